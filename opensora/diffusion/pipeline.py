"""VideoPipeline: prompt (and picture) to latents to pixels. Everything that makes a video goes through it."""

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora.acceleration import collectives
from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.parallel_vae import share_tiles
from opensora.acceleration.plugins import divide_model
from opensora.acceleration.shardformer import use_shardformer
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.checks import check_config, check_resources, section_names
from opensora.diffusion.conditions import build_condition, get_spans, restore_references
from opensora.diffusion.decode import DecodeMemoryError, decode_latents
from opensora.diffusion.latents import get_noise, pack, prepare_ids, unpack
from opensora.diffusion.lora import apply_loras
from opensora.diffusion.offload import on_device
from opensora.diffusion.plan import LatentSpec, SamplePlan, image_plan, make_plan
from opensora.diffusion.references import References, Source, check_references, per_prompt_references, read_clips
from opensora.diffusion.solvers import SOLVERS, StepCallback, Velocity, solve
from opensora.diffusion.step_cache import STEP_CACHES
from opensora.diffusion.timing import as_stage, timed, with_latents
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, distilled_velocity, guided_velocity
from opensora.diffusion.wording import check_motion_score, check_seed, final_text
from opensora.models.autoencoder import as_autoencoder
from opensora.models.build import build_ready
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.video import to_uint8

logger = get_logger(__name__)

TEXT_ENCODERS = ("t5", "clip")
REFERENCE_SEED_OFFSET = 0x5DEECE66D  # keeps posterior noise apart from the starting noise of the same seed


@dataclass
class SampleResult:
    """What a call of the pipeline made, per sample of the batch.

    Attributes:
        latents: [B, C, T, h, w] float32 on the CPU.
        frames: uint8 arrays [num_frames, H, W, 3].
        texts: prompts as the text encoders got them.
        seeds: of the starting noise.
        timings: seconds by stage: ``image``, ``text``, ``references``, ``denoise``, ``decode``.
        plan: sizes and schedule.
        images: uint8 [H, W, 3], pictures made first from the prompts (``use_t2i2v``), else empty.
    """

    latents: Tensor
    frames: list[np.ndarray]
    texts: list[str]
    seeds: list[int]
    timings: dict[str, float]
    plan: SamplePlan
    images: list[np.ndarray] = field(default_factory=list)


