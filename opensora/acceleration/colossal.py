"""The engine of ColossalAI's Booster: ZeRO stages 1 and 2, its hybrid plugin, its DDP.

Its Shardformer divides weights for tensor parallelism, by the table of `tensor_parallel` (see `colossal_policy`).
Sequence parallelism is in place before Booster sees the model (`sequence_parallel`); ranks of one such group are
data-parallel ranks to it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opensora.acceleration import collectives
from opensora.acceleration.native import DistributedEngine, OptimizerFactory
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.sharding import Gathered, WeightLayout
from opensora.config.options import PluginOptions
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.optional import require

logger = get_logger(__name__)

INSTALL = (
    "`pip install -r requirements-colossalai.txt && pip install --no-deps colossalai==0.5.0`, or use --plugin fsdp2, "
    "which comes with torch"
)
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# keys of plugin_config that this package reads itself
OWN_KEYS = (
    *("tp_size", "pp_size", "sp_size", "branch_size", "shard_size", "whole_gradients"),
    *("sequence_parallelism_mode", "enable_sequence_parallelism"),
)


def require_colossalai(on_cpu: bool) -> Any:
    """The package, ready for this machine.

    Raises:
        UserError: not installed; says how.
    """
    booster = require("colossalai.booster", "this plugin", INSTALL)
    if on_cpu:
        from opensora.acceleration import colossal_cpu

        colossal_cpu.enable()
    return booster


class ColossalEngine(DistributedEngine):
    """Model and optimizer in ColossalAI's Booster.

    Args:
        name: ``zero1``, ``zero2``, ``hybrid`` or ``torch_ddp``.
        model: divided by sequence parallelism already, if that is wanted; its weights are whole.
        make_optimizer: an element-wise one (AdamW): ZeRO hands it flat pieces of parameters.
        context: the ranks.
        max_norm: limit of the gradient norm, 0 for none.
        layout: how ``hybrid`` is to divide the weights; nothing in it leaves them whole.
        dtype: of the forward and backward pass; below float32, optimizer and masters are float32.
        config: ``plugin_config``; keys that are not ours go to ColossalAI's plugin as they are.

    Raises:
        UserError: not installed, or settings that it refuses.
    """

    def __init__(
        self, name: str, model: nn.Module, make_optimizer: OptimizerFactory, context: ParallelContext,
        max_norm: float, layout: WeightLayout, dtype: torch.dtype, config: PluginOptions,
    ) -> None:  # fmt: skip
        booster = require_colossalai(context.device.type == "cpu")
        if name == "torch_ddp" and dtype != torch.float32:
            raise UserError("plugin torch_ddp keeps no fp32 weights: set dtype fp32, or use zero1, hybrid or fsdp2")
        named = [*model.named_parameters()]
        super().__init__(model, model, named, make_optimizer, max_norm, context, layout)
        self._by_name = dict(named)
        self._booster = booster.Booster(plugin=_plugin(name, model, dtype, context, max_norm, layout, config))
        # self.optimizer stays torch's own, for schedules; its groups are shared with the boosted one
        self.model, self._boosted, *_ = self._booster.boost(model, self.optimizer)
        self._keeps_norm = type(self._boosted).__name__ not in ("OptimizerWrapper", "HybridParallelNaiveOptimizer")
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in layout.splits:
                parameter.dist_layout = layout.splits[parameter_name]  # type: ignore[attr-defined] # for its norm
        self._skip_bad_steps()
        self.rounded_to = dtype if dtype != torch.float32 else None

    def _skip_bad_steps(self) -> None:
        """Leave weights as they are where the gradient is not finite; only fp16 does so by itself."""
        update = self.optimizer.step

        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            norm = self._boosted.get_grad_norm() if self._keeps_norm else None
            return update(*args, **kwargs) if norm is None or math.isfinite(norm) else None

        # a bound method: schedules look into it
        self.optimizer.step = MethodType(step, self.optimizer)  # type: ignore[method-assign]

    def backward(self, loss: Tensor) -> None:
        self._booster.backward(loss, self._boosted)

    def no_sync(self) -> AbstractContextManager:
        """ZeRO 2 and hybrid exchange gradients of every micro-batch."""
        plugin = self._booster.plugin
        return self._booster.no_sync(self.model, self._boosted) if plugin.support_no_sync() else nullcontext()

    def step(self) -> float:
        if not self._keeps_norm:
            return super().step()
        self._boosted.step()
        norm = self._boosted.get_grad_norm()
        self._boosted.zero_grad()
        return float("nan") if norm is None else float(norm)

    def state_dict(self) -> Mapping[str, Any]:
        own = self.optimizer.state_dict()
        # where ZeRO or 16 bit have masters, the state is theirs; in the order of the parameters it is put together
        masters = {name: master for name, _, master in self._masters()}
        states = {
            index: self.optimizer.state[masters.get(name, parameter)]
            for index, (name, parameter) in enumerate(zip(self._names, self._parameters))
            if masters.get(name, parameter) in self.optimizer.state
        }
        return self._whole_state({**own, "state": states})

    def _whole_value(self, name: str, key: str, value: Any) -> Any:
        """The whole of a master, or of an entry of its optimizer state."""
        parameter = self._by_name[name]
        if isinstance(value, Tensor) and value.ndim and _is_piece(value, parameter):
            pieces = collectives.all_gather(value.flatten().to(self.context.device), self.context.replica)
            value = pieces[: parameter.numel()].view(parameter.shape)
        return super()._whole_value(name, key, value)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._boosted.load_state_dict(self._local_state(state))

    def master_state(self) -> Mapping[str, Tensor]:
        masters = {name: master for name, _, master in self._masters()}
        return Gathered(masters, lambda name, master: self._whole_value(name, "master", master))

    @torch.no_grad()
    def load_master_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter, master in self._masters():
            value = self.layout.local(name, state[name].to(parameter.device), parameter)
            parameter.copy_(value)
            if _is_piece(master, parameter):
                axis = self.context.replica
                padded = torch.nn.functional.pad(value.flatten(), (0, master.numel() * axis.size - value.numel()))
                value = padded.chunk(axis.size)[axis.rank]
            master.copy_(value.view_as(master))

    def _masters(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Names, parameters of the model, and what the optimizer holds instead of them."""
        found = self._boosted.get_working_to_master_map() if self._keeps_norm else None
        for name, parameter in zip(self._names, self._parameters):
            master = (found or {}).get(id(parameter))
            if master is not None:
                yield name, parameter, master


