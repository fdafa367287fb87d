"""From a config to files: every prompt of a run, made, saved and recorded."""

import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora.diffusion import outputs
from opensora.diffusion.decode import DecodeMemoryError
from opensora.diffusion.pipeline import SampleResult, VideoPipeline
from opensora.diffusion.plan import LatentSpec
from opensora.diffusion.progress import timed
from opensora.diffusion.prompts import Request, read_requests
from opensora.diffusion.references import check_references
from opensora.diffusion.refine import Ask, make_asker, refine_requests, wants_language_model
from opensora.diffusion.report import dry_run_report
from opensora.diffusion.validate import (
    check_conditions,
    check_config,
    check_parallelism,
    check_resources,
    check_writable,
)
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.video import save_image, write_text

logger = get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """One sample to make: a prompt, which repetition, its seed and its file name without ending."""

    request: Request
    epoch: int
    seed: int
    stem: Path

    @property
    def condition(self) -> tuple[str, bool]:
        """Samples of one batch have this in common."""
        return self.request.cond_type, bool(self.request.refs)


def generate(
    cfg: Mapping[str, Any],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    environment: Mapping[str, str] | None = None,
    log: Callable[[str], None] = tqdm.write,
) -> list[Path]:
    """Make and save everything that a config asks for.

    All that can be wrong is found before weights are loaded and before anything is written.

    Args:
        cfg: resolved config (:class:`opensora.schema.InferenceOptions`).
        device: where the models work.
        rank: of this process; the samples are divided over all ranks, each made once.
        world_size: number of processes.
        environment: where the key of a language model may stand, see :func:`opensora.diffusion.refine.make_asker`.
        log: gets a line per saved file.

    Returns:
        Videos and images written by this rank.

    Raises:
        UserError: see :mod:`opensora.diffusion.validate`.
    """
    with tempfile.TemporaryDirectory() as downloads:
        requests = prepare(cfg, world_size, Path(downloads))
        if cfg["dry_run"]:
            if rank == 0:
                log(dry_run_report(cfg, device, [job.stem for job in list_jobs(cfg, requests)]))
            check_resources(cfg, device)
            return []
        check_resources(cfg, device)
        asker = make_asker(cfg, environment or {}) if wants_language_model(cfg, requests) else None
        if asker:  # each prompt is asked about once, by the rank that makes its videos
            requests = requests[rank::world_size]
            jobs = list_jobs(cfg, requests)
        else:
            jobs = list_jobs(cfg, requests)[rank::world_size]
        if cfg["skip_existing"]:
            jobs = [job for job in jobs if not _exists(job, cfg)]
            logger.info("%d samples are left to make", len(jobs))
        if not jobs:
            return []
        if asker:
            jobs = _refined(jobs, cfg, asker())
        return list(_make_all(VideoPipeline.from_config(cfg, device), jobs, rank, log))


def prepare(cfg: Mapping[str, Any], world_size: int, downloads: Path) -> list[Request]:
    """Read the prompts and check everything but the weights."""
    check_parallelism(cfg, world_size)
    requests = read_requests(cfg, downloads)
    check_config(cfg)
    if cfg["use_t2i2v"]:
        requests = [_from_picture(request) for request in requests]
    check_conditions(cfg, {request.cond_type for request in requests})
    _check_references(cfg, requests)
    outputs.check_stems(cfg, requests)
    check_writable(cfg["save_dir"])
    return requests


def list_jobs(cfg: Mapping[str, Any], requests: Sequence[Request]) -> list[Job]:
    """The samples of a run, all prompts once before any is repeated."""
    folder = outputs.output_folder(cfg)
    return [
        Job(request, epoch, job_seed(cfg["seed"], request, epoch), folder / outputs.file_stem(cfg, request, epoch))
        for epoch in range(cfg["num_sample"])
        for request in requests
    ]


def _refined(jobs: Sequence[Job], cfg: Mapping[str, Any], ask: Ask) -> list[Job]:
    requests = list({job.request.index: job.request for job in jobs}.values())
    refined = {request.index: request for request in refine_requests(requests, cfg, ask)}
    return [dataclasses.replace(job, request=refined[job.request.index]) for job in jobs]


def job_seed(run_seed: int, request: Request, epoch: int) -> int:
    """Seed of a sample: the prompt's plus the repetition; without one, drawn from the run's seed, row and repetition.

    It depends on nothing else, so batches, order and number of ranks do not change a video.
    """
    if request.seed is not None:
        return request.seed + epoch
    return random.Random(f"{run_seed}/{request.index}/{epoch}").getrandbits(32)


