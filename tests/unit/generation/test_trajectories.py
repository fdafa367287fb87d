"""Trajectories sampled beforehand: resumed, divided, and those that sampling itself would have made."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora.config import load_config
from opensora.config.commands import TrajectoryOptions
from opensora.datasets.source import SampleKey
from opensora.diffusion.pipeline import VideoPipeline
from opensora.encoded.config import TrajectoriesConfig
from opensora.encoded.trajectories import TrajectoryDataset, trajectory_shard
from opensora.generation.trajectories import TrajectoryWriter, write_trajectories
from opensora.registry import MODELS, build_module
from opensora.utils.claims import take
from opensora.utils.errors import UserError
from opensora.utils.video import save_video
from opensora.utils.weights_writing import save_safetensors

CPU = torch.device("cpu")


def with_weights(section, path):
    """The section, with random weights in a file."""
    torch.manual_seed(0)
    save_safetensors(build_module(section, MODELS).state_dict(), path)
    return {**section, "from_pretrained": str(path)}


@pytest.fixture
def config(tiny_config, tmp_path):
    clip = save_video(np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), tmp_path / "0.mp4", 8)
    table = tmp_path / "clips.csv"
    table.write_text("path,text\n" + "".join(f"{clip},a thing {row}\n" for row in range(6)))
    content = {
        **tiny_config,
        **{name: with_weights(tiny_config[name], tmp_path / f"{name}.safetensors") for name in ("model", "ae")},
        "dataset": {"type": "text", "data_path": str(table)},
        "save_dir": str(tmp_path / "made"),
        "condition_config": {"t2v": 1, "i2v_head": 1},
        **{"keep_every": 2, "shard_size": 2, "batch_size": 2},
    }
    return load_config(content, TrajectoryOptions)


def contents(folder):
    return {path.name: load_file(path) for path in sorted((folder / "trajectories").glob("*.safetensors"))}


def test_they_are_what_sampling_makes_and_survive_a_kill(config, tmp_path, monkeypatch):
    folder = write_trajectories(config, CPU)
    dataset = TrajectoryDataset(TrajectoriesConfig(type="trajectories", data_path=str(folder)))
    assert {*dataset.data["cond_type"]} == {"t2v", "i2v_head"}
    assert dataset.info.positions == [1, 0.5, 0]
    whole = contents(folder)
    pipe = VideoPipeline.from_config(config)
    for row in range(2):
        entry, seen = dataset.row(row), []
        ref = str(tmp_path / "0.mp4") if entry["cond_type"] == "i2v_head" else None
        keep = partial(lambda seen, step, total, latents: seen.append(latents[0]), seen)
        pipe(f"a thing {row}", ref=ref, cond_type=entry["cond_type"], seed=int(entry["seed"]), on_step=keep)
        sample = dataset.load(SampleKey(row, 9, 32, 32, 0))
        assert sample["states"].shape == (3, *seen[0].shape)
        # one is sampled in a batch of two, and rounded to fp16
        torch.testing.assert_close(sample["states"][1:].float(), torch.stack(seen)[1::2], rtol=1e-3, atol=1e-3)
        assert bool(sample["condition"][0].any()) == (ref is not None)

    def killed(self, number, make=TrajectoryWriter._shard):
        if number == 1:
            raise KeyboardInterrupt
        return make(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryWriter, "_shard", killed)
        again = load_config(config, TrajectoryOptions, {"save_dir": str(tmp_path / "again")})
        with pytest.raises(KeyboardInterrupt):
            write_trajectories(again, CPU)
    with pytest.raises(UserError, match="are not finished; resume with: python scripts/diffusion/trajectories.py"):
        TrajectoryDataset(TrajectoriesConfig(type="trajectories", data_path=str(tmp_path / "again")))
    before = trajectory_shard(tmp_path / "again", 0).stat().st_mtime_ns
    resumed = contents(write_trajectories(again, CPU))
    assert trajectory_shard(tmp_path / "again", 0).stat().st_mtime_ns == before
    for name, tensors in whole.items():
        assert all(torch.equal(value, resumed[name][key]) for key, value in tensors.items())


def test_processes_divide_them(config, tmp_path):
    claim = take(trajectory_shard(tmp_path / "made", 1), is_folder=False)  # another process is at it
    folder = write_trajectories(config, CPU)
    assert [*contents(folder)] == ["00000.safetensors", "00002.safetensors"]
    assert not (folder / "index.parquet").exists()
    claim.release()
    write_trajectories(config, CPU)
    assert len(contents(folder)) == 3
    assert (folder / "index.parquet").is_file()
    fewer = load_config(config, TrajectoryOptions, {"num_samples": 4})
    stamps = [trajectory_shard(folder, number).stat().st_mtime_ns for number in (0, 1)]
    write_trajectories(fewer, CPU)
    assert [trajectory_shard(folder, number).stat().st_mtime_ns for number in (0, 1)] == stamps
    assert len(TrajectoryDataset(TrajectoriesConfig(type="trajectories", data_path=str(folder)))) == 4
    other = load_config(config, TrajectoryOptions, {"guidance": 2.0})
    with pytest.raises(UserError, match="made with another sampling.*: give another --save-dir, or --overwrite"):
        write_trajectories(other, CPU)


def test_what_cannot_be_kept(config):
    with pytest.raises(UserError, match="keep_every=3 does not divide num_steps=4"):
        write_trajectories(load_config(config, TrajectoryOptions, {"keep_every": 3}), CPU)
