"""What a diffusion model is to everything that samples with one or trains it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.utils.errors import UserError


class DiffusionConfig(Protocol):
    """Keys that the option group of every diffusion model has: messages name them ``model.KEY``."""

    @property
    def in_channels(self) -> int:
        """Channels of a packed token: latent channels x patch_size^2."""

    @property
    def patch_size(self) -> int:
        """Latent pixels per token side."""

    @property
    def vec_in_dim(self) -> int:
        """Width of the pooled text vector."""

    @property
    def context_in_dim(self) -> int:
        """Width of the text tokens."""

    @property
    def cond_embed(self) -> bool:
        """Whether the model takes masked reference latents, without which it makes videos from text alone."""

    @property
    def guidance_embed(self) -> bool:
        """Whether the model takes the guidance scale as an input."""


KEYS = ("in_channels", "patch_size", "vec_in_dim", "context_in_dim", "cond_embed", "guidance_embed")


def row_sizes(x: Tensor) -> Tensor:
    """Sum of the magnitudes of ``x`` ``[B, N, C]`` row by row, ``[B]`` float32 at least."""
    return x.abs().sum(dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


@runtime_checkable
class SplitBlocks(Protocol):
    """All blocks of a model as one function, which can also be run in two goes: what step caches are given."""

    row_sizes: Callable[[Tensor], Tensor]
    """:func:`row_sizes` over the image tokens of all ranks that hold some of them each."""

    def __call__(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Any) -> Tensor:
        """Image tokens ``[B, N, C]`` after all blocks."""
        ...

    def first(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
        """Image and text tokens after the first block alone."""
        ...

    def rest(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Any) -> Tensor:
        """Image tokens after the other blocks, from what :meth:`first` returns."""
        ...


class DiffusionModel(nn.Module):
    """Predictor of the velocity of packed latents, written for one device.

    A subclass must have :meth:`forward`; the rest describes a model that knows no step caches, whose weight files say
    nothing of their layout, and which runs its blocks by :meth:`run_block`. With the plugin fsdp2, blocks of the
    ``nn.ModuleList`` ``blocks`` are divided one by one.

    Attributes:
        takes_step_cache: whether `forward` lets ``around`` stand in for the blocks.
        config: its option group.
        recomputes: whether blocks are to be computed again in the backward pass, instead of kept.
        recompute: what runs such a block; an engine may replace it (for instance to offload activations).
        row_sizes: see :func:`row_sizes`; sequence parallelism replaces it, so that ranks decide alike.
    """

    takes_step_cache: ClassVar[bool] = False
    config: Any  # a DiffusionConfig

    def __init__(self) -> None:
        super().__init__()
        self.recomputes = False
        self.recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.row_sizes: Callable[[Tensor], Tensor] = row_sizes

    def forward(
        self,
        img: Tensor,  # [B, N, in_channels] packed noisy latents
        img_ids: Tensor,  # [B, N, 3] frame, row, column of each token
        txt: Tensor,  # [B, L, context_in_dim] text tokens
        txt_ids: Tensor,  # [B, L, 3] zeros
        timesteps: Tensor,  # [B] diffusion times in [0, 1], 1 is noise
        y_vec: Tensor,  # [B, vec_in_dim] pooled text
        cond: Tensor | None = None,  # [B, N, in_channels + patch_size^2] mask and reference latents
        guidance: Tensor | None = None,  # [B] guidance scales
        around: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Velocity of every image token, ``[B, N, in_channels]``.

        ``around`` comes with a step cache only: see :class:`opensora.diffusion.step_cache.StepCache`.
        """
        raise NotImplementedError

    def run_block(self, block: nn.Module, checkpointed: bool, *args: Any) -> Any:
        """Run one block, keeping only its inputs for the backward pass if ``checkpointed``."""
        if checkpointed and self.training and torch.is_grad_enabled():
            return self.recompute(block, *args)
        return block(*args)

    def set_grad_checkpoint(self, enabled: bool) -> None:
        """Gradient checkpointing, as ``grad_checkpoint`` of the training config says."""
        self.recomputes = enabled

    def blocks_in_order(self) -> list[nn.Module]:
        """Blocks in the order in which they run, each by one call: what streaming of weights brings to the device one
        by one. Here those of the ``nn.ModuleList`` ``blocks``, none where there is none."""
        blocks = getattr(self, "blocks", None)
        return [*blocks] if isinstance(blocks, nn.ModuleList) else []

    def modulation_layers(self) -> Mapping[str, nn.Module]:
        """Layers by name whose only input is :meth:`modulation_input`: a sampler computes them once for all steps, see
        :mod:`opensora.diffusion.reuse`. Here none."""
        return {}

    def modulation_input(self, timesteps: Tensor, y_vec: Tensor, guidance: Tensor | None) -> Tensor:
        """What `forward` gives all of :meth:`modulation_layers`, ``[B, C]``, from some of its arguments.

        A model that has no such layers need not say."""
        if self.modulation_layers():
            raise NotImplementedError
        return y_vec

    def constant_layers(self) -> Mapping[str, nn.Module]:
        """Layers by name whose only input follows from ``txt``, ``txt_ids`` and ``img_ids``, which are the same at all
        steps. Here none."""
        return {}

    def forward_flops(self, image_tokens: int, text_tokens: int) -> float:
        """Floating-point operations of a forward on one sample (2 per multiply-add); here of matrices, each applied to
        all tokens."""
        return 2.0 * (image_tokens + text_tokens) * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    def activation_bytes(self, tokens: int, rows: int, dtype: torch.dtype) -> float:
        """Rough peak of what a forward keeps besides the weights; here eight times its widest layer."""
        widest = max((max(p.shape) for p in self.parameters() if p.ndim == 2), default=0)
        return 8.0 * rows * tokens * widest * dtype.itemsize

    def file_metadata(self) -> dict[str, str]:
        """Layouts that shapes do not tell, recorded in weight files and compared when they are read."""
        return {}

    def explain_mismatch(self, shapes: Mapping[str, tuple[int, ...]], strict: bool = True) -> list[str]:
        """Sentences that say why a weight file of these shapes does not fit, and which key to set; none if unknown."""
        return []


def as_diffusion_model(model: object) -> DiffusionModel:
    """``model``, known to be a diffusion model.

    Raises:
        UserError: it is none, or its option group lacks a key.
    """
    if not isinstance(model, DiffusionModel):
        raise UserError(
            f"{type(model).__name__} is no diffusion model (opensora.models.diffusion.DiffusionModel says what is)"
        )
    missing = [key for key in KEYS if not hasattr(getattr(model, "config", None), key)]
    if missing:
        raise UserError(f"{type(model).__name__}: its config has no {', '.join(missing)} (opensora.models.diffusion)")
    return model
