"""MMDiT: the diffusion transformer that predicts the velocity of packed video (or image) latents."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.config.keys import given_config
from opensora.models.diffusion import DiffusionModel
from opensora.models.kinds import Shapes, WeightKind
from opensora.models.mmdit.attention import JointAttention, Rotary, RotaryTable, resolve_attention
from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.mmdit.flops import activation_bytes, forward_flops
from opensora.models.mmdit.layers import (
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    SingleStreamBlock,
    timestep_embedding,
)
from opensora.models.mmdit.loading import explain_mismatch, layout_metadata, quantization
from opensora.registry import MODELS
from opensora.utils.weights_loading import Change, load_model

TIME_EMBED_DIM = 256
ALL_BLOCKS = 10**6

RunBlocks = Callable[[Tensor, Tensor, Tensor, Rotary], Tensor]
"""``run(img, txt, vec, rope)``: image tokens after all blocks, see :meth:`MMDiTModel.run_blocks`; of the MMDiT it is a
:class:`~opensora.models.diffusion.SplitBlocks`."""


class Blocks:
    """The blocks of an MMDiT, see :class:`~opensora.models.diffusion.SplitBlocks`."""

    def __init__(self, model: "MMDiTModel") -> None:
        self.model, self.row_sizes = model, model.row_sizes

    def __call__(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary) -> Tensor:
        return self.model.run_blocks(img, txt, vec, rope)

    def first(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary) -> tuple[Tensor, Tensor]:
        return self.model.run_first_block(img, txt, vec, rope)

    def rest(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary) -> Tensor:
        return self.model.run_blocks(img, txt, vec, rope, start=1)


class MMDiTModel(DiffusionModel):
    """Multimodal diffusion transformer of FLUX.1 and Open-Sora 2.0 (arXiv:2403.03206, arXiv:2503.09642).

    Written for one device: parallelism replaces the blocks' ``attention`` modules and shards the inputs in hooks.

    Args:
        config: sizes and layouts.
    """

    takes_step_cache = True

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.grad_ckpt_settings = tuple(config.grad_ckpt_settings or (0, 0))
        backend = resolve_attention(config.attn_backend)
        hidden = config.hidden_size

        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = MLPEmbedder(TIME_EMBED_DIM, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        self.guidance_in = MLPEmbedder(TIME_EMBED_DIM, hidden) if config.guidance_embed else None
        self.guidance_img_in = MLPEmbedder(TIME_EMBED_DIM, hidden) if config.guidance_img_embed else None
        self.cond_in = nn.Linear(config.cond_channels, hidden) if config.cond_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.rotary = RotaryTable(config.axes_dim, config.theta)

        def attention() -> JointAttention:
            return JointAttention(backend, config.use_liger_rope, config.rope_backend, config.attn_backend == "auto")

        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config, attention()) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, attention()) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden, config.in_channels)
        if self.cond_in is not None:  # a model that gains a condition starts out as the one without it
            nn.init.zeros_(self.cond_in.weight)
            nn.init.zeros_(self.cond_in.bias)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.img_in.weight.dtype

    def prepare(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None,
        guidance: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Rotary]:
        """Embed the inputs of `forward`.

        Returns:
            image tokens ``[B, N, C]``, text tokens ``[B, L, C]``, conditioning vector ``[B, C]``, rotary table of text
            then image tokens.
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(f"img and txt must be [B, tokens, channels], not {[*img.shape]} and {[*txt.shape]}.")
        x = self.img_in(img)
        if self.cond_in is not None:
            if cond is None:
                raise ValueError(f"a model with cond_embed=True needs `cond`, [B, N, {self.config.cond_channels}].")
            x = x + self.cond_in(cond)
        vec = self.embed_vector(timesteps, y_vec, guidance, img.dtype)
        rope = self.rotary(torch.cat((txt_ids, img_ids), dim=1))
        return x, self.txt_in(txt), vec, rope

    def embed_vector(self, timesteps: Tensor, y_vec: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Conditioning vector ``[B, C]``: embedded time, pooled text and, if the model takes it, guidance scale."""
        vec = self.time_in(timestep_embedding(timesteps, TIME_EMBED_DIM).to(dtype)) + self.vector_in(y_vec)
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("a model with guidance_embed=True needs `guidance`, [B] guidance scales.")
            told = guidance[:, None] if guidance.ndim == 1 else guidance
            vec = vec + self.guidance_in(timestep_embedding(told[:, 0], TIME_EMBED_DIM).to(dtype))
            if self.guidance_img_in is not None:
                scale = told[:, 1] if told.shape[1] > 1 else torch.ones_like(told[:, 0])
                vec = vec + self.guidance_img_in(timestep_embedding(scale, TIME_EMBED_DIM).to(dtype))
        return vec

    def blocks_in_order(self) -> list[nn.Module]:
        """Double, then single blocks."""
        return [*self.double_blocks, *self.single_blocks]

    def modulation_layers(self) -> Mapping[str, nn.Module]:
        """Of all blocks, and of the last layer."""
        found = [f"{name}.lin" for name, module in self.named_modules() if isinstance(module, Modulation)]
        return {name: self.get_submodule(name) for name in (*found, "final_layer.adaLN_modulation.1")}

    def modulation_input(self, timesteps: Tensor, y_vec: Tensor, guidance: Tensor | None) -> Tensor:
        """The conditioning vector, as modulation takes it in."""
        return F.silu(self.embed_vector(timesteps, y_vec, guidance, timesteps.dtype))

    def constant_layers(self) -> Mapping[str, nn.Module]:
        """Embedder of the text tokens, and rotary table."""
        return {name: self.get_submodule(name) for name in ("txt_in", "rotary")}

    def set_grad_checkpoint(self, enabled: bool) -> None:
        """Of the numbers of double and single blocks, from the first, that the config says; else of all."""
        chosen = tuple(self.config.grad_ckpt_settings or (ALL_BLOCKS, ALL_BLOCKS))
        self.grad_ckpt_settings = chosen if enabled else (0, 0)

    def forward_flops(self, image_tokens: int, text_tokens: int) -> float:
        """See :func:`opensora.models.mmdit.flops.forward_flops`."""
        return forward_flops(self, image_tokens, text_tokens)

    def activation_bytes(self, tokens: int, rows: int, dtype: torch.dtype) -> float:
        """See :func:`opensora.models.mmdit.flops.activation_bytes`."""
        return activation_bytes(self, tokens, rows, dtype)

    def file_metadata(self) -> dict[str, str]:
        """See :func:`opensora.models.mmdit.loading.layout_metadata`."""
        return layout_metadata(self.config)

    def explain_mismatch(self, shapes: Shapes, strict: bool = True) -> list[str]:
        """See :func:`opensora.models.mmdit.loading.explain_mismatch`."""
        return explain_mismatch(self.config, shapes, strict)

    def forward(
        self,
        img: Tensor,  # [B, N, in_channels] packed noisy latents
        img_ids: Tensor,  # [B, N, 3] frame, row, column of each token
        txt: Tensor,  # [B, L, context_in_dim] text tokens
        txt_ids: Tensor,  # [B, L, 3] zeros
        timesteps: Tensor,  # [B] diffusion times in [0, 1], 1 is noise; embedded in their own dtype
        y_vec: Tensor,  # [B, vec_in_dim] pooled text
        cond: Tensor | None = None,  # [B, N, in_channels + patch_size^2] mask and reference latents
        guidance: Tensor | None = None,  # [B] guidance scales, or [B, 2] of text and image
        around: Callable[[RunBlocks, Tensor, Tensor, Tensor, Rotary], Tensor] | None = None,
    ) -> Tensor:
        """Velocity of every image token, ``[B, N, in_channels]``.

        ``around(run, img, txt, vec, rope)`` stands in for :meth:`run_blocks`, which it is given as ``run``: step caches
        come in here.

        Raises:
            ValueError: `cond` or `guidance` is missing for a model that embeds it, or inputs are not 3-D.
        """
        img, txt, vec, rope = self.prepare(img, img_ids, txt, txt_ids, timesteps, y_vec, cond, guidance)
        run = self.run_blocks if around is None else partial(around, Blocks(self))
        return self.final_layer(run(img, txt, vec, rope), vec)

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary, start: int = 0) -> Tensor:
        """What `prepare` returns, through all blocks (from the one numbered ``start``, double ones first): image tokens
        ``[B, N, C]`` before the last layer."""
        n_double, n_single = self.grad_ckpt_settings
        for i, block in enumerate(self.double_blocks):
            if i >= start:
                img, txt = self.run_block(block, i < n_double, img, txt, vec, rope)
        x, text_tokens = torch.cat((txt, img), dim=1), txt.shape[1]
        del img, txt  # their room is needed
        for i, block in enumerate(self.single_blocks):
            if i + len(self.double_blocks) >= start:
                x = self.run_block(block, i < n_single, x, vec, rope)
        return x[:, text_tokens:]

    def run_first_block(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary) -> tuple[Tensor, Tensor]:
        """What `prepare` returns, through the first block: image tokens ``[B, N, C]`` and text tokens ``[B, L, C]``."""
        if len(self.double_blocks):
            return self.run_block(self.double_blocks[0], self.grad_ckpt_settings[0] > 0, img, txt, vec, rope)
        x, text_tokens = torch.cat((txt, img), dim=1), txt.shape[1]
        x = self.run_block(self.single_blocks[0], self.grad_ckpt_settings[1] > 0, x, vec, rope)
        return x[:, text_tokens:], x[:, :text_tokens]


def new_embedders() -> dict[str, float | None]:
    """How embedders start that a file lacks: as constants, or (None) as new layers do."""
    scales = ("guidance_in", "guidance_img_in")
    layers = {"in_layer": None, "out_layer": 0.0}
    return {"cond_in.": 0.0, **{f"{name}.{layer}.": value for name in scales for layer, value in layers.items()}}


@MODELS.register_module("flux")
@WeightKind("an MMDiT", "img_in.weight", section="model")
def Flux(
    config: MMDiTConfig | str | None = None,
    device_map: str | torch.device = "cpu",
    torch_dtype: torch.dtype = torch.float32,
    change: Change | None = None,
    **keys: Any,
) -> MMDiTModel:
    """Build an MMDiT, with weights from a file or freshly initialised.

    Args:
        config: sizes, layouts and the file of the weights (see `opensora.utils.weights.resolve_path`). With
            ``strict_load=False`` a model may start from one with other embedders: those of a condition or of guidance
            scales that the file lacks start without effect (their last layer at zero), and those that the config does
            not have are left out.
        device_map: device of the model; "meta" builds it without memory.
        torch_dtype: dtype of the weights.
        change: what is done to every parameter when it is read, before it is quantised (``quantize``).
        **keys: those of `MMDiTConfig` instead.

    Raises:
        UserError: config or weights that do not fit; the message names the config key.
    """
    own = given_config(MMDiTConfig, config, keys, "model")
    return load_model(
        lambda: MMDiTModel(own),
        own.from_pretrained,
        device_map,
        torch_dtype,
        explain=partial(explain_mismatch, own, strict=own.strict_load),
        metadata=layout_metadata(own),
        allow_missing={} if own.strict_load else new_embedders(),
        allow_unexpected=() if own.strict_load else ("cond_in.", "guidance_in.", "guidance_img_in."),
        cache_dir=own.cache_dir,
        packing=quantization(own.quantize),
        change=change,
    )
