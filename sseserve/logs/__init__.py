"""The log on standard error: one record a line, as text or as JSON.

Lines have fields, and the ids of what they belong to. Whoever logs never waits for standard error.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

from .context import JobIds, LogContext, RequestIds, begin_context, current_context, note_user
from .lines import JSONFormatter, Line, TextFormatter, hide_addresses
from .writer import BackgroundHandler

__all__ = [
    "JobIds",
    "Levels",
    "Line",
    "LogContext",
    "RequestIds",
    "TextFormatter",
    "begin_context",
    "configure",
    "current_context",
    "note_user",
    "set_levels",
]


class Levels:
    """``access`` is the level of the lines of requests that were served without an error."""

    access = logging.DEBUG


def set_levels(level: str, *, access_log: bool) -> None:
    """Log from ``level`` on; with ``access_log`` each request at level info, not at debug."""
    Levels.access = logging.INFO if access_log else logging.DEBUG
    logging.getLogger().setLevel(level.upper())


def configure(
    level: str,
    form: str,
    worker: int | None = None,
    *,
    access_log: bool = False,
    in_background: bool = True,
) -> None:
    """Write this process's log to standard error.

    Args:
        level: the minimum level.
        form: ``text`` or ``json``.
        worker: the number of this process, if it is one of several; each line has it.
        access_log: log each request at level info.
        in_background: a thread writes. Not for a process that forks, which must have no threads.
    """
    handler: logging.Handler = logging.StreamHandler()
    if in_background:
        with suppress(OSError):  # what stands in for standard error may be no file
            handler = BackgroundHandler(sys.stderr.fileno())
    if form == "json":
        handler.setFormatter(JSONFormatter(worker))
    else:
        name = "%(name)s" if worker is None else f"worker {worker} %(name)s"
        handler.setFormatter(TextFormatter(f"%(asctime)s %(levelname)-7s {name}: %(message)s"))
    handler.addFilter(hide_addresses)
    logging.basicConfig(handlers=[handler], force=True)
    set_levels(level, access_log=access_log)
    for library in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)  # they log whole URLs, which may have secrets
