"""Publishers that retry, and watchers that change instance and transport, as raw bytes over any stream."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio
from raw_client import HANDSHAKE, ChunkReader, frame, request_bytes

from sseserve.sse import Decoder

from .history import TERMINAL_EVENTS, Complete, Joined, Message, Observation, Publish

__all__ = ["ConnectionEnded", "Publisher", "Recorder", "Watcher", "Wire", "request"]

Connect = Callable[[int], Awaitable["Wire"]]

ATTEMPT = 0.5  # seconds that a request may take before its publisher tries another instance
HASTE = 0.002  # or less, if it is in haste
PAUSE = 0.004  # seconds before the next attempt
POLL = 0.25  # seconds for which a server holds a poll


class ConnectionEnded(Exception):
    """The connection is over, or there was none."""


class Recorder:
    """Counts ticks, and wakes those who wait for something to be recorded."""

    def __init__(self) -> None:
        self._tick = 0
        self._lot = trio.lowlevel.ParkingLot()
        self.problems: list[str] = []

    def tick(self) -> int:
        """Return the next number, and wake who waits."""
        self._tick += 1
        self._lot.unpark_all()
        return self._tick

    async def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until a condition holds, at most ``timeout`` seconds; return whether it does."""
        with trio.move_on_after(timeout):
            while not condition():
                await self._lot.park()
        return condition()


