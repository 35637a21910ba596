"""Streams, long-polls and the list while the engine is unavailable, and when it is back."""

from __future__ import annotations

import pytest
import trio
from faulty_engine import METHODS, UNREACHABLE
from harness import FaultyHarness
from http2_harness import Client
from live_harness import ParsedMessage, SocketReader, SSEReader
from raw_client import HANDSHAKE, RawConnection, request_bytes
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve import Grant
from sseserve.errors import Unauthorized
from sseserve.http.auth import Action
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

STREAM = "/api/sessions/s/status/stream"
SOCKET = "/api/sessions/s/status/ws"
LIST = "/api/streams/sessions"
TRANSPORTS = ["sse", "ws", "h2", "h2-ws"]


class Watcher:
    """A client that reads all that it gets, over a transport; ``received`` are the messages so far."""

    def __init__(self, harness: FaultyHarness, transport: str = "sse") -> None:
        self.received: list[ParsedMessage] = []
        self.status: int | None = None
        self.ended = False
        self.reader = SocketReader() if transport.endswith("ws") else SSEReader()
        self._harness = harness
        self._transport = transport
        self._scope = trio.CancelScope()

    @property
    def names(self) -> list[str | None]:
        return [message.event for message in self.received]

    @property
    def cursor(self) -> str:
        return self.reader.cursor

    def take(self) -> list[str | None]:
        """The names of the messages since the last call; those of the list's server are left out."""
        names, self.received = self.names, []
        return [name for name in names if name != "server"]

    async def run(self, target: str, cursor: str | None, *, task_status: trio.TaskStatus[None]) -> None:
        client, server = memory_stream_pair()
        self._harness.app.nursery.start_soon(self._harness.app.connections.serve, server)
        task_status.started()
        with self._scope:
            async with client:
                if self._transport.startswith("h2"):
                    await self._run_http2(Client(client), target, cursor)
                else:
                    await self._run_http1(RawConnection(client), target, cursor)
        self.ended = True

    async def _run_http1(self, connection: RawConnection, target: str, cursor: str | None) -> None:
        headers = list(HANDSHAKE) if self._transport == "ws" else []
        headers += [] if cursor is None else [("Last-Event-ID", cursor)]
        await connection.send(request_bytes("GET", target, headers=headers))
        response = await connection.read_head()
        self.status = response.status
        if response.status in (101, 200):
            while True:
                data, connection.buffer = connection.buffer, b""
                self.received += self.reader.feed(data)
                if not await connection.receive():
                    return

    async def _run_http2(self, client: Client, target: str, cursor: str | None) -> None:
        headers = {} if cursor is None else {"last-event-id": cursor}
        if self._transport == "h2-ws":
            number = await client.websocket(target, **headers)
        else:
            number = await client.request("GET", target, headers.items())
        while number not in client.ended:
            await client.read()
            if number in client.status:
                self.status = int(client.status[number])
            data, client.body[number] = client.body[number], b""
            if self.status == 200:
                self.received += self.reader.feed(data)

    def disconnect(self) -> None:
        self._scope.cancel()


async def watch(harness, transport="sse", target=None, cursor=None) -> Watcher:
    """Start a watcher; return it when there is nothing more to read."""
    watcher = Watcher(harness, transport)
    target = target or (SOCKET if transport.endswith("ws") else STREAM)
    await harness.app.nursery.start(watcher.run, target, cursor)
    await wait_all_tasks_blocked()
    return watcher


@pytest.fixture
async def harness(nursery):
    harness = FaultyHarness(nursery, retry_ms=50)
    await harness.tracker.update("s", progress=1)
    return harness


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_streams_stay_open_and_say_so(autojump_clock, harness, transport):
    """``degraded`` with the reason, heartbeats as ever, ``restored``, and then what is published."""
    watcher = await watch(harness, transport)
    assert watcher.take() == ["progress"]
    harness.engine.fail()
    await wait_all_tasks_blocked()
    assert watcher.received == [ParsedMessage("degraded", None, {"reason": UNREACHABLE})]
    assert watcher.take() == ["degraded"]
    heartbeats = watcher.reader.heartbeats
    await trio.sleep(60)
    assert watcher.take() == []
    assert watcher.reader.heartbeats >= heartbeats + 3
    harness.engine.recover()
    await wait_all_tasks_blocked()
    assert watcher.received == [ParsedMessage("restored", None, {})]
    await harness.tracker.update("s", status="done")
    await trio.sleep(2)
    assert watcher.take() == ["restored", "complete"]
    assert watcher.ended


