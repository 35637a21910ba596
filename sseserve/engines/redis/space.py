"""How much room the logs take in Redis, and which of them are deleted when that is too much.

It is looked at about once a second, so a little more than the limit may be stored. As long as Redis uses less
memory than the limit there is nothing to do. Otherwise the sizes of all logs are added up, since others may
keep much more there: again when what Redis uses has grown by what was left, and from time to time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio
from coredis.exceptions import RedisError

from ...errors import EngineUnavailable
from .client import RedisClient
from .faults import LOST
from .scripts import SESSIONS_KEY, session_keys

__all__ = ["Space"]

INTERVAL = 1.0  # seconds between two looks
AGAIN = 60.0  # seconds after which the sizes are added up again
REST = 20.0  # times as long as that has taken it is not done again at least
RECORD = 1024  # about what a session takes besides its events and receipts, in bytes
LEFT = 0.05  # of the limit, that is free after sessions were deleted
CHUNK = 1000  # sessions that are asked for at once

log = logging.getLogger(__name__)


class _Measured(NamedTuple):
    """How many bytes all logs took, and Redis used; when that was, and how long it took to find out."""

    logs: int
    used: int
    at: float
    took: float


class _Ended(NamedTuple):
    """A session that has ended, and when."""

    at: float
    session_id: str
    epoch: str
    size: int


class Space:
    """Keeps the logs within a limit.

    Args:
        client: of the Redis.
        limit: bytes that they may take.
        delete: deletes the session of an id and an epoch.
    """

    def __init__(
        self, client: RedisClient, limit: int, delete: Callable[[str, str], Awaitable[bool]]
    ) -> None:
        self._client = client
        self._limit = limit
        self._delete = delete
        self._measured: _Measured | None = None
        self.is_full = False  # nothing may be added: there are no more sessions that could be deleted

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            try:
                await self._look()
            except (RedisError, EngineUnavailable, *LOST) as error:
                log.debug("cannot find out how much room the logs take: %s", error)
            await trio.sleep(INTERVAL)

    async def _look(self) -> None:
        used, began = await self._client.used_memory(), trio.current_time()
        if used <= self._limit:
            self.is_full = False
            return
        if not self._is_due(used, began):
            return
        logs, ended = await self._measure()
        if logs > self._limit:
            logs -= await self._make_room(logs - int(self._limit * (1 - LEFT)), ended)
        now = trio.current_time()
        self._measured = _Measured(logs, await self._client.used_memory(), now, now - began)
        self._set_full(logs > self._limit)

    def _is_due(self, used: int, now: float) -> bool:
        """Return whether the sizes of all logs must be added up, as Redis uses that many bytes."""
        if (last := self._measured) is None:
            return True
        if now < last.at + REST * last.took:
            return False
        has_grown = last.logs + used - last.used > self._limit
        return has_grown or self.is_full or now >= last.at + max(AGAIN, 5 * REST * last.took)

    def _set_full(self, is_full: bool) -> None:
        if is_full and not self.is_full:
            log.warning(
                "the logs take max_log_bytes = %d bytes, and none of them can be deleted", self._limit
            )
        self.is_full = is_full

    async def _measure(self) -> tuple[int, list[_Ended]]:
        """Return what all logs take, and those that have ended."""
        ids = await self._client.execute("ZRANGE", SESSIONS_KEY, 0, -1)
        total, ended = 0, []
        for start in range(0, len(ids), CHUNK):
            chunk = [session_id.decode() for session_id in ids[start : start + CHUNK]]
            fields = ("size", "epoch", "ended", "touched")
            rows = await self._client.execute_many(
                [("HMGET", session_keys(session_id)[0], *fields) for session_id in chunk]
            )
            for session_id, (size, epoch, has_ended, touched) in zip(chunk, rows, strict=True):
                if epoch is not None:
                    taken = int(size) + RECORD
                    total += taken
                    if has_ended == b"1":
                        ended.append(_Ended(float(touched), session_id, epoch.decode(), taken))
        return total, ended

    async def _make_room(self, excess: int, ended: list[_Ended]) -> int:
        """Delete sessions that take so many bytes, if there are, those first that ended longest ago.

        Returns how many bytes they took.
        """
        freed = 0
        for session in sorted(ended):
            if freed >= excess:
                break
            await self._delete(session.session_id, session.epoch)
            freed += session.size  # also if another instance, which has measured the same, was faster
        if freed:
            log.info("deleted sessions that had ended, as the logs took max_log_bytes: %d bytes", freed)
        return freed
