"""ColossalAI's engines, in one group of two and one of four processes; and what is said without ColossalAI."""

import sys

import pytest

from opensora.acceleration.colossal import require_colossalai
from opensora.utils.errors import UserError
from tests.parallel.checks_colossal import CHECKS, FOUR, import_it
from tests.parallel.harness import in_groups

test_processes = in_groups({2: CHECKS, 4: FOUR}, needs="colossalai", prepare=import_it)


def test_without_it_the_message_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "colossalai", None)
    monkeypatch.setitem(sys.modules, "colossalai.booster", None)
    with pytest.raises(UserError, match="pip install --no-deps colossalai==0.5.0"):
        require_colossalai(on_cpu=True)
