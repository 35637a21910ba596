"""Subscribe to channels by patterns: the messages of programs that publish through Redis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import cast

import trio
from coredis.connection import BaseConnection
from coredis.exceptions import RedisError

from ...concurrency import raise_single_error
from ...errors import EngineUnavailable
from .client import RedisClient

__all__ = ["PatternSubscription"]

PING_INTERVAL = 5.0  # seconds
PING_TIMEOUT = 5.0


class PatternSubscription:
    """Receives the messages of all channels whose names match a pattern, in the order of publication.

    Args:
        client: connects.
        patterns: of the command PSUBSCRIBE.
        receive: is called with a channel's name, the message, and the time of Trio's clock after which it was
            published.
        subscribed: is called when no message is missed any more.
    """

    def __init__(
        self,
        client: RedisClient,
        patterns: Sequence[str],
        receive: Callable[[bytes, bytes, float], None],
        subscribed: Callable[[], None],
    ) -> None:
        self._client = client
        self._patterns = patterns
        self._receive = receive
        self._subscribed = subscribed
        self._published_after = 0.0  # of all that is received now

    async def run(self) -> None:
        """Receive messages until the connection is lost.

        Raises:
            EngineUnavailable: it cannot be opened, or was lost; or Redis refuses the subscription.
        """
        lost: BaseExceptionGroup[Exception] | None = None
        try:
            with raise_single_error():
                await self._run()
        except* (RedisError, OSError, trio.TooSlowError) as group:
            lost = group  # reading and the ping may fail in the same moment
        if lost is not None:
            raise EngineUnavailable(str(lost.exceptions[0]) or "no response") from lost

    async def _run(self) -> None:
        # In a Cluster each node gets the messages of all others.
        connection = await self._client.connect(await self._client.location_of(self._patterns[0]))
        try:
            async with trio.open_nursery() as nursery:
                self._published_after = trio.current_time()
                connection.send_command(b"PSUBSCRIBE", *self._patterns)
                nursery.start_soon(self._ping, connection)
                missing = len(self._patterns)
                async with aclosing(connection.push_messages) as messages:
                    async for message in messages:
                        kind, _pattern, *rest = cast("list[bytes]", message)
                        if kind == b"pmessage":
                            self._receive(rest[0], rest[1], self._published_after)
                        elif kind == b"psubscribe":
                            missing -= 1
                            if missing == 0:
                                self._subscribed()
        finally:
            connection.invalidate()

    async def _ping(self, connection: BaseConnection) -> None:
        """Find out that the subscription is refused or the connection lost, and how old messages may be.

        What comes before the response to a ping may still wait for its turn here when that has come. So the
        time of the ping before it is what counts.
        """
        before = trio.current_time()
        while True:
            sent_at = trio.current_time()
            with trio.fail_after(PING_TIMEOUT):
                # Only a refusal responds to PSUBSCRIBE: it is then taken for the response to the first ping.
                await connection.create_request(b"PING")
            self._published_after, before = before, sent_at
            await trio.sleep(PING_INTERVAL)
