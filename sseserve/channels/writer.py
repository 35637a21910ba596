"""Publishes the progress that this instance records in the channels of other systems.

Guarantee: what is written of a session is in the order of its log, whichever instances write it. An instance
waits a moment for the others to write the events before its own; one that is later leaves its own out, but
never the last one.
"""

from __future__ import annotations

import heapq
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import trio

from ..backoff import with_jitter
from ..dialects import RedisChannel
from ..engines.redis.client import RedisClient, Script
from ..errors import EngineUnavailable
from ..metrics import Counters
from ..model import Event, Session
from .reader import MARK, ORIGIN

__all__ = ["KEY_TTL", "RETRY_DELAY", "ChannelWriter", "with_mark"]

log = logging.getLogger(__name__)

KEY_TTL = 3600  # seconds
MAX_WAITING = 10_000  # events of all sessions; while Redis is away older ones are dropped
RETRY_DELAY = 0.5  # seconds
PATIENCE = 2.0  # seconds that an event waits for those before it
FIRST_DELAY, LONGEST_DELAY = 0.002, 0.05  # seconds between two looks for them

_WRITTEN, _TOO_EARLY = 1, 2  # 0: a newer event was written
# Writes an event if it is its turn.
# KEYS: of the place of the last event that was written; those that hold the last message.
# ARGV: the event's place (when its session was created, attempt, seq); 1 if it waits for those before it; how
# many seconds the keys are kept; the values of KEYS from the second on; channels, each with its message.
_WRITE = Script(
    """
local last = redis.call('HMGET', KEYS[1], 'created', 'attempt', 'seq')
local next = tonumber(last[3] or 0) + 1
for i = 1, 3 do
  local before, now = tonumber(last[i] or 0), tonumber(ARGV[i])
  if now < before then return 0 end
  if i < 3 and now > before then
    next = 1
    break
  end
end
if ARGV[4] == '1' and tonumber(ARGV[3]) > next then return 2 end
redis.call('HSET', KEYS[1], 'created', ARGV[1], 'attempt', ARGV[2], 'seq', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[5])
for i = 2, #KEYS do redis.call('SETEX', KEYS[i], ARGV[5], ARGV[i + 4]) end
for i = #KEYS + 5, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end
return 1
"""
)


class _Item(NamedTuple):
    """An event to be published, None: its session was deleted. Items are in the order of the log.

    ``late_at``: from then on, of Trio's clock, it does not wait for those before it. ``origin`` is the system
    from whose channel it came.
    """

    created_at: float
    attempt: float
    seq: int
    number: int
    late_at: float
    session: Session
    event: Event | None
    origin: str | None


