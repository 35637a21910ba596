"""The commands of settings: ``config show``, ``config check`` and ``config template``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .common import USAGE, fail, print_json
from .server import serve

if TYPE_CHECKING:
    from ..config.sources import Loaded

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

    loaded = _read(config, flags)
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


@config.command(params=[*serve.params])
@click.argument("file", required=False, type=click.Path(dir_okay=False))
def check(file: str | None, config: str | None, **flags: Any) -> None:
    """Say all that is wrong with settings, without starting a server.

    They are those that serve --config FILE would have in the same environment with the same options: what
    serve would refuse is refused here. FILE may be given with --config, too, or by SSESERVE_CONFIG. Nothing
    is listened on, connected to, or changed.

    \b
    Exit status:
      0    serve would accept them
      2    invalid option or setting
    """
    from ..server.checks import find_refusals

    loaded = _read(file or config, flags)
    texts = [problem.text for problem in loaded.problems]
    # What is wrong already has its default now, and would be complained about again.
    wrong = {problem.setting for problem in loaded.problems}
    for refusal in find_refusals(loaded.settings):
        if wrong.isdisjoint(refusal.names):
            source = next((loaded.sources[name] for name in refusal.names if name in loaded.sources), None)
            texts.append(refusal.text if source is None else f"{refusal.text} ({source})")
    if texts:
        fail("\n".join(texts), USAGE)
    click.echo("the settings are valid: serve would start with them")


def _read(file: str | None, flags: dict[str, Any]) -> Loaded:
    from ..config.sources import read_all
    from ..errors import ConfigError

    try:
        return read_all(file, flags=flags)
    except ConfigError as error:
        fail(str(error), USAGE)


@config.command()
def template() -> None:
    """Print a TOML file with every setting as a comment: its default, unit and reason.

    \b
    sseserve config template > sseserve.toml
    """
    from ..config.document import template

    click.echo(template(), nl=False)
