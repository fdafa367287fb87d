"""Stands in for VBench-I2V, which looks for its pictures below the working folder."""

import json
from pathlib import Path

from vbench import VBench


class VBenchI2V(VBench):
    def evaluate(self, videos_path, name, dimension_list=None, resolution="1-1", **options):
        for entry in json.loads(Path(self.full_info_dir).read_text()):
            assert Path(f"vbench2_beta_i2v/data/crop/{resolution}", entry["image_name"]).is_file()
        super().evaluate(videos_path, name, dimension_list=dimension_list, **options)
