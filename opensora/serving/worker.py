"""The worker: the one process (or group of ranks) that owns the device and makes the jobs, one after another.

``python -m opensora.serving.worker SETTINGS`` is started by the server, which restarts it when it ends. It keeps its
models loaded. What a job runs into is written into the job in the words of the command line; after anything but a
user's mistake (out of memory, above all) the worker ends as well, so that the next job finds a device in order.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.devices import pick_device
from opensora.acceleration.failures import reported_once
from opensora.acceleration.parallel_context import ParallelContext, launch, shutdown
from opensora.acceleration.torchrun import Torchrun
from opensora.config import load_config
from opensora.config.commands import ServeOptions
from opensora.diffusion.lora import split_lora
from opensora.diffusion.offload import on_device
from opensora.diffusion.pipeline import SampleResult, VideoPipeline
from opensora.diffusion.plan import SamplePlan
from opensora.generation.refine import Ask, make_asker, refine_requests, wants_language_model
from opensora.generation.requests import Request
from opensora.generation.run import join
from opensora.generation.writer import SampleWriter
from opensora.models.autoencoder import as_autoencoder
from opensora.serving.desk import Desk, Prepared
from opensora.serving.folders import PREVIEW, READY, SHEET, THUMBNAIL, Folders
from opensora.serving.jobs import Gone, Job, JobStore
from opensora.serving.preview import ColourMap, Denoised, write_preview, write_sheet, write_thumbnail
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger, setup_logging
from opensora.utils.main import doing, run_main, told_of

logger = get_logger(__name__)

POLL = 0.05  # seconds between looks into the queue
BEAT = 60.0  # seconds after which the ranks hear from the first one, work or not
WATCH = 0.25  # seconds between looks at whether the server lives
PREVIEWS = 0.4  # seconds between previews of a job
PATIENCE = timedelta(days=1)  # of ranks that wait for the first one


class Worker:
    """Makes jobs.

    Args:
        desk: says how.
        pipe: the models.
        store: the jobs.
        folders: where their files are.
    """

    def __init__(self, desk: Desk, pipe: VideoPipeline, store: JobStore, folders: Folders) -> None:
        self.desk, self.pipe, self.store, self.folders = desk, pipe, store, folders
        self.first = pipe.parallel.rank == 0
        self.writer = SampleWriter(desk.cfg, logger.info) if self.first else None
        with on_device(pipe.models["ae"], pipe.device, pipe.cfg.offload) as ae:
            self.colours = ColourMap.of(as_autoencoder(ae), pipe.device, pipe.dtype)
        self._ask: Ask | None = None

    def run(self, ends: Callable[[], bool] = lambda: False) -> None:
        """Make jobs until ``ends``, which the first rank is asked between jobs."""
        while (jobs := self._next(ends)) is not None:
            if jobs:
                self.make(jobs)

    def _next(self, ends: Callable[[], bool]) -> list[Job] | None:
        """The next batch, for all ranks; none now and then while nothing waits, None at the end."""
        jobs: list[Job] | None = []
        beat = time.monotonic() + BEAT
        while self.first and not jobs and time.monotonic() < beat:
            if ends():
                jobs = None
                break
            jobs = self.store.take(self.desk.cfg.batch_size)
            if not jobs:
                time.sleep(POLL)
        return collectives.broadcast_object(jobs, self.pipe.parallel.host)

    def make(self, jobs: Sequence[Job]) -> None:
        """Make a batch of jobs of equal shape; what goes wrong is written into them. A batch that fails is made one by
        one, so that no job fails for another's sake.

        Raises:
            Exception: something other than a user's mistake, which leaves the device in doubt.
        """
        try:
            self._make(jobs)
        except Gone:
            logger.info("stopped: %s", ", ".join(job.id for job in jobs))
        except UserError as error:
            self._fail(jobs, "generation_failed", str(error))
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            self._fail(jobs, "out_of_memory" if memory else "server_error", told_of(error))
            raise
        finally:
            self._tidy(jobs)

    def _make(self, jobs: Sequence[Job]) -> None:
        try:
            batch = [self._prepare(job) for job in jobs]
            progress = Progress(self, jobs, _denoised(batch[0].plan))
            self._use_lora(batch[0].lora)
            result = self._sample(jobs, batch, progress)
        except (UserError, torch.OutOfMemoryError) as error:
            if len(jobs) == 1:
                raise
            logger.warning("a batch of %d fails, its jobs are made one by one: %s", len(jobs), told_of(error))
            self._one_by_one(jobs)
            return
        for index, job in enumerate(jobs if self.first else ()):
            if job.id in progress.living:
                self._keep(job, batch[index], result, index)

    def _keep(self, job: Job, prepared: Prepared, result: SampleResult, index: int) -> None:
        """Save a sample, unless its job is cancelled or deleted meanwhile, whose folder may go at any moment."""
        try:
            self._save(job, prepared, result, index)
        except Gone:
            logger.info("made in vain: %s", job.id)
        except OSError:
            if self.store.get(job.id) is not None:
                raise
            logger.info("made in vain: %s", job.id)

    def _one_by_one(self, jobs: Sequence[Job]) -> None:
        if self.pipe.device.type == "cuda":
            torch.cuda.empty_cache()
        for job in jobs:
            self.make([job])

    def _prepare(self, job: Job) -> Prepared:
        prepared = self.desk.prepared(job, self.folders.of(job.id))
        if not wants_language_model(prepared.cfg, [prepared.request]):
            return prepared
        refined = self._refined(prepared) if self.first else None
        return dataclasses.replace(
            prepared, request=collectives.broadcast_object(refined, self.pipe.parallel.host) or prepared.request
        )

    def _use_lora(self, entry: str | None) -> None:
        """Have an adapter (``PATH@strength``) on the model, or none; it stays for the jobs that want it as well."""
        if [each.entry for each in self.pipe.loras] == ([] if entry is None else [entry]):
            return
        self.pipe.unload_lora()
        if entry is not None:
            self.pipe.load_lora(*split_lora(entry))

    def _refined(self, prepared: Prepared) -> Request:
        self._ask = self._ask or make_asker(prepared.cfg, self.desk.environment)()
        return refine_requests([prepared.request], prepared.cfg, self._ask)[0]

    def _sample(self, jobs: Sequence[Job], batch: Sequence[Prepared], progress: "Progress") -> SampleResult:
        requests = [prepared.request for prepared in batch]
        pictures = self.pipe.cfg.use_t2i2v
        with doing(", ".join(job.id for job in jobs)):
            return self.pipe.make(
                [request.final_text for request in requests],
                [list(request.refs) for request in requests],
                requests[0].cond_type,
                [prepared.seed for prepared in batch],
                [request.neg for request in requests],
                batch[0].cfg.sampling_option,
                progress,
                image_texts=[request.picture_text for request in requests] if pictures else None,
                next_texts=[request.next_final_texts for request in requests],
            )

    def _save(self, job: Job, prepared: Prepared, result: SampleResult, index: int) -> None:
        """Write a sample; the video is in place before the job is said to be completed."""
        assert self.writer is not None
        start, folder = time.perf_counter(), self.folders.of(job.id)
        sample, frames = prepared.sample(self.folders.stem(job.id)), result.frames[index]
        write_thumbnail(frames, folder / THUMBNAIL)
        write_sheet(frames, folder / SHEET)
        self.writer.with_config(prepared.cfg, prepared.lora).sample(sample, result, index)
        seconds = {**result.timings, "write": time.perf_counter() - start}
        self.colours.show(result.latents[index], torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1)
        facts = {"text": result.texts[index], "forwards": result.plan.forwards}
        self.store.complete(job, facts, {stage: round(value, 3) for stage, value in seconds.items()})

    def _fail(self, jobs: Sequence[Job], code: str, message: str) -> None:
        logger.warning("%s: %s", ", ".join(job.id for job in jobs), message)
        for job in jobs if self.first else ():
            try:
                self.store.fail(job, code, message.replace(str(self.folders.of(job.id)) + "/", ""))
            except Gone:
                continue

    def _tidy(self, jobs: Sequence[Job]) -> None:
        """Delete previews, and all that was written of jobs that were deleted meanwhile."""
        for job in jobs if self.first else ():
            (self.folders.of(job.id) / PREVIEW).unlink(missing_ok=True)
            if self.store.get(job.id) is None:
                self.folders.remove(job.id)


def _denoised(plan: SamplePlan) -> Denoised:
    return Denoised(plan.times, plan.windows.count if plan.windows is not None else 1)


class Progress:
    """Notes the steps of a batch, shows its latents, and stops it once nobody wants it any more.

    Args:
        worker: that makes it.
        jobs: of the batch.
        denoised: what the latents are becoming.

    Attributes:
        living: names of those that somebody still wants.
    """

    def __init__(self, worker: Worker, jobs: Sequence[Job], denoised: Denoised) -> None:
        self.worker, self.jobs, self.denoised = worker, jobs, denoised
        self.living = {job.id for job in jobs}
        self._shown = 0.0

    def __call__(self, step: int, total: int, latents: Tensor) -> None:
        """A :data:`opensora.diffusion.solvers.StepCallback`.

        Raises:
            Gone: all jobs were cancelled or deleted; on every rank at the same step.
        """
        if self.worker.first:
            self._note(step, total, latents)
        left = collectives.broadcast_object(len(self.living), self.worker.pipe.parallel.host)
        if not left:
            raise Gone

    def _note(self, step: int, total: int, latents: Tensor) -> None:
        shows, seen = time.monotonic() - self._shown > PREVIEWS, self.denoised(step, total, latents)
        for index, job in enumerate(self.jobs):
            if job.id not in self.living:
                continue
            try:
                self.worker.store.advance(job, step, total)
            except Gone:
                self.living.discard(job.id)
                continue
            if shows:
                with suppress(OSError):  # its folder may go at any moment, and a preview is not worth a failure
                    write_preview(seen[index], self.worker.colours, self.worker.folders.of(job.id) / PREVIEW)
        self._shown = time.monotonic() if shows else self._shown


def read_settings(path: Path) -> tuple[ServeOptions, int, float]:
    """What the server wrote for its worker: the config, and the server's process number and start."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return load_config(content["config"], ServeOptions), content["pid"], content["started"]


