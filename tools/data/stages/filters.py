"""Named sets of thresholds. Nothing is deleted: rows get ``keep``, ``reason`` and ``tier``."""

# ruff: noqa: RUF009 - opt() makes dataclass fields

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError
from tools.data.engine.stage import TableStage

Bounds = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class FilterOptions(Options):
    """Named sets of thresholds, from lenient to strict."""

    tiers: dict[str, Bounds] = opt({}, "{tier: {column: [lowest or none, highest or none]}}")
    keep: str | None = opt(None, "tier that a clip must reach; none takes the first")


class Filter(TableStage):
    """Thresholds on any columns; a value that is not known (null) passes.

    ``tier`` is the last one of the tiers, in the order of the config, that a row reaches together with all before it.
    """

    settings: FilterOptions

    name = "filter"
    adds: ClassVar = {"tier": pl.String, "keep": pl.Boolean, "reason": pl.String}

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns with a threshold."""
        return tuple(dict.fromkeys(column for bounds in self.settings.tiers.values() for column in bounds))

    def check(self) -> None:
        """Tiers are complete and ``keep`` is one of them."""
        tiers, keep = self.settings.tiers, self.settings.keep
        if not tiers:
            raise UserError(
                f"stage '{self.name}' has no {self.name}.tiers, e.g. {{'base': {{'sharpness': [3, None]}}}}"
            )
        if keep is not None and keep not in tiers:
            raise UserError(f"{self.name}.keep = {keep!r} is none of the tiers {', '.join(tiers)}")
        for tier, bounds in tiers.items():
            for column, pair in bounds.items():
                numbers = [value for value in pair if value is not None]
                if len(pair) != 2 or not all(isinstance(v, int | float) for v in numbers) or numbers != sorted(numbers):
                    raise UserError(
                        f"{self.name}.tiers.{tier}.{column} = {pair!r}: expected [lowest or None, highest or None]"
                    )

    def run_table(self, table: pl.DataFrame) -> pl.DataFrame:
        """Judge every row.

        Raises:
            UserError: a threshold on a column that holds no numbers.
        """
        tiers = self.settings.tiers
        for column in self.reads:
            kind = table[column].dtype
            if not kind.is_numeric() and kind != pl.Null:
                raise UserError(f"{self.name}.tiers: column '{column}' is {kind}; thresholds are for numbers")
        names = list(tiers)
        wanted = names.index(self.settings.keep or names[0])
        reached = pl.lit(None, pl.String)
        passed, reason = pl.lit(True), pl.lit("")
        for number, name in enumerate(names):
            why = failure(tiers[name])
            if number <= wanted:
                reason = pl.when(reason == "").then(why).otherwise(reason)
            passed = passed & (why == "")
            reached = pl.when(passed).then(pl.lit(name)).otherwise(reached)
        table = table.with_columns(reached.alias("tier"), reason.alias("reason"))
        return table.with_columns((pl.col("reason") == "").alias("keep"))


class Final(Filter):
    """The same after captions, on what they and ``match`` add."""

    name = "final"


def failure(bounds: Mapping[str, list[Any]]) -> pl.Expr:
    """The first threshold a row misses (``sharpness < 3``), empty if it misses none."""
    why = pl.lit("")
    for column, (low, high) in reversed(list(bounds.items())):
        if high is not None:
            why = pl.when(pl.col(column) > high).then(pl.lit(f"{column} > {high:g}")).otherwise(why)
        if low is not None:
            why = pl.when(pl.col(column) < low).then(pl.lit(f"{column} < {low:g}")).otherwise(why)
    return why
