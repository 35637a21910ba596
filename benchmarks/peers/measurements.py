"""The measurements: what each does with a server, its watchers and its publishers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..load.process import BenchmarkError, WorkerProcess
from ..load.publishers import publisher_main
from ..load.watchers import watcher_main
from ..servers import NCHAN, SSESERVE, SSESERVE_TOKEN, SSESERVE_WS, Server, Target

__all__ = ["GROUPS", "QUICK", "Measurement", "Plan", "Testbed", "describe_faults", "select_measurements"]

GROUPS = ("fanout", "latency", "idle", "accept", "ws", "stalled", "token")
COMMAND_TIMEOUT = 120.0

# By their keys in the result of a round.
_CLIENT_FAULTS = {
    "short": "clients with missing events",
    "doubled": "clients with duplicate events",
    "cut": "clients disconnected by the server",
    "cut_by_overflow": "disconnected because of overflow",
}


def describe_faults(result: dict[str, Any]) -> str:
    """Describe the delivery faults in a round's result; return an empty string if there are none."""
    faults = [f"{text}: {count}" for name, text in _CLIENT_FAULTS.items() if (count := result.get(name))]
    faults += ["events out of order"] if not result.get("in_order", True) else []
    faults += ["clients received different bytes"] if not result.get("identical", True) else []
    if "alone" in result and (alone := describe_faults(result["alone"])):
        faults.append(f"without stalled clients: {alone}")
    return ", ".join(faults)


@dataclass(frozen=True)
class Plan:
    """The parameters of a run: times in seconds, rates in events per second, sizes in bytes."""

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


class Testbed:
    """The processes of one round: a server, a watching process and a publishing process."""

    def __init__(self, target: Target, plan: Plan, files: int) -> None:
        self.target, self.plan = target, plan
        self.server = Server(target.server, files, target.publish_headers, **dict(target.settings))
        self._watchers = WorkerProcess(watcher_main)
        self._publishers = WorkerProcess(publisher_main)
        self._publish_request = {
            "path": target.publish_path,
            "prefix": target.publish_prefix,
            "suffix": target.publish_suffix,
            "headers": target.publish_headers,
        }

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *exception: Any) -> None:
        with self.server, self._publishers, self._watchers:
            if exception[0] is None:
                self._watchers.call("close")
            elif log := self.server.log():
                print(f"Output of {self.target.name}:\n{log}", file=sys.stderr)

    def open(self, number: int, *, stalled: bool = False) -> float:
        """Open ``number`` streams; return the time that it took, in seconds."""
        seconds = self._watchers.call(
            "open",
            COMMAND_TIMEOUT,
            port=self.server.port,
            number=number,
            request=self.target.watch_request,
            status=self.target.watch_status,
            stalled=stalled,
        )
        return float(seconds)

    def drain_stalled(self) -> dict[str, int]:
        """Read from the stalled clients; return the counts of :meth:`Watchers.drain_stalled`."""
        return dict(self._watchers.call("drain_stalled", COMMAND_TIMEOUT))

    def run(self, command: str, *, latency: bool, size: int, **arguments: Any) -> dict[str, Any]:
        """Publish while the watchers collect events; return the watchers' figures with rates and CPU shares.

        Args:
            command: command of the publishing process.
            latency: whether to record the age of each event.
            size: payload size in bytes.
            arguments: other arguments of the command.
        """
        self._watchers.call("discard_pending")
        self._watchers.start("collect", latency=latency)
        cpu_before = self.server.cpu_seconds()
        published = self._publishers.call(
            command,
            COMMAND_TIMEOUT,
            port=self.server.port,
            size=size,
            request=self._publish_request,
            **arguments,
        )
        self._watchers.pipe.send(published["sent"])
        collected = self._watchers.result(COMMAND_TIMEOUT)
        seconds = collected["last"] - published["start"]
        return {
            **collected,
            "seconds": seconds,
            "published": sum(published["sent"]),
            "publishes_per_second": sum(published["sent"]) / published["elapsed"],
            "late_ms": published.get("late", 0.0) * 1e3,
            "server_cpu": (self.server.cpu_seconds() - cpu_before) / seconds,
            "watcher_cpu": collected["cpu"] / seconds,
        }

    def warm_up(self) -> None:
        """Publish 20 events before the measurement, and check that every client receives them.

        Raises:
            BenchmarkError: a client did not, so measurements of this server would be meaningless.
        """
        result = self.run(
            "publish_closed_loop", latency=False, size=self.plan.size, connections=1, count=20, seconds=5.0
        )
        if faults := describe_faults(result):
            raise BenchmarkError(f"{self.target.name} failed the warm-up with 20 events: {faults}")


def fanout(testbed: Testbed, connections: int) -> dict[str, Any]:
    """Publish in a closed loop; measure until the last client has received the last event."""
    testbed.open(testbed.plan.clients)
    testbed.warm_up()
    result = testbed.run(
        "publish_closed_loop",
        latency=False,
        size=testbed.plan.size,
        connections=connections,
        count=None,
        seconds=testbed.plan.fanout_seconds,
    )
    return {**result, "value": result["delivered"] / result["seconds"]}


def publish(testbed: Testbed) -> dict[str, Any]:
    """Publish in a closed loop while one client watches; measure the requests."""
    testbed.open(1)
    testbed.warm_up()
    result = testbed.run(
        "publish_closed_loop",
        latency=False,
        size=testbed.plan.size,
        connections=1,
        count=None,
        seconds=testbed.plan.fanout_seconds,
    )
    return {**result, "value": result["publishes_per_second"]}


