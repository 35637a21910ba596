"""Publishing progress, events and batches, each exactly once.

Every call carries an idempotency key, and what a call has sent is kept until the server has answered it.
So a call that failed on the way can be sent again: the server applies what it has not applied yet.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
import trio

from ..model import Artifact, Control
from .backoff import Backoff
from .errors import ClientError, RequestRejected, translate_httpx_errors, unwrap_exception_group
from .messages import PublishResult
from .publish_request import PublishRequest, build_request, decode_response
from .retry import RetryPolicy

__all__ = ["Publisher"]

Line = str | bytes | Mapping[str, Any]

# What one request of a batch may hold. All of it is kept until it is answered.
_MAX_LINES = 4096
_MAX_BYTES = 2**20
# A request whose next line does not come within that time is brought to its end: servers do not wait
# long for a body, and its answer may have news. Seconds.
_LINGER = 0.25


class Publisher:
    """Publishes to the sessions of one server::

        async with Publisher("http://127.0.0.1:8000") as publisher:
            result = await publisher.progress("report-42", progress=40, message="reading")
            if result.control is Control.CANCEL: ...

    All calls raise ``RequestRejected`` (or its subclass ``SessionFinished``) when the server rejects the
    request, ``CannotConnect`` when it could not be reached for ``retry_timeout`` seconds, and
    ``InvalidResponse``. A call that was cancelled, or that raised ``CannotConnect``, may have been
    applied or not; repeat it with the same ``key`` to make sure that it is applied exactly once.

    Args:
        base_url: where the server is.
        headers: to send with every request.
        retry_timeout: how long a call is tried again after its first failure, in seconds.
        timeout: how long one attempt may wait for its answer, in seconds.
        backoff: how long to wait between attempts.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        # Times
        retry_timeout: float = 30.0,
        timeout: float = 30.0,
        backoff: Backoff | None = None,
    ) -> None:
        self._sessions_url = f"{base_url.rstrip('/')}/api/sessions"
        self._retry_timeout = retry_timeout
        self._backoff = backoff or Backoff(initial=0.5, maximum=10.0)
        limits = httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None)
        self._http = httpx.AsyncClient(headers=dict(headers or {}), timeout=limits)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(exc_type, exc, traceback)

    async def progress(
        self,
        session_id: str,
        *,
        status: str | None = None,
        progress: float | None = None,
        stage: str | None = None,
        message: str | None = None,
        error: str | Mapping[str, Any] | None = None,
        data: Any = None,
        artifacts: Sequence[Artifact | Mapping[str, Any]] | None = None,
        restart: bool = False,
        key: str | None = None,
    ) -> PublishResult:
        """Publish progress (percent, 0 to 100); what is None stays as it was.

        Raises:
            ValueError: ``progress`` is not a finite number, which JSON cannot say.
        """
        if progress is not None and not math.isfinite(progress):
            raise ValueError(f"progress must be a finite number, not {progress}")
        fields = {
            "status": status,
            "progress": progress,
            "stage": stage,
            "message": message,
            "error": error,
            "data": data,
            "artifacts": artifacts,
            "restart": restart or None,
        }
        said = {name: value for name, value in fields.items() if value is not None}
        return await self._post(session_id, "progress", msgspec.json.encode(said), key)

    async def event(
        self,
        session_id: str,
        type: str,  # noqa: A002 - the event stream's own word
        data: Any = None,
        *,
        retry: int | None = None,
        key: str | None = None,
    ) -> PublishResult:
        """Publish an event of a type of your own. ``retry``: when watchers reconnect, in milliseconds."""
        event = {"type": type, "data": data} | ({} if retry is None else {"retry": retry})
        return await self._post(session_id, "events", msgspec.json.encode(event), key)

    async def batch(
        self,
        session_id: str,
        lines: Iterable[Line] | AsyncIterable[Line],
        *,
        key: str | None = None,
        on_result: Callable[[PublishResult], None] | None = None,
    ) -> PublishResult:
        """Publish many updates and events in order: each line is one, as JSON text or as a mapping.

        Each line is sent when it comes. As many as come in quick succession share a request; at most
        4,096 lines or about 1 MiB are kept for sending them again. With a ``key`` of your own all lines
        share one request, so that the key covers them all; then nothing bounds what is kept.

        Args:
            on_result: called after each request with the sum so far; its ``control`` is news.

        Raises:
            RequestRejected: a line is invalid: ``line`` is its number (from 1), ``applied`` how many lines
                before it were applied.
            ValueError: a line holds a line end.
        """
        total = PublishResult(None, Control.CONTINUE, 0)
        sent = 0
        with unwrap_exception_group():
            async with trio.open_nursery() as nursery:
                send, source = trio.open_memory_channel[bytes](0)
                nursery.start_soon(_feed, lines, send)
                async for first in source:
                    body = _Body(first, source) if key is None else _Body(first, source, bounded=False)
                    try:
                        result = await self._send(session_id, "events", body, "application/x-ndjson", key)
                    except RequestRejected as error:
                        error.applied += total.applied
                        if error.line is not None:
                            error.line += sent
                        raise
                    sent += body.lines
                    total = PublishResult(
                        total.id if result.id is None else result.id,
                        result.control,
                        total.applied + result.applied,
                    )
                    if on_result is not None:
                        on_result(total)
        return total

    async def _post(self, session_id: str, resource: str, body: bytes, key: str | None) -> PublishResult:
        return await self._send(session_id, resource, body, "application/json", key)

    async def _send(
        self, session_id: str, resource: str, body: bytes | _Body, media_type: str, key: str | None
    ) -> PublishResult:
        request = build_request(self._sessions_url, session_id, resource, media_type=media_type, key=key)
        policy = RetryPolicy(request.url, self._retry_timeout, self._backoff)
        while True:
            try:
                return await self._attempt(request, body)
            except ClientError as error:
                delay = policy.next_delay(error, trio.current_time())
            await trio.sleep(delay)

    async def _attempt(self, request: PublishRequest, body: bytes | _Body) -> PublishResult:
        url, headers = request.url, request.headers
        if isinstance(body, bytes):
            http_request = self._http.build_request("POST", url, headers=headers, content=body)
        else:
            headers = {"Transfer-Encoding": "chunked", **headers}
            http_request = self._http.build_request("POST", url, headers=headers)
            # As ``content`` it would be read through a generator that nobody closes when a write fails.
            http_request.stream = body.rewound()
        with translate_httpx_errors():
            response = await self._http.send(http_request)
        return decode_response(url, response)


