"""Batches from other processes, with little shared memory and with enough."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from opensora.datasets import sharing
from opensora.datasets.sharing import Piped, Sender, SharingLoader


class Clips(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((2, 3), float(index)), f"clip {index}"


def together(samples):
    return {"video": torch.stack([clip for clip, _ in samples]).bfloat16(), "text": [text for _, text in samples]}


@pytest.mark.parametrize("free", [0, 2**40])
def test_the_same_batches(monkeypatch, free):
    monkeypatch.setattr(sharing.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    batches = list(SharingLoader(Clips(), together, num_workers=1, batch_size=2))
    assert [batch["text"] for batch in batches] == [["clip 0", "clip 1"], ["clip 2"]]
    video = batches[0]["video"]
    torch.testing.assert_close(video, torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 3).bfloat16())
    assert video.is_shared() == (free > 0)


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.zeros(0, 4), torch.randn(2, 3).T, torch.ones(2).bool()])
def test_bytes_of_every_kind(tensor):
    back = Piped.of(tensor).tensor()
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_every_process_needs_room(monkeypatch, caplog):
    caplog.set_level("WARNING", logger="opensora")
    monkeypatch.setattr(sharing.logger, "propagate", True)
    monkeypatch.setattr(sharing.shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    few, many = (Sender(lambda samples: [torch.zeros(10)], workers) for workers in (2, 3))
    assert torch.is_tensor(few(None)[0])
    assert isinstance(many(None)[0], Piped)
    many(None)
    assert caplog.text.count("come through a pipe") <= 1


def test_flags_are_those_of_forked_processes_too(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    flags = sharing.shared_flags(100_000)
    child = os.fork()
    if child == 0:
        flags[7] = True
        os._exit(0)
    os.waitpid(child, 0)
    assert flags.nonzero().tolist() == [[7]]
    assert len(sharing.shared_flags(0)) == 0
