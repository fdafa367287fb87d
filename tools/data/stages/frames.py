"""Pictures taken out of each clip once, for all stages that look at pictures, with their perceptual hashes."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl
from PIL import Image

from opensora.config.options import Options, opt
from opensora.utils.files import write_beside
from tools.data.engine.stage import (
    LARGEST_SIDE,
    SMALLEST_SIDE,
    Analyser,
    ClipInfo,
    Picture,
    PixelStage,
    Row,
    check_library,
    shrink,
)
from tools.data.stages.motion import middles


@dataclass(frozen=True, kw_only=True)
class FramesOptions(Options):
    """Pictures taken out of a clip for the stages after."""

    count: int = opt(3, "frames per clip, at the middle of equal parts", least=1, most=1000)
    side: int = opt(720, "long side", "px", least=SMALLEST_SIDE, most=LARGEST_SIDE)
    quality: int = opt(92, "of the JPEG", least=1, most=100)


class FrameSamples(PixelStage):
    """JPEGs ``frames/xx/CLIP_ID-SETTINGS-N.jpg`` and one 64-bit perceptual hash (hex) of each.

    The name holds a hash of the settings: those of others stay, and stages that look at the pictures tell them apart.
    """

    settings: FramesOptions

    name = "frames"
    version = 3
    adds: ClassVar = {"frame_paths": pl.List(pl.String), "phash": pl.List(pl.String)}
    files = ("frame_paths",)
    folders = ("frames",)

    def check(self) -> None:
        """The hash's library is there."""
        check_library("imagehash", "stage 'frames'")

    def analyser(self, row: Row, info: ClipInfo) -> Analyser:
        """Frames of one clip."""
        return _Saver(self, row["clip_id"], info)


class _Saver(Analyser):
    def __init__(self, stage: FrameSamples, clip_id: str, info: ClipInfo) -> None:
        self.stage, self.clip_id = stage, clip_id
        self.settings_id = stage.fingerprint()[:8]
        self.wanted = middles(stage.settings.count, info.num_frames)
        self.taken: dict[int, np.ndarray] = {}

    def add(self, index: int, time: float, frame: Picture) -> None:
        """Keep the frame if it is one of the chosen."""
        if index in self.wanted or index == 0:
            self.taken[index] = shrink(frame.rgb, self.stage.settings.side)

    def result(self) -> Row:
        """Write the pictures and hash them."""
        import imagehash

        if 0 not in self.wanted and len(self.taken) > 1:
            del self.taken[0]  # it stands in where the header's number of frames is too high, and only there
        folder = self.stage.root / "frames" / self.clip_id[:2]
        paths, hashes = [], []
        for number, index in enumerate(sorted(self.taken)):
            image = Image.fromarray(self.taken[index])
            target = folder / f"{self.clip_id}-{self.settings_id}-{number}.jpg"
            quality = self.stage.settings.quality
            write_beside(target, lambda path: image.save(path, quality=quality))  # noqa: B023
            paths.append(target.relative_to(self.stage.root).as_posix())
            hashes.append(str(imagehash.phash(image)))
        return {"frame_paths": paths, "phash": hashes}
