"""The videos of a batch, written while they are decoded."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from opensora.generation.outputs import SampleFile


class SampleFiles:
    """A :class:`opensora.diffusion.decode.FrameSink` that writes files; a context, at whose end none is left half done.

    Args:
        samples: of each sample, its file without ending and its frames per second.
    """

    def __init__(self, samples: Sequence[tuple[Path, float]]) -> None:
        self._samples = samples
        self._files: dict[int, SampleFile] = {}
        self._current: SampleFile | None = None

    def __enter__(self) -> "SampleFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.discard()

    def start(self, sample: int) -> None:
        """Begin the file of a sample, anew if it was begun."""
        if sample in self._files:
            self._files.pop(sample).discard()
        self._current = self._files[sample] = SampleFile(*self._samples[sample])

    def write(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3], to the file begun last."""
        assert self._current is not None, "start comes first"
        self._current.write(frames)

    def put_in_place(self, sample: int) -> Path:
        """Finish the file of a sample and give it its name; returns that."""
        path = self._files[sample].put_in_place()
        del self._files[sample]  # only now: what has no room is discarded
        return path