def latency(testbed: Testbed) -> dict[str, Any]:
    """Publish at a low rate; record the age of every event at every client."""
    plan = testbed.plan
    testbed.open(plan.clients)
    testbed.warm_up()
    return testbed.run(
        "publish_at_rate", latency=True, size=plan.size, rate=plan.latency_rate, seconds=plan.latency_seconds
    )


def idle(testbed: Testbed) -> dict[str, Any]:
    """Open streams that stay idle; measure the memory before and after."""
    before = testbed.server.stable_rss()
    testbed.open(testbed.plan.idle_streams)
    after = testbed.server.stable_rss()
    per_stream = (after - before) / testbed.plan.idle_streams / 1024
    return {"value": per_stream, "rss_before": before, "rss_after": after}


def accept(testbed: Testbed) -> dict[str, Any]:
    """Open streams as fast as possible, 64 at a time."""
    cpu_before = testbed.server.cpu_seconds()
    seconds = testbed.open(testbed.plan.accept_streams)
    return {
        "value": testbed.plan.accept_streams / seconds,
        "server_cpu": (testbed.server.cpu_seconds() - cpu_before) / seconds,
    }


def stalled(testbed: Testbed) -> dict[str, Any]:
    """Measure latency alone, then on the same server with an equal number of clients that do not read.

    The first part fills the server's log, so memory growth in the second part is due to the stalled clients.
    """
    plan = testbed.plan
    testbed.open(plan.clients)
    testbed.warm_up()
    load = {"size": plan.stalled_size, "rate": plan.stalled_rate, "seconds": plan.stalled_seconds}
    start = testbed.server.stable_rss()
    alone = testbed.run("publish_at_rate", latency=True, **load)
    testbed.open(plan.clients, stalled=True)
    before = testbed.server.stable_rss()
    testbed.server.reset_peak_rss()
    with_stalled = testbed.run("publish_at_rate", latency=True, **load)
    after, peak = testbed.server.rss(), testbed.server.peak_rss()
    return {
        **with_stalled,
        **testbed.drain_stalled(),
        "alone": alone,
        "p99_alone": alone["p99"],
        "rate": with_stalled["publishes_per_second"],
        "factor": with_stalled["p99"] / alone["p99"],
        "growth_alone": (before - start) / 2**20,
        "growth": (after - before) / 2**20,
        "peak_growth": (peak - before) / 2**20,
    }


@dataclass(frozen=True)
class Measurement:
    """One measurement: its targets, its number of rounds, and which of its figures the table shows."""

    name: str
    group: str
    targets: tuple[Target, ...]
    rounds: int
    run: Callable[[Testbed], dict[str, Any]]
    figures: tuple[tuple[str, str, str], ...]  # key in the result, label, unit


def select_measurements(plan: Plan, groups: set[str]) -> list[Measurement]:
    """Return the measurements of the groups. WebSocket runs in the same rounds as sseserve's SSE."""
    servers = (SSESERVE, NCHAN)

    def add_variants(group: str) -> tuple[Target, ...]:
        targets = servers if group in groups else (SSESERVE,)
        targets += (SSESERVE_WS,) if "ws" in groups else ()
        return (*targets, SSESERVE_TOKEN) if "token" in groups else targets

    fanouts = [
        Measurement(
            f"fanout{count}",
            "fanout",
            add_variants("fanout"),
            plan.fanout_rounds,
            lambda testbed, count=count: fanout(testbed, count),
            (("value", f"fan-out, {count} publisher{'s' if count > 1 else ''}", "deliveries/s"),),
        )
        for count in (1, 8)
    ]
    memory = Measurement(
        "idle", "idle", add_variants("idle"), plan.idle_rounds, idle, (("value", "idle stream", "KB RSS"),)
    )
    selected = [
        measurement for measurement in (*fanouts, memory) if {measurement.group, "ws", "token"} & groups
    ]
    if "token" in groups:
        targets, figures = (SSESERVE, SSESERVE_TOKEN), (("value", "publish requests", "requests/s"),)
        selected.append(Measurement("publish", "token", targets, plan.fanout_rounds, publish, figures))
    if "latency" in groups:
        rate = f"latency at {plan.latency_rate:g} events/s"
        figures = (("p50", f"{rate}, p50", "ms"), ("p99", f"{rate}, p99", "ms"))
        selected.append(Measurement("latency", "latency", servers, plan.latency_rounds, latency, figures))
    if "accept" in groups:
        figures = (("value", "new streams", "streams/s"),)
        selected.append(Measurement("accept", "accept", servers, plan.accept_rounds, accept, figures))
    if "stalled" in groups:
        load = f"{plan.stalled_rate:g} events/s of {plan.stalled_size} bytes"
        figures = (
            ("p99", f"{load}, p99 beside {plan.clients} stalled clients", "ms"),
            ("rate", f"{load}, rate reached beside {plan.clients} stalled clients", "events/s"),
            ("p99_alone", f"{load}, p99 alone", "ms"),
            ("factor", "p99 beside stalled clients / alone", "x"),
            ("peak_growth", f"memory growth with {plan.clients} stalled clients, peak", "MB RSS"),
        )
        selected.append(Measurement("stalled", "stalled", servers, plan.stalled_rounds, stalled, figures))
    return selected
