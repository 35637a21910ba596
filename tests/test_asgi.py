"""The ASGI application in a server of one's own: plain Hypercorn, over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

import sseserve
from sseserve.client import watch
from sseserve.config import load
from sseserve.server.application import Application


@pytest.fixture
async def mounted(nursery) -> AsyncIterator[tuple[sseserve.Server, str]]:
    """A server whose application is mounted in a Hypercorn of its own, and that one's URL."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    stop = trio.Event()
    async with sseserve.serve(port=0) as server:
        (url,) = await nursery.start(
            lambda *, task_status: hypercorn_serve(
                server.asgi_app, config, shutdown_trigger=stop.wait, mode="asgi", task_status=task_status
            )
        )
        yield server, url
        stop.set()


@pytest.mark.parametrize("transport", ["sse", "ws", "poll"])
async def test_every_transport_passes_through(mounted, nursery, transport):
    """Each message once and in order, and the same end, over each of the three transports."""
    server, url = mounted
    await server.tracker.update("a", progress=1)
    received = []

    async def follow() -> None:
        nonlocal received
        async with watch(url, "a", transport=transport) as messages:
            async for message in messages:
                received += [(message.event, message.data)]

    async with trio.open_nursery() as following:
        following.start_soon(follow)
        while not received:
            await trio.lowlevel.checkpoint()
        for number in range(20):
            await server.tracker.emit("a", "x", number)
        await server.tracker.update("a", status="done")
    assert [event for event, _ in received] == ["progress", *["x"] * 20, "complete"]
    assert [data for event, data in received if event == "x"] == list(range(20))


@pytest.mark.parametrize("http2", [False, True])
async def test_requests_are_served_as_by_our_own_listener(mounted, http2):
    """The same statuses, bodies and headers, but for the request's id and the date."""
    server, url = mounted
    requests = [
        ("POST", "/api/sessions", {"session_id": "a/b"}),
        ("POST", "/api/sessions", {"session_id": "a"}),
        ("POST", "/api/sessions/a/progress", {"progress": 5}),
        ("GET", "/api/sessions/a/status", None),
        ("GET", "/api/sessions/none/status", None),
        ("OPTIONS", "/api/sessions/a/status", None),
        ("PUT", "/api/sessions/a/status", None),
        ("HEAD", "/api/sessions/a/status/stream", None),
        ("DELETE", "/api/sessions/a", None),
        ("GET", "/nothing", None),
    ]
    async with (
        httpx.AsyncClient(base_url=url, http1=not http2, http2=http2, trust_env=False) as theirs,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as ours,
    ):
        for method, path, body in requests:
            response = await theirs.request(method, path, json=body, headers={"X-Request-ID": "r"})
            if response.is_success and method in ("POST", "DELETE"):
                continue  # it changes something, so it is sent once
            same = await ours.request(method, path, json=body, headers={"X-Request-ID": "r"})
            assert (response.status_code, response.content) == (same.status_code, same.content), path
            names = ("content-type", "allow", "etag", "cache-control", "x-request-id")
            assert [response.headers.get(n) for n in names] == [same.headers.get(n) for n in names], path


@pytest.mark.parametrize(
    ("changes", "status"), [({"path": "", "raw_path": b""}, 200), ({"headers": [(b"host", b"a..b")]}, 421)]
)
async def test_unusual_requests_are_served(autojump_clock, nursery, changes, status):
    """An empty path is that of the root; a host that cannot be a name of the DNS is refused as any other."""
    app = Application(load(environ={}), nursery)
    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.1", "version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/health",
        "raw_path": b"/health",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        **changes,
    }
    sent = []

    async def receive():
        await trio.sleep_forever()

    async def send(message):
        sent.append(message)

    await app.web(scope, receive, send)
    assert sent[0]["status"] == status


async def test_a_connection_is_closed_after_its_last_response(mounted):
    """Hypercorn closes it inside the last message, which must not be cancelled."""
    _, url = mounted
    port = int(url.rpartition(":")[2])
    for path in ("/health", "/nothing"):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            with trio.fail_after(3):  # Hypercorn's keep-alive time is 5 seconds
                while await stream.receive_some():
                    pass
