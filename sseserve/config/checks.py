"""What the value of a setting may be, and which names there are. Pure.

All that is wrong is found at once. Each problem says what is wrong, where, and what to do; none repeats a
secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import cache
from ipaddress import ip_network
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from .secrets import SECRETS, URLS
from .settings import Settings
from .toml import UNSET

__all__ = ["Problem", "Reader", "hints", "is_list", "plain"]

_HIDDEN = object()  # a value that may be, or hold, a secret

Path = tuple[str | int, ...]


class Problem(msgspec.Struct, frozen=True):
    """Something that is wrong.

    Args:
        text: says what.
        setting: what it belongs to, by its name or the one that was meant; None: nobody knows.
    """

    text: str
    setting: str | None


class Reader:
    """Reads values of one source; ``problems`` has what was wrong.

    Args:
        where: returns the place of a value in the source, as in "in x.toml, line 3".
        called: returns how a setting is called there.
        others: names beside the settings' that may be meant there.
        has_null: ``None`` can be written there.
    """

    def __init__(
        self,
        where: Callable[[Path], str],
        *,
        called: Callable[[str], str] = str,
        others: Sequence[str] = (),
        has_null: bool = False,
    ) -> None:
        self.problems: list[Problem] = []
        self._where = where
        self._called = called
        self._others = others
        self._has_null = has_null

    def read(self, key: str, value: Any, *, written: Any = None) -> dict[str, Any]:
        """Return a setting and its value, or nothing if there is a problem.

        Args:
            key: the name of the setting.
            value: what it is to be, of any type.
            written: how that is written in the source; None: as it is.
        """
        if key not in hints(Settings):
            self._report_unknown((key,), Settings)
            return {}
        before = len(self.problems)
        converted = self._convert((key,), value, hints(Settings)[key], written)
        return {} if len(self.problems) > before else {key: converted}

    def _convert(self, path: Path, value: Any, hint: Any, written: Any = None) -> Any:
        kind = plain(hint)
        origin, args = get_origin(kind), get_args(kind)
        if _is_struct(kind):
            return self._convert_table(path, value, kind)
        if origin is dict and isinstance(value, dict):
            return {name: self._convert((*path, name), item, args[1]) for name, item in value.items()}
        if origin is tuple and _is_struct(args[0]) and isinstance(value, list | tuple):
            return tuple(self._convert((*path, number), item, args[0]) for number, item in enumerate(value))
        if value == UNSET and not self._has_null and NoneType in args:
            return None
        try:
            converted = msgspec.convert(value, hint, strict=False)
        except msgspec.ValidationError:
            holds_tables = origin is dict or (origin is tuple and _is_struct(args[0]))
            if holds_tables:
                self._report_invalid(path, "tables")
            else:
                self._report_invalid(path, _describe(hint, has_null=self._has_null), value, written)
            return None
        items = [converted] if isinstance(converted, str) else converted
        if (check := _FORMATS.get(path)) is not None and not all(map(check[0], items)):
            self._report_invalid(path, check[1], value, written)
        return converted

    def _convert_table(self, path: Path, value: Any, kind: type[msgspec.Struct]) -> Any:
        if isinstance(value, kind):
            return value
        if not isinstance(value, dict):
            self._report_invalid(path, "a table")
            return None
        known, fields, before = hints(kind), {}, len(self.problems)
        for key, item in value.items():
            if key in known:
                fields[key] = self._convert((*path, key), item, known[key])
            else:
                self._report_unknown((*path, key), kind)
        required = [field.name for field in msgspec.structs.fields(kind) if field.required]
        if missing := [name for name in required if name not in value]:
            self.report(f"{self._name(path)} {self._clause(path)} needs {', '.join(missing)}", path[0])
        return None if len(self.problems) > before else kind(**fields)

    def _report_invalid(self, path: Path, expected: str, value: Any = _HIDDEN, written: Any = None) -> None:
        shown = f", not {(value if written is None else written)!r}"
        if value is _HIDDEN or path[-1] in SECRETS | URLS:
            shown = ""
        self.report(f"{self._name(path)} {self._clause(path)} must be {expected}{shown}", path[0])

    def _report_unknown(self, path: Path, kind: type[msgspec.Struct]) -> None:
        key, known = str(path[-1]), [*hints(kind), *(self._others if kind is Settings else ())]
        meant = _nearest(key, known)
        if meant is not None:
            advice = f"did you mean {self._name((*path[:-1], meant))!r}?"
        elif kind is not Settings and key in hints(Settings):
            advice = f"{key!r} must stand above the first table"
        elif kind is not Settings:
            advice = f"there are {', '.join(known)}"
        else:
            advice = "sseserve config template lists all settings"
        text = f"unknown setting {self._name(path)!r} {self._where(path)}: {advice}"
        self.problems.append(Problem(text, meant if kind is Settings else str(path[0])))

    def report(self, text: str, setting: object) -> None:
        """Add a problem with a setting."""
        self.problems.append(Problem(text, str(setting)))

    def _name(self, path: Path) -> str:
        """Return what a value is called, as in ``issuers[0].key``."""
        rest = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])
        return self._called(str(path[0])) + "".join(rest)

    def _clause(self, path: Path) -> str:
        where = self._where(path)
        return f"{where}," if ", " in where else where


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the name that was probably meant; None: none is similar."""
    names = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.7)
    return names[0] if names else None


