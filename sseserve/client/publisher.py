"""Publish progress, events and NDJSON, each exactly once.

Every call has an idempotency key, and its request body is kept until the server has responded. So a
failed request can be retried: the server applies only what it has not applied yet.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
import trio

from ..backoff import Backoff
from ..concurrency import require_trio
from ..model import Artifact, Control
from .errors import (
    ClientError,
    ConnectionLost,
    RequestRejected,
    translate_httpx_errors,
    unwrap_exception_group,
)
from .messages import PublishResult
from .publish_request import PublishRequest, build_request, decode_response
from .retry import RetryPolicy
from .tls import trusted_authorities
from .token import AsyncBearer, AsyncToken

__all__ = ["Publisher"]

Line = str | bytes | Mapping[str, Any]

# Limits of one request with NDJSON. Its lines are kept for retries until the server has responded.
_MAX_LINES = 4096
_MAX_BYTES = 2**20
# Seconds to wait for the next line before the request is completed: servers do not wait long for a body,
# and the response may carry a control request for the worker.
_LINE_TIMEOUT = 0.25


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
        base_url: the server's URL, ``http://`` or ``https://``.
        headers: sent with every request.
        token: a bearer token, or a function, which may be asynchronous, that returns one that is valid now,
            and is called for every attempt.
        ca: path of the certificates (PEM) that https servers must be signed by; None: those of the variable
            ``SSL_CERT_FILE``, else those that the system trusts.
        retry_timeout: seconds to keep retrying a call after its first failure.
        timeout: seconds that one attempt may take; with NDJSON, that it may wait for the network.
        backoff: the delays between attempts.

    Raises:
        ValueError: ``token`` cannot be a token, or ``ca`` cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token: AsyncToken | None = None,
        ca: str | os.PathLike[str] | None = None,
        # Timeouts
        retry_timeout: float = 30.0,
        timeout: float = 30.0,
        backoff: Backoff | None = None,
    ) -> None:
        self._sessions_url = f"{base_url.rstrip('/')}/api/sessions"
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._backoff = backoff or Backoff(initial=0.5, maximum=10.0)
        timeouts = httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None)
        hooks = {} if token is None else {"request": [AsyncBearer(token, base_url).add_to]}
        self._http = httpx.AsyncClient(
            headers=dict(headers or {}),
            timeout=timeouts,
            event_hooks=hooks,
            verify=trusted_authorities(ca),
        )

    async def __aenter__(self) -> Self:
        require_trio("Publisher")
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
        """Publish a progress update; what is None stays unchanged.

        Args:
            session_id: the session.
            status: a label; ``completed``, ``failed``, ``cancelled`` and their synonyms end the session.
            progress: percent, 0 to 100.
            stage: the part of the work that is in progress.
            message: one sentence for the watchers.
            error: what went wrong, as text or as an object.
            data: any JSON value.
            artifacts: the files produced so far.
            restart: allow the progress to go backwards.
            key: the idempotency key; None generates one.

        Raises:
            ValueError: ``progress`` is not a finite number, which JSON cannot represent.
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
        payload = {name: value for name, value in fields.items() if value is not None}
        return await self._post(session_id, "progress", msgspec.json.encode(payload), key)

    async def event(
        self,
        session_id: str,
        type: str,  # noqa: A002 - the standard's term
        data: Any = None,
        *,
        retry: int | None = None,
        key: str | None = None,
    ) -> PublishResult:
        """Publish an event of any type.

        Args:
            session_id: the session.
            type: the event type.
            data: any JSON value.
            retry: the reconnection time for the watchers, in milliseconds (WHATWG HTML, section 9.2.6).
            key: the idempotency key; None generates one.
        """
        payload = {"type": type, "data": data} | ({} if retry is None else {"retry": retry})
        return await self._post(session_id, "events", msgspec.json.encode(payload), key)

    async def ndjson(
        self,
        session_id: str,
        lines: Iterable[Line] | AsyncIterable[Line],
        *,
        key: str | None = None,
        on_result: Callable[[PublishResult], None] | None = None,
    ) -> PublishResult:
        """Publish many updates and events in order.

        Each line is sent as soon as it is available. Lines that follow each other quickly share a request;
        at most 4,096 lines or about 1 MiB are kept for retries.

        Args:
            session_id: the session.
            lines: one update or event each, as JSON text or as a mapping.
            key: the idempotency key. With one, all lines share a single request, so that the key covers
                them all, and the memory for retries is unbounded; None generates one for each request.
            on_result: called after each request with the totals so far and the latest ``control``.

        Raises:
            RequestRejected: a line is invalid: ``line`` is its number (from 1), ``applied`` how many lines
                before it were applied.
            ValueError: a line contains a line break.
        """
        require_trio("Publisher")
        total = PublishResult(None, Control.CONTINUE, 0)
        lines_sent = 0
        with unwrap_exception_group():
            async with trio.open_nursery() as nursery:
                sender, receiver = trio.open_memory_channel[bytes](0)
                nursery.start_soon(_send_lines, lines, sender)
                async for first in receiver:
                    body = _BatchBody(first, receiver, bounded=key is None)
                    try:
                        result = await self._send(session_id, "events", body, "application/x-ndjson", key)
                    except RequestRejected as error:
                        error.applied += total.applied
                        if error.line is not None:
                            error.line += lines_sent
                        raise
                    lines_sent += body.line_count
                    total = PublishResult(
                        total.id if result.id is None else result.id,
                        result.control,
                        total.applied + result.applied,
                        total.created or result.created,
                    )
                    if on_result is not None:
                        on_result(total)
        return total

    async def _post(self, session_id: str, resource: str, body: bytes, key: str | None) -> PublishResult:
        return await self._send(session_id, resource, body, "application/json", key)

    async def _send(
        self, session_id: str, resource: str, body: bytes | _BatchBody, media_type: str, key: str | None
    ) -> PublishResult:
        require_trio("Publisher")
        request = build_request(self._sessions_url, session_id, resource, media_type=media_type, key=key)
        policy = RetryPolicy(request.url, self._retry_timeout, self._backoff)
        while True:
            try:
                return await self._attempt(request, body)
            except ClientError as error:
                delay = policy.next_delay(error, trio.current_time())
            await trio.sleep(delay)

    async def _attempt(self, request: PublishRequest, body: bytes | _BatchBody) -> PublishResult:
        url, headers = request.url, request.headers
        timeout = math.inf
        if isinstance(body, bytes):
            # httpx limits each read, but not their sum.
            timeout = self._timeout
            http_request = self._http.build_request("POST", url, headers=headers, content=body)
        else:
            headers = {"Transfer-Encoding": "chunked", **headers}
            http_request = self._http.build_request("POST", url, headers=headers)
            # As ``content`` it would be read through a generator that is not closed when a write fails.
            http_request.stream = body.rewind()
        try:
            with translate_httpx_errors(), trio.fail_after(timeout):
                response = await self._http.send(http_request)
        except trio.TooSlowError:
            raise ConnectionLost("timed out waiting for data from the server") from None
        return decode_response(url, response)


