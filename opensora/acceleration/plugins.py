"""From a config's ``plugin`` to an engine for training, or to a divided model for sampling."""

import hashlib
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opensora.acceleration.engine import Engine, ReleasingEngine, SingleEngine
from opensora.acceleration.native import DDPEngine, FSDP2Engine, Named, OptimizerFactory
from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.acceleration.sequence_parallel import apply_sequence_parallel, check_mode
from opensora.acceleration.sharding import WeightLayout
from opensora.acceleration.tensor_parallel import apply_tensor_parallel, check_tensor_parallel, layout_of
from opensora.config.options import PluginOptions
from opensora.models.mmdit import MMDiTConfig
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

NATIVE = ("ddp", "fsdp2")
COLOSSAL = ("zero1", "zero2", "hybrid", "torch_ddp")


def plugin_name(plugin: str | None) -> str | None:
    """A config's ``plugin``, or None where it says there is none.

    Raises:
        UserError: unknown name.
    """
    if plugin in (None, "", "none"):
        return None
    if plugin not in NATIVE + COLOSSAL:
        raise UserError(f"plugin={plugin!r} is unknown; valid: {', '.join((*COLOSSAL, *NATIVE, 'none'))}")
    return plugin


def keeps_masters(plugin: str | None, context: ParallelContext) -> bool:
    """Whether the plugin keeps fp32 weights itself, whatever the dtype of the forward pass.

    The model is best built in float32 for it, so that nothing is rounded before.
    """
    return plugin_name(plugin) in ("fsdp2", *COLOSSAL) and context.world_size > 1


def check_agreement(model: nn.Module, context: ParallelContext) -> None:
    """See that all ranks hold the same parameters, before anything is exchanged that would hang if not.

    Raises:
        UserError: names the first difference.
    """
    if context.world_size == 1:
        return
    mine = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()]
    digests: list[Any] = [None] * context.world_size
    dist.all_gather_object(digests, hashlib.sha256("\n".join(mine).encode()).hexdigest())
    if len(set(digests)) > 1:
        everyone: list[Any] = [None] * context.world_size
        dist.all_gather_object(everyone, mine)
        other = next(lines for lines in everyone if lines != everyone[0])
        first = next((pair for pair in zip_longest(everyone[0], other) if pair[0] != pair[1]), None)
        raise UserError(f"the ranks have built different models: {first}; do all read the same config and weights?")


