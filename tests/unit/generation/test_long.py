"""The command on videos longer than the model's window."""

from pathlib import Path

import pytest
import torch

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.generation import decode_files
from opensora.generation.requests import read_requests
from opensora.utils.errors import UserError
from opensora.utils.video import read_video

LONG = ("--prompt", "a red circle", "--window", "9", "--num_frames", "25", "--num_steps", "1")


def video(folder: str) -> bytes:
    return Path(folder, "video_32px", "prompt_0000.mp4").read_bytes()


def test_killed_and_run_again_it_is_the_same_file(run_tiny, monkeypatch):
    whole = run_tiny(*LONG, "--save-dir", "whole")
    assert not [path for path in whole if ".windows" in path], "nothing is left of a run that ended"
    go_on, calls = VideoPipeline.go_on, []

    def killed(self, *arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return go_on(self, *arguments)

    monkeypatch.setattr(VideoPipeline, "go_on", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_tiny(*LONG, "--save-dir", "killed")
    kept = [path.name for path in Path("killed", "video_32px").iterdir() if path.name.endswith(".windows")]
    assert [name[:13] for name in kept] == [".prompt_0000."], "two windows are kept"
    calls.clear()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_tiny(*LONG, "--save-dir", "killed", "--sampling_option.seed", "5")
    assert len(calls) == 2, "another seed begins anew"
    run_tiny(*LONG, "--save-dir", "killed")
    assert len(calls) == 3, "only the third window was left"
    assert video("killed") == video("whole")
    assert not [*Path("killed", "video_32px").glob(".*.windows")]


def test_kept_latents_are_decoded_as_they_were(run_tiny, tiny_config, monkeypatch):
    run_tiny(*LONG, "--save-latents", "True")
    cfg, seen = load_config(tiny_config, InferenceOptions, {"overwrite": True}), []
    decode = decode_files.decode_keeping
    monkeypatch.setattr(decode_files, "decode_keeping", lambda *given: seen.append(given) or decode(*given))
    latents = "samples/video_32px/prompt_0000.latents.safetensors"
    (made,) = decode_files.decode_files(cfg, [latents], torch.device("cpu"))
    assert read_video(made)[0].shape == (25, 32, 32, 3)
    assert seen[0][2].shape == (1, 4, 7, 4, 4)
    assert seen[0][-1] == 9, "in windows again"


def test_the_plan_of_a_dry_run(run_tiny, capsys, caplog):
    run_tiny(*LONG, "--dry-run", "True")
    told = "".join(capsys.readouterr()) + caplog.text
    assert "25 frames of 32 x 32" in told
    assert "3 of 9 frames: 2 forwards for the first, 3 for each further one, which continues from the last" in told
    assert "8 forwards per sample" in told


def requests_of(tiny_config, tmp_path, table: str):
    path = tmp_path / "prompts.csv"
    path.write_text(table)
    section = {"type": "text", "data_path": str(path)}
    return read_requests(load_config({**tiny_config, "dataset": section}, InferenceOptions, {}), tmp_path)


def test_texts_of_further_windows(tiny_config, tmp_path):
    first, second = requests_of(tiny_config, tmp_path, 'text,text_2,text_3\na,"b; c, d",e\nf,,\n')
    assert (first.next_texts, second.next_texts) == (("b; c, d", "e"), ())
    assert first.next_final_texts == ["b; c, d. 8 FPS.", "e. 8 FPS."]
    with pytest.raises(UserError, match="text_3 is given, but not all texts before it"):
        requests_of(tiny_config, tmp_path, "text,text_2,text_3\na,,e\n")
    cfg = load_config(tiny_config, InferenceOptions, {"prompt": "a", "next_prompts": ["b; c, d", "e"]})
    assert read_requests(cfg, tmp_path)[0].next_texts == ("b; c, d", "e")


def test_texts_of_windows_that_there_are_not(run_tiny):
    with pytest.raises((UserError, SystemExit)) as caught:
        run_tiny("--prompt", "a", "--next_prompts", '["b"]', "--num_steps", "1")
    assert "--next_prompts is of a second window" in str(caught.value)
