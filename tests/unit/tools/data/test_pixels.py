"""What the pixel stages measure, on clips whose truth is known, and that they share one decoding."""

from typing import ClassVar

import av
import numpy as np
import polars as pl
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import read_image, save_image, save_video
from tools.data.engine import decode
from tools.data.engine.decode import PixelWorker
from tools.data.engine.pipeline import Pipeline
from tools.data.engine.runners import LocalRunner
from tools.data.engine.stage import NoOptions, Picture
from tools.data.sample_footage import blurred, pan, scenery, shake, still, texture, view, zoom
from tools.data.stages.camera import Camera, CameraOptions, camera_label
from tools.data.stages.frames import FrameSamples, FramesOptions
from tools.data.stages.motion import (
    Blur,
    BlurOptions,
    Flow,
    FlowOptions,
    Motion,
    MotionAnalyser,
    MotionOptions,
    middles,
    sharpness,
)

SIZE = (120, 200)
STAGES = {
    "motion": (Motion, MotionOptions),
    "flow": (Flow, FlowOptions),
    "camera": (Camera, CameraOptions),
    "blur": (Blur, BlurOptions),
    "frames": (FrameSamples, FramesOptions),
}


def measure(tmp_path, frames, *names, fps=24, crf=20, **settings) -> dict:
    """Columns that the named stages give for a clip."""
    path = save_video(frames, tmp_path / "clip.mp4", fps=fps, crf=crf)
    stages = [STAGES[n][0](STAGES[n][1](**settings), tmp_path) for n in names]
    results = PixelWorker(stages)({"clip_id": "abcd", "clip_path": path.name}, names)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return {key: value for result in results.values() for key, value in result.items()}


# ------------------------------------------------------------------------------------------------------------- motion


def vmafmotion(path) -> float:
    """Mean motion that FFmpeg's own filter finds."""
    scores = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        source, node, sink = graph.add_buffer(template=stream), graph.add("vmafmotion"), graph.add("buffersink")
        source.link_to(node)
        node.link_to(sink)
        graph.configure()
        for frame in container.decode(stream):
            graph.push(frame)
            scores.append(float(graph.pull().metadata["lavfi.vmafmotion.score"]))
    return float(np.mean(scores))


@pytest.mark.parametrize("speed", [0.5, 3.0])
def test_motion_equals_ffmpegs(tmp_path, speed):
    path = save_video(pan(texture(240, 400, 1), SIZE, 20, x=speed), tmp_path / "v.mp4", fps=24)
    analyser = MotionAnalyser(24, 24)
    for index, (time, frame) in enumerate(decode.clip_frames(path)):
        analyser.add(index, time, frame)
    assert len(analyser.scores) == 20
    assert np.mean(analyser.scores) == pytest.approx(vmafmotion(path), abs=0.01)


def test_motion_of_stills_and_of_speed(tmp_path):
    image = texture(240, 400, 2)
    assert measure(tmp_path, still(image[:120, :200], 8), "motion")["score_vmafmotion"] < 0.05
    slow, fast = (measure(tmp_path, pan(image, SIZE, 16, x=x), "motion")["score_vmafmotion"] for x in (0.5, 2))
    assert 1 < slow < fast / 1.5


def test_motion_at_other_rates():
    """Frames beyond the rate are left out; of a slower clip each counts once per time it would be shown."""

    def score(fps, images):
        analyser = MotionAnalyser(24, fps)
        for index, image in enumerate(images):
            analyser.add(index, index / fps, Picture(image, lambda: np.zeros(0)))
        return analyser.scores, analyser.result()["score_vmafmotion"]

    ramp = [np.full((16, 16), level, np.uint8) for level in range(0, 96, 2)]
    scores, value = score(24, ramp)
    assert scores[1:] == pytest.approx([2.0] * 47)
    assert value == pytest.approx(2.0, rel=0.05)
    assert score(48, ramp)[0][1:] == pytest.approx([4.0] * 23)
    slow = [ramp[0], ramp[0], *[image for image in ramp[1:] for _ in (0, 1)]]
    assert score(12, ramp)[1] == pytest.approx(score(24, slow)[1], rel=0.05)


# ------------------------------------------------------------------------------------------------------------- camera


