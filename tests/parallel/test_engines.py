"""Engines, in one group of two and one of four processes."""

from tests.parallel import checks_bytes, checks_engines, checks_optimizers
from tests.parallel.checks_training import memory_of_four
from tests.parallel.harness import in_groups

test_processes = in_groups({
    2: [*checks_engines.CHECKS, *checks_bytes.CHECKS, *checks_optimizers.CHECKS],
    4: [*checks_engines.FOUR, *checks_bytes.FOUR, memory_of_four],
})  # fmt: skip
