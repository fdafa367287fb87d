"""scripts/diffusion/inference.py as users call it, on tiny random models."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.video import read_image, read_video, save_image, save_video

SCRIPT = Path(__file__).parents[2] / "scripts" / "diffusion" / "inference.py"


def load_main(script: Path):
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def main():
    return load_main(SCRIPT)


@pytest.fixture
def run(main, tiny_config_file, tmp_path, monkeypatch):
    """Run one command line in an empty folder; returns the paths of the files it left there."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str) -> list[str]:
        main([str(tiny_config_file), *map(str, words)])
        return files(work)

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_csv(name: str, *rows: dict[str, str]) -> str:
    with Path(name).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def latents(path: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")


def test_prompt_to_video(run):
    made = run("--prompt", 'a "red" circle, moving', "--save-dir", "out", "--sampling_option.seed=42")
    base = "out/video_32px/prompt_0000"
    assert [name for name in made if "." in Path(name).name] == [f"{base}.json", f"{base}.mp4", f"{base}.txt"]
    frames, fps = read_video(f"{base}.mp4")
    assert frames.shape == (9, 32, 32, 3)
    assert fps == 8
    assert Path(f"{base}.txt").read_text() == 'a "red" circle, moving. 8 FPS.'
    record = json.loads(Path(f"{base}.json").read_text())
    assert record["seed"] == 42
    assert record["forwards"] == 8
    assert record["config"]["sampling_option"]["num_steps"] == 4
    assert len(record["weights"]["t5"]["header_sha256"]) == 64
    assert set(record["seconds"]) == {"text", "references", "denoise", "decode"}
    assert "torch" in record["versions"]


def test_image_to_video_and_repetitions(run):
    save_image(np.full((32, 32, 3), 200, np.uint8), "ref.png")
    made = run(
        *("--prompt", "a", "--ref", "ref.png", "--cond_type", "i2v_head", "--motion-score", "4"),
        *("--num-sample", "2", "--sampling_option.seed", "0", "--save-latents", "True"),
    )
    assert "samples/video_32px/prompt_0000.mp4" in made
    assert "samples/video_32px/prompt_0000_1.mp4" in made
    assert Path("samples/video_32px/prompt_0000.txt").read_text() == "a. 8 FPS. 4 motion score."
    first, second = (latents(f"samples/video_32px/prompt_0000{end}.latents.safetensors") for end in ("", "_1"))
    assert not torch.allclose(first, second), "seed 0 is a seed like any other: the repetition has seed 1"


def test_kept_latents_can_be_decoded_alone(run, tiny_config_file):
    run("--prompt", "a", "--save-latents", "True", "--num_steps", "1", "--fps-save", "12")
    video, kept = (Path(f"samples/video_32px/prompt_0000{end}") for end in (".mp4", ".latents.safetensors"))
    before = read_video(video)[0]
    video.unlink()
    decode = load_main(SCRIPT.with_name("decode.py"))
    assert decode([str(tiny_config_file), str(kept)]) == [video]
    after, fps = read_video(video)
    assert (after.shape, fps) == (before.shape, 12)
    with pytest.raises(UserError, match="latents not found: gone"):
        decode([str(tiny_config_file), "gone.latents.safetensors"])
    with pytest.raises(UserError, match="no latents given"):
        decode([str(tiny_config_file)])


def test_latents_outlive_a_failed_decode(run, monkeypatch):
    def fail(self, z):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("opensora.models.hunyuan_vae.autoencoder.AutoencoderKLCausal3D.decode", fail)
    with pytest.raises(UserError, match=r"decode\.py .*tiny\.py samples/video_32px/prompt_0000\.latents\.safetensors"):
        run("--prompt", "a", "--num_steps", "1")
    assert Path("samples/video_32px/prompt_0000.latents.safetensors").is_file()


def test_refined_prompt(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr("opensora.diffusion.refine.ApiModel.__call__", lambda self, *question: "A grey cat walks.")
    run("--prompt", "a cat", "--refine-prompt", "True", "--num_steps", "1")
    assert Path("samples/video_32px/prompt_0000.txt").read_text() == "A grey cat walks. 8 FPS."
    assert json.loads(Path("samples/video_32px/prompt_0000.json").read_text())["prompt"] == "a cat"


def test_refining_needs_a_key(run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("opensora.diffusion.building.build_ready", None)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        run("--prompt", "a cat", "--motion-score", "dynamic")
    assert files(Path()) == []


def test_parallel_plugin(run, monkeypatch):
    run("--prompt", "a", "--plugin", "hybrid", "--num_steps", "1", "--num_frames", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--plugin none"):
        run("--prompt", "a", "--plugin", "hybrid")


def test_single_frame_is_a_png(run):
    run("--prompt", "a", "--num_frames", "1", "--num_steps", "1")
    assert read_image("samples/image_32px/prompt_0000.png").shape == (32, 32, 3)


def test_table_of_prompts(run):
    save_image(np.full((32, 32, 3), 200, np.uint8), "ref.png")
    blank = {"ref": "", "neg": "", "name": "", "fps": "", "seed": "", "motion_score": "", "cond_type": ""}
    table = write_csv(
        "list.csv",
        {**blank, "text": "skipped"},
        {**blank, "text": "a, b", "name": "first", "seed": "5", "fps": "24", "motion_score": "2"},
        {**blank, "text": "none"},
        {**blank, "text": "c", "ref": "ref.png", "cond_type": "i2v_head", "neg": "bad"},
        {**blank, "text": "skipped too"},
    )
    arguments = ("--dataset.data-path", table, "--start-index", "1", "--end-index", "4", "--save-prefix", "x-")
    run(*arguments, "--save-latents", "True", "--batch-size", "2", "--num_steps", "2")
    folder = Path("samples/video_32px")
    assert sorted(path.name for path in folder.glob("*.mp4")) == ["x-first.mp4", "x-list_0002.mp4", "x-list_0003.mp4"]
    assert (folder / "x-first.txt").read_text() == "a, b. 24 FPS. 2 motion score."
    assert (folder / "x-list_0002.txt").read_text() == "none. 8 FPS."
    assert read_video(folder / "x-first.mp4")[1] == 24
    record = json.loads((folder / "x-list_0003.json").read_text())
    assert (record["cond_type"], record["negative_prompt"], record["forwards"]) == ("i2v_head", "bad", 6)
    batched = {path.name: latents(str(path)) for path in folder.glob("*.safetensors")}

    run(*arguments, "--save-latents", "True", "--save-dir", "alone", "--num_steps", "2")
    for name, value in batched.items():
        alone = latents(f"alone/video_32px/{name}")
        torch.testing.assert_close(alone, value, rtol=0, atol=1e-4, msg=f"{name} depends on its batch")


def test_ranks_share_the_prompts(run, monkeypatch):
    table = write_csv("list.csv", *({"text": text} for text in "abc"))
    arguments = ("--dataset.data-path", table, "--num_steps", "1")
    made = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        before = set(made)
        made = [name for name in run(*arguments) if name.endswith(".mp4")]
        assert len(set(made) - before) == (2 if rank == 0 else 1)
    assert [Path(name).name for name in made] == ["list_0000.mp4", "list_0001.mp4", "list_0002.mp4"]


def test_skip_existing(run):
    table = write_csv("list.csv", *({"text": text} for text in "ab"))
    arguments = ("--dataset.data-path", table, "--num_steps", "1")
    run(*arguments)
    kept, lost = Path("samples/video_32px/list_0000.mp4"), Path("samples/video_32px/list_0001.mp4")
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    run(*arguments, "--skip-existing", "True")
    assert lost.exists()
    assert kept.stat().st_mtime_ns == stamp


def test_prompt_as_path(run):
    made = run("--prompt", "A dog / a cat.", "--prompt-as-path", "True", "--num-sample", "2", "--num_steps", "1")
    names = [Path(name).name for name in made if name.endswith(".mp4")]
    assert names == ["A dog _ a cat-0.mp4", "A dog _ a cat-1.mp4"]


def test_dry_run_loads_and_writes_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr("opensora.diffusion.building.build_ready", None)
    assert run("--prompt", "a", "--dry-run", "True", "--num-sample", "2") == []
    out = capsys.readouterr().out
    with pytest.raises(UserError, match="hf download"):
        run("--prompt", "a", "--dry-run", "True", "--model.from_pretrained", "./ckpts/Open_Sora_v2.safetensors")
    assert "9 frames" in capsys.readouterr().out, "the plan comes before what is missing"
    for part in ("9 frames of 32 x 32", "tokens       12 image", "8 forwards", "TFLOP", "prompt_0000_1.mp4"):
        assert part in out


def test_picture_by_address(run, tmp_path, monkeypatch):
    picture = save_image(np.full((32, 32, 3), 90, np.uint8), tmp_path / "served.png")
    monkeypatch.setattr("opensora.diffusion.references.fetch", lambda url, folder, name: picture)
    run("--prompt", "a", "--ref", "https://example.org/a.png", "--cond_type", "i2v_head", "--num_steps", "1")
    record = json.loads(Path("samples/video_32px/prompt_0000.json").read_text())
    assert (record["cond_type"], record["references"]) == ("i2v_head", "https://example.org/a.png")


def bad_lines(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")
    clip = save_video(np.zeros((5, 32, 32, 3), np.uint8), tmp_path / "short.mp4", 8)
    tables = {
        "no_text": [{"prompt": "a"}],
        "empty_text": [{"text": "a"}, {"text": " "}],
        "bad_ref": [{"text": "a", "ref": ""}, {"text": "b", "ref": "gone.png"}],
        "bad_seed": [{"text": "a", "seed": "x"}],
        "bad_cond": [{"text": "a", "cond_type": "i2v"}],
        "same_name": [{"text": "a", "name": "n"}, {"text": "b", "name": "n"}],
    }
    paths = {name: write_csv(str(tmp_path / f"{name}.csv"), *rows) for name, rows in tables.items()}
    prompt = ["--prompt", "a"]

    def from_table(name: str, *more: str) -> list[str]:
        return ["--dataset.data-path", paths[name], *more]

    return {
        "unknown flag": ([*prompt, "--num-step", "3"], "num_steps"),
        "no value": ([*prompt, "--seed"], "--seed needs a value"),
        "wrong type": ([*prompt, "--num_steps", "many"], "integer"),
        "frames": ([*prompt, "--num_frames", "18"], r"num_frames=18: .*nearest is 17 \(or 21\)"),
        "ratio": ([*prompt, "--aspect_ratio", "7:3"], "unknown aspect_ratio '7:3'.*16:9"),
        "resolution": ([*prompt, "--resolution", "large"], "unknown resolution 'large'; valid: .*256px"),
        "no prompt": ([], "give --prompt"),
        "empty prompt": (["--prompt", " "], "--prompt is empty"),
        "no table": (["--dataset.data-path", "gone.csv"], r"gone\.csv: no such file"),
        "no text": (from_table("no_text"), "missing column 'text'.*found prompt"),
        "empty text": (from_table("empty_text"), r"empty_text\.csv, row 3: column 'text' is empty"),
        "row's ref": (from_table("bad_ref", "--cond_type", "i2v_head"), r"row 3: image not found: gone\.png"),
        "row's seed": (from_table("bad_seed"), "row 2: seed 'x' is not a number"),
        "row's condition": (from_table("bad_cond"), "row 2: unknown cond_type 'i2v'; valid: t2v, i2v_head"),
        "same name": (from_table("same_name"), "row 3: has the same name 'n'.*row 2"),
        "rows": (from_table("no_text", "--start-index", "9"), "missing column|no rows"),
        "not a picture": ([*prompt, "--cond_type", "i2v_head", "--ref", str(text)], "not a readable image"),
        "short clip": (
            [*prompt, "--cond_type", "v2v_head", "--num_frames", "65", "--ref", str(clip)],
            r"--prompt: reference too short: .*short\.mp4 has 5 frames, v2v_head needs 33",
        ),
        "no weights": (
            [*prompt, "--model.from_pretrained", "./ckpts/Open_Sora_v2.safetensors"],
            "hf download hpcai-tech/Open-Sora-v2",
        ),
        "no encoder": ([*prompt, "--t5.from_pretrained", "./ckpts/google/t5-v1_1-xxl"], "hf download"),
        "channels": ([*prompt, "--model.in_channels", "64"], "does not fit the autoencoder"),
        "save dir": ([*prompt, "--save-dir", str(text)], "is a file, not a folder"),
        "motion": ([*prompt, "--motion-score", "lots"], "neither a number"),
        "batch": ([*prompt, "--batch-size", "0"], "batch_size=0"),
    }


BAD = (
    *("unknown flag", "no value", "wrong type", "frames", "ratio", "resolution", "no prompt", "empty prompt"),
    *("no table", "no text", "empty text", "row's ref", "row's seed", "row's condition", "same name", "rows"),
    *("not a picture", "short clip", "no weights", "no encoder", "channels", "save dir", "motion", "batch"),
)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_weights(run, tmp_path, monkeypatch, case):
    words, message = bad_lines(tmp_path)[case]
    monkeypatch.setattr("opensora.diffusion.building.build_ready", None)
    with pytest.raises(UserError, match=message):
        run(*words)
    assert files(Path()) == [], "nothing is left behind"


def test_every_case_is_listed(tmp_path):
    assert sorted(BAD) == sorted(bad_lines(tmp_path))


def test_gpu_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="found 0 GPUs; use --device cpu"):
        run("--prompt", "a", "--device", "cuda")


def test_model_too_large_for_a_cpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("opensora.diffusion.building.MAX_CPU_PARAMETERS", 1000)
    with pytest.raises(UserError, match=r"no GPU found.*demo\.py.*--device cpu"):
        run("--prompt", "a", "--device", "none")
    run("--prompt", "a", "--num_steps", "1", "--num_frames", "1")


def test_status_of_a_mistake(capsys):
    def fail(argv):
        raise UserError("no such thing")

    with pytest.raises(SystemExit) as caught:
        run_main(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_as_a_program(tiny_config_file, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tiny_config_file)]
    good = subprocess.run(
        [*command, "--prompt", "a cat", "--num_steps", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert good.returncode == 0, good.stderr
    assert "saved samples/video_32px/prompt_0000.mp4" in good.stdout
    bad = subprocess.run([*command[:2], "gone.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: config file gone.py does not exist")


def test_picture_first_then_video(run, tiny_config):
    pytest.importorskip("opensora.models.vae.autoencoder_2d")
    flux = {**tiny_config["model"], "cond_embed": False, "guidance_embed": True, "fused_qkv": True}
    flux |= {"use_liger_rope": False, "from_pretrained": None}
    picture_ae = {"type": "autoencoder_2d", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
    table = write_csv("list.csv", {"text": "a", "name": "first"}, {"text": "b", "name": "second"})
    made = run(
        *("--use-t2i2v", "True", "--img-flux", repr(flux), "--img-flux-ae", repr(picture_ae)),
        *("--img-resolution", "64px", "--num_steps", "2", "--dataset.data-path", table, "--offload", "True"),
    )
    folder = "samples/video_32px"
    assert [name for name in made if name.endswith(".mp4")] == [f"{folder}/first.mp4", f"{folder}/second.mp4"]
    assert read_image(f"{folder}/generated_condition/first.png").shape == (64, 64, 3)
    assert Path(f"{folder}/generated_condition/second.txt").read_text() == "b", "no suffix: a picture has no rate"
    record = json.loads(Path(f"{folder}/first.json").read_text())
    assert record["cond_type"] == "i2v_head"
    assert "image" in record["seconds"]
