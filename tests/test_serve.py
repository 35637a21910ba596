"""The package as a library: how a server starts, fails and ends in a program, its types and its errors."""

from __future__ import annotations

import asyncio
import importlib.metadata
import pydoc
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_type_hints

import pytest
import trio
from click.testing import CliRunner

import sseserve
from sseserve import cli
from sseserve.client import Publisher, watch
from sseserve.config import SettingFields, Settings
from sseserve.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


class StartHook(list):
    """Additional routes that call a function when the server reads them, in the middle of its start."""

    def __init__(self, call):
        super().__init__()
        self._call = call

    def __iter__(self):
        self._call()
        return super().__iter__()


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def check_port_is_free(port):
    socket.create_server(("127.0.0.1", port)).close()


# Start and end


@pytest.mark.parametrize("name", ["authenticate", "runner"])
def test_what_is_no_function(name):
    """Said at once: not with the first request, as a server that authenticates nobody."""
    with pytest.raises(TypeError, match=f"^{name} must be an async function, not 'x'"):
        sseserve.serve(port=0, **{name: "x"})


async def test_failed_start_leaves_nothing_open():
    """The error is raised as it is, the port is free again, and the task can go on."""
    port = unused_port()

    def fail():
        raise LookupError("in the middle of the start")

    with pytest.raises(LookupError, match="in the middle"):
        async with sseserve.serve(port=port, routes=StartHook(fail)):
            pytest.fail("the server has started")
    check_port_is_free(port)
    async with trio.open_nursery():
        await trio.lowlevel.checkpoint()


async def test_cancelled_start_leaves_nothing_open():
    """A program may give up while the server starts."""
    port = unused_port()
    with trio.CancelScope() as scope:
        async with sseserve.serve(port=port, routes=StartHook(scope.cancel)):
            await trio.lowlevel.checkpoint()
            pytest.fail("the server has started")
    assert scope.cancelled_caught
    check_port_is_free(port)
    async with trio.open_nursery():
        await trio.lowlevel.checkpoint()


async def _fail():
    raise OSError("in the background")


async def test_background_failure_cancels_the_block():
    """Its error is raised as it is."""

    async def run():
        async with sseserve.serve(port=0) as server:
            server.app.nursery.start_soon(_fail)
            await trio.sleep_forever()

    with pytest.raises(OSError, match="in the background"):
        await run()


async def test_background_failure_does_not_hide_the_error_of_the_block():
    """Both are raised, as a group."""

    async def run():
        async with sseserve.serve(port=0) as server:
            server.app.nursery.start_soon(_fail)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the block")

    with pytest.raises(ExceptionGroup) as failure:
        await run()
    assert {str(error) for error in failure.value.exceptions} == {"in the background", "in the block"}


@pytest.mark.parametrize(
    "error", [ValueError("one"), StopAsyncIteration(), ExceptionGroup("a group", [ValueError("one")])]
)
async def test_error_of_the_block_is_raised_as_it_is(error):
    """Also a group of the program's own."""
    with pytest.raises(type(error)) as failure:
        async with sseserve.serve(port=0):
            raise error
    # Trio copies a group that passes through a nursery.
    assert failure.value is error or (isinstance(error, ExceptionGroup) and str(failure.value) == str(error))


# Arguments


@pytest.mark.parametrize(
    "start",
    [
        lambda: sseserve.serve(port="x"),
        lambda: sseserve.serve(Settings(), port="x"),
        lambda: sseserve.serve(Settings(), port=70_000),
        lambda: sseserve.serve(Settings(), prot=8000),
    ],
)
def test_fields_are_validated(start):
    """With and without a settings object, a wrong field is an error at once."""
    with pytest.raises(ConfigError, match=r"port|prot"):
        start()


async def test_fields_override_the_settings():
    """Those that are not named are as in the settings object; None is a value."""
    settings = Settings(port=0, drain=0.5, retry_ms=7)
    async with sseserve.serve(settings, drain=2, retry_ms=None) as server:
        assert server.app._reconnect_within == 2
        assert server.app.web._first_line == b""
        assert server.port


@pytest.mark.parametrize("settings", ["x", 8000, {"port": 8000}])
def test_settings_of_another_type(settings):
    """The error says what they must be."""
    for start in (sseserve.serve, sseserve.run):
        with pytest.raises(TypeError, match=r"must be a sseserve.Settings, not .*serve\(host="):
            start(settings)


async def test_awaiting_serve():
    """The error says how it is used."""
    with pytest.raises(TypeError, match="async with"):
        await sseserve.serve()


# Wrong use


