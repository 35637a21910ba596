"""What instances share through Redis: presence, the leader, limits and watchers; here in one process."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from redis_server import RedisServer

from sseserve.concurrency import raise_single_error
from sseserve.engines import coordination as local
from sseserve.engines.coordination import Counts, LocalCoordination
from sseserve.engines.redis import client as client_module
from sseserve.engines.redis import connection, coordination, fields, revocations
from sseserve.engines.redis.client import RedisClient, Script
from sseserve.engines.redis.coordination import RedisCoordination
from sseserve.errors import ConfigError, EngineUnavailable, InsufficientStorage


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let instances be renewed, and missed, sooner."""
    monkeypatch.setattr(coordination, "HEARTBEAT", 0.1)
    monkeypatch.setattr(coordination, "TTL", 0.7)
    monkeypatch.setattr(coordination, "RETRY_DELAY", 0.1)
    monkeypatch.setattr(fields, "RETRY_DELAY", 0.1)
    monkeypatch.setattr(coordination, "GRACE", 0.3)
    monkeypatch.setattr(coordination, "WATCHERS_INTERVAL", 0.02)


async def wait_until(condition: Callable[[], object]) -> None:
    """Poll until a condition holds."""
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def wait_for(condition: Callable[[], Awaitable[object]]) -> None:
    """Poll until a condition that asks Redis holds."""
    with trio.fail_after(20):
        while not await condition():
            await trio.sleep(0.01)


