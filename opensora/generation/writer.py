"""Samples and their records, from the pipeline to files."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from opensora.config.commands import InferenceOptions
from opensora.diffusion.decode import DecodeMemoryError
from opensora.diffusion.pipeline import SampleResult
from opensora.diffusion.references import given_frames, media_of
from opensora.generation import outputs
from opensora.generation.jobs import Job
from opensora.generation.sample_files import SampleFiles
from opensora.models.mmdit.attention import is_approximate
from opensora.models.mmdit.config import MMDiTConfig
from opensora.utils.errors import UserError
from opensora.utils.main import doing
from opensora.utils.paths import own_command
from opensora.utils.video import save_image
from opensora.utils.weights import files_hash

# Keys that decide what is in a video, besides its prompt and seed.
OF_A_VIDEO = ("sampling_option", "model", "ae", "t5", "clip", "patch_size", "dtype", "device", "pretrained_lora_path")


class SampleWriter:
    """Writes the samples of a run, and what belongs beside them.

    Args:
        cfg: resolved config.
        log: gets a line per saved file.
    """

    def __init__(self, cfg: InferenceOptions, log: Callable[[str], None]) -> None:
        self.cfg, self.log = cfg, log
        self.common: dict[str, Any] = {
            "versions": outputs.versions(),
            "weights": outputs.weight_records(cfg),
            "config": cfg.to_dict(),
        }

    def with_config(self, cfg: InferenceOptions, lora: str | None = None) -> "SampleWriter":
        """This writer for a config that differs in no model, and maybe an adapter on top (``PATH@strength``)."""
        writer = copy.copy(self)
        writer.cfg, weights = cfg, self.common["weights"]
        if lora is not None:
            weights = {**weights, "lora": outputs.lora_record(lora)}
        writer.common = {**self.common, "weights": weights, "config": cfg.to_dict()}
        return writer

    def windows(self, job: Job) -> Path:
        """Where the latents of a long video are kept while it is made: by its name and all that it is made with."""
        models = {key: value for key, value in self.cfg.to_dict().items() if key in OF_A_VIDEO}
        request = dataclasses.asdict(job.request) | {"index": None, "where": None}
        request.pop("mask")  # one of the refs
        refs = [files_hash(str(media_of(ref))) for ref in job.request.refs]
        facts = [models, self.common["weights"], request | {"refs": refs}, job.seed]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return outputs.windows_folder(job.stem, digest)

    def pictures(self, batch: Sequence[Job], images: Sequence[np.ndarray]) -> None:
        """Keep the pictures that videos start from, with their prompts."""
        for job, image in zip(batch, images, strict=True):
            path = outputs.condition_path(job.stem)
            outputs.save_text(job.request.picture_text, path.parent / job.stem.name)
            self.log(f"saved {save_image(image, path)}")

    def files(self, batch: Sequence[Job]) -> SampleFiles:
        """Where the frames of a batch go while it is decoded."""
        return SampleFiles([(job.stem, job.request.fps) for job in batch])

    def latents(self, batch: Sequence[Job], result: SampleResult) -> None:
        """Keep the latents of a batch that is about to be decoded, if they are to be kept: whatever happens then."""
        if not self.cfg.save_latents:
            return
        for index, job in enumerate(batch):
            self._notes(job, result, index)
            self._latents(job, result, index)

    def sample(self, job: Job, result: SampleResult, index: int, files: SampleFiles | None = None) -> Path:
        """Write what belongs beside a sample, and give it its name. The video comes last: where it is, all else is.

        Args:
            job: the sample.
            result: of its batch.
            index: its place there.
            files: where its frames went while it was decoded (and its latents went beside); None: they are in
                ``result``.
        """
        with doing(f"writing {job.stem}"):
            self._notes(job, result, index)
            if files is None and self.cfg.save_latents:
                self._latents(job, result, index)
            with nullcontext(files) if files is not None else self.files([job]) as written:
                number = index if files is not None else self._write(written, result.frames[index])
                path = written.put_in_place(number)
        outputs.remove_windows(job.stem)
        self.log(f"saved {path}")
        return path

    def _write(self, files: SampleFiles, frames: np.ndarray) -> int:
        """Write all frames of a sample, the only one of ``files``; returns its number there."""
        files.start(0)
        files.write(frames)
        return 0

    def undecoded(self, batch: Sequence[Job], error: DecodeMemoryError) -> UserError:
        """Keep the latents of a batch for which decoding had no memory; what to tell the user."""
        paths = []
        for index, job in enumerate(batch):
            self._notes(job, error.result, index)
            paths.append(self._latents(job, error.result, index))
        command = own_command("decode", "scripts/diffusion/decode.py")
        return UserError(
            f"{error}. Nothing is lost; when there is memory:\n"
            f"  {command} {self.cfg.config_path} {' '.join(map(str, paths))}"
        )

    def _latents(self, job: Job, result: SampleResult, index: int) -> Path:
        frames = result.plan.kept_frames()
        window = None if result.plan.windows is None else result.plan.num_frames
        latents, text = result.latents[index], result.texts[index]
        kept = result.kept[index] if result.kept else None
        return outputs.save_latents(latents, job.stem, text, job.request.fps, frames, window, kept)

    def _notes(self, job: Job, result: SampleResult, index: int) -> None:
        """Write the ``.txt`` and the ``.json`` of a sample."""
        text, request, plan = result.texts[index], job.request, result.plan
        kept = plan.kept_frames()
        record = {
            "text": text,
            "prompt": request.text,
            "negative_prompt": request.neg,
            "references": request.ref,
            **({"mask": request.mask} if request.mask else {}),
            **({"given": given} if (given := given_frames(request.refs, plan)) else {}),
            "cond_type": request.cond_type,
            "seed": job.seed,
            "fps": request.fps,
            "frames": [kept.stop - kept.start, plan.height, plan.width, 3],
            "latent": list(result.latents[index].shape),
            **_windows_record(result, job),
            "tokens": plan.tokens,
            "forwards": plan.forwards,
            **_step_cache_record(result, index),
            **_attention_record(self.cfg),
            **({"tiles": result.tiles} if result.tiles else {}),
            "seconds": {stage: round(seconds, 3) for stage, seconds in result.timings.items()},
            **self.common,
        }
        outputs.save_record(record, job.stem)  # first: what else is there without it is not of this program
        outputs.save_text(text, job.stem)


def _attention_record(cfg: InferenceOptions) -> dict[str, Any]:
    """Attention kernels that make a sample approximate."""
    models = {"model": cfg.model, "img_flux": cfg.img_flux if cfg.use_t2i2v else None}
    kernels = {name: each.attn_backend for name, each in models.items() if isinstance(each, MMDiTConfig)}
    found = {name: kernel for name, kernel in kernels.items() if is_approximate(kernel)}
    return {"attention": {**found, "approximate": True}} if found else {}


def _windows_record(result: SampleResult, job: Job) -> dict[str, Any]:
    """How a long video was divided."""
    plan = result.plan
    if plan.windows is None:
        return {}
    windows = {"count": plan.windows.count, "frames": plan.num_frames, "latent_overlap": plan.windows.overlap}
    return {"windows": windows, **({"next_prompts": list(job.request.next_texts)} if job.request.next_texts else {})}


def _step_cache_record(result: SampleResult, index: int) -> dict[str, Any]:
    """What made a sample approximate, and how often."""
    choice = result.plan.step_cache
    if choice is None:
        return {}
    record: dict[str, Any] = {"kind": choice.kind, "approximate": True}
    if choice.threshold is not None:
        record["threshold"] = choice.threshold
    if result.reused:
        record["reused"] = round(result.reused[index], 4)  # share of the evaluations
    return {"step_cache": record}
