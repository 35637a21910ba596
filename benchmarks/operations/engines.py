"""Measure the appends of each engine from concurrent publishers: rate, and latency at p50 and p99.

    python -m benchmarks engines [--engine URL]... [--rounds 3] [--seconds 3] [--only append,http]

``append`` calls the engine in this process: each publisher on its own session, all on one, and each append
with an idempotency key. ``http`` publishes to a server in a process of its own, each publisher over one
keep-alive connection. A publisher waits for one append, of a progress record of about 450 bytes, before the
next: a rate is what all of them get together. Figures are the medians of the rounds.

Without --engine: memory:, and sqlite: on a file in --directory with both durabilities. Another engine should
be empty, such as a redis-server that was started for this.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from sseserve.config import Settings
from sseserve.engines import EngineListener, Stale, open_engine
from sseserve.model import Control, Event, Progress, Receipt, Session, State

from ..load.events import stamp
from ..load.process import BenchmarkError
from ..load.publishers import RESPONSE_TIMEOUT, Connection, PublishRequest

ROOT = Path(__file__).resolve().parents[2]
AT = 1_767_322_800.25
MESSAGE = "rendering frame 1200 of 4800"


class Figures(NamedTuple):
    """Appends per second, and their latency in seconds."""

    rate: float
    p50: float
    p99: float

    @classmethod
    def of(cls, latencies: list[float], elapsed: float) -> Figures:
        latencies.sort()
        count = len(latencies)
        return cls(count / elapsed, latencies[count // 2], latencies[int(count * 0.99)])


class Engine(NamedTuple):
    """An engine, as it is configured; ``name`` is for the table."""

    name: str
    url: str
    durability: str


async def measure_appends(settings: Settings, publishers: int, seconds: float, workload: str) -> Figures:
    """Append in this process."""
    latencies: list[float] = []
    async with trio.open_nursery() as nursery:
        engine = open_engine(settings, EngineListener())
        await nursery.start(engine.run)
        start = time.perf_counter()
        end = start + seconds
        label = f"{os.getpid()}-{time.time_ns()}"

        async def publish(publisher: int) -> None:
            session_id = label if workload == "one session" else f"{label}-{publisher}"
            number = 0
            while (began := time.perf_counter()) < end:
                number += 1
                while True:
                    before = await engine.latest(session_id) or Session(id=session_id, epoch="e")
                    seq = before.seq + 1
                    progress = Progress(
                        status="running",
                        state=State.RUNNING,
                        percent=number % 100,
                        stage="render",
                        message=MESSAGE,
                        started_at=AT,
                        updated_at=AT,
                        rate=0.25,
                        eta=120.5,
                    )
                    after = msgspec.structs.replace(
                        before, seq=seq, progress=progress, touched_at=AT, producer_seq=seq
                    )
                    receipt = None
                    if workload == "with keys":
                        key = f"progress {label}-{publisher}-{number}"
                        receipt = key, Receipt(str(after.cursor), Control.CONTINUE, 1, b"0123456789abcdef")
                    try:
                        await engine.append(after, [Event(seq, "progress", progress, AT)], receipt=receipt)
                    except Stale:
                        await trio.lowlevel.checkpoint()
                        continue
                    break
                latencies.append(time.perf_counter() - began)
                if settings.engine_url == "memory:":
                    await trio.lowlevel.checkpoint()  # no other engine lets a publisher go on at once

        async with trio.open_nursery() as running:
            for publisher in range(publishers):
                running.start_soon(publish, publisher)
        elapsed = time.perf_counter() - start
        nursery.cancel_scope.cancel()
    return Figures.of(latencies, elapsed)


def measure_http(engine: Engine, publishers: int, seconds: float) -> Figures:
    """Publish progress over HTTP to a server in a process of its own."""
    command = [sys.executable, "-m", "sseserve", "serve", "--port", "0", "--engine", engine.url]
    environ = {**os.environ, "SSESERVE_DURABILITY": engine.durability}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        port = 0
        for line in process.stderr:
            if match := re.search(r"serving at \S+:(\d+)", line):
                port = int(match[1])
                break
        if not port:
            raise BenchmarkError("the server did not start")
        prefix = b'{"status":"running","stage":"render","message":"%b","data":' % MESSAGE.encode()
        label = f"{os.getpid()}-{time.time_ns()}"
        request = PublishRequest("/api/sessions/*/progress", prefix, b"}")
        return _publish(
            {Connection(port): request.template(f"{label}-{number}", 150) for number in range(publishers)},
            seconds,
        )
    finally:
        process.terminate()
        process.communicate()


def _publish(connections: dict[Connection, bytes], seconds: float) -> Figures:
    """Send each connection's request, of which these are templates, again and again."""
    publishers = {connection.sock.fileno(): connection for connection in connections}
    sent_at: dict[int, float] = {}
    latencies: list[float] = []
    poll = select.epoll()
    start = time.perf_counter()
    for fd, publisher in publishers.items():
        poll.register(fd, select.EPOLLIN)
        sent_at[fd] = time.perf_counter()
        publisher.sock.sendall(connections[publisher] % (0, stamp()))
    while sent_at:
        ready = poll.poll(RESPONSE_TIMEOUT)
        if not ready:
            raise BenchmarkError(f"no response within {RESPONSE_TIMEOUT:g} s")
        for fd, _ in ready:
            publisher = publishers[fd]
            if not publisher.receive():
                continue
            now = time.perf_counter()
            latencies.append(now - sent_at.pop(fd))
            if now < start + seconds:
                sent_at[fd] = now
                publisher.sock.sendall(connections[publisher] % (len(latencies), stamp()))
    elapsed = time.perf_counter() - start
    poll.close()
    for publisher in connections:
        publisher.sock.close()
    return Figures.of(latencies, elapsed)


