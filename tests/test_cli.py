"""The command line: arguments, output and exit status."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from functools import partial

import click
import httpx
import msgspec
import pytest
import trio
from click.testing import CliRunner
from fakes import FakeServer, read_body, respond, respond_error, send_messages, send_raw
from processes import Program

from sseserve import sse
from sseserve.cli import main
from sseserve.client.console import run
from sseserve.config import Settings, load
from sseserve.http.routes import ROUTES
from sseserve.server import serve

RUNNING = {
    "state": "running",
    "status": "running",
    "progress": 40.5,
    "stage": "read",
    "message": "page 3",
    "eta": 12,
}
ONE = ("e-1", "progress", RUNNING)
DONE = ("e-3", "complete", {"progress": 100, "state": "succeeded", "status": "done"})


def final_message(state):
    """Return the final message of a session that did not succeed."""
    return ("e-2", "error", {"progress": 50, "state": state, "status": state, "error": "disk full"})


async def invoke(*args, **options):
    """Run a command in a thread, since it runs Trio itself."""
    return await trio.to_thread.run_sync(partial(CliRunner().invoke, main, args, **options))


def command(*args):
    """Return the arguments that run a command in a process of its own."""
    return [sys.executable, "-m", "sseserve", *args]


async def unused_url():
    """Return a URL at which no server listens."""
    with trio.socket.socket() as bound:
        await bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


# watch


@pytest.mark.parametrize("transport", ["sse", "ws", "poll"])
async def test_watch_json(transport, nursery):
    """One line of JSON per message, nothing else."""
    fake = await FakeServer(send_messages(transport, ONE, DONE, then="end")).start(nursery)
    result = await invoke("watch", "s", "--server", fake.url, "--transport", transport, "--json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"id": id_, "event": event, "data": data} for id_, event, data in (ONE, DONE)
    ]
    assert (result.exit_code, result.stderr) == (0, "")


async def test_watch_lines(nursery):
    """Without a terminal each message is a line of text."""
    messages = [
        ONE,
        ("e-2", "note", {"a": "\x1b[2J"}),
        ("e-2", "control", {"control": "pause"}),
        ("e-2", "stalled", {"lease": 1.0, "silent": 3.2}),
        (None, "resume", {"status": "ok", "missed": 0}),
        (
            "e-2",
            "progress",
            {**RUNNING, "state": "paused", "status": "on hold", "message": "\x1b[31mred\x9b"},
        ),
        DONE,
    ]
    fake = await FakeServer(send_messages("sse", *messages)).start(nursery)
    result = await invoke("watch", "s", "--server", fake.url)
    assert result.stdout.splitlines() == [
        " 40% read  page 3  ETA 0:12",
        'note  {"a":"\\u001b[2J"}',
        "pause requested",
        "stalled: the worker has published nothing for 0:03",
        " 40% on hold read   [31mred   ETA 0:12",
        "100% done",
    ]
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (DONE, 0),
        (final_message("failed"), 1),
        (final_message("cancelled"), 4),
        (final_message("lost"), 4),
        (("e-2", "deleted", {}), 4),
    ],
)
async def test_watch_exit_status(message, status, nursery):
    """The exit status depends on how the session ended."""
    fake = await FakeServer(send_messages("sse", ONE, message)).start(nursery)
    result = await invoke("watch", "s", "--server", fake.url)
    assert result.exit_code == status


async def test_watch_prints_the_error(nursery):
    """The last line of a failed session contains its error."""
    fake = await FakeServer(send_messages("sse", final_message("failed"))).start(nursery)
    result = await invoke("watch", "s", "--server", fake.url)
    assert result.stdout == " 50% failed  error: disk full\n"


async def test_watch_from_a_cursor_at_the_end(nursery):
    """There is nothing to print, but the exit status is still the session's."""
    fake = await FakeServer(respond(204), send_messages("poll", final_message("failed"), then="end")).start(
        nursery
    )
    result = await invoke("watch", "s", "--server", fake.url, "--cursor", "e-2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert fake.requests[0].cursor == "e-2"


async def test_watch_reconnects(nursery):
    """A lost connection and missed events are reported on stderr, not on stdout."""
    gap = (None, "resume", {"status": "gap", "missed": 7})
    fake = await FakeServer(send_messages("sse", ONE, retry=1), send_messages("sse", gap, DONE)).start(
        nursery
    )
    result = await invoke("watch", "s", "--server", fake.url)
    assert result.stdout.splitlines() == [" 40% read  page 3  ETA 0:12", "100% done"]
    assert result.stderr.splitlines() == [
        "the server closed the stream; retrying in 0.1 s",
        "7 events are missing: the server no longer stores them",
    ]
    assert (result.exit_code, fake.requests[1].cursor) == (0, "e-1")


async def test_watch_reports_a_new_event_log(nursery):
    """After a restart of the server the notice has the likely reason."""
    restarted = (None, "resume", {"status": "reset", "missed": 1})
    fake = await FakeServer(send_messages("sse", restarted, DONE)).start(nursery)
    result = await invoke("watch", "s", "--server", fake.url, "--cursor", "d-9")
    assert result.stderr == (
        "1 event is missing: the log was restarted, most likely together with the server\n"
    )


@pytest.mark.parametrize(
    "path",
    ["", "/", "/status", "/status/stream", "/status/ws?x=1", "/events"],
)
async def test_watch_accepts_any_url_of_a_session(path, nursery):
    """All links to a session are accepted."""
    fake = await FakeServer(send_messages("sse", DONE)).start(nursery)
    result = await invoke("watch", f"{fake.url}/prefix/api/sessions/a%20b{path}")
    assert result.exit_code == 0
    assert fake.requests[0].path == "/prefix/api/sessions/a%20b/status/stream"


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES if "{id}" in route.path}))
async def test_watch_accepts_a_url_of_any_dialect(path, nursery):
    """A session is the same in all of them."""
    fake = await FakeServer(send_messages("sse", DONE)).start(nursery)
    url = path.replace("{id}", "s-1").replace("{name}", "film.y4m")
    result = await invoke("watch", f"{fake.url}/prefix{url}?replay=1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert fake.requests[0].path == "/prefix/api/sessions/s-1/status/stream"


async def test_watch_accepts_a_websocket_url(nursery):
    """``ws:`` selects the server, not the transport."""
    fake = await FakeServer(send_messages("sse", DONE)).start(nursery)
    url = fake.url.replace("http:", "ws:") + "/api/sessions/s/status/ws"
    assert (await invoke("watch", url)).exit_code == 0


async def test_server_from_the_environment(nursery):
    """SSE_SERVER is the URL of the server."""
    fake = await FakeServer(send_messages("sse", DONE)).start(nursery)
    assert (await invoke("watch", "s", env={"SSE_SERVER": fake.url})).exit_code == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "ftp://h/api/sessions/s", "http:///api/sessions/s"])
