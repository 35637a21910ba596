"""When the producer of a leased session has been silent for too long. Pure: time is an argument.

1. Silent for longer than its lease, the session is stalled; for longer than three, it is lost.
2. ``stalled`` always comes first, at least one lease before ``lost``, however late the check is.
3. Silence is measured on a monotonic clock, so setting the clock of the machine ends no session. It counts
   from when this process has learnt of the producer's last event: with a new process, and after one in which
   this process was suspended, leases begin afresh.
"""

from __future__ import annotations

from typing import Literal

from ..model import Session

__all__ = ["Leases"]


class Leases:
    """Since when each producer has been silent. ``now`` is in seconds, on a monotonic clock."""

    def __init__(self) -> None:
        # By session id: the producer's last event, as epoch and seq, and since when it has been silent.
        self._idle_since: dict[str, tuple[str, int, float]] = {}

    def observe(self, session: Session, now: float) -> None:
        """Begin to count when the producer has published something new; an older record changes nothing."""
        known = self._idle_since.get(session.id)
        if known is None or known[0] != session.epoch or known[1] < session.producer_seq:
            self._idle_since[session.id] = (session.epoch, session.producer_seq, now)

    def idle_time(self, session: Session, now: float) -> float:
        """Return how long a producer has been silent, in seconds."""
        self.observe(session, now)
        return now - self._idle_since[session.id][2]

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
        self._idle_since[session.id] = (session.epoch, session.producer_seq, since)

    def restart(self) -> None:
        """Let all leases begin afresh."""
        self._idle_since.clear()

    def retain(self, session_ids: set[str]) -> None:
        """Forget the other sessions."""
        for session_id in self._idle_since.keys() - session_ids:
            del self._idle_since[session_id]
