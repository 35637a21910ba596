"""Other people's SSE clients: each reads event streams until they have ended for good.

A client that reconnects by itself is only told where to read. Around the others is the loop that their
documentation leaves to the user: connect again with the last ID, until the server responds with 204.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import httpx
import httpx_sse
import requests
import sseclient
import trio
from processes import ROOT, Chromium, install_node_packages
from programs import require_program, skip_without

__all__ = ["CLIENTS", "Client", "Message", "Toolbox", "is_final"]

TIMEOUT = 20  # seconds without a byte
TLS = ssl.create_default_context()  # made once: it takes longer than all the rest of a connection
GO_VERSION = (1, 22)
DEPENDENCY_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"


class Message(NamedTuple):
    """A message as a client hands it out; ``data`` is text."""

    event: str
    id: str
    data: str


Receive = Callable[[str, Message], None]  # is called with the URL and each message of it


class Client(NamedTuple):
    """A client.

    ``read`` returns when each stream has ended for good. ``needs`` makes what it reads with, and skips the
    test if that cannot be made. ``avoid`` matches the end of what a client has got where a cut would make it
    lose or repeat an event whatever a server does. ``ends_with_204``: it connects again after the end of a
    response, and stops when the server responds with 204.
    """

    read: Callable[[Toolbox, list[str], Receive], Awaitable[None]]
    needs: Callable[[Toolbox], object] = attrgetter("folder")
    avoid: re.Pattern[bytes] | None = None
    ends_with_204: bool = True


def is_final(message: Message) -> bool:
    """Whether a message is the final one of a session."""
    return message.event in ("complete", "job-completed") or (
        message.event == "message" and json.loads(message.data)["status"] == "completed"
    )


class Toolbox:
    """What the clients are built with, each part when it is first used. ``folder`` is for its files."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    @cached_property
    def curl(self) -> str:
        return require_program("curl")

    @cached_property
    def node_modules(self) -> Path:
        folder = self.folder / "npm"
        folder.mkdir()
        return install_node_packages(folder)

    @cached_property
    def chromium(self) -> Chromium:
        return self._stack.enter_context(Chromium())

    @cached_property
    def go_client(self) -> list[str | Path]:
        """The command that reads with a Go client."""
        go = skip_without("go")
        version = _run(go, "env", "GOVERSION")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < GO_VERSION:
            skip_without(f"go {GO_VERSION[0]}.{GO_VERSION[1]} or later")
        program = self.folder / "watch"
        _run(go, "build", "-buildvcs=false", "-o", program, ".", cwd=ROOT / "tests" / "go")
        return [program]

    @cached_property
    def java_client(self) -> list[str | Path]:
        """The command that reads with a Java client."""
        java, javac, maven = map(skip_without, ("java", "javac", "mvn"))
        source, jars, classes = ROOT / "tests" / "java", self.folder / "jars", self.folder / "classes"
        _run(maven, "-q", "-B", "-f", source / "pom.xml", DEPENDENCY_PLUGIN, f"-DoutputDirectory={jars}")
        checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in jars.iterdir()}
        lines = (source / "jars.sha256").read_text().splitlines()
        assert checksums == {name: checksum for checksum, name in map(str.split, lines)}
        _run(javac, "-cp", f"{jars}/*", "-d", classes, source / "Watch.java")
        return [java, "-cp", f"{jars}/*:{classes}", "Watch"]


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Python clients, and curl, in a thread for each stream


class _EndedForGood(Exception):
    """The response was 204."""


def _in_threads(connect: Callable[[str, str], Iterator[Message]]) -> Callable[..., Awaitable[None]]:
    def read_one(url: str, receive: Receive) -> None:
        cursor = ""
        while True:
            message = None
            try:
                for message in connect(url, cursor):
                    cursor = message.id or cursor
                    trio.from_thread.run_sync(receive, url, message)
                assert message is not None, "a response without a message"
                assert is_final(message), f"a cut was taken for an end: {message}"
            except _EndedForGood:
                return
            except (httpx.TransportError, requests.RequestException):
                pass

    async def read(_tools: Toolbox, urls: list[str], receive: Receive) -> None:
        async with trio.open_nursery() as nursery:
            for url in urls:
                nursery.start_soon(
                    partial(trio.to_thread.run_sync, read_one, url, receive, abandon_on_cancel=True)
                )

    return read


def _headers(cursor: str) -> dict[str, str]:
    return {"Accept": "text/event-stream"} | ({"Last-Event-ID": cursor} if cursor else {})


def _check_status(status: int) -> None:
    if status == 204:
        raise _EndedForGood
    assert status == 200


def _connect_httpx_sse(url: str, cursor: str) -> Iterator[Message]:
    with (
        httpx.Client(timeout=TIMEOUT, verify=TLS) as client,
        httpx_sse.connect_sse(client, "GET", url, headers=_headers(cursor)) as source,
    ):
        _check_status(source.response.status_code)
        for event in source.iter_sse():
            yield Message(event.event, event.id, event.data)


def _connect_sseclient_py(url: str, cursor: str) -> Iterator[Message]:
    with requests.get(url, headers=_headers(cursor), stream=True, timeout=TIMEOUT) as response:
        _check_status(response.status_code)
        for event in sseclient.SSEClient(response).events():
            yield Message(event.event, event.id or "", event.data)


