"""Commands to a Redis: one server, the primary that Sentinels name, or a Cluster.

``RedisClient`` keeps one connection per server, on which all commands are pipelined: what waits is written
together. It stands on coredis's connections and parser, and not on its clients, whose pools lose a place for
each connection that breaks while it is used.

Guarantee: every command ends within ``DEADLINE`` plus its own timeout, with its response or an error. While
Redis does not respond, ``problem`` says so and commands fail at once; ``run`` checks it until it is back.
"""

from __future__ import annotations

import binascii
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha1
from typing import Any

import trio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from coredis import exceptions
from coredis.connection import (
    BaseConnection,
    TCPConnection,
    TCPLocation,
    UnixDomainSocketConnection,
    UnixDomainSocketLocation,
)

from ...concurrency import raise_single_error
from ...errors import ConfigError, EngineUnavailable
from .address import RedisAddress
from .faults import LOST, CannotConnect, describe, is_temporary, reason

__all__ = ["Location", "RedisClient", "Script", "Value", "client_for", "hash_slot"]

CONNECT_TIMEOUT = 2.0  # seconds to connect to one server and to log in
COMMAND_TIMEOUT = 2.0  # seconds from a command to its response
DEADLINE = 3.0  # seconds in which a command that was not executed is tried again
FIRST_DELAY, LONGEST_DELAY = 0.02, 0.5  # seconds between two tries
MAX_TOGETHER = 128  # commands
LAST_USE = 5.0  # seconds for which whoever runs it waits for the others to end
CHECK = 1.0  # seconds between two checks that Redis responds

SLOTS = 16384  # of a Cluster

Value = str | bytes | int | float
Location = TCPLocation | UnixDomainSocketLocation

log = logging.getLogger(__name__)
# It logs a traceback for each connection that cannot be opened or breaks; what matters is logged here.
logging.getLogger("coredis").setLevel(logging.CRITICAL)


def hash_slot(key: bytes) -> int:
    """Return the slot of a key in a Cluster (Redis Cluster specification, "Hash tags")."""
    start = key.find(b"{")
    if start >= 0 and (end := key.find(b"}", start + 1)) > start + 1:
        key = key[start + 1 : end]
    return binascii.crc_hqx(key, 0) % SLOTS


