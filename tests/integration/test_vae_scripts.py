"""scripts/vae/inference.py and stats.py on a handful of clips and a tiny random autoencoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.config import load_config
from opensora.config.commands import VaeInferenceOptions
from opensora.evaluation.reconstruction import reconstruct
from opensora.models.vae.lpips import LPIPS
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.video import read_video, save_image, save_video
from opensora.utils.weights_writing import save_safetensors
from scripts.vae import inference, stats

MODEL = dict(
    type="hunyuan_vae", latent_channels=4, block_out_channels=[4, 4, 8, 8], layers_per_block=1, norm_num_groups=2
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos (9 and 14 frames, 32x48) and a picture in a folder, with a table of the videos."""
    folder = tmp_path_factory.mktemp("judged")
    rng, rows = np.random.default_rng(0), []
    for name, frames in (("long", 14), ("short", 9)):
        path = save_video(rng.integers(0, 255, (frames, 32, 48, 3), dtype=np.uint8), folder / f"{name}.mp4", fps=8)
        rows.append(dict(path=path.name, num_frames=frames, height=32, width=48, fps=8.0))
    save_image(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8), folder / "still.png")
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return folder


@pytest.fixture
def config(tmp_path, clips):
    """Content of a config that reconstructs the folder."""
    torch.manual_seed(0)
    save_safetensors(build_module(MODEL, MODELS).state_dict(), tmp_path / "vae.safetensors")
    return dict(
        model={**MODEL, "from_pretrained": str(tmp_path / "vae.safetensors")},
        dataset=dict(type="video_text", data_path=str(clips)),
        device="cpu",
        num_workers=0,
        fps=8,
        save_dir=str(tmp_path / "results"),
    )


def run(config, **changes):
    return reconstruct(load_config({**config, **changes}, VaeInferenceOptions))


def test_a_folder_is_reconstructed_measured_and_resumed(config, monkeypatch, capsys):
    monkeypatch.setattr(LPIPS.__init__, "__defaults__", ((2, 2, 3, 3, 3), False))
    folder = run(config, lpips=dict(random=True))
    table = pd.read_csv(folder / "metrics.csv")
    assert table["name"].tolist() == ["long", "short", "still"]
    assert table[["num_frames", "height", "width"]].to_numpy().tolist() == [[13, 32, 48], [9, 32, 48], [1, 40, 40]]
    assert table[["psnr", "ssim", "lpips", "latent_mean", "latent_std"]].notna().all().all()
    assert table["flicker"].isna().tolist() == [False, False, True]
    overall = pd.read_csv(folder / "overall.csv")
    mean = overall[(overall["kind"] == "videos") & (overall["measure"] == "psnr")]["mean"].item()
    assert mean == pytest.approx(table["psnr"][:2].mean())
    assert "pictures" in (printed := capsys.readouterr().out)
    assert "latents: mean" in printed
    assert pd.read_csv(folder / "latents.csv").shape == (4, 3)
    for name, width in (("orig/long_orig.mp4", 48), ("recn/long_recn.mp4", 48), ("side_by_side/long.mp4", 96)):
        assert read_video(folder / name)[0].shape == (13, 32, width, 3)
    assert {p.name for p in (folder / "orig").iterdir()} == {"long_orig.mp4", "short_orig.mp4", "still_orig.png"}
    assert (folder / "sheet.png").is_file()

    # As if it had been stopped before its last clip: only that one is done again, and the tables are the same.
    (folder / "clips" / "short.json").unlink()
    before = (folder / "recn" / "long_recn.mp4").stat().st_mtime_ns
    again = run(config, lpips=dict(random=True))
    pd.testing.assert_frame_equal(pd.read_csv(again / "metrics.csv"), table)
    assert (folder / "recn" / "long_recn.mp4").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other weights or settings"):
        run(config)


def test_tables_buckets_and_tiles(config, clips, tmp_path):
    from_table = dict(dataset=dict(type="video_text", data_path=str(clips / "clips.csv")))
    buckets = {"32px_ar1:1": {9: (0.0, 5)}}  # neither share nor batch size matter here
    table = pd.read_csv(run(config, **from_table, bucket_config=buckets) / "metrics.csv")
    assert table[["num_frames", "height", "width"]].to_numpy().tolist() == [[9, 32, 32]] * 2
    tiled = dict(model={**config["model"], "use_temporal_tiling": True, "sample_tsize": 8})
    folder = run(config, **from_table, **tiled, eval_setting="13x32x48", save_dir=str(tmp_path / "tiled"))
    assert pd.read_csv(folder / "metrics.csv")["name"].tolist() == ["long"]
    folder = run(config, **from_table, frame_interval=2, save_dir=str(tmp_path / "strided"))
    assert pd.read_csv(folder / "metrics.csv")["num_frames"].tolist() == [5, 5]
    assert read_video(folder / "orig" / "long_orig.mp4")[1] == 4


