"""Read texts and check Python values against a type hint: what option groups and config files need."""

import ast
import json
import types
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
_SCALAR_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything"}


def describe(hint: Any) -> str:
    """The hint in a user's words: ``int | None`` -> ``integer or none``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "none"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"{len(args)} values ({', '.join(describe(arg) for arg in args)})"
    if origin in (list, tuple) and args:
        return f"list of {describe(args[0])}"
    if hint in (list, tuple):
        return "list"
    if dict in (hint, origin):
        return "dict"
    return _SCALAR_NAMES.get(hint, str(hint))


def is_switch(hint: Any) -> bool:
    """Whether a key may stand without a value, which means true."""
    return hint is bool or (get_origin(hint) in (Union, types.UnionType) and bool in get_args(hint))


def mapping_types(hint: Any) -> tuple[Any, Any] | None:
    """Key and value hints if the hint is (optionally) a dict with any keys, else None."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for member in members:
        if get_origin(member) is dict:
            key, value = get_args(member)
            return key, value
        if member is dict:
            return Any, Any
    return None


def parse_text(text: str, hint: Any) -> Any:
    """Value that a command line's text stands for.

    Text stays text where the hint says ``str``; optional hints take ``none``; lists are Python literals or comma
    lists; dicts are Python literals or JSON.

    Raises:
        ValueError: the text is no such value.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _parse_union(text, get_args(hint))
    if hint is Any:
        return _parse_any(text)
    if hint is str:
        return text
    if hint is bool:
        word = text.lower()
        if word in TRUE_WORDS + FALSE_WORDS:
            return word in TRUE_WORDS
        raise ValueError(text)
    if hint is int:
        return _as_int(float(text)) if any(c in text for c in ".eE") else int(text)
    if hint is float:
        return float(text)
    if origin is Literal:
        for choice in get_args(hint):
            if str(choice) == text:
                return choice
        raise ValueError(text)
    if hint in (list, tuple) or origin in (list, tuple):
        return coerce(_parse_list(text, hint), hint)
    if dict in (hint, origin):
        return coerce(_parse_dict(text), hint)
    raise ValueError(text)


def coerce(value: Any, hint: Any) -> Any:
    """Value in the type of the hint; only loss-free changes (int -> float, list <-> tuple, number -> text) are made.

    Raises:
        ValueError: the value is of another type.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args)
    if hint is type(None) and value is None:
        return None
    if origin is Literal and value in args:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and number:
        return _as_int(value)
    if hint is float and number:
        return float(value)
    if hint is str and (number or isinstance(value, str | PurePath)):
        return str(value)
    kind = origin or hint
    if kind in (list, tuple) and isinstance(value, list | tuple):
        return kind(_coerce_items(value, kind, args))
    if kind is dict and isinstance(value, Mapping):
        key_hint, value_hint = args or (Any, Any)
        return {coerce(key, key_hint): coerce(item, value_hint) for key, item in value.items()}
    raise ValueError(value)


def _coerce_items(value: list | tuple, kind: type, args: tuple) -> list:
    if not args:
        return list(value)
    if kind is tuple and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise ValueError(value)
        return [coerce(item, hint) for item, hint in zip(value, args)]
    return [coerce(item, args[0]) for item in value]


def _coerce_union(value: Any, members: tuple) -> Any:
    for member in members:  # a member of exactly this type first, so that no int becomes text
        if type(value) is member:
            return value
    for member in members:
        try:
            return coerce(value, member)
        except ValueError:
            continue
    raise ValueError(value)


def _parse_union(text: str, members: tuple) -> Any:
    if type(None) in members and text.lower() == "none":
        return None
    bracketed = text.startswith(("[", "("))
    for member in sorted(members, key=lambda m: m is str):  # text takes anything: last
        if member is type(None):
            continue
        sequence = (get_origin(member) or member) in (list, tuple)
        if sequence and len(members) > 1 and not bracketed and "," not in text and not is_single(members, member):
            continue  # a lone word is the plain member of "text or list of text"
        try:
            return parse_text(text, member)
        except (ValueError, SyntaxError):
            continue
    raise ValueError(text)


def is_single(members: tuple, member: Any) -> bool:
    """Whether ``member`` is the only one of the union besides None."""
    return all(other is member or other is type(None) for other in members)


def _parse_any(text: str) -> Any:
    word = text.lower()
    if word in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[word]
    try:
        return _literal(text)
    except ValueError:
        return text


def _parse_list(text: str, hint: Any) -> list | tuple:
    if text.startswith(("[", "(")):
        try:
            value = _literal(text)
            return value if isinstance(value, list | tuple) else [value]
        except ValueError:
            text = text[1:].rstrip("])")
    args = [arg for arg in get_args(hint) if arg is not Ellipsis] or [Any]
    words = [word.strip() for word in text.split(",") if word.strip()]
    return [parse_text(word, args[min(i, len(args) - 1)]) for i, word in enumerate(words)]


def _parse_dict(text: str) -> Any:
    try:
        return _literal(text)
    except ValueError:
        try:
            return json.loads(text)  # its error is a ValueError
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def _literal(text: str) -> Any:
    """The value of a Python literal; raises ValueError for all else: ``{{1}}``, what is nested too deeply."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _as_int(value: int | float) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)
