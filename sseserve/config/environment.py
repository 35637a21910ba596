"""Settings in environment variables, and the variables that are none. Pure.

``SSESERVE_*`` are settings. Some have the names and units of other systems, too. Kubernetes sets variables
for each Service in every container (its documentation, "Service", "Environment variables"); those of Services
called ``sseserve`` or ``redis`` look like settings, and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from .checks import Problem, Reader, hints, is_list
from .secrets import SECRETS
from .settings import Settings
from .toml import UNSET

__all__ = ["CONFIG", "ignored_variables", "other_names", "read_environment", "service_variables"]

CONFIG = "SSESERVE_CONFIG"  # the path of the file

_PREFIX = "SSESERVE_"
# SSESERVE_CONFIG and SSESERVE_TOKEN are of the commands, and no settings.
_COMMANDS = ("config", "token")

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

# Of a Service X with the port 80, called http: X_SERVICE_HOST, X_SERVICE_PORT, X_SERVICE_PORT_HTTP, X_PORT,
# X_PORT_80_TCP, X_PORT_80_TCP_PROTO, _PORT and _ADDR. X_PORT is the name of a setting, but not its value.
_SERVICE = re.compile(r".+_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://\S+:\d+")

# An empty one is probably a value that is missing, and without it the server would let more clients in.
_NEVER_EMPTY = ("jwt_key", "jwks_url", "jwt_issuer")
_TABLES = ("claims", "issuers", "roles")


def read_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """Read the settings of an environment.

    Returns:
        The values, the variable that each comes from, and what is wrong.
    """
    values, sources = dict[str, Any](), dict[str, str]()
    problems: list[Problem] = []
    # SSESERVE_* overrides the names of other systems.
    for name, keys in sorted(_settings(environ), key=lambda pair: pair[0] not in _ALIASES):
        reader = Reader(lambda _path: "in the environment", called=partial(_variable, name), others=_COMMANDS)
        for key in keys:
            read = _read(name, key, environ[name], reader)
            values |= read
            sources |= dict.fromkeys(read, name)
            if reader.problems:
                break  # the same would be said of the next one
        problems += reader.problems
    return values, sources, problems


def _variable(name: str, key: str) -> str:
    """Return the variable of a setting, in an error of the variable ``name``."""
    return name if name in _ALIASES else _PREFIX + key.upper()


def _settings(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return the variables that are settings, or are meant to be, each with the settings' names."""
    for name, text in environ.items():
        if _is_of_service(name, text):
            continue
        if name in _ALIASES:
            yield name, _ALIASES[name][0]
        elif name.startswith(_PREFIX) and name.removeprefix(_PREFIX).lower() not in _COMMANDS:
            yield name, (name.removeprefix(_PREFIX).lower(),)


def _read(name: str, key: str, text: str, reader: Reader) -> dict[str, Any]:
    """Return the setting that a variable has; none if it is empty, or wrong."""
    if key in _TABLES:
        reader.report(f"{name} in the environment: {key} are tables, which only a file has ({CONFIG})", key)
        return {}
    if key not in hints(Settings):
        return reader.read(key, text)
    if is_list(key) and text.strip() != UNSET:
        return reader.read(key, [part.strip() for part in text.split(",") if part.strip()], written=text)
    if not text.strip():
        if key in _NEVER_EMPTY:
            reader.report(f"{name} in the environment is empty: give it a value, or remove it", key)
        return {}
    if key in SECRETS:
        return reader.read(key, text)  # it may begin or end with a space
    unit = _ALIASES[name][1] if name in _ALIASES else None
    return reader.read(key, _in_seconds(text.strip(), unit), written=text)


def _in_seconds(text: str, unit: float | None) -> Any:
    if unit is None:
        return text
    try:
        return float(text) * unit
    except ValueError:
        return text


def _is_of_service(name: str, text: str) -> bool:
    if not name.startswith(_PREFIX) and name != "REDIS_PORT":
        return False
    return bool(_SERVICE.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_PORT.fullmatch(text)))


def service_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables of Services that look like settings and are not read."""
    return sorted(name for name, text in environ.items() if _is_of_service(name, text))


def other_names(key: str) -> list[str]:
    """Return the variables of other systems that are this setting, too."""
    return [name for name, (keys, _unit) in _ALIASES.items() if key in keys]


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
