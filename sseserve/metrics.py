"""What Prometheus reads at ``/metrics``.

The hot path only counts in plain integers; they are turned into samples when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from .context import Context

__all__ = ["Metrics"]


class Metrics(Collector):
    """The collector of one server, in a registry of its own."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: it keeps the registry from collecting before the server is complete."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Make the samples of this moment."""
        context, broker = self._context, self._context.broker.statistics()
        yield GaugeMetricFamily("sseserve_connections", "Open connections.", context.connections)
        yield GaugeMetricFamily("sseserve_topics", "Sessions that somebody watches now.", broker.topics)
        streams = GaugeMetricFamily("sseserve_subscribers", "Live watchers.", labels=["protocol", "dialect"])
        counts: dict[tuple[str, str], int] = {}
        for subscriber in context.broker.subscribers():
            label: tuple[str, str] = (subscriber.encoding.protocol, subscriber.encoding.dialect.name)
            counts[label] = counts.get(label, 0) + 1
        for label, count in sorted(counts.items()):
            streams.add_metric(label, count)
        yield streams
        yield CounterMetricFamily("sseserve_events", "Events taken into a log.", broker.events)
        yield CounterMetricFamily("sseserve_batches", "Batches fanned out.", broker.batches)
        yield CounterMetricFamily("sseserve_deliveries", "Events offered to watchers.", broker.delivered)
        yield CounterMetricFamily(
            "sseserve_conflated", "Deliveries dropped for newer progress.", broker.conflated
        )
        yield CounterMetricFamily("sseserve_cut", "Watchers cut for being too slow.", broker.cut)
        yield CounterMetricFamily("sseserve_heartbeats", "Heartbeats sent.", broker.heartbeats)
        yield GaugeMetricFamily(
            "sseserve_jobs_waiting", "Jobs that wait for their turn.", context.jobs.waiting
        )
        yield CounterMetricFamily("sseserve_bad_messages", "Pub/Sub messages dropped.", context.bad_messages)
        yield CounterMetricFamily("sseserve_refused", "Connections refused at the door.", context.refused)

    def render(self) -> bytes:
        """Write the samples in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)
