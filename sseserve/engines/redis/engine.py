"""The engine over Redis; the package's docstring has its guarantees."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import trio
from coredis.exceptions import AuthorizationError, ResponseError

from ...concurrency import raise_single_error
from ...config import Settings
from ...errors import ConfigError, EngineUnavailable, InsufficientStorage
from ...model import Event, Receipt, Session
from ..base import MAX_RECEIPTS, EngineListener, Page, Repeated, Stale, no_room, receipt_size
from ..codec import decode_event, decode_receipt, encode_event, encode_receipt, encode_session
from . import scripts
from .client import RedisClient
from .connection import Value
from .faults import Refused, translated
from .feed import Feed
from .index import SPARE_TIME, Entry, SessionIndex, decode_record, keep_seconds
from .known import Records
from .messages import message_head
from .places import Reading
from .scripts import SESSIONS_KEY, ChannelNames, session_keys
from .space import Space

__all__ = ["RedisEngine"]

MAX_MESSAGE = 64 * 1024  # bytes of an append that followers get without reading
MAX_RECORDS = 10_000  # that are known without asking Redis
PROBE = 1.0  # seconds between two questions to a Redis that cannot store
CATCH_UP = 10.0  # seconds in which what was missed is delivered before all is said to be well
LEAD = 30.0  # seconds before its end from which on a session is kept by being watched

log = logging.getLogger(__name__)
_replace = msgspec.structs.replace
_FULL = ("OOM", "MISCONF")  # codes of responses


class RedisEngine:
    """See the package; see ``Engine`` for the methods.

    Args:
        settings: the URL of the engine, and what it keeps.
        listener: is told what is stored.
        clock: returns the seconds that retention times are measured in; None: Redis's own clock.
    """

    immediate = False

    def __init__(
        self, settings: Settings, listener: EngineListener, clock: Callable[[], float] | None = None
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._clock = clock
        self._instance = secrets.token_hex(6)
        self._nursery: trio.Nursery | None = None
        self._problem: str | None = None
        self._restoring = trio.CancelScope()
        self._is_probing = False
        self.client = RedisClient(settings.engine_url)
        self.client.on_availability.append(self._on_availability)
        self.client.on_restart.append(self._on_restart)
        self._channel = ChannelNames(self.client.address.db).of
        self._feed = Feed(
            self.client,
            listener,
            self._instance,
            read=self._read,
            is_under_way=lambda session_id: session_id in self._under_way,
            on_record=self._note_record,
            on_change=self._forget,
            on_loss=self._renew,
        )
        self.follow = self._feed.follow
        self.unfollow = self._feed.unfollow
        self.wait_followed = self._feed.wait_followed
        self._records = Records()
        self._index = SessionIndex(self.client, settings, self._now)
        self.sessions, self.count = self._index.sessions, self._index.count
        self.leased, self.jobs = self._index.leased, self._index.jobs
        limit = settings.max_log_bytes
        self._space = None if limit is None else Space(self.client, limit, self.delete)
        self._under_way: dict[str, trio.Event] = {}  # set when the last append to a session is over
        # What this instance was acknowledged, and so must never miss: epoch, seq and nonce.
        self._acknowledged: OrderedDict[str, tuple[str, int, str]] = OrderedDict()

    @property
    def problem(self) -> str | None:
        return self._problem

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with raise_single_error():
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self.client.run)
                await self._check_configuration()
                try:
                    await self._enter_lineage()
                except EngineUnavailable as error:
                    raise ConfigError(f"cannot use the Redis at {self.client.address}: {error}") from error
                self._nursery.start_soon(self._feed.run)
                if self._space is not None:
                    self._nursery.start_soon(self._space.run)
                task_status.started()

    async def _check_configuration(self) -> None:
        """Find out at the start what would let appends fail half done, or be lost.

        Raises:
            ConfigError: the user has no permission for our keys or channels.
        """
        try:
            await self.client.execute(self._publish, scripts.PROBE_CHANNEL, "")
            await self.client.evaluate(scripts.PROBE, [SESSIONS_KEY])
        except AuthorizationError as error:
            raise ConfigError(
                f"the user at the Redis at {self.client.address} lacks permissions ({error}): give it "
                "~sseserve* &* +@all -@dangerous +info"
            ) from error
        except (ResponseError, EngineUnavailable):
            pass  # publishers are told
        with suppress(ResponseError, EngineUnavailable):
            found = await self.client.execute("CONFIG", "GET", "maxmemory-policy")
            policy = found.get(b"maxmemory-policy", b"noeviction").decode()
            if policy != "noeviction":
                log.warning("Redis may evict logs: set its maxmemory-policy to noeviction (it is %s)", policy)

    # Availability

    def _set_problem(self, problem: str | None) -> None:
        before, self._problem = self._problem, problem
        if (before is None) != (problem is None):
            self._listener.availability_changed(problem)

    def _on_availability(self, problem: str | None) -> None:
        self._restoring.cancel()
        if problem is not None:
            self._set_problem(problem)
        elif self._nursery is not None:
            self._nursery.start_soon(self._restore)

    async def _restore(self) -> None:
        """Deliver what was appended in the meantime; then nothing is the matter any more."""
        with trio.CancelScope() as self._restoring:
            self._feed.reopen()
            with trio.move_on_after(CATCH_UP):
                await self._feed.wait_caught_up()
            self._set_problem(None)

    def _note_full(self, problem: str) -> None:
        """Take note that Redis refuses to store; ask it again until it does not."""
        self._set_problem(problem)
        if not self._is_probing and self._nursery is not None:
            self._is_probing = True
            self._nursery.start_soon(self._probe)

    async def _probe(self) -> None:
        while True:
            await trio.sleep(PROBE)
            with suppress(ResponseError, EngineUnavailable):
                await self.client.evaluate(scripts.PROBE, [SESSIONS_KEY])
                break
        self._is_probing = False
        self._set_problem(None)

    def _on_restart(self) -> None:
        self._feed.reopen()
        if self._nursery is not None:
            self._nursery.start_soon(self._verify)

    async def _verify(self) -> None:
        """Find out whether a Redis that was restarted, or has replaced another, has lost something."""
        remaining = list(self._acknowledged.items())
        while True:
            with suppress(EngineUnavailable):
                await self._enter_lineage()
                while remaining:
                    with suppress(Refused):
                        await self._renew(remaining[-1][0], *remaining[-1][1])
                    remaining.pop()
                return
            await trio.sleep(PROBE)

    async def _enter_lineage(self) -> None:
        if not self.client.is_cluster:
            # Refused when the memory of Redis is full, say; then the first append does it.
            with suppress(ResponseError):
                arguments = [int(await self._keeps_all())]
                await self.client.evaluate(scripts.LINEAGE, [scripts.LINEAGE_KEY], arguments)

    async def _keeps_all(self) -> bool:
        """Return whether Redis loses nothing that it has acknowledged when its process is killed."""
        try:
            found = await self.client.execute("CONFIG", "GET", "append*")
        except ResponseError:
            return False  # whoever runs it does not let us know
        return bool(found.get(b"appendonly") == b"yes" and found.get(b"appendfsync") == b"always")

    # Records

    def _note_record(self, session: Session, nonce: str) -> None:
        """Take note of what another instance has stored."""
        known = self._records.get(session.id)
        if known is not None and (known.epoch != session.epoch or known.seq < session.seq):
            self._records.put(session, session.progress.size if session.progress else 256, nonce)
        if session.ended:
            self._index.forget(session.id)

    def _forget(self, session_id: str) -> None:
        self._records.discard(session_id)
        self._acknowledged.pop(session_id, None)
        self._index.forget(session_id)

    @translated
    async def load(self, session_id: str) -> Session | None:
        acknowledged = self._acknowledged.get(session_id)
        record, epoch = await self.client.execute("HMGET", session_keys(session_id)[0], "record", "epoch")
        if record is None:
            return None
        session = decode_record(record, epoch)
        await self._check_loss(session.id, session.epoch, session.seq, acknowledged)
        return session

    settled = load  # Redis executes it after what has been sent to it before

    async def latest(self, session_id: str) -> Session | None:
        return self._records.get(session_id) or await self.load(session_id)

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        acknowledged = self._acknowledged.get(session_id)
        reading = await self._read(session_id, after, limit)
        if reading is None:
            return None
        session = reading.page.session
        await self._check_loss(session.id, session.epoch, session.seq, acknowledged)
        return reading.page

    @translated
    async def _read(self, session_id: str, after: int, limit: int) -> Reading | None:
        found = await self.client.evaluate(scripts.READ, session_keys(session_id)[:2], [after, limit])
        if found is None:
            return None
        record, epoch, first, nonce, entries, nonce_before = found
        events = [decode_event(int(entry_id[:-2]), fields[3]) for entry_id, fields in entries]
        while events and events[-1].seq - events[0].seq >= len(events):
            events.pop()  # somebody has deleted one before it: the next page says so
        nonces = [fields[5].decode() for _, fields in entries]
        page = Page(decode_record(record, epoch), first, events)
        return Reading(page, nonces, nonce.decode(), nonce_before.decode())

    @translated
    async def receipt(self, session_id: str, key: str) -> Receipt | None:
        found = await self.client.execute("HGET", session_keys(session_id)[2], key)
        return None if found is None else _decode_receipt(found)

    # Appending

    async def append(
        self,
        session: Session,
        events: Sequence[Event],
        *,
        receipt: tuple[str, Receipt] | None = None,
        replaces: str | None = None,
    ) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        # What was sent cannot be taken back, and must be delivered. The time is bounded.
        with trio.CancelScope(shield=True):
            await self._append(session, events, receipt, replaces)

    async def _append(
        self,
        session: Session,
        events: Sequence[Event],
        receipt: tuple[str, Receipt] | None,
        replaces: str | None,
    ) -> None:
        first = session.seq - len(events) + 1
        if self._space is not None and self._space.is_full and not (session.ended and first > 1):
            raise no_room(self._settings.max_log_bytes or 0)
        # What this append builds on may still be under way, and another instance be first.
        builds_on, chain = self._records.origin(
            session.id, replaces or session.epoch, None if replaces else first - 1
        )
        try:
            await self._index.note(session, begins=first == 1, is_new=first == 1 and replaces is None)
        except ResponseError as error:
            raise self._translate(error) from error
        acknowledged = self._acknowledged.get(session.id)
        record = encode_session(session)
        nonce = secrets.token_hex(4)
        chain = chain or nonce
        self._records.put(session, len(record), nonce, chain)
        before, done = self._under_way.get(session.id), trio.Event()
        self._under_way[session.id] = done
        try:
            response = await self._execute_append(
                session, record, events, receipt, replaces, builds_on=builds_on, nonce=nonce
            )
            if before is not None:  # its response has come too, but its task may run after this one
                await before.wait()
            if response[0] == b"stored":
                self._acknowledge(session, nonce)
                self._feed.append(session, events, replaces, nonce, (response[1], response[2].decode()))
        except BaseException:
            self._records.discard(session.id, chain)
            self._feed.read_on(session.id)
            raise
        finally:
            done.set()
            if self._under_way.get(session.id) is done:  # none if a later one was over sooner
                del self._under_way[session.id]
        match response:
            case [b"repeated", found]:
                self._records.discard(session.id, chain)
                raise Repeated(_decode_receipt(found))
            case [b"stale", epoch, seq, found, stored_nonce]:
                self._records.discard(session.id, chain)
                lost = await self._check_loss(session.id, epoch.decode(), seq, acknowledged)
                if found and not lost and self._records.get(session.id) is None:
                    self._records.put(decode_record(found, epoch), len(found), stored_nonce.decode())
                raise Stale

    async def _execute_append(
        self,
        session: Session,
        record: bytes,
        events: Sequence[Event],
        receipt: tuple[str, Receipt] | None,
        replaces: str | None,
        *,
        builds_on: str,
        nonce: str,
    ) -> Any:
        settings = self._settings
        first = session.seq - len(events) + 1
        keys: list[str] = list(session_keys(session.id))
        if not self.client.is_cluster:
            keys.append(scripts.LINEAGE_KEY)
        arguments: list[Value] = [
            self._now(),
            message_head("renewed", self._instance, session.id),
            self._channel(session.id),
            self._publish,
            session.epoch,
            first,
            session.seq,
            replaces or "",
            builds_on,
            nonce,
            settings.history_events,
            settings.history_bytes,
            MAX_RECEIPTS,
            record,
            keep_seconds(session, settings),
            int(session.ended),
            message_head(
                "append", self._instance, session.id, session.epoch, first, session.seq, replaces or ""
            ),
            MAX_MESSAGE,
        ]
        if receipt is None:
            arguments += ["", 0, 0, ""]
        else:
            arguments += [receipt[0], receipt[1].count, receipt_size(*receipt), encode_receipt(receipt[1])]
        for event in events:
            arguments += [event.weight, encode_event(event)]
        try:
            return await self.client.evaluate(scripts.APPEND, keys, arguments, repeatable=False)
        except ResponseError as error:
            raise self._translate(error) from error

    def _translate(self, error: ResponseError) -> Exception:
        """Return what the server makes of a refusal of Redis to store."""
        if str(error).startswith(_FULL):
            self._note_full(f"Redis cannot store: {error}")
            return InsufficientStorage(f"Redis cannot store: {error}")
        return EngineUnavailable(f"Redis refuses to store: {error}")

    @property
    def _publish(self) -> str:
        return "SPUBLISH" if self.client.is_cluster else "PUBLISH"

    def _now(self) -> str:
        return "" if self._clock is None else repr(self._clock())

    def _acknowledge(self, session: Session, nonce: str) -> None:
        before = self._acknowledged.pop(session.id, None)
        if before is None or before[0] != session.epoch or before[1] < session.seq:
            before = session.epoch, session.seq, nonce
        self._acknowledged[session.id] = before
        if len(self._acknowledged) > MAX_RECORDS:
            self._acknowledged.popitem(last=False)

    # Loss

    async def _check_loss(
        self, session_id: str, epoch: str, seq: int, acknowledged: tuple[str, int, str] | None
    ) -> bool:
        """Renew the epoch of a log that ends before what this instance had been acknowledged."""
        if acknowledged is None or acknowledged[0] != epoch or seq >= acknowledged[1]:
            return False
        await self._renew(session_id, *acknowledged)
        return True

    @translated
    async def _renew(self, session_id: str, epoch: str, seq: int, nonce: str) -> None:
        """Give a log another epoch if it has this one, but not this event any more."""
        head = message_head("renewed", self._instance, session_id)
        arguments: list[Value] = [head, self._channel(session_id), self._publish, epoch, seq, nonce]
        arguments.append(secrets.token_hex(4))
        if await self.client.evaluate(scripts.RENEW, session_keys(session_id)[:2], arguments):
            log.warning("Redis has lost events of the session %s; its epoch changes", session_id)
            self._forget(session_id)

    # The end of sessions

    @translated
    async def delete(self, session_id: str, epoch: str) -> bool:
        entries = await self._index.entries(session_id)
        head = message_head("removed", self._instance, session_id)
        arguments: list[Value] = [epoch, head, self._channel(session_id), self._publish]
        record = await self.client.evaluate(scripts.REMOVE, session_keys(session_id), arguments)
        if record is None:
            return False
        await self._removed(session_id, epoch, record, entries)
        return True

    async def _removed(self, session_id: str, epoch: str, record: bytes, entries: Sequence[Entry]) -> None:
        self._forget(session_id)
        self._feed.remove(session_id, epoch)
        self._listener.removed(decode_record(record, epoch.encode()))
        await self._index.remove(session_id, entries)

    @translated
    async def expire(self, watched: Callable[[str], bool]) -> None:
        idle = self._settings.idle_ttl
        lead = min(LEAD, idle / 2)
        now, due = await self._index.due(lead)
        for session_id, at in due:
            is_watched = watched(session_id)
            if not is_watched and float(at) > now:
                continue
            entries = await self._index.entries(session_id)
            head = message_head("removed", self._instance, session_id)
            arguments: list[Value] = [self._now(), head, self._channel(session_id), self._publish]
            arguments += [idle if is_watched else "", lead]
            response = await self.client.evaluate(scripts.EXPIRE, session_keys(session_id), arguments)
            match response:
                case [b"removed", epoch, record]:
                    await self._removed(session_id, epoch.decode(), record, entries)
                case [b"kept", until]:
                    await self._index.postpone(session_id, at, until)
                case _ if float(at) < now - SPARE_TIME:
                    await self._index.remove(session_id, entries)


def _decode_receipt(stored: bytes) -> Receipt:
    return decode_receipt(stored.split(b":", 2)[2])
