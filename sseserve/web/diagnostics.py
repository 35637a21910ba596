"""Diagnostics: what a proxy makes of requests, responses, streams and WebSockets, for ``sseserve doctor``.

A client learns when what it receives was sent, and when what it has sent was received. Nothing is stored,
and of no session is anything told. Streams and requests that wait are counted and limited as all are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

import trio

from ..dialects import Encoding, Message
from ..dialects.base import encode_json
from ..errors import PayloadTooLarge
from ..http.diagnostics import FIELDS, Probe, SeenRequest
from ..http.messages import Request, Response, json_response
from ..http.routing import Match, number_parameter
from ..http.schemas import ReceivedParts
from ..live.subscriber import reconnect_delay
from .dispatch import Handler

__all__ = ["DiagnosticsHandlers"]

MAX_BODY = 65_536  # bytes
MAX_PARTS = 100  # of a body, whose times are noted


class DiagnosticsHandlers:
    """The handlers of diagnostics.

    Args:
        version: of this package.
        instance: the id of this instance.
        heartbeat: for how many seconds a stream is silent at most.
        proxy_header: the header that is believed of trusted proxies; empty: there are none.
        stopping: is set when the server begins to stop.
        drain: over how many seconds clients reconnect then.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        version: str,
        instance: str,
        *,
        heartbeat: float,
        proxy_header: str,
        stopping: trio.Event,
        drain: float,
        clock: Callable[[], float],
    ) -> None:
        self._version = version
        self._instance = instance
        self._heartbeat = heartbeat
        self._proxy_header = proxy_header
        self._stopping = stopping
        self._drain = drain
        self._clock = clock
        self._open: dict[str, int] = {}  # probes by their names

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"diagnose": self.describe, "diagnose_body": self.receive}

    async def describe(self, request: Request, match: Match) -> Response:
        """Describe the request; with ``wait``, that many seconds later."""
        await self._sleep(number_parameter(request.query, match, "wait", 0))
        return json_response(200, self._seen(request))

    def _seen(self, request: Request) -> SeenRequest:
        return SeenRequest(
            id=request.id,
            instance=self._instance,
            version=self._version,
            time=self._clock(),
            http_version=request.http_version,
            host=request.headers.get("host", ""),
            address=request.peer,
            proxy=request.proxy,
            proxy_header=self._proxy_header,
            fields={name: request.headers[name] for name in FIELDS if name in request.headers},
            names=list(request.headers),
            heartbeat=self._heartbeat,
            is_open=request.query.get("name", "") in self._open,
        )

    async def receive(self, request: Request, _match: Match) -> Response:
        """Say when the parts of the request's body have arrived."""
        began, size = trio.current_time(), 0
        parts: list[tuple[float, int]] = []
        async for part in request.body:
            size += len(part)
            if size > MAX_BODY or len(parts) == MAX_PARTS:
                raise PayloadTooLarge(f"this body may have {MAX_BODY} bytes, in {MAX_PARTS} parts")
            parts.append((round(trio.current_time() - began, 4), len(part)))
        request.check_grant()
        return json_response(200, ReceivedParts(parts, self._seen(request)))

    async def pages(self, probe: Probe, encoding: Encoding) -> AsyncGenerator[bytes]:
        """Yield the encoded messages of a probe, to its end or until the server stops."""

        def message(event: str, data: object) -> bytes:
            return encoding.message(Message(event, encode_json(data)))

        with self._name(probe.name):
            yield message("request", self._seen(probe.request))
            text = "." * probe.size
            for number in range(1, probe.events + 1):
                if not await self._sleep(probe.interval):
                    break
                yield message("probe", {"number": number, "time": self._clock(), "text": text})
            if await self._sleep(probe.quiet):
                yield message("end", {"time": self._clock()})
            else:
                yield encoding.retry(reconnect_delay(self._drain))

    async def _sleep(self, seconds: float) -> bool:
        """Sleep; return whether the server goes on."""
        with trio.move_on_after(seconds):
            await self._stopping.wait()
        return not self._stopping.is_set()

    @contextmanager
    def _name(self, name: str) -> Iterator[None]:
        """Let the probe of a name be open for the length of the block."""
        if not name:
            yield
            return
        self._open[name] = self._open.get(name, 0) + 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]
