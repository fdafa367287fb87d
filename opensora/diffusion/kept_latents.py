"""Latents of a long video on the disk, window by window: a killed run resumes after the last finished one."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora.diffusion.windows import Windows
from opensora.utils.files import naming, write_text

LATENTS, DONE = "latents.f32", "windows_done.txt"


class KeptLatents:
    """What is there of one video, in a folder of its own: float32 frames [T, C, h, w] one after the other, so that
    any run of them is read without the rest.

    Args:
        folder: made if it is not there; what an earlier run left in it is gone on from.
        windows: of the video.
        frame: (C, h, w) of a latent frame.
    """

    def __init__(self, folder: Path, windows: Windows, frame: tuple[int, int, int]) -> None:
        self.folder, self.windows, self.frame = folder, windows, frame
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / LATENTS

    @property
    def done(self) -> int:
        """Finished windows; what was written of a further one is void."""
        try:
            done = int((self.folder / DONE).read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return 0
        needed = self.windows.end(done) * self._frame_bytes
        return done if self._file.is_file() and self._file.stat().st_size >= needed else 0

    def add(self, latents: Tensor) -> None:
        """Keep the next window's new frames, [C, t, h, w]."""
        done = self.done
        assert latents.shape[1] == self.windows.end(done + 1) - self.windows.end(done), (latents.shape, done)
        content = latents.detach().float().cpu().transpose(0, 1).contiguous().numpy()
        with naming(self._file), self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.seek(self.windows.end(done) * self._frame_bytes)
            file.write(content.tobytes())
            file.flush()
            os.fsync(file.fileno())
        write_text(str(done + 1), self.folder / DONE)  # last: a window counts once all of it is on the disk

    def frames(self) -> Tensor:
        """The frames of the finished windows, [C, T, h, w]: mapped, so that only what is touched is read."""
        count = self.windows.end(self.done)
        mapped = np.memmap(self._file, np.float32, "c", shape=(count, *self.frame))
        return torch.from_numpy(mapped).transpose(0, 1)

    def window(self, index: int) -> Tensor:
        """The frames that a finished window added, [C, t, h, w], in memory."""
        return self.frames()[:, self.windows.end(index) : self.windows.end(index + 1)].clone()

    def go_back(self, done: int) -> None:
        """Forget all windows but the first ``done``, if there are more."""
        if self.done > done:
            write_text(str(done), self.folder / DONE)

    @property
    def _frame_bytes(self) -> int:
        return 4 * int(np.prod(self.frame))