class _Body(httpx.AsyncByteStream):
    """The body of one request of a batch: what has come from ``source`` so far, and what comes next.

    Sent again it says the same as before and no more, for the first attempt may have arrived whole.
    """

    def __init__(
        self, first: bytes, source: trio.MemoryReceiveChannel[bytes], *, bounded: bool = True
    ) -> None:
        self._source = source
        self._bounded = bounded
        self._kept = [first]
        self._size = len(first)
        self._next = 0
        self._grows = True

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return sum(chunk.count(b"\n") for chunk in self._kept)

    def rewound(self) -> Self:
        """Begin the next attempt."""
        self._grows = self._grows and self._next == 0
        self._next = 0
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._next == len(self._kept):
            await self._grow()
        chunk = b"".join(self._kept[self._next :])
        self._next = len(self._kept)
        return chunk

    async def _grow(self) -> None:
        full = self._bounded and (len(self._kept) >= _MAX_LINES or self._size >= _MAX_BYTES)
        if self._grows and not full:
            with trio.move_on_after(_LINGER if self._bounded else math.inf):
                try:
                    line = await self._source.receive()
                except trio.EndOfChannel:
                    raise StopAsyncIteration from None
                self._kept.append(line)
                self._size += len(line)
                return
        raise StopAsyncIteration


async def _feed(lines: Iterable[Line] | AsyncIterable[Line], send: trio.MemorySendChannel[bytes]) -> None:
    """Hand lines on one at a time, so that none is taken before there is somebody to send it.

    Empty lines travel with the next one: alone they would be a batch of nothing, but they count.
    """
    blank = b""
    with send:
        async with aclosing(_each(lines)) as each:
            async for line in each:
                raw = blank + _encode(line)
                if raw.isspace():
                    blank = raw
                else:
                    blank = b""
                    await send.send(raw)


async def _each(lines: Iterable[Line] | AsyncIterable[Line]) -> AsyncGenerator[Line]:
    if isinstance(lines, AsyncGenerator):
        async with aclosing(lines):
            async for line in lines:
                yield line
    elif isinstance(lines, AsyncIterable):
        async for line in lines:
            yield line
    else:
        for line in lines:
            yield line


def _encode(line: Line) -> bytes:
    if isinstance(line, Mapping):
        return msgspec.json.encode(line) + b"\n"
    raw = line.encode() if isinstance(line, str) else line
    raw = raw.removesuffix(b"\n")
    if b"\n" in raw:
        raise ValueError("a line of a batch cannot hold a line end")
    return raw + b"\n"
