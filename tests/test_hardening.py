"""What an unkind client or a careless program can do, and what it must not cost the others."""

from __future__ import annotations

import socket

import httpx
import msgspec
import pytest
import trio
import trio.testing

import sseserve
from sseserve import Grant, Tracker
from sseserve.config import Settings
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import Invalid
from sseserve.http.publishing import _split_lines
from sseserve.server.listener import open_listeners


class Pieces(bytes):
    """A chunk that counts how often it is joined to something."""

    joined = 0

    def __radd__(self, other):
        Pieces.joined += len(other)
        return bytes(other) + bytes(self)


async def test_a_line_in_many_pieces_is_joined_once():
    """The unfinished part of a line is not copied anew for each of its pieces."""

    async def chunks():
        for _ in range(5000):
            yield Pieces(b"x")
        yield b"\ny"

    assert [line async for line in _split_lines(chunks(), 10_000)] == [b"x" * 5000, b"y"]
    assert Pieces.joined == 0


async def test_small_chunks_let_others_run():
    """A body of one-byte chunks, all in one read, does not keep the loop to itself."""
    async with sseserve.serve(port=0) as server:
        body = (
            b"".join(b"1\r\n%c\r\n" % c for c in b'{"type":"t","data":"' + b"x" * 5000 + b'"}') + b"0\r\n\r\n"
        )
        head = b"POST /api/sessions/a/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        turns = 0
        done = trio.Event()

        async def other():
            nonlocal turns
            while not done.is_set():
                turns += 1
                await trio.lowlevel.checkpoint()

        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream, trio.open_nursery() as nursery:
            await stream.send_all(head + body)
            before = turns
            nursery.start_soon(other)
            assert b" 202 " in await stream.receive_some()
            done.set()
        assert turns - before > 20


@pytest.mark.parametrize("depth", [33, 200])
async def test_an_error_is_not_nested_too_deep(depth):
    """What every later event carries along is shallow; a deeper one changes nothing."""
    error = {}
    for _ in range(depth):
        error = {"in": error}
    tracker = Tracker(MemoryEngine(Settings(), lambda _session, _events: None))
    await tracker.update("a", progress=1)
    with pytest.raises(Invalid, match="deep"):
        await tracker.update("a", error=error)
    assert (await tracker.get("a")).seq == 1


async def test_raw_data_of_a_program_is_looked_into():
    """What is no JSON is refused before it is in the log."""
    tracker = Tracker(MemoryEngine(Settings(), lambda _session, _events: None))
    with pytest.raises(Invalid, match="JSON"):
        await tracker.emit("a", "note", msgspec.Raw(b"{nonsense"))


async def test_deleting_by_the_tracker_tells_the_watchers():
    """A program that deletes a session in process ends its streams, and a new life begins anew."""
    async with sseserve.serve(port=0) as server:
        await server.tracker.update("a", progress=1)
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", "/api/interaction/events/a") as watching,
        ):
            chunks = watching.aiter_text()
            assert "processing" in await anext(chunks)
            await server.tracker.delete("a")
            assert "deleted" in "".join([chunk async for chunk in chunks])
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", "/api/interaction/events/a") as watching,
        ):
            await server.tracker.update("a", progress=2, status="done")
            assert "complete" in (await watching.aread()).decode()


async def test_health_keeps_session_ids_to_itself_where_rights_are_asked_for():
    """With authentication nobody learns from /health what is watched."""

    async def authenticate(_request):
        return Grant("root", "admin")

    async with (
        sseserve.serve(port=0, authenticate=authenticate) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        assert "connections_per_job" not in (await client.get("/health")).json()


async def test_a_failing_authenticate_is_answered_and_logged(caplog):
    """What goes wrong in the program's own code is a 500 at both doors, whatever it raises."""

    async def authenticate(_request):
        raise trio.BrokenResourceError("the key server is gone")

    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.update("a", progress=1)
        async with httpx.AsyncClient(base_url=server.url) as client:
            for method, path in [
                ("GET", "/api/sessions/a/status/stream"),
                ("POST", "/api/sessions/a/progress"),
                ("GET", "/api/sessions/a/status"),
            ]:
                answer = await client.request(method, path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert caplog.text.count("authenticate failed") == 3


async def test_who_comes_while_the_server_stops_is_told_to_come_back():
    """A stream that is admitted when the others have been told already ends as they do."""
    asked, go = trio.Event(), trio.Event()

    async def authenticate(_request):
        asked.set()
        await go.wait()
        return Grant("root", "admin")

    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.update("a", progress=1)
        answers = []

        async def watch():
            async with httpx.AsyncClient(base_url=server.url) as client:
                answers.append(await client.get("/api/sessions/a/status/stream"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await asked.wait()
            server.stop()
            await server.app.stopping.wait()
            go.set()
    # Not 503, which would stop an EventSource for good.
    assert answers[0].status_code == 200
    assert answers[0].text.startswith("retry: ")


async def test_connections_inherit_what_finds_dead_peers():
    """An accepted connection gives a peer up that acknowledges nothing for 30 seconds (tcp(7))."""
    (listener,) = await open_listeners("127.0.0.1", 0)
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        accepted = await listener.accept()
        async with client, accepted:
            assert accepted.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert accepted.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_a_made_up_token_is_no_other_user():
    """Where nobody looks at tokens, streams are counted by address."""
    async with sseserve.serve(port=0, max_streams_per_user=1) as server:
        await server.tracker.update("a", progress=1)
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", "/api/sessions/a/status/stream", headers={"Authorization": "1"}),
        ):
            second = await client.get("/api/sessions/a/status/stream", headers={"Authorization": "2"})
            assert second.status_code == 429


async def test_a_thousand_leases_are_looked_at_without_being_committed():
    """A lease that is not due costs no write, and the look lets others run."""
    reads = 0

    class Counting(MemoryEngine):
        async def load(self, session_id):
            nonlocal reads
            reads += 1
            return await super().load(session_id)

    tracker = Tracker(Counting(Settings(), lambda _session, _events: None), clock=lambda: 1000.0)
    for number in range(1000):
        await tracker.create(f"s{number}", lease=10)
    reads = 0
    await tracker.check_leases()
    assert reads == 0
