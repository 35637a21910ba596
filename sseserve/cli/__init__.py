"""The command line. Each command parses its options, calls the package, and returns an exit status.

Modules are imported where they are used, so that ``watch`` does not wait for the server's libraries.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ..extras import MissingExtra
from .client import publish, watch
from .common import INTERRUPTED, USAGE, fail
from .config import config
from .doctor import doctor
from .log import log
from .server import demo, serve
from .token import token

__all__ = ["main"]


class _Group(click.Group):
    """Commands that end quietly on Ctrl-C, and when nobody reads their output any more."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except MissingExtra as error:
            fail(str(error), USAGE)
        except BrokenPipeError:
            from ..client.console import discard_output

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


def _print_version(ctx: click.Context) -> None:
    from ..version import package_version

    click.echo(f"{ctx.info_name}, version {package_version()}")
    ctx.exit()


for command in (serve, demo, config, log, token, watch, publish, doctor):
    main.add_command(command)
