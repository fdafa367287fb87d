"""scripts/diffusion/inference.py as users call it, on tiny random models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from opensora.utils.errors import UserError
from opensora.utils.video import read_image, read_video, save_image
from tests.helpers.cli import DECODE, INFERENCE, load_main, write_csv


def latents(path: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")


def test_prompt_to_video(run_tiny):
    made = run_tiny("--prompt", 'a "red" circle, moving', "--save-dir", "out", "--sampling_option.seed=42")
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
    assert len(record["weights"]["t5"]["sha256"]) == 64
    assert record["weights"]["model"] == {"path": "random weights of seed 1"}
    assert set(record["seconds"]) == {"text", "references", "denoise", "decode"}
    assert "torch" in record["versions"]


def test_image_to_video_and_repetitions(run_tiny):
    save_image(np.full((32, 32, 3), 200, np.uint8), "ref.png")
    made = run_tiny(
        *("--prompt", "a", "--ref", "ref.png", "--cond_type", "i2v_head", "--motion-score", "4"),
        *("--num-sample", "2", "--sampling_option.seed", "0", "--save-latents", "True"),
    )
    assert "samples/video_32px/prompt_0000.mp4" in made
    assert "samples/video_32px/prompt_0000_1.mp4" in made
    assert Path("samples/video_32px/prompt_0000.txt").read_text() == "a. 8 FPS. 4 motion score."
    first, second = (latents(f"samples/video_32px/prompt_0000{end}.latents.safetensors") for end in ("", "_1"))
    assert not torch.allclose(first, second), "seed 0 is a seed like any other: the repetition has seed 1"


def test_kept_latents_can_be_decoded_alone(run_tiny, tiny_config_file):
    run_tiny("--prompt", "a", "--save-latents", "True", "--num_steps", "1", "--fps-save", "12")
    video, kept = (Path(f"samples/video_32px/prompt_0000{end}") for end in (".mp4", ".latents.safetensors"))
    before = read_video(video)[0]
    video.unlink()
    decode = load_main(DECODE)
    assert decode([str(tiny_config_file), str(kept)]) == [video]
    after, fps = read_video(video)
    assert (after.shape, fps) == (before.shape, 12)
    with pytest.raises(UserError, match="prompt_0000 is there already: --skip-existing True"):
        decode([str(tiny_config_file), str(kept)])
    assert decode([str(tiny_config_file), str(kept), "--skip-existing", "True"]) == []
    assert decode([str(tiny_config_file), str(kept), "--overwrite", "True"]) == [video]
    with pytest.raises(UserError, match="latents not found: gone"):
        decode([str(tiny_config_file), "gone.latents.safetensors"])
    with pytest.raises(UserError, match="no latents given"):
        decode([str(tiny_config_file)])


def test_latents_outlive_a_failed_decode(run_tiny, monkeypatch):
    def fail(self, z):
        raise torch.OutOfMemoryError("out of memory")

    lost = r"decode\.py .*tiny\.py samples/video_32px/prompt_0000\.latents\.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("opensora.models.hunyuan_vae.autoencoder.AutoencoderKLCausal3D.decode", fail)
        with pytest.raises(UserError, match=lost):
            run_tiny("--prompt", "a", "--num_steps", "1")
    assert Path("samples/video_32px/prompt_0000.latents.safetensors").is_file()
    record = json.loads(Path("samples/video_32px/prompt_0000.json").read_text())
    assert (record["prompt"], record["frames"]) == ("a", [9, 32, 32, 3])
    run_tiny("--prompt", "b", "--num_steps", "1")
    assert json.loads(Path("samples/video_32px/prompt_0001.json").read_text())["prompt"] == "b"


def test_refined_prompt(run_tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr("opensora.generation.refine.ApiModel.__call__", lambda self, *question: "A grey cat walks.")
    run_tiny("--prompt", "a cat", "--refine-prompt", "True", "--num_steps", "1")
    assert Path("samples/video_32px/prompt_0000.txt").read_text() == "A grey cat walks. 8 FPS."
    assert json.loads(Path("samples/video_32px/prompt_0000.json").read_text())["prompt"] == "a cat"


def test_parallel_plugin(run_tiny, monkeypatch):
    run_tiny("--prompt", "a", "--plugin", "hybrid", "--num_steps", "1", "--num_frames", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sizes = ("--plugin_config.sp_size", "2", "--plugin_config.sequence_parallelism_mode", "ring")
    with pytest.raises(UserError, match="ring_attn"):
        run_tiny("--prompt", "a", "--plugin", "hybrid", *sizes)


def test_plugins_of_training_are_taken_without_effect(run_tiny, capsys):
    """As in the original, whose default is zero2 and where only hybrid does something."""
    assert run_tiny("--prompt", "a", "--plugin", "zero2", "--plugin_config.sp_size", "2", "--dry-run", "True") == []
    assert "plugin=zero2 has no effect" in capsys.readouterr().err
    with pytest.raises(UserError, match="plugin_ae: plugin='zero9' is unknown; valid: zero1, zero2, hybrid"):
        run_tiny("--prompt", "a", "--plugin_ae", "zero9")


def test_single_frame_is_a_png(run_tiny):
    run_tiny("--prompt", "a", "--num_frames", "1", "--num_steps", "1")
    assert read_image("samples/image_32px/prompt_0000.png").shape == (32, 32, 3)


def test_table_of_prompts(run_tiny):
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
    run_tiny(*arguments, "--save-latents", "True", "--batch-size", "2", "--num_steps", "2")
    folder = Path("samples/video_32px")
    assert sorted(path.name for path in folder.glob("*.mp4")) == ["x-first.mp4", "x-list_0002.mp4", "x-list_0003.mp4"]
    assert (folder / "x-first.txt").read_text() == "a, b. 24 FPS. 2 motion score."
    assert (folder / "x-list_0002.txt").read_text() == "none. 8 FPS."
    assert read_video(folder / "x-first.mp4")[1] == 24
    record = json.loads((folder / "x-list_0003.json").read_text())
    assert (record["cond_type"], record["negative_prompt"], record["forwards"]) == ("i2v_head", "bad", 6)
    batched = {path.name: latents(str(path)) for path in folder.glob("*.safetensors")}

    run_tiny(*arguments, "--save-latents", "True", "--save-dir", "alone", "--num_steps", "2")
    for name, value in batched.items():
        alone = latents(f"alone/video_32px/{name}")
        torch.testing.assert_close(alone, value, rtol=0, atol=1e-4, msg=f"{name} depends on its batch")


def test_skip_existing(run_tiny):
    table = write_csv("list.csv", *({"text": text} for text in "ab"))
    arguments = ("--dataset.data-path", table, "--num_steps", "1")
    run_tiny(*arguments)
    kept, lost = Path("samples/video_32px/list_0000.mp4"), Path("samples/video_32px/list_0001.mp4")
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    run_tiny(*arguments, "--skip-existing", "True")
    assert lost.exists()
    assert kept.stat().st_mtime_ns == stamp
    other = write_csv("list.csv", *({"text": text} for text in "xb"))
    with pytest.raises(UserError, match="row 2: .*list_0000 holds another prompt, 'a'.*--overwrite True"):
        run_tiny("--dataset.data-path", other, "--skip-existing", "True")


def test_nothing_is_replaced_unasked(run_tiny):
    """A table stops before it starts; a prompt takes the next number; --overwrite True replaces."""
    table = write_csv("list.csv", {"text": "a"}, {"text": "b"})
    arguments = ("--dataset.data-path", table, "--num_steps", "1")
    run_tiny(*arguments)
    first = Path("samples/video_32px/list_0000.mp4")
    stamp = first.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"list_0000 is there already \(and 1 more\): --skip-existing True"):
        run_tiny(*arguments)
    assert first.stat().st_mtime_ns == stamp
    run_tiny(*arguments, "--overwrite", "True")
    assert first.stat().st_mtime_ns > stamp


def test_prompts_are_numbered_on(run_tiny):
    single = ("--num_steps", "1", "--num_frames", "1", "--sampling_option.seed", "3")

    def pictures() -> list[str]:
        return sorted(path.name for path in Path("samples/image_32px").glob("*.png"))

    run_tiny("--prompt", "a", *single)
    run_tiny("--prompt", "b", *single, "--num-sample", "2")
    assert pictures() == ["prompt_0000.png", "prompt_0001.png", "prompt_0001_1.png"]
    assert Path("samples/image_32px/prompt_0000.txt").read_text() == "a. 8 FPS."
    run_tiny("--prompt", "b", *single, "--num-sample", "3", "--skip-existing", "True")
    assert pictures() == ["prompt_0000.png", "prompt_0001.png", "prompt_0001_1.png", "prompt_0001_2.png"]
    run_tiny("--prompt", "c", *single, "--overwrite", "True")
    assert Path("samples/image_32px/prompt_0000.txt").read_text() == "c. 8 FPS."


def test_prompt_as_path(run_tiny):
    made = run_tiny("--prompt", "A dog / a cat.", "--prompt-as-path", "True", "--num-sample", "2", "--num_steps", "1")
    names = [Path(name).name for name in made if name.endswith(".mp4")]
    assert names == ["A dog _ a cat-0.mp4", "A dog _ a cat-1.mp4"]


def test_dry_run_loads_and_writes_nothing(run_tiny, monkeypatch, capsys):
    monkeypatch.setattr("opensora.diffusion.loading.build_ready", None)
    assert run_tiny("--prompt", "a", "--dry-run", "True", "--num-sample", "2") == []
    out = capsys.readouterr().out
    with pytest.raises(UserError, match="hf download"):
        run_tiny("--prompt", "a", "--dry-run", "True", "--model.from_pretrained", "./ckpts/Open_Sora_v2.safetensors")
    assert "9 frames" in capsys.readouterr().out, "the plan comes before what is missing"
    for part in ("9 frames of 32 x 32", "tokens       12 image", "8 forwards", "TFLOP", "prompt_0000_1.mp4"):
        assert part in out


def planned_and_made(run_tiny, capsys, *words):
    """The line of a dry run that has the forwards, and the record of the video."""
    run_tiny("--prompt", "a", "--dry-run", "True", *words)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("steps"))
    run_tiny("--prompt", "a", *words)
    return line, json.loads(Path("samples/video_32px/prompt_0000.json").read_text())


def test_a_dry_run_knows_that_there_is_no_reference(run_tiny, capsys):
    line, record = planned_and_made(run_tiny, capsys, "--cond_type", "i2v_head")
    assert "4 by euler, 8 forwards per sample" in line
    assert record["forwards"] == 8


def test_a_dry_run_knows_the_rows_of_a_table(run_tiny, tmp_path, capsys):
    picture = save_image(np.full((32, 32, 3), 90, np.uint8), tmp_path / "picture.png")
    table = write_csv("list.csv", {"text": "a", "ref": ""}, {"text": "b", "ref": str(picture)})
    run_tiny("--dataset.data-path", table, "--cond_type", "i2v_head", "--dry-run", "True")
    out = capsys.readouterr().out
    assert "(height x width), i2v_head or t2v" in out
    assert "12 or 8 forwards per sample" in out


def test_solver_is_planned_made_and_recorded(run_tiny, capsys):
    line, record = planned_and_made(run_tiny, capsys, "--sampling_option.solver", "heun")
    assert "4 by heun, 14 forwards per sample" in line
    assert (record["forwards"], record["config"]["sampling_option"]["solver"]) == (14, "heun")
    with pytest.raises(UserError, match="--sampling_option.solver hein: expected one of euler, heun"):
        run_tiny("--prompt", "a", "--sampling_option.solver", "hein")


def test_step_cache_is_planned_made_and_recorded(run_tiny, capsys):
    line, record = planned_and_made(run_tiny, capsys, "--step-cache", "5")
    assert "4 by euler, at most 8 forwards per sample" in line
    assert record["step_cache"] == {"kind": "first_block", "approximate": True, "threshold": 5.0, "reused": 0.5}
    assert "step cache first_block (threshold 5): approximate" in capsys.readouterr().err
    run_tiny("--prompt", "a", "--step-cache", "0")
    assert "step_cache" not in json.loads(Path("samples/video_32px/prompt_0001.json").read_text())


def test_a_distilled_model_needs_one_forward_a_step(run_tiny, capsys):
    words = ("--sampling_option.method", "distill")
    line, record = planned_and_made(run_tiny, capsys, *words, "--model.guidance_embed", "True")
    assert "4 by euler, 4 forwards per sample" in line
    assert record["forwards"] == 4
    assert "guidance_embed" not in capsys.readouterr().err
    run_tiny("--prompt", "a", "--dry-run", "True", *words)
    assert "no guidance_embed" in capsys.readouterr().err
    with pytest.raises(UserError, match="method distill.*from text alone.*i2v_head"):
        run_tiny("--prompt", "a", *words, "--cond_type", "i2v_head")


def test_picture_by_address(run_tiny, tmp_path, monkeypatch):
    picture = save_image(np.full((32, 32, 3), 90, np.uint8), tmp_path / "served.png")
    monkeypatch.setattr("opensora.diffusion.references.fetch", lambda url, folder, name: picture)
    run_tiny("--prompt", "a", "--ref", "https://example.org/a.png", "--cond_type", "i2v_head", "--num_steps", "1")
    record = json.loads(Path("samples/video_32px/prompt_0000.json").read_text())
    assert (record["cond_type"], record["references"]) == ("i2v_head", "https://example.org/a.png")


def test_as_a_program(tmp_path):
    """With a mistake; a video is made by programs in `test_two_at_once`."""
    command = [sys.executable, str(INFERENCE), "gone.py"]
    bad = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: config file gone.py does not exist")


def test_picture_first_then_video(run_tiny, tiny_config):
    flux = {**tiny_config["model"], "cond_embed": False, "guidance_embed": True, "fused_qkv": True}
    flux |= {"use_liger_rope": False, "from_pretrained": None}
    picture_ae = {"type": "autoencoder_2d", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
    table = write_csv("list.csv", {"text": "a", "name": "first"}, {"text": "b", "name": "second"})
    made = run_tiny(
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
