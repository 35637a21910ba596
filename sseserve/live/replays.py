"""What clients that join a log at the same place are sent first, encoded once for all of them.

When thousands reconnect at once, most of them resume from the same few cursors. Guarantee: an entry is used
only with the record that it was made of. Each client reads that record itself, so its rights are checked, and
nothing that was published since is missed. What nobody has asked for within ``KEEP`` seconds is dropped.
"""

from __future__ import annotations

import math

import msgspec

from ..dialects import Encoding
from ..engines.base import record_size
from ..model import Session

__all__ = ["Place", "Replay", "Replays"]

KEEP = 5.0  # seconds
MAX_BYTES = 2**21  # that are kept, and as many of those that were used before them
ENTRY = 512  # bytes of an entry besides its data and its record, about


class Place(msgspec.Struct, frozen=True):
    """Where a client is in a log, and what it is to get: entries are found by this.

    ``started``: it has been sent a page before. ``replay``: without a cursor it gets the log, not a snapshot.
    """

    encoding: Encoding
    session_id: str
    cursor: str | None
    started: bool
    replay: bool


class Replay(msgspec.Struct, frozen=True):
    """One write of a replay, or a snapshot.

    ``data`` brings a client to the event ``seq`` of the log of ``session``; it has ``count`` events, a
    snapshot counting as one. ``resume`` says how resuming went; None: the client has no cursor.
    """

    session: Session
    data: bytes
    seq: int
    count: int
    resume: str | None = None

    def holds_for(self, session: Session) -> bool:
        """Return whether nothing was recorded since, by the record as it is now."""
        return self.session is session or self.session == session


class Replays:
    """The entries of one broker, in two generations: those that are used, and those that were before."""

    def __init__(self) -> None:
        self._recent: dict[Place, Replay] = {}
        self._older: dict[Place, Replay] = {}
        self._size = 0  # of the recent ones
        self._drop_at = -math.inf

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def get(self, place: Place) -> Replay | None:
        """Return the entry of a place; None: there is none."""
        replay = self._recent.get(place)
        if replay is None and (replay := self._older.pop(place, None)) is not None:
            self.put(place, replay)
        return replay

    def discard(self, place: Place) -> None:
        """Drop the entry of a place, if there is one."""
        self._older.pop(place, None)
        if (replay := self._recent.pop(place, None)) is not None:
            self._size -= _size(place, replay)

    def put(self, place: Place, replay: Replay) -> None:
        """Keep an entry, instead of another one."""
        self.discard(place)
        self._recent[place] = replay
        self._size += _size(place, replay)
        if self._size > MAX_BYTES:
            self._begin_generation()

    def _begin_generation(self) -> None:
        self._older, self._recent, self._size = self._recent, {}, 0

    def expire(self, now: float) -> None:
        """Drop what was not used of late; ``now`` is in seconds of any clock. To be called every second."""
        if now >= self._drop_at and (self._recent or self._older):
            self._drop_at = now + KEEP
            self._begin_generation()


def _size(place: Place, replay: Replay) -> int:
    # The record may be an old one, which nobody else keeps.
    return ENTRY + len(place.cursor or "") + len(replay.data) + record_size(replay.session)
