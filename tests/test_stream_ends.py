"""One line at the end of each stream, on every transport: why it has ended, and its figures."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from harness import START, FaultyHarness, ServerHarness, logged
from live_harness import socket_streams
from raw_client import HANDSHAKE, request_bytes
from trio.testing import wait_all_tasks_blocked
from watch_clients import Authority, WatchClient

from sseserve import Grant
from sseserve.model import EndReason

STREAMS = ("sse", "sse over h2", "websocket", "websocket over h2", "bundle", "bundle over h2", "list")
OF_SESSIONS = STREAMS[:-1]
FIELDS = ["reason", "session_id", "transport", "dialect", "user", "seconds", "events", "bytes"]


@pytest.fixture(autouse=True)
def at_info(caplog):
    caplog.set_level(logging.INFO, "sseserve")


async def end(harness: ServerHarness, watcher: WatchClient) -> None:
    await harness.tracker.update("s", status="done")


async def delete(harness: ServerHarness, watcher: WatchClient) -> None:
    await harness.app.engine.delete("s", (await harness.tracker.get("s")).epoch)


async def leave(harness: ServerHarness, watcher: WatchClient) -> None:
    watcher.leave()


async def drain(harness: ServerHarness, watcher: WatchClient) -> None:
    harness.app.stopping.set()
    await harness.broker.visit_subscribers(lambda subscriber: subscriber.ask_to_reconnect(500))
    harness.broker.notify_all()


async def replace(harness: ServerHarness, watcher: WatchClient) -> None:
    harness.broker.resync("s")


async def fail(harness: ServerHarness, watcher: WatchClient) -> None:
    (subscriber,) = harness.broker.subscribers()
    subscriber.cut("a bug", EndReason.ERROR)


async def expire(harness: ServerHarness, watcher: WatchClient) -> None:
    await trio.sleep(1000)


async def revoke(harness: ServerHarness, watcher: WatchClient) -> None:
    response = await harness.post("/api/revocations", {"subject": "ann"}, [("Authorization", "Bearer root")])
    assert response.status == 204


CASES = [
    *((end, EndReason.ENDED, transport) for transport in OF_SESSIONS),
    *((delete, EndReason.DELETED, transport) for transport in OF_SESSIONS if "bundle" not in transport),
    # A bundle has no session left, which is its end.
    *((delete, EndReason.ENDED, transport) for transport in OF_SESSIONS if "bundle" in transport),
    *((leave, EndReason.CLIENT_LEFT, transport) for transport in STREAMS),
    *((drain, EndReason.DRAINED, transport) for transport in STREAMS),
    *((replace, EndReason.REPLACED, transport) for transport in OF_SESSIONS if "bundle" not in transport),
    *((fail, EndReason.ERROR, transport) for transport in OF_SESSIONS),
    *((expire, EndReason.EXPIRED, transport) for transport in STREAMS),
    *((revoke, EndReason.REVOKED, transport) for transport in STREAMS),
]


@pytest.mark.parametrize(
    ("act", "reason", "transport"), [pytest.param(*case, id=f"{case[2]}-{case[1]}") for case in CASES]
)
async def test_the_reason(autojump_clock, nursery, caplog, act, reason, transport):
    """The first thing that leads to the end, with the session, the user, and what was sent."""
    tokens = {"root": Grant("root", "admin"), "ann": Grant("ann", "admin", token_id="1", issued_at=START)}
    if act is expire:
        tokens["ann"] = Grant("ann", "admin", expires_at=START + 500)
    harness = ServerHarness(nursery, authenticate=Authority(**tokens).authenticate)
    await harness.tracker.update("s", progress=1)
    path = "/api/streams?session=s" if "bundle" in transport else None
    watcher = WatchClient(harness, transport, token="ann", path=path)
    nursery.start_soon(watcher.run)
    await wait_all_tasks_blocked()
    await trio.sleep(3)
    await act(harness, watcher)
    await wait_all_tasks_blocked()
    await trio.sleep(5)
    assert watcher.ended
    (line,) = logged(caplog, "stream ended")
    assert line["reason"] == reason.value
    assert [name for name in line if not name.endswith("_id") or name == "session_id"] == [
        name for name in FIELDS if name != "session_id" or transport != "list"
    ]
    assert line.get("session_id", "s") == "s"
    assert line["transport"] == ("ws" if "websocket" in transport else "sse")
    assert (line["dialect"], line["user"]) == ("sessions", "ann")
    assert line["seconds"] >= 3
    events = 1 + (reason is EndReason.ENDED)  # that of the end, or "deleted" of a bundle
    if transport == "list":
        assert line["events"] >= 2
    else:
        assert line["events"] == events
    assert line["bytes"] > 100
    assert line["request_id"] == line["correlation_id"]


async def test_the_bytes_are_those_that_the_client_has_received(autojump_clock, nursery, caplog):
    """With the head of the response, whatever the connection has served before."""
    harness = ServerHarness(nursery)
    connection = harness.connect()
    await connection.request("GET", "/health")
    await harness.tracker.update("s", progress=1)
    ids = [("X-Request-ID", "r-1"), ("X-Correlation-ID", "c-1")]
    await connection.send(request_bytes("GET", "/api/sessions/s/status/stream", headers=ids))
    await wait_all_tasks_blocked()
    await harness.tracker.update("s", status="done", message="x" * 1000)
    data = connection.buffer + await connection.read_to_end()
    (line,) = logged(caplog, "stream ended")
    assert line["bytes"] == len(data)
    assert (line["request_id"], line["correlation_id"]) == ("r-1", "c-1")


@pytest.mark.parametrize(
    ("count", "size", "reason"), [(40, 10_000, "overflow"), (2, 100_000, "send_timeout")]
)
async def test_a_client_that_reads_too_slowly(autojump_clock, nursery, caplog, count, size, reason):
    """Its buffer is full, or it takes nothing for as long as a write may take."""
    harness = ServerHarness(nursery, buffer_events=16, send_timeout=10.0)
    await harness.tracker.create("s")
    server, client = socket_streams()
    nursery.start_soon(harness.app.connections.serve, server)
    await client.send_all(request_bytes("GET", "/api/sessions/s/status/stream"))
    await wait_all_tasks_blocked()
    for _ in range(count):
        await harness.tracker.emit("s", "note", "x" * size)
        await wait_all_tasks_blocked()
    await trio.sleep(60)
    (line,) = logged(caplog, "stream ended")
    assert line["reason"] == reason
    assert 1 <= line["events"] < 8  # without those that were dropped
    assert line["bytes"] < 400_000
    await client.aclose()


async def test_an_age_and_idleness(autojump_clock, nursery, caplog):
    """Of the dialects that end streams for them."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    for path, reason, within in (
        ("/api/v1/jobs/s/events", "max_age", 3605),
        ("/api/v1/sessions/s/status/stream", "idle", 305),
    ):
        caplog.clear()
        stream = await harness.stream(path)
        await stream.read_to_end()
        await wait_all_tasks_blocked()
        (line,) = logged(caplog, "stream ended")
        assert line["reason"] == reason
        assert within - 10 <= line["seconds"] <= within


