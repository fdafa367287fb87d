"""The text that a script prints for ``--help``: every key with type, default, unit and one line, grouped by purpose."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opensora.config.keys import Option, group_options, walk_options
from opensora.config.shipped import shipped_names
from opensora.config.topics import Topic
from opensora.config.values import describe
from opensora.utils.terminal import help_width

INTRO = """Keys may be written with - or _, and dotted keys reach into sections: --model.from_pretrained FILE.
A true/false key without value means true. A value that starts with -- is written --key=value.
none unsets a key; lists are written a,b or [a, b]."""
KEY_WIDTH = 30  # columns of the longest key that its text stands beside

Entry = tuple[str, str]  # a key and what is said of it


def help_text(options: type, data: Mapping | None, script: str) -> str:
    """All keys of a script.

    Args:
        options: the script's option group.
        data: checked content of a config file, whose values are shown as the defaults; None shows the code's.
        script: name for the usage line.
    """
    shown = "value in this config, or default" if data is not None else "default"
    lines = [
        f"usage: {script} CONFIG [--key value | --key=value | --flag] ...",
        "",
        *_filled((options.__doc__ or "").strip()),
        "",
        *(line for paragraph in INTRO.splitlines() for line in _filled(paragraph)),
        "",
        *_names(options),
        f"After each key: [type, unit; {shown}].",
    ]
    for heading, entries in _headings(options, data).items():
        lines += ["", f"{heading}:", *_entries(entries)]
    extra = [key for key in data or () if key not in group_options(options)]
    if extra:
        lines += ["", "further keys of this config:", *_entries((key, f"[{data[key]}]") for key in extra)]  # type: ignore[index]
    aliases: Mapping[str, str] = options.aliases  # type: ignore[attr-defined]
    lines += ["", "short for:", *_entries((name, f"--{target}") for name, target in aliases.items())]
    return "\n".join(lines)


def _headings(options: type, data: Mapping | None) -> dict[str, list[Entry]]:
    """Keys below the heading of their topic, in the order of topics, then those of sections."""
    topics: dict[str, str] = dict(topics_of(options))
    found: dict[str, list[Entry]] = {topic: [] for topic in Topic}
    for dotted, option, type_name in walk_options(options, data):
        heading = dotted.rpartition(".")[0] + ".*" + (f" with type {type_name}" if type_name else "")
        entry = (dotted, _text(option, _present(data, dotted, option.default)))
        found.setdefault(topics.get(dotted, heading), []).append(entry)
    return {heading: entries for heading, entries in found.items() if entries}


def topics_of(options: type) -> Iterator[tuple[str, Topic]]:
    """Each top-level key with its topic: its own, or that of the key before it."""
    topic = Topic.GENERAL
    for name, option in group_options(options).items():
        topic = option.metadata.get("topic", topic)
        yield name, topic


def _names(options: type) -> list[str]:
    """What may stand for CONFIG besides a file."""
    names = shipped_names(options.configs) if options.configs else {}  # type: ignore[attr-defined]
    return [*_filled(f"CONFIG is a file, or one that comes with opensora: {', '.join(names)}."), ""] if names else []


def _entries(entries: Iterable[Entry]) -> list[str]:
    """A paragraph per key; a key too long for its column has a line of its own."""
    lines: list[str] = []
    indent = " " * (KEY_WIDTH + 5)
    for key, text in entries:
        start = f"  --{key:<{KEY_WIDTH}} "
        if len(key) > KEY_WIDTH:
            lines.append(start.rstrip())
            start = indent
        lines += _filled(text, start, indent)
    return lines


def _filled(text: str, first: str = "", rest: str = "") -> list[str]:
    wrapped = textwrap.wrap(text, help_width(), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return wrapped or [first.rstrip()]


def _text(option: Option, value: Any) -> str:
    kind = describe(option.hint)
    if "choices" in option.metadata:
        kind = f"one of {option.metadata['choices'].listing}"
    if option.is_section:
        types = option.types
        kind = f"section with type {' or '.join(types)}" if types else "section"
        value = "none" if value is None else "see below"
    unit = f", {option.metadata['unit']}" if option.metadata["unit"] else ""
    also = f" (also sets {option.metadata['also']})" if "also" in option.metadata else ""
    idle = f" (no effect: {option.metadata['no_effect']})" if "no_effect" in option.metadata else ""
    return f"{option.metadata['help']}{also}{idle} [{kind}{unit}; {_show(value)}]"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return "''" if value == "" else str(value)


def _present(data: Mapping | None, dotted: str, default: Any) -> Any:
    """Value of a dotted key in a config, or its default."""
    node: Any = data
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node
