"""What a run needs is compared with what is there, before models are loaded."""

import dataclasses
from collections import namedtuple

import pytest
import torch

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.prepared import PreparedRun
from opensora.generation import room
from opensora.generation.requests import read_requests
from opensora.generation.run import generate
from opensora.utils.errors import UserError

GIB = 2**30


@pytest.fixture
def prepared(tiny_config, tmp_path):
    """``prepared(**overrides)`` gives a run of one prompt, and its requests."""

    def prepare(**overrides):
        content = {**tiny_config, "prompt": "a", "save_dir": str(tmp_path / "not" / "there")}
        cfg = load_config(content, InferenceOptions, overrides)
        return PreparedRun.of(cfg, torch.device("cpu")), read_requests(cfg, tmp_path)

    return prepare


def test_memory(prepared, monkeypatch, caplog):
    run, requests = prepared(num_frames=4097, **{"sampling_option.height": 1024, "sampling_option.width": 1024})
    pixels = 4097 * 1024 * 1024 * 3
    needs = room.Needs.of(run, [run.plan], 1)
    assert needs.pixels == pixels * room.PIXEL_BYTES
    monkeypatch.setattr(room, "memory_of", lambda device: (16 * GIB, 16 * GIB))
    with pytest.raises(UserError, match=r"needs about \S+ GiB of memory .*, and this machine has 16.0 GiB: fewer"):
        room.check_room(run, requests)
    monkeypatch.setattr(room, "memory_of", lambda device: (128 * GIB, 16 * GIB))
    room.check_room(run, requests)
    assert "and cpu has 16.0 GiB of 128.0 GiB left" in caplog.text
    caplog.clear()
    monkeypatch.setattr(room, "memory_of", lambda device: (128 * GIB, 127 * GIB))
    room.check_room(run, requests)
    assert caplog.text == ""


def test_a_limit_of_the_gpu_is_compared_instead_of_what_is_free(prepared, monkeypatch, caplog):
    run, requests = prepared(gpu_memory="1MB")
    monkeypatch.setattr(room, "memory_of", lambda device: (16 * GIB, 16 * GIB))
    room.check_room(run, requests)
    assert caplog.text == "", "no limit of a CPU"
    room.check_room(dataclasses.replace(run, device=torch.device("cuda")), requests)
    assert "and cuda has 1.0 MiB of 16.0 GiB left" in caplog.text


def test_disk(prepared, monkeypatch, caplog):
    monkeypatch.setattr(room, "memory_of", lambda device: (128 * GIB, 127 * GIB))
    run, requests = prepared(num_sample=1000, save_latents=True)
    needs = room.Needs.of(run, [run.plan], 1000)
    assert needs.latents == 1000 * 4 * 4 * 3 * 4 * 4, "4 channels of 3 x 4 x 4 in fp32"
    usage = namedtuple("usage", "total used free")
    for free, refused in ((needs.latents - 1, True), (needs.latents + 1, False)):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda folder, free=free: usage(free, 0, int(free)))
        if refused:
            with pytest.raises(UserError, match=r"save_dir .*not/there: the latents to keep are .* MiB left"):
                room.check_room(run, requests)
        else:
            room.check_room(run, requests)
    assert "the files are about" in caplog.text


def test_runs_and_dry_runs_look_before_models_are_loaded(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "memory_of", lambda device: (1024, 1024))
    for dry in (True, False):
        run, _ = prepared(dry_run=dry)
        lines = []
        with pytest.raises(UserError, match="this machine has 0.0 MiB"):
            generate(run.cfg, torch.device("cpu"), log=lines.append)
        assert bool(lines) == dry, "a dry run shows its plan before that"
        assert not (tmp_path / "not").exists()
