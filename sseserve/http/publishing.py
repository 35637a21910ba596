"""What publishers send, from bytes to the tracker: one update or event, or a batch a line each.

Both doors use it: ``server/`` on the transport, ``web/`` behind Hypercorn.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import msgspec
import trio

from ..dialects import Publication, PublishBody
from ..errors import (
    Conflict,
    Invalid,
    PayloadTooLarge,
    SseserveError,
    UnsupportedMediaType,
)
from ..jsontext import decode
from ..live.broker import Broker
from ..model import Receipt
from ..progress.tracker import Tracker
from .messages import Answer, Request, json_answer
from .routes import Match

__all__ = ["NDJSON", "Publishing", "read_body"]

log = logging.getLogger(__name__)

NDJSON = frozenset(
    {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}
)
_JSON = frozenset(
    {"", "application/json", "application/x-www-form-urlencoded", "text/plain"}
)  # curl -d's is welcome


async def read_body(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    """Read a whole body.

    Raises:
        PayloadTooLarge: it has more than ``limit`` bytes.
    """
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise PayloadTooLarge(f"a body has at most {limit} bytes")
    return bytes(body)


async def _lines(chunks: AsyncIterator[bytes], limit: int) -> AsyncGenerator[bytes]:
    """Split a body into lines as they come. One that is much too long is the last, and cut short."""
    # A line may come in a million pieces, so they are joined once, at its end.
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


class Publishing:
    """Applies publish requests. ``max_body`` is in bytes, of a body or of one line of a batch."""

    def __init__(self, tracker: Tracker, broker: Broker, *, max_body: int, auto_create: bool) -> None:
        self._tracker = tracker
        self._broker = broker
        self._max_body = max_body
        self._auto_create = auto_create
        self._running: set[tuple[str, str]] = set()  # idempotency keys of requests under way

    async def handle(self, match: Match, request: Request, chunks: AsyncIterator[bytes]) -> Answer:
        """Apply a request's body and answer it.

        Raises:
            SseserveError: what was wrong. Of a batch the lines before the bad one stand.
        """
        session_id = match.params["id"]
        if not self._auto_create:
            await self._tracker.get(session_id)
        key = request.headers.get("idempotency-key")
        if key is None:
            return await self._apply(match, request, chunks, None)
        if not 1 <= len(key) <= 255:
            raise Invalid("an Idempotency-Key has 1 to 255 characters")
        # Keys of the two paths do not meet.
        key = f"{match.route.name} {key}"
        if (session_id, key) in self._running:
            raise Conflict("a request with this Idempotency-Key is under way")
        self._running.add((session_id, key))
        try:
            return await self._apply(match, request, chunks, key)
        finally:
            self._running.discard((session_id, key))

    async def _apply(
        self, match: Match, request: Request, chunks: AsyncIterator[bytes], key: str | None
    ) -> Answer:
        session_id = match.params["id"]
        if (parse_line := match.route.parse_line) is not None and request.media_type in NDJSON:
            return await self._batch(session_id, chunks, key, parse_line)
        if request.media_type not in _JSON:
            raise UnsupportedMediaType(f"send application/json, not {request.media_type}")
        body = await read_body(chunks, self._max_body)
        assert match.route.body is not None
        payload: PublishBody = decode(body, match.route.body)
        known = None if key is None else await self._tracker.engine.receipt(session_id, key)
        digest = b"" if key is None else hashlib.blake2b(body, digest_size=16).digest()
        if known is None:
            receipt = await self._one(session_id, payload, body, key, 1, digest)
        elif known.digest == digest:
            receipt = known
        else:
            raise Invalid("this Idempotency-Key was used with another body")
        return json_answer(202, {"id": receipt.id, "control": receipt.control})

    async def _one(
        self, session_id: str, body: PublishBody, raw: bytes, key: str | None, count: int, digest: bytes
    ) -> Receipt:
        def store_receipt(receipt: Receipt) -> tuple[str, Receipt]:
            assert key is not None
            return key, msgspec.structs.replace(receipt, count=count, digest=digest)

        if not self._broker.watched(session_id):
            log.debug("nobody listens to session %r", session_id)
        change = body.change(Publication(session_id, raw, self._tracker.clock()))
        receipt = await self._tracker.apply(
            session_id, change, store_receipt=None if key is None else store_receipt
        )
        await self._broker.room(session_id)
        return receipt

    async def _batch(
        self,
        session_id: str,
        chunks: AsyncIterator[bytes],
        key: str | None,
        parse_line: Callable[[bytes], PublishBody],
    ) -> Answer:
        """Apply lines in order. With a key, the lines that an earlier try has applied are passed over.

        The digest of the lines up to there must be the same, else it is another batch.
        """
        known = None if key is None else await self._tracker.engine.receipt(session_id, key)
        seen = hashlib.blake2b(digest_size=16)
        last, applied, number = known, 0, 1  # number: of the line that is awaited or applied
        try:
            async with aclosing(_lines(chunks, self._max_body)) as lines:
                async for raw in lines:
                    if len(raw) > self._max_body:
                        raise PayloadTooLarge(f"a line has at most {self._max_body} bytes")
                    if not (text := raw.strip()):
                        number += 1
                        continue
                    if key is not None:
                        seen.update(text + b"\n")
                    if known is None or applied >= known.count:
                        digest = seen.digest() if key is not None else b""
                        last = await self._one(session_id, parse_line(text), text, key, applied + 1, digest)
                    elif applied + 1 == known.count and seen.digest() != known.digest:
                        raise Invalid("this Idempotency-Key was used with another batch")
                    applied += 1
                    number += 1
                    if applied % 32 == 0:
                        await trio.lowlevel.checkpoint()
        except SseserveError as error:
            error.details = {"line": number, "applied": applied}
            raise
        if known is not None and applied < known.count:
            raise Invalid("this Idempotency-Key was used with another batch")
        if last is None:
            raise Invalid("the batch is empty")
        return json_answer(202, {"applied": applied, "id": last.id, "control": last.control})
