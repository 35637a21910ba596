"""The open streams: how many there are of each kind, and until when each is allowed.

An open stream is an event stream, a WebSocket or a long-poll. Guarantees:

- No limit is exceeded, and no stream is ended to make room for another one.
- A stream ends when its token does: ``EXPIRING`` seconds before its client is told, or at once if less is
  left. A fresh token of the same user extends it, if that may watch the same.
- When its token is revoked a stream ends at once. So does one that was extended: every token counts.
- When the server has reloaded its settings, the streams end whose tokens it would refuse now, as it has other
  keys or issuers, and those whose roles may not watch any more what they watch.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import msgspec
import trio

from ..concurrency import VISIT, select, visit
from ..dialects import Encoding
from ..engines.coordination import Coordination
from ..errors import InvalidToken, TooManyStreams, Unavailable
from ..live.subscriber import Subscriber
from ..model import EndReason, Session
from .auth import LEEWAY, Action, Grant, Policy, Visible
from .revocations import Revocation, Revocations

__all__ = ["EXPIRING", "Client", "OpenStream", "OpenStreams", "Poll", "StreamLimits"]

EXPIRING = 30.0  # seconds before its end a client is told
LONGEST_SLEEP = 60.0  # seconds: the system's clock may be set
RETRY = 1.0  # seconds, when the engine could not say what a token may watch
UNTRUSTED = "the token is not signed with a key that is trusted here"
SPARE = 1024  # entries of what is due that may be outdated, besides as many as are not
_ADDRESS = "address "


class Client(Protocol):
    """What an open stream is ended by."""

    def expiring(self, seconds: float) -> None:
        """Tell the client that its stream ends in that many seconds. Does not wait."""

    def expire(self, reason: str, why: EndReason) -> None:
        """End the stream: its token is not valid any more, for that reason. Does not wait."""


class Poll:
    """A long-poll, as an open stream ends it.

    Args:
        on_end: is called when the token is not valid any more; does not wait.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.reason = ""
        self._on_end = on_end

    def expiring(self, seconds: float) -> None:
        """Do nothing: its client hears of it when it asks again."""

    def expire(self, reason: str, why: EndReason) -> None:  # noqa: ARG002 - it is one request
        self.reason = reason
        self._on_end()

    def check(self) -> None:
        """Raise InvalidToken if the token is not valid any more."""
        if self.reason:
            raise InvalidToken(self.reason)


class Credential:
    """The tokens of some open streams, the newest and those before, and until when the streams may go on.

    ``due`` is when something is to be done for them; None: it is not waited for.
    """

    __slots__ = ("due", "earlier", "ends_at", "grant", "is_warned", "streams")

    def __init__(self, grant: Grant, ends_at: float, earlier: tuple[Grant, ...] = ()) -> None:
        self.grant = grant
        self.ends_at = ends_at
        self.earlier = earlier
        self.due: float | None = None
        self.is_warned = False
        self.streams: set[OpenStream] = set()

    @property
    def grants(self) -> tuple[Grant, ...]:
        """All tokens."""
        return (self.grant, *self.earlier)

    def extended(self, grant: Grant, ends_at: float, now: float) -> Credential:
        """Return the credential with a fresh token before these, without those that have expired.

        Of those only what may be revoked is kept, and once.
        """
        earlier = {
            (g.token_id, g.issued_at): msgspec.structs.replace(g, patients=frozenset(), capabilities={})
            for g in self.grants
            if g.expires_at is None or g.expires_at + LEEWAY > now
        }
        return Credential(grant, ends_at, tuple(earlier.values()))


class OpenStream:
    """One open stream, for the length of a ``with`` block."""

    __slots__ = ("_owner", "_sessions", "address", "client", "credential", "held", "limits", "peer")

    def __init__(
        self, owner: OpenStreams, address: str | None, session_ids: Sequence[str], peer: str
    ) -> None:
        self._owner = owner
        self.peer = sys.intern(peer)  # its client's address
        # There are many streams, so the same strings are kept once, and what most of them watch is no tuple.
        self.address = None if address is None else sys.intern(address)
        interned = tuple(map(sys.intern, session_ids))
        self._sessions = interned[0] if len(interned) == 1 else interned
        self.limits = owner.limits  # its slots are those that were limited when it was opened
        self.held = 0  # how many of its slots it has
        self.credential: Credential | None = None
        self.client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._owner.on_end(self, error)
        finally:
            self._owner.close(self)

    @property
    def session_ids(self) -> tuple[str, ...]:
        """What it watches."""
        return (self._sessions,) if isinstance(self._sessions, str) else self._sessions

    @property
    def visible(self) -> Visible | None:
        """Returns whether it may watch a session, by the token that it has then; None: it may watch all."""
        return None if self.credential is None else self._is_visible

    def visible_now(self) -> Visible | None:
        """Return whether it may watch a session, by the token that it has now; None: it may watch all."""
        return None if self.credential is None else self._owner.policy.visible_to(self.credential.grant)

    def _is_visible(self, session: Session) -> bool:
        visible = self.visible_now()
        return visible is None or visible(session)

    def attach(self, client: Client) -> None:
        """Have ``client`` told when the token is about to expire, and ended when it has, or is revoked."""
        self.client = client
        self._owner.attached(self)


