"""The commands of settings: ``config show``, ``config check`` and ``config template``."""

from __future__ import annotations

from typing import Any

import click

from .common import USAGE, fail, print_json
from .server import serve

__all__ = ["config"]


@click.group()
def config() -> None:
    """Show and check settings, and print a template of a file with all of them."""


@config.command(params=[*serve.params])
@click.option("--json", "as_json", is_flag=True, help="Print JSON. [default: TOML]")
def show(config: str | None, *, as_json: bool, **flags: Any) -> None:
    """Print the settings that serve would have with the same options, and where each comes from.

    Secrets are hidden.

    \b
    Exit status:
      0    printed
      2    invalid option or setting
    """
    from ..config.document import as_builtins
    from ..config.document import show as document
    from ..config.sources import read_all
    from ..errors import ConfigError

    try:
        loaded = read_all(config, flags=flags)
    except ConfigError as error:
        fail(str(error), USAGE)
    if loaded.problems:
        fail("\n".join(problem.text for problem in loaded.problems), USAGE)
    settings, sources = loaded.settings, loaded.sources
    if not as_json:
        click.echo(document(settings, sources), nl=False)
        return
    print_json(
        {
            name: {
                "value": as_builtins(name, getattr(settings, name)),
                "source": sources.get(name, "default"),
            }
            for name in settings.__struct_fields__
        }
    )


@config.command()
def template() -> None:
    """Print a TOML file with every setting as a comment: its default, unit and reason.

    \b
    sseserve config template > sseserve.toml
    """
    from ..config.document import template

    click.echo(template(), nl=False)
