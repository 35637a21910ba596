"""Where settings come from: defaults < TOML file < environment < flags. Unknown keys are errors."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConfigError
from .checks import Problem, Reader
from .environment import CONFIG, read_environment
from .settings import Settings
from .toml import key_lines, line_of

__all__ = ["Loaded", "load", "override", "read_all"]


class Loaded(msgspec.Struct, frozen=True):
    """What all sources say.

    Args:
        settings: with the values that are valid.
        sources: where each setting comes from that has not its default: "sseserve.toml, line 3", the name of
            a variable, or a flag.
        problems: what is wrong.
    """

    settings: Settings
    sources: dict[str, str]
    problems: list[Problem]


def override(settings: Settings, fields: Mapping[str, Any]) -> Settings:
    """Return ``settings`` with other values for some fields.

    Raises:
        ConfigError: a field is unknown, or a value has the wrong type or range.
    """
    reader = Reader(lambda _path: "among the arguments", has_null=True)
    values = _read(reader, fields)
    _raise(reader.problems)
    return msgspec.structs.replace(settings, **values)


def load(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the settings from a file, the environment and flags. Later sources override earlier ones.

    In the environment they are called ``SSESERVE_*``. Some have another name too, which other systems use:
    ``PORT``, ``SSE_HEARTBEAT_INTERVAL`` (milliseconds), ``SSE_CONNECTION_TIMEOUT`` (seconds), ``ENABLE_SSE``,
    ``REDIS_*``. ``SSESERVE_*`` overrides these. A variable that is empty counts as not set, but is an empty
    list if it is a list. Variables that Kubernetes sets for its Services are not read.

    Args:
        path: of a TOML file; None: the one that ``SSESERVE_CONFIG`` names, if it names one.
        environ: the environment; None: that of this process.
        flags: values by the settings' names; None as a value: not given.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or a value has the wrong type or range. It says
            all that is wrong, each on a line.
    """
    loaded = read_all(path, environ, flags)
    _raise(loaded.problems)
    return loaded.settings


def read_all(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read as ``load`` does, and say where each setting comes from, and all that is wrong.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get(CONFIG, "").strip() or None
    values, sources, problems = ({}, {}, []) if path is None else _read_file(path)
    for more, origins, wrong in (read_environment(environ), _read_flags(flags or {})):
        values |= more
        sources |= origins
        problems += wrong
    return Loaded(Settings(**values), sources, problems)


def _read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    try:
        text = Path(path).read_bytes().decode()
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    lines = key_lines(text)
    reader = Reader(lambda where: f"in {path}, line {line_of(where, lines)}")
    values = _read(reader, table)
    return values, {key: f"{path}, line {line_of((key,), lines)}" for key in values}, reader.problems


def _read_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    reader = Reader(lambda _path: "among the flags")
    values = _read(reader, {key: value for key, value in flags.items() if value is not None})
    return values, {key: f"--{key.replace('_', '-')}" for key in values}, reader.problems


def _read(reader: Reader, fields: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in fields.items():
        values |= reader.read(key, value)
    return values


def _raise(problems: list[Problem]) -> None:
    if problems:
        raise ConfigError("\n".join(problem.text for problem in problems))
