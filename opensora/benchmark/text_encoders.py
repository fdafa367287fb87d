"""Text encoders with random weights, for measurements without any file."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

# Widths of the released encoders (T5 v1.1 XXL, CLIP ViT-L/14); others get two layers.
XXL, LARGE = 4096, 768
T5_VOCABULARY, CLIP_VOCABULARY = 32128, 49408


class RandomTextEncoder(nn.Module):
    """Answers texts as :class:`opensora.models.text.HFEmbedder` does, from random tokens.

    Args:
        encoder: T5 or CLIP.
        vocabulary: number of tokens.
        length: tokens per text.
    """

    def __init__(self, encoder: nn.Module, vocabulary: int, length: int) -> None:
        super().__init__()
        self.encoder, self.vocabulary, self.length = encoder, vocabulary, length

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """[B, length, D] of a T5, [B, D] of a CLIP."""
        device = next(self.encoder.parameters()).device
        out = self.encoder(input_ids=torch.randint(self.vocabulary, (len(texts), self.length), device=device))
        return out.pooler_output if isinstance(self.encoder, CLIPTextModel) else out.last_hidden_state


def random_text_encoder(
    name: str, width: int, length: int, device: torch.device, dtype: torch.dtype
) -> RandomTextEncoder:
    """The encoder ``t5`` or ``clip`` of a width, of the released size where the width is the released one."""
    encoder: Any
    sizes: dict[str, Any]
    with device:
        if name == "t5":
            sizes = dict(d_ff=10240, num_layers=24, num_heads=64)
            if width != XXL:
                sizes = dict(d_ff=2 * width, num_layers=2, num_heads=max(width // 64, 1))
            common: dict[str, Any] = dict(vocab_size=T5_VOCABULARY, d_model=width, d_kv=64)
            encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **common, **sizes))
            return RandomTextEncoder(encoder.to(dtype).eval(), T5_VOCABULARY, length)
        sizes = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(width // 64, 1))
        sizes |= dict(num_hidden_layers=12 if width == LARGE else 2, max_position_embeddings=length)
        encoder = CLIPTextModel(CLIPTextConfig(vocab_size=CLIP_VOCABULARY, **sizes))
        return RandomTextEncoder(encoder.to(dtype).eval(), CLIP_VOCABULARY, length)
