"""What a process that works on videos sets before it begins: as many threads as it has cores, and memory kept."""

import ctypes
import os
import sys

# glibc's mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 25  # bytes of a block; more is refused by older versions
MOST_KEPT = 1 << 28  # bytes that are free but not given back


def prepare(workers: int = 1) -> None:
    """Make this process one of ``workers`` that share the machine's cores.

    Libraries take all cores unless told otherwise, which many processes at once pay for in switches between threads.
    """
    import cv2

    threads = max((os.cpu_count() or 1) // max(workers, 1), 1)
    cv2.setNumThreads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    keep_memory()


def keep_memory() -> None:
    """Let freed memory stay with this process. Nothing happens where the C library is not glibc.

    Every frame is some megabytes, made and freed many times a second. By default each is given back to the system and
    asked for again, page by page; that took as long as the work on the frame.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
