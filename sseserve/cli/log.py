"""The commands of the file of the engine sqlite:PATH: ``log export``, ``log import``, ``log check``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import click

from .common import REJECTED, fail

if TYPE_CHECKING:
    from ..engines.sqlite.transfer import Totals

__all__ = ["log"]

T = TypeVar("T")


@click.group()
def log() -> None:
    """Export, import and check the file of the engine sqlite:PATH."""


_path = click.argument("path", type=click.Path(dir_okay=False, path_type=Path))


@log.command(name="export")
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
    from ..engines.sqlite.transfer import export_log

    _report("exported", _refuse(partial(export_log, path, output)))


@log.command(name="import")
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
    from ..engines.sqlite.transfer import import_log
    from ..errors import Invalid

    try:
        counts = _refuse(partial(import_log, path, input_))
    except Invalid as error:
        fail(str(error), REJECTED)
    _report("imported", counts)


@log.command(name="check")
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
    from ..engines.sqlite.transfer import check_log

    problems: list[str] = []
    _report("checked", _refuse(partial(check_log, path, problems)))
    for problem in problems:
        click.echo(problem)
    sys.exit(REJECTED if problems else 0)


def _refuse(work: Callable[[], T]) -> T:
    """Return what ``work`` returns; end the command if a file cannot be used."""
    from ..errors import ConfigError

    try:
        return work()
    except ConfigError as error:
        fail(str(error), 2)


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
