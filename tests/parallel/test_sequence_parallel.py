"""Sequence parallelism, in one group of two and one of four processes."""

from pathlib import Path

from tests.parallel.checks_sequence_parallel import CHECKS, FOUR
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS, 4: FOUR})


def test_models_know_nothing_of_it():
    for path in (Path(__file__).parents[2] / "opensora" / "models").rglob("*.py"):
        assert "torch.distributed" not in path.read_text(), path
