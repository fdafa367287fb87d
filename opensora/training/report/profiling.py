"""A stretch of steps for Nsight Systems: ``nsys profile --capture-range=cudaProfilerApi ...``."""

from typing import Any

import torch


class NsightWindow:
    """Switches the CUDA profiler on and off.

    Args:
        first: the step after which it goes on.
        last: the step after which it goes off.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    @classmethod
    def from_config(cls, cfg: Any, start_step: int, device: torch.device) -> "NsightWindow | None":
        """The window of a training config; None if it asks for none, or on a device without the profiler."""
        if not cfg.nsys or device.type != "cuda":
            return None
        first = start_step + cfg.nsys_warmup_steps
        return cls(first, first + cfg.nsys_num_steps)

    def on_step(self, step: int) -> None:
        """To be called after every optimizer step."""
        if step == self.first:
            torch.cuda.profiler.start()
        elif step == self.last:
            torch.cuda.profiler.stop()
