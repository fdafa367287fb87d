"""From a config to files: every prompt of a run, made, saved and recorded."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.acceleration.rank_zero import from_rank_zero
from opensora.diffusion.checks import check_conditions, check_config, check_parallelism, check_resources, check_writable
from opensora.diffusion.decode import DecodeMemoryError
from opensora.diffusion.pipeline import SampleResult, VideoPipeline
from opensora.diffusion.plan import LatentSpec
from opensora.diffusion.references import check_references
from opensora.diffusion.timing import timed
from opensora.generation import outputs
from opensora.generation.dry_run import dry_run_report
from opensora.generation.jobs import Job, hold_jobs, left_to_make, list_jobs, settle_jobs, with_local_references
from opensora.generation.refine import make_asker, wants_language_model
from opensora.generation.requests import Request, read_requests, where_of_ref
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.main import doing
from opensora.utils.video import save_image

logger = get_logger(__name__)


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
        cfg: resolved config (:class:`opensora.config.commands.InferenceOptions`).
        device: where the models work.
        rank: of this process; the samples are divided over the ranks (or groups of ranks with a parallel ``plugin``),
            each made once.
        world_size: number of processes.
        environment: where the key of a language model may stand, see :func:`opensora.generation.refine.make_asker`.
        log: gets a line per saved file.

    Returns:
        Videos and images written by this rank.

    Raises:
        UserError: see :mod:`opensora.diffusion.checks`.
    """
    with tempfile.TemporaryDirectory() as downloads, ExitStack() as held:
        requests = prepare(cfg, world_size, Path(downloads))
        if cfg["dry_run"]:
            jobs = list_jobs(cfg, requests)
            if rank == 0:
                log(dry_run_report(cfg, device, jobs))
            check_resources(cfg, device)
            left_to_make(cfg, jobs)
            return []
        check_resources(cfg, device)
        start = make_asker(cfg, environment or {}) if wants_language_model(cfg, requests) else None
        jobs = from_rank_zero(lambda: settle_jobs(cfg, requests, start, held), device, rank, world_size)
        parallel = _ranks(cfg, device) if world_size > 1 else ParallelContext(device=device)
        jobs = with_local_references(jobs, requests)[parallel.dp.rank :: parallel.dp.size]
        if not jobs:
            return []
        if rank:
            hold_jobs(cfg, jobs, held)
        pipe = VideoPipeline.from_config(cfg, device, parallel)
        if not parallel.sample.first:  # the group's first rank writes what all of them make
            _take_part(pipe, jobs)
            return []
        return list(_make_all(pipe, jobs, rank, log))


def _ranks(cfg: Mapping[str, Any], device: torch.device) -> ParallelContext:
    """Groups of ranks that make samples together, each rank on its own without a parallel plugin."""
    return ParallelContext.create(Sizes.of(cfg["plugin"], cfg["plugin_config"]), device)


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


def _from_picture(request: Request) -> Request:
    """The request as the second half of text to image to video."""
    return dataclasses.replace(request, cond_type="i2v_head") if request.cond_type == "t2v" else request


def _check_references(cfg: Mapping[str, Any], requests: Sequence[Request]) -> None:
    from opensora.models.build import build_on_meta

    spec = LatentSpec.of(build_on_meta(cfg["ae"]))
    for request in requests:
        try:
            if request.refs:
                check_references(request.refs, request.cond_type, spec)
        except UserError as error:
            raise UserError(f"{where_of_ref(request.where)}: {error}") from None


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
            shown = tqdm(desc=batch[0].request.text[:40], unit="step", leave=False, disable=hidden)
            with doing(", ".join(job.request.where for job in batch)), shown as steps:
                result = _make(pipe, batch, steps, log, common)
            for index, job in enumerate(batch):
                with doing(f"writing {job.stem}"):
                    path = _save(cfg, job, result, index, common)
                log(f"saved {path}")
                bar.update()
                yield path


