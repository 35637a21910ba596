"""Event streams over HTTP/2 beside those over HTTP/1.1: the CPU time and the memory they cost, as ratios.

All clients watch one session of the same server. What counts is its CPU time for each delivery. That depends
on how many events are delivered together, which in a closed loop differs from run to run; so it is also
measured with one event at a time and with a hundred.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from ..load.http2 import http2_watcher_main
from ..load.process import BenchmarkError, WorkerProcess, raise_file_limit
from ..load.publishers import PublishRequest, publisher_main
from ..load.watchers import watcher_main
from ..servers import Server

__all__ = ["CONTENDERS", "main", "run_round"]

SESSION = "bench"
PATH = f"/api/sessions/{SESSION}/status/stream"
REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
PUBLISH = PublishRequest("/api/sessions/*/events", b'{"type":"tick","data":', b"}")
PUBLISH_LINES = PublishRequest(
    "/api/sessions/*/events", b'{"type":"tick","data":', b"}", content_type="application/x-ndjson"
)
RATE = 20.0  # events per second, where they come one at a time
SIZE = 150  # bytes of a payload
PATIENCE = 6.0
TIMEOUT = 120.0
BUFFER = {"buffer_events": 1_000_000, "buffer_bytes": 2**28}  # no client is cut, however busy the machine is


class Contender(NamedTuple):
    """``streams`` on each connection; None: over HTTP/1.1, which has one."""

    name: str
    streams: int | None


CONTENDERS = (
    Contender("HTTP/1.1", None),
    Contender("HTTP/2, 1 stream a connection", 1),
    Contender("HTTP/2, 100 streams a connection", 100),
)


class Load(NamedTuple):
    """How is published: the command of the publishers, with its arguments, and its sequences."""

    name: str
    command: str
    arguments: dict[str, Any]
    sequences: int = 1


def _closed_loop(connections: int) -> Load:
    shares = [[(SESSION, sequence)] for sequence in range(connections)]
    name = f"{connections} publisher{'s' * (connections > 1)} in a closed loop"
    return Load(name, "publish_closed_loop", {"request": PUBLISH, "shares": shares}, connections)


LOADS = (
    Load("one event at a time", "publish_paced", {"request": PUBLISH, "channel": SESSION, "rate": RATE}),
    Load("100 events in a request", "publish_lines", {"request": PUBLISH_LINES, "channel": SESSION}),
    _closed_loop(1),
    _closed_loop(8),
)


def run_round(contender: Contender, clients: int, seconds: float, settle: float = 1.0) -> dict[str, float]:
    """Measure a contender once, with a new server.

    Args:
        contender: how the clients connect.
        clients: streams.
        seconds: how long is published in each way.
        settle: how long the memory of the server must be stable, in seconds.

    Returns:
        The figures by their names.

    Raises:
        BenchmarkError: a client has missed an event.
    """
    http1 = contender.streams is None
    with ExitStack() as stack:
        server = stack.enter_context(Server(**BUFFER))
        watchers = stack.enter_context(WorkerProcess(watcher_main if http1 else http2_watcher_main))
        publishers = stack.enter_context(WorkerProcess(publisher_main))
        memory, cpu = server.stable_rss(settle), server.cpu_seconds()
        if contender.streams is None:
            requests = [(0, REQUEST)] * clients
            watchers.call("open", TIMEOUT, port=server.port, requests=requests, status=b"HTTP/1.1 200")
            watchers.call("discard_pending")
        else:
            connections = clients // contender.streams
            arguments = {"path": PATH, "connections": connections, "streams": contender.streams}
            watchers.call("open", TIMEOUT, port=server.port, **arguments)
        opened = server.cpu_seconds() - cpu
        figures = {
            "streams opened per CPU second": clients / max(opened, 0.01),
            "KB of the server for each idle stream": (server.stable_rss(settle) - memory) / clients / 1024,
        }
        for run, load in enumerate(LOADS, 1):
            latency = {"latency": False} if http1 else {}
            watchers.start("collect", run=run, sequences=load.sequences, patience=PATIENCE, **latency)
            cpu = server.cpu_seconds()
            published = publishers.call(
                load.command,
                TIMEOUT,
                port=server.port,
                size=SIZE,
                run=run,
                seconds=seconds,
                **load.arguments,
            )
            watchers.pipe.send(published["sent"])
            watched = watchers.result(TIMEOUT)
            if watched["faults"]:
                raise BenchmarkError(f"{contender.name}, {load.name}: {', '.join(watched['faults'])}")
            cpu = server.cpu_seconds() - cpu
            figures[f"deliveries per CPU second, {load.name}"] = watched["delivered"] / max(cpu, 0.01)
            if load.command == "publish_closed_loop":
                took = watched["last"] - published["start"]
                figures[f"deliveries per second, {load.name}"] = watched["delivered"] / took
        watchers.call("close")
    return figures


def print_table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians of each contender's rounds, with their ratio to those of the first."""
    medians = [
        {key: statistics.median(each[key] for each in measured) for key in measured[0]}
        for measured in rounds.values()
    ]
    print("\n| | " + " | ".join(rounds) + " |\n" + "|---" * (len(medians) + 1) + "|")
    for key, base in medians[0].items():
        cells = [f"{each[key]:,.1f} ({each[key] / base:.2f})" for each in medians]
        print(f"| {key} | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds, alternating the contenders, and print the table; return 1 if one failed."""
    parser = argparse.ArgumentParser(description="Compare event streams over HTTP/2 and over HTTP/1.1.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (3)")
    parser.add_argument("--clients", type=int, default=1000, help="streams, a multiple of 100 (1000)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long is published in each way (2)")
    options = parser.parse_args(arguments)
    raise_file_limit()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}", flush=True)
    rounds: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in CONTENDERS}
    try:
        for number in range(1, options.rounds + 1):
            for contender in CONTENDERS:
                print(f"  round {number}: {contender.name}", flush=True)
                rounds[contender.name].append(run_round(contender, options.clients, options.seconds))
    except (BenchmarkError, OSError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print_table(rounds)
    return 0
