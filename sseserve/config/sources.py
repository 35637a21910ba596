"""Where settings come from: defaults < TOML file < environment < flags. Unknown keys are errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConfigError
from .checks import check
from .settings import Settings

__all__ = ["ignored_variables", "load", "override"]


def override(settings: Settings, fields: Mapping[str, Any]) -> Settings:
    """Return ``settings`` with other values for some fields.

    Raises:
        ConfigError: a field is unknown, or a value has the wrong type or range.
    """
    for name, value in fields.items():
        check(name, value, "among the arguments", name)
    return msgspec.convert({**msgspec.structs.asdict(settings), **fields}, Settings, strict=False)


def load(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the settings from a file, the environment and flags. Later sources override earlier ones.

    In the environment they are called ``SSESERVE_*``. Some have another name too, which other systems use:
    ``PORT``, ``SSE_HEARTBEAT_INTERVAL`` (milliseconds), ``SSE_CONNECTION_TIMEOUT`` (seconds), ``ENABLE_SSE``,
    ``REDIS_*``. ``SSESERVE_*`` overrides these.

    Args:
        path: of a TOML file; None: there is none.
        environ: the environment; None: that of this process.
        flags: values by the settings' names; None as a value: not given.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or a value has the wrong type or range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = msgspec.toml.decode(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        for key, value in values.items():
            check(key, value, f"in {path}", key)
    environ = os.environ if environ is None else environ
    aliases: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for name, text in environ.items():
        # An empty variable of another system counts as not set.
        if name in _ALIASES and text.strip():
            for key in _ALIASES[name][0]:
                aliases[key] = _alias(name, text)
                check(key, aliases[key], "in the environment", name, text)
        elif name.startswith("SSESERVE_") and name != "SSESERVE_TOKEN":  # that is the clients'
            key = name.removeprefix("SSESERVE_").lower()
            variables[key] = _parse(name, text)
            check(key, variables[key], "in the environment", name, text)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for key, value in given.items():
        check(key, value, "among the flags", key)
    return msgspec.convert({**values, **aliases, **variables, **given}, Settings, strict=False)


# The names that other systems have for the same settings, and the unit in seconds, if it is a time. One means
# a connection's age in one system, and its idle time in another.
_ALIASES: dict[str, tuple[tuple[str, ...], float | None]] = {
    "PORT": (("port",), None),
    "SSE_HEARTBEAT_INTERVAL": (("heartbeat",), 0.001),
    "SSE_CONNECTION_TIMEOUT": (("max_age", "idle_timeout"), 1),
    "ENABLE_SSE": (("enable_sse",), None),
    "REDIS_URL": (("redis_url",), None),
    "REDIS_HOST": (("redis_host",), None),
    "REDIS_PORT": (("redis_port",), None),
    "REDIS_PASSWORD": (("redis_password",), None),
}


_PUBSUB = (
    "GOOGLE_CLOUD_PROJECT_ID",
    "PUBSUB_STATUS_UPDATES_TOPIC",
    "PUBSUB_STATUS_UPDATES_SUBSCRIPTION",
)


def ignored_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for the variables of other systems that are set but have no effect here."""
    sentences = []
    if names := [name for name in _PUBSUB if environ.get(name, "").strip()]:
        sentences.append(
            f"{', '.join(names)}: this server does not pull from Pub/Sub; let a push subscription deliver to "
            "/api/v1/pubsub/push, or run examples/podcast/subscriber.py, which reads these variables"
        )
    # In production nothing is to be shown to clients but what they may see, which is always so here.
    if (environment := environ.get("NODE_ENV", "").strip()) not in ("", "production"):
        sentences.append(
            f"NODE_ENV={environment}: it has no effect here; for more output use --log-level debug"
        )
    return sentences


def _alias(name: str, text: str) -> Any:
    """Read a variable of another system, in its own unit."""
    keys, unit = _ALIASES[name]
    if unit is None:
        return text.strip().lower() if keys == ("enable_sse",) else text
    try:
        return float(text) * unit
    except ValueError:
        return text


_LISTS = {
    f"SSESERVE_{name}"
    for name in ("ALLOWED_HOSTS", "CORS_ORIGINS", "REDIS_CHANNELS", "REDIS_PUBLISH", "TRUSTED_PROXIES")
}


def _parse(name: str, text: str) -> Any:
    """Read an environment variable: the items of a list are separated by commas."""
    if name in _LISTS:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text
