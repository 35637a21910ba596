"""The receipts that are in memory: of the sessions whose publishers used idempotency keys of late."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from ...model import Receipt, Session
from ..records import Record
from .changes import LogState, NewReceipt, StoredReceipt
from .readers import Reader, Readers

__all__ = ["Log", "ReceiptCache"]


class Log(Record):
    """One session as it is stored. ``receipts`` are by key, the oldest first; None: not in memory.

    ``last_receipt`` is the number of the newest, stored or being stored.
    """

    __slots__ = ("last_receipt", "receipts", "state")

    def __init__(self, session: Session, state: LogState) -> None:
        super().__init__(session)
        self.state = state
        self.receipts: OrderedDict[str, StoredReceipt] | None = None if state.receipts else OrderedDict()
        self.last_receipt = 0


class ReceiptCache:
    """Has the receipts of some sessions in memory, of each all or none.

    Args:
        readers: read them.
        limit: bytes of receipts that are kept, beyond those that are in use.
        in_use: returns whether a log is being changed.
    """

    def __init__(self, readers: Readers, limit: int, in_use: Callable[[Log], bool]) -> None:
        self._readers = readers
        self._limit = limit
        self._in_use = in_use
        # How many bytes each log's receipts take, the least recently used first.
        self._sizes: OrderedDict[Log, int] = OrderedDict()
        self._size = 0

    async def load(self, log: Log) -> None:
        """Read the receipts of a log; call it again if they are not in memory afterwards."""
        before = log.last_receipt
        receipts = await self._readers.call(Reader.receipts, log.state.position)
        # Another task may have read them too, have stored one more, and they may be forgotten again.
        if log.receipts is None and log.last_receipt == before:
            log.receipts = receipts
            log.last_receipt = max([before, *(stored.number for stored in receipts.values())])
            self._count(log)

    def get(self, log: Log, key: str) -> Receipt | None:
        """Return a receipt of a log whose receipts are in memory."""
        assert log.receipts is not None
        if log in self._sizes:
            self._sizes.move_to_end(log)
        stored = log.receipts.get(key)
        return None if stored is None else stored.receipt

    def note(self, log: Log, new: NewReceipt, receipt: Receipt, evicted: Sequence[str]) -> None:
        """Take note of a receipt that is stored, and of those that were deleted for it."""
        assert log.receipts is not None
        for key in (new.key, *evicted):
            log.receipts.pop(key, None)
        if new.key not in evicted:
            log.receipts[new.key] = StoredReceipt(new.number, new.size, receipt)
        self._count(log)

    def forget(self, log: Log) -> None:
        """Keep the receipts of a log in memory no longer."""
        log.receipts = None
        self._size -= self._sizes.pop(log, 0)

    def _count(self, log: Log) -> None:
        """Note how much a log's receipts take, and forget others if that is too much."""
        size = log.state.receipts_size
        self._size += size - self._sizes.pop(log, 0)
        self._sizes[log] = size
        if self._size <= self._limit:
            return
        for other in list(self._sizes)[:-1]:
            if not self._in_use(other):
                self.forget(other)
                if self._size <= self._limit:
                    break
