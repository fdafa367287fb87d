"""What keys a config may have: look them up in the option groups, check their values, walk dotted names."""

import copy
import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, NoReturn, TypeVar, get_type_hints

from opensora.config.options import Options, check_bounds
from opensora.config.registries import REGISTRIES, LazyRegistry
from opensora.config.values import coerce, describe, mapping_types, parse_text
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.nearest import nearest_key

logger = get_logger(__name__)

Group = TypeVar("Group", bound=Options)


class Option(NamedTuple):
    """One key of an option group."""

    name: str
    hint: Any  # type of the value
    default: Any
    metadata: Mapping[str, Any]

    @property
    def is_section(self) -> bool:
        """Whether the value is a section with keys of its own."""
        return "group" in self.metadata or self.registry is not None

    @property
    def registry(self) -> LazyRegistry | None:
        """Where the section's ``type`` is looked up; None for sections without one."""
        return REGISTRIES.get(self.metadata.get("registry", ""))

    @property
    def types(self) -> list[str]:
        """Shipped types that the section may have."""
        return self.registry.with_role(self.metadata["role"]) if self.registry is not None else []

    def config_of(self, name: str) -> type | None:
        """Option group of a type that the section may have."""
        return self.registry.config_of(name) if self.registry is not None else None

    def group(self, value: Any) -> type | None:
        """Option group of the section whose present content is ``value``; None where it is not known."""
        if "group" in self.metadata:
            return self.metadata["group"]
        return self.config_of(value.get("type", "")) if isinstance(value, Mapping) else None


class Place(NamedTuple):
    """Where a dotted key leads: ``parent[name]``, with the type of its value."""

    parent: dict
    name: Any
    hint: Any
    option: Option | None  # None for keys that no group names


def group_options(group: type | None) -> dict[str, Option]:
    """Keys of an option group by name, in the order of its lines; none without a group."""
    if group is None:
        return {}
    return {each.name: each._replace(default=copy.deepcopy(each.default)) for each in _described(group)}


@cache
def _described(group: type) -> tuple[Option, ...]:
    """Keys of a group. To read their types takes long, a config asks for those of each group several times, and a class
    keeps them."""
    hints = get_type_hints(group)
    return tuple(
        Option(f.name, hints[f.name], f.metadata["default"], f.metadata)
        for f in dataclasses.fields(group)
        if f.metadata
    )


def walk_options(group: type, data: Mapping | None, prefix: str = "") -> Iterator[tuple[str, Option, str]]:
    """Every key below an option group: (dotted name, option, ``type`` of the section it is in).

    Sections without content in ``data`` are listed with the keys of all types that they may take.
    """
    for option in group_options(group).values():
        yield prefix + option.name, option, ""
        value = (data or {}).get(option.name)
        present = option.group(value)
        types = option.types
        if present is None and isinstance(value, Mapping) and "type" in value:
            continue  # a type of the user's own
        groups: dict[str, type] = {"": present} if present else {}
        if types:
            names = (value["type"],) if present and value else types
            groups = {name: config for name in names if (config := option.config_of(name))}
        for name, below in groups.items():
            content = value if isinstance(value, Mapping) else None
            for dotted, sub_option, sub_name in walk_options(below, content, f"{prefix}{option.name}."):
                yield dotted, sub_option, sub_name or name


def check_value(value: Any, option: Option, path: str, where: str) -> Any:
    """Value of one key in its schema's type; sections key by key.

    Args:
        path: dotted name of the key, for messages.
        where: file or other source of the value, for messages.

    Raises:
        UserError: a value of another type, or a key that a section does not have.
    """
    if not option.is_section:
        value = default_for_none(value, option.metadata, f"{where}: {path}")
        try:
            value = coerce(value, option.hint)
        except ValueError:
            raise UserError(f"{where}: {path} = {value!r}: expected {describe(option.hint)}") from None
        _check_text(value, f"{where}: {path}")
        check_bounds(value, option.metadata, f"{where}: {path}")
        return value
    if isinstance(value, Options):
        value = value.to_dict()
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {path} = {value!r}: expected a section (dict) or none")
    if option.registry is not None:
        _check_type(value.get("type"), option, path, where)
    group = option.group(value)
    known = group_options(group)
    checked = {}
    for key, item in value.items():
        if key in known:
            checked[key] = check_value(item, known[key], f"{path}.{key}", where)
        elif group is None or (key == "type" and option.registry is not None) or option.metadata.get("open"):
            checked[key] = item
        else:
            valid = [dotted for dotted, _, _ in walk_options(group, value, f"{path}.")] if group else []
            raise_unknown(f"{path}.{key}", valid, f"{where}: {path}.{key}")
    return checked


