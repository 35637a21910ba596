"""A model of an engine that several instances share: what they must do about a network, and no more.

The logs are in a ``MemoryEngine``, which is the server. Between it and an instance everything takes time, a
message that is on its way when the link is cut is lost, and so is a response.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import trio

from sseserve.config import Settings
from sseserve.engines import EngineListener, Page
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import Unavailable
from sseserve.model import Event, Session

from .instances import MakeEngine

__all__ = ["SharedEngine", "SharedMemoryStore"]

DELAY = 0.002  # seconds at most, for one way


class _Publisher(EngineListener):
    """Passes what the server stores to the instances that follow it and can be reached."""

    def __init__(self) -> None:
        self.engines: dict[int, SharedEngine] = {}

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        for engine in self.engines.values():
            engine.receive(session, events)

    def removed(self, session: Session, *, own: bool = True) -> None:
        for engine in self.engines.values():
            engine.receive(session, None)


class SharedMemoryStore:
    """The server. ``make_engine`` returns what makes the engine of an instance."""

    def __init__(self, engine: type[SharedEngine] | None = None) -> None:
        self._class = engine or SharedEngine
        self.listener = _Publisher()
        self.server: MemoryEngine | None = None
        self.cut: set[int] = set()
        self.random = random.Random(0)

    def make_engine(self, instance: int) -> MakeEngine:
        def make(settings: Settings, listener: EngineListener) -> SharedEngine:
            if self.server is None:
                self.server = MemoryEngine(settings, self.listener)
            return self._class(self, listener, instance)

        return make

    def url(self, instance: int) -> str:
        return "memory:"

    async def open(self, nursery: trio.Nursery) -> None:
        self.server = None
        self.cut = set()

    async def before_kill(self, instance: int) -> None:
        self.listener.engines.pop(instance, None)

    async def after_kill(self, instance: int) -> None:
        pass

    async def apply(self, action: str, who: int, how: str) -> None:
        if action == "cut":
            self._lose(who)
        elif action == "drop pubsub":
            for number in range(len(self.listener.engines)):
                self._lose(number)
            self.cut.clear()
        elif action == "heal":
            self.cut.discard(who)

    def _lose(self, instance: int) -> None:
        self.cut.add(instance)
        if (engine := self.listener.engines.get(instance)) is not None:
            engine.lose_connection()

    async def heal(self) -> None:
        self.cut.clear()


class SharedEngine:
    """The engine of one instance."""

    problem = None
    immediate = False

    def __init__(self, store: SharedMemoryStore, listener: EngineListener, number: int) -> None:
        self._store = store
        self._listener = listener
        self._number = number
        self._followed: dict[str, tuple[str, int] | None] = {}  # the epoch and seq that was delivered last
        self._active: set[str] = set()  # of these, the subscriptions that the server knows
        self._interrupted: set[str] = set()  # and those that were lost
        self._connections = 0
        self._send, self._inbox = trio.open_memory_channel[tuple[int, Session, Any]](10_000)
        self._lost = trio.Event()

    @property
    def _server(self) -> MemoryEngine:
        assert self._store.server is not None
        return self._store.server

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._store.listener.engines[self._number] = self
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver)
            nursery.start_soon(self._connect)
            task_status.started()

    # The network

    async def _travel(self) -> None:
        """Raise Unavailable if the link is cut, or is cut meanwhile."""
        connection = self._connections
        await trio.sleep(self._store.random.uniform(0, DELAY))
        if self._number in self._store.cut or connection != self._connections:
            raise Unavailable("the server cannot be reached")

    async def _ask(self, name: str, *arguments: Any, **more: Any) -> Any:
        await self._travel()
        value = await getattr(self._server, name)(*arguments, **more)
        await self._travel()
        return value

    def lose_connection(self) -> None:
        """Lose what is on its way, and all subscriptions."""
        self._connections += 1
        self._interrupted |= self._active
        self._active.clear()
        self._lost.set()

    def receive(self, session: Session, events: Sequence[Event] | None) -> None:
        """Take what the server publishes."""
        if session.id in self._active and self._number not in self._store.cut:
            self._send.send_nowait((self._connections, session, events))

    # Subscriptions

    def follow(self, session_id: str) -> None:
        self._followed[session_id] = None
        self._lost.set()

    def unfollow(self, session_id: str) -> None:
        self._followed.pop(session_id, None)
        self._active.discard(session_id)
        self._interrupted.discard(session_id)

    async def wait_followed(self, session_id: str) -> None:
        with trio.move_on_after(1):
            while session_id in self._followed and session_id not in self._active:
                await trio.sleep(DELAY)
            return
        raise Unavailable("the server cannot be reached")

    async def _subscribe(self) -> None:
        await self._travel()

    async def _connect(self) -> None:
        """Subscribe to what is followed, and get what was missed before."""
        while True:
            try:
                for session_id in self._followed.keys() - self._active:
                    await self._subscribe()
                    self._active.add(session_id)
                    if session_id in self._interrupted:
                        await self._fill(session_id)
                        self._interrupted.discard(session_id)
            except Unavailable:
                self._active.clear()
                await trio.sleep(DELAY)
                continue
            if self._followed.keys() <= self._active:
                await self._lost.wait()
                self._lost = trio.Event()

    async def _deliver(self) -> None:
        async for connection, session, events in self._inbox:
            await trio.sleep(self._store.random.uniform(0, DELAY))
            if connection != self._connections:
                continue  # it was on its way
            if events is None:
                self._followed[session.id] = None
                self._listener.removed(session, own=False)
                continue
            last = self._followed.get(session.id)
            first = session.seq - len(events) + 1
            if last is not None and last[0] == session.epoch and first > last[1] + 1:
                await self._fill(session.id)
            else:
                self._pass_on(session, events)

    async def _fill(self, session_id: str) -> None:
        """Deliver what follows the last event that was delivered."""
        last = self._followed.get(session_id)
        if last is None:
            # Where its watchers are is not known here.
            self._listener.resync(session_id)
            return
        try:
            page: Page | None = await self._ask("read", session_id, last[1], 10_000)
        except Unavailable:
            self._active.discard(session_id)
            self._lost.set()
            return
        if page is None or self._followed.get(session_id) != last:
            return
        if page.session.epoch != last[0] or page.first > last[1] + 1:
            self._listener.resync(session_id)
        elif page.events:
            self._pass_on(page.session, page.events)

    def _pass_on(self, session: Session, events: Sequence[Event]) -> None:
        """Deliver the events that were not delivered yet."""
        last = self._followed.get(session.id)
        if last is not None and last[0] == session.epoch:
            events = [event for event in events if event.seq > last[1]]
        if session.id in self._followed and events:
            self._followed[session.id] = session.epoch, session.seq
            self._listener.deliver(session, events)

    # Logs

    async def load(self, session_id: str) -> Session | None:
        return await self._ask("load", session_id)

    latest = settled = load

    async def append(self, session: Session, events: Sequence[Event], **more: Any) -> None:
        await self._ask("append", session, events, **more)

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        return await self._ask("read", session_id, after, limit)

    async def receipt(self, session_id: str, key: str) -> Any:
        return await self._ask("receipt", session_id, key)

    async def count(self) -> int:
        return await self._server.count()

    async def sessions(self, newest: int | None = None) -> list[Session]:
        return await self._server.sessions(newest)

    async def jobs(self) -> list[Session]:
        return []

    async def leased(self) -> list[Session]:
        return []

    async def delete(self, session_id: str, epoch: str) -> bool:
        return await self._ask("delete", session_id, epoch)

    async def expire(self, watched: Callable[[str], bool]) -> None:
        await trio.lowlevel.checkpoint()
