"""The lines of the log."""

from __future__ import annotations

import logging
import sys

from sseserve.logs import TextFormatter


def format_record(message: str, *arguments: object, **options: object) -> str:
    record = logging.LogRecord("sseserve", logging.WARNING, "", 0, message, arguments, None)
    record.exc_info = options.get("exc_info")
    return TextFormatter("%(levelname)s %(name)s: %(message)s").format(record)


def test_what_a_client_sends_stays_on_one_line():
    """A session's id in the path of a request may hold any characters."""
    line = format_record("No active listeners for session %s", "a\r\nERROR b\x1b[2J\x85\u2028\u00e9")
    expected = "WARNING sseserve: No active listeners for session a\\r\\nERROR b\\x1b[2J\\x85\\u2028\u00e9"
    assert line == expected


def test_a_traceback_has_lines():
    """It is after the line of its record."""
    try:
        raise ValueError("a")
    except ValueError:
        lines = format_record("failed", exc_info=sys.exc_info()).splitlines()
    assert lines[0] == "WARNING sseserve: failed"
    assert lines[-1] == "ValueError: a"
