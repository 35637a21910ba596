"""The server's clients as people use them: curl, httpx, httpx-sse, trio-websocket, and Chromium."""

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
from harness import logged
from processes import FLAGS
from programs import require_program
from raw_client import connect, get

from sseserve.server import serve

PROBLEM_LEVELS = ("WARNING", "ERROR")


@pytest.fixture
async def server():
    async with serve(port=0, drain=0.5, retry_ms=20) as server:
        yield server


def logged_problems(caplog):
    """Return the server's warnings and errors."""
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelname in PROBLEM_LEVELS and r.name.startswith("sseserve")
    ]


async def wait_for_watchers(server, count):
    """Wait until ``count`` clients watch."""
    while len(server.app.broker.subscribers()) != count:
        await trio.lowlevel.checkpoint()


async def run_job(server, count=30):
    """Wait for one watcher, emit ``count`` events, and end the session."""
    await wait_for_watchers(server, 1)
    for number in range(count):
        await server.tracker.emit("a", "x", [number, "é\u2028\n"])
    await server.tracker.update("a", status="done")


async def read_log(server):
    """Return the events of session "a"."""
    return (await get(server.port, "/api/sessions/a/events")).json["events"]


# curl


async def curl(server, *arguments, data=None):
    """Run curl on paths of the server; return its output."""
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
    """The README's tour: a stream ends with its session, over HTTP/1.1 and over HTTP/2."""
    await server.tracker.create("a")
    nursery.start_soon(run_job, server)
    output = (await curl(server, version, "-N", "/api/sessions/a/status/stream")).decode()
    assert output.startswith("retry: 20\n")
    assert output.count("\nevent: x\n") == 30
    assert output.count("\nevent: complete\n") == 1
    assert [line[4:] for line in output.split("\n") if line.startswith("id: ")] == [
        event["id"] for event in await read_log(server)
    ]
    assert logged_problems(caplog) == []


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
async def test_curl_publishes(server, version):
    """JSON as ``-d`` sends it, an idempotency key, a batch from a pipe, and an error in the common format."""
    base = "/api/sessions/a/"
    assert json.loads(await curl(server, version, "-d", '{"progress": 40}', base + "progress"))["id"]
    key = ["-H", "Idempotency-Key: k", "-d", '{"type": "x"}', base + "events"]
    assert await curl(server, version, *key) == await curl(server, version, *key)
    lines = b"".join(b'{"type": "x", "data": %d}\n' % n for n in range(5000))
    batch = ["-H", "Content-Type: application/x-ndjson", "-T", "-", "-X", "POST", base + "events"]
    assert json.loads(await curl(server, version, *batch, data=lines))["applied"] == 5000
    refused = json.loads(await curl(server, version, "-d", '{"progress": 10}', base + "progress"))
    assert refused["error"]["code"] == "invalid_progress"
    assert (await server.tracker.get("a")).seq == 5002


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
@pytest.mark.parametrize("path", ["/api/sessions", "/api/sessions/a/progress"])
async def test_curl_gets_413(server, caplog, version, path):
    """The response arrives although curl is still sending; also when it waits for 100 Continue."""
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
    assert logged_problems(caplog) == []


async def test_curl_reuses_its_connection(server):
    """A publish, a status request and a stream share one connection."""
    await curl(server, "-d", "{}", "/api/sessions/a/progress")
    base = "/api/sessions/a/"
    done = await curl(
        server,
        *("-w", "%{num_connects} ", "-o", "/dev/null", "-d", '{"progress": 5}', base + "progress"),
        *("--next", "-sS", "-w", "%{num_connects} ", "-o", "/dev/null", base + "status"),
        *(
            "--next",
            "-sS",
            "-w",
            "%{num_connects} ",
            "-o",
            "/dev/null",
            "-d",
            '{"status": "done"}',
            base + "progress",
        ),
        *("--next", "-sS", "-w", "%{num_connects}", base + "status/stream"),
    )
    assert done.startswith(b"1 0 0 retry")
    assert done.endswith(b"\n\n0")
    assert b"event: complete" in done


async def test_an_upgrade_to_http_2_is_ignored(server, caplog):
    """RFC 9113, section 3.1, has removed h2c by upgrade: such a request is served over HTTP/1.1."""
    version = ("--http2", "-o", "/dev/null", "-w", "%{http_version} %{http_code}")
    assert await curl(server, *version, "/health") == b"1.1 200"
    assert await curl(server, *version, "-d", '{"status": "done"}', "/api/sessions/a/progress") == b"1.1 202"
    assert await curl(server, *version, "/api/sessions/a/status/stream") == b"1.1 200"
    connection = await connect(server.port)
    async with connection.stream:
        for settings in ("", "!", "AAMAAABkAAQAoAAAAAIAAAAA"):
            headers = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")]
            headers += [("HTTP2-Settings", settings)]
            assert (await connection.request("GET", "/health", headers=headers)).status == 200
    assert logged_problems(caplog) == []


# httpx and httpx-sse


