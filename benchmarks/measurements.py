"""The measurements: what each does with a server, its watchers and its publishers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from process import BenchError, Remote
from publishers import publisher_main
from servers import NCHAN, OURS, OURS_WS, Server, Target
from watchers import watcher_main

__all__ = ["GROUPS", "QUICK", "Measure", "Plan", "Stage", "faults_of", "measures"]

GROUPS = ("fanout", "latency", "idle", "accept", "ws", "stalled")
ANSWER_LIMIT = 120.0


def faults_of(seen: dict[str, Any]) -> str:
    """Say what is wrong with what the clients have seen; nothing if all is right."""
    said = [f"{seen[name]} {name}" for name in ("short", "doubled", "cut") if seen.get(name)]
    if seen.get("cut_by_overflow"):
        said.append(f"{seen['cut_by_overflow']} of them by overflow")
    said += ["not in order"] if not seen.get("in_order", True) else []
    said += ["clients saw different bytes"] if not seen.get("identical", True) else []
    if "alone" in seen and (faults := faults_of(seen["alone"])):
        said.append(f"alone: {faults}")
    return ", ".join(said)


@dataclass(frozen=True)
class Plan:
    """The sizes of a run. Times are seconds, sizes are bytes."""

    clients: int = 1000
    size: int = 100
    fanout_rounds: int = 5
    fanout_seconds: float = 3.0
    latency_rounds: int = 3
    latency_seconds: float = 10.0
    latency_rate: float = 10.0
    idle_rounds: int = 3
    idle_streams: int = 10_000
    accept_rounds: int = 5
    accept_streams: int = 6000
    stalled_rounds: int = 3
    stalled_seconds: float = 15.0
    stalled_rate: float = 50.0
    stalled_size: int = 1000


QUICK = Plan(
    fanout_rounds=1,
    fanout_seconds=1.5,
    latency_rounds=1,
    latency_seconds=3.0,
    idle_rounds=1,
    idle_streams=2000,
    accept_rounds=1,
    accept_streams=2000,
    stalled_rounds=1,
    stalled_seconds=8.0,
)


class Stage:
    """One server, one process that watches and one that publishes: what a measurement plays on."""

    def __init__(self, target: Target, plan: Plan, files: int) -> None:
        self.target, self.plan = target, plan
        self.server = Server(target.server, files)
        self._watchers = Remote(watcher_main)
        self._publishers = Remote(publisher_main)
        self._way = {"path": target.publish_path, "before": target.before, "after": target.after}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *raised: Any) -> None:
        with self.server, self._publishers, self._watchers:
            if raised[0] is None:
                self._watchers.call("close")
            elif log := self.server.log():
                print(f"{self.target.name} had said:\n{log}", file=sys.stderr)

    def open(self, number: int, *, stalled: bool = False) -> float:
        """Open streams; return the seconds that it took."""
        request = {"request": self.target.watch, "status": self.target.status, "stalled": stalled}
        return float(
            self._watchers.call("open", ANSWER_LIMIT, port=self.server.port, number=number, **request)
        )

    def drain_stalled(self) -> dict[str, int]:
        """Read the stalled clients to their end."""
        return dict(self._watchers.call("drain_stalled", ANSWER_LIMIT))

    def run(self, command: str, *, latency: bool, size: int, **arguments: Any) -> dict[str, Any]:
        """Publish while the watchers collect; return what they have seen and what it has cost."""
        self._watchers.call("settle")
        self._watchers.start("collect", latency=latency)
        before = self.server.cpu()
        told = self._publishers.call(
            command, ANSWER_LIMIT, port=self.server.port, size=size, way=self._way, **arguments
        )
        self._watchers.pipe.send(told["sent"])
        seen = self._watchers.answer(ANSWER_LIMIT)
        seconds = seen["last"] - told["start"]
        return {
            **seen,
            "seconds": seconds,
            "published": sum(told["sent"]),
            "publishes_per_second": sum(told["sent"]) / told["elapsed"],
            "late_ms": told.get("late", 0.0) * 1e3,
            "server_cpu": (self.server.cpu() - before) / seconds,
            "watcher_cpu": seen["cpu"] / seconds,
        }

    def warm_up(self) -> None:
        """Publish a little before the clock runs, and see that every client gets it.

        Raises:
            BenchError: it does not; then nothing measured on this server would mean anything.
        """
        seen = self.run("flood", latency=False, size=self.plan.size, connections=1, count=20, seconds=5.0)
        if faults := faults_of(seen):
            raise BenchError(f"{self.target.name} fails at 20 events: {faults}")


def fanout(stage: Stage, connections: int) -> dict[str, Any]:
    """Publish in a closed loop; the time runs until the last client has the last event."""
    stage.open(stage.plan.clients)
    stage.warm_up()
    seen = stage.run(
        "flood",
        latency=False,
        size=stage.plan.size,
        connections=connections,
        count=None,
        seconds=stage.plan.fanout_seconds,
    )
    return {**seen, "value": seen["delivered"] / seen["seconds"]}


def latency(stage: Stage) -> dict[str, Any]:
    """Publish at an easy rate; take the age of every event at every client."""
    plan = stage.plan
    stage.open(plan.clients)
    stage.warm_up()
    return stage.run(
        "pace", latency=True, size=plan.size, rate=plan.latency_rate, seconds=plan.latency_seconds
    )


def idle(stage: Stage) -> dict[str, Any]:
    """Open streams, let them be, and look at the memory before and after."""
    before = stage.server.settled_rss()
    stage.open(stage.plan.idle_streams)
    after = stage.server.settled_rss()
    each = (after - before) / stage.plan.idle_streams / 1024
    return {"value": each, "rss_before": before, "rss_after": after}


def accept(stage: Stage) -> dict[str, Any]:
    """Open streams as fast as 64 at a time go."""
    before = stage.server.cpu()
    seconds = stage.open(stage.plan.accept_streams)
    return {
        "value": stage.plan.accept_streams / seconds,
        "server_cpu": (stage.server.cpu() - before) / seconds,
    }


def stalled(stage: Stage) -> dict[str, Any]:
    """Measure latency alone, then on the same server with as many clients beside that do not read at all.

    The first part fills the server's log, so what the memory grows by in the second is the doing of the
    stalled clients.
    """
    plan = stage.plan
    stage.open(plan.clients)
    stage.warm_up()
    load = {"size": plan.stalled_size, "rate": plan.stalled_rate, "seconds": plan.stalled_seconds}
    start = stage.server.settled_rss()
    alone = stage.run("pace", latency=True, **load)
    stage.open(plan.clients, stalled=True)
    before = stage.server.settled_rss()
    stage.server.forget_peak()
    beside = stage.run("pace", latency=True, **load)
    after, peak = stage.server.rss(), stage.server.peak()
    return {
        **beside,
        **stage.drain_stalled(),
        "alone": alone,
        "p99_alone": alone["p99"],
        "rate": beside["publishes_per_second"],
        "factor": beside["p99"] / alone["p99"],
        "growth_alone": (before - start) / 2**20,
        "growth": (after - before) / 2**20,
        "peak_growth": (peak - before) / 2**20,
    }


@dataclass(frozen=True)
class Measure:
    """One measurement: who takes part, how often, and which of its figures go into the table."""

    name: str
    group: str
    targets: tuple[Target, ...]
    rounds: int
    run: Callable[[Stage], dict[str, Any]]
    shown: tuple[tuple[str, str, str], ...]  # key in the result, label, unit


def measures(plan: Plan, groups: set[str]) -> list[Measure]:
    """Return what to run. WebSocket is measured beside our own SSE, in the same rounds."""
    servers = (OURS, NCHAN)

    def with_socket(group: str) -> tuple[Target, ...]:
        beside_nchan = servers if group in groups else (OURS,)
        return (*beside_nchan, OURS_WS) if "ws" in groups else beside_nchan

    both = [
        Measure(
            f"fanout{count}",
            "fanout",
            with_socket("fanout"),
            plan.fanout_rounds,
            lambda stage, count=count: fanout(stage, count),
            (("value", f"fan-out, {count} publisher{'s' if count > 1 else ''}", "deliveries/s"),),
        )
        for count in (1, 8)
    ]
    memory = Measure(
        "idle", "idle", with_socket("idle"), plan.idle_rounds, idle, (("value", "idle stream", "KB RSS"),)
    )
    found = [measure for measure in (*both, memory) if {measure.group, "ws"} & groups]
    if "latency" in groups:
        rate = f"latency at {plan.latency_rate:g} events/s"
        shown = (("p50", f"{rate}, p50", "ms"), ("p99", f"{rate}, p99", "ms"))
        found.append(Measure("latency", "latency", servers, plan.latency_rounds, latency, shown))
    if "accept" in groups:
        shown = (("value", "new streams", "streams/s"),)
        found.append(Measure("accept", "accept", servers, plan.accept_rounds, accept, shown))
    if "stalled" in groups:
        load = f"{plan.stalled_rate:g} events/s of {plan.stalled_size} bytes"
        shown = (
            ("p99", f"{load}, p99 beside {plan.clients} stalled clients", "ms"),
            ("rate", f"{load}, rate reached beside {plan.clients} stalled clients", "events/s"),
            ("p99_alone", f"{load}, p99 alone", "ms"),
            ("factor", "p99 beside stalled clients / alone", "x"),
            ("peak_growth", f"memory growth with {plan.clients} stalled clients, peak", "MB RSS"),
        )
        found.append(Measure("stalled", "stalled", servers, plan.stalled_rounds, stalled, shown))
    return found
