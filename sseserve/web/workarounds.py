"""Quart-Trio 0.12, worked around. Nothing else in the package depends on their internals.

Each class names what it works around; ``tests/test_workarounds.py`` reproduces each defect without us, and
fails when a new version has mended it: then the work-around can go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from quart_trio.wrappers.request import TrioBody

__all__ = ["QuartApp"]

MAX_MESSAGE = 64 * 1024  # bytes of a response that may take the send timeout
MAX_UNREAD = 64 * 1024  # bytes of a body that wait for their handler


class PacedBody(TrioBody):
    """A request's body, of which at most one message beyond ``MAX_UNREAD`` is kept.

    Quart keeps all that has arrived, however slow the handler is, and all that nobody is going to read.
    """

    def __init__(self, *lengths: int | None) -> None:
        super().__init__(*lengths)
        self._is_dropped = False
        self._taken = trio.Event()

    async def __anext__(self) -> bytes:
        data = await super().__anext__()
        self._taken.set()
        return data

    def append(self, data: bytes) -> None:
        if not self._is_dropped:
            super().append(data)

    async def wait_for_capacity(self) -> None:
        """Wait until the handler has read what has arrived."""
        while len(self._data) >= MAX_UNREAD:
            self._taken = trio.Event()
            await self._taken.wait()

    def drop(self) -> None:
        """Keep nothing from now on: nobody is going to read it."""
        self._is_dropped = True
        self.clear()
        self._taken.set()


class _Request(TrioRequest):
    body_class: type[PacedBody] = PacedBody
    body: PacedBody


class BoundedConnection(TrioASGIHTTPConnection):
    """One request, whose response is sent within a timeout for each message of at most ``MAX_MESSAGE`` bytes.

    - The last message is not cancelled by a disconnect: Hypercorn queues ``http.disconnect`` inside it,
      Quart-Trio takes that for a client that has left, and would cancel the task before Hypercorn has closed
      the stream.
    - A body is read at the pace of its handler. Only while the handler is slower is it not noticed that
      the client leaves: what comes after an unread body is not known. So the bodies of methods that have
      none are dropped, and so is the rest of one that got its response early.
    - A task less waits for the response of each request: an event stream's is open for hours.
    - ``request.cleanup`` is an ``ExitStack`` that is closed when the response is over, however it ends: a
      response's own generator may never be started.
    """

    _body: PacedBody
    _is_last = False  # the last message is being sent

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        request = cast("_Request", self._create_request_from_scope(send))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.handle_messages, nursery, request, receive)
            await self.handle_request(nursery, request, send)

    async def handle_messages(  # type: ignore[override]  # as the class above does
        self, nursery: trio.Nursery, request: _Request, receive: ASGIReceiveCallable
    ) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.request":
                request.body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    request.body.set_complete()
                await request.body.wait_for_capacity()
            elif message["type"] == "http.disconnect":
                break
        if not self._is_last:
            nursery.cancel_scope.cancel()

    async def handle_request(  # type: ignore[override]  # as the class above does
        self, nursery: trio.Nursery, request: _Request, send: ASGISendCallable
    ) -> None:
        self._body = request.body
        if request.method != "POST":
            self._body.drop()
        with contextlib.ExitStack() as cleanup:
            request.cleanup = cleanup  # type: ignore[attr-defined]
            await super().handle_request(nursery, request, send)

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        timeout = self.app.config["SEND_TIMEOUT"]

        async def send_bounded(message: ASGISendEvent) -> None:
            for part in _split(message):
                self._is_last = part["type"] == "http.response.body" and not part.get("more_body", False)
                with trio.fail_after(timeout):
                    await send(part)

        self._body.drop()
        with contextlib.suppress(trio.TooSlowError):
            await super()._send_response(send_bounded, response)


def _split(message: Any) -> Iterator[Any]:
    """Split a message of a response into some of at most ``MAX_MESSAGE`` bytes."""
    body = message.get("body", b"")
    if len(body) <= MAX_MESSAGE:
        yield message
        return
    for start in range(0, len(body), MAX_MESSAGE):
        end = start + MAX_MESSAGE
        has_more = end < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:end], "more_body": has_more}


class QuartApp(QuartTrio):
    """A Quart-Trio application with the work-arounds of this module.

    Its configuration has ``SEND_TIMEOUT``, in seconds, for each message of a response.

    - A request reaches the application whatever its ``Host``. Quart matches it with its routes first,
      of which this has none, and fails if the host cannot be a name of the DNS.
    - A path may be empty (RFC 9110, section 4.2.3). Quart reads its first character.
    """

    asgi_http_class = BoundedConnection
    request_class = _Request

    def create_url_adapter(self, request: object) -> None:  # noqa: ARG002 - as Quart has it
        return None

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == "":
            scope = {**scope, "path": "/"}
        await super().asgi_app(scope, receive, send)
