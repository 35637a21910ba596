"""Who may do what: a grant and a session in, yes or no out. Pure; no token is read here.

A grant says who makes a request. It comes from a token (``auth``), or from the program that runs the server
(``serve(authenticate=...)``). What its role may do is configured; ``config.ROLES`` are the defaults:
a ``patient`` has the sessions that it owns, a ``therapist`` those of the patients that are assigned to it as
well, both may watch those whose ``viewers`` name them; a ``service`` (a worker) creates, publishes to and
watches all; an ``admin`` may do everything. Instead of a role, or besides it, a grant has capabilities: what
it may do with the sessions whose ids match.

Who may not see a session learns nothing of it: without a right the response is 403 whether it exists or not.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

import msgspec

from ..config import ROLES, Role
from ..errors import Forbidden
from ..model import Session

__all__ = ["LEEWAY", "Action", "Check", "Grant", "Policy", "Ticket", "Visible"]


LEEWAY = 30.0  # seconds for which an expired token is accepted, as clocks differ


class Action(enum.StrEnum):
    """What a request wants to do."""

    CREATE = "create"
    LIST = "list"
    WATCH = "watch"
    PUBLISH = "publish"
    CONTROL = "control"
    DELETE = "delete"
    TICKET = "ticket"  # make a ticket, for sessions that it may watch
    REFRESH = "refresh"  # extend its own streams
    REVOKE = "revoke"  # revoke tokens
    DIAGNOSE = "diagnose"  # see what a proxy makes of its requests


# Everybody with a grant may do these: what comes of it depends on other rights.
_ALWAYS = frozenset({Action.LIST, Action.TICKET, Action.REFRESH, Action.DIAGNOSE})

# Returns whether a client may watch a session.
Visible = Callable[[Session], bool]

# Raises ``Forbidden`` if a client may not do something with a session; None: with one that does not exist.
Check = Callable[[Session | None], None]


class Ticket(msgspec.Struct, frozen=True):
    """What a ticket is for: watching these sessions, or the list of sessions."""

    sessions: frozenset[str] = frozenset()
    lists: bool = False


class Grant(msgspec.Struct, frozen=True):
    """Who makes a request, and what that allows.

    Args:
        subject: the user.
        role: the name of a role; None: it has none.
        patients: the owners of the sessions that are assigned to it.
        capabilities: what it may do, with sessions of which ids; ``*`` in an id stands for any characters.
        issuer: who has issued its token.
        token_id: the id of that (``jti``).
        issued_at, expires_at: when, in POSIX seconds; None: not known, or never.
        ticket: it may watch what this is for, and nothing else; None: it was no ticket.
        trust: stands for what its token was verified with, and changes with that; None: there was no token.
    """

    subject: str
    role: str | None = None
    patients: frozenset[str] = frozenset()
    capabilities: dict[Action, tuple[str, ...]] = {}
    issuer: str | None = None
    token_id: str | None = None
    issued_at: float | None = None
    expires_at: float | None = None
    ticket: Ticket | None = None
    trust: str | None = None

    @property
    def user(self) -> tuple[str | None, str]:
        """Whose it is, whatever the token: the issuer and the subject."""
        return self.issuer, self.subject


class Policy:
    """What each role may do.

    Args:
        roles: by their names.
    """

    def __init__(self, roles: Mapping[str, Role] = ROLES) -> None:
        self.set_roles(roles)

    def set_roles(self, roles: Mapping[str, Role]) -> None:
        """Replace what each role may do, from now on."""
        self._roles = roles
        self._every = {name: frozenset(map(Action, role.every)) for name, role in roles.items()}

    def allows_any(self, grant: Grant, action: Action, session_id: str | None) -> bool:
        """Return whether a grant allows an action whatever the session of that id is, be there one or not.

        ``session_id`` None: whichever it is.
        """
        ticket = grant.ticket
        if ticket is not None:
            if action is Action.LIST:
                return ticket.lists
            if action is not Action.WATCH or session_id not in ticket.sessions:
                return False
        elif action in _ALWAYS:
            return True
        if self._has_every(grant, action):
            return True
        return any(
            pattern == "*" or (session_id is not None and _matches(pattern, session_id))
            for pattern in grant.capabilities.get(action, ())
        )

    def allows(self, grant: Grant, action: Action, session_id: str | None, session: Session | None) -> bool:
        """Return whether a grant allows an action.

        Args:
            grant: who wants it.
            action: what it is.
            session_id: of which session; None: of none in particular.
            session: the session; None: there is none.
        """
        if self.allows_any(grant, action, session_id):
            return True
        role = self._roles.get(grant.role) if grant.role is not None else None
        if role is None or session is None:
            return False
        ticket = grant.ticket
        if ticket is not None and (action is not Action.WATCH or session.id not in ticket.sessions):
            return False
        right, owner = action.value, session.owner
        return (
            (right in role.own and owner is not None and owner == grant.subject)
            or (right in role.assigned and owner is not None and owner in grant.patients)
            or (right in role.viewer and grant.subject in session.viewers)
        )

    def depends_on_session(self, grant: Grant, action: Action) -> bool:
        """Return whether a grant's role allows an action with some sessions, depending on whose they are."""
        role = self._roles.get(grant.role) if grant.role is not None else None
        right = action.value
        return role is not None and (right in role.own or right in role.assigned or right in role.viewer)

    def check(self, grant: Grant | None, action: Action, session_id: str) -> Check | None:
        """Return what checks that a grant allows an action with the session of that id, as it is then.

        None: it does, whatever the session is. It may be another one than when the request was authorised:
        deleted, and created again by somebody else.
        """
        if grant is None or self.allows_any(grant, action, session_id):
            return None

        def check(session: Session | None) -> None:
            if not self.allows(grant, action, session_id, session):
                raise refusal(grant, action)

        return check

    def may_create_some(self, grant: Grant) -> bool:
        """Return whether a grant allows to create any session; which, ``creation_owner`` decides."""
        if grant.ticket is not None:
            return False
        return (
            self._has_every(grant, Action.CREATE)
            or self.depends_on_session(grant, Action.CREATE)
            or bool(grant.capabilities.get(Action.CREATE))
        )

    def creation_owner(
        self, grant: Grant | None, action: Action, session_id: str | None, owner: str | None = None
    ) -> str | None:
        """Return who owns a session that a grant's holder creates, or that is created by its publishing.

        That is the holder, unless its role has the right on every session. Whose role has it only on its own
        sessions, or on those of its patients, gets an id from the server: another one might be somebody
        else's, and it would learn that.

        Args:
            grant: who creates it; None: without authentication.
            action: what it does.
            session_id: the id; None: the server chooses it.
            owner: whose it is to be; None: it does not say.

        Raises:
            Forbidden: the grant does not allow it.
        """
        if grant is None or self.has_every(grant, action):
            return owner
        wanted = grant.subject if owner is None else owner
        if not self.allows_any(grant, action, session_id):
            new = None if session_id is not None else Session(id="", epoch="", owner=wanted)
            if not self.allows(grant, action, session_id, new):
                raise refusal(grant, action)
        elif wanted != grant.subject:
            raise Forbidden("this grant creates only sessions of its own: leave out their owner")
        return wanted

    def has_every(self, grant: Grant, action: Action) -> bool:
        """Return whether a grant's role allows an action with every session, and it is no ticket's."""
        return grant.ticket is None and self._has_every(grant, action)

    def _has_every(self, grant: Grant, action: Action) -> bool:
        return grant.role is not None and action in self._every.get(grant.role, ())

    def visible_to(self, grant: Grant | None) -> Visible | None:
        """Return whether the holder of a grant may watch a session; None if it may watch all of them."""
        if grant is None or self.allows_any(grant, Action.WATCH, None):
            return None
        if grant.ticket is not None and grant.ticket.lists:
            grant = msgspec.structs.replace(grant, ticket=None)
            return self.visible_to(grant)
        return lambda session: self.allows(grant, Action.WATCH, session.id, session)


