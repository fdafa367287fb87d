"""Footage as people have it: what ``ingest`` and ``cut`` make of it is what the reader of clips shows of it."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from opensora.utils.media.probe import probe
from opensora.utils.video import read_image, read_video
from tests.unit.utils.media_files import (
    edited,
    numbered,
    numbers_of,
    scene,
    see_through,
    write_clip,
    write_see_through,
)
from tools.data.engine.decode import clip_frames, clip_info
from tools.data.engine.pipeline import Pipeline
from tools.data.engine.runners import LocalRunner
from tools.data.engine.stage import NoOptions
from tools.data.listing import list_files
from tools.data.stages.cut import Cut, CutOptions, Whole
from tools.data.stages.ingest import Ingest, IngestOptions
from tools.data.stages.scenes import Scenes, ScenesOptions

BT709_LIMITED = {"color_primaries": 1, "color_trc": 1, "colorspace": 1, "color_range": 1}
HLG = {"colorspace": 9, "color_primaries": 9, "color_trc": 18, "color_range": 1}
LOSSY = {"crf": "5"}


def cut_all(folder: Path) -> dict[str, dict]:
    """Rows by the names of their files, with ``frames`` of the clips."""
    out = folder.parent / "out"
    ingest = IngestOptions(min_seconds=0.0, min_bpp=0.0, min_fps=1.0, max_aspect=9.0, min_aspect=0.1)
    cutting = CutOptions(min_seconds=0.1, crf=5, max_side=2000, remove_borders=False)
    stages = [Ingest(ingest, out), Scenes(ScenesOptions(threshold=100.0), out), Cut(cutting, out)]
    table = Pipeline(stages, out, LocalRunner(0), progress=False).run(list_files(folder))
    assert table["error"].drop_nulls().to_list() == []
    return {Path(row["path"]).name: {**row, "file": out / row["clip_path"]} for row in table.iter_rows(named=True)}


def difference(clip: Path, source: Path) -> float:
    """Mean difference in levels of a clip and of what the reader shows of its source."""
    ours, theirs = read_video(clip)[0], read_video(source)[0]
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(int) - theirs).mean())


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.ts", "libx264", 24),
        ("a.mts", "libx264", 25),
        ("a.mpg", "mpeg2video", 25),
        ("a.3gp", "libx264", 24),
        ("a.flv", "libx264", 24),
        ("a.wmv", "wmv2", 24),
        ("a.ogv", "libtheora", 24),
        ("a.MP4", "libx264", 24),
    ],
)
def test_clips_of_all_containers_are_taken(tmp_path, name, codec, rate):
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg without {codec}")
    raw = tmp_path / "raw"
    raw.mkdir()
    source = write_clip(raw / name, scene(24), codec=codec, rate=rate, options=LOSSY if codec == "libx264" else {})
    source.with_name("README").write_text("about " * 40)
    source.with_name("t.csv").write_text("path,text\na,b\n")
    rows = cut_all(raw)
    assert set(rows) == {name}
    assert rows[name]["kind"] == "video"
    assert abs(rows[name]["num_frames"] - 24) <= 1
    assert (rows[name]["height"], rows[name]["width"]) == (96, 160)


def test_names_say_nothing(tmp_path):
    """A clip called .jpg, a picture called .mp4, an animation, and files with other endings or none."""
    raw = tmp_path / "raw"
    raw.mkdir()
    write_clip(tmp_path / "clip.mp4", scene(12)).rename(raw / "clip.jpg")
    Image.fromarray(scene(1)[0]).save(raw / "picture.mp4", "PNG")
    Image.fromarray(scene(1)[0]).save(raw / "picture", "JPEG")
    frames = [Image.fromarray(frame) for frame in scene(8)]
    frames[0].save(raw / "moves.gif", save_all=True, append_images=frames[1:], duration=50)
    frames[1].save(raw / "still.gif")
    (raw / "notes.log").write_text("no film " * 9)
    rows = cut_all(raw)
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds == {
        "clip.jpg": "video",
        "picture.mp4": "image",
        "picture": "image",
        "moves.gif": "video",
        "still.gif": "image",
    }
    assert (rows["moves.gif"]["num_frames"], rows["moves.gif"]["fps"]) == (8, 20.0)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
def test_clips_are_turned_and_mirrored_as_players_show_them(tmp_path, degrees, flips):
    raw = tmp_path / "raw"
    raw.mkdir()
    source = write_clip(raw / "a.mp4", scene(12), turned=(degrees, *flips), options=LOSSY)
    (row,) = cut_all(raw).values()
    assert (row["source_height"], row["source_width"]) == (row["height"], row["width"])
    assert difference(row["file"], source) < 3  # other corners at the top differ by tens of levels
    assert probe(row["file"]).height == (160 if degrees % 180 else 96)


@pytest.mark.parametrize("kind", ["turned", "high dynamic range", "wide pixels"])
def test_borders_are_found_in_frames_as_they_are_stored(tmp_path, kind):
    frames = np.pad(scene(12).clip(60), ((0, 0), (12, 12), (0, 0), (0, 0)))
    made = {
        "turned": {"turned": (90, False, False)},
        "high dynamic range": dict(codec="libx265", pixels="yuv420p10le", tags=HLG, matrix=Colorspace.BT2020),
        "wide pixels": {"tags": {"sample_aspect_ratio": Fraction(3, 2)}},
    }
    source = write_clip(tmp_path / "a.mkv" if kind == "wide pixels" else tmp_path / "a.mp4", frames, **made[kind])
    stage = Cut(CutOptions(min_seconds=0.1), tmp_path / "out")
    row = {"path": str(source), "kind": "video", "source_id": "a", "scenes": [[0.0, 0.5]]}
    (clip,) = stage.worker()(row)
    sizes = {"turned": (160, 96), "high dynamic range": (96, 160), "wide pixels": (96, 240)}
    assert (clip["height"], clip["width"]) == sizes[kind]


def test_photographs_stand_upright(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(scene(1)[0]).save(raw / f"{orientation}.png", exif=exif)
    for name, row in cut_all(raw).items():
        lying = int(name[0]) > 4
        assert (row["source_height"], row["source_width"]) == ((160, 96) if lying else (96, 160))
        assert np.array_equal(read_image(row["file"]), read_image(raw / name))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("tag", "matrix"),
    [(None, Colorspace.ITU601), (1, Colorspace.ITU709), (5, Colorspace.ITU601), (9, Colorspace.BT2020)],
)
def test_clips_are_bt709_of_limited_range_and_say_so(tmp_path, tag, matrix, full):
    raw = tmp_path / "raw"
    raw.mkdir()
    tags = {"color_range": 1 + full, **({"colorspace": tag} if tag else {})}
    source = write_clip(raw / "a.mp4", scene(6), matrix=matrix, full=full, tags=tags, options=LOSSY)
    (row,) = cut_all(raw).values()
    with av.open(str(row["file"])) as container:
        context = container.streams.video[0].codec_context
        assert {name: int(getattr(context, name)) for name in BT709_LIMITED} == BT709_LIMITED
    assert difference(row["file"], source) < 2


@pytest.mark.parametrize("size", [(608, 320), (720, 1280)])
def test_high_definition_without_a_name_is_bt709(tmp_path, size):
    raw = tmp_path / "raw"
    raw.mkdir()
    source = write_clip(raw / "a.mp4", scene(3, *size), matrix=Colorspace.ITU709, options=LOSSY)
    (row,) = cut_all(raw).values()
    assert difference(row["file"], source) < 1.5


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_tone_mapped(tmp_path, transfer):
    raw = tmp_path / "raw"
    raw.mkdir()
    signal = (scene(12).astype(np.float64) / 255 * {16: 0.58, 18: 0.75}[transfer] * 65535).astype(np.uint16)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1}
    matrix = Colorspace.BT2020
    source = write_clip(raw / "a.mp4", signal, "libx265", "yuv420p10le", matrix=matrix, tags=tags, options={"crf": "5"})
    (row,) = cut_all(raw).values()
    assert difference(row["file"], source) < 3
    assert read_video(row["file"])[0].max() > 225  # white is white
    _, picture = next(clip_frames(source))
    shown = read_video(source)[0][0]
    assert np.array_equal(picture.rgb, shown)
    assert np.abs(picture.luma.astype(int) - shown @ (0.299, 0.587, 0.114)).max() < 2


def test_interlaced_clips_have_no_combs(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    frames = scene(25)
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "crf": "5"}
    woven = frames[:-1].copy()
    woven[:, 1::2] = frames[1:, 1::2]  # the lower field is a moment later
    source = write_clip(raw / "a.mp4", woven, options=options)
    assert probe(source).interlaced
    (row,) = cut_all(raw).values()
    assert difference(row["file"], source) < 2
    made = read_video(row["file"])[0].astype(int)
    assert np.abs(made[12] - woven[12]).max() > 60, "the combs are gone"
    assert not probe(row["file"]).interlaced


@pytest.mark.parametrize(("codec", "pixels", "ending"), [("prores_ks", "yuva444p10le", "mov"), ("png", "rgba", "mov")])
def test_transparency_is_laid_on_white(tmp_path, codec, pixels, ending):
    raw = tmp_path / "raw"
    raw.mkdir()
    source = write_see_through(raw / f"a.{ending}", see_through()[0], codec, pixels)
    (row,) = cut_all(raw).values()
    assert difference(row["file"], source) < 3  # 26 without
    _, picture = next(clip_frames(source))
    assert picture.luma[45, 80] > 250


def test_animations_keep_their_rate(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    pictures = [Image.fromarray(frame) for frame in numbered(5)]
    pictures[0].save(raw / "a.webp", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    (row,) = cut_all(raw).values()
    assert (row["num_frames"], row["fps"]) == (5, 10.0)
    assert numbers_of(read_video(row["file"])[0], 5) == [0, 1, 2, 3, 4]


def test_recordings_that_were_joined_are_whole(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    parts = [write_clip(tmp_path / f"{i}.ts", numbered(48)[24 * i : 24 * i + 24], options=LOSSY) for i in (0, 1)]
    (raw / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    (row,) = cut_all(raw).values()
    assert (row["num_frames"], row["fps"], row["source_seconds"]) == (48, 24.0, 2.0)
    assert numbers_of(read_video(row["file"])[0], 48) == list(range(48))


def test_what_an_edit_list_cuts_off_is_not_there(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    whole = write_clip(tmp_path / "whole.mp4", numbered(40), options={"crf": "5", "bf": "0"})
    source = edited(whole, raw / "a.mp4", start=6, length=30)
    (row,) = cut_all(raw).values()
    assert row["source_seconds"] == pytest.approx(30 / 24, abs=0.02)
    assert row["num_frames"] == 30
    assert numbers_of(read_video(row["file"])[0], 40) == numbers_of(read_video(source)[0], 40) == list(range(6, 36))
    assert clip_info(source).num_frames == 30


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_rates_are_cut_by_time(tmp_path, ending):
    raw = tmp_path / "raw"
    raw.mkdir()
    times = [*range(0, 12), *range(12, 48, 3), *range(48, 60)]
    source = write_clip(raw / f"a.{ending}", numbered(len(times)), times=times, rate=Fraction(24), options=LOSSY)
    (row,) = cut_all(raw).values()
    made, fps = read_video(row["file"])
    shown = numbers_of(made, len(times))
    assert shown == sorted(shown)
    for index, number in enumerate(shown):
        assert times[number] / 24 <= index / fps + 0.05, "no frame is shown before its time"
    assert len(made) / fps == pytest.approx(60 / 24, abs=0.1)
    assert row["source_fps"] == pytest.approx(len(times) / (60 / 24), rel=0.05)
    assert probe(source).variable_rate


def test_whole_clips_are_described_as_they_are_read(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for degrees in (0, 90):
        write_clip(raw / f"{degrees}.mp4", scene(12), turned=(degrees, False, False))
    out = tmp_path / "out"
    stages = [Ingest(IngestOptions(min_seconds=0.0, min_bpp=0.0), out), Whole(NoOptions(), out)]
    table = Pipeline(stages, out, LocalRunner(0), progress=False).run(list_files(raw))
    assert table.select("height", "width", "num_frames").rows() == [(96, 160, 12), (160, 96, 12)]
    assert table["fps"].to_list() == [24.0, 24.0]