def divide_model(
    model: nn.Module, context: ParallelContext, config: PluginOptions | None = None, engine: str | None = None
) -> WeightLayout:
    """Tensor and sequence parallelism of a diffusion model, in place.

    Args:
        model: the same on every rank.
        context: the ranks.
        config: ``plugin_config``; ``sequence_parallelism_mode`` counts.
        engine: plugin that the model will be trained under; ``hybrid`` divides weights itself, when it is created.

    Returns:
        How the weights are divided, or will be.

    Raises:
        UserError: sizes that the ranks do not divide.
    """
    layout = (layout_of if engine == "hybrid" else apply_tensor_parallel)(model, context.tp)
    mode = (config or PluginOptions()).sequence_parallelism_mode
    if context.sp.size > 1:
        described: Any = model.config
        apply_sequence_parallel(model, context.sp, mode, described.num_heads // context.tp.size)
    return layout


def check_sizes(config: PluginOptions | None, model: nn.Module, world_size: int) -> None:
    """Whether a ``plugin_config`` can divide a model over that many processes; nothing is exchanged.

    Raises:
        UserError: sizes or a mode that cannot be.
    """
    sizes = Sizes.of("fsdp2", config).fit(world_size)
    if max(sizes.tp, sizes.sp) == 1:
        return
    described: Any = model.config
    if not isinstance(described, MMDiTConfig):
        raise UserError(
            f"plugin_config: tp_size and sp_size divide the MMDiT, not a {type(model).__name__}; set both to 1 and "
            "use fsdp2, ddp or zero2 to train it, branch_size to sample"
        )
    check_tensor_parallel(described, sizes.tp)
    mode = (config or PluginOptions()).sequence_parallelism_mode
    if sizes.sp > 1:
        check_mode(mode, described.num_heads // sizes.tp, sizes.sp, described.attn_backend)


def check_training(plugin: str | None, config: PluginOptions | None, model: Any, world_size: int) -> None:
    """Everything about parallel training that can be judged before anything is built.

    Args:
        plugin, config: ``plugin`` and ``plugin_config``.
        model: with its ``config``; without memory will do.
        world_size: number of processes.

    Raises:
        UserError: an unknown plugin, impossible sizes, several processes and no plugin, ColossalAI not installed.
    """
    name = plugin_name(plugin)
    sizes = Sizes.of(name, config)
    if world_size == 1:
        return
    if name is None:
        raise UserError(f"{world_size} processes, and plugin none trains on one; --plugin fsdp2 (or ddp) uses all")
    if sizes.branch > 1:
        raise UserError("plugin_config.branch_size: guidance branches are of sampling; training has none")
    check_sizes(config, model, world_size)
    if name in COLOSSAL:
        from opensora.acceleration.colossal import require_colossalai

        require_colossalai(on_cpu=False)


def check_in_backward(world_size: int, max_norm: float = 0.0, accumulation: int = 1) -> None:
    """Whether the backward pass can update parameters (``optim.in_backward``).

    Raises:
        UserError: names the key that needs all gradients at once.
    """
    wrong = {
        f"grad_clip=0, not {max_norm}: the norm of all gradients is known when they are gone": max_norm > 0,
        f"accumulation_steps=1, not {accumulation}: gradients are gone before they could add up": accumulation > 1,
        "one process: under --plugin fsdp2 each holds its share of the gradients only": world_size > 1,
    }
    for need, applies in wrong.items():
        if applies:
            raise UserError(f"optim.in_backward=True needs {need}")


def create_context(plugin: str | None, config: PluginOptions | None, device: torch.device) -> ParallelContext:
    """Groups of ranks that a config asks for; call `launch` first.

    Raises:
        UserError: an unknown plugin or impossible sizes.
    """
    return ParallelContext.create(Sizes.of(plugin_name(plugin), config), device)


def create_engine(
    plugin: str | None,
    model: nn.Module,
    make_optimizer: OptimizerFactory,
    context: ParallelContext,
    *,
    max_norm: float = 0.0,
    dtype: torch.dtype = torch.float32,
    config: PluginOptions | None = None,
    layout: WeightLayout | None = None,
    masters: Named | None = None,
    adapters: bool = False,
    in_backward: bool = False,
    fill: Callable[[nn.Module], None] | None = None,
) -> Engine:
    """Engine of a config's plugin.

    Args:
        plugin: ``ddp``, ``fsdp2``, ``zero1``, ``zero2``, ``hybrid``, ``torch_ddp``, or none.
        model: the same whole weights on every rank, or divided already (then give ``layout``).
        make_optimizer: from named parameters to an optimizer; called once they are what they will stay.
        context: the ranks, see `create_context`.
        max_norm: limit of the gradient norm, 0 for none.
        dtype: of the forward and backward pass.
        config: ``plugin_config``.
        layout: what `divide_model` returned; None divides the model here.
        masters: fp32 copies of the (divided) parameters, for plugins that keep none of their own (`keeps_masters`).
        adapters: float32 adapters train in a frozen model, which keeps its dtypes; ``dtype`` is theirs.
        in_backward: have the backward pass update parameters, see :class:`ReleasingEngine`; on one process.
        fill: gives a model on meta its weights, once fsdp2 has divided it; None: it has them.

    Raises:
        UserError: unknown plugin, sizes that do not fit, ColossalAI not installed, or ``in_backward`` with what needs
            all gradients at once.
    """
    name = plugin_name(plugin)
    if in_backward:
        check_in_backward(context.world_size, max_norm)
        named = [(key, p) for key, p in masters or model.named_parameters() if p.requires_grad]
        return ReleasingEngine(model, make_optimizer(named), named)
    if context.world_size == 1:
        if name is not None:
            logger.info("one process: plugin %s is not used", name)
        return SingleEngine(model, make_optimizer(masters or [*model.named_parameters()]), max_norm)
    check_agreement(model, context)
    if layout is None:
        layout = divide_model(model, context, config, name)
    if name in COLOSSAL:
        from opensora.acceleration.colossal import ColossalEngine

        return ColossalEngine(name, model, make_optimizer, context, max_norm, layout, dtype, config or PluginOptions())
    if name == "fsdp2":
        whole = config is not None and config.whole_gradients
        return FSDP2Engine(
            model, make_optimizer, context, max_norm, layout, dtype,
            adapters=adapters, whole_gradients=whole, fill=fill,
        )  # fmt: skip
    return DDPEngine(model, make_optimizer, context, max_norm, layout, masters)
