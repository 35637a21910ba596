"""The revocations that all instances hold: in Redis, and in the memory of each.

- ``sseserve:{/instances}:revocations`` is a sorted set of them, by when each may be forgotten (POSIX time).
- ``sseserve:{/instances}:revoked`` is another one, by when they were stored, in microseconds by the clock of
  the Redis server, each later than those before. So an instance reads only what is new to it.

What Redis loses it gets again from the instances.
"""

from __future__ import annotations

from collections.abc import Callable

from ..coordination import MAX_REVOCATIONS, RevocationTable, too_many_revocations
from .client import RedisClient, Script
from .faults import translated
from .fields import ALLOW_FULL

__all__ = ["EXPIRE_REVOCATIONS", "REVOCATION_KEYS", "RedisRevocations"]

CHUNK = 500  # that are read or written together
MARGIN = 60  # seconds for which Redis keeps them longer: its clock may be ahead of an instance's

REVOCATION_KEYS = "sseserve:{/instances}:revocations", "sseserve:{/instances}:revoked"

# Deletes some that have expired; ``seconds`` is the time.
EXPIRE_REVOCATIONS = f"""
    local function expire_revocations(revocations, revoked, seconds)
        local before = string.format('%d', seconds - {MARGIN})
        local expired = redis.call('ZRANGEBYSCORE', revocations, '-inf', before, 'LIMIT', 0, {CHUNK})
        if #expired > 0 then
            redis.call('ZREM', revocations, unpack(expired))
            redis.call('ZREM', revoked, unpack(expired))
        end
    end
"""

# Arguments: the channel of news, what to say there, how many there may be, then of each revocation its value
# and until when it is kept. Returns how many are stored.
_STORE = Script(
    ALLOW_FULL
    + EXPIRE_REVOCATIONS
    + f"""
    local time = redis.call('TIME')
    expire_revocations(KEYS[1], KEYS[2], time[1])
    local newest = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2] or 0
    local place, stored = math.max(time[1] * 1000000 + time[2], newest + 1), 0
    for i = 4, #ARGV, 2 do
        local is_known = redis.call('ZSCORE', KEYS[1], ARGV[i])
        if is_known or redis.call('ZCARD', KEYS[1]) < tonumber(ARGV[3]) then
            redis.call('ZADD', KEYS[1], 'GT', ARGV[i + 1], ARGV[i])
            redis.call('ZADD', KEYS[2], 'NX', string.format('%d', place), ARGV[i])
            place, stored = place + 1, stored + 1
        end
    end
    if stored > 0 then
        local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
        for _, key in ipairs(KEYS) do
            redis.call('EXPIREAT', key, string.format('%d', math.ceil(last) + {MARGIN}))
        end
        redis.call('PUBLISH', ARGV[1], ARGV[2])
    end
    return stored
    """
)

# Arguments: after which place (-inf: none), how many. Returns value, place and until when, of each.
_READ = Script(
    """#!lua flags=no-writes
    local found = redis.call('ZRANGEBYSCORE', KEYS[2], ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
    local rows = {}
    for i = 1, #found, 2 do
        rows[#rows + 1] = {found[i], found[i + 1], redis.call('ZSCORE', KEYS[1], found[i]) or '0'}
    end
    return rows
    """
)


class RedisRevocations:
    """The revocations, as far as this instance knows them.

    Args:
        client: of the Redis.
        channel: the channel of news.
        news: what is said there when one is stored.
        on_revocation: is called once with each.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        client: RedisClient,
        channel: str,
        news: str,
        on_revocation: Callable[[bytes], None],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._channel = channel
        self._news = news
        self._clock = clock
        self._known = RevocationTable(on_revocation)
        self._read_to: int | None = None  # the place of the newest that was read
        self._may_be_lost = True  # Redis may lack what this instance knows

    @property
    def is_loaded(self) -> bool:
        """Whether all that were stored are known, or were once."""
        return self._read_to is not None

    def note_loss(self) -> None:
        """Take note that Redis may have lost what it had: the next ``catch_up`` stores that again."""
        self._may_be_lost = True

    @translated
    async def store(self, value: bytes, until: float) -> None:
        """Keep a revocation; see ``Coordination.store_revocation``."""
        if not await self._store([(value, until)]):
            raise too_many_revocations()
        self._known.add(value, until)

    async def _store(self, items: list[tuple[bytes, float]]) -> int:
        words = [word for value, until in items for word in (value, repr(until))]
        stored: int = await self._client.evaluate(
            _STORE, REVOCATION_KEYS, [self._channel, self._news, MAX_REVOCATIONS, *words]
        )
        return stored

    @translated
    async def catch_up(self, newest: bytes) -> None:
        """Read what is stored and not known here.

        Args:
            newest: the place of the newest one in Redis, empty if there is none.
        """
        self._known.expire(self._clock() - MARGIN)
        place = int(float(newest or 0))
        if self._read_to is None or place < self._read_to:
            self._may_be_lost = True
        if self._may_be_lost:
            self._may_be_lost = False  # unless that is said again meanwhile
            try:
                await self._compare()
            except BaseException:
                self._may_be_lost = True
                raise
        elif place != self._read_to:
            await self._read(self._read_to)

    async def _read(self, after: int | None) -> set[bytes]:
        """Read what was stored after that place (None: all), and return it."""
        found = set()
        while True:
            start = "-inf" if after is None else f"({after}"
            rows = await self._client.evaluate(_READ, REVOCATION_KEYS, [start, CHUNK])
            for value, place, until in rows:
                found.add(value)
                self._known.add(value, float(until))
                after = int(float(place))
            if len(rows) < CHUNK:
                self._read_to = after or 0
                return found

    async def _compare(self) -> None:
        """Read all, and store again what Redis lacks."""
        found = await self._read(None)
        missing = [item for item in self._known.items() if item[0] not in found]
        for start in range(0, len(missing), CHUNK):
            await self._store(missing[start : start + CHUNK])
