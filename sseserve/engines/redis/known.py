"""The newest records that an instance knows without asking Redis. Pure."""

from __future__ import annotations

from collections import OrderedDict

from ...model import Session

__all__ = ["Records"]

MAX_RECORDS = 10_000
MAX_RECORDS_SIZE = 32 * 2**20  # bytes


class Records:
    """The newest records that this instance knows, with those that are being stored.

    A nonce tells the append of a record from another one at the same place of the log.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[str, tuple[Session, int, str]] = OrderedDict()
        self._size = 0

    def get(self, session_id: str) -> Session | None:
        """Return the record of a session, None if it is not known."""
        found = self._records.get(session_id)
        return None if found is None else found[0]

    def nonce(self, session_id: str, epoch: str, seq: int | None) -> str:
        """Return the nonce of the record of this epoch and ``seq`` (None: any), empty if it is not known."""
        found = self._records.get(session_id)
        if found is None or found[0].epoch != epoch or seq not in (None, found[0].seq):
            return ""
        return found[2]

    def put(self, session: Session, size: int, nonce: str) -> None:
        """Keep a record, which takes about ``size`` bytes."""
        self.discard(session.id)
        self._records[session.id] = session, size, nonce
        self._size += size
        while len(self._records) > MAX_RECORDS or self._size > MAX_RECORDS_SIZE:
            self._size -= self._records.popitem(last=False)[1][1]

    def discard(self, session_id: str) -> None:
        """Forget the record of a session."""
        if (found := self._records.pop(session_id, None)) is not None:
            self._size -= found[1]