def _take_part(pipe: VideoPipeline, jobs: Sequence[Job]) -> None:
    """Work on samples that another rank of this one's group writes."""
    for batch in _batches(jobs, pipe.cfg["batch_size"]):
        _make(pipe, batch)


def _make(
    pipe: VideoPipeline,
    batch: Sequence[Job],
    bar: Any = None,
    log: Callable[[str], None] = print,
    common: Mapping[str, Any] | None = None,
) -> SampleResult:
    """Sample a batch; pictures made on the way, and latents that cannot be decoded, are saved at once.

    Nothing is saved without ``common``, the part that all records share.
    """

    def on_step(step: int, total: int, latents: Tensor) -> None:
        if bar is not None:
            bar.total = total
            bar.update(step - bar.n)

    requests, seeds = [job.request for job in batch], [job.seed for job in batch]
    seconds: dict[str, float] = {}
    sources: list[list[Any]] = [list(request.refs) for request in requests]
    if pipe.cfg["use_t2i2v"] and not any(sources):
        with timed(seconds, "image", pipe.device):
            images = pipe.make_images([request.image_text or request.text for request in requests], seeds, on_step)
        if common is not None:
            bar.reset()
            for job, image in zip(batch, images):
                log(f"saved {_save_condition(job, image)}")
        sources = [[image] for image in images]
    texts = [request.final_text for request in requests]
    negatives = [request.neg for request in requests]
    try:
        result = pipe.make(texts, sources, requests[0].cond_type, seeds, negatives, on_step=on_step)
    except DecodeMemoryError as error:
        if common is None:
            raise
        error.result.timings = {**seconds, **error.result.timings}
        paths = [_save_undecoded(job, error.result, index, common) for index, job in enumerate(batch)]
        raise UserError(
            f"{error}. Nothing is lost; when there is memory:\n"
            f"  python scripts/diffusion/decode.py {pipe.cfg['config_path']} {' '.join(map(str, paths))}"
        ) from error
    result.timings = {**seconds, **result.timings}
    return result


def _save_condition(job: Job, image: np.ndarray) -> Path:
    """Keep the picture that a video starts from, with its prompt."""
    path = outputs.condition_path(job.stem)
    outputs.save_text(job.request.image_text or job.request.text, path.parent / job.stem.name)
    return save_image(image, path)


def _save(cfg: Mapping[str, Any], job: Job, result: SampleResult, index: int, common: Mapping[str, Any]) -> Path:
    """Write a sample. The video comes last: where it is, all else is."""
    _save_notes(job, result, index, common)
    if cfg["save_latents"]:
        _save_latents(job, result, index)
    return outputs.save_sample(result.frames[index], job.stem, job.request.fps)


def _save_undecoded(job: Job, result: SampleResult, index: int, common: Mapping[str, Any]) -> Path:
    _save_notes(job, result, index, common)
    return _save_latents(job, result, index)


def _save_latents(job: Job, result: SampleResult, index: int) -> Path:
    frames = result.plan.kept_frames()
    return outputs.save_latents(result.latents[index], job.stem, result.texts[index], job.request.fps, frames)


def _save_notes(job: Job, result: SampleResult, index: int, common: Mapping[str, Any]) -> None:
    """Write the ``.txt`` and the ``.json`` of a sample."""
    text, request, plan = result.texts[index], job.request, result.plan
    kept = plan.kept_frames()
    record = {
        "text": text,
        "prompt": request.text,
        "negative_prompt": request.neg,
        "references": request.ref,
        "cond_type": request.cond_type,
        "seed": job.seed,
        "fps": request.fps,
        "frames": [kept.stop - kept.start, plan.height, plan.width, 3],
        "latent": list(result.latents[index].shape),
        "tokens": plan.tokens,
        "forwards": plan.forwards,
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.timings.items()},
        **common,
    }
    outputs.save_record(record, job.stem)  # first: what else is there without it is not of this program
    outputs.save_text(text, job.stem)


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    content: Any = cfg
    return content.to_dict() if hasattr(content, "to_dict") else dict(content)
