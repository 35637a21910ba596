"""What the tests of examples/deploy share: a job that is streamed, interrupted by a restart, and resumed."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from processes import ROOT, Program, wait_until
from tokens import bearer, make_token

from sseserve.config import Settings, load

__all__ = [
    "ADMIN",
    "BIN",
    "DEPLOY",
    "Job",
    "over_http",
    "publish_in_redis",
    "run_command",
    "serve_and_restart",
    "settings_of",
    "watch_to_the_end",
    "watch_until_stopped",
]

DEPLOY = ROOT / "examples" / "deploy"
BIN = Path(sys.executable).parent  # of the server, and of the programs that check formats
AMOUNT = re.compile(r'"progress": ?(\d+)')  # in an event's data
ADMIN = bearer(make_token(role="admin"))


def run_command(command: list[str], environ: dict[str, str]) -> Program:
    """Start a server by the command of an example, with a short drain so that no test takes long."""
    return Program(BIN / command[0], *command[1:], **{**environ, "SSESERVE_DRAIN": "1", "PATH": str(BIN)})


class Job(NamedTuple):
    """How a platform's clients watch a job, and how its workers publish an amount."""

    stream: str
    publish: Callable[[int], Any]


def _amounts(lines: Iterator[str]) -> Iterator[str]:
    """Read a stream; yield the amount of each event that has one."""
    return (match[1] for line in lines if (match := AMOUNT.search(line)))


def watch_until_stopped(client: httpx.Client, job: Job, stop: Callable[[], int]) -> str:
    """Stream a job, stop its server in the middle, and return the cursor to resume with."""
    with client.stream("GET", job.stream) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        for percent in (20, 40):
            job.publish(percent)
            assert str(percent) in _amounts(lines)
            cursor = next(lines).removeprefix("id: ")
        assert stop() == 0
        # The response is complete, and its client reconnects.
        assert [line.split(":")[0] for line in lines if line and line[0] != ":"] == ["retry"]
    return cursor


def watch_to_the_end(client: httpx.Client, job: Job, cursor: str) -> None:
    """Resume a stream; what was published meanwhile comes first, then the end."""
    job.publish(60)
    with client.stream("GET", job.stream, headers={"Last-Event-ID": cursor}) as response:
        assert response.status_code == 200, response.read()
        amounts = _amounts(response.iter_lines())
        assert next(amounts) == "60"
        job.publish(100)
        assert next(amounts) == "100"
        assert list(amounts) == []


def over_http(client: httpx.Client, session: str) -> Callable[[int], None]:
    """Return what publishes an amount in the sessions dialect."""

    def publish(percent: int) -> None:
        body = {"progress": percent, "status": "done" if percent == 100 else "running"}
        path, headers = f"/api/sessions/{session}/progress", {"Idempotency-Key": str(percent)}
        # A proxy whose server has just stopped responds with 502, and publishers repeat the request.
        response = wait_until(
            lambda: (got := client.post(path, json=body, headers=headers)).status_code != 502 and got, path
        )
        assert response.is_success, (response.text, response.headers)

    return publish


def publish_in_redis(redis: Any, channel: str, **fields: Any) -> Callable[[int], None]:
    """Return what publishes an amount on a channel, to all servers that read it."""

    def publish(percent: int) -> None:
        status = "completed" if percent == 100 else "processing"
        message = json.dumps({**fields, "status": status, "progress": percent})
        wait_until(lambda: redis.command("PUBLISH", channel, message) != b":0\r\n", f"a reader of {channel}")

    return publish


def settings_of(environ: dict[str, str]) -> Settings:
    """Return the settings that a server has with these variables alone."""
    return load(environ={name: text for name, text in environ.items() if name != "PATH"})


def serve_and_restart(
    program: Callable[[], Program], url: str, begin: Callable[[httpx.Client], Job], stop: int = signal.SIGTERM
) -> None:
    """Run a server, begin a job, stream it, stop the server, start it again, and stream the rest."""
    with httpx.Client(base_url=url, headers=ADMIN, timeout=10) as client, ExitStack() as stack:
        server = stack.enter_context(program())
        server.wait_for_output("serving at")
        job = begin(client)
        assert httpx.get(f"{url}{job.stream}").status_code == 401  # nobody is let in without a token
        cursor = watch_until_stopped(client, job, lambda: server.wait(stop))
        server = stack.enter_context(program())
        server.wait_for_output("serving at")
        watch_to_the_end(client, job, cursor)
        assert server.wait(stop) == 0, server.output
