"""The text that a script prints for ``--help``: every key with type, default, unit and one line."""

from collections.abc import Mapping
from typing import Any

from opensora.config.keys import Option, group_options, walk_options
from opensora.config.shipped import shipped_names
from opensora.config.values import describe

INTRO = """Keys may be written with - or _, and dotted keys reach into sections: --model.from_pretrained FILE.
A true/false key without value means true. A value that starts with -- is written --key=value.
none unsets a key; lists are written a,b or [a, b]."""
KEY_WIDTH = 46


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
        (options.__doc__ or "").strip(),
        "",
        INTRO,
        "",
        *_names(options),
        f"keys [type, unit; {shown}]:",
    ]
    nested: dict[str, list[str]] = {}
    for dotted, option, type_name in walk_options(options, data):
        value = _present(data, dotted, option.default)
        if "." not in dotted:
            lines.append(_line(dotted, option, value))
            continue
        heading = dotted.rsplit(".", 1)[0] + ".*" + (f" with type {type_name}" if type_name else "")
        nested.setdefault(heading, []).append(_line(dotted, option, value))
    for heading, entries in nested.items():
        lines += ["", f"{heading}:", *entries]
    extra = [key for key in data or () if key not in group_options(options)]
    if extra:
        lines += ["", "further keys of this config:", *(f"  --{key}  [{data[key]}]" for key in extra)]  # type: ignore[index]
    aliases: Mapping[str, str] = options.aliases  # type: ignore[attr-defined]
    lines += ["", "short for:", *(f"  --{name:<{KEY_WIDTH}} --{target}" for name, target in aliases.items())]
    return "\n".join(lines)


def _names(options: type) -> list[str]:
    """What may stand for CONFIG besides a file."""
    names = shipped_names(options.configs) if options.configs else {}  # type: ignore[attr-defined]
    return [f"CONFIG is a file, or one that comes with opensora: {', '.join(names)}.", ""] if names else []


def _line(dotted: str, option: Option, value: Any) -> str:
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
    return f"  --{dotted:<{KEY_WIDTH}} {option.metadata['help']}{also}{idle} [{kind}{unit}; {_show(value)}]"


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
