"""The commands of clients: ``watch`` and ``publish``."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

import click

from .common import (
    CANNOT_CONNECT,
    REJECTED,
    ca_option,
    check_ca,
    check_token,
    fail,
    print_json,
    token_option,
)

if TYPE_CHECKING:
    from ..client import Publisher, PublishResult
    from ..client.watcher import Transport

__all__ = ["publish", "watch"]

T = TypeVar("T")

_server = click.option(
    "--server",
    envvar="SSE_SERVER",
    default="http://127.0.0.1:8000",
    show_default=True,
    show_envvar=True,
    help="URL of the server; ignored if a session's URL is given.",
)


@click.command()
@click.argument("session", metavar="URL|ID")
@_server
@token_option
@ca_option
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
    session: str,
    server: str,
    token: str | None,
    ca: str | None,
    transport: Transport,
    *,
    as_json: bool,
    cursor: str | None,
    wait: bool,
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
    from ..client.console import run, while_output_is_read
    from ..client.errors import ClientError
    from ..client.terminal import Bar, JsonLines, Lines, follow

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
        token=check_token(token),
        ca=check_ca(ca),
    )
    try:
        status = run(partial(while_output_is_read, work))
    except ClientError as error:
        fail(_describe_error(error, token), CANNOT_CONNECT)
    sys.exit(status)


@click.command()
@click.argument("session", metavar="URL|ID")
@_server
@token_option
@ca_option
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
    session: str,
    server: str,
    token: str | None,
    ca: str | None,
    type_: str | None,
    ndjson: BinaryIO | None,
    key: str | None,
    **fields: Any,
) -> None:
    """Publish progress or events to a session.

    Prints the result as JSON. Its member "control" is what the watchers request of the worker: continue,
    pause or cancel. A session that does not exist is created, and that is said on standard error.

    \b
    Exit status:
      0    published
      1    the server rejected it
      2    usage error, such as a value that is not JSON
      3    cannot connect, or the token is missing or not valid
      130  interrupted
    """
    from ..client.console import read_lines, run
    from ..client.errors import CannotConnect, ClientError, RequestRejected

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
        result = run(partial(_publish, base_url, check_token(token), check_ca(ca), send))
    except CannotConnect as error:
        fail(str(error), CANNOT_CONNECT)
    except ClientError as error:
        is_unauthorized = isinstance(error, RequestRejected) and error.status == 401
        fail(_describe_error(error, token), CANNOT_CONNECT if is_unauthorized else REJECTED)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    announce_created(result)
    output = {"id": result.id, "control": result.control.value}
    print_json(output if ndjson is None else {"applied": result.applied, **output})


async def _publish(
    base_url: str, token: str | None, ca: str | None, send: Callable[[Publisher], Awaitable[T]]
) -> T:
    from ..client import Publisher

    async with Publisher(base_url, token=token, ca=ca, retry_timeout=5.0) as publisher:
        return await send(publisher)


def _print_control(result: PublishResult) -> None:
    """Print the watchers' request immediately, since a pipe may stay open for hours."""
    if result.control != "continue":
        click.echo(f"sseserve: the watchers request: {result.control.value}", err=True)


def _describe_error(error: Exception, token: str | None) -> str:
    from ..client.errors import RequestRejected

    if isinstance(error, RequestRejected) and error.status == 401 and token is None:
        return "the server requires a token: give one with --token or SSESERVE_TOKEN"
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
    from ..http.routes import ROUTES

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
    from ..model import Cursor

    if text is not None and Cursor.parse(text) is None:
        raise click.BadParameter(
            f"{text!r} is not a message id, as watch --json prints them", param_hint="--cursor"
        )


def _parse_json(text: str) -> Any:
    from ..errors import SseserveError
    from ..jsontext import decode

    try:
        return decode(text.encode(errors="surrogateescape"), Any)
    except SseserveError as error:
        raise click.BadParameter(str(error), param_hint="--data") from error
