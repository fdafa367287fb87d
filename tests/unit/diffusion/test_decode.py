"""Frames leave the decoder as they are done, whole videos are held nowhere, and tiles fit into the memory."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion import decode, stages
from opensora.diffusion.decode import Gathered, decode_into
from opensora.diffusion.pipeline import VideoPipeline
from opensora.generation.jobs import list_jobs
from opensora.generation.requests import read_requests
from opensora.generation.run import generate
from opensora.generation.sample_files import SampleFiles
from opensora.generation.writer import SampleWriter
from opensora.models.vae.footprint import LiveBytes
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.video import VideoWriter, save_video
from tests.helpers.decoding import decode_latents
from tests.unit.models.test_autoencoder_contract import SMALL

CPU = torch.device("cpu")
TILED = {"use_temporal_tiling": True}


@pytest.fixture(params=["hunyuan_vae", "dc_ae"])
def ae(request):
    torch.manual_seed(0)
    model = build_module({"type": request.param, **SMALL[request.param], **TILED}, MODELS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def latents(ae, frames, batch=1):
    return torch.randn(batch, ae.latent_channels, frames, 2, 2, generator=torch.Generator().manual_seed(1))


class Log:
    """A sink that says what it got."""

    def __init__(self):
        self.events = []

    def start(self, sample):
        self.events.append(f"start {sample}")

    def write(self, frames):
        self.events.append(len(frames))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_parts_are_the_whole_bit_for_bit(ae, frames):
    z = latents(ae, frames)
    parts = list(ae.decode_parts(z))
    assert torch.equal(torch.cat(parts, 2), ae.decode(z))
    assert (len(parts) > 1) == ae.tiling.cuts_time(frames)


@pytest.mark.parametrize("kept", [slice(0, 17), slice(3, 20), slice(6, 9), slice(0, 1), slice(9, 1000)])
def test_frames_that_are_kept_may_lie_in_any_part(ae, kept):
    z = latents(ae, 6, batch=2)
    whole = decode_latents(ae, z, slice(0, 1000), CPU, torch.float32)
    found = decode_latents(ae, z, kept, CPU, torch.float32)
    assert len(found) == len(whole) == 2
    for video, part in zip(whole, found):
        np.testing.assert_array_equal(part, video[kept])


def test_a_file_is_the_same_as_of_the_video_at_once_and_memory_does_not_grow_with_length(ae, tmp_path):
    peaks = []
    for length in (6, 24):
        z, stem = latents(ae, length), tmp_path / f"{length}.parts"
        with SampleFiles([(stem, 8)]) as files, LiveBytes() as live:
            decode_into(files, ae, z, slice(0, 1000), CPU, torch.float32)
            assert not stem.with_name(f"{length}.parts.mp4").exists(), "it has no name before it is told to"
            made = files.put_in_place(0)
        peaks.append(live.peak - z.nbytes)
        (video,) = decode_latents(ae, z, slice(0, 1000), CPU, torch.float32)
        assert made.read_bytes() == save_video(video, tmp_path / "whole.mp4", 8).read_bytes()
    assert peaks[1] < 1.05 * peaks[0], "of which the latents are all that is longer"
    assert {path.name for path in tmp_path.iterdir()} == {"6.parts.mp4", "24.parts.mp4", "whole.mp4"}


def test_a_video_that_has_no_room_leaves_nothing(monkeypatch, tmp_path):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoWriter, "put_in_place", full)
    with SampleFiles([(tmp_path / "a", 8)]) as files:
        files.start(0)
        files.write(np.zeros((2, 16, 16, 3), np.uint8))
        with pytest.raises(OSError, match="No space"):
            files.put_in_place(0)
    assert not [*tmp_path.iterdir()]


def test_a_sample_begins_anew_in_other_tiles_when_memory_runs_out(ae, monkeypatch, tmp_path):
    calls, parts = [], type(ae).decode_parts

    def short(self, z):
        calls.append(self.tiling)
        for number, part in enumerate(parts(self, z)):
            if number == 1 and not self.tiling.use_spatial:
                raise torch.OutOfMemoryError("out of memory")
            yield part

    monkeypatch.setattr(type(ae), "decode_parts", short)
    log, z, before = Log(), latents(ae, 6), ae.tiling
    told = decode_into(log, ae, z, slice(0, 1000), CPU, torch.float32)
    lost, *rest = log.events[1:]
    assert log.events[0] == rest[0] == "start 0"
    assert lost == rest[1], "the first part, again"
    assert told == "tiles of 16 px and 8 frames"
    assert ae.tiling is before
    with SampleFiles([(tmp_path / "a", 8)]) as files:
        decode_into(files, ae, z, slice(0, 1000), CPU, torch.float32)
        files.put_in_place(0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"], "nothing is left of the first try"


def test_ever_smaller_tiles_are_tried_where_the_room_is_known(ae, monkeypatch):
    tried = []

    def never(self, z):
        tried.append(self.tiling.volume(z.shape[2:]))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(type(ae), "decode", never)
    monkeypatch.setattr(type(ae), "decode_parts", lambda self, z: iter([self.decode(z)]))
    with pytest.raises(decode.DecodeMemoryError, match="not enough memory to decode, even in tiles"):
        decode_into(Gathered(), ae, torch.zeros(1, ae.latent_channels, 8, 8, 8), slice(0, 9), CPU, torch.float32, 2**40)
    assert len(tried) > 2
    assert all(after <= before for before, after in itertools.pairwise(tried))


def test_tiles_of_a_budget_are_told_and_recorded(tiny_config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stages, "room_to_work", lambda device, limit: limit)
    settings = {"save_dir": str(tmp_path), "num_steps": 1, "num_frames": 33, "gpu_memory": "0.5MB"}
    cfg = load_config({**tiny_config, "prompt": "a"}, InferenceOptions, settings)
    with caplog.at_level("INFO", logger="opensora"):
        (fitted,) = generate(cfg, CPU, log=lambda line: None)
    record = json.loads(fitted.with_suffix(".json").read_text())
    assert "frames" in record["tiles"]
    assert f"decoding in {record['tiles']} instead of one piece" in caplog.text


def test_what_cannot_be_written_leaves_kept_latents(tiny_config, tmp_path, monkeypatch):
    def full(self, frames):
        raise OSError("no space left on device")

    monkeypatch.setattr("opensora.generation.outputs.VideoWriter.write", full)
    settings = {"save_dir": str(tmp_path), "num_steps": 1, "save_latents": True}
    cfg = load_config({**tiny_config, "prompt": "a"}, InferenceOptions, settings)
    with pytest.raises(OSError, match="no space left"):
        generate(cfg, CPU, log=lambda line: None)
    left = {path.name for path in (tmp_path / "video_32px").iterdir() if not path.name.startswith(".")}
    assert "tiles" not in json.loads((tmp_path / "video_32px" / "prompt_0000.json").read_text()), "the config's"
    assert left == {"prompt_0000.json", "prompt_0000.txt", "prompt_0000.latents.safetensors"}


def test_no_frames_is_an_error_of_ours(tmp_path):
    with pytest.raises(UserError, match="at least one frame"):
        save_video(np.zeros((0, 4, 4, 3), np.uint8), tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_takes_frames_that_a_result_holds(tiny_config, tmp_path):
    """As a server does, which shows them too: the same files."""
    settings = {"save_dir": str(tmp_path), "num_steps": 1, "save_latents": True, "seed": 3}
    cfg = load_config({**tiny_config, "prompt": "a"}, InferenceOptions, settings)
    (made,) = generate(cfg, CPU, log=lambda line: None)
    pipe = VideoPipeline.from_config(cfg)
    request = read_requests(cfg, tmp_path)[0]
    job = dataclasses.replace(list_jobs(cfg, [request])[0], stem=tmp_path / "other")
    result = pipe.make([request.final_text], [[]], "t2v", [job.seed], [request.neg])
    path = SampleWriter(cfg, lambda line: None).sample(job, result, 0)
    assert path.read_bytes() == made.read_bytes()
    ends = {".mp4", ".json", ".txt", ".latents.safetensors"}
    assert {path.name.removeprefix("other") for path in tmp_path.glob("other*")} == ends
