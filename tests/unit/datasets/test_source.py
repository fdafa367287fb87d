"""A dataset of the user's own, whose clips are computed: trained on, cached, held out and evaluated like any other."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.config import load_config
from opensora.config.commands import CacheOptions, TrainOptions, VaeInferenceOptions
from opensora.config.keys import read_section
from opensora.datasets.dataloader import build_train_loader
from opensora.datasets.source import ClipDataset, SampleKey, build_source
from opensora.datasets.video_io import BrokenMediaError
from opensora.encoded.store import batch_key
from opensora.evaluation.reconstruction import reconstruct
from opensora.registry import DATASETS, MODELS, build_module
from opensora.training.diffusion.cache import build_dataset, cache_writer, check_cache
from opensora.training.diffusion.trainer import Trainer
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors

BUCKETS = {"32px_ar1:1": {9: (1.0, 2)}}
BROKEN = 3


class MovingBars(ClipDataset):
    """Bright bars that move to the right by a pixel per frame; there are no files."""

    def __init__(self, data_path="bars", count=8, brightness=1.0, word="bar"):
        self.data_path, self.max_broken = data_path, 0.5
        self.data = pd.DataFrame({"num_frames": 17, "height": 32, "width": 32}, index=range(count))
        self.brightness, self.word = brightness, word

    def row(self, index):
        return {"path": f"bars/{index}", "text": f"{self.word} {index}"}

    def clip(self, key, row):
        if key.row == BROKEN:
            raise BrokenMediaError(f"{row['path']}: no such bar")
        video = torch.full((3, key.num_frames, key.height, key.width), -1.0)
        for frame in range(key.num_frames):
            video[:, frame, :, (key.row + frame) % key.width] = self.brightness
        return video


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The dataset under its name."""
    DATASETS.register_module("moving_bars", module=MovingBars)
    yield
    DATASETS.module_dict.pop("moving_bars")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config):
    """A training config, and an autoencoder with weights in a file."""
    folder = tmp_path_factory.mktemp("bars")
    torch.manual_seed(0)
    ae = build_module(dict(tiny_config["ae"]), MODELS, device_map="cpu", torch_dtype=torch.float32)
    save_safetensors(ae.state_dict(), folder / "ae.safetensors")
    return {
        **{key: tiny_config[key] for key in ("model", "t5", "clip")},
        **{"ae": {**tiny_config["ae"], "from_pretrained": str(folder / "ae.safetensors")}},
        **{"dataset": {"type": "moving_bars"}, "bucket_config": BUCKETS, "condition_config": {"t2v": 1, "i2v_tail": 1}},
        **{"num_workers": 0, "device": "cpu", "dtype": "fp32", "seed": 5},
    }


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """The config with its cache."""
    content = {**base, "cache_dir": str(tmp_path_factory.mktemp("written") / "cache")}
    cache_writer(load_config(content, CacheOptions)).run()
    return {**content, "cached_video": True, "cached_text": True}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(workers):
    source = build_source(
        read_section({"type": "moving_bars", "brightness": 0.5}, DATASETS), require_text=False, keep_in_memory=False
    )
    loader, sampler = build_train_loader(source, BUCKETS, num_workers=workers)
    batches = list(loader)
    assert len(batches) == len(sampler) == 4
    rows = [row for batch in batches for row in batch["index"]]
    assert len(rows) == 8
    assert BROKEN not in rows
    assert set(loader.broken.reasons) == {BROKEN}
    for batch in batches:
        assert batch["video"].shape == (2, 3, 9, 32, 32)
        assert batch["video"].amax() == 0.5
        assert batch["text"] == [f"bar {row}" for row in batch["index"]]


def test_what_is_no_source_of_clips_is_refused(tmp_path):
    pd.DataFrame({"text": ["a"]}).to_csv(tmp_path / "prompts.csv", index=False)
    with pytest.raises(UserError, match="dataset.type=text: no dataset of clips, it has no data, .*fixed_sizes"):
        build_source(read_section({"type": "text", "data_path": str(tmp_path / "prompts.csv")}, DATASETS))
    with pytest.raises(UserError, match="'moving_bars' takes no argument 'brightnes'; did you mean 'brightness'"):
        build_source(read_section({"type": "moving_bars", "brightnes": 1.0}, DATASETS))


