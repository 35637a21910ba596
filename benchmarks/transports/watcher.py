"""What a client of a benchmark has got: which events, in which order, and how old each was on arrival.

The events of a session are progress updates whose ``data`` is ``{"n": NUMBER, "t": TIME}``: the numbers are
0, 1, 2 and so on; the time is when the update was to be published, in nanoseconds on the monotonic clock, the
same for all processes of a machine.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Recorder", "Watcher", "quantiles"]


class _Stamp(msgspec.Struct):
    n: int
    t: int


class _Record(msgspec.Struct):
    data: _Stamp | None = None


_decode = msgspec.json.Decoder(_Record).decode


class Recorder:
    """What all clients of a round share.

    Args:
        interval: nanoseconds between two events, from which the ages of skipped events are known.
    """

    def __init__(self, interval: int = 0) -> None:
        self.interval = interval
        self.ages: list[int] = []  # nanoseconds
        self.received = 0  # events, without those that were skipped


class Watcher:
    """One client of one session.

    ``last`` is the highest number that it has, ``missing`` those below it that never came. An event that is
    newer makes the skipped ones obsolete: their age is the time until then.
    """

    __slots__ = ("_recorder", "arrivals", "cursor", "doubled", "last", "missing", "reordered", "told")

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.cursor = ""
        self.last = -1
        self.missing: set[int] = set()
        self.doubled = self.reordered = 0
        self.told: list[str] = []  # what the server has said about resuming
        self.arrivals: list[tuple[int, int]] = []  # number, and the time of its arrival in nanoseconds

    def take(self, cursor: str, record: bytes, at: int, *, snapshot: bool = False) -> None:
        """Take a progress event, or a snapshot: the state at some time, which the client may have already.

        Args:
            cursor: its cursor.
            record: the JSON of its record.
            at: the time of its arrival, in nanoseconds.
            snapshot: it may be one that the client has.
        """
        self.cursor = cursor
        stamp = _decode(record).data
        if stamp is None:
            return  # published by nobody: the session has just been created
        number, recorder = stamp.n, self._recorder
        if number > self.last:
            if self.last >= 0:  # the first is the state at that time, however old
                recorder.received += 1
                recorder.ages.append(at - stamp.t)
                for skipped in range(self.last + 1, number):
                    self.missing.add(skipped)
                    recorder.ages.append(at - stamp.t + (number - skipped) * recorder.interval)
            self.last = number
            self.arrivals.append((number, at))
        elif number in self.missing:
            self.missing.remove(number)
            self.reordered += 1
        elif not snapshot:
            self.doubled += 1

    def tell(self, verdict: Any) -> None:
        """Take what the server says about resuming: ``{"status": "ok"}``, for instance."""
        self.told.append(verdict["status"])


def quantiles(nanoseconds: list[int]) -> dict[str, float]:
    """Return p50, p90, p99 and the maximum in milliseconds; nothing for no values."""
    ages = sorted(nanoseconds)
    points = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ages[min(int(len(ages) * p), len(ages) - 1)] / 1e6 for name, p in points.items() if ages}
