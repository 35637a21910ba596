"""Settings as a document: the template of a file, and those in use, each with its source. Pure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import msgspec

from .about import About, descriptions
from .checks import hints, plain
from .environment import other_names
from .secrets import shown
from .settings import Settings
from .tables import Issuer
from .toml import encode

__all__ = ["as_builtins", "show", "template"]

WIDTH = 100  # characters of a line
_TABLES = ("claims", "roles", "issuers")  # follow all other settings, as TOML needs it

_HEAD = """\
Settings of sseserve. Each line has a default: remove the # in front of it, and change the value.

Environment variables override this file, and options of the command override both. In the environment ttl
is SSESERVE_TTL, and the items of a list are separated by commas. "unset" stands for no value. What is
marked [reloads] is read again on SIGHUP; all else needs a restart.

sseserve config check FILE says what is wrong, sseserve config show what is in use.
"""


def template() -> str:
    """Return a TOML file with all settings as comments: each with its default, unit and reason."""
    lines = [f"# {line}".rstrip() for line in _HEAD.splitlines()]
    default, known = Settings(), descriptions(Settings)
    for name, about in known.items():
        lines += _heading(about)
        if name not in _TABLES:
            lines += [*_describe(Settings, name, about), f"#{name} = {encode(getattr(default, name))}", ""]
    for name in _TABLES:
        lines += _describe(Settings, name, known[name])
        if name == "claims":
            lines += ["#[claims]", *_fields(default.claims, "#"), ""]
        elif name == "roles":
            for role, rights in default.roles.items():
                lines += [
                    f"#[roles.{role}]",
                    *_fields(rights, "#", described=role == next(iter(default.roles))),
                ]
                lines.append("")
        else:
            lines += ["# For example:", "#     [[issuers]]", *_fields(_EXAMPLE, "#     ")]
    return "\n".join(lines) + "\n"


_EXAMPLE = Issuer(issuer="https://id.example", jwks_url="https://id.example/jwks.json")


def show(settings: Settings, sources: Mapping[str, str]) -> str:
    """Return settings as a TOML document, each with a comment that says where it comes from; without secrets.

    What has no value, as by default, is a comment. So a file with this document says the same.

    Args:
        settings: to be shown.
        sources: where those come from that do not have their defaults.
    """
    lines: list[str] = []
    default = Settings()
    for name, about in descriptions(Settings).items():
        lines += _heading(about)[:-1]
        if name not in _TABLES:
            value = getattr(settings, name)
            line = _show(name, value, about, is_default=value == getattr(default, name))
            lines.append(f"{line}  # {sources.get(name, 'default')}")
    tables: list[tuple[str, str, msgspec.Struct]] = [("claims", "[claims]", settings.claims)]
    tables += [("roles", f"[roles.{_key(role)}]", rights) for role, rights in settings.roles.items()]
    tables += [("issuers", "[[issuers]]", issuer) for issuer in settings.issuers]
    for name, header, table in tables:
        lines += ["", f"{header}  # {sources.get(name, 'default')}"]
        for key, about in descriptions(type(table)).items():
            # What may have no value in a table has none by default.
            lines.append(_show(key, getattr(table, key), about, is_default=True))
    return "\n".join(lines).lstrip("\n") + "\n"


def _show(name: str, value: Any, about: About, *, is_default: bool) -> str:
    if value is None and is_default:
        return f"# {name}: not set ({about.unset})"
    return f"{name} = {encode(as_builtins(name, value))}"


def as_builtins(name: str, value: Any) -> Any:
    """Return the value of a setting as JSON has it, without secrets."""
    if isinstance(value, msgspec.Struct):
        return {key: as_builtins(key, getattr(value, key)) for key in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: as_builtins(key, item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [as_builtins("", item) for item in value]
    return sorted(value) if isinstance(value, frozenset) else shown(name, value)


def _heading(about: About) -> list[str]:
    return [] if about.heading is None else ["", f"# {about.heading}", ""]


def _describe(kind: type[msgspec.Struct], name: str, about: About) -> list[str]:
    unit = "" if about.unit is None else f" ({about.unit})"
    sentences = [f"{about.text}{unit}. {about.reason[0].upper()}{about.reason[1:]}."]
    if get_origin(hint := plain(hints(kind)[name])) is Literal:
        sentences.append(f"One of {', '.join(get_args(hint))}.")
    if about.unset is not None:
        sentences.append(f'"unset": {about.unset}.')
    if kind is Settings and (names := other_names(name)):
        sentences.append(f"In the environment also {', '.join(names)}.")
    if about.reloads:
        sentences.append("[reloads]")
    return _comment(" ".join(sentences))


def _fields(table: msgspec.Struct, mark: str, *, described: bool = True) -> Iterator[str]:
    """Return the fields of a table, behind ``mark``."""
    for key, about in descriptions(type(table)).items():
        if described:
            yield from _describe(type(table), key, about)
        yield f"{mark}{key} = {encode(as_builtins(key, getattr(table, key)))}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else encode(name)
