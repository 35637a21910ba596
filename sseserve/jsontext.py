"""JSON from publishers, as text: read strictly, kept as one line. No I/O.

What a publisher sends is kept as it was written, so that its clients get it back unchanged; but it is
checked before it is stored, and it holds no line end, because an event stream would split it there.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec

from .errors import BadRequest, Invalid, InvalidProgress

__all__ = ["MAX_DEPTH", "decode", "is_shallow", "one_line", "to_raw"]

DEPTH_MARGIN = 400  # levels of nesting
MAX_DEPTH = 32  # levels of nesting in what every later event carries along


def decode(body: bytes, kind: type[Any]) -> Any:
    """Decode JSON of a type.

    Raises:
        BadRequest: it is not JSON (RFC 8259), or not UTF-8.
        Invalid: it is JSON of another type; InvalidProgress if it is the member ``progress`` that is wrong.
    """
    try:
        # What is kept as Raw is not looked into by msgspec, and JSON is UTF-8 (RFC 8259, section 8.1).
        body.decode()
        _check_depth(body)
        if b"\\u" in body:
            msgspec.json.decode(body)  # a lone surrogate is not a character; many clients stop there
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise (InvalidProgress if str(error).endswith("`$.progress`") else Invalid)(str(error)) from None
    except RecursionError:
        raise BadRequest("invalid JSON: it is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _syntax_error(body) from None


def _check_depth(text: bytes) -> None:
    """Raise RecursionError for JSON so deep that it could be decoded here, but not where it is used later.

    The limit depends on the calls that led here, so more brackets around it leave a margin.
    """
    if len(text) > DEPTH_MARGIN and text.count(b"{") + text.count(b"[") > DEPTH_MARGIN:
        with contextlib.suppress(msgspec.DecodeError):
            msgspec.json.decode(b"[" * DEPTH_MARGIN + text + b"]" * DEPTH_MARGIN, type=msgspec.Raw)


def _syntax_error(body: bytes) -> BadRequest | InvalidProgress:
    """Return the error for a body that is not JSON: it names the place."""
    if not body.strip():
        return BadRequest("invalid JSON: it is empty")
    constants: list[str] = []  # NaN and Infinity are not JSON, but many encoders write them.
    try:
        json.loads(body.decode(), parse_constant=constants.append)
        reason = "a lone surrogate is not a character"
    except UnicodeDecodeError as error:
        reason = f"byte 0x{body[error.start]:02x} at position {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        # A line of NDJSON has a number of its own.
        line = f"line {error.lineno}, " if b"\n" in body.strip() else ""
        reason = f"{error.msg} at {line}column {error.colno}"
    except ValueError as error:
        reason = str(error)
    if constants:
        return InvalidProgress("NaN and Infinity are not JSON numbers")
    return BadRequest(f"invalid JSON: {reason}")


def to_raw(data: Any) -> msgspec.Raw:
    """Encode ``data`` as one line of JSON.

    Raises:
        Invalid: it cannot be encoded as JSON.
    """
    try:
        text = msgspec.json.encode(data)
        _check_depth(text)
        if isinstance(data, msgspec.Raw):
            msgspec.json.decode(text)  # it has not been checked yet
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"the data cannot be written as JSON: {error}") from None
    return one_line(text)


def one_line(text: bytes | msgspec.Raw) -> msgspec.Raw:
    """Remove the line ends from JSON that may have been indented."""
    text = bytes(text)
    return msgspec.Raw(msgspec.json.format(text, indent=-1) if b"\n" in text or b"\r" in text else text)


def is_shallow(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Return whether ``value`` is nested at most ``depth`` deep, so that every JSON library can write it."""
    if isinstance(value, dict):
        return depth > 0 and all(is_shallow(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(is_shallow(item, depth - 1) for item in value)
    return True
