"""Where logs live, and how several instances share them. The contract is in ``base``."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..config import Settings
from ..errors import ConfigError
from .base import Deliver, Engine, Page, Stale
from .memory import MemoryEngine

__all__ = ["Deliver", "Engine", "Page", "Stale", "open_engine"]


def open_engine(
    url: str, settings: Settings, deliver: Deliver, clock: Callable[[], float] = trio.current_time
) -> Engine:
    """Open the engine that a URL names: ``memory:``.

    Args:
        url: names the engine.
        settings: limit what it keeps.
        deliver: called with all that it stores.
        clock: returns the seconds that retention times are measured in, on a monotonic clock.

    Raises:
        ConfigError: there is no such engine.
    """
    if url == "memory:":
        return MemoryEngine(settings, deliver, clock)
    raise ConfigError(f"unknown engine {url!r}: the engines are memory:")
