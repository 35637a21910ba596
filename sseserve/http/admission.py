"""Whether a request may be served: its rights, the sessions it names, its cursor, the user's free slots.

The same checks for every HTTP version, made before anything is sent.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import msgspec
import trio

from ..dialects import Dialect, Encoding
from ..errors import (
    BadRequest,
    Invalid,
    SessionNotFound,
    SSEDisabled,
    SseserveError,
    Unavailable,
    UpgradeRequired,
)
from ..live.bundle import MAX_SESSIONS, parse_bundle_cursor
from ..live.resume import is_complete
from ..logs import note_user
from ..model import EndReason, Session
from ..progress.steps import check_session_id
from ..progress.tracker import Tracker
from .auth import Action, Grant, refusal
from .diagnostics import Probe
from .limits import RateLimit, limited_address
from .messages import Request, Response, error_response, log_failure
from .open_streams import OpenStream, OpenStreams, user_name
from .origins import Origins
from .routing import Kind, Match
from .tickets import Tickets

__all__ = ["Admission", "Authenticate", "ReadPages", "WatchRequest", "validate_handshake"]

# Returns the grant of a request. Raises ``Unauthorized`` if it has none.
Authenticate = Callable[[Request], Awaitable[Grant]]

# What a client watches that cannot send headers.
_TAKES_TICKET = (Kind.STREAM, Kind.SOCKET)

# What streams are for that are of no session.
_OF_NO_SESSION = (Action.LIST, Action.DIAGNOSE)

_UPGRADE = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))


class WatchRequest(msgspec.Struct, frozen=True):
    """What a client asks to watch.

    ``cursor`` is where it wants to resume. ``replay``: without a cursor, the log is sent from its beginning.
    ``bundled``: several sessions on one stream. ``is_complete``: the client has seen everything that there
    will ever be. ``lists``: it watches the list of sessions. ``probe``: it is a diagnostic stream.
    ``unavailable``: why it cannot be said whether it may watch. ``grant`` is who asks, from ``address``.
    """

    session_ids: list[str]
    dialect: Dialect
    cursor: str | None
    replay: bool
    bundled: bool
    is_complete: bool = False
    lists: bool = False
    probe: Probe | None = None
    unavailable: str | None = None
    grant: Grant | None = None
    address: str = ""

    @classmethod
    def of(cls, request: Request, match: Match, grant: Grant | None) -> WatchRequest:
        """Read the sessions and the cursor from a request.

        Raises:
            Invalid: it names no session, or too many.
        """
        dialect = match.route.dialect
        if match.route.action is Action.DIAGNOSE:
            probe = Probe.of(request, match)
            return cls([], dialect, None, False, False, probe=probe, grant=grant, address=request.peer)
        if match.route.action is Action.LIST:
            return cls([], dialect, None, False, False, lists=True, grant=grant, address=request.peer)
        return cls(
            _session_ids(request, match),
            dialect,
            request.cursor,
            dialect.replays_log or request.query.get("replay") == "1",
            "id" not in match.params,
            grant=grant,
            address=request.peer,
        )

    @property
    def pages_end(self) -> EndReason:
        """Why a stream has ended that is not one of sessions, if nothing else ends it."""
        if self.probe is not None:
            return EndReason.ENDED
        return EndReason.DRAINED if self.unavailable is None else EndReason.DEGRADED

    @property
    def reads_pages(self) -> bool:
        """Whether the stream is not one of sessions."""
        return self.lists or self.unavailable is not None or self.probe is not None


# Returns what a stream sends that is not one of sessions, encoded.
ReadPages = Callable[[WatchRequest, Encoding, OpenStream], AsyncGenerator[bytes]]


def _session_ids(request: Request, match: Match) -> list[str]:
    """Return the sessions that a request is about, each once."""
    if "id" in match.params:
        return [match.params["id"]]
    session_ids = list(dict.fromkeys(request.values("session")))
    if not 1 <= len(session_ids) <= MAX_SESSIONS:
        raise Invalid(f"name 1 to {MAX_SESSIONS} sessions: ?session=a&session=b")
    return session_ids


class RateSettings(Protocol):
    """The settings of rates; see ``config.Settings``."""

    @property
    def connect_rate(self) -> float | None: ...
    @property
    def publish_rate(self) -> float | None: ...
    @property
    def ticket_rate(self) -> float | None: ...
    @property
    def limit_loopback(self) -> bool: ...


class Admission:
    """Decides which requests are served.

    Args:
        tracker: knows the sessions.
        open_streams: counts them, and ends them with their tokens.
        origins: knows the server's hosts, and the pages that may do everything.
        tickets: takes them back.
        authenticate: returns the grant of a request; None: everybody may do everything.
        special: does it instead for the route of that name, whose clients have tokens of others.
        enable_sse: False: the dialects that can be disabled have no streams.
        limits: how often clients may do what.
    """

    def __init__(
        self,
        tracker: Tracker,
        open_streams: OpenStreams,
        origins: Origins,
        tickets: Tickets,
        *,
        authenticate: Authenticate | None = None,
        special: Mapping[str, Authenticate] = MappingProxyType({}),
        enable_sse: bool = True,
        limits: RateSettings,
    ) -> None:
        self._tracker = tracker
        self._open_streams = open_streams
        self._policy = open_streams.policy
        self._origins = origins
        self._tickets = tickets
        self.authenticate = authenticate
        self._special = special
        self._enable_sse = enable_sse
        self._connect_rate = RateLimit("connect_rate", None)
        self._publish_rate = RateLimit("publish_rate", None)
        self._ticket_rate = RateLimit("ticket_rate", None)
        self._rates = {
            Action.PUBLISH: self._publish_rate,
            Action.TICKET: self._ticket_rate,
            Action.REFRESH: self._ticket_rate,
        }
        self.set_limits(limits)

    def set_limits(self, limits: RateSettings) -> None:
        """Set how often clients may do what, from now on."""
        self._limit_loopback = limits.limit_loopback
        self._connect_rate.set_rate(limits.connect_rate)
        self._publish_rate.set_rate(limits.publish_rate)
        self._ticket_rate.set_rate(limits.ticket_rate)

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything."""
        return self.authenticate is None

    async def authorize(self, request: Request, match: Match) -> Grant | None:
        """Check that a request may do what its route does; returns its grant, None without authentication.

        Raises:
            HostNotAllowed: it is for another host.
            Unauthorized: it has no grant.
            Forbidden: its grant does not allow it, or a page of another origin has sent it; it does not learn
                whether the session exists.
            TooManyRequests: its client publishes, or makes tickets, too often.
        """
        grant = await self._authenticate(request, match)
        action = match.route.action
        # Lines wait instead, see ``pace``.
        if action in self._rates and not match.route.takes_lines(request):
            self._check_rate(self._rates[action], request.peer, grant)
        if grant is not None:
            await self._check_rights(grant, request, match)
        return grant

    async def _authenticate(self, request: Request, match: Match) -> Grant | None:
        self._origins.check(request, match, is_open=self.is_open)
        if self.authenticate is None or match.route.action is None:
            return None
        if match.route.kind in _TAKES_TICKET and (ticket := request.query.get("ticket")) is not None:
            return await self._tickets.take(ticket)
        try:
            grant = await self._special.get(match.route.name, self.authenticate)(request)
            if not isinstance(grant, Grant):  # None would mean that there is no authentication
                raise TypeError(f"authenticate must return a Grant, not {type(grant).__name__}")
        except SseserveError:
            raise
        except Exception as error:
            # An error of the embedding program, whatever its type: not one of the connection.
            log_failure(request, "authenticate failed", error)
            raise SseserveError("internal server error; see the server log") from error
        self._open_streams.check(grant)
        return grant

    def check(self, grant: Grant) -> None:
        """Check that a grant is valid now.

        Raises:
            InvalidToken: its token has expired, or was revoked.
        """
        self._open_streams.check(grant)

    async def _check_rights(self, grant: Grant, request: Request, match: Match) -> None:
        action = match.route.action
        assert action is not None
        if self._policy.has_every(grant, action):
            return
        of_all = False
        if action is Action.CREATE:
            allowed = self._policy.may_create_some(grant)  # its handler knows which
        elif "id" not in match.params and (match.route.kind is not Kind.STREAM or action in _OF_NO_SESSION):
            allowed, of_all = self._policy.allows_any(grant, action, None), True
        else:
            allowed = all([await self.allows(grant, action, name) for name in _session_ids(request, match)])
        if not allowed:
            raise refusal(grant, action, of_all=of_all)

    async def allows(self, grant: Grant, action: Action, session_id: str) -> bool:
        """Return whether a grant allows an action with the session of that id.

        Who may not know whether there is one cannot find out from how long that takes either: the engine is
        asked as often.
        """
        if self._policy.allows_any(grant, action, session_id):
            return True
        if not self._policy.depends_on_session(grant, action):
            return False
        session = await self._tracker.engine.load(session_id)
        return self._policy.allows(grant, action, session_id, session)

    async def check_watch_request(self, request: Request, match: Match) -> WatchRequest:
        """Check a request to watch, and return what it is for.

        If that is complete, a stream is a 204, which stops an EventSource from reconnecting (HTML Living
        Standard, section 9.2.3). So would a 503, so a stream that the engine cannot check is ``unavailable``.

        A stream that is not complete then needs a slot.

        Raises:
            SseserveError: why there is nothing to watch.
        """
        dialect = match.route.dialect
        if dialect.can_be_disabled and not self._enable_sse:
            raise SSEDisabled("streaming is disabled (ENABLE_SSE); poll the status instead")
        grant = await self._authenticate(request, match)
        self._check_rate(self._connect_rate, request.peer, grant)
        if grant is not None:
            note_user(grant.subject)
        watch = WatchRequest.of(request, match, grant)
        try:
            if grant is not None:
                await self._check_rights(grant, request, match)
            if not watch.reads_pages and _has_seen_all(watch, await self._find_sessions(watch)):
                return msgspec.structs.replace(watch, is_complete=True)
        except Unavailable as error:
            if match.route.kind is not Kind.STREAM or request.method == "HEAD":
                raise
            watch = msgspec.structs.replace(watch, unavailable=str(error))
        return watch

    async def open_stream(self, watch: WatchRequest) -> OpenStream:
        """Open a stream, for the length of the block that begins at once with what is returned.

        Raises:
            TooManyStreams: the user, its address, a session or this process has too many.
            InvalidToken: the token is not valid any more.
        """
        return await self._open_streams.open(
            watch.grant, self.limited(watch.address), tuple(watch.session_ids), watch.address
        )

    async def open_poll(self, request: Request, match: Match) -> OpenStream:
        """Do the same for a request that may be responded to much later.

        Raises:
            TooManyRequests: its client sends them too often.
        """
        self._check_rate(self._connect_rate, request.peer, request.grant)
        session_ids = tuple(filter(None, [match.params.get("id")]))
        return await self._open_streams.open(
            request.grant, self.limited(request.peer), session_ids, request.peer
        )

    def limited(self, address: str) -> str | None:
        """Return by which name an address is counted; None if it is not limited."""
        return limited_address(address, limit_loopback=self._limit_loopback)

    def _check_rate(self, rate: RateLimit, address: str, grant: Grant | None) -> None:
        if (names := self._names(address, grant)) is not None:
            rate.check(names, trio.current_time())

    def _names(self, address: str, grant: Grant | None) -> tuple[str, ...] | None:
        """Return by which names a client is counted: its address and the user; None: it is not limited."""
        if (limited := self.limited(address)) is None:
            return None
        return (limited,) if grant is None else (limited, f"user {user_name(grant)}")

    async def pace(self, request: Request) -> None:
        """Count a line of a request's body, and wait until it may be recorded.

        Raises:
            Unauthorized: the token is not valid any more.
        """
        request.check_grant()
        names = self._names(request.peer, request.grant)
        if names is not None and (seconds := self._publish_rate.delay(names, trio.current_time())):
            await trio.sleep(seconds)

    async def _find_sessions(self, watch: WatchRequest) -> list[Session]:
        """Load what is to be watched. A client that resumes learns in-band which of several are gone."""
        sessions: list[Session] = []
        missing: SessionNotFound | None = None
        for session_id in watch.session_ids:
            try:
                sessions.append(await self._tracker.get(session_id))
            except SessionNotFound as error:
                if watch.dialect.waits_for_session:
                    check_session_id(session_id)  # it would wait for what cannot exist
                missing = missing or error
        resumes = watch.cursor is not None and bool(sessions)
        if missing is not None and not watch.dialect.waits_for_session and not resumes:
            raise missing
        return sessions


