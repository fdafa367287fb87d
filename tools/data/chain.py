"""Stages by name: a config to a chain, and the chain a single stage needs."""

import difflib
import inspect
import os
import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import polars as pl

from opensora.config import parse_config
from opensora.utils.errors import UserError
from opensora.utils.paths import expand_home
from tools.data import stages as room
from tools.data.engine.own_files import OwnFiles
from tools.data.engine.pipeline import STATUS_COLUMNS, Pipeline
from tools.data.engine.runners import LocalRunner, Runner
from tools.data.engine.stage import Stage
from tools.data.engine.tables import READ_FORMATS
from tools.data.listing import list_files, read_list
from tools.data.options import DataOptions, with_sections
from tools.outputs import check_place, check_text


def find_stages() -> dict[str, type[Stage]]:
    """Every stage of the files in ``tools/data/stages``, by its name."""
    modules = [import_module(f"{room.__name__}.{module.name}") for module in pkgutil.iter_modules(room.__path__)]
    classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    found = {value.name: value for value in classes if issubclass(value, Stage) and value.name}
    return dict(sorted(found.items()))


STAGES: Mapping[str, type[Stage]] = find_stages()


def parse(argv: Sequence[str] | None) -> DataOptions:
    """Options of a command line of ``run.py`` or ``stage_run.py``."""
    return parse_config(argv, with_sections(STAGES))


def make_stages(names: Sequence[str], cfg: DataOptions, root: Path) -> list[Stage]:
    """Stages of a chain, in the order given, with their sections of the config.

    Raises:
        UserError: an unknown or repeated name, or none.
    """
    if not names:
        raise UserError(f"stages is empty; choose from {', '.join(STAGES)}")
    for name in names:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(STAGES)}"
            raise UserError(f"stages: there is no stage '{name}'; {hint}")
    repeated = {name for name in names if list(names).count(name) > 1}
    if repeated:
        raise UserError(f"stages: '{repeated.pop()}' stands twice")
    return [STAGES[name](getattr(cfg, name, None) or STAGES[name].options()(), root) for name in names]


def chain_for(name: str, cfg: DataOptions, table_columns: Sequence[str]) -> list[str]:
    """The shortest chain that ends in a stage: files as whole clips, unless the stage itself cuts."""
    known = {*table_columns, *STATUS_COLUMNS}
    chain: list[str] = []

    def add(name: str) -> None:
        (stage,) = make_stages([name], cfg, Path())
        for column in stage.reads:
            if column in known:
                continue
            maker = next((s for s in STAGES.values() if column in s.adds and not s.expands), None)
            if maker is None or maker.name == name:
                raise UserError(f"stage '{name}' needs column '{column}', which the table does not have")
            add(maker.name)
        if name not in chain:
            chain.append(name)
            known.update(stage.adds)

    add("ingest")
    add(name)
    return chain


def read_input(cfg: DataOptions) -> pl.DataFrame:
    """Files of the folder that the config's ``input`` names, or those that a table of that name lists.

    Raises:
        UserError: neither is there, or what is made would be taken for footage the next time.
    """
    if not cfg.input:
        raise UserError("no --input: give a folder of raw footage, or a CSV/parquet table with a column path")
    place = expand_home(cfg.input)
    check_text(place, "--input")
    if place.suffix.lower() in READ_FORMATS:
        return read_list(place)
    if cfg.output and _is_below(expand_home(cfg.output), place):
        raise UserError(f"--output {cfg.output} lies in --input {cfg.input}: its clips would be taken for raw footage")
    return list_files(place)


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def make_runner(cfg: DataOptions) -> Runner:
    """Where the work is done."""
    workers = cfg.workers if cfg.workers is not None else os.cpu_count() or 1
    if cfg.runner == "ray":
        from tools.data.engine.ray_runner import RayRunner

        return RayRunner(max(workers, 1))
    return LocalRunner(workers)


def make_pipeline(names: Sequence[str], cfg: DataOptions) -> Pipeline:
    """A chain on the config's output folder.

    Raises:
        UserError: no output folder, or a wrong chain.
    """
    if not cfg.output:
        raise UserError("no --output: give a folder for what is made")
    root = expand_home(cfg.output)
    check_place(root, "--output", folder=True)
    own = OwnFiles(root, cfg.overwrite)
    return Pipeline(make_stages(names, cfg, root), root, make_runner(cfg), cfg.retry_errors, own=own)
