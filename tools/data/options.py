"""Keys of a data config (``configs/data/*.py`` and the command lines): those of the run, and a section per stage.

A stage's keys stand in its own file below ``stages/``.
"""

# ruff: noqa: RUF009 - opt() makes dataclass fields

from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from typing import Literal

from opensora.config.options import Options, opt, section
from tools.data.engine.stage import Stage


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """From raw footage to a training table."""

    input: str | None = opt(None, "folder of raw footage, or a CSV/parquet table with a column path")
    output: str | None = opt(None, "folder for everything that is made")
    stages: list[str] = opt([], "stages to run, in order")
    workers: int | None = opt(None, "processes; none takes one per core, 0 works in this one", least=0, most=4096)
    runner: Literal["local", "ray"] = opt("local", "where: this machine, or a Ray cluster")
    dry_run: bool = opt(False, "print what would be done")
    retry_errors: bool = opt(False, "do rows again that failed before")
    overwrite: bool = opt(False, "replace files of the output folder that were not written by these tools")


def with_sections(stages: Mapping[str, type[Stage]]) -> type[DataOptions]:
    """The keys of a config with these stages: ``DataOptions`` and a section for each that has settings."""
    groups = {name: stage.options() for name, stage in stages.items()}
    sections = [
        (name, group, section(group, (group.__doc__ or "").splitlines()[0], default={}, fill=True))
        for name, group in groups.items()
        if any(key.metadata for key in fields(group))
    ]
    return make_dataclass(
        "DataOptions",
        sections,
        bases=(DataOptions,),
        namespace={"__doc__": DataOptions.__doc__},
        frozen=True,
        kw_only=True,
    )
