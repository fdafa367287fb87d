"""The harness sees what it is there to see."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel import harness
from tests.parallel.harness import Group

pytestmark = pytest.mark.parallel


def waits_for_ever(folder: Path) -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)


def fails(folder: Path) -> None:
    assert dist.get_rank() == 0, "of rank 1"


def test_processes_that_wait_for_one_another_are_ended(monkeypatch):
    monkeypatch.setattr(harness, "IDLE", 5)
    group = Group(2, [waits_for_ever])
    with pytest.raises(pytest.fail.Exception, match=r"waits_for_ever did not finish on ranks \[0\]"):
        group.passed(waits_for_ever)


def test_a_failure_is_shown():
    group = Group(2, [fails])
    with pytest.raises(pytest.fail.Exception, match="of rank 1"):
        group.passed(fails)
