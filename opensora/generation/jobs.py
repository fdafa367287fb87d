"""The samples of a run: their seeds, their file names, and which of them are left to make."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.generation import outputs
from opensora.generation.refine import Ask, refine_requests
from opensora.generation.requests import Request
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

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


def job_seed(run_seed: int, request: Request, epoch: int) -> int:
    """Seed of a sample: the prompt's plus the repetition; without one, drawn from the run's seed, row and repetition.

    It depends on nothing else, so batches, order and number of ranks do not change a video.
    """
    if request.seed is not None:
        return request.seed + epoch
    return random.Random(f"{run_seed}/{request.index}/{epoch}").getrandbits(32)


def list_jobs(cfg: Mapping[str, Any], requests: Sequence[Request]) -> list[Job]:
    """The samples of a run, all prompts once before any is repeated.

    A prompt of the command line takes the first number whose files are free (or, with ``skip_existing``, that it has
    itself), so that ``prompt_0000`` of an earlier run stays.
    """
    if cfg["prompt"] is not None and not (cfg["prompt_as_path"] or cfg["overwrite"]):
        requests = [_numbered(cfg, request) for request in requests]
    return [_job(cfg, request, epoch) for epoch in range(cfg["num_sample"]) for request in requests]


def _job(cfg: Mapping[str, Any], request: Request, epoch: int) -> Job:
    stem = outputs.output_folder(cfg) / outputs.file_stem(cfg, request, epoch)
    return Job(request, epoch, job_seed(cfg["seed"], request, epoch), stem)


def _numbered(cfg: Mapping[str, Any], request: Request) -> Request:
    for number in itertools.count():
        named = dataclasses.replace(request, name=f"prompt_{number:04d}")
        stems = [_job(cfg, named, epoch).stem for epoch in range(cfg["num_sample"])]
        taken = [stem for stem in stems if outputs.is_taken(stem)]
        if not taken or (cfg["skip_existing"] and all(_same_prompt(stem, request) for stem in taken)):
            return named
    raise AssertionError("numbers do not end")


def _same_prompt(stem: Path, request: Request) -> bool:
    """Whether files belong to a prompt, as far as they tell (those of other programs may not)."""
    return outputs.recorded_prompt(stem) in (None, request.text)


def left_to_make(cfg: Mapping[str, Any], jobs: Sequence[Job]) -> list[Job]:
    """The jobs that a run has to do: all, or with ``skip_existing`` those whose video is not there.

    Raises:
        UserError: files are in the way, and neither ``skip_existing`` nor ``overwrite`` says what to do with them.
    """
    if cfg["overwrite"]:
        return list(jobs)
    in_the_way = [job for job in jobs if outputs.is_taken(job.stem)]
    if cfg["skip_existing"]:
        for job in in_the_way:
            if not _same_prompt(job.stem, job.request):
                raise UserError(
                    f"{job.request.where}: {job.stem} holds another prompt, "
                    f"{outputs.recorded_prompt(job.stem)!r}: give another --save-dir or --save-prefix, or "
                    "--overwrite True to replace it"
                )
        left = [job for job in jobs if not outputs.has_video(job.stem)]
        logger.info("%d of %d samples are left to make", len(left), len(jobs))
        return left
    if in_the_way:
        more = f" (and {len(in_the_way) - 1} more)" if len(in_the_way) > 1 else ""
        raise UserError(
            f"{in_the_way[0].stem} is there already{more}: --skip-existing True makes only what is missing, "
            "--overwrite True replaces it, --save-dir or --save-prefix writes elsewhere"
        )
    return list(jobs)


def settle_jobs(cfg: Mapping[str, Any], requests: Sequence[Request], start: Callable[[], Ask] | None) -> list[Job]:
    """The jobs of a run with everything decided that may be decided only once.

    Args:
        cfg: resolved config.
        requests: its prompts.
        start: gives the language model that is to be asked about them, if there is one.

    Raises:
        UserError: see :func:`left_to_make`.
    """
    jobs = left_to_make(cfg, list_jobs(cfg, requests))
    if start is None or not jobs:
        return jobs
    asked = list({job.request.index: job.request for job in jobs}.values())
    refined = {request.index: request for request in refine_requests(asked, cfg, start())}
    return [dataclasses.replace(job, request=refined[job.request.index]) for job in jobs]


def with_local_references(jobs: Sequence[Job], requests: Sequence[Request]) -> list[Job]:
    """Jobs that another process settled, with the reference files of this one."""
    own = {request.index: request.refs for request in requests}
    return [
        dataclasses.replace(job, request=dataclasses.replace(job.request, refs=own[job.request.index])) for job in jobs
    ]
