"""How much memory a device has, and how much of it this process may still take."""

from contextlib import suppress
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def memory_of(device: torch.device) -> tuple[int, int]:
    """(all, left) memory of a device in bytes; of a container's, on a CPU, what it may use."""
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info(device)
        return total, left
    import psutil

    memory = psutil.virtual_memory()
    total, left = memory.total, memory.available
    for file in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            total = min(total, int(Path(file).read_text(encoding="ascii")))
    return total, min(left, total)


def room_on(device: torch.device, limit: int | None = None) -> int:
    """Bytes that this process may still allocate on a device.

    Args:
        device: on a GPU, what torch holds there without using it counts as free.
        limit: of all that this process uses there (`gpu_memory`); a CPU has none. None: what is free is the limit.
    """
    left = memory_of(device)[1]
    if device.type != "cuda":
        return left
    in_use = torch.cuda.memory_allocated(device)
    left += torch.cuda.memory_reserved(device) - in_use
    index = torch.cuda.current_device() if device.index is None else device.index
    fraction = torch.cuda.get_per_process_memory_fraction(index)  # unlike the others, of numbered devices only
    if fraction < 1:
        left = min(left, int(fraction * memory_of(device)[0]) - in_use)
    return max(left if limit is None else min(left, limit - in_use), 0)
