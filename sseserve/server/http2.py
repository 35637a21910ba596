"""One HTTP/2 connection (RFC 9113): h2 is the protocol, and Hypercorn's streams make ASGI of its requests.

Hypercorn has a connection of its own, with the defects that ``tests/test_workarounds.py`` reproduces.

- One task writes. What h2 has encoded is sent whole and in its order, or the connection ends: all responses
  share the state of the header compression (RFC 7541, section 2.2), so none of it may be lost with a
  request that is cancelled.
- What a request does wrong ends its stream, not the connection (RFC 9113, section 8.1.1).
- A response waits for its client's window; ``HIGH_WATER`` bytes of it are copied.
- The reader waits for no application: the windows of the other streams are read by it, too.
- The client chooses the size of the compression's table, but no more than ``MAX_TABLE`` of it are used: it
  is searched for every header field of a response.
- With the connection ends all that belongs to it.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import trio
from h2.config import H2Configuration
from h2.connection import ConnectionState as H2State
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.events import Event as H2Event
from h2.exceptions import ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings
from h2.utilities import HeaderValidationFlags, validate_headers
from hypercorn.config import Config
from hypercorn.protocol.events import (
    Body,
    Data,
    EndBody,
    EndData,
    Event,
    InformationalResponse,
    Request,
    Response,
    StreamClosed,
)
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import filter_pseudo_headers, parse_socket_addr

from ..live.transport import DISCONNECTED, LINGER, Transport
from .http2_frames import FrameCountingConnection
from .request_body import RequestBody
from .websocket_stream import WebSocketStream

__all__ = ["Http2Connection"]

log = logging.getLogger(__name__)

# At the level debug it logs every header, and so tokens and tickets.
logging.getLogger("hpack").setLevel(logging.INFO)

READ = 16 * 1024
DECODE = 2048  # bytes; as many frames as they hold are decoded without letting other tasks run
MAX_WRITE = 64 * 1024  # bytes of responses that one write joins
MAX_TABLE = 4096  # bytes of the header compression's dynamic table
HIGH_WATER = 32 * 1024  # bytes of one response that may wait for its client's window

_REQUEST = HeaderValidationFlags(
    is_client=False, is_trailer=False, is_response_header=False, is_push_promise=False
)
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH = re.compile(rb"/[\x21-\x3e\x40-\x7e]*(\?.*)?|\*", re.DOTALL)


class _Outgoing:
    """What waits to be sent of one stream. ``is_open``: neither its end nor a reset has been sent."""

    __slots__ = ("buffer", "changed", "ends", "is_open")

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ends = False  # after what is in the buffer
        self.is_open = True
        self.changed = trio.lowlevel.ParkingLot()

    @property
    def is_full(self) -> bool:
        return len(self.buffer) >= HIGH_WATER


class _AppWithBody(NamedTuple):
    """An application, and where it gets the body of its request from."""

    app: AppWrapper
    body: RequestBody


class _TaskGroup(TaskGroup):
    """Hypercorn's, without a queue of messages for a request: what ends its body ends the request, too."""

    async def spawn_app(self, app: Any, config: Config, scope: Any, send: Any) -> Any:
        if not isinstance(app, _AppWithBody):
            return await super().spawn_app(app, config, scope, send)
        threads = trio.to_thread.run_sync, trio.from_thread.run
        self.spawn(_handle, app.app, config, scope, app.body.receive, send, *threads)
        return _drop


async def _drop(_message: object) -> None:
    pass