@cache
def hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the annotations of a struct's fields."""
    return get_type_hints(kind, include_extras=True)


def is_list(key: str) -> bool:
    """Return whether a setting is a list of strings."""
    kind = plain(hints(Settings)[key])
    return tuple[str, ...] in (kind, *get_args(kind))


def plain(hint: Any) -> Any:
    """Return a type without what is said of it."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def _describe(hint: Any, *, has_null: bool = False) -> str:
    """Return what a value must be, such as "a whole number from 0 to 65535"."""
    if get_origin(plain(hint)) is Literal:
        return f"one of {', '.join(get_args(plain(hint)))}"
    kind = inspect.type_info(hint)
    if isinstance(kind, inspect.UnionType):
        (only,) = (one for one in kind.types if not isinstance(one, inspect.NoneType))
        return f"{_describe_type(only)} or {None if has_null else repr(UNSET)}"
    return _describe_type(kind)


def _describe_type(kind: inspect.Type) -> str:
    match kind:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=None):
            return "a whole number"
        case inspect.IntType(le=None):
            return f"a whole number, at least {kind.ge}"
        case inspect.IntType():
            return f"a whole number from {kind.ge} to {kind.le}"
        case inspect.FloatType():
            return "a number" if kind.gt is None else f"a number greater than {kind.gt:g}"
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, kind.values))}"
        case (
            inspect.VarTupleType(item_type=inspect.LiteralType() as item)
            | inspect.FrozenSetType(item_type=inspect.LiteralType() as item)
        ):
            return f"a list of {', '.join(map(str, item.values))}"
        case inspect.VarTupleType(item_type=inspect.StructType()):
            return "tables"
        case inspect.VarTupleType():
            return "a list of strings"
        case inspect.DictType():
            return "tables"
    return "a string"


def _is_network(text: str) -> bool:
    if text == "unix":
        return True
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


# An item in another format would match no request, and so refuse what it is to allow.
_FORMATS: dict[Path, tuple[Callable[[str], object], str]] = {
    ("allowed_hosts",): (
        re.compile(r"\*|\.?[^\s:/@*?#\[\]]+|[\da-f.]*:[\da-f.]*:[\da-f:.]*", re.IGNORECASE).fullmatch,
        "host names or addresses without scheme and port, such as a.example or .a.example, or *",
    ),
    ("cors_origins",): (
        re.compile(r"\*|null|[a-z][a-z\d+.-]*://[^\s/@*?#A-Z]+").fullmatch,
        "origins as browsers send them, such as https://a.example or http://localhost:3000, or *",
    ),
    ("trusted_proxies",): (
        _is_network,
        "addresses or networks, such as 192.0.2.7 or 10.0.0.0/8, without bits behind the prefix, or unix",
    ),
    ("unix_socket_mode",): (
        re.compile("0?[0-7]{3}").fullmatch,
        "permissions in octal digits, such as 0660",
    ),
}