def _from_picture(request: Request) -> Request:
    """The request as the second half of text to image to video."""
    return dataclasses.replace(request, cond_type="i2v_head") if request.cond_type == "t2v" else request


def _check_references(cfg: Mapping[str, Any], requests: Sequence[Request]) -> None:
    from opensora.diffusion.building import build_on_meta

    spec = LatentSpec.of(build_on_meta(cfg["ae"]))
    for request in requests:
        try:
            if request.refs:
                check_references(request.refs, request.cond_type, spec)
        except UserError as error:
            raise UserError(f"{request.where}: {error}") from None


def _exists(job: Job, cfg: Mapping[str, Any]) -> bool:
    ending = ".png" if cfg["sampling_option"]["num_frames"] == 1 else ".mp4"
    return job.stem.with_name(job.stem.name + ending).exists()


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Batches of at most ``size`` samples with the same kind of condition, in order."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or job.condition != batch[0].condition):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _make_all(pipe: VideoPipeline, jobs: Sequence[Job], rank: int, log: Callable[[str], None]) -> Iterator[Path]:
    cfg = pipe.cfg
    common = {"versions": outputs.versions(), "weights": outputs.weight_records(cfg), "config": _plain(cfg)}
    hidden = rank != 0
    with tqdm(total=len(jobs), desc="samples", unit="sample", disable=hidden) as bar:
        for batch in _batches(jobs, cfg["batch_size"]):
            with tqdm(desc=batch[0].request.text[:40], unit="step", leave=False, disable=hidden) as steps:
                result = _make(pipe, batch, steps, log)
            for index, job in enumerate(batch):
                path = _save(cfg, job, result, index, common)
                log(f"saved {path}")
                bar.update()
                yield path


def _make(pipe: VideoPipeline, batch: Sequence[Job], bar: Any, log: Callable[[str], None]) -> SampleResult:
    """Sample a batch; pictures made on the way, and latents that cannot be decoded, are saved at once."""

    def on_step(step: int, total: int, latents: Tensor) -> None:
        bar.total = total
        bar.update(step - bar.n)

    requests, seeds = [job.request for job in batch], [job.seed for job in batch]
    seconds: dict[str, float] = {}
    sources: list[list[Any]] = [list(request.refs) for request in requests]
    if pipe.cfg["use_t2i2v"] and not any(sources):
        with timed(seconds, "image", pipe.device):
            images = pipe.make_images([request.image_text or request.text for request in requests], seeds, on_step)
        bar.reset()
        for job, image in zip(batch, images):
            log(f"saved {_save_condition(job, image)}")
        sources = [[image] for image in images]
    texts = [request.final_text for request in requests]
    negatives = [request.neg for request in requests]
    try:
        result = pipe.make(texts, sources, requests[0].cond_type, seeds, negatives, on_step=on_step)
    except DecodeMemoryError as error:
        paths = [
            outputs.save_latents(latents, job.stem, job.request.final_text, job.request.fps, error.frames)
            for job, latents in zip(batch, error.latents)
        ]
        names = " ".join(map(str, paths))
        raise UserError(
            f"{error}. Nothing is lost; when there is memory:\n"
            f"  python scripts/diffusion/decode.py {pipe.cfg['config_path']} {names}"
        ) from error
    result.timings = {**seconds, **result.timings}
    return result


def _save_condition(job: Job, image: np.ndarray) -> Path:
    """Keep the picture that a video starts from, with its prompt, in ``generated_condition`` beside the videos."""
    folder = job.stem.parent / "generated_condition"
    write_text(job.request.image_text or job.request.text, folder / f"{job.stem.name}.txt")
    return save_image(image, folder / f"{job.stem.name}.png")


def _save(cfg: Mapping[str, Any], job: Job, result: SampleResult, index: int, common: Mapping[str, Any]) -> Path:
    """Write a sample. The video comes last: where it is, all else is."""
    text, request = result.texts[index], job.request
    outputs.save_text(text, job.stem)
    if cfg["save_latents"]:
        outputs.save_latents(result.latents[index], job.stem, text, request.fps, result.plan.kept_frames())
    record = {
        "text": text,
        "prompt": request.text,
        "negative_prompt": request.neg,
        "references": request.ref,
        "cond_type": request.cond_type,
        "seed": job.seed,
        "fps": request.fps,
        "frames": list(result.frames[index].shape),
        "latent": list(result.latents[index].shape),
        "tokens": result.plan.tokens,
        "forwards": result.plan.forwards,
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.timings.items()},
        **common,
    }
    outputs.save_record(record, job.stem)
    return outputs.save_sample(result.frames[index], job.stem, request.fps)


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    content: Any = cfg
    return content.to_dict() if hasattr(content, "to_dict") else dict(content)
