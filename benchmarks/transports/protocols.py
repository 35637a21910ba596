"""The clients of the transports without I/O: bytes in, events and bytes to send out; time is an argument.

Each is the protocol's ordinary Python library (h11, wsproto, h2) and as little as possible on top of it, the
same for all: the record of each event is decoded. All send the header fields of a browser. A client with a
cursor resumes with it; one without begins with the current state.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11
import msgspec
import wsproto
import wsproto.events
from wsproto.utilities import ProtocolError

from sseserve.sse import Decoder, ServerSentEvent

from .watcher import Watcher

__all__ = ["CHANNELS", "POLL_INTERVAL", "WAIT", "Channel", "Refused"]

WAIT = 30  # seconds that a long-poll may wait
POLL_INTERVAL = 2.0  # seconds between a response and the next poll
RECORDS = frozenset({"progress", "complete", "error"})  # the events whose data is a record
# The windows of Chromium, so that no stream waits for a window update.
STREAM_WINDOW, CONNECTION_WINDOW = 6 * 2**20, 15 * 2**20
# What Chromium sends with each request of a page, without cookies.
BROWSER = (
    ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0"),
    ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ("Accept-Language", "en-US,en;q=0.9"),
)
FETCH = (
    ("Sec-CH-UA", '"Chromium";v="142", "Not_A Brand";v="99"'),
    ("Sec-CH-UA-Mobile", "?0"),
    ("Sec-CH-UA-Platform", '"Linux"'),
    ("Sec-Fetch-Dest", "empty"),
    ("Sec-Fetch-Mode", "cors"),
    ("Sec-Fetch-Site", "same-origin"),
)


class Refused(Exception):
    """The server, or a proxy, does not serve this transport. The text is the status."""


class _Message(msgspec.Struct):
    id: str | None
    event: str | None
    data: msgspec.Raw


class _Page(msgspec.Struct):
    resume: dict[str, Any] | None
    events: list[_Message]
    next: str
    end: bool


_decode_message = msgspec.json.Decoder(_Message).decode
_decode_page = msgspec.json.Decoder(_Page).decode


class Channel(ABC):
    """The protocol of one connection, which has one watcher; over HTTP/2 up to ``capacity``.

    ``output`` are the bytes to be sent. ``due`` is the monotonic time, in seconds, when ``wake`` is to be
    called. ``ended``: nothing more comes.
    """

    capacity = 1

    def __init__(self, host: str, session: str, watchers: list[Watcher]) -> None:
        self.host = host
        self.session = session
        self.watchers = watchers
        self.output = b""
        self.due: float | None = None
        self.ended = False

    @abstractmethod
    def begin(self) -> None:
        """The connection is open."""

    @abstractmethod
    def receive(self, data: bytes, at: int) -> None:
        """Take bytes that arrived at a time in nanoseconds; none: the peer has closed the connection.

        Raises:
            Refused: the status is not one of success.
        """

    def wake(self) -> None:
        """The time ``due`` has come."""
        self.due = None

    def _path(self, suffix: str) -> str:
        return f"/api/sessions/{self.session}/{suffix}"


class _HTTP1(Channel):
    """One request after another over HTTP/1.1."""

    def begin(self) -> None:
        self._at = 0  # when the bytes have arrived that are being read
        self._h11 = h11.Connection(h11.CLIENT)

    def _get(self, path: str, *headers: tuple[str, str]) -> None:
        fields = [("Host", self.host), ("Connection", "keep-alive"), *BROWSER, *FETCH, *headers]
        request = h11.Request(method="GET", target=path, headers=fields)
        self.output += self._h11.send(request) or b""
        self.output += self._h11.send(h11.EndOfMessage()) or b""

    def receive(self, data: bytes, at: int) -> None:
        self._at = at
        try:
            self._h11.receive_data(data)
            while True:
                event = self._h11.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                if isinstance(event, h11.Response):
                    if event.status_code != 200:
                        raise Refused(str(event.status_code))
                elif isinstance(event, h11.Data):
                    self._take(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    if self._h11.our_state is h11.MUST_CLOSE or self._h11.their_state is h11.MUST_CLOSE:
                        self.ended = True
                    else:
                        self._h11.start_next_cycle()
                    self._finish()
                elif isinstance(event, h11.ConnectionClosed):
                    self.ended = True
                    return
        except h11.RemoteProtocolError:  # it was cut
            self.ended = True

    @abstractmethod
    def _take(self, body: bytes) -> None:
        """Take a part of the body of a response."""

    @abstractmethod
    def _finish(self) -> None:
        """The response is complete."""


class _StreamReader:
    """Gives the events of one event stream to a watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._decoder = Decoder(last_event_id=watcher.cursor)
        self._snapshot = not watcher.cursor

    def feed(self, data: bytes, at: int) -> None:
        for event in self._decoder.feed(data):
            self._take(event, at)

    def _take(self, event: ServerSentEvent, at: int) -> None:
        if event.event in RECORDS:
            self._watcher.take(event.id, event.data.encode(), at, snapshot=self._snapshot)
            self._snapshot = False
        elif event.event == "resume":
            verdict = json.loads(event.data)
            self._watcher.tell(verdict)
            self._snapshot = verdict["status"] != "ok"


class SSE(_HTTP1):
    """An event stream, as an EventSource reads it."""

    def begin(self) -> None:
        super().begin()
        cursor = self.watchers[0].cursor
        self._reader = _StreamReader(self.watchers[0])
        headers = [("Accept", "text/event-stream"), ("Cache-Control", "no-cache")]
        self._get(self._path("status/stream"), *headers, *([("Last-Event-ID", cursor)] if cursor else []))

    def _take(self, body: bytes) -> None:
        self._reader.feed(body, self._at)

    def _finish(self) -> None:
        self.ended = True


