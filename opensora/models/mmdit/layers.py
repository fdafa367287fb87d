"""Layers of the MMDiT: embedders, normalisation, modulation, and the two kinds of transformer block.

Shapes: B batch, L text tokens, N image tokens, C hidden size, H heads, D head dimension. Parameter names are those of
the released files, in both projection layouts (``fused_qkv``: one matrix for q, k, v; else one each).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.mmdit.attention import LIGER_HINT, JointAttention, Rotary
from opensora.models.mmdit.config import MMDiTConfig
from opensora.utils.optional import require

TIME_FACTOR = 1000.0  # diffusion time in [0, 1] and guidance scales are embedded in thousandths
NORM_EPS = 1e-6


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of ``1000 t``: cosines first, then sines (a zero column if ``dim`` is odd).

    Args:
        t: ``[B]`` diffusion times in [0, 1], or guidance scales. The product with 1000 is taken in this dtype: released
            weights were trained on bfloat16 times.
        dim: width of the embedding.
        max_period: longest period, in thousandths.

    Returns:
        ``[B, dim]`` in the dtype of ``t`` (float32 inside).
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = (TIME_FACTOR * t)[:, None].float() * freqs
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return F.pad(embedding, (0, dim % 2)).to(t.dtype)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: a vector ``[B, in_dim]`` -> ``[B, C]``."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv:1910.07467), eps 1e-6, with a learned ``scale``.

    Args:
        dim: width of the last axis.
        backend: "torch", or "liger" for its fused kernel (GPU only).
    """

    def __init__(self, dim: int, backend: str = "torch"):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.fused = None
        if backend == "liger":
            self.fused = require("liger_kernel.ops.rms_norm", "norm_backend='liger'", LIGER_HINT).LigerRMSNormFunction

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused.apply(x, self.scale, NORM_EPS, 0.0, "llama", False)  # offset, casting, in place
        return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)


class QKNorm(nn.Module):
    """Separate RMSNorm of queries and keys, per head."""

    def __init__(self, dim: int, backend: str = "torch"):
        super().__init__()
        self.query_norm = RMSNorm(dim, backend)
        self.key_norm = RMSNorm(dim, backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised q and k ``[B, L, H, D]``, in the dtype of v."""
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class ModulationOut(NamedTuple):
    """Shift, scale and gate of one residual branch, each ``[B, 1, C]``."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """adaLN modulation (arXiv:2212.09748) from the conditioning vector, for one or two residual branches."""

    def __init__(self, dim: int, branches: int):
        super().__init__()
        self.branches = branches
        self.lin = nn.Linear(dim, 3 * branches * dim)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        """``vec`` ``[B, C]`` -> one `ModulationOut` per branch."""
        chunks = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.branches, dim=-1)
        return [ModulationOut(*chunks[3 * i : 3 * i + 3]) for i in range(self.branches)]


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm without learned scale and bias: modulation supplies them."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) x + shift in one pass over ``x`` ``[B, L, C]``."""
    return torch.addcmul(shift, x, 1 + scale)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, L, H*D]`` -> ``[B, L, H, D]``; H follows from the width, so a tensor-parallel share needs no telling."""
    return x.unflatten(-1, (-1, head_dim))


class SelfAttention(nn.Module):
    """Projections of one stream of a double block: normalised q, k, v on the way in, ``proj`` on the way out.

    Args:
        dim: hidden size C.
        head_dim: channels D of one head.
        qkv_bias: whether the q, k, v projections have biases (``proj`` always has).
        fused_qkv: one matrix ``qkv`` (rows q, k, v, each head by head) or ``q_proj``, ``k_proj``, ``v_proj``.
        norm_backend: see `RMSNorm`.
    """

    def __init__(self, dim: int, head_dim: int, qkv_bias: bool, fused_qkv: bool, norm_backend: str = "torch"):
        super().__init__()
        self.head_dim = head_dim
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
            self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
            self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.norm = QKNorm(head_dim, norm_backend)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` ``[B, L, C]`` -> q, k, v, each ``[B, L, H, D]``, q and k normalised."""
        projected = self.qkv(x).chunk(3, dim=-1) if self.fused_qkv else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (split_heads(part, self.head_dim) for part in projected)
        return *self.norm(q, k, v), v


