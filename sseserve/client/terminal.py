"""Display a session in a terminal, a pipe or a script.

The JSON output is for programs; it is what the server sends, and not filtered.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Protocol
from urllib.parse import quote

import click
import httpx
import msgspec
import trio

from ..model import State
from .connection import ConnectOptions
from .errors import (
    ClientError,
    ConnectionLost,
    UnknownSession,
    translate_httpx_errors,
    unwrap_exception_group,
)
from .messages import ReceivedMessage, decode_json
from .text import describe, describe_missed, is_progress, printable, render_bar, render_end, truncate
from .tls import trusted_authorities
from .token import AsyncBearer
from .watcher import Transport, watch

__all__ = ["Bar", "Display", "JsonLines", "Lines", "follow"]

# Exit statuses; 2 is a usage error, and 3 that the server cannot be reached.
_SUCCEEDED = 0
_FAILED = 1
_CANCELLED_OR_LOST = 4  # or deleted

_REDRAW_INTERVAL = 1.0  # seconds
_RECORD_TIMEOUT = 2.0  # seconds to wait for the title


class Display(Protocol):
    """Displays messages.

    ``is_live``: it changes between messages too, so that it is to be redrawn, and shows the session's title.
    """

    is_live: ClassVar[bool]

    def show(self, message: ReceivedMessage) -> None:
        """Display one message."""

    def notice(self, text: str) -> None:
        """Display a notice about the connection, separate from the messages."""

    def reconnecting(self, error: ConnectionLost, delay: float) -> None:
        """Display why there is no connection, and the seconds until the next attempt."""

    def show_session(self, record: Mapping[str, Any]) -> None:
        """Display what is no part of a message: the title, and what the watchers request."""

    def redraw(self) -> None:
        """Bring times and widths up to date."""

    def close(self) -> None:
        """Leave the terminal ready for the next program."""


class Lines:
    """One line for each message; of the failed attempts to connect, one for each reason."""

    is_live: ClassVar[bool] = False

    def __init__(self) -> None:
        self._reason = ""

    def show(self, message: ReceivedMessage) -> None:
        self._reason = ""
        if (text := self._format(message)) is not None:
            click.echo(text)

    def _format(self, message: ReceivedMessage) -> str | None:
        return describe(message)

    def notice(self, text: str) -> None:
        click.echo(printable(text), err=True)

    def reconnecting(self, error: ConnectionLost, delay: float) -> None:
        if str(error) != self._reason:
            self._reason = str(error)
            self.notice(f"{error}; retrying in {delay:.1f} s")

    def show_session(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def redraw(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonLines(Lines):
    """One line of JSON for each message, as ``{"id", "event", "data"}``."""

    def _format(self, message: ReceivedMessage) -> str:
        return msgspec.json.encode(message).decode()


# Erases what is behind the cursor and below (ECMA-48, ED). It is written behind a line and not before it:
# tmux copies a screen that is erased as a whole into its history.
_ERASE_REST = "\x1b[J"
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"  # whether lines wrap (DECAWM)


class Bar:
    """A progress bar that is redrawn in place; other messages are printed above it.

    The cursor rests on the first column. Where a narrower window wraps the bar into several rows it stays
    on the first of them, so that they are all erased, whether the terminal rewraps lines or cuts them.

    Args:
        base_url: the server's URL, for the artifacts.
        columns: returns the terminal's width.
        clock: returns POSIX seconds.
    """

    is_live: ClassVar[bool] = True

    def __init__(
        self,
        base_url: str,
        columns: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._base_url = base_url
        self._columns = columns or _terminal_columns
        self._clock = clock
        self._record: Mapping[str, Any] | None = None
        self._title: str | None = None
        self._control: Any = None
        self._away: tuple[str, float] | None = None  # why there is no connection, and when to try again
        self._final: ReceivedMessage | None = None

    def show(self, message: ReceivedMessage) -> None:
        self._away = None
        if message.is_final:
            self._final = message
        text = None
        if is_progress(message):
            self._record = message.data
        elif message.event == "control" and isinstance(message.data, Mapping):
            self._control = message.data.get("control")
        elif not message.is_final:
            text = describe(message)
        self._draw(above=text)

    def notice(self, text: str) -> None:
        self._draw(above=printable(text))

    def reconnecting(self, error: ConnectionLost, delay: float) -> None:
        self._away = (printable(str(error)), self._clock() + delay)
        self._draw()

    def show_session(self, record: Mapping[str, Any]) -> None:
        self._control = record.get("control")
        title = record.get("title")
        if title and title != self._title:
            self._title = title
            self._draw(above=printable(str(title)))

    def redraw(self) -> None:
        self._draw()

    def close(self) -> None:
        self._away = None
        lines = [self._line()]
        if self._final is not None:
            lines = [] if self._record is None else render_end(self._record, self._width(), self._base_url)
            if not is_progress(self._final):
                lines.append(describe(self._final) or "")
        self._write("".join(f"\r{line}{_ERASE_REST}\n" for line in lines if line) or f"\r{_ERASE_REST}")

    def _draw(self, above: str | None = None) -> None:
        if self._final is not None:
            return  # ``close`` draws the end
        printed = "" if above is None else f"\r{above}{_ERASE_REST}\n"
        self._write(f"{printed}\r{_WRAP_OFF}{self._line()}{_ERASE_REST}{_WRAP_ON}\r")

    def _line(self) -> str:
        now = self._clock()
        note = ""
        if self._away is not None:
            reason, retry_at = self._away
            seconds = math.ceil(retry_at - now)
            # In this order: the end is cut if it does not fit.
            note = f"retrying in {seconds} s: {reason}" if seconds > 0 else f"connecting: {reason}"
        if self._record is None:
            return truncate(note, self._width())
        if note:
            # The rest may be out of date, and the reason is what matters now.
            amount = {name: self._record.get(name) for name in ("progress", "indeterminate")}
            return render_bar(amount, self._width(), note=note)
        state = self._record.get("state")
        if self._control == "cancel" or (self._control == "pause" and state != State.PAUSED):
            note = f"{self._control} requested"
        elif self._control == "continue" and state == State.PAUSED:
            note = "continue requested"
        return render_bar(self._record, self._width(), now, note)

    def _width(self) -> int:
        # The last column stays free: some terminals wrap when it is filled.
        return max(self._columns() - 1, 1)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _terminal_columns() -> int:
    # The terminal knows better than COLUMNS, which may be from before the window was resized.
    with suppress(OSError, ValueError):
        if columns := os.get_terminal_size(sys.stdout.fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns


async def follow(
    base_url: str,
    session_id: str,
    display: Display,
    *,
    transport: Transport = "sse",
    cursor: str | None = None,
    wait_for_session: bool = False,
    token: str | None = None,
    ca: str | None = None,
) -> int:
    """Display a session to its end; see ``watch`` for the arguments.

    Returns:
        The exit status: 0 if the session succeeded, 1 if it failed, 4 if it was cancelled, lost or deleted.

    Raises:
        ClientError: see ``watch``.
    """
    with unwrap_exception_group():
        async with trio.open_nursery() as nursery:
            if display.is_live:
                nursery.start_soon(_redraw_regularly, display)
                nursery.start_soon(_redraw_when_resized, display)
            try:
                last = await _show_all(
                    base_url, session_id, display, transport, cursor, wait_for_session, token, ca
                )
            finally:
                display.close()
            nursery.cancel_scope.cancel()
    if last is None or not last.is_final:
        # The cursor was already at the end, so no message has told yet how the session ended.
        last = await _fetch_final_message(base_url, session_id, token, ca)
    return _exit_status(last)


async def _show_all(
    base_url: str,
    session_id: str,
    display: Display,
    transport: Transport,
    cursor: str | None,
    wait_for_session: bool,
    token: str | None,
    ca: str | None,
) -> ReceivedMessage | None:
    """Show all messages; return the last one."""
    last = None
    async with watch(
        base_url,
        session_id,
        transport=transport,
        cursor=cursor,
        connect_timeout=5.0,
        wait_for_session=wait_for_session,
        token=token,
        ca=ca,
        on_reconnect=display.reconnecting,
    ) as messages:
        async for message in messages:
            is_other_log = message.event == "resume" and message.data.get("status") != "ok"
            if display.is_live and (last is None or is_other_log):
                await _show_session(base_url, session_id, display, token, ca)
            display.show(message)
            if is_other_log:
                display.notice(describe_missed(message.data))
            last = message
    return last


async def _redraw_regularly(display: Display) -> None:
    while True:
        display.redraw()
        await trio.sleep(_REDRAW_INTERVAL)


async def _redraw_when_resized(display: Display) -> None:
    with trio.open_signal_receiver(signal.SIGWINCH) as signals:
        async for _ in signals:
            display.redraw()


async def _show_session(
    base_url: str, session_id: str, display: Display, token: str | None, ca: str | None
) -> None:
    """Show the session's title, if the server tells it in time."""
    url = f"{base_url.rstrip('/')}/api/sessions/{quote(session_id, safe='')}/status"
    bearer = None if token is None else AsyncBearer(token, base_url)
    with trio.move_on_after(_RECORD_TIMEOUT), suppress(ClientError), translate_httpx_errors():
        options = ConnectOptions(bearer=bearer, authorities=trusted_authorities(ca))
        async with options.http_client() as client:
            response = await client.get(url)
        record = decode_json(response.content)
        if response.status_code == httpx.codes.OK and isinstance(record, Mapping):
            display.show_session(record)


async def _fetch_final_message(
    base_url: str, session_id: str, token: str | None, ca: str | None
) -> ReceivedMessage | None:
    with suppress(UnknownSession):
        async with watch(base_url, session_id, transport="poll", token=token, ca=ca) as messages:
            async for message in messages:
                if message.is_final:
                    return message
    return None


def _exit_status(last: ReceivedMessage | None) -> int:
    if last is None or last.event == "deleted":
        return _CANCELLED_OR_LOST
    if last.event == "complete":
        return _SUCCEEDED
    failed = isinstance(last.data, Mapping) and last.data.get("state") == State.FAILED
    return _FAILED if failed else _CANCELLED_OR_LOST
