"""What the engine's event loop and its writing thread pass to each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from ...model import Receipt, Session

__all__ = [
    "MAX_SEQ",
    "Change",
    "Committed",
    "LogState",
    "NewReceipt",
    "StoredReceipt",
    "StoredSession",
    "place",
    "seq_of",
]

MAX_SEQ = 2**32 - 1


def place(log: int, seq: int) -> int:
    """Return the key of an event in the table events; that of ``seq`` 0 is before all of the log."""
    return log << 32 | seq


def seq_of(place: int) -> int:
    """Return the ``seq`` of an event by its key."""
    return place & MAX_SEQ


class LogState:
    """What is stored of a session beside its record, see the table sessions. Sizes are in bytes.

    ``weights`` are those of some events, the first of which is ``weights_from``, as far as they are known.
    """

    __slots__ = (
        "first",
        "log",
        "position",
        "receipts",
        "receipts_size",
        "size",
        "weights",
        "weights_from",
    )

    def __init__(self, position: int, log: int) -> None:
        self.position = position
        self.log = log
        self.first = 1
        self.size = 0
        self.receipts = 0
        self.receipts_size = 0
        self.weights: list[int] = []
        self.weights_from = 0


class StoredReceipt(NamedTuple):
    """A receipt, its size in bytes, and its number: a session's newest has the highest."""

    number: int
    size: int
    receipt: Receipt


class NewReceipt(NamedTuple):
    """A receipt that is to be stored. ``stored`` are the session's by key, the oldest first."""

    number: int
    size: int
    key: str
    body: bytes
    stored: OrderedDict[str, StoredReceipt]


class Change:
    """One append, or a deletion (``record`` is None), encoded.

    Args:
        position: of the session.
        session_id: of the session.
        touched: when, on the file's clock.
    """

    __slots__ = ("begins_log", "events", "last_seq", "position", "receipt", "record", "session_id", "touched")

    def __init__(self, position: int, session_id: str, touched: float) -> None:
        self.position = position
        self.session_id = session_id
        self.touched = touched
        self.record: bytes | None = None
        self.last_seq = 0
        self.begins_log: int | None = None  # the number of a new log
        self.events: list[tuple[int, int, bytes]] = []  # seq, weight, body
        self.receipt: NewReceipt | None = None

    @property
    def size(self) -> int:
        """About what it takes in the transaction, in bytes."""
        return 512 + len(self.record or b"") + sum(len(body) for _, _, body in self.events)


class Committed(NamedTuple):
    """What a commit has made of the sessions.

    ``states`` and ``evicted`` are by position; ``evicted`` are keys whose receipts have made room for newer
    ones. ``dropped`` are logs that are to be deleted, with the position if the session is deleted too.
    """

    states: dict[int, LogState]
    evicted: dict[int, list[str]]
    dropped: list[tuple[int, int | None]]


class StoredSession(NamedTuple):
    """A row of the table sessions."""

    state: LogState
    touched: float
    session: Session
