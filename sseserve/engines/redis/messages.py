"""The messages by which an instance tells the others what it has stored. Pure.

Each is an array of JSON: what it says, the instance, the session's id, and more.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...model import Event, Session
from ..codec import decode_event, decode_session

__all__ = ["Appended", "Removed", "Renewed", "decode_message", "message_head"]


class Appended(msgspec.Struct, array_like=True, tag="append"):
    """The events from ``first`` to ``last``; without ``record`` and ``events`` if these are too large.

    ``replaces`` is the epoch of the log that this one took the place of; ``after`` and ``after_nonce`` are of
    its last event before.
    """

    instance: str
    id: str
    epoch: str
    first: int
    last: int
    replaces: str
    nonce: str
    after: int
    after_nonce: str
    record: msgspec.Raw = msgspec.Raw()
    events: list[msgspec.Raw] = []

    def content(self) -> tuple[Session, Sequence[Event]] | None:
        """Return what was stored; None if it is not in the message, or cannot be read there."""
        if not self.record or len(self.events) != self.last - self.first + 1:
            return None
        try:
            events = [
                decode_event(self.first + number, bytes(event)) for number, event in enumerate(self.events)
            ]
            return decode_session(bytes(self.record)), events
        except (msgspec.DecodeError, RecursionError):
            return None


class Removed(msgspec.Struct, array_like=True, tag="removed"):
    instance: str
    id: str
    epoch: str
    record: Session


class Renewed(msgspec.Struct, array_like=True, tag="renewed"):
    """The log has another epoch than ``former``, since it may have lost events."""

    instance: str
    id: str
    epoch: str
    seq: int
    former: str
    nonce: str


_decoder = msgspec.json.Decoder(Appended | Removed | Renewed)


def decode_message(payload: bytes) -> Appended | Removed | Renewed:
    """Return a message.

    Raises:
        msgspec.DecodeError: it is none.
    """
    try:
        message: Appended | Removed | Renewed = _decoder.decode(payload)
    except RecursionError as error:
        raise msgspec.DecodeError("it is nested too deeply") from error
    return message


def message_head(kind: str, instance: str, session_id: str, *fields: str | int) -> bytes:
    """Return the beginning of a message; the script completes it."""
    return msgspec.json.encode((kind, instance, session_id, *fields))[:-1] + b","
