"""What is known of a stream when it has ended: one line of the log, and a sample of the metrics."""

from __future__ import annotations

import logging

import msgspec
import trio

from ..concurrency import is_cancelled
from ..live.subscriber import Subscriber
from ..logs import Line, current_context
from ..model import EndReason
from ..tracing import Tracing
from .open_streams import OpenStream

__all__ = ["StreamEnd", "describe_end", "log_end", "trace_end"]

log = logging.getLogger(__name__)


class StreamEnd(msgspec.Struct, frozen=True):
    """A stream that has ended.

    Attributes:
        session_ids: what it has watched; none: the list of sessions.
        transport: ``sse`` or ``ws``.
        dialect: its name.
        user: the subject of its token; without one the client's address.
        seconds: from its beginning.
        events: that were sent, a snapshot counting as one, and those that were dropped for a newer progress.
        bytes: that were sent, with all that frames the events.
        reason: why it has ended.
    """

    session_ids: tuple[str, ...]
    transport: str
    dialect: str
    user: str
    seconds: float
    events: int
    bytes: int
    reason: EndReason


def describe_end(stream: OpenStream, error: BaseException | None, *, is_stopping: bool) -> StreamEnd | None:
    """Describe a stream that has ended; None if it is a long-poll, which is one request.

    Args:
        stream: its client is still attached.
        error: what has ended its task; None: it has returned.
        is_stopping: whether the server is.
    """
    client = stream.client
    if not isinstance(client, Subscriber):
        return None
    reason = client.end_reason or EndReason.CLIENT_LEFT
    if error is not None and reason is EndReason.CLIENT_LEFT:  # that is what its cleanup takes it for
        if not is_cancelled(error):
            reason = EndReason.ERROR
        elif is_stopping:
            reason = EndReason.DRAINED
    return StreamEnd(
        session_ids=stream.session_ids,
        transport=client.encoding.protocol,
        dialect=client.encoding.dialect.name,
        user=stream.peer if stream.credential is None else stream.credential.grant.subject,
        seconds=trio.current_time() - client.joined_at,
        events=max(client.sent, 0),
        bytes=client.sent_bytes,
        reason=reason,
    )


def log_end(end: StreamEnd) -> None:
    """Log a stream that has ended; the ids are those of the request that it was the response to."""
    if log.isEnabledFor(logging.INFO):
        watched = {"session_id": end.session_ids[0]} if len(end.session_ids) == 1 else {}
        if len(end.session_ids) > 1:
            watched = {"session_ids": ",".join(end.session_ids)}
        log.info(
            Line(
                "stream ended",
                reason=end.reason.value,
                **watched,
                transport=end.transport,
                dialect=end.dialect,
                user=end.user or None,
                seconds=round(end.seconds, 3),
                events=end.events,
                bytes=end.bytes,
            )
        )


def trace_end(tracing: Tracing, end: StreamEnd) -> None:
    """Record the span of a stream that has ended; it is linked to the trace of its request."""
    context = current_context()
    subject = None if context is None else context.subject
    tracing.stream(
        end.seconds,
        getattr(subject, "trace", None),
        {
            "sseserve.session.ids": ",".join(end.session_ids),
            "sseserve.stream.transport": end.transport,
            "sseserve.stream.dialect": end.dialect,
            "sseserve.stream.events": end.events,
            "sseserve.stream.bytes": end.bytes,
            "sseserve.stream.reason": end.reason.value,
        },
    )
