"""The same work on a Ray cluster, by Ray Data: actors that load their models once, results that come as they are done.

Ray repeats a block whose actor or node is gone, for ever if need be. A file that crashes its decoder would then hold up
the run, so each actor works through a process of its own: the crash ends that one, and the file alone is given up.
"""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from opensora.utils.errors import UserError
from opensora.utils.optional import require
from tools.data.engine.runners import DIED, Job, LocalRunner, Outcomes, do_job, make_pool
from tools.data.engine.stage import Stage
from tools.data.engine.store import Failure

ROWS_PER_BLOCK = 8  # go to an actor together and come back together: what the loss of a node costs at most
BLOCKS_PER_WORKER = 4  # at least, so that none waits for the last one


class Actor:
    """Does jobs in a process that it starts, and starts another where a job has ended it."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # Ray has counted one core for this actor
        return make_pool(self.stages, 1, sharing=os.cpu_count() or 1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """A batch with a column ``job`` of pickled jobs (which Arrow holds as they are); the same with ``outcomes``."""
        jobs = [pickle.loads(data) for data in batch["job"]]
        return {"job": list(batch["job"]), "outcomes": [pickle.dumps(self._do(job)) for job in jobs]}

    def _do(self, job: Job) -> Outcomes | UserError:
        try:
            return self.pool.submit(do_job, job).result()
        except UserError as error:  # the stages cannot start; raised here, it would reach the user in Ray's wrappings
            return error
        except BrokenProcessPool:
            self.pool = self._start()
            return {name: Failure(DIED) for name in job.keys}


@dataclass(frozen=True)
class RayRunner:
    """A Ray cluster: the one that ``ray start`` or ``RAY_ADDRESS`` made known, else one on this machine.

    Input and output folders must be visible under the same paths on all nodes. Rows that are done are kept in the
    stage's shards by the process that started the run, so a lost node or a killed run costs only the blocks in flight.
    Stages that wait for an endpoint do so in that process.

    Args:
        workers: actors; each takes one CPU, or one GPU where a stage's device is cuda.
    """

    workers: int

    def run(self, stages: Sequence[Stage], jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcomes]]:
        """Every job with its outcomes, as they come.

        Raises:
            UserError: Ray is not installed, or the stages cannot start.
        """
        if stages[0].concurrency:
            yield from LocalRunner(0).run(stages, jobs)
            return
        ray = _ray()
        if not ray.is_initialized():  # it stays for the next stages, and ends with this process
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        for job, outcomes in self._outcomes(ray, list(stages), list(jobs)):
            if isinstance(outcomes, UserError):
                raise outcomes
            yield job, outcomes

    def _outcomes(self, ray: Any, stages: list[Stage], jobs: list[Job]) -> Iterator[tuple[Job, Outcomes | UserError]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the pipeline has one
        context.execution_options.preserve_order = False
        gpus = 1 if any(stage.device != "cpu" for stage in stages) else 0
        workers = min(self.workers, len(jobs))
        blocks = max(-(-len(jobs) // ROWS_PER_BLOCK), min(workers * BLOCKS_PER_WORKER, len(jobs)))
        rows = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=blocks)
        done = rows.map_batches(
            Actor,
            fn_constructor_args=(stages,),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            yield pickle.loads(row["job"]), pickle.loads(row["outcomes"])


def _ray() -> Any:
    require("ray.data", "runner 'ray'", "`pip install 'ray[data]'`")
    import ray

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)  # its plans and timings stay in its log file
    return ray
