"""Records the messages of the channels, each once and in the order of its session."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import struct
from collections import OrderedDict, deque
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec
import trio

from ..backoff import Backoff
from ..dialects import RedisChannel
from ..engines import Repeated
from ..errors import EngineUnavailable, InsufficientStorage, PayloadTooLarge, SessionEnded, SseserveError
from ..http.publishing import Publishing
from ..jsontext import decode
from ..metrics import Counters
from ..model import Session
from ..progress.tracker import IdempotencyKey, Tracker

__all__ = ["MARK", "ORIGIN", "ChannelReader"]

log = logging.getLogger(__name__)

# A member of all messages that a server publishes, of this deployment or of any other. Whoever reads them
# ignores it; a server ignores the message.
MARK = ("published_by", "sseserve")

# The system from whose channel comes what this task records; None: it comes from elsewhere.
ORIGIN: ContextVar[str | None] = ContextVar("ORIGIN", default=None)

MAX_WAITING = 10_000  # messages of all sessions that could not be recorded yet
MAX_WAITING_BYTES = 32 * 2**20
RETRY_FOR = 600.0  # seconds that recording one message is tried
BACKOFF = Backoff(initial=0.05, maximum=2.0)  # between two tries
MAX_OCCURRENCES = 20_000  # messages whose number of occurrences is remembered
CLOCK_SKEW = 30.0  # seconds between the clocks of two instances
_TAG = struct.Struct("!d8s")  # when a message was received (POSIX seconds), and by which instance


class _Message(msgspec.Struct, eq=False):
    """One message. ``from_key``: it is the content of a key, and may have been a message before."""

    system: str
    channel: RedisChannel
    payload: bytes
    from_key: bool
    # It was published between these two times (POSIX seconds).
    published_after: float
    received_at: float
    not_before: float
    done: trio.Event


class ChannelReader:
    """Records messages. Each session's are recorded by a task of its own, which exists while some wait.

    Args:
        publishing: records them.
        tracker: knows the sessions.
        counters: count what became of them.
        max_body: limit of a message, in bytes.
    """

    def __init__(
        self,
        publishing: Publishing,
        tracker: Tracker,
        counters: Counters,
        *,
        max_body: int,
    ) -> None:
        self._publishing = publishing
        self._tracker = tracker
        self._counters = counters
        self._max_body = max_body
        self._waiting: dict[str, deque[_Message]] = {}  # by session; the first is being recorded
        self._token = secrets.token_bytes(8)
        self._count = 0
        self._size = 0
        self._occurrences: OrderedDict[bytes, int] = OrderedDict()

    def receive(
        self,
        nursery: trio.Nursery,
        system: str,
        channel: RedisChannel,
        session_id: str,
        payload: bytes,
        *,
        from_key: bool = False,
        published_after: float = 0.0,
        not_before: float = 0.0,
    ) -> trio.Event | None:
        """Take in a message; returns an event that is set when it is recorded, or refused.

        Never waits, and returns None for a message that is refused at once.

        Args:
            nursery: runs the task that records it.
            system: whose message it is.
            channel: the system's channels.
            session_id: the session.
            payload: the message.
            from_key: it is the content of the system's key.
            published_after: it was published after this time (POSIX seconds).
            not_before: it is recorded at this time of Trio's clock at the earliest.
        """
        try:
            if len(payload) > self._max_body:
                raise PayloadTooLarge(f"it is larger than max_body = {self._max_body} bytes")
            if _is_marked(payload):
                return None
        except SseserveError as error:
            self._refuse(system, session_id, error)
            return None
        now = self._tracker.clock()
        message = _Message(system, channel, payload, from_key, published_after, now, not_before, trio.Event())
        queue = self._waiting.get(session_id)
        if self._count >= MAX_WAITING or self._size + len(payload) > MAX_WAITING_BYTES:
            # The newest message says most. That which is being recorded stays.
            if queue is None or len(queue) < 2:
                self._drop(system, session_id)
                return None
            oldest = queue[1]
            del queue[1]
            self._forget(oldest)
            self._drop(oldest.system, session_id)
        self._count += 1
        self._size += len(payload)
        if queue is None:
            self._waiting[session_id] = deque([message])
            nursery.start_soon(self._record_all, session_id)
        else:
            queue.append(message)
        return message.done

    def resume(self, nursery: trio.Nursery) -> None:
        """Record the messages that still wait since an earlier nursery was cancelled."""
        for session_id in self._waiting:
            nursery.start_soon(self._record_all, session_id)

    async def _record_all(self, session_id: str) -> None:
        queue = self._waiting[session_id]
        while queue:
            message = queue[0]
            try:
                await self._record(session_id, message)
            except SseserveError as error:
                # A key is read again and again; its message may have been refused before.
                if not (message.from_key and isinstance(error, SessionEnded)):
                    self._refuse(message.system, session_id, error)
            except Exception:
                # The boundary of a message: the others are not affected.
                self._counters.count_message(message.system, "refused")
                log.exception("recording a %s message of session %s failed", message.system, session_id)
            queue.popleft()
            self._forget(message)
        del self._waiting[session_id]

    def _forget(self, message: _Message) -> None:
        self._count -= 1
        self._size -= len(message.payload)
        message.done.set()

    async def _record(self, session_id: str, message: _Message) -> None:
        await trio.sleep_until(message.not_before)
        ORIGIN.set(message.system)
        body = decode(message.payload, message.channel.body)
        time: str | None = getattr(body, message.channel.time)
        if message.from_key and not await self._is_news(session_id, time):
            return
        deadline = trio.current_time() + RETRY_FOR
        failures = 0
        digest = hashlib.blake2b(
            b"\0".join((message.channel.name.encode(), session_id.encode(), message.payload)), digest_size=16
        ).digest()
        # A publisher that lost its connection may send a message again. What has no time is another message.
        is_unique = time is not None or message.from_key
        occurrence = 1 if is_unique else self._occurrence(digest)
        tag = _TAG.pack(message.received_at, self._token)
        while True:
            key = IdempotencyKey(f"redis {digest.hex()} {occurrence}", digest=tag)
            try:
                await self._publishing.publish(session_id, body, message.payload, key)
            except Repeated as repeated:
                receipt = repeated.receipt
                recorded_at, _ = _TAG.unpack(receipt.digest)
                if not is_unique and recorded_at < message.published_after - CLOCK_SKEW:
                    # That was an earlier message of the same text, which this instance has not seen.
                    occurrence = self._occurrence(digest)
                    continue
                result = "recorded" if receipt.digest == tag else "repeated"
            except (EngineUnavailable, InsufficientStorage) as error:
                delay = BACKOFF.delay(failures)
                if trio.current_time() + delay > deadline:
                    raise
                if not failures:
                    log.warning("a %s message of session %s waits: %s", message.system, session_id, error)
                failures += 1
                await trio.sleep(delay)
                continue
            else:
                result = "recorded"
            break
        self._counters.count_message(message.system, result)

    def _occurrence(self, digest: bytes) -> int:
        """Return how often a message has come, this time included."""
        number = self._occurrences.pop(digest, 0) + 1
        self._occurrences[digest] = number
        if len(self._occurrences) > MAX_OCCURRENCES:
            self._occurrences.popitem(last=False)
        return number

    async def _is_news(self, session_id: str, time: str | None) -> bool:
        """Return whether the content of a key is newer than what is known of its session."""
        session = await self._tracker.engine.load(session_id)
        return session is None or _posix(time) > _updated_at(session)

    def _refuse(self, system: str, session_id: str, error: SseserveError) -> None:
        self._counters.count_message(system, "refused")
        log.warning("a %s message of session %s is refused: %s", system, session_id[:128], error)

    def _drop(self, system: str, session_id: str) -> None:
        self._counters.count_message(system, "dropped")
        log.warning("a %s message of session %s is dropped: too many wait", system, session_id)


def _is_marked(payload: bytes) -> bool:
    name, value = MARK
    if name.encode() not in payload:
        return False
    try:
        members = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return False
    return isinstance(members, dict) and members.get(name) == value


def _posix(text: str | None) -> float:
    """Read an ISO 8601 time; without a zone it is UTC. What is none is before all times."""
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return -math.inf
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()


def _updated_at(session: Session) -> float:
    return session.touched_at if session.progress is None else session.progress.updated_at
