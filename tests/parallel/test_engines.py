"""Engines, in one group of two and one of four processes."""

from tests.parallel.checks_engines import CHECKS, FOUR
from tests.parallel.checks_training import memory_of_four
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS, 4: [*FOUR, memory_of_four]})
