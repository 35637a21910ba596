"""What leads to the sessions in Redis: all of them, those with a lease, the jobs, and when to check which.

An entry is made before the session is stored, so that none is forgotten by a crash. One that leads to nothing
is skipped, and removed after some time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import attrgetter

import msgspec
import trio

from ...config import Settings
from ...model import Session
from ..base import too_many_sessions
from ..codec import decode_session
from . import scripts
from .client import RedisClient
from .connection import Value
from .faults import translated
from .scripts import DUE_KEY, INDEX, JOBS_KEY, LEASED_KEY, OWNER_KEY, SESSIONS_KEY, session_keys

__all__ = ["Entry", "SessionIndex", "decode_record", "keep_seconds"]

MAX_NOTED = 10_000  # sessions of which is known that they are noted
SPARE_TIME = 60.0  # seconds for which an entry may lead to no session: it is being created
OWNED_KEEP = 30 * 86400  # seconds after an owner's last creation that what it owns is not known any more
RECOUNT = 60.0  # seconds between two looks at whether the sessions of an owner still exist
MAX_RECOUNTED = 10_000  # owners of which is known when that was

Entry = tuple[str, str]  # the key of a set of the index, and the score of a session in it


class SessionIndex:
    """The index, and what this instance knows to be in it.

    Args:
        client: of the Redis.
        settings: say how long sessions are kept.
        now: returns the time for scripts, empty for that of Redis.
    """

    def __init__(self, client: RedisClient, settings: Settings, now: Callable[[], str]) -> None:
        self._client = client
        self._settings = settings
        self._now = now
        # Whether a session is noted among those with a lease, and among the jobs
        self._noted: OrderedDict[str, tuple[bool, bool]] = OrderedDict()
        self._recounted: OrderedDict[str, float] = OrderedDict()  # owners, and when

    @translated
    async def count(self) -> int:
        """Return how many sessions there are."""
        count: int = await self._client.execute("ZCARD", SESSIONS_KEY)
        return count

    async def sessions(self, newest: int | None = None) -> list[Session]:
        """Return all records, or the newest ones, the newest first."""
        return (await self._load(SESSIONS_KEY, newest=newest))[::-1]

    async def leased(self) -> list[Session]:
        """Return the sessions that have not ended and have a lease."""
        return await self._load(LEASED_KEY, _is_leased)

    async def jobs(self) -> list[Session]:
        """Return the jobs that have not ended, the oldest first."""
        return sorted(await self._load(JOBS_KEY, _is_job, may_change=False), key=attrgetter("created_at"))

    def forget(self, session_id: str) -> None:
        """Take note that it is not known any more what leads to a session."""
        self._noted.pop(session_id, None)

    async def note(self, session: Session, *, begins: bool, is_new: bool) -> None:
        """Note in the index what will lead to a session, before it is stored.

        Raises:
            TooManySessions: its owner has as many as there may be.
        """
        leads = _is_leased(session), _is_job(session)
        noted = self._noted.get(session.id, (False, False))
        if (
            begins
            or session.ended
            or any(lead and not known for lead, known in zip(leads, noted, strict=True))
        ):
            keys, limit = list(INDEX), self._settings.max_sessions_per_owner
            words: list[Value] = [
                self._now(),
                session.id,
                keep_seconds(session, self._settings),
                int(is_new),
                *map(int, leads),
                "inf" if limit is None else limit,
                OWNED_KEEP,
            ]
            if is_new and session.owner is not None:
                keys.append(OWNER_KEY + session.owner)
            while not await self._client.evaluate(scripts.NOTE, keys, words):
                assert session.owner is not None
                assert limit is not None
                if not await self._recount(session.owner):
                    raise too_many_sessions(limit)
        self._noted.pop(session.id, None)
        if any(leads):
            self._noted[session.id] = leads
            if len(self._noted) > MAX_NOTED:
                self._noted.popitem(last=False)

    async def _recount(self, owner: str) -> bool:
        """Remove what an owner does not have any more; return False if that was done a short time ago.

        Its sessions may not have been stored after they were noted, or have vanished without an instance.
        """
        now = trio.current_time()
        if now - self._recounted.get(owner, -RECOUNT) < RECOUNT:
            return False
        self._recounted[owner] = now
        self._recounted.move_to_end(owner)
        if len(self._recounted) > MAX_RECOUNTED:
            self._recounted.popitem(last=False)
        await self._load(OWNER_KEY + owner, lambda session: session.owner == owner)
        return True

    @translated
    async def due(self, lead: float) -> tuple[float, list[tuple[str, bytes]]]:
        """Return the time, and which sessions are to be checked within ``lead`` seconds, and when."""
        now, due = await self._client.evaluate(scripts.DUE, [DUE_KEY], [self._now(), lead])
        return float(now), [(id_.decode(), at) for id_, at in zip(due[::2], due[1::2], strict=True)]

    async def postpone(self, session_id: str, before: bytes, until: bytes) -> None:
        """Have a session checked later, unless that has changed since."""
        await self._client.evaluate(scripts.UPDATE, [DUE_KEY], [session_id, before, until])

    @translated
    async def _load(
        self,
        key: str,
        belongs: Callable[[Session], bool] = lambda _session: True,
        newest: int | None = None,
        *,
        may_change: bool = True,
    ) -> list[Session]:
        """Return the sessions that an index leads to, and remove old entries that lead to none.

        ``may_change``: one that is stored and does not belong there may have been noted because it will.
        """
        if newest == 0:
            return []
        start = 0 if newest is None else -newest
        entries = await self._client.execute("ZRANGE", key, start, -1, "WITHSCORES")
        commands = [("HMGET", session_keys(id_.decode())[0], "record", "epoch") for id_, _ in entries]
        found: list[Session] = []
        latest = entries[-1][1] if entries else 0
        for (id_, score), (record, epoch) in zip(
            entries, await self._client.execute_many(commands), strict=True
        ):
            session = None if record is None else decode_record(record, epoch)
            if session is not None and belongs(session):
                found.append(session)
            elif score < latest - SPARE_TIME or (session is not None and not may_change):
                await self._client.evaluate(scripts.UPDATE, [key], [id_, repr(score), ""])
        return found

    async def entries(self, session_id: str) -> list[Entry]:
        """Return where a session is in the index, to remove it unless it is noted again in the meantime."""
        record, *scores = await self._client.execute_many(
            [
                ("HGET", session_keys(session_id)[0], "record"),
                *(("ZSCORE", key, session_id) for key in INDEX),
            ]
        )
        keys = list(INDEX)
        if record is not None and (owner := decode_session(record).owner) is not None:
            keys.append(OWNER_KEY + owner)
            scores.append(await self._client.execute("ZSCORE", keys[-1], session_id))
        # coredis rounds floats
        return [(key, repr(score)) for key, score in zip(keys, scores, strict=True) if score is not None]

    async def remove(self, session_id: str, entries: Iterable[Entry]) -> None:
        """Remove the entries of a session, as they were."""
        keys: list[str] = []
        words: list[Value] = [session_id]
        for key, score in entries:
            keys.append(key)
            words += [score, ""]
        if keys:
            await self._client.evaluate(scripts.UPDATE, keys, words)


def keep_seconds(session: Session, settings: Settings) -> float:
    """Return for how many seconds after its last event a session is kept."""
    if session.ended:
        return session.ttl or settings.ttl
    return max(settings.idle_ttl, session.ttl or 0)


def _is_leased(session: Session) -> bool:
    return session.lease is not None and not session.ended


def _is_job(session: Session) -> bool:
    return session.job is not None and not session.ended


def decode_record(record: bytes, epoch: bytes) -> Session:
    """Return a record as it is stored; its epoch is stored beside it, as it may change."""
    session = decode_session(record)
    return (
        session if session.epoch == epoch.decode() else msgspec.structs.replace(session, epoch=epoch.decode())
    )
