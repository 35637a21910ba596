"""What publishers are told, and what clients see, while connections, clients, instances and engines fail."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio
from checker import runner
from checker.campaign import Campaign, run_together
from checker.schedule import generate
from checker.shared_memory import SharedEngine, SharedMemoryStore

from sseserve.engines import EngineListener, Page
from sseserve.engines.memory import MemoryEngine

# Seeds of each profile. More: python tests/fault_schedules.py --schedules 1000 --profile ...
SEEDS = 10
TOGETHER = 3  # schedules that run at once: they mostly wait


async def test_memory(tmp_path):
    """Clients that change their transport, stall and stay away; logs that end, are deleted and trimmed."""
    with Campaign("memory", tmp_path) as campaign:
        await campaign.run(range(SEEDS))
    assert not campaign.failures, "\n".join(campaign.failures)
    assert campaign.counts["ok"] > SEEDS
    assert campaign.counts["gap"] + campaign.counts["reset"] > 0


async def test_sqlite(tmp_path):
    """The same, and restarts of the server, which lose nothing."""
    with Campaign("sqlite", tmp_path) as campaign:
        await campaign.run(range(SEEDS))
    assert not campaign.failures, "\n".join(campaign.failures)
    assert campaign.counts["ok"] > SEEDS


@pytest.mark.timeout(180)
@pytest.mark.parametrize("first", [0, 30])
async def test_redis(first, tmp_path):
    """Three instances and a Redis with an append-only file lose nothing."""
    campaign = await run_together("redis", range(first, first + 30), tmp_path, TOGETHER)
    assert not campaign.failures, "\n".join(campaign.failures)
    assert campaign.counts["degraded"] > 0


@pytest.mark.timeout(180)
async def test_redis_that_loses_data(tmp_path):
    """By a restart without a file or with an older one, or by the promotion of a replica that lags behind.

    Clients are told so, and go on with what is left.
    """
    campaign = await run_together("redis-loss", range(20), tmp_path, TOGETHER)
    assert not campaign.failures, "\n".join(campaign.failures)
    assert campaign.counts["lost"] > 0
    assert campaign.counts["reset"] > 0


async def test_killed_processes(tmp_path):
    """With SQLite a process that is ended by SIGKILL loses nothing either."""
    with Campaign("sqlite", tmp_path, processes=True) as campaign:
        await campaign.run([16])
    assert not campaign.failures, "\n".join(campaign.failures)


# Engines that break one guarantee now and then. Each must be found, or the tests above say nothing.


class LosesDelivery(MemoryEngine):
    """An event is stored, but not delivered."""

    async def append(self, session, events, **more):
        listener, self._listener = (
            self._listener,
            EngineListener() if session.seq % 16 == 7 else self._listener,
        )
        try:
            await super().append(session, events, **more)
        finally:
            self._listener = listener


class DeliversTwice(MemoryEngine):
    """An event is delivered again after the next one."""

    async def append(self, session, events, **more):
        await super().append(session, events, **more)
        if session.seq % 16 == 7:
            self._listener.deliver(session, events)


class ForgetsReceipts(MemoryEngine):
    """A retried request is stored again."""

    async def append(self, session, events, *, receipt=None, replaces=None):
        await super().append(session, events, replaces=replaces)

    async def receipt(self, session_id, key):
        return None


class ReadsTooLittle(MemoryEngine):
    """A replay does not have the last event."""

    async def read(self, session_id, after, limit):
        page = await super().read(session_id, after, limit)
        if page is None or len(page.events) < 2 or page.session.ended:
            return page
        session = msgspec.structs.replace(page.session, seq=page.session.seq - 1)
        return Page(session, page.first, page.events[:-1])


class KeepsTooLittle(MemoryEngine):
    """A log is trimmed long before it is full."""

    def _trim(self, log):
        del log.events[:-3]


class AcknowledgesTooSoon(MemoryEngine):
    """What is acknowledged is not always stored."""

    async def append(self, session, events, **more):
        if session.seq % 16 != 7 or session.ended:
            await super().append(session, events, **more)


class KeepsTheEpoch(MemoryEngine):
    """A session that is created again has a log of the same epoch."""

    async def append(self, session, events, **more):
        self._epochs = getattr(self, "_epochs", {})
        epoch = self._epochs.setdefault(session.id, session.epoch)
        await super().append(msgspec.structs.replace(session, epoch=epoch), events, **more)


BROKEN = {
    LosesDelivery: {"missing", "converge"},
    DeliversTwice: {"backwards"},
    ForgetsReceipts: {"doubled"},
    ReadsTooLittle: {"missing"},
    KeepsTooLittle: {"verdict", "log"},
    AcknowledgesTooSoon: {"replaced", "missing"},
    KeepsTheEpoch: {"replaced", "epoch"},
}


@pytest.mark.parametrize("engine", BROKEN)
async def test_a_broken_engine_is_found(engine, monkeypatch, tmp_path):
    """By the rule that is about it, and by few schedules."""
    monkeypatch.setattr(runner, "FINISH", 0.5)
    with Campaign("memory", tmp_path, make_engine=lambda _number: engine) as campaign:
        for seed in range(40):
            found = {violation.rule for violation in await campaign.attempt(generate("memory", seed))}
            if found & BROKEN[engine]:
                return
    pytest.fail(f"{engine.__doc__} Nothing has found that.")


class ForgetsItsPlace(SharedEngine):
    """What was published while the connection was lost is not read afterwards."""

    async def _fill(self, session_id):
        pass


class DoesNotWait(SharedEngine):
    """A log is read before what follows is sure to be delivered, which takes longer than the reading."""

    async def _subscribe(self):
        await trio.sleep(0.03)
        await super()._subscribe()

    async def wait_followed(self, session_id):
        pass


class ResyncsTooLittle(SharedEngine):
    """Watchers are not told that a log is another one, or lacks what they need."""

    async def _fill(self, session_id):
        listener, self._listener = self._listener, EngineListener()
        self._listener.deliver = listener.deliver
        await super()._fill(session_id)
        self._listener = listener


# The rules that find it, and the first seed to try.
BROKEN_SHARED = {
    ForgetsItsPlace: ({"missing", "converge", "untold"}, 2),
    DoesNotWait: ({"missing"}, 7),
    ResyncsTooLittle: ({"missing", "untold", "converge"}, 2),
}


async def test_a_model_of_a_shared_engine():
    """Three instances with everything in order between them."""
    store = SharedMemoryStore()
    with Campaign("shared", Path(), store=store, make_engine=store.make_engine) as campaign:
        await campaign.run(range(3))
    assert not campaign.failures, "\n".join(campaign.failures)


@pytest.mark.parametrize("engine", BROKEN_SHARED)
async def test_a_broken_shared_engine_is_found(engine, monkeypatch):
    """The same for what instances must do about a network."""
    rules, first = BROKEN_SHARED[engine]
    store = SharedMemoryStore(engine)
    monkeypatch.setattr(runner, "FINISH", 0.5)
    with Campaign("shared", Path(), store=store, make_engine=store.make_engine) as campaign:
        for seed in range(first, first + 40):
            found = {violation.rule for violation in await campaign.attempt(generate("shared", seed))}
            if found & rules:
                return
    pytest.fail(f"{engine.__doc__} Nothing has found that.")
