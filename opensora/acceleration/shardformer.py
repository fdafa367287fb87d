"""ColossalAI's Shardformer for the T5 encoder: its fused residual sums, where it can and results stay the same."""

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import nn

from opensora.utils.logging import get_logger

logger = get_logger(__name__)

PROBE, PROBE_TOKENS = "a probe of a few words", 16
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def use_shardformer(embedder: nn.Module) -> bool:
    """Have a text embedder whose config says ``shardformer=True`` compute with ColossalAI's replacements.

    They are made in a copy that shares the weights, and compared on a probe text. ColossalAI 0.5 expects an older
    transformers: replacements with other arguments than today's are left out, and where it is absent, fails, or
    computes something else, the embedder stays as it is. One log line says which.

    Args:
        embedder: see `opensora.models.text.embedder.HFEmbedder`; others are left alone.

    Returns:
        Whether they are used.
    """
    given: Any = embedder
    if not getattr(embedder, "shardformer", False):
        return False
    plain = given.model
    try:
        replaced = _replaced(plain, given.is_clip)
        error = _difference(given, plain, replaced)
        if not error <= TOLERANCE.get(given.dtype, 0):
            raise ValueError(f"ColossalAI's result differs by {error:.1e}")
    except Exception as reason:  # whatever a library says that was written for another version of transformers
        logger.info("shardformer=True: the text encoder runs as plain transformers, with the same results (%s)", reason)
        return False
    given.model = replaced
    logger.info("shardformer=True: the text encoder runs with ColossalAI's fused operations")
    return True


def _replaced(model: nn.Module, is_clip: bool) -> nn.Module:
    """A copy of a T5 encoder with ColossalAI's forward passes, on the same weights."""
    if is_clip:
        raise ValueError("CLIP has none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises to install kernels that are not used here
        from colossalai.shardformer import ShardConfig, ShardFormer
        from colossalai.shardformer.policies.t5 import T5EncoderPolicy

        class Policy(T5EncoderPolicy):
            def module_policy(self) -> dict[Any, Any]:
                described = super().module_policy()
                for owner, description in described.items():
                    _drop_outdated(owner, description.method_replacement or {})
                if not any(description.method_replacement for description in described.values()):
                    raise ValueError("none of ColossalAI's replacements fits this version of transformers")
                return described

        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        config = ShardConfig(enable_tensor_parallelism=False, enable_jit_fused=True)
        return ShardFormer(config).optimize(copy.deepcopy(model, shared), Policy())[0]


def _drop_outdated(owner: Any, methods: dict[str, Any]) -> None:
    """Leave a class alone whose forward pass has arguments that the one to replace it does not know."""
    if "forward" in methods:
        own, new = (inspect.signature(method).parameters.keys() for method in (owner.forward, methods["forward"]))
        if own - new:
            methods.clear()


def _difference(embedder: Any, plain: nn.Module, replaced: nn.Module) -> float:
    """Norm of the difference on the probe, relative."""
    ids = embedder.tokenize([PROBE])[:, :PROBE_TOKENS].to(embedder.device)
    with torch.no_grad():
        expected, found = (
            model(input_ids=ids, attention_mask=None)[embedder.output_key].float() for model in (plain, replaced)
        )
    return float((found - expected).norm() / expected.norm())