class WebSocket(Channel):
    """A WebSocket (RFC 6455) without extensions."""

    def begin(self) -> None:
        cursor = self.watchers[0].cursor
        self._snapshot = not cursor
        path = self._path("status/ws") + (f"?last_event_id={cursor}" if cursor else "")
        self._connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self.output += self._connection.send(
            wsproto.events.Request(
                host=self.host,
                target=path,
                extra_headers=[(name.encode(), value.encode()) for name, value in BROWSER],
            )
        )
        self._text = ""

    def receive(self, data: bytes, at: int) -> None:
        try:
            self._connection.receive_data(data or None)
            for event in self._connection.events():
                self._handle(event, at)
        except ProtocolError:
            self.ended = True
        self.ended = self.ended or not data

    def _handle(self, event: wsproto.events.Event, at: int) -> None:
        if isinstance(event, wsproto.events.TextMessage):
            self._text += event.data
            if event.message_finished:
                text, self._text = self._text, ""
                self._take(_decode_message(text), at)
        elif isinstance(event, wsproto.events.Ping):
            self.output += self._connection.send(event.response())
        elif isinstance(event, wsproto.events.CloseConnection):
            self.ended = True
        elif isinstance(event, wsproto.events.RejectConnection):
            raise Refused(str(event.status_code))

    def _take(self, message: _Message, at: int) -> None:
        watcher = self.watchers[0]
        if message.event in RECORDS:
            watcher.take(message.id or "", bytes(message.data), at, snapshot=self._snapshot)
            self._snapshot = False
        elif message.event == "resume":
            verdict = msgspec.json.decode(message.data)
            watcher.tell(verdict)
            self._snapshot = verdict["status"] != "ok"


class LongPoll(_HTTP1):
    """Requests that wait until there is something after the cursor. The first one gets the current state."""

    def begin(self) -> None:
        super().begin()
        self._body = b""
        self._ask()

    def _ask(self) -> None:
        cursor = self.watchers[0].cursor
        self._get(self._path(f"events?after={cursor}&wait={WAIT}" if cursor else "status"))

    def _take(self, body: bytes) -> None:
        self._body += body

    def _finish(self) -> None:
        body, self._body = self._body, b""
        watcher = self.watchers[0]
        if watcher.cursor:
            page = _decode_page(body)
            resumed = page.resume is None or page.resume["status"] == "ok"
            if page.resume is not None:
                watcher.tell(page.resume)
            for message in page.events:
                if message.event in RECORDS:
                    watcher.take(message.id or "", bytes(message.data), self._at, snapshot=not resumed)
            watcher.cursor = page.next
            self.ended = self.ended or page.end
        else:
            watcher.take(msgspec.json.decode(body)["id"], body, self._at, snapshot=True)
        if not self.ended:
            self._ask()


class Polling(_HTTP1):
    """Requests for the state, ``POLL_INTERVAL`` seconds after the response to the one before.

    They are not conditional: the responses must not be stored (``Cache-Control: no-store``), so a browser
    sends no ``If-None-Match`` by itself.
    """

    phase = 1.0  # the part of the interval after which the second poll is sent, so that clients take turns

    def begin(self) -> None:
        super().begin()
        self._body = b""
        self.due = None
        self._get(self._path("status"))

    def wake(self) -> None:
        super().wake()
        self._get(self._path("status"))

    def _take(self, body: bytes) -> None:
        self._body += body

    def _finish(self) -> None:
        body, self._body = self._body, b""
        self.watchers[0].take("", body, self._at, snapshot=True)
        self.due = self._at / 1e9 + POLL_INTERVAL * self.phase
        self.phase = 1.0


class HTTP2(Channel):
    """Event streams over one HTTP/2 connection, with prior knowledge (RFC 9113, section 3.3) or over TLS."""

    capacity = 100  # a usual limit of a server
    scheme = "http"

    def begin(self) -> None:
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW)
        self._readers: dict[int, _StreamReader] = {}
        for watcher in self.watchers:
            self._open(watcher)
        self.output += self._h2.data_to_send()

    def _open(self, watcher: Watcher) -> None:
        number = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "GET"),
            (":scheme", self.scheme),
            (":authority", self.host),
            (":path", self._path("status/stream")),
            ("accept", "text/event-stream"),
            ("cache-control", "no-cache"),
            *((name.lower(), value) for name, value in (*BROWSER, *FETCH)),
        ]
        if watcher.cursor:
            headers.append(("last-event-id", watcher.cursor))
        self._h2.send_headers(number, headers, end_stream=True)
        self._readers[number] = _StreamReader(watcher)

    def receive(self, data: bytes, at: int) -> None:
        if not data:
            self.ended = True
            return
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            self.ended = True
            return
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                self._readers[event.stream_id].feed(event.data or b"", at)
                if event.flow_controlled_length and not event.stream_ended:
                    self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.ResponseReceived):
                status = dict(event.headers or ()).get(b":status", b"").decode()
                if status != "200":
                    raise Refused(status)
            elif isinstance(
                event, h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated
            ):
                self.ended = True
        self.output += self._h2.data_to_send()


CHANNELS: dict[str, type[Channel]] = {
    "sse": SSE,
    "websocket": WebSocket,
    "long-poll": LongPoll,
    "polling": Polling,
    "sse-h2": HTTP2,
}