@pytest.mark.parametrize("http2", [False, True])
async def test_httpx_sse_gets_exactly_the_log(server, nursery, caplog, http2):
    """The parser of httpx-sse returns exactly the log, over both versions of HTTP."""
    await server.tracker.create("a")
    nursery.start_soon(run_job, server)
    events = []
    async with (
        httpx.AsyncClient(base_url=server.url, http1=not http2, http2=http2, trust_env=False) as client,
        httpx_sse.aconnect_sse(client, "GET", "/api/sessions/a/status/stream") as source,
    ):
        assert source.response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert source.response.headers["cache-control"] == "no-cache, no-transform"
        assert source.response.headers["x-request-id"]
        events += [(e.id, e.event, json.loads(e.data)) async for e in source.aiter_sse()]
    assert events == [(e["id"], e["event"], e["data"]) for e in await read_log(server)]
    assert logged_problems(caplog) == []


async def test_concurrent_requests_on_one_http_2_connection(server, caplog):
    """A stream, publishes and a long-poll share one connection."""
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
    assert logged_problems(caplog) == []


@pytest.mark.parametrize("http2", [False, True])
async def test_resuming_over_either_version_of_http(server, http2):
    """A resume event, the missed events, the end; and 204 with the cursor of the end."""
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
        assert "content-length" not in reply.headers


async def test_http_2_streams_are_asked_to_reconnect(nursery):
    """In the drain an HTTP/2 stream gets a reconnection time and a clean end."""
    async with (
        httpx.AsyncClient(http1=False, http2=True, trust_env=False) as client,
        serve(port=0, drain=20) as server,
    ):
        await server.tracker.update("a", progress=1)
        url = f"{server.url}/api/sessions/a/status/stream"
        async with client.stream("GET", url) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "event: progress"
            server.stop()
            assert [line async for line in lines][-2:] == ["", "retry: 500"]


# trio-websocket


@asynccontextmanager
async def open_websocket(server, path="a/status/ws"):
    """Open a WebSocket over our own stream: trio-websocket leaves its open if the server closes first."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream, trio.open_nursery() as nursery:
        host = f"127.0.0.1:{server.port}"
        try:
            socket = await trio_websocket.wrap_client_stream(nursery, stream, host, f"/api/sessions/{path}")
            yield socket
            await socket.aclose(1000, "enough")
        finally:
            nursery.cancel_scope.cancel()


async def read_to_end(socket):
    """Return all messages to the end, and the close code."""
    messages = []
    with suppress(trio_websocket.ConnectionClosed):
        while True:
            messages.append(json.loads(await socket.get_message()))
    return messages, socket.closed.code


async def test_trio_websocket_gets_exactly_the_log(server, nursery, caplog):
    """All events, and then close code 1000, because the session has ended."""
    await server.tracker.create("a")
    nursery.start_soon(run_job, server)
    async with open_websocket(server) as socket:
        assert await read_to_end(socket) == (await read_log(server), 1000)
    assert logged_problems(caplog) == []


async def test_trio_websocket_pings_between_messages(server, caplog):
    """Every ping gets its pong, and no message is missing."""
    await server.tracker.create("a")
    numbers = []
    async with open_websocket(server) as socket:
        assert json.loads(await socket.get_message())["event"] == "progress"

        async def publish():
            for number in range(200):
                await server.tracker.emit("a", "x", [number, "y" * (number * 5)])
                await trio.lowlevel.checkpoint()

        async def read():
            while len(numbers) < 200:
                numbers.append(json.loads(await socket.get_message())["data"][0])

        async with trio.open_nursery() as inner:
            inner.start_soon(publish)
            inner.start_soon(read)
            for _ in range(50):
                await socket.ping()
    assert numbers == list(range(200))
    await wait_for_watchers(server, 0)
    assert logged_problems(caplog) == []


async def test_trio_websocket_gets_1009(server, caplog):
    """The close code arrives although the client was still sending."""
    await server.tracker.create("a")
    async with open_websocket(server) as socket:
        with suppress(trio_websocket.ConnectionClosed):
            await socket.send_message("x" * 200_000)
        _, code = await read_to_end(socket)
        assert code == 1009
    await wait_for_watchers(server, 0)
    assert logged_problems(caplog) == []


@pytest.mark.parametrize(
    ("path", "status"), [("none/status/ws", 404), ("a/status", 200), ("a/progress", 405)]
)
async def test_trio_websocket_handshake_is_refused(server, path, status):
    """For a session that does not exist, and on paths that are no WebSocket."""
    await server.tracker.create("a")
    with pytest.raises(ExceptionGroup) as refused:
        async with open_websocket(server, path):
            raise AssertionError("the handshake was accepted")
    (error,) = refused.value.exceptions
    assert isinstance(error, trio_websocket.ConnectionRejected)
    assert (error.status_code == 404) == (status == 404)


# A browser


def browse(url, script, argument):
    """Run ``script`` on a page of ``url`` in headless Chromium; return its result."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_program("chromium"), args=FLAGS)
        try:
            page = browser.new_page()
            page.goto(url)
            return page.evaluate(script, argument)
        finally:
            browser.close()


