"""Bad inputs, generated class by class."""

from tests.attack.cases import numbers, places, tables, weights
from tests.attack.runner import Case


def all_cases() -> list[Case]:
    """Every case of every class."""
    return [case for room in (numbers, places, tables, weights) for case in room.cases()]
