"""Sharded saving, in one group of two processes."""

import pytest

from tests.parallel.checks_saving import CHECKS
from tests.parallel.harness import Group

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def two():
    return Group(2, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(two, check):
    two.passed(check)
