"""A dialect that the package does not have is one module and its rows in the table of routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx_sse
import msgspec
import pytest
import trio
from raw_client import HANDSHAKE, RawWebSocket, connect, request_bytes

import sseserve
from sseserve.client import watch
from sseserve.dialects import Dialect, Message
from sseserve.errors import ConfigError
from sseserve.http.auth import Action
from sseserve.http.routing import Kind, Route
from sseserve.model import Event
from sseserve.progress.rules import NewEvent, Update

# The dialect: a bakery, whose ovens count down the minutes that are left of an hour.


class OvenBody(msgspec.Struct, frozen=True):
    """What an oven sends: the minutes left, or a remark."""

    minutes_left: float | None = None
    remark: str | None = None

    def change(self, _publication: Any) -> Update | NewEvent:
        if self.minutes_left is None:
            return NewEvent("remark", self.remark)
        status = "done" if self.minutes_left == 0 else "baking"
        return Update(status=status, progress=100 * (60 - self.minutes_left) / 60)


def render(session_id: str, event: Event) -> list[Message]:
    if event.progress is None:
        return [Message(event.type, bytes(event.data))]
    minutes = round(60 * (100 - event.progress.percent) / 100)
    return [Message("oven", msgspec.json.encode({"oven": session_id, "minutes_left": minutes}))]


BAKERY = Dialect(
    name="bakery",
    render=render,
    heartbeat_interval=20.0,
    waits_for_session=True,
    event_names=frozenset({"oven"}),
)
OVEN = "/api/ovens/{id}"
ROUTES = (
    Route("POST", OVEN, "oven_publish", "Publish", Kind.PUBLISH, BAKERY, Action.PUBLISH, body=OvenBody),
    Route("GET", f"{OVEN}/stream", "oven_stream", "Watch", Kind.STREAM, BAKERY, Action.WATCH),
    Route("GET", f"{OVEN}/ws", "oven_socket", "Watch", Kind.SOCKET, BAKERY, Action.WATCH),
    Route("GET", OVEN, "oven", "Poll", dialect=BAKERY, action=Action.WATCH, handler="describe"),
    Route(
        "GET", f"{OVEN}/log", "oven_log", "History", dialect=BAKERY, action=Action.WATCH, handler="history"
    ),
)


@pytest.fixture
async def server(nursery) -> AsyncIterator[sseserve.Server]:
    async with sseserve.serve(port=0, routes=ROUTES) as server:
        yield server


@pytest.mark.parametrize("http2", [False, True])
async def test_it_is_served_over_every_transport(server, http2):
    """Publish, stream, poll and read the log in its own shapes, over both versions of HTTP."""
    options = {"http1": not http2, "http2": http2, "trust_env": False}
    async with httpx.AsyncClient(base_url=server.url, **options) as client:
        async with httpx_sse.aconnect_sse(client, "GET", "/api/ovens/o1/stream") as source:
            events = source.aiter_sse()
            for body in ({"minutes_left": 45}, {"remark": "smells good"}, {"minutes_left": 0}):
                assert (await client.post("/api/ovens/o1", json=body)).status_code == 202
            received = [(event.event, json.loads(event.data)) async for event in events if event.data]
        assert received == [
            ("oven", {"oven": "o1", "minutes_left": 45}),
            ("remark", "smells good"),
            ("oven", {"oven": "o1", "minutes_left": 0}),
        ]
        assert (await client.get("/api/ovens/o1")).json() == {"oven": "o1", "minutes_left": 0}
        page = (await client.get("/api/ovens/o1/log")).json()
        assert [event["event"] for event in page["events"]] == ["oven", "remark", "oven"]
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert set(paths[OVEN]) == {"get", "post"}


async def test_it_is_served_over_websocket(server):
    """The same messages, framed as text."""
    await server.tracker.update("o1", progress=50)
    connection = await connect(server.port)
    async with connection.stream:
        await connection.send(request_bytes("GET", "/api/ovens/o1/ws", headers=HANDSHAKE))
        assert (await connection.read_head()).status == 101
        websocket = RawWebSocket(connection)
        first = await websocket.message()
        await server.tracker.update("o1", status="done")
        last = await websocket.message()
        assert (await websocket.message())[0] == 1000
    assert [message["data"]["minutes_left"] for message in (first, last)] == [30, 0]
    assert [message["event"] for message in (first, last)] == ["oven", "oven"]


async def test_its_sessions_are_sessions_like_all_others(server):
    """What its clients publish is watched in our own dialect, under the same rules."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        await client.post("/api/ovens/o1", json={"minutes_left": 30})
        going_back = await client.post("/api/ovens/o1", json={"minutes_left": 40})
        assert going_back.json()["error"]["code"] == "invalid_progress"
        reserved = await client.post("/api/sessions/o1/events", json={"type": "oven"})
        assert reserved.status_code == 422
        invalid = await client.post("/api/ovens/o1", json={"minutes_left": "many"})
        assert invalid.status_code == 422
        received = []

        async def follow() -> None:
            async with watch(server.url, "o1") as messages:
                received.extend([(message.event, message.data["progress"]) async for message in messages])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            while not server.app.broker.count_watchers("o1"):
                await trio.lowlevel.checkpoint()
            await client.post("/api/ovens/o1", json={"minutes_left": 0})
        assert received == [("progress", 50), ("complete", 100)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Route("GET", "/api/ovens", "status", "x"), "two routes have the name 'status'"),
        (Route("GET", "/health", "oven_health", "x", handler="health"), "two routes are GET /health"),
        (Route("GET", "/api/ovens", "ovens", "x", handler="bake"), "there is no handler 'bake'"),
    ],
)
async def test_a_row_that_cannot_be_served_is_an_error_at_the_start(row, message):
    """It says which row, and what is wrong with it."""
    with pytest.raises(ConfigError, match=message):
        async with sseserve.serve(port=0, routes=[row]):
            pass
