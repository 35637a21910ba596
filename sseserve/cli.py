"""The command line. Each command parses its options, calls the package, and returns an exit status.

Modules are imported where they are used, so that ``watch`` does not wait for the server's libraries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

import click

if TYPE_CHECKING:
    from .client import Publisher, PublishResult
    from .client.watcher import Transport
    from .config import Settings
    from .engines.sqlite.transfer import Totals

__all__ = ["main"]

T = TypeVar("T")

# Exit statuses; click's own for a usage error is 2.
_REJECTED = 1
_CANNOT_CONNECT = 3
_INTERRUPTED = 130

_server = click.option(
    "--server",
    envvar="SSE_SERVER",
    default="http://127.0.0.1:8000",
    show_default=True,
    show_envvar=True,
    help="URL of the server; ignored if a session's URL is given.",
)


class _Group(click.Group):
    """Commands that end quietly on Ctrl-C, and when nobody reads their output any more."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            from .client.console import discard_output

            discard_output()
            ctx.exit(0)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _option, given: _print_version(ctx) if given else None,
    help="Show the version and exit.",
)
def main() -> None:
    """Stream the progress of long-running work over SSE, WebSocket and long-poll."""
    # A character that the terminal cannot display must not raise an exception.
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


@main.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 selects a free one. [default: 8000]"
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes on the port; they share a Redis. [default: 1]"
)
@click.option(
    "--engine",
    metavar="URL",
    help="Where logs live: memory:, sqlite:PATH, redis://HOST:PORT/DB. [default: REDIS_URL, else memory:]",
)
@click.option("--config", type=click.Path(dir_okay=False), help="TOML file with settings. [default: none]")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Minimum level to log. [default: info]",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Log format. [default: text]")
def serve(config: str | None, **flags: Any) -> None:
    """Run the server until SIGTERM, SIGINT or SIGHUP.

    Settings come from the defaults, the TOML file, SSESERVE_* environment variables and the options;
    later sources override earlier ones.

    \b
    Exit status:
      0    stopped by a signal
      1    cannot listen on the address and port, or cannot start workers
      2    invalid option or setting, or the engine cannot be opened
    """
    from .server import run

    _run_server(run, _settings(config, flags))


@main.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on. [default: a free one]"
)
def demo(**flags: Any) -> None:
    """Run a server with demonstration jobs, and print its URL."""
    from .server import run

    # One process, whatever SSESERVE_WORKERS says: it is to be watched.
    _run_server(lambda settings: run(settings, with_demo=True), _settings(None, {**flags, "workers": 1}))


@main.group(name="log")
def log_() -> None:
    """Export, import and check the file of the engine sqlite:PATH."""


_path = click.argument("path", type=click.Path(dir_okay=False, path_type=Path))


@log_.command(name="export")
@_path
@click.argument("output", type=click.File("wb"), default="-")
def log_export(path: Path, output: BinaryIO) -> None:
    """Write all sessions of the file PATH as NDJSON to OUTPUT.

    The default is standard output. A server may have the file open: its state at one moment is written.

    \b
    Exit status:
      0    all is written, or nobody reads the output any more
      2    usage error, or the file cannot be used
      130  interrupted
    """
    from .engines.sqlite.transfer import export_log

    _report("exported", _refuse(partial(export_log, path, output)))


@log_.command(name="import")
@_path
@click.argument("input_", metavar="[INPUT]", type=click.File("rb"), default="-")
def log_import(path: Path, input_: BinaryIO) -> None:
    """Store what was exported, from INPUT, in the file PATH, which must be new or empty.

    The default is standard input. All of it is stored, or nothing.

    \b
    Exit status:
      0    all is stored
      1    the input is wrong or incomplete
      2    usage error, or the file cannot be used
      130  interrupted
    """
    from .engines.sqlite.transfer import import_log
    from .errors import Invalid

    try:
        counts = _refuse(partial(import_log, path, input_))
    except Invalid as error:
        _fail(str(error), _REJECTED)
    _report("imported", counts)


@log_.command(name="check")
@_path
def log_check(path: Path) -> None:
    """Check that the file PATH is sound: SQLite's own structures, that no event is missing, and the records.

    A server may have the file open. Prints a line for each problem.

    \b
    Exit status:
      0    all is well
      1    there are problems
      2    usage error, or the file cannot be used
      130  interrupted
    """
    from .engines.sqlite.transfer import check_log

    problems: list[str] = []
    _report("checked", _refuse(partial(check_log, path, problems)))
    for problem in problems:
        click.echo(problem)
    sys.exit(_REJECTED if problems else 0)


