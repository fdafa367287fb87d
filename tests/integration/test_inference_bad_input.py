"""What a user can get wrong: each has its message, exit status 2, and is found before weights are loaded."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.config import run_main
from opensora.utils.video import save_video
from tests.helpers.cli import files, write_csv


def write_inputs(folder: Path) -> dict[str, str]:
    """Files with something wrong in them, by name."""
    text = folder / "notes.txt"
    text.write_text("not a picture")
    clip = save_video(np.zeros((5, 32, 32, 3), np.uint8), folder / "short.mp4", 8)
    broken = folder / "broken.mp4"
    broken.write_bytes(b"not a clip")
    tables = {
        "short_ref": [{"text": "a", "ref": str(clip)}],
        "no_text": [{"prompt": "a"}],
        "empty_text": [{"text": "a"}, {"text": " "}],
        "bad_ref": [{"text": "a", "ref": ""}, {"text": "b", "ref": "gone.png"}],
        "bad_seed": [{"text": "a", "seed": "x"}],
        "bad_cond": [{"text": "a", "cond_type": "i2v"}],
        "same_name": [{"text": "a", "name": "n"}, {"text": "b", "name": "n"}],
    }
    paths = {name: write_csv(str(folder / f"{name}.csv"), *rows) for name, rows in tables.items()}
    return {**paths, "text": str(text), "clip": str(clip), "broken": str(broken)}


def bad_lines(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Words of a command line, and what its message must match, by case."""
    paths = write_inputs(tmp_path)
    prompt = ["--prompt", "a"]

    def from_table(name: str, *more: str) -> list[str]:
        return ["--dataset.data-path", paths[name], *more]

    return {
        "unknown flag": ([*prompt, "--num-step", "3"], "--num-step.*num_steps"),
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
        "rows": (from_table("bad_seed", "--start-index", "9"), "no rows from start_index=9"),
        "no picture": (
            [*prompt, "--cond_type", "i2v_head", "--ref", "gone.png"],
            r"--ref: image not found: gone\.png",
        ),
        "no clip": ([*prompt, "--cond_type", "v2v_head", "--num_frames", "65", "--ref", "gone.mp4"], r"gone\.mp4"),
        "damaged clip": (
            [*prompt, "--cond_type", "i2v_head", "--ref", paths["broken"]],
            r"not a readable video: .*broken\.mp4",
        ),
        "row's short clip": (
            from_table("short_ref", "--cond_type", "v2v_head", "--num_frames", "65"),
            r"short_ref\.csv, row 2: reference too short: .*short\.mp4 has 5 frames, v2v_head needs 33",
        ),
        "bool": ([*prompt, "--offload", "maybe"], "--offload maybe: expected"),
        "no lora": ([*prompt, "--pretrained-lora-path", "gone"], r"pretrained_lora_path gone: no adapter there"),
        "damaged weights": ([*prompt, "--model.from_pretrained", paths["text"]], r"notes\.txt"),
        "not a picture": ([*prompt, "--cond_type", "i2v_head", "--ref", paths["text"]], "not a readable image"),
        "short clip": (
            [*prompt, "--cond_type", "v2v_head", "--num_frames", "65", "--ref", paths["clip"]],
            r"--ref: reference too short: .*short\.mp4 has 5 frames, v2v_head needs 33",
        ),
        "no weights": (
            [*prompt, "--model.from_pretrained", "./ckpts/Open_Sora_v2.safetensors"],
            "hf download hpcai-tech/Open-Sora-v2",
        ),
        "no encoder": ([*prompt, "--t5.from_pretrained", "./ckpts/google/t5-v1_1-xxl"], "hf download"),
        "channels": ([*prompt, "--model.in_channels", "64"], "does not fit the autoencoder"),
        "save dir": ([*prompt, "--save-dir", paths["text"]], "is a file, not a folder"),
        "motion": ([*prompt, "--motion-score", "lots"], "neither a number"),
        "much motion": ([*prompt, "--motion-score", "99"], "motion_score 99 must be"),
        "nothing of a picture": ([*prompt, "--cond_type", "i2v_head", "--ref", ";"], "--ref: ref ';' names no file"),
        "batch": ([*prompt, "--batch-size", "0"], "batch_size=0"),
    }


BAD = (
    *("unknown flag", "no value", "wrong type", "frames", "ratio", "resolution", "no prompt", "empty prompt"),
    *("no table", "no text", "empty text", "row's ref", "row's seed", "row's condition", "same name", "rows"),
    *("no picture", "no clip", "damaged clip", "row's short clip", "bool", "no lora", "damaged weights"),
    *("not a picture", "short clip", "no weights", "no encoder", "channels", "save dir", "motion", "batch"),
    *("much motion", "nothing of a picture"),
)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weight fails the test."""

    def fail(*arguments):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("opensora.diffusion.loading.build_ready", fail)


@pytest.fixture
def refused(inference_main, tiny_config_file, tmp_path, monkeypatch, no_weights, capsys):
    """Run a command line in an empty folder that must be refused with exit status 2; returns the message."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def refused(*words: str, config: Path = tiny_config_file) -> str:
        with pytest.raises(SystemExit) as caught:
            run_main(lambda argv: inference_main([str(config), *words]))
        assert caught.value.code == 2
        assert files(work) == [], "nothing is left behind"
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_weights(refused, tmp_path, case):
    words, message = bad_lines(tmp_path)[case]
    answer = refused(*words)
    assert re.search(f"(?s)error: .*(?:{message})", answer), answer


def test_missing_config(refused, tiny_config_file):
    answer = refused("--prompt", "a", config=tiny_config_file.with_name("tinny.py"))
    assert re.search(r"tinny\.py does not exist; did you mean .*/tiny\.py\?", answer)


def test_folder_without_permission(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    answer = refused("--prompt", "a", "--save-dir", "sealed")
    assert "save_dir sealed: no permission to write in" in answer


def test_no_key_for_a_language_model(refused, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for words in (["--motion-score", "dynamic"], ["--refine-prompt", "True"]):
        answer = refused("--prompt", "a", *words)
        assert "set OPENAI_API_KEY, or give --refine-base-url" in answer


def test_no_gpu(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = refused("--prompt", "a", "--device", "cuda")
    assert "found 0 GPUs; use --device cpu" in asked
    monkeypatch.setattr("opensora.models.build.MAX_CPU_PARAMETERS", 1000)
    needed = refused("--prompt", "a", "--device", "none")
    assert re.search(r"no GPU found.*demo/.*--device cpu", needed)


def test_every_case_is_listed(tmp_path):
    assert sorted(BAD) == sorted(bad_lines(tmp_path))