_PHRASES = {
    Action.CREATE: "create this session",
    Action.LIST: "list the sessions",
    Action.WATCH: "watch this session",
    Action.PUBLISH: "publish to this session",
    Action.CONTROL: "control this session",
    Action.DELETE: "delete this session",
    Action.TICKET: "make tickets",
    Action.REFRESH: "extend streams",
    Action.REVOKE: "revoke tokens",
    Action.DIAGNOSE: "use the diagnostics",
}


def refusal(grant: Grant, action: Action, *, of_all: bool = False) -> Forbidden:
    """Return the error of who has no right: it is the same whether there is a session or not.

    Args:
        grant: whose it is.
        action: what it does not allow.
        of_all: with all sessions, rather than with one.
    """
    if grant.ticket is not None:
        who = "this ticket"
    else:
        who = "a token without a role" if grant.role is None else f"a token with the role {grant.role!r}"
    what = _PHRASES[action]
    return Forbidden(f"{who} may not {what.replace('this session', 'all sessions') if of_all else what}")


def _matches(pattern: str, session_id: str) -> bool:
    """Return whether a whole id matches, in time proportional to both lengths."""
    first, *rest = pattern.split("*")
    if not rest:
        return session_id == pattern
    if not session_id.startswith(first):
        return False
    at = len(first)
    for part in rest[:-1]:
        if (found := session_id.find(part, at)) < 0:
            return False
        at = found + len(part)
    return len(session_id) - len(rest[-1]) >= at and session_id.endswith(rest[-1])
