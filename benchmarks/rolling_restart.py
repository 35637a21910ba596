"""Restart instances in turn, under load, behind nginx; count the events that clients lose or get twice.

    python benchmarks/rolling_restart.py [--clients 2000] [--instances 3] [--rate 50]

README.md describes what is measured. Exit status: 0 if every client got every event once and in order,
1 if not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

from deployment import Deployment
from event_sources import event_sources_main
from process import BenchmarkError, WorkerProcess, raise_file_limit

BACK_TIMEOUT = 60.0  # for all streams to be open again
RETRY = 0.2  # seconds before a publisher repeats a request
REPEATED = frozenset({429, 502, 503, 504})  # statuses after which a publisher repeats its request


class Publisher(threading.Thread):
    """Publishes the numbers 0, 1, 2... to one session, each until it is acknowledged, under a key of its own.

    Args:
        port: of nginx.
        session: the session's id.
        interval: between two events, in seconds.
        delay: before the first one, in seconds.
        stopping: ends it.
    """

    def __init__(
        self, port: int, session: str, interval: float, delay: float, stopping: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        self.acknowledged = self.repeated = 0
        self.slowest = 0.0  # seconds until an event was acknowledged
        self.failure: str | None = None
        self._port = port
        self.session = session
        self._interval, self._delay = interval, delay
        self._stopping = stopping
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        due = time.monotonic() + self._delay
        while not self._stopping.wait(max(due - time.monotonic(), 0)):
            began = time.monotonic()
            while (status := self._publish(self.acknowledged)) != 202:
                if status not in REPEATED:
                    self.failure = f"status {status} for a publish request"
                    return
                self.repeated += 1
                time.sleep(RETRY)
            self.acknowledged += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            due += self._interval

    def _publish(self, number: int) -> int:
        """Publish a number; return the status, 502 if the connection failed."""
        body = json.dumps({"type": "tick", "data": {"n": number}}, separators=(",", ":"))
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"{self.session}-{number}"}
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            self._connection.request("POST", f"/api/sessions/{self.session}/events", body, headers)
            response = self._connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            return 502
        return response.status


def wait_until_open(clients: WorkerProcess) -> None:
    """Wait until no client waits for a stream."""
    began = time.monotonic()
    while True:
        clients.pipe.send(None)
        if not (count := clients.result(BACK_TIMEOUT)):
            return
        if time.monotonic() - began > BACK_TIMEOUT:
            raise BenchmarkError(f"{count} clients have no stream after {BACK_TIMEOUT:g} s")
        time.sleep(0.02)  # between two questions


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the measurement; return the clients' counts with those of the publishers and the restarts."""
    files = raise_file_limit()
    sessions = [f"rolling-{number}" for number in range(options.sessions)]
    stopping = threading.Event()
    with ExitStack() as stack:
        deployment = stack.enter_context(
            Deployment(options.instances, files, options.engine, drain=options.drain)
        )
        clients = stack.enter_context(WorkerProcess(event_sources_main))
        deployment.instances[0].create_sessions(sessions)
        clients.call("open", port=deployment.port, sessions=sessions, number=options.clients)
        clients.start("watch", patience=options.patience)
        interval = options.sessions / options.rate
        publishers = [
            Publisher(deployment.port, session, interval, interval * number / options.sessions, stopping)
            for number, session in enumerate(sessions)
        ]
        for publisher in publishers:
            publisher.start()
        time.sleep(options.pause)  # load before the first restart
        statuses = []
        for index in range(options.instances):
            began = time.monotonic()
            statuses.append(deployment.stop(index))
            stopped = time.monotonic() - began
            deployment.replace(index)
            replaced = time.monotonic() - began
            wait_until_open(clients)
            print(
                f"instance {index + 1}: exit status {statuses[-1]} after {stopped:.1f} s, "
                f"replaced after {replaced:.1f} s, all streams open after {time.monotonic() - began:.1f} s",
                flush=True,
            )
            time.sleep(options.pause)  # load between two restarts
        stopping.set()
        for publisher in publishers:
            publisher.join()
        clients.pipe.send({publisher.session: publisher.acknowledged for publisher in publishers})
        result: dict[str, Any] = clients.result(BACK_TIMEOUT)
        log = deployment.nginx.log()
    failures = [publisher.failure for publisher in publishers if publisher.failure]
    failures += [f"an instance ended with status {status}" for status in statuses if status]
    return {
        **result,
        "acknowledged": sum(publisher.acknowledged for publisher in publishers),
        "repeated": sum(publisher.repeated for publisher in publishers),
        "slowest": max(publisher.slowest for publisher in publishers),
        "failures": failures,
        "log": log,
    }


def main() -> int:
    """Run the measurement, and print what was lost."""
    parser = argparse.ArgumentParser(description="Restart instances in turn, and count what clients lose.")
    parser.add_argument("--clients", type=int, default=2000, help="number of EventSource clients (2000)")
    parser.add_argument("--instances", type=int, default=3, help="number of instances (3)")
    parser.add_argument("--sessions", type=int, default=20, help="number of sessions and publishers (20)")
    parser.add_argument("--rate", type=float, default=50.0, help="events per second, of all publishers (50)")
    parser.add_argument("--drain", type=float, default=4.0, help="the instances' drain, in seconds (4)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between two restarts (3)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for missing events at the end (10)"
    )
    parser.add_argument("--engine", help="URL of the instances' Redis (default: one is run)")
    options = parser.parse_args()
    try:
        result = run(options)
    except (BenchmarkError, OSError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    counts = {name: result[name] for name in ("lost", "doubled", "reordered")}
    resumed = ", ".join(f"{status} {count}" for status, count in sorted(result["resumed"].items())) or "none"
    print(f"clients: {options.clients}, sessions: {options.sessions}, instances: {options.instances}")
    print(f"events acknowledged: {result['acknowledged']:,}, requests repeated: {result['repeated']}")
    print(f"slowest acknowledgement: {result['slowest']:.2f} s")
    print(f"reconnections: {result['reconnections']:,}, resumed: {resumed}")
    for name, per_client in counts.items():
        affected = sum(count > 0 for count in per_client)
        print(f"events {name}: {sum(per_client)}, clients affected: {affected}")
    for status, count in result["refused"].items():
        print(f"streams refused for good: {count} x {status}")
    for failure in result["failures"]:
        print(f"failure: {failure}")
    if result["refused"] or result["repeated"]:
        print(f"nginx:\n{result['log']}", file=sys.stderr)
    return 1 if any(map(sum, counts.values())) or result["refused"] or result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
