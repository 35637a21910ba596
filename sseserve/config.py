"""Settings: defaults < TOML file < environment < flags. An unknown key is an error in each of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints
from urllib.parse import quote

import msgspec
from msgspec import Meta

from .errors import ConfigError

__all__ = [
    "ROLES",
    "Claims",
    "Issuer",
    "Role",
    "SettingFields",
    "Settings",
    "hide_password",
    "ignored_variables",
    "load",
    "override",
]

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Right = Literal["create", "watch", "publish", "control", "delete", "revoke"]


# What is in these is shown to nobody: not in a representation, nor in an error.
_SECRETS = frozenset({"jwt_key", "key", "redis_password"})
_URLS = frozenset({"engine", "redis_url"})


def hide_password(url: str) -> str:
    """Return a URL without its credentials, to be shown."""
    return re.sub(r"(password=)[^&#]*", r"\1***", re.sub(r"//.*@", "//***@", url))


def _shown(name: str, value: Any) -> Any:
    if value is None:
        return None
    return "***" if name in _SECRETS else hide_password(value) if name in _URLS else value


class _HidesSecrets(msgspec.Struct, frozen=True):
    """Is represented without its secrets."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, _shown(name, value)) for name, value in msgspec.structs.asdict(self).items()]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({fields})"


