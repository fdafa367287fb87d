"""Frozen text encoders (T5, CLIP) behind one interface."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.registry import MODELS
from opensora.utils.errors import UserError
from opensora.utils.weights import download_command

KINDS = {"t5": "t5", "clip": "clip", "clip_text_model": "clip"}  # model_type of a config.json -> kind of encoder


def encoder_kind(from_pretrained: str) -> str:
    """ "t5" or "clip": from the model's own config.json; for bare hub ids from the name.

    Raises:
        UserError: no such folder (says how to get it), no config.json in it, or another kind of model.
    """
    folder = Path(from_pretrained).expanduser()
    if not folder.is_dir():
        parts = from_pretrained.split("/")
        if len(parts) != 2 or parts[0] in ("", ".", "..", "~") or Path(parts[0]).exists():
            command = download_command(folder)
            hint = f"Download it with:\n  {command}" if command else "Give a Hugging Face folder or hub id (org/name)."
            raise UserError(f"No text encoder at {from_pretrained}. {hint}")
        return "clip" if "openai" in from_pretrained or "clip" in from_pretrained.lower() else "t5"
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no usable config.json, so it is no Hugging Face text encoder ({error})."
        ) from error
    if model_type not in KINDS:
        raise UserError(f"{folder} holds a {model_type!r} model; text_embedder takes T5 and CLIP text encoders.")
    return KINDS[model_type]


@MODELS.register_module("text_embedder")
class HFEmbedder(nn.Module):
    """T5 encoder (all token states) or CLIP text encoder (pooled state), frozen and in eval mode.

    No attention mask is passed: padding tokens attend and are attended to, as when the diffusion model was trained.

    Args:
        from_pretrained: folder in Hugging Face format, or hub id.
        max_length: tokens per text; longer texts are cut, shorter ones padded (512 for T5, 77 for CLIP).
        shardformer: remembered for `opensora.acceleration.shardformer`, which may speed T5 up; results stay the same.
        cache_dir: cache of downloads.
        device_map: device of the encoder; None is the CPU.
        torch_dtype: dtype of the encoder; None is float32.

    Raises:
        UserError: no such folder, or not a T5 / CLIP encoder.
    """

    def __init__(
        self,
        from_pretrained: str,
        max_length: int,
        shardformer: bool = False,
        cache_dir: str | None = None,
        device_map: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.is_clip = encoder_kind(from_pretrained) == "clip"
        self.max_length = max_length
        self.shardformer = shardformer
        self.tokenizer, self.model = self._load(from_pretrained, cache_dir, torch_dtype or torch.float32)
        self.output_key = "pooler_output" if self.is_clip else "last_hidden_state"
        self.model.eval().requires_grad_(False)
        if device_map is not None:
            self.model.to(device_map)

    def _load(self, from_pretrained: str, cache_dir: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
        # transformers takes seconds to import: only those who embed text pay for it
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        try:
            if self.is_clip:
                tokenizer = CLIPTokenizer.from_pretrained(
                    from_pretrained, max_length=self.max_length, cache_dir=cache_dir
                )
                return tokenizer, CLIPTextModel.from_pretrained(from_pretrained, cache_dir=cache_dir, dtype=dtype)
            tokenizer = T5Tokenizer.from_pretrained(
                from_pretrained, max_length=self.max_length, legacy=True, cache_dir=cache_dir
            )
            return tokenizer, T5EncoderModel.from_pretrained(from_pretrained, cache_dir=cache_dir, dtype=dtype)
        except OSError as error:  # what transformers raises for absent, gated, unreachable or incomplete models
            raise UserError(f"Cannot load the text encoder {from_pretrained}: {error}") from error

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder and its output."""
        return next(self.model.parameters()).dtype

    def tokenize(self, texts: Sequence[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor:
        """Token ids ``[B, max_length]``, padded further so that ``added_tokens`` + length is a multiple of
        ``seq_align`` (even shards for sequence parallelism)."""
        if self.is_clip:
            import ftfy

            # the original CLIP cleaned its text like this; the tokenizer no longer does
            texts = [" ".join(ftfy.fix_text(text).split()) for text in texts]
        ids = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )["input_ids"]
        extra = -(added_tokens + ids.shape[1]) % seq_align
        return F.pad(ids, (0, extra), value=self.tokenizer.pad_token_id)

    @torch.no_grad()
    def forward(self, texts: Sequence[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor:
        """Embed a batch of texts.

        Args:
            texts: B strings.
            added_tokens: tokens that will be joined to these (the image tokens).
            seq_align: the joint length is padded to a multiple of this.

        Returns:
            T5: ``[B, L, dim]`` token states; CLIP: ``[B, dim]`` pooled states; in the dtype of the encoder.
        """
        ids = self.tokenize(texts, added_tokens, seq_align).to(self.device)
        return self.model(input_ids=ids, attention_mask=None)[self.output_key].to(self.dtype)
