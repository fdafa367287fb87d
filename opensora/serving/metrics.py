"""What a server tells Prometheus. Counts are those of the database, so that they continue after a restart."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from opensora.serving.jobs import IN_PROGRESS, QUEUED
from opensora.serving.service import Service


class JobCollector(Collector):
    """Reads the metrics of a service when it is asked for them."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        store, supervisor = self.service.store, self.service.supervisor
        counts = store.counts()
        yield GaugeMetricFamily("opensora_queue_length", "Jobs that wait", counts[QUEUED])
        yield GaugeMetricFamily("opensora_jobs_in_progress", "Jobs that are being made", counts[IN_PROGRESS])
        yield _counter("opensora_jobs_finished", "Jobs by how they ended", "status", store.totals("finished"))
        yield _counter("opensora_failures", "Jobs that failed, by why", "code", store.totals("failures"))
        stages = SummaryMetricFamily("opensora_stage_seconds", "Seconds of completed jobs by stage", labels=["stage"])
        runs, seconds = store.totals("stage_runs"), store.totals("stage_seconds")
        for stage in sorted(runs):
            stages.add_metric([stage], int(runs[stage]), seconds[stage])
        yield stages
        if supervisor is not None:
            yield GaugeMetricFamily("opensora_worker_ready", "Whether models are loaded", supervisor.state == "ready")
            yield CounterMetricFamily("opensora_worker_starts", "Starts of the worker", supervisor.starts)


def _counter(name: str, help: str, label: str, values: dict[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=[label])
    for value in sorted(values):
        family.add_metric([value], values[value])
    return family


def registry_of(service: Service) -> CollectorRegistry:
    """A registry of this service alone."""
    registry = CollectorRegistry()
    registry.register(JobCollector(service))
    return registry
