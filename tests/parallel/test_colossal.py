"""ColossalAI's engines, in one group of two processes; and what is said without ColossalAI."""

import importlib.util
import sys

import pytest

from opensora.acceleration.colossal import require_colossalai
from opensora.utils.errors import UserError
from tests.parallel.checks_colossal import CHECKS, FOUR
from tests.parallel.harness import Group


def group(size, checks):
    if importlib.util.find_spec("colossalai") is None:
        pytest.skip("ColossalAI is not installed")
    return Group(size, checks)


@pytest.fixture(scope="module")
def two():
    return group(2, CHECKS)


@pytest.fixture(scope="module")
def four():
    return group(4, FOUR)


@pytest.mark.parallel
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(two, check):
    two.passed(check)


@pytest.mark.parallel
@pytest.mark.parametrize("check", FOUR, ids=lambda check: check.__name__)
def test_four_processes(four, check):
    four.passed(check)


def test_without_it_the_message_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "colossalai", None)
    monkeypatch.setitem(sys.modules, "colossalai.booster", None)
    with pytest.raises(UserError, match="pip install --no-deps colossalai==0.5.0"):
        require_colossalai(on_cpu=True)
