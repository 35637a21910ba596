"""What limits the requests and streams of clients: who is counted together, rates, the pace of a body.

No I/O, no clock: ``now`` is in seconds of any clock that never goes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from ..errors import TooManyRequests

__all__ = ["UNIX", "BodyDeadline", "RateLimit", "TokenBuckets", "limited_address"]

UNIX = "unix"  # what stands for the address of who connects to a unix socket
MIN_BODY_RATE = 1024  # bytes per second
BURST = 10.0  # seconds of a rate that a full bucket holds
MAX_BUCKETS = 16_384  # twice as many are kept; a client of more addresses has as many buckets anyway


@lru_cache(maxsize=4096)
def limited_address(address: str, *, limit_loopback: bool = False) -> str | None:
    """Return by which name an address is counted; None if it is not limited.

    That of IPv6 is its /64, as one host has all of those (RFC 4291, section 2.5.4); an IPv4 address is the
    same in IPv6 notation. Unless ``limit_loopback``, the addresses of the loopback interface are not limited,
    and neither is what has no address, or connects to a unix socket.
    """
    if address in ("", UNIX):
        return (address or "no address") if limit_loopback else None
    try:
        parsed: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return address  # an ASGI server may call its clients as it likes
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if parsed.is_loopback and not limit_loopback:
        return None
    if isinstance(parsed, IPv6Address):
        return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"
    return str(parsed)


class TokenBuckets:
    """A token bucket for each name, full at first.

    A bucket is kept as the time at which it is full again (the virtual scheduling of ITU-T I.371, annex A),
    so one that is full need not be kept. They are dropped together when all are that were not used since the
    last time, or when more than ``MAX_BUCKETS`` were: then those that were used longest ago.

    Args:
        rate: tokens per second.
    """

    def __init__(self, rate: float) -> None:
        self.set_rate(rate)
        self._recent: dict[str, float] = {}  # when each is full
        self._older: dict[str, float] = {}
        self._drop_at = -math.inf

    def set_rate(self, rate: float) -> None:
        """Set the tokens per second. Each bucket is as full as it was."""
        self._interval = 1 / rate
        # A full bucket holds a token at least.
        self._capacity = max(BURST, self._interval)  # in seconds of the rate

    def __len__(self) -> int:
        return len(self._recent.keys() | self._older.keys())

    def _taken(self, name: str, now: float) -> float:
        """Return when the bucket is full if a token is taken now."""
        full_at = self._recent.get(name)
        if full_at is None:
            full_at = self._older.get(name, now)
        return max(now, full_at) + self._interval

    def wait(self, name: str, now: float) -> float:
        """Return in how many seconds the bucket has a token; 0: it has one now. Takes none."""
        # Differences of large floats are not exact.
        excess = self._taken(name, now) - now - self._capacity
        return excess if excess > 1e-6 else 0.0

    def take(self, name: str, now: float) -> None:
        """Take a token, be there one or not: then the next one is as much later."""
        self._recent[name] = self._taken(name, now)
        if now >= self._drop_at or len(self._recent) > MAX_BUCKETS:
            self._older, self._recent = self._recent, {}
            self._drop_at = now + self._capacity


class RateLimit:
    """How often each client may do something, by its address and as a user.

    Args:
        setting: the name of the setting.
        rate: how often per second; ``BURST`` times as often at once. None: no limit.
    """

    def __init__(self, setting: str, rate: float | None) -> None:
        self._setting = setting
        self._buckets: TokenBuckets | None = None
        self.set_rate(rate)

    def set_rate(self, rate: float | None) -> None:
        """Set how often per second. Who has used up what is allowed at once has done so at any rate."""
        self._rate = rate
        if rate is None:
            self._buckets = None
        elif self._buckets is None:
            self._buckets = TokenBuckets(rate)
        else:
            self._buckets.set_rate(rate)

    def check(self, names: Sequence[str], now: float) -> None:
        """Count a request of a client.

        Args:
            names: by which the client is counted; a request over the limit of one of them counts for none.
            now: the time.

        Raises:
            TooManyRequests: the client is over its limit.
        """
        buckets = self._buckets
        if buckets is None:
            return
        for name in names:
            if seconds := buckets.wait(name, now):
                raise TooManyRequests(
                    f"more requests than {self._setting} = {self._rate:g} per second allows for {name}",
                    limit=self._setting,
                    retry_after=math.ceil(seconds),
                )
        for name in names:
            buckets.take(name, now)

    def delay(self, names: Sequence[str], now: float) -> float:
        """Count a part of a request, and return in how many seconds it may be served."""
        buckets = self._buckets
        if buckets is None:
            return 0.0
        seconds = 0.0
        for name in names:
            seconds = max(seconds, buckets.wait(name, now))
            buckets.take(name, now)
        return seconds


class BodyDeadline:
    """By when the next bytes of a request's body must arrive.

    A body that needs more than ``timeout`` must arrive at ``MIN_BODY_RATE``: else a client could keep a
    request open for ever with a byte now and then. Of NDJSON that holds for each line: a worker sends them as
    it works, but each at once.

    Args:
        timeout: how long the next bytes may take, in seconds.
        between_lines: how long the next line of NDJSON may take to begin; None: it is another body.
    """

    def __init__(self, timeout: float, *, between_lines: float | None = None) -> None:
        self._timeout = timeout
        self._between_lines = between_lines
        self._has_begun = between_lines is None
        self._latest: float | None = None  # set when bytes are waited for

    def next(self, now: float) -> float:
        """Return the deadline of the next bytes; ``now`` is in seconds of any clock."""
        if self._between_lines is not None and not self._has_begun:
            return now + self._between_lines
        if self._latest is None:
            self._latest = now + self._timeout
        return min(now + self._timeout, self._latest)

    def count(self, size: int) -> None:
        """Note that ``size`` bytes have arrived which were waited for."""
        if self._latest is not None:
            self._latest += size / MIN_BODY_RATE

    def note(self, data: bytes | bytearray) -> None:
        """Note what they have brought of the body itself."""
        if self._between_lines is not None and data:
            if b"\n" in data:
                self._latest = None
            self._has_begun = not data.endswith(b"\n")
