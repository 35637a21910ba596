"""What a round runs on: one server, and the processes of the clients and of the publisher."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..load.process import WorkerProcess, raise_file_limit
from ..results import Contender, Round
from ..servers import Server
from .clients import clients_main
from .connection import Address
from .network import SERVER, Network
from .protocols import POLL_INTERVAL
from .publisher import publisher_main

__all__ = ["CONTENDERS", "TRANSPORTS", "Bed", "Delivery", "Plan", "cpu_seconds", "describe", "find_faults"]

CONTENDERS = [
    Contender(
        name="sse",
        title="SSE",
        settings="GET /api/sessions/{id}/status/stream over HTTP/1.1, one connection for each client",
        source="https://html.spec.whatwg.org/multipage/server-sent-events.html",
        note="Resumes with Last-Event-ID.",
    ),
    Contender(
        name="websocket",
        title="WebSocket",
        settings="GET /api/sessions/{id}/status/ws, without compression",
        source="https://www.rfc-editor.org/rfc/rfc6455",
        note="Resumes with a cursor in the query; the protocol itself has none, so most servers cannot.",
    ),
    Contender(
        name="long-poll",
        title="Long polling",
        settings="GET /api/sessions/{id}/events?after=CURSOR&wait=30, over a connection that is kept",
        source="https://www.rfc-editor.org/rfc/rfc6202",
        note="The cursor is in each request, so it always resumes.",
    ),
    Contender(
        name="polling",
        title="Polling",
        settings=f"GET /api/sessions/{{id}}/status {POLL_INTERVAL:g} s after the response to the one before, "
        "over a connection that is kept, not conditional",
        note="Sees the state at the time of each poll; what happens in between is superseded.",
    ),
    Contender(
        name="sse-h2",
        title="SSE over HTTP/2",
        settings="as SSE, up to 100 streams on each connection; without TLS by prior knowledge",
        source="https://www.rfc-editor.org/rfc/rfc9113",
        note="Resumes with Last-Event-ID.",
    ),
]
TRANSPORTS = [contender.name for contender in CONTENDERS]


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``firsts`` are pairs: far or near, with TLS or without."""

    rounds: int = 2
    seconds: float = 3.0  # of publishing in a round
    loads: tuple[tuple[int, float], ...] = (  # clients, and events per second
        (1, 10),
        (100, 10),
        (100, 50),
        (1000, 1),
        (1000, 10),
        (1000, 50),
    )
    idle_clients: int = 1000
    idle_seconds: float = 60.0  # in which bytes are counted
    opens: int = 10  # of each transport, to measure the time to the first event
    offline: float = 3.0  # seconds without a network
    firsts: tuple[tuple[bool, bool], ...] = ((False, False), (False, True), (True, False), (True, True))
    sites: tuple[str, ...] = ("default", "buffering", "ours")
    conditions: tuple[str, ...] = ("delay", "loss", "bandwidth")
    settle: float = 2.5  # seconds that idle clients are left alone before memory is read
    transports: tuple[str, ...] = tuple(TRANSPORTS)


