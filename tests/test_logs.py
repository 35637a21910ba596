"""The lines of the log: their fields, whose ids they have, and that nobody waits for their being written."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
import trio
from harness import ServerHarness, logged
from processes import ROOT, Program, wait_until
from raw_client import HANDSHAKE, request_bytes
from trio.testing import wait_all_tasks_blocked

from sseserve.logs import Line, begin_context, writer
from sseserve.logs.lines import JSONFormatter, TextFormatter
from sseserve.logs.writer import BackgroundHandler


def record_of(message: object, *arguments: object, **options: object) -> logging.LogRecord:
    record = logging.LogRecord("sseserve", logging.WARNING, "", 0, message, arguments, None)
    record.exc_info = options.get("exc_info")
    return record


def format_text(message: object, *arguments: object, **options: object) -> str:
    formatter = TextFormatter("%(levelname)s %(name)s: %(message)s")
    return formatter.format(record_of(message, *arguments, **options))


def format_json(message: object, *arguments: object, **options: object) -> dict:
    line = JSONFormatter(None).format(record_of(message, *arguments, **options))
    assert "\n" not in line
    return json.loads(line)


# Lines


def test_what_a_client_sends_stays_on_one_line():
    """A session's id in the path of a request may hold any characters."""
    line = format_text("No active listeners for session %s", "a\r\nERROR b\x1b[2J\x85\u2028\u00e9")
    expected = "WARNING sseserve: No active listeners for session a\\r\\nERROR b\\x1b[2J\\x85\\u2028\u00e9"
    assert line == expected


def test_a_traceback_has_lines():
    """It is after the line of its record."""
    try:
        raise ValueError("a")
    except ValueError:
        error = sys.exc_info()
    lines = format_text("failed", exc_info=error).splitlines()
    assert lines[0] == "WARNING sseserve: failed"
    assert lines[-1] == "ValueError: a"
    assert format_json("failed", exc_info=error)["exception"].splitlines()[-1] == "ValueError: a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        ("a b", '"a b"'),
        ('a"b', r'"a\"b"'),
        ("a=b", '"a=b"'),
        ("a\nb=c", r'"a\nb=c"'),
        ("", '""'),
        ("\u2028", '"\\u2028"'),
        (1.5, "1.5"),
        (3, "3"),
        (True, "true"),
    ],
)
def test_fields(value, text):
    """As text in their order, in quotes where they could be read otherwise; in JSON as members."""
    line = Line("it ended", first=value, second=None, third=3)
    assert format_text(line) == f"WARNING sseserve: it ended first={text} third=3"
    decoded = format_json(line)
    assert {name: decoded[name] for name in ("level", "logger", "message", "first", "third")} == {
        "level": "warning",
        "logger": "sseserve",
        "message": "it ended",
        "first": value,
        "third": 3,
    }
    assert "second" not in decoded
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", decoded["time"])


# Whose ids a line has


class Request:
    log_fields = {"request_id": "r-1", "correlation_id": "c-1"}  # noqa: RUF012 - a stand-in


async def test_the_ids_of_a_request():
    """All lines of its task and of the tasks and threads that it waits for have them, whoever logs them."""
    lines = []

    async def log() -> None:
        lines.append(format_text("from a task"))
        lines.append(await trio.to_thread.run_sync(format_text, "from a thread"))
        lines.append(format_json("from a task"))

    async def serve() -> None:
        begin_context(Request())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
    ids = "request_id=r-1 correlation_id=c-1"
    assert lines[0] == f"WARNING sseserve: from a task {ids}"
    assert lines[1] == f"WARNING sseserve: from a thread {ids}"
    assert lines[2].items() >= Request.log_fields.items()
    assert format_text("from elsewhere") == "WARNING sseserve: from elsewhere"


async def test_what_is_only_started_by_a_request_does_not_have_its_ids(nursery):
    """As the tasks that deliver to others what it has published."""
    lines = []

    async def deliver() -> None:
        lines.append(format_text("delivered"))

    async def serve() -> None:
        begin_context(Request())
        nursery.start_soon(deliver)

    nursery.start_soon(serve)
    await wait_all_tasks_blocked()
    assert lines == ["WARNING sseserve: delivered"]


