"""Group commit: what is submitted while a batch is being stored becomes the next batch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import outcome
import trio

__all__ = ["Batcher"]

T = TypeVar("T")


class _Entry(Generic[T]):
    """An item that waits to be stored, and the task that waits for it, if one does."""

    __slots__ = ("item", "size", "task")

    def __init__(self, item: T, size: int, task: trio.lowlevel.Task | None) -> None:
        self.item = item
        self.size = size
        self.task = task


class Batcher(Generic[T]):
    """Stores items in the order in which they were submitted, one batch at a time.

    Args:
        store: stores a batch. It handles errors itself, and returns for each item None, or the exception
            that its submitter gets.
        withdraw: is called with an item whose submitter is cancelled before the item is in a batch; returns
            whether it may be left out.
        max_items: of a batch.
        max_size: of a batch, as a sum of the items' sizes; a batch has one item at least.
    """

    def __init__(
        self,
        store: Callable[[Sequence[T]], Awaitable[Sequence[Exception | None]]],
        withdraw: Callable[[T], bool],
        *,
        max_items: int,
        max_size: int,
    ) -> None:
        self._store = store
        self._withdraw = withdraw
        self._max_items = max_items
        self._max_size = max_size
        self._waiting: list[_Entry[T]] = []
        self._wakeup = trio.Event()

    async def submit(self, item: T, size: int) -> None:
        """Store an item, and wait for that.

        Cancelled, the item is left out if it still can be; otherwise this waits to the end, and returns.
        """
        entry = _Entry(item, size, trio.lowlevel.current_task())
        self._add(entry)

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            if entry in self._waiting and self._withdraw(item):
                self._waiting.remove(entry)
                return trio.lowlevel.Abort.SUCCEEDED
            return trio.lowlevel.Abort.FAILED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def submit_nowait(self, item: T, size: int) -> None:
        """Have an item stored, without waiting for that."""
        self._add(_Entry(item, size, None))

    def _add(self, entry: _Entry[T]) -> None:
        self._waiting.append(entry)
        self._wakeup.set()

    def take_waiting(self) -> list[T]:
        """Return all items that are not in a batch yet."""
        return [entry.item for entry in self._waiting]

    def fail(self, items: Sequence[T], error: Exception) -> None:
        """Do not store these items, which are not in a batch yet; their submitters get ``error``."""
        failed = set(map(id, items))
        entries = [entry for entry in self._waiting if id(entry.item) in failed]
        self._waiting = [entry for entry in self._waiting if id(entry.item) not in failed]
        for entry in entries:
            _wake(entry, error)

    async def run(self) -> None:
        """Store batches until cancelled."""
        while True:
            if not self._waiting:
                self._wakeup = trio.Event()
                await self._wakeup.wait()
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._store_next()

    async def flush(self) -> None:
        """Store all that is waiting, after ``run`` has ended."""
        while self._waiting:
            await self._store_next()

    async def _store_next(self) -> None:
        count, size = 0, 0
        for entry in self._waiting[: self._max_items]:
            size += entry.size
            if count and size > self._max_size:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        try:
            results = await self._store([entry.item for entry in batch])
        except BaseException:
            # They may not be able to be cancelled, so nobody but this wakes them.
            for entry in batch:
                _wake(entry, RuntimeError("the batch was not stored, because of an error"))
            raise
        for entry, error in zip(batch, results, strict=True):
            _wake(entry, error)


def _wake(entry: _Entry[T], error: Exception | None) -> None:
    if entry.task is not None:
        result = outcome.Value(None) if error is None else outcome.Error(error)
        trio.lowlevel.reschedule(entry.task, result)
