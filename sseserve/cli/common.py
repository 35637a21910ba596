"""What the commands share: exit statuses, settings, and how a command ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from ..config import Settings

__all__ = [
    "CANNOT_CONNECT",
    "INTERRUPTED",
    "REJECTED",
    "USAGE",
    "ca_option",
    "check_ca",
    "check_token",
    "config_option",
    "fail",
    "load_settings",
    "print_json",
    "token_option",
]

# Exit statuses; click's own for a usage error is 2.
REJECTED = 1
USAGE = 2
CANNOT_CONNECT = 3
INTERRUPTED = 130

config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False),
    help="TOML file with settings. [default: SSESERVE_CONFIG, else none]",
)

token_option = click.option(
    "--token",
    envvar="SSESERVE_TOKEN",
    show_envvar=True,
    help="Bearer token. Other users of this machine can see options, not variables. [default: none]",
)
ca_option = click.option(
    "--ca",
    type=click.Path(dir_okay=False),
    help="File of certificates (PEM) that sign the certificates of https servers. "
    "[default: SSL_CERT_FILE, else those that the system trusts]",
)


def load_settings(config: str | None, flags: dict[str, Any]) -> Settings:
    """Read the settings; end the command if they are wrong."""
    from ..config import load
    from ..errors import ConfigError

    try:
        return load(config, flags=flags)
    except ConfigError as error:
        fail(str(error), USAGE)


def print_json(value: Any) -> None:
    """Print a value as a line of JSON."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def fail(message: str, status: int) -> NoReturn:
    """End the command with a message on standard error, which may have several lines."""
    for line in message.splitlines():
        click.echo(f"sseserve: {line}", err=True)
    sys.exit(status)


def check_token(token: str | None) -> str | None:
    """Return the token; an empty variable is none."""
    from ..client.token import check_token as checked

    if not token:
        return None
    try:
        return checked(token)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--token or SSESERVE_TOKEN") from None


def check_ca(path: str | None) -> str | None:
    from ..client.tls import trusted_authorities

    try:
        trusted_authorities(path)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--ca") from None
    return path
