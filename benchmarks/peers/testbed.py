"""The processes of a turn: a server, and the load generator, which is kept from turn to turn."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..load.process import BenchmarkError, WorkerProcess
from ..load.publishers import publisher_main
from ..load.watchers import watcher_main
from ..results import Round
from .contenders import Peer
from .plan import Plan

__all__ = ["Load", "Testbed", "kernel_memory"]

COMMAND_TIMEOUT = 120.0
CONCURRENCY = 64  # streams that are opened at the same time
PAGE = os.sysconf("SC_PAGE_SIZE")


class Load:
    """The load generator: one publishing process, and on more than two cores several watching processes."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        watching = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        self.watchers = [self._stack.enter_context(WorkerProcess(watcher_main)) for _ in range(watching)]
        self.publishers = self._stack.enter_context(WorkerProcess(publisher_main))

    def stop(self) -> None:
        """End the processes."""
        self._stack.close()

    def all(self, name: str, arguments: Sequence[dict[str, Any]] | None = None) -> list[Any]:
        """Run a command in all watching processes at the same time; return the results."""
        for watcher, values in zip(self.watchers, arguments or [{}] * len(self.watchers), strict=True):
            watcher.start(name, **values)
        return [watcher.result(COMMAND_TIMEOUT) for watcher in self.watchers]


