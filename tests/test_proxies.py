"""nginx, HAProxy, Caddy and Apache httpd before a real server, with default and proper configurations."""

from __future__ import annotations

import itertools
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx
import httpx_sse
import pytest
import trio
from processes import Program, run_server
from reverse_proxies import CONFIGURATIONS, DEPLOY, Configuration, run_proxy

from sseserve.client import watch
from sseserve.http.routes import ROUTES

STREAM_PATHS = (
    "/api/sessions/{}/status/stream",
    "/api/interaction/events/{}",
    "/api/jobs/{}/events",
    "/api/v1/jobs/{}/events",
    "/api/v1/sessions/{}/status/stream",
    "/api/streams?session={}",
)
PUBLIC_NAME = "jobs.example.com"
# The shortest idle timeouts of the default configurations (HAProxy's) and of examples/deploy, in seconds.
DEFAULT_TIMEOUT, TIMEOUT = 50, 3600


class Setup(NamedTuple):
    """A proxy in front of a server: the URLs of both."""

    configuration: Configuration
    url: str
    server_url: str
    program: Program


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    # No heartbeat during a test: it could push an event out of a buffer.
    with run_server(heartbeat=300, throttle=0.000001, drain=1, allowed_hosts=PUBLIC_NAME) as url:
        yield url


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def setup(request: Any, tmp_path_factory: pytest.TempPathFactory, server_url: str) -> Iterator[Setup]:
    configuration = CONFIGURATIONS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with run_proxy(folder, configuration, server_url) as (url, program):
        yield Setup(configuration, url, server_url, program)
    assert "[error]" not in program.output, program.output


_names = map("session-{}".format, itertools.count())


@pytest.fixture
def session() -> str:
    """The id of a session of the test's own."""
    return next(_names)


def progress(client: httpx.Client, session: str, percent: int, **more: Any) -> str:
    """Publish progress; return the event's cursor."""
    body = {"progress": percent, "message": str(percent), **more}
    return client.post(f"/api/sessions/{session}/progress", json=body).raise_for_status().json()["id"]


def test_events_are_not_delayed(setup, session):
    """Each event arrives on all streams before the next one is published: none is buffered or compressed."""
    with ExitStack() as stack:
        publisher = stack.enter_context(httpx.Client(base_url=setup.server_url))
        client = stack.enter_context(httpx.Client(base_url=setup.url, timeout=10))

        def stream(path: str) -> Iterator[httpx_sse.ServerSentEvent]:
            headers = {"Accept-Encoding": "gzip"}
            source = stack.enter_context(
                httpx_sse.connect_sse(client, "GET", path.format(session), headers=headers)
            )
            assert "content-encoding" not in source.response.headers
            return source.iter_sse()

        def wait_for(events: Iterator[httpx_sse.ServerSentEvent], id_: str, text: str) -> None:
            for event in events:  # a stream begins with a snapshot
                if event.id.endswith(id_) and text in event.data:
                    return
            raise AssertionError(f"the stream has ended without {text}")

        progress(publisher, session, 1, stage="plan")
        streams = [stream(path) for path in STREAM_PATHS]
        commands = stream("/api/sessions/{}/control")
        for percent, command in ((2, "pause"), (3, "resume"), (4, "cancel")):
            cursor = progress(publisher, session, percent)
            for events in streams:
                wait_for(events, cursor, f'"message":"{percent}"')
            publisher.post(f"/api/sessions/{session}/{command}").raise_for_status()
            wait_for(commands, "", f'"{command.replace("resume", "continue")}"')


async def test_websockets_pass(setup, session):
    """Each message arrives before the next one is published, and the final one ends the stream."""
    status = setup.configuration.websocket_status
    if status is None:
        return
    async with httpx.AsyncClient(base_url=setup.server_url) as publisher:
        await publisher.post("/api/sessions", json={"session_id": session})
        if status != 101:
            headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
            url = f"{setup.url}/api/sessions/{session}/status/ws"
            assert (await publisher.get(url, headers=headers)).status_code == status
            return
        with trio.fail_after(10):
            async with watch(setup.url, session, transport="ws", retry_timeout=0) as messages:
                assert (await anext(messages)).data["status"] == "queued"
                for percent in (1, 2, 3):
                    await publisher.post(f"/api/sessions/{session}/progress", json={"progress": percent})
                    assert (await anext(messages)).data["progress"] == percent
                await publisher.post(f"/api/sessions/{session}/progress", json={"status": "done"})
                assert [message.event async for message in messages] == ["complete"]


