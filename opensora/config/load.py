"""Config files and command lines: ``script.py CONFIG --key value`` to one resolved, checked config.

A config is an mmengine file (``_base_`` inheritance included). Its values and those of the command line are checked
against the script's option group (``opensora.config.commands``); what is wrong is a ``UserError`` that names the
nearest right key.
"""

import codecs
import copy
import dataclasses
import errno
import importlib
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import yaml
from mmengine.config import Config
from mmengine.fileio.handlers import BaseFileHandler
from mmengine.fileio.handlers.registry_utils import file_handlers

from opensora.config.commands import RunOptions
from opensora.config.help import help_text
from opensora.config.keys import Option, Place, as_group, check_value, default_for_none, group_options, locate
from opensora.config.options import AE_KNOWS, Options, check_bounds
from opensora.config.places import is_relative, named_files, places_of, with_places
from opensora.config.shipped import SUFFIXES, find_config
from opensora.config.values import coerce, describe, is_switch, parse_text
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.paths import is_at_hand, is_file
from opensora.utils.temporary import kept_together

logger = get_logger(__name__)

HELP_FLAGS = ("--help", "-h")


# Keys that configs and command lines of Open-Sora 2.0 hold and that nothing needs, and why.
IGNORED_KEYS: Mapping[str, str] = MappingProxyType({"ae_spatial_compression": AE_KNOWS})


class _Text(str):
    """A value that came as text from a command line, still to be read as the type of its key."""


class _Bare:
    """Stands for the value of a flag that has none."""


class Override(NamedTuple):
    """One key to set: its name as written, the value, and how to show the key in messages."""

    key: str
    value: Any
    shown: str


Group = TypeVar("Group", bound=Options)


def parse_config(argv: Sequence[str] | None, options: type[Group]) -> Group:
    """Read a command line: CONFIG (a file, or the name of a shipped one) and overrides, for the script whose keys are
    ``options``.

    Args:
        argv: words after the script's name; None takes those of this process.
        options: the script's option group, e.g. ``InferenceOptions``.

    Returns:
        What ``load_config`` returns.

    Raises:
        UserError: anything wrong with the words, the file or a value.
        SystemExit: status 0, after ``--help``.
    """
    script = Path(sys.argv[0]).name
    path, overrides, wants_help = _split_words(list(sys.argv[1:] if argv is None else argv))
    if wants_help:
        data = _read_checked(path, options, overrides)[0] if path else None
        print(help_text(options, data, script))
        raise SystemExit(0)
    if path is None:
        raise UserError(f"no config file given; usage: {script} CONFIG [--key value ...], --help lists the keys")
    data, where = _read_checked(path, options, overrides)
    return _resolve(data, options, overrides, where)


def load_config(path: str | Path | Mapping | Options, options: type[Group], overrides: Mapping | None = None) -> Group:
    """Resolve a config from Python.

    Args:
        path: a config file, the name of a shipped one, or the content of one (which is not changed); an instance of
            ``options`` without overrides is resolved already.
        options: option group of the script, e.g. ``InferenceOptions``.
        overrides: Python values by key; dotted keys and aliases as on a command line. A dict given for a section is
            merged into it, unless it holds ``_delete_=True``.

    Returns:
        An instance of ``options``: every value in its type, sections as instances of their own groups.

    Raises:
        UserError: a missing file, an unknown key, a value of the wrong type.
    """
    if not (isinstance(path, str | Path | Mapping) or hasattr(path, "to_dict")):
        raise UserError(f"config {path!r}: give a path, the name of a shipped config, or the content of one as a dict")
    if not isinstance(overrides, Mapping | None) or not all(isinstance(key, str) for key in overrides or ()):
        raise UserError(f"overrides {overrides!r}: give a dict of values by key, such as {{'seed': 1}}")
    if isinstance(path, options) and not overrides:
        return path
    changes = [Override(key, value, key) for key, value in (overrides or {}).items()]
    if isinstance(path, str | Path):
        data, where = _read_checked(path, options, changes)
    else:
        data = copy.deepcopy(path.to_dict() if hasattr(path, "to_dict") else dict(path))
        where = data.get("config_path") or "config"
        data = _checked_file(data, options, changes, where)
    return _resolve(data, options, changes, where)


