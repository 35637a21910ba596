"""The extras: parts of the package with libraries that only they need (``pip install 'sseserve[NAME]'``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingExtra", "required_by"]


class MissingExtra(ImportError):
    """A part of the package is used whose libraries are not installed. The message says what to install."""


@contextmanager
def required_by(part: str, extra: str) -> Iterator[None]:
    """Import the libraries of an extra in this context.

    Args:
        part: what needs them, for the message.
        extra: its name in ``pyproject.toml``.

    Raises:
        MissingExtra: one of them, or a library that it needs itself, is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "sseserve").partition(".")[0] == "sseserve":
            raise
        raise MissingExtra(
            f"{part} needs {error.name}, which is not installed: pip install 'sseserve[{extra}]'",
            name=error.name,
        ) from None
