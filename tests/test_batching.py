"""Group commit: what a batch has, and what becomes of those who wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sseserve.engines.batching import Batcher


class Store:
    """Stores batches when it is allowed to, and fails when told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.results: dict[int, Exception] = {}
        self.error: Exception | None = None
        self.gate = trio.Event()
        self.keeps: set[int] = set()  # items that must not be left out
        self.batcher: Batcher[int] = Batcher(
            self.store, lambda item: item not in self.keeps, max_items=5, max_size=100
        )

    async def store(self, batch: Sequence[int]) -> Sequence[Exception | None]:
        with trio.CancelScope(shield=True):
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.batches.append(list(batch))
        return [self.results.get(item) for item in batch]


async def test_batches(nursery):
    """What waits is stored together, in its order, within the bounds; one item always is."""
    store = Store()
    nursery.start_soon(store.batcher.run)
    sizes = [1, 1, 1, 1, 1, 1, 1, 60, 60, 500, 1]
    for item, size in enumerate(sizes):
        nursery.start_soon(store.batcher.submit, item, size)
        await wait_all_tasks_blocked()
    store.batcher.submit_nowait(99, 1)
    store.gate.set()
    await wait_all_tasks_blocked()
    assert store.batches == [[0], [1, 2, 3, 4, 5], [6, 7], [8], [9], [10, 99]]


async def test_each_gets_its_own_result(nursery):
    """An error is that of one item."""
    store = Store()
    nursery.start_soon(store.batcher.run)
    store.gate.set()
    store.results[2] = ValueError("two")
    await store.batcher.submit(1, 1)
    with pytest.raises(ValueError, match="two"):
        await store.batcher.submit(2, 1)
    await store.batcher.submit(3, 1)


async def test_cancelled(nursery):
    """Left out if it is not in a batch yet and may be; otherwise waited for."""
    store = Store()
    store.keeps = {2}
    nursery.start_soon(store.batcher.run)
    scopes = {}

    async def submit(item: int) -> None:
        with trio.CancelScope() as scopes[item]:
            await store.batcher.submit(item, 1)

    for item in (0, 1, 2, 3):
        nursery.start_soon(submit, item)
        await wait_all_tasks_blocked()
    for item in (0, 1, 2):
        scopes[item].cancel()
    await wait_all_tasks_blocked()
    store.gate.set()
    await wait_all_tasks_blocked()
    assert store.batches == [[0], [2, 3]]
    assert [scopes[item].cancelled_caught for item in range(4)] == [False, True, False, False]


async def test_failing_what_waits(nursery):
    """Those that are named are not stored."""
    store = Store()
    nursery.start_soon(store.batcher.run)
    failed = []

    async def submit(item: int) -> None:
        try:
            await store.batcher.submit(item, 1)
        except ValueError:
            failed.append(item)

    for item in (0, 1, 2, 3):
        nursery.start_soon(submit, item)
        await wait_all_tasks_blocked()
    assert store.batcher.take_waiting() == [1, 2, 3]
    store.batcher.fail([1, 3], ValueError())
    store.gate.set()
    await wait_all_tasks_blocked()
    assert store.batches == [[0], [2]]
    assert sorted(failed) == [1, 3]


async def test_error_of_the_store():
    """Whoever waits learns of it, also a task that could not be cancelled: nobody waits for ever."""
    store = Store()
    store.keeps = {0, 1}
    failed = []

    async def submit(item: int) -> None:
        try:
            await store.batcher.submit(item, 1)
        except RuntimeError:
            failed.append(item)

    with pytest.RaisesGroup(pytest.RaisesExc(ZeroDivisionError)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(submit, 0)
            await wait_all_tasks_blocked()

            async def run() -> None:
                try:
                    await store.batcher.run()
                finally:
                    store.error = None
                    await store.batcher.flush()

            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            nursery.start_soon(submit, 1)
            await wait_all_tasks_blocked()
            store.error = ZeroDivisionError()
            store.gate.set()
    assert failed == [0]
    assert store.batches == [[1]]
