"""Sans-I/O codec of the WHATWG event stream, in both directions. No socket, no clock.

Source: HTML Living Standard, section 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an event
stream". What ``encode`` writes, ``Decoder`` reads back the same, however its bytes are split.
"""

from __future__ import annotations

import codecs

import msgspec

__all__ = ["Decoder", "ServerSentEvent", "comment", "encode", "retry_line", "valid_field"]


class ServerSentEvent(msgspec.Struct, frozen=True):
    """One dispatched event.

    ``id`` is the last event id in force when it was dispatched, not only one of its own; ``retry`` is
    the reconnection time in milliseconds if the event's block set one.
    """

    data: str
    event: str = "message"
    id: str = ""
    retry: int | None = None


def valid_field(text: str) -> bool:
    """Return whether ``text`` can be the value of an ``event`` or ``id`` field: it has no CR, LF or NUL."""
    return not ("\r" in text or "\n" in text or "\0" in text)


def encode(
    data: str | None = None,
    *,
    event: str | None = None,
    id: str | None = None,  # noqa: A002 - the standard's own name
    retry: int | None = None,
) -> bytes:
    """Write one block. Without ``data`` it dispatches nothing but still sets the id or the retry time.

    The id is behind the data: some clients take it as soon as they have read its line, and would lose the
    event if the connection broke between the two.

    Raises:
        ValueError: ``event`` or ``id`` holds CR, LF or NUL, or ``retry`` is negative.
    """
    block = ""
    if event is not None:
        if not valid_field(event):
            raise ValueError(f"an event type cannot hold CR, LF or NUL: {event!r}")
        block = f"event: {event}\n"
    if retry is not None:
        if retry < 0:
            raise ValueError(f"a retry time cannot be negative: {retry}")
        block += f"retry: {retry}\n"
    if data is not None:
        # CR, LF and CRLF all end a line there; str.splitlines would split at more than these.
        if "\r" in data:
            data = data.replace("\r\n", "\n").replace("\r", "\n")
        if "\n" in data:
            data = data.replace("\n", "\ndata: ")
        block += f"data: {data}\n"
    if id is not None:
        if not valid_field(id):
            raise ValueError(f"an id cannot hold CR, LF or NUL: {id!r}")
        block += f"id: {id}\n"
    return f"{block}\n".encode()


# Lines by themselves. No empty line follows: some clients take any empty line for the end of a message.


def comment(text: str) -> bytes:
    """Write a comment, which every client ignores: it keeps an idle connection open."""
    return b"".join(b": " + line.encode() + b"\n" for line in text.splitlines() or [""])


def retry_line(milliseconds: int) -> bytes:
    """Write the reconnection time, which takes effect as soon as its line has been read."""
    return b"retry: %d\n" % milliseconds


class Decoder:
    """Bytes in, events out.

    ``last_event_id`` and ``retry`` (milliseconds, None until the server names one) outlive the
    connection: pass them to the next ``Decoder`` to continue where this one stopped. A block that was
    cut off does not change ``last_event_id``, as its event was not dispatched either.
    """

    def __init__(self, *, last_event_id: str = "", retry: int | None = None) -> None:
        self.last_event_id = self._id = last_event_id
        self.retry = retry
        self._text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending: list[str] = []
        self._started = False
        self._skip_lf = False
        self._reset()

    def _reset(self) -> None:
        self._data: list[str] = []
        self._event = ""
        self._block_retry: int | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes of the stream; return the events that they complete, in order."""
        text = self._text.decode(chunk)
        if not text:
            return []
        if not self._started:
            self._started = True
            text = text.removeprefix("\ufeff")
        if self._skip_lf and text:
            self._skip_lf = False
            text = text.removeprefix("\n")
        if text.endswith("\r"):
            self._skip_lf = True
        *lines, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if not lines:
            self._pending.append(rest)
            return []
        lines[0] = "".join(self._pending) + lines[0]
        self._pending = [rest] if rest else []
        events = []
        for line in lines:
            if not line:
                if (event := self._dispatch()) is not None:
                    events.append(event)
            else:
                self._field(line)
        return events

    def _dispatch(self) -> ServerSentEvent | None:
        event = None
        self.last_event_id = self._id
        if self._data:
            event = ServerSentEvent(
                "\n".join(self._data), self._event or "message", self.last_event_id, self._block_retry
            )
        self._reset()
        return event

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._event = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit() and len(digits := value.lstrip("0")) < 19:
                self.retry = self._block_retry = int(digits or "0")
            case _:
                pass