class Wire:
    """A connection to an instance, byte by byte. What the server does wrong in HTTP raises AssertionError."""

    def __init__(self, stream: trio.abc.Stream, gate: Callable[[], Awaitable[None]] | None = None) -> None:
        self._stream = stream
        self._gate = gate
        self._chunks: ChunkReader | None = None
        self.buffer = b""

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ConnectionEnded from None

    async def more(self) -> None:
        """Read more bytes into ``buffer``."""
        if self._gate is not None:
            await self._gate()
        try:
            data = bytes(await self._stream.receive_some(65536))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ConnectionEnded from None
        if not data:
            raise ConnectionEnded
        self.buffer += data if self._chunks is None else self._chunks.feed(data)

    async def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            await self.more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the status and the headers of a response."""
        while b"\r\n\r\n" not in self.buffer:
            await self.more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            self._chunks = ChunkReader()
            self.buffer = self._chunks.feed(self.buffer)
        return int(first.split(" ")[1]), headers

    async def request(
        self, method: str, target: str, value: Any = None, headers: tuple[tuple[str, str], ...] = ()
    ) -> tuple[int, Any]:
        """Send a request; return the status and the JSON of the response."""
        body = None if value is None else json.dumps(value).encode()
        await self.send(request_bytes(method, target, body, headers))
        status, fields = await self.head()
        data = await self.exactly(int(fields.get("content-length", 0)))
        return status, json.loads(data) if data else None

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


async def request(
    connect: Connect,
    instance: int,
    method: str,
    target: str,
    value: Any = None,
    *,
    timeout: float = ATTEMPT,
    **headers: str,
) -> tuple[int, Any]:
    """Send a request on a connection of its own.

    Raises:
        ConnectionEnded: there was no complete response within ``timeout`` seconds.
    """
    with trio.move_on_after(timeout):
        wire = await connect(instance)
        try:
            fields = tuple((name.replace("_", "-"), text) for name, text in headers.items())
            return await wire.request(method, target, value, fields)
        finally:
            await wire.aclose()
    raise ConnectionEnded


class Publisher:
    """Publishes one payload after another, each until it is acknowledged or refused.

    Args:
        connect: opens a connection to an instance.
        instances: how many there are; it chooses one for each attempt.
        session_id: to publish to.
        name: begins its payloads.
        recorder: counts the ticks.
        seed: of its choices.
    """

    def __init__(
        self, connect: Connect, instances: int, session_id: str, name: str, recorder: Recorder, seed: str
    ) -> None:
        self._connect = connect
        self._instances = instances
        self._path = f"/api/sessions/{session_id}"
        self._retry_path = f"/api/v1/sessions/{session_id}/status"
        self._name = name
        self._recorder = recorder
        self._random = random.Random(seed)
        self._send, self._receive = trio.open_memory_channel[str](1000)
        self._number = 0
        self.waiting = 0
        self.patient = False  # from now on nothing is given up
        self.publishes: list[Publish] = []

    def add(self, kind: str) -> None:
        """Publish one more."""
        self.waiting += 1
        self._send.send_nowait(kind)

    async def run(self) -> None:
        """Publish what is added, one after another, for ever."""
        async for kind in self._receive:
            await self._publish(kind)
            self.waiting -= 1
            self._recorder.tick()

    async def _publish(self, kind: str) -> None:
        self._number += 1
        payload = f"{self._name}.{self._number}"
        gives_up = kind == "impatient" and not self.patient
        is_hasty = kind == "hasty"
        if kind in ("mixed", "large", "impatient", "hasty"):
            fill = "x" * self._random.choice((5000, 40_000)) if kind == "large" else ""
            kind = self._random.choice(("note", "progress"))
        else:
            fill = ""
        path, body = f"{self._path}/progress", {"message": payload, "data": {"fill": fill, "name": payload}}
        recorded = "end" if kind in ("end", "fail") else "progress"
        match kind:
            case "note":
                path, recorded = f"{self._path}/events", "note"
                body = {"type": "note", "data": {"payload": payload, "fill": fill}}
            case "end":
                body["status"] = "completed"
            case "fail":
                body["status"] = "failed"
            case "retry":
                path, body = self._retry_path, {"status": "running", "message": payload}
        began = self._recorder.tick()
        outcome, cursor = await self._attempt(path, body, payload, gives_up=gives_up, is_hasty=is_hasty)
        self.publishes.append(Publish(payload, recorded, began, self._recorder.tick(), outcome, cursor))

    async def _attempt(
        self, path: str, body: dict[str, Any], key: str, *, gives_up: bool, is_hasty: bool
    ) -> tuple[Any, str | None]:
        # Who is hasty does not wait for the response to the first attempt, and may have done it nevertheless.
        timeout = self._random.uniform(0, HASTE) if is_hasty else ATTEMPT
        while True:
            instance = self._random.randrange(self._instances)
            try:
                status, answer = await request(
                    self._connect, instance, "POST", path, body, timeout=timeout, Idempotency_Key=key
                )
            except ConnectionEnded:
                if gives_up:
                    return "in doubt", None
            else:
                if status == 202:
                    return "acknowledged", answer["id"]
                if status == 409 and answer["error"]["code"] == "session_ended":
                    return "refused", None
                if status not in (409, 503):
                    self._recorder.problems.append(f"POST {path}: {status} {answer}")
                    return "in doubt", None
            timeout = ATTEMPT
            await trio.sleep(PAUSE * self._random.uniform(0.5, 2))


class Watcher:
    """A client that watches to the end, and comes back with its cursor whenever its connection ends.

    ``seen`` is what it saw. ``place`` is its cursor.
    """

    def __init__(
        self, connect: Connect, instances: int, session_id: str, recorder: Recorder, seed: str
    ) -> None:
        self._connect = connect
        self._instances = instances
        self._path = f"/api/sessions/{session_id}"
        self._recorder = recorder
        self._random = random.Random(seed)
        self._scope = trio.CancelScope()
        self._reading = trio.Event()
        self._reading.set()
        self._present = trio.Event()
        self._present.set()
        self._next: tuple[int, str] | None = None
        self.place: str | None = None
        self.seen: list[Observation] = []

    # What happens to it

    def move(self, instance: int, transport: str) -> None:
        """Disconnect, and come back to that instance over that transport."""
        self._next = instance, transport
        self._scope.cancel()

    def stay_away(self) -> None:
        """Disconnect, until ``come_back``."""
        if self._present.is_set():
            self._present = trio.Event()
        self._scope.cancel()

    def come_back(self) -> None:
        self._present.set()

    def stall(self) -> None:
        """Read nothing more, until ``read_on``."""
        if self._reading.is_set():
            self._reading = trio.Event()

    def read_on(self) -> None:
        self._reading.set()

    # What it does

    async def run(self) -> None:
        """Watch for ever."""
        while True:
            await self._present.wait()
            instance, transport = self._next or (
                self._random.randrange(self._instances),
                self._random.choice(("sse", "ws", "poll")),
            )
            self._next = None
            with trio.CancelScope() as self._scope, suppress(ConnectionEnded):
                wire = await self._connect(instance)
                wire._gate = self._wait_while_stalled
                try:
                    await getattr(self, f"_watch_{transport}")(wire, instance)
                finally:
                    await wire.aclose()
            await trio.sleep(PAUSE * self._random.uniform(0, 2))

    async def _wait_while_stalled(self) -> None:
        await self._reading.wait()

    def _record(self, observation: Observation) -> None:
        self.seen.append(observation)
        if isinstance(observation, Message):
            self.place = observation.id or self.place
        self._recorder.tick()

    def _refused(self, status: int, answer: Any) -> None:
        # 404: deleted, and perhaps created again soon.
        if status not in (404, 503):
            self._recorder.problems.append(f"a watcher got {status} {answer}")

    async def _watch_sse(self, wire: Wire, instance: int) -> None:
        joined = Joined(self.place, "sse", self._recorder.tick(), instance)
        headers = [] if self.place is None else [("Last-Event-ID", self.place)]
        await wire.send(request_bytes("GET", f"{self._path}/status/stream", headers=headers))
        status, fields = await wire.head()
        if status == 204:
            self.seen += [joined, Complete()]
            return
        if status != 200:
            self._refused(status, await wire.exactly(int(fields["content-length"])))
            return
        self.seen.append(joined)
        decoder = Decoder()
        while True:
            data, wire.buffer = wire.buffer, b""
            for event in decoder.feed(data):
                # The decoder repeats the last id, as the standard says; ours are told apart by their names.
                name = event.event
                message = Message(name, json.loads(event.data), event.id or None)
                if message.place is None:
                    message = Message(name, message.data)
                self._record(message)
            await wire.more()

    async def _watch_ws(self, wire: Wire, instance: int) -> None:
        joined = Joined(self.place, "ws", self._recorder.tick(), instance)
        query = "" if self.place is None else f"?last_event_id={self.place}"
        await wire.send(request_bytes("GET", f"{self._path}/status/ws{query}", headers=HANDSHAKE))
        status, fields = await wire.head()
        if status != 101:
            self._refused(status, await wire.exactly(int(fields["content-length"])))
            return
        self.seen.append(joined)
        while True:
            first, size = await wire.exactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", await wire.exactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await wire.exactly(8))
            payload = await wire.exactly(size)
            if first & 0x0F == 8:
                await wire.send(frame(8, payload))
                return
            if first & 0x0F == 1:
                value = json.loads(payload)
                if value.get("event") is not None:
                    self._record(Message(value["event"], value.get("data"), value.get("id")))

    async def _watch_poll(self, wire: Wire, instance: int) -> None:
        while True:
            joined = Joined(self.place, "poll", self._recorder.tick(), instance)
            query = "" if self.place is None else f"?after={self.place}&wait={POLL}"
            status, page = await wire.request("GET", f"{self._path}/events{query}")
            if status != 200:
                self._refused(status, page)
                return
            self.seen.append(joined)
            if page["resume"] is not None:
                self._record(Message("resume", page["resume"]))
            for value in page["events"]:
                self._record(Message(value["event"], value["data"], value["id"]))
            assert self.place is None or page["next"] == self.place, (page["next"], self.place)
            if page["end"]:
                self.seen.append(Complete())
                return

    @property
    def at_end(self) -> bool:
        """Whether the last thing it got is a terminal event."""
        last = next((o for o in reversed(self.seen) if isinstance(o, Message) and o.place is not None), None)
        return last is not None and last.event in TERMINAL_EVENTS