def run_in_asyncio(use):
    async def main():
        await use()

    with pytest.raises(RuntimeError, match=r"runs on Trio.* trio.run\(main\)"):
        asyncio.run(main())


def test_use_under_asyncio():
    """The error names Trio, and what to do, wherever a program begins."""

    async def use_serve():
        async with sseserve.serve(port=0):
            pass

    async def use_watch():
        async with watch("http://127.0.0.1:1", "s"):
            pass

    async def use_publisher():
        async with Publisher("http://127.0.0.1:1"):
            pass

    async def use_publisher_without_a_block():
        await Publisher("http://127.0.0.1:1").progress("s", progress=1)

    async def use_ndjson():
        await Publisher("http://127.0.0.1:1").ndjson("s", ["{}"])

    for use in (use_serve, use_watch, use_publisher, use_publisher_without_a_block, use_ndjson):
        run_in_asyncio(use)


async def test_watch_without_a_block():
    """``async for`` over a watch that was not entered."""
    with pytest.raises(TypeError, match="async with watch"):
        async for _message in watch("http://127.0.0.1:1", "s"):
            pass


async def test_session_ids_of_another_type():
    """A number or a UUID, anywhere."""
    with pytest.raises(TypeError, match="the session id must be a str, not 42"):
        watch("http://127.0.0.1:1", 42)
    async with Publisher("http://127.0.0.1:1") as publisher:
        for call in (publisher.progress(42), publisher.event(42, "x"), publisher.ndjson(42, ["{}"])):
            with pytest.raises(TypeError, match="the session id must be a str, not 42"):
                await call
    async with sseserve.serve(port=0, drain=0.1) as server:
        tracker = server.tracker
        for call in (
            tracker.update(42),
            tracker.emit(42, "x"),
            tracker.create(42),
            server.events.publish(42, "x"),
        ):
            with pytest.raises(TypeError, match="the session id must be a str, not 42"):
                await call


@pytest.mark.parametrize("field", ["status", "stage", "message", "artifacts"])
async def test_update_fields_of_another_type(field):
    """Nothing changes, and the error names the field."""
    async with sseserve.serve(port=0, drain=0.1) as server:
        with pytest.raises(TypeError, match=field.rstrip("s") + ".* must be an? .* not 5"):
            await server.tracker.update("s", **{field: [5] if field == "artifacts" else 5})
        with pytest.raises(TypeError, match="type must be a str, not 5"):
            await server.tracker.emit("s", 5)
        assert await server.tracker.sessions() == []


# Types and names


def test_keyword_arguments_have_the_types_of_the_settings():
    """Every field of ``Settings``, in its order."""
    assert list(get_type_hints(SettingFields).items()) == list(get_type_hints(Settings).items())


def test_names_of_the_package():
    """What is imported on first use is listed as everything else is."""
    assert {"serve", "run", "Server", *sseserve.__all__} <= set(dir(sseserve))
    documentation = pydoc.plain(pydoc.render_doc(sseserve))
    for name in ("class Server(", "class serve(", "run("):
        assert name in documentation
    with pytest.raises(AttributeError, match="nothing"):
        sseserve.nothing  # noqa: B018 - it is the attribute that is missing


PROGRAM = """
import sseserve
import trio


async def main() -> None:
    async with sseserve.serve(port=8000, retry_ms=None, cors_origins=("http://localhost:3000",)) as server:
        receipt = await server.tracker.update("job-1", progress=40)
        receipt.id.upper()
        receipt.nothing
    sseserve.serve(prot=8000)
    sseserve.serve(port="x")
    await server.tracker.update(42)


trio.run(main)
"""


def test_types_of_a_users_program(tmp_path):
    """A type checker sees the types of the installed package, and exactly the wrong lines."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--hide-error-context",
        "program.py",
    ]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in process.stdout.splitlines() if ": error: " in line]
    assert [line.partition(": error: ")[0].rpartition(":")[2] for line in errors] == [
        "10",
        "11",
        "12",
        "13",
    ], process.stdout
    assert "[call-arg]" in errors[1]


def test_wheel_has_the_types_and_the_pages(tmp_path):
    """``py.typed`` (PEP 561), and what is not Python."""
    pytest.importorskip("hatchling")
    build = f"import hatchling.build; hatchling.build.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sseserve/py.typed", "sseserve/web/templates/index.html"} <= set(names)
    assert not [name for name in names if name.startswith("tests")]


async def test_version_without_metadata(monkeypatch):
    """A package that was not installed, but is used from a folder, runs all the same."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("sseserve.version.version", version)
    async with sseserve.serve(port=0, drain=0.1):
        pass
    assert CliRunner().invoke(cli.main, ["--version"]).stdout == "main, version unknown\n"
