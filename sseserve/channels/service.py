"""The service that reads and writes the channels, as long as the server runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import trio

from ..backoff import Backoff
from ..concurrency import raise_single_error
from ..dialects import RedisChannel
from ..engines.redis.client import RedisClient
from ..engines.redis.patterns import PatternSubscription
from ..errors import ConfigError, EngineUnavailable, Invalid
from ..http.publishing import Publishing
from ..metrics import Counters
from ..model import Event, Session
from ..progress.steps import check_session_id
from ..progress.tracker import Tracker
from .presence import Presence
from .reader import ChannelReader
from .writer import ChannelWriter

__all__ = ["Channels"]

log = logging.getLogger(__name__)

BACKOFF = Backoff(initial=0.1, maximum=5.0)  # between two tries to connect, or to subscribe
FIND_TIMEOUT = 5.0  # seconds in which a session that is asked for is looked for in its key
CLOSE_TIMEOUT = 1.0  # seconds in which the sets and keys of this instance are removed
# Seconds after subscribing in which nothing is recorded: other instances record what this one has missed.
SETTLE = 1.0
PAGE = 500  # keys that are read at once


class Channels:
    """Reads and writes the channels of other systems.

    Args:
        client: of the Redis; the engine may use it too.
        read: the channels that are read, by system.
        written: the channels that are written, by system.
        publishing: records the messages.
        tracker: knows the sessions.
        counters: count the messages.
        max_body: limit of a message, in bytes.
        instance: the name of this instance.
        is_shared: other instances may record in the same logs.
    """

    def __init__(
        self,
        client: RedisClient,
        read: Mapping[str, RedisChannel],
        written: Mapping[str, RedisChannel],
        *,
        publishing: Publishing,
        tracker: Tracker,
        counters: Counters,
        max_body: int,
        instance: str,
        is_shared: bool,
    ) -> None:
        self._client = client
        self._settle = SETTLE if is_shared else 0.0
        self._settled_at = 0.0  # of Trio's clock
        self._read = read
        self._tracker = tracker
        self._reader = ChannelReader(publishing, tracker, counters, max_body=max_body)
        keys = [channel.key for channel in {**read, **written}.values() if channel.key is not None]
        self._writer = ChannelWriter(written, keys, counters)
        self._presence = Presence(written, instance)
        self._nursery: trio.Nursery | None = None  # while the client runs
        self.subscribed = trio.Event()  # for the first time
        self._is_subscribed = False

    # What this instance does

    def recorded(self, session: Session, event: Event) -> None:
        """Take an event that this instance has recorded. Never waits."""
        self._writer.recorded(session, event)

    def removed(self, session: Session) -> None:
        """Take note of a session that this instance has deleted."""
        self._writer.removed(session)

    def note_watchers(self, session_id: str, count: int) -> None:
        """Take note that a session has that many watchers on this instance now."""
        self._presence.note_watchers(session_id, count)

    async def find(self, session_id: str) -> None:
        """Create a session of which there is none, if its progress is in a key."""
        with suppress(Invalid, EngineUnavailable), trio.move_on_after(FIND_TIMEOUT):
            check_session_id(session_id)
            for system, channel in self._read.items():
                if channel.key is None or self._nursery is None:
                    continue
                value = await self._client.execute("GET", channel.key.replace("{id}", session_id))
                if value is not None:
                    await self._record_key(self._nursery, system, session_id, value)

    async def _record_key(self, nursery: trio.Nursery, system: str, session_id: str, value: bytes) -> None:
        if self._writer.is_removing(session_id):
            return  # it was read too early
        done = self._reader.receive(nursery, system, self._read[system], session_id, value, from_key=True)
        if done is not None:
            await done.wait()

    # The service

    async def run(self) -> None:
        """Read and write until cancelled. While Redis is away, that is tried again and again."""
        failures = 0
        reason = ""
        while True:
            try:
                await self._run()
            except ConfigError as error:
                level = logging.DEBUG if str(error) == reason else logging.WARNING
                log.log(level, "the Redis channels are not read: %s; trying again", error)
                reason = str(error)
            await trio.sleep(BACKOFF.delay(failures))
            failures += 1

    async def _run(self) -> None:
        client = self._client
        try:
            with raise_single_error():
                async with trio.open_nursery() as nursery:
                    await nursery.start(client.run)
                    self._nursery = nursery
                    self._reader.resume(nursery)
                    nursery.start_soon(self._writer.run, client)
                    nursery.start_soon(self._presence.run, client)
                    if self._read:
                        await self._listen(client, nursery)
        finally:
            self._nursery = None
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True), suppress(ConfigError, EngineUnavailable):
                await self._leave()

    async def _leave(self) -> None:
        """Write what waits, and remove this instance from the sets. The client may be closed."""
        if not (self._writer.is_busy or self._presence.is_registered):
            return
        client = self._client
        with raise_single_error():
            async with trio.open_nursery() as nursery:
                await nursery.start(client.run)
                await self._writer.flush(client)
                await self._presence.leave(client)
                nursery.cancel_scope.cancel()

    async def _listen(self, client: RedisClient, nursery: trio.Nursery) -> None:
        patterns = [channel.name.replace("{id}", "*") for channel in self._read.values()]
        failures = 0
        reason = ""
        while True:
            began_at = trio.current_time()
            subscription = PatternSubscription(
                client,
                patterns,
                partial(self._receive, nursery),
                partial(self._note_subscribed, client, nursery),
            )
            self._settled_at = began_at + self._settle
            self._is_subscribed = False
            try:
                await subscription.run()
            except EngineUnavailable as error:
                # The client itself logs that Redis is away, and a lost connection is made again at once.
                is_news = client.problem is None and not self._is_subscribed and str(error) != reason
                level = logging.WARNING if is_news else logging.DEBUG
                log.log(level, "the Redis channels are not read: %s; subscribing again", error)
                reason = str(error)
            if trio.current_time() - began_at > BACKOFF.maximum:
                failures = 0
            await trio.sleep(BACKOFF.delay(failures))
            failures += 1

    def _note_subscribed(self, client: RedisClient, nursery: trio.Nursery) -> None:
        log.info("the Redis channels are read: %s", ", ".join(self._read))
        self._settled_at = trio.current_time() + self._settle
        self._is_subscribed = True
        self.subscribed.set()
        nursery.start_soon(self._read_keys, client, nursery)

    def _receive(self, nursery: trio.Nursery, name: bytes, message: bytes, published_after: float) -> None:
        text = _text(name)
        age = trio.current_time() - published_after
        for system, channel in self._read.items():
            prefix, suffix = channel.name.split("{id}")
            if text.startswith(prefix) and text.endswith(suffix):
                session_id = text.removeprefix(prefix).removesuffix(suffix)
                after = self._tracker.clock() - age
                self._reader.receive(
                    nursery,
                    system,
                    channel,
                    session_id,
                    message,
                    published_after=after,
                    not_before=self._settled_at,
                )

    async def _read_keys(self, client: RedisClient, nursery: trio.Nursery) -> None:
        """Read the keys of all sessions: what was published before, or while the connection was lost."""
        await trio.sleep_until(self._settled_at)
        if client.is_cluster:
            return  # the keys are on many nodes; each is read when somebody asks for its session
        with suppress(EngineUnavailable):
            for system, channel in self._read.items():
                if channel.key is None:
                    continue
                prefix, suffix = channel.key.split("{id}")
                cursor = b"0"
                while True:
                    pattern = f"{prefix}*{suffix}"
                    cursor, keys = await client.execute("SCAN", cursor, "MATCH", pattern, "COUNT", PAGE)
                    values = await client.execute("MGET", *keys) if keys else []
                    async with trio.open_nursery() as page:
                        for key, value in zip(keys, values, strict=True):
                            if value is not None:
                                session_id = _text(key).removeprefix(prefix).removesuffix(suffix)
                                page.start_soon(self._record_key, nursery, system, session_id, value)
                    if cursor == b"0":
                        break


def _text(name: bytes) -> str:
    """Decode a name. What is no UTF-8 becomes what cannot be in a session's id."""
    return name.decode(errors="backslashreplace")
