"""The videos of a folder, what is recorded beside them, and which belong to one prompt."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensora.utils.errors import UserError
from opensora.utils.media.probe import probe
from opensora.utils.paths import read_text
from opensora.utils.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, is_video, read_image, read_video

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """A video or picture.

    Attributes:
        path: its file.
        name: the same below the folder, without ending.
        record: of the ``.json`` beside it, empty where there is none.
    """

    path: Path
    name: str
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What it shows: as recorded, else its name without the number of the repetition (``cat-3``, ``cat_3``)."""
        found = self.record.get("prompt")
        return found if isinstance(found, str) else re.sub(r"[-_]\d+$", "", self.name)

    @property
    def seed(self) -> int | None:
        """Of its noise, as recorded."""
        found = self.record.get("seed")
        return found if isinstance(found, int) else None

    def read(self) -> tuple[Frames, float]:
        """Frames ``[T, H, W, 3]`` and their rate; one frame and NaN for a picture.

        Raises:
            UserError: it cannot be read.
        """
        if is_video(self.path):
            return read_video(self.path)[0], probe(self.path).fps
        return read_image(self.path)[None], float("nan")


def list_samples(folder: Path) -> list[Sample]:
    """All videos (pictures where there are none) of a folder and those below it, in order.

    Raises:
        UserError: there are none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = [path for path in files if path.parent.name != "generated_condition"]
    for endings in (VIDEO_EXTENSIONS, IMAGE_EXTENSIONS):
        if found := [path for path in files if path.suffix.lower() in endings]:
            return [Sample(path, str(path.relative_to(folder).with_suffix("")), _record(path)) for path in found]
    raise UserError(f"{folder}: no videos and no pictures in it")


def _record(path: Path) -> dict[str, Any]:
    """What inference.py writes beside a sample; empty for files of others."""
    try:
        found = json.loads(read_text(path.with_suffix(".json")))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
