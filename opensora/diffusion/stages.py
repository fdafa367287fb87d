"""The stages of a run, one after another: texts, references, noise to latents, latents to frames."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora.acceleration import collectives
from opensora.acceleration.lockstep import Lockstep
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.streaming import BlockStream, streamed
from opensora.config.commands import InferenceOptions
from opensora.config.options import SamplingOption
from opensora.diffusion.calling import SHOWN
from opensora.diffusion.conditions import build_condition, head_condition, restore_references
from opensora.diffusion.decode import FrameSink, Gathered, check_pixels, room_to_work
from opensora.diffusion.distilled import Distilled
from opensora.diffusion.encoding import embed_texts, encode_references
from opensora.diffusion.finite import check_result, watched
from opensora.diffusion.fitting import blocks_of, device_room, sampling_bytes, streams, text_bytes
from opensora.diffusion.free import PlacedLatents
from opensora.diffusion.guidance import Branch
from opensora.diffusion.kept_pixels import KeptRegion, decode_keeping
from opensora.diffusion.latents import get_noise, pack, prepare_ids, unpack
from opensora.diffusion.offload import on_device
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.prepared import TEXT_ENCODERS, plan_picture
from opensora.diffusion.references import Source
from opensora.diffusion.reuse import SampleMemo, reused
from opensora.diffusion.solvers import SOLVERS, StepCallback, Velocity, asked, solve
from opensora.diffusion.step_cache import CountedStepCache, StepCache
from opensora.diffusion.timing import with_latents
from opensora.diffusion.velocity import (
    Coming,
    Denoiser,
    Scale,
    TextEmbeddings,
    distilled_velocity,
    evaluations_of,
    guided_rows,
    guided_velocity,
    holding,
    told_scales,
    told_velocity,
)
from opensora.models.autoencoder import LatentSpec, as_autoencoder
from opensora.models.diffusion import as_diffusion_model
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.sizes import parse_bytes
from opensora.utils.video import to_uint8

logger = get_logger(__name__)

OF_STEPS = ("num_steps", "solver", "shift", "flow_shift")


class Stages:
    """Models, each of which is on the device while it works. A :class:`opensora.diffusion.pipeline.VideoPipeline` calls
    them in order; whoever wants one stage only may too.

    Args:
        models: by config name: t5, clip, model, ae; for use_t2i2v also img_flux and img_flux_ae.
        cfg: resolved config.
        device: where the models work.
        dtype: of the models.
        parallel: ranks that make a sample together, already reflected in the models; all call the same methods.
        distilled: what the video model says of itself, if it is distilled; ``cfg`` is already as it asks.
        plain: sampling options before that, by which a picture that comes first is made.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        cfg: InferenceOptions,
        device: torch.device,
        dtype: torch.dtype,
        parallel: ParallelContext | None = None,
        distilled: Distilled | None = None,
        plain: SamplingOption | None = None,
    ) -> None:
        self.parallel = parallel or ParallelContext()
        self.distilled, self.plain = distilled, plain
        self.models = dict(models)
        self.cfg = cfg
        self.device = device
        self.dtype = dtype
        self.spec = LatentSpec.of(self.models["ae"])

    @torch.no_grad()
    def encode_prompt(self, texts: str | Sequence[str]) -> TextEmbeddings:
        """Embed texts (or one): T5 tokens [B, L, D] and CLIP vector [B, D]; equal texts are embedded once.

        Ranks that make a sample together get what the first of them embeds.

        Raises:
            UserError: no text, or something that is none.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"texts: give a text or a list of texts, not {repr(texts)[:SHOWN]}")
        axis = self.parallel.sample
        if axis.size == 1:
            return TextEmbeddings(*self._embed(texts))
        mine = [x.cpu() for x in self._embed(texts)] if axis.first else None
        return TextEmbeddings(*(x.to(self.device) for x in collectives.broadcast_object(mine, axis)))

    def _embed(self, texts: Sequence[str]) -> list[Tensor]:
        embedded = []
        for name in TEXT_ENCODERS:
            with self._ready(name, text_bytes(self.models[name], len(set(texts)))) as embedder:
                embedded.append(embed_texts(embedder, texts, self.device, self.dtype))
            check_result(embedded[-1], f"embeddings of the prompts by {name}", "--dtype bf16 or fp32, or other weights")
        return embedded

    @torch.no_grad()
    def encode_references(
        self, sources: Sequence[Sequence[Source] | None], plan: SamplePlan, seeds: Sequence[int]
    ) -> list[list[Tensor] | PlacedLatents | None]:
        """Latents of each sample's references, see :func:`opensora.diffusion.encoding.encode_references`."""
        if not plan.has_image:
            return [None] * len(sources)
        with self._ready("ae") as ae:
            room = self._room()
            found = encode_references(as_autoencoder(ae), sources, plan, seeds, self.device, self.dtype, room)
        every = (each.latents if isinstance(each, PlacedLatents) else each or () for each in found)
        for latent in itertools.chain.from_iterable(every):
            check_result(latent[None], "latents of a reference", "--dtype bf16 or fp32, or other weights of ae")
        return found

    def sample(
        self,
        plan: SamplePlan,
        positive: TextEmbeddings,
        negative: TextEmbeddings,
        refs: Sequence[Sequence[Tensor] | PlacedLatents | None],
        seeds: Sequence[int],
        on_step: StepCallback | None = None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Noise to latents [B, C, T, h, w] in float32, with given pictures put back; ``cache`` reuses work."""
        config: Any = self.models["model"].config
        size, patch = plan.latent_size, plan.patch_size
        noise, cond = get_noise(seeds, self.channels(plan), size, self.device), None
        if config.cond_embed:
            cond = build_condition(noise, plan.cond_type, refs, self.spec.is_causal)
        held = None
        if plan.keep_given:
            exact = [each.exact() if isinstance(each, PlacedLatents) else each for each in refs]
            held = build_condition(noise, plan.cond_type, exact, self.spec.is_causal)
        tokens = self._denoise("model", plan, noise, cond, positive, negative, on_step, cache, held)
        return restore_references(unpack(tokens, size, patch), plan.cond_type, refs)

    def go_on(
        self,
        plan: SamplePlan,
        positive: TextEmbeddings,
        negative: TextEmbeddings,
        given: Tensor,
        seeds: Sequence[int],
        on_step: StepCallback | None = None,
        cache: StepCache | None = None,
        placed: Sequence[PlacedLatents | None] | None = None,
    ) -> Tensor:
        """Noise to latents [B, C, T, h, w] in float32 that go on from ``given [B, C, t, h, w]``, which they begin with;
        ``plan`` is that of such a window (``SamplePlan.after``), and ``placed`` what is given further on in it."""
        size, patch = plan.latent_size, plan.patch_size
        noise = get_noise(seeds, self.channels(plan), size, self.device)
        cond = head_condition(noise, given, placed)
        held = cond if plan.keep_given else None
        tokens = self._denoise("model", plan, noise, cond, positive, negative, on_step, cache, held)
        latents = restore_references(unpack(tokens, size, patch), plan.cond_type, placed or [None] * len(noise))
        return torch.cat([given.to(latents), latents[:, :, given.shape[2] :]], dim=2)

    def channels(self, plan: SamplePlan) -> int:
        """Of a latent of the video model."""
        config: Any = self.models["model"].config
        return int(config.in_channels) // plan.patch_size**2

    def _denoise(
        self,
        name: str,
        plan: SamplePlan,
        noise: Tensor,  # [B, C, T, h, w]
        cond: Tensor | None,  # [B, 1 + C, T, h, w]
        positive: TextEmbeddings,
        negative: TextEmbeddings,
        on_step: StepCallback | None,
        cache: StepCache | None,
        held: Tensor | None = None,  # [B, 1 + C, T, h, w]: mask and latents that stay what they are
    ) -> Tensor:
        """Noise to tokens [B, L, C] in float32 by one of the diffusion models."""
        size, patch = plan.latent_size, plan.patch_size
        held = None if held is None else torch.cat([held[:, :1].expand(-1, held.shape[1] - 1, -1, -1, -1), held[:, 1:]])
        noise, cond = pack(noise, patch), None if cond is None else pack(cond, patch)
        ids = prepare_ids(len(noise), size, patch, positive.txt.shape[1], self.device)
        guided = (positive, negative, plan.guidance, plan.num_steps, size[0], plan.has_image, self.parallel.branch)
        coming = self._coming(plan, positive, *guided)
        with self._sampling(name, coming, noise, plan, positive.txt.shape[1]) as (memo, together):
            denoiser = Denoiser(self.models[name], *ids, cond, cache, memo, together)
            velocity: Velocity
            if memo is not None:
                denoiser.foresee(coming, noise.shape[0] * noise.shape[1])
            if plan.tells_scales:
                velocity = told_velocity(denoiser, positive, plan.guidance, plan.num_steps, size[0], plan.has_image)
            elif plan.method == "distill":
                velocity = distilled_velocity(denoiser, positive, plan.guidance.text)
            else:
                velocity = guided_velocity(denoiser, *guided)
            if held is not None:
                velocity = holding(velocity, *pack(held, patch).chunk(2))
            looked_at = watched(with_latents(on_step, size, patch), self.dtype)
            return solve(SOLVERS.get(plan.solver), velocity, noise, plan.steps(), looked_at)

    def _coming(self, plan: SamplePlan, positive: TextEmbeddings, *guided: Any) -> list[Coming]:
        """Each evaluation to come."""
        rows = guided_rows(*guided) if plan.method != "distill" else lambda step: [(Branch.PROMPT, positive)]

        def scale(step: int) -> Scale:
            if not plan.tells_scales:
                return plan.guidance.text
            return told_scales(plan.guidance, step, plan.num_steps, plan.latent_size[0], plan.has_image)

        return [(time, scale(step), rows(step)) for time, step in asked(SOLVERS.get(plan.solver), plan.steps())]

    @contextmanager
    def _sampling(
        self, name: str, coming: Sequence[Coming], noise: Tensor, plan: SamplePlan, text_tokens: int
    ) -> Iterator[tuple[SampleMemo | None, Lockstep | None]]:
        """Have a diffusion model on the device; yields what it computes once per sample, and what takes branches
        through it together, where there are these."""
        with ExitStack() as stack:
            memo = None
            if self.cfg.precompute:
                batches = evaluations_of(coming, noise.shape[0] * noise.shape[1])
                model = as_diffusion_model(self.models[name])
                memo = stack.enter_context(reused(model, self.device, batches, len(noise)))
            working = sampling_bytes(self.models[name], plan, len(noise), text_tokens, self.dtype)
            working += 0 if memo is None else memo.bytes
            stream = stack.enter_context(self._placed(name, working))
            yield memo, stream.together if isinstance(stream, BlockStream) else None

    def decode(self, latents: Tensor, plan: SamplePlan, kept: Sequence[KeptRegion | None] = ()) -> list[np.ndarray]:
        """Latents [B, C, T, h, w] to uint8 videos [num_frames, H, W, 3], see :meth:`decode_into`."""
        gathered = Gathered()
        self.decode_into(gathered, latents, plan, kept)
        return gathered.videos()

    def decode_into(
        self, sink: FrameSink, latents: Tensor, plan: SamplePlan, kept: Sequence[KeptRegion | None] = ()
    ) -> str:
        """Decode latents, frames to ``sink`` as they are done; ``kept`` is what is kept of regions, per sample
        (``SampleResult.kept``). See :func:`opensora.diffusion.kept_pixels.decode_keeping`."""
        with self._ready("ae") as ae:
            frames, room = plan.kept_frames(), self._room()
            window = None if plan.windows is None else plan.num_frames
            where = (frames, self.device, self.dtype, room, window)
            return decode_keeping(sink, as_autoencoder(ae), latents, kept, *where)

    def _room(self) -> int | None:
        """Bytes for tiles to be chosen by, the same on all ranks that make a sample together."""
        own = room_to_work(self.device, parse_bytes(self.cfg.gpu_memory, "gpu_memory"))
        return None if own is None else min(collectives.gather_values(own, self.parallel.sample))

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], option: SamplingOption, on_step: StepCallback | None
    ) -> list[np.ndarray]:
        """Pictures uint8 [H, W, 3] of texts, by the image model; arguments as of ``VideoPipeline.make_images``."""
        for name in ("img_flux", "img_flux_ae"):
            if name not in self.models:
                raise UserError(f"{name} is not loaded: set use_t2i2v=True and give the config section {name}")
        if self.distilled is not None and self.plain is not None:
            option = replace(option, **{key: getattr(self.plain, key) for key in OF_STEPS})
        plan = plan_picture(self.cfg, self.models, option)
        config: Any = self.models["img_flux"].config
        size, patch = plan.latent_size, plan.patch_size
        embedded = self.encode_prompt(prompts)
        noise = get_noise(seeds, config.in_channels // patch**2, size, self.device)
        cache = plan.step_cache.make(plan.num_steps) if plan.step_cache is not None else None
        tokens = self._denoise("img_flux", plan, noise, None, embedded, embedded, on_step, cache)
        latents = unpack(tokens, size, patch).to(self.dtype)
        with self._ready("img_flux_ae") as ae:
            pixels = [as_autoencoder(ae).decode(latent) for latent in latents.split(1)]
        for picture in pixels:
            check_pixels(picture)
        return [to_uint8(picture[0])[0] for picture in pixels]

    @contextmanager
    def _ready(self, name: str, working: float = 0.0) -> Iterator[nn.Module]:
        """A model, on the device inside the block; arguments as of :meth:`_placed`."""
        with self._placed(name, working):
            yield self.models[name]

    def _placed(self, name: str, working: float = 0.0) -> AbstractContextManager[Any]:
        """Have a model on the device inside the block, whole or block by block.

        Args:
            name: of its section.
            working: bytes that it needs there besides its weights.

        Yields:
            What brings its blocks, if they come and go.
        """
        model = self.models[name]
        blocks = blocks_of(model) if streams(self.cfg) else []
        if blocks:
            room = device_room(self.cfg, self.device)
            left = None if room is None else int(room - working)
            return streamed(model, blocks, self.device, left, self.cfg.offload == "blocks", name)
        parked = self.device.type == "cuda" and self.cfg.precompute  # see park_modulation
        return on_device(model, self.device, bool(self.cfg.offload) or parked)

    def _reused(self, cache: StepCache | None) -> list[float]:
        """Share of evaluations, by sample, in which a cache left blocks out, over all ranks that share branches."""
        if not isinstance(cache, CountedStepCache):
            return []
        counts = collectives.gather_values([cache.evaluated, cache.reused], self.parallel.branch)
        evaluated, reused = (np.sum([each[i] for each in counts if each[0]], axis=0) for i in range(2))
        shares: list[float] = (reused / evaluated).tolist()
        logger.info("step cache: %.0f %% of the evaluations left blocks out", 100 * float(np.mean(shares)))
        return shares
