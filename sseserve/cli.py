"""The commands. Each reads its arguments, calls what does the work, and turns the outcome into a status.

Libraries are imported where they are used: ``watch`` need not wait for the server's.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

import click

if TYPE_CHECKING:
    from .client import Publisher, PublishResult
    from .client.watcher import Transport
    from .config import Settings

__all__ = ["main"]

T = TypeVar("T")

_INTERRUPTED = 130
_UNREACHABLE = 3

_server = click.option(
    "--server",
    envvar="SSE_SERVER",
    default="http://127.0.0.1:8000",
    show_default=True,
    show_envvar=True,
    help="Where the server is.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sseserve")
def main() -> None:
    """Stream the progress of long work to whoever watches it."""
    # What a publisher writes in its messages must not stop a terminal that cannot show it.
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


@main.command()
@click.option("--host", help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen at; 0 takes a free one.")
@click.option("--config", type=click.Path(dir_okay=False), help="TOML file with settings.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What to log.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="How to log it.")
def serve(config: str | None, **flags: Any) -> None:
    """Run the server until SIGTERM or SIGINT.

    Settings come from their defaults, the file, SSESERVE_* variables and the options, the later the stronger.
    """
    from .server import run

    _listen(run, _settings(config, flags))


@main.command()
@click.option("--host", help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port to listen at; default: a free one."
)
def demo(**flags: Any) -> None:
    """Run a server with demonstration jobs, and say where to watch them."""
    from .server import run

    _listen(lambda settings: run(settings, with_demo=True), _settings(None, flags))


def _settings(config: str | None, flags: dict[str, Any]) -> Settings:
    from .config import load
    from .errors import ConfigError

    try:
        return load(config, flags=flags)
    except ConfigError as error:
        _fail(str(error), 2)


def _listen(run: Callable[[Settings], None], settings: Settings) -> None:
    try:
        run(settings)
    except OSError as error:
        _fail(f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}", 1)


@main.command()
@click.argument("session", metavar="URL|ID")
@_server
@click.option(
    "--transport",
    type=click.Choice(["sse", "ws", "poll"]),
    default="sse",
    show_default=True,
    help="How to connect.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each message as a line of JSON.")
@click.option("--cursor", help="Go on behind this message id instead of beginning with the current state.")
def watch(session: str, server: str, transport: Transport, *, as_json: bool, cursor: str | None) -> None:
    """Watch a session to its end: a bar in a terminal, else a line for each message.

    \b
    Exit status:
      0    the session succeeded
      1    it failed
      2    it was cancelled, got lost or was deleted
      3    there is no connection, or no such session
      130  interrupted
    """
    from .client.errors import ClientError
    from .client.terminal import Bar, JsonLines, Lines, follow

    base_url, session_id = _session(session, server)
    display = JsonLines() if as_json else Bar() if sys.stdout.isatty() else Lines()
    try:
        status = _run(partial(follow, base_url, session_id, display, transport=transport, cursor=cursor))
    except ClientError as error:
        _fail(str(error), _UNREACHABLE)
    sys.exit(status)


@main.command()
@click.argument("session", metavar="URL|ID")
@_server
@click.option("--progress", type=float, help="Percent, 0 to 100.")
@click.option("--status", help="A word of your own; completed, failed and the like end the session.")
@click.option("--stage", help="The part of the work that is under way.")
@click.option("--message", help="A sentence for the watchers.")
@click.option("--error", help="What went wrong.")
@click.option("--data", help="JSON of your own.")
@click.option("--restart", is_flag=True, help="Progress may begin again from 0.")
@click.option("--type", "type_", help="Publish an event of this type, with --data, instead of progress.")
@click.option("--ndjson", type=click.File("rb"), help="Publish each line of a file, or of - as it comes.")
@click.option("--key", help="Idempotency key: the same one again changes nothing.")
def publish(
    session: str, server: str, type_: str | None, ndjson: BinaryIO | None, key: str | None, **fields: Any
) -> None:
    """Publish progress, an event, or a line each of many; prints the result.

    Its member "control" says what the watchers ask of the worker: continue, pause or cancel.
    Exit status 0 if it was taken, 1 if it was refused, 3 if there is no connection.
    """
    from .client.errors import CannotConnect, ClientError

    base_url, session_id = _session(session, server)
    fields = {name: value for name, value in fields.items() if value is not None and value is not False}
    if "data" in fields:
        fields["data"] = _json(fields["data"])
    if ndjson is not None and (fields or type_ is not None):
        raise click.UsageError("--ndjson goes with --key alone")
    if type_ is not None and fields.keys() - {"data"}:
        raise click.UsageError("--type goes with --data and --key alone")
    if ndjson is None and type_ is None and not fields:
        raise click.UsageError("there is nothing to publish; see --help")

    async def send(publisher: Publisher) -> PublishResult:
        if ndjson is not None:
            async with aclosing(_lines(ndjson.fileno())) as lines:
                return await publisher.batch(session_id, lines, key=key, on_result=_tell)
        if type_ is not None:
            return await publisher.event(session_id, type_, fields.get("data"), key=key)
        return await publisher.progress(session_id, key=key, **fields)

    try:
        result = _run(partial(_publish, base_url, send))
    except CannotConnect as error:
        _fail(str(error), _UNREACHABLE)
    except (ClientError, ValueError) as error:
        _fail(_describe_error(error), 1)
    shown = {"id": result.id, "control": result.control.value}
    _print_json(shown if ndjson is None else {"applied": result.applied, **shown})


async def _publish(base_url: str, send: Callable[[Publisher], Awaitable[T]]) -> T:
    from .client import Publisher

    async with Publisher(base_url, retry_timeout=5.0) as publisher:
        return await send(publisher)


async def _lines(fd: int) -> AsyncGenerator[bytes]:
    """Read lines as they are written, from whatever ``fd`` is.

    Files and terminals cannot be waited for, so a thread waits, one that is left behind when we leave.
    It reads the descriptor itself: whoever is left behind with a lock of ``sys.stdin`` stops the exit.
    """
    import os

    import trio

    rest = b""
    while chunk := await trio.to_thread.run_sync(os.read, fd, 65536, abandon_on_cancel=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _tell(result: PublishResult) -> None:
    """Say at once what the watchers ask, for a pipe may stay open for hours."""
    if result.control != "continue":
        click.echo(f"sseserve: the watchers ask: {result.control.value}", err=True)


def _describe_error(error: Exception) -> str:
    from .client.errors import RequestRejected

    if isinstance(error, RequestRejected) and error.line is not None:
        return f"{error} ({error.applied} applied)"
    return str(error)


def _session(text: str, server: str) -> tuple[str, str]:
    """Take a session's URL apart, whichever of its URLs it is; an id belongs to ``server``."""
    if "://" not in text:
        return _base(server), text
    url = urlsplit(text)
    prefix, found, path = url.path.partition("/api/sessions/")
    session_id = unquote(path.partition("/")[0])
    scheme = {"http": "http", "https": "https", "ws": "http", "wss": "https"}.get(url.scheme)
    if not found or not session_id or scheme is None or not url.netloc:
        raise click.BadParameter(f"{text} is not a session's URL (http://host/api/sessions/ID)")
    return f"{scheme}://{url.netloc}{prefix}", session_id


def _base(server: str) -> str:
    url = urlsplit(server)
    if url.scheme not in {"http", "https"} or not url.netloc:
        raise click.BadParameter(f"{server} is not a server's URL (http://host:port)")
    return server


def _json(text: str) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        _fail(f"--data is not JSON: {error}", 1)


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def _run(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` in Trio; Ctrl-C, however deep it struck, is an exit status."""
    import trio

    from .client.errors import unwrap_exception_group

    try:
        with unwrap_exception_group():
            return trio.run(work)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _fail(text: str, status: int) -> NoReturn:
    click.echo(f"sseserve: {text}", err=True)
    sys.exit(status)