def _refuse(work: Callable[[], T]) -> T:
    """Return what ``work`` returns; end the command if a file cannot be used."""
    from .errors import ConfigError

    try:
        return work()
    except ConfigError as error:
        _fail(str(error), 2)


def _report(what: str, counts: Totals) -> None:
    text = ", ".join(
        f"{count} {name if count == 1 else name + 's'}"
        for name, count in (
            ("session", counts.sessions),
            ("event", counts.events),
            ("receipt", counts.receipts),
        )
    )
    click.echo(f"sseserve: {what} {text}", err=True)


def _settings(config: str | None, flags: dict[str, Any]) -> Settings:
    from .config import load
    from .errors import ConfigError

    try:
        return load(config, flags=flags)
    except ConfigError as error:
        _fail(str(error), 2)


def _run_server(run: Callable[[Settings], None], settings: Settings) -> None:
    from .errors import ConfigError

    try:
        run(settings)
    except ConfigError as error:
        _fail(str(error), 2)
    except ChildProcessError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}", 1)


@main.command()
@click.argument("session", metavar="URL|ID")
@_server
@click.option(
    "--transport",
    type=click.Choice(["sse", "ws", "poll"]),
    default="sse",
    show_default=True,
    help="Transport: Server-Sent Events, WebSocket or long-poll.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each message as a line of JSON. [default: text]")
@click.option("--cursor", help="Resume after this message id. [default: start with the current state]")
@click.option(
    "--wait",
    is_flag=True,
    help="Wait for a session that does not exist yet. [default: exit, unless the URL's stream would wait]",
)
def watch(
    session: str, server: str, transport: Transport, *, as_json: bool, cursor: str | None, wait: bool
) -> None:
    """Watch a session to its end.

    The session is an id, or any of its URLs on the server, such as that of its stream in any dialect.
    Shows a progress bar in a terminal, otherwise one line per message.

    \b
    Exit status:
      0    the session succeeded, or nobody reads the output any more
      1    it failed
      2    usage error
      3    cannot connect, or the request was rejected (for example: unknown session)
      4    it was cancelled, was lost or was deleted
      130  interrupted
    """
    from .client.console import run, while_output_is_read
    from .client.errors import ClientError
    from .client.terminal import Bar, JsonLines, Lines, follow

    base_url, session_id, dialect_waits = _parse_session(session, server)
    _check_cursor(cursor)
    has_cursor_movement = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    display = JsonLines() if as_json else Bar(base_url) if has_cursor_movement else Lines()
    work = partial(
        follow,
        base_url,
        session_id,
        display,
        transport=transport,
        cursor=cursor,
        wait_for_session=wait or dialect_waits,
    )
    try:
        status = run(partial(while_output_is_read, work))
    except ClientError as error:
        _fail(str(error), _CANNOT_CONNECT)
    sys.exit(status)


