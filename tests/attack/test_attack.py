"""Whatever is wrong with an input: one line that names it, exit status 2, nothing left behind and nothing changed."""

import zlib

import pytest

from tests.attack.cases import all_cases
from tests.attack.runner import attack

SHARE = 4  # one case of so many, by its name, to be quick; ``python -m tests.attack.survey`` runs them all
HELD = [case for case in all_cases() if not case.unmended]
CASES = {case.name: case for case in HELD if zlib.crc32(case.name.encode()) % SHARE == 0}


def test_there_are_many():
    assert len(CASES) >= 600
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names), "two cases of one name"


@pytest.mark.parametrize("name", CASES)
def test_bad_input(server, good, tmp_path, name):
    result = attack(server, CASES[name], good, tmp_path / "place")
    assert result.problems == [], f"{result.case.words}\n{result.outcome}\n{result.said}"
