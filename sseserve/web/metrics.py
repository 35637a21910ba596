"""The metrics at ``/metrics``, in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from ..live.broker import Broker
from ..metrics import Counters
from ..model import State
from ..progress.queue import JobQueue
from ..progress.tracker import Tracker

__all__ = ["Metrics"]


class Metrics(Collector):
    """The collector of one server, in a registry of its own.

    Args:
        counters: of connections and messages.
        broker: counts subscribers and deliveries.
        queue: counts the jobs that wait.
        tracker: has the engine, and counts what it could not store.
        worker: the number of this process, if it is one of several on the port. It is a label of all samples,
            as whoever asks gets those of any of them.
    """

    def __init__(
        self,
        counters: Counters,
        broker: Broker,
        queue: JobQueue,
        tracker: Tracker,
        worker: int | None = None,
    ) -> None:
        self._counters = counters
        self._broker = broker
        self._queue = queue
        self._tracker = tracker
        self._labels = {} if worker is None else {"worker": str(worker)}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not collect."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Make the samples of this moment."""
        for family in self._families():
            family.samples = [
                sample._replace(labels={**self._labels, **sample.labels}) for sample in family.samples
            ]
            yield family

    def _families(self) -> Iterable[Metric]:
        counters, broker = self._counters, self._broker.statistics()
        yield GaugeMetricFamily("sseserve_connections", "Open connections.", counters.connections)
        yield GaugeMetricFamily("sseserve_topics", "Sessions that are watched now.", broker.topics)
        streams = GaugeMetricFamily("sseserve_subscribers", "Live watchers.", labels=["protocol", "dialect"])
        counts: dict[tuple[str, str], int] = {}
        for encoding, count in self._broker.watchers.by_encoding.items():
            label: tuple[str, str] = (encoding.protocol, encoding.dialect.name)
            counts[label] = counts.get(label, 0) + count
        for label, count in sorted(counts.items()):
            streams.add_metric(label, count)
        yield streams
        durations = SummaryMetricFamily(
            "sseserve_stream_duration_seconds",
            "From a watcher's coming to its end, for each that has ended.",
            labels=["protocol", "dialect"],
        )
        for label, (count, seconds) in sorted(self._broker.watchers.ended.items()):
            durations.add_metric(label, count, seconds)
        yield durations
        finished = CounterMetricFamily("sseserve_sessions_finished", "Sessions ended.", labels=["state"])
        for state in State:
            if state.terminal:
                finished.add_metric([state.value], counters.finished.get(state.value, 0))
        yield finished
        yield SummaryMetricFamily(
            "sseserve_session_duration_seconds",
            "From the first update of a session to its end.",
            count_value=sum(counters.finished.values()),
            sum_value=counters.session_seconds,
        )
        yield CounterMetricFamily("sseserve_events", "Events appended to a log.", counters.events)
        yield GaugeMetricFamily(
            "sseserve_engine_up", "Whether events can be stored.", float(self._tracker.engine.problem is None)
        )
        yield CounterMetricFamily(
            "sseserve_append_failures", "Appends that the engine has not done.", self._tracker.failed_appends
        )
        yield CounterMetricFamily("sseserve_batches", "Batches fanned out.", broker.batches)
        yield CounterMetricFamily("sseserve_deliveries", "Events offered to watchers.", broker.delivered)
        yield CounterMetricFamily(
            "sseserve_conflated", "Deliveries dropped for newer progress.", broker.conflated
        )
        yield SummaryMetricFamily(
            "sseserve_delivery_seconds",
            "From the log to the last watcher, for each batch.",
            count_value=broker.batches,
            sum_value=broker.latency,
        )
        yield CounterMetricFamily(
            "sseserve_resumed", "Watchers that came back with a cursor.", broker.resumed
        )
        yield CounterMetricFamily("sseserve_cut", "Watchers cut for being too slow.", broker.cut)
        yield CounterMetricFamily("sseserve_heartbeats", "Heartbeats sent.", broker.heartbeats)
        yield GaugeMetricFamily(
            "sseserve_jobs_waiting", "Jobs in the queue of all instances.", self._queue.waiting
        )
        yield CounterMetricFamily(
            "sseserve_bad_messages", "Invalid Pub/Sub messages dropped.", counters.invalid_messages
        )
        yield SummaryMetricFamily(
            "sseserve_pubsub_seconds",
            "From publishing in Pub/Sub to the log, for each message.",
            count_value=counters.pubsub_messages,
            sum_value=counters.pubsub_latency,
        )
        messages = CounterMetricFamily(
            "sseserve_channel_messages",
            "Messages of Redis channels: recorded here, by another instance (repeated), refused, dropped, "
            "written.",
            labels=["system", "result"],
        )
        for (system, result), count in sorted(counters.channel_messages.items()):
            messages.add_metric([system, result], count)
        yield messages
        failures = CounterMetricFamily(
            "sseserve_background_failures", "Failures of background services.", labels=["service"]
        )
        for service, count in counters.background_failures.items():
            failures.add_metric([service], count)
        yield failures
        refused = CounterMetricFamily(
            "sseserve_refused",
            "Connections and requests refused, by the setting whose limit they exceed.",
            labels=["limit"],
        )
        for limit, count in counters.refused.items():
            refused.add_metric([limit], count)
        yield refused

    def render(self) -> bytes:
        """Write the samples in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)
