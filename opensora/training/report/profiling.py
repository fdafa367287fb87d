"""Profilers of some steps: Nsight Systems (``nsys profile --capture-range=cudaProfilerApi ...``), and torch's."""

from pathlib import Path

import torch

from opensora.config.commands import TrainOptions


class NsightWindow:
    """Switches the CUDA profiler on and off.

    Args:
        first: the step after which it continues.
        last: the step after which it goes off.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    @classmethod
    def from_config(cls, cfg: TrainOptions, start_step: int, device: torch.device) -> "NsightWindow | None":
        """The window of a training config; None if it asks for none, or on a device without the profiler."""
        if not cfg.nsys or device.type != "cuda":
            return None
        first = start_step + cfg.nsys_warmup_steps
        return cls(first, first + cfg.nsys_num_steps)

    def after_step(self, step: int) -> None:
        if step == self.first:
            torch.cuda.profiler.start()
        elif step == self.last:
            torch.cuda.profiler.stop()

    def close(self) -> None:
        """Nothing is held: Nsight ends the record with the process."""


class TorchProfile:
    """Records steps 12 to 31 of a run with torch's profiler, to ``<folder>/profile`` (read by TensorBoard)."""

    def __init__(self, folder: Path) -> None:
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=10, active=20, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "profile")),
        )
        self._profiler.start()

    def after_step(self, step: int) -> None:
        self._profiler.step()

    def close(self) -> None:
        self._profiler.stop()
