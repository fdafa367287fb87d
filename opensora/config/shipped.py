"""Configs that come with the package: where they are, and which one a name means."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

from opensora.utils import hub
from opensora.utils.errors import UserError, shorten
from opensora.utils.paths import is_file, is_folder, read_text, shipped_root

CONFIGS = "configs"
SUFFIXES = (".py", ".json", ".yaml", ".yml")
PARTS = "plugins"  # folder of files that only others build on
FOLDER_CONFIG = "config"  # name of the config in the folder of a model
PIPELINES = "diffusion/inference"  # folder of the commands that may be given a pipeline of a hub
RUNS_CODE = ("imports", "_base_")  # keys that nothing from a hub may have


def shipped_names(folder: str) -> dict[str, Path]:
    """Configs that a script may be given by name.

    Args:
        folder: of the script's configs, below ``configs``.

    Returns:
        Files by name: their place in the folder, without suffix.
    """
    root = shipped_root() / CONFIGS / folder
    files = [file.relative_to(root) for file in sorted(root.rglob("*.py"))]
    whole = [file for file in files if PARTS not in file.parts]
    return {file.with_suffix("").as_posix(): root / file for file in sorted(whole, key=lambda file: len(file.parts))}


def find_config(given: str | Path, folder: str) -> Path:
    """The file that a config's path or name stands for.

    What is a file, or ends like one, is a path. Else it is a folder with a file ``config.py`` (``.json``, ``.yaml``) in
    it, the name of a shipped config, or a repository of a hub with a ``config.json``, which is downloaded.

    Args:
        given: path, name, or id of a repository (``org/name``, ``modelscope:org/name``).
        folder: of the script's configs, below ``configs``; empty for one that has none.

    Raises:
        UserError: no such file or name, or one that could be two; says which are near.
    """
    path = Path(given)
    if is_file(path):
        return path
    if path.suffix in SUFFIXES:
        near = _same_below_configs(path)
        nearest = "" if near else _nearest_beside(path)
        hint = f"; {near} comes with opensora" if near else f"; did you mean {nearest}?" if nearest else ""
        raise UserError(f"config file {given} does not exist{hint}")
    shipped = shipped_names(folder) if folder else {}
    inside = next((file for file in _with_suffixes(path / FOLDER_CONFIG)), None)
    beside = next((file for file in _with_suffixes(path)), None)
    known = shipped.get(str(given))  # ./demo is a path
    if known is not None:
        for other in (inside, beside):
            if other is not None and not other.samefile(known):
                raise UserError(
                    f"config {given} is ambiguous: {other} here, or {known}, which comes with opensora; give the path "
                    "of one of them"
                )
    found = known or inside
    if found is None and is_folder(path):
        raise UserError(f"{path} is a folder without a {FOLDER_CONFIG}.py (.json, .yaml); name a config file")
    if found is None:
        hint, name = _hint(path, folder), str(given)
        if folder == PIPELINES and "did you mean" not in hint and hub.is_repo(name):
            return _in_repository(name)
        raise UserError(f"config file {given} does not exist, and no shipped config has this name{hint}")
    return found


def _in_repository(name: str) -> Path:
    """The config of a pipeline on a hub, with all files beside it.

    Raises:
        UserError: not to be had, no pipeline, or a config that has code run.
    """
    try:
        folder = hub.snapshot(name)
    except UserError as error:
        raise UserError(f"{name} is neither a config here nor a shipped one, and as a repository: {error}") from error
    file = folder / f"{FOLDER_CONFIG}.json"
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is a repository without a readable {file.name} of a pipeline ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{name} is a repository whose {file.name} is not that of a pipeline of opensora")
    unsafe = [key for key in RUNS_CODE if content.get(key)]
    if unsafe:
        raise UserError(
            f"{name}: its {file.name} has {unsafe[0]}, which runs code; download it ({hub.command_for(name)}), look at "
            "that code, and give the folder"
        )
    return file


def _with_suffixes(stem: Path) -> Iterable[Path]:
    return (file for suffix in SUFFIXES if is_file(file := stem.parent / f"{stem.name}{suffix}"))


def _same_below_configs(path: Path) -> Path | None:
    """The shipped file of the same path below ``configs``, of which only the start is wrong."""
    if CONFIGS not in path.parts:
        return None
    file = shipped_root().joinpath(CONFIGS, *path.parts[path.parts.index(CONFIGS) + 1 :])
    return file if is_file(file) else None


def _nearest_beside(path: Path, cutoff: float = 0.0) -> Path | None:
    """The config in the same folder whose name is most like that of a missing one."""
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES) if is_folder(path.parent) else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=cutoff)
    return path.parent / near[0] if near else None


def _hint(path: Path, folder: str) -> str:
    """What may have been meant by the name of no config."""
    name, shipped = path.as_posix(), list(shipped_names(folder)) if folder else []
    near = [*difflib.get_close_matches(name, shipped, n=3, cutoff=0.6)]
    near += [each for each in shipped if each.startswith(name) and each not in near]
    beside = _nearest_beside(path, cutoff=0.6)
    if near or beside:
        return f"; did you mean {' or '.join([*([str(beside)] if beside else []), *near[:3]])}?"
    found = {
        file.relative_to(shipped_root()).parent
        for file in (shipped_root() / CONFIGS).rglob("*.py")
        if file.stem == path.name and PARTS not in file.parts
    }
    # those of folders within have longer names
    elsewhere = sorted(place.as_posix() for place in found if found.isdisjoint(place.parents))
    if elsewhere:
        return f"; {shorten(elsewhere)} has one, for another command"
    return f"; shipped: {', '.join(shipped)}" if shipped else ""
