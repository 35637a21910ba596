"""Publishes the progress that this instance records in the channels of other systems."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import trio

from ..dialects import RedisChannel
from ..errors import EngineUnavailable
from ..metrics import Counters
from ..model import Event, Session
from .reader import MARK, ChannelReader

__all__ = ["KEY_TTL", "ChannelWriter", "Execute", "with_mark"]

KEY_TTL = 3600  # seconds
MAX_WAITING = 10_000  # events; while Redis is away the oldest are dropped
RETRY_DELAY = 0.5  # seconds

# Executes one command of Redis; raises EngineUnavailable.
Execute = Callable[..., Awaitable[object]]


class _Item(NamedTuple):
    """An event to be published, None: its session was deleted.

    ``done`` is set when the message is recorded that was being recorded when the event was.
    """

    session: Session
    event: Event | None
    done: trio.Event | None


class ChannelWriter:
    """Publishes events in order, each in the channels of all systems but that from which it came.

    Args:
        channels: are written, by system.
        keys: the names of the keys that go with their session.
        reader: knows where an event came from.
        counters: count what became of the events.
    """

    def __init__(
        self,
        channels: Mapping[str, RedisChannel],
        keys: Sequence[str],
        reader: ChannelReader,
        counters: Counters,
    ) -> None:
        self._channels = channels
        self._keys = keys
        self._reader = reader
        self._counters = counters
        self.waiting: deque[_Item] = deque()
        self._wakeup = trio.Event()

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        """Take events that this instance has recorded. Never waits."""
        if self._channels:
            done = self._reader.being_recorded(session.id)
            for event in events:
                if event.progress is not None:  # other systems know nothing else
                    self._put(_Item(session, event, done))

    def removed(self, session: Session) -> None:
        """Delete the keys of a session that was deleted, from which it would come back."""
        if self._keys:
            self._put(_Item(session, None, None))

    def _put(self, item: _Item) -> None:
        if len(self.waiting) >= MAX_WAITING:
            self.waiting.popleft()
            for system in self._channels:
                self._counters.count_message(system, "dropped")
        self.waiting.append(item)
        self._wakeup.set()

    async def run(self, execute: Execute) -> None:
        """Publish until cancelled. While Redis is away, it is tried again and again."""
        while True:
            try:
                await self.flush(execute)
            except EngineUnavailable:
                # All of an event again: who reads a status twice knows no less.
                await trio.sleep(RETRY_DELAY * random.uniform(0.5, 1))  # noqa: S311 - spreads the tries
            else:
                await self._wakeup.wait()

    async def flush(self, execute: Execute) -> None:
        """Publish what waits. Raises EngineUnavailable."""
        self._wakeup = trio.Event()
        while self.waiting:
            item = self.waiting[0]
            if item.event is None:
                for key in self._keys:
                    await execute("DEL", key.replace("{id}", item.session.id))
            else:
                await self._publish(execute, item.session, item.event, item.done)
            if self.waiting and self.waiting[0] is item:
                self.waiting.popleft()

    async def _publish(
        self, execute: Execute, session: Session, event: Event, done: trio.Event | None
    ) -> None:
        if done is not None:
            await done.wait()  # then it is known where the event came from
        origin = self._reader.origin(f"{session.epoch}-{event.seq}")
        for system, channel in self._channels.items():
            if system == origin:
                continue
            message = with_mark(channel.encode(session.id, event))
            if channel.key is not None:
                await execute("SETEX", channel.key.replace("{id}", session.id), KEY_TTL, message)
            await execute("PUBLISH", channel.name.replace("{id}", session.id), message)
            self._counters.count_message(system, "written")


def with_mark(message: bytes) -> bytes:
    """Return a JSON object with the member that says that a server has published it."""
    return message[:-1] + b"," + msgspec.json.encode(dict([MARK]))[1:]
