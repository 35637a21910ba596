"""A load that goes on whatever happens to the instances: EventSource clients, and persistent publishers.

A publisher repeats each request, with its Idempotency-Key, until it is acknowledged. In the end every client
must have every acknowledged event, once and in order.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any

from ..load.event_sources import event_sources_main
from ..load.process import BenchmarkError, WorkerProcess
from .deployment import Deployment

__all__ = ["Load", "report"]

TIMEOUT = 60.0  # for all streams to be open again, and for all clients to have everything
RETRY = 0.2  # seconds before a request is repeated
REPEATED = frozenset({429, 502, 503, 504})  # statuses after which a request is repeated


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
        self.acknowledged_at = 0.0  # the monotonic time of the last acknowledgement
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
                time.sleep(RETRY)  # as a client does, before it repeats the request
            self.acknowledged += 1
            self.acknowledged_at = time.monotonic()
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


class Load:
    """Clients and publishers of some sessions, through nginx; leaving the context ends them.

    Args:
        deployment: the instances and nginx.
        clients: number of clients.
        sessions: number of sessions, each with a publisher.
        rate: events per second of all publishers.
        patience: how long to wait for missing events at the end, in seconds.
    """

    def __init__(
        self, deployment: Deployment, *, clients: int, sessions: int, rate: float, patience: float
    ) -> None:
        self._deployment = deployment
        self._number = clients
        self._sessions = [f"session-{number}" for number in range(sessions)]
        self._patience = patience
        self._stopping = threading.Event()
        interval = sessions / rate
        self.publishers = [
            Publisher(deployment.port, session, interval, number / rate, self._stopping)
            for number, session in enumerate(self._sessions)
        ]

    def __enter__(self) -> Load:
        self._clients = WorkerProcess(event_sources_main)
        try:
            self._deployment.instances[0].create_sessions(self._sessions)
            self._clients.call(
                "open", port=self._deployment.port, sessions=self._sessions, number=self._number
            )
            self._clients.start("watch", patience=self._patience)
        except BaseException:
            self._clients.__exit__(*sys.exc_info())
            raise
        for publisher in self.publishers:
            publisher.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stopping.set()
        self._clients.__exit__(*exception)

    def wait_until_open(self) -> None:
        """Wait until no client waits for a stream."""
        deadline = time.monotonic() + TIMEOUT
        while count := self._ask(None):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{count} clients have no stream after {TIMEOUT:g} s")
            time.sleep(0.02)  # between two questions

    def wait_until_delivered(self) -> float:
        """Wait until all clients have what is acknowledged now; return the monotonic time of that moment."""
        return float(self._ask((self._acknowledged(),)))

    def _ask(self, question: object) -> Any:
        self._clients.pipe.send(question)
        return self._clients.result(TIMEOUT)

    def _acknowledged(self) -> dict[str, int]:
        return {publisher.session: publisher.acknowledged for publisher in self.publishers}

    def finish(self) -> dict[str, Any]:
        """Stop publishing, wait until all clients have everything, and return all counts."""
        self._stopping.set()
        for publisher in self.publishers:
            publisher.join()
        result: dict[str, Any] = self._ask(self._acknowledged())
        return {
            **result,
            "acknowledged": sum(publisher.acknowledged for publisher in self.publishers),
            "repeated": sum(publisher.repeated for publisher in self.publishers),
            "slowest": max(publisher.slowest for publisher in self.publishers),
            "failures": [publisher.failure for publisher in self.publishers if publisher.failure],
            "log": self._deployment.nginx.log(),
        }


def report(result: dict[str, Any]) -> bool:
    """Print the counts; return whether every client has got every event once and in order."""
    told = "".join(f", {name}: {count:,}" for name, count in sorted(result["told"].items()))
    print(f"events acknowledged: {result['acknowledged']:,}, requests repeated: {result['repeated']}")
    print(f"slowest acknowledgement: {result['slowest']:.2f} s")
    print(f"reconnections: {result['reconnections']:,}{told}")
    counts = {name: result[name] for name in ("lost", "doubled", "reordered")}
    for name, per_client in counts.items():
        affected = sum(count > 0 for count in per_client)
        print(f"events {name}: {sum(per_client)}, clients affected: {affected}")
    for status, count in result["refused"].items():
        print(f"streams refused for good: {count} x {status}")
    for failure in result["failures"]:
        print(f"failure: {failure}")
    if result["refused"]:
        print(f"nginx:\n{result['log']}", file=sys.stderr)
    return not (any(map(sum, counts.values())) or result["refused"] or result["failures"])