async def test_watch_rejects_other_urls(url):
    """A URL that is not a session's is a usage error."""
    result = await invoke("watch", url)
    assert result.exit_code == 2
    assert "is not a session URL" in result.stderr


@pytest.mark.parametrize("text", ["localhost:8000/api/sessions/s", "/api/sessions/s", "a/b"])
async def test_watch_rejects_a_url_without_a_scheme(text):
    """It is not taken for an id, which has no slash."""
    result = await invoke("watch", text)
    assert result.exit_code == 2
    assert f"{text} is not a session URL (http://host/api/sessions/ID)" in result.stderr


@pytest.mark.parametrize("cursor", ["abc", "3", "e-", ""])
async def test_watch_rejects_what_is_no_cursor(cursor):
    """The server would take it for one of a log that is gone, and report a restart that never was."""
    result = await invoke("watch", "s", "--cursor", cursor)
    assert result.exit_code == 2
    assert f"for --cursor: '{cursor}' is not a message id" in result.stderr


async def test_watch_unknown_session(nursery):
    """One line on stderr, and exit status 3."""
    fake = await FakeServer(respond_error(404, "session_not_found", "there is no session 's'")).start(nursery)
    result = await invoke("watch", "s", "--server", fake.url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "sseserve: there is no session 's'\n"


async def test_watch_without_a_server(monkeypatch):
    """After a few attempts the exit status is 3."""
    from sseserve.client import terminal

    monkeypatch.setattr(terminal, "watch", partial(terminal.watch, retry_timeout=0))
    url = await unused_url()
    result = await invoke("watch", "s", "--server", url)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"sseserve: cannot connect to {url}/api/sessions/s: ")
    assert result.stderr.count("\n") == 1


