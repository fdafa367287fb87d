"""ColossalAI 0.5 on CPUs with gloo: for trials and checks of what later runs on GPUs. Never used where there is a GPU.

Two of its public hooks are used (the accelerator, and its name) and one check is relaxed.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from colossalai.accelerator import get_accelerator, set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator as BaseCpuAccelerator
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer


class CpuAccelerator(BaseCpuAccelerator):
    """A CPU has one queue of work: streams are empty and there is nothing to wait for."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing is under way."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def device_count(self) -> int:
        """The CPU."""
        return 1

    def manual_seed(self, seed: int) -> None:
        """Seed of torch's generator."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """State of torch's generator."""
        return torch.get_rng_state()

    def Stream(self, *args: Any, **kwargs: Any) -> None:
        """No stream."""

    def current_stream(self, device: Any = None) -> None:
        """No stream."""

    default_stream = current_stream

    def set_stream(self, stream_: Any) -> None:
        """Nothing to choose."""

    def stream(self, stream_: Any) -> AbstractContextManager:
        """Nothing to choose."""
        return nullcontext()


def enable() -> None:
    """Let ColossalAI work on the CPU in this process; a second call changes nothing."""
    if isinstance(get_accelerator(), CpuAccelerator):
        return
    accelerator = CpuAccelerator()
    set_accelerator(accelerator)
    check = LowLevelZeroOptimizer._sanity_checks

    @wraps(check)
    def check_all_but_the_name(self: Any) -> None:
        accelerator._name = "cuda"
        try:
            check(self)
        finally:
            accelerator._name = "cpu"

    LowLevelZeroOptimizer._sanity_checks = check_all_but_the_name
