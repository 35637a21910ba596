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
    "config_option",
    "fail",
    "load_settings",
    "print_json",
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
