"""The events of a measurement, and the check that a client gets each of them once and in order.

The payload of an event is one JSON object of a fixed number of bytes: ``n``, a number of 13 digits; ``t``,
the time when it was to be published, in microseconds of the monotonic clock, which is the same for all
processes of a machine; and ``p``, padding whose end is marked, so that an event counts once it is complete.
``n`` has three parts: the run (a phase of a measurement), the sequence, and the place in it. The events of a
sequence are published one after another by one connection, so they have to arrive in order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Hashable
from urllib.parse import quote_from_bytes

__all__ = ["MAX_PLACES", "MAX_RUNS", "MAX_SEQUENCES", "Position", "first_number", "payload_template", "stamp"]

MAX_RUNS, MAX_SEQUENCES, MAX_PLACES = 100, 10_000, 1_000_000
_RUN = MAX_SEQUENCES * MAX_PLACES
_FIRST = MAX_RUNS * _RUN  # so that all numbers have as many digits
MARK = b"^"  # ends the padding
_EPOCH = 10**15  # microseconds, for the same reason; JavaScript's numbers are exact up to 9 * 10**15
_TEMPLATE = b'{"n":%d,"t":%d,"p":"'
_EVENT = re.compile(rb'"n": ?(\d{13}), ?"t": ?(\d{16}), ?"p": ?"x*\^')
_CHUNK = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")  # between two chunks of a response; not in a payload
_LENGTH = len(_TEMPLATE % (_FIRST, _EPOCH)) + 3  # of a payload without padding


def stamp(moment: float | None = None) -> int:
    """Return what stands for a moment of the monotonic clock (by default now) in an event."""
    return _EPOCH + (time.monotonic_ns() // 1000 if moment is None else int(moment * 1e6))


def first_number(run: int, sequence: int) -> int:
    """Return the number of the first event of a sequence."""
    return _FIRST + run * _RUN + sequence * MAX_PLACES


def payload_template(size: int, *, quoted: bool = False) -> bytes:
    """Return what makes the payload with ``% (number, time)``, of ``size`` bytes; ``quoted`` as in a form.

    Raises:
        ValueError: the size is too small for an event.
    """
    if size < _LENGTH:
        raise ValueError(f"an event has at least {_LENGTH} bytes, not {size}")
    end = b"x" * (size - _LENGTH) + b'^"}'
    if not quoted:
        return _TEMPLATE + end
    parts = (_TEMPLATE + end).split(b"%d")
    return b"%d".join(quote_from_bytes(part, safe="").replace("%", "%%").encode() for part in parts)


class Position:
    """What a client has read so far. Immutable, and shared by all clients that have read the same bytes.

    So each distinct piece of a stream is decoded once, however many clients read it, and yet every event of
    every client is checked.
    """

    __slots__ = (
        "_run",
        "_tail",
        "doubled",
        "following",
        "foreign",
        "gained",
        "missing",
        "nexts",
        "reordered",
        "times",
    )

    def __init__(self, run: int, sequences: range | tuple[int, ...]) -> None:
        self._run = run
        self._tail = b""
        self.nexts = dict.fromkeys(
            sequences, 0
        )  # the place of each sequence's next event, if none is missing
        self.missing: frozenset[tuple[int, int]] = frozenset()  # (sequence, place)
        self.doubled = self.reordered = self.foreign = 0
        self.gained = 0  # events of the last piece
        self.times: list[int] = []  # when they were to be published
        self.following: dict[bytes, Position] = {}

    def advance(self, data: bytes) -> Position:
        """Return the position after ``data``, the next bytes of the stream."""
        after = Position.__new__(Position)
        self.following[data] = after
        after.following = {}
        after._run = self._run
        after.nexts, after.missing = self.nexts, self.missing
        after.doubled, after.reordered, after.foreign = self.doubled, self.reordered, self.foreign
        if self._tail:
            data = self._tail + data
        events = list(_EVENT.finditer(data))
        if data.count(MARK) > len(events):  # one may be spread over several chunks of the response
            data = _CHUNK.sub(b"", data)
            events = list(_EVENT.finditer(data))
        after.times = [int(event[2]) for event in events]
        after.gained = len(events)
        if events:
            after._count([int(event[1]) for event in events])
        begun = data.rfind(b"{", events[-1].end() if events else 0)
        after._tail = data[begun:] if begun >= 0 else b""
        return after

    def _count(self, numbers: list[int]) -> None:
        self.nexts = dict(self.nexts)
        for number in numbers:
            run, rest = divmod(number - _FIRST, _RUN)
            sequence, place = divmod(rest, MAX_PLACES)
            following = self.nexts.get(sequence) if run == self._run else None
            if following == place:
                self.nexts[sequence] = place + 1
            elif following is None:
                self.foreign += 1
                self.gained -= 1
            elif place > following:
                self.missing |= {(sequence, lost) for lost in range(following, place)}
                self.nexts[sequence] = place + 1
            elif (sequence, place) in self.missing:
                self.missing -= {(sequence, place)}
                self.reordered += 1
            else:
                self.doubled += 1

    @property
    def state(self) -> Hashable:
        """What is equal for positions from which clients go on alike."""
        faults = self.missing, self.doubled, self.reordered, self.foreign
        return self._run, self._tail, tuple(self.nexts.items()), *faults

    def lost(self, sent: dict[int, int]) -> int:
        """Return how many events of its sequences are missing, if so many of each were published."""
        return len(self.missing) + sum(
            max(sent.get(sequence, 0) - place, 0) for sequence, place in self.nexts.items()
        )
