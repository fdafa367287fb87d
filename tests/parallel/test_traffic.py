"""Bytes that parallelism sends, in one group of two processes; and the model of sampling times."""

import sys

import pytest

from tests.parallel.checks_traffic import CHECKS
from tests.parallel.harness import in_groups
from tools.benchmark.parallel import WORKLOADS, Machine, seconds

test_processes = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' counters")(in_groups({2: CHECKS}))


@pytest.mark.parametrize("load", WORKLOADS, ids=lambda load: load.name)
def test_modelled_times_are_near_reported_ones(load):
    for devices, reported in load.reported.items():
        modelled = seconds(load, load.reported_way, devices, Machine())
        assert modelled == pytest.approx(reported, rel=0.1)


def test_heads_limit_ulysses():
    assert seconds(WORKLOADS[0], "ulysses", 16, Machine()) is None
    assert seconds(WORKLOADS[0], "ring", 16, Machine()) is not None
