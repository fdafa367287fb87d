"""Configuration of the MMDiT."""

# ruff: noqa: RUF009 - opt() makes dataclass fields

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opensora.config.choices import ATTENTION_KERNELS, QUANTIZERS
from opensora.config.keys import read_group
from opensora.config.options import MAX_DEPTH, MAX_PATCH, MAX_WIDTH, ModelOptions, opt
from opensora.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(ModelOptions):
    """Diffusion transformer (`flux`); the defaults are the sizes of the released 11B video model.

    Raises:
        UserError: sizes that do not fit together; names the config key.
    """

    key_prefix: ClassVar[str] = "model."

    strict_load: bool = opt(True, "refuse weights with missing or unexpected keys")
    in_channels: int = opt(64, "channels of a packed token", least=1, most=MAX_WIDTH, required=True)
    vec_in_dim: int = opt(768, "width of the pooled text vector", least=1, most=MAX_WIDTH, required=True)
    context_in_dim: int = opt(4096, "width of the text tokens", least=1, most=MAX_WIDTH, required=True)
    hidden_size: int = opt(3072, "width of the model", least=1, most=MAX_WIDTH, required=True)
    mlp_ratio: float = opt(4.0, "MLP width over hidden_size", above=0, most=1000, required=True)
    num_heads: int = opt(24, "attention heads", least=1, most=MAX_WIDTH, required=True)
    depth: int = opt(19, "double-stream blocks", least=0, most=MAX_DEPTH, required=True)
    depth_single_blocks: int = opt(38, "single-stream blocks", least=0, most=MAX_DEPTH, required=True)
    axes_dim: list[int] = opt(
        [16, 56, 56], "rotary channels of time, row and column; sum is the head width", required=True
    )
    theta: float = opt(10_000.0, "rotary base", above=0, required=True)
    qkv_bias: bool = opt(True, "bias in the query, key and value projections", required=True)
    guidance_embed: bool = opt(False, "model takes the guidance scale as input", required=True)
    guidance_img_embed: bool = opt(False, "model takes the image guidance scale as a second input of this kind")
    cond_embed: bool = opt(False, "model takes masked reference latents as input")
    fused_qkv: bool = opt(True, "one projection for query, key and value")
    grad_ckpt_settings: tuple[int, int] | None = opt(None, "double and single blocks to recompute in backward", least=0)
    use_liger_rope: bool = opt(False, "half-split rotary layout instead of interleaved pairs")
    patch_size: int = opt(2, "latent pixels per token side", "latent px", least=1, most=MAX_PATCH)
    attn_backend: str = opt("sdpa", f"attention kernel: {', '.join(ATTENTION_KERNELS)}, auto")
    norm_backend: Literal["torch", "liger"] = opt("torch", "RMSNorm kernel")
    rope_backend: Literal["torch", "liger"] = opt("torch", "rotary kernel; liger knows the half-split layout only")

    quantize: str | None = opt(
        None, "approximate: blocks' weights quantised while loading; none by the file", choices=QUANTIZERS
    )

    model_type: ClassVar[str] = "MMDiT"

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any]) -> "MMDiTConfig":
        """Config from the keys of a config file.

        Raises:
            UserError: unknown key (with the nearest valid one), a missing one, or a value that cannot be.
        """
        return read_group(cls, keys, "model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given and not self.is_complete:  # of a section without all sizes, nothing can be said yet
            return
        if self.guidance_img_embed and not self.guidance_embed:
            raise UserError(
                "model.guidance_img_embed=True needs guidance_embed=True: text and image scales come together."
            )
        if self.hidden_size % self.num_heads:
            raise UserError(f"model.hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}.")
        impossible = any(dim % 2 or dim < 0 for dim in self.axes_dim)
        if sum(self.axes_dim) != self.head_dim or impossible or len(self.axes_dim) != 3:
            raise UserError(
                f"model.axes_dim={self.axes_dim} must be three even numbers whose sum is hidden_size / num_heads = "
                f"{self.head_dim}."
            )

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
