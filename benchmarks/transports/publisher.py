"""The process that publishes: progress at a fixed rate, over one connection that is kept.

If a response takes longer than the time to the next update, that is published late; its time is the one when
it was to be published, so that its latency includes the delay.
"""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing
from multiprocessing.connection import Connection

from ..load.process import BenchmarkError, serve_commands

__all__ = ["publisher_main"]

MESSAGE = "Rendering the frames of scene 3"


def publish(
    *, host: str, port: int, session: str, first: int, count: int, interval: float, delay: float = 0.0
) -> dict[str, float]:
    """Publish the numbers from ``first`` on, ``count`` of them.

    Args:
        host: where the server is.
        port: likewise.
        session: its id.
        first: the first number.
        count: how many.
        interval: seconds between two.
        delay: seconds before the first.

    Returns:
        The most seconds that one was late (``late``), and when the first was to be published, in nanoseconds
        (``start``).

    Raises:
        BenchmarkError: the server did not accept one.
    """
    with closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
        start = time.monotonic_ns() + int(delay * 1e9)
        late = 0.0
        for index in range(count):
            due = start + int(index * interval * 1e9)
            wait = (due - time.monotonic_ns()) / 1e9
            if wait > 0:
                time.sleep(wait)  # until the next one is due
            late = max(late, -wait)
            number = first + index
            body = {
                "status": "processing",
                "progress": round(100 * number / (number + 100), 2),  # rises, and never ends
                "message": MESSAGE,
                "data": {"n": number, "t": due},
            }
            connection.request("POST", f"/api/sessions/{session}/progress", json.dumps(body))
            response = connection.getresponse()
            text = response.read()
            if response.status != 202:
                raise BenchmarkError(f"an update was not accepted: {response.status} {text[:300]!r}")
    return {"late": late, "start": float(start)}


def publisher_main(pipe: Connection) -> None:
    """Run the commands of the process."""
    serve_commands(pipe, {"publish": publish})
