"""Publish requests, from bytes to the tracker: one update or event, or many as NDJSON.

An ``Idempotency-Key`` makes a repeated request return the first one's response; NDJSON that
broke off continues where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import trio

from ..dialects import Dialect, Publication, PublishBody
from ..engines import Repeated
from ..errors import BadRequest, Conflict, Invalid, PayloadTooLarge, SseserveError, UnsupportedMediaType
from ..jsontext import decode, to_raw
from ..live.broker import Broker
from ..model import Receipt
from ..progress.tracker import IdempotencyKey, Tracker
from ..trace_context import TraceContext
from .auth import Action, Check, Grant, Policy
from .messages import ReceivedBody, Request, Response, json_response, read_body
from .routing import Match, Route
from .schemas import Accepted

__all__ = ["EventPublisher", "Publishing"]

log = logging.getLogger(__name__)

# "curl -d" sends a form's type, and many programs send none.
_JSON = frozenset({"", "application/json", "application/x-www-form-urlencoded", "text/plain"})
_NDJSON = "application/x-ndjson"


async def _split_lines(chunks: AsyncIterator[bytes], limit: int) -> AsyncGenerator[bytes]:
    """Split a body into lines as they arrive. One that is longer than ``limit`` is the last, cut short."""
    # A line may arrive in a million pieces, so they are joined once, at its end.
    rest = bytearray()
    async for chunk in chunks:
        rest.extend(chunk)
        if b"\n" in chunk:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield bytes(line)
        if len(rest) > limit:
            break
    yield bytes(rest)


async def _at_once(_request: Request) -> None:
    pass


class _Running:
    """A request with an idempotency key that is being served."""

    __slots__ = ("ended", "scope")

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class Publishing:
    """Applies publish requests.

    Args:
        tracker: records the changes.
        broker: says when a topic's backlog is too large.
        max_body: limit of a body, or of one line of NDJSON, in bytes.
        auto_create: publishing to a session that does not exist creates it.
        policy: says who may publish, and whose the sessions are that are created so; None: by default.
        pace: checks and counts a line of a request, and waits until it may be recorded.
    """

    def __init__(
        self,
        tracker: Tracker,
        broker: Broker,
        *,
        max_body: int,
        auto_create: bool,
        policy: Policy | None = None,
        pace: Callable[[Request], Awaitable[None]] = _at_once,
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._max_body = max_body
        self._auto_create = auto_create
        self._policy = policy or Policy()
        self._pace = pace
        self._running: dict[tuple[str, str], _Running] = {}  # by session and idempotency key

    async def handle(self, request: Request, match: Match) -> Response:
        """Apply a request's body and respond.

        A request takes the place of an earlier one with its idempotency key that is still being served: the
        client has given that one up, though its connection may look alive.

        Raises:
            SseserveError: what was wrong. Of NDJSON the lines before the bad one stand.
        """
        session_id = match.params["id"]
        if not self._auto_create:
            await self._tracker.get(session_id)
        key = request.headers.get("idempotency-key")
        if key is None:
            return await self._apply(request, match, None)
        if not 1 <= len(key) <= 255:
            raise Invalid("an Idempotency-Key has 1 to 255 characters")
        # Each route has keys of its own.
        key = f"{match.route.name} {key}"
        while (earlier := self._running.get((session_id, key))) is not None:
            earlier.scope.cancel()
            await earlier.ended.wait()
        running = self._running[session_id, key] = _Running()
        try:
            with running.scope:
                return await self._apply(request, match, key)
        finally:
            del self._running[session_id, key]
            running.ended.set()
        raise Conflict("a later request with this Idempotency-Key has taken the place of this one")

    def log_unwatched(self, session_id: str, dialect: Dialect) -> None:
        """Log that nobody watches a session to which something is published."""
        if not self._broker.is_watched(session_id):
            level = logging.WARNING if dialect.warns_unwatched else logging.DEBUG
            log.log(level, "No active listeners for session %s", session_id)

    async def publish(
        self,
        session_id: str,
        body: PublishBody,
        raw: bytes = b"",
        key: IdempotencyKey | None = None,
        *,
        owner: str | None = None,
        check: Check | None = None,
        trace: TraceContext | None = None,
        defers: bool = False,
    ) -> Receipt:
        """Record what a decoded body asks for, and wait while its topic has a large backlog.

        ``trace``: that of the request. ``defers``: the caller calls ``Broker.flush`` before any other task
        runs.

        Raises:
            SseserveError, Repeated: see ``Tracker.apply``.
        """
        change = body.change(Publication(session_id, raw, self._tracker.clock()))
        if defers:
            self._broker.defer()
        receipt = await self._tracker.apply(
            session_id, change, key=key, owner=owner, check=check, trace=trace
        )
        await self._broker.wait_for_capacity(session_id)
        return receipt

    def _rights(self, grant: Grant | None, session_id: str) -> tuple[str | None, Check | None]:
        """Return who owns a session that is created by publishing, and what checks the right to publish."""
        if grant is None or self._policy.has_every(grant, Action.PUBLISH):
            return None, None
        check = self._policy.check(grant, Action.PUBLISH, session_id)
        # With a right that depends on the session it creates none.
        owner = self._policy.creation_owner(grant, Action.PUBLISH, session_id) if check is None else None
        return owner, check

    async def _apply(self, request: Request, match: Match, key: str | None) -> Response:
        session_id, route = match.params["id"], match.route
        self.log_unwatched(session_id, route.dialect)
        if route.parse_line is not None and route.takes_lines(request):
            return await self._apply_lines(session_id, request, route.parse_line, key)
        if (media_type := request.media_type) not in _JSON:
            expected = "application/json" if route.parse_line is None else f"application/json or {_NDJSON}"
            raise UnsupportedMediaType(f"the content type must be {expected}, not {media_type}")
        raw = await read_body(request, self._max_body)
        assert route.body is not None
        try:
            body: PublishBody = decode(raw, route.body)
        except (BadRequest, Invalid) as error:
            if route.parse_line is None:
                raise
            # Most often they are lines, sent without their type.
            given = f"content type {media_type}" if media_type else "no content type"
            hint = f"with {given} the body is one event; lines of events and progress are {_NDJSON}"
            raise type(error)(f"{error}; {hint}") from None
        known = None if key is None else await self._tracker.engine.receipt(session_id, key)
        digest = b"" if key is None else hashlib.blake2b(raw, digest_size=16).digest()
        owner, check = self._rights(request.grant, session_id)
        if known is None:
            try:
                once = None if key is None else IdempotencyKey(key, digest=digest)
                # Over an engine that never waits, the connection responds in this step, and flushes.
                defers = isinstance(request.body, ReceivedBody) and self._tracker.engine.immediate
                receipt = await self.publish(
                    session_id,
                    body,
                    raw,
                    once,
                    owner=owner,
                    check=check,
                    trace=request.trace,
                    defers=defers,
                )
            except Repeated as repeated:
                receipt = known = repeated.receipt
        else:
            receipt = known
            if check is not None:  # the receipt may be of another session than when the body began
                check(await self._tracker.find(session_id))
        if known is not None and known.digest != digest:
            raise Invalid("this Idempotency-Key was used with another body")
        return json_response(202, Accepted(id=receipt.id, control=receipt.control, created=receipt.created))

    async def _apply_lines(
        self, session_id: str, request: Request, parse_line: Callable[[bytes], PublishBody], key: str | None
    ) -> Response:
        """Apply lines in order. With a key, the lines that an earlier attempt has applied are skipped.

        The digest of the lines up to there must be the same, else it is another body.
        """
        known = None if key is None else await self._tracker.engine.receipt(session_id, key)
        hashed = hashlib.blake2b(digest_size=16)
        trace = request.trace
        last, applied, number = known, 0, 1  # number: of the line that is being applied
        try:
            async with aclosing(_split_lines(request.body, self._max_body)) as lines:
                async for raw in lines:
                    if len(raw) > self._max_body:
                        raise PayloadTooLarge(
                            f"the line is larger than max_body = {self._max_body} bytes", limit="max_body"
                        )
                    if not (line := raw.strip()):
                        number += 1
                        continue
                    await self._pace(request)
                    if key is not None:
                        hashed.update(line + b"\n")
                    if known is None or applied >= known.count:
                        created = last is not None and last.created
                        once = None
                        if key is not None:
                            once = IdempotencyKey(key, applied + 1, hashed.digest(), created)
                        # For each line: what the roles may do can be reloaded.
                        owner, check = self._rights(request.grant, session_id)
                        try:
                            last = await self.publish(
                                session_id,
                                parse_line(line),
                                line,
                                once,
                                owner=owner,
                                check=check,
                                trace=trace,
                            )
                            if created and not last.created:
                                last = msgspec.structs.replace(last, created=True)
                        except Repeated as repeated:
                            last = known = repeated.receipt
                    if known is not None and applied + 1 == known.count and hashed.digest() != known.digest:
                        raise Invalid("this Idempotency-Key was used with other lines")
                    applied += 1
                    number += 1
                    if applied % 32 == 0:
                        await trio.lowlevel.checkpoint()
        except SseserveError as error:
            error.details = {"line": number, "applied": applied}
            raise
        if known is not None and applied < known.count:
            raise Invalid("this Idempotency-Key was used with other lines")
        if last is None:
            raise Invalid("the body has no lines")
        accepted = Accepted(applied=applied, id=last.id, control=last.control, created=last.created)
        return json_response(202, accepted)


class EventPublisher:
    """Publishes typed events from this process: ``await events.publish(session_id, type, data)``.

    Args:
        publishing: records them.
        route: does the same over HTTP.
    """

    def __init__(self, publishing: Publishing, route: Route) -> None:
        assert route.body is not None
        self._publishing = publishing
        self._dialect = route.dialect
        self._body_type: Callable[[str, msgspec.Raw, int | None], PublishBody] = route.body

    async def publish(
        self,
        session_id: str,
        type: str,  # noqa: A002 - the event stream's own word
        data: Any = None,
        *,
        retry: int | None = None,
    ) -> Receipt:
        """Publish an event; if nobody listens that is logged, and it is kept for those who come later.

        ``processing`` is progress, its ``progress`` a fraction. ``retry`` is in milliseconds.

        Raises:
            SessionEnded: the session has its terminal event.
            Invalid: the type or the data cannot be one.
        """
        self._publishing.log_unwatched(session_id, self._dialect)
        raw = to_raw(data)
        # A caller in this process may have nothing else to wait for.
        await trio.lowlevel.checkpoint()
        return await self._publishing.publish(session_id, self._body_type(type, raw, retry))
