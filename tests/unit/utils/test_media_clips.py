"""Clips as people have them: every container, turned, of variable rate, trimmed, interlaced, damaged."""

import io
import os
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from opensora.utils import video
from opensora.utils.errors import UserError
from opensora.utils.media import frames as frames_module
from opensora.utils.media import kinds
from opensora.utils.media.frames import read_clip, read_frames
from opensora.utils.media.kinds import is_picture, kind_of
from opensora.utils.media.probe import probe
from opensora.utils.paths import read_text
from tests.unit.utils.media_files import (
    HEIGHT,
    WIDTH,
    edited,
    numbered,
    numbers_of,
    scene,
    see_through,
    write_clip,
    write_see_through,
)

CASES = Path(__file__).parents[4] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not there")

# ending, codec, pixel format, rate
CONTAINERS = [
    ("mp4", "libx264", "yuv420p", 24),
    ("ts", "libx264", "yuv420p", 24),
    ("m2ts", "libx264", "yuv420p", 24),
    ("mpg", "mpeg2video", "yuv420p", 25),
    ("vob", "mpeg2video", "yuv420p", 25),
    ("mxf", "mpeg2video", "yuv420p", 25),
    ("3gp", "mpeg4", "yuv420p", 24),
    ("wmv", "wmv2", "yuv420p", 24),
    ("flv", "flv", "yuv420p", 24),
    ("webm", "libvpx-vp9", "yuv420p", 24),
    ("avi", "mpeg4", "yuv420p", 24),
    ("mkv", "ffv1", "yuv444p", 24),
    ("mov", "prores_ks", "yuv422p10le", 24),
    ("h264", "libx264", "yuv420p", 25),
    ("nut", "ffv1", "yuv420p", 24),
]


@pytest.mark.parametrize("named", ["own", "none", "wrong"])
@pytest.mark.parametrize(("ending", "codec", "pixels", "rate"), CONTAINERS, ids=[c[0] for c in CONTAINERS])
def test_a_clip_is_one_whatever_its_container_and_name(tmp_path, ending, codec, pixels, rate, named):
    frames = scene()
    path = write_clip(tmp_path / f"a.{ending}", frames, codec, pixels, rate)
    if named != "own":
        path = path.rename(tmp_path / {"none": "clip", "wrong": "picture 50%d:.png"}[named])
    assert kind_of(path) == "clip"
    assert video.is_video(path)
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (12, HEIGHT, WIDTH, rate)
    assert (info.variable_rate, info.interlaced, info.hdr) == (False, False, None)
    whole, fps = read_clip(path)
    assert fps == rate
    assert np.abs(whole.astype(int) - frames).mean() < 4
    np.testing.assert_array_equal(read_frames(path, [0, 5, 5, 11], info.fps), whole[[0, 5, 5, 11]])
    np.testing.assert_array_equal(read_clip(path, 3, from_end=True)[0], whole[-3:])


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_a_clip_and_one_that_stands_still_a_picture(tmp_path, name):
    path = tmp_path / "a.jpg"
    pictures = [Image.fromarray(frame) for frame in numbered(5)]
    pictures[0].save(path, name, save_all=True, append_images=pictures[1:], duration=[100, 100, 100, 100, 100])
    assert kind_of(path) == "clip"
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (5, HEIGHT, WIDTH, 10)
    assert numbers_of(read_clip(path)[0], 5) == [0, 1, 2, 3, 4]
    assert numbers_of(read_frames(path, [1, 4], info.fps), 5) == [1, 4]
    pictures[0].save(path, name)
    assert kind_of(path) == "picture"
    assert probe(path).num_frames == 1


def test_what_is_neither_is_refused_and_named(tmp_path):
    (tmp_path / "clip.ts").write_bytes(write_clip(tmp_path / "a.ts", scene()).read_bytes())
    others = {
        "text.txt": b"hello\n" * 500,
        "empty.mp4": b"",
        "zeros.mp4": bytes(4000),
        "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n",
        "list.mp4": b"ffconcat version 1.0\nfile clip.ts\n",
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    }
    for name, content in others.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert kind_of(path) is None, name
        for read in (probe, read_clip, video.read_image, lambda p: read_frames(p, [0])):
            with pytest.raises(UserError, match=name):
                read(path)
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "gone.mp4") is None
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match=r"no video stream in .*sound\.mp4"):
        probe(tmp_path / "sound.mp4")


