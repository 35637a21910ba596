"""One HTTP/2 connection (RFC 9113): h2 is the protocol.

Event streams are served here as those over HTTP/1.1 are, all other requests by Hypercorn's streams. Hypercorn
has a connection of its own, with the defects that ``tests/test_workarounds.py`` reproduces.

- What a request does wrong ends its stream, not the connection (RFC 9113, section 8.1.1).
- The reader waits for no application: the windows of the other streams are read by it, too.
- The client chooses the size of the compression's table, but no more than ``MAX_TABLE`` of it are used: it
  is searched for every header field of a response.
- A server that stops says so twice: first that the client is to send no more requests here, and when those
  that were on their way have arrived, which is the last that is served (RFC 9113, section 6.8).
- With the connection ends all that belongs to it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import trio
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.events import Event as H2Event
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from h2.utilities import HeaderValidationFlags, validate_headers
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper

from ..live.transport import DISCONNECTED, LINGER, Transport
from .drain import HEAD_TIME
from .http2_frames import DataFrames, FrameCountingConnection
from .http2_output import HIGH_WATER, Outgoing, Output
from .http2_requests import AppRequests, RequestTasks
from .http2_stream import EventStreamTransport

__all__ = ["FindEventStream", "Http2Connection"]

log = logging.getLogger(__name__)

# At the level debug it logs every header, and so tokens and tickets.
logging.getLogger("hpack").setLevel(logging.INFO)

READ = 16 * 1024
DECODE = 2048  # bytes; as many frames as they hold are decoded without letting other tasks run
MAX_TABLE = 4096  # bytes of the header compression's dynamic table
GRACE = 0.2  # seconds from the begin of a drain to GOAWAY
LAST_STREAM = 2**31 - 1  # the highest number of a stream
PING = b"goodbye."  # is sent with the first GOAWAY; its answer says that what was on its way has arrived

_REQUEST = HeaderValidationFlags(
    is_client=False, is_trailer=False, is_response_header=False, is_push_promise=False
)
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH = re.compile(rb"/[\x21-\x3e\x40-\x7e]*(\?.*)?|\*", re.DOTALL)

_Fields = list[tuple[bytes, bytes]]

# From a method, a target, header fields and a transport to what serves an event stream; None: it is none.
FindEventStream = Callable[
    [bytes, bytes, _Fields, Transport], Callable[[EventStreamTransport], Coroutine[Any, Any, None]] | None
]


class Http2Connection:
    """Serves one connection over a transport.

    Args:
        app, config, worker: Hypercorn's; every request that is no event stream becomes a call of the
            application.
        find_event_stream: returns what serves an event stream.
        frames: what all connections share.
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
        find_event_stream: FindEventStream,
        frames: DataFrames,
        transport: Transport,
        *,
        keep_alive: float,
        request_timeout: float,
        send_timeout: float,
    ) -> None:
        self._find_event_stream = find_event_stream
        self._transport = transport
        self._keep_alive = keep_alive
        self._request_timeout = request_timeout
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
        self._tasks = RequestTasks()
        self._until_idle = trio.CancelScope()  # its deadline is that of an idle connection
        self._everything = trio.CancelScope()
        self._output = Output(self._h2, transport, frames, self._until_idle.cancel, send_timeout=send_timeout)
        self._requests = AppRequests(
            *(app, config, worker, self._tasks, transport, self._output),
            release=self._release,
            end=self._end_stream,
        )
        self._open_streams: set[int] = set()
        self._unreleased = 0  # bytes of the connection's window
        self._is_serving = False
        self._head_deadline = math.inf  # of the head that is incomplete
        self._is_draining = False  # the client has been told to send no more requests
        self._is_last_known = False  # it has been told which is the last
        self._is_stopping = False  # requests are refused

    async def serve(self) -> None:
        """Serve the connection to its end; whoever calls this closes the transport."""
        self._h2.initiate_connection()
        with self._everything:
            async with self._tasks:
                try:
                    await self._serve()
                finally:
                    self._is_serving = False
                    self._everything.cancel()
                    self._output.close()

    async def _serve(self) -> None:
        self._is_serving = True
        self._tasks.spawn(self._write)
        if self._is_draining:
            self._tasks.spawn(self._announce_end)
        self._update_idle()
        is_connected = True
        with self._until_idle:
            is_connected = await self._read()
        if is_connected:
            await self._close()

    async def _write(self) -> None:
        await self._output.run()
        self._everything.cancel()

    def drain(self) -> None:
        """Close the connection after the requests that it has, and tell the client to send no more."""
        if not self._is_draining:
            self._is_draining = True
            if self._is_serving:
                self._tasks.spawn(self._announce_end)
                self._update_idle()

    async def _announce_end(self) -> None:
        # The streams that end now do so before it: some clients (h2) accept nothing after a GOAWAY.
        await trio.sleep(GRACE)
        if self._is_last_known:
            return  # without requests the connection is being closed already
        if not self._output.is_over:
            self._h2.ping(PING)
            self._h2.announce_end(LAST_STREAM)
            self._output.wake()
        await trio.sleep(HEAD_TIME)
        self._refuse_requests()

    def _refuse_requests(self) -> None:
        """Tell the client which request is the last that is served; it repeats those after it elsewhere."""
        if self._is_stopping:
            return
        if not self._output.is_over:
            self._is_last_known = True
            self._h2.announce_end(self._h2.highest_inbound_stream_id)
            self._output.wake()
        self._stop()

    def _stop(self) -> None:
        self._is_stopping = True
        self._update_idle()

    def _update_idle(self) -> None:
        """Close the connection when it is without a request for too long."""
        if self._open_streams:
            self._until_idle.deadline = math.inf
        elif self._is_stopping or self._is_draining:
            self._until_idle.cancel()
        else:
            self._until_idle.deadline = trio.current_time() + self._keep_alive

    async def _close(self) -> None:
        """Send GOAWAY, unless the client has got one, and give it the time to read it."""
        if not self._output.is_over and not self._is_last_known:
            self._is_last_known = True
            self._h2.close_connection()
        self._output.is_over = True
        await self._output.flush()
        await self._transport.aclose_lingering(LINGER)

    async def _end_stream(self, number: int, code: ErrorCodes = ErrorCodes.INTERNAL_ERROR) -> None:
        """Forget a stream, and reset it if its response is not complete."""
        self._output.forget(number, code)
        if number in self._open_streams:
            self._open_streams.discard(number)
            self._update_idle()
            await self._requests.close(number)

    async def _read(self) -> bool:
        """Read to the end of the connection; returns whether the client is still there."""
        while not self._output.is_over:
            try:
                data = await self._receive()
            except trio.TooSlowError:
                self._output.fail(ErrorCodes.ENHANCE_YOUR_CALM)
                return True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            if not data:
                return False
            await self._decode(bytes(data))
            self._output.wake()
            # Not faster than the client reads what it causes to be written.
            if self._output.is_writing:
                await self._output.written()
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
                self._output.is_over = True  # h2 has encoded the GOAWAY that says why
                return
            for event in events:
                await self._handle(event)
            if self._output.is_over:
                return

    async def _handle(self, event: H2Event) -> None:
        match event:
            case RequestReceived(stream_id=number, headers=headers):
                await self._open(number, headers)
            case DataReceived(stream_id=number, data=data, flow_controlled_length=length):
                self._release_connection(length)
                await self._requests.receive(number, data, length)
            case StreamEnded(stream_id=number):
                await self._requests.receive_end(number)
            case StreamReset(stream_id=number):
                await self._end_stream(number)
            case RemoteSettingsChanged():
                encoder = self._h2.encoder
                if encoder.header_table_size > MAX_TABLE:
                    encoder.header_table_size = MAX_TABLE
            case PingAckReceived(ping_data=data) if data == PING and self._is_draining:
                self._refuse_requests()
            case ConnectionTerminated(error_code=ErrorCodes.NO_ERROR):
                self._stop()
            case ConnectionTerminated():
                self._output.is_over = True

    def _release(self, number: int, size: int) -> None:
        """Let the client send more of a request."""
        with suppress(ProtocolError, KeyError):  # the stream has ended
            if size:
                self._h2.increment_flow_control_window(size, number)
                self._output.wake()

    def _release_connection(self, size: int) -> None:
        """Let the client send more, of whatever stream: the window of each bounds what waits."""
        self._unreleased += size
        if self._unreleased >= HIGH_WATER:
            with suppress(ProtocolError):  # the connection has failed meanwhile
                self._h2.increment_flow_control_window(self._unreleased)
            self._unreleased = 0

    async def _open(self, number: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin to serve a request."""
        # It may be closed because it was idle, before a request that has arrived together with others.
        if self._is_stopping or self._until_idle.cancel_called:
            self._output.reset(number, ErrorCodes.REFUSED_STREAM)
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
            self._output.reset(number, ErrorCodes.PROTOCOL_ERROR)
            return
        if (stream := self._h2.streams.get(number)) is None:
            return  # it has been reset, too
        self._open_streams.add(number)
        self._update_idle()
        if (serve := self._find_event_stream(method, path, headers, self._transport)) is not None:
            self._output.open(transport := EventStreamTransport(number, stream, self._output))
            self._tasks.spawn(self._serve_event_stream, serve, transport)
        else:
            await self._requests.open(Outgoing(number, stream), method, path, headers)

    async def _serve_event_stream(
        self, serve: Callable[[EventStreamTransport], Coroutine[Any, Any, None]], stream: EventStreamTransport
    ) -> None:
        try:
            with stream.scope:
                serving = serve(stream)
                del serve
                await serving
        except DISCONNECTED:
            pass
        except Exception:
            # The boundary of a stream: the others are not affected.
            log.exception("stream %d failed", stream.number)
        await self._end_stream(stream.number, ErrorCodes.CANCEL)
