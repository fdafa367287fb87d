"""From a batch of clips and captions to what the diffusion model is trained on."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.parallel_context import Axis
from opensora.config.options import LossWeightingOptions, TimeSamplingOptions
from opensora.datasets.runs import ClipPart, encode_part
from opensora.diffusion.conditions import (
    build_condition,
    choose_conditions,
    condition_runs,
    drawn_parts,
    get_spans,
)
from opensora.diffusion.flow import flow_matching_loss, interpolate, unconditioned_tokens, velocity
from opensora.diffusion.free import DrawnPart, PlacedLatents
from opensora.diffusion.latents import pack, prepare_ids
from opensora.diffusion.times import draw_times, time_weights
from opensora.diffusion.windows import CLIP
from opensora.encoded.memory import EncodedMemory, even_group
from opensora.encoded.store import WHOLE, batch_key
from opensora.models.autoencoder import Autoencoder, LatentSpec
from opensora.models.text.fitting import count_notes
from opensora.training.diffusion.sharing import ClipEncoder, embed_shared

TEXTS_AT_A_TIME = 8  # where embeddings are kept


@dataclass(frozen=True)
class InputOptions:
    """Numbers of the training objective; names as in the training config."""

    patch_size: int = 2
    spatial_multiple: int = 16  # heights and widths are multiples of this many pixels
    sigma_min: float = 1e-5
    guidance: float = 4.0
    no_i2v_ref_loss: bool = False
    t5_dropout: float = 0.0
    clip_dropout: float = 0.0
    condition_weights: Mapping[str, float] | None = None
    window: int | None = None  # pixel frames; longer clips are trained on in windows of so many
    time_sampling: TimeSamplingOptions = field(default_factory=TimeSamplingOptions)
    loss_weighting: LossWeightingOptions = field(default_factory=LossWeightingOptions)

    def frames_at_once(self, num_frames: int) -> int:
        """Frames that are trained on together of a clip of so many."""
        return num_frames if self.window is None else min(num_frames, self.window)


class InputEncoder:
    """Frozen encoders of a diffusion training run.

    Args:
        ae: autoencoder.
        t5, clip: text encoders, ``list[str] -> [B, L, D]`` and ``[B, D]``.
        options: see :class:`InputOptions`.
        memory: remembers encoder outputs of clips, row by row, and so does one of texts; for small datasets. Of a clip
            that it holds, the batch need not hold the pixels. A clip longer than its bucket must come with the same
            frames each time.
        encode_clips: encodes clips, with the same autoencoder; None encodes eight at a time.
        axis: ranks that get the same batches, and share the work of the text encoders.
    """

    def __init__(
        self, ae: Autoencoder, t5: nn.Module, clip: nn.Module, options: InputOptions,
        memory: EncodedMemory | None = None, encode_clips: ClipEncoder | None = None, axis: Axis | None = None,
    ) -> None:  # fmt: skip
        self.ae, self.t5, self.clip, self.options = ae, t5, clip, options
        self.encode_clips, self.axis = encode_clips or ClipEncoder(ae), axis or Axis()
        count_notes(t5, clip)
        with torch.no_grad():
            self._null_txt, self._null_vec = t5([""]), clip([""])
        self._memory = memory
        self._text_memory = EncodedMemory(memory.room if memory is not None else None, self._null_txt.device)

    def with_options(self, options: InputOptions) -> "InputEncoder":
        """The same encoders for other inputs; nothing is kept."""
        return InputEncoder(self.ae, self.t5, self.clip, options, None, self.encode_clips, self.axis)

    @property
    def _window(self) -> int | None:
        """Latent frames of a window, if longer clips are trained on in windows."""
        window = self.options.window
        return None if window is None else LatentSpec.of(self.ae).latent_size(window, 1, 1)[0]

    @property
    def empty_text(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the empty text, ``[1, L, D]`` and ``[1, D]``."""
        return self._null_txt, self._null_vec

    def latent_size(self, batch: Mapping[str, Any]) -> tuple[int, int, int]:
        """Latent frames, rows and columns of what is trained on of a batch's clips."""
        frames, height, width = batch["size"][0]
        return LatentSpec.of(self.ae).latent_size(self.options.frames_at_once(frames), height, width)

    @torch.no_grad()
    def __call__(
        self, batch: dict[str, Any], generator: torch.Generator, timesteps: Tensor | None = None
    ) -> dict[str, Any]:
        """Model inputs and target of one batch.

        Args:
            batch: ``video [B, 3, T, H, W]`` in [-1, 1], ``text``, ``index``, ``size``; or, instead of pixels and
                texts, what :class:`opensora.encoded.dataset.CachedVideoTextDataset` gives for them. With a memory,
                ``video`` holds the clips at the positions ``read`` (all, if not given) and may be absent.
            generator: source of everything random.
            timesteps: these ``[B]`` instead of random ones, as they are.

        Returns:
            ``inputs`` (keyword arguments of the model), ``target [B, L, C]``, ``mask [B, L]`` or None, ``weights [B]``
            of the samples in the loss or None, and ``conditions``, their types, or None without any.
        """
        batch = self._with_kept(batch)
        x_0 = self._clips(batch, generator)
        types: Sequence[str] | None
        cond: Tensor | None
        if self._window is not None and x_0.shape[2] > self._window:
            types, x_0, cond = continued(x_0, self._window, generator)
        else:
            types, cond = self._condition(x_0, batch, generator)
        txt, vec = self._text(batch, generator)

        patch, (frames, height, width) = self.options.patch_size, x_0.shape[2:]
        tokens = height * width // 4  # the schedule counts 2x2 patches, whatever the model's patch is
        if timesteps is None:
            timesteps = draw_times(len(x_0), tokens, frames, self.options.time_sampling, generator)
        t = timesteps.to(x_0)  # rounded once, for the mix and for the model
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        img_ids, txt_ids = prepare_ids(
            len(x_0), (frames, height, width), patch, txt.shape[1], x_0.device, torch.float32
        )
        inputs = {
            "img": pack(interpolate(x_0, noise, t, self.options.sigma_min), patch),
            "img_ids": img_ids,
            "txt": txt,
            "txt_ids": txt_ids,
            "timesteps": t,
            "y_vec": vec,
            "guidance": torch.full((len(x_0),), self.options.guidance, device=x_0.device),
        }
        mask = None
        if cond is not None:
            inputs["cond"] = pack(cond, patch)
            if self.options.no_i2v_ref_loss:
                whole = cond[:, 0].amin((2, 3))  # frames of which only a region is given count
                mask = unconditioned_tokens(whole, height * width // patch**2)
        target = pack(velocity(x_0, noise, self.options.sigma_min), patch)
        weights = self._loss_weights(timesteps, types)
        return {"inputs": inputs, "target": target, "mask": mask, "weights": weights, "conditions": types}

    def _loss_weights(self, timesteps: Tensor, types: Sequence[str] | None) -> Tensor | None:
        """What each sample counts in the loss, float32 [B]; None if all count 1."""
        options = self.options.loss_weighting
        weights = time_weights(timesteps, options)
        if options.conditions is None:
            return weights
        of_types = torch.tensor([options.conditions.get(name, 1.0) for name in types or []])
        return of_types if weights is None else weights.cpu() * of_types

    def _with_kept(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with what is kept of its clips and texts, in the form a cache gives it; what is new is encoded."""
        if self._memory is None:
            return batch
        found = dict(batch)
        if "video_latents" not in batch and batch_key(WHOLE) not in batch:
            keys = [(row, *size) for row, size in zip(batch["index"], batch["size"])]
            at_once = self.encode_clips.at_once(batch["size"][0], self._null_txt.dtype)
            group = even_group(len(keys), at_once * self.encode_clips.axis.size)
            found |= self._memory(keys, lambda rows: self._encode_all_runs(batch, rows), group)
        if "text_t5" not in batch:
            texts = batch["text"]
            found |= self._text_memory(texts, lambda rows: self._embed([texts[i] for i in rows]), TEXTS_AT_A_TIME)
        return found

    def _encode_all_runs(self, batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Tensor]:
        """Moments of whole clips and of all frames that conditions may give, by batch key."""
        place = {row: i for i, row in enumerate(batch.get("read", range(len(batch["index"]))))}
        video = batch["video"][[place[row] for row in rows]]
        runs = condition_runs(self.options.condition_weights, self.ae, video.shape[2], self.options.window)
        numbers = [int(batch["index"][row]) for row in rows]
        found = {run.name: encode_part(run, numbers, [*video], self.encode_clips) for run in runs}
        return {batch_key(name): moments for name, moments in {WHOLE: self.encode_clips(video), **found}.items()}

    def _embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoders = {"text_t5": self.t5, "text_clip": self.clip}
        return {name: embed_shared(encoder, texts, self.axis) for name, encoder in encoders.items()}

    def _clips(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Latents ``[B, C, t, h, w]`` of whole clips, from the pixels or from what was cached of them."""
        if "video_latents" in batch:
            return batch["video_latents"]
        stored = batch.get(batch_key(WHOLE))
        if stored is None:
            stored = self.encode_clips(batch["video"])
        return self.ae.from_stored(stored, generator)

    def _condition(
        self, x_0: Tensor, batch: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Sequence[str] | None, Tensor | None]:
        """The samples' condition types, and mask and reference latents ``[B, 1 + C, t, h, w]``; the given frames are
        encoded on their own."""
        weights = self.options.condition_weights
        if weights is None:
            return None, None
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        types = choose_conditions(weights, len(x_0), x_0.shape[2], rng, self.ae.is_causal)
        # Parts of the clips that the samples need; one is encoded for all its samples together.
        needs = [self._needed(cond_type, x_0.shape[2], rng) for cond_type in types]
        latents: dict[tuple[int, ClipPart], Tensor] = {}
        for part in dict.fromkeys(part for parts in needs for part in parts):
            rows = [i for i, parts in enumerate(needs) if part in parts]
            stored = batch.get(batch_key(part.name))
            if stored is None:
                clips, numbers = [batch["video"][i] for i in rows], [int(batch["index"][i]) for i in rows]
                moments = encode_part(part, numbers, clips, self.encode_clips)
            else:
                moments = stored[rows]
            encoded = self.ae.from_stored(moments, generator)
            latents.update({(i, part): latent for i, latent in zip(rows, encoded)})
        refs = [self._references(i, batch, parts, latents) for i, parts in enumerate(needs)]
        return types, build_condition(x_0, types, refs, self.ae.is_causal)

    def _needed(self, cond_type: str, latent_frames: int, rng: random.Random) -> list[ClipPart]:
        """What of a clip a condition takes; one that may give anything is given what ``rng`` draws."""
        spec = LatentSpec.of(self.ae)
        drawn = drawn_parts(cond_type, latent_frames, spec)
        if drawn:
            return [rng.choice(drawn)]
        return [span.pixel_run(spec.is_causal, spec.compression[0]) for span in get_spans(cond_type)]

    def _references(
        self, sample: int, batch: Mapping[str, Any], parts: list[ClipPart], latents: Mapping[Any, Tensor]
    ) -> list[Tensor] | PlacedLatents | None:
        """Latents that a sample is given, as :func:`build_condition` takes them."""
        if not parts:
            return None
        if isinstance(parts[0], DrawnPart):
            _, height, width = batch["size"][sample]
            return parts[0].placed(int(batch["index"][sample]), latents[sample, parts[0]], height, width)
        return [latents[sample, part] for part in parts]

    def _text(self, batch: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings; each encoder's is replaced by that of the empty text at its dropout rate, independently."""
        texts: Sequence[str] = batch["text"]
        known = batch if "text_t5" in batch else self._embed(texts)
        txt, vec = known["text_t5"], known["text_clip"]
        drop_txt = torch.rand(len(texts), generator=generator) < self.options.t5_dropout
        drop_vec = torch.rand(len(texts), generator=generator) < self.options.clip_dropout
        txt = torch.where(drop_txt[:, None, None].to(txt.device), self._null_txt, txt)
        return txt, torch.where(drop_vec[:, None].to(vec.device), self._null_vec, vec)


def continued(x_0: Tensor, length: int, generator: torch.Generator) -> tuple[list[str], Tensor, Tensor]:
    """Windows of long videos, each of which goes on from its own first latents as in :mod:`opensora.diffusion.long`.

    Args:
        x_0: ``[B, C, T, h, w]`` latents of whole clips.
        length: latent frames of a window, less than T.
        generator: chooses for each sample where its window begins, after the first latent frame, and how much of it is
            given: one latent frame to all but one.

    Returns:
        The samples' condition types, the windows ``[B, C, length, h, w]``, and what is given of them
        ``[B, 1 + C, length, h, w]``.
    """
    begins = torch.randint(1, x_0.shape[2] - length + 1, (len(x_0),), generator=generator)
    given = torch.randint(1, length, (len(x_0),), generator=generator)
    places = torch.arange(length)
    frames = (begins[:, None] + places).to(x_0.device)
    windows = x_0[torch.arange(len(x_0), device=x_0.device)[:, None], :, frames].transpose(1, 2).contiguous()
    mask = (places < given[:, None]).to(x_0)[:, None, :, None, None]
    return [CLIP] * len(x_0), windows, torch.cat([mask.expand_as(windows[:, :1]), windows * mask], dim=1)


def diffusion_loss(model: nn.Module, prepared: dict[str, Any]) -> Tensor:
    """Rectified-flow loss of a prepared batch (arXiv:2209.03003), all samples weighed alike."""
    return flow_matching_loss(model(**prepared["inputs"]), prepared["target"], prepared["mask"])
