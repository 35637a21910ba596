"""A TCP proxy that cuts event streams at random places, for tests of clients that must resume them."""

from __future__ import annotations

import random
import re
import socket
import struct
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import trio

__all__ = ["CuttingProxy"]

HEAD_END = b"\r\n\r\n"
CONNECTION = re.compile(rb"\r\nConnection:[^\r]*", re.IGNORECASE)
# A cut is made behind fewer bytes than one of these, and then behind the next of these places: anywhere, in a
# chunk's size or its end, in a block at each of its fields, between two blocks, between two chunks.
SIZES = (300, 1000, 1500, 3000)
PLACES = (b"", b"\r\n", b"\r", b"data: ", b"\nid: ", b"\n", b"\n\n", b"\n\n\r\n")
# The least of a first response, which says how soon to come back: without that some clients wait for seconds.
FIRST_SIZE = 800


class Cut(NamedTuple):
    """Cut a response behind its first ``size`` bytes and the next ``place``; ``reset``: with RST, not FIN."""

    size: int
    place: bytes
    reset: bool

    def position(self, response: bytearray, start: int) -> int | None:
        """Return where to cut, at or behind ``start``; None: further on."""
        if len(response) < self.size:
            return None
        index = response.find(self.place, max(self.size, start - len(self.place) + 1))
        return None if index < 0 else index + len(self.place)


class CuttingProxy:
    """A proxy on a free port that cuts every response to one of some paths, at places that a seed chooses.

    All other responses, and those that are shorter than their cut, pass as they are.

    Args:
        url: of the server.
        paths: whose responses are cut.
        seed: of the random choices. Which bytes a response begins with depends on when its client came back.
        avoid: no cut is made where this matches the end of what the client has got.
    """

    def __init__(
        self, url: str, paths: Iterable[str], *, seed: Any, avoid: re.Pattern[bytes] | None = None
    ) -> None:
        self._target = urlsplit(url)
        self._random = {path: random.Random(f"{seed} {path}") for path in paths}
        self._avoid = avoid
        # How many responses to each path were cut, and the statuses of all of them in order.
        self.cuts = dict.fromkeys(self._random, 0)
        self.statuses: dict[str, list[int]] = {path: [] for path in self._random}

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; report the URL."""
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, self._serve, 0, host="127.0.0.1"))
            task_status.started(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")

    async def _serve(self, client: trio.SocketStream) -> None:
        upstream = await trio.open_tcp_stream(self._target.hostname, self._target.port)
        async with client, upstream:
            try:
                await self._forward(client, upstream)
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def _forward(self, client: trio.SocketStream, upstream: trio.SocketStream) -> None:
        head = b""
        while HEAD_END not in head:
            data = await client.receive_some()
            if not data:
                return
            head += data
        path = head.split(b" ", 2)[1].decode().partition("?")[0]
        # One request on each connection, so that all of what comes back is the response to this one.
        await upstream.send_all(CONNECTION.sub(b"", head)[:-2] + b"Connection: close\r\n\r\n")
        async with trio.open_nursery() as nursery:

            async def wait_for_departure() -> None:
                while await client.receive_some():
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_departure)
            await self._respond(path, upstream, client)
            nursery.cancel_scope.cancel()

    async def _respond(self, path: str, upstream: trio.SocketStream, client: trio.SocketStream) -> None:
        cut = self._next_cut(path)
        response = bytearray()
        sent = 0
        async for data in upstream:
            if path in self.statuses and len(response) < 12 <= len(response) + len(data):
                self.statuses[path].append(int((response + data)[9:12]))
            response += data
            end = None if cut is None else cut.position(response, sent)
            while end is not None and end < len(response) and self._is_avoided(response, end):
                end += 1
            if end is not None and self._is_avoided(response, end):
                end = None
            await client.send_all(response[sent:end])
            sent = len(response)
            if end is not None:
                assert cut is not None
                self.cuts[path] += 1
                # Without TLS Chromium, curl and http.client take half a head for a whole one if FIN follows.
                if cut.reset or HEAD_END not in response[:end]:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return

    def _next_cut(self, path: str) -> Cut | None:
        if path not in self._random:
            return None
        choice = self._random[path]
        least = 0 if self.cuts[path] else FIRST_SIZE
        size = least + choice.randrange(choice.choice(SIZES))
        return Cut(size, choice.choice(PLACES), choice.random() < 0.3)

    def _is_avoided(self, response: bytearray, end: int) -> bool:
        return self._avoid is not None and self._avoid.search(response, max(0, end - 10_000), end) is not None
