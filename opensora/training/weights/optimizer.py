"""Optimizers and learning-rate schedules, both counted in optimizer steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from opensora.acceleration.engine import Engine
from opensora.config.choices import SCHEDULES
from opensora.config.options import OptimOptions, SchedulerOptions
from opensora.training.checkpoint.folder import load_part
from opensora.training.weights.eight_bits import STATE_IN_8_BITS, adamw_in_8_bits
from opensora.training.weights.groups import Named, parameter_groups
from opensora.training.weights.host import kind_of
from opensora.training.weights.muon import DividedMuon
from opensora.training.weights.schedules import name_of, plateau_share
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.optional import BITSANDBYTES, BITSANDBYTES_HINT, check_module

logger = get_logger(__name__)

# One process trains with torch's AdamW under either name: HybridAdam is ColossalAI's AdamW for sharded training.
ADAM_NAMES = ("HybridAdam", "AdamW", "Adam")
IN_8_BITS = "AdamW8bit"
NAMES = (*ADAM_NAMES, IN_8_BITS, "Muon")
WHOLE_ROWS = (IN_8_BITS, "Muon")  # those that cannot work on any share of a parameter


Parameters = Sequence[nn.Parameter] | Sequence[dict[str, Any]]  # what an optimizer takes: tensors, or groups


class MuonWithAdamW(Optimizer):
    """Muon on the matrices of the repeated blocks, AdamW on everything else (biases, norms, first and last layers).

    Muon's updates are scaled to the root mean square of AdamW's, so both take the same learning rate and decay.
    Both parts share this object's parameter groups and state: schedules and checkpoints see one optimizer.

    Args:
        matrices: two-dimensional parameters of hidden layers, or groups of them.
        others: the remaining parameters, or groups of them.
        momentum: of Muon, in [0, 1).
        lr, betas, eps, weight_decay: as in AdamW; ``betas`` and ``eps`` concern AdamW alone.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); scaling as in Liu et al.,
    "Muon is Scalable for LLM Training" (2025).
    """

    def __init__(
        self,
        matrices: "Parameters",
        others: "Parameters",
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        muon: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        muon["adjust_lr_fn"] = "match_rms_adamw"
        adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(DividedMuon(matrices, **muon))
        if others:
            self.parts.append(AdamW(others, **adam))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Let the parts work on this object's groups and state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One update of all parameters."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Groups and state of an earlier run."""
        super().load_state_dict(state_dict)
        self._link()


def create_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimOptions) -> Optimizer:
    """Optimizer over the trainable parameters.

    Args:
        named_parameters: as ``model.named_parameters()`` gives them; those without ``requires_grad`` are left out.
        optim: its options. ``cls`` is HybridAdam or AdamW (decoupled decay), Adam, AdamW8bit (bitsandbytes'; moments of
            parameters of 4096 numbers and more in 8 bits; arXiv:2110.02861), or Muon
            (:class:`MuonWithAdamW`); ``adamw_mode=False`` is an L2 penalty as in Adam.

    Raises:
        UserError: see :func:`check_settings`; or a pattern of ``groups`` that fits nothing.
    """
    check_settings(optim)
    name, decoupled = optim.cls, _is_decoupled(optim)
    momentum = {} if optim.momentum is None else {"momentum": optim.momentum}
    options: dict[str, Any] = {key: getattr(optim, key) for key in ("lr", "betas", "eps", "weight_decay")}
    options.update(momentum)
    trainable = [(key, p) for key, p in named_parameters if p.requires_grad]
    if name == "Muon":
        matrices = {id(p) for key, p in trainable if is_hidden_matrix(key, p)}
        groups = _parameters(trainable, optim)
        return MuonWithAdamW(
            _only(groups, lambda p: id(p) in matrices), _only(groups, lambda p: id(p) not in matrices), **options
        )
    if name == IN_8_BITS:
        return adamw_in_8_bits(_parameters(trainable, optim), options)
    return (AdamW if decoupled else torch.optim.Adam)(_parameters(trainable, optim), **options)


def _parameters(trainable: Named, optim: OptimOptions) -> Parameters:
    return parameter_groups(trainable, optim) if optim.groups else [p for _, p in trainable]


def _only(parameters: Parameters, takes: Callable[[nn.Parameter], bool]) -> Parameters:
    """Those that are to be taken, in groups as they were."""
    found: list[Any] = []
    for each in parameters:
        if isinstance(each, dict):
            kept = [p for p in each["params"] if takes(p)]
            found += [{**each, "params": kept}] if kept else []
        elif takes(each):
            found.append(each)
    return found


