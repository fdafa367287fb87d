"""Whatever is wrong with an input: one line that names it, exit status 2, nothing left behind and nothing changed."""

import pytest

from tests.attack.cases import all_cases
from tests.attack.runner import attack

CASES = {case.name: case for case in all_cases()}


def test_there_are_many():
    assert len(CASES) == len(all_cases()) >= 600


@pytest.mark.parametrize("name", CASES)
def test_bad_input(server, good, tmp_path, name):
    result = attack(server, CASES[name], good, tmp_path / "place")
    assert result.problems == [], f"{result.case.words}\n{result.outcome}\n{result.said}"
