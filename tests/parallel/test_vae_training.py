"""Autoencoder training, in one group of two processes."""

from tests.parallel.checks_vae_training import CHECKS
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS})
