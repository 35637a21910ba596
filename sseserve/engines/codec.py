"""Records as JSON, for engines that keep them outside this process's memory. Pure."""

from __future__ import annotations

import msgspec

from ..model import Event, OriginalPayload, Progress, Receipt, Session
from ..trace_context import TraceContext

__all__ = [
    "decode_event",
    "decode_receipt",
    "decode_session",
    "encode_event",
    "encode_receipt",
    "encode_session",
]


class _Event(msgspec.Struct, omit_defaults=True):
    """An event as it is stored; ``seq`` is stored beside it. It has either ``data`` or ``progress``."""

    type: str
    at: float
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    progress: Progress | None = None
    changed: tuple[str, ...] = ()
    retry: int | None = None
    original: OriginalPayload | None = None
    trace: TraceContext | None = None


_encode = msgspec.json.Encoder().encode
_event = msgspec.json.Decoder(_Event)
_session = msgspec.json.Decoder(Session)
_receipt = msgspec.json.Decoder(Receipt)


def encode_event(event: Event) -> bytes:
    """Return an event as JSON, without its ``seq``."""
    more = event.changed, event.retry, event.original, event.trace
    if isinstance(event.data, Progress):
        return _encode(_Event(event.type, event.at, msgspec.UNSET, event.data, *more))
    return _encode(_Event(event.type, event.at, event.data, None, *more))


def decode_event(seq: int, body: bytes) -> Event:
    """Return the event that ``encode_event`` has encoded.

    Raises:
        msgspec.DecodeError: it is none.
    """
    stored = _event.decode(body)
    data = stored.progress if stored.data is msgspec.UNSET else stored.data
    if data is None:
        raise msgspec.ValidationError("an event needs data or progress")
    more = stored.changed, stored.retry, stored.original, stored.trace
    return Event(seq, stored.type, data, stored.at, *more)


def encode_session(session: Session) -> bytes:
    """Return a session's record as JSON."""
    return _encode(session)


def decode_session(body: bytes) -> Session:
    """Return the record that ``encode_session`` has encoded.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _session.decode(body)


def encode_receipt(receipt: Receipt) -> bytes:
    """Return a receipt as JSON."""
    return _encode(receipt)


def decode_receipt(body: bytes) -> Receipt:
    """Return the receipt that ``encode_receipt`` has encoded.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _receipt.decode(body)
