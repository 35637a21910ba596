"""The one place through which sessions change: the rules of progress, over an engine."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec
import trio

from ..concurrency import SLICE, select
from ..engines import Engine, Repeated, Stale
from ..errors import (
    InsufficientStorage,
    Invalid,
    SessionExists,
    SessionNotFound,
    SseserveError,
    Unavailable,
)
from ..jsontext import to_raw
from ..metrics import Histogram
from ..model import Artifact, Control, Event, Receipt, Session, State, check_id_type
from ..trace_context import TraceContext
from ..tracing import Tracing
from .leases import Leases
from .rules import Change, NewEvent, Update
from .steps import (
    Step,
    apply_change,
    apply_claim,
    apply_control,
    apply_loss,
    apply_update,
    begin_session,
    check_data,
    queued_progress,
)

__all__ = ["MAX_TITLE", "Check", "IdempotencyKey", "Tracker"]

MAX_TITLE = 1024  # characters

_new = msgspec.structs.replace

# Raises an error if whoever asks for a change of this session may not have it; None: there is no session.
Check = Callable[[Session | None], None]


class IdempotencyKey(msgspec.Struct, frozen=True):
    """Under which key the receipt of a change is stored, and what it says about the request.

    ``count`` and ``digest`` say how much of the request is applied with this change; ``created``: an earlier
    part of it has created the session.
    """

    key: str
    count: int = 1
    digest: bytes = b""
    created: bool = False


class Tracker:
    """The one place through which sessions change.

    All methods raise ``SessionNotFound`` for a session that does not exist (updates and events create it
    if ``auto_create`` is on), and ``EngineUnavailable`` or ``InsufficientStorage`` while the engine cannot be
    used. They are atomic with respect to cancellation: cancelled, they have either not begun or are complete.

    A ``check`` is called with the very record that is changed, and raises an error if it must not be.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        auto_create: bool = True,
        max_sessions: int = 100_000,
        max_event: float = math.inf,
        reserved: Collection[str] = (),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = trio.current_time,
    ) -> None:
        """Args:
        engine: keeps the sessions and their logs.
        auto_create: publishing to a session that does not exist creates it.
        max_sessions: more than that many are refused.
        max_event: limit of an event's data, in bytes.
        reserved: event types that only the server uses; publishers cannot.
        clock: returns POSIX seconds.
        monotonic: returns the seconds that leases are measured in.
        """
        self.engine = engine
        self._auto_create = auto_create
        self._max_sessions = max_sessions
        self._max_event = max_event
        self.clock = clock
        self._monotonic = monotonic
        self._leases = Leases()
        self._reserved = frozenset(reserved)
        # Looks elsewhere for a session that there is none of, and may create it.
        self.find_elsewhere: Callable[[str], Awaitable[None]] | None = None
        # Is called with what was recorded here.
        self.on_record: Callable[[Session, Event], None] | None = None
        self.tracing: Tracing | None = None
        self.failed_appends = 0  # what the engine could not store
        self.append_seconds = Histogram()  # that the others took
        self.stalled_leases = self.lost_leases = 0

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
        job: str | None = None,
        instance: str | None = None,
        trace: TraceContext | None = None,
    ) -> Session:
        """Create a session, queued, and return it. Without an id it gets a random one.

        With a ``lease`` (seconds) the producer promises to publish at least that often; see ``check_leases``.
        ``job`` is the runner of a job for the server's queue; ``instance`` runs it already. ``trace`` is the
        trace that this is a part of.

        Raises:
            SessionExists: the id is taken.
            Invalid: the id cannot be one (1 to 128 characters, printable, no space or slash), or the title is
                longer than ``MAX_TITLE`` characters.
            PayloadTooLarge: the data is larger than ``max_event``.
            Unavailable: there are ``max_sessions``.
        """
        if title is not None and len(title) > MAX_TITLE:
            raise Invalid(f"title has at most {MAX_TITLE} characters, not {len(title)}")
        now = self.clock()
        session_id = secrets.token_urlsafe(12) if session_id is None else session_id
        if data is not msgspec.UNSET:
            data = to_raw(data)
            check_data(data, self._max_event)
        queued = queued_progress(data, now)
        session = _new(
            begin_session(session_id, now),
            owner=owner,
            viewers=tuple(viewers),
            title=title,
            ttl=ttl,
            lease=lease,
            correlation_id=correlation_id,
            data=data,
            seq=1,
            progress=queued,
            job=job,
            instance=instance,
        )
        await self._check_capacity()
        if await self.engine.load(session_id) is not None:
            raise SessionExists(f"there is a session {session_id!r} already")
        try:
            event = Event(1, "progress", queued, now, ("state", "status"))
            await self._append(session, event, trace=trace)
        except Stale:
            raise SessionExists(f"there is a session {session_id!r} already") from None
        if lease is not None:
            self._leases.observe(session, self._monotonic())
        return session

    async def get(self, session_id: str) -> Session:
        """Return the session's record as it is now."""
        session = await self.find(session_id)
        if session is None:
            raise _not_found(session_id)
        return session

    async def find(self, session_id: str) -> Session | None:
        """Return the session's record as it is now, None if there is none."""
        session = await self.engine.load(session_id)
        if session is None and self.find_elsewhere is not None:
            await self.find_elsewhere(session_id)
            session = await self.engine.load(session_id)
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
        """Publish progress (percent, 0 to 100); the receipt says what the watchers ask.

        Raises:
            SessionEnded: the session has its terminal event.
            InvalidProgress: the percentage is invalid, or falls without ``restart``.
            Invalid: something of it cannot be written as JSON.
            PayloadTooLarge: the data is larger than ``max_event``.
            TypeError: an argument has the wrong type.
        """
        check_id_type(session_id)
        _check_types(status=status, stage=stage, message=message)
        for artifact in artifacts or ():
            if not isinstance(artifact, Artifact):
                raise TypeError(f"an artifact must be an Artifact, not {artifact!r}")
        update = Update(
            status=status,
            progress=progress,
            stage=stage,
            message=message,
            error=error,
            data=msgspec.UNSET if data is None else to_raw(data),
            artifacts=None if artifacts is None else tuple(artifacts),
            restart=restart,
        )
        to_raw(update)
        # A caller in this process may have nothing else to wait for.
        await trio.lowlevel.checkpoint()
        return await self.apply(session_id, update)

    async def apply(
        self,
        session_id: str,
        change: Change,
        *,
        key: IdempotencyKey | None = None,
        owner: str | None = None,
        check: Check | None = None,
        trace: TraceContext | None = None,
    ) -> Receipt:
        """Record a change.

        Args:
            session_id: the session.
            change: an update or event, or a function from the session as it is now to an update.
            key: the receipt is stored under it, atomically with the event.
            owner: of the session, if the change creates it.
            check: see the class.
            trace: the trace that the change is a part of; the event carries it.

        Raises:
            SessionEnded: the session has its terminal event.
            InvalidProgress: the percentage is invalid, or falls without a restart.
            Invalid: the event type is empty, too long or reserved, or something cannot be written as JSON.
            PayloadTooLarge: the data is larger than ``max_event``.
            Repeated: a change with this key has been recorded already.
        """
        step = apply_change(change, self._reserved, self._max_event)
        return (await self._commit(session_id, step, key, owner=owner, check=check, trace=trace))[0]

    async def emit(
        self,
        session_id: str,
        type: str,  # noqa: A002 - the event stream's own word
        data: Any = None,
        *,
        retry: int | None = None,
    ) -> Receipt:
        """Publish an event of the publisher's own ``type`` with JSON ``data``.

        ``retry`` is the reconnection time that watchers are asked for, in milliseconds.

        Raises:
            SessionEnded: the session has its terminal event.
            Invalid: the type is empty, too long, reserved, or would break the framing.
            PayloadTooLarge: the data is larger than ``max_event``.
            TypeError: the type is not a string.
        """
        check_id_type(session_id)
        _check_types(type=type)
        return await self.apply(session_id, NewEvent(type, data, retry))

    async def control(
        self, session_id: str, command: Control, *, force: bool = False, check: Check | None = None
    ) -> Session:
        """Ask the worker to pause, continue or cancel; watchers see a ``control`` event.

        Nobody works on a queued session yet, so cancelling ends it at once; ``force`` does so in any
        state, for a worker that is known to be dead. Repeating a request changes nothing.

        Raises:
            SessionEnded: the session has its terminal event.
            Conflict: it has been asked to cancel, which cannot be withdrawn.
        """
        step = apply_control(command, force=force)
        return (await self._commit(session_id, step, from_producer=False, check=check))[1]

    async def claim(
        self, session: Session, lease: float | None = None, *, instance: str | None = None
    ) -> Session:
        """Start a queued session: for a worker, or for an instance of the server that runs it.

        A worker promises to publish every ``lease`` seconds. An instance that has claimed a session already
        gets it again, as it may not have learnt of its success.

        Raises:
            Conflict: it is not queued any more, or another session has its id.
        """
        return (await self._commit(session.id, apply_claim(session, lease, instance)))[1]

    async def end_as_lost(self, session: Session, reason: str) -> None:
        """End a session as ``lost``, unless it has ended, or another instance runs it."""
        with contextlib.suppress(SessionNotFound):
            await self._commit(session.id, apply_loss(session, reason), from_producer=False)

    async def check_leases(self, *, restart: bool = False) -> None:
        """Publish ``stalled`` for the producers that were silent for longer than their lease.

        After three leases the session ends as ``lost``; see ``leases``. ``restart``: this process was
        suspended, so all leases begin afresh.
        """
        now = self._monotonic()
        if restart:
            self._leases.restart()
        self._leases.begin_round()
        leased = await self.engine.leased()
        while leased:
            session = leased.pop()  # what is replaced meanwhile is freed one by one, not all with the list
            is_due = self._leases.due(session, now) is not None
            if is_due:
                with contextlib.suppress(SessionNotFound):
                    _, after = await self._commit(session.id, self._check_lease, from_producer=False)
                    if after.progress is not None and after.progress.state is State.LOST:
                        self.lost_leases += 1
                    elif after.stalled and not session.stalled:
                        self.stalled_leases += 1
            if is_due or len(leased) % SLICE == 0:
                await trio.lowlevel.checkpoint()
        await self._leases.end_round()

    def forget_leases(self) -> None:
        """Forget what only the instance needs that judges leases; for it they would begin afresh."""
        self._leases.restart()

    def _check_lease(self, session: Session, at: float) -> tuple[Session, Event] | None:
        now = self._monotonic()
        due = self._leases.due(session, now)
        if due == "lost":
            return apply_update(session, Update(status="lost"), at)
        if due is None:
            return None
        data = to_raw({"lease": session.lease, "silent": round(self._leases.idle_time(session, now), 3)})
        self._leases.mark_stalled(session, now)
        return _new(session, stalled=True), Event(session.seq + 1, "stalled", data, at)

    async def delete(self, session_id: str, *, check: Check | None = None) -> Session:
        """Delete a session and its log; returns its last record."""
        while True:
            session = await self.find(session_id)
            if check is not None:
                check(session)
            if session is None:
                raise _not_found(session_id)
            if await self.engine.delete(session_id, session.epoch):
                return session
            # Its log is another one now, or it is deleted already.

    async def sessions(self, state: State | None = None) -> list[Session]:
        """Return all sessions, the newest first, or those in one state."""
        sessions = await self.engine.sessions()
        if state is None:
            return sessions
        return await select(sessions, lambda s: (s.progress.state if s.progress else State.QUEUED) is state)

    async def _check_capacity(self) -> None:
        if await self.engine.count() >= self._max_sessions:
            raise Unavailable(
                f"there are max_sessions = {self._max_sessions} sessions already", limit="max_sessions"
            )

    async def _commit(
        self,
        session_id: str,
        step: Step,
        key: IdempotencyKey | None = None,
        *,
        from_producer: bool = True,
        owner: str | None = None,
        check: Check | None = None,
        trace: TraceContext | None = None,
    ) -> tuple[Receipt, Session]:
        """Read, decide and store; again if the log has grown in between. Returns the record after it, too.

        ``from_producer``: the change renews the producer's lease, and may create the session. Another is
        rare, and decided on what is stored: this instance may not know when the producer was last heard of.
        So is a ``check``. ``owner`` is that of a session that is created.
        """
        settled = not from_producer or check is not None  # whether ``session`` is what is stored
        session = await (self.engine.settled if settled else self.engine.latest)(session_id)
        while True:
            now = self.clock()
            if check is not None:
                check(session)
            if session is None and not settled:
                session, settled = await self.engine.settled(session_id), True
            created = session is None
            try:
                current = session or await self._begin_published(session_id, now, owner, from_producer)
                decided = step(current, now)
            except SseserveError:
                if not settled:
                    session, settled = await self.engine.settled(session_id), True
                    continue
                if key is not None:
                    await self._check_repeated(session_id, key)
                raise
            if decided is None:
                if settled:
                    return Receipt(str(current.cursor), current.control), current
                session, settled = await self.engine.settled(session_id), True
                continue
            after, event = decided
            if after.is_waiting and after.progress is not None and after.progress.state is not State.QUEUED:
                after = _new(after, job=None)  # somebody else has begun it
            if from_producer:
                after = _new(after, seq=event.seq, touched_at=now, producer_seq=event.seq, stalled=False)
            else:
                after = _new(after, seq=event.seq, touched_at=now)
            receipt = Receipt(str(after.cursor), after.control, created=created)
            stored = None
            if key is not None:
                receipt = _new(receipt, count=key.count, digest=key.digest, created=created or key.created)
                stored = key.key, receipt
            try:
                replaces = None if after.epoch == current.epoch else current.epoch
                await self._append(after, event, stored, replaces, trace)
            except Stale:
                settled = check is not None
                session = await (self.engine.settled if settled else self.engine.latest)(session_id)
                continue
            if after.lease is not None:
                self._leases.observe(after, self._monotonic())
            return receipt, after

    async def _append(
        self,
        session: Session,
        event: Event,
        receipt: tuple[str, Receipt] | None = None,
        replaces: str | None = None,
        trace: TraceContext | None = None,
    ) -> None:
        if trace is not None:
            event = _new(event, trace=trace)
        append = self.engine.append if self.tracing is None else self._append_traced
        began = time.perf_counter()
        try:
            await append(session, [event], receipt=receipt, replaces=replaces)
        except (Unavailable, InsufficientStorage):
            self.failed_appends += 1
            raise
        self.append_seconds.observe(time.perf_counter() - began)
        if self.on_record is not None:
            self.on_record(session, event)

    async def _append_traced(
        self,
        session: Session,
        events: Sequence[Event],
        *,
        receipt: tuple[str, Receipt] | None,
        replaces: str | None,
    ) -> None:
        """Append within a span, which is what the events carry on."""
        assert self.tracing is not None
        with self.tracing.append(session.id, events[0].type, events[0].seq):
            trace = self.tracing.current()
            traced = [_new(event, trace=trace) for event in events]
            await self.engine.append(session, traced, receipt=receipt, replaces=replaces)

    async def _begin_published(
        self, session_id: str, now: float, owner: str | None, from_producer: bool
    ) -> Session:
        """Return a new session that an update or event creates."""
        if not (self._auto_create and from_producer):
            raise _not_found(session_id)
        await self._check_capacity()
        session = begin_session(session_id, now)
        return session if owner is None else _new(session, owner=owner)

    async def _check_repeated(self, session_id: str, key: IdempotencyKey) -> None:
        """Raise Repeated if a change was refused because it has been recorded already."""
        stored = await self.engine.receipt(session_id, key.key)
        if stored is not None and stored.count >= key.count:
            raise Repeated(stored)


def _not_found(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"there is no session {session_id!r}")


def _check_types(**texts: object) -> None:
    """Raise a TypeError for an argument that is neither a string nor None."""
    for name, value in texts.items():
        if not isinstance(value, str | None):
            raise TypeError(f"{name} must be a str, not {value!r}")
