"""From a config to files: every prompt of a run, made, saved and recorded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.acceleration.rank_zero import from_rank_zero
from opensora.acceleration.torchrun import Torchrun
from opensora.config.commands import InferenceOptions
from opensora.diffusion.decode import DecodeMemoryError, Dropped, FrameSink
from opensora.diffusion.pipeline import SampleResult, VideoPipeline
from opensora.diffusion.prepared import PreparedRun, check_parallelism
from opensora.diffusion.references import check_references
from opensora.diffusion.solvers import StepCallback
from opensora.diffusion.trained import note_untrained
from opensora.diffusion.windows import is_long
from opensora.generation import outputs
from opensora.generation.dry_run import dry_run_report
from opensora.generation.jobs import Job, hold_jobs, left_to_make, list_jobs, settle_jobs, with_local_references
from opensora.generation.refine import make_asker, wants_language_model
from opensora.generation.requests import Request, read_requests, where_of_ref
from opensora.generation.room import check_room
from opensora.generation.sample_files import SampleFiles
from opensora.generation.writer import SampleWriter
from opensora.utils.download import naming_addresses
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.main import doing
from opensora.utils.progress import Bar
from opensora.utils.temporary import TemporaryFolder

logger = get_logger(__name__)


def generate(
    cfg: InferenceOptions,
    device: torch.device,
    processes: Torchrun | None = None,
    environment: Mapping[str, str] | None = None,
    log: Callable[[str], None] = tqdm.write,
) -> list[Path]:
    """Make and save everything that a config asks for.

    All that can be wrong is found before weights are loaded and before anything is written.

    Args:
        cfg: resolved config.
        device: where the models work.
        processes: place of this one among those of the run; None: there is only this one. The samples are divided over
            the ranks (or groups of ranks with a parallel ``plugin``), each made once.
        environment: where the key of a language model may stand, see :func:`opensora.generation.refine.make_asker`.
        log: gets a line per saved file.

    Returns:
        Videos and images written by this rank.

    Raises:
        UserError: see :mod:`opensora.diffusion.prepared`.
    """
    processes = processes or Torchrun()
    with TemporaryFolder() as downloads, naming_addresses(downloads), ExitStack() as held:
        requests = read_requests(cfg, downloads)
        run = PreparedRun.of(cfg, device)
        cfg = run.cfg
        check_parallelism(cfg, run.models["model"], processes.world_size)
        check_requests(run, requests)
        if cfg.dry_run:
            jobs = list_jobs(cfg, requests)
            if processes.rank == 0:
                log(dry_run_report(run, jobs))
            run.check_resources()
            check_room(run, requests)
            left_to_make(cfg, jobs)
            return []
        run.check_resources()
        check_room(run, requests)
        start = make_asker(cfg, environment or {}) if wants_language_model(cfg, requests) else None
        jobs = from_rank_zero(
            lambda: settle_jobs(cfg, requests, start, held), device, processes.rank, processes.world_size
        )
        parallel = join(cfg, device, processes)
        jobs = with_local_references(jobs, requests)[parallel.dp.rank :: parallel.dp.size]
        if not jobs:
            return []
        if processes.rank:
            hold_jobs(cfg, jobs, held)
        return make_all(VideoPipeline.from_prepared(run, parallel), jobs, log)


def join(cfg: InferenceOptions, device: torch.device, processes: Torchrun) -> ParallelContext:
    """Groups of ranks that make samples together, each rank on its own without a parallel plugin."""
    if processes.world_size == 1:
        return ParallelContext(device=device)
    plugin = cfg.plugin if cfg.plugin == "hybrid" else None  # others do nothing in sampling
    return ParallelContext.create(Sizes.of(plugin, cfg.plugin_config), device)


def check_requests(run: PreparedRun, requests: Sequence[Request]) -> None:
    """See that every prompt of a run can be made and saved.

    Raises:
        UserError: names the row, or the flag.
    """
    plans = {plan.cond_type: plan for plan in run.plans(request.cond_type for request in requests)}
    note_untrained(run.sections.get("model"), plans)
    for request in requests:
        if request.next_texts and not is_long(run.cfg.sampling_option):
            name = "--next_prompts" if request.where == "--prompt" else f"{request.where}: text_2"
            option = run.cfg.sampling_option
            raise UserError(
                f"{name} is of a second window, and num_frames={option.num_frames} is made at once "
                f"(sampling_option.window={option.window}): ask for more frames, or leave it out"
            )
        try:
            if request.refs:
                check_references(request.refs, request.cond_type, run.plan.spec, plans[request.cond_type])
        except UserError as error:
            raise UserError(f"{where_of_ref(request.where)}: {error}") from None
    outputs.check_stems(run.cfg, requests)
    outputs.check_writable(run.cfg.save_dir)


def make_all(pipe: VideoPipeline, jobs: Sequence[Job], log: Callable[[str], None]) -> list[Path]:
    """Make the samples of this rank's group; its first rank writes them and gets their files."""
    cfg, hidden = pipe.cfg, pipe.parallel.rank != 0
    writer = SampleWriter(cfg, log) if pipe.parallel.sample.first else None
    made = []
    with Bar(total=len(jobs), desc="samples", unit="sample", disable=hidden) as bar:
        for batch in _batches(jobs, cfg.batch_size):
            shown = Bar(desc=batch[0].request.text[:40], unit="step", leave=False, disable=hidden)
            with nullcontext() if writer is None else writer.files(batch) as files:
                kept = writer is not None and is_long(cfg.sampling_option)
                folders = [writer.windows(job) for job in batch] if writer is not None and kept else None
                with doing(", ".join(job.request.where for job in batch)), shown as steps:
                    result = _make(pipe, batch, writer, _shown_on(steps), files, folders)
                if writer is not None and files is not None:
                    made += [writer.sample(job, result, index, files) for index, job in enumerate(batch)]
            bar.update(len(batch))
    return made


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


def _shown_on(bar: Bar) -> StepCallback:
    def on_step(step: int, total: int, latents: Tensor) -> None:
        bar.total = total
        bar.update(step - bar.n)

    return on_step


def _make(
    pipe: VideoPipeline,
    batch: Sequence[Job],
    writer: SampleWriter | None,
    on_step: StepCallback,
    files: SampleFiles | None,
    folders: Sequence[Path] | None,
) -> SampleResult:
    """Sample a batch, frames to ``files`` as they are decoded; pictures made on the way, and latents that cannot be
    decoded, are saved at once."""
    requests = [job.request for job in batch]

    def on_sampled(result: SampleResult) -> FrameSink:
        if writer is not None:
            writer.latents(batch, result)
        return files or Dropped()

    try:
        return pipe.make(
            [request.final_text for request in requests],
            [list(request.refs) for request in requests],
            requests[0].cond_type,
            [job.seed for job in batch],
            [request.neg for request in requests],
            on_step=on_step,
            image_texts=[request.picture_text for request in requests] if pipe.cfg.use_t2i2v else None,
            on_images=None if writer is None else lambda images: writer.pictures(batch, images),
            on_sampled=on_sampled,
            next_texts=[request.next_final_texts for request in requests],
            folders=folders,
        )
    except DecodeMemoryError as error:
        if writer is None:
            raise
        raise writer.undecoded(batch, error) from error
