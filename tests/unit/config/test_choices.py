"""Tables of named choices: shipped names are imported when asked for, a user's own are added."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.config.choices import Choices
from opensora.utils.errors import UserError


@pytest.fixture
def fruit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Choices[str]]:
    (tmp_path / "choices_orchard.py").write_text("apple = 'red'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Choices("fruit", {"apple": "choices_orchard:apple", "absent": "choices_nowhere:absent"})
    sys.modules.pop("choices_orchard", None)


def test_a_shipped_choice_is_imported_when_asked_for(fruit: Choices[str]) -> None:
    assert fruit.names == ("apple", "absent")
    assert "absent" in fruit
    fruit.check("apple")
    assert "choices_orchard" not in sys.modules
    assert fruit.get("apple") == "red"


def test_a_user_adds_choices(fruit: Choices[str]) -> None:
    fruit.add("pear", "green")
    assert fruit.get("pear") == "green"
    assert list(fruit) == ["apple", "absent", "pear"]


def test_the_decorator_leaves_what_it_registers() -> None:
    tables: Choices[type] = Choices("table")

    @tables.register("round")
    class Round:
        pass

    assert tables.get("round") is Round
    assert Round.__name__ == "Round"


@pytest.mark.parametrize("name", ["apple", "pear"])
def test_a_taken_name_is_refused(fruit: Choices[str], name: str) -> None:
    fruit.add("pear", "green")
    with pytest.raises(UserError, match=f"fruit '{name}' is there already"):
        fruit.add(name, "other")
    assert fruit.get("pear") == "green"
    assert fruit.get("apple") == "red"


def test_an_unknown_name_is_answered_with_the_nearest(fruit: Choices[str]) -> None:
    with pytest.raises(UserError, match=r"unknown fruit 'aple'; did you mean 'apple'\?"):
        fruit.get("aple")
    with pytest.raises(UserError, match="unknown fruit 'zzz'; known: apple, absent"):
        fruit.check("zzz")
    with pytest.raises(UserError, match="unknown fruit None; known"):
        fruit.check(None)
    with pytest.raises(UserError, match="known: none"):
        Choices("thing").get("x")


def test_what_a_shipped_module_lacks_is_not_hidden(fruit: Choices[str]) -> None:
    with pytest.raises(ModuleNotFoundError, match="choices_nowhere"):
        fruit.get("absent")


def test_tables_are_read_without_torch() -> None:
    code = "import sys, opensora.config.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
