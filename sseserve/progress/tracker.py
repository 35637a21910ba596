"""The one place through which sessions change: the rules of progress, over an engine."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import trio

from .. import sse
from ..dialects import RESERVED
from ..engines import Engine, Stale
from ..errors import (
    Conflict,
    Invalid,
    SessionEnded,
    SessionExists,
    SessionNotFound,
    Unavailable,
)
from ..model import Artifact, Control, Event, Progress, Published, Receipt, Session, State
from .rules import Update, advance, changes

__all__ = ["StoreReceipt", "Tracker"]

_new = msgspec.structs.replace

# From what a publisher is told to what is stored of it, under which idempotency key.
StoreReceipt = Callable[[Receipt], tuple[str, Receipt]]


class Tracker:
    """The one place through which sessions change.

    All methods raise ``SessionNotFound`` for a session that does not exist (updates and events create it
    if ``auto_create`` is on). They are atomic with respect to cancellation: cancelled, they have either
    not begun or are complete.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        auto_create: bool = True,
        max_sessions: int = 100_000,
        clock: Callable[[], float] = time.time,
        forgotten: Callable[[Session], None] = lambda _session: None,
    ) -> None:
        self.engine = engine
        self._auto_create = auto_create
        self._max_sessions = max_sessions
        self.clock = clock
        self._forgotten = forgotten  # is told of every session that is no more

    async def create(
        self,
        session_id: str | None = None,
        *,
        owner: str | None = None,
        viewers: Sequence[str] = (),
        title: str | None = None,
        ttl: float | None = None,
        lease: float | None = None,
        correlation_id: str | None = None,
        data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
    ) -> Session:
        """Create a session, queued, and return it. Without an id it gets a random one.

        With a ``lease`` (seconds) the producer promises a word at least that often; see ``check_leases``.

        Raises:
            SessionExists: the id is taken.
            Invalid: the id cannot be one (1 to 128 characters, printable, no space or slash).
            Unavailable: there are ``max_sessions``.
        """
        now = self.clock()
        session_id = _checked(secrets.token_urlsafe(12) if session_id is None else session_id)
        data = data if data is msgspec.UNSET else _raw(data)
        queued = Progress(status="queued", state=State.QUEUED, data=data, updated_at=now)
        session = _new(
            self._begin(session_id, now),
            owner=owner,
            viewers=tuple(viewers),
            title=title,
            ttl=ttl,
            lease=lease,
            correlation_id=correlation_id,
            data=data,
            seq=1,
            progress=queued,
        )
        await self._room()
        if await self.engine.load(session_id) is not None:
            raise SessionExists(f"there is a session {session_id!r} already")
        try:
            await self.engine.append(session, [Event(1, "progress", queued, now, ("state", "status"))])
        except Stale:
            raise SessionExists(f"there is a session {session_id!r} already") from None
        return session

    async def get(self, session_id: str) -> Session:
        """Return the session's record as it is now."""
        session = await self.engine.load(session_id)
        if session is None:
            raise SessionNotFound(f"there is no session {session_id!r}")
        return session

    async def update(
        self,
        session_id: str,
        *,
        status: str | None = None,
        progress: float | None = None,
        stage: str | None = None,
        message: str | None = None,
        error: str | dict[str, Any] | None = None,
        data: Any = None,
        artifacts: Sequence[Artifact] | None = None,
        restart: bool = False,
    ) -> Receipt:
        """Publish progress (percent, 0 to 100) and learn what the watchers ask.

        Raises:
            SessionEnded: the session has its terminal event.
            InvalidProgress: the percentage is none, or falls without ``restart``.
            Invalid: something of it cannot be written as JSON.
        """
        update = Update(
            status=status,
            progress=progress,
            stage=stage,
            message=message,
            error=error,
            data=msgspec.UNSET if data is None else _raw(data),
            artifacts=None if artifacts is None else tuple(artifacts),
            restart=restart,
        )
        _raw(update)
        # A caller in this process may have nothing else to wait for.
        await trio.lowlevel.checkpoint()
        return await self.apply(session_id, update)

    async def apply(
        self,
        session_id: str,
        update: Update | Callable[[Session], Update],
        *,
        receipt: StoreReceipt | None = None,
        published: Published | None = None,
    ) -> Receipt:
        """Publish an ``Update``, or one that depends on where the session stands.

        ``receipt`` names the idempotency key to store the receipt under; ``published`` is what the
        clients of the publisher's own dialect get.
        """

        def step(session: Session, now: float) -> tuple[Session, Event]:
            said = update if isinstance(update, Update) else update(session)
            if said.data is not msgspec.UNSET:
                said = _new(said, data=_raw(said.data))
            progress = advance(session.progress, said, now)
            changed = changes(session.progress, progress, said)
            event = Event(session.seq + 1, "progress", progress, now, changed, published=published)
            return _new(session, progress=progress, published=published), event

        return await self._commit(session_id, step, receipt)

    async def emit(
        self,
        session_id: str,
        type: str,  # noqa: A002 - the event stream's own word
        data: Any = None,
        *,
        retry: int | None = None,
        receipt: StoreReceipt | None = None,
    ) -> Receipt:
        """Publish an event of the publisher's own ``type`` with JSON ``data``. ``retry``: milliseconds.

        Raises:
            SessionEnded: the session has its terminal event.
            Invalid: the type is empty, too long, reserved, or would break the framing.
        """
        if not type or len(type) > 128 or not sse.valid_field(type):
            raise Invalid("an event type has 1 to 128 characters, none of them CR, LF or NUL")
        _raw(type)
        if type in RESERVED:
            raise Invalid(f"events of the type {type!r} come from the server alone")
        if retry is not None and not 0 <= retry <= 86_400_000:
            raise Invalid("retry is in milliseconds, from 0 to 86400000")
        raw = _raw(data)

        def step(session: Session, now: float) -> tuple[Session, Event]:
            if session.ended:
                raise SessionEnded(f"the session has ended: {session.progress and session.progress.status}")
            return session, Event(session.seq + 1, type, raw, now, retry=retry)

        return await self._commit(session_id, step, receipt)

    async def control(self, session_id: str, wish: Control, *, force: bool = False) -> Session:
        """Ask the worker to pause, continue or cancel; watchers see a ``control`` event.

        Nobody works on a queued session yet, so cancelling ends it at once; ``force`` does so in any
        state, for a worker that is known to be dead. Asking for what is asked already changes nothing.

        Raises:
            SessionEnded: the session has its terminal event.
            Conflict: it is to be cancelled, which cannot be taken back.
        """

        def step(session: Session, now: float) -> tuple[Session, Event] | None:
            if session.ended:
                raise SessionEnded(f"the session has ended: {session.progress and session.progress.status}")
            waiting = session.progress is not None and session.progress.state is State.QUEUED
            if wish is Control.CANCEL and (force or waiting):
                progress = advance(session.progress, Update(status="cancelled"), now)
                after = _new(session, progress=progress, published=None, control=wish)
                return after, Event(session.seq + 1, "progress", progress, now, ("state", "status"))
            if session.control is wish:
                return None
            if session.control is Control.CANCEL:
                raise Conflict("the session is to be cancelled, which cannot be taken back")
            event = Event(session.seq + 1, "control", _raw({"control": wish.value}), now)
            return _new(session, control=wish), event

        await self._commit(session_id, step, heard=False)
        return await self.get(session_id)

    async def check_leases(self) -> None:
        """Say of the producers that were silent for longer than their lease that they have stalled.

        After three leases the session is lost, which is its end.
        """

        def step(session: Session, now: float) -> tuple[Session, Event] | None:
            silent = now - session.heard_at
            if session.ended or session.lease is None or silent <= session.lease:
                return None
            if silent > 3 * session.lease:
                progress = advance(session.progress, Update(status="lost"), now)
                return _new(session, progress=progress, published=None), Event(
                    session.seq + 1, "progress", progress, now, ("state", "status")
                )
            if session.stalled:
                return None
            data = _raw({"lease": session.lease, "silent": round(silent, 3)})
            return _new(session, stalled=True), Event(session.seq + 1, "stalled", data, now)

        for number, session in enumerate(await self.engine.leased(), 1):
            if number % 256 == 0:
                await trio.lowlevel.checkpoint()
            if session.lease is None or self.clock() - session.heard_at <= session.lease:
                continue
            with contextlib.suppress(SessionNotFound):
                await self._commit(session.id, step, heard=False)

    async def delete(self, session_id: str) -> Session:
        """Forget a session; returns the record it had."""
        session = await self.get(session_id)
        if not await self.engine.delete(session_id, session.epoch):
            raise SessionNotFound(f"there is no session {session_id!r}")
        self._forgotten(session)
        return session

    async def sessions(self, state: State | None = None) -> list[Session]:
        """All sessions, the newest first, or those in one state."""
        found = await self.engine.sessions()
        return [
            s for s in found if state is None or (s.progress.state if s.progress else State.QUEUED) is state
        ]

    async def expire(self, watched: Callable[[str], bool]) -> list[Session]:
        """Forget the sessions whose time is over, and return them."""
        gone = await self.engine.expire(self.clock(), watched)
        for session in gone:
            self._forgotten(session)
        return gone

    def _begin(self, session_id: str, now: float) -> Session:
        return Session(
            id=session_id, epoch=secrets.token_hex(4), created_at=now, touched_at=now, heard_at=now
        )

    async def _room(self) -> None:
        if await self.engine.count() >= self._max_sessions:
            raise Unavailable(f"the server keeps {self._max_sessions} sessions already")

    async def _commit(
        self,
        session_id: str,
        step: Callable[[Session, float], tuple[Session, Event] | None],
        receipt: StoreReceipt | None = None,
        *,
        heard: bool = True,
    ) -> Receipt:
        """Read, decide, and store what was decided, again if somebody else was faster.

        ``heard``: the producer says it, which renews its lease and may create the session.
        """
        while True:
            now = self.clock()
            session = await self.engine.load(session_id)
            if session is None:
                if not (self._auto_create and heard):
                    raise SessionNotFound(f"there is no session {session_id!r}")
                await self._room()
                session = self._begin(_checked(session_id), now)
            if (decided := step(session, now)) is None:
                return Receipt(str(session.cursor), session.control)
            after, event = decided
            after = _new(after, seq=event.seq, touched_at=now)
            if heard:
                after = _new(after, heard_at=now, stalled=False)
            answer = Receipt(str(after.cursor), after.control)
            try:
                await self.engine.append(after, [event], receipt=None if receipt is None else receipt(answer))
            except Stale:
                continue
            return answer


def _checked(session_id: str) -> str:
    bad = session_id in {".", ".."}  # which clients take out of a path
    bad = bad or not session_id.isprintable() or bool(set(session_id) & set(' /\\?#%"'))
    if 1 <= len(session_id) <= 128 and not bad:
        return session_id
    raise Invalid('a session id has 1 to 128 printable characters, without space, / \\ ? # % and "')


def _raw(data: Any) -> msgspec.Raw:
    """Write data as one line of JSON.

    Raises:
        Invalid: it cannot be written as JSON.
    """
    try:
        text = msgspec.json.encode(data)
        if isinstance(data, msgspec.Raw):
            msgspec.json.decode(text)  # nobody has looked into it yet
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"the data cannot be written as JSON: {error}") from None
    # A Raw keeps the white space it came with, line ends among it.
    return msgspec.Raw(msgspec.json.format(text, indent=-1) if b"\n" in text or b"\r" in text else text)
