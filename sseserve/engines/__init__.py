"""Where logs live, and how several instances share them. The contract is in ``base``."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..config import Settings
from ..errors import ConfigError
from .base import ALL, Engine, EngineListener, Page, Repeated, Stale
from .memory import MemoryEngine

__all__ = ["ALL", "Engine", "EngineListener", "Page", "Repeated", "Stale", "open_engine"]


def open_engine(
    settings: Settings, listener: EngineListener, clock: Callable[[], float] = trio.current_time
) -> Engine:
    """Return the engine that ``settings.engine`` names: ``memory:`` or ``sqlite:PATH``; ``run`` opens it.

    Args:
        settings: name the engine, and limit what it keeps.
        listener: is told all that it stores.
        clock: returns the seconds that retention times are measured in, on a monotonic clock.

    Raises:
        ConfigError: there is no such engine.
    """
    url = settings.engine_url
    if url == "memory:":
        return MemoryEngine(settings, listener, clock)
    if url.startswith("sqlite:"):
        from .sqlite import SqliteEngine

        return SqliteEngine(settings, listener, clock)
    raise ConfigError(f"unknown engine {url!r}: the engines are memory: and sqlite:PATH")
