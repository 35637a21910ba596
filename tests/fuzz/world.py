"""A server, a hostile client that plays a script, and an honest client beside it.

The invariant, whatever bytes the hostile client sends, in whatever pieces, and however it leaves:

- it gets responses below 500 (or 501, to a transfer coding that the server does not have), or the connection
  is closed;
- nothing is logged at level warning or above, so there is no traceback;
- it never gets a byte of the honest client's session, requests or tokens, and changes nothing outside its
  own sessions;
- the honest client's stream has its own events and nothing else; its next requests get their responses;
- when the hostile client has left, nothing of it is left: no connection, no task, no watcher.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest.mock import patch

import jwt
import trio
import trio.testing
from harness import START, ServerHarness
from trio.testing import memory_stream_pair

from sseserve.http import tickets
from sseserve.logs import Line

__all__ = ["HOSTILE_TOKEN", "TICKETS", "Step", "decode_script", "encode_script", "make_token", "play"]

KEY = "0123456789abcdef0123456789abcdef"
MARK = "kept-from-others"
# Warnings that are about no error of the server: nobody watches, and a trusted proxy is configured wrongly.
EXPECTED = ("No active listeners", "a connection of the proxy")


def make_token(subject: str, pattern: str) -> str:
    """Return a token that may do everything with the sessions whose ids match."""
    rights = {right: [pattern] for right in ("watch", "publish", "control", "create")}
    claims = {"sub": subject, "iat": int(START), "exp": int(START) + 86_400, "sseserve": rights}
    return jwt.encode(claims, KEY, "HS256")


HOSTILE_TOKEN = make_token("hostile", "a*")
HONEST_TOKEN = make_token("honest", "b*")
HONEST = [("Authorization", f"Bearer {HONEST_TOKEN}")]


TICKETS = tuple(f"ticket-{number}-{'x' * 30}" for number in range(20))  # the next ones that are made
PROXIED = ContextVar("PROXIED", default=False)  # whether a connection is one of a proxy that is trusted


class Step(NamedTuple):
    """What the hostile client does on one of its connections: "send", "end" (its side), "close" or "wait"."""

    action: str
    connection: int = 0
    data: bytes = b""


Script = tuple[Step, ...]


def encode_script(script: Script) -> str:
    """Encode a script as text for the corpus: a step in a line."""
    steps = [[step.action, step.connection, step.data.decode("latin-1")] for step in script]
    return "\n".join(map(json.dumps, steps)) + "\n"


def decode_script(text: str) -> Script:
    """Decode what ``encode_script`` has encoded."""
    lines = map(json.loads, text.splitlines())
    return tuple(Step(action, connection, data.encode("latin-1")) for action, connection, data in lines)


class _Records(logging.Handler):
    """What is logged that may not be: warnings, and responses that are errors of the server."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.offences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        line = record.msg
        status = line.fields.get("status", 0) if isinstance(line, Line) else 0
        if isinstance(status, int) and status >= 500 and status not in (501, 505):
            self.offences.append(message)
        if record.levelno >= logging.WARNING and not message.startswith(EXPECTED):
            self.offences.append(message + (str(record.exc_info[1]) if record.exc_info else ""))


class _World:
    """A server, and the connections of the hostile client."""

    def __init__(self, nursery: trio.Nursery, settings: dict[str, Any]) -> None:
        self.harness = ServerHarness(nursery, jwt_key=KEY, **settings)
        self.open = 0
        self.connections: dict[int, trio.abc.HalfCloseableStream] = {}
        self.outputs: list[bytearray] = []
        self._nursery = nursery

    def connection(self, number: int) -> trio.abc.HalfCloseableStream:
        """Return a connection; it is opened when it is first used."""
        if number not in self.connections:
            client, server = memory_stream_pair()
            self.open += 1
            self._nursery.start_soon(self._serve, server)
            self._nursery.start_soon(self._read, client)
            self.connections[number] = client
        return self.connections[number]

    async def _serve(self, stream: trio.abc.Stream) -> None:
        PROXIED.set(True)
        await self.harness.app.connections.serve(stream)
        self.open -= 1

    async def _read(self, stream: trio.abc.Stream) -> None:
        output = bytearray()
        self.outputs.append(output)
        try:
            while data := await stream.receive_some():
                output += data
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def play(self, step: Step) -> None:
        """Do one step. What the server has closed already cannot be sent to any more."""
        if step.action == "wait":
            await trio.sleep(step.connection)
            return
        stream = self.connection(step.connection)
        try:
            if step.action == "send":
                await stream.send_all(step.data)
            elif step.action == "end":
                await stream.send_eof()
            else:
                await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await trio.testing.wait_all_tasks_blocked()


async def _play(script: Script, settings: dict[str, Any]) -> list[bytes]:
    async with trio.open_nursery() as nursery:
        world = _World(nursery, settings)
        harness = world.harness
        if harness.app.connections._proxies._hops is None:
            # Streams in memory have no addresses to trust.
            harness.app.connections._proxies.begins_with_header = lambda _peer: PROXIED.get()  # type: ignore[method-assign]
        await harness.tracker.update("b-1", progress=1, message=MARK)
        await harness.tracker.update("a-1", progress=1)
        watcher = await harness.stream("/api/sessions/b-1/status/stream", headers=HONEST)
        for step in script:
            await world.play(step)
        for number, request_id in enumerate((MARK + "-1", MARK + "-2")):
            headers = [*HONEST, ("X-Request-ID", request_id)]
            response = await harness.post(
                "/api/sessions/b-1/events", {"type": "note", "data": number}, headers
            )
            assert (response.status, response.headers["x-request-id"]) == (202, request_id), response
        for stream in world.connections.values():
            await stream.aclose()
        events = [(await watcher.next()) for _ in range(3)]
        assert [event.event for event in events] == ["progress", "note", "note"], events
        assert [event.data for event in events[1:]] == [0, 1], events
        await watcher.disconnect()
        await trio.sleep(3)
        assert world.open == 0, "a connection is left"
        assert harness.app.broker.subscribers() == [], "a watcher is left"
        sessions = [session.id for session in await harness.tracker.sessions()]
        assert all(name == "b-1" or name.startswith("a") for name in sessions), sessions
        for output in world.outputs:
            for secret in (MARK, HONEST_TOKEN):
                assert secret.encode() not in output, bytes(output)
        nursery.cancel_scope.cancel()
    return list(map(bytes, world.outputs))


def play(script: Script, **settings: Any) -> list[bytes]:
    """Play a script against a new server, in virtual time; raises AssertionError if the invariant is broken.

    Args:
        script: the steps of the hostile client.
        settings: of the server.

    Returns:
        what the hostile client got on each of its connections.
    """
    records, logger, made = _Records(), logging.getLogger(), iter(TICKETS)
    level = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    try:
        with patch.object(tickets.secrets, "token_urlsafe", lambda _size=None: next(made)):
            outputs = trio.run(_play, script, settings, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        logger.removeHandler(records)
        logger.setLevel(level)
    assert records.offences == []
    return outputs