async def test_every_dialect_gets_named_messages_without_a_cursor(autojump_clock, harness):
    """So an EventSource without a listener for them ignores them, and keeps its last event id."""
    watchers = {}
    for route in ROUTES:
        if route.kind in (Kind.STREAM, Kind.SOCKET) and route.action is not Action.DIAGNOSE:
            transport = "ws" if route.kind is Kind.SOCKET else "sse"
            target = route.path.replace("{id}", "s") + ("?session=s" if route.path == "/api/streams" else "")
            watchers[route.name] = await watch(harness, transport, target)
    assert len(watchers) >= 9
    cursors = {name: watcher.cursor for name, watcher in watchers.items()}
    for watcher in watchers.values():
        watcher.take()
    harness.engine.fail()
    await trio.sleep(1)
    harness.engine.recover()
    await trio.sleep(5)
    for name, watcher in watchers.items():
        notices = [m for m in watcher.received if m.event not in ("server", "snapshot")]
        assert notices == [
            ParsedMessage("degraded", None, {"reason": UNREACHABLE}),
            ParsedMessage("restored", None, {}),
        ], name
        assert watcher.cursor == cursors[name]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_joins_while_nothing_can_be_stored_is_told(autojump_clock, harness, transport):
    """The log can be read, so it is sent; what is missing is that nothing will come."""
    harness.engine.fill()
    watcher = await watch(harness, transport)
    assert sorted(watcher.take()) == ["degraded", "progress"]
    harness.engine.recover()
    await wait_all_tasks_blocked()
    assert watcher.take() == ["restored"]


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
@pytest.mark.parametrize("method", ["read", "wait_followed"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_that_cannot_read_its_log_waits(autojump_clock, harness, transport, method, announced):
    """It is told why, stays open with heartbeats, and begins where its cursor is when the engine is back."""
    first = await watch(harness, transport)
    cursor = first.cursor
    first.disconnect()
    await harness.tracker.update("s", progress=2)
    harness.engine.fail([method], announced=announced)
    watcher = await watch(harness, transport, cursor=cursor)
    assert watcher.received == [ParsedMessage("degraded", None, {"reason": UNREACHABLE})]
    await trio.sleep(60)
    assert watcher.take() == ["degraded"]
    assert watcher.reader.heartbeats >= 3
    # Each attempt is an hour's at most a few thousand, and none is in a row.
    assert harness.engine.calls[method] < 150
    harness.engine.recover()
    await trio.sleep(5)
    assert watcher.take() == ["restored", "resume", "progress"]
    await harness.tracker.update("s", status="done")
    await wait_all_tasks_blocked()
    assert watcher.take() == ["complete"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_client_that_leaves_while_it_waits_is_let_go(autojump_clock, harness, transport):
    """Its subscriber is gone, and nothing reads the log for it any more."""
    harness.engine.fail(["read"])
    watcher = await watch(harness, transport)
    assert harness.broker.statistics().subscribers == 1
    watcher.disconnect()
    await trio.sleep(60)
    assert harness.broker.statistics().subscribers == 0
    calls = harness.engine.calls["read"]
    await trio.sleep(60)
    assert harness.engine.calls["read"] == calls


async def test_an_engine_that_comes_and_goes_leaves_no_wrong_notice(autojump_clock, harness):
    """Each client is told what is true when its turn comes, and nothing twice in a row."""
    watchers = [await watch(harness) for _ in range(70)]  # more than are told at once
    for watcher in watchers:
        watcher.take()
    harness.engine.fail()
    harness.engine.recover()
    await wait_all_tasks_blocked()
    assert [watcher.take() for watcher in watchers] == [[]] * 70
    harness.engine.fail()
    await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    harness.engine.recover()
    await wait_all_tasks_blocked()
    for watcher in watchers:
        assert watcher.take() in ([], ["degraded", "restored"])


async def test_streams_do_not_end_because_of_their_age_meanwhile(autojump_clock, nursery):
    """Who came back could not be served; afterwards the time counts again."""
    harness = FaultyHarness(nursery, idle_timeout=30)
    await harness.tracker.update("s", progress=1)
    watcher = await watch(harness, target="/api/v1/sessions/s/status/stream")
    harness.engine.fail()
    await trio.sleep(300)
    assert not watcher.ended
    harness.engine.recover()
    await trio.sleep(3)
    assert watcher.ended


# New streams


@pytest.mark.parametrize("transport", ["sse", "h2"])
@pytest.mark.parametrize("target", [STREAM, "/api/streams?session=s", LIST])
async def test_a_new_event_stream_is_opened_all_the_same(autojump_clock, harness, transport, target):
    """An EventSource would not come back after a 503: it is told how it is, and asked to come back."""
    harness.engine.fail()
    watcher = await watch(harness, transport, target)
    assert watcher.status == 200
    assert watcher.received[0] == ParsedMessage("degraded", None, {"reason": UNREACHABLE})
    await trio.sleep(60)
    assert watcher.take() == ["degraded"]
    harness.engine.recover()
    await trio.sleep(5)
    if target == LIST:  # who may see it does not depend on a session
        assert watcher.take() == ["snapshot", "restored"]
        return
    assert watcher.take() == ["restored"]
    assert watcher.ended
    assert b"retry: " in watcher.reader.raw.split(b"event: restored")[1]


@pytest.mark.parametrize("transport", ["ws", "h2-ws"])
async def test_a_new_websocket_is_refused(autojump_clock, harness, transport):
    """Its clients reconnect by themselves, and a status can tell them when."""
    harness.engine.fail()
    watcher = await watch(harness, transport)
    assert watcher.status == 503


async def test_a_head_request_is_refused(autojump_clock, harness):
    harness.engine.fail()
    response = await harness.request("HEAD", STREAM)
    assert (response.status, response.headers["retry-after"]) == (503, "1")


async def test_nothing_is_said_before_the_rights_are_checked(autojump_clock, nursery):
    """Without credentials 401 as ever; with them nothing of the session until they could be checked."""

    async def authenticate(request):
        if (name := request.headers.get("authorization")) is None:
            raise Unauthorized("no token")
        return Grant(name, "patient")

    harness = FaultyHarness(nursery, authenticate=authenticate)
    await harness.tracker.create("s", owner="ann")
    harness.engine.fail()
    assert (await harness.get(STREAM)).status == 401
    eve = [("Authorization", "eve")]
    paths = (STREAM, "/api/sessions/none/status/stream")
    streams = [await harness.stream(path, headers=eve) for path in paths]
    harness.engine.recover()
    received = [[message.event for message in await stream.read_to_end()] for stream in streams]
    assert received == [["degraded", "restored"]] * 2
    assert (await harness.get(STREAM, headers=eve)).status == 403


async def test_waiting_streams_take_their_slots(autojump_clock, nursery):
    harness = FaultyHarness(nursery, max_streams_per_user=2, limit_loopback=True)
    harness.engine.fail()
    for _ in range(2):
        await harness.stream(STREAM)
    assert (await harness.get(STREAM)).status == 429
    harness.engine.recover()
    await trio.sleep(5)
    assert harness.app.coordination.slots.taken == {}


@pytest.mark.parametrize("methods", [METHODS, ["read"], ["sessions"]], ids=["all", "read", "sessions"])
@pytest.mark.parametrize("target", [STREAM, "/api/streams?session=s", LIST])
async def test_waiting_streams_end_when_the_server_stops(autojump_clock, harness, target, methods):
    """At once, with a time to come back at, as all streams; whatever they wait for."""
    harness.engine.fail(methods)
    stream = await harness.stream(target)
    while (await stream.next()).event != "degraded":
        pass
    await wait_all_tasks_blocked()
    harness.app.stopping.set()
    for subscriber in harness.broker.subscribers():
        subscriber.ask_to_reconnect(1000)
    harness.broker.notify_all()
    started_at = trio.current_time()
    await stream.read_to_end()
    assert stream.retry is not None
    assert stream.connection.chunks.complete
    assert trio.current_time() - started_at <= 1


# Several sessions


async def test_a_bundle_waits_and_catches_up(autojump_clock, harness):
    """Nothing is taken for deleted because it could not be read."""
    await harness.tracker.update("t", progress=1)
    stream = await harness.stream("/api/streams?session=s&session=t")
    assert [m.event for m in await stream.take(2)] == ["progress", "progress"]
    harness.engine.fail(announced=True)
    assert (await stream.next())[:2] == ("degraded", {"reason": UNREACHABLE})
    await trio.sleep(60)
    await harness.elsewhere.update("s", progress=50)
    harness.engine.recover()
    messages = await stream.take(2)
    assert sorted((m.event, m.data.get("progress")) for m in messages) == [
        ("progress", 50.0),
        ("restored", None),
    ]
    assert stream.comments.count("heartbeat") >= 3
    await harness.tracker.update("s", status="done")
    await harness.tracker.update("t", status="done")
    assert [m.event for m in await stream.read_to_end()] == ["complete", "complete"]


@pytest.mark.parametrize("fails", ["load", "read", "wait_followed"])
async def test_a_bundle_that_cannot_begin_waits(autojump_clock, harness, fails):
    """It resumes from its cursor when the engine is back."""
    await harness.tracker.update("t", progress=1)
    target = "/api/streams?session=s&session=t"
    stream = await harness.stream(target)
    cursor = (await stream.take(2))[-1].id
    await stream.disconnect()
    await harness.tracker.update("t", progress=2)
    check = harness.app.admission._find_sessions

    async def find_sessions(watch):
        found = await check(watch)
        harness.engine.fail([fails])
        return found

    harness.app.admission._find_sessions = find_sessions
    stream = await harness.stream(target, cursor)
    first = await stream.next()
    while first.event == "resume":
        first = await stream.next()
    assert first.event == "degraded"
    await trio.sleep(30)
    harness.engine.recover()
    messages = []
    while not messages or messages[-1].event != "progress":
        messages.append(await stream.next())
    assert messages[-1].data["progress"] == 2
    assert "deleted" not in {m.event for m in stream.received}
    assert {m.data["status"] for m in stream.received if m.event == "resume"} == {"ok"}


async def test_the_list_waits_and_catches_up(autojump_clock, harness):
    """Its heartbeat, what the server is doing, goes on; the sessions come when they can be read."""
    harness.engine.fail(["sessions"])
    stream = await harness.stream(LIST)
    assert (await stream.next())[:2] == ("degraded", {"reason": UNREACHABLE})
    assert (await stream.next()).event == "server"
    await trio.sleep(30)
    harness.engine.recover()
    while (message := await stream.next()).event == "server":
        pass
    assert (message.event, message.data["total"]) == ("snapshot", 1)
    assert (await stream.next()).event == "restored"


async def test_the_list_says_so_at_once(autojump_clock, harness):
    """Also if the engine becomes unavailable just before the stream waits for changes."""
    stream = await harness.stream(LIST)
    await stream.take(2)
    count = harness.engine.memory.count

    async def fail_afterwards():
        harness.engine.memory.count = count
        harness.engine.fill()
        return await count()

    harness.engine.memory.count = fail_afterwards
    await stream.next()
    counted_at = trio.current_time()
    while (await stream.next()).event != "degraded":
        pass
    assert trio.current_time() - counted_at <= 1


# Polling


@pytest.mark.parametrize(
    "target",
    ["/api/sessions/s/events", "/api/sessions/s/status", "/api/sessions", "/api/jobs/s", "/api/v1/jobs/s"],
)
async def test_reading_is_refused_with_a_time_to_come_back(autojump_clock, harness, target):
    harness.engine.fail()
    response = await harness.get(target)
    assert (response.status, response.headers["retry-after"]) == (503, "1")
    assert (response.error["code"], response.error["message"]) == ("engine_unavailable", UNREACHABLE)
    assert 503 in {error.status for error in ROUTES.match("GET", target).route.errors}


@pytest.mark.parametrize("resource", ["events?wait=60&after=", "status?wait=60"])
async def test_a_long_poll_that_waits_ends(autojump_clock, harness, resource):
    """At once: its client is told when to ask again, instead of waiting for what cannot come."""
    cursor = (await harness.tracker.get("s")).cursor
    target = f"/api/sessions/s/{resource}" + (str(cursor) if resource.endswith("=") else "")
    responses = harness.start_get(target)
    await wait_all_tasks_blocked()
    harness.engine.fail()
    await wait_all_tasks_blocked()
    assert [(response.status, response.headers["retry-after"]) for response in responses] == [(503, "1")]


async def test_a_long_poll_goes_on_while_logs_can_be_read(autojump_clock, harness):
    cursor = (await harness.tracker.get("s")).cursor
    responses = harness.start_get(f"/api/sessions/s/events?wait=60&after={cursor}")
    await wait_all_tasks_blocked()
    harness.engine.fill()
    await trio.sleep(1)
    harness.engine.recover()
    await harness.tracker.update("s", progress=9)
    await wait_all_tasks_blocked()
    assert [len(response.json["events"]) for response in responses] == [1]


# What has changed between two reads


@pytest.mark.parametrize(
    "target",
    [
        STREAM,
        "/api/streams?session=s",
        "/api/sessions/s/status",
        "/api/sessions/s/status?wait=60",
        "/api/sessions/s/events",
        "/api/sessions/s/watchers",
        "/api/jobs/s",
    ],
)
async def test_another_owners_session_of_that_id_is_not_shown(autojump_clock, nursery, target):
    """It may have taken the place of the one for which the rights were checked, before that is read."""

    async def authenticate(request):
        return Grant(request.headers["authorization"], "patient")

    harness = FaultyHarness(nursery, authenticate=authenticate)
    await harness.tracker.create("s", owner="ann", title="hers")
    load = harness.engine.memory.load
    loads = 2 if "stream" in target else 1  # that are the checks

    async def replace_afterwards(session_id):
        nonlocal loads
        session = await load(session_id)
        if (loads := loads - 1) == 0:
            harness.engine.memory.load = load
            await harness.elsewhere.delete("s")
            await harness.elsewhere.create("s", owner="bob", title="secret")
        return session

    harness.engine.memory.load = replace_afterwards
    ann = [("Authorization", "ann")]
    if "stream" not in target:
        response = await harness.get(target, ann)
        assert (response.status, b"secret" in response.body) == (403, False)
        return
    stream = await harness.stream(target, headers=ann)
    assert [message.event for message in await stream.read_to_end()] == ["deleted"]