class ChannelWriter:
    """Publishes events, each in the channels of all systems but that from which it came.

    A session's are published by a task of its own, which exists while some wait.

    Args:
        channels: are written, by system.
        keys: the names of the keys that go with their session.
        counters: count what became of the events.
    """

    def __init__(self, channels: Mapping[str, RedisChannel], keys: Sequence[str], counters: Counters) -> None:
        self._channels = channels
        self._keys = keys
        self._counters = counters
        self._waiting: dict[str, list[_Item]] = {}  # heaps, by session
        self._count = 0
        self._number = 0
        self._refusal = ""  # the last one of Redis
        self._running: tuple[RedisClient, trio.Nursery] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether anything waits."""
        return bool(self._waiting)

    def is_removing(self, session_id: str) -> bool:
        """Whether the keys of a session are still to be deleted."""
        return any(item.event is None for item in self._waiting.get(session_id, ()))

    def recorded(self, session: Session, event: Event) -> None:
        """Take an event that this instance has recorded. Never waits."""
        if self._channels:
            self._put(session, event, session.attempt, event.seq)

    def removed(self, session: Session) -> None:
        """Delete the keys of a session that was deleted, from which it would come back."""
        if self._keys:
            self._put(session, None, math.inf, 0)

    def _put(self, session: Session, event: Event | None, attempt: float, seq: int) -> None:
        heap = self._waiting.get(session.id)
        if self._count >= MAX_WAITING:
            for system in self._channels:
                self._counters.count_message(system, "dropped")
            if heap is None or len(heap) < 2:
                return
            # The newest says most. The first is being written.
            self._remove(heap, min(heap[1:]))
        self._count += 1
        self._number += 1
        late_at = trio.current_time() + PATIENCE
        place = session.created_at, attempt, seq, self._number
        item = _Item(*place, late_at, session, event, ORIGIN.get())
        if heap is not None:
            heapq.heappush(heap, item)
            return
        self._waiting[session.id] = [item]
        if self._running is not None:
            client, nursery = self._running
            nursery.start_soon(self._write_all, client, session.id)

    def _remove(self, heap: list[_Item], item: _Item) -> None:
        heap.remove(item)
        heapq.heapify(heap)
        self._count -= 1

    async def run(self, client: RedisClient) -> None:
        """Publish until cancelled. While Redis is away, it is tried again and again."""
        try:
            async with trio.open_nursery() as nursery:
                self._running = client, nursery
                for session_id in self._waiting:
                    nursery.start_soon(self._write_all, client, session_id)
                await trio.sleep_forever()
        finally:
            self._running = None

    async def flush(self, client: RedisClient) -> None:
        """Publish what waits, while ``run`` does not run."""
        for session_id in list(self._waiting):
            await self._write_all(client, session_id)

    async def _write_all(self, client: RedisClient, session_id: str) -> None:
        heap = self._waiting[session_id]
        delay = FIRST_DELAY
        while heap:
            item = heap[0]
            try:
                is_done = await self._write(client, item)
            except EngineUnavailable:
                await trio.sleep(with_jitter(RETRY_DELAY))
                continue
            except Exception as error:  # noqa: BLE001 - the boundary of an event: Redis refuses the command
                level = logging.DEBUG if str(error) == self._refusal else logging.WARNING
                log.log(level, "an event of session %s cannot be published: %s", session_id, error)
                self._refusal, is_done = str(error), True
            if is_done:
                delay = FIRST_DELAY
                if item in heap:  # it may have been dropped meanwhile
                    self._remove(heap, item)
            else:
                await trio.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)
        del self._waiting[session_id]

    async def _write(self, client: RedisClient, item: _Item) -> bool:
        """Publish an event; return False if it is too early."""
        session, event = item.session, item.event
        if event is None:
            for key in self._keys:
                await client.execute("DEL", key.replace("{id}", session.id))
            return True
        keys = [_place_key(session.id, self._keys)]
        values: list[bytes] = []  # of these
        messages: list[str | bytes] = []  # each behind its channel
        # Other systems know nothing but progress; but those that write what follows wait for every event.
        systems = [name for name in self._channels if name != item.origin and event.progress is not None]
        for channel in map(self._channels.__getitem__, systems):
            message = with_mark(channel.encode(session.id, event))
            messages += [channel.name.replace("{id}", session.id), message]
            if channel.key is not None:
                keys.append(channel.key.replace("{id}", session.id))
                values.append(message)
        place = (session.created_at, session.attempt, event.seq)
        waits = int(trio.current_time() < item.late_at)
        result = await client.evaluate(_WRITE, keys, (*place, waits, KEY_TTL, *values, *messages))
        if result == _TOO_EARLY:
            return False
        for system in systems:
            self._counters.count_message(system, "written" if result == _WRITTEN else "superseded")
        return True


def _place_key(session_id: str, keys: Sequence[str]) -> str:
    """Return the key of a session's place, in the same slot of a Cluster as the first of ``keys``."""
    name = keys[0].replace("{id}", session_id) if keys else session_id
    match = re.search(r"{([^}]+)}", name)
    return f"sseserve-channels:{{{match[1] if match else name}}}:{session_id}"


def with_mark(message: bytes) -> bytes:
    """Return a JSON object with the member that says that a server has published it."""
    return message[:-1] + b"," + msgspec.json.encode(dict([MARK]))[1:]