async def run_in_browser(url, script, argument=None):
    """Call ``browse`` in a thread, so that the server keeps running."""
    require_program("chromium")
    return await trio.to_thread.run_sync(partial(browse, url, script, argument))


EVENT_SOURCE = """
url => new Promise(resolve => {
  const source = new EventSource(url), messages = [];
  let opened = 0;
  const note = event => messages.push([event.lastEventId, event.type, JSON.parse(event.data)]);
  for (const type of ["progress", "x", "complete", "resume", "warning", "message"]) {
    source.addEventListener(type, note);
  }
  source.onopen = () => opened++;
  source.onerror = async () => {
    if (source.readyState !== EventSource.CLOSED) return;
    await fetch("/health");
    resolve([messages, opened, source.readyState]);
  };
})
"""


async def test_event_source_gets_the_log_and_stops(server, nursery, caplog):
    """When its stream is cut it resumes with its cursor; at the end 204 keeps it from reconnecting."""
    caplog.set_level(logging.DEBUG, "sseserve")
    await server.tracker.create("a")

    async def job():
        await wait_for_watchers(server, 1)
        for number in range(5):
            await server.tracker.emit("a", "x", [number, "é\u2028\n"])
        for subscriber in server.app.broker.subscribers():
            subscriber.end()
        for number in range(5, 10):
            await server.tracker.emit("a", "x", [number, "é\u2028\n"])
        await wait_for_watchers(server, 1)
        await server.tracker.update("a", status="done")

    nursery.start_soon(job)
    url = f"{server.url}/api/sessions/a/status/stream"
    messages, opened, state = await run_in_browser(f"{server.url}/health", EVENT_SOURCE, url)
    assert state == 2
    assert opened == 2
    resumes = [data for _, event, data in messages if event == "resume"]
    assert resumes == [{"status": "ok", "missed": 0}]
    events = [tuple(e) for e in messages if e[1] != "resume"]
    assert events == [(e["id"], e["event"], e["data"]) for e in await read_log(server)]
    requests = [line for line in logged(caplog, "request") if line["path"] == "/api/sessions/a/status/stream"]
    assert [line["status"] for line in requests] == [200, 200, 204]
    assert all(0 <= line["ms"] < 60_000 for line in requests)
    assert logged_problems(caplog) == []


WEB_SOCKET = """
url => new Promise(resolve => {
  const socket = new WebSocket(url), messages = [];
  socket.onmessage = event => messages.push(JSON.parse(event.data));
  socket.onclose = event => resolve([messages, event.code, event.wasClean, socket.extensions]);
})
"""


async def test_browser_websocket_gets_the_log(server, nursery, caplog):
    """To a clean close, and without the extension that the browser offers."""
    await server.tracker.create("a")
    nursery.start_soon(run_job, server)
    url = server.url.replace("http", "ws") + "/api/sessions/a/status/ws"
    messages, code, clean, extensions = await run_in_browser(f"{server.url}/health", WEB_SOCKET, url)
    assert messages == await read_log(server)
    assert (code, clean, extensions) == (1000, True, "")
    assert logged_problems(caplog) == []


CROSS_ORIGIN = """
url => Promise.all([
  fetch(url + "/status").then(
    r => r.json().then(body => [body.state, r.headers.get("X-Request-ID")]), () => "blocked"),
  fetch(url + "/events", {
    method: "POST",
    headers: {"Content-Type": "application/json", "Idempotency-Key": "k"},
    body: '{"type": "x"}',
  }).then(r => r.status, () => "blocked"),
  // What a form can send without a preflight.
  fetch(url + "/events", {method: "POST", mode: "no-cors", body: '{"type": "y"}'}).then(() => "sent"),
  new Promise(resolve => {
    const source = new EventSource(url + "/status/stream", {withCredentials: true});
    source.addEventListener("progress", () => { source.close(); resolve("seen"); });
    source.onerror = () => { source.close(); resolve("blocked"); };
  }),
])
"""


@pytest.mark.parametrize("listed", [True, False])
async def test_cross_origin_page(server, listed):
    """A listed origin reads, publishes after a preflight, streams with credentials; any other is blocked."""
    origins = (server.url,) if listed else ("http://somewhere.example",)
    async with serve(port=0, drain=0.5, cors_origins=origins) as other:
        await other.tracker.update("a", progress=1)
        url = f"{other.url}/api/sessions/a"
        page = f"{server.url}/health"
        status, published, sent, streamed = await run_in_browser(page, CROSS_ORIGIN, url)
        seq = (await other.tracker.get("a")).seq
    if listed:
        assert status[0] == "running"
        assert status[1]
        assert (published, sent, streamed, seq) == (202, "sent", "seen", 3)
    else:
        assert (status, published, sent, streamed, seq) == ("blocked", "blocked", "sent", "blocked", 1)
