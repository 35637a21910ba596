"""The log on standard error: one record a line, as text or as JSON."""

from __future__ import annotations

import logging
import re
import sys

import msgspec

from .model import isotime

__all__ = ["TextFormatter", "configure"]


# Control characters, and other ends of lines.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class TextFormatter(logging.Formatter):
    """Writes a record as text. What a client has sent cannot end its line and look like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of the standard library
        line = super().formatMessage(record)
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


class _JSONFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": isotime(record.created),
            "level": record.levelname.lower(),
            **self._worker,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str, form: str, worker: int | None = None) -> None:
    """Write this process's log to standard error, from ``level`` on, as ``text`` or ``json``.

    Each line names the ``worker``, if the process is one of several.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JSONFormatter(worker))
    else:
        name = "%(name)s" if worker is None else f"worker {worker} %(name)s"
        handler.setFormatter(TextFormatter(f"%(asctime)s %(levelname)-7s {name}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in ("httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)  # they log whole URLs, which may have secrets
