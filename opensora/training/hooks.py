"""What happens besides training, between optimizer steps: validation, samples, profilers."""

from typing import Protocol


class Hook(Protocol):
    """Called by the loop on every rank, in the order of its list. The time that it takes does not count as training."""

    def after_step(self, step: int) -> None:
        """Optimizer step number ``step`` is complete."""

    def close(self) -> None:
        """The run ends, whatever the reason."""
