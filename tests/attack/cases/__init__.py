"""Bad inputs, generated class by class."""

from tests.attack.cases import fuzz, numbers, odd, places, python, tables, weights
from tests.attack.runner import Case


def all_cases() -> list[Case]:
    """Every case of every class."""
    return [case for room in (numbers, places, odd, tables, weights, python, fuzz) for case in room.cases()]
