"""Caches of latents and text embeddings: written, resumed, refused when stale, and equal to no cache at all."""

import json
import pprint
import runpy
import shutil
import sys
from functools import lru_cache, partialmethod
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from opensora.acceleration.torchrun import Torchrun
from opensora.config import load_config
from opensora.config.commands import CacheOptions, TrainOptions
from opensora.datasets.dataloader import build_train_loader, endless
from opensora.datasets.dataset import VideoTextDataset
from opensora.datasets.runs import FrameRun
from opensora.datasets.video_io import BrokenMediaError
from opensora.diffusion.flow import flow_matching_loss
from opensora.encoded.dataset import CachedVideoTextDataset
from opensora.encoded.store import batch_key
from opensora.encoded.writer import CacheWriter
from opensora.registry import DATASETS, MODELS, build_module
from opensora.training.diffusion.cache import build_dataset, cache_writer, check_cache
from opensora.training.diffusion.encoders import cached_encoders
from opensora.training.diffusion.inputs import InputEncoder, InputOptions
from opensora.training.diffusion.trainer import Trainer
from opensora.utils.claims import TakenError
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from opensora.utils.video import save_image, save_video
from opensora.utils.weights import files_hash
from opensora.utils.weights_writing import save_safetensors

SCRIPT = Path(__file__).parents[3] / "scripts" / "diffusion" / "cache.py"
ENCODERS = ("ae", "t5", "clip")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config):
    """A training config of clips longer than their bucket, one of them broken, and pictures; weights in a file."""
    folder = tmp_path_factory.mktemp("cache")
    rng, rows = np.random.default_rng(0), []
    for i in range(7):
        save_video(rng.integers(0, 255, (13, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", fps=8)
        rows.append(dict(path=f"{i}.mp4", text=f"clip {i % 3}", num_frames=13, height=32, width=32, fps=8.0))
    (folder / "6.mp4").write_bytes(bytes(100))
    for i in range(2):
        save_image(rng.integers(0, 255, (40, 32, 3), dtype=np.uint8), folder / f"{i}.png")
        rows.append(dict(path=f"{i}.png", text="", num_frames=1, height=40, width=32, fps=np.nan))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    torch.manual_seed(0)
    ae = build_module(dict(tiny_config["ae"]), MODELS, device_map="cpu", torch_dtype=torch.float32)
    save_safetensors(ae.state_dict(), folder / "ae.safetensors")
    sections = {key: tiny_config[key] for key in ("model", "t5", "clip")}
    return {
        **sections,
        "ae": {**tiny_config["ae"], "from_pretrained": str(folder / "ae.safetensors")},
        "dataset": {"type": "video_text", "data_path": str(folder / "clips.csv"), "fps_max": 24, "max_broken": 0.5},
        "bucket_config": {"32px_ar1:1": {9: (1.0, 2), 1: (1.0, 2)}},
        "condition_config": {"t2v": 1, "i2v_head": 1, "i2v_loop": 1, "frames": 1, "region": 1, "extend_right": 1},
        "num_workers": 0,
        "device": "cpu",
        "dtype": "fp32",
        "seed": 5,
        "cache_shard_size": 3,
    }


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """The config with its cache."""
    folder = tmp_path_factory.mktemp("written") / "cache"
    content = {**base, "cache_dir": str(folder)}
    cache_writer(load_config(content, CacheOptions)).run()
    return content


def config(content, **changes):
    return load_config({**content, **changes}, CacheOptions)


@lru_cache
def encoder(section):
    """An encoder, loaded once for all tests."""
    return build_module(json.loads(section), MODELS, torch_dtype=torch.float32)


def losses(cfg, count):
    """Losses of the first micro-batches, as a training run would compute them."""
    dataset = build_dataset(cfg)
    check_cache(cfg, dataset)
    device, dtype = torch.device("cpu"), torch.float32
    stand_ins = cached_encoders(cfg, dataset, device, dtype)
    encoders = [stand_ins.get(key) or encoder(json.dumps(getattr(cfg, key).to_dict())) for key in ENCODERS]
    weights = dict(cfg.condition_config)
    encode = InputEncoder(*encoders, InputOptions(t5_dropout=0.3, clip_dropout=0.3, condition_weights=weights))
    torch.manual_seed(0)
    model = build_module(cfg.model, MODELS, torch_dtype=dtype).eval()
    loader, sampler = build_train_loader(dataset, cfg.bucket_config, seed=cfg.seed)
    found, rows = [], []
    for step, batch in zip(range(count), endless(loader, sampler, 0)):
        prepared = encode(batch, torch.Generator().manual_seed(step))
        with torch.no_grad():
            found.append(float(flow_matching_loss(model(**prepared["inputs"]), prepared["target"], prepared["mask"])))
        rows.append(batch["index"])
    return found, rows, stand_ins


def without_broken(content, tmp_path):
    """The config with the broken row gone, which an uncached run would replace and a cached one leaves out."""
    path = Path(content["dataset"]["data_path"])
    table = pd.read_csv(path, keep_default_na=False).drop(index=6)
    table["path"] = [str(path.parent / name) for name in table["path"]]
    table.to_csv(tmp_path / "whole.csv", index=False)
    return {**content, "dataset": {**content["dataset"], "data_path": str(tmp_path / "whole.csv")}}


def test_losses_are_those_without_a_cache(base, tmp_path):
    content = without_broken(base, tmp_path)
    plain, plain_rows, none = losses(config(content), 4)  # the four batches of the first epoch
    content["cache_dir"] = str(tmp_path / "cache")
    cache_writer(config(content)).run()
    assert not none
    for parts in ({"cached_video": True}, {"cached_text": True}, {"cached_video": True, "cached_text": True}):
        cached, rows, stand_ins = losses(config(content, **parts), 4)
        assert rows == plain_rows
        assert cached == pytest.approx(plain, abs=1e-6)
        assert ("ae" in stand_ins, "t5" in stand_ins) == ("cached_video" in parts, "cached_text" in parts)


def test_training_with_a_cache_gives_the_same_weights(base, tmp_path):
    content = without_broken(base, tmp_path)
    cache = {"cache_dir": str(tmp_path / "cache"), "cached_video": True, "cached_text": True}
    cache_writer(config(content, cache_dir=cache["cache_dir"])).run()
    run = dict(outputs=str(tmp_path), max_steps=3, optim={"cls": "AdamW", "lr": 1e-3}, plugin="none")
    run |= dict(is_causal_vae=True, dropout_ratio={"t5": 0.3, "clip": 0.3}, grad_checkpoint=False)
    found = []
    for name, extra in (("plain", {}), ("cached", {**cache, "num_workers": 1})):
        folder = Trainer(load_config({**content, **run, "exp_name": name, **extra}, TrainOptions)).run()
        found.append(load_file(next(folder.glob("epoch*-global_step3")) / "model" / "model.safetensors"))
    assert all(torch.allclose(found[0][key], found[1][key], rtol=0, atol=1e-6) for key in found[0])


def test_what_is_stored(written):
    cfg = config(written, cached_video=True, cached_text=True)
    dataset = build_dataset(cfg)
    assert isinstance(dataset, CachedVideoTextDataset)
    folder = Path(written["cache_dir"])
    assert len(list((folder / "video").iterdir())) == 3  # nine rows by three
    assert len(list((folder / "text").iterdir())) == 2  # three captions with a rate, and the empty one
    assert pd.read_csv(folder / "broken.csv")["row"].tolist() == [8]
    assert sorted(dataset.cache.rows) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert dataset.fixed_sizes()[0].tolist() == [9, 9, 9, 9, 9, 9, 0, 1, 1]
    clip, picture = dataset.cache.clip(0), dataset.cache.clip(7)
    drawn = ("frames_0", "frames_1", "region_0", "region_1", "extend_right_0")
    assert set(clip) == {batch_key(part) for part in ("all", "head_1", "tail_1", *drawn)}
    assert clip[batch_key("all")].shape == (8, 3, 4, 4)  # mean and log-variance of four channels
    assert set(picture) == {batch_key("all")}
    latents, rows, _ = losses(cfg, 8)
    assert np.isfinite(latents).all()
    assert 6 not in {row for batch in rows for row in batch}


def test_a_stopped_writer_goes_on(written, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    cfg = config(written, cache_dir=str(folder))
    writer, encoded = cache_writer(cfg), []
    real = CacheWriter._encode

    def encode(self, clips, encoder):
        encoded.append([key.row for key, _ in clips])
        if len(encoded) == 2 and not folder.joinpath("index.parquet").exists():
            raise KeyboardInterrupt
        return real(self, clips, encoder)

    monkeypatch.setattr(CacheWriter, "_encode", encode)
    with pytest.raises(KeyboardInterrupt):
        writer.run()
    with pytest.raises(UserError, match="not finished; resume with: python scripts/diffusion/cache.py"):
        build_dataset(config(written, cache_dir=str(folder), cached_video=True))
    assert [p.name for p in (folder / "video").iterdir()] == ["00000.safetensors"]
    monkeypatch.setattr(CacheWriter, "_encode", real)
    left = []
    write_beside(folder / "cache.json.2", lambda path: left.append(path) or path.touch()).unlink()
    left[0].touch()  # as a kill before the renaming leaves it
    cache_writer(cfg).run()
    assert not left[0].exists()
    theirs = Path(written["cache_dir"])
    for file in ("video/00000", "video/00001", "text/00000"):
        name = f"{file}.safetensors"
        assert (folder / name).stat().st_size > 0
        a, b = (
            build_dataset(config(written, cache_dir=str(c), cached_video=True)).cache.clip(1) for c in (folder, theirs)
        )
        assert all(torch.equal(a[key], b[key]) for key in a)


def files_of(folder):
    """Tensors of all shards by file and name, and the rows of the index."""
    found = {
        f"{path.parent.name}/{path.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return found, pd.read_parquet(folder / "index.parquet")


def assert_same_cache(folder, expected):
    (found, index), (theirs, their_index) = files_of(Path(folder)), files_of(Path(expected))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in found)
    pd.testing.assert_frame_equal(index, their_index)


def test_parts_make_up_the_whole_whoever_comes_last(written, tmp_path, monkeypatch):
    """Jobs of a cluster: each writes its files only, one is stopped and started again, and the last one finishes."""
    folder = tmp_path / "cache"
    encoded, real = [], CacheWriter._encode

    def encode(self, clips, encoder):
        encoded.append(self.part)
        if self.part == (1, 3) and encoded.count((1, 3)) == 1:
            raise KeyboardInterrupt
        return real(self, clips, encoder)

    monkeypatch.setattr(CacheWriter, "_encode", encode)
    writers = [cache_writer(config(written, cache_dir=str(folder), cache_part=f"{n}/3")) for n in range(3)]
    writers[2].run()
    with pytest.raises(KeyboardInterrupt):
        writers[1].run()
    writers[0].run()
    assert not (folder / "index.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert sorted(path.name for path in before if path.parent.name == "video") == [
        f"{n:05d}.safetensors" for n in range(3) if n % 3 != 1
    ]
    assert writers[1].run() == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is there is not written again"
    assert_same_cache(folder, written["cache_dir"])
    assert not [*folder.glob(".opensora*")]


def test_processes_of_torchrun_divide_a_part(written):
    words = {"cache_part": "1/3", "cache_dir": written["cache_dir"]}
    parts = [cache_writer(config(written, **words), Torchrun(rank, rank, 2)).part for rank in range(2)]
    assert parts == [(2, 6), (3, 6)]
    for text in ("3/3", "1", "a/b", "-1/3", "0/0"):
        with pytest.raises(UserError, match="counted from 0"):
            cache_writer(config(written, cache_part=text))


def test_two_writers_at_once_are_of_different_parts_of_one_cache(written, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    refused = []
    real = CacheWriter._encode

    def try_all(self, clips, encoder):
        if not refused:
            refused.append(True)
            others = {
                "the same part": dict(cache_part="0/2"),
                "all of it": {},
                "another cache": dict(cache_part="1/2", seed=6, overwrite=True),
            }
            for what, changes in others.items():
                with pytest.raises(TakenError, match="in use by process"):
                    cache_writer(config(written, cache_dir=str(folder), **changes)).run()
                refused.append(what)
            assert cache_writer(config(written, cache_dir=str(folder), cache_part="1/2")).run() == folder
        return real(self, clips, encoder)

    monkeypatch.setattr(CacheWriter, "_encode", try_all)
    cache_writer(config(written, cache_dir=str(folder), cache_part="0/2")).run()
    assert len(refused) == 4
    assert_same_cache(folder, written["cache_dir"])


def test_parts_replace_a_cache_once_they_are_whole(written, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(written["cache_dir"], folder)
    info = (folder / "cache.json").read_text()
    (folder / "cache.json").write_text(info.replace('"shard_size": 3', '"shard_size": 2'))  # of other settings
    for number in (1, 0):
        words = dict(cache_dir=str(folder), cache_part=f"{number}/2", overwrite=True)
        cache_writer(config(written, **words)).run()
        assert ('"shard_size": 3' in (folder / "cache.json").read_text()) == (number == 0)
    assert not (folder / ".new").exists()
    assert_same_cache(folder, written["cache_dir"])
    cache_writer(config(written, cache_dir=str(folder), cache_part="1/2", overwrite=True)).run()


@pytest.mark.parametrize("stopped_at", ["video", "text", "cache.json"])
def test_a_cache_that_is_being_replaced_is_not_taken_for_a_whole_one(written, tmp_path, monkeypatch, stopped_at):
    """Until the new one is whole the old one stays; between the two there is none; a further run ends it."""
    folder = shutil.copytree(written["cache_dir"], tmp_path / "cache")
    cfg = config(written, cache_dir=str(folder), overwrite=True, **{"cache_shard_size": 1})
    read = config(written, cache_dir=str(folder), cached_video=True)
    moved = {"rename": Path.rename, "replace": Path.replace}

    def killed(self, target, how):
        if self.parent.name == ".new" and self.name == stopped_at:
            raise KeyboardInterrupt
        return moved[how](self, target)

    with monkeypatch.context() as patch:
        for how in moved:
            patch.setattr(Path, how, partialmethod(killed, how=how))
        with pytest.raises(KeyboardInterrupt):
            cache_writer(cfg).run()
    with pytest.raises(UserError, match="holds no cache|not finished"):
        build_dataset(read)
    cache_writer(config(written, cache_dir=str(folder), cache_shard_size=1)).run()
    assert build_dataset(read).cache.info.shard_size == 1
    assert not list(folder.rglob(".*"))


def test_an_old_cache_stays_if_no_clip_can_be_read(written, tmp_path, monkeypatch):
    folder = shutil.copytree(written["cache_dir"], tmp_path / "cache")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    writer = cache_writer(config(written, cache_dir=str(folder), overwrite=True))

    def broken(*_):
        raise BrokenMediaError("gone")

    monkeypatch.setattr(VideoTextDataset, "clip", broken)
    with pytest.raises(UserError, match="no clip could be read"):
        writer.run()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", [["video/mine.mp4"], ["text/00000.safetensors"], ["index.parquet"]])
def test_what_is_no_cache_is_left_alone(written, tmp_path, files, overwrite):
    for name in files:
        write_beside(tmp_path / "work" / name, lambda path: path.write_text("mine"))
    with pytest.raises(UserError, match=r"but no cache \(cache.json is missing\)"):
        cache_writer(config(written, cache_dir=str(tmp_path / "work"), overwrite=overwrite)).run()
    assert [p.read_text() for p in (tmp_path / "work").rglob("*") if p.is_file()] == ["mine"]


def test_a_file_of_the_users_among_the_shards_stays(written, tmp_path):
    folder = shutil.copytree(written["cache_dir"], tmp_path / "cache")
    write_beside(folder / "video" / "mine.mp4", lambda path: path.write_text("mine"))
    with pytest.raises(UserError, match=r"no cache's: video/mine\.mp4"):
        cache_writer(config(written, cache_dir=str(folder), overwrite=True)).run()
    assert (folder / "video" / "mine.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ae": {"block_out_channels": [4, 8, 8, 8]}}, "ae.block_out_channels: .4, 4, 8, 8. then, .4, 8, 8, 8. now"),
        ({"dataset": {"fps_max": 6}}, "dataset.fps_max: 24.0 then, 6.0 now|its text is"),
        ({"t5": {"max_length": 20}}, "t5.max_length: 16 then, 20 now"),
        ({"dtype": "bf16"}, "dtype: torch.float32 then, torch.bfloat16 now"),
        ({"condition_config": {"i2v_head": 1, "v2v_head": 1}, "longer": True}, "lacks the frames head_33"),
        ({"bucket_config": {"48px_ar1:1": {9: (1.0, 2)}}}, "6 rows are cached at 9x32x32, which is no bucket"),
    ],
)
def test_a_stale_cache_is_refused(written, changes, message, monkeypatch):
    merged = {key: {**written[key], **changes[key]} for key in ("ae", "t5", "dataset") if key in changes}
    content = {**changes, **merged}
    if content.pop("longer", False):  # as if the cached clips had 65 frames, of which a condition gives 33
        monkeypatch.setattr(
            "opensora.training.diffusion.cache.condition_runs", lambda *_: [FrameRun("head", 1), FrameRun("head", 33)]
        )
    with pytest.raises(UserError, match=message):
        losses(config({**written, **content}, cached_video=True, cached_text=True), 1)


def test_other_weights_and_captions_are_noticed(written, tmp_path):
    weights = Path(written["ae"]["from_pretrained"])
    other = bytearray(weights.read_bytes())
    other[-1] ^= 1  # one bit of one weight
    (tmp_path / "ae.safetensors").write_bytes(other)
    assert files_hash(weights) != files_hash(tmp_path / "ae.safetensors")
    ae = {**written["ae"], "from_pretrained": str(tmp_path / "ae.safetensors")}
    with pytest.raises(UserError, match=r"(?s)ae.from_pretrained: weights .* --overwrite"):
        losses(config(written, ae=ae, cached_video=True), 1)
    with pytest.raises(UserError, match="made with another video"):
        cache_writer(config(written, ae=ae)).run()
    path = Path(written["dataset"]["data_path"])
    table = pd.read_csv(path)
    table["path"] = [str(path.parent / name) for name in table["path"]]
    table.loc[1, "text"] = "a new caption"
    table.to_csv(tmp_path / "new.csv", index=False)
    dataset = {**written["dataset"], "data_path": str(tmp_path / "new.csv")}
    with pytest.raises(UserError, match="row 3: its text is 'a new caption. 8 FPS.'"):
        losses(config(written, dataset=dataset, cached_text=True), 1)
    assert losses(config(written, dataset=dataset, cached_video=True), 1)  # latents do not depend on it
    table.iloc[::-1].to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(UserError, match="its clip is"):
        losses(config(written, dataset=dataset, cached_video=True), 1)


def test_another_folder_of_clips_with_the_same_names_is_noticed(written, tmp_path):
    path = Path(written["dataset"]["data_path"])
    for file in path.parent.glob("*.*"):
        shutil.copy(file, tmp_path)

    def build(cached, **changes):
        table = {**written["dataset"], "data_path": str(tmp_path / "clips.csv")}
        cfg = config({**written, "dataset": table, cached: True, **changes})
        return build_dataset(cfg)

    assert len(build("cached_video")) == 9  # the same files elsewhere
    clip = np.random.default_rng(1).integers(0, 255, (13, 32, 32, 3), dtype=np.uint8)
    save_video(clip, tmp_path / "2.mp4", fps=8)
    with pytest.raises(UserError, match="clips.csv, row 4: its clip .*2.mp4 has another size, not what the cache"):
        build("cached_video")
    assert len(build("cached_text")) == 9
    index = Path(written["cache_dir"]) / "index.parquet"
    older = shutil.copytree(index.parent, tmp_path / "older") / index.name
    pd.read_parquet(index).drop(columns="file_bytes").to_parquet(older, index=False)
    assert build("cached_video", cache_dir=str(older.parent)).cache.folder == older.parent


def test_single_files(base, tmp_path):
    path = Path(base["dataset"]["data_path"])
    table = pd.read_csv(path).iloc[:4]
    table["path"] = [str(path.parent / name) for name in table["path"]]
    for i in range(4):
        torch.save(torch.full((4, 3, 4, 4), float(i)), tmp_path / f"{i}.pt")
    table["latents_path"] = [str(tmp_path / f"{i}.pt") for i in range(4)]
    table.to_csv(tmp_path / "single.csv", index=False)
    section = dict(type="cached_video_text", data_path=str(tmp_path / "single.csv"), max_broken=0.5, cached_video=True)
    (tmp_path / "2.pt").write_bytes(b"nothing")
    dataset = build_module(dict(section, return_latents_path=True), DATASETS)
    loader, _ = build_train_loader(dataset, {"32px_ar1:1": {9: (1.0, 2)}})
    batches = list(loader)
    assert 2 not in {row for batch in batches for row in batch["index"]}
    for batch in batches:
        assert batch["video_latents"].flatten(1).mean(1).tolist() == [float(row) for row in batch["index"]]
        assert "video" not in batch
        assert batch["latents_path"] == [str(tmp_path / f"{row}.pt") for row in batch["index"]]
    torch.save(torch.zeros(4, 2, 4, 4), tmp_path / "0.pt")
    with pytest.raises(UserError, match="video_latents: the samples of one bucket differ in size .row"):
        list(loader)
    with pytest.raises(UserError, match="cached_text: set cache_dir .* text_t5_path, text_clip_path"):
        build_module(dict(section, cached_text=True), DATASETS)


def test_the_command(base, tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.py"
    path.write_text("\n".join(f"{key} = {pprint.pformat(value)}" for key, value in base.items()))
    words = [str(path), "--cache-dir", str(tmp_path / "out"), "--cache-parts", "text"]
    monkeypatch.setattr(sys, "argv", ["cache.py", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    info = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert info["video"] is None
    assert not (tmp_path / "out" / "video").exists()
    with pytest.raises(UserError, match="cached_video: the cache .* holds no video"):
        build_dataset(config(base, cache_dir=str(tmp_path / "out"), cached_video=True))
    monkeypatch.setattr(sys, "argv", ["cache.py", str(path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "--cache-dir" in capsys.readouterr().err