async def test_watch_interrupted(nursery):
    """Ctrl-C ends it with exit status 130 and without a traceback."""
    fake = await FakeServer(send_messages("sse", ONE, then="hang")).start(nursery)
    process = await trio.lowlevel.open_process(
        command("watch", "s", "--server", fake.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert await process.stdout.receive_some() == b" 40% read  page 3  ETA 0:12\n"
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    assert await process.stderr.receive_some() == b""
    await process.stdout.aclose()
    await process.stderr.aclose()


@pytest.fixture
def interruptible():
    """Handle Ctrl-C as a program started from a terminal does."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_interrupt_cancels_at_a_checkpoint(interruptible):
    """Ctrl-C is not raised between two instructions, which may be those of a cleanup."""
    steps = []

    async def work():
        try:
            signal.raise_signal(signal.SIGINT)
            steps.append("next instruction")
            await trio.sleep_forever()
        finally:
            steps.append("cleanup")

    with pytest.raises(KeyboardInterrupt):
        run(work)
    assert steps == ["next instruction", "cleanup"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_interrupt_ends_what_blocks(interruptible):
    """A second Ctrl-C ends a program that cannot be cancelled, such as one that waits for its terminal."""
    steps = []

    async def work():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("next instruction")

    with pytest.raises(KeyboardInterrupt):
        run(work)
    assert steps == []


def test_ignored_interrupt_stays_ignored(interruptible):
    """A program that was started to ignore Ctrl-C, such as one in the background of a script, ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def work():
        signal.raise_signal(signal.SIGINT)
        await trio.lowlevel.checkpoint()
        return "done"

    assert run(work) == "done"


# publish


async def test_publish_progress(nursery):
    """The options become the request body; the result is printed."""
    fake = await FakeServer(respond(202, {"id": "e-1", "control": "pause"})).start(nursery)
    result = await invoke(
        *("publish", "s", "--server", fake.url, "--progress", "0", "--message", "hi", "--restart"),
        *("--data", '{"a":[1]}', "--key", "k", "--status", "busy", "--stage", "x", "--error", "y"),
    )
    assert (result.exit_code, result.stdout) == (0, '{"id":"e-1","control":"pause"}\n')
    assert json.loads(fake.requests[0].body) == {
        "progress": 0,
        "message": "hi",
        "restart": True,
        "data": {"a": [1]},
        "status": "busy",
        "stage": "x",
        "error": "y",
    }
    assert fake.requests[0].headers["idempotency-key"] == "k"


async def test_publish_an_event(nursery):
    """With --type an event is published."""
    fake = await FakeServer(respond(202, {"id": "e-1", "control": "continue"})).start(nursery)
    result = await invoke("publish", f"{fake.url}/api/sessions/s", "--type", "note", "--data", "[1]")
    assert result.exit_code == 0
    assert (fake.requests[0].path, json.loads(fake.requests[0].body)) == (
        "/api/sessions/s/events",
        {"type": "note", "data": [1]},
    )


async def test_publish_a_file(nursery, tmp_path):
    """All lines of a file are in one request, with or without a line break after the last."""
    path = tmp_path / "lines"
    path.write_bytes(b'{"progress":1}\n\n{"progress":2}')
    fake = await FakeServer(respond(202, {"applied": 2, "id": "e-2", "control": "continue"})).start(nursery)
    result = await invoke("publish", "s", "--server", fake.url, "--ndjson", str(path))
    assert (result.exit_code, result.stdout) == (0, '{"applied":2,"id":"e-2","control":"continue"}\n')
    assert fake.requests[0].body == b'{"progress":1}\n\n{"progress":2}\n'


async def test_publish_an_invalid_line(nursery, tmp_path):
    """The line number and the number of lines applied are printed."""
    path = tmp_path / "lines"
    path.write_text("{}\n")
    fake = await FakeServer(respond_error(422, "invalid", "no number", line=3, applied=2)).start(nursery)
    result = await invoke("publish", "s", "--server", fake.url, "--ndjson", str(path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "sseserve: line 3: no number (2 applied)\n"


async def test_publish_a_pipe_line_by_line(nursery):
    """A line is sent as soon as it is written, while the pipe stays open."""
    arrived = trio.Event()

    async def handler(stream, request):
        await read_body(stream, request, chunks=1)
        first.append(request.body)
        arrived.set()
        await respond(202, {"applied": 1, "id": "e-1", "control": "cancel"})(stream, request)

    first = []
    fake = await FakeServer(handler).start(nursery)
    process = await trio.lowlevel.open_process(
        command("publish", "s", "--server", fake.url, "--ndjson", "-"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    await process.stdin.send_all(b'{"progress":1}\n{"prog')
    await arrived.wait()
    assert first == [b'{"progress":1}\n']
    assert await process.stderr.receive_some() == b"sseserve: the watchers request: cancel\n"
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    for stream in (process.stdin, process.stdout, process.stderr):
        await stream.aclose()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to publish"),
        (["--type", "x", "--progress", "1"], "--type can be combined only with"),
        (["--ndjson", "-", "--progress", "1"], "--ndjson can be combined only with"),
        (["--progress", "much"], "not a valid float"),
    ],
)
async def test_publish_usage_errors(args, message):
    """Options that contradict each other are usage errors."""
    result = await invoke("publish", "s", *args)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--data", '{"a" 1}'],
            "for --data: invalid JSON: Expecting ':' delimiter at column 6",
        ),
        (["--data", "NaN"], "Invalid value for --data: NaN and Infinity are not JSON numbers"),
        (["--progress", "nan"], "progress must be a finite number"),
    ],
)
async def test_publish_invalid_values(args, message):
    """Invalid JSON, and numbers that JSON cannot represent, are usage errors."""
    result = await invoke("publish", "s", *args)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("args", [["--progress", "5"], ["--type", "note"], ["--ndjson", "-"]])
async def test_publish_says_that_it_has_created_a_session(args):
    """A mistyped id is noticed; a session that exists is not announced."""
    line = '{"progress":5}\n'
    async with serve(port=0) as server:
        for stderr in ("sseserve: created session 'typo'\n", ""):
            piped = await trio.run_process(
                command("publish", "typo", *args, "--server", server.url),
                stdin=line.encode() * 2,
                capture_stdout=True,
                capture_stderr=True,
            )
            assert piped.stderr.decode() == stderr
            assert ("created" in json.loads(piped.stdout)) is False


async def test_publish_rejected(nursery):
    """The server's message is printed in one line."""
    fake = await FakeServer(respond_error(409, "session_ended", "the session has ended: done")).start(nursery)
    result = await invoke("publish", "s", "--server", fake.url, "--progress", "1")
    assert (result.exit_code, result.stderr) == (1, "sseserve: the session has ended: done\n")


async def test_publish_without_a_server(monkeypatch):
    """The exit status is 3."""
    from sseserve import client

    def publisher(url, **options):
        return client.publisher.Publisher(url, **{**options, "retry_timeout": 0})

    monkeypatch.setattr(client, "Publisher", publisher)
    result = await invoke("publish", "s", "--progress", "1", "--server", await unused_url())
    assert result.exit_code == 3
    assert result.stderr.startswith("sseserve: cannot publish to ")


async def test_server_url_is_checked():
    """A server URL without a scheme is a usage error."""
    result = await invoke("publish", "s", "--progress", "1", "--server", "127.0.0.1:8000")
    assert result.exit_code == 2
    assert "is not a server URL" in result.stderr


# serve and demo


@pytest.fixture
def runs(monkeypatch):
    """Collect the arguments with which the server was run."""
    from sseserve import server

    calls = []
    monkeypatch.setattr(server, "run", lambda settings, **options: calls.append((settings, options)))
    return calls


async def test_serve(runs, tmp_path):
    """Options override the file."""
    config = tmp_path / "c.toml"
    config.write_text('port = 1\nhost = "127.0.0.2"\n')
    result = await invoke(
        "serve", "--config", str(config), "--port", "2", "--workers", "3", "--log-level", "debug"
    )
    assert result.exit_code == 0
    [(settings, options)] = runs
    assert (settings.host, settings.port, settings.log_level) == ("127.0.0.2", 2, "debug")
    assert settings.workers == 3
    config.write_text('port = 1\nhost = "127.0.0.3"\n')
    assert options["reread"]() == msgspec.structs.replace(settings, host="127.0.0.3")


async def test_demo(runs):
    """A free port, one process, and demonstration jobs."""
    assert (await invoke("demo", env={"SSESERVE_WORKERS": "2"})).exit_code == 0
    [(settings, options)] = runs
    assert (settings.port, settings.workers, options) == (0, 1, {"with_demo": True})


async def test_serve_invalid_settings(runs, tmp_path):
    """One line on stderr, and exit status 2."""
    result = await invoke("serve", "--config", str(tmp_path / "none"))
    assert (result.exit_code, runs) == (2, [])
    assert result.stderr.startswith("sseserve: cannot read ")
    result = await invoke("serve", env={"SSESERVE_POTR": "1"})
    assert result.exit_code == 2
    assert result.stderr == (
        "sseserve: unknown setting 'SSESERVE_POTR' in the environment: did you mean 'SSESERVE_PORT'?\n"
    )
    result = await invoke("serve", env={"SSESERVE_POTR": "1", "SSESERVE_TTL": "0"})
    assert [line[:9] for line in result.stderr.splitlines()] == ["sseserve:"] * 2


SERVICES = {
    "SSESERVE_SERVICE_HOST": "10.0.0.11",
    "SSESERVE_SERVICE_PORT": "80",
    "SSESERVE_SERVICE_PORT_HTTP": "80",
    "SSESERVE_PORT": "tcp://10.0.0.11:80",
    "SSESERVE_PORT_80_TCP": "tcp://10.0.0.11:80",
    "SSESERVE_PORT_80_TCP_PROTO": "tcp",
    "SSESERVE_PORT_80_TCP_PORT": "80",
    "SSESERVE_PORT_80_TCP_ADDR": "10.0.0.11",
    "REDIS_SERVICE_HOST": "10.0.0.12",
    "REDIS_PORT": "tcp://10.0.0.12:6379",
    "SSE_SERVER_SERVICE_HOST": "10.0.0.13",
    "SSE_SERVER_PORT": "tcp://10.0.0.13:80",
}


async def test_variables_of_kubernetes_services(runs, nursery):
    """No command minds those of Services called sseserve, redis and sse-server."""
    assert (await invoke("serve", env=SERVICES)).exit_code == 0
    assert (await invoke("demo", env=SERVICES)).exit_code == 0
    assert [settings.port for settings, _ in runs] == [8000, 0]
    assert [settings.engine_url for settings, _ in runs] == ["memory:"] * 2
    key = {"SSESERVE_JWT_KEY": "k" * 32}
    assert (await invoke("token", "--subject", "a", env=SERVICES | key)).exit_code == 0
    fake = await FakeServer(send_messages("sse", ONE, DONE, then="end")).start(nursery)
    result = await invoke("watch", "s", env=SERVICES | {"SSE_SERVER": fake.url})
    assert (result.exit_code, result.stderr) == (0, "")


def all_commands(group):
    """Return the commands of a group, and those of the groups in it."""
    for one in group.commands.values():
        yield from all_commands(one) if isinstance(one, click.Group) else [one]


def test_variables_of_commands_are_no_settings():
    """A variable that an option is read from must not be refused as an unknown setting."""
    names = {param.envvar for one in all_commands(main) for param in one.params if param.envvar}
    assert "SSESERVE_TOKEN" in names
    assert load(None, dict.fromkeys(names, "x")) == Settings()


def test_a_server_beside_kubernetes_services():
    """It listens where its settings say, and says once which variables it has not read."""
    with Program(*command("serve", "--port", "0"), **SERVICES) as program:
        url = program.wait_for_output(r"serving at (\S+)")[1]
        assert httpx.get(f"{url}/health").status_code == 200
        assert program.wait(signal.SIGTERM) == 0, program.output
    [line] = [line for line in program.output.splitlines() if "SSESERVE_" in line]
    names = sorted(name for name in SERVICES if name.startswith("SSESERVE_") or name == "REDIS_PORT")
    assert line.endswith(f"Kubernetes sets these for its Services; they are no settings: {', '.join(names)}")


async def test_file_of_the_environment(runs, tmp_path):
    """SSESERVE_CONFIG names it for every command; --config overrides it."""
    path, other = tmp_path / "a.toml", tmp_path / "b.toml"
    path.write_text("ttl = 5")
    other.write_text("ttl = 6")
    environ = {"SSESERVE_CONFIG": str(path)}
    for arguments in (["serve"], ["demo"], ["serve", "--config", str(other)]):
        assert (await invoke(*arguments, env=environ)).exit_code == 0
    assert [settings.ttl for settings, _ in runs] == [5.0, 5.0, 6.0]
    path.write_text("tttl = 5")
    result = await invoke("token", "--subject", "a", env=environ)
    assert result.exit_code == 2
    assert "did you mean 'ttl'" in result.stderr


async def test_serve_on_a_port_in_use(monkeypatch):
    """One line on stderr, and exit status 1."""
    from sseserve import server

    def run(settings, **_options):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(server, "run", run)
    result = await invoke("serve", "--port", "9")
    assert (result.exit_code, result.stderr) == (
        1,
        "sseserve: cannot listen on 127.0.0.1:9: Address already in use\n",
    )


async def test_help_names_the_defaults():
    """The help of ``serve`` names the defaults of the settings."""
    result = await invoke("serve", "--help")
    text = " ".join(result.stdout.split())
    for name in ("host", "port", "log_level", "log_format"):
        option = text[text.index("--" + name.replace("_", "-")) :]
        assert option[option.index("[default: ") :].startswith(f"[default: {getattr(Settings(), name)}]")


async def test_version_and_help():
    """Every command has a help text."""
    assert (await invoke("--version")).stdout.startswith("main, version ")
    for args in ([], ["serve"], ["demo"], ["watch"], ["publish"]):
        result = await invoke(*args, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")


# With a real server


async def test_with_a_real_server():
    """Publish from one process, watch in another."""
    async with serve(port=0) as server:
        result = await invoke("publish", "s", "--progress", "40", "--server", server.url)
        assert result.exit_code == 0
        cursor = json.loads(result.stdout)["id"]
        lines = b'{"progress":50}\n{"type":"note","data":1}\n{"status":"failed","error":"disk full"}\n'
        piped = await trio.run_process(
            command("publish", "s", "--ndjson", "-", "--server", server.url), stdin=lines, capture_stdout=True
        )
        assert json.loads(piped.stdout)["applied"] == 3
        for transport in ("sse", "ws", "poll"):
            args = ("watch", "s", "--json", "--transport", transport, "--server", server.url)
            result = await invoke(*args, "--cursor", cursor)
            events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
            assert events == ["resume", "progress", "note", "error"]
            assert result.exit_code == 1
        result = await invoke("publish", "s", "--progress", "60", "--server", server.url)
        assert (result.exit_code, result.stderr) == (1, "sseserve: the session has ended: failed\n")


@pytest.mark.parametrize("format_", [[], ["--json"]], ids=["lines", "json"])
async def test_watch_ends_when_its_output_is_not_read(format_, nursery):
    """``watch | head -1`` succeeds at once, even if no other message comes."""
    events = sse.encode("{}", event="a") + sse.encode("{}", event="b")
    fake = await FakeServer(send_raw(events, then="hang")).start(nursery)
    watch = shlex.join(command("watch", "s", *format_, "--server", fake.url))
    script = f"set -o pipefail; {watch} | head -1"
    process = await trio.run_process(["bash", "-c", script], capture_stdout=True, capture_stderr=True)
    assert process.stdout.count(b"\n") == 1
    assert (process.returncode, process.stderr) == (0, b"")


async def test_closed_output_is_no_failure():
    """Where the pipe is closed before the first line, writing fails, and that is no error either."""
    async with serve(port=0) as server:
        await server.tracker.update("s", status="done")
        for arguments in (("watch", "s"), ("publish", "t", "--progress", "1")):
            script = f"set -o pipefail; {shlex.join(command(*arguments, '--server', server.url))} | :"
            process = await trio.run_process(["bash", "-c", script], capture_stderr=True)
            assert process.returncode == 0
            assert b"Traceback" not in process.stderr
            assert b"Exception" not in process.stderr


@pytest.mark.parametrize("transport", ["sse", "ws", "poll"])
async def test_watch_waits_for_a_session(transport):
    """With ``--wait`` a session may be created later; one line says what it waits for."""
    async with serve(port=0) as server:
        arguments = ("watch", "s", "--wait", "--transport", transport, "--server", server.url)
        process = await trio.lowlevel.open_process(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        notice = (await process.stderr.receive_some()).decode()
        assert notice.startswith("there is no session 's'; retrying in ")
        await server.tracker.update("s", progress=100, status="done")
        assert await process.wait() == 0
        assert await process.stdout.receive_some() == b"100% done\n"
        assert await process.stderr.receive_some() == b""
        await process.stdout.aclose()
        await process.stderr.aclose()


async def test_watch_reports_an_outage_once(nursery, monkeypatch):
    """Not each failed attempt, only each other reason."""
    from sseserve.client import Backoff, terminal

    no_delay = Backoff(initial=0.0, maximum=0.0)
    monkeypatch.setattr(terminal, "watch", partial(terminal.watch, backoff=no_delay))
    gone = [send_raw(head=b"", then="close")] * 3
    fake = await FakeServer(send_messages("sse", ONE, retry=1), *gone, send_messages("sse", DONE)).start(
        nursery
    )
    result = await invoke("watch", "s", "--server", fake.url)
    assert result.exit_code == 0
    reasons = [line.partition(";")[0] for line in result.stderr.splitlines()]
    assert reasons == [
        "the server closed the stream",
        "the server closed the connection",
    ]
