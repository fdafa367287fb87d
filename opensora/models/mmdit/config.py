"""Configuration of the MMDiT."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from opensora.utils.errors import UserError
from opensora.utils.nearest import nearest_key


@dataclass
class MMDiTConfig:
    """Every size and layout of an MMDiT; the comments give the values of the released 11B video model.

    Raises:
        UserError: sizes that do not fit together; the message names the config key.
    """

    in_channels: int  # packed latent channels: 64 = 16 latent channels x 2 x 2 patch
    vec_in_dim: int  # pooled text width: 768 (CLIP-L)
    context_in_dim: int  # text token width: 4096 (T5-XXL)
    hidden_size: int  # 3072
    mlp_ratio: float  # 4.0
    num_heads: int  # 24
    depth: int  # double blocks: 19
    depth_single_blocks: int  # single blocks: 38
    axes_dim: list[int]  # rotary channels for (frame, row, column): [16, 56, 56]
    theta: float  # rotary base: 10000
    qkv_bias: bool  # biases of the double blocks' q, k, v: True
    guidance_embed: bool  # embeds the guidance scale (distilled image model only): False
    cond_embed: bool = False  # embeds an image / video condition: True
    fused_qkv: bool = True  # one projection matrix for q, k, v: False
    grad_ckpt_settings: tuple[int, int] | None = None  # first n double / single blocks that recompute their activations
    use_liger_rope: bool = False  # rotary layout: half-split pairs (k, k + D/2) instead of (2k, 2k + 1): True
    patch_size: int = 2  # patch of the condition mask: 2 (1 with the high-compression autoencoder)
    attn_backend: str = "sdpa"  # attention kernel: sdpa, math, flash2, flash3, xformers, auto
    norm_backend: str = "torch"  # RMSNorm kernel: torch, liger
    rope_backend: str = "torch"  # rotary kernel: torch, liger (half-split layout only)

    model_type: ClassVar[str] = "MMDiT"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
        """Config from the keys of a config file.

        Raises:
            UserError: unknown key (with the nearest valid one) or a missing one.
        """
        names = {field.name: field for field in fields(cls)}
        for key in config:
            if key not in names:
                near = nearest_key(key, names)
                hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(names)}."
                raise UserError(f"model.{key} is not a key of the model 'flux'; {hint}")
        missing = [name for name, field in names.items() if field.default is MISSING and name not in config]
        if missing:
            raise UserError(f"the model 'flux' needs the config keys {', '.join('model.' + name for name in missing)}.")
        return cls(**config)

    def __post_init__(self) -> None:
        if not isinstance(self.axes_dim, Iterable):
            raise UserError(f"model.axes_dim={self.axes_dim!r}: give three numbers, such as [16, 56, 56].")
        self.axes_dim = list(self.axes_dim)
        blocks = self.grad_ckpt_settings
        if blocks and (not isinstance(blocks, Sequence) or len(blocks) != 2):
            raise UserError(
                f"model.grad_ckpt_settings={blocks!r}: give two numbers, how many double and how many single blocks "
                "recompute their activations, such as [8, 100]."
            )
        for name in ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("mlp_ratio", "theta"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must be above 0.")
        if min(blocks or (0,)) < 0:
            raise UserError(f"model.grad_ckpt_settings={blocks!r}: numbers of blocks must not be negative.")
        if self.depth < 0 or self.depth_single_blocks < 0:
            raise UserError("model.depth and model.depth_single_blocks must not be negative.")
        if self.hidden_size % self.num_heads:
            raise UserError(f"model.hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}.")
        impossible = any(dim % 2 or dim < 0 for dim in self.axes_dim)
        if sum(self.axes_dim) != self.head_dim or impossible or len(self.axes_dim) != 3:
            raise UserError(
                f"model.axes_dim={self.axes_dim} must be three even numbers whose sum is hidden_size / num_heads = "
                f"{self.head_dim}."
            )
        for name in ("norm_backend", "rope_backend"):
            if getattr(self, name) not in ("torch", "liger"):
                raise UserError(f"model.{name}={getattr(self, name)!r} is unknown; choose 'torch' or 'liger'.")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden channels of the feed-forward networks."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def cond_channels(self) -> int:
        """Packed width of the condition: one mask value per pixel of a patch, then the reference latent."""
        return self.in_channels + self.patch_size**2

    def get(self, key: str, default: Any = None) -> Any:
        """Value of ``key``, like a dict's: adapter libraries read configs this way."""
        return getattr(self, key, default)

    def __contains__(self, key: str) -> bool:
        return hasattr(self, key)