@pytest.mark.parametrize("upside_down", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270, -90])
def test_clips_are_turned_as_players_turn_them(tmp_path, degrees, mirrored, upside_down):
    plain = read_clip(write_clip(tmp_path / "plain.mp4", scene()))[0]
    path = write_clip(tmp_path / "turned.mp4", scene(), turned=(degrees, mirrored, upside_down))
    expected = np.rot90(plain, degrees // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if mirrored else expected
    expected = expected[:, ::-1] if upside_down else expected
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3]
    assert video.video_info(path) == video.VideoInfo(12, *expected.shape[1:3], 24.0)
    np.testing.assert_array_equal(read_clip(path)[0], expected)
    np.testing.assert_array_equal(read_frames(path, [2, 7]), expected[[2, 7]])


@pytest.mark.parametrize(
    ("ending", "codec", "pixels", "options"),
    [
        ("webm", "libvpx-vp9", "yuva420p", {"b": "3M", "auto-alt-ref": "0"}),
        ("webm", "libvpx", "yuva420p", {"b": "3M", "auto-alt-ref": "0"}),
        ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("mov", "qtrle", "argb", {}),
        ("apng", "apng", "rgba", {}),
    ],
)
def test_transparency_of_clips_is_laid_on_white(tmp_path, ending, codec, pixels, options):
    frames, white = see_through()
    path = write_see_through(tmp_path / f"a.{ending}", frames, codec, pixels, **options)
    whole, _ = read_clip(path)
    assert np.abs(whole.astype(int) - white).mean() < 6  # 26 without
    np.testing.assert_array_equal(read_frames(path, [0, 4], 24.0), whole[[0, 4]])


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = write_clip(tmp_path / "a.mkv", scene(), tags={"sample_aspect_ratio": Fraction(16, 15)})
    info = probe(path)
    assert (info.height, info.width) == (HEIGHT, round(WIDTH * 16 / 15))
    assert read_clip(path)[0].shape[1:3] == (info.height, info.width)


# which of 24 frames is on display in the middle of each of 24 equal parts, by hand: the first twelve last one tick
# each, the others three, 48 ticks in all, so a part is two ticks
SLOW_END = [1, 3, 5, 7, 9, 11, 12, 12, 13, 14, 14, 15, 16, 16, 17, 18, 18, 19, 20, 20, 21, 22, 22, 23]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "nut", "mov"])
def test_a_variable_rate_is_read_by_time(tmp_path, ending):
    times = [*range(12), *range(12, 48, 3)]
    path = write_clip(tmp_path / f"a.{ending}", numbered(24), rate=24, times=times, options={"crf": "5", "g": "6"})
    info = probe(path)
    assert (info.num_frames, info.variable_rate) == (24, True)
    assert info.fps == pytest.approx(12, rel=0.05)  # containers differ in what they know of the last frame's length
    whole, rate = read_clip(path)
    assert rate == pytest.approx(info.fps, abs=1e-3)
    shown = np.array(numbers_of(whole, 24))
    assert np.abs(shown - SLOW_END).max() <= 1
    assert np.abs(np.array(times)[shown] - np.arange(24) * 2).max() <= 3
    for window in ([0, 1, 2], [5, 6, 7, 8], [3, 9, 15, 21], [22, 23]):
        np.testing.assert_array_equal(read_frames(path, window, info.fps), whole[window])
    np.testing.assert_array_equal(read_clip(path, 5, from_end=True)[0], whole[-5:])
    with pytest.raises(UserError, match="frame 24"):
        read_frames(path, [0, 24], info.fps)


def test_rounded_time_stamps_are_no_variable_rate(tmp_path):
    path = write_clip(tmp_path / "a.mkv", numbered(60), rate=Fraction(24000, 1001), options={"crf": "5"})
    info = probe(path)
    assert (info.num_frames, info.fps, info.variable_rate) == (60, 23.976, False)
    assert numbers_of(read_clip(path)[0], 60) == list(range(60))


@pytest.mark.parametrize(("ending", "codec"), [("ts", "libx264"), ("mpg", "mpeg2video"), ("m2ts", "libx264")])
@pytest.mark.parametrize("count", [1, 2])
def test_a_frame_or_two_have_the_rate_of_their_codec(tmp_path, ending, codec, count):
    frames = np.random.default_rng(0).integers(0, 255, (count, HEIGHT, WIDTH, 3), np.uint8)
    info = probe(write_clip(tmp_path / f"a.{ending}", frames, codec))
    assert (info.num_frames, info.fps) == (count, 24.0)