class Instance(RedisCoordination):
    """An instance that can be killed. ``watched`` is who watches here."""

    def __init__(self, url: str) -> None:
        self.watched: dict[str, dict[tuple[str, str], int]] = {}
        super().__init__(RedisClient(url), self._watchers_here)
        self.scope = trio.CancelScope()
        self.news = 0
        self.revoked: list[bytes] = []
        self.heard: list[bytes] = []
        self.on_revocation = self.revoked.append
        self.on_broadcast = self.heard.append

    def _watchers_here(self, session_id: str) -> Counts:
        return self.watched.get(session_id, {})

    def watch(self, session_id: str, count: int, protocol: str = "sse", dialect: str = "jobs") -> None:
        self.watched[session_id] = {(protocol, dialect): count} if count else {}
        self.note_watchers(session_id)

    async def live(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope, raise_single_error():
            async with trio.open_nursery() as nursery:
                await nursery.start(self.run)
                nursery.start_soon(self._count_news)
                task_status.started()

    async def _count_news(self) -> None:
        while True:
            await self.wait_for_news()
            self.news += 1

    async def count(self, session_id: str) -> int:
        """Return how many watch a session on all instances."""
        watchers = await self.watchers(session_id)
        return sum(sum(counts.values()) for counts in watchers.values())

    def kill(self) -> None:
        """End it as a crash does: it does not say goodbye."""

        async def leave() -> None:
            await trio.lowlevel.checkpoint()

        self._leave = leave  # type: ignore[method-assign]
        self.scope.cancel()


@asynccontextmanager
async def instances(server: RedisServer, count: int):
    """That many instances, which know of each other."""
    with raise_single_error():
        async with trio.open_nursery() as nursery:
            every = [Instance(server.url) for _ in range(count)]
            for instance in every:
                await nursery.start(instance.live)
            await wait_until(lambda: all(len(instance._alive) == count for instance in every))
            yield every
            for instance in every:
                instance.scope.cancel()


def leaders(every: list[Instance]) -> list[Instance]:
    return [instance for instance in every if instance.is_leader]


@pytest.mark.parametrize("kill", [False, True])
async def test_there_is_one_leader(redis, kill):
    """When it stops, or is killed, another one leads; all hear that it has gone."""
    async with instances(redis, 3) as every:
        while len(every) > 1:
            await wait_until(lambda: leaders(every))
            (leader,) = leaders(every)
            every.remove(leader)
            before = [instance.news for instance in every]
            (leader.kill if kill else leader.scope.cancel)()
            await wait_until(lambda: leaders(every))
            for number, instance in enumerate(every):
                await wait_until(lambda: instance.news > before[number])  # noqa: B023 - waits at once


async def test_an_instance_that_stops_is_gone_at_once(redis, monkeypatch):
    """The others need not wait until its time is over, also to lead in its place."""
    async with instances(redis, 2) as every:
        await wait_until(lambda: leaders(every))
        one, other = sorted(every, key=lambda instance: instance.is_leader)
        await wait_until(lambda: one.is_gone("never seen"))
        monkeypatch.setattr(coordination, "HEARTBEAT", 60)
        monkeypatch.setattr(coordination, "TTL", 60)
        await trio.sleep(0.2)  # so that the next renewal would be much later
        news = one.news
        other.scope.cancel()
        await wait_until(lambda: one.is_gone(other.instance))
        await wait_until(lambda: one.news > news)
        await wait_until(lambda: one.is_leader)


async def test_an_instance_that_is_killed_is_gone_later(redis):
    """After its time and a grace period; those that live never are."""
    async with instances(redis, 3) as (one, other, third):
        await wait_until(lambda: one.is_gone("never seen"))
        news = one.news
        other.kill()
        while not one.is_gone(other.instance):
            assert not one.is_gone(third.instance)
            assert not one.is_gone(one.instance)
            await trio.sleep(0.01)
        await wait_until(lambda: one.news > news)
        assert other.instance not in one._last_seen


async def test_a_redis_that_has_lost_its_data(redis):
    """Nobody is taken for dead, there is one leader at most, and slots and watchers are known again."""
    async with instances(redis, 2) as (one, other):
        await wait_until(lambda: one.is_gone("never seen"))
        assert await one.take_slot("user u", 1)
        one.watch("s", 2)
        for _ in range(5):
            redis.flush()
            for _ in range(20):
                assert not one.is_gone(other.instance)
                assert not other.is_gone(one.instance)
                await trio.sleep(0.01)
            await wait_until(lambda: leaders([one, other]))
            await wait_until(lambda: len(one._alive) == len(other._alive) == 2)
            await wait_for(lambda: other.count("s"))
            assert len(leaders([one, other])) == 1
            while await other.take_slot("user u", 1):
                other.release_slot("user u")
                await trio.sleep(0.01)
        assert not one.is_gone("never seen")  # it might be one that has not been heard of again
        await wait_until(lambda: one.is_gone("never seen"))


async def test_instances_that_were_suspended_together(redis, monkeypatch):
    """The first one that goes on does not take the others for dead."""
    monkeypatch.setattr(coordination, "HEARTBEAT", 60.0)
    monkeypatch.setattr(coordination, "TTL", 6.0)
    async with instances(redis, 2) as (one, other):
        one._renewed_at -= 5
        one._known_since -= 60
        one._last_seen[other.instance] -= 5
        assert redis.command("ZREM", coordination.ALIVE, other.instance) == b":1\r\n"
        await one._renew()
        assert not one.is_gone(other.instance)
        assert one.news == 0


async def test_slots_are_limited_on_all_instances(redis):
    """Exactly as many as there are, if all ask at once; one that is given back is free."""
    async with instances(redis, 3) as every:
        taken: list[Instance] = []

        async def take(instance: Instance, name: str) -> None:
            if await instance.take_slot(name, 7):
                taken.append(instance)

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(take, every[number % 3], "user u")
        assert len(taken) == 7
        assert await every[0].take_slot("user v", 1)
        for instance in taken[:3]:
            instance.release_slot("user u")
        for _ in range(3):
            with trio.fail_after(20):
                while not await every[0].take_slot("user u", 7):
                    await trio.sleep(0.01)
        assert not await every[1].take_slot("user u", 7)


async def test_slots_of_an_instance_that_was_killed(redis):
    """They are free again."""
    async with instances(redis, 2) as (one, other):
        for _ in range(3):
            assert await one.take_slot("user u", 3)
        assert not await other.take_slot("user u", 3)
        one.kill()
        await wait_for(lambda: other.take_slot("user u", 3))


async def test_a_slot_that_is_not_waited_for(tmp_path):
    """A request that is cancelled while it asks for a slot has taken none, although Redis counts it first."""
    with RedisServer(tmp_path / "redis") as server:
        async with instances(server, 2) as (one, other):
            assert await one.take_slot("user u", 2)
            server.pause()
            with trio.move_on_after(0.1):
                await one.take_slot("user u", 2)
            server.resume()
            assert one.slots.taken == {"user u": 1}
            await wait_for(lambda: other.take_slot("user u", 2))


async def test_a_redis_that_hangs(tmp_path, monkeypatch):
    """Nothing waits for its responses until they time out."""
    monkeypatch.setattr(coordination, "ANSWER_TIMEOUT", 0.1)
    monkeypatch.setattr(coordination, "LEAVE_TIMEOUT", 0.1)
    for name in ("COMMAND_TIMEOUT", "CONNECT_TIMEOUT"):
        monkeypatch.setattr(connection, name, 60)
    with RedisServer(tmp_path / "redis") as server:
        async with instances(server, 1) as (one,):
            one.watch("s", 1)
            await wait_until(lambda: one._watcher_fields.written)
            server.pause()
            with trio.fail_after(20):
                assert [await one.take_slot("user u", 1) for _ in range(2)] == [True, False]
                assert await one.count("s") == 1
                one.scope.cancel()


async def test_watchers_of_all_instances(redis):
    """Who watches where, as they come and leave; the field of one that nobody watches is deleted."""
    async with instances(redis, 2) as (one, other):
        assert await one.watchers("s") == {one.instance: {}}
        one.watch("s", 2)
        other.watch("s", 1, "ws", "sessions")
        expected = {one.instance: {("sse", "jobs"): 2}, other.instance: {("ws", "sessions"): 1}}

        async def is_expected(instance: Instance) -> bool:
            return await instance.watchers("s") == expected

        for instance in (one, other):
            await wait_for(lambda: is_expected(instance))  # noqa: B023 - awaited in this turn
        one.watch("s", 0)
        await wait_for(lambda: _equals(other.count, "s", 1))
        other.watch("s", 0)
        await wait_until(lambda: redis.command("EXISTS", "sseserve:watchers:s") == b":0\r\n")
        await wait_until(lambda: not one._watcher_fields.written)


async def test_watchers_are_written_at_most_once_in_an_interval(redis, monkeypatch):
    """However often they change; the last number counts."""
    monkeypatch.setattr(coordination, "WATCHERS_INTERVAL", 0.3)
    async with instances(redis, 2) as (one, other):
        writes = 0
        write = one._watcher_fields._write

        async def count_write(name: str) -> None:
            nonlocal writes
            writes += 1
            await write(name)

        monkeypatch.setattr(one._watcher_fields, "_write", count_write)
        for number in range(1, 201):
            one.watch("s", number)
            await trio.sleep(0.002)
        took = 200 * 0.002
        await wait_for(lambda: _equals(other.count, "s", 200))
        assert writes <= 3 + took / 0.3 * 10  # a bound that holds on a slow machine too
        assert writes < 100


async def _equals(count, session_id: str, expected: int) -> bool:
    return await count(session_id) == expected


async def test_watchers_of_an_instance_that_was_killed(redis):
    """They do not count any more, nor does a new instance count them."""
    async with instances(redis, 2) as (one, other):
        one.watch("s", 3)
        await wait_for(lambda: _equals(other.count, "s", 3))
        one.kill()
        await wait_for(lambda: _equals(other.count, "s", 0))


async def test_jobs_are_announced_to_the_others(redis):
    """And to nobody else."""
    async with instances(redis, 3) as every:
        await wait_until(lambda: all(instance.is_gone("never seen") for instance in every))
        one, *others = every
        before = [instance.news for instance in every]
        with trio.fail_after(20):
            while any(o.news == n for o, n in zip(others, before[1:], strict=True)):
                one.announce_job()
                await trio.sleep(0.05)
        assert one.news == before[0]


async def test_a_cluster(redis_cluster):
    """All of it works where the keys are on several nodes."""
    async with instances(redis_cluster, 2) as (one, other):
        one.watch("s", 2)
        for number in range(20):
            assert await one.take_slot(f"user {number}", 1)
            assert not await other.take_slot(f"user {number}", 1)
        await wait_for(lambda: _equals(other.count, "s", 2))
        await wait_until(lambda: other.is_gone("never seen"))
        news = other.news
        one.announce_job()
        await wait_until(lambda: other.news > news)
        assert len(leaders([one, other])) == 1
        for number in range(20):
            await one.store_ticket(f"t{number}", b"%d" % number, 60)
            assert await other.take_ticket(f"t{number}") == b"%d" % number
            assert await one.take_ticket(f"t{number}") is None
        await one.store_revocation(b"r", later())
        await one.broadcast(b"hello")
        await wait_until(lambda: other.revoked == [b"r"] and other.heard == [b"hello"])


async def test_the_memory_of_redis_is_full(redis):
    """Logs cannot grow, but instances go on."""
    try:
        async with instances(redis, 2) as (one, other):
            redis.command("CONFIG", "SET", "maxmemory", "1")
            (leader,) = leaders([one, other])
            leader.scope.cancel()
            (follower,) = {one, other} - {leader}
            await wait_until(lambda: follower.is_leader)
            follower.watch("s", 1)
            await wait_until(lambda: redis.command("EXISTS", "sseserve:watchers:s") == b":1\r\n")
            assert await follower.take_slot("user u", 1)
            assert redis.command("EXISTS", "sseserve:slots:user u") == b":1\r\n"
    finally:
        redis.command("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_redis_is_away(tmp_path, monkeypatch, how):
    """Nothing waits for it: limits hold for what is known, nobody leads or is gone; then all is as before."""
    monkeypatch.setattr(connection, "COMMAND_TIMEOUT", 0.3)
    monkeypatch.setattr(client_module, "DEADLINE", 0.2)
    monkeypatch.setattr(client_module, "CHECK", 0.1)
    monkeypatch.setattr(coordination, "ANSWER_TIMEOUT", 0.2)
    with RedisServer(tmp_path / "redis") as server:
        async with instances(server, 2) as (one, other):
            assert await one.take_slot("user u", 2)
            assert await other.take_slot("user u", 2)
            other.watch("s", 2)
            await wait_for(lambda: one.count("s"))
            await wait_until(lambda: one.is_gone("never seen"))
            server.pause() if how == "pause" else server.kill()
            # Another stream of this user is open on the other instance.
            assert [await one.take_slot("user u", 2) for _ in range(3)] == [True, False, False]
            assert await one.watchers("s") == {one.instance: {}}
            one.announce_job()
            await wait_until(lambda: not leaders([one, other]))
            await trio.sleep(0.5)
            assert not one.is_gone(other.instance)
            assert not one.is_gone("never seen")
            monkeypatch.setattr(coordination, "ANSWER_TIMEOUT", 10)
            monkeypatch.setattr(connection, "COMMAND_TIMEOUT", 10)
            server.resume() if how == "pause" else server.start()
            await wait_until(lambda: len(leaders([one, other])) == 1)
            await wait_for(lambda: one.count("s"))
            assert not one.is_gone(other.instance)
            values = {b"*2\r\n$1\r\n1\r\n$1\r\n2\r\n", b"*2\r\n$1\r\n2\r\n$1\r\n1\r\n"}
            await wait_until(lambda: server.command("HVALS", "sseserve:slots:user u") in values)
            await wait_until(lambda: len(other._alive) == 2 and other._client.problem is None)
            assert [await other.take_slot("user u", 4) for _ in range(2)] == [True, False]


# Tickets, revocations and broadcasts


def later(seconds: float = 1000.0) -> float:
    return time.time() + seconds


async def test_a_ticket_is_taken_once(redis):
    """Of all that take it at once, on all instances, one gets it; afterwards, and later, nobody."""
    async with instances(redis, 2) as (one, other):
        await one.store_ticket("t", b"\0\xff", 60)
        await one.store_ticket("short", b"s", 0.05)
        taken: list[bytes | None] = []

        async def take(instance: Instance) -> None:
            taken.append(await instance.take_ticket("t"))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(take, (one, other)[number % 2])
        assert taken.count(b"\0\xff") == 1
        assert taken.count(None) == 19
        assert await other.take_ticket("unknown") is None
        await wait_until(lambda: redis.command("EXISTS", "sseserve:ticket:short") == b":0\r\n")
        assert await one.take_ticket("short") is None


async def test_a_revocation_is_known_everywhere(redis):
    """Here and elsewhere, once; and by an instance that starts later, before it has started."""
    async with instances(redis, 2) as (one, other):
        await one.store_revocation(b"a \0\xff", later())
        assert one.revoked == [b"a \0\xff"]
        await other.store_revocation(b"b", later())
        await one.store_revocation(b"b", later(2000))
        await wait_until(lambda: len(one.revoked) == len(other.revoked) == 2)
        async with trio.open_nursery() as nursery:
            third = Instance(redis.url)
            await nursery.start(third.live)
            assert sorted(third.revoked) == [b"a \0\xff", b"b"]
            third.scope.cancel()
        assert sorted(one.revoked) == sorted(other.revoked) == [b"a \0\xff", b"b"]


async def test_a_revocation_whose_message_is_lost(redis, monkeypatch):
    """It is known at the next renewal."""
    monkeypatch.setattr(Instance, "_receive", lambda *_args: None)
    async with instances(redis, 2) as (one, other):
        for number in range(3):
            await one.store_revocation(b"%d" % number, later())
            await wait_until(lambda: len(other.revoked) == number + 1)  # noqa: B023 - waits at once
        assert other.revoked == [b"0", b"1", b"2"]


async def test_revocations_reach_others_by_a_message(redis, monkeypatch):
    """They do not wait for a renewal."""
    async with instances(redis, 2) as (one, other):
        await wait_until(lambda: one.is_gone("never seen"))
        await one.broadcast(b"x")
        await wait_until(lambda: other.heard)
        monkeypatch.setattr(coordination, "HEARTBEAT", 1000.0)
        await trio.sleep(0.2)  # so that the next renewal would be much later
        await one.store_revocation(b"r", later())
        await wait_until(lambda: other.revoked == [b"r"])


async def test_a_redis_that_has_lost_revocations(redis):
    """Nobody forgets them, and it gets them back: who starts later knows them."""
    async with instances(redis, 2) as (one, other):
        await one.store_revocation(b"a", later())
        await wait_until(lambda: other.revoked)
        redis.flush()
        await other.store_revocation(b"b", later())
        await wait_until(lambda: redis.command("ZCARD", revocations.REVOCATION_KEYS[0]) == b":2\r\n")
        await wait_until(lambda: redis.command("ZCARD", revocations.REVOCATION_KEYS[1]) == b":2\r\n")
        await wait_until(lambda: b"b" in one.revoked)
        async with trio.open_nursery() as nursery:
            third = Instance(redis.url)
            await nursery.start(third.live)
            assert sorted(third.revoked) == [b"a", b"b"]
            third.scope.cancel()
        assert sorted(one.revoked) == sorted(other.revoked) == [b"a", b"b"]


async def test_many_revocations(redis, monkeypatch):
    """They are read in parts, whoever starts; there are so many at most, and those that expire make room."""
    monkeypatch.setattr(revocations, "CHUNK", 3)
    monkeypatch.setattr(revocations, "MAX_REVOCATIONS", 10)
    monkeypatch.setattr(revocations, "MARGIN", 0)
    async with instances(redis, 1) as (one,):
        for number in range(10):
            await one.store_revocation(b"%d" % number, later())
        with pytest.raises(InsufficientStorage, match="revocations"):
            await one.store_revocation(b"more", later())
        await one.store_revocation(b"3", later())
        assert b"more" not in one.revoked
        async with trio.open_nursery() as nursery:
            other = Instance(redis.url)
            await nursery.start(other.live)
            assert other.revoked == [b"%d" % number for number in range(10)]
            redis.flush()
            await wait_until(lambda: redis.command("ZCARD", revocations.REVOCATION_KEYS[1]) == b":10\r\n")
            other.scope.cancel()
        # As if their time had come.
        past = int(time.time()) - 100
        for number in range(4):
            redis.command("ZADD", revocations.REVOCATION_KEYS[0], past, number)
        await wait_until(lambda: redis.command("ZCARD", revocations.REVOCATION_KEYS[0]) == b":6\r\n")
        await wait_until(lambda: redis.command("ZCARD", revocations.REVOCATION_KEYS[1]) == b":6\r\n")
        await one.store_revocation(b"more", later())
        for key in revocations.REVOCATION_KEYS:
            assert 0 < int(redis.command("TTL", key)[1:-2]) <= 1100


async def test_tokens_when_the_memory_of_redis_is_full(redis):
    """Watchers get tickets, and tokens can be revoked."""
    try:
        async with instances(redis, 1) as (one,):
            redis.command("CONFIG", "SET", "maxmemory", "1")
            await one.store_ticket("t", b"v", 60)
            assert await one.take_ticket("t") == b"v"
            await one.store_revocation(b"r", later())
            assert one.revoked == [b"r"]
    finally:
        redis.command("CONFIG", "SET", "maxmemory", "0")


async def test_broadcasts(redis):
    """They reach the other instances unchanged, whatever bytes they are, and not this one."""
    async with instances(redis, 3) as (one, *others):
        message = bytes(range(256))
        while not all(other.heard for other in others):
            await one.broadcast(message)
            await trio.sleep(0.02)
        assert all(heard == message for other in others for heard in other.heard)
        assert not one.heard


async def test_tokens_while_redis_is_away(tmp_path, monkeypatch):
    """Nothing is stored or taken, what is known stays; what others store is known when it is back."""
    monkeypatch.setattr(client_module, "DEADLINE", 0.2)
    monkeypatch.setattr(client_module, "CHECK", 0.1)
    monkeypatch.setattr(coordination, "HEARTBEAT", 1000.0)
    monkeypatch.setattr(coordination, "TTL", 3000.0)
    with RedisServer(tmp_path / "redis", appendonly="yes") as server:
        async with instances(server, 2) as (one, other):
            await one.store_revocation(b"a", later())
            await wait_until(lambda: other.revoked)
            server.kill()
            await wait_until(lambda: one._client.problem)
            for attempt in (
                lambda: one.store_ticket("t", b"v", 60),
                lambda: one.take_ticket("t"),
                lambda: one.store_revocation(b"x", later()),
            ):
                with pytest.raises(EngineUnavailable):
                    await attempt()
            await one.broadcast(b"lost")
            assert one.revoked == [b"a"]
            await wait_until(lambda: other._client.problem)
            server.start()
            place = int(time.time() * 1e6)
            server.command("ZADD", revocations.REVOCATION_KEYS[0], int(later()), "b")
            server.command("ZADD", revocations.REVOCATION_KEYS[1], place, "b")
            await wait_until(lambda: b"b" in one.revoked and b"b" in other.revoked)
            assert one.revoked == other.revoked == [b"a", b"b"]


async def test_local_revocations(monkeypatch):
    """Without Redis: so many at most, and those that have expired make room."""
    monkeypatch.setattr(local, "MAX_REVOCATIONS", 2)
    now = 1000.0
    one = LocalCoordination(clock=lambda: now)
    revoked: list[bytes] = []
    one.on_revocation = revoked.append
    await one.store_revocation(b"a", 1010)
    await one.store_revocation(b"b", 1020)
    with pytest.raises(InsufficientStorage, match="revocations"):
        await one.store_revocation(b"c", 1030)
    now = 1010.0
    await one.store_revocation(b"c", 1030)
    assert revoked == [b"a", b"b", b"c"]


async def test_revocations_that_cannot_be_read(redis, monkeypatch):
    """Nothing is served without them."""
    monkeypatch.setattr(revocations, "_READ", Script("return redis.error_reply('ERR broken')"))
    with pytest.raises(ConfigError, match="cannot read the revocations"):
        async with instances(redis, 1):
            pass


async def test_a_replica_that_lacks_revocations(redis):
    """One that takes the place of the primary gets them from the instances, although newer ones are there."""
    first, second = revocations.REVOCATION_KEYS
    async with instances(redis, 1) as (one,):
        await one.store_revocation(b"a", later())
        redis.command("ZREM", first, "a")
        redis.command("ZREM", second, "a")
        redis.command("ZADD", first, int(later()), "b")
        redis.command("ZADD", second, int(time.time() * 1e6) + 10**6, "b")
        for restarted in one._client.on_restart:
            restarted()
        await wait_until(lambda: redis.command("ZCARD", first) == b":2\r\n")
        await wait_until(lambda: one.revoked == [b"a", b"b"])