def _connect_requests(url: str, cursor: str) -> Iterator[Message]:
    with requests.get(url, headers=_headers(cursor), stream=True, timeout=TIMEOUT) as response:
        _check_status(response.status_code)
        yield from _parse(line.decode() for line in response.iter_lines())


def _connect_curl(url: str, cursor: str) -> Iterator[Message]:
    headers = [word for name, value in _headers(cursor).items() for word in ("-H", f"{name}: {value}")]
    command = ["curl", "-sN", "-w", "%{stderr}%{http_code}", *headers, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield from _parse(line.decode(errors="replace").removesuffix("\n") for line in process.stdout)
        status = int(process.stderr.read())
    if process.returncode != 0:
        raise httpx.TransportError(f"curl: {process.returncode}")
    _check_status(status)


def _parse(lines: Iterable[str]) -> Iterator[Message]:
    """Read an event stream's lines as the scripts do that people write."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif fields:
            if "data" in fields:
                yield Message(fields.get("event", "message"), fields.get("id", ""), fields["data"])
            fields = {}


# Clients that are programs and write a line of JSON for each message


async def _read_by_program(command: list[str | Path], urls: list[str], receive: Receive) -> None:
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, [*command, *urls], stdout=subprocess.PIPE, capture_stderr=True)
        process = await nursery.start(run)
        rest = b""
        async for data in process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                receive(message.pop("url"), Message(**message))


async def _read_by_node(client: str, tools: Toolbox, urls: list[str], receive: Receive) -> None:
    await _read_by_program(["node", tools.node_modules.parent / "watch.mjs", client], urls, receive)


async def _read_by_go(client: str, tools: Toolbox, urls: list[str], receive: Receive) -> None:
    await _read_by_program([*tools.go_client, client], urls, receive)


async def _read_by_java(tools: Toolbox, urls: list[str], receive: Receive) -> None:
    await _read_by_program(tools.java_client, urls, receive)


# Clients in Chromium


async def _read_by_chromium(
    client: str, files: dict[str, str], tools: Toolbox, urls: list[str], receive: Receive
) -> None:
    sources = {name: (tools.node_modules / file).read_text() for name, file in files.items()}
    script = (ROOT / "tests" / "npm" / "watch-page.js").read_text()
    token = trio.lowlevel.current_trio_token()

    def scenario(page) -> None:
        def received(url: str, *message: str) -> None:
            token.run_sync_soon(receive, url, Message(*message))

        page.expose_function("received", received)
        page.goto(urls[0].rpartition("/api/")[0] + "/health")  # a page of the same origin
        page.evaluate(f"(args) => {{ {script}; start(...args); }}", [client, sources, urls])
        page.wait_for_function("window.result")
        assert page.evaluate("window.result") == "ended"

    await trio.to_thread.run_sync(lambda: tools.chromium.visit(scenario))


# All of them

NODE, GO, JAVA = map(attrgetter, ("node_modules", "go_client", "java_client"))
CHROMIUM = attrgetter("node_modules", "chromium")
POLYFILL = {"polyfill": "event-source-polyfill/src/eventsource.js"}
RECONNECTING = {"client": "reconnecting-eventsource/dist/ReconnectingEventSource.min.js"}
FETCH = {f"./{name}": f"@microsoft/fetch-event-source/lib/cjs/{name}.js" for name in ("fetch", "parse")}

CLIENTS = {
    "httpx-sse": Client(_in_threads(_connect_httpx_sse)),
    "sseclient-py": Client(_in_threads(_connect_sseclient_py)),
    "requests": Client(_in_threads(_connect_requests)),
    "curl": Client(_in_threads(_connect_curl), attrgetter("curl")),
    "eventsource": Client(partial(_read_by_node, "eventsource"), NODE),
    "launchdarkly": Client(partial(_read_by_node, "launchdarkly"), NODE),
    "EventSource": Client(partial(_read_by_chromium, "EventSource", {}), CHROMIUM),
    "event-source-polyfill": Client(partial(_read_by_chromium, "event-source-polyfill", POLYFILL), CHROMIUM),
    "reconnecting-eventsource": Client(
        partial(_read_by_chromium, "reconnecting-eventsource", RECONNECTING), CHROMIUM, ends_with_204=False
    ),
    # It takes the id as soon as it has read its line, not at the end of the message.
    "fetch-event-source": Client(
        partial(_read_by_chromium, "fetch-event-source", FETCH),
        CHROMIUM,
        avoid=re.compile(rb"\nid: [^\n]*\n\Z"),
        ends_with_204=False,
    ),
    # It hands out what it has of a message when the connection breaks, even with half an id: no cut between
    # the end of the data and the end of the message.
    "r3labs": Client(
        partial(_read_by_go, "r3labs"),
        GO,
        avoid=re.compile(rb"\ndata: [^\n]*\}(\n[^\n]*){0,2}\Z"),
        ends_with_204=False,
    ),
    "tmaxmax": Client(partial(_read_by_go, "tmaxmax"), GO),
    "okhttp-eventsource": Client(_read_by_java, JAVA, ends_with_204=False),
}