class Script:
    """A Lua script, which is sent as a whole only to a server that does not know it yet."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode()).hexdigest()  # noqa: S324 - how Redis names a script


def _encode(word: Value) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def _parse_info(text: bytes) -> dict[bytes, bytes]:
    return dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)


class _Attempt:
    """An attempt to connect, which all commands wait for that need the connection."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.connection: BaseConnection | None = None
        self.error: Exception | None = None


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
        self.is_cluster = False
        # Called with the reason when Redis does not respond, with None when it does again.
        self.on_availability: list[Callable[[str | None], None]] = []
        # Called when Redis was restarted, or another server has taken its place.
        self.on_restart: list[Callable[[], None]] = []
        self._users = 0  # tasks that run it
        self._is_open = trio.Event()
        self._is_unused = trio.Event()
        self._replication_ids: set[bytes] = set()  # of the servers
        self._ssl_context = self.address.ssl_context()
        self._nursery: trio.Nursery | None = None
        # By location; that of the primary by None, where Sentinel says what its location is.
        self._connections: dict[Location | None, BaseConnection] = {}
        self._attempts: dict[Location | None, _Attempt] = {}
        self._open_connections: set[BaseConnection] = set()
        self._check_now = trio.Event()
        # Of a Cluster
        self._slots: dict[int, TCPLocation] = {}
        self._slots_are_stale = True
        self._refreshing = trio.Lock()
        if self.address.path is not None:
            self._seeds: list[Location] = [UnixDomainSocketLocation(self.address.path)]
        else:
            self._seeds = [TCPLocation(host, port) for host, port in self.address.hosts]

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
            if self._nursery is None:
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
                    self._nursery = None
                    self._is_open.set()
                    scope.cancel()

    async def _run(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope, raise_single_error():
            async with trio.open_nursery() as self._nursery:
                try:
                    info = await self._send(None, ("INFO", "cluster"))
                    self.is_cluster = b"cluster_enabled:1" in info
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
        delay = FIRST_DELAY
        target: Location | None = None  # where a part of a Cluster's keys is moved to
        while True:
            location, sent = target, False
            error: Exception
            try:
                if location is None:
                    location = await self.location_of(key)
                connection = await self._connection(location)
                if target is not None:
                    connection.create_request(b"ASKING")
                    target = None
                sent = True
                return await self._receive(connection, command, timeout)
            except exceptions.MovedError as caught:
                self._slots_are_stale, error = True, caught
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
            if trio.current_time() + delay > deadline:
                self._check_now.set()
                raise EngineUnavailable(describe(error)) from error
            await trio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - spreads the tries
            delay = min(2 * delay, LONGEST_DELAY)

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

    async def execute_on_primaries(self, *command: Value, timeout: float | None = None) -> list[Any]:
        """Send a command to every primary, of which there are several in a Cluster; return the responses."""
        if self.problem is not None:
            raise EngineUnavailable(self.problem)
        try:
            return [await self._send(location, command, timeout) for location in await self._primaries()]
        except (exceptions.RedisError, *LOST) as error:
            self._check_now.set()
            raise EngineUnavailable(describe(error)) from error

    async def _send(
        self, location: Location | None, command: Sequence[Value], timeout: float | None = None
    ) -> Any:
        try:
            return await self._receive(await self._connection(location), command, timeout)
        except (exceptions.RedisError, *LOST):
            self.disconnect(location)
            raise

    async def _receive(
        self, connection: BaseConnection, command: Sequence[Value], timeout: float | None = None
    ) -> Any:
        timeout = timeout or COMMAND_TIMEOUT
        name, *words = command
        try:
            return await connection.create_request(_encode(name), *words, decode=False, timeout=timeout)
        except TimeoutError:
            # The response may still come, after others; nobody knows which.
            connection.invalidate()
            raise trio.TooSlowError(f"no response to {name!s} within {timeout:g} s") from None

    # Connections

    async def _connection(self, location: Location | None) -> BaseConnection:
        """Return the connection for commands to a server (None: the primary), which is opened if need be."""
        connection = self._connections.get(location)
        if connection is not None and connection.usable:
            return connection
        attempt = self._attempts.get(location)
        if attempt is None:
            if self._nursery is None:
                raise EngineUnavailable("the connection to Redis is closed")
            attempt = self._attempts[location] = _Attempt()
            self._nursery.start_soon(self._try_to_connect, location, attempt)
        await attempt.done.wait()
        if attempt.connection is None:
            assert attempt.error is not None
            raise attempt.error
        return attempt.connection

    async def _try_to_connect(self, location: Location | None, attempt: _Attempt) -> None:
        try:
            attempt.connection = self._connections[location] = await self.connect(location)
        except (exceptions.RedisError, *LOST) as error:
            attempt.error = error
        finally:
            if attempt.connection is None and attempt.error is None:
                attempt.error = EngineUnavailable("the connection to Redis is closed")
            del self._attempts[location]
            attempt.done.set()

    async def connect(self, location: Location | None = None) -> BaseConnection:
        """Open another connection, for subscriptions; see ``location_of``. ``invalidate`` closes it.

        Raises:
            coredis.exceptions.RedisError, OSError, trio.TooSlowError: it cannot be opened.
        """
        if location is not None or self.address.sentinel is None:
            connection = await self._open(location or self._seeds[0], self.address.credentials())
        else:
            connection = await self._open(await self._ask_sentinels(), self.address.credentials())
            info = _parse_info(await self._receive(connection, ("INFO", "replication")))
            if info.get(b"role") != b"master":
                connection.invalidate()
                raise exceptions.StalePrimaryError("the server that Sentinel names is not a primary any more")
        return connection

    async def _open(self, location: Location, credentials: dict[str, Any]) -> BaseConnection:
        if self._nursery is None:  # closed while this was about to connect again
            raise CannotConnect("the connections to Redis are closed: the server stops")
        options = {"connect_timeout": CONNECT_TIMEOUT, "stream_timeout": CONNECT_TIMEOUT, **credentials}
        connection: BaseConnection
        if isinstance(location, TCPLocation):
            connection = TCPConnection(location, ssl_context=self._ssl_context, **options)
        else:
            connection = UnixDomainSocketConnection(location, **options)
        with trio.move_on_after(CONNECT_TIMEOUT):
            try:
                await self._nursery.start(self._serve, connection)
            except (exceptions.ConnectionError, OSError) as error:
                raise CannotConnect(f"cannot connect to Redis: {reason(error)}") from error
            return connection
        raise CannotConnect(f"cannot connect to Redis within {CONNECT_TIMEOUT:g} s")

    async def _serve(self, connection: BaseConnection, *, task_status: trio.TaskStatus[None]) -> None:
        """Let a connection run. That it breaks is no error of this task once it has been open."""
        connection.register_connect_callback(self._open_connections.add)
        try:
            await connection.run(task_status=task_status)
        except Exception:
            if connection not in self._open_connections:
                raise
            log.debug("a connection to Redis has ended", exc_info=True)
        finally:
            self._open_connections.discard(connection)
            for stream in vars(connection).values():  # coredis leaves them open if it cannot connect
                if isinstance(stream, MemoryObjectSendStream | MemoryObjectReceiveStream):
                    stream.close()

    async def _ask_sentinels(self) -> TCPLocation:
        """Return where the primary is."""
        last: Exception | None = None
        for number, location in enumerate(self._seeds):
            connection = None
            try:
                connection = await self._open(location, self.address.credentials(of_sentinel=True))
                command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.sentinel or "")
                response = await self._receive(connection, command)
            except (exceptions.RedisError, *LOST) as error:
                last = error
                continue
            finally:
                if connection is not None:
                    connection.invalidate()
            if response:
                self._seeds.insert(0, self._seeds.pop(number))  # it is asked first the next time
                return TCPLocation(response[0].decode(), int(response[1]))
        raise exceptions.PrimaryNotFoundError(
            f"no Sentinel knows a primary named {self.address.sentinel!r}"
        ) from last

    def disconnect(self, location: Location | None) -> None:
        """Close the connection for commands to a server; in a Cluster, ask again who serves which slot."""
        if (connection := self._connections.pop(location, None)) is not None:
            connection.invalidate()
        self._slots_are_stale = True

    # Which server

    async def location_of(self, key: Value) -> Location | None:
        """Return the node of a Cluster that serves a key; None: there is no Cluster, see ``connect``."""
        if not self.is_cluster:
            return None
        if self._slots_are_stale:
            await self._read_slots()
        location = self._slots.get(hash_slot(_encode(key)))
        if location is None:
            self._slots_are_stale = True
            raise exceptions.ClusterDownError("no node serves a part of the keys")
        return location

    async def _primaries(self) -> list[Location | None]:
        if not self.is_cluster:
            return [None]
        if self._slots_are_stale:
            await self._read_slots()
        return list(dict.fromkeys(self._slots.values()))

    async def _read_slots(self) -> None:
        async with self._refreshing:
            if not self._slots_are_stale:
                return
            last: Exception | None = None
            for location in dict.fromkeys([*self._slots.values(), *self._seeds]):
                try:
                    connection = await self._connection(location)
                    ranges = await self._receive(connection, ("CLUSTER", "SLOTS"))
                except (exceptions.RedisError, *LOST) as error:
                    last = error
                    if (broken := self._connections.pop(location, None)) is not None:
                        broken.invalidate()
                    continue
                assert isinstance(location, TCPLocation)
                self._slots = {}
                for first, final, primary, *_replicas in ranges:
                    node = TCPLocation(primary[0].decode() if primary[0] else location.host, int(primary[1]))
                    self._slots.update(dict.fromkeys(range(first, final + 1), node))
                self._slots_are_stale = False
                return
            raise exceptions.ConnectionError("no node of the Cluster responds") from last

    # Availability

    async def _watch(self) -> None:
        """Check that Redis responds: often while it does not."""
        while True:
            with trio.move_on_after(random.uniform(0.2, 0.4) if self.problem else CHECK):  # noqa: S311
                await self._check_now.wait()
            self._check_now = trio.Event()
            try:
                try:
                    await self.check()
                except exceptions.ConnectionError:  # the connection broke, perhaps while Redis is well
                    await self.check()
            except (exceptions.RedisError, EngineUnavailable, *LOST) as error:
                self._slots_are_stale = True
                self._set_problem(error)
            else:
                self._set_problem(None)

    async def check(self) -> None:
        """Raise an error if a primary does not respond, or is none any more."""
        self._slots_are_stale = True
        await self._leave_old_primary()
        replication_ids = set()
        for location in await self._primaries():
            info = _parse_info(await self._send(location, ("INFO", "replication")))
            if info.get(b"role") != b"master":
                self.disconnect(location)
                raise exceptions.StalePrimaryError("the server is a replica")
            replication_ids.add(info.get(b"master_replid", b""))
        if self.is_cluster and len(self._slots) < SLOTS:
            raise exceptions.ClusterDownError("no node serves a part of the keys")
        before, self._replication_ids = self._replication_ids, replication_ids
        if before and not replication_ids <= before:
            for restarted in self.on_restart:
                restarted()

    async def _leave_old_primary(self) -> None:
        """Close the connection to a server that Sentinel does not name any more; it may go on for a while."""
        connection = self._connections.get(None)
        if self.address.sentinel is None or connection is None:
            return
        with suppress(exceptions.RedisError, *LOST):
            if connection.location != await self._ask_sentinels():
                self.disconnect(None)

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
