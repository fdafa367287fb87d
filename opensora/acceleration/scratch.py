"""Weights on disk that are in no file as a run uses them: converted, merged with adapters, or made at random."""

import mmap
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.acceleration.packing import Packed
from opensora.utils.errors import UserError
from opensora.utils.sizes import size_text

SMALL = 1 << 20  # bytes that are not worth a place in a file
KEPT_FOLDER = Path("/var/tmp")  # where /tmp is memory, this is a disk


def scratch_folder() -> Path:
    """Where large files go that need not outlive the process: ``TMPDIR`` where it is set."""
    folder = Path(tempfile.gettempdir())
    return KEPT_FOLDER if folder == Path("/tmp") and os.access(KEPT_FOLDER, os.W_OK) else folder


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses (start, end) of this process that are parts of files, in order; none where the system does not tell."""
    ranges = []
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in (line for line in lines if " /" in line and " /dev/" not in line):
            start, end = line[: line.index(" ")].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)


def is_in(part: Tensor, ranges: list[tuple[int, int]]) -> bool:
    """Whether a plain tensor lies within one of these ranges."""
    number = bisect_right(ranges, (part.data_ptr(), 2**64)) - 1
    return not part.numel() or (number >= 0 and part.data_ptr() < ranges[number][1])


class ScratchFile:
    """A file without a name, gone with the last tensor that is in it.

    Args:
        folder: where; None takes `scratch_folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or scratch_folder()
        self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - as long as this object
        self.size = 0
        self._ranges: list[tuple[int, int]] = []

    def memory(self, size: int) -> Tensor:
        """A piece of the file [size] uint8: what is written there goes to the disk.

        Raises:
            UserError: the disk is full.
        """
        step = mmap.ALLOCATIONGRANULARITY
        whole = -(-size // step) * step
        try:
            os.posix_fallocate(self._file.fileno(), self.size, whole)
        except OSError as error:
            raise UserError(
                f"offload disk: {self.folder} has no room for {size_text(self.size + whole)} of weights that are in no "
                f"file as they are used ({error.strerror}); set TMPDIR to a folder that has"
            ) from error
        mapped = mmap.mmap(self._file.fileno(), whole, offset=self.size, access=mmap.ACCESS_WRITE)
        self.size += whole
        return torch.frombuffer(mapped, dtype=torch.uint8)[:size]

    def keep(self, tensor: Tensor) -> Tensor:
        """A large tensor of the host, in the file unless it is in one."""
        if tensor.nbytes < SMALL or self._is_filed(tensor):
            return tensor
        memory = self.memory(tensor.nbytes)
        filed = memory.view(tensor.dtype).view(tensor.shape)
        return filed.copy_(tensor)

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Move what modules hold into the file, one after another, unless all that is large is in files already."""
        for module in modules:
            packed = Packed(module)
            if sum(piece.like.nbytes for piece in packed.pieces if not self._is_filed(piece.like)) >= SMALL:
                packed.move_to(self.memory(packed.size))

    def _is_filed(self, part: Tensor) -> bool:
        """Whether a plain tensor is part of a file."""
        if not is_in(part, self._ranges):
            self._ranges = mapped_ranges()  # files may have been opened since
        return is_in(part, self._ranges)