def _is_piece(master: Tensor, parameter: Tensor) -> bool:
    return master.shape != parameter.shape


def _plugin(
    name: str, model: nn.Module, dtype: torch.dtype, context: ParallelContext,
    max_norm: float, layout: WeightLayout, config: PluginOptions,
) -> Any:  # fmt: skip
    """ColossalAI's plugin of a config."""
    from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

    on_cpu = context.device.type == "cpu"
    given = {key: value for key, value in config.to_dict().items() if key not in OWN_KEYS and value is not None}
    try:
        if name == "torch_ddp":
            return TorchDDPPlugin(**{k: v for k, v in given.items() if k == "static_graph"})
        if dtype not in PRECISIONS:
            raise UserError(f"plugin {name}: dtype {dtype} is unknown to ColossalAI; use bf16, fp16 or fp32")
        common: dict[str, Any] = {"precision": PRECISIONS[dtype], "max_norm": max_norm or math.inf}
        if on_cpu:
            given |= {"overlap_communication": False, "overlap_allgather": False}
        if name != "hybrid":
            for key in ("zero_stage", "static_graph"):
                given.pop(key, None)
            return LowLevelZeroPlugin(stage=int(name[-1]), **common, **{"cast_inputs": False, **given})
        from opensora.acceleration.colossal_policy import policy_of

        policy = policy_of(model, layout)
        return HybridParallelPlugin(custom_policy=policy, **common, **_hybrid_options(given, dtype, context))
    except (TypeError, AssertionError) as error:
        raise UserError(f"plugin_config does not suit ColossalAI's plugin {name}: {error}") from error


def _hybrid_options(given: Mapping[str, Any], dtype: torch.dtype, context: ParallelContext) -> dict[str, Any]:
    options = {key: value for key, value in given.items() if key != "cast_inputs"}
    bucket = options.pop("reduce_bucket_size_in_m", None)
    if bucket is not None:
        options.setdefault("zero_bucket_size_in_m", bucket)
    if dtype == torch.float32 and options.get("zero_stage"):
        logger.info("plugin hybrid: ColossalAI has ZeRO in 16 bit only; in fp32 weights are replicated (zero_stage=0)")
        options["zero_stage"] = 0
    return {
        "tp_size": context.tp.size,
        "pp_size": 1,
        "enable_metadata_cache": False,
        **options,
    }
