"""Frozen text encoders (T5, CLIP) behind one interface."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from opensora.config.keys import given_config
from opensora.models.text.config import TextEmbedderConfig
from opensora.models.text.files import (
    check_encoder,
    check_quantize,
    encoder_kind,
    quantization,
    t5_activations,
    tokenizer_folder,
    weight_files,
)
from opensora.models.text.fitting import TextNotes, suffix_of
from opensora.models.text.quantized import load_t5
from opensora.registry import MODELS
from opensora.utils import hub
from opensora.utils.errors import UserError, shorten
from opensora.utils.progress import quiet_libraries
from opensora.utils.waiting import no_slow_hub
from opensora.utils.weights import check_finite


def _load_model(model_class: Any, path: str, **options: Any) -> Any:
    """A model of transformers, which itself only warns of weights that the files lack, and draws them at random."""
    with quiet_libraries():
        model, loading = model_class.from_pretrained(path, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise ValueError(f"its weights lack {shorten(sorted(loading['missing_keys']))}")
    return model


def _load_tokenizer(tokenizer_class: Any, path: str, cache_dir: str | None, **options: Any) -> Any:
    """A tokenizer of transformers, which itself makes up a vocabulary of nothing where the files are missing."""
    from huggingface_hub import try_to_load_from_cache

    def is_there(name: str) -> bool:
        if Path(path).is_dir():
            return (Path(path) / name).is_file()
        return isinstance(try_to_load_from_cache(path, name, cache_dir=cache_dir), str)

    tokenizer = None
    with contextlib.suppress(ValueError):  # one file of two
        tokenizer = tokenizer_class.from_pretrained(path, cache_dir=cache_dir, **options)
    whole = "tokenizer.json"  # takes the place of all others
    absent = [name for name in tokenizer_class.vocab_files_names.values() if name != whole and not is_there(name)]
    if tokenizer is None or (absent and not is_there(whole)):
        raise ValueError(f"its tokenizer lacks {shorten(absent) or 'readable files'}")
    return tokenizer


@MODELS.register_module("text_embedder")
class HFEmbedder(nn.Module):
    """T5 encoder (all token states) or CLIP text encoder (pooled state), frozen and in eval mode.

    No attention mask is passed: padding tokens attend and are attended to, as when the diffusion model was trained.

    Args:
        config: folder in Hugging Face format, or hub id, as text; or all options. Texts longer than ``max_length``
            tokens are cut, shorter ones padded (512 for T5, 77 for CLIP); the log says what is lost, and with
            ``keep_suffix`` T5 keeps frame rate and motion score at the end. ``shardformer`` is remembered for
            `opensora.acceleration.shardformer`, which may speed T5 up; results stay the same.
        max_length: that option, where ``config`` is a folder.
        device_map: device of the encoder; None is the CPU.
        torch_dtype: dtype of the encoder; None is float32.
        **keys: further keys of `TextEmbedderConfig`.

    Raises:
        UserError: no such folder, not a T5 / CLIP encoder, or one of which files or tensors are missing.
    """

    def __init__(
        self,
        config: TextEmbedderConfig | str | None = None,
        max_length: int | None = None,
        device_map: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        **keys: Any,
    ):
        super().__init__()
        if max_length is not None:
            keys["max_length"] = max_length
        own = given_config(TextEmbedderConfig, config, keys, "text_embedder")
        from_pretrained, max_length = own.from_pretrained, own.max_length
        if not from_pretrained:
            raise UserError("a text encoder needs from_pretrained: the folder of one, or a hub id")
        self.is_clip = encoder_kind(from_pretrained) == "clip"
        check_encoder("", from_pretrained, max_length)
        check_quantize("t5", from_pretrained, own.quantize)
        self.max_length = max_length
        self.shardformer, self.keep_suffix = own.shardformer, own.keep_suffix and not self.is_clip
        self.notes = TextNotes("CLIP" if self.is_clip else "T5", max_length)
        self.tokenizer, self.model = self._load(own, torch_dtype or torch.float32)
        positions = self.model.config.max_position_embeddings if self.is_clip else max_length
        if max_length > positions:
            raise UserError(f"max_length={max_length}: the text encoder {from_pretrained} takes {positions} at most")
        for name, parameter in self.model.named_parameters():
            check_finite(name, parameter.detach(), f"the text encoder {from_pretrained}")
        self.output_key = "pooler_output" if self.is_clip else "last_hidden_state"
        self.model.eval().requires_grad_(False)
        if device_map is not None:
            self.model.to(device_map)

    def _load(self, own: TextEmbedderConfig, dtype: torch.dtype) -> tuple[Any, Any]:
        # transformers takes seconds to import: only those who embed text pay for it
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        from_pretrained, cache_dir = own.from_pretrained or "", own.cache_dir
        folder = Path(hub.local_model(from_pretrained)).expanduser()
        is_folder = folder.is_dir()
        path = str(folder) if is_folder else from_pretrained
        self.tokenizer_files = tokenizer_folder(folder).resolve() if is_folder else None  # None: from a hub
        words = str(self.tokenizer_files or path)
        files: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": hub.only_local(path)}
        options: dict[str, Any] = {"max_length": self.max_length, **files}
        try:
            with no_slow_hub(not files["local_files_only"]):
                if self.is_clip:
                    model = _load_model(CLIPTextModel, path, dtype=dtype, **files)
                    return _load_tokenizer(CLIPTokenizer, words, **options), model
                chosen = quantization(own.quantize)
                if is_folder and chosen.kind(weight_files(folder)) is not None:
                    model = load_t5(folder, chosen, dtype)
                else:
                    model = _load_model(T5EncoderModel, path, dtype=dtype, **files)
                return _load_tokenizer(T5Tokenizer, words, legacy=True, **options), model
        # absent, gated, unreachable, incomplete, of another size, truncated
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            how = "" if is_folder else f" Download it with:\n  {hub.command_for(from_pretrained)}"
            raise UserError(f"Cannot load the text encoder {from_pretrained}: {error}{how}") from error

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder and its output."""
        return next(self.model.parameters()).dtype

    def blocks_in_order(self) -> list[nn.Module]:
        """Blocks of T5 in the order in which they run; none of CLIP, which is small."""
        return [] if self.is_clip else [*self.model.encoder.block]

    def activation_bytes(self, texts: int) -> float:
        """Rough peak of what T5 keeps besides its weights while it embeds so many texts."""
        numbers = 0 if self.is_clip else t5_activations(self.model.config.to_dict(), self.max_length)
        return float(texts * numbers * self.dtype.itemsize)

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
        for row, text in enumerate(texts):
            self._fit(text, ids[row])
        extra = -(added_tokens + ids.shape[1]) % seq_align
        return F.pad(ids, (0, extra), value=self.tokenizer.pad_token_id)

    def _fit(self, text: str, ids: Tensor) -> None:
        """Note what is lost of a text, and write what is kept of its end into its ids ``[max_length]``.

        An end that would take more than half of the room is not kept.
        """
        tokens = self._tokens(text)
        unknown, end = self.tokenizer.unk_token_id, self.tokenizer.eos_token_id
        if unknown != end and unknown in tokens:
            self.notes.unknown(text, [word for word in dict.fromkeys(text.split()) if unknown in self._tokens(word)])
        if len(tokens) <= self.max_length:
            return
        kept = suffix_of(text) if self.keep_suffix else ""
        tail = self._tokens(kept) if kept else []
        if 2 * len(tail) > self.max_length:
            kept, tail = "", []
        self.notes.cut(text, len(tokens), kept)
        if tail:
            ids[:] = torch.tensor(tokens[: self.max_length - len(tail)] + tail)

    def _tokens(self, text: str) -> list[int]:
        """All tokens of a text with those that end it."""
        return self.tokenizer(text, verbose=False)["input_ids"]

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
