"""The table of tensor parallelism as a policy of ColossalAI's Shardformer. Imported where ColossalAI is used only."""

from collections.abc import Sequence
from typing import Any

from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)
from torch import nn

from opensora.acceleration.sharding import WeightLayout
from opensora.acceleration.tensor_parallel import Replacement, replacements


class MMDiTPolicy(Policy):
    """Divides an MMDiT over the tensor-parallel ranks of a ``ShardConfig``.

    Args:
        items: modules to replace; none leaves the model whole.
    """

    def __init__(self, items: Sequence[Replacement]) -> None:
        super().__init__()
        self.items = items

    def config_sanity_check(self) -> None:
        """Sizes are checked where the replacements are listed."""

    def preprocess(self) -> nn.Module:
        """The model as it is."""
        return self.model

    def module_policy(self) -> dict[Any, ModulePolicyDescription]:
        """Every replacement by its full name, below the class of the whole model."""
        described = [
            SubModuleReplacementDescription(suffix=item.name, target_module=item.target, kwargs={"parts": item.parts})
            for item in self.items
        ]
        return {type(self.model): ModulePolicyDescription(sub_module_replacement=described)} if described else {}

    def postprocess(self) -> nn.Module:
        """The model as it is."""
        return self.model


def policy_of(model: nn.Module, layout: WeightLayout) -> MMDiTPolicy:
    """Policy that divides a whole model as its layout says (see `opensora.acceleration.tensor_parallel.layout_of`)."""
    return MMDiTPolicy(replacements(model, layout.axis) if layout.splits else [])
