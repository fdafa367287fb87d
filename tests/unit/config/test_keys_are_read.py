"""A key that a config may hold is read somewhere, or says that it has no effect."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.config import commands
from opensora.config.keys import group_options
from opensora.config.options import Options
from opensora.config.registries import REGISTRIES

PACKAGE = Path(commands.__file__).parents[1]
COMMAND_LINES = PACKAGE / "cli"
# group of a script -> the rooms in which its keys are read
COMMANDS = {
    commands.InferenceOptions: ("diffusion", "generation", "acceleration"),
    commands.ServeOptions: ("serving",),
    commands.TrajectoryOptions: ("diffusion", "generation", "acceleration"),
    commands.TrainOptions: ("training", "acceleration", "diffusion"),
    commands.CacheOptions: ("training", "encoded"),
    commands.VaeTrainOptions: ("training", "acceleration"),
    commands.VaeInferenceOptions: ("evaluation",),
    commands.VaeStatsOptions: ("evaluation",),
}
LOADER = {"imports"}  # read while a config is resolved


def groups(root: type[Options]) -> Iterator[type[Options]]:
    """An option group and all that its sections may be."""
    yield root
    for option in group_options(root).values():
        if "group" in option.metadata:
            yield from groups(option.metadata["group"])


def read_names(*rooms: str) -> set[str]:
    """Attributes that code outside the option groups takes, and names that it hands to ``getattr``."""
    folders = [PACKAGE / room for room in rooms] or [PACKAGE]
    names = set()
    for path in (path for folder in [*folders, COMMAND_LINES] for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                names.add(node.value)
    return names


def idle_keys(group: type[Options], read: set[str]) -> list[str]:
    """Keys that nothing reads and that do not say so."""
    return [
        key
        for key, option in group_options(group).items()
        if key not in read | LOADER and not {"no_effect", "also"} & set(option.metadata)
    ]


@pytest.mark.parametrize("group", COMMANDS)
def test_every_key_of_a_script_is_read(group):
    own = {key for base in COMMANDS if base is not group and issubclass(group, base) for key in group_options(base)}
    assert [key for key in idle_keys(group, read_names(*COMMANDS[group])) if key not in own] == []


SECTIONS = [group for command in COMMANDS for group in groups(command) if group is not command]
TYPES = [registry.config_of(name) for registry in REGISTRIES.values() for name in registry.entries]


@pytest.mark.parametrize("group", dict.fromkeys([*SECTIONS, *(group for kind in TYPES for group in groups(kind))]))
def test_every_key_of_a_section_is_read(group):
    assert idle_keys(group, read_names()) == []