def test_pan_and_tilt_speeds(tmp_path):
    found = measure(tmp_path, pan(texture(300, 500, 1), SIZE, 24, x=2.0), "camera", "flow")
    assert found["pan"] == pytest.approx(2.0 * 24 / 200, rel=0.05)
    assert found["flow"] == pytest.approx(2.0 * 24 / 200, rel=0.1)
    assert abs(found["tilt"]) < 0.005
    assert found["camera_motion"] == "pan right"
    found = measure(tmp_path, pan(texture(300, 500, 3), SIZE, 24, y=-1.0), "camera")
    assert found["tilt"] == pytest.approx(-1.0 * 24 / 200, rel=0.05)
    assert found["camera_motion"] == "tilt up"


@pytest.mark.parametrize(("factor", "label"), [(1.01, "zoom in"), (1 / 1.01, "zoom out")])
def test_zoom_speed(tmp_path, factor, label):
    found = measure(tmp_path, zoom(texture(500, 800, 1), SIZE, 24, factor), "camera")
    assert np.exp(found["zoom"] / 24) == pytest.approx(factor, abs=0.001)
    assert np.exp(found["zoom"]) == pytest.approx(factor**24, rel=0.01)
    assert found["camera_motion"] == label


def test_shaking_still_and_empty(tmp_path):
    image = texture(240, 400, 4)
    assert measure(tmp_path, shake(image, SIZE, 24, pixels=3), "camera")["camera_motion"] == "shake"
    found = measure(tmp_path, still(view(image, SIZE, 200, 120), 12), "camera", "flow")
    assert found["camera_motion"] == "static"
    assert found["jitter"] < 0.001
    assert found["flow"] < 0.01
    assert measure(tmp_path, np.full((12, *SIZE, 3), 90, np.uint8), "camera")["camera_motion"] == "unknown"


def test_things_that_move_are_not_the_camera(tmp_path):
    frames = still(view(texture(240, 400, 5), SIZE, 200, 120), 16)
    ball = texture(40, 40, 6)
    for number, frame in enumerate(frames):
        frame[40:80, 20 + 6 * number : 60 + 6 * number] = ball
    assert measure(tmp_path, frames, "camera")["camera_motion"] == "static"


def test_labels():
    settings = CameraOptions()
    assert camera_label(-0.2, 0.1, 0.0, 0.0, settings) == "pan left"
    assert camera_label(0.01, 0.0, -0.2, 0.0, settings) == "zoom out"
    assert camera_label(0.0, 0.02, 0.0, 0.0, settings) == "static"


# --------------------------------------------------------------------------------------------------------------- blur


def test_blur_is_told_from_sharp_at_any_quality(tmp_path):
    sharp, soft = [], []
    for seed in (1, 2):
        edges = texture(360, 640, seed) // 80 * 80 + 20
        frames = pan(edges, (180, 320), 6, x=1.0)
        for crf in (12, 34):
            sharp.append(measure(tmp_path, frames, "blur", crf=crf)["sharpness"])
            soft.append(measure(tmp_path, blurred(frames, 4.0), "blur", crf=crf)["sharpness"])
    assert min(sharp) > 2 * max(soft)


