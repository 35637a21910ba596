"""The metrics at ``/metrics``, in the Prometheus text format."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ..dialects import Encoding
from ..live.broker import Broker
from ..metrics import Counters, Histogram
from ..model import State
from ..progress.queue import JobQueue
from ..progress.tracker import Tracker
from ..version import package_version

__all__ = ["Metrics"]

_STREAM = ("transport", "dialect")
_PAGE = resource.getpagesize()


class Metrics(Collector):
    """The collector of one server, in a registry of its own.

    The values of all labels are from closed sets: no id, address or name that clients send is among them.

    Args:
        counters: of connections and messages.
        broker: counts streams and deliveries.
        opened: counts the streams that were opened.
        queue: counts the jobs.
        tracker: has the engine, and counts what is appended to it.
        worker: the number of this process, if it is one of several on the port. It is a label of all samples,
            as whoever asks gets those of any of them.
    """

    def __init__(
        self,
        counters: Counters,
        broker: Broker,
        opened: Mapping[Encoding, int],
        queue: JobQueue,
        tracker: Tracker,
        worker: int | None = None,
    ) -> None:
        self._counters = counters
        self._broker = broker
        self._opened = opened
        self._queue = queue
        self._tracker = tracker
        self._labels = {} if worker is None else {"worker": str(worker)}
        self._started_at = time.time()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not collect."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Make the samples of this moment."""
        for families in (
            self._process(),
            self._requests(),
            self._streams(),
            self._deliveries(),
            self._sessions(),
            self._engine(),
            self._systems(),
        ):
            for family in families:
                family.samples = [
                    sample._replace(labels={**self._labels, **sample.labels}) for sample in family.samples
                ]
                yield family

    def _process(self) -> Iterable[Metric]:
        """Of the process, under the names that Prometheus' own clients have for them."""
        info = GaugeMetricFamily("sseserve_build_info", "The version.", labels=["version", "python"])
        info.add_metric([package_version(), platform.python_version()], 1)
        yield info
        yield GaugeMetricFamily(
            "process_start_time_seconds", "When the server has started, in POSIX seconds.", self._started_at
        )
        cpu = CounterMetricFamily("process_cpu_seconds", "CPU time, of user and system.", time.process_time())
        yield cpu
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory.", _resident_memory())
        yield GaugeMetricFamily(
            "process_max_fds", "Limit of open files.", resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        )
        yield _histogram(
            "sseserve_event_loop_lag_seconds",
            "How late a task that runs 20 times a second is.",
            self._counters.loop_lag,
        )
        yield _counter(
            "sseserve_background_failures",
            "Failures of background services.",
            ["service"],
            (((name,), count) for name, count in self._counters.background_failures.items()),
        )

    def _requests(self) -> Iterable[Metric]:
        counters = self._counters
        yield GaugeMetricFamily("sseserve_connections", "Open connections.", counters.connections)
        yield _counter(
            "sseserve_responses",
            "Responses by status, without those that became streams.",
            ["status"],
            (((str(status),), count) for status, count in counters.responses.items()),
        )
        yield _counter(
            "sseserve_refused",
            "Connections and requests refused, by the setting whose limit they exceed.",
            ["limit"],
            (((limit,), count) for limit, count in counters.refused.items()),
        )

    def _streams(self) -> Iterable[Metric]:
        broker, watchers = self._broker.statistics(), self._broker.watchers
        streams = GaugeMetricFamily("sseserve_streams", "Open streams.", labels=_STREAM)
        for label, count in _by_dialect(watchers.by_encoding):
            streams.add_metric(label, count)
        yield streams
        yield _counter("sseserve_streams_opened", "Streams opened.", _STREAM, _by_dialect(self._opened))
        yield _counter(
            "sseserve_streams_closed",
            "Streams that have ended, by the first thing that led to it.",
            [*_STREAM, "reason"],
            self._counters.streams_closed.items(),
        )
        durations = SummaryMetricFamily(
            "sseserve_stream_duration_seconds",
            "How long the streams were open that have ended.",
            labels=_STREAM,
        )
        for label, (count, seconds) in sorted(self._counters.stream_seconds.items()):
            durations.add_metric(label, count, seconds)
        yield durations
        yield GaugeMetricFamily("sseserve_watched_sessions", "Sessions that are watched.", broker.topics)
        yield CounterMetricFamily(
            "sseserve_reconnects", "Streams opened by clients that came with a cursor.", broker.resumed
        )
        yield _counter(
            "sseserve_resumes",
            "Sessions resumed from a cursor: without a loss, after one, or from another log.",
            ["status"],
            (((status,), count) for status, count in self._broker.resumes.items()),
        )
        yield CounterMetricFamily(
            "sseserve_streams_cut", "Streams cut, as their clients were too slow.", broker.cut
        )
        yield CounterMetricFamily("sseserve_heartbeats", "Heartbeats sent.", broker.heartbeats)

    def _deliveries(self) -> Iterable[Metric]:
        broker, deliveries = self._broker.statistics(), self._broker.deliveries
        yield CounterMetricFamily("sseserve_batches", "Batches fanned out.", broker.batches)
        yield CounterMetricFamily("sseserve_deliveries", "Events offered to streams.", broker.delivered)
        yield _histogram(
            "sseserve_delivery_seconds",
            "From the record of an event to a client's socket, for each batch and client.",
            deliveries.seconds,
        )
        yield CounterMetricFamily(
            "sseserve_events_conflated", "Deliveries dropped for newer progress.", broker.conflated
        )
        yield GaugeMetricFamily(
            "sseserve_buffered_streams", "Streams for which something waits.", deliveries.clients
        )
        yield GaugeMetricFamily("sseserve_buffered_events", "Events that wait for them.", deliveries.events)
        yield GaugeMetricFamily("sseserve_buffered_bytes", "Bytes that wait for them.", deliveries.size)

    def _sessions(self) -> Iterable[Metric]:
        counters, tracker = self._counters, self._tracker
        yield CounterMetricFamily("sseserve_events", "Events appended to a log.", counters.events)
        yield _counter(
            "sseserve_sessions_finished",
            "Sessions ended.",
            ["state"],
            (((s.value,), counters.finished.get(s.value, 0)) for s in State if s.terminal),
        )
        yield SummaryMetricFamily(
            "sseserve_session_duration_seconds",
            "From the first update of a session to its end.",
            count_value=sum(counters.finished.values()),
            sum_value=counters.session_seconds,
        )
        yield CounterMetricFamily(
            "sseserve_leases_stalled", "Producers silent for longer than their lease.", tracker.stalled_leases
        )
        yield CounterMetricFamily(
            "sseserve_leases_lost", "Sessions ended as lost after three leases.", tracker.lost_leases
        )
        yield GaugeMetricFamily(
            "sseserve_jobs_waiting", "Jobs in the queue of all instances.", self._queue.waiting
        )
        yield GaugeMetricFamily("sseserve_jobs_running", "Jobs that run here.", self._queue.running)

    def _engine(self) -> Iterable[Metric]:
        tracker = self._tracker
        yield GaugeMetricFamily(
            "sseserve_engine_up", "Whether events can be stored.", float(tracker.engine.problem is None)
        )
        yield _histogram(
            "sseserve_append_seconds", "How long appending to a log has taken.", tracker.append_seconds
        )
        yield CounterMetricFamily(
            "sseserve_append_failures", "Appends that the engine has not done.", tracker.failed_appends
        )
        yield _histogram(
            "sseserve_redis_lag_seconds",
            "From the record of an event in another instance to its arrival here.",
            self._counters.redis_lag,
        )

    def _systems(self) -> Iterable[Metric]:
        """Of Pub/Sub, and of the Redis channels of other systems."""
        counters = self._counters
        yield CounterMetricFamily(
            "sseserve_pubsub_invalid_messages", "Invalid Pub/Sub messages dropped.", counters.invalid_messages
        )
        yield SummaryMetricFamily(
            "sseserve_pubsub_latency_seconds",
            "From publishing in Pub/Sub to the log, for each message.",
            count_value=counters.pubsub_messages,
            sum_value=counters.pubsub_latency,
        )
        yield _counter(
            "sseserve_channel_messages",
            "Messages of Redis channels: recorded here, by another instance (repeated), refused, dropped, "
            "written.",
            ["system", "result"],
            counters.channel_messages.items(),
        )

    def render(self) -> bytes:
        """Write the samples in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


def _counter(
    name: str, text: str, labels: Iterable[str], counts: Iterable[tuple[tuple[str, ...], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[*labels])
    for label, count in sorted(counts):
        family.add_metric(label, count)
    return family


def _by_dialect(counts: Mapping[Encoding, int]) -> list[tuple[tuple[str, ...], int]]:
    """Add up counts by encoding to counts by transport and dialect."""
    totals: dict[tuple[str, ...], int] = {}
    for encoding, count in counts.items():
        label = (encoding.protocol, encoding.dialect.name)
        totals[label] = totals.get(label, 0) + count
    return sorted(totals.items())


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets = [*histogram.buckets()]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)


def _resident_memory() -> int:
    """Return how many bytes of this process are in memory; see proc(5)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