class _BatchBody(httpx.AsyncByteStream):
    """The body of one request with NDJSON: the lines received so far, and those still to come.

    A retry sends the same lines and no more, since the first attempt may have been applied as a whole.
    """

    def __init__(self, first: bytes, receiver: trio.MemoryReceiveChannel[bytes], *, bounded: bool) -> None:
        self._receiver = receiver
        self._bounded = bounded
        self._chunks = [first]
        self._size = len(first)
        self._next = 0
        self._is_open = True

    @property
    def line_count(self) -> int:
        """The number of lines so far, empty ones included."""
        return sum(chunk.count(b"\n") for chunk in self._chunks)

    def rewind(self) -> Self:
        """Start the next attempt."""
        self._is_open = self._is_open and self._next == 0
        self._next = 0
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._next == len(self._chunks):
            await self._receive_line()
        data = b"".join(self._chunks[self._next :])
        self._next = len(self._chunks)
        return data

    async def _receive_line(self) -> None:
        is_full = self._bounded and (len(self._chunks) >= _MAX_LINES or self._size >= _MAX_BYTES)
        if self._is_open and not is_full:
            with trio.move_on_after(_LINE_TIMEOUT if self._bounded else math.inf):
                try:
                    line = await self._receiver.receive()
                except trio.EndOfChannel:
                    raise StopAsyncIteration from None
                self._chunks.append(line)
                self._size += len(line)
                return
        raise StopAsyncIteration


async def _send_lines(
    lines: Iterable[Line] | AsyncIterable[Line], sender: trio.MemorySendChannel[bytes]
) -> None:
    """Send the encoded lines one at a time, so that none is consumed before it can be sent.

    Empty lines are joined to the next one: empty lines alone are invalid, but they count when
    lines are numbered.
    """
    empty_lines = b""
    with sender:
        async with aclosing(_iterate(lines)) as iterator:
            async for line in iterator:
                chunk = empty_lines + _encode_line(line)
                if chunk.isspace():
                    empty_lines = chunk
                else:
                    empty_lines = b""
                    await sender.send(chunk)


async def _iterate(lines: Iterable[Line] | AsyncIterable[Line]) -> AsyncGenerator[Line]:
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


def _encode_line(line: Line) -> bytes:
    if isinstance(line, Mapping):
        return msgspec.json.encode(line) + b"\n"
    raw = line.encode() if isinstance(line, str) else line
    raw = raw.removesuffix(b"\n")
    if b"\n" in raw:
        raise ValueError("a line of NDJSON cannot contain a line break")
    return raw + b"\n"
