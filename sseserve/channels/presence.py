"""Says in Redis which sessions are watched on this instance, as the systems with such sets and keys do."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from ..backoff import with_jitter
from ..dialects import RedisChannel
from ..engines.redis.client import RedisClient
from ..errors import EngineUnavailable
from .writer import KEY_TTL, RETRY_DELAY

__all__ = ["Presence"]

REFRESH = KEY_TTL / 3  # seconds


class Presence:
    """Keeps the sets of instances and the keys of this one up to date.

    Args:
        channels: name them, by system.
        instance: the name of this instance.
    """

    def __init__(self, channels: Mapping[str, RedisChannel], instance: str) -> None:
        self._channels = [channel for channel in channels.values() if channel.instances is not None]
        self._instance = instance
        self._watched: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._wakeup = trio.Event()

    def note_watchers(self, session_id: str, count: int) -> None:
        """Note that a session has that many watchers on this instance now."""
        if not self._channels or (count > 0) == (session_id in self._watched):
            return
        if count:
            self._watched[session_id] = None
        else:
            del self._watched[session_id]
        self._changed[session_id] = None
        self._wakeup.set()

    async def run(self, client: RedisClient) -> None:
        """Write changes, and what would expire, until cancelled."""
        self._changed |= self._watched
        while True:
            if not self._changed:
                with trio.move_on_after(REFRESH) as timeout:
                    await self._wakeup.wait()
                if timeout.cancelled_caught:
                    self._changed |= self._watched
            self._wakeup = trio.Event()
            try:
                for session_id in list(self._changed):
                    watched = session_id in self._watched
                    await self._write(client, session_id, watched=watched)
                    if (session_id in self._watched) == watched:
                        del self._changed[session_id]
            except EngineUnavailable:
                await trio.sleep(with_jitter(RETRY_DELAY))

    @property
    def is_registered(self) -> bool:
        """Whether anything in Redis may say that a session is watched here."""
        return bool(self._watched or self._changed)

    async def leave(self, client: RedisClient) -> None:
        """Say that nothing is watched here any more. Raises EngineUnavailable."""
        for session_id in self._watched | self._changed:
            await self._write(client, session_id, watched=False)

    async def _write(self, client: RedisClient, session_id: str, *, watched: bool) -> None:
        for channel in self._channels:
            assert channel.instances is not None
            instances = channel.instances.replace("{id}", session_id)
            key = channel.instance.replace("{instance}", self._instance).replace("{id}", session_id)
            if watched:
                await client.execute("SADD", instances, self._instance)
                # An instance that dies leaves its name there.
                await client.execute("EXPIRE", instances, KEY_TTL)
                await client.execute("SETEX", key, KEY_TTL, "active")
            else:
                await client.execute("SREM", instances, self._instance)
                await client.execute("DEL", key)
