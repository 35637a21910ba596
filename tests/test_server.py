"""The server over real loopback sockets, as its users and as hostile peers meet it."""

from __future__ import annotations

import pytest
from peers import connect, post

from sseserve.server import serve


@pytest.fixture
async def server():
    async with serve(port=0, drain=0.5) as server:
        yield server


# What publishers must not be able to do


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/api/sessions/a/events", b'{"type": "x", "data": "\xff"}'),
        ("/api/sessions/a/progress", b'{"progress": 2, "data": "\xff"}'),
        ("/api/sessions", b'{"session_id": "b", "data": "\xff"}'),
    ],
)
async def test_json_that_is_no_utf8_is_refused(server, target, body):
    """Bytes that no event stream can carry do not get into a log."""
    await server.tracker.update("a", progress=1)
    reply = await post(server.port, target, body)
    assert (reply.status, reply.error["code"]) == (400, "bad_request")
    assert [s.seq for s in await server.tracker.sessions()] == [1]


async def test_a_fan_out_that_fails_costs_only_its_watchers(server, monkeypatch, caplog):
    """If an event cannot be encoded, its watchers are cut and told; other sessions go on."""
    await server.tracker.update("bad", progress=1)
    await server.tracker.update("good", progress=1)
    bad, good = await connect(server.port), await connect(server.port)
    async with bad.stream, good.stream:
        for connection, session_id in ((bad, "bad"), (good, "good")):
            await connection.watch(session_id)
            assert (await connection.event()).event == "progress"
        (subscriber,) = [s for s in server.context.broker.subscribers() if s.topic.session_id == "bad"]
        encoding = type(subscriber.encoding)
        honest = encoding.event

        def event(self, session_id, epoch, event):
            if session_id == "bad":
                raise RuntimeError("a bug")
            return honest(self, session_id, epoch, event)

        monkeypatch.setattr(encoding, "event", event)
        await server.tracker.update("bad", progress=2)
        await server.tracker.update("good", progress=2)
        assert [e.event for e in await bad.events()] == ["overflow"]
        assert (await good.event()).event == "progress"
    assert "fan-out of session bad failed" in caplog.text
