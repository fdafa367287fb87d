"""The samples of a run: their seeds, their file names, and which of them are left to make."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from opensora.config.commands import InferenceOptions
from opensora.generation import outputs
from opensora.generation.refine import Ask, refine_requests
from opensora.generation.requests import Request
from opensora.utils.claims import POLL_SECONDS, Holder, NameClaims, TakenError, claimed, no_empty_folders
from opensora.utils.errors import UserError
from opensora.utils.files import remove_unfinished_files
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
        return (request.seed + epoch) % 2**63
    return random.Random(f"{run_seed}/{request.index}/{epoch}").getrandbits(32)


def list_jobs(cfg: InferenceOptions, requests: Sequence[Request], being_made: Container[str] = ()) -> list[Job]:
    """The samples of a run, all prompts once before any is repeated.

    A prompt of the command line takes the first number whose files are free (or, with ``skip_existing``, that it has
    itself), so that ``prompt_0000`` of an earlier run stays.

    Args:
        cfg: resolved config.
        requests: its prompts.
        being_made: names of files, without ending, that other processes are making.
    """
    if cfg.prompt is not None and not (cfg.prompt_as_path or cfg.overwrite):
        requests = [_numbered(cfg, request, being_made) for request in requests]
    return [_job(cfg, request, epoch) for epoch in range(cfg.num_sample) for request in requests]


def _job(cfg: InferenceOptions, request: Request, epoch: int) -> Job:
    stem = outputs.output_folder(cfg) / outputs.file_stem(cfg, request, epoch)
    return Job(request, epoch, job_seed(cfg.seed, request, epoch), stem)


def _numbered(cfg: InferenceOptions, request: Request, being_made: Container[str]) -> Request:
    for number in itertools.count():
        named = dataclasses.replace(request, name=f"prompt_{number:04d}")
        stems = [_job(cfg, named, epoch).stem for epoch in range(cfg.num_sample)]
        if any(stem.name in being_made for stem in stems):
            continue
        taken = [stem for stem in stems if outputs.is_taken(stem)]
        if not taken or (cfg.skip_existing and all(_same_prompt(stem, request) for stem in taken)):
            return named
    raise AssertionError("numbers do not end")


def _same_prompt(stem: Path, request: Request) -> bool:
    """Whether files belong to a prompt, as far as they tell (those of other programs may not)."""
    return outputs.recorded_prompt(stem) in (None, request.text)


def left_to_make(
    cfg: InferenceOptions, jobs: Sequence[Job], being_made: Mapping[str, Holder] | None = None
) -> list[Job]:
    """The jobs that a run has to do: all, or with ``skip_existing`` those whose video is not there.

    Args:
        cfg: resolved config.
        jobs: all of them.
        being_made: what other processes are making, by the files' name without ending.

    Raises:
        TakenError: another process makes one of them, and ``skip_existing`` does not leave it to that one.
        UserError: files are in the way, and neither ``skip_existing`` nor ``overwrite`` says what to do with them.
    """
    jobs = _left_by_others(cfg, jobs, being_made or {})
    if cfg.overwrite:
        return jobs
    in_the_way = [job for job in jobs if outputs.is_taken(job.stem)]
    if cfg.skip_existing:
        for job in in_the_way:
            if not _same_prompt(job.stem, job.request):
                raise UserError(
                    f"{job.request.where}: {job.stem} holds another prompt, "
                    f"{outputs.recorded_prompt(job.stem)!r}: give another --save-dir or --save-prefix, or "
                    "--overwrite True to replace it"
                )
            if foreign := outputs.foreign_note(job.stem):
                raise UserError(
                    f"{job.request.where}: {foreign} is not of this program: give another --save-dir or --save-prefix, "
                    "or --overwrite True to replace it"
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
    return jobs


def _left_by_others(cfg: InferenceOptions, jobs: Sequence[Job], being_made: Mapping[str, Holder]) -> list[Job]:
    """Jobs that no other process is making; see :func:`left_to_make`."""
    theirs = [job for job in jobs if job.stem.name in being_made]
    if theirs and not cfg.skip_existing:
        holder = being_made[theirs[0].stem.name]
        raise TakenError(
            f"{theirs[0].stem} is being made by {holder.describe()}; --wait True waits for it, "
            "--skip-existing True leaves it to that process, --save-dir or --save-prefix writes elsewhere"
        )
    if theirs:
        logger.info("%d samples are being made by another process", len(theirs))
    return [job for job in jobs if job.stem.name not in being_made]


def claim_jobs(cfg: InferenceOptions, requests: Sequence[Request], held: ExitStack) -> list[Job]:
    """The jobs of a run, claimed against other processes until ``held`` is closed.

    Files that killed runs were writing into the folder are deleted where no other process is at work.

    Raises:
        UserError: see :func:`left_to_make`.
    """
    folder = outputs.output_folder(cfg)
    held.enter_context(no_empty_folders(folder))
    while True:
        try:
            with claimed(folder, wait=True):
                claims = NameClaims(folder)
                if not claims.holders:
                    remove_unfinished_files(folder)
                jobs = left_to_make(cfg, list_jobs(cfg, requests, claims.holders), claims.holders)
                held.callback(claims.take([job.stem.name for job in jobs]).release)
                return jobs
        except TakenError:
            if not cfg.wait:
                raise
            time.sleep(POLL_SECONDS)


def hold_jobs(cfg: InferenceOptions, jobs: Sequence[Job], held: ExitStack) -> None:
    """Claim jobs that another process of this run has settled, which may end before this one."""
    folder = outputs.output_folder(cfg)
    with claimed(folder, wait=True):
        held.callback(NameClaims(folder).take([job.stem.name for job in jobs]).release)


def settle_jobs(
    cfg: InferenceOptions, requests: Sequence[Request], start: Callable[[], Ask] | None, held: ExitStack
) -> list[Job]:
    """The jobs of a run with everything decided that may be decided only once.

    Args:
        cfg: resolved config.
        requests: its prompts.
        start: gives the language model that is to be asked about them, if there is one.
        held: keeps the jobs from other processes until it is closed.

    Raises:
        UserError: see :func:`left_to_make`.
    """
    jobs = claim_jobs(cfg, requests, held)
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
