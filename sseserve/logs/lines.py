"""Lines of the log: a message with fields, as text or as JSON."""

from __future__ import annotations

import logging
import re

import msgspec

from ..model import isotime
from .context import current_fields

__all__ = ["JSONFormatter", "Line", "TextFormatter", "hide_addresses"]

# Control characters, and other ends of lines.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_QUERY, _USERINFO = re.compile(r"\?\S*"), re.compile(r"//[^/@\s]+@")
_PLAIN = re.compile(r"[^\s\"=\\]+")  # values that are written as text without quotes


class Line:
    """A message with fields, for ``log.info(Line("stream ended", events=3))``.

    As text it is ``stream ended events=3``; in the JSON format the fields are members. The ids of what it
    belongs to are added. Values are strings, numbers or booleans; None: there is none.
    """

    __slots__ = ("fields", "message", "trace")

    def __init__(self, message: str, **fields: object) -> None:
        self.message = message
        self.trace = ""  # of an exception, if it is not that of the record
        self.fields = fields
        for name, value in current_fields().items():
            fields.setdefault(name, value)

    def __str__(self) -> str:
        trace = self.trace and f"\n{self.trace}"
        return f"{self.message}{format_fields(self.fields)}{trace}"


def format_fields(fields: dict[str, object]) -> str:
    """Write fields as `` name=value`` each; a value in quotes if it has spaces, quotes or ``=``."""
    pairs = [f" {name}={_format_value(value)}" for name, value in fields.items() if value is not None]
    return "".join(pairs)


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if _PLAIN.fullmatch(text) else msgspec.json.encode(text).decode()


def hide_addresses(record: logging.LogRecord) -> bool:
    """Hide what may be secret in the addresses that OpenTelemetry logs when it cannot export.

    A filter of a handler: it passes all records.
    """
    if record.name.startswith("opentelemetry"):
        message = _USERINFO.sub("//***@", _QUERY.sub("?***", record.getMessage()))
        record.msg, record.args, record.exc_info = message, (), None
    return True


class TextFormatter(logging.Formatter):
    """Writes a record as text. What a client has sent cannot end its line and look like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of the standard library
        line = super().formatMessage(record)
        if not isinstance(record.msg, Line) and (fields := current_fields()):
            line += format_fields(fields)
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


class JSONFormatter(logging.Formatter):
    """Writes a record as a JSON object: ``time``, ``level``, ``logger``, ``message``, and its fields."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        message, fields = record.getMessage(), current_fields()
        if isinstance(record.msg, Line):
            message = record.msg.message
            fields = {name: value for name, value in record.msg.fields.items() if value is not None}
        line: dict[str, object] = {
            "time": isotime(record.created),
            "level": record.levelname.lower(),
            **self._worker,
            "logger": record.name,
            "message": message,
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif isinstance(record.msg, Line) and record.msg.trace:
            line["exception"] = record.msg.trace
        return msgspec.json.encode(line).decode()
