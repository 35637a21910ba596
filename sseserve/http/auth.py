"""Who may do what: a grant and a session in, yes or no out. Pure; no token is read here.

A program that runs the server turns a request into a grant (``serve(authenticate=...)``); without that
everybody may do everything. Roles: a ``patient`` has the sessions that it owns, a ``therapist`` those of
the patients that are assigned to it as well, both those whose ``viewers`` name them; a ``service`` (a worker)
creates, publishes to and watches all; an ``admin`` may do everything.

Who may not see a session learns nothing of it: without a right the response is 403 whether it exists or not.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal

import msgspec

from ..model import Session

__all__ = ["Action", "Grant", "is_allowed", "visible_to"]


class Action(enum.StrEnum):
    """What a request wants to do."""

    CREATE = "create"
    LIST = "list"
    WATCH = "watch"
    PUBLISH = "publish"
    CONTROL = "control"
    DELETE = "delete"


class Grant(msgspec.Struct, frozen=True):
    """What a token says of its holder. ``patients`` are the subjects assigned to a therapist."""

    subject: str
    role: Literal["patient", "therapist", "service", "admin"]
    patients: frozenset[str] = frozenset()


def is_allowed(grant: Grant, action: Action, session: Session | None) -> bool:
    """Return whether the grant allows an action; ``session`` None: none in particular, or one that is not."""
    if grant.role == "admin":
        return True
    if grant.role == "service":
        return action is not Action.DELETE
    if action is Action.LIST:
        return True  # the list holds only those that it may watch
    if session is None or action not in (Action.WATCH, Action.CONTROL):
        return False
    owner = session.owner
    if owner is not None and (owner == grant.subject or owner in grant.patients):
        return True
    return action is Action.WATCH and grant.subject in session.viewers


def visible_to(grant: Grant | None) -> Callable[[Session], bool] | None:
    """Return whether the holder of a grant may watch a session; None if it may watch all of them."""
    if grant is None or grant.role in ("admin", "service"):
        return None
    return lambda session: is_allowed(grant, Action.WATCH, session)
