"""Measures of reconstructions beside hand-checked float64 references, and the choice of clips and sizes."""

import numpy as np
import pandas as pd
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from opensora.config import load_config
from opensora.config.commands import VaeInferenceOptions
from opensora.datasets.video_io import BrokenMediaError
from opensora.evaluation.clips import (
    EvalClip,
    bucket_of,
    check_size,
    choose_clips,
    list_media,
    own_size,
    parse_eval_setting,
    read_clip,
)
from opensora.evaluation.latents import RunningMoments
from opensora.evaluation.quality import flicker, psnr, ssim
from opensora.evaluation.reconstruction import measure, overall_table
from opensora.models.vae.lpips import LPIPS
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video


@pytest.fixture(scope="module")
def clips():
    """A clip and a noisy copy, uint8 [4, 16, 18, 3]."""
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (4, 16, 18, 3))
    noisy = np.clip(clip + rng.integers(-40, 41, clip.shape), 0, 255)
    return clip.astype(np.uint8), noisy.astype(np.uint8)


def test_psnr_by_hand(clips):
    original = np.full((2, 16, 16, 3), 100, dtype=np.uint8)
    assert psnr(original, original + 5) == pytest.approx(20 * np.log10(255 / 5), abs=1e-6)
    assert psnr(original, original - 5) == pytest.approx(20 * np.log10(255 / 5), abs=1e-6)  # no wrap at 0 or 255
    assert psnr(original, original) == float("inf")
    half = original.copy()
    half[1] += 10  # the clip's mean error counts, not the mean of its frames' decibels
    assert psnr(original, half) == pytest.approx(10 * np.log10(255**2 / 50), abs=1e-6)
    assert psnr(*clips) == pytest.approx(peak_signal_noise_ratio(*clips), abs=1e-6)


