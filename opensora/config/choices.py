"""Tables of what a config key may name: solvers, attention kernels and the like, shipped ones and a user's own."""

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from opensora.utils.errors import UserError

T = TypeVar("T")
Registered = TypeVar("Registered")


def is_again(before: Any, now: Any) -> bool:
    """Whether two registered things are one, from a module that was read a second time (in a notebook, say)."""
    place = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (before, now)]
    return before == now or (place[0] == place[1] and None not in place[0])


def check_whole(what: str, value: Any) -> None:
    """Refuse a class that lacks methods of its contract, when it is registered.

    Args:
        what: how messages call it.
        value: a class, or anything else.

    Raises:
        UserError: names what is missing.
    """
    missing = sorted(getattr(value, "__abstractmethods__", ()))
    if missing:
        raise UserError(f"{what}: {value.__name__} lacks {', '.join(missing)}")


class Choices(Generic[T]):
    """Names that a config key may hold, and what they stand for.

    The names are known at once, for help texts and checks; what stands behind a shipped one is imported when it is
    asked for. A user's own module adds to the table::

        @SOLVERS.register("midpoint")
        def midpoint(...): ...

    Args:
        kind: what the names are, for messages: ``solver``.
        places: shipped names in the order of help texts, each with its place ``module:attribute``.
    """

    def __init__(self, kind: str, places: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.places = MappingProxyType(dict(places or {}))
        self._added: dict[str, T] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that can be chosen, imported or not: shipped ones first."""
        return (*self.places, *self._added)

    def __contains__(self, name: object) -> bool:
        return name in self.places or name in self._added

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def get(self, name: str) -> T:
        """What a name stands for; imports its module first if need be.

        Raises:
            UserError: no such name; says the nearest one, or all.
        """
        self.check(name)
        if name in self._added:
            return self._added[name]
        module, _, attribute = self.places[name].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

    @property
    def listing(self) -> str:
        """The names, for messages and help texts."""
        return ", ".join(self.names)

    def check(self, name: Any) -> None:
        """Raise the UserError of :meth:`get` for a name that is not in the table; imports nothing."""
        if name in self:
            return
        near = difflib.get_close_matches(str(name), self.names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {self.listing or 'none'}"
        raise UserError(f"unknown {self.kind} {name!r}; {hint}")

    def add(self, name: str, value: T) -> None:
        """Add a choice.

        Raises:
            UserError: the name is taken by another one, or a class lacks methods of its contract.
        """
        check_whole(f"the {self.kind} {name!r}", value)
        if name in self and not (name in self._added and is_again(self._added[name], value)):
            raise UserError(f"the {self.kind} {name!r} is there already: register yours under another name")
        self._added[name] = value

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Decorator that adds a function or class under a name, and leaves it as it is. Raises as :meth:`add`."""

        def keep(value: Registered) -> Registered:
            self.add(name, cast(T, value))
            return value

        return keep


CONDITIONS: Choices[Any] = Choices(
    "cond_type",
    {
        name: f"opensora.diffusion.conditions:{name.upper()}"
        for name in (
            *("t2v", "i2v_head", "i2v_tail", "i2v_loop"),
            *("v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"),
            *("frames", "region", "extend_left", "extend_right"),
        )
    },
)
ATTENTION_KERNELS: Choices[Any] = Choices(
    "attention kernel",
    {
        **{name: f"opensora.models.mmdit.kernels:{name}" for name in ("cudnn", "sage")},
        "sdpa": "opensora.models.mmdit.attention:attention_sdpa",
        "math": "opensora.models.mmdit.attention:attention_math",
        **{name: f"opensora.models.mmdit.kernels:{name}" for name in ("flash3", "flash2", "xformers")},
    },
)
SOLVERS: Choices[Any] = Choices(
    "solver", {name: f"opensora.diffusion.solvers:{name}" for name in ("euler", "heun", "ab2", "renoise")}
)
TIME_SAMPLINGS: Choices[Any] = Choices(
    "density of diffusion times",
    {name: f"opensora.diffusion.times:{name}" for name in ("logit_normal", "uniform", "mode")},
)
LOSS_WEIGHTINGS: Choices[Any] = Choices(
    "loss weighting", {name: f"opensora.diffusion.times:{name}" for name in ("cosmap", "min_snr", "sigma_sqrt")}
)
SCHEDULES: Choices[Any] = Choices(
    "learning-rate schedule",
    {name: f"opensora.training.weights.schedules:{name}" for name in ("constant", "cosine", "linear", "wsd")},
)
TRACKERS: Choices[Any] = Choices(
    "tracker",
    {
        "tensorboard": "opensora.training.report.tensorboard:TensorBoardTracker",
        "wandb": "opensora.training.report.wandb:WandbTracker",
        "swanlab": "opensora.training.report.swanlab:SwanLabTracker",
    },
)
QUANTIZERS: Choices[Any] = Choices(
    "kind of quantised weights",
    {name: f"opensora.models.quantization.{name}:{name.capitalize()}" for name in ("fp8", "int8", "nf4")},
)
STEP_CACHES: Choices[Any] = Choices("step cache", {"first_block": "opensora.diffusion.first_block:FirstBlockCache"})
METHODS: Choices[Any] = Choices(
    "training method",
    {
        "flow_matching": "opensora.training.methods.flow_matching:FlowMatching",
        "dmd": "opensora.training.methods.dmd:DistributionMatching",
        "guidance_distillation": "opensora.training.methods.guidance:GuidanceDistillation",
        "trajectory_distillation": "opensora.training.methods.trajectory:TrajectoryDistillation",
    },
)
