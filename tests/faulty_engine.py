"""An engine that a test makes slow, unavailable, full or deaf, and that another instance appends to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import trio

from sseserve.config import Settings
from sseserve.engines import ALL, EngineListener
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import EngineUnavailable, InsufficientStorage, SseserveError
from sseserve.model import Event, Session

METHODS = (
    *("load", "latest", "settled", "append", "read", "receipt", "sessions"),
    *("count", "leased", "jobs", "delete", "expire", "wait_followed"),
)
UNREACHABLE = "Redis does not respond"
FULL = "the disk is full"


class FaultyEngine(EngineListener):
    """A memory engine with faults.

    ``calls`` counts the calls of each method; each takes ``delay`` seconds.

    ``elsewhere`` is the same engine as another instance has it: what is appended to it is delivered here as
    that instance's. While ``is_deaf`` nothing is delivered here. ``followed`` are the sessions that are.
    """

    immediate = False

    def __init__(
        self,
        settings: Settings,
        listener: EngineListener,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.memory = MemoryEngine(settings, self, clock)
        self.elsewhere = _Elsewhere(self)
        self.problem: str | None = None
        self.delay = 0.0
        self.is_deaf = False
        self.followed: set[str] = set()
        self.calls: Counter[str] = Counter()
        self._listener = listener
        self._own = True
        self._errors: dict[str, Callable[[], SseserveError]] = {}  # by method
        self._stores_first = False

    # Faults

    def fail(
        self,
        methods: Collection[str] = METHODS,
        *,
        announced: bool = True,
        stores_first: bool = False,
        hangs: float = 0.0,
    ) -> None:
        """Make methods raise ``EngineUnavailable``.

        Args:
            announced: the engine says so in ``problem``, and to its listener.
            stores_first: ``append`` stores what it is given before it raises.
            hangs: seconds until they raise.
        """
        self._errors = dict.fromkeys(methods, lambda: EngineUnavailable(UNREACHABLE))
        self._stores_first = stores_first
        self.delay = hangs
        if announced:
            self._set_problem(UNREACHABLE)

    def fill(self) -> None:
        """Make ``append`` raise ``InsufficientStorage``; reading goes on."""
        self._errors = {"append": lambda: InsufficientStorage(FULL)}
        self._set_problem(FULL)

    def recover(self) -> None:
        """End all faults."""
        self._errors, self._stores_first, self.delay, self.is_deaf = {}, False, 0.0, False
        self._set_problem(None)

    def _set_problem(self, problem: str | None) -> None:
        if problem != self.problem:
            self.problem = problem
            self._listener.availability_changed(problem)

    def resync(self, session_id: str) -> None:
        """Say that what follows of a session does not continue what was delivered."""
        self._listener.resync(session_id)

    # The engine

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.memory.run(task_status=task_status)

    def follow(self, session_id: str) -> None:
        assert session_id not in self.followed
        self.followed.add(session_id)

    def unfollow(self, session_id: str) -> None:
        self.followed.remove(session_id)

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(name)

        async def call(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            if self.delay:
                await trio.sleep(self.delay)
            if name == "wait_followed":
                assert args[0] in self.followed
            if name not in self._errors:
                result = await getattr(self.memory, name)(*args, **options)
                if self.delay:
                    await trio.lowlevel.checkpoint()
                return result
            if name == "append" and self._stores_first:
                await self.memory.append(*args, **options)
            raise self._errors[name]()

        return call

    # What the memory engine delivers

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        if self._hears(session):
            self._listener.deliver(session, events)

    def removed(self, session: Session, *, own: bool = True) -> None:
        if self._hears(session):
            self._listener.removed(session, own=self._own)

    def _hears(self, session: Session) -> bool:
        return not self.is_deaf and (self._own or bool({session.id, ALL} & self.followed))


class _Elsewhere:
    """A memory engine whose appends and deletions are another instance's."""

    def __init__(self, engine: FaultyEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            # Nothing waits in a memory engine, so no append of this instance comes in between.
            self._engine._own = False
            try:
                return await getattr(self._engine.memory, name)(*args, **options)
            finally:
                self._engine._own = True

        return call
