"""The clients that people have: curl, httpx, httpx-sse, trio-websocket, and a browser's own."""

from __future__ import annotations

import json
import logging
import os
from contextlib import asynccontextmanager, suppress
from functools import partial

import httpx
import httpx_sse
import pytest
import trio
import trio_websocket
from programs import require_program
from raw_client import get

from sseserve.server import serve

LOUD = ("WARNING", "ERROR")
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


@pytest.fixture
async def server():
    async with serve(port=0, drain=0.5, retry_ms=20) as server:
        yield server


def loud(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname in LOUD and r.name.startswith("sseserve")]


async def watched(server, count):
    """Wait until so many clients watch."""
    while len(server.app.broker.subscribers()) != count:
        await trio.lowlevel.checkpoint()


async def work(server, count=30):
    """Do a job in view of one watcher."""
    await watched(server, 1)
    for number in range(count):
        await server.tracker.emit("a", "x", [number, "é\u2028\n"])
    await server.tracker.update("a", status="done")


async def log_of(server):
    return (await get(server.port, "/api/sessions/a/events")).json["events"]


# curl


async def curl(server, *arguments, data=None):
    """Run curl on paths of the server; returns what it printed."""
    command = [require_program("curl"), "-sS"]
    command += [server.url + a if a.startswith(("/api", "/health")) else a for a in arguments]
    done = await trio.run_process(
        command,
        stdin=data or b"",
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env={**os.environ, "no_proxy": "*"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
async def test_curl_watches_to_the_end(server, nursery, caplog, version):
    """The tour of the README: a stream that ends with its session, over HTTP/1.1 and over HTTP/2."""
    await server.tracker.create("a")
    nursery.start_soon(work, server)
    said = (await curl(server, version, "-N", "/api/sessions/a/status/stream")).decode()
    assert said.startswith("retry: 20\nid: ")
    assert said.count("\nevent: x\n") == 30
    assert said.count("\nevent: complete\n") == 1
    assert [line[4:] for line in said.split("\n") if line.startswith("id: ")] == [
        event["id"] for event in await log_of(server)
    ]
    assert loud(caplog) == []


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
async def test_curl_publishes(server, version):
    """``-d`` as it comes, an idempotency key, a batch from a pipe, and an error in its shape."""
    where = "/api/sessions/a/"
    assert json.loads(await curl(server, version, "-d", '{"progress": 40}', where + "progress"))["id"]
    key = ["-H", "Idempotency-Key: k", "-d", '{"type": "x"}', where + "events"]
    assert await curl(server, version, *key) == await curl(server, version, *key)
    lines = b"".join(b'{"type": "x", "data": %d}\n' % n for n in range(5000))
    batch = ["-H", "Content-Type: application/x-ndjson", "-T", "-", "-X", "POST", where + "events"]
    assert json.loads(await curl(server, version, *batch, data=lines))["applied"] == 5000
    refused = json.loads(await curl(server, version, "-d", '{"progress": 10}', where + "progress"))
    assert refused["error"]["code"] == "invalid_progress"
    assert (await server.tracker.get("a")).seq == 5002


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
@pytest.mark.parametrize("path", ["/api/sessions", "/api/sessions/a/progress"])
async def test_curl_hears_that_its_body_is_too_big(server, caplog, version, path):
    """The answer comes through although curl is still sending; also when it waits for 100 Continue."""
    for expect in ("Expect:", "Expect: 100-continue"):
        out = await curl(
            server,
            *(version, "-w", "%{http_code}", "-H", expect, "-H", "Content-Type: application/json"),
            *("--data-binary", "@-", path),
            data=b"x" * 5_000_000,
        )
        assert out.endswith(b"413")
        assert json.loads(out[:-3])["error"]["code"] == "payload_too_large"
    assert await server.tracker.sessions() == []
    assert loud(caplog) == []


async def test_curl_asks_for_several_things_on_one_connection(server):
    """Publish, look, and then the stream: one connection for all of it."""
    await curl(server, "-d", "{}", "/api/sessions/a/progress")
    where = "/api/sessions/a/"
    done = await curl(
        server,
        *("-w", "%{num_connects} ", "-o", "/dev/null", "-d", '{"progress": 5}', where + "progress"),
        *("--next", "-sS", "-w", "%{num_connects} ", "-o", "/dev/null", where + "status"),
        *(
            "--next",
            "-sS",
            "-w",
            "%{num_connects} ",
            "-o",
            "/dev/null",
            "-d",
            '{"status": "done"}',
            where + "progress",
        ),
        *("--next", "-sS", "-w", "%{num_connects}", where + "status/stream"),
    )
    assert done.startswith(b"1 0 0 retry")
    assert done.endswith(b"\n\n0")
    assert b"event: complete" in done


async def test_an_upgrade_to_http_2_is_ignored(server):
    """RFC 9113, section 3.1, has removed h2c by upgrade: such a request is served over HTTP/1.1."""
    version = ("--http2", "-o", "/dev/null", "-w", "%{http_version} %{http_code}")
    assert await curl(server, *version, "/health") == b"1.1 200"
    assert await curl(server, *version, "-d", '{"status": "done"}', "/api/sessions/a/progress") == b"1.1 202"
    assert await curl(server, *version, "/api/sessions/a/status/stream") == b"1.1 200"


# httpx and httpx-sse


@pytest.mark.parametrize("http2", [False, True])
async def test_httpx_sse_gets_exactly_the_log(server, nursery, caplog, http2):
    """Through another implementation's parser, over both versions of HTTP."""
    await server.tracker.create("a")
    nursery.start_soon(work, server)
    found = []
    async with (
        httpx.AsyncClient(base_url=server.url, http1=not http2, http2=http2, trust_env=False) as client,
        httpx_sse.aconnect_sse(client, "GET", "/api/sessions/a/status/stream") as source,
    ):
        assert source.response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert source.response.headers["cache-control"] == "no-cache, no-transform"
        assert source.response.headers["x-request-id"]
        found += [(e.id, e.event, json.loads(e.data)) async for e in source.aiter_sse()]
    assert found == [(e["id"], e["event"], e["data"]) for e in await log_of(server)]
    assert loud(caplog) == []


async def test_one_http_2_connection_carries_everything(server, caplog):
    """A stream, publishes and a long-poll beside each other."""
    async with httpx.AsyncClient(base_url=server.url, http1=False, http2=True, trust_env=False) as client:
        cursor = (await client.post("/api/sessions/a/progress", json={"progress": 1})).json()["id"]
        async with httpx_sse.aconnect_sse(client, "GET", "/api/sessions/a/status/stream") as source:
            events = source.aiter_sse()
            assert (await anext(events)).event == "progress"
            polled = []

            async def poll():
                target = f"/api/sessions/a/events?wait=30&after={cursor}"
                polled.append((await client.get(target)).json()["events"][0]["event"])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(poll)
                while not server.app.broker._topics["a"].waiters:
                    await trio.lowlevel.checkpoint()
                await client.post("/api/sessions/a/events", json={"type": "x"})
                assert (await anext(events)).event == "x"
            assert polled == ["x"]
            assert server.app.counters.connections == 1
            await client.post("/api/sessions/a/progress", json={"status": "done"})
            assert [event.event async for event in events] == ["complete"]
        lines = b'{"type": "x"}\n{"type": ""}\n'
        headers = {"Content-Type": "application/x-ndjson"}
        reply = await client.post("/api/sessions/b/events", content=lines, headers=headers)
        assert (reply.status_code, reply.json()["error"]["line"]) == (422, 2)
        assert (await client.get("/health")).json()["connections"] == 1
    assert loud(caplog) == []


@pytest.mark.parametrize("http2", [False, True])
async def test_resuming_over_either_version_of_http(server, http2):
    """The verdict, what was missed, the end; and 204 for who has seen it."""
    ids = [(await server.tracker.emit("a", "x", n)).id for n in range(5)]
    end = (await server.tracker.update("a", status="done")).id
    async with httpx.AsyncClient(
        base_url=server.url, http1=not http2, http2=http2, trust_env=False
    ) as client:
        headers = {"Last-Event-ID": ids[2]}
        url = "/api/sessions/a/status/stream"
        async with httpx_sse.aconnect_sse(client, "GET", url, headers=headers) as source:
            events = [(event.event, event.data) async for event in source.aiter_sse()]
        assert [event for event, _ in events] == ["resume", "x", "x", "complete"]
        assert json.loads(events[0][1]) == {"status": "ok", "missed": 0}
        reply = await client.get(url, headers={"Last-Event-ID": end})
        assert (reply.status_code, reply.content) == (204, b"")
        reply = await client.get("/api/sessions/none/status/stream")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
        reply = await client.head(url)
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream")


async def test_http_2_streams_are_told_to_come_back(nursery):
    """The drain, as HTTP/2 sees it: a reconnection time and a clean end."""
    async with (
        httpx.AsyncClient(http1=False, http2=True, trust_env=False) as client,
        serve(port=0, drain=20) as server,
    ):
        await server.tracker.update("a", progress=1)
        url = f"{server.url}/api/sessions/a/status/stream"
        async with client.stream("GET", url) as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("id: ")
            server.stop()
            assert [line async for line in lines][-2:] == ["retry: 500", ""]


# trio-websocket


@asynccontextmanager
async def web_socket(server, path="a/status/ws"):
    """Open one over a stream of ours: trio-websocket does not close its own when the server was first."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream, trio.open_nursery() as nursery:
        host = f"127.0.0.1:{server.port}"
        try:
            socket = await trio_websocket.wrap_client_stream(nursery, stream, host, f"/api/sessions/{path}")
            yield socket
            await socket.aclose(1000, "enough")
        finally:
            nursery.cancel_scope.cancel()


async def rest(socket):
    """All messages to the end, and the code of the close."""
    found = []
    with suppress(trio_websocket.ConnectionClosed):
        while True:
            found.append(json.loads(await socket.get_message()))
    return found, socket.closed.code


async def test_trio_websocket_gets_exactly_the_log(server, nursery, caplog):
    """And a proper end: 1000, because the session is over."""
    await server.tracker.create("a")
    nursery.start_soon(work, server)
    async with web_socket(server) as socket:
        assert await rest(socket) == (await log_of(server), 1000)
    assert loud(caplog) == []


async def test_trio_websocket_pings_while_frames_flow(server, caplog):
    """Every ping has its pong, and no frame is missing."""
    await server.tracker.create("a")
    found = []
    async with web_socket(server) as socket:
        assert json.loads(await socket.get_message())["event"] == "progress"

        async def publish():
            for number in range(200):
                await server.tracker.emit("a", "x", [number, "y" * (number * 5)])
                await trio.lowlevel.checkpoint()

        async def read():
            while len(found) < 200:
                found.append(json.loads(await socket.get_message())["data"][0])

        async with trio.open_nursery() as inner:
            inner.start_soon(publish)
            inner.start_soon(read)
            for _ in range(50):
                await socket.ping()
    assert found == list(range(200))
    await watched(server, 0)
    assert loud(caplog) == []


async def test_trio_websocket_is_told_that_it_talks_too_much(server, caplog):
    """1009 is read although the client was still sending."""
    await server.tracker.create("a")
    async with web_socket(server) as socket:
        with suppress(trio_websocket.ConnectionClosed):
            await socket.send_message("x" * 200_000)
        _, code = await rest(socket)
        assert code == 1009
    await watched(server, 0)
    assert loud(caplog) == []


@pytest.mark.parametrize(
    ("path", "status"), [("none/status/ws", 404), ("a/status", 200), ("a/progress", 405)]
)
async def test_trio_websocket_is_refused_where_there_is_nothing(server, path, status):
    """A session that does not exist, and paths that are no sockets."""
    await server.tracker.create("a")
    with pytest.raises(ExceptionGroup) as refused:
        async with web_socket(server, path):
            raise AssertionError("it was let in")
    (error,) = refused.value.exceptions
    assert isinstance(error, trio_websocket.ConnectionRejected)
    assert (error.status_code == 404) == (status == 404)


# A browser


def browse(url, script, argument):
    """Run ``script`` on a page of ``url`` in headless Chromium; returns its result."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_program("chromium"), args=CHROMIUM)
        try:
            page = browser.new_page()
            page.goto(url)
            return page.evaluate(script, argument)
        finally:
            browser.close()


async def in_browser(url, script, argument=None):
    """In a thread of its own, so that the server goes on."""
    require_program("chromium")
    return await trio.to_thread.run_sync(partial(browse, url, script, argument))


EVENT_SOURCE = """
url => new Promise(resolve => {
  const source = new EventSource(url), found = [];
  let opened = 0;
  const note = event => found.push([event.lastEventId, event.type, JSON.parse(event.data)]);
  for (const type of ["progress", "x", "complete", "resume", "warning", "message"]) {
    source.addEventListener(type, note);
  }
  source.onopen = () => opened++;
  source.onerror = async () => {
    if (source.readyState !== EventSource.CLOSED) return;
    await fetch("/health");
    resolve([found, opened, source.readyState]);
  };
})
"""


async def test_an_event_source_gets_the_log_and_really_stops(server, nursery, caplog):
    """Cut in the middle it comes back with its cursor; at the end it is told 204, and asks no more."""
    caplog.set_level(logging.DEBUG, "sseserve")
    await server.tracker.create("a")

    async def job():
        await watched(server, 1)
        for number in range(5):
            await server.tracker.emit("a", "x", [number, "é\u2028\n"])
        for subscriber in server.app.broker.subscribers():
            subscriber.end()
        for number in range(5, 10):
            await server.tracker.emit("a", "x", [number, "é\u2028\n"])
        await watched(server, 1)
        await server.tracker.update("a", status="done")

    nursery.start_soon(job)
    url = f"{server.url}/api/sessions/a/status/stream"
    found, opened, state = await in_browser(f"{server.url}/health", EVENT_SOURCE, url)
    assert state == 2
    assert opened == 2
    resumed = [data for _, event, data in found if event == "resume"]
    assert resumed == [{"status": "ok", "missed": 0}]
    events = [tuple(e) for e in found if e[1] != "resume"]
    assert events == [(e["id"], e["event"], e["data"]) for e in await log_of(server)]
    answers = [
        r.getMessage()[-3:] for r in caplog.records if "/api/sessions/a/status/stream ->" in r.getMessage()
    ]
    assert answers == ["200", "200", "204"]
    assert loud(caplog) == []


WEB_SOCKET = """
url => new Promise(resolve => {
  const socket = new WebSocket(url), found = [];
  socket.onmessage = event => found.push(JSON.parse(event.data));
  socket.onclose = event => resolve([found, event.code, event.wasClean, socket.extensions]);
})
"""


async def test_a_browsers_web_socket_gets_the_log(server, nursery, caplog):
    """To a clean end, and without an extension, although it offers one."""
    await server.tracker.create("a")
    nursery.start_soon(work, server)
    url = server.url.replace("http", "ws") + "/api/sessions/a/status/ws"
    found, code, clean, extensions = await in_browser(f"{server.url}/health", WEB_SOCKET, url)
    assert found == await log_of(server)
    assert (code, clean, extensions) == (1000, True, "")
    assert loud(caplog) == []


ELSEWHERE = """
url => Promise.all([
  fetch(url + "/status").then(
    r => r.json().then(body => [body.state, r.headers.get("X-Request-ID")]), () => "blocked"),
  fetch(url + "/events", {
    method: "POST",
    headers: {"Content-Type": "application/json", "Idempotency-Key": "k"},
    body: '{"type": "x"}',
  }).then(r => r.status, () => "blocked"),
  new Promise(resolve => {
    const source = new EventSource(url + "/status/stream", {withCredentials: true});
    source.addEventListener("progress", () => { source.close(); resolve("seen"); });
    source.onerror = () => { source.close(); resolve("blocked"); };
  }),
])
"""


@pytest.mark.parametrize("listed", [True, False])
async def test_a_page_of_another_origin_sees_what_it_may(server, listed):
    """A listed origin reads, publishes after a preflight, streams with credentials; another one nothing."""
    origins = (server.url,) if listed else ("http://somewhere.example",)
    async with serve(port=0, drain=0.5, cors_origins=origins) as other:
        await other.tracker.update("a", progress=1)
        url = f"{other.url}/api/sessions/a"
        status, published, streamed = await in_browser(f"{server.url}/health", ELSEWHERE, url)
        seq = (await other.tracker.get("a")).seq
    if listed:
        assert status[0] == "running"
        assert status[1]
        assert (published, streamed, seq) == (202, "seen", 2)
    else:
        assert (status, published, streamed, seq) == ("blocked", "blocked", "blocked", 1)
