"""Commands to a Redis, whichever servers it has; see ``connection``.

``RedisClient`` pipelines all commands to a server on one connection: what waits is written together.

Guarantee: every command ends within ``DEADLINE`` plus its own timeout, with its response or an error. While
Redis does not respond, ``problem`` says so and commands fail at once; ``run`` checks it until it is back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any

import trio
from coredis import exceptions
from coredis.connection import TCPLocation

from ...backoff import Backoff, with_jitter
from ...concurrency import raise_single_error
from ...errors import ConfigError, EngineUnavailable
from .address import RedisAddress
from .connection import Connections, Location, Value, parse_info, request
from .faults import LOST, describe, is_temporary, reason

__all__ = ["RedisClient", "Script", "client_for"]

DEADLINE = 3.0  # seconds in which a command that was not executed is tried again
BACKOFF = Backoff(initial=0.02, maximum=0.5)  # between two tries
MAX_TOGETHER = 128  # commands
LAST_USE = 5.0  # seconds for which whoever runs it waits for the others to end
CHECK = 1.0  # seconds between two checks that Redis responds
CHECK_AWAY = 0.4  # and at most while it does not

log = logging.getLogger(__name__)


class Script:
    """A Lua script, which is sent as a whole only to a server that does not know it yet."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode()).hexdigest()  # noqa: S324 - how Redis names a script