def _has_seen_all(watch: WatchRequest, sessions: list[Session]) -> bool:
    """Whether a client has seen everything that there will ever be; ``sessions`` are those that exist."""
    if not watch.bundled:
        return bool(sessions) and is_complete(sessions[0], watch.cursor)
    cursors = parse_bundle_cursor(watch.cursor)
    if len(sessions) < len(watch.session_ids) and not cursors.keys() <= {s.epoch for s in sessions}:
        return False  # it has yet to learn of those that are gone
    return all(is_complete(session, cursors.get(session.epoch)) for session in sessions)


def validate_handshake(request: Request) -> Response | None:
    """Check a WebSocket's opening handshake (RFC 6455, section 4.2.1); returns the response to a bad one."""
    headers = request.headers
    tokens = [token.strip() for token in headers.get("connection", "").lower().split(",")]
    error: SseserveError
    if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in tokens:
        error = UpgradeRequired("this path is a WebSocket: it needs an Upgrade")
    elif headers.get("sec-websocket-version") != "13":
        error = UpgradeRequired("this path is a WebSocket of version 13")
    else:
        try:
            if len(base64.b64decode(headers.get("sec-websocket-key", ""), validate=True)) == 16:
                return None
        except (binascii.Error, ValueError):
            pass
        error = BadRequest("Sec-WebSocket-Key must be 16 bytes in base64")
    response = error_response(error, request)
    if error.status == UpgradeRequired.status:
        response = msgspec.structs.replace(response, headers=(*response.headers, *_UPGRADE))
    return response
