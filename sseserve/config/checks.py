"""What the value of a setting may be."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any, get_args, get_type_hints

import msgspec

from ..errors import ConfigError
from .secrets import SECRETS, URLS
from .settings import Settings

__all__ = ["check"]


def check(key: str, value: Any, where: str, name: str, text: Any = None) -> None:
    """Raise ConfigError if there is no setting ``key``, or if ``value`` cannot be its value.

    Args:
        key: the setting.
        value: its value.
        where: the source.
        name: what the setting is called there.
        text: how the value is written there; None: as it is.
    """
    if key not in Settings.__struct_fields__:
        called = "" if name == key else f": {name}"
        raise ConfigError(f"unknown setting {key!r} {where}{called}")
    not_given = f", not {(value if text is None else text)!r}"
    if key in SECRETS | URLS:
        not_given = ""  # it may be a secret, or hold one
    try:
        msgspec.convert({key: value}, Settings, strict=False)
    except msgspec.ValidationError as error:
        if key in _TABLES:
            raise ConfigError(f"{name} {where} is wrong: {error}") from error
        raise ConfigError(f"{name} {where} must be {_expected(key, error)}{not_given}") from error
    if key in _FORMATS:
        is_valid, expected = _FORMATS[key]
        if not all(map(is_valid, value)):
            raise ConfigError(f"{name} {where} must be {expected}{not_given}")


def _is_network(text: str) -> bool:
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


# An item in another format would match no request, and so refuse what it is to allow.
_FORMATS: dict[str, tuple[Callable[[str], object], str]] = {
    "allowed_hosts": (
        re.compile(r"\*|\.?[^\s:/@*?#\[\]]+|[\da-f.]*:[\da-f.]*:[\da-f:.]*", re.IGNORECASE).fullmatch,
        "host names or addresses without scheme and port, such as a.example or .a.example, or *",
    ),
    "cors_origins": (
        re.compile(r"\*|null|[a-z][a-z\d+.-]*://[^\s/@*?#A-Z]+").fullmatch,
        "origins as browsers send them, such as https://a.example or http://localhost:3000, or *",
    ),
    "trusted_proxies": (
        _is_network,
        "addresses or networks, such as 192.0.2.7 or 10.0.0.0/8, without bits behind the prefix",
    ),
}

_TABLES = ("claims", "issuers", "roles")
_TYPE_NAMES = {"float": "a number", "int": "a whole number", "bool": "true or false", "array": "a list"}


def _expected(key: str, error: msgspec.ValidationError) -> str:
    """Return what a setting must be, from an error such as "Expected `float` > 0.0 - at `$.ttl`"."""
    if match := re.match(r"Expected `(\w+)[^`]*`([^,]*?)(?:,| - at|$)", str(error)):
        return _TYPE_NAMES.get(match[1], "text") + match[2]
    return "one of " + ", ".join(map(str, get_args(get_type_hints(Settings)[key])))