class RedisClient:
    """Sends commands; opens connections when they are needed.

    ``run`` must run meanwhile: ``await nursery.start(client.run)``. Responses are as in RESP3: ``bytes``,
    ``int``, ``None``, lists, and dicts for maps. All methods raise ``EngineUnavailable`` while Redis does not
    respond, or if it does not in time, and coredis's ``ResponseError`` if the command itself is refused.

    Args:
        url: see ``RedisAddress.parse``. Whether it is a Cluster is found out.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.address = RedisAddress.parse(url)
        self.problem: str | None = None  # why Redis cannot be used now, in a sentence
        # Called with the reason when Redis does not respond, with None when it does again.
        self.on_availability: list[Callable[[str | None], None]] = []
        # Called when Redis was restarted, or another server has taken its place.
        self.on_restart: list[Callable[[], None]] = []
        self._users = 0  # tasks that run it
        self._is_open = trio.Event()
        self._is_unused = trio.Event()
        self._replication_ids: set[bytes] = set()  # of the servers
        self._check_now = trio.Event()
        self._connections = Connections(self.address)
        self.connect = self._connections.connect
        self.location_of = self._connections.location_of
        self.disconnect = self._connections.disconnect

    @property
    def is_cluster(self) -> bool:
        """Whether the Redis is a Cluster, once this runs."""
        return self._connections.is_cluster

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, report that it has started, and check the connection until cancelled.

        Several tasks may run it. It is connected until the last of them is cancelled.

        Raises:
            ConfigError: Redis cannot be reached, or refuses the login.
        """
        self._users += 1
        await (self._run_with_others if self._users > 1 else self._run_first)(task_status)

    async def _run_with_others(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            await self._is_open.wait()
            if self._connections.nursery is None:
                raise ConfigError(f"cannot use the Redis at {self.address}")
            task_status.started()
            await trio.sleep_forever()
        finally:
            self._users -= 1
            if self._users == 0:
                self._is_unused.set()

    async def _run_first(self, task_status: trio.TaskStatus[None]) -> None:
        self._is_open, self._is_unused = trio.Event(), trio.Event()
        scope = trio.CancelScope()
        with raise_single_error():
            async with trio.open_nursery() as nursery:
                try:
                    await nursery.start(self._run, scope)
                    scope.shield = True
                    self._is_open.set()
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._users -= 1
                    if self._users:
                        with trio.move_on_after(LAST_USE, shield=True):
                            await self._is_unused.wait()
                    self._connections.nursery = None
                    self._is_open.set()
                    scope.cancel()

    async def _run(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope, raise_single_error():
            async with trio.open_nursery() as self._connections.nursery:
                try:
                    info = await self._send(None, ("INFO", "cluster"))
                    self._connections.is_cluster = b"cluster_enabled:1" in info
                    await self.check()
                except (EngineUnavailable, exceptions.RedisError, *LOST) as error:
                    what_to_do = (
                        "; start it, or name another one with --engine or REDIS_URL"
                        if isinstance(error, LOST)
                        else ""
                    )
                    raise ConfigError(
                        f"cannot use the Redis at {self.address}: {reason(error)}{what_to_do}"
                    ) from error
                task_status.started()
                await self._watch()

    # Commands

    async def execute(
        self,
        *command: Value,
        key: str | bytes | None = None,
        timeout: float | None = None,
        repeatable: bool = True,
    ) -> Any:
        """Send a command and return its response.

        Args:
            command: its words, such as ``"SET", "a", 1``.
            key: decides which node of a Cluster executes it; None: the second word is the key.
            timeout: seconds until the response; None: ``COMMAND_TIMEOUT``.
            repeatable: it is sent again when the connection breaks before its response has come. If False, an
                ``EngineUnavailable`` leaves open whether it was executed.
        """
        if self.problem is not None:
            raise EngineUnavailable(self.problem)
        key = "".join(map(str, command[1:2])) if key is None else key
        deadline = trio.current_time() + DEADLINE
        failures = 0
        target: Location | None = None  # where a part of a Cluster's keys is moved to
        while True:
            location, sent = target, False
            error: Exception
            try:
                if location is None:
                    location = await self.location_of(key)
                connection = await self._connections.get(location)
                if target is not None:
                    connection.create_request(b"ASKING")
                    target = None
                sent = True
                return await request(connection, command, timeout)
            except exceptions.MovedError as caught:
                error = caught
                self._connections.note_change()
            except exceptions.AskError as caught:
                target, error = TCPLocation(caught.host, caught.port), caught
            except (exceptions.RedisError, *LOST) as caught:
                error = caught
                refused = isinstance(caught, exceptions.ResponseError | exceptions.BusyLoadingError)
                if refused and not is_temporary(caught):
                    raise
                self.disconnect(location)
                if sent and not refused and not repeatable:
                    self._check_now.set()
                    raise EngineUnavailable(f"Redis did not confirm: {reason(caught)}") from caught
            delay = BACKOFF.delay(failures)
            if trio.current_time() + delay > deadline:
                self._check_now.set()
                raise EngineUnavailable(describe(error)) from error
            failures += 1
            await trio.sleep(delay)

    async def evaluate(
        self,
        script: Script,
        keys: Sequence[str | bytes],
        arguments: Sequence[Value] = (),
        *,
        timeout: float | None = None,
        repeatable: bool = True,
    ) -> Any:
        """Execute a script on the server that has ``keys``, which are all in one slot of a Cluster."""
        words = (len(keys), *keys, *arguments)
        key = keys[0]
        try:
            return await self.execute(
                "EVALSHA", script.digest, *words, key=key, timeout=timeout, repeatable=repeatable
            )
        except exceptions.NoScriptError:
            return await self.execute(
                "EVAL", script.source, *words, key=key, timeout=timeout, repeatable=repeatable
            )

    async def execute_many(
        self, commands: Sequence[Sequence[Value]], *, timeout: float | None = None
    ) -> list[Any]:
        """Send commands together, whose second words are their keys; return their responses in that order."""
        responses: list[Any] = [None] * len(commands)

        async def execute(numbers: range) -> None:
            for number in numbers:
                responses[number] = await self.execute(*commands[number], timeout=timeout)

        # What several tasks send at once is written together.
        tasks = min(len(commands), MAX_TOGETHER)
        with raise_single_error():
            async with trio.open_nursery() as nursery:
                for first in range(tasks):
                    nursery.start_soon(execute, range(first, len(commands), tasks))
        return responses

    async def _send(self, location: Location | None, command: Sequence[Value]) -> Any:
        try:
            return await request(await self._connections.get(location), command)
        except (exceptions.RedisError, *LOST):
            self.disconnect(location)
            raise

    async def used_memory(self) -> int:
        """Return how many bytes Redis uses, on all primaries together."""
        infos = [
            parse_info(await self._send(location, ("INFO", "memory")))
            for location in await self._connections.primaries()
        ]
        return sum(int(info[b"used_memory"]) for info in infos)

    # Availability

    async def _watch(self) -> None:
        """Check that Redis responds: often while it does not."""
        while True:
            with trio.move_on_after(with_jitter(CHECK_AWAY) if self.problem else CHECK):
                await self._check_now.wait()
            self._check_now = trio.Event()
            try:
                try:
                    await self.check()
                except exceptions.ConnectionError:  # the connection broke, perhaps while Redis is well
                    await self.check()
            except (exceptions.RedisError, EngineUnavailable, *LOST) as error:
                self._connections.note_change()
                self._set_problem(error)
            else:
                self._set_problem(None)

    async def check(self) -> None:
        """Raise an error if a primary does not respond, or is none any more."""
        self._connections.note_change()
        await self._connections.leave_old_primary()
        replication_ids = set()
        for location in await self._connections.primaries():
            info = parse_info(await self._send(location, ("INFO", "replication")))
            if info.get(b"role") != b"master":
                self.disconnect(location)
                raise exceptions.StalePrimaryError("the server is a replica")
            replication_ids.add(info.get(b"master_replid", b""))
        if not self._connections.has_all_slots:
            raise exceptions.ClusterDownError("no node serves a part of the keys")
        before, self._replication_ids = self._replication_ids, replication_ids
        if before and not replication_ids <= before:
            for restarted in self.on_restart:
                restarted()

    def _set_problem(self, error: Exception | None) -> None:
        problem = None if error is None else describe(error)
        before, self.problem = self.problem, problem
        if (before is None) == (problem is None):
            return
        if problem is None:
            log.info("the Redis at %s can be used again", self.address)
        else:
            log.warning("the Redis at %s cannot be used: %s", self.address, problem)
        for changed in self.on_availability:
            changed(problem)


def client_for(url: str, engine: object) -> RedisClient:
    """Return what an engine uses, if it is for this URL, else a client of its own."""
    client = getattr(engine, "client", None)
    return client if isinstance(client, RedisClient) and client.url == url else RedisClient(url)
