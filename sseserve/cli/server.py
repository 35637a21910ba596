"""The commands that run a server: ``serve`` and ``demo``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .common import config_option, fail, load_settings

if TYPE_CHECKING:
    from ..config import Settings

__all__ = ["demo", "serve"]


_insecure = click.option(
    "--insecure",
    is_flag=True,
    default=None,
    help="Without a key, let everybody who can reach another address than 127.0.0.1 do everything. "
    "[default: refuse to start]",
)
_tls_cert = click.option(
    "--tls-cert",
    type=click.Path(dir_okay=False),
    help="Certificate and its chain (PEM), for https. [default: none]",
)
_tls_key = click.option(
    "--tls-key", type=click.Path(dir_okay=False), help="Key of the certificate (PEM). [default: none]"
)


@click.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 selects a free one. [default: 8000]"
)
@_tls_cert
@_tls_key
@click.option(
    "--unix",
    "unix_socket",
    metavar="PATH",
    help="Unix socket to listen on, instead of host and port.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes on the port; they share a Redis. [default: 1]"
)
@click.option(
    "--engine",
    metavar="URL",
    help="Where logs live: memory:, sqlite:PATH, redis://HOST:PORT/DB. [default: REDIS_URL, else memory:]",
)
@config_option
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Minimum level to log. [default: info]",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Log format. [default: text]")
@_insecure
def serve(config: str | None, **flags: Any) -> None:
    """Run the server until SIGTERM or SIGINT, or until its terminal is closed. SIGHUP reloads the settings.

    Settings come from the defaults, the TOML file (--config, SSESERVE_CONFIG), SSESERVE_* environment
    variables and the options; later sources override earlier ones. With a key (jwt_key, jwks_url or
    issuers) requests need a token; without one everybody may do everything, so only this machine is
    served.

    \b
    Exit status:
      0    stopped by a signal
      1    cannot listen on the address and port, or cannot start workers
      2    invalid option or setting, no key for an address that others reach, or the engine cannot be opened
    """
    from ..config import load
    from ..server import run

    reread = partial(load, config, flags=flags)
    _run(partial(run, reread=reread), load_settings(config, flags))


@click.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on. [default: a free one]"
)
@_tls_cert
@_tls_key
@_insecure
def demo(**flags: Any) -> None:
    """Run a server with demonstration jobs, and print its URL."""
    from ..server import run

    # One process, whatever SSESERVE_WORKERS says: it is to be watched.
    _run(lambda settings: run(settings, with_demo=True), load_settings(None, {**flags, "workers": 1}))


def _run(run: Callable[[Settings], None], settings: Settings) -> None:
    from ..errors import ConfigError

    try:
        run(settings)
    except ConfigError as error:
        fail(str(error), 2)
    except ChildProcessError as error:
        fail(str(error), 1)
    except OSError as error:
        where = settings.unix_socket or f"{settings.host}:{settings.port}"
        fail(f"cannot listen on {where}: {error.strerror or error}", 1)
