"""What is fed to the model, shared by two processes."""

from tests.parallel.checks_feeding import CHECKS
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS})