class TanhGELU(nn.Module):
    """GELU in its tanh approximation. Without gradients it overwrites its input: the widest tensor of a block."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")


def mlp(dim: int, mlp_hidden: int) -> nn.Sequential:
    """Feed-forward network C -> mlp_hidden -> C with tanh-approximated GELU."""
    return nn.Sequential(nn.Linear(dim, mlp_hidden), TanhGELU(), nn.Linear(mlp_hidden, dim))


class DoubleStreamBlock(nn.Module):
    """Text and image stream with weights of their own and one joint attention (MM-DiT, arXiv:2403.03206)."""

    def __init__(self, config: MMDiTConfig, attention: JointAttention):
        super().__init__()
        hidden_size, mlp_hidden = config.hidden_size, config.mlp_hidden
        projection = (hidden_size, config.head_dim, config.qkv_bias, config.fused_qkv, config.norm_backend)
        self.img_mod = Modulation(hidden_size, branches=2)
        self.img_norm1 = layer_norm(hidden_size)
        self.img_attn = SelfAttention(*projection)
        self.img_norm2 = layer_norm(hidden_size)
        self.img_mlp = mlp(hidden_size, mlp_hidden)
        self.txt_mod = Modulation(hidden_size, branches=2)
        self.txt_norm1 = layer_norm(hidden_size)
        self.txt_attn = SelfAttention(*projection)
        self.txt_norm2 = layer_norm(hidden_size)
        self.txt_mlp = mlp(hidden_size, mlp_hidden)
        self.attention = attention

    def project(self, img: Tensor, txt: Tensor, img_mod: ModulationOut, txt_mod: ModulationOut) -> list[Tensor]:
        """q, k, v ``[B, L + N, H, D]`` of both streams, text first."""
        img_qkv = self.img_attn(modulate(self.img_norm1(img), img_mod.shift, img_mod.scale))
        txt_qkv = self.txt_attn(modulate(self.txt_norm1(txt), txt_mod.shift, txt_mod.scale))
        return [torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True)]

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary) -> tuple[Tensor, Tensor]:
        """``img`` ``[B, N, C]``, ``txt`` ``[B, L, C]``, ``vec`` ``[B, C]``, ``rope`` of text then image tokens."""
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        qkv = self.project(img, txt, img_mod1, txt_mod1)
        txt_out, img_out = self.attention(*qkv, rope).split((txt.shape[1], img.shape[1]), dim=1)
        del qkv  # the MLPs need the room

        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_out))
        img = torch.addcmul(
            img, img_mod2.gate, self.img_mlp(modulate(self.img_norm2(img), img_mod2.shift, img_mod2.scale))
        )
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_out))
        txt = torch.addcmul(
            txt, txt_mod2.gate, self.txt_mlp(modulate(self.txt_norm2(txt), txt_mod2.shift, txt_mod2.scale))
        )
        return img, txt


class SingleStreamBlock(nn.Module):
    """One stream of text and image tokens; attention and MLP side by side (arXiv:2302.05442)."""

    def __init__(self, config: MMDiTConfig, attention: JointAttention):
        super().__init__()
        hidden_size = config.hidden_size
        self.hidden_size, self.mlp_hidden = hidden_size, config.mlp_hidden
        self.head_dim = config.head_dim
        self.fused_qkv = config.fused_qkv
        if config.fused_qkv:
            self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + self.mlp_hidden)  # rows q, k, v, mlp
        else:
            self.q_proj = nn.Linear(hidden_size, hidden_size)
            self.k_proj = nn.Linear(hidden_size, hidden_size)
            self.v_mlp = nn.Linear(hidden_size, hidden_size + self.mlp_hidden)  # rows v, mlp
        self.linear2 = nn.Linear(hidden_size + self.mlp_hidden, hidden_size)
        self.norm = QKNorm(self.head_dim, config.norm_backend)
        self.pre_norm = layer_norm(hidden_size)
        self.mlp_act = TanhGELU()
        self.modulation = Modulation(hidden_size, branches=1)
        self.attention = attention

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` ``[B, L, C]`` -> q, k ``[B, L, C]``, and v with the MLP's hidden state ``[B, L, C + mlp_hidden]``."""
        if not self.fused_qkv:
            return self.q_proj(x), self.k_proj(x), self.v_mlp(x)
        joined = self.linear1(x)
        # a tensor-parallel rank holds the same share of all four parts
        width = joined.shape[-1] * self.hidden_size // (3 * self.hidden_size + self.mlp_hidden)
        q, k, v_mlp = joined.split((width, width, joined.shape[-1] - 2 * width), dim=-1)
        return q, k, v_mlp

    def forward(self, x: Tensor, vec: Tensor, rope: Rotary) -> Tensor:
        """``x`` ``[B, L + N, C]``, ``vec`` ``[B, C]``, ``rope`` of all tokens -> ``[B, L + N, C]``."""
        (mod,) = self.modulation(vec)
        q, k, v_mlp = self.project(modulate(self.pre_norm(x), mod.shift, mod.scale))
        v, hidden = v_mlp.tensor_split((q.shape[-1],), dim=-1)
        q, k, v = (split_heads(part, self.head_dim) for part in (q, k, v))
        q, k = self.norm(q, k, v)
        attn = self.attention(q, k, v, rope)
        hidden = self.mlp_act(hidden)
        if torch.is_grad_enabled():
            v_mlp = torch.cat((attn, hidden), dim=-1)
        else:  # the activation worked in place, and the attention's result takes the place of v, beside it
            v.copy_(attn.view_as(v))
        return torch.addcmul(x, mod.gate, self.linear2(v_mlp))


class LastLayer(nn.Module):
    """Modulated LayerNorm and projection to the packed latent channels."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """``x`` ``[B, N, C]``, ``vec`` ``[B, C]`` -> ``[B, N, out_channels]``."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
