"""Publish to many sessions, served by one process and by several on one port; print rates and ratios.

    python -m benchmarks workers [--workers 1,2] [--rounds 3] [--memory]

README.md describes what is measured. Exit status: 0 on success, 1 if a client missed an event or got
one twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from typing import Any

from ..load.event_sources import event_sources_main
from ..load.process import BenchmarkError, WorkerProcess, raise_file_limit
from ..load.publishers import PublishRequest, publisher_main
from ..servers import Server, cpu_seconds
from .deployment import Redis

TIMEOUT = 60.0
SIZE = 100  # bytes of an event's data


def run_round(workers: int, options: argparse.Namespace, *, memory: bool = False) -> dict[str, Any]:
    """Run one round with a new server, and a new Redis unless ``memory``; return its figures."""
    sessions = [f"many-{number}" for number in range(options.sessions)]
    with ExitStack() as stack:
        processes: dict[str, list[int]] = {}
        engine = "memory:"
        if not memory:
            redis = stack.enter_context(Redis())
            processes["redis"], engine = [redis.pid], redis.url
        server = stack.enter_context(Server(workers=workers, engine=engine, log_level="info"))
        processes["server"] = server.wait_for_workers()
        clients = stack.enter_context(WorkerProcess(event_sources_main))
        publishers = stack.enter_context(WorkerProcess(publisher_main))
        server.create_sessions(sessions)
        clients.call("open", TIMEOUT, port=server.port, sessions=sessions, number=len(sessions))
        clients.start("watch")
        before = {name: sum(map(cpu_seconds, pids)) for name, pids in processes.items()}
        channels = [(session, number) for number, session in enumerate(sessions)]
        published = publishers.call(
            "publish_closed_loop",
            TIMEOUT,
            port=server.port,
            request=PublishRequest("/api/sessions/*/events", b'{"type":"tick","data":', b"}"),
            size=SIZE,
            run=0,
            shares=[channels[number :: options.connections] for number in range(options.connections)],
            seconds=options.seconds,
        )
        clients.pipe.send({sessions[number]: count for number, count in published["sent"].items()})
        watched = clients.result(TIMEOUT)
        cpu = {name: sum(map(cpu_seconds, pids)) - before[name] for name, pids in processes.items()}
    seconds = watched["last"] - published["start"]
    cpu |= {"publishers": published["cpu"], "clients": watched["cpu"]}
    return {
        "rate": sum(published["sent"].values()) / seconds,
        "per_cpu": sum(published["sent"].values()) / cpu["server"],
        "cpu": {name: used / seconds for name, used in cpu.items()},
        "faults": {
            name: sum(watched[name]) for name in ("lost", "doubled", "reordered") if any(watched[name])
        },
    }


def main() -> int:
    """Run the rounds, alternating the numbers of workers, and print the table."""
    parser = argparse.ArgumentParser(description="Compare the publish rates of one process and of several.")
    parser.add_argument("--workers", default="1,2", help="numbers of workers (1,2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round (4)")
    parser.add_argument("--sessions", type=int, default=1000, help="sessions, each with one client (1000)")
    parser.add_argument("--connections", type=int, default=50, help="connections that publish (50)")
    parser.add_argument("--memory", action="store_true", help="measure one process without Redis too")
    options = parser.parse_args()
    raise_file_limit()
    targets = {f"{count} over Redis": (int(count), False) for count in options.workers.split(",")}
    if options.memory:
        targets["1 in memory"] = (1, True)
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in targets}
    per_cpu: dict[str, list[float]] = {name: [] for name in targets}
    faulty = False
    try:
        for number in range(options.rounds):
            for name, (workers, memory) in targets.items():
                result = run_round(workers, options, memory=memory)
                rates[name].append(result["rate"])
                per_cpu[name].append(result["per_cpu"])
                shares = ", ".join(f"{part} {share:.0%}" for part, share in result["cpu"].items())
                faults = ", ".join(f"{count} events {fault}" for fault, count in result["faults"].items())
                faulty |= bool(faults)
                end = f" !! {faults}" if faults else ""
                print(
                    f"  {number + 1}, workers: {name}: {result['rate']:,.0f}/s, CPU: {shares}{end}",
                    flush=True,
                )
    except (BenchmarkError, OSError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    first = statistics.median(next(iter(rates.values())))
    print("\n| workers | publishes/s | ratio | publishes per CPU second of the server |\n|---|---|---|---|")
    for name, values in rates.items():
        median = statistics.median(values)
        print(
            f"| {name} | {median:,.0f} ({min(values):,.0f} - {max(values):,.0f}) | {median / first:.2f} "
            f"| {statistics.median(per_cpu[name]):,.0f} |"
        )
    return 1 if faulty else 0
