"""Sampling by several processes, in one group of two and one of four processes."""

from tests.parallel.checks_pipeline import CHECKS, FOUR
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS, 4: FOUR})