class VideoPipeline:
    """Text (and image, and video) to video.

    Example::

        pipe = VideoPipeline.from_config("configs/diffusion/inference/demo.py")
        result = pipe("a red circle moving right", seed=42)
        save_video(result.frames[0], "circle.mp4", fps=8)

    Prompts are taken as they are given (the command line's ``refine_prompt`` comes before this class).

    Args:
        models: by config name: t5, clip, model, ae; for use_t2i2v also img_flux and img_flux_ae.
        cfg: resolved config (:class:`opensora.config.commands.InferenceOptions`).
        device: where the models work.
        dtype: of the models.
        parallel: ranks that make a sample together, already reflected in the models; all call the same methods.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        cfg: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        parallel: ParallelContext | None = None,
    ) -> None:
        self.parallel = parallel or ParallelContext()
        self.models = dict(models)
        self.cfg = cfg
        self.device = device
        self.dtype = dtype
        self.spec = LatentSpec.of(self.models["ae"])

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, Any],
        device: torch.device | None = None,
        parallel: ParallelContext | None = None,
        **overrides: Any,
    ) -> "VideoPipeline":
        """Build the models of a config.

        Args:
            config: a config file, or its content.
            device: where the models work; None goes by the config.
            parallel: ranks that make a sample together; the models are divided over them.
            overrides: config values by key; dotted keys and the aliases of the command line work
                (``**{"ae.use_spatial_tiling": True}``, ``num_steps=20``).

        Raises:
            UserError: anything wrong with config or weight files; found before weights are loaded.
        """
        cfg = load_config(config, InferenceOptions, overrides)
        device = device or pick_device(cfg.device)
        check_config(cfg)
        check_resources(cfg, device)
        dtype = torch_dtype(cfg.dtype)
        home = torch.device("cpu") if cfg.offload else device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)  # for models that start from random weights
            # of ranks that make a sample together, the first embeds its text for all
            embeds = parallel is None or parallel.sample.first
            names = [name for name in section_names(cfg) if embeds or name not in TEXT_ENCODERS]
            models = {name: build_ready(cfg[name], home, dtype, name) for name in names}
        for name in set(TEXT_ENCODERS) & models.keys():
            use_shardformer(models[name])
        models["model"] = apply_loras(models["model"], cfg.pretrained_lora_path, cfg.merge_lora)
        if parallel is not None:
            divide_model(models["model"], parallel, cfg.plugin_config)
            if cfg.plugin_ae not in (None, "none"):
                share_tiles(as_autoencoder(models["ae"]), parallel.sample)
        return cls(models, cfg, device, dtype, parallel)

    def __call__(
        self,
        prompt: str | Sequence[str],
        ref: References | Sequence[References | None] | None = None,
        cond_type: str | None = None,
        seed: int | Sequence[int] | None = None,
        neg: str | Sequence[str] | None = None,
        fps: float | None = None,
        motion_score: str | float | None = None,
        on_step: StepCallback | None = None,
        **sampling: Any,
    ) -> SampleResult:
        """Make a video of each prompt.

        Args:
            prompt: one text, or a batch of them.
            ref: references of the condition. For one prompt: files or addresses separated by ``;``, pixels (uint8
                [H, W, 3] or [T, H, W, 3]), or a list of those. For a batch: one of these (or None) per prompt.
            cond_type: what the references fix; None takes the config's.
            seed: of the starting noise, one for all prompts or one each; None takes the config's or draws one.
            neg: negative prompt, one for all or one each.
            fps: frame rate told to the model; None takes the config's.
            motion_score: amount of motion told to the model; None takes the config's.
            on_step: ``on_step(step, total, latents)`` after each step, with latents [B, C, T, h, w]; what it raises
                stops the run. With ``use_t2i2v`` the steps of the picture count too.
            sampling: keys of the config's ``sampling_option`` for this call (``num_steps=20``).

        Returns:
            Latents, frames, final texts, seeds and timings.

        Raises:
            UserError: impossible sizes or conditions, unreadable references.
            DecodeMemoryError: decoding ran out of memory.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        option = self._option(sampling)
        score = check_motion_score(self.cfg["motion_score"] if motion_score is None else motion_score, "motion_score")
        if score == "dynamic":
            raise UserError("motion_score: give a number; 'dynamic' is worked out by the command line only")
        texts = [final_text(text, fps or self.cfg["fps_save"], score) for text in prompts]
        negatives = _per_prompt(neg or "", len(prompts), "negative prompts")
        seeds = self._seeds(option["seed"] if seed is None else seed, len(prompts))
        cond_type = cond_type or self.cfg["cond_type"]
        images: list[np.ndarray] = []
        image_time: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as downloads:
            sources = per_prompt_references(ref, len(prompts), Path(downloads))
            if self.cfg["use_t2i2v"] and not any(sources):
                with timed(image_time, "image", self.device):
                    images = self.make_images(prompts, seeds, as_stage(on_step, 0, 2), **sampling)
                sources, cond_type, on_step = [[image] for image in images], "i2v_head", as_stage(on_step, 1, 2)
            result = self.make(texts, sources, cond_type, seeds, negatives, option, on_step)
        result.images = images
        result.timings = {**image_time, **result.timings}
        return result

    def make(
        self,
        texts: Sequence[str],
        sources: Sequence[Sequence[Source] | None],
        cond_type: str,
        seeds: Sequence[int],
        negatives: Sequence[str],
        option: Mapping[str, Any] | None = None,
        on_step: StepCallback | None = None,
    ) -> SampleResult:
        """Make a batch with everything given: what a call does after it has worked out its defaults.

        Args:
            texts: prompts as the text encoders shall get them.
            sources: local references per sample, or None.
            cond_type: what they fix; ``t2v`` if there are none.
            seeds: per sample.
            negatives: negative prompt per sample.
            option: sampling options; None takes the config's.
            on_step: as in a call.
        """
        timings: dict[str, float] = {}
        plan = self._plan(option or self.cfg["sampling_option"], cond_type, sources)
        if plan.method == "distill" and any(negatives):
            logger.warning("method distill: a guidance-distilled model takes no negative prompt, it has no effect")
        with timed(timings, "references", self.device):
            refs = self.encode_references(sources, plan, seeds)
        with timed(timings, "text", self.device):
            embedded = self.encode_prompt([*texts, *negatives])
        with timed(timings, "denoise", self.device):
            latents = self.sample(plan, *embedded.split(len(texts)), refs, seeds, on_step)
        result = SampleResult(latents.float().cpu(), [], list(texts), list(seeds), timings, plan)
        try:
            with timed(timings, "decode", self.device):
                result.frames = self.decode(latents, plan)
        except DecodeMemoryError as error:
            error.result = result
            raise
        return result

    @torch.no_grad()
    def encode_prompt(self, texts: Sequence[str]) -> TextEmbeddings:
        """Embed texts: T5 tokens [B, L, D] and CLIP vector [B, D]; equal texts are embedded once.

        Ranks that make a sample together get what the first of them embeds.
        """
        axis = self.parallel.sample
        if axis.size == 1:
            return TextEmbeddings(*self._embed(texts))
        mine = [x.cpu() for x in self._embed(texts)] if axis.first else None
        return TextEmbeddings(*(x.to(self.device) for x in collectives.broadcast_object(mine, axis)))

    def _embed(self, texts: Sequence[str]) -> list[Tensor]:
        unique = list(dict.fromkeys(texts))
        rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
        embedded = []
        for name in TEXT_ENCODERS:
            with on_device(self.models[name], self.device, self.cfg["offload"]) as embedder:
                embed: Any = embedder
                embedded.append(embed(unique).to(self.device, self.dtype)[rows])
        return embedded

    @torch.no_grad()
    def encode_references(
        self, sources: Sequence[Sequence[Source] | None], plan: SamplePlan, seeds: Sequence[int]
    ) -> list[list[Tensor] | None]:
        """Latents [C, T', h, w] of each sample's references, one per given run of the plan's condition.

        The posterior is sampled with a stream of the sample's own seed.
        """
        if not plan.has_image:
            return [None] * len(sources)
        encoded: list[list[Tensor] | None] = []
        with on_device(self.models["ae"], self.device, self.cfg["offload"]) as ae:
            for of_sample, seed in zip(sources, seeds):
                if not of_sample:
                    encoded.append(None)
                    continue
                encoder: Any = ae
                generator = torch.Generator("cpu").manual_seed(seed ^ REFERENCE_SEED_OFFSET)
                clips = read_clips(of_sample, plan.cond_type, self.spec, plan.height, plan.width)
                pixels = [clip[None].to(self.device, self.dtype) for clip in clips]
                encoded.append([encoder.encode(clip, generator=generator)[0] for clip in pixels])
        return encoded

    def sample(
        self,
        plan: SamplePlan,
        positive: TextEmbeddings,
        negative: TextEmbeddings,
        refs: Sequence[Sequence[Tensor] | None],
        seeds: Sequence[int],
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Noise to latents [B, C, T, h, w] in float32, with given pictures put back."""
        config: Any = self.models["model"].config
        size, patch = plan.latent_size, plan.patch_size
        noise = get_noise(seeds, config.in_channels // patch**2, size, self.device)
        cond = None
        if config.cond_embed:
            cond = pack(build_condition(noise, plan.cond_type, refs, self.spec.is_causal), patch)
        tokens = self._denoise("model", plan, pack(noise, patch), cond, positive, negative, on_step)
        return restore_references(unpack(tokens, size, patch), plan.cond_type, refs)

    def _denoise(
        self,
        name: str,
        plan: SamplePlan,
        noise: Tensor,  # [B, L, C] packed
        cond: Tensor | None,  # [B, L, C + p*p] packed
        positive: TextEmbeddings,
        negative: TextEmbeddings,
        on_step: StepCallback | None,
    ) -> Tensor:
        """Noise to tokens [B, L, C] in float32 by one of the diffusion models."""
        size, patch = plan.latent_size, plan.patch_size
        ids = prepare_ids(len(noise), size, patch, positive.txt.shape[1], self.device)
        cache = STEP_CACHES.get(plan.step_cache)(plan.num_steps) if plan.step_cache is not None else None
        with on_device(self.models[name], self.device, self.cfg["offload"]) as model:
            denoiser = Denoiser(model, *ids, cond, cache)
            velocity: Velocity
            if plan.method == "distill":
                velocity = distilled_velocity(denoiser, positive, plan.guidance.text)
            else:
                velocity = guided_velocity(
                    *(denoiser, positive, negative, plan.guidance, plan.num_steps, size[0], plan.has_image),
                    branches=self.parallel.branch,
                )
            return solve(SOLVERS.get(plan.solver), velocity, noise, plan.steps(), with_latents(on_step, size, patch))

    def decode(self, latents: Tensor, plan: SamplePlan) -> list[np.ndarray]:
        """Latents [B, C, T, h, w] to uint8 videos [num_frames, H, W, 3], see :func:`decode_latents`."""
        with on_device(self.models["ae"], self.device, self.cfg["offload"]) as ae:
            return decode_latents(as_autoencoder(ae), latents, plan.kept_frames(), self.device, self.dtype)

    @torch.no_grad()
    def make_images(
        self, prompts: Sequence[str], seeds: Sequence[int], on_step: StepCallback | None = None, **sampling: Any
    ) -> list[np.ndarray]:
        """Pictures of the prompts by the image model (``img_flux``), to start videos from.

        Args:
            prompts: texts, used as they are.
            seeds: of the noise, one per prompt.
            on_step: as in a call.
            sampling: as in a call; size is ``img_resolution`` at the video's aspect ratio.

        Returns:
            uint8 [H, W, 3] per prompt.
        """
        for name in ("img_flux", "img_flux_ae"):
            if name not in self.models:
                raise UserError(f"{name} is not loaded: set use_t2i2v=True and give the config section {name}")
        plan = image_plan(self.cfg, self._option(sampling), LatentSpec.of(self.models["img_flux_ae"]))
        config: Any = self.models["img_flux"].config
        size, patch = plan.latent_size, plan.patch_size
        embedded = self.encode_prompt(prompts)
        noise = get_noise(seeds, config.in_channels // patch**2, size, self.device)
        tokens = self._denoise("img_flux", plan, pack(noise, patch), None, embedded, embedded, on_step)
        latents = unpack(tokens, size, patch).to(self.dtype)
        with on_device(self.models["img_flux_ae"], self.device, self.cfg["offload"]) as ae:
            decoder: Any = ae
            return [to_uint8(decoder.decode(latent)[0])[0] for latent in latents.split(1)]

    def _option(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling options of a call: the config's with some replaced."""
        if not sampling:
            return dict(self.cfg["sampling_option"])
        overrides = {f"sampling_option.{key}": value for key, value in sampling.items()}
        return dict(load_config(self.cfg, InferenceOptions, overrides)["sampling_option"])

    def _plan(
        self, option: Mapping[str, Any], cond_type: str, sources: Sequence[Sequence[Source] | None]
    ) -> SamplePlan:
        has_refs = any(sources)
        if has_refs and not get_spans(cond_type):
            raise UserError("ref is given but cond_type is t2v; i2v_head makes a video that starts with a picture")
        config: Any = self.models["model"].config
        if has_refs and not config.cond_embed:
            raise UserError(f"this model takes no references (model.cond_embed is False); cond_type {cond_type}")
        for of_sample in sources:
            if of_sample:
                check_references(of_sample, cond_type, self.spec)
        return make_plan(option, self.spec, self.cfg["patch_size"], cond_type if has_refs else "t2v", has_refs)

    def _seeds(self, seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            drawn = [random.SystemRandom().getrandbits(32) for _ in range(count)]
            return collectives.broadcast_object(drawn, self.parallel.sample)
        return [check_seed(value) for value in _per_prompt(seed, count, "seeds")]


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """One value for all prompts, or one each, as a list."""
    if isinstance(value, str | int):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{len(value)} {name} for {count} prompts")
    return list(value)
