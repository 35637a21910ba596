"""Fields of an instance in hashes of Redis, which are written again whenever they have changed."""

from __future__ import annotations

from collections.abc import Callable

import trio
from coredis.exceptions import RedisError

from ...errors import EngineUnavailable
from .client import RedisClient, Script

__all__ = ["ALLOW_FULL", "KEEP", "NO_ANSWER", "RETRY_DELAY", "InstanceFields"]

RETRY_DELAY = 1.0
CHUNK = 256  # fields that are written together
LOCKS = 64
KEEP = 3600.0  # seconds after the last write that a hash is deleted; each is written again sooner

# What instances share takes little, and must go on where the logs have filled the memory of Redis.
ALLOW_FULL = "#!lua flags=allow-oom\n"
NO_ANSWER = (EngineUnavailable, RedisError)

# Arguments: the instance, its value ("": none), milliseconds.
_WRITE = Script(
    ALLOW_FULL
    + """
    if ARGV[2] == '' then
        redis.call('HDEL', KEYS[1], ARGV[1])
    else
        redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
    end
    """
)


class InstanceFields:
    """The fields of this instance in the hashes of one kind, which are written after they change.

    Args:
        client: writes them.
        instance: their name.
        prefix: of the hashes' keys.
        read: returns the value of the field in the hash of that name; empty: there is none.
        interval: seconds between two writes.
    """

    def __init__(
        self, client: RedisClient, instance: str, prefix: str, read: Callable[[str], bytes], interval: float
    ) -> None:
        self._client = client
        self._instance = instance
        self._prefix = prefix
        self._read = read
        self._interval = interval
        self._changed: dict[str, None] = {}
        self._has_changed = trio.Event()
        self._has_failed = False
        self.written: set[str] = set()  # names of the hashes that have a field
        self._locks = [trio.Lock() for _ in range(LOCKS)]

    def note_change(self, name: str) -> None:
        """Have a field written, if it is not as it was."""
        self._changed[name] = None
        self._has_changed.set()

    def lock(self, name: str) -> trio.Lock:
        """Return what to hold while a field is written: the last value must be the last to arrive."""
        return self._locks[hash(name) % LOCKS]

    def write_all_again(self) -> None:
        """Have all fields written, because Redis may have lost them, or will."""
        for name in self.written:
            self.note_change(name)

    async def run(self) -> None:
        """Write what changes, for ever."""
        while True:
            await self._has_changed.wait()
            self._has_changed = trio.Event()
            changed, self._changed = list(self._changed), {}
            self._has_failed = False
            for start in range(0, len(changed), CHUNK):
                async with trio.open_nursery() as nursery:
                    for name in changed[start : start + CHUNK]:
                        nursery.start_soon(self._write, name)
            await trio.sleep(RETRY_DELAY if self._has_failed else self._interval)

    async def _write(self, name: str) -> None:
        async with self.lock(name):
            value = self._read(name)
            if not value and name not in self.written:
                return
            self.written.add(name)
            arguments = (self._instance, value, round(KEEP * 1000))
            try:
                await self._client.evaluate(_WRITE, [self._prefix + name], arguments)
            except NO_ANSWER:
                self._has_failed = True
                self.note_change(name)
            else:
                if not value:
                    self.written.discard(name)