def check_settings(optim: OptimOptions, section: str = "optim") -> None:
    """See that an optimizer can be made of its options, as far as they alone tell.

    Raises:
        UserError: an unknown ``cls`` or key, a decay that it has not, or a package that is not installed.
    """
    name = optim.cls
    if name not in NAMES:
        raise UserError(f"{section}.cls={name!r} is unknown; use one of {', '.join(NAMES)}")
    momentum = ["momentum"] if name == "Muon" else []
    known = ["lr", "betas", "eps", "weight_decay", "adamw_mode", "groups", *momentum]
    unknown = [*optim.extra, *(["momentum"] if optim.momentum is not None and not momentum else [])]
    if unknown:
        raise UserError(f"{section}.{sorted(unknown)[0]} is unknown for {name}; use {', '.join(known)}")
    if name in (IN_8_BITS, "Muon") and not _is_decoupled(optim):
        raise UserError(f"{section}.adamw_mode=False: the decay of {name} is decoupled; leave the key out")
    if name == IN_8_BITS:
        check_module(BITSANDBYTES, f"{section}.cls={name}", BITSANDBYTES_HINT)


def _is_decoupled(optim: OptimOptions) -> bool:
    return optim.cls != "Adam" if optim.adamw_mode is None else optim.adamw_mode


def check_same_optimizer(saved: Mapping[str, Any], optimizer: Optimizer, source: str) -> None:
    """Whether an optimizer can resume from a saved state.

    Args:
        saved: state dict of an earlier run's.
        optimizer: over the same parameters.
        source: where the state is from, for the message.

    Raises:
        UserError: it is of another kind, or over other parameters.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{source}: its optimizer is of another kind, or trains other weights (groups of {sizes[0]} parameters, "
            f"now {sizes[1]}); set optim.cls, optim.groups and freeze_layers as its config.txt has them"
        )
    in_8_bits = any(STATE_IN_8_BITS in values for values in saved["state"].values())
    if saved["state"] and in_8_bits != (kind_of(optimizer) == IN_8_BITS):
        raise UserError(
            f"{source}: its optimizer is {'' if in_8_bits else 'not '}{IN_8_BITS}; set optim.cls as in its config.txt"
        )


def load_optimizer(engine: Engine, checkpoint: Path, name: str = "optimizer") -> None:
    """Have an engine's optimizer resume from a checkpoint, where it is called ``name``.

    It starts from scratch, and the log says so, if the checkpoint's run had none because all weights were frozen.

    Raises:
        UserError: see `check_same_optimizer`.
    """
    saved = load_part(checkpoint, name)
    if not saved:
        logger.warning("%s: all weights were frozen in that run, so their optimizer starts from scratch", checkpoint)
        return
    check_same_optimizer(saved, engine.optimizer, f"--load {checkpoint}")
    engine.load_state_dict(saved)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a list of blocks; its name then has a number, as ``double_blocks.0``."""
    return parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))


class Schedule:
    """Learning rates that follow from the number of the optimizer step alone.

    Unlike torch's schedulers it does not ask whether the optimizer moved: a step that was skipped counts, too.

    Args:
        optimizer: its groups have ``initial_lr``, and get ``lr``, which is that times ``factor(step)``.
        factor: by optimizer step.
        step: optimizer step to begin with.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], step: int = 0) -> None:
        self._optimizer, self._factor, self._step = optimizer, factor, step
        self._apply()

    def step(self) -> None:
        """Go on to the next optimizer step."""
        self._step += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Learning rate of each parameter group at this step."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def _apply(self) -> None:
        factor = self._factor(self._step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def create_schedule(
    optimizer: Optimizer,
    options: SchedulerOptions | None = None,
    *,
    total_steps: int | None = None,
    start_step: int = 0,
    initial_lr: float = 1e-6,
) -> Schedule:
    """Linear warm-up from ``initial_lr``, a plateau for a share of the run, then the named decay.

    Args:
        optimizer: the ``lr`` of its groups is the plateau; all follow one course.
        options: lengths and decay; None stays on the plateau.
        total_steps: where the decay ends; required with one.
        start_step: optimizer step to resume at.
        initial_lr: learning rate of the first warm-up step, of the first group.
    """
    options = options or SchedulerOptions()
    name, decay = name_of(options), SCHEDULES.get(name_of(options))
    if name != "constant" and total_steps is None:
        raise UserError(f"the learning-rate schedule {name} needs the length of the run: set max_steps or epochs")
    first = optimizer.param_groups[0]
    base = first.get("initial_lr", first["lr"]) if start_step else first["lr"]
    warmup_steps, final = options.warmup_steps or 0, options.final_share
    flat_until = warmup_steps + plateau_share(options) * max((total_steps or 0) - warmup_steps, 0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            start = min(initial_lr / base, 1.0) if base else 1.0
            return start + (1.0 - start) * (step + 1) / (warmup_steps + 1)
        if name == "constant" or total_steps is None or step < flat_until:
            return 1.0
        done = min((step - flat_until) / max(total_steps - flat_until, 1), 1.0)
        return final + (1.0 - final) * decay(done)

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] if start_step == 0 else group.get("initial_lr", group["lr"])
    return Schedule(optimizer, factor, start_step)
