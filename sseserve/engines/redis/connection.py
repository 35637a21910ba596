"""Connections to a Redis: to one server, to the primary that Sentinels name, or to the nodes of a Cluster.

They stand on coredis's connections and parser, and not on its clients, whose pools lose a place for each
connection that breaks while it is used.

Guarantee: opening one ends within ``CONNECT_TIMEOUT`` for each server that is asked, and a request within its
timeout; a connection on which a response has not come in time is not used again.
"""

from __future__ import annotations

import binascii
import logging
from collections.abc import Sequence
from contextlib import suppress
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

from ...errors import EngineUnavailable
from .address import RedisAddress
from .faults import LOST, CannotConnect, reason

__all__ = ["Connections", "Location", "Value", "hash_slot", "parse_info", "request"]

CONNECT_TIMEOUT = 2.0  # seconds to connect to one server and to log in
COMMAND_TIMEOUT = 2.0  # seconds from a command to its response

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


def _encode(word: Value) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


async def request(connection: BaseConnection, command: Sequence[Value], timeout: float | None = None) -> Any:
    """Send a command on a connection, and return its response.

    Args:
        connection: where it is sent.
        command: its words.
        timeout: seconds until the response; None: ``COMMAND_TIMEOUT``.
    """
    timeout = timeout or COMMAND_TIMEOUT
    name, *words = command
    try:
        return await connection.create_request(_encode(name), *words, decode=False, timeout=timeout)
    except TimeoutError:
        # The response may still come, after others; nobody knows which.
        connection.invalidate()
        raise trio.TooSlowError(f"no response to {name!s} within {timeout:g} s") from None


def parse_info(text: bytes) -> dict[bytes, bytes]:
    """Return the fields of a response to INFO."""
    return dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)


class _Attempt:
    """An attempt to connect, which all commands wait for that need the connection."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.connection: BaseConnection | None = None
        self.error: Exception | None = None


class Connections:
    """One connection for the commands to each server, and others for subscriptions.

    Args:
        address: where the Redis is.
    """

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._ssl_context = address.ssl_context()
        self.nursery: trio.Nursery | None = None  # runs them; None: they are closed
        # By location; that of the primary by None, where Sentinel says what its location is.
        self._connections: dict[Location | None, BaseConnection] = {}
        self._attempts: dict[Location | None, _Attempt] = {}
        self._open_connections: set[BaseConnection] = set()
        # Of a Cluster
        self.is_cluster = False
        self._slots: dict[int, TCPLocation] = {}
        self._slots_are_stale = True
        self._refreshing = trio.Lock()
        if address.path is not None:
            self._seeds: list[Location] = [UnixDomainSocketLocation(address.path)]
        else:
            self._seeds = [TCPLocation(host, port) for host, port in address.hosts]

    async def get(self, location: Location | None) -> BaseConnection:
        """Return the connection for commands to a server (None: the primary), which is opened if need be."""
        connection = self._connections.get(location)
        if connection is not None and connection.usable:
            return connection
        attempt = self._attempts.get(location)
        if attempt is None:
            if self.nursery is None:
                raise EngineUnavailable("the connection to Redis is closed")
            attempt = self._attempts[location] = _Attempt()
            self.nursery.start_soon(self._try_to_connect, location, attempt)
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
        if location is not None or self._address.sentinel is None:
            connection = await self._open(location or self._seeds[0], self._address.credentials())
        else:
            connection = await self._open(await self._ask_sentinels(), self._address.credentials())
            info = parse_info(await request(connection, ("INFO", "replication")))
            if info.get(b"role") != b"master":
                connection.invalidate()
                raise exceptions.StalePrimaryError("the server that Sentinel names is not a primary any more")
        return connection

    async def _open(self, location: Location, credentials: dict[str, Any]) -> BaseConnection:
        if self.nursery is None:  # closed while this was about to connect again
            raise CannotConnect("the connections to Redis are closed: the server stops")
        options = {"connect_timeout": CONNECT_TIMEOUT, "stream_timeout": CONNECT_TIMEOUT, **credentials}
        connection: BaseConnection
        if isinstance(location, TCPLocation):
            connection = TCPConnection(location, ssl_context=self._ssl_context, **options)
        else:
            connection = UnixDomainSocketConnection(location, **options)
        with trio.move_on_after(CONNECT_TIMEOUT):
            try:
                await self.nursery.start(self._serve, connection)
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
                connection = await self._open(location, self._address.credentials(of_sentinel=True))
                command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._address.sentinel or "")
                response = await request(connection, command)
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
            f"no Sentinel knows a primary named {self._address.sentinel!r}"
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

    async def primaries(self) -> list[Location | None]:
        """Return the primaries, of which there are several in a Cluster."""
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
                    connection = await self.get(location)
                    ranges = await request(connection, ("CLUSTER", "SLOTS"))
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

    async def leave_old_primary(self) -> None:
        """Close the connection to a server that Sentinel does not name any more; it may go on for a while."""
        connection = self._connections.get(None)
        if self._address.sentinel is None or connection is None:
            return
        with suppress(exceptions.RedisError, *LOST):
            if connection.location != await self._ask_sentinels():
                self.disconnect(None)

    def note_change(self) -> None:
        """Take note that other nodes of a Cluster may serve the slots now."""
        self._slots_are_stale = True

    @property
    def has_all_slots(self) -> bool:
        """Whether some node serves each part of the keys, as far as is known."""
        return not self.is_cluster or len(self._slots) == SLOTS
