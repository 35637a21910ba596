"""What instances share through Redis: who is there, who leads, limits of streams, who watches, and tokens.

- ``sseserve:{/instances}:alive`` is a sorted set of the instances, by the time at which they are taken for
  dead unless they renew it. ``sseserve:{/instances}:leader`` names the leader, and expires likewise. Both are
  by the clock of the Redis server.
- ``sseserve:slots:NAME`` and ``sseserve:watchers:SESSION`` are hashes with a field for each instance, which
  only that instance writes. Those of dead instances do not count.
- ``sseserve:ticket:HASH`` has what a ticket is for, until it is taken or has expired. ``revocations`` has the
  keys of revocations.
- What is said on the channel ``sseserve:/instances`` is found out a little later without it, but for what is
  broadcast.

An instance that was killed, or cannot reach Redis, is taken for dead after ``TTL``. Its jobs are lost
``GRACE`` later: a Redis that has lost its data does not know the instances until they have renewed
themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
import trio

from ...concurrency import raise_single_error
from ...errors import ConfigError, EngineUnavailable
from ..coordination import Counts, Slots, new_instance
from .client import RedisClient, Script
from .faults import translated
from .fields import ALLOW_FULL, KEEP, NO_ANSWER, InstanceFields
from .patterns import PatternSubscription
from .revocations import EXPIRE_REVOCATIONS, REVOCATION_KEYS, RedisRevocations

__all__ = ["RedisCoordination"]

HEARTBEAT = 2.0  # seconds between two renewals of an instance
TTL = 6.0  # seconds after the last one an instance is taken for dead
GRACE = 4.0  # seconds after that its jobs are lost
LEAVE_TIMEOUT = 1.0  # seconds to tell the others that this instance stops
ANSWER_TIMEOUT = 1.0  # seconds after which a request goes on with what this instance knows itself
WATCHERS_INTERVAL = 1.0  # seconds between two writes of who watches
SLOTS_INTERVAL = 0.02  # and of slots that were given back
RETRY_DELAY = 1.0

ALIVE, LEADER = "sseserve:{/instances}:alive", "sseserve:{/instances}:leader"
NEWS = "sseserve:/instances"
SLOTS, WATCHERS, TICKET = "sseserve:slots:", "sseserve:watchers:", "sseserve:ticket:"

_NOW = "local time = redis.call('TIME') local now = time[1] * 1000 + math.floor(time[2] / 1000) "

# Keys: of the instances, the leader, and the revocations. Arguments: the instance, milliseconds.
# Returns whether it leads, whether it was known, all that are alive, the place of the newest revocation.
_RENEW = Script(
    ALLOW_FULL
    + _NOW
    + EXPIRE_REVOCATIONS
    + """
    local known = redis.call('ZSCORE', KEYS[1], ARGV[1])
    redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
    local leader = redis.call('GET', KEYS[2])
    if not leader or leader == ARGV[1] then
        redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
        leader = ARGV[1]
    end
    expire_revocations(KEYS[3], KEYS[4], time[1])
    local newest = redis.call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES')[2] or ''
    return {leader == ARGV[1] and 1 or 0, known and 1 or 0, redis.call('ZRANGE', KEYS[1], 0, -1), newest}
    """
)

_LEAVE = Script(
    """
    redis.call('ZREM', KEYS[1], ARGV[1])
    if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
    """
)

# Arguments: the instance, how many it would have, milliseconds, the limit, the other instances.
_TAKE = Script(
    ALLOW_FULL
    + """
    local total = tonumber(ARGV[2])
    for i = 5, #ARGV do
        total = total + (redis.call('HGET', KEYS[1], ARGV[i]) or 0)
    end
    if total > tonumber(ARGV[4]) then return 0 end
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1
    """
)

# Arguments: the value, milliseconds.
_STORE_TICKET = Script(ALLOW_FULL + "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])")


class RedisCoordination:
    """The coordination of instances that share a Redis; see ``Coordination``.

    Args:
        client: of the Redis; the engine may use it too.
        count_watchers: returns who watches a session here.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        client: RedisClient,
        count_watchers: Callable[[str], Counts] = lambda _session_id: {},
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.instance = new_instance()
        self.slots = Slots()
        self._count_watchers = count_watchers
        self._client = client
        client.on_availability.append(self._note_availability)
        client.on_restart.append(self._note_restart)
        self._slot_fields = InstanceFields(client, self.instance, SLOTS, self._encode_slots, SLOTS_INTERVAL)
        self._watcher_fields = InstanceFields(
            client, self.instance, WATCHERS, self._encode_watchers, WATCHERS_INTERVAL
        )
        self._revocations = RedisRevocations(
            client, NEWS, f"revoked {self.instance}", lambda value: self.on_revocation(value), clock
        )
        self._nursery: trio.Nursery | None = None
        self._news = trio.Event()
        self._renew_now = trio.Event()
        self.on_revocation: Callable[[bytes], None] = lambda _value: None
        self.on_broadcast: Callable[[bytes], None] = lambda _message: None
        self._leads_until = -math.inf
        # As of the last renewal. Times are of Trio's clock.
        self._alive: frozenset[str] = frozenset()
        self._renewed_at = -math.inf
        self._known_since = -math.inf  # since then this instance has renewed itself in time
        self._last_seen: dict[str, float] = {}
        self._left: set[str] = set()  # instances that said so since

    # Instances

    @property
    def is_leader(self) -> bool:
        return trio.current_time() < self._leads_until

    def is_gone(self, instance: str) -> bool:
        if instance == self.instance:
            return False
        since = max(self._last_seen.get(instance, -math.inf), self._known_since)
        return self._renewed_at - since >= GRACE

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        client_scope = trio.CancelScope(shield=True)  # the client is needed until this instance has left

        async def run_client(*, task_status: trio.TaskStatus[None]) -> None:
            with client_scope:
                await self._client.run(task_status=task_status)

        with raise_single_error():
            async with trio.open_nursery() as nursery:
                await nursery.start(run_client)
                try:
                    await self._renew()
                    if not self._revocations.is_loaded:
                        raise ConfigError(
                            f"cannot read the revocations in the Redis at {self._client.address}, which must "
                            "be known before anything is served; start again when it responds"
                        )
                    self._nursery = nursery
                    nursery.start_soon(self._publish, f"joined {self.instance}")
                    nursery.start_soon(self._listen)
                    nursery.start_soon(self._slot_fields.run)
                    nursery.start_soon(self._watcher_fields.run)
                    task_status.started()
                    await self._keep_renewing()
                finally:
                    self._leads_until = -math.inf
                    with trio.move_on_after(LEAVE_TIMEOUT, shield=True):
                        await self._leave()
                    client_scope.cancel()

    async def _keep_renewing(self) -> None:
        written_at = trio.current_time()
        while True:
            with trio.move_on_after(HEARTBEAT):
                await self._renew_now.wait()
            self._renew_now = trio.Event()
            await self._renew()
            if trio.current_time() - written_at > KEEP / 3:
                written_at = trio.current_time()
                self._slot_fields.write_all_again()
                self._watcher_fields.write_all_again()

    async def _renew(self) -> None:
        """Tell Redis that this instance is alive, and find out who else is."""
        sent_at = trio.current_time()  # so that Redis keeps what it is told for longer than is assumed here
        try:
            response = await self._client.evaluate(
                _RENEW, [ALIVE, LEADER, *REVOCATION_KEYS], [self.instance, round(TTL * 1000)]
            )
        except NO_ANSWER:
            self._renewed_at = -math.inf
            return
        leads, was_known, names, newest_revocation = response
        self._alive = frozenset(name.decode(errors="replace") for name in names)
        if not was_known or sent_at - self._renewed_at > TTL / 2:
            # So may others have been, who are not known now: all of them may have been suspended.
            self._known_since = sent_at
        self._renewed_at = sent_at
        if not was_known:  # Redis has lost what it knew, or has not heard of this instance for too long
            self._slot_fields.write_all_again()
            self._watcher_fields.write_all_again()
            self._revocations.note_loss()
        has_news = False
        self._leads_until = sent_at + TTL if leads else -math.inf
        for instance in self._left - self._alive:
            self._last_seen[instance] = -math.inf
        self._left &= self._alive
        for instance in [name for name in self._last_seen if self.is_gone(name)]:
            del self._last_seen[instance]
            has_news = True
        self._last_seen.update(dict.fromkeys(self._alive, sent_at))
        if has_news:
            self._news.set()
        with suppress(EngineUnavailable):  # then at the next renewal
            await self._revocations.catch_up(newest_revocation)

    async def _leave(self) -> None:
        with suppress(*NO_ANSWER):  # then the others will find out
            await self._client.evaluate(_LEAVE, [ALIVE, LEADER], [self.instance])
            await self._client.execute("PUBLISH", NEWS, f"left {self.instance}")

    # News

    def announce_job(self) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._publish, f"job {self.instance}")

    async def wait_for_news(self) -> None:
        await self._news.wait()
        self._news = trio.Event()

    async def broadcast(self, message: bytes) -> None:
        await self._publish(b"broadcast %b %b" % (self.instance.encode(), message))

    async def _publish(self, message: str | bytes) -> None:
        with suppress(*NO_ANSWER):
            await self._client.execute("PUBLISH", NEWS, message)

    async def _listen(self) -> None:
        subscription = PatternSubscription(self._client, [NEWS], self._receive, self._renew_now.set)
        while True:
            try:
                await subscription.run()
            except EngineUnavailable:
                await trio.sleep(RETRY_DELAY)

    def _receive(self, _channel: bytes, message: bytes, _published_after: float) -> None:
        kind, _, rest = message.partition(b" ")
        name, _, content = rest.partition(b" ")
        instance = name.decode(errors="replace")
        if instance == self.instance:
            return
        if kind == b"broadcast":
            self.on_broadcast(content)
            return
        if kind == b"left":
            self._left.add(instance)
        if kind == b"job":
            self._news.set()
        else:
            self._renew_now.set()

    def _note_availability(self, problem: str | None) -> None:
        if problem is None:
            self._renew_now.set()

    def _note_restart(self) -> None:
        self._revocations.note_loss()
        self._renew_now.set()

    # Slots

    async def take_slot(self, name: str, limit: int) -> bool:
        with trio.move_on_after(ANSWER_TIMEOUT), suppress(*NO_ANSWER):
            async with self._slot_fields.lock(name):
                return await self._ask_for_slot(name, limit)
        has_slot = self.slots.taken.get(name, 0) < limit  # as far as this instance knows
        if has_slot:
            self.slots.add(name, 1)
            self._slot_fields.note_change(name)
        return has_slot

    async def _ask_for_slot(self, name: str, limit: int) -> bool:
        count = self.slots.taken.get(name, 0) + 1
        if count > limit:
            return False
        has_slot = False
        self._slot_fields.written.add(name)
        others = self._alive - {self.instance}
        try:
            arguments: list[str | int] = [self.instance, count, round(KEEP * 1000), limit, *others]
            has_slot = bool(await self._client.evaluate(_TAKE, [SLOTS + name], arguments))
        finally:
            if has_slot:
                self.slots.add(name, 1)
            else:
                self._slot_fields.note_change(name)  # it may have been counted by Redis
        return has_slot

    def release_slot(self, name: str) -> None:
        self.slots.add(name, -1)
        self._slot_fields.note_change(name)

    def _encode_slots(self, name: str) -> bytes:
        count = self.slots.taken.get(name, 0)
        return b"%d" % count if count else b""

    # Watchers

    def note_watchers(self, session_id: str) -> None:
        self._watcher_fields.note_change(session_id)

    async def watchers(self, session_id: str) -> dict[str, Counts]:
        watchers: dict[str, Counts] = {self.instance: self._count_watchers(session_id)}
        with trio.move_on_after(ANSWER_TIMEOUT):
            try:
                fields = await self._client.execute("HGETALL", WATCHERS + session_id)
            except NO_ANSWER:
                return watchers
            for name, value in fields.items():
                instance = name.decode(errors="replace")
                if instance != self.instance and instance in self._alive:
                    rows = msgspec.json.decode(value, type=list[tuple[str, str, int]])
                    watchers[instance] = {(protocol, dialect): count for protocol, dialect, count in rows}
        return watchers

    def _encode_watchers(self, session_id: str) -> bytes:
        counts = self._count_watchers(session_id)
        rows = [(protocol, dialect, count) for (protocol, dialect), count in counts.items()]
        return msgspec.json.encode(rows) if rows else b""

    # Tickets and revocations

    @translated
    async def store_ticket(self, key: str, value: bytes, seconds: float) -> None:
        await self._client.evaluate(_STORE_TICKET, [TICKET + key], [value, max(1, round(seconds * 1000))])

    @translated
    async def take_ticket(self, key: str) -> bytes | None:
        # Sent again when the connection breaks, it may find that it has been taken: it is never taken twice.
        value: bytes | None = await self._client.execute("GETDEL", TICKET + key)
        return value

    async def store_revocation(self, value: bytes, until: float) -> None:
        await self._revocations.store(value, until)
