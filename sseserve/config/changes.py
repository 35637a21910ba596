"""What differs between two sets of settings, for a server that reloads them. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from .about import descriptions
from .secrets import shown
from .settings import Settings

__all__ = ["Change", "changes"]


class Change(msgspec.Struct, frozen=True):
    """A setting that differs. ``str()`` says how, as in ``ttl: 3600.0 -> 600.0``, without secrets.

    Args:
        name: of the setting.
        old: its value before; its representation has no secrets.
        new: its value now, likewise.
        reloads: a running server can take it; otherwise it must be started again.
    """

    name: str
    old: Any
    new: Any
    reloads: bool

    def __str__(self) -> str:
        old, new = repr(self.old), repr(self.new)
        # What differs is a secret if it looks the same.
        return f"{self.name}: another value" if old == new else f"{self.name}: {old} -> {new}"


def changes(old: Settings, new: Settings) -> tuple[list[Change], list[Change]]:
    """Return what differs: what a running server can take, and what only a restarted one has.

    Args:
        old: the settings of the running server.
        new: those that were read since.
    """
    differing = [
        Change(name, shown(name, before), shown(name, after), about.reloads)
        for name, about in descriptions(Settings).items()
        if (before := getattr(old, name)) != (after := getattr(new, name))
    ]
    return [change for change in differing if change.reloads], [
        change for change in differing if not change.reloads
    ]
