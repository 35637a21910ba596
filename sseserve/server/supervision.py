"""Background services: tasks that run as long as the server does, and whose failure does not end it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from ..engines import Engine
from ..errors import InsufficientStorage, Unavailable
from ..metrics import Counters

__all__ = ["EngineTasks", "supervise"]

log = logging.getLogger(__name__)

FIRST_DELAY = 1.0  # seconds before a service that has failed is started again
LONGEST_DELAY = 60.0


async def supervise(name: str, service: Callable[[], Awaitable[None]], counters: Counters) -> None:
    """Run a service to its end; start it again whenever it has failed, after a delay that doubles each time.

    Args:
        name: of the service, for the log and the metrics.
        service: the service.
        counters: count its failures.
    """
    counters.background_failures.setdefault(name, 0)
    delay = FIRST_DELAY
    while True:
        started_at = trio.current_time()
        try:
            await service()
        except Exception:
            counters.background_failures[name] += 1
            if trio.current_time() - started_at > LONGEST_DELAY:
                delay = FIRST_DELAY
            log.exception("background service %s has failed; it starts again in %g s", name, delay)
        else:
            return
        await trio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY)


class EngineTasks:
    """What background services do with the engine. While it is unavailable they leave it out and go on.

    If the engine has not said itself that it is, that is logged once when it begins and once when it ends.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._left_out: set[str] = set()  # names of services, of which it is logged

    async def attempt(self, name: str, task: Awaitable[None]) -> bool:
        """Do a task of the service ``name``; return whether the engine could do it."""
        try:
            await task
        except (Unavailable, InsufficientStorage) as error:
            if name not in self._left_out and self._engine.problem is None:
                self._left_out.add(name)
                log.warning("background service %s waits for the engine: %s", name, error)
            return False
        if name in self._left_out:
            self._left_out.remove(name)
            log.info("background service %s goes on", name)
        return True
