"""What is said of a setting, beside its type and default: in its annotation, and read from there."""

from __future__ import annotations

from functools import cache
from typing import Annotated, get_args, get_origin, get_type_hints

import msgspec

__all__ = ["About", "descriptions"]


class About(msgspec.Struct, frozen=True):
    """Describes a field of ``Settings``, or of a table in it: ``Annotated[float, About(...)]``.

    Args:
        text: what it is, as a sentence without its full stop.
        reason: why it exists, or why its default is what it is; also a sentence without its full stop.
        unit: of its value, such as seconds; None: it has none.
        unset: what ``None`` means; None: it cannot be unset.
        heading: of the group of settings that begins with it; None: it belongs to the group before it.
        reloads: a running server can take a new value (SIGHUP); otherwise it must be started again.
    """

    text: str
    reason: str
    unit: str | None = None
    unset: str | None = None
    heading: str | None = None
    reloads: bool = False


@cache
def descriptions(kind: type[msgspec.Struct]) -> dict[str, About]:
    """Return what is said of each field of a struct, by the field's name, in order."""
    return {
        name: about
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is Annotated
        for about in get_args(hint)
        if isinstance(about, About)
    }
