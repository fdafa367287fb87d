"""Sampling by several processes, in one group of two and one of four processes."""

import pytest

from tests.parallel.checks_pipeline import CHECKS, FOUR
from tests.parallel.harness import Group

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def two():
    return Group(2, CHECKS)


@pytest.fixture(scope="module")
def four():
    return Group(4, FOUR)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(two, check):
    two.passed(check)


@pytest.mark.parametrize("check", FOUR, ids=lambda check: check.__name__)
def test_four_processes(four, check):
    four.passed(check)