class Testbed:
    """A turn of one contender: its server, which is started here, and what the load generator does with it.

    Args:
        peer: the contender.
        load: the load generator.
        channels: names of the channels. A client watches the one with its number, modulo the channels.
        plan: size of a payload, and how long to wait for missing events.
    """

    def __init__(self, peer: Peer, load: Load, channels: Sequence[str], plan: Plan) -> None:
        self.peer, self._load, self._channels = peer, load, channels
        self._size, self._patience = plan.size, plan.patience
        self._run = 0
        self._clients = 0
        self.server = peer.start()
        try:
            peer.prepare(self.server, channels)
        except BaseException:
            self.server.stop()
            raise

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *exception: Any) -> None:
        with self.server:
            if exception[0] is None:
                self._load.all("close")

    def open(self, number: int, *, stalled: bool = False) -> Round:
        """Open streams; return their rate."""
        requests = [
            (index % len(self._channels), self.peer.watch(self._channels[index % len(self._channels)]))
            for index in range(self._clients, self._clients + number)
        ]
        cpu = self.server.cpu_seconds()
        opened = self._load.all("open", self._shares(requests, CONCURRENCY, stalled=stalled))
        cpu = self.server.cpu_seconds() - cpu
        self._clients += 0 if stalled else number
        self._load.all("discard_pending")
        seconds = max(each["seconds"] for each in opened)
        return self._round(
            seconds,
            cpu,
            max(each["cpu"] for each in opened),
            [],
            {"rate": number / seconds, "seconds": seconds},
        )

    def _shares(self, requests: Sequence[Any], concurrency: int, **arguments: Any) -> list[dict[str, Any]]:
        processes = len(self._load.watchers)
        return [
            {
                "port": self.server.port,
                "requests": requests[source::processes],
                "status": self.peer.watch_status,
                "source": source,
                "concurrency": max(concurrency // processes, 1),
                **arguments,
            }
            for source in range(processes)
        ]

    def replay(self, number: int, *, events: int, concurrency: int) -> Round:
        """Publish events; let clients come back that have missed them; return how long they waited."""
        self.open(1)
        self._publish(self._channel_shares(1), count=1)
        cursor = self.peer.find_cursor(self._load.watchers[0].call("read_stream"))
        if not cursor:
            raise BenchmarkError("the event has no id")
        request = self.peer.watch(self._channels[0], cursor)
        self._publish(self._channel_shares(1), count=events)
        shares = self._shares([(0, request)] * number, concurrency, run=self._run, events=events)
        cpu = self.server.cpu_seconds()
        replayed = self._load.all("replay", shares)
        cpu = self.server.cpu_seconds() - cpu
        seconds = max(each["seconds"] for each in replayed)
        waits = merge([each["waits"] for each in replayed])
        return self._round(
            seconds,
            cpu,
            max(each["cpu"] for each in replayed),
            [fault for each in replayed for fault in each["faults"]],
            {"seconds": seconds, "rate": number / seconds, "p50": waits[50], "p99": waits[99]},
        )

    def _channel_shares(self, connections: int) -> list[list[tuple[str, int]]]:
        """Return what each connection publishes to: all to the one channel, or each to a share of them.

        With one channel each connection has a sequence of its own; otherwise each channel has one.
        """
        if len(self._channels) == 1:
            return [[(self._channels[0], sequence)] for sequence in range(connections)]
        channels = [(channel, sequence) for sequence, channel in enumerate(self._channels)]
        return [channels[index::connections] for index in range(connections)]

    def _publish(
        self, shares: list[list[tuple[str, int]]], *, count: int | None = None, seconds: float = 15.0
    ) -> dict[str, Any]:
        return self._call_publishers("publish_closed_loop", shares=shares, count=count, seconds=seconds)

    def _call_publishers(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._run += 1
        arguments = {"request": self.peer.publish, "size": self._size} | arguments
        result: dict[str, Any] = self._load.publishers.call(
            command, COMMAND_TIMEOUT, port=self.server.port, run=self._run, **arguments
        )
        return result

    def publish(self, connections: int, seconds: float) -> Round:
        """Publish in a closed loop while nobody watches."""
        return self._measure_publishing(
            "publish_closed_loop", shares=self._channel_shares(connections), seconds=seconds
        )

    def publish_lines(self, seconds: float) -> Round:
        """Publish several events in each request while nobody watches."""
        return self._measure_publishing(
            "publish_lines", request=self.peer.publish_lines, channel=self._channels[0], seconds=seconds
        )

    def _measure_publishing(self, command: str, **arguments: Any) -> Round:
        cpu = self.server.cpu_seconds()
        published = self._call_publishers(command, **arguments)
        cpu = self.server.cpu_seconds() - cpu
        number = sum(published["sent"].values())
        values = {"rate": number / published["elapsed"], "cpu": cpu / number * 1e6}
        return self._round(published["elapsed"], cpu, published["cpu"], [], values)

    def saturate(
        self, connections: int, seconds: float, size: int | None = None, count: int | None = None
    ) -> Round:
        """Publish at most ``count`` events in a closed loop; measure until the last client has the last."""
        size = size or self._size
        shares = self._channel_shares(connections)
        self._warm_up(shares, size)
        return self._deliver(
            "publish_closed_loop",
            len(shares),
            latency=False,
            shares=shares,
            seconds=seconds,
            size=size,
            count=count,
        )

    def pace(self, rate: float, seconds: float, size: int | None = None) -> Round:
        """Publish on a schedule; record how old every event is at every client."""
        size = size or self._size
        shares = self._channel_shares(1)
        self._warm_up(shares, size)
        arguments = {"channel": self._channels[0], "rate": rate, "seconds": seconds, "size": size}
        return self._deliver("publish_paced", 1, latency=True, **arguments)

    def _warm_up(self, shares: list[list[tuple[str, int]]], size: int) -> None:
        """Publish 10 events from each connection, and check that every client receives them.

        Raises:
            BenchmarkError: a client did not, so measurements of this server would be meaningless.
        """
        count = max(10, *map(len, shares))
        result = self._deliver(
            "publish_closed_loop",
            len(shares),
            latency=False,
            shares=shares,
            seconds=15.0,
            count=count,
            size=size,
        )
        if result.faults:
            raise BenchmarkError(f"warm-up of {count} events: {'; '.join(result.faults)}")

    def _deliver(self, command: str, connections: int, *, latency: bool, **arguments: Any) -> Round:
        """Publish while the watchers take events."""
        load = self._load
        sequences = connections if len(self._channels) == 1 else None
        for watcher in load.watchers:
            watcher.start(
                "collect",
                run=self._run + 1,
                sequences=sequences,
                latency=latency,
                patience=self._patience,
            )
        cpu = self.server.cpu_seconds()
        published = self._call_publishers(command, **arguments)
        for watcher in load.watchers:
            watcher.pipe.send(published["sent"])
        collected = [watcher.result(COMMAND_TIMEOUT) for watcher in load.watchers]
        cpu = self.server.cpu_seconds() - cpu
        seconds = max(each["last"] for each in collected) - published["start"]
        delivered = sum(each["delivered"] for each in collected)
        number = sum(published["sent"].values())
        values = {
            "rate": delivered / seconds,
            "cpu": cpu / max(delivered, 1) * 1e6,
            "publishes": number / published["elapsed"],
            "bandwidth": delivered * arguments.get("size", self._size) / seconds / 1e6,
        }
        samples = {}
        if latency and (ages := merge([each["latencies"] for each in collected])):
            values |= {"p50": ages[50], "p90": ages[90], "p99": ages[99], "max": ages[100]}
            samples["latency"] = ages
        busiest = max(published["cpu"], *(each["cpu"] for each in collected))
        faults = [fault for each in collected for fault in each["faults"]]
        outcome = self._round(seconds, cpu, busiest, faults, values)
        outcome.samples = samples
        return outcome

    def _round(
        self, seconds: float, cpu: float, load: float, faults: list[str], values: dict[str, float]
    ) -> Round:
        """Return a round; the runner gives it its number."""
        return Round(
            contender=self.peer.name,
            number=0,
            values=values,
            load=load / seconds,
            server_cpu=cpu / seconds,
            faults=faults,
        )

    def drain_stalled(self) -> int:
        """Read what the stalled clients have; return how many the server has disconnected."""
        return sum(each["cut"] for each in self._load.all("drain_stalled"))


def merge(quantiles: Sequence[list[float]]) -> list[float]:
    """Return the quantiles of several processes together: with as many values each, as here."""
    if len(quantiles) == 1:
        return quantiles[0]
    values = sorted(value for each in quantiles for value in each)
    last = len(values) - 1
    return [values[round(part * last / 100)] for part in range(101)] if values else []


def kernel_memory() -> int:
    """Return the memory of the kernel's objects and of TCP's buffers, in bytes, of the whole machine."""
    slab = re.search(r"^Slab:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    tcp = re.search(r"^TCP: .*mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    return (int(slab[1]) * 1024 if slab else 0) + (int(tcp[1]) * PAGE if tcp else 0)
