"""Stands in for VBench: its interface and its files, with scores that are made up from the names of the videos."""

import json
import os
from pathlib import Path


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path
        Path(output_path).mkdir(exist_ok=True)

    def build_full_info_json(self, videos_path, name, dimension_list):
        """As VBench does: five videos of each prompt, with the ending of whichever file is listed first."""
        names, found = [path.name for path in Path(videos_path).iterdir()], []
        ending = Path(names[0]).suffix
        for entry in json.loads(Path(self.full_info_dir).read_text()):
            if set(dimension_list) & set(entry["dimension"]):
                wanted = [f"{entry['prompt_en']}-{i}{ending}" for i in range(5)]
                entry["video_list"] = [f"{videos_path}/{file}" for file in wanted if file in names]
                found.append(entry)
        path = f"{self.output_path}/{name}_full_info.json"
        Path(path).write_text(json.dumps(found))
        return path

    def evaluate(
        self, videos_path, name, prompt_list=(), dimension_list=None, local=False, read_frame=False, mode="x", **options
    ):
        assert local
        assert mode == "vbench_standard"
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert options["imaging_quality_preprocessing_mode"] == "longer"
        assert Path(os.environ["VBENCH_CACHE_DIR"]).is_dir()
        if "scene" in dimension_list and os.environ.get("STANDIN_FAILS"):
            raise NotImplementedError("UnImplemented dimension scene!")
        info = json.loads(Path(self.build_full_info_json(videos_path, name, dimension_list)).read_text())
        results = {}
        for dimension in dimension_list:
            videos = [path for entry in info if dimension in entry["dimension"] for path in entry["video_list"]]
            scored = [{"video_path": path, "video_results": len(Path(path).name) / 100} for path in videos]
            results[dimension] = [sum(row["video_results"] for row in scored) / len(scored), scored]
        Path(self.output_path, f"{name}_eval_results.json").write_text(json.dumps(results))