def flagged_interlaced(path: Path, header: str = "", first: int = 0) -> np.ndarray:
    """A bar that moves 3 px a field, and what it looks like at the time of each frame's first field.

    Args:
        header: a codec whose frames say nothing of it, the file's header alone does.
        first: 1 where the lower field is the first one.
    """
    fields = np.zeros((48, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(48):
        fields[t, :, 3 * t % (WIDTH - 40) : 3 * t % (WIDTH - 40) + 40] = 220
    frames = fields[::2].copy()
    frames[:, 1 - first :: 2] = fields[1::2, 1 - first :: 2]
    if header:
        write_clip(path, frames, header, tags={"field_order": 3 if first else 2}, options={"crf": "10", "g": "6"})
    else:
        write_clip(path, frames, options={"x264-params": "tff=1:cpu-independent=1", "crf": "10", "g": "6"})
    return fields[::2]


@pytest.mark.parametrize(
    ("ending", "header", "first"),
    [("mp4", "", 0), ("ts", "", 0), ("mkv", "libx264", 0), ("mkv", "ffv1", 1)],
)
def test_interlaced_clips_are_made_whole(tmp_path, ending, header, first):
    path = tmp_path / f"a.{ending}"
    whole = flagged_interlaced(path, header, first)
    info = probe(path)
    assert info.interlaced
    assert info.num_frames == 24
    frames, _ = read_clip(path)

    def combs(pixels: np.ndarray) -> float:
        grey = pixels[..., 0].astype(int)
        return float(np.abs(2 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:]).mean())

    with av.open(str(path)) as container:
        raw = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert combs(raw) > 8 * combs(frames)
    assert np.abs(frames[2:-2].astype(int) - whole[2:-2]).mean() < 6
    for window in ([0, 1], [1, 2], [9, 10, 13], [12], [23]):
        got = read_frames(path, window, info.fps)
        assert np.abs(got.astype(int) - frames[window]).max() <= 2


SHARED = {  # frames, height, width, rate, and what else is known of it
    "anim.gif": (20, 96, 160, 20.0, ""),
    "clip.ts": (40, 96, 160, 24.0, ""),
    "elst.mp4": (30, 96, 160, 24.0, ""),
    "exif6.jpg": (1, 96, 160, None, ""),
    "hlg.mp4": (72, 96, 160, 24.0, "HLG"),
    "interl.mp4": (40, 96, 160, 24.0, "interlaced"),
    "num.mp4": (40, 96, 160, 24.0, ""),
    "plain.mp4": (40, 96, 160, 24.0, ""),
    "rot90.mp4": (40, 160, 96, 24.0, ""),
    "up.png": (1, 96, 160, None, ""),
    "vfr.mp4": (40, 96, 160, 15.385, "variable"),
}


@needs_cases
@pytest.mark.parametrize("name", SHARED)
def test_shared_files_are_what_they_show(name):
    path, (count, height, width, rate, what) = CASES / name, SHARED[name]
    info = probe(path)
    known = info.hdr or ("interlaced" if info.interlaced else "variable" if info.variable_rate else "")
    assert (info.num_frames, info.height, info.width, known) == (count, height, width, what)
    if rate is None:
        upright = video.read_image(CASES / "up.png")
        assert np.abs(video.read_image(path).astype(int) - upright).mean() < 2
        return
    frames, fps = read_clip(path)
    assert (frames.shape[:3], info.fps, round(fps, 3)) == ((count, height, width), rate, rate)
    near = read_frames(path, [0, count // 2, count - 1], info.fps).astype(int)
    assert np.abs(near - frames[[0, count // 2, count - 1]]).max() <= 2
    if name == "rot90.mp4":
        np.testing.assert_array_equal(frames, np.rot90(read_clip(CASES / "plain.mp4")[0], -1, axes=(1, 2)))


@needs_cases
def test_what_an_edit_list_cuts_off_is_not_there():
    path = CASES / "elst.mp4"
    info = probe(path)
    frames, _ = read_clip(path)
    assert info.num_frames == len(frames) == video.video_info(path).num_frames == 30
    np.testing.assert_array_equal(read_frames(path, [0, 29], info.fps), frames[[0, 29]])
    with pytest.raises(UserError, match="frame 30"):
        read_frames(path, [0, 30], info.fps)


@pytest.mark.parametrize(("start", "length"), [(0, 20), (4, 20), (7, 30), (10, 5)])
def test_edit_lists_are_followed(tmp_path, start, length):
    source = write_clip(tmp_path / "a.mp4", numbered(40), options={"crf": "5", "g": "12", "bf": "2"})
    path = edited(source, tmp_path / "cut.mp4", start, length)
    frames, _ = read_clip(path)
    shown = numbers_of(frames, 40)
    assert shown == list(range(start, start + len(shown)))
    assert abs(len(shown) - length) <= 1  # a film's ticks are coarser than a frame
    info = probe(path)
    assert (info.num_frames, info.fps) == (len(shown), 24)
    assert numbers_of(read_frames(path, [0, 3, len(shown) - 1], info.fps), 40) == [shown[0], shown[3], shown[-1]]
    with pytest.raises(UserError, match=f"frame {len(shown)}"):
        read_frames(path, [0, len(shown)], info.fps)


def paused(source: Path, target: Path, entries: list[tuple[float, int]]) -> Path:
    """A copy of an mp4 with an edit list of (seconds, first frame, -1 for a pause) in place of the one it has."""
    data = bytearray(source.read_bytes())
    at = data.index(b"elst")
    first, size = int.from_bytes(data[at + 16 : at + 20], "big"), int.from_bytes(data[at - 4 : at], "big")
    rows = [(round(seconds * 1000), frame if frame < 0 else first + frame * 512) for seconds, frame in entries]
    new = bytearray((16 + 12 * len(rows)).to_bytes(4, "big") + b"elst" + bytes(4) + len(rows).to_bytes(4, "big"))
    for length, place in rows:
        new += length.to_bytes(4, "big") + (place & 2**32 - 1).to_bytes(4, "big") + b"\0\1\0\0"
    data[at - 4 : at - 4 + size] = new
    for box in (b"edts", b"trak", b"moov"):
        start = data.index(box) - 4
        longer = int.from_bytes(data[start : start + 4], "big") + len(new) - size
        data[start : start + 4] = longer.to_bytes(4, "big")
    target.write_bytes(data)
    return target


def test_pauses_and_jumps_of_an_edit_list(tmp_path):
    source = write_clip(tmp_path / "a.mp4", numbered(40), options={"crf": "5", "g": "12", "bf": "2"})
    cut = paused(source, tmp_path / "cut.mp4", [(10 / 24, 0), (10 / 24, 20)])
    assert set(numbers_of(read_clip(cut)[0], 40)) <= {*range(11), *range(20, 31)}
    late = paused(source, tmp_path / "late.mp4", [(1.0, -1), (40 / 24, 0)])
    assert (probe(late).num_frames, probe(late).fps, probe(late).variable_rate) == (40, 24.0, False)
    for entries in ([(10 / 24, 0), (0.5, -1), (10 / 24, 20)], [(10 / 24, 20), (10 / 24, 0)], [(10 / 24, 0)] * 2):
        path = paused(source, tmp_path / "paused.mp4", entries)
        info, (whole, rate) = probe(path), read_clip(path)
        assert (len(whole), rate) == (info.num_frames, pytest.approx(info.fps, abs=1e-3))
        for window in ([0, 9, 14], [12, 13], [len(whole) - 1]):
            np.testing.assert_array_equal(read_frames(path, window, info.fps), whole[window])


def test_recordings_that_were_joined_keep_their_rate(tmp_path):
    parts = [write_clip(tmp_path / f"{i}.ts", numbered(48)[24 * i : 24 * i + 24], options={"crf": "5"}) for i in (0, 1)]
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    info, (whole, rate) = probe(tmp_path / "a.ts"), read_clip(tmp_path / "a.ts")
    assert (info.num_frames, info.fps, rate, info.variable_rate) == (48, 24.0, 24.0, False)
    assert numbers_of(whole, 48) == list(range(48))
    assert numbers_of(read_frames(tmp_path / "a.ts", [3, 30, 47], info.fps), 48) == [3, 30, 47]


def test_of_several_videos_it_is_the_film(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as target:  # whose thumbnail is a track like any other
        small, film = target.add_stream("mjpeg", rate=1), target.add_stream("libx264", rate=24)
        small.height, small.width, small.pix_fmt = 64, 64, "yuvj420p"
        film.height, film.width, film.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        target.mux([*small.encode(black.reformat(format="yuvj420p")), *small.encode()])
        for picture in scene():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            target.mux(film.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601)))
        target.mux(film.encode())
    info, (whole, _) = probe(path), read_clip(path)
    assert (info.num_frames, info.codec) == (12, "h264")
    assert np.abs(whole.astype(int) - scene()).mean() < 4
    np.testing.assert_array_equal(read_frames(path, [2, 9], info.fps), whole[[2, 9]])


def test_the_picture_on_a_cover_is_no_clip(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(scene(1)[0]).save(picture, "JPEG")
    tag = b"\0image/jpeg\0\3\0" + picture.getvalue()
    size = len(tag)
    frame = b"APIC" + size.to_bytes(4, "big") + b"\0\0" + tag
    bits = [(len(frame) >> shift) & 127 for shift in (21, 14, 7, 0)]
    sound = bytes.fromhex("fffb9064") + bytes(413)
    (tmp_path / "song.mp3").write_bytes(b"ID3\3\0\0" + bytes(bits) + frame + sound * 20)
    assert kind_of(tmp_path / "song.mp3") is None


def test_a_codec_nobody_knows_is_named(tmp_path):
    data = write_clip(tmp_path / "a.mp4", scene()).read_bytes().replace(b"avc1", b"zzzz")
    (tmp_path / "odd.mp4").write_bytes(data)
    for read in (probe, read_clip, lambda p: read_frames(p, [0, 1])):
        with pytest.raises(UserError, match=r"odd\.mp4"):
            read(tmp_path / "odd.mp4")


def test_frames_that_change_their_size_are_scaled_to_the_first(tmp_path):
    parts = [write_clip(tmp_path / f"{i}.h264", scene(4, *size)) for i, size in enumerate([(96, 160), (64, 96)])]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, _ = read_clip(tmp_path / "both.h264")
    assert frames.shape == (8, 96, 160, 3)
    assert np.abs(frames[4].astype(int) - frames[0]).mean() < 25


def test_what_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", scene())
    monkeypatch.setattr(frames_module, "MAX_BYTES", 10 * HEIGHT * WIDTH * 3)
    assert len(read_clip(path, max_frames=10)[0]) == len(read_clip(path, max_frames=10, from_end=True)[0]) == 10
    assert len(read_frames(path, range(10))) == 10
    for read in (read_clip, lambda p: read_frames(p, range(11))):
        with pytest.raises(UserError, match=r"long\.mp4.*11 frames of 96x160 pixels take more than"):
            read(path)
    monkeypatch.setattr(kinds, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(UserError, match=r"frames of 160x96 pixels, which is too large, in .*long\.mp4"):
        probe(path)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi", "gif", "webp"])
def test_damaged_clips_are_read_or_refused_by_name(tmp_path, ending):
    """Cut anywhere, and with bytes of chance: frames or a UserError, quickly, and nothing else."""
    path = tmp_path / f"whole.{ending}"
    if ending in ("gif", "webp"):
        pictures = [Image.fromarray(frame) for frame in scene()]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    else:
        write_clip(path, scene(), {"avi": "mpeg4"}.get(ending, "libx264"))
    data, rng = path.read_bytes(), np.random.default_rng(5)
    bad = tmp_path / f"bad.{ending}"
    start = time.process_time()
    for number in range(30):
        changed = bytearray(data)
        if number % 3 == 0:
            changed = changed[: int(rng.integers(1, len(data)))]
        else:
            within = len(data) if number % 3 == 1 else min(len(data), 800)  # headers
            for place in rng.integers(0, within, 1 + number % 8):
                changed[place] = rng.integers(256)
        bad.write_bytes(changed)
        for read in (probe, read_clip, is_picture, lambda p: read_frames(p, [0, 3], 24.0)):
            refused = _refusal(read, bad)
            assert refused is None or f"bad.{ending}" in refused
    assert time.process_time() - start < 60


def _refusal(read: Callable[[Path], object], path: Path) -> str | None:
    try:
        read(path)
    except UserError as error:
        return str(error)
    return None


def test_what_an_interlaced_clip_says_of_itself_is_kept(tmp_path):
    tags = {"colorspace": 1, "color_range": 2, "color_primaries": 1, "color_trc": 1}
    still = scene(1).repeat(6, axis=0)
    options = {"x264-params": "tff=1:cpu-independent=1", "crf": "5"}
    path = write_clip(
        tmp_path / "a.mp4",
        still,
        matrix=Colorspace.ITU709,
        full=True,
        tags=tags,
        options=options,
        turned=(-90, True, False),
    )
    assert probe(path).interlaced
    expected = np.rot90(still, -1, axes=(1, 2))[:, :, ::-1]
    frames, _ = read_clip(path)
    assert np.abs(frames.astype(int) - expected).mean() < 3
    inner = np.abs(frames.astype(int) - expected)[:, 10:-10, 10:-10].max(axis=(0, 3))
    assert np.median(inner) < 4


def test_a_pipe_is_nothing(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert kind_of(tmp_path / "a.png") is None
    assert not is_picture(tmp_path / "a.png")
    with pytest.raises(OSError, match="not a file"):
        read_text(tmp_path / "a.png")