def test_cached_and_read_back(written):
    cfg = load_config(written, TrainOptions)
    dataset = build_dataset(cfg)
    check_cache(cfg, dataset)
    assert sorted(dataset.cache.rows) == [0, 1, 2, 4, 5, 6, 7]
    assert dataset.cache.info.runs == ["all", "tail_1"]
    ae = build_module(cfg.ae, MODELS, torch_dtype=torch.float32)
    (batch, *_), source = (
        list(build_train_loader(dataset, BUCKETS)[0]),
        build_source(read_section({"type": "moving_bars"}, DATASETS)),
    )
    assert "video" not in batch
    for place, row in enumerate(batch["index"]):
        clip = source.clip(SampleKey(row, 9, 32, 32, 0), {})
        with torch.no_grad():
            whole, last = ae.encode_stored(clip[None]), ae.encode_stored(clip[None, :, -1:])
        assert torch.allclose(batch[batch_key("all")][place], whole[0], atol=1e-5)
        assert torch.allclose(batch[batch_key("tail_1")][place], last[0], atol=1e-5)
    brighter = load_config({**written, "dataset": {"type": "moving_bars", "brightness": 0.9}}, TrainOptions)
    with pytest.raises(UserError, match="dataset.brightness: unset then, 0.9 now"):
        check_cache(brighter, build_dataset(brighter))


def test_each_row_is_checked_when_it_is_first_read(written):
    other = load_config({**written, "dataset": {"type": "moving_bars", "word": "pole"}}, TrainOptions)
    with pytest.raises(UserError, match="bars, row 2: its text is 'pole 0', not what the cache"):
        build_dataset(other)[SampleKey(0, 9, 32, 32, 0)]
    dataset, asked = build_dataset(load_config(written, TrainOptions)), []
    real = dataset._check_rows
    dataset._check_rows = lambda rows: asked.append(rows.tolist()) or real(rows)
    for row in (4, 4, 2, 4):
        assert dataset[SampleKey(row, 9, 32, 32, 0)]["text"] == f"bar {row}"
    assert asked == [[4], [2]]
    with pytest.raises(UserError, match=f"row {BROKEN + 2}: its clip is bars/{BROKEN}, not what the cache"):
        dataset[SampleKey(BROKEN, 9, 32, 32, 0)]


def test_trained_on_with_rows_held_out(written, tmp_path):
    run = dict(outputs=str(tmp_path), max_steps=1, optim={"cls": "AdamW", "lr": 1e-3}, plugin="none")
    run |= dict(is_causal_vae=True, grad_checkpoint=False, exp_name="bars")
    run["validation"] = {"data_path": "held out", "every": 1, "max_rows": 2, "timesteps": [0.5]}
    folder = Trainer(load_config({**written, **run}, TrainOptions)).run()
    assert (folder / "epoch0-global_step1" / "model" / "model.safetensors").is_file()


def test_evaluated(base, tmp_path, capsys):
    content = {
        **{"model": base["ae"], "dataset": {"type": "moving_bars", "count": 5}, "eval_setting": "5x32"},
        **{"save_dir": str(tmp_path), "device": "cpu", "dtype": "fp32", "lpips": None, "num_workers": 0, "verbose": 0},
    }
    reconstruct(load_config({**content, "frame_interval": 2}, VaeInferenceOptions))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["name"].astype(str).tolist() == ["0", "1", "2", "4"]
    assert table["num_frames"].unique().tolist() == [5]
    assert np.isfinite(table["psnr"]).all()
    assert json.loads((tmp_path / "clips" / "4.json").read_text())["clip"]["row"] == 4
    assert "psnr" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds results of other weights or settings"):
        reconstruct(load_config({**content, "dataset": {"type": "moving_bars"}}, VaeInferenceOptions))
    longer = load_config({**content, "eval_setting": "33x32"}, VaeInferenceOptions)
    with pytest.raises(UserError, match="bars: none of 5 clips is large and long enough for eval_setting=33x32"):
        reconstruct(longer)
