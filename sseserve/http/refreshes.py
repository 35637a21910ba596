"""Extends the open streams of a user with a fresh token, on all instances."""

from __future__ import annotations

import logging

import msgspec
import trio

from ..engines.coordination import Coordination
from ..errors import SseserveError, Unavailable
from .auth import Grant
from .open_streams import OpenStreams

__all__ = ["Refreshes"]

log = logging.getLogger(__name__)

RETRY = 1.0  # seconds until streams are extended whose rights could not be checked
MAX_WAITING = 10_000  # refreshes of other instances that wait for that; older ones are dropped


class Refreshes:
    """What fresh tokens do on this instance and the others.

    Args:
        open_streams: those of this instance.
        coordination: tells the other instances, and of them.
    """

    def __init__(self, open_streams: OpenStreams, coordination: Coordination) -> None:
        self._open_streams = open_streams
        self._coordination = coordination
        self._waiting: dict[bytes, Grant] = {}  # those of other instances, by their messages
        self._wakeup = trio.Event()
        coordination.on_broadcast = self._note

    async def refresh(self, grant: Grant) -> None:
        """Let the open streams of a user go on by a fresh token.

        Raises:
            Unavailable: whether the token may watch the same cannot be checked now. Some may be extended.
        """
        await self._open_streams.extend(grant)
        await self._coordination.broadcast(msgspec.msgpack.encode(grant))

    def _note(self, message: bytes) -> None:
        try:
            grant = msgspec.msgpack.decode(message, type=Grant)
        except msgspec.DecodeError:
            log.warning("another instance has sent a message that is not a grant; is it another version?")
            return
        if len(self._waiting) >= MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[message] = grant
        self._wakeup.set()

    async def run(self) -> None:
        """Extend streams as other instances say, for ever."""
        while True:
            if not self._waiting:
                self._wakeup = trio.Event()
                await self._wakeup.wait()
            for message, grant in list(self._waiting.items()):
                try:
                    await self._open_streams.extend(grant)
                except Unavailable:
                    continue
                except SseserveError:
                    pass  # the token has expired, or was revoked, since
                self._waiting.pop(message, None)
            if self._waiting:
                await trio.sleep(RETRY)