def test_batches_pass_line_by_line(setup, session):
    """A publisher's lines are applied while it still sends, unless the proxy collects the request first."""
    with httpx.Client(base_url=setup.server_url) as client, httpx.Client(timeout=10) as watcher:
        client.post("/api/sessions", json={"session_id": session}).raise_for_status()
        stream = f"{setup.server_url}/api/sessions/{session}/status/stream"
        with httpx_sse.connect_sse(watcher, "GET", stream) as source:
            events = source.iter_sse()
            seen = [next(events).json()["progress"]]

            def lines() -> Iterator[bytes]:
                for percent in (10, 20, 30):
                    yield b'{"progress": %d}\n' % percent
                    if setup.configuration.streams_requests:
                        seen.append(next(events).json()["progress"])

            headers = {"Content-Type": "application/x-ndjson"}
            target = f"{setup.url}/api/sessions/{session}/events"
            response = client.post(target, content=lines(), headers=headers)
            assert (response.status_code, response.json()["applied"]) == (202, 3)
            if not setup.configuration.streams_requests:
                seen += [next(events).json()["progress"] for _ in range(3)]
    assert seen == [0, 10, 20, 30]


def test_resuming(setup, session):
    """Last-Event-ID reaches the server, the missed events are sent, the stream ends; after the end, 204."""
    with httpx.Client(base_url=setup.server_url) as publisher, httpx.Client(timeout=10) as client:
        cursors = [progress(publisher, session, percent) for percent in (1, 2, 3)]
        cursors.append(progress(publisher, session, 100, status="done"))
        stream = f"{setup.url}/api/sessions/{session}/status/stream"
        with httpx_sse.connect_sse(client, "GET", stream, headers={"Last-Event-ID": cursors[0]}) as source:
            resume, *events = source.iter_sse()
        assert (resume.event, resume.json()) == ("resume", {"status": "ok", "missed": 0})
        assert [event.id for event in events] == cursors[1:]
        for _ in range(2):  # no proxy keeps it
            assert client.get(stream, headers={"Last-Event-ID": cursors[-1]}).status_code == 204


def test_names_of_the_server(setup):
    """A proxy that passes the name it was asked for needs it in ``allowed_hosts``."""
    for name, status in (
        (PUBLIC_NAME, 200),
        ("other.example", 421 if setup.configuration.passes_host else 200),
    ):
        assert httpx.get(f"{setup.url}/health", headers={"Host": name}).status_code == status


SERVER = "server sseserve 127.0.0.1:8000"
# How each proxy says whose requests it forwards: a configuration, a change of it, and the setting.
FORWARDING = {
    "nginx": ("nginx", ("", ""), "x-forwarded-for"),
    "nginx-forwarded": (
        "nginx",
        ("X-Forwarded-For $proxy_add_x_forwarded_for", 'Forwarded "$http_forwarded, for=$remote_addr"'),
        "forwarded",
    ),
    "haproxy": ("haproxy", ("", ""), "x-forwarded-for"),
    "haproxy-h2": ("haproxy-h2", ("", ""), "x-forwarded-for"),
    "haproxy-v1": ("haproxy", (SERVER, f"{SERVER} send-proxy"), "proxy-protocol"),
    "haproxy-v2": ("haproxy", (SERVER, f"{SERVER} send-proxy-v2"), "proxy-protocol"),
    "haproxy-v2-check": ("haproxy", (SERVER, f"{SERVER} send-proxy-v2 check inter 100"), "proxy-protocol"),
    "haproxy-v2-h2": ("haproxy", (SERVER, f"{SERVER} send-proxy-v2 proto h2"), "proxy-protocol"),
    "caddy": ("caddy", ("", ""), "x-forwarded-for"),
    "caddy-h2": ("caddy-h2", ("", ""), "x-forwarded-for"),
    "apache": ("apache", ("", ""), "x-forwarded-for"),
}


@pytest.fixture(scope="module")
def limiting_servers() -> Iterator[dict[str, str]]:
    """Servers that limit each address, by the setting ``proxy_header``."""
    with ExitStack() as stack:
        servers = {}
        for header in ("x-forwarded-for", "forwarded", "proxy-protocol"):
            settings = {"proxy_header": header, "trusted_proxies": "127.0.0.1", "limit_loopback": "true"}
            limits = {"publish_rate": 0.001, "max_streams_per_address": 1}
            servers[header] = stack.enter_context(run_server(drain=1, **settings, **limits))
        yield servers


