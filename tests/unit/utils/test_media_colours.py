"""Colours of clips: whatever they are stored as, they come out as they were, in BT.709 of standard range."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from opensora.utils import video
from opensora.utils.errors import UserError
from opensora.utils.media import hdr
from opensora.utils.media.frames import read_clip, read_frames
from opensora.utils.media.probe import probe
from tests.unit.utils.media_files import BARS, scene, write_clip

CASES = Path(__file__).parents[4] / "shared" / "cases"
BT601, BT709, BT2020 = Colorspace.ITU601, Colorspace.ITU709, Colorspace.BT2020
RANGES = {False: 1, True: 2}


def bars(path: Path, height: int = 96) -> np.ndarray:
    """Colours of the bars of a :func:`scene`, read from a clip: float [8, 3]."""
    frame = read_clip(path, max_frames=1)[0][0]
    width = frame.shape[1] // len(BARS)
    return np.stack([frame[height // 2, i * width + width // 2] for i in range(len(BARS))]).astype(float)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("tag", "matrix"), [(1, BT709), (5, BT601), (6, BT601), (7, Colorspace.SMPTE240M), (9, BT2020), (4, Colorspace.FCC)]
)
def test_the_matrix_and_range_that_a_clip_names_are_honoured(tmp_path, tag, matrix, full):
    tags = {"colorspace": tag, "color_range": RANGES[full]}
    path = write_clip(tmp_path / "a.mp4", scene(2), matrix=matrix, full=full, tags=tags, options={"crf": "5"})
    assert np.abs(bars(path) - BARS).max() < 6


@pytest.mark.parametrize(
    ("size", "matrix"),
    [((96, 160), BT601), ((576, 720), BT601), ((608, 320), BT709), ((96, 1280), BT709), ((720, 1280), BT709)],
)
def test_without_a_name_it_is_the_one_that_players_take(tmp_path, size, matrix):
    path = write_clip(tmp_path / "a.mp4", scene(1, *size), matrix=matrix, options={"crf": "5"})
    assert np.abs(bars(path, size[0]) - BARS).max() < 6


def to_signal(pictures: np.ndarray, transfer: int, to_2020: bool = True) -> np.ndarray:
    """uint16 RGB of HDR (or of BT.2020 in standard range) that shows the colours of uint8 pictures, white at 203
    cd/m2: what :func:`hdr.to_sdr` undoes, from other formulas (light by light, inverse OOTF first)."""
    light = (pictures / 255.0) ** 2.4
    if to_2020:
        light = light @ np.linalg.inv(np.array(hdr.TO_BT709[hdr.BT2020])).T
    light = light.clip(0)
    if transfer == hdr.PQ:
        y = (light * 203 / 10000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    elif transfer == hdr.HLG:
        display = light * 0.203
        luma = display @ np.array((0.2627, 0.6780, 0.0593))
        linear = display * np.maximum(luma, 1e-9)[..., None] ** (1 / 1.2 - 1)
        high = 0.17883277 * np.log(np.maximum(12 * linear - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(linear <= 1 / 12, np.sqrt(3 * linear), high)
    else:
        signal = light ** (1 / 2.4)
    return np.round(signal.clip(0, 1) * 65535).astype(np.uint16)


def hdr_clip(path: Path, transfer: int, codec: str = "libx265", pixels: str = "yuv420p10le", **tags: int) -> Path:
    named = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1, **tags}
    options = {"x265-params": "log-level=none", "crf": "8"} if codec == "libx265" else {}
    frames = to_signal(scene(3), transfer)
    return write_clip(path, frames, codec, pixels, matrix=BT2020, tags=named, options=options)


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
@pytest.mark.parametrize(
    ("ending", "codec", "pixels"), [("mp4", "libx265", "yuv420p10le"), ("mkv", "ffv1", "yuv422p12le")]
)
def test_high_dynamic_range_is_tone_mapped(tmp_path, transfer, ending, codec, pixels):
    path = hdr_clip(tmp_path / f"a.{ending}", transfer, codec, pixels)
    assert probe(path).hdr == {hdr.PQ: "PQ", hdr.HLG: "HLG"}[transfer]
    found = bars(path)
    white = read_clip(path)[0][0, 8:16, 4:12].mean()
    assert 225 < white <= 240
    assert np.abs(found[6] - 120).max() < 8  # mid grey stays where it is
    expected = BARS.astype(float)
    assert np.abs(found - expected).max() < 30  # the brightest come down a little
    assert np.abs(found - expected).mean() < 10
    hues = [(row - row.mean()) / np.linalg.norm(row - row.mean()) for row in (*found[:6], *expected[:6])]
    assert min(float(a @ b) for a, b in zip(hues[:6], hues[6:])) > 0.98
    np.testing.assert_array_equal(read_frames(path, [0, 2], 24.0), read_clip(path)[0][[0, 2]])
    with pytest.raises(UserError, match=f"high dynamic range .{probe(path).hdr}"):
        read_clip(path, on_hdr="refuse")


@pytest.mark.parametrize("transfer", [1, 2, 14])
def test_wide_gamut_of_standard_range_is_brought_to_bt709(tmp_path, transfer):
    path = hdr_clip(tmp_path / "a.mkv", transfer, "ffv1")
    assert probe(path).hdr is None
    assert np.abs(bars(path) - BARS).max() < 6


def test_colours_that_the_file_alone_names_are_honoured(tmp_path):
    """ProRes has names of its own, which are empty here."""
    path = hdr_clip(tmp_path / "a.mov", hdr.PQ, "prores_ks", "yuv422p10le")
    with av.open(str(path)) as container:
        assert int(next(container.decode(video=0)).color_trc) == 2
    assert probe(path).hdr == "PQ"
    assert 225 < read_clip(path)[0][0, 8:16, 4:12].mean() <= 240
    np.testing.assert_array_equal(read_frames(path, [0, 2], 24.0), read_clip(path)[0][[0, 2]])


def test_brighter_light_stays_brighter_up_to_the_peak():
    nits = np.array([0.0, 0.1, 1, 10, 50, 100, 203, 400, 700, 1000, 4000])
    signal = np.round(hdr.nits_to_pq(nits) * 65535).astype(np.uint16)
    mapped = hdr.to_sdr(np.repeat(signal[None, :, None], 3, axis=2), hdr.PQ, hdr.BT2020)[0, :, 0].astype(int)
    assert (np.diff(mapped[:9]) > 0).all()
    assert (mapped[0], mapped[-2], mapped[-1]) == (0, 255, 255)
    dark = nits < 100
    np.testing.assert_allclose(mapped[dark], 255 * (nits[dark] / 203) ** (1 / 2.4), atol=3)  # below the knee


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not there")
def test_the_case_of_a_phone_in_hlg():
    frames, _ = read_clip(CASES / "hlg.mp4")
    assert frames.shape == (72, 96, 160, 3)
    assert (frames[:, 40, 150] > 225).all()


def test_a_matrix_that_cannot_be_undone_is_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4", scene(2), tags={"colorspace": 8})
    with pytest.raises(UserError, match="YCgCo"):
        read_clip(path)


def natural(count: int, height: int, width: int) -> np.ndarray:
    """Smooth light and shade in muted colours that drift: uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0 : height + count, 0 : width + 2 * count]
    light = 0.5 + 0.3 * np.sin(x / 61 + np.cos(y / 47)) * np.cos(y / 83) + 0.12 * np.sin(x / 17 + y / 23)
    tint = np.stack([0.1 * np.sin(x / 150), 0.05 * np.cos(y / 170), 0.12 * np.sin((x + y) / 190)], axis=-1)
    whole = np.round((light[..., None] + tint).clip(0, 1) * 255).astype(np.uint8)
    return np.stack([whole[i : i + height, 2 * i : 2 * i + width] for i in range(count)])