class Bed:
    """A server with its load, in a context.

    Args:
        network: has the server in one namespace, and the clients in the other; None: all on loopback.
        settings: of the server, beside those that lift its limits.
    """

    def __init__(self, network: Network | None = None, **settings: object) -> None:
        self._network = network
        self._settings: dict[str, Any] = {
            "max_streams_per_user": 20_000,
            "max_streams_per_address": 20_000,
            "max_connections_per_address": 20_000,
            "retry_ms": 1000,
            **({"host": "0.0.0.0", "insecure": "true", "allowed_hosts": "*"} if network else {}),
            **settings,
        }
        self._stack = ExitStack()
        self._numbers = itertools.count(1)

    @property
    def has_network(self) -> bool:
        """Whether the clients are in a namespace of their own."""
        return self._network is not None

    def inside(self, name: str) -> AbstractContextManager[None]:
        """Let what is made in the block be in a namespace of the network, if there is one."""
        return self._network.inside(name) if self._network else nullcontext()

    def __enter__(self) -> Bed:
        raise_file_limit()
        with ExitStack() as stack:
            with self.inside("server"):
                self.server = Server(**self._settings)
                stack.push(self.server)
                self.publisher = stack.enter_context(WorkerProcess(publisher_main))
            self._stack = stack.pop_all()
        self.host = SERVER if self._network else "127.0.0.1"
        self.address = Address(self.host, self.server.port)
        self.clients = self.add_clients()
        return self

    def add_clients(self) -> WorkerProcess:
        """Start another process of clients."""
        with self.inside("client"):
            return self._stack.enter_context(WorkerProcess(clients_main))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def new_session(self) -> str:
        """Create a session and publish its first state, number 0; return its id."""
        session = f"benchmark-{next(self._numbers)}"
        with self.inside("server"):
            self.server.create_sessions([session])
        self.publish(session, 0, 1)
        return session

    def open(
        self,
        transport: str,
        session: str,
        watchers: int,
        *,
        address: Address | None = None,
        clients: WorkerProcess | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Open clients of a session, at the server unless another address is given."""
        result: dict[str, Any] = (clients or self.clients).call(
            "open",
            90,
            transport=transport,
            address=address or self.address,
            session=session,
            watchers=watchers,
            **more,
        )
        return result

    def start_publishing(self, session: str, first: int, count: int, interval: float = 0.1) -> None:
        """Publish ``count`` updates from number ``first`` on; the result is the publisher's."""
        where = {"host": "127.0.0.1", "port": self.server.port, "session": session}
        self.publisher.start("publish", **where, first=first, count=count, interval=interval)

    def publish(self, session: str, first: int, count: int, interval: float = 0.1) -> dict[str, float]:
        """Publish, and wait until that is done."""
        self.start_publishing(session, first, count, interval)
        result: dict[str, float] = self.publisher.result(60 + 2 * count * interval)
        return result


class Delivery:
    """Clients of one session that get updates at a fixed rate.

    Args:
        bed: the server and its load.
        transport: of the clients.
        watchers: their number.
        rate: events per second.
        seconds: how long.
        address: where the clients connect to; by default the server.
        waits: for the first event of each client, before anything is published.
    """

    def __init__(
        self,
        bed: Bed,
        transport: str,
        *,
        watchers: int,
        rate: float,
        seconds: float,
        address: Address | None = None,
        waits: bool = True,
    ) -> None:
        self.transport = transport
        self.count = max(int(seconds * rate), 3)
        session = bed.new_session()
        interval = 1 / rate
        self.opened = bed.open(transport, session, watchers, address=address, interval=interval, waits=waits)
        self.refused: str | None = self.opened.get("refused")
        if self.refused:
            bed.clients.call("close")
            return
        cpu = cpu_seconds(bed.server.pid)
        bed.clients.start("watch", until=self.count)
        self.late = bed.publish(session, 1, self.count, interval)["late"]
        self.seen = bed.clients.result(120)
        self.cpu = cpu_seconds(bed.server.pid) - cpu
        bed.clients.call("close")
        self.deliveries = watchers * self.count

    def round(self, number: int) -> Round:
        """Return the figures: latencies, CPU and bytes for each delivery, and what was skipped."""
        seen = self.seen
        values = {name: float(value) for name, value in seen["latency"].items()}
        values["cpu"] = self.cpu * 1e6 / self.deliveries
        values["bytes"] = (seen["sent"] + seen["received_bytes"]) / self.deliveries
        values["skipped"] = 100 * sum(seen["missed"]) / self.deliveries
        return Round(
            contender=self.transport,
            number=number,
            values=values,
            load=seen["load"],
            server_cpu=self.cpu / seen["elapsed"],
            faults=find_faults(self.transport, seen),
            samples={"p50": seen["ages"]},
        )


def find_faults(transport: str, seen: dict[str, Any]) -> list[str]:
    """Return what clients got wrong. Polling promises no more than the newest state."""
    faults = [
        f"{sum(seen[key])} events {key} at {sum(map(bool, seen[key]))} of {seen['watchers']} clients"
        for key in ("missed", "doubled", "reordered")
        if any(seen[key]) and not (key == "missed" and transport == "polling")
    ]
    if seen["refused"]:
        faults.append(f"refused with status {', '.join(seen['refused'])}")
    return faults


def describe(turn: Round) -> str:
    """Return a line about a round of delivery."""
    v = turn.values
    text = f"{turn.contender} {turn.number}: "
    text += f"p50 {v['p50']:.1f} ms, p99 {v['p99']:.1f} ms, " if "p50" in v else "nothing arrived, "
    text += f"{v['cpu']:.1f} ms CPU per 1,000, {v['bytes']:.0f} B; "
    text += f"server {turn.server_cpu:.0%}, clients {turn.load:.0%}"
    return text + (f" !! {', '.join(turn.faults)}" if turn.faults else "")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, in seconds, more exactly than its clock ticks."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