_hosts = itertools.count(2)


@pytest.mark.parametrize("name", FORWARDING)
def test_clients_are_limited_by_their_own_addresses(tmp_path, limiting_servers, name):
    """Two clients of one proxy are; and one that says that it is another client gains nothing by it."""
    base, change, header = FORWARDING[name]
    configuration = CONFIGURATIONS[base]
    configuration = configuration._replace(text=configuration.text.replace(*change))
    server_url = limiting_servers[header]
    forged = ({}, {"X-Forwarded-For": "192.0.2.1"}, {"Forwarded": "for=192.0.2.1"}, {"Forwarded": 'for="'})
    with run_proxy(tmp_path, configuration, server_url) as (url, program), ExitStack() as stack:
        for _ in range(2):
            # A connection for each request: nginx closes one whose request was refused before its body came.
            limits = httpx.Limits(max_keepalive_connections=0)
            transport = httpx.HTTPTransport(local_address=f"127.0.0.{next(_hosts)}", limits=limits)
            client = stack.enter_context(httpx.Client(base_url=url, transport=transport, timeout=10))

            def publish(client: httpx.Client, headers: dict[str, str]) -> int:
                response = client.post("/api/sessions/s/events", json={"type": "x"}, headers=headers)
                return response.status_code

            assert [publish(client, headers) for headers in forged] == [202, 429, 429, 429]
            stream = "/api/sessions/s/status/stream"
            stack.enter_context(client.stream("GET", stream))
            assert [client.get(stream, headers=headers).status_code for headers in forged] == [429] * 4
        assert "[error]" not in program.output, program.output
    if header != "proxy-protocol":
        # Who is no proxy is not believed either.
        transport = httpx.HTTPTransport(local_address=f"127.0.0.{next(_hosts)}")
        with httpx.Client(base_url=server_url, transport=transport) as client:
            statuses = [
                client.post("/api/sessions/s/events", json={"type": "x"}, headers=headers).status_code
                for headers in forged
            ]
        assert statuses == [202, 429, 429, 429]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_killed_server_is_seen_as_a_cut(tmp_path, name):
    """A stream that the server could not complete breaks for the client; one that it completed does not."""
    configuration = CONFIGURATIONS[name]
    with (
        Program(sys.executable, "-m", "sseserve", "serve", "--port", "0") as server,
        ExitStack() as stack,
    ):
        server_url = server.wait_for_output(r"serving at (\S+)")[1]
        url, _ = stack.enter_context(run_proxy(tmp_path, configuration, server_url))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=10))
        publisher = stack.enter_context(httpx.Client(base_url=server_url))
        progress(publisher, "s", 1)
        streams = []
        for path in STREAM_PATHS:
            source = stack.enter_context(httpx_sse.connect_sse(client, "GET", path.format("s")))
            events = source.iter_sse()
            assert next(events).id
            streams.append(events)
        server.wait(signal.SIGKILL)
        cut = [is_cut(events) for events in streams]
    if configuration.shows_cuts is not None:
        assert cut == [configuration.shows_cuts] * len(streams)


def is_cut(events: Iterator[Any]) -> bool:
    """Read to the end; return whether the response was not complete."""
    try:
        for _ in events:
            pass
    except httpx.RemoteProtocolError:
        return True
    return False


