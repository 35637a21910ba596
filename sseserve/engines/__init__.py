"""Where logs live, and how several instances of the server share them.

An engine keeps sessions and their logs. It decides nothing: the tracker passes it the record after an
update together with the events that the update made. Every engine guarantees:

1. All or nothing. ``append`` stores the record, the events and the receipt of an idempotency key together, or
   raises an error and stores none of them. Cancelled, it has either not begun or is complete.
2. Order. A log has one event for each ``seq`` from 1 on. Of writers that compete for one ``seq``, in this
   instance or in any other, one succeeds; the others get ``Stale``.
3. Once. Of requests with one idempotency key one is stored, wherever they arrive; others get ``Repeated``.
4. Durability. When ``append`` returns, the events are as durable as the engine says in its own docstring, and
   nothing is read or delivered before it is.
5. Delivery. Every instance that follows a session has its events delivered once, in the order of the log and
   without a gap, each after it can be read. Where the engine cannot do so, it says that by ``resync``.
6. Epochs. What was once delivered under an epoch and a ``seq`` is never replaced by something else under the
   same two: an engine that may have lost events gives the log another epoch.
7. Retention. A log keeps its newest ``history_events`` events, its last event always, and the receipts of its
   newest ``MAX_RECEIPTS`` idempotency keys. Both take at most ``history_bytes``, receipts a quarter of it.
   A session is deleted ``ttl`` after its end, or ``idle_ttl`` after its last event unless it
   is watched. A jump of the clock of day, or a restart, deletes nothing early.
8. Owners. An owner has at most ``max_sessions_per_owner`` sessions, on all instances together: ``append``
   creates no other one.
9. Space. Records, events and receipts of all sessions take at most ``max_log_bytes``. For an append that
   needs more room sessions are deleted that have ended, those first that ended longest ago. If that would not
   be enough the append is refused, and nothing is deleted. The end of a session is stored all the same: that
   session can be deleted from then on.
10. Availability. An engine that cannot store raises ``Unavailable`` or ``InsufficientStorage``, in a bounded
   time, says why in ``problem`` and in the log, and continues by itself when it can store again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from ..config import Settings, hide_password
from ..errors import ConfigError
from .base import ALL, Engine, EngineListener, Page, Repeated, Stale
from .coordination import Coordination, Counts, LocalCoordination, RevocationStore
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
    raise ConfigError(
        f"unknown engine {hide_password(url)!r}: the engines are memory:, sqlite:PATH and redis://HOST"
    )


def open_coordination(
    settings: Settings,
    engine: Engine,
    count_watchers: Callable[[str], Counts],
    clock: Callable[[], float] = time.time,
) -> Coordination:
    """Return what the instances that share an engine coordinate by; ``run`` opens it.

    Args:
        settings: name the engine.
        engine: its connections are used if they can be; it keeps revocations if it can.
        count_watchers: returns who watches a session in this instance.
        clock: returns POSIX seconds.
    """
    if settings.engine_url.startswith(_REDIS):
        from .redis.client import client_for  # needs coredis
        from .redis.coordination import RedisCoordination

        return RedisCoordination(client_for(settings.engine_url, engine), count_watchers, clock)
    store = engine if isinstance(engine, RevocationStore) else None
    return LocalCoordination(count_watchers, store=store, clock=clock)