def _check_text(value: Any, shown: str) -> None:
    """Raise a UserError for texts, in lists and sections too, that files and tables cannot hold."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for each in value:
            _check_text(each, shown)
    if not isinstance(value, str):
        return
    if "\0" in value:
        raise UserError(f"{shown} = {value!r}: a text cannot hold a zero byte")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown} = {value!r}: not UTF-8; give a text that is, rename a file that is not") from None


def default_for_none(value: Any, metadata: Mapping[str, Any], shown: str) -> Any:
    """The value, or the default where the key takes ``none`` for it, which the log says.

    Args:
        value: None, or the word on a command line.
        metadata: of the key.
        shown: the key as the user wrote it.
    """
    is_none = value is None or (isinstance(value, str) and value.lower() == "none")
    if not is_none or not metadata.get("none_is_default"):
        return value
    logger.warning("%s none: the default is taken, %s", shown, metadata["default"])
    return metadata["default"]


def _check_type(name: Any, option: Option, path: str, where: str) -> None:
    """Refuse a ``type`` that this section cannot hold; a user's own registered types may go anywhere."""
    assert option.registry is not None
    allowed = [*option.types, *option.registry.own]
    if name is None:
        raise UserError(f"{where}: section {path} has no type; expected {' or '.join(allowed)}")
    if name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"expected {' or '.join(allowed)}, or what `imports` register"
        raise UserError(f"{where}: {path}.type = {name!r} is not possible here; {hint}")


def read_group(group: type[Group], data: Mapping[str, Any], path: str, where: str = "config") -> Group:
    """An option group from plain values: checked, in their types, everything else at its default.

    Args:
        group: option group.
        data: values by key.
        path: dotted name of the section, for messages.
        where: file or other source of the values, for messages.

    Raises:
        UserError: a key that the group does not have, one that it needs, a value of another type or out of its bounds.
    """
    option = Option(path, group, {}, {"group": group})
    check_required(group, data, path)
    return as_group(group, check_value({k: v for k, v in data.items() if k != "type"}, option, path, where))


def read_section(content: Mapping[str, Any], registry: LazyRegistry, path: str = "section") -> Any:
    """A section with a ``type`` from plain values, as an instance of that type's option group.

    Args:
        content: ``type`` and its keys.
        registry: where the type is looked up.
        path: dotted name of the section, for messages.

    Raises:
        UserError: an unknown type or key, a value of another type or out of its bounds.
    """
    registry.resolve(content.get("type", ""))
    group = registry.config_of(content["type"]) or registry.base
    option = Option(path, group, {}, {"group": group, "open": group is registry.base})
    checked = check_value({key: value for key, value in content.items() if key != "type"}, option, path, "config")
    return as_group(group, {"type": content["type"], **checked})


def given_config(group: type[Group], config: Group | str | None, keys: Mapping[str, Any], path: str) -> Group:
    """The option group that a factory was called with: as it is, or as keys; a text is the value of its main key.

    Args:
        group: option group of the factory, with a ``main_key``.
        config: first argument of the factory.
        keys: its further ones.
        path: name of the section, for messages.

    Raises:
        UserError: see :func:`read_group`.
    """
    if isinstance(config, group):
        return dataclasses.replace(config, **keys) if keys else config
    return read_group(group, {**({group.main_key: config} if config is not None else {}), **keys}, path)  # type: ignore[attr-defined]


def check_required(group: type, data: Mapping[str, Any], path: str) -> None:
    """Raise a UserError if a model is to be built without a key that every config has to give."""
    missing = [key for key, option in group_options(group).items() if option.metadata.get("required")]
    missing = [f"{path}.{key}" for key in missing if key not in data]
    if missing:
        raise UserError(f"a section is incomplete: {', '.join(missing)} must be given")