@main.command()
@click.argument("session", metavar="URL|ID")
@_server
@click.option("--progress", type=float, help="Progress in percent, 0 to 100. [default: unchanged]")
@click.option(
    "--status",
    help="Status label; completed, failed, cancelled and synonyms end the session. [default: unchanged]",
)
@click.option("--stage", help="Part of the work that is in progress. [default: unchanged]")
@click.option("--message", help="One sentence for the watchers. [default: unchanged]")
@click.option("--error", help="What went wrong. [default: unchanged]")
@click.option("--data", help="Any JSON value. [default: unchanged; null with --type]")
@click.option("--restart", is_flag=True, help="Allow progress to go backwards. [default: rejected]")
@click.option(
    "--type",
    "type_",
    help="Publish an event of this type, with --data. [default: publish a progress update]",
)
@click.option(
    "--ndjson",
    type=click.File("rb"),
    help="Publish each line of this file; - is standard input, sent line by line as it is written. "
    "[default: none]",
)
@click.option(
    "--key",
    help="Idempotency key: a request repeated with the same key is applied once. [default: a new key]",
)
def publish(
    session: str, server: str, type_: str | None, ndjson: BinaryIO | None, key: str | None, **fields: Any
) -> None:
    """Publish progress or events to a session.

    Prints the result as JSON. Its member "control" is what the watchers request of the worker: continue,
    pause or cancel. A session that does not exist is created, and that is said on standard error.

    \b
    Exit status:
      0    published
      1    the server rejected it
      2    usage error, such as a value that is not JSON
      3    cannot connect
      130  interrupted
    """
    from .client.console import read_lines, run
    from .client.errors import CannotConnect, ClientError

    base_url, session_id, _ = _parse_session(session, server)
    fields = {name: value for name, value in fields.items() if value is not None and value is not False}
    if "data" in fields:
        fields["data"] = _parse_json(fields["data"])
    if ndjson is not None and (fields or type_ is not None):
        raise click.UsageError("--ndjson can be combined only with --key")
    if type_ is not None and fields.keys() - {"data"}:
        raise click.UsageError("--type can be combined only with --data and --key")
    if ndjson is None and type_ is None and not fields:
        raise click.UsageError("nothing to publish; see --help")

    announced = False

    def announce_created(result: PublishResult) -> None:
        nonlocal announced
        if result.created and not announced:
            announced = True
            click.echo(f"sseserve: created session {session_id!r}", err=True)

    def on_result(result: PublishResult) -> None:
        announce_created(result)
        _print_control(result)

    async def send(publisher: Publisher) -> PublishResult:
        if ndjson is not None:
            async with aclosing(read_lines(ndjson.fileno())) as lines:
                return await publisher.ndjson(session_id, lines, key=key, on_result=on_result)
        if type_ is not None:
            return await publisher.event(session_id, type_, fields.get("data"), key=key)
        return await publisher.progress(session_id, key=key, **fields)

    try:
        result = run(partial(_publish, base_url, send))
    except CannotConnect as error:
        _fail(str(error), _CANNOT_CONNECT)
    except ClientError as error:
        _fail(_describe_error(error), _REJECTED)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    announce_created(result)
    output = {"id": result.id, "control": result.control.value}
    _print_json(output if ndjson is None else {"applied": result.applied, **output})


async def _publish(base_url: str, send: Callable[[Publisher], Awaitable[T]]) -> T:
    from .client import Publisher

    async with Publisher(base_url, retry_timeout=5.0) as publisher:
        return await send(publisher)


def _print_version(ctx: click.Context) -> None:
    from .version import package_version

    click.echo(f"{ctx.info_name}, version {package_version()}")
    ctx.exit()


def _print_control(result: PublishResult) -> None:
    """Print the watchers' request immediately, since a pipe may stay open for hours."""
    if result.control != "continue":
        click.echo(f"sseserve: the watchers request: {result.control.value}", err=True)


def _describe_error(error: Exception) -> str:
    from .client.errors import RequestRejected

    if isinstance(error, RequestRejected) and error.line is not None:
        return f"{error} ({error.applied} applied)"
    return str(error)


def _parse_session(text: str, server: str) -> tuple[str, str, bool]:
    """Read any URL of a session; a bare id belongs to ``server``.

    Returns:
        The server's URL, the session's id, and whether the streams of the URL's dialect wait for a session.
    """
    if "://" not in text and "/" not in text:
        return _check_server_url(server), text, False
    from .http.routes import ROUTES

    url = urlsplit(text)
    scheme = {"http": "http", "https": "https", "ws": "http", "wss": "https"}.get(url.scheme)
    # A session is the same in all dialects, so the part of a path before its id does not matter.
    for route in ROUTES:
        if "{id}" in route.path and scheme is not None and url.netloc:
            prefix, _, path = url.path.partition(route.path.partition("{id}")[0])
            if session_id := unquote(path.partition("/")[0]):
                return f"{scheme}://{url.netloc}{prefix}", session_id, route.dialect.waits_for_session
    raise click.BadParameter(f"{text} is not a session URL (http://host/api/sessions/ID)")


def _check_server_url(server: str) -> str:
    url = urlsplit(server)
    if url.scheme not in {"http", "https"} or not url.netloc:
        raise click.BadParameter(
            f"{server!r} is not a server URL (http://host:port)", param_hint="--server or SSE_SERVER"
        )
    return server


def _check_cursor(text: str | None) -> None:
    from .model import Cursor

    if text is not None and Cursor.parse(text) is None:
        raise click.BadParameter(
            f"{text!r} is not a message id, as watch --json prints them", param_hint="--cursor"
        )


def _parse_json(text: str) -> Any:
    from .errors import SseserveError
    from .jsontext import decode

    try:
        return decode(text.encode(errors="surrogateescape"), Any)
    except SseserveError as error:
        raise click.BadParameter(str(error), param_hint="--data") from error


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"sseserve: {message}", err=True)
    sys.exit(status)