@pytest.mark.parametrize("crf", [12, 34])
def test_a_sharp_subject_on_a_soft_background_is_sharp(tmp_path, crf):
    """A ninth of the picture in focus is enough for the shipped threshold, and low contrast does not matter."""
    frames = pan(scenery(360, 640, 2), (180, 320), 6, x=1.0)
    soft = blurred(frames, 6.0)
    subject = soft.copy()
    subject[:, 60:120, 100:207] = frames[:, 60:120, 100:207]
    faint = (128 + (frames.astype(int) - 128) // 6).astype(np.uint8)
    assert measure(tmp_path, soft, "blur", crf=crf)["sharpness"] < 1
    for sharp in (frames, subject, faint):
        assert measure(tmp_path, sharp, "blur", crf=crf)["sharpness"] > 2


def test_sharpness_of_any_size():
    assert sharpness(np.full((1, 1), 9, np.uint8)) == 0
    assert sharpness(scenery(7, 300, 1)[..., 0]) > 2
    assert sharpness(np.zeros((90, 160), np.uint8)) == 0


# ------------------------------------------------------------------------------------------------------ frames, sharing


def test_frames_are_taken_from_the_middle_of_equal_parts(tmp_path):
    assert middles(3, 12) == [2, 6, 10]
    assert middles(5, 2) == [0, 1]
    frames = np.stack([np.full((40, 60, 3), 20 * number, np.uint8) for number in range(12)])
    found = measure(tmp_path, frames, "frames", side=30)
    names = [path.split("-") for path in found["frame_paths"]]
    assert [(name[0], name[2]) for name in names] == [("frames/ab/abcd", f"{number}.jpg") for number in range(3)]
    pictures = [read_image(tmp_path / path) for path in found["frame_paths"]]
    assert [picture.shape for picture in pictures] == [(20, 30, 3)] * 3
    assert [round(picture.mean() / 20) for picture in pictures] == [2, 6, 10]
    assert all(len(value) == 16 for value in found["phash"])


def test_pictures_of_other_settings_stay(tmp_path):
    frames = np.stack([np.full((40, 60, 3), 20 * number, np.uint8) for number in range(12)])
    small = measure(tmp_path, frames, "frames", side=30)
    measure(tmp_path, frames, "frames", side=45, count=5)
    assert [read_image(tmp_path / path).shape for path in small["frame_paths"]] == [(20, 30, 3)] * 3


def test_pictures_have_scores_too(tmp_path):
    save_image(texture(40, 60, 1), tmp_path / "a.png")
    stages = [kind(options(), tmp_path) for kind, options in STAGES.values()]
    results = PixelWorker(stages)({"clip_id": "abcd", "clip_path": "a.png"}, set(STAGES))
    assert results["motion"] == {"score_vmafmotion": None}
    assert results["flow"] == {"flow": None}
    assert results["camera"]["camera_motion"] == "static"
    assert results["blur"]["sharpness"] > 0
    assert len(results["frames"]["frame_paths"]) == 1


def test_one_decoding_for_all_and_failures_apart(tmp_path, monkeypatch):
    decoded = []
    original = decode.Shower.picture
    monkeypatch.setattr(decode.Shower, "picture", lambda self, frame: decoded.append(1) or original(self, frame))

    class Broken(Flow):
        name = "broken"

        def analyser(self, row, info):
            analyser = super().analyser(row, info)
            analyser.side = "wrong"
            return analyser

    path = save_video(pan(texture(240, 400, 1), SIZE, 10, x=1), tmp_path / "a.mp4", fps=24)
    stages = [kind(options(), tmp_path) for kind, options in STAGES.values()]
    worker = PixelWorker([*stages, Broken(FlowOptions(), tmp_path)])
    results = worker({"clip_id": "abcd", "clip_path": path.name}, {*STAGES, "broken"})
    assert len(decoded) == 10
    assert isinstance(results.pop("broken"), Exception)
    assert set(results) == set(STAGES)
    assert not any(isinstance(result, Exception) for result in results.values())
    assert set(worker({"clip_id": "abcd", "clip_path": path.name}, {"blur"})) == {"blur"}
    gone = worker({"clip_id": "abcd", "clip_path": "gone.mp4"}, {"blur", "flow"})
    assert all("no such file" in str(error) for error in gone.values())


def test_failures_of_stages_that_share_a_decoding_add_up(tmp_path):
    class Refusing(Flow):
        name = "refusing"
        adds: ClassVar = {}

        def analyser(self, row, info):
            raise UserError("not this one")

    save_video(pan(texture(240, 400, 1), SIZE, 4, x=1), tmp_path / "a.mp4", fps=24)
    stages = [Refusing(NoOptions(), tmp_path), Blur(BlurOptions(), tmp_path)]
    pipeline = Pipeline(stages, tmp_path / "out", LocalRunner(0), progress=False)
    clips = [str(tmp_path / name) for name in ("a.mp4", "gone.mp4")]
    table = pipeline.run(pl.DataFrame({"clip_id": ["a", "b"], "clip_path": clips}))
    assert table["error"][0] == "not this one"
    assert table["sharpness"][0] > 0
    assert table["error_stage"].to_list() == ["refusing", "refusing"]
    assert [(s.rows_in, s.rows_out, s.failed) for s in pipeline.funnel] == [(2, 0, 2), (0, 0, 0)]
