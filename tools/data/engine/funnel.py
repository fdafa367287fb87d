"""What each stage did to the rows: kept in ``funnel.json``, so that it can be seen while a run is at work."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from opensora.utils.errors import UserError

FUNNEL_FILE = "funnel.json"


@dataclass
class FunnelStep:
    """What a stage did to the rows."""

    stage: str
    rows_in: int
    rows_out: int = 0
    failed: int = 0
    done_before: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    finished: bool = False

    def __post_init__(self) -> None:
        counts = (self.rows_in, self.rows_out, self.failed, self.done_before, *self.dropped.values())
        if not isinstance(self.stage, str) or not all(isinstance(count, int) for count in counts):
            raise ValueError("a stage's name and whole numbers")


def funnel_json(steps: Sequence[FunnelStep]) -> str:
    """The steps as text."""
    return json.dumps([asdict(step) for step in steps], indent=2)


def read_funnel(root: Path) -> list[FunnelStep]:
    """The steps of the run in a folder, in order.

    Raises:
        UserError: no run in this folder, or a file that is damaged.
    """
    path = root / FUNNEL_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {root} the --output of tools/data/run.py?")
    try:
        return [FunnelStep(**step) for step in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run tools/data/run.py again") from error