def reference_ssim(x, y):
    """SSIM of one channel in float64, window by window."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            a, b = (p[i - 5 : i + 6, j - 5 : j + 6].astype(np.float64) for p in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb, vab = (
                (window * a * a).sum() - ma**2,
                (window * b * b).sum() - mb**2,
                (window * a * b).sum() - ma * mb,
            )
            found.append((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(found)


def test_ssim_equals_a_float64_reference(clips):
    original, noisy = clips
    expected = np.mean([reference_ssim(original[t, ..., c], noisy[t, ..., c]) for t in range(4) for c in range(3)])
    assert ssim(original, noisy) == pytest.approx(expected, abs=1e-6)
    assert ssim(original, original) == pytest.approx(1.0, abs=1e-12)


def test_flicker_by_hand():
    original = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    original[1] = 50
    other = original + 30  # a constant error does not flicker
    assert flicker(original, other) == 0
    other[2] = 60  # changes are +50, -50 in the one, +50, -20 in the other
    assert flicker(original, other) == pytest.approx((0 + 30) / 2, abs=1e-6)
    assert np.isnan(flicker(original[:1], other[:1]))


def test_running_moments_merge_to_those_of_everything():
    torch.manual_seed(0)
    z = torch.randn(5, 3, 2, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1) + 1000
    whole, parts = RunningMoments(), RunningMoments()
    whole.add(z)
    for part in z.split(2):
        other = RunningMoments()
        other.add(part)
        parts.merge(other.state())
    values = z.double().transpose(0, 1).flatten(1)
    for moments in (whole, parts):
        assert moments.mean.tolist() == pytest.approx(values.mean(1).tolist(), abs=1e-9)
        assert moments.std.tolist() == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-9)
        assert moments.overall == pytest.approx((float(values.mean()), float(values.std(correction=0))), abs=1e-9)


def test_measures_are_of_the_saved_pixels():
    torch.manual_seed(0)
    lpips = LPIPS((2, 2, 3, 3, 3))
    for key, value in lpips.state_dict().items():
        value.copy_(torch.rand_like(value) if key.startswith("lin") else torch.randn_like(value))
    original = torch.rand(3, 19, 16, 16) * 2 - 1
    values, (first, second) = measure(original, original * 1.5, torch.full((1, 2, 1, 1, 1), 3.0), lpips)
    assert values["psnr"] == psnr(first, second)
    assert values["latent_mean"] == 3
    assert values["latent_std"] == 0
    images = [torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1 for frames in (first, second)]
    assert values["lpips"] == pytest.approx(float(lpips(*images).mean()), rel=1e-5)  # over batches of frames
    assert list(values) == ["psnr", "ssim", "lpips", "flicker", "latent_mean", "latent_std"]


def test_overall_table():
    table = pd.DataFrame(dict(num_frames=[9, 9, 1], psnr=[30.0, 34.0, 20.0], flicker=[1.0, 3.0, np.nan]))
    rows = {(row["kind"], row["measure"]): row for row in overall_table(table).to_dict("records")}
    assert set(rows) == {("videos", "psnr"), ("videos", "flicker"), ("pictures", "psnr")}
    row = rows["videos", "psnr"]
    assert [row[key] for key in ("clips", "mean", "std", "lowest", "highest")] == [2, 32, 2, 30, 34]


def on_meta(**section):
    return build_module(section, MODELS, device_map="meta")


def test_sizes_that_an_autoencoder_takes():
    causal, deep = on_meta(type="hunyuan_vae"), on_meta(type="dc_ae")
    assert own_size(20, 100, 70, causal) == (17, 96, 64)
    assert own_size(4, 100, 70, causal) == (1, 96, 64)
    assert own_size(17, 100, 70, deep) == (16, 96, 64)
    assert own_size(7, 100, 70, deep) == (1, 96, 64)  # four frames would come back as one
    assert own_size(17, 100, 20, deep) is None
    check_size((17, 96, 64), causal, "here")
    for size, model, nearest in (((18, 96, 64), causal, "17x96x64"), ((16, 90, 64), deep, "16x96x64")):
        with pytest.raises(UserError, match=f"here: .*nearest: {nearest}"):
            check_size(size, model, "here")


def test_eval_settings():
    assert parse_eval_setting("17x256") == (17, 256, 256)
    assert parse_eval_setting("17x256x320") == (17, 256, 320)
    assert bucket_of("17x64") == {"64px_ar1:1": {17: (1.0, 1)}}
    for wrong in ("17", "17x", "17x0", "a", "1x2x3x4"):
        with pytest.raises(UserError, match="17x256x320"):
            parse_eval_setting(wrong)
    with pytest.raises(UserError, match="only squares"):
        bucket_of("17x64x32")


def test_folders_of_clips(tmp_path):
    clip = np.arange(5 * 20 * 36 * 3, dtype=np.uint8).reshape(5, 20, 36, 3)
    (tmp_path / "deep").mkdir()
    save_video(clip, tmp_path / "b.mp4", fps=8, crf=0)
    save_image(clip[0], tmp_path / "deep" / "a.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("left alone")
    table = list_media(tmp_path)
    assert [(row.num_frames, row.height, row.width) for row in table.itertuples()] == [(5, 20, 36), (1, 20, 36)]
    middle = read_clip(EvalClip("a", str(tmp_path / "deep" / "a.png"), 1, 16, 32, 1, float("nan"), keep_scale=True))
    assert torch.equal(
        ((middle[:, 0] + 1) * 127.5).round().byte(), torch.from_numpy(clip[0, 2:18, 2:34]).permute(2, 0, 1)
    )
    strided = read_clip(EvalClip("b", str(tmp_path / "b.mp4"), 2, 16, 32, 3, 8.0))
    assert strided.shape == (3, 2, 16, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable videos"):
        list_media(tmp_path / "empty")


def test_results_in_the_folder_of_clips_are_not_clips(tmp_path):
    save_image(np.zeros((16, 16, 3), dtype=np.uint8), tmp_path / "a.png")
    for name in ("orig/a_orig.png", "recn/a_recn.png", "side_by_side/a.png", "sheet.png"):
        save_image(np.zeros((16, 16, 3), dtype=np.uint8), tmp_path / "results" / name)
    assert list_media(tmp_path, tmp_path / "results")["path"].tolist() == [str(tmp_path / "a.png")]
    assert len(list_media(tmp_path / "results", tmp_path / "other")) == 4  # other results may be clips
    assert len(list_media(tmp_path)) == 5


def test_every_clip_has_a_name_of_its_own(tmp_path):
    for name in ("a.png", "a_00000.png", "deep/a.png", "b.png"):
        save_image(np.zeros((16, 16, 3), dtype=np.uint8), tmp_path / name)
    cfg = load_config(dict(dataset=dict(type="video_text", data_path=str(tmp_path))), VaeInferenceOptions)
    names = [clip.name for clip in choose_clips(cfg, on_meta(type="hunyuan_vae"))]
    assert names == ["a_00000_", "a_00000", "b", "a_00003"]


def test_tables_that_promise_too_much(tmp_path):
    save_video(np.zeros((5, 20, 36, 3), dtype=np.uint8), tmp_path / "a.mp4", fps=8)
    save_image(np.zeros((20, 36, 3), dtype=np.uint8), tmp_path / "a.png")
    with pytest.raises(BrokenMediaError, match="20x36 px, where the table says 32x32"):
        read_clip(EvalClip("a", str(tmp_path / "a.mp4"), 5, 32, 32, 1, 8.0, keep_scale=True))
    with pytest.raises(BrokenMediaError, match="a picture, where the table says 5 frames"):
        read_clip(EvalClip("a", str(tmp_path / "a.png"), 5, 16, 16, 1, float("nan")))
    row = dict(path="a.mp4", num_frames=5, height=20, width=36, fps=8.0)
    for key, value in (("num_frames", 0), ("num_frames", None), ("height", "tall"), ("width", -1)):
        pd.DataFrame([{**row, key: value}]).to_csv(tmp_path / "clips.csv", index=False)
        with pytest.raises(UserError, match=f"row 2: {key} is"):
            list_media(tmp_path / "clips.csv")