def report(name: str, workload: str, measure: Callable[[], Figures], rounds: int) -> None:
    """Print a row of the table."""
    results = [measure() for _ in range(rounds)]
    rate, p50, p99 = (statistics.median(values) for values in zip(*results, strict=True))
    rates = sorted(result.rate for result in results)
    print(
        f"| {name} | {workload} | {rate:,.0f} ({rates[0]:,.0f} - {rates[-1]:,.0f}) "
        f"| {p50 * 1000:.2f} | {p99 * 1000:.2f} |",
        flush=True,
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", action="append", metavar="URL", help="may be given several times")
    parser.add_argument("--publishers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="append,http", help="append, http or both (default)")
    parser.add_argument("--directory", help="of the file; default: that for temporary files")
    options = parser.parse_args()
    print(f"{options.publishers} publishers, {options.rounds} rounds of {options.seconds:g} s, "
          f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}\n")  # fmt: skip
    print("| engine | publishers | appends/s (median, range) | p50 ms | p99 ms |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="sseserve-", dir=options.directory) as folder:
        engines = [Engine(url, url, "normal") for url in options.engine or ()] or [
            Engine("memory:", "memory:", "normal"),
            Engine("sqlite: normal", f"sqlite:{folder}/normal.db", "normal"),
            Engine("sqlite: full", f"sqlite:{folder}/full.db", "full"),
        ]
        for engine in engines:
            settings = Settings(engine=engine.url, durability=engine.durability)
            if "append" in options.only:
                for workload in ("own session", "one session", "with keys"):

                    def measure(settings: Settings = settings, workload: str = workload) -> Figures:
                        arguments = settings, options.publishers, options.seconds, workload
                        return trio.run(measure_appends, *arguments)

                    report(engine.name, workload, measure, options.rounds)
            if "http" in options.only:

                def measure_over_http(engine: Engine = engine) -> Figures:
                    return measure_http(engine, options.publishers, options.seconds)

                report(engine.name, "HTTP, own session", measure_over_http, options.rounds)
    return 0
