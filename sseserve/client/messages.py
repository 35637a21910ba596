"""What a client receives. No I/O, no clock."""

from __future__ import annotations

from typing import Any

import msgspec

from ..model import Control
from .errors import InvalidResponse

__all__ = ["Message", "Receipt", "decode"]

# The last words about a session; nothing follows them.
_LAST = frozenset({"complete", "error", "deleted"})


class Message(msgspec.Struct, frozen=True):
    """One message about a session, the same over every transport.

    ``id`` is the cursor to come back with: whoever has seen this message has seen everything up to it.
    ``event`` is ``progress``, ``complete``, ``error`` (``data["state"]`` says whether it failed, was
    cancelled or got lost), ``control``, ``deleted``, ``warning``, a type of the publisher's own, or
    ``resume``: how coming back with a cursor went, ``{"status": "ok" | "gap" | "reset", "missed": N}``.
    ``data`` is decoded JSON.
    """

    id: str | None
    event: str
    data: Any

    @property
    def ends(self) -> bool:
        """Whether nothing follows."""
        return self.event in _LAST


class Receipt(msgspec.Struct, frozen=True):
    """What a publisher is told.

    ``id`` is the cursor behind its last event, ``control`` what the watchers ask of the worker, and
    ``applied`` how many events (or lines of a batch) it stands for.
    """

    id: str | None
    control: Control
    applied: int = 1


def decode(text: str | bytes) -> Any:
    """Read JSON that the server sent.

    Raises:
        InvalidResponse: it is none.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidResponse(f"the server sent data that is not JSON: {error}") from error
