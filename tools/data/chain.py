"""Stages by name: a config to a chain, and the chain a single stage needs."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from opensora.utils.errors import UserError
from tools.data.camera import Camera
from tools.data.caption import Caption
from tools.data.clip_scores import Aesthetic, ClipFeatures, Match
from tools.data.cut import Cut, Whole
from tools.data.duplicates import Duplicates
from tools.data.filters import Filter, Final
from tools.data.frames import FrameSamples
from tools.data.ingest import Ingest, list_files, read_list
from tools.data.limits import check_numbers
from tools.data.motion import Blur, Flow, Motion
from tools.data.ocr import Ocr
from tools.data.pipeline import Pipeline
from tools.data.runners import LocalRunner, Runner
from tools.data.scenes import Scenes
from tools.data.stage import Stage

ORDER: tuple[type[Stage], ...] = (
    Ingest,
    Scenes,
    Cut,
    Whole,
    Motion,
    Camera,
    Flow,
    Blur,
    FrameSamples,
    Ocr,
    ClipFeatures,
    Aesthetic,
    Duplicates,
    Filter,
    Caption,
    Match,
    Final,
)
STAGES: Mapping[str, type[Stage]] = {stage.name: stage for stage in ORDER}


def make_stages(names: Sequence[str], cfg: Mapping[str, Any], root: Path) -> list[Stage]:
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
    # 'whole' has no settings: it takes files as they are
    return [STAGES[name](dict(cfg.get(name) or {}), root) for name in names]


def chain_for(name: str, cfg: Mapping[str, Any], table_columns: Sequence[str]) -> list[str]:
    """The shortest chain that ends in a stage: files as whole clips, unless the stage itself cuts."""
    if name not in STAGES:
        make_stages([name], cfg, Path())
    if name in ("scenes", "cut"):
        return [stage.name for stage in ORDER[: ORDER.index(STAGES[name]) + 1]]
    known = set(table_columns)
    chain: list[str] = []

    def add(stage: Stage) -> None:
        for column in stage.needs():
            if column in known:
                continue
            maker = next((s for s in ORDER if column in s.adds and s not in (Cut, Filter, Final)), None)
            if maker is None or maker.name == stage.name:
                raise UserError(f"stage '{stage.name}' needs column '{column}', which the table does not have")
            if maker.name not in chain:
                add(make_stages([maker.name], cfg, Path())[0])
        if stage.name not in chain:
            chain.append(stage.name)
            known.update(stage.adds)

    add(make_stages(["ingest"], cfg, Path())[0])
    add(make_stages([name], cfg, Path())[0])
    return chain


def read_input(cfg: Mapping[str, Any]) -> pl.DataFrame:
    """Files of the folder that the config's ``input`` names, or those that a table of that name lists.

    Raises:
        UserError: neither is there, or what is made would be taken for footage the next time.
    """
    path, output = cfg["input"], cfg["output"]
    if not path:
        raise UserError("no --input: give a folder of raw footage, or a CSV/parquet table with a column path")
    place = Path(path)
    if place.suffix.lower() in (".csv", ".parquet"):
        return read_list(place)
    if output and Path(output).resolve().is_relative_to(place.resolve()):
        raise UserError(f"--output {output} lies in --input {path}: its clips would be taken for raw footage")
    return list_files(place)


def make_runner(cfg: Mapping[str, Any]) -> Runner:
    """Where the work is done."""
    workers = cfg["workers"] if cfg["workers"] is not None else os.cpu_count() or 1
    if cfg["runner"] == "ray":
        from tools.data.ray_runner import RayRunner

        return RayRunner(max(workers, 1))
    return LocalRunner(workers)


def make_pipeline(names: Sequence[str], cfg: Mapping[str, Any]) -> Pipeline:
    """A chain on the config's output folder.

    Raises:
        UserError: no output folder, a wrong chain, or a number that cannot work.
    """
    check_numbers(cfg)
    if not cfg["output"]:
        raise UserError("no --output: give a folder for what is made")
    root = Path(cfg["output"])
    if root.exists() and not root.is_dir():
        raise UserError(f"--output {root} is a file; give a folder")
    return Pipeline(make_stages(names, cfg, root), root, make_runner(cfg), cfg["retry_errors"])
