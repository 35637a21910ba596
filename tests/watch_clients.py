"""One client for every way to watch, which keeps all that it receives; and tokens for it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from urllib.parse import urlencode

import trio
from harness import ServerHarness
from live_harness import SocketReader
from raw_client import HANDSHAKE, RawConnection, request_bytes
from test_http2 import Client as HTTP2Connection

from sseserve import Grant, Unauthorized
from sseserve.sse import Decoder

__all__ = ["POLLS", "SOCKETS", "STREAMED", "TRANSPORTS", "Authority", "WatchClient", "bearer"]

STREAMED = ("sse", "sse over h2", "bundle", "list", "bundle over h2")
SOCKETS = ("websocket", "websocket over h2")
POLLS = ("status", "history", "claim")
TRANSPORTS = (*STREAMED, *SOCKETS, *POLLS)

_PATHS = {
    "sse": "/api/sessions/{}/status/stream",
    "bundle": "/api/streams?session={}",
    "list": "/api/streams/sessions",
    "websocket": "/api/sessions/{}/status/ws",
    "status": "/api/sessions/{}/status?wait=60",
    "history": "/api/sessions/{}/events?wait=60",
    "claim": "/api/claims?wait=60",
}


def bearer(token: str | None) -> list[tuple[str, str]]:
    """The header that a token comes in."""
    return [] if token is None else [("Authorization", f"Bearer {token}")]


class Authority:
    """Knows whose each token is: ``tokens`` are the grants by the tokens' text."""

    def __init__(self, **tokens: Grant) -> None:
        self.tokens = tokens

    async def authenticate(self, request: Any) -> Grant:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or token not in self.tokens:
            raise Unauthorized("a bearer token is required")
        return self.tokens[token]


class Received(NamedTuple):
    """A message of a stream or a WebSocket."""

    event: str | None
    data: Any


class WatchClient:
    """Watches until the server ends that: over one of ``TRANSPORTS``. ``run`` it in a task.

    ``status`` is that of the (last) response, ``received`` the messages of a stream or a WebSocket, ``raw``
    all bytes, ``code`` that of a WebSocket's close.
    """

    def __init__(
        self,
        harness: ServerHarness,
        transport: str,
        session_id: str = "s",
        *,
        token: str | None = None,
        ticket: str | None = None,
        path: str | None = None,
        cursor: str | None = None,
    ) -> None:
        self._harness = harness
        self.transport = transport
        name = transport.removesuffix(" over h2")
        self._path = (path or _PATHS[name]).format(session_id)
        query = {key: value for key, value in (("ticket", ticket), ("last_event_id", cursor)) if value}
        if query:
            self._path += ("&" if "?" in self._path else "?") + urlencode(query)
        self._headers = bearer(token)
        self.status: int | None = None
        self.received: list[Received] = []
        self.raw = b""
        self.code: int | None = None
        self.ended = False
        self._decoder = Decoder()
        self._frames = SocketReader()
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<WatchClient {self.transport} {self._path} {self.status} {self.received} ended={self.ended}>"

    @property
    def names(self) -> list[str | None]:
        """The names of the messages."""
        return [message.event for message in self.received]

    def leave(self) -> None:
        """Disconnect."""
        self._scope.cancel()

    async def run(self) -> None:
        """Connect, and receive to the end."""
        connection = self._harness.connect()
        try:
            with self._scope:
                if self.transport.endswith("over h2"):
                    await self._run_http2(HTTP2Connection(connection.stream))
                elif self.transport in POLLS:
                    await self._poll(connection)
                else:
                    await self._run_http1(connection)
        except trio.BrokenResourceError:
            pass
        finally:
            self.ended = True
            await trio.aclose_forcefully(connection.stream)

    def _feed(self, data: bytes) -> None:
        self.raw += data
        if self.transport in SOCKETS:
            self.received += [Received(m.event, m.data) for m in self._frames.feed(data)]
            if self._frames.closed is not None:
                self.code = self._frames.closed.code
        else:
            self.received += [
                Received(event.event, json.loads(event.data)) for event in self._decoder.feed(data)
            ]

    async def _run_http1(self, connection: RawConnection) -> None:
        headers = [*self._headers, *(HANDSHAKE if self.transport == "websocket" else ())]
        await connection.send(request_bytes("GET", self._path, headers=headers))
        response = await connection.read_head()
        self.status = response.status
        if response.status not in (101, 200):
            self.raw = await connection.read_to_end()
            return
        while True:
            data, connection.buffer = connection.buffer, b""
            self._feed(data)
            if self.code is not None or not await connection.receive():
                return

    async def _run_http2(self, client: HTTP2Connection) -> None:
        headers = {name.lower(): value for name, value in self._headers}
        if self.transport in SOCKETS:
            number = await client.websocket(self._path, **headers)
        else:
            number = await client.request("GET", self._path, headers.items())
        await client.until(lambda: number in client.status or number in client.ended)
        self.status = int(client.status.get(number, 0))
        while True:
            data, client.body[number] = client.body[number], b""
            if self.status == 200:
                self._feed(data)
            else:
                self.raw += data
            if number in client.ended or self.code is not None or not await client.read():
                return

    async def _poll(self, connection: RawConnection) -> None:
        """Ask again and again, each time after what is known already."""
        known: list[tuple[str, str]] = []
        path = self._path
        method = "POST" if self.transport == "claim" else "GET"
        while True:
            began = trio.current_time()
            body = b"" if method == "POST" else None
            response = await connection.request(method, path, body, [*self._headers, *known])
            self.status = response.status
            self.raw += response.body
            if response.status == 304 or (response.status == 204 and method == "POST"):
                if trio.current_time() == began:
                    return  # the session has ended: there is nothing to wait for
                continue
            if response.status != 200 or self.transport == "claim":
                return
            if self.transport == "status":
                known = [("If-None-Match", response.headers["etag"])]
            elif response.json["end"]:
                return
            else:
                path = f"{self._path}&after={response.json['next']}"