class Role(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the holders of a role may do, besides their list, tickets and refreshing: see ``http.auth``.

    Args:
        every: with every session.
        own: with the sessions whose owner they are.
        assigned: with those whose owner is in their claim ``patients``.
        viewer: with those whose viewers name them.
    """

    every: frozenset[Right] = frozenset()
    own: frozenset[Right] = frozenset()
    assigned: frozenset[Right] = frozenset()
    viewer: frozenset[Right] = frozenset()


ROLES = {
    "patient": Role(own=frozenset({"watch", "control"}), viewer=frozenset({"watch"})),
    "therapist": Role(
        own=frozenset({"watch", "control"}),
        assigned=frozenset({"watch", "control"}),
        viewer=frozenset({"watch"}),
    ),
    "service": Role(every=frozenset({"create", "watch", "publish", "control"})),
    "admin": Role(every=frozenset({"create", "watch", "publish", "control", "delete", "revoke"})),
}


class Issuer(_HidesSecrets, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who issues tokens (RFC 7519), as one of several: a table ``[[issuers]]``.

    One of ``key`` and ``jwks_url`` is needed.

    Args:
        issuer: the claim ``iss`` of its tokens.
        audience: one of the claim ``aud``; None: tokens need none.
        key: as the setting ``jwt_key``.
        jwks_url: as the setting of that name.
        roles: those that its tokens may have; None: all that there are.
        capabilities: with ``roles``, its tokens may have capabilities, too.
        subject_prefix: is put before its subjects and patients, so that they are not another issuer's, whose
            tokens cannot name them either.
    """

    issuer: str
    audience: str | None = None
    key: str | None = None
    jwks_url: str | None = None
    roles: tuple[str, ...] | None = None
    capabilities: bool = False
    subject_prefix: str = ""

    @property
    def allowed_roles(self) -> frozenset[str] | None:
        """The roles that its tokens may have; None: all."""
        return None if self.roles is None else frozenset(self.roles)

    @property
    def allows_capabilities(self) -> bool:
        """Whether its tokens may have capabilities: what a role may not, they must not either."""
        return self.roles is None or self.capabilities


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names of the claims that a token's rights are read from."""

    subject: str = "sub"
    role: str = "role"
    patients: str = "patients"
    capabilities: str = "sseserve"


class Settings(_HidesSecrets, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. Times are in seconds and sizes in bytes, unless the name says otherwise."""

    # Address
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    workers: Count = 1  # processes on the port, which share a Redis; the limits below are of each of them

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

    # Jobs: run in the server, or claimed by workers elsewhere
    job_workers: Literal["server", "remote"] = (
        "server"  # "remote": the server itself runs only demonstrations
    )
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
    idle_timeout: Positive | None = None  # and of a stream on which nothing happens
    throttle: Positive | None = None  # between two updates of the amount, in the dialects that have one
    # None: no limit. Both are of all instances together. Without authentication a user is an address.
    max_streams_per_user: Count | None = 1000
    max_streams_per_session: Count | None = 20_000
    # Of this process; for streams None: nine tenths of the connections.
    max_streams: Count | None = None
    max_streams_per_address: Count | None = 1000
    enable_sse: bool = True  # False: the dialects that can be disabled are polled
    send_timeout: Positive = 20.0  # one write, of at most 64 KiB, that takes longer closes the connection

    # Connections and requests
    max_connections: Count | None = None  # None: what the file limit allows, less 64
    request_timeout: Positive = (
        10.0  # to read a request's head, or the next bytes of its body, at 1 KiB/s or more
    )
    ndjson_timeout: Positive = 3600.0  # until the next line of NDJSON begins: a worker sends them as it works
    keep_alive: Positive = 75.0  # how long a connection may be idle
    max_body: Count = 2**20  # of a request's body, or of one line of NDJSON
    drain: Positive = 4.0  # from SIGTERM to the exit of the process
    max_head: Count = 16 * 1024  # of a request's line and header fields
    max_event: Count = 256 * 1024  # of the data of one event or update

    # Limits of each address (IPv6: of each /64) and user. None: no limit
    max_connections_per_address: Count | None = 2000
    connect_rate: Positive | None = 100.0  # streams opened per second; in a burst ten times as many
    publish_rate: Positive | None = 2000.0  # updates and events per second, likewise
    ticket_rate: Positive | None = 20.0  # tickets, and tokens that are refreshed, per second, likewise
    limit_loopback: bool = False  # True: addresses of the loopback interface are limited, too
    max_sessions_per_owner: Count | None = 10_000
    max_log_bytes: Count | None = 2**30  # of all logs and receipts together; ended sessions go first

    # Proxies that say who their client is: addresses and networks, such as 10.0.0.0/8
    trusted_proxies: tuple[str, ...] = ()
    proxy_header: Literal["x-forwarded-for", "forwarded", "proxy-protocol"] = "x-forwarded-for"

    # Authentication; see SECURITY.md. Without a key everybody may do everything
    jwt_key: str | None = None  # a secret, or file:PATH of a secret or of a public key in PEM
    jwks_url: str | None = None  # or where the public keys are
    jwt_issuer: str | None = None  # what the claim iss must be; None: anything
    jwt_audience: str | None = None  # what the claim aud must contain; None: there must be none
    issuers: tuple[Issuer, ...] = ()  # several, each with its key
    claims: Claims = Claims()
    roles: dict[str, Role] = msgspec.field(default_factory=lambda: dict(ROLES))
    max_token_lifetime: Positive = 30 * 86400.0  # a token that expires later is refused
    cookie: str = "__Host-sseserve"  # may hold a token, too
    insecure: bool = False  # True: without a key it may listen on any address, too
    pubsub_audience: str | None = None  # of the tokens that Pub/Sub sends
    pubsub_email: str | None = None  # the service account that they are of
    pubsub_jwks_url: str = "https://www.googleapis.com/oauth2/v3/certs"

    # Engine: where logs live. memory:, sqlite:PATH, redis://..., rediss://... or unix://...
    engine: str | None = None  # None: the Redis that is named below, else memory:
    redis_url: str | None = None
    redis_host: str | None = None
    redis_port: Annotated[int, Meta(ge=1, le=65535)] = 6379
    redis_password: str | None = None
    durability: Literal["full", "normal"] = "normal"  # of sqlite:, see engines/sqlite

    # The Redis channels of other systems: sessions, jobs_v1, transcription; see channels/
    redis_channels: tuple[str, ...] | None = None  # are read; None: all, if a Redis is named
    redis_publish: tuple[str, ...] = ()  # are written

    # Hosts and origins, see http/origins.py
    allowed_hosts: tuple[str, ...] = ()  # more names of the server; ".a.example": and all below it; "*": any
    cors_origins: tuple[str, ...] = ()  # whose pages may do everything; "*": all others, without credentials

    @property
    def has_token_keys(self) -> bool:
        """Whether requests need a token: the settings say what verifies it."""
        return self.jwt_key is not None or self.jwks_url is not None or bool(self.issuers)

    @property
    def engine_url(self) -> str:
        """The URL of the engine: the one that is named, else that of the Redis that is named, else memory."""
        if self.engine is not None:
            return self.engine
        return self._named_redis or "memory:"

    @property
    def channels_url(self) -> str | None:
        """The URL of the Redis of the channels: the one that is named, else that of the engine, else None."""
        return self._named_redis or (self.engine_url if self.is_shared else None)

    @property
    def is_shared(self) -> bool:
        """Whether other instances may have the same logs: they are in Redis."""
        return not self.engine_url.startswith(("memory:", "sqlite:"))

    @property
    def _named_redis(self) -> str | None:
        if self.redis_url is not None:
            return self.redis_url
        if self.redis_host is None:
            return None
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        password = "" if self.redis_password is None else f":{quote(self.redis_password, safe='')}@"
        return f"redis://{password}{host}:{self.redis_port}/0"


class SettingFields(TypedDict, total=False):
    """The fields of ``Settings`` as keyword arguments, for type checkers."""

    host: str
    port: int
    workers: int
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
    auto_create: bool
    ttl: float
    idle_ttl: float
    max_sessions: int
    history_events: int
    history_bytes: int
    job_workers: Literal["server", "remote"]
    max_running_jobs: int
    max_waiting_jobs: int
    demo_seconds: float
    buffer_events: int
    buffer_bytes: int
    retry_ms: int | None
    heartbeat: float | None
    max_age: float | None
    idle_timeout: float | None
    throttle: float | None
    max_streams_per_user: int | None
    max_streams_per_session: int | None
    max_streams: int | None
    max_streams_per_address: int | None
    enable_sse: bool
    send_timeout: float
    max_connections: int | None
    request_timeout: float
    ndjson_timeout: float
    keep_alive: float
    max_body: int
    drain: float
    max_head: int
    max_event: int
    max_connections_per_address: int | None
    connect_rate: float | None
    publish_rate: float | None
    ticket_rate: float | None
    limit_loopback: bool
    max_sessions_per_owner: int | None
    max_log_bytes: int | None
    trusted_proxies: tuple[str, ...]
    proxy_header: Literal["x-forwarded-for", "forwarded", "proxy-protocol"]
    jwt_key: str | None
    jwks_url: str | None
    jwt_issuer: str | None
    jwt_audience: str | None
    issuers: tuple[Issuer, ...]
    claims: Claims
    roles: dict[str, Role]
    max_token_lifetime: float
    cookie: str
    insecure: bool
    pubsub_audience: str | None
    pubsub_email: str | None
    pubsub_jwks_url: str
    engine: str | None
    redis_url: str | None
    redis_host: str | None
    redis_port: int
    redis_password: str | None
    durability: Literal["full", "normal"]
    redis_channels: tuple[str, ...] | None
    redis_publish: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    cors_origins: tuple[str, ...]


def override(settings: Settings, fields: Mapping[str, Any]) -> Settings:
    """Return ``settings`` with other values for some fields.

    Raises:
        ConfigError: a field is unknown, or a value has the wrong type or range.
    """
    for name, value in fields.items():
        _check(name, value, "among the arguments", name)
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
            _check(key, value, f"in {path}", key)
    environ = os.environ if environ is None else environ
    aliases: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for name, text in environ.items():
        # An empty variable of another system counts as not set.
        if name in _ALIASES and text.strip():
            for key in _ALIASES[name][0]:
                aliases[key] = _alias(name, text)
                _check(key, aliases[key], "in the environment", name, text)
        elif name.startswith("SSESERVE_") and name != "SSESERVE_TOKEN":  # that is the clients'
            key = name.removeprefix("SSESERVE_").lower()
            variables[key] = _parse(name, text)
            _check(key, variables[key], "in the environment", name, text)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for key, value in given.items():
        _check(key, value, "among the flags", key)
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


def _check(key: str, value: Any, where: str, name: str, text: Any = None) -> None:
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
    if key in _SECRETS | _URLS:
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
