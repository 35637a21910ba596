"""The command ``doctor``."""

from __future__ import annotations

import os
import re
import sys
from functools import partial

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

__all__ = ["doctor"]

MAX_IDLE = 3600.0  # seconds
_ORIGIN = re.compile(r"https?://[\w.:\[\]-]+", re.ASCII)


@click.command()
@click.argument("url")
@token_option
@ca_option
@click.option("--origin", help="Origin of a page, such as https://app.example.com: try CORS. [default: none]")
@click.option(
    "--idle",
    type=click.FloatRange(1, MAX_IDLE),
    default=5.0,
    show_default=True,
    help="Seconds of silence: shorter timeouts of a proxy are found. The server is silent for up to 30.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON. [default: a table]")
def doctor(
    url: str, token: str | None, ca: str | None, origin: str | None, idle: float, *, as_json: bool
) -> None:
    """Find out what is wrong between this machine and the server at URL, such as a proxy that buffers.

    Says for each problem which line of the proxy's configuration to change. Nothing is published or stored.

    \b
    Exit status:
      0    no problem
      1    problems
      2    usage error
      3    cannot connect, or the server rejected the requests
      130  interrupted
    """
    from ..client.console import run
    from ..client.doctor import diagnose, render
    from ..client.errors import ClientError

    if origin is not None and _ORIGIN.fullmatch(origin) is None:
        raise click.BadParameter(
            f"{origin!r} is not an origin (https://app.example.com)", param_hint="--origin"
        )
    work = partial(diagnose, url, token=check_token(token), ca=check_ca(ca), origin=origin, idle=idle)
    try:
        report = run(work)
    except ClientError as error:
        fail(str(error), CANNOT_CONNECT)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="URL") from None
    if as_json:
        print_json(report)
    else:
        color = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        click.echo(render(report, color=color), color=color)
    sys.exit(REJECTED if report.has_problems else 0)