def test_only_what_still_holds_is_left_as_it_is(config, tmp_path):
    rng, folder = np.random.default_rng(2), tmp_path / "clips"
    pixels = rng.integers(0, 255, (2, 9, 32, 32, 3), dtype=np.uint8)
    for name, clip in zip("ab", pixels):
        save_video(clip, folder / f"{name}.mp4", fps=8)
    changes = dict(dataset=dict(type="video_text", data_path=str(folder)), save_dir=str(folder / "results"))
    results = run(config, **changes)
    table = pd.read_csv(results / "metrics.csv")
    assert table["name"].tolist() == ["a", "b"]
    (results / "clips" / "b.json").write_text('{"clip": ')  # a disk that was full
    pd.testing.assert_frame_equal(pd.read_csv(run(config, **changes) / "metrics.csv"), table)
    shutil.copy(folder / "a.mp4", folder / "b.mp4")  # another clip of the same name
    again = pd.read_csv(run(config, **changes) / "metrics.csv")["psnr"]
    assert again.tolist() == [table["psnr"][0]] * 2
    with pytest.raises(UserError, match="other weights or settings"):
        run(config, **changes, fps=4)


def test_frames_that_do_not_come_back_are_not_counted(config, tmp_path):
    coder = dict(width_list=[4, 8, 8], depth_list=[1, 1, 1], block_type="ResBlock")
    model = dict(type="dc_ae", from_scratch=True, latent_channels=4, use_temporal_tiling=True, temporal_tile_size=16)
    model["encoder"] = {**coder, "temporal_downsample": [True, True, False]}
    model["decoder"] = {**coder, "temporal_upsample": [True, True, False]}
    save_video(np.zeros((28, 16, 16, 3), dtype=np.uint8), tmp_path / "clips" / "a.mp4", fps=8)
    dataset = dict(type="video_text", data_path=str(tmp_path / "clips"))
    folder = run(config, model=model, dataset=dataset)
    assert read_video(folder / "recn" / "a_recn.mp4")[0].shape == (25, 16, 16, 3)
    assert pd.read_csv(folder / "metrics.csv")["num_frames"].tolist() == [25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dataset=None), "dataset.data_path is not set"),
        (dict(model=None), "'model' is missing"),
        (dict(model={**MODEL, "from_pretrained": "no/vae.safetensors"}), "No weights at no/vae.safetensors"),
        (dict(model={**MODEL, "from_pretrained": "assets/demo/mmdit.safetensors"}), "type='flux'"),
        (dict(eval_setting="16x32"), "nearest: 13x32x32"),
        (dict(eval_setting="101x32"), "none of 3 clips"),
        (dict(lpips=dict(heads="no.pth")), "lpips.backbone is not set"),
        (dict(frame_interval=0), "frame_interval=0"),
        (dict(fps=0), "fps=0: must be at least 1"),
        (dict(max_clips=0), "max_clips=0: must be at least 1"),
        (dict(num_workers=-1), "num_workers=-1: must be at least 0"),
    ],
)
def test_mistakes_are_named(config, changes, message):
    with pytest.raises(UserError, match=message):
        run(config, **changes)
    assert not Path(config["save_dir"]).exists()


def test_command_lines(config, clips, tmp_path, capsys):
    path = tmp_path / "vae.py"
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in config.items()))
    inference.main([str(path), "--max-clips", "1", "--sheet-clips", "0", "--verbose", "0"])
    assert capsys.readouterr().out.strip().endswith("results")
    assert len(list((tmp_path / "results" / "clips").glob("*.json"))) == 1
    stats.main([str(path), "--dataset.data_path", str(clips / "clips.csv"), "--eval-setting", "9x32", "--verbose", "0"])
    out = dict(line.split("=", 1) for line in capsys.readouterr().out.replace(" = ", "=").splitlines())
    mean, std, scale = (json.loads(out[key].rstrip(",")) for key in ("mean", "std", "scale_factor"))
    assert len(mean) == 4
    assert scale == pytest.approx([1 / value for value in std], rel=1e-2)


def test_statistics_are_the_same_each_time_and_mistakes_named(config, clips, tmp_path, capsys):
    path = tmp_path / "vae.py"
    content = {**config, "dataset": dict(type="video_text", data_path=str(clips / "clips.csv"))}
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in content.items()))
    printed = []
    for _ in range(2):
        stats.main([str(path), "--eval-setting", "9x32", "--verbose", "0"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    stats.main([str(path), "--eval-setting", "9x32", "--verbose", "0", "--model.from_pretrained", "none"])
    assert "random weights" in capsys.readouterr().err
    for words, message in (
        (["--eval-setting", "8x32"], "8 frames do not fit"),
        (["--eval-setting", "9x32", "--max-batches", "0"], "--max_batches=0: must be at least 1"),
        (["--eval-setting", "9x32", "--model.from_pretrained", "no.safetensors"], "No weights at no.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            stats.main([str(path), *words])


@pytest.mark.parametrize("name", ["metrics.csv", "orig/mine.mp4"])
def test_files_of_others_stay(config, name):
    mine = write_text("mine", Path(config["save_dir"]) / name)
    with pytest.raises(UserError, match=r"but no results of this program \(settings.json is missing\)"):
        run(config)
    assert mine.read_text() == "mine"


def test_results_of_earlier_versions_are_gone_on_with(config):
    """They record size and time of the weight file, in place of what is in it."""
    folder = run(config)
    settings = json.loads((folder / "settings.json").read_text())
    weights = Path(config["model"]["from_pretrained"])
    settings["weights"] = [weights.stat().st_size, weights.stat().st_mtime]
    write_text(json.dumps(settings, indent=4) + "\n", folder / "settings.json")
    before = (folder / "recn" / "long_recn.mp4").stat().st_mtime_ns
    assert (run(config) / "recn" / "long_recn.mp4").stat().st_mtime_ns == before