class StreamLimits(Protocol):
    """The settings that open streams need; see ``config.Settings``."""

    @property
    def max_streams_per_user(self) -> int | None: ...
    @property
    def max_streams_per_session(self) -> int | None: ...
    @property
    def max_streams_per_address(self) -> int | None: ...


class OpenStreams:
    """All open streams of this process.

    Args:
        coordination: counts those of a user and of a session on all instances.
        policy: says who may watch what.
        revocations: those that hold.
        limits: how many there may be of each kind.
        max_streams: and in this process.
        clock: returns POSIX seconds.
        find: returns a session; None: there is none.
        trusts: returns whether the token of a grant would be accepted now; None: there are no tokens.
    """

    def __init__(
        self,
        coordination: Coordination,
        policy: Policy,
        revocations: Revocations,
        limits: StreamLimits,
        *,
        max_streams: float,
        clock: Callable[[], float],
        find: Callable[[str], Awaitable[Session | None]],
        trusts: Callable[[Grant], bool] | None = None,
    ) -> None:
        self._coordination = coordination
        self.policy = policy
        self._revocations = revocations
        self.set_limits(limits, max_streams=max_streams)
        self.trusts = trusts
        self._clock = clock
        self._find = find
        self.total = 0
        self.opened: dict[Encoding, int] = {}  # streams, since the start; without the long-polls
        self._addresses: dict[str, int] = {}
        self._credentials: dict[tuple[str | None, str], set[Credential]] = {}  # by user
        self._by_grant: dict[int, Credential] = {}  # those that have not been extended, by the grant's id()
        self._due: list[tuple[float, int, Credential]] = []  # also of those whose streams have been closed
        self._waiting = 0  # credentials that something is due for
        self._numbers = itertools.count()
        self._changed = trio.Event()
        self._revoked: deque[Revocation] = deque()  # those whose streams are to be ended by ``run``
        self._all_ended = trio.Event()
        revocations.on_revoked = self._revoke
        # Is called with a stream that has ended, and with the error that has ended its task, if one has.
        self.on_end: Callable[[OpenStream, BaseException | None], None] = lambda _stream, _error: None

    def set_limits(self, limits: StreamLimits, *, max_streams: float) -> None:
        """Set how many there may be, from now on; those that are open go on."""
        self.limits = limits
        self._max_streams = max_streams

    # Opening and closing

    async def open(
        self, grant: Grant | None, address: str | None, session_ids: Sequence[str], peer: str = ""
    ) -> OpenStream:
        """Open a stream, for the length of the block that begins at once with what is returned.

        Args:
            grant: who opens it; None: without authentication.
            address: whose streams are counted together; None: they are not limited.
            session_ids: what it watches.
            peer: the client's address, for the log.

        Raises:
            TooManyStreams: a limit is reached.
            InvalidToken: the token is not valid any more.
        """
        if self.total >= self._max_streams:
            raise TooManyStreams(
                f"max_streams = {self._max_streams} streams are open already", limit="max_streams"
            )
        self.total += 1
        stream = OpenStream(self, address, session_ids, peer)
        try:
            if grant is not None:
                self._grant(stream, grant)
            for name, limit, setting in self._slots(stream):
                await self._take(name, limit, setting)
                stream.held += 1
            if grant is not None:
                self.check(grant)
        except BaseException:
            self.close(stream)
            raise
        return stream

    def _slots(self, stream: OpenStream) -> Iterator[tuple[str, int, str]]:
        """Yield the slots that a stream needs, always in this order: names, limits, and their settings."""
        limits, credential = stream.limits, stream.credential
        address = stream.address
        if address is not None and (limit := limits.max_streams_per_address) is not None:
            yield _ADDRESS + address, limit, "max_streams_per_address"
        if (limit := limits.max_streams_per_user) is not None:
            if credential is not None:
                yield f"user {user_name(credential.grant)}", limit, "max_streams_per_user"
            elif address is not None:
                yield f"user {address}", limit, "max_streams_per_user"
        if (limit := limits.max_streams_per_session) is not None:
            for session_id in stream.session_ids:
                yield f"session {session_id}", limit, "max_streams_per_session"

    async def _take(self, name: str, limit: int, setting: str) -> None:
        if name.startswith(_ADDRESS):
            count = self._addresses.get(name, 0)
            if has_slot := count < limit:
                self._addresses[name] = count + 1
        else:
            has_slot = await self._coordination.take_slot(name, limit)
        if not has_slot:
            kind, _, whose = name.partition(" ")
            raise TooManyStreams(
                f"{setting} = {limit} streams of the {kind} {whose.strip()!r} are open already", limit=setting
            )

    def close(self, stream: OpenStream) -> None:
        """Count a stream no more."""
        self.total -= 1
        for name, _, _ in itertools.islice(self._slots(stream), stream.held):
            if not name.startswith(_ADDRESS):
                self._coordination.release_slot(name)
            elif self._addresses[name] > 1:
                self._addresses[name] -= 1
            else:
                del self._addresses[name]
        stream.client = None
        if stream.credential is not None:
            self._leave(stream)

    # Credentials

    def check(self, grant: Grant) -> None:
        """Check that a grant is valid now.

        Raises:
            InvalidToken: its token has expired, or was revoked.
        """
        if grant.expires_at is not None and self._clock() >= grant.expires_at + LEEWAY:
            raise InvalidToken("the token has expired")
        if self._revocations.is_revoked(grant):
            raise InvalidToken("the token was revoked")
        if self.trusts is not None and not self.trusts(grant):
            raise InvalidToken(UNTRUSTED)

    def _grant(self, stream: OpenStream, grant: Grant) -> None:
        """Give a stream the credential of the token that it is opened with."""
        self.check(grant)
        credential = self._by_grant.get(id(grant))
        if credential is None or credential.is_warned:
            ends_at = _end_of(grant)
            if ends_at <= self._clock():
                ends_at += LEEWAY
            credential = self._by_grant[id(grant)] = Credential(grant, ends_at)
        self._enter(stream, credential)

    def _enter(self, stream: OpenStream, credential: Credential) -> None:
        if not credential.streams:
            self._credentials.setdefault(credential.grant.user, set()).add(credential)
            if credential.ends_at < math.inf:
                self._schedule(credential, credential.ends_at - EXPIRING)
        credential.streams.add(stream)
        stream.credential = credential

    def _leave(self, stream: OpenStream) -> None:
        credential = stream.credential
        assert credential is not None
        credential.streams.discard(stream)
        if credential.streams:
            return
        self._unschedule(credential)
        known = self._credentials[credential.grant.user]
        known.discard(credential)
        if not known:
            del self._credentials[credential.grant.user]
        if self._by_grant.get(id(credential.grant)) is credential:
            del self._by_grant[id(credential.grant)]

    def _schedule(self, credential: Credential, at: float) -> None:
        self._unschedule(credential)
        credential.due = at
        self._waiting += 1
        if len(self._due) > 2 * self._waiting + SPARE:
            self._due = [entry for entry in self._due if entry[0] == entry[2].due]
            heapq.heapify(self._due)
        heapq.heappush(self._due, (at, next(self._numbers), credential))
        if self._due[0][2] is credential:
            self._changed.set()

    def _unschedule(self, credential: Credential) -> None:
        if credential.due is not None:
            credential.due = None
            self._waiting -= 1

    def attached(self, stream: OpenStream) -> None:
        """Tell a client what it has missed while its stream was opened."""
        assert stream.client is not None
        if isinstance(stream.client, Subscriber):
            encoding = stream.client.encoding
            self.opened[encoding] = self.opened.get(encoding, 0) + 1
        if (credential := stream.credential) is None:
            return
        if any(map(self._revocations.is_revoked, credential.grants)):
            stream.client.expire("the token was revoked", EndReason.REVOKED)
        elif not self._is_trusted(credential):
            stream.client.expire(UNTRUSTED, EndReason.REVOKED)
        elif self._clock() >= credential.ends_at:
            stream.client.expire("the token has expired", EndReason.EXPIRED)
        elif credential.is_warned:
            stream.client.expiring(max(0.0, credential.ends_at - self._clock()))

    # Expiry

    async def run(self) -> None:
        """Tell the clients whose tokens are about to expire, and end their streams, for ever."""
        while True:
            self._changed = trio.Event()
            await self._end_waiting()
            now = self._clock()
            await self._revocations.expire(now)
            number = 0
            while self._due and self._due[0][0] <= now:
                due, _, credential = heapq.heappop(self._due)
                if due == credential.due:
                    self._unschedule(credential)
                    await self._visit(credential, now)
                number += 1
                if number % VISIT == 0:
                    await trio.lowlevel.checkpoint()
            seconds = min(self._due[0][0] - now, LONGEST_SLEEP) if self._due else LONGEST_SLEEP
            with trio.move_on_after(seconds):
                await self._changed.wait()

    async def _visit(self, credential: Credential, now: float) -> None:
        """Do what is due for the streams of a credential."""
        ends = now >= credential.ends_at
        seconds = max(0.0, credential.ends_at - now)
        if not ends:
            self._schedule(credential, credential.ends_at)
        credential.is_warned = True

        # The others are told when they are attached.
        def tell(stream: OpenStream) -> None:
            # It may have been closed, or extended, since.
            if stream in credential.streams and stream.client is not None:
                if ends:
                    stream.client.expire("the token has expired", EndReason.EXPIRED)
                else:
                    stream.client.expiring(seconds)

        await visit([stream for stream in credential.streams if stream.client is not None], tell)

    async def extend(self, grant: Grant) -> None:
        """Let the open streams of a user go on by a fresh token, those whose sessions it may watch.

        Streams that may go on for longer already keep what they have.

        Raises:
            Unauthorized: the token is not valid any more.
            Unavailable: what it may watch cannot be checked now. Some streams may be extended.
        """
        self.check(grant)
        ends_at = _end_of(grant)
        extended: dict[Credential, Credential] = {}
        known = self._credentials.get(grant.user, ())
        streams = [stream for credential in known for stream in credential.streams]
        for number, stream in enumerate(streams, 1):
            if number % VISIT == 0:
                await trio.lowlevel.checkpoint()
            if not await self._may_watch(grant, stream.session_ids):
                continue
            # Meanwhile it may have been closed, or extended, or a token revoked.
            credential = stream.credential
            assert credential is not None
            if stream not in credential.streams or credential.ends_at >= ends_at:
                continue
            if (fresh := extended.get(credential)) is None:
                fresh = extended[credential] = credential.extended(grant, ends_at, self._clock())
            if not any(map(self._revocations.is_revoked, fresh.grants)):
                self._leave(stream)
                self._enter(stream, fresh)

    async def _may_watch(self, grant: Grant, session_ids: Sequence[str]) -> bool:
        for session_id in session_ids:
            if not self.policy.allows_any(grant, Action.WATCH, session_id):
                session = await self._find(session_id)
                if not self.policy.allows(grant, Action.WATCH, session_id, session):
                    return False
        return True

    async def judge(self) -> None:
        """End the open streams that keys and roles do not allow any more, which have changed."""
        for number, stream in enumerate([s for known in self._all_credentials() for s in known.streams], 1):
            if number % VISIT == 0:
                await trio.lowlevel.checkpoint()
            reason = await self._find_objection(stream)
            if reason is not None and stream.client is not None:
                stream.client.expire(reason, EndReason.REVOKED)

    async def _find_objection(self, stream: OpenStream) -> str | None:
        """Return why a stream must end; None: it may go on."""
        while (credential := stream.credential) is not None and stream in credential.streams:
            if not self._is_trusted(credential):
                return UNTRUSTED
            try:
                if await self._may_watch(credential.grant, stream.session_ids):
                    return None
            except Unavailable:
                # Until the engine can say it, nothing is delivered either.
                await trio.sleep(RETRY)
            else:
                return "the token may not watch this any more"
        return None

    def _is_trusted(self, credential: Credential) -> bool:
        return self.trusts is None or all(map(self.trusts, credential.grants))

    def _revoke(self, revocation: Revocation) -> None:
        """End the streams of revoked tokens: at once, or many of them by ``run``."""
        if self.total > VISIT:
            self._revoked.append(revocation)
            self._changed.set()
            return
        for credential in self._all_credentials():
            if _is_revoked_by(revocation, credential):
                for stream in list(credential.streams):
                    _end_revoked(stream)

    def _all_credentials(self) -> list[Credential]:
        return [credential for credentials in self._credentials.values() for credential in credentials]

    async def _end_waiting(self) -> None:
        """End the streams of the tokens that were revoked while there were many."""
        while self._revoked:
            revocation = self._revoked[0]
            revoked = await select(self._all_credentials(), partial(_is_revoked_by, revocation))
            await visit([stream for known in revoked for stream in known.streams], _end_revoked)
            self._revoked.popleft()
        self._all_ended.set()
        self._all_ended = trio.Event()

    async def wait_revoked(self) -> None:
        """Wait until the streams of all revoked tokens have ended."""
        while self._revoked:
            await self._all_ended.wait()


def _is_revoked_by(revocation: Revocation, credential: Credential) -> bool:
    return any(map(revocation.applies, credential.grants))


def _end_revoked(stream: OpenStream) -> None:
    if stream.client is not None:
        stream.client.expire("the token was revoked", EndReason.REVOKED)


def _end_of(grant: Grant) -> float:
    return math.inf if grant.expires_at is None else grant.expires_at


def user_name(grant: Grant) -> str:
    """Return whose requests are counted together: those of a subject, whatever its tokens."""
    return f"{(grant.issuer or '').replace(' ', '%20')} {grant.subject}"
