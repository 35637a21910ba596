"""Settings: defaults < TOML file < environment < flags. An unknown key is an error in each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .errors import ConfigError

__all__ = ["Settings", "ignored_variables", "load"]

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. Times are in seconds and sizes in bytes, unless the name says otherwise."""

    # Address
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    # Sessions
    auto_create: bool = True  # publishing to a session that does not exist creates it
    ttl: Positive = 3600.0  # how long a session is kept after its end
    idle_ttl: Positive = 86400.0  # how long one that has not ended is kept after its last update
    max_sessions: Count = 100_000
    history_events: Count = 10_000  # a session's log keeps that many events
    history_bytes: Count = 4 * 2**20  # and that many bytes of them

    # Jobs that run in the server
    max_running_jobs: Count = 4
    max_waiting_jobs: Count = 1000
    demo_seconds: Positive = 20.0  # how long a demonstration takes

    # Streams
    buffer_events: Count = 1024  # how much may wait for one client
    buffer_bytes: Count = 256 * 1024
    retry_ms: Count | None = None  # the reconnection time that streams ask for; None leaves it to the client
    heartbeat: Positive | None = None  # between two heartbeats; None leaves it to the dialect
    max_age: Positive | None = (
        None  # of a stream, in the dialects that have one; None leaves it to the dialect
    )
    throttle: Positive | None = None  # between two updates of the amount, in the dialects that have one
    max_streams_per_user: Count | None = None  # None: no limit
    enable_sse: bool = True  # False: the dialects that can be disabled are polled
    send_timeout: Positive = 20.0  # one write, of at most 64 KiB, that takes longer closes the connection

    # Connections and requests
    max_connections: Count | None = None  # None: what the file limit allows, less 64
    request_timeout: Positive = 10.0  # to read a request's head, or the next bytes of its body
    keep_alive: Positive = 75.0  # how long a connection may be idle
    max_body: Count = 2**20  # of a request's body, or of one line of NDJSON
    drain: Positive = 4.0  # from SIGTERM to the exit of the process

    # Redis: no engine of this version uses it, and a warning says so
    redis_host: str | None = None
    redis_port: Annotated[int, Meta(ge=1, le=65535)] = 6379
    redis_password: str | None = None

    # Other origins
    cors_origins: tuple[str, ...] = ()  # exact origins; "*": all others, without credentials


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
        _check(values, f"in {path}")
    environ = os.environ if environ is None else environ
    aliases = {
        key: value for name in _ALIASES if name in environ for key, value in _alias(name, environ[name])
    }
    variables = {
        name.removeprefix("SSESERVE_").lower(): _parse(name, text)
        for name, text in environ.items()
        if name.startswith("SSESERVE_")
    }
    _check(aliases, f"in the environment ({', '.join(_ALIASES)})")
    _check(variables, "in the environment (SSESERVE_*)")
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    _check(given, "among the flags")
    return msgspec.convert({**values, **aliases, **variables, **given}, Settings, strict=False)


# The names that other systems have for the same settings, and the unit in seconds, if it is a time.
_ALIASES: dict[str, tuple[str, float | None]] = {
    "PORT": ("port", None),
    "SSE_HEARTBEAT_INTERVAL": ("heartbeat", 0.001),
    "SSE_CONNECTION_TIMEOUT": ("max_age", 1),
    "ENABLE_SSE": ("enable_sse", None),
    "REDIS_HOST": ("redis_host", None),
    "REDIS_PORT": ("redis_port", None),
    "REDIS_PASSWORD": ("redis_password", None),
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


def _alias(name: str, text: str) -> list[tuple[str, Any]]:
    """Read a variable of another system; an empty one counts as not set."""
    key, unit = _ALIASES[name]
    if not text.strip():
        return []
    if unit is None:
        return [(key, text.strip().lower() if key == "enable_sse" else text)]
    try:
        return [(key, float(text) * unit)]
    except ValueError:
        raise ConfigError(f"{name} must be a number, not {text!r}") from None


def _parse(name: str, text: str) -> Any:
    """Read an environment variable: the items of a list are separated by commas."""
    if name == "SSESERVE_CORS_ORIGINS":
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _check(values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for what ``Settings`` cannot hold; it names the key and its source."""
    for name in values:
        if name not in Settings.__struct_fields__:
            raise ConfigError(f"unknown setting {name!r} {where}")
    try:
        msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad setting {where}: {error}") from error