class Http2Connection:
    """Serves one connection over a transport.

    Args:
        app, config, worker: Hypercorn's; every request becomes a call of the application.
        transport: what has been read of the preface is pushed back.
        keep_alive: how long it may be without a request, in seconds.
        request_timeout: how long the head of a request may take, in seconds.
        send_timeout: how long one write may take, in seconds.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        worker: WorkerContext,
        transport: Transport,
        *,
        keep_alive: float,
        request_timeout: float,
        send_timeout: float,
    ) -> None:
        self._app = app
        self._config = config
        self._worker = worker
        self._transport = transport
        self._keep_alive = keep_alive
        self._request_timeout = request_timeout
        self._send_timeout = send_timeout
        # Requests are validated in ``_open``: for h2 a malformed one is an error of the connection.
        self._h2 = FrameCountingConnection(
            H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False),
            trio.current_time,
            max_header_block=config.h2_max_header_list_size,
        )
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: config.h2_max_concurrent_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: config.h2_max_header_list_size,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            },
        )
        self._group = _TaskGroup()
        self._streams: dict[int, HTTPStream | WebSocketStream] = {}
        self._outgoing: dict[int, _Outgoing] = {}
        self._bodies: dict[int, RequestBody] = {}  # of HTTP requests
        self._unreleased = 0  # bytes of the connection's window
        self._ready: dict[int, _Outgoing] = {}  # those with something to send, in the order of their turns
        self._head_deadline = math.inf  # of the head that is incomplete
        self._is_stopping = False
        self._is_over = False  # nothing more can be sent but what h2 has encoded
        self._wakeup = trio.Event()  # there may be something to write
        self._is_writing = False
        self._written = trio.lowlevel.ParkingLot()  # those who wait for the end of a write
        self._until_idle = trio.CancelScope()  # its deadline is that of an idle connection
        self._everything = trio.CancelScope()

    async def serve(self) -> None:
        """Serve the connection to its end; whoever calls this closes the transport."""
        self._h2.initiate_connection()
        with self._everything:
            async with self._group:
                self._group.spawn(self._write)
                self._update_idle()
                is_connected = True
                with self._until_idle:
                    is_connected = await self._read()
                if is_connected:
                    await self._close()
                self._everything.cancel()

    def stop(self) -> None:
        """Accept no more requests, and close the connection after those that it has."""
        self._is_stopping = True
        self._update_idle()

    def _update_idle(self) -> None:
        """Close the connection when it is without a request for too long."""
        if self._streams:
            self._until_idle.deadline = math.inf
        elif self._is_stopping:
            self._until_idle.cancel()
        else:
            self._until_idle.deadline = trio.current_time() + self._keep_alive

    async def _close(self) -> None:
        """Send GOAWAY, and give the client the time to read it."""
        if not self._is_over:
            self._h2.close_connection()
        self._wakeup.set()
        while self._is_writing or self._wakeup.is_set():
            await self._written.park()
        await self._transport.aclose_lingering(LINGER)

    def _fail(self) -> None:
        """End the connection: what h2 knows is not what the client has been told."""
        if not self._is_over:
            self._is_over = True
            self._h2.close_connection(ErrorCodes.INTERNAL_ERROR)
        self._until_idle.cancel()

    # Writing

    async def _write(self) -> None:
        """Write what there is to write; the only task that does."""
        while True:
            self._wakeup = trio.Event()
            self._fill()
            while data := self._h2.data_to_send():
                self._is_writing = True
                try:
                    with trio.fail_after(self._send_timeout):
                        await self._transport.send_all(data)
                except DISCONNECTED:
                    self._everything.cancel()
                    return
                self._is_writing = False
                self._written.unpark_all()
                self._fill()
            self._written.unpark_all()
            await self._wakeup.wait()

    def _fill(self) -> None:
        """Encode what the windows allow, a frame of each stream in turn, up to what one write joins."""
        size, progress = 0, True
        while progress and size < MAX_WRITE:
            progress = False
            for number in list(self._ready):
                outgoing = self._ready.pop(number)
                sent = self._send_frame(number, outgoing)
                if outgoing.is_open and (outgoing.buffer or outgoing.ends):
                    self._ready[number] = outgoing
                size, progress = size + sent, progress or sent > 0
                if size >= MAX_WRITE:
                    break

    def _send_frame(self, number: int, outgoing: _Outgoing) -> int:
        """Encode one frame of a stream; returns how many bytes of it that was."""
        try:
            window = self._h2.local_flow_control_window(number)
            size = max(0, min(window, self._h2.max_outbound_frame_size, len(outgoing.buffer)))
            is_end = outgoing.ends and size == len(outgoing.buffer)
            if size or is_end:
                self._h2.send_data(number, bytes(outgoing.buffer[:size]), end_stream=is_end)
                del outgoing.buffer[:size]
        except ProtocolError:
            size, is_end = 0, True  # it is reset, or cannot go on
            self._reset(number, ErrorCodes.INTERNAL_ERROR)
        if is_end:
            outgoing.is_open = False
        if size or is_end:
            outgoing.changed.unpark_all()
        return size

    def queue(self, number: int, data: bytes, *, ends: bool = False, may_drop: bool = False) -> None:
        """Send a part of a response when its window allows, without waiting for that.

        Args:
            number: of the stream.
            data: what follows.
            ends: nothing follows after it.
            may_drop: do nothing if the client does not read.
        """
        outgoing = self._outgoing.get(number)
        if outgoing is None or outgoing.ends or (may_drop and outgoing.is_full):
            return
        outgoing.buffer += data
        outgoing.ends = ends
        self._ready[number] = outgoing
        self._wakeup.set()

    async def send(self, event: Event) -> None:
        """Send an event of one of Hypercorn's streams, and wait until more can be sent."""
        number = event.stream_id
        if (outgoing := self._outgoing.get(number)) is None:
            return
        match event:
            case Response() | InformationalResponse():
                self._send_head(number, event)
            case Body() | Data():
                for at in range(0, len(event.data), HIGH_WATER):
                    self.queue(number, event.data[at : at + HIGH_WATER])
                    await self._wait_for_window(number, outgoing)
            case EndBody() | EndData():
                self.queue(number, b"", ends=True)
                await self._wait_for_window(number, outgoing)
            case StreamClosed():
                # Cancelled here is only a connection that ends: thousands of resets are not written any more.
                if trio.current_effective_deadline() > -math.inf:
                    await self._end_stream(number)

    async def _wait_for_window(self, number: int, outgoing: _Outgoing) -> None:
        """Wait until more can be sent, or the end has been; a stream that stalls is reset."""
        while outgoing.is_open and (outgoing.is_full or outgoing.ends):
            with trio.move_on_after(self._send_timeout) as scope:
                await outgoing.changed.park()
            if scope.cancelled_caught:
                await self._end_stream(number)

    def _send_head(self, number: int, event: Response | InformationalResponse) -> None:
        if self._h2.state_machine.state is H2State.CLOSED:
            return  # by an error of the client
        status = (b":status", b"%d" % event.status_code)
        try:
            self._h2.send_headers(number, [status, *event.headers, *self._config.response_headers("h2")])
        except StreamClosedError:
            return  # its client has reset it, and ``_handle`` is about to read that
        except ProtocolError as error:
            # It may have been raised in the middle of the header block.
            log.error("the head of a response cannot be sent: %s", error)
            self._fail()
        self._wakeup.set()

    async def _end_stream(self, number: int) -> None:
        """Forget a stream, and reset it if its response is not complete."""
        if (outgoing := self._outgoing.pop(number, None)) is not None:
            self._ready.pop(number, None)
            while outgoing.is_open and self._send_frame(number, outgoing):
                pass
            if outgoing.is_open:
                outgoing.is_open = False
                outgoing.changed.unpark_all()
                self._reset(number, ErrorCodes.INTERNAL_ERROR)
            self._wakeup.set()
        if (body := self._bodies.pop(number, None)) is not None:
            body.close()
        if (stream := self._streams.pop(number, None)) is not None:
            self._update_idle()
            await stream.handle(StreamClosed(stream_id=number))

    def _reset(self, number: int, code: ErrorCodes) -> None:
        with suppress(ProtocolError):  # its client has reset it already
            self._h2.reset_stream(number, code)
        self._wakeup.set()

    # Reading

    async def _read(self) -> bool:
        """Read to the end of the connection; returns whether the client is still there."""
        while not self._is_over:
            try:
                data = await self._receive()
            except trio.TooSlowError:
                self._is_over = True
                self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
                return True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            if not data:
                return False
            await self._decode(bytes(data))
            self._wakeup.set()
            # Not faster than the client reads what it causes to be written.
            if self._is_writing:
                await self._written.park()
        return True

    async def _receive(self) -> bytes | bytearray:
        """Receive; raises TooSlowError if a head that has begun is not complete in time."""
        if not self._h2.waits_for_head:
            self._head_deadline = math.inf
            return await self._transport.receive_some(READ)
        if self._head_deadline == math.inf:
            self._head_deadline = trio.current_time() + self._request_timeout
        with trio.fail_at(self._head_deadline):
            return await self._transport.receive_some(READ)

    async def _decode(self, data: bytes) -> None:
        """Handle what the client has sent, a few frames at a time."""
        for at in range(0, len(data), DECODE):
            if at:
                await trio.lowlevel.checkpoint()
            try:
                events = self._h2.receive_data(data[at : at + DECODE])
            except ProtocolError:
                self._is_over = True  # h2 has encoded the GOAWAY that says why
                return
            for event in events:
                await self._handle(event)
            if self._is_over:
                return

    async def _handle(self, event: H2Event) -> None:
        match event:
            case RequestReceived(stream_id=number, headers=headers):
                await self._open(number, headers)
            case DataReceived(stream_id=number, data=data, flow_controlled_length=length):
                self._release_connection(length)
                if (body := self._bodies.get(number)) is not None:
                    body.append(data, length)
                    return
                if (stream := self._streams.get(number)) is not None:
                    await stream.handle(Body(stream_id=number, data=data))
                self._release(number, length)
            case StreamEnded(stream_id=number):
                if (body := self._bodies.get(number)) is not None:
                    body.end()
                elif (stream := self._streams.get(number)) is not None:
                    await stream.handle(EndBody(stream_id=number))
            case StreamReset(stream_id=number):
                await self._end_stream(number)
            case RemoteSettingsChanged():
                encoder = self._h2.encoder
                if encoder.header_table_size > MAX_TABLE:
                    encoder.header_table_size = MAX_TABLE
            case ConnectionTerminated(error_code=ErrorCodes.NO_ERROR):
                self.stop()
            case ConnectionTerminated():
                self._is_over = True

    def _release(self, number: int, size: int) -> None:
        """Let the client send more of a request."""
        with suppress(ProtocolError, KeyError):  # the stream has ended
            if size:
                self._h2.increment_flow_control_window(size, number)
                self._wakeup.set()

    def _release_connection(self, size: int) -> None:
        """Let the client send more, of whatever stream: the window of each bounds what waits."""
        self._unreleased += size
        if self._unreleased >= HIGH_WATER:
            with suppress(ProtocolError):  # the connection has failed meanwhile
                self._h2.increment_flow_control_window(self._unreleased)
            self._unreleased = 0

    async def _open(self, number: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin to serve a request."""
        if self._is_stopping:
            self._reset(number, ErrorCodes.REFUSED_STREAM)
            return
        try:
            fields = dict(validate_headers(headers, _REQUEST))
        except ProtocolError:
            fields = {}
        method, path = fields.get(b":method", b""), fields.get(b":path", b"")
        is_socket = method == b"CONNECT"
        if (
            not _METHOD.fullmatch(method)
            or not _PATH.fullmatch(path)
            or (is_socket and fields.get(b":protocol") != b"websocket")
        ):
            self._reset(number, ErrorCodes.PROTOCOL_ERROR)
            return
        arguments: tuple[Any, ...] = (
            *(self._config, self._worker, self._group, False),
            *_addresses(self._transport),
            *(self.send, number),
        )
        stream: HTTPStream | WebSocketStream
        if is_socket:
            stream = WebSocketStream(self.queue, self._app, *arguments)
        else:
            body = self._bodies[number] = RequestBody(partial(self._release, number))
            app: Any = _AppWithBody(self._app, body)  # which only ``_TaskGroup`` uses
            stream = HTTPStream(app, *arguments)
        self._streams[number] = stream
        self._outgoing[number] = _Outgoing()
        self._update_idle()
        await stream.handle(
            Request(
                stream_id=number,
                headers=filter_pseudo_headers(headers),
                http_version="2",
                method=method.decode("ascii").upper(),
                raw_path=path,
                state=ConnectionState({}),
            )
        )


def _addresses(transport: Transport) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Return the addresses of client and server; None if the stream is no socket, or is reset already."""
    try:
        socket = transport.socket
        names = socket.getpeername(), socket.getsockname()
    except (AttributeError, OSError):
        return None, None
    port = names[0][1] if isinstance(names[0], tuple) else 0
    return transport.client or (transport.peer, port), parse_socket_addr(socket.family, names[1])
