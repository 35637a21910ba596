"""What a client receives. No I/O, no clock."""

from __future__ import annotations

from typing import Any

import msgspec

from ..model import Control
from .errors import InvalidResponse

__all__ = ["PublishResult", "ReceivedMessage", "decode_json"]

_FINAL_EVENTS = frozenset({"complete", "error", "deleted"})


class ReceivedMessage(msgspec.Struct, frozen=True):
    """One message about a session, the same over every transport.

    Attributes:
        id: the cursor to resume from: a client that has this message has all messages up to it.
        event: ``progress``, ``complete``, ``error`` (``data["state"]`` is ``failed``, ``cancelled`` or
            ``lost``), ``control``, ``deleted``, ``warning``, a type of the publisher's own, or ``resume``:
            the result of resuming from a cursor, ``{"status": "ok" | "gap" | "reset", "missed": N}``.
            ``degraded``: nothing new can be stored, for the reason in ``data["reason"]``, until ``restored``.
        data: decoded JSON.
    """

    id: str | None
    event: str
    data: Any

    @property
    def is_final(self) -> bool:
        """Whether this is the session's last message."""
        return self.event in _FINAL_EVENTS


class PublishResult(msgspec.Struct, frozen=True):
    """The response to a publish request.

    Attributes:
        id: the cursor after the last event that was published; None if there was none.
        control: what the watchers request of the worker: continue, pause or cancel.
        applied: how many events, or lines of NDJSON, were applied.
        created: there was no such session before.
    """

    id: str | None
    control: Control
    applied: int = 1
    created: bool = False


def decode_json(text: str | bytes) -> Any:
    """Decode JSON that the server sent.

    Raises:
        InvalidResponse: it is not valid JSON.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidResponse(f"the server sent invalid JSON: {error}") from error
