"""The stages of a run: each starts a contender's server once, and measures one scenario or several with it.

Scenarios share a stage if they need the same streams, which are opened once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..results import Round, Scenario
from .contenders import Peer
from .plan import Plan
from .testbed import Testbed, kernel_memory

__all__ = [
    "STORM_CONCURRENCY",
    "Stage",
    "run_fanout",
    "run_many",
    "run_paced",
    "run_payload",
    "run_publish",
    "run_stalled",
    "run_storm",
    "run_streams",
]

Outcome = tuple[str, Round | str]  # the name of a scenario, and its round or why there is none
Run = Callable[[Testbed, Plan, frozenset[str]], Iterator[Outcome]]

STORM_CONCURRENCY = 1000


@dataclass(frozen=True)
class Stage:
    """A stage: ``run`` yields the outcomes of those of its scenarios that are wanted.

    ``seconds`` is the time of one turn of a contender, roughly, for the estimate; ``scenarios`` makes the
    scenarios of a plan, ``channels`` the names of its channels, and ``unsupported`` says why a contender
    cannot take part.
    """

    name: str
    run: Run
    scenarios: Callable[[Plan], list[Scenario]]
    rounds: Callable[[Plan], int]
    seconds: Callable[[Plan], float]
    channels: Callable[[Plan], Sequence[str]] = lambda _: ("bench",)
    unsupported: Callable[[Peer], str] = lambda _: ""


def run_many(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Publish to many channels with one client each."""
    bed.open(plan.many_channels)
    for publishers in plan.many_publishers:
        if (name := f"many-{publishers}") in wanted:
            yield name, bed.saturate(publishers, plan.many_seconds)


def run_fanout(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Publish to one channel with more and more clients."""
    opened = 0
    for clients in plan.fanout_clients:
        for publishers in (1, plan.fanout_publishers) if clients == max(plan.fanout_clients) else (1,):
            if (name := f"fanout-{clients}-{publishers}") in wanted:
                if clients > opened:
                    bed.open(clients - opened)
                    opened = clients
                yield name, bed.saturate(publishers, plan.fanout_seconds)


def run_paced(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Publish on a schedule to one channel."""
    bed.open(plan.paced_clients)
    for rate in plan.paced_rates:
        if (name := f"paced-{rate:g}") in wanted:
            yield name, bed.pace(rate, max(plan.paced_seconds, plan.paced_events / rate))


def run_publish(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Publish to a channel that nobody watches."""
    for connections in plan.publish_connections:
        bed.publish(connections, plan.publish_seconds / 4)  # warm-up
        if (name := f"publish-{connections}") in wanted:
            yield name, bed.publish(connections, plan.publish_seconds)
    if "publish-lines" in wanted:
        if bed.peer.publish_lines is None:
            yield "publish-lines", bed.peer.no_lines
        else:
            yield "publish-lines", bed.publish_lines(plan.publish_seconds)


def run_streams(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Open many streams, leave them idle, publish slowly, then as fast as possible."""
    is_idle = "idle" in wanted
    user, kernel = (bed.server.stable_rss() if is_idle else 0), kernel_memory()
    opened = bed.open(plan.streams)
    if "accept" in wanted:
        yield "accept", opened
    if is_idle:
        user, kernel = bed.server.stable_rss() - user, kernel_memory() - kernel
        values = {"user": user / plan.streams / 1024, "kernel": kernel / plan.streams / 1024}
        yield "idle", Round(contender=bed.peer.name, number=0, values=values)
    if (name := f"paced-{plan.streams_rate:g}-{plan.streams}") in wanted:
        yield name, bed.pace(plan.streams_rate, plan.streams_seconds)
    if (name := f"fanout-{plan.streams}-1") in wanted:
        yield name, bed.saturate(1, plan.fanout_seconds)


def run_storm(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Let clients come back that have missed events."""
    if "storm" in wanted:
        yield "storm", bed.replay(plan.streams, events=plan.storm_events, concurrency=STORM_CONCURRENCY)


def run_stalled(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Measure latency alone, then on the same server with clients that do not read.

    The first part fills the server's log, so memory growth in the second part is due to the stalled clients.
    """
    if "stalled" not in wanted:
        return
    bed.open(plan.paced_clients)
    alone = bed.pace(plan.stalled_rate, plan.stalled_seconds / 2, plan.stalled_size)
    bed.open(round(plan.paced_clients * plan.stalled_share), stalled=True)
    before = bed.server.stable_rss()
    bed.server.reset_peak_rss()
    beside = bed.pace(plan.stalled_rate, plan.stalled_seconds, plan.stalled_size)
    beside.values |= {
        "alone": alone.values["p99"],
        "growth": (bed.server.peak_rss() - before) / 2**20,
        "cut": bed.drain_stalled(),
    }
    beside.faults += [f"without stalled clients: {fault}" for fault in alone.faults]
    yield "stalled", beside


def run_payload(bed: Testbed, plan: Plan, wanted: frozenset[str]) -> Iterator[Outcome]:
    """Publish payloads of several sizes."""
    bed.open(plan.paced_clients)
    for size in plan.payload_sizes:
        if (name := f"payload-{size}") in wanted:
            yield name, bed.saturate(1, plan.payload_seconds, size, plan.payload_bytes // size)
