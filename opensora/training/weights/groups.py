"""Parameters that train with a learning rate or weight decay of their own, chosen by their names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from opensora.config.keys import read_group
from opensora.config.options import OptimOptions, Options, opt
from opensora.utils.errors import UserError

PATTERN = "pattern"  # key of an optimizer's group: the one in optim.groups that chose its parameters

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class ParameterGroupOptions(Options):
    """An entry of ``optim.groups``."""

    lr: float | None = opt(None, "learning rate; none takes that of optim", least=0)
    weight_decay: float | None = opt(None, "decoupled weight decay; none takes that of optim", least=0)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern with ``*`` fits the name of a parameter, or of a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def read_groups(optim: OptimOptions, path: str = "optim") -> dict[str, ParameterGroupOptions]:
    """The entries of ``groups`` by pattern, in their order.

    Raises:
        UserError: an entry that holds other keys or values than :class:`ParameterGroupOptions`, or nothing.
    """
    found = {}
    for pattern, values in (optim.groups or {}).items():
        place = f"{path}.groups[{pattern!r}]"
        if not isinstance(values, Mapping) or not values:
            raise UserError(f"{place} = {values!r}: give lr, weight_decay or both, e.g. dict(lr=1e-4)")
        found[pattern] = read_group(ParameterGroupOptions, values, place)
    return found


def parameter_groups(named: Named, optim: OptimOptions, path: str = "optim") -> list[dict[str, Any]]:
    """Parameters as an optimizer takes them: first those that no pattern fits, then a group for each pattern.

    Args:
        named: parameters that train. The first pattern that fits a name decides.
        optim: with ``groups``.
        path: of these options in the config, for messages.

    Raises:
        UserError: a pattern that fits none of them, or only such that one before it takes.
    """
    groups = read_groups(optim, path)
    chosen: dict[str | None, list[nn.Parameter]] = {None: [], **{pattern: [] for pattern in groups}}
    for name, parameter in named:
        chosen[next((pattern for pattern in groups if matches(name, pattern)), None)].append(parameter)
    for pattern in groups:
        if not chosen[pattern]:
            raise UserError(f"{path}.groups: {_why_empty(pattern, named)}")
    return [
        {"params": parameters, PATTERN: pattern, **({} if pattern is None else _settings(groups[pattern]))}
        for pattern, parameters in chosen.items()
        if parameters
    ]


def _settings(group: ParameterGroupOptions) -> dict[str, float]:
    return {key: value for key in ("lr", "weight_decay") if (value := getattr(group, key)) is not None}


def _why_empty(pattern: str, named: Named) -> str:
    if any(matches(name, pattern) for name, _ in named):
        return f"patterns before {pattern!r} take all parameters that it fits; put it before them"
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in named))
    return f"{pattern!r} fits no parameter that trains; the names of those begin with {parts}"


def base_lr(group: Mapping[str, Any], optim: OptimOptions) -> float:
    """Learning rate that a config says for a group of an optimizer, before the schedule."""
    own = read_groups(optim).get(group.get(PATTERN) or "")
    return optim.lr if own is None or own.lr is None else own.lr


def check_groups(named: Iterable[tuple[str, nn.Parameter]], optim: OptimOptions, path: str = "optim") -> None:
    """See that the patterns fit a model, on the meta device will do.

    Raises:
        UserError: see :func:`parameter_groups`.
    """
    if optim.groups:
        parameter_groups([(name, p) for name, p in named if p.requires_grad], optim, path)
