"""When the producer of a leased session has been silent for too long. Pure: time is an argument.

1. Silent for longer than its lease, the session is stalled; for longer than three, it is lost.
2. ``stalled`` always comes first, at least one lease before ``lost``, however late the check is.
3. Silence is measured on a monotonic clock, so setting the clock of the machine ends no session. It counts
   from when this process has learnt of the producer's last event: with a new process, and after one in which
   this process was suspended, leases begin afresh.
"""

from __future__ import annotations

from typing import Literal

from ..concurrency import select, visit
from ..model import Session

__all__ = ["Leases"]


class _Silence:
    """The producer's last event, since when it has been silent, and in which round it was last looked at."""

    __slots__ = ("epoch", "round", "seq", "since")

    def __init__(self, epoch: str, seq: int, since: float) -> None:
        self.epoch = epoch
        self.seq = seq
        self.since = since
        self.round = 0


class Leases:
    """Since when each producer has been silent. ``now`` is in seconds, on a monotonic clock."""

    def __init__(self) -> None:
        self._silences: dict[str, _Silence] = {}  # by session id
        self._round = 0

    def observe(self, session: Session, now: float) -> None:
        """Begin to count when the producer has published something new; an older record changes nothing."""
        self._observe(session, now)

    def _observe(self, session: Session, now: float) -> _Silence:
        known = self._silences.get(session.id)
        if known is None or known.epoch != session.epoch or known.seq < session.producer_seq:
            known = self._silences[session.id] = _Silence(session.epoch, session.producer_seq, now)
        known.round = self._round
        return known

    def idle_time(self, session: Session, now: float) -> float:
        """Return how long a producer has been silent, in seconds."""
        return now - self._observe(session, now).since

    def due(self, session: Session, now: float) -> Literal["stalled", "lost"] | None:
        """Return what becomes of a session now."""
        if session.lease is None or session.ended or (idle := self.idle_time(session, now)) <= session.lease:
            return None
        if not session.stalled:
            return "stalled"
        return "lost" if idle > 3 * session.lease else None

    def mark_stalled(self, session: Session, now: float) -> None:
        """Note that a session becomes stalled: from now on its producer has one lease more at least."""
        assert session.lease is not None
        since = max(now - self.idle_time(session, now), now - 2 * session.lease)
        self._observe(session, now).since = since

    def restart(self) -> None:
        """Let all leases begin afresh."""
        self._silences = {}

    def begin_round(self) -> None:
        """Begin to look at all sessions; those that are not looked at may be forgotten."""
        self._round += 1

    async def end_round(self) -> None:
        """Forget the sessions that were not looked at in this round, and let other tasks run in between."""
        silences = self._silences
        old = await select(list(silences), lambda session_id: silences[session_id].round < self._round)
        await visit(old, silences.pop)
