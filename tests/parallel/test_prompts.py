"""Prompts of one run, divided over two processes."""

from tests.parallel.checks_prompts import CHECKS
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS})