def watch(pid: int, started: float) -> None:
    """End this process, whatever it does, soon after the server has ended."""
    import psutil

    parent = os.getppid()  # the server, or torchrun

    def look() -> None:
        while os.getppid() == parent and psutil.pid_exists(pid) and psutil.Process(pid).create_time() == started:
            time.sleep(WATCH)
        os._exit(0)

    threading.Thread(target=look, name="watch", daemon=True).start()


def join_ranks(cfg: ServeOptions, device: torch.device, processes: Torchrun) -> ParallelContext:
    """The ranks of the worker, all of which make each video together.

    Raises:
        UserError: the config's parallelism uses fewer.
    """
    if processes.world_size > 1:
        launch(device, PATIENCE)
    parallel = join(cfg, device, processes)
    if parallel.dp.size > 1:
        raise UserError(
            f"worker_processes={cfg.worker_processes}: the config's plugin and plugin_config have "
            f"{cfg.worker_processes // parallel.dp.size} of them make a video together; all have to"
        )
    return parallel


def main(argv: list[str] | None = None) -> None:
    """Load the models and make jobs until the server ends."""
    settings = Path((sys.argv[1:] if argv is None else argv)[0])
    processes = Torchrun.read(os.environ)
    setup_logging(rank=processes.rank)
    with reported_once(os.environ):
        cfg, pid, started = read_settings(settings)
        watch(pid, started)
        folders = Folders(cfg.data_dir)
        with nullcontext() if processes.rank else claimed(folders.worker, is_folder=False, wait=True):
            device = pick_device(cfg.device, processes.local_rank)
            desk = Desk(cfg, device, os.environ)
            pipe = VideoPipeline.from_prepared(desk.run, join_ranks(cfg, device, processes))
            worker = Worker(desk, pipe, JobStore(folders.database), folders)
            if worker.first:
                (folders.root / READY).write_text(str(os.getpid()), encoding="ascii")
                logger.info("ready")
            worker.run()
    shutdown()


if __name__ == "__main__":
    run_main(main)
