"""The newest records that an instance knows without asking Redis. Pure."""

from __future__ import annotations

from collections import OrderedDict

from ...model import Session

__all__ = ["Records"]

MAX_RECORDS = 10_000
MAX_RECORDS_SIZE = 32 * 2**20  # bytes


class Records:
    """The newest records that this instance knows, with those that are being stored.

    A nonce tells the append of a record from another one at the same place of the log. A chain is a record
    with those that build on it: when one of them turns out stale, so do all that follow.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[str, tuple[Session, int, str, str]] = OrderedDict()
        self._size = 0

    def get(self, session_id: str) -> Session | None:
        """Return the record of a session, None if it is not known."""
        found = self._records.get(session_id)
        return None if found is None else found[0]

    def origin(self, session_id: str, epoch: str, seq: int | None) -> tuple[str, str]:
        """Return nonce and chain of the record of this epoch and ``seq`` (None: any), empty if not known."""
        found = self._records.get(session_id)
        if found is None or found[0].epoch != epoch or seq not in (None, found[0].seq):
            return "", ""
        return found[2], found[3]

    def put(self, session: Session, size: int, nonce: str, chain: str = "") -> None:
        """Keep a record, which takes about ``size`` bytes; without a ``chain`` it begins one."""
        self.discard(session.id)
        self._records[session.id] = session, size, nonce, chain or nonce
        self._size += size
        while len(self._records) > MAX_RECORDS or self._size > MAX_RECORDS_SIZE:
            self._size -= self._records.popitem(last=False)[1][1]

    def discard(self, session_id: str, chain: str = "") -> None:
        """Forget the record of a session, if it belongs to ``chain`` (empty: any)."""
        found = self._records.get(session_id)
        if found is not None and chain in ("", found[3]):
            self._size -= found[1]
            del self._records[session_id]