async def test_lines_of_a_program_that_is_called_by_a_request(autojump_clock, nursery):
    """Such as its ``authenticate``: they have the ids, as have all of the request, also over HTTP/2."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(JSONFormatter(None))
    logging.getLogger("program").addHandler(handler)

    async def authenticate(request):
        logging.getLogger("program").warning("called")
        raise ValueError("a bug")

    harness = ServerHarness(nursery, authenticate=authenticate)
    ids = [("X-Request-ID", "r-1"), ("X-Correlation-ID", "c-1")]
    assert (await harness.get("/api/sessions", ids)).status == 500
    logging.getLogger("program").removeHandler(handler)
    line = json.loads(output.getvalue())
    assert (line["message"], line["request_id"], line["correlation_id"]) == ("called", "r-1", "c-1")


async def test_a_request_and_its_failure(autojump_clock, nursery, caplog):
    """The line of a request says who has sent it, what came of it, and how long that took."""
    caplog.set_level(logging.DEBUG, "sseserve")
    harness = ServerHarness(nursery)
    ids = [("X-Request-ID", "r-1"), ("X-Correlation-ID", "c-1")]
    response = await harness.get("/api/sessions/none/status?ticket=secret-ticket", ids)
    (line,) = logged(caplog, "request")
    assert line.pop("ms") >= 0
    assert line == {
        "method": "GET",
        "path": "/api/sessions/none/status",
        "status": 404,
        "bytes": len(response.body),
        "user": None,
        "address": None,  # a stream in memory has none
        "error": "there is no session 'none'",
        "request_id": "r-1",
        "correlation_id": "c-1",
    }


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/api/sessions/s/status/stream", [], 200), ("/api/sessions/s/status/ws", HANDSHAKE, 101)],
)
async def test_the_request_of_a_stream(nursery, caplog, path, headers, status):
    """It is logged when the stream begins, with how long that took."""
    caplog.set_level(logging.DEBUG, "sseserve")
    harness = ServerHarness(nursery)
    await harness.tracker.create("s")
    await harness.connect().send(request_bytes("GET", path, headers=headers))
    await wait_all_tasks_blocked()
    (line,) = logged(caplog, "request")
    assert (line["path"], line["status"]) == (path, status)
    assert 0 <= line["ms"] < 60_000


# Writing


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def handler_of(descriptor: int) -> BackgroundHandler:
    handler = BackgroundHandler(descriptor)
    handler.setFormatter(TextFormatter("%(message)s"))
    return handler


def read_lines(descriptor: int, until: str) -> list[str]:
    """Read lines up to one that matches."""
    data = ""
    while not re.search(until, data):
        data += os.read(descriptor, 65536).decode()
    return data.splitlines()


def test_nobody_waits_for_a_pipe_that_nobody_reads(pipe, monkeypatch):
    """What waits is bounded; of the rest it is said how many lines they were, when somebody reads again."""
    monkeypatch.setattr(writer, "MAX_WAITING", 200_000)
    monkeypatch.setattr(writer, "FLUSH", 0.01)
    handler = handler_of(pipe[1])
    for number in range(10_000):
        handler.handle(record_of(f"line {number} {'x' * 90}"))
    handler.flush()  # the end of the process does not wait for ever either
    reader = threading.Thread(target=lambda: lines.extend(read_lines(pipe[0], "last\n")))
    lines: list[str] = []
    reader.start()
    wait_until(lambda: not handler._size, "all is written")
    handler.handle(record_of("last"))
    reader.join()
    handler.close()
    due = 0
    for line in lines[:-1]:  # a thread that starts late has no room, and then that of a whole pipe
        if match := re.fullmatch("lines were dropped, as nobody reads them count=([1-9][0-9]*)", line):
            due += int(match[1])
        else:
            assert line.split()[:2] == ["line", str(due)]
            due += 1
    assert due == 10_000
    assert lines[-1] == "last"
    assert 200_000 < sum(len(line) + 1 for line in lines) < 300_000  # with what the pipe holds


def test_the_end_waits_once(pipe, monkeypatch):
    """``logging.shutdown`` flushes a handler, and then closes it."""
    monkeypatch.setattr(writer, "FLUSH", 0.01)
    handler = handler_of(pipe[1])
    for number in range(2000):
        handler.handle(record_of(f"line {number} {'x' * 90}"))
    handler.flush()
    assert handler._size
    monkeypatch.setattr(handler, "flush", lambda: pytest.fail("it waits again"))
    handler.close()
    assert len(read_lines(pipe[0], "line 1999 x+\n")) == 2000  # its thread writes on


def test_lines_of_several_processes_are_not_mixed_up(pipe):
    """Even if the pipe is full again and again."""
    handlers = [handler_of(pipe[1]) for _ in range(2)]
    for number in range(2000):
        for name, handler in zip("ab", handlers, strict=True):
            handler.handle(record_of(f"{name}{number} {name * 150}"))
    lines = []
    while len(lines) < 4000:
        data = os.read(pipe[0], 1000)
        while not data.endswith(b"\n"):
            data += os.read(pipe[0], 1)
        lines += data.decode().splitlines()
    for name in "ab":
        assert [line for line in lines if line[0] == name] == [f"{name}{n} {name * 150}" for n in range(2000)]
    for handler in handlers:
        handler.close()


def test_a_descriptor_that_does_not_block(pipe):
    """Whoever shares it may have made it so: all is written nevertheless."""
    os.set_blocking(pipe[1], False)
    handler = handler_of(pipe[1])
    for number in range(3000):
        handler.handle(record_of(f"{number:0100}"))
    handler.handle(record_of("last"))
    lines = read_lines(pipe[0], "last\n")
    handler.close()
    assert [int(line) for line in lines[:-1]] == list(range(3000))


def test_a_record_that_cannot_be_formatted(pipe):
    """It is said where it was logged."""
    handler = handler_of(pipe[1])
    handler.handle(record_of("%d", "a"))
    (line,) = read_lines(pipe[0], "\n")
    handler.close()
    assert line.startswith("a record cannot be formatted place=:0 error=")


def test_a_pipe_whose_reader_has_gone():
    """The lines are lost, and nothing else."""
    reading, writing = os.pipe()
    os.close(reading)
    handler = handler_of(writing)
    handler.handle(record_of("a"))
    handler.flush()
    assert not handler._size
    handler.close()
    os.close(writing)


def test_a_server_whose_log_nobody_reads():
    """It serves on, and stops in time with status 0."""
    command = [sys.executable, "-m", "sseserve", "serve", "--port", "0", "--log-level", "debug"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with server:
        line = server.stderr.readline()
        url = re.search(r"serving at (\S+)", line)[1]
        with httpx.Client(base_url=url) as client:
            for _ in range(60):  # with 16 KB in each of their lines, which the pipe does not hold
                assert client.get(f"/{'x' * 15_000}").status_code == 404
            assert client.get("/health").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


@pytest.mark.parametrize(("option", "has_lines"), [("true", True), ("false", False)])
def test_the_access_log(option, has_lines):
    """Each request is logged at level info where that is wanted; in JSON with a status that is a number."""
    environ = {"SSESERVE_ACCESS_LOG": option, "SSESERVE_LOG_FORMAT": "json"}
    with Program(sys.executable, "-m", "sseserve", "serve", "--port", "0", **environ) as server:
        url = server.wait_for_output(r"serving at ([^\s\"]+)")[1]
        httpx.get(f"{url}/health", headers={"X-Request-ID": "r-1"})
        assert server.wait(signal.SIGTERM) == 0
        lines = [json.loads(line) for line in server.output.splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [(line["level"], line["status"], line["request_id"]) for line in requests] == [
        ("info", 200, "r-1")
    ] * has_lines
    assert lines[-1]["message"].startswith("stopping")  # the last line is written, too