@pytest.mark.parametrize("size", [(576, 1024), (768, 768)])
def test_written_colours_are_what_a_player_shows(tmp_path, size):
    frames = natural(6, *size)
    path = video.save_video(frames, tmp_path / "a.mp4", 24)
    with av.open(str(path)) as container:
        stored = list(container.decode(video=0))
    assert {(f.colorspace, f.color_primaries, f.color_trc, f.color_range) for f in stored} == {(1, 1, 1, 1)}
    # undone here by the formulas of BT.709 themselves
    y, u, v = (np.stack(planes).astype(float) for planes in zip(*(_planes(frame) for frame in stored)))
    luma, blue, red = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    shown = np.stack([luma + 1.5748 * red, luma - 0.187324 * blue - 0.468124 * red, luma + 1.8556 * blue], axis=-1)
    error = np.mean((shown.clip(0, 1) * 255 - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 40
    assert np.abs((shown.clip(0, 1) * 255 - frames).mean(axis=(0, 1, 2))).max() < 0.5  # no colour cast
    back, _ = video.read_video(path)
    assert 10 * np.log10(255**2 / np.mean((back.astype(float) - frames) ** 2)) > 38


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    whole = frame.to_ndarray()
    y, rest = np.split(whole, [frame.height])
    half = rest.reshape(2, frame.height // 2, frame.width // 2)
    return [y, *(plane.repeat(2, axis=0).repeat(2, axis=1) for plane in half)]
