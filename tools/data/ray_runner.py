"""The same work on a Ray cluster: one actor per worker, which loads its models once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from opensora.utils.errors import UserError
from tools.data.runners import AHEAD, DIED, Job, Outcomes, Work, make_work
from tools.data.stage import Stage
from tools.data.store import Failure


class Actor:
    """Holds the work of a group of stages in a process of the cluster."""

    def __init__(self, stages: list[Stage]) -> None:
        import cv2

        cv2.setNumThreads(1)
        self.work: Work = make_work(stages)

    def do(self, job: Job) -> Outcomes:
        """One job."""
        return self.work(job)


@dataclass(frozen=True)
class RayRunner:
    """A Ray cluster: the one that ``ray start`` or ``RAY_ADDRESS`` made known, else one on this machine.

    Input and output folders must be visible under the same paths on all nodes. Rows that are done are kept in the
    stage's shards by the process that started the run, so a lost node or a killed run costs only the rows in flight.

    Args:
        workers: actors; each takes one CPU, or one GPU where a stage's device is cuda.
    """

    workers: int

    def run(self, stages: Sequence[Stage], jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcomes]]:
        """Every job with its outcomes, as they come."""
        ray = _ray()
        started = not ray.is_initialized()
        if started:
            ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
        try:
            yield from self._run(ray, list(stages), iter(jobs))
        finally:
            if started:
                ray.shutdown()

    def _run(self, ray: Any, stages: list[Stage], jobs: Iterator[Job]) -> Iterator[tuple[Job, Outcomes]]:
        gpus = 1 if any(stage.settings.get("device", "cpu") != "cpu" for stage in stages) else 0
        waiting = stages[0].io_bound
        threads = int(stages[0].settings["concurrency"]) if waiting else 1
        count = 1 if waiting else self.workers
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_concurrency=threads)(Actor)
        actors = [remote.remote(stages) for _ in range(count)]
        flying: dict[Any, tuple[Job, int]] = {}
        load = [0] * count
        while True:
            for job in islice(jobs, count * threads * AHEAD - len(flying)):
                place = load.index(min(load))
                load[place] += 1
                flying[actors[place].do.remote(job)] = (job, place)
            if not flying:
                return
            (reference, *_), _ = ray.wait(list(flying), num_returns=1)
            job, place = flying.pop(reference)
            load[place] -= 1
            yield job, self._outcome(ray, reference, job, stages, remote)

    @staticmethod
    def _outcome(ray: Any, reference: Any, job: Job, stages: list[Stage], remote: Any) -> Outcomes:
        try:
            return ray.get(reference)
        except ray.exceptions.ActorDiedError as error:
            raise UserError(f"stage '{stages[0].name}' cannot start on Ray: {error}") from error
        except ray.exceptions.ActorUnavailableError:
            pass
        alone = remote.remote(stages)  # this job or one beside it ended the actor; alone it shows which
        try:
            return ray.get(alone.do.remote(job))
        except ray.exceptions.RayActorError:
            return {name: Failure(DIED) for name in job.keys}
        finally:
            ray.kill(alone)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("runner 'ray' needs the library ray: pip install ray") from error
    return ray