def as_group(group: type[Group], data: Mapping[str, Any]) -> Group:
    """Checked values as an instance of their option group, sections likewise; the rest is ``extra``."""
    known = group_options(group)
    own = {key: _as_value(data[key], option) for key, option in known.items() if key in data}
    plain = {f.name for f in dataclasses.fields(group)} - {*known, "given", "extra"}  # such as ``type``
    own.update({key: data[key] for key in plain & data.keys()})
    extra = {key: value for key, value in data.items() if key not in own}
    return group(**own, given=tuple(data), extra=extra)


def _as_value(value: Any, option: Option) -> Any:
    if not option.is_section or (value is None and option.default is None):
        return value
    group = option.group(value) or (option.registry.base if option.registry is not None else None)
    assert group is not None
    return as_group(group, value or {})  # none is all defaults where that is the default


def locate(data: dict, options: type, dotted: str, shown: str) -> Place:
    """Walk a dotted key through option groups and config, making absent sections on the way.

    Args:
        data: content of the config.
        dotted: canonical name, ``_`` for ``-``.
        shown: the key as the user wrote it, for messages.

    Raises:
        UserError: neither the groups nor the config have such a key.
    """
    known, node = group_options(options), data
    free: tuple[Any, Any] | None = None  # key and value types of a dict that takes any key
    in_typed = False
    parts = dotted.split(".")
    for i, part in enumerate(parts):
        name = _match(part, known, node)
        option = known.get(name)
        if option is not None:
            hint = option.hint
        elif in_typed and name == "type":
            hint = str
        elif free is not None:
            name, hint = _free_key(part, name, node, free[0], shown), free[1]
        elif name in node:
            hint = _present_hint(node[name])
        else:
            raise_unknown(dotted, valid_keys(options, data), shown)
        if i == len(parts) - 1:
            return Place(node, name, hint, option)
        free = mapping_types(hint) if (option and not option.is_section) or free else None
        in_typed = option is not None and option.registry is not None
        node = _descend(node, name, option if in_typed else None, parts[i + 1], shown)
        known = group_options(option.group(node)) if option else {}
    raise AssertionError("a dotted key has at least one part")


def _descend(node: dict, name: Any, typed: Option | None, next_part: str, shown: str) -> dict:
    """The section ``node[name]``, made if it is absent; one with several possible types needs its ``type`` first."""
    child = node.get(name)
    if child is None:
        child = {}
        if typed and next_part != "type":
            types = typed.types
            if len(types) > 1:
                raise UserError(f"{shown}: the config has no section {name}; give --{name}.type {' or '.join(types)}")
            child["type"] = types[0]
        node[name] = child
    if not isinstance(child, dict):
        raise UserError(f"{shown}: {name} is a single value ({child!r}), not a section")
    return child


def _match(part: str, known: Mapping[str, Option], node: Mapping) -> Any:
    """Name of a key as schema or file spell it: ``-`` and ``_`` are alike, and numbers may be keys."""
    if part in known or part in node:
        return part
    return next((name for name in node if str(name).replace("-", "_") == part), part)


def _free_key(part: str, name: Any, node: Mapping, hint: Any, shown: str) -> Any:
    """Key of a dict that takes any key, in the type that its hint says."""
    if name in node:
        return name
    try:
        return parse_text(part, hint)
    except ValueError:
        raise UserError(f"{shown}: '{part}': expected {describe(hint)}") from None


def _present_hint(value: Any) -> Any:
    """Type for a key that only the file defines: that of its value; an integer may become a number."""
    if value is None:
        return Any
    return int | float if type(value) is int else type(value)


def valid_keys(options: type, data: Mapping) -> list[str]:
    """Every key that an override may name, given the present sections."""
    keys = [*options.aliases, *(str(key) for key in data)]  # type: ignore[attr-defined]
    keys += [dotted for dotted, _, _ in walk_options(options, data)]
    for key, value in data.items():
        if isinstance(value, Mapping):
            keys += [f"{key}.{name}" for name in value]
    return keys


def raise_unknown(key: str, valid: Collection[str], shown: str) -> NoReturn:
    """Raise for an unknown key, naming the nearest valid one.

    Args:
        shown: the key as the user wrote it, with its place.
    """
    near = nearest_key(key, valid)
    dashes = "--" if shown.startswith("--") else ""
    hint = f"did you mean {dashes}{near}?" if near else "--help lists the keys"
    raise UserError(f"{shown} is not a known key; {hint}")