@pytest.mark.parametrize("name", ["nginx", "haproxy", "caddy", "apache"])
def test_a_restart_of_the_server(tmp_path, name):
    """A job is streamed, drained and resumed through each proxy, which forwards requests again at once."""
    engine = f"sqlite:{tmp_path / 'jobs.db'}"
    session = quote("job:7;ä[x]", safe="")  # is passed on as it is

    def start(port: int = 0) -> Program:
        command = (sys.executable, "-m", "sseserve", "serve", "--port", str(port), "--engine", engine)
        return Program(*command, SSESERVE_DRAIN="1", SSESERVE_ALLOWED_HOSTS=PUBLIC_NAME)

    with ExitStack() as stack:
        server = stack.enter_context(start())
        server_url = server.wait_for_output(r"serving at (\S+)")[1]
        url, _ = stack.enter_context(run_proxy(tmp_path, CONFIGURATIONS[name], server_url))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=10))
        stream = f"/api/sessions/{session}/status/stream"

        cursor = progress(client, session, 10)
        with client.stream("GET", stream) as response:
            lines = response.iter_lines()
            assert f"id: {cursor}" in lines
            cursor = progress(client, session, 20)
            assert f"id: {cursor}" in lines
            assert server.wait(signal.SIGTERM) == 0, server.output
            # The response is complete, and its client reconnects.
            assert [line.split(":")[0] for line in lines if line and line[0] != ":"] == ["retry"]
        assert client.get(stream).status_code in (502, 503)
        server = stack.enter_context(start(urlsplit(server_url).port))
        server.wait_for_output("serving at")
        progress(client, session, 30)
        progress(client, session, 100, status="done")
        with httpx_sse.connect_sse(client, "GET", stream, headers={"Last-Event-ID": cursor}) as source:
            seen = [(event.event, event.json().get("progress")) for event in source.iter_sse()]
        assert seen == [("resume", None), ("progress", 30), ("complete", 100)]
        assert server.wait(signal.SIGTERM) == 0, server.output


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_reload_loses_no_event(tmp_path, server_url, session, name):
    """When a proxy reloads, its old process's streams end in time; their watchers resume at the new one."""
    text = CONFIGURATIONS[name].text.replace("hard-stop-after 10s", "hard-stop-after 1s")
    with run_proxy(tmp_path, CONFIGURATIONS[name]._replace(text=text), server_url) as (url, program):
        stream = f"{url}/api/sessions/{session}/status/stream"
        seen: list[int] = []
        connections = []
        started = threading.Event()

        def watch_job() -> None:
            cursor = ""
            with httpx.Client(timeout=10) as client:
                while 200 not in seen:
                    headers = {"Last-Event-ID": cursor} if cursor else {}
                    try:
                        with httpx_sse.connect_sse(client, "GET", stream, headers=headers) as source:
                            connections.append(cursor)
                            for event in source.iter_sse():
                                cursor = event.id
                                if event.event in ("progress", "complete"):
                                    seen.append(event.json()["data"])
                                started.set()
                    except httpx.TransportError:
                        continue

        watcher = threading.Thread(target=watch_job)
        with httpx.Client(base_url=server_url) as publisher, httpx.Client(timeout=10) as client:
            progress(publisher, session, 1, data=0)
            watcher.start()
            assert started.wait(10)
            for number in range(1, 100):
                progress(publisher, session, 1, data=number)
            reload, ended = _reload(program, name)
            program.signal(reload)
            for number in range(100, 200):
                if number == 150:
                    # The new process serves requests; the old one serves its stream until it exits.
                    program.wait_for_output(ended)
                    assert client.get(f"{url}/health").status_code == 200
                progress(publisher, session, 1, data=number)
            progress(publisher, session, 100, data=200, status="done")
            watcher.join(20)
    assert not watcher.is_alive()
    assert seen == list(range(201))
    assert len(connections) == 2


def _reload(program: Program, name: str) -> tuple[int, str]:
    """Return the signal that reloads a proxy, and what it then writes when its old process has exited."""
    if name == "nginx":
        (old,) = re.findall(r"start worker process (\d+)", program.output)
        return signal.SIGHUP, rf"gracefully shutting down[\s\S]*worker process {old} exited with code 0"
    (old,) = re.findall(r"New worker \((\d+)\) forked", program.output)
    return signal.SIGUSR2, rf"[wW]orker \({old}\) exited"


def test_heartbeats_come_before_a_proxy_gives_up():
    """The heartbeats of each dialect come within the idle timeout of each proxy, default or configured."""
    longest = max(row.dialect.heartbeat_interval for row in ROUTES)
    assert longest < DEFAULT_TIMEOUT < TIMEOUT
    nginx, haproxy, caddy, apache = (
        (DEPLOY / name).read_text() for name in ("nginx.conf", "haproxy.cfg", "Caddyfile", "apache.conf")
    )
    for name in ("proxy_read", "proxy_send", "client_body"):
        assert f"{name}_timeout {TIMEOUT}s;" in nginx
    for name in ("client", "server", "tunnel"):
        assert re.search(rf"^    timeout {name} {TIMEOUT // 3600}h\b", haproxy, re.MULTILINE)
    assert "timeout " not in caddy
    assert f"TimeOut {TIMEOUT}\n" in apache
    assert f" timeout={TIMEOUT}\n" in apache
    assert "option http-no-delay" in haproxy  # without it each chunk waits up to 0.2 s for the next one
