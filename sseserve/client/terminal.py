"""Following a session in a terminal, a pipe or a script.

Nothing that a publisher says reaches a reader but as printable characters; JSON is for machines.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import click
import msgspec

from ..model import State
from .errors import ConnectionLost, UnknownSession
from .messages import ReceivedMessage
from .watcher import Transport, watch

__all__ = ["Bar", "Display", "JsonLines", "Lines", "follow", "render", "width_of"]

_BAR = 20  # cells between the brackets, in a terminal that is wide enough
_CLOSED = 2  # exit status of a session that came to no end of its own


class Display(Protocol):
    """Shows messages to whoever is there."""

    def show(self, message: ReceivedMessage) -> None:
        """Show one message."""

    def notice(self, text: str) -> None:
        """Show something about the connection, apart from the messages."""

    def close(self) -> None:
        """Leave the terminal in order."""


class JsonLines:
    """One line of JSON for each message, as ``{"id", "event", "data"}``."""

    def show(self, message: ReceivedMessage) -> None:
        click.echo(msgspec.json.encode(message).decode())

    def notice(self, text: str) -> None:
        click.echo(text, err=True)

    def close(self) -> None:
        """There is nothing to do."""


class Lines:
    """One line for each message."""

    def show(self, message: ReceivedMessage) -> None:
        if (text := describe(message)) is not None:
            click.echo(text)

    def notice(self, text: str) -> None:
        click.echo(printable(text), err=True)

    def close(self) -> None:
        """There is nothing to do."""


class Bar:
    """One line, drawn again and again; whatever is no progress gets a line of its own above it."""

    def __init__(self, columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns) -> None:
        self._columns = columns
        self._shown = ""
        self._drawn = 0

    def show(self, message: ReceivedMessage) -> None:
        if _is_progress(message):
            # The last column stays free: some terminals begin a new line when it is filled.
            self._shown = render(message.data, max(self._columns() - 1, 1))
            self._draw()
        elif (text := describe(message)) is not None:
            self._clear()
            click.echo(text)
            self._draw()

    def notice(self, text: str) -> None:
        self._clear()
        click.echo(printable(text), err=True)
        self._draw()

    def close(self) -> None:
        if self._drawn:
            self._drawn = 0
            click.echo()

    def _draw(self) -> None:
        if self._shown:
            width = width_of(self._shown)
            click.echo("\r" + self._shown + " " * (self._drawn - width), nl=False)
            self._drawn = width

    def _clear(self) -> None:
        if self._drawn:
            click.echo("\r" + " " * self._drawn + "\r", nl=False)
            self._drawn = 0


async def follow(
    base_url: str,
    session_id: str,
    display: Display,
    *,
    transport: Transport = "sse",
    cursor: str | None = None,
) -> int:
    """Show a session to its end. Returns 0 if it succeeded, 1 if it failed, else 2.

    Raises:
        ClientError: see ``watch``.
    """

    def lost(error: ConnectionLost, delay: float) -> None:
        display.notice(f"no connection: {error}; trying again in {delay:.1f} s")

    last = None
    try:
        async with watch(
            base_url, session_id, transport=transport, cursor=cursor, connect_timeout=5.0, on_reconnect=lost
        ) as messages:
            async for message in messages:
                display.show(message)
                if message.event == "resume" and message.data.get("status") != "ok":
                    display.notice(_missed(message.data))
                last = message
    finally:
        display.close()
    if last is None or not last.is_final:
        # We came with a cursor that stands at the end, so nobody has told us yet how it ended.
        last = await _end(base_url, session_id)
    return _exit_status(last)


async def _end(base_url: str, session_id: str) -> ReceivedMessage | None:
    try:
        async with watch(base_url, session_id, transport="poll") as messages:
            async for message in messages:
                if message.is_final:
                    return message
    except UnknownSession:
        pass
    return None


def _exit_status(last: ReceivedMessage | None) -> int:
    if last is None or last.event == "deleted":
        return _CLOSED
    if last.event == "complete":
        return 0
    failed = isinstance(last.data, Mapping) and last.data.get("state") == State.FAILED
    return 1 if failed else _CLOSED


def _missed(verdict: Mapping[str, Any]) -> str:
    why = "the log no longer reaches back" if verdict.get("status") == "gap" else "it is another log now"
    return f"{verdict.get('missed', 0)} events are missing: {why}"


def describe(message: ReceivedMessage) -> str | None:
    """Write a message as one line; None if it says nothing to a reader."""
    if _is_progress(message):
        return render(message.data)
    if message.event == "resume":
        return None
    if message.event == "deleted":
        return "deleted"
    if message.event == "control" and isinstance(message.data, Mapping):
        return printable(f"control  {message.data.get('control')}")
    return printable(f"{message.event}  {msgspec.json.encode(message.data).decode()}")


def _is_progress(message: ReceivedMessage) -> bool:
    return message.event in {"progress", "complete", "error"} and isinstance(message.data, Mapping)


def render(data: Mapping[str, Any], width: int | None = None) -> str:
    """Write progress as one line, with a bar and at most ``width`` cells wide if that is given.

    What does not fit goes from the middle: the bar and the percentage come first, the ETA last.
    """
    percent = data.get("progress")
    percent = float(percent) if isinstance(percent, int | float) else 0.0
    head = f"{int(percent):3d}%"
    if width is not None:
        cells = max(min(_BAR, width // 4), 1)
        full = int(cells * min(max(percent, 0), 100) / 100)
        head = f"[{'#' * full}{'-' * (cells - full)}] {head.lstrip()}"
    state = data.get("state")
    status = data.get("status")
    first = " ".join(
        str(part) for part in (None if state == "running" else status, data.get("stage")) if part
    )
    eta = data.get("eta")
    tail = f"  ETA {_clock(eta)}" if isinstance(eta, int | float) else ""
    parts = [part for part in (first, data.get("message"), _error(data.get("error"))) if part]
    text = printable("  ".join(str(part) for part in parts))
    if width is not None:
        text = clip(text, width - len(head) - 1 - len(tail))
    line = f"{head} {text}{tail}" if text else head + tail
    return line if width is None else clip(line, width)


def _error(error: Any) -> str | None:
    if isinstance(error, Mapping):
        error = error.get("message") or msgspec.json.encode(error).decode()
    return f"error: {error}" if error else None


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def printable(text: str) -> str:
    """Replace what moves the cursor, changes colours or worse, by spaces."""
    return "".join(char if char.isprintable() else " " for char in text)


def width_of(text: str) -> int:
    """How many cells of a terminal ``text`` takes (Unicode Standard Annex 11)."""
    return sum(map(_width, text))


def _width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def clip(text: str, width: int) -> str:
    """Cut ``text`` to ``width`` cells, and show by dots that it was cut."""
    if width_of(text) <= width:
        return text
    dots = "..." if width > 6 else ""
    room = width - len(dots)
    kept = []
    for char in text:
        room -= _width(char)
        if room < 0:
            break
        kept.append(char)
    return ("".join(kept).rstrip() + dots) if width > 0 else ""
