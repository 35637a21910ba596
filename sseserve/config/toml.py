"""TOML: the lines of a document's keys, and values as TOML. Pure."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["UNSET", "encode", "key_lines", "line_of"]

UNSET = "unset"  # stands for None, which neither TOML nor the environment has

Path = tuple[str | int, ...]


def key_lines(text: str) -> dict[Path, int]:
    """Return on which line each key and each table of a valid document begins, counted from 1.

    Each statement of TOML is on lines of its own and is a document by itself, so the parser says where it
    ends. Items of an array of tables are numbered from 0.
    """
    found: dict[Path, int] = {}
    table: Path = ()
    statement: list[str] = []
    first = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            first = number
        statement.append(line.rstrip("\r"))
        try:
            parsed = tomllib.loads("\n".join(statement))
        except tomllib.TOMLDecodeError:
            continue  # it goes on
        if statement[0].lstrip().startswith("["):
            table = _header(parsed, found)
            for length in range(1, len(table) + 1):
                found.setdefault(table[:length], first)
        else:
            for path in _paths(parsed, table):
                found.setdefault(path, first)
        statement = []
    return found


def _header(parsed: Any, found: Mapping[Path, int]) -> Path:
    """Return the path of the table that a header begins."""
    path: Path = ()
    while parsed:
        if isinstance(parsed, list):
            path = (*path, sum(known[:-1] == path and isinstance(known[-1], int) for known in found))
            parsed = parsed[0]
        else:
            ((key, parsed),) = parsed.items()
            path = (*path, key)
    return path


def _paths(value: Any, path: Path) -> Iterator[Path]:
    """Return the paths of everything in a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """Return the line of a value, or else of what it is in; None: it is not in the document."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def encode(value: Any) -> str:
    """Write a value on one line."""
    match value:
        case None:
            return encode(UNSET)
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:_}" if abs(value) >= 100_000 else str(value)
        case float():
            return encode(int(value)) if value.is_integer() else repr(value)
        case str():
            # JSON escapes as TOML does, but leaves DEL, which TOML does not allow.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(encode, value))}]"
    raise TypeError(f"a {type(value).__name__} is not written on one line")
