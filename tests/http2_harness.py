"""A server without a listener, and HTTP/2 clients that read and send only what they are told to."""

from __future__ import annotations

import math
from collections.abc import Callable

import h2.config
import h2.connection
import h2.errors
import h2.events
import trio
from trio.testing import memory_stream_pair

from sseserve.config import load
from sseserve.server.application import Application

PIECE = b"x" * 16_000


class Server:
    """A server without a listener, and how many of its connections are open."""

    def __init__(self, nursery: trio.Nursery, **settings) -> None:
        self.app = Application(load(environ={}, flags=settings), nursery, clock=trio.current_time)
        self.tracker = self.app.tracker
        self.open = 0
        self._nursery = nursery
        self._listener: Listener | None = None

    async def listen(self) -> Listener:
        """From now on serve the connections as a listener does."""
        self._listener = Listener()
        self._listener.server = self.app.listen([self._listener])
        await self._nursery.start(self._listener.run)
        return self._listener

    async def connect(self, pair: Callable = memory_stream_pair) -> Client:
        """Open a connection that speaks HTTP/2."""
        client, server = pair()
        if self._listener is not None:
            await self._listener.connections.send(server)
            return Client(client)
        self.open += 1
        self._nursery.start_soon(self._serve, server)
        return Client(client)

    async def _serve(self, stream) -> None:
        await self.app.connections.serve(stream)
        self.open -= 1


class Listener(trio.abc.Listener):
    """Accepts the streams that are put into ``connections``."""

    def __init__(self) -> None:
        self.connections, self._accepted = trio.open_memory_channel(math.inf)
        self.stopped = trio.Event()

    async def run(self, *, task_status) -> None:
        await self.server.run(task_status=task_status)
        self.stopped.set()

    async def stop(self) -> float:
        """Drain; returns how many seconds that took."""
        start = trio.current_time()
        self.server.stop()
        await self.stopped.wait()
        return trio.current_time() - start

    async def accept(self):
        return await self._accepted.receive()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class ClientConnection(h2.connection.H2Connection):
    """h2's, but after a GOAWAY its streams go on, as RFC 9113, section 6.8, has it."""

    def _receive_goaway_frame(self, frame):
        event = h2.events.ConnectionTerminated()
        event.last_stream_id = frame.last_stream_id
        return [], [event]


class Client:
    """An HTTP/2 client that reads only when it is told to, and sends what it is told to."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self.h2 = ClientConnection(
            h2.config.H2Configuration(
                header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
            )
        )
        self.h2.initiate_connection()
        self.status: dict[int, str] = {}
        self.headers: dict[int, dict[str, str]] = {}
        self.body: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.reset_with: dict[int, int] = {}
        self.goaway_after: set[int] | None = None  # the streams that had ended when GOAWAY arrived
        self.last_streams: list[int] = []  # what each GOAWAY has named

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def request(self, method: str, path: str, headers=(), *, end: bool = True) -> int:
        """Send the head of a request; returns the number of its stream."""
        head = {":method": method, ":path": path, ":scheme": "http", ":authority": "localhost"}
        return await self.send_head({**head, **dict(headers)}, end=end)

    async def websocket(self, path: str = "/api/sessions/a/status/ws", **more: str) -> int:
        """Send the opening handshake of a WebSocket (RFC 8441); returns the number of its stream."""
        if not self.h2.remote_settings.enable_connect_protocol:
            await self.flush()
            await self.read()
        head = {":method": "CONNECT", ":protocol": "websocket", ":path": path, ":scheme": "http"}
        head |= {":authority": "localhost", "sec-websocket-version": "13"} | more
        return await self.send_head(head, end=False)

    async def send_head(self, head: dict[str, str], *, end: bool) -> int:
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, list(head.items()), end_stream=end)
        self.body[number] = b""
        await self.flush()
        return number

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(number, data, end_stream=end)
        await self.flush()

    async def reset(self, number: int) -> None:
        self.h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        await self.flush()

    async def read(self) -> bool:
        """Read once; returns False at the end of the connection."""
        if not (data := await self.stream.receive_some()):
            return False
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.ResponseReceived():
                    self.headers[event.stream_id] = headers = dict(event.headers)
                    self.status[event.stream_id] = headers[":status"]
                case h2.events.DataReceived():
                    self.body[event.stream_id] += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    self.ended.add(event.stream_id)
                case h2.events.StreamReset():
                    self.ended.add(event.stream_id)
                    self.reset_with[event.stream_id] = event.error_code
                case h2.events.ConnectionTerminated():
                    self.goaway_after = set(self.ended)
                    self.last_streams.append(event.last_stream_id)
        await self.flush()
        return True

    async def until(self, condition: Callable[[], object]) -> None:
        """Read until a condition holds."""
        while not condition():
            assert await self.read(), "the connection has ended"

    async def send_body(self, number: int, pieces: int) -> int:
        """Send a body as far as the windows allow, and return how many bytes that was."""
        sent = 0
        for _ in range(pieces):
            while self.h2.local_flow_control_window(number) < len(PIECE):
                with trio.move_on_after(1) as scope:
                    await self.read()
                if scope.cancelled_caught:
                    return sent
            self.h2.send_data(number, PIECE)
            await self.flush()
            sent += len(PIECE)
        self.h2.end_stream(number)
        await self.flush()
        return sent


async def closed(server: Server) -> None:
    """Wait, in virtual time, until no connection is open."""
    while server.open:
        await trio.sleep(0.01)