def config_to_text(cfg: Options) -> str:
    """The resolved config as JSON, indented by 4."""
    return json.dumps(cfg.to_dict(), indent=4, default=str, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------------- files


def _read_checked(given: str | Path, options: type, overrides: Sequence[Override]) -> tuple[dict, str]:
    """Checked content of a config by its path or name, files that it names being where they are; and its path."""
    file = find_config(given, options.configs)  # type: ignore[attr-defined]
    where = str(given) if Path(given) == file else str(file)
    data = _checked_file(_read(file), options, overrides, where)
    return with_places(data, options, places_of(_with_bases(file))), where


def _with_bases(file: Path) -> Iterator[Path]:
    """A config file that can be read, and those that it builds on."""
    yield file
    for base in _bases_of(file):
        yield from _with_bases(base)


@contextmanager
def naming_places(cfg: RunOptions) -> Iterator[None]:
    """Within it, an error about a file that a config names and that is not there says where it was looked for.

    Args:
        cfg: what `parse_config` or `load_config` returned.
    """
    try:
        yield
    except UserError as error:
        searched = _searched(cfg, str(error))
        if not searched:
            raise
        raise UserError(f"{error}\n{searched}") from error


def _searched(cfg: RunOptions, message: str) -> str:
    """Where the files of a config were looked for that an error names; nothing if it is about something else."""
    file = Path(cfg.config_path)
    if file.suffix not in SUFFIXES or not is_file(file):  # the values came from Python
        return ""
    data = _checked_file(_read(file), type(cfg), [], str(file))
    places = places_of(_with_bases(file))
    lost = [
        path
        for path in named_files(data, type(cfg))
        if is_relative(path) and _is_named(path, message) and not is_at_hand(path)
    ]
    if not lost:
        return ""
    folders = list(dict.fromkeys((*map(str, places), str(Path.cwd()))))
    return f"{', '.join(dict.fromkeys(lost))} of {file}: looked for in {', then in '.join(folders)}"


def _is_named(path: str, message: str) -> bool:
    """Whether a message names a relative path, and not another that ends like it."""
    return any(re.search(rf"(?<![\w/.-]){re.escape(each)}", message) for each in (path, str(Path(path))))


def _read(path: Path) -> dict:
    """Content of a config file with its bases."""
    _check_bases(path)
    try:
        # plain python: an import in the file must not switch mmengine to its lazy mode
        with _plain_yaml(), kept_together():  # mmengine makes copies
            return Config.fromfile(path, lazy_import=False).to_dict()
    except (Exception, SystemExit) as error:  # a config is a program: anything may go wrong in it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
        if isinstance(error, SyntaxError):  # mmengine names a copy of its own
            _check_syntax(path)
        raise UserError(f"{path}: cannot be read as a config: {type(error).__name__}: {error}") from error


def _bases_of(file: Path) -> list[Path]:
    """Files that a config names as its bases; none of one that mmengine alone can read."""
    try:
        bases = Config._get_base_files(str(file))
    except Exception:  # one with variables of mmengine's, which it fills in before it reads, or a damaged one
        return []
    return [path for base in bases if is_file(path := file.parent / base)]  # others are of mmengine's own kinds


def _check_bases(file: Path, above: tuple[Path, ...] = ()) -> None:
    """Raise a UserError for a config that is one of its own bases, which mmengine would read again and again."""
    chain = (*above, file.resolve())
    if chain[-1] in above:
        names = " -> ".join(path.name for path in chain[above.index(chain[-1]) :])
        raise UserError(f"{chain[0]}: cannot be read as a config: _base_ leads back to where it came from ({names})")
    for base in _bases_of(file):
        _check_bases(base, chain)


def _check_syntax(file: Path) -> None:
    """Raise a UserError that names the line of a config, or of one of its bases, that is no Python."""
    for each in _with_bases(file):
        content = each.read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            raise UserError(f"{each}: cannot be read as a config: it begins with a byte order mark; save it as UTF-8")
        try:
            compile(content, str(each), "exec") if each.suffix == ".py" else None
        except (SyntaxError, ValueError) as error:
            line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
            said = error.msg if isinstance(error, SyntaxError) else error
            raise UserError(f"{each}: cannot be read as a config: {line}{said}") from error


class _PlainYaml(BaseFileHandler):
    """YAML without the tags that make Python objects, which would run whatever they name."""

    def load_from_fileobj(self, file: Any, **options: Any) -> Any:
        return yaml.safe_load(file)

    def dump_to_fileobj(self, obj: Any, file: Any, **options: Any) -> None:
        yaml.safe_dump(obj, file)

    def dump_to_str(self, obj: Any, **options: Any) -> str:
        return yaml.safe_dump(obj)


@contextmanager
def _plain_yaml() -> Iterator[None]:
    """Within it, mmengine reads YAML as data alone."""
    before = {ending: file_handlers[ending] for ending in ("yaml", "yml")}
    file_handlers.update(dict.fromkeys(before, _PlainYaml()))
    try:
        yield
    finally:
        file_handlers.update(before)


def import_own(modules: Sequence[str], where: str) -> None:
    """Import the modules of a user's own that a config names, for what they register.

    They are looked for as Python does, then in the working folder and beside the config.

    Raises:
        UserError: one cannot be imported; says why, and in which line.
    """
    folders = list(dict.fromkeys((str(Path.cwd()), str(Path(where).absolute().parent))))
    for name in modules:
        sys.path += [folder for folder in folders if folder not in sys.path]  # stays: workers import the module again
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # the module is a program: anything may go wrong in it
            raise UserError(f"{where}: imports: {name}{_why_not(error, name, folders)}") from error


def _why_not(error: BaseException, name: str, folders: Sequence[str]) -> str:
    """Why a module of the user's own cannot be imported, after its name."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}."):
        hint = "; name it as an import statement does: my_package.my_module" if name.endswith(".py") else ""
        return f" is not there: looked for where Python looks, and in {' and '.join(folders)}{hint}"
    ours = ("<", str(Path(__file__).parents[1]), importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    theirs = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(frames[0].filename).parent)]
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f" cannot be imported{place}: {kind}{' '.join(str(error).splitlines()[:1])}"


def _import_named(data: Mapping[str, Any], options: type, overrides: Sequence[Override], where: str) -> None:
    """Import what ``imports`` names, of a command line or else of the file: other keys may hold what it registers."""
    if "imports" not in group_options(options):  # a script that registers nothing
        return
    place = locate({}, options, "imports", "imports")
    assert place.option is not None
    named = check_value(data.get("imports"), place.option, "imports", where)
    for override in overrides:
        named = _typed(override, place) if override.key == "imports" else named
    import_own(named or [], where)


def _checked_file(data: dict, options: type, overrides: Sequence[Override], where: str) -> dict:
    """Content of a file with aliases resolved and values in the schema's types, once ``imports`` are imported."""
    _import_named(data, options, overrides, where)
    for key in IGNORED_KEYS:
        data.pop(key, None)
    for key in [key for key in data if key in options.aliases]:  # type: ignore[attr-defined]
        value = data.pop(key)
        if value is not None:
            _set(data, options, Override(key, value, f"{where}: {key}"))
    data = _checked(data, options, where)
    for option in group_options(options).values():
        if "also" in option.metadata:
            _warn_if_replaced(data, option, where)
    return data


def _checked(data: dict, options: type, where: str) -> dict:
    """Known keys in the schema's types; further top-level keys are variables of the file and stay as they are."""
    known = group_options(options)
    return {key: check_value(value, known[key], key, where) if key in known else value for key, value in data.items()}


def _warn_if_replaced(data: dict, option: Option, where: str) -> None:
    """A file that gives ``lr`` and another ``optim.lr`` trains with ``lr``: say so."""
    section, key = option.metadata["also"].split(".")
    new, old = data.get(option.name), (data.get(section) or {}).get(key)
    if new is not None and old is not None and new != old:
        logger.warning("%s: %s = %s replaces %s.%s = %s", where, option.name, new, section, key, old)


# ------------------------------------------------------------------------------------------------------ command lines


def _split_words(words: list[str]) -> tuple[str | None, list[Override], bool]:
    """CONFIG (None if there is none), overrides, and whether help is asked for."""
    path: str | None = None
    overrides: list[Override] = []
    wants_help = False
    rest = iter(range(len(words)))
    for i in rest:
        word = words[i]
        if word in HELP_FLAGS:
            wants_help = True
        elif not word.startswith("--"):
            if word.startswith("-") or path is not None:
                raise UserError(f"'{word}' is neither a --key nor its value; quote values with spaces, write lists a,b")
            path = word
        elif "=" in word:
            key, text = word.split("=", 1)
            overrides.append(Override(key[2:], _Text(text), key))
        elif i + 1 < len(words) and not words[i + 1].startswith("--"):
            overrides.append(Override(word[2:], _Text(words[next(rest)]), word))
        else:
            overrides.append(Override(word[2:], _Bare(), word))
    return path, overrides, wants_help


def _resolve(data: dict, options: type[Group], overrides: list[Override], where: str) -> Group:
    """Merge overrides into the checked content of a file, fill defaults and make the config."""
    known = group_options(options)
    for option in known.values():
        data.setdefault(option.name, copy.deepcopy(option.default))
    # a section's type decides which keys it has, so it comes first
    given = {_set(data, options, override) for override in sorted(overrides, key=lambda o: not o.key.endswith(".type"))}
    data = _checked(data, options, f"{where} with overrides" if overrides else where)
    for option in known.values():
        if "also" in option.metadata:
            _link(data, option, given)
        if option.metadata.get("fill") and data[option.name] is not None:
            defaults = {name: sub.default for name, sub in group_options(option.metadata["group"]).items()}
            data[option.name] = {**defaults, **data[option.name]}
    data["config_path"] = where
    return dataclasses.replace(as_group(options, data), chosen=tuple(sorted(given)))


def _link(data: dict, option: Option, given: set[str]) -> None:
    """Keep a key and the one that it also sets (``lr`` and ``optim.lr``) equal; an override beats the file."""
    section, key = option.metadata["also"].split(".")
    if data[section] is None:
        return
    only_target_given = f"{section}.{key}" in given and option.name not in given
    if data[option.name] is None or only_target_given:
        data[option.name] = data[section].get(key)
    else:
        data[section][key] = data[option.name]


def _set(data: dict, options: type, override: Override) -> str:
    """Set one dotted key and return its canonical name."""
    dotted = override.key.replace("-", "_")
    dotted = options.aliases.get(dotted, dotted)  # type: ignore[attr-defined]
    if dotted in IGNORED_KEYS:
        logger.warning("%s has no effect: %s", override.shown, IGNORED_KEYS[dotted])
        return dotted
    place = locate(data, options, dotted, override.shown)
    if place.option and "no_effect" in place.option.metadata:
        logger.warning("%s has no effect: %s", override.shown, place.option.metadata["no_effect"])
    value = _typed(override, place)
    if place.option and place.option.is_section and isinstance(value, Mapping):
        kept = {} if value.get("_delete_") else place.parent.get(place.name) or {}
        value = {**kept, **{key: item for key, item in value.items() if key != "_delete_"}}
    place.parent[place.name] = value
    return dotted


def _typed(override: Override, place: Place) -> Any:
    """Value of an override in the type of its key."""
    value, is_section = override.value, place.option is not None and place.option.is_section
    expected = f"a section; set its keys one by one ({override.shown}.KEY)" if is_section else describe(place.hint)
    if isinstance(value, _Bare):
        if not is_switch(place.hint):
            raise UserError(f"{override.shown} needs a value: {expected}")
        return True
    hint = dict | None if is_section else place.hint
    metadata = place.option.metadata if place.option else {}
    if isinstance(value, Options):
        return value.to_dict()
    value = default_for_none(value, metadata, override.shown)
    try:
        if not isinstance(value, _Text):
            value = coerce(value, hint)
        else:
            value = str(value) if metadata.get("verbatim") else parse_text(str(value), hint)
    except (ValueError, SyntaxError):
        raise UserError(f"{override.shown} {value}: expected {expected}") from None
    named = f"--{override.key.replace('-', '_')}" if override.shown.startswith("--") else override.shown
    check_bounds(value, metadata, named)
    return value
