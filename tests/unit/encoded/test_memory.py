"""Encoder outputs kept in memory: clips are read once, and nothing else changes."""

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.datasets.dataloader import build_train_loader, endless
from opensora.datasets.dataset import VideoTextDataset
from opensora.encoded.memory import EncodedMemory, HostRoom, even_group, fixed_groups
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.inputs import InputEncoder, InputOptions
from opensora.utils.video import save_video

BUCKETS = {"32px_ar1:1": {9: (1.0, 3)}}
CONDITIONS = {"t2v": 1, "i2v_head": 1, "i2v_loop": 1}
STEPS = 9  # three epochs of ten readable clips in batches of three: one is left over each time


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eleven clips that are longer than their bucket, one of them broken."""
    folder = tmp_path_factory.mktemp("kept")
    rng, rows = np.random.default_rng(0), []
    for i in range(11):
        save_video(rng.integers(0, 255, (14, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", fps=8)
        rows.append(dict(path=f"{i}.mp4", text=f"clip {i % 4}", num_frames=14, height=32, width=32, fps=8.0))
    (folder / "7.mp4").write_bytes(bytes(100))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return str(folder / "clips.csv")


@pytest.fixture(scope="module")
def encoders(tiny_config):
    """Autoencoder and text encoders."""
    torch.manual_seed(0)
    return [build_module(dict(tiny_config[k]), MODELS, torch_dtype=torch.float32) for k in ("ae", "t5", "clip")]


def prepared(clips, encoders, first=0, workers=0, skip=True, keep=True, room=None):
    """What the model would be given at the steps from ``first`` on, and how many clips were read at each."""
    options = InputOptions(t5_dropout=0.3, clip_dropout=0.3, condition_weights=CONDITIONS)
    memory = EncodedMemory(room) if keep else None
    encode = InputEncoder(*encoders, options, memory)
    dataset = VideoTextDataset(clips, max_broken=0.5)
    is_encoded = memory.is_encoded if memory is not None and skip else None
    loader, sampler = build_train_loader(
        dataset, BUCKETS, seed=1, num_workers=workers, same_windows=True, is_encoded=is_encoded
    )
    found, read = [], []
    for step, batch in zip(range(first, STEPS), endless(loader, sampler, first)):
        read.append(len(batch.get("read", ())))
        ready = encode(batch, torch.Generator().manual_seed(step))
        found.append({**ready["inputs"], "target": ready["target"]})
    return found, read


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert all(torch.equal(a[name], b[name]) for name in b)  # bitwise


def test_each_clip_is_read_once_and_nothing_changes(clips, encoders):
    always, all_read = prepared(clips, encoders, skip=False)
    assert all_read == [3] * STEPS
    found, read = prepared(clips, encoders)
    assert_same(found, always)
    assert read[:3] == [3, 3, 3]
    # The clip that the first epoch left over, and those that stand in for the broken one, which is tried every time.
    assert sum(read[3:]) < 6
    resumed, read = prepared(clips, encoders, first=5)  # what is missing there is not what was missing above
    assert_same(resumed, always[5:])
    assert read[0] == 3
    in_workers, read = prepared(clips, encoders, workers=2)
    assert_same(in_workers, always)
    assert sum(read) < 3 * STEPS


def test_the_same_as_without(clips, encoders):
    plain, _ = prepared(clips, encoders, keep=False)
    kept, _ = prepared(clips, encoders)
    for a, b in zip(kept, plain):  # equal but for what the size of an encoder's batch does to the last bits
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in b)


def test_what_does_not_fit_is_read_and_encoded_again(clips, encoders, monkeypatch):
    """Memory is bounded, clips and texts together, and nothing else changes; the log says so once."""
    told = []
    monkeypatch.setattr("opensora.encoded.memory.logger.warning", lambda *words: told.append(words))
    everything = HostRoom()
    always, all_read = prepared(clips, encoders, room=everything)
    assert everything.used > 0
    some = HostRoom(everything.used // 2)
    found, read = prepared(clips, encoders, room=some)
    assert_same(found, always)
    assert sum(all_read) < sum(read) < 3 * STEPS
    assert 0 < some.used <= some.limit
    assert len(told) == 1


def test_what_is_kept_lies_in_host_memory():
    """Tensors of another device are copied, not referred to, and every byte counts."""
    room = HostRoom(40)
    kept = EncodedMemory(room)
    source = torch.arange(12, dtype=torch.float32).view(3, 4)
    kept(["a", "b", "c"], lambda rows: {"x": source[rows]}, 1)
    assert room.used == 32, "two rows of four numbers; the third has no room"
    assert ["c" in kept, "b" in kept] == [False, True]
    source.zero_()
    assert kept(["b"], lambda rows: {}, 1)["x"].tolist() == [[4, 5, 6, 7]]
    elsewhere = EncodedMemory(device=torch.device("meta"))
    made = elsewhere(["a"], lambda rows: {"x": torch.ones(1, 4)}, 1)["x"]
    assert made.device.type == "meta"
    assert next(iter(elsewhere._kept.values()))["x"].device.type == "cpu"


def test_groups_have_one_size():
    assert list(fixed_groups([4, 5, 6, 7, 8], 2)) == [[4, 5], [6, 7], [8, 8]]
    assert list(fixed_groups([], 3)) == []
    assert [even_group(count, 8) for count in (1, 8, 9, 12, 48)] == [1, 8, 5, 6, 8]
    kept, asked = EncodedMemory(), []

    def compute(positions):
        asked.append(positions)
        return {"x": torch.tensor(positions)}

    assert kept(["a", "b", "a"], compute, 2)["x"].tolist() == [2, 1, 2]
    assert kept(["c", "a"], compute, 2)["x"].tolist() == [0, 2]
    assert asked == [[2, 1], [0, 0]]
    assert "b" in kept
    assert "d" not in kept
