"""Numbers that cannot work are refused before anything runs, rather than by a table whose rows fail one by one."""

from collections.abc import Mapping
from typing import Any

from opensora.config.keys import walk_options
from opensora.utils.errors import UserError
from tools.data.options import DataOptions

WORDS = {"least": "at least", "above": "more than", "most": "at most"}
ORDERED = (("cut.min_seconds", "cut.max_seconds"), ("ingest.min_aspect", "ingest.max_aspect"))
HIGHEST_THRESHOLD = {"scdet": 100.0, "transnetv2": 1.0}


def check_numbers(cfg: Mapping[str, Any]) -> None:
    """Hold a config against the limits of its keys (``least``, ``above``, ``most`` in ``options.py``).

    Args:
        cfg: resolved config of ``DataOptions``.

    Raises:
        UserError: a number out of its range, or a lower limit above its upper one.
    """
    values: dict[str, Any] = {}
    for dotted, option, _ in walk_options(DataOptions, cfg):
        value = values[dotted] = _value(cfg, dotted, option.default)
        limits = {word: option.metadata[word] for word in WORDS if word in option.metadata}
        if value is not None and limits and not _within(value, **limits):
            raise UserError(f"--{dotted} {value}: expected {_range(limits)}")
    for low, high in ORDERED:
        if values[low] > values[high]:
            raise UserError(f"--{low} {values[low]:g} is above --{high} {values[high]:g}: nothing would be left")
    method, threshold = values["scenes.method"], values["scenes.threshold"]
    highest = HIGHEST_THRESHOLD.get(method)
    if threshold is not None and highest is not None and threshold > highest:
        raise UserError(f"--scenes.threshold {threshold:g}: expected at most {highest:g} with --scenes.method {method}")


def _value(cfg: Mapping[str, Any], dotted: str, default: Any) -> Any:
    *sections, name = dotted.split(".")
    for section in sections:
        cfg = cfg.get(section) or {}
    return cfg.get(name, default)


def _within(value: float, least: float | None = None, above: float | None = None, most: float | None = None) -> bool:
    """False for NaN, which is in no range."""
    return (
        value == value
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )


def _range(limits: Mapping[str, float]) -> str:
    return " and ".join(f"{WORDS[word]} {limit:g}" for word, limit in limits.items())
