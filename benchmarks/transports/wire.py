"""Scenarios: what an update and an idle minute cost on the wire, and whether idle streams last in nginx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from ..load.process import WorkerProcess
from ..report.progress import Progress
from ..results import Figure, Round, Scenario
from .bed import Bed, Plan
from .connection import Address
from .network import Network, client_address, missing
from .protocols import WAIT
from .proxy import DEFAULT, Nginx, missing_nginx

__all__ = ["measure_wire", "wire_steps"]

CLIENTS = 10  # of each transport: a page with ten jobs
PROXY_TIMEOUT = 60.0  # nginx's default: proxy_read_timeout


def wire_steps(_plan: Plan) -> int:
    """Return the number of steps."""
    return 3


def measure_wire(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Watch all transports at the same time, busy and then idle."""
    why = missing()
    level = "TCP payload" if why else "IP packets"
    notes = [f"All transports at the same time, with {CLIENTS} clients each, and the headers of a browser."]
    if why:
        notes.append(f"Bytes are payload of TCP, as counting IP packets {why}.")
    else:
        notes.append("Bytes of IP packets of both directions: with TCP and IP headers, and acknowledgements.")
    busy = Scenario(
        name="wire-update",
        group="wire",
        title="Bytes on the wire for each update",
        question="How much must a client's link carry for one update of about 250 bytes of JSON?",
        parameters={"clients": CLIENTS, "events per second": 10},
        figures=[Figure(key="bytes", label=f"bytes per update ({level})", unit="B", better="less")],
        notes=[*notes, "Polling transfers a state every two seconds, however many updates there were."],
    )
    idle = Scenario(
        name="wire-idle",
        group="wire",
        title="Bytes on the wire in an idle minute",
        question="What does a client cost its link while nothing happens?",
        parameters={"clients": CLIENTS, "seconds measured": plan.idle_seconds, "heartbeat": "15 s"},
        figures=[Figure(key="bytes", label=f"bytes per idle minute ({level})", unit="B", better="less")],
        notes=[*notes, "Heartbeats of the server included; SSE over HTTP/2 shares one connection."],
    )
    if plan.idle_seconds != 60:
        idle.notes.append(f"Measured for {plan.idle_seconds:g} s and scaled to a minute.")
    if not why:
        for scenario in (busy, idle):
            packets = Figure(key="packets", label="packets", unit="packets", better="less", plot="none")
            scenario.figures.append(packets)
    lasting = Scenario(
        name="proxy-idle",
        group="wire",
        title="Idle streams behind nginx with its default configuration",
        question="Does a proxy that ends silent connections after 60 seconds end the streams?",
        parameters={"clients": CLIENTS, "seconds": plan.idle_seconds},
        figures=[
            Figure(key="with", label="ended, server with heartbeats", unit="%", better="less", plot="none"),
            Figure(key="without", label="ended, without heartbeats", unit="%", better="less", plot="none"),
        ],
        headline="without",
        notes=["By default nginx ends a response of which nothing came for 60 s (proxy_read_timeout)."],
    )
    with ExitStack() as stack:
        network = None if why else stack.enter_context(Network())
        direct = _Crowd(stack, plan, Bed(network), progress)
        behind: dict[str, _Crowd] = {}
        reason = missing_nginx()
        if plan.idle_seconds < PROXY_TIMEOUT:
            reason = f"only {plan.idle_seconds:g} s were measured, and nginx waits for 60 s"
        if reason:
            lasting.skipped = dict.fromkeys(plan.transports, reason)
        else:
            # The last one has no heartbeats in this time.
            behind["with"] = _Crowd(stack, plan, Bed(), progress, behind=DEFAULT)
            behind["without"] = _Crowd(stack, plan, Bed(heartbeat=300), progress, behind=DEFAULT)
        progress.start(busy.title)
        for transport, values, load in direct.measure(network, plan.seconds, publishes=True):
            busy.rounds.append(Round(contender=transport, number=1, values=values, load=load))
        progress.finish(f"{busy.name} {_bytes(busy)}")
        yield busy
        progress.start(idle.title)
        for crowd in behind.values():
            crowd.start(plan.idle_seconds + 6)
        for transport, values, load in direct.measure(network, plan.idle_seconds):
            if transport == "long-poll" and plan.idle_seconds < 2 * WAIT:
                idle.skipped[transport] = f"it asks every {WAIT} s, and {plan.idle_seconds:g} s were measured"
                continue
            per_minute = {key: value * 60 / plan.idle_seconds for key, value in values.items()}
            idle.rounds.append(Round(contender=transport, number=1, values=per_minute, load=load))
        progress.finish(f"{idle.name} {_bytes(idle)}")
        yield idle
        if behind:
            for transport in plan.transports:
                if transport in behind["with"].refused:
                    lasting.skipped[transport] = "nginx refuses it in its default configuration"
                else:
                    ended = {key: crowd.ended(transport) for key, crowd in behind.items()}
                    lasting.rounds.append(Round(contender=transport, number=1, values=ended))
        progress.finish(f"{lasting.name} {', '.join(f'{r.contender} {r.values}' for r in lasting.rounds)}")
        yield lasting


class _Crowd:
    """A server with clients of all transports, each in a process of its own."""

    def __init__(
        self, stack: ExitStack, plan: Plan, bed: Bed, progress: Progress, *, behind: str | None = None
    ) -> None:
        progress.start("opening the clients of all transports")
        self._bed = stack.enter_context(bed)
        self._session = bed.new_session()
        self._processes: dict[str, WorkerProcess] = {}
        self._sources: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._published = 0
        address = bed.address
        if behind is not None:
            address = stack.enter_context(Nginx(behind, bed)).address
        processes = [bed.add_clients() for _ in plan.transports]
        for number, (transport, process) in enumerate(zip(plan.transports, processes, strict=True)):
            source = client_address(number) if bed.has_network else ""
            where = Address(address.host, address.port, tls=address.tls, source=source)
            opened = bed.open(transport, self._session, CLIENTS, address=where, clients=process)
            if "refused" in opened:
                self.refused[transport] = opened["refused"]
            else:
                self._processes[transport] = process
                self._sources[transport] = source

    def start(self, seconds: float) -> None:
        """Let all clients read for so long."""
        for process in self._processes.values():
            process.start("watch", seconds=seconds)

    def measure(
        self, network: Network | None, seconds: float, *, publishes: bool = False
    ) -> Iterator[tuple[str, dict[str, float], float]]:
        """Count what is transferred in some seconds, for each client or each update; with the load."""
        if network is not None:
            network.take_traffic()
        self.start(seconds)
        count = 1
        if publishes:
            count = int(seconds * 10)
            self._bed.publish(self._session, self._published + 1, count)
            self._published += count
        results = {name: process.result(seconds + 60) for name, process in self._processes.items()}
        traffic = network.take_traffic() if network is not None else {}
        for transport, seen in results.items():
            counted = {"bytes": seen["sent"] + seen["received_bytes"]}
            if network is not None:
                counted = traffic.get(self._sources[transport], {"bytes": 0, "packets": 0})
            yield transport, {key: n / CLIENTS / count for key, n in counted.items()}, seen["load"]

    def ended(self, transport: str) -> float:
        """Return what part of the streams has ended, in percent."""
        seen = self._processes[transport].result(120)
        connections = 1 if transport == "sse-h2" else CLIENTS
        return min(100.0, 100 * int(seen["cuts"]) / connections)


def _bytes(scenario: Scenario) -> str:
    return ", ".join(f"{turn.contender} {turn.values['bytes']:.0f} B" for turn in scenario.rounds)
