"""Where logs live, and how several instances share them. The contract is in ``base``."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..config import Settings
from ..errors import ConfigError
from .base import ALL, Engine, EngineListener, Page, Repeated, Stale
from .coordination import Coordination, Counts, LocalCoordination
from .memory import MemoryEngine

__all__ = [
    "ALL",
    "Coordination",
    "Counts",
    "Engine",
    "EngineListener",
    "Page",
    "Repeated",
    "Stale",
    "open_coordination",
    "open_engine",
]

_REDIS = ("redis:", "rediss:", "unix:")


def open_engine(
    settings: Settings, listener: EngineListener, clock: Callable[[], float] | None = None
) -> Engine:
    """Return the engine that ``settings.engine`` names; ``run`` opens it.

    Args:
        settings: name the engine (``memory:``, ``sqlite:PATH`` or the URL of a Redis: ``redis://``,
            ``rediss://``, ``unix://``), and limit what it keeps.
        listener: is told all that it stores.
        clock: returns the seconds that retention times are measured in, on a monotonic clock; None: the
            engine's own.

    Raises:
        ConfigError: there is no such engine.
    """
    url = settings.engine_url
    if url == "memory:":
        return MemoryEngine(settings, listener, clock or trio.current_time)
    if url.startswith("sqlite:"):
        from .sqlite import SqliteEngine

        return SqliteEngine(settings, listener, clock or trio.current_time)
    if url.startswith(_REDIS):
        from .redis import RedisEngine  # needs coredis

        return RedisEngine(settings, listener, clock)
    raise ConfigError(f"unknown engine {url!r}: the engines are memory:, sqlite:PATH and redis://HOST")


def open_coordination(
    settings: Settings, engine: Engine, count_watchers: Callable[[str], Counts]
) -> Coordination:
    """Return what the instances that share an engine coordinate by; ``run`` opens it.

    Args:
        settings: name the engine.
        engine: its connections are used if they can be.
        count_watchers: returns who watches a session in this instance.
    """
    if settings.engine_url.startswith(_REDIS):
        from .redis.client import client_for  # needs coredis
        from .redis.coordination import RedisCoordination

        return RedisCoordination(client_for(settings.engine_url, engine), count_watchers)
    return LocalCoordination(count_watchers)
