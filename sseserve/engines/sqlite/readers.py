"""Reads of the SQLite engine: a few connections, each used by one thread at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
import trio

from ...errors import EngineUnavailable
from .storage import Reader

__all__ = ["Readers"]

T = TypeVar("T")
P = ParamSpec("P")

MOST = 4  # connections


class Readers:
    """Connections to one file that read; each is opened when it is needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[Reader] = []
        self._limiter = trio.CapacityLimiter(MOST)
        self._is_closed = False

    async def call(self, read: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a method of ``Reader`` returns, called in a thread.

        Raises:
            EngineUnavailable: the file cannot be read, or is closed.
        """
        if self._is_closed:
            raise EngineUnavailable("the server is shutting down")
        try:
            call = partial(self._call, read, *args, **kwargs)
            return await trio.to_thread.run_sync(call, limiter=self._limiter)
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise EngineUnavailable(f"the server's log cannot be read: {error}") from error

    def _call(self, read: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        # Each of these is one operation on a list, which threads may do at the same time.
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = Reader(self._path)
        try:
            return read(reader, *args, **kwargs)
        finally:
            self._idle.append(reader)

    async def aclose(self) -> None:
        """Close the connections once nobody uses them."""
        self._is_closed = True
        while self._limiter.borrowed_tokens:
            async with self._limiter:
                pass
        for reader in self._idle:
            reader.close()
