"""VideoPipeline: prompt (and picture) to latents to pixels. Everything that makes a video goes through it."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.devices import DTYPES, dtype_name, pick_device, torch_dtype
from opensora.acceleration.parallel_context import ParallelContext
from opensora.config import load_config, naming_places
from opensora.config.commands import InferenceOptions
from opensora.config.keys import read_group
from opensora.config.options import SamplingOption
from opensora.diffusion.calling import (
    Generators,
    condition_of,
    one_of,
    per_prompt,
    plain,
    seeds_of,
    shown_steps,
    texts_of,
    with_aliases,
)
from opensora.diffusion.conditions import get_condition, get_spans, takes_references
from opensora.diffusion.decode import DecodeMemoryError, Gathered
from opensora.diffusion.distilled import as_distilled
from opensora.diffusion.fitting import check_fit
from opensora.diffusion.free import PlacedLatents
from opensora.diffusion.kept_pixels import KeptRegion
from opensora.diffusion.loading import load_models, park_modulation
from opensora.diffusion.long import kept_in, sample_windows, texts_of_windows
from opensora.diffusion.lora_stack import LoadedLora, LoraStack
from opensora.diffusion.moving import move
from opensora.diffusion.plan import SamplePlan, make_plan, starts_from_picture
from opensora.diffusion.prepared import PreparedRun, check_goes_on, check_takes_references
from opensora.diffusion.references import References, Source, check_given, check_references, per_prompt_references
from opensora.diffusion.result import ImagesCallback, SampledCallback
from opensora.diffusion.result import SampleResult as SampleResult
from opensora.diffusion.saving import save_pipeline
from opensora.diffusion.solvers import StepCallback
from opensora.diffusion.stages import Stages
from opensora.diffusion.step_cache import StepCache
from opensora.diffusion.timing import as_stage, timed
from opensora.diffusion.velocity import TextEmbeddings
from opensora.diffusion.windows import Windows
from opensora.diffusion.wording import check_fps, check_motion_score, check_prompt, check_seed, final_text
from opensora.models.build import build_on_meta
from opensora.models.diffusion import DiffusionModel
from opensora.models.quantization.linear import QuantizedLinear
from opensora.utils import hub
from opensora.utils.download import naming_addresses
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.temporary import TemporaryFolder

logger = get_logger(__name__)


class VideoPipeline(Stages):
    """Text (and image, and video) to video.

    Example::

        pipe = VideoPipeline.from_pretrained("demo")
        result = pipe("a red circle moving right", seed=42)
        save_video(result.frames[0], "circle.mp4", fps=8)

    Prompts are taken as they are given (the command line's ``refine_prompt`` comes before this class). It is made of
    what :class:`Stages` is made of.
    """

    _loras: LoraStack | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> "VideoPipeline":
        """Build the models of a shipped config (``"demo"``), a config file, a folder that holds one (``config.json``,
        ``config.py``), whose relative paths start in the folder, or a repository of a hub that holds such a folder
        (``"org/name"``, ``"modelscope:org/name"``).

        Args:
            name: of the config; see :func:`opensora.config.shipped.find_config`.
            device: where the models work; None goes by the config.
            torch_dtype: of the models; None goes by the config.
            overrides: as in :meth:`from_config`.

        Raises:
            UserError: anything wrong with config or weight files; found before weights are loaded.
        """
        dtype = one_of("dtype", overrides.pop("dtype", None), "torch_dtype", torch_dtype)
        if dtype is not None:
            overrides["dtype"] = dtype if isinstance(dtype, str) else dtype_name(dtype)
        return cls.from_config(name, device, **overrides)

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, Any] | InferenceOptions,
        device: str | torch.device | None = None,
        parallel: ParallelContext | None = None,
        **overrides: Any,
    ) -> "VideoPipeline":
        """Build the models of a config.

        Args:
            config: a config file, the name of a shipped one, or the content of one.
            device: where the models work; None goes by the config.
            parallel: ranks that make a sample together; the models are divided over them.
            overrides: config values by key; dotted keys and the aliases of the command line work
                (``**{"ae.use_spatial_tiling": True}``, ``num_steps=20``).

        Raises:
            UserError: anything wrong with config or weight files; found before weights are loaded.
        """
        cfg = load_config(config, InferenceOptions, overrides)
        run = PreparedRun.of(cfg, pick_device(cfg.device if device is None else str(device)))
        with naming_places(cfg):
            run.check_resources()
        check_fit(run, [run.plan])
        return cls.from_prepared(run, parallel)

    @classmethod
    def from_prepared(cls, run: PreparedRun, parallel: ParallelContext | None = None) -> "VideoPipeline":
        """Load the models of a run whose config and weights are checked; ``parallel`` as in :meth:`from_config`."""
        return cls(load_models(run, parallel), run.cfg, run.device, run.dtype, parallel, run.distilled, run.plain)

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
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: References | Sequence[References | None] | None = None,
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        progress: bool | None = None,
        decode: bool = True,
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
            fps: frame rate, appended to the prompt; default: the config's.
            motion_score: motion score appended to the prompt; default: the config's.
            on_step: ``on_step(step, total, latents)`` after each step, with latents [B, C, T, h, w]; what it raises
                stops the run. With ``use_t2i2v`` the steps of the picture count too.
            negative_prompt: ``neg``, as diffusers calls it.
            image: ``ref``, as diffusers calls it; fixes the first frame unless ``cond_type`` says otherwise.
            generator: one for all prompts or one each, instead of ``seed``; a new one stands for its seed.
            num_inference_steps, guidance_scale: ``num_steps`` and ``guidance``, as diffusers calls them.
            progress: show a bar of the steps; None shows it in a terminal.
            decode: False leaves frames out: ``decode(result.latents, result.plan, result.kept)`` makes them later.
            sampling: keys of the config's ``sampling_option`` for this call (``num_steps=20``, ``height=``,
                ``width=``, ``num_frames=``).

        Returns:
            Latents, frames, final texts, seeds and timings.

        Raises:
            UserError: impossible sizes or conditions, unreadable references, an argument under both of its names.
            DecodeMemoryError: decoding ran out of memory.
        """
        prompts = [check_prompt(text, "prompt") for text in texts_of(prompt)]
        neg = one_of("neg", neg, "negative_prompt", negative_prompt)
        ref = one_of("ref", ref, "image", image)
        cond_type = condition_of(cond_type, self.cfg.cond_type, image)
        sampling = with_aliases(sampling, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        get_condition(cond_type)
        fps = self.cfg.fps_save if fps is None else check_fps(plain(fps))
        if on_step is not None and not callable(on_step):
            raise UserError(f"on_step: give a function of (step, total, latents), not {on_step!r}")
        option = self._option(sampling)
        score = check_motion_score(self.cfg.motion_score if motion_score is None else motion_score, "motion_score")
        if score == "dynamic":
            raise UserError("motion_score: give a number; 'dynamic' is worked out by the command line only")
        texts = [final_text(text, fps, score) for text in prompts]
        neg = neg or "" if isinstance(neg, str | None) else texts_of(neg, "neg")
        negatives = [check_prompt(text, "neg") for text in per_prompt(neg, len(prompts), "negative prompts")]
        seed = one_of("seed", seed, "generator", seeds_of(generator))
        seeds = self._seeds(option.seed if seed is None else seed, len(prompts))
        hidden = False if self.parallel.rank else progress
        with TemporaryFolder() as downloads, naming_addresses(downloads), shown_steps(hidden, on_step) as shown:
            sources = per_prompt_references(ref, len(prompts), downloads)
            check_given(sources, cond_type, not self.cfg.use_t2i2v)
            return self.make(
                *(texts, sources, cond_type, seeds, negatives, option, shown),
                image_texts=prompts if self.cfg.use_t2i2v else None,
                decode=decode,
            )

    def make(
        self,
        texts: Sequence[str],
        sources: Sequence[Sequence[Source] | None],
        cond_type: str,
        seeds: Sequence[int],
        negatives: Sequence[str],
        option: SamplingOption | None = None,
        on_step: StepCallback | None = None,
        image_texts: Sequence[str] | None = None,
        on_images: ImagesCallback | None = None,
        on_sampled: SampledCallback | None = None,
        next_texts: Sequence[Sequence[str]] = (),
        folders: Sequence[Path] | None = None,
        decode: bool = True,
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
            image_texts: prompts of pictures to make first and start from, where no sample has references; None makes
                none.
            on_images: gets these pictures before their videos are made.
            on_sampled: called when a batch is about to be decoded, and gives where its frames go instead of into the
                result, so that no video is held whole.
            next_texts: per sample, texts of the windows after the first of a long video; the last one stays.
            folders: per sample, where the latents of a long video are kept while it is made, and gone on from; None
                keeps them in a temporary place. Whoever gives them deletes them.
            decode: False leaves frames out.
        """
        timings: dict[str, float] = {}
        images: list[np.ndarray] = []
        option = option or self.cfg.sampling_option
        if image_texts is not None and not any(sources):
            with timed(timings, "image", self.device):
                images = self.draw(image_texts, seeds, option, as_stage(on_step, 0, 2))
            if on_images is not None:
                on_images(images)
            sources, on_step = [[image] for image in images], as_stage(on_step, 1, 2)
            cond_type = starts_from_picture(cond_type)
        plan = self._plan(option, cond_type, sources)
        if plan.method == "distill" and any(negatives):
            logger.warning("method distill: a guidance-distilled model takes no negative prompt, it has no effect")
        with timed(timings, "references", self.device):
            refs = self.encode_references(sources, plan, seeds)
        with timed(timings, "text", self.device):
            script = texts_of_windows(plan, texts, next_texts)
            embedded = self.encode_prompt([*itertools.chain(*script), *negatives])
        with timed(timings, "denoise", self.device):
            *positive, negative = embedded.chunks(len(texts))
            latents, reused = self._sample(plan, positive, negative, refs, seeds, on_step, folders)
        result = SampleResult(latents.float().cpu(), [], list(texts), list(seeds), timings, plan, images, reused)
        kept = [KeptRegion.of(each) for each in refs]
        result.kept = kept if any(kept) else []
        if decode:
            self._add_frames(result, latents, on_sampled)
        return result

    def _add_frames(self, result: SampleResult, latents: Tensor, on_sampled: SampledCallback | None) -> None:
        """Decode ``latents [B, C, T, h, w]``, into the result or to where ``on_sampled`` says."""
        gathered = Gathered()
        try:
            with timed(result.timings, "decode", self.device):
                sink = gathered if on_sampled is None else on_sampled(result)
                result.tiles = self.decode_into(sink, latents, result.plan, result.kept)
        except DecodeMemoryError as error:
            error.result = result
            raise
        result.frames = gathered.videos()

    def _sample(
        self,
        plan: SamplePlan,
        positive: Sequence[TextEmbeddings],
        negative: TextEmbeddings,
        refs: Sequence[Sequence[Tensor] | PlacedLatents | None],
        seeds: Sequence[int],
        on_step: StepCallback | None,
        folders: Sequence[Path] | None,
    ) -> tuple[Tensor, list[float]]:
        """Latents of a batch, in windows where the plan has them, and the share of work that a cache saved (of the last
        window). ``positive`` has the texts of each window, the last of them those of all further ones."""
        caches: list[StepCache | None] = [None]
        windows = plan.windows

        def make(
            index: int, plan: SamplePlan, given: Tensor | None, seeds: Sequence[int], on_step: StepCallback | None
        ) -> Tensor:
            caches[0] = plan.step_cache.make(plan.num_steps) if plan.step_cache is not None else None
            texts = positive[min(index, len(positive) - 1)]
            here = refs if windows is None else [_in_window(each, windows, index) for each in refs]
            if given is None:
                return self.sample(plan, texts, negative, here, seeds, on_step, caches[0])
            placed = [each if isinstance(each, PlacedLatents) else None for each in here]
            return self.go_on(plan, texts, negative, given, seeds, on_step, caches[0], placed)

        if windows is None:
            latents = make(0, plan, None, seeds, on_step)
        else:
            with kept_in(folders, len(seeds)) as kept:
                axis = self.parallel.sample
                latents = sample_windows(plan, self.channels(plan), kept, seeds, make, on_step, axis)
        return latents, self._reused(caches[0])

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """Adapters that :meth:`load_lora` put on, in their order."""
        return self._loras.loaded if self._loras is not None else ()

    def load_lora(self, path: str | Path, strength: float = 1.0) -> None:
        """Put a LoRA adapter on the video model, beside those that are on it: of PEFT, diffusers, ComfyUI or Kohya.

        With the config's ``merge_lora`` (the default) it is added to the weights, of which a copy is kept in host
        memory; the model is as if it had been loaded with ``pretrained_lora_path``. It stays beside quantised weights.

        Args:
            path: folder or file.
            strength: what it is multiplied by.

        Raises:
            UserError: no adapter there, one that does not fit, or a model that is divided over ranks; nothing is
                changed.
        """
        if self.parallel.sample.size > 1:
            raise UserError("load_lora: the model is divided over ranks; give adapters as pretrained_lora_path instead")
        if self._loras is None:
            model, section = self.models["model"], self.cfg.model
            quantized = section is not None and any(isinstance(each, QuantizedLinear) for each in model.modules())
            plain = build_on_meta(section) if section is not None and quantized else None
            self._loras = LoraStack(model, plain, self.cfg.merge_lora, self.cfg.lora_partial)
        self._loras.add(path, strength)

    def unload_lora(self, path: str | Path | None = None) -> None:
        """Take an adapter of :meth:`load_lora` off again, or all of them: the weights are as they were, to the bit.

        Raises:
            UserError: there is none of that path.
        """
        if self._loras is None and path is None:
            return
        if self._loras is None:
            raise UserError(f"unload_lora: {path} is not loaded; loaded: none")
        self._loras.remove(path)

    def save_pretrained(
        self, folder: str | Path, name: str | None = None, license: str | None = None, overwrite: bool = False
    ) -> Path:
        """Write the whole pipeline as a folder, which ``from_pretrained``, every command and diffusers load: weights as
        they are now, adapters merged into them included, ``config.json`` and a model card.

        Args:
            folder: to write; whole or not at all.
            name: of the pipeline in its model card; None takes the folder's.
            license: identifier of the weights' licence for the card (``apache-2.0``).
            overwrite: replace a folder that holds a pipeline.

        Raises:
            UserError: the folder has something, adapters lie beside the weights, or the model is divided over ranks.
        """
        return save_pipeline(self, folder, name, license, overwrite)

    def push_to_hub(
        self,
        repo: str,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload pipeline",
    ) -> str:
        """Send the pipeline to a hub, as :meth:`save_pretrained` writes it; ``from_pretrained(repo)`` loads it again.

        Args:
            repo: ``org/name``, or ``modelscope:org/name``; made if it is not there.
            license: as in :meth:`save_pretrained`.
            private: whether a new repository is; None goes by the hub's settings.
            token: of the hub; None takes the one that its login command kept.
            commit_message: of the upload.

        Returns:
            Address of the repository.

        Raises:
            UserError: no such id, a hub that refuses, or see :meth:`save_pretrained`.
        """
        hub.check_repo(repo)
        with TemporaryFolder() as work:
            folder = self.save_pretrained(work / "pipeline", repo, license)
            return hub.upload(folder, repo, private, token, commit_message)

    def to(self, *where: str | torch.device | torch.dtype) -> "VideoPipeline":
        """Move the models to a device, or another precision, or both: ``pipe.to("cuda", torch.bfloat16)``.

        With ``offload`` they stay in host memory and are copied to the new device when they work. What a lower
        precision rounds away is gone: going back to the higher one does not bring it back.

        Raises:
            UserError: a device that is not there, something that is neither, or models that are divided over ranks.
        """
        if self.parallel.sample.size > 1:
            raise UserError("to: the models are divided over ranks, and stay where they are")
        device, dtype = self.device, self.dtype
        for each in where:
            if isinstance(each, torch.dtype) or (isinstance(each, str) and each in DTYPES):
                dtype = each if isinstance(each, torch.dtype) else torch_dtype(each)
            else:
                device = pick_device(str(each))
        name = dtype_name(dtype)
        for model in self.models.values():
            move(model, torch.device("cpu") if self.cfg.offload else device, dtype)
            if self.cfg.precompute and isinstance(model, DiffusionModel):
                park_modulation(model)
        self.cfg = replace(self.cfg, device=str(device), dtype=name)
        self.device, self.dtype = device, dtype
        return self

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
        return self.draw(prompts, seeds, self._option(sampling), on_step)

    def _option(self, sampling: Mapping[str, Any]) -> SamplingOption:
        """Sampling options of a call: the config's with some replaced."""
        option = self.cfg.sampling_option
        if not sampling:
            return option
        option = read_group(
            SamplingOption,
            {**option.to_dict(), **{key: plain(value) for key, value in sampling.items()}},
            "sampling_option",
            "this call",
        )
        return option if self.distilled is None else as_distilled(option, self.distilled, sampling)

    def _plan(self, option: SamplingOption, cond_type: str, sources: Sequence[Sequence[Source] | None]) -> SamplePlan:
        has_refs = any(sources)
        if has_refs and not takes_references(cond_type):
            raise UserError("ref is given but cond_type is t2v; i2v_head makes a video that starts with a picture")
        if has_refs:
            check_takes_references(self.models["model"], cond_type)
        for of_sample in sources:
            if of_sample and get_spans(cond_type):
                check_references(of_sample, cond_type, self.spec)
        condition = cond_type if has_refs else "t2v"
        plan = make_plan(option, self.spec, self.cfg.patch_size, condition, has_refs, self.distilled)
        check_goes_on(self.models["model"], plan)
        for of_sample in sources:
            if of_sample and not get_spans(cond_type):  # where they lie depends on the length
                check_references(of_sample, cond_type, self.spec, plan)
        return plan

    def _seeds(self, seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            drawn = [random.SystemRandom().getrandbits(32) for _ in range(count)]
            return collectives.broadcast_object(drawn, self.parallel.sample)
        return [check_seed(value) for value in per_prompt(plain(seed), count, "seeds")]


def _in_window(
    given: Sequence[Tensor] | PlacedLatents | None, windows: Windows, index: int
) -> Sequence[Tensor] | PlacedLatents | None:
    """What of a sample's references lies in a window; those of the beginning are for the first one."""
    if not isinstance(given, PlacedLatents):
        return given
    begin = index * windows.advance
    return given.within(begin, begin + windows.window)