async def test_an_engine_that_cannot_say_who_may_watch(autojump_clock, nursery, caplog):
    """The client is asked to come back when it can."""
    harness = FaultyHarness(nursery)
    harness.engine.fail()
    stream = await harness.stream("/api/sessions/s/status/stream")
    await trio.sleep(1)
    harness.engine.recover()
    await stream.read_to_end()
    await wait_all_tasks_blocked()
    (line,) = logged(caplog, "stream ended")
    assert line["reason"] == "degraded"


async def test_a_websocket_that_breaks_the_protocol(autojump_clock, nursery, caplog):
    """A frame that is not masked."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    connection = harness.connect()
    await connection.send(request_bytes("GET", "/api/sessions/s/status/ws", headers=HANDSHAKE))
    await connection.read_head()
    await connection.send(b"\x81\x01a")
    await connection.stream.send_eof()
    await trio.sleep(5)
    await wait_all_tasks_blocked()
    (line,) = logged(caplog, "stream ended")
    assert line["reason"] == "protocol_error"


async def test_an_error_of_the_server(autojump_clock, nursery, caplog, monkeypatch):
    """It is logged with the ids of the stream's request, and so is the end."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)

    async def broken(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sseserve.server.streams.join", broken)
    connection = harness.connect()
    await connection.send(request_bytes("GET", "/api/sessions/s/status/stream"))
    await connection.read_to_end()
    await wait_all_tasks_blocked()
    (line,) = logged(caplog, "stream ended")
    (failure,) = logged(caplog, "connection failed")
    assert line["reason"] == "error"
    assert line["request_id"] == failure["request_id"]


async def test_cancelled_by_a_server_that_stops(nursery, caplog):
    """At the deadline of its drain: that is not the client's doing."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("s", progress=1)
    async with trio.open_nursery() as connections:
        client, server = trio.testing.memory_stream_pair()
        connections.start_soon(harness.app.connections.serve, server)
        await client.send_all(request_bytes("GET", "/api/sessions/s/status/stream"))
        await wait_all_tasks_blocked()
        harness.app.stopping.set()
        connections.cancel_scope.cancel()
    (line,) = logged(caplog, "stream ended")
    assert line["reason"] == "drained"


def test_every_reason_is_tested():
    """Those above are all there are."""
    others = {"max_age", "idle", "degraded", "protocol_error", "overflow", "send_timeout"}
    assert {case[1] for case in CASES} | others == set(EndReason)
