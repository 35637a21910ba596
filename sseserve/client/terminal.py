"""Display a session in a terminal, a pipe or a script.

Text from publishers is reduced to printable characters, so that it cannot control the terminal. The JSON
output is for programs and not filtered.
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

__all__ = ["Bar", "Display", "JsonLines", "Lines", "display_width", "follow", "render"]

_MAX_BAR_WIDTH = 20  # columns between the brackets

# Exit statuses
_SUCCEEDED = 0
_FAILED = 1
_CANCELLED_OR_LOST = 2  # or deleted


class Display(Protocol):
    """Displays messages."""

    def show(self, message: ReceivedMessage) -> None:
        """Display one message."""

    def notice(self, text: str) -> None:
        """Display a notice about the connection, separate from the messages."""

    def close(self) -> None:
        """Leave the terminal ready for the next program."""


class JsonLines:
    """One line of JSON for each message, as ``{"id", "event", "data"}``."""

    def show(self, message: ReceivedMessage) -> None:
        click.echo(msgspec.json.encode(message).decode())

    def notice(self, text: str) -> None:
        click.echo(text, err=True)

    def close(self) -> None:
        """Do nothing."""


class Lines:
    """One line for each message."""

    def show(self, message: ReceivedMessage) -> None:
        if (text := describe(message)) is not None:
            click.echo(text)

    def notice(self, text: str) -> None:
        click.echo(printable(text), err=True)

    def close(self) -> None:
        """Do nothing."""


class Bar:
    """A progress bar that is redrawn in place; other messages are printed above it."""

    def __init__(self, columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns) -> None:
        self._columns = columns
        self._line = ""
        self._drawn_width = 0

    def show(self, message: ReceivedMessage) -> None:
        if _is_progress(message):
            # The last column stays free: some terminals wrap when it is filled.
            self._line = render(message.data, max(self._columns() - 1, 1))
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
        if self._drawn_width:
            self._drawn_width = 0
            click.echo()

    def _draw(self) -> None:
        if self._line:
            width = display_width(self._line)
            click.echo("\r" + self._line + " " * (self._drawn_width - width), nl=False)
            self._drawn_width = width

    def _clear(self) -> None:
        if self._drawn_width:
            click.echo("\r" + " " * self._drawn_width + "\r", nl=False)
            self._drawn_width = 0


async def follow(
    base_url: str,
    session_id: str,
    display: Display,
    *,
    transport: Transport = "sse",
    cursor: str | None = None,
) -> int:
    """Display a session to its end.

    Returns:
        The exit status: 0 if the session succeeded, 1 if it failed, 2 if it was cancelled, lost or deleted.

    Raises:
        ClientError: see ``watch``.
    """

    def show_reconnect(error: ConnectionLost, delay: float) -> None:
        display.notice(f"not connected: {error}; retrying in {delay:.1f} s")

    last = None
    try:
        async with watch(
            base_url,
            session_id,
            transport=transport,
            cursor=cursor,
            connect_timeout=5.0,
            on_reconnect=show_reconnect,
        ) as messages:
            async for message in messages:
                display.show(message)
                if message.event == "resume" and message.data.get("status") != "ok":
                    display.notice(_describe_missed(message.data))
                last = message
    finally:
        display.close()
    if last is None or not last.is_final:
        # The cursor was already at the end, so no message has told yet how the session ended.
        last = await _fetch_final_message(base_url, session_id)
    return _exit_status(last)


async def _fetch_final_message(base_url: str, session_id: str) -> ReceivedMessage | None:
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
        return _CANCELLED_OR_LOST
    if last.event == "complete":
        return _SUCCEEDED
    failed = isinstance(last.data, Mapping) and last.data.get("state") == State.FAILED
    return _FAILED if failed else _CANCELLED_OR_LOST


def _describe_missed(resume: Mapping[str, Any]) -> str:
    missed = resume.get("missed", 0)
    if resume.get("status") == "gap":
        reason = "the server no longer stores them"
    else:
        reason = "the session has a new event log, most likely because the server was restarted"
    return f"{missed} event{'' if missed == 1 else 's'} missed: {reason}"


def describe(message: ReceivedMessage) -> str | None:
    """Return a message as one line of text; None if it is not for display."""
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
    """Return progress as one line of text: bar, percentage, status, message and ETA.

    Args:
        data: the ``data`` of a progress message.
        width: the maximum width in columns; the text in the middle is shortened to fit. None: no limit
            and no bar.
    """
    percent = data.get("progress")
    percent = float(percent) if isinstance(percent, int | float) else 0.0
    head = f"{int(percent):3d}%"
    if width is not None:
        bar_width = max(min(_MAX_BAR_WIDTH, width // 4), 1)
        filled = int(bar_width * min(max(percent, 0), 100) / 100)
        head = f"[{'#' * filled}{'-' * (bar_width - filled)}] {head.lstrip()}"
    state = data.get("state")
    status = data.get("status")
    label = " ".join(
        str(part) for part in (None if state == "running" else status, data.get("stage")) if part
    )
    eta = data.get("eta")
    tail = f"  ETA {_format_duration(eta)}" if isinstance(eta, int | float) else ""
    parts = [part for part in (label, data.get("message"), _format_error(data.get("error"))) if part]
    text = printable("  ".join(str(part) for part in parts))
    if width is not None:
        text = truncate(text, width - len(head) - 1 - len(tail))
    line = f"{head} {text}{tail}" if text else head + tail
    return line if width is None else truncate(line, width)


def _format_error(error: Any) -> str | None:
    if isinstance(error, Mapping):
        error = error.get("message") or msgspec.json.encode(error).decode()
    return f"error: {error}" if error else None


def _format_duration(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def printable(text: str) -> str:
    """Replace control and other unprintable characters by spaces."""
    return "".join(char if char.isprintable() else " " for char in text)


def display_width(text: str) -> int:
    """Return the width of ``text`` in terminal columns (Unicode Standard Annex 11)."""
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def truncate(text: str, width: int) -> str:
    """Truncate ``text`` to ``width`` columns, with an ellipsis if there is space for one."""
    if display_width(text) <= width:
        return text
    ellipsis = "..." if width > 6 else ""
    remaining = width - len(ellipsis)
    kept = []
    for char in text:
        remaining -= _char_width(char)
        if remaining < 0:
            break
        kept.append(char)
    return ("".join(kept).rstrip() + ellipsis) if width > 0 else ""
