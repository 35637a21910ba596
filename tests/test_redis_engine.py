"""The Redis engine with several instances, and a Redis that is away or has lost something."""

from __future__ import annotations

import re
import shutil
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from coredis import exceptions
from redis_server import RedisCluster, RedisSentinel, RedisServer

from sseserve.concurrency import raise_single_error
from sseserve.config import Settings
from sseserve.engines import ALL, EngineListener, Repeated, Stale, open_coordination, open_engine
from sseserve.engines.redis import client as client_module
from sseserve.engines.redis import connection, engine, feed, index, space
from sseserve.engines.redis.connection import hash_slot
from sseserve.engines.redis.engine import RedisEngine
from sseserve.engines.redis.patterns import PatternSubscription
from sseserve.engines.redis.scripts import JOBS_KEY, OWNER_KEY, session_keys
from sseserve.errors import ConfigError, EngineUnavailable, InsufficientStorage, TooManySessions
from sseserve.model import Control, Event, Progress, Receipt, Session, State

PAYLOAD = msgspec.Raw(b'"x"')


class Instance(EngineListener):
    """An engine of one instance, and what it has told: ("events", id, epoch, seqs), ("removed", id), ..."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.told: list[tuple[Any, ...]] = []
        opened = open_engine(Settings(engine=url, **settings), self)
        assert isinstance(opened, RedisEngine)
        self.engine = opened

    def deliver(self, session, events):
        self.told.append(("events", session.id, session.epoch, [event.seq for event in events]))
        self.last = session

    def removed(self, session, *, own=True):
        self.told.append(("removed", session.id, session.epoch))

    def resync(self, session_id):
        self.told.append(("resync", session_id))

    def availability_changed(self, problem):
        self.told.append(("restored",) if problem is None else ("degraded", problem))

    def seqs(self, session_id: str = "s") -> list[int]:
        """All that was delivered of a session."""
        mine = [told for told in self.told if told[:2] == ("events", session_id)]
        return [seq for told in mine for seq in told[3]]

    def kinds(self) -> list[str]:
        """What else was told."""
        return [kind for kind, *_ in self.told if kind != "events"]

    async def follow(self, session_id: str = "s") -> None:
        self.engine.follow(session_id)
        await self.engine.wait_followed(session_id)

    async def append(self, session_id: str = "s", data: msgspec.Raw = PAYLOAD, **fields: Any) -> Session:
        """Append an event to whatever log there is, as the tracker does."""
        receipt = fields.pop("receipt", None)
        before = await self.engine.latest(session_id)
        while True:
            current = before or Session(id=session_id, epoch=f"e{trio.current_time():.6f}".replace(".", ""))
            session = msgspec.structs.replace(current, seq=current.seq + 1, **fields)
            try:
                event = Event(session.seq, "note", data, 1.0)
                await self.engine.append(session, [event], receipt=receipt)
            except Stale:
                before = await self.engine.latest(session_id)
            else:
                return session


@asynccontextmanager
async def instances(url, count=2, **settings):
    """Several instances, whose engines run."""
    with raise_single_error():
        async with trio.open_nursery() as nursery:
            opened = [Instance(url, **settings) for _ in range(count)]
            for instance in opened:
                await nursery.start(instance.engine.run)
            yield opened
            nursery.cancel_scope.cancel()


@pytest.fixture
def quick(monkeypatch):
    """Let what waits for a server that is away give up sooner."""
    monkeypatch.setattr(connection, "COMMAND_TIMEOUT", 0.5)
    monkeypatch.setattr(client_module, "DEADLINE", 0.2)
    monkeypatch.setattr(client_module, "CHECK", 0.1)
    monkeypatch.setattr(feed, "MISSING", 0.5)
    monkeypatch.setattr(engine, "PROBE", 0.05)


@pytest.fixture(params=["redis", "redis_cluster"])
def redis_url(request):
    """The URL of a Redis that is one server, or a Cluster."""
    return request.getfixturevalue(request.param).url


async def wait_until(condition):
    """Poll until a condition holds."""
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def wait_until_up(*instances: Instance) -> None:
    """Wait until instances use a Redis that is there again."""
    for instance in instances:
        with trio.fail_after(20):
            while True:
                with suppress(EngineUnavailable):
                    await instance.engine.load("s")
                    break
                await trio.sleep(0.01)
        await wait_until(lambda instance=instance: instance.engine.problem is None)


async def test_other_instances_get_what_is_appended(redis_url):
    """Once, in order, with the record; those that follow another session get nothing."""
    async with instances(redis_url, 3) as (one, two, three):
        await one.follow()
        await two.follow()
        await three.follow("t")
        for _ in range(5):
            await one.append()
        last = await two.append(title="by two")
        await wait_until(lambda: 6 in one.seqs() and 6 in two.seqs())
        assert one.seqs() == two.seqs() == [1, 2, 3, 4, 5, 6]
        assert one.last == last
        assert await one.engine.latest("s") == last
        assert three.told == []


async def test_concurrent_writers_on_several_instances(redis_url):
    """Everybody gets each event once and in order, whoever has written it."""
    async with instances(redis_url, 3) as all_:
        for instance in all_:
            await instance.follow()

        async def write(instance: Instance) -> None:
            for _ in range(30):
                await instance.append()

        async with trio.open_nursery() as nursery:
            for instance in all_:
                nursery.start_soon(write, instance)
                nursery.start_soon(write, instance)
        await wait_until(lambda: all(180 in instance.seqs() for instance in all_))
        for instance in all_:
            assert instance.seqs() == list(range(1, 181))
            assert instance.kinds() == []


@pytest.mark.parametrize("replaces", [False, True])
async def test_what_builds_on_a_stale_append_is_stale(redis, replaces):
    """Even if another instance has stored an event in that place: it would keep a state that never was."""
    async with instances(redis.url) as (one, two):
        await one.append()
        stored = await two.append(owner="two")
        event = Event(2, "note", PAYLOAD, 1.0)

        async def append(session: Session, **more: Any) -> None:
            with pytest.raises(Stale):
                await one.engine.append(session, [msgspec.structs.replace(event, seq=session.seq)], **more)

        before = await one.engine.latest("s")
        assert before is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(append, msgspec.structs.replace(before, seq=2, owner="one"))
            while (pending := await one.engine.latest("s")) is before:
                await trio.lowlevel.checkpoint()
            assert pending is not None
            assert pending.owner == "one"
            if replaces:
                changed = msgspec.structs.replace(pending, seq=1, epoch="another")
                await append(changed, replaces=pending.epoch)
            else:
                await append(msgspec.structs.replace(pending, seq=3))
        assert await two.engine.load("s") == stored
        assert (await one.append()).owner == "two"


async def test_many_writers_of_one_session(redis, monkeypatch):
    """Each builds on what is under way. One that is refused has few others refused."""
    tries = []
    execute = RedisEngine._execute_append

    async def count(self, session, *arguments, **more):
        tries.append(session.seq)
        return await execute(self, session, *arguments, **more)

    monkeypatch.setattr(RedisEngine, "_execute_append", count)
    async with instances(redis.url, 1) as (one,):

        async def write() -> None:
            for _ in range(5):
                await one.append()

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(write)
        assert (await one.engine.load("s")).seq == 200
        assert len(tries) < 2 * 200


async def test_large_events_are_read(redis_url, monkeypatch):
    """They are not in the message, and are delivered all the same."""
    sizes = []
    decode = feed.decode_message

    def measure(payload):
        sizes.append(len(payload))
        return decode(payload)

    monkeypatch.setattr(feed, "decode_message", measure)
    async with instances(redis_url) as (one, two):
        await two.follow()
        await one.append(data=msgspec.Raw(b'"%s"' % (b"x" * 70_000)))
        await one.append()
        await wait_until(lambda: two.seqs() == [1, 2])
    assert sizes
    assert max(sizes) < 1000


async def test_keys_expire(redis):
    """What no instance deletes, since none runs any more, goes a day after it should have been deleted."""
    keep = 60
    async with instances(redis.url, 1, idle_ttl=keep) as (one,):
        receipt = "k", Receipt("c", Control.CONTINUE, 1, b"d")
        await one.append(receipt=receipt)
    for key in session_keys("s"):
        assert keep <= int(redis.command("TTL", key)[1:]) <= keep + 86400, key


async def test_all_sessions(redis_url):
    """Whoever follows all of them gets those of other instances, and their deletion."""
    async with instances(redis_url) as (one, two):
        await two.follow(ALL)
        await one.append("a")
        await one.append("b")
        session = await one.append("a")
        await wait_until(lambda: two.seqs("a") == [1, 2])
        await one.engine.delete("a", session.epoch)
        await wait_until(lambda: two.kinds() == ["removed"])
        await two.append("a")
        await wait_until(lambda: two.seqs("a") == [1, 2, 1] and two.seqs("b") == [1])
        assert two.kinds() == ["removed"]


async def test_index_of_jobs(redis):
    """Those that have ended leave it when it is read; one that is being created stays."""
    async with instances(redis.url) as (one, two):
        for name in "abcd":
            await one.append(name, job="", created_at=float(ord(name)))
        await one.append("c", job=None)
        ended = Progress(status="done", state=State.SUCCEEDED)
        for name in "ab":
            await two.append(name, progress=ended)
        await one.engine._index.note(Session(id="e", epoch="e", seq=1, job=""), begins=True, is_new=True)
        assert [session.id for session in await two.engine.jobs()] == ["d"]
        assert redis.command("ZCARD", JOBS_KEY) == b":2\r\n"
        await one.append("e", job="", created_at=200.0)
        assert [session.id for session in await two.engine.jobs()] == ["d", "e"]


async def test_instances_subscribe_to_what_they_follow(redis, monkeypatch):
    """The channel is given up some time after the last one has left."""
    monkeypatch.setattr(feed, "LINGER", 0.2)
    async with instances(redis.url, 1) as (one,):
        await one.follow("a")
        await one.follow("b")
        assert redis.command("PUBSUB", "CHANNELS", "*").startswith(b"*2")
        one.engine.unfollow("a")
        await wait_until(lambda: redis.command("PUBSUB", "CHANNELS", "*").startswith(b"*1"))
        await one.follow("a")
        await one.append("a")
        assert one.seqs("a") == [1]


async def test_nothing_is_told_of_what_is_not_followed_any_more(redis):
    """Even while its channel is still subscribed to; who follows it again goes on from there."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        await one.append()
        await wait_until(lambda: two.seqs() == [1])
        two.engine.unfollow("s")
        await one.append()
        await two.follow("t")
        await one.append("t")
        await wait_until(lambda: two.seqs("t") == [1])
        await two.follow()
        await one.append()
        await wait_until(lambda: len(two.seqs()) > 1)
        assert two.seqs() == [1, 3]


async def test_deletion_is_told_everywhere(redis_url):
    """Once on each instance that follows the session; so is expiry."""
    async with instances(redis_url, ttl=0.1) as (one, two):
        for name in "ab":
            await one.follow(name)
            await two.follow(name)
        a = await one.append("a")
        b = await one.append("b", progress=Progress(status="done", state=State.SUCCEEDED))
        await wait_until(lambda: two.seqs("b") == [1])
        assert await one.engine.delete("a", a.epoch)
        await wait_until(lambda: ("removed", "a", a.epoch) in two.told)
        with trio.fail_after(20):
            while ("removed", "b", b.epoch) not in two.told:
                await two.engine.expire(lambda _id: False)
        await wait_until(lambda: ("removed", "b", b.epoch) in one.told)
        assert one.kinds() == two.kinds() == ["removed", "removed"]
        assert await one.engine.count() == 0
        # A session of the same id is another one.
        await one.append("a")
        await wait_until(lambda: two.seqs("a") == [1, 1])
        assert "resync" not in two.kinds()


async def test_session_watched_on_another_instance_is_kept(redis_url):
    """The one on which it is watched extends its time before it is over."""
    async with instances(redis_url, idle_ttl=0.4) as (one, two):
        session = await one.append()
        deadline = trio.current_time() + 1.2
        while trio.current_time() < deadline:
            await two.engine.expire(lambda _id: True)
            await one.engine.expire(lambda _id: False)
        assert await one.engine.load("s") == session
        await wait_until(lambda: one.kinds() == [])
        with trio.fail_after(20):
            while not one.kinds():
                await one.engine.expire(lambda _id: False)


async def test_next_attempt_is_delivered_in_order(redis_url):
    """It takes the place of the log before, so nobody has to come back."""
    async with instances(redis_url) as (one, two):
        await two.follow()
        await one.append()
        before = await one.append()
        after = msgspec.structs.replace(before, epoch="next", seq=1, attempt=2)
        await one.engine.append(after, [Event(1, "note", PAYLOAD, 1.0)], replaces=before.epoch)
        await one.append()
        await wait_until(lambda: len(two.told) == 4)
        assert [told[2:] for told in two.told] == [
            (before.epoch, [1]), (before.epoch, [2]), ("next", [1]), ("next", [2]),
        ]  # fmt: skip


# Messages that do not arrive


@pytest.fixture
def dropping(monkeypatch):
    """A function that has an instance lose the messages of its channels until it is called again."""
    receive = feed.Feed._receive
    deaf: set[int] = set()
    monkeypatch.setattr(
        feed.Feed, "_receive", lambda self, *message: None if id(self) in deaf else receive(self, *message)
    )

    def drop(instance: Instance, lose: bool) -> None:
        (deaf.add if lose else deaf.discard)(id(instance.engine._feed))

    return drop


async def test_gap_is_filled_from_the_log(redis, dropping):
    """When a message is missing, which the next one shows."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        await one.append()
        await wait_until(lambda: two.seqs() == [1])
        dropping(two, True)
        for _ in range(300):
            await one.append()
        await two.follow("t")
        dropping(two, False)
        await one.append()
        await wait_until(lambda: 302 in two.seqs())
        assert two.seqs() == list(range(1, 303))
        assert two.kinds() == []


@pytest.mark.parametrize("case", ["trimmed", "another log", "next attempt"])
async def test_gap_that_cannot_be_filled(redis, dropping, case):
    """Watchers are asked to come back with their cursors."""
    async with instances(redis.url, history_events=3) as (one, two):
        await two.follow()
        session = await one.append()
        await wait_until(lambda: two.seqs() == [1])
        dropping(two, True)
        if case == "trimmed":
            for _ in range(5):
                await one.append()
        elif case == "another log":
            await one.engine.delete("s", session.epoch)
            await one.append()
        else:
            after = msgspec.structs.replace(session, epoch="next", seq=1)
            await one.engine.append(after, [Event(1, "note", PAYLOAD, 1.0)], replaces=session.epoch)
        await two.follow("t")
        dropping(two, False)
        await one.append()
        await wait_until(lambda: two.kinds() == ["resync"])
        last = await one.append()
        await wait_until(lambda: two.told[-1] == ("events", "s", last.epoch, [last.seq]))
        assert two.kinds() == ["resync"]


async def test_interrupted_subscription(redis):
    """What was appended meanwhile is delivered, without a message that would show that it is missing."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        await one.append()
        await wait_until(lambda: two.seqs() == [1])
        for seq in range(2, 6):
            redis.command("CLIENT", "KILL", "TYPE", "pubsub")
            await one.append()
            await wait_until(lambda seq=seq: two.seqs() == list(range(1, seq + 1)))
        assert two.kinds() == []


@pytest.mark.parametrize(
    "message",
    [
        b"hello",
        b"[" * 100_000,
        b'["append"]',
        b'["append","x","s","EPOCH",2,2,"","n",1,"NONCE",{"id":1},[{}]]',
        b'["append","x","s","EPOCH",2,3,"","n",1,"NONCE",{"id":"s","epoch":"EPOCH"},[]]',
        b'["append","x","s","EPOCH",2,2,"","n",1,"NONCE",' + b"[" * 100_000 + b"]" * 100_000 + b",[{}]]",
        b'["removed","x","s","EPOCH",{"id":1}]',
        b'["removed","x","s","EPOCH"]',
    ],
    ids=range(8),
)
async def test_messages_of_others_on_our_channels(redis, message):
    """They neither end the engine, nor keep it from delivering; one of them is logged."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        await two.follow(ALL)
        session = await one.append()
        await wait_until(lambda: two.seqs() == [1])
        (_, key, *_), epoch = session_keys("s"), session.epoch
        nonce = (await one.engine.client.execute("XRANGE", key, "-", "+"))[0][1][5]
        message = message.replace(b"EPOCH", epoch.encode()).replace(b"NONCE", nonce)
        for channel in ("sseserve:{s}:live", b"sseserve:\xff:live"):
            await one.engine.client.execute("PUBLISH", channel, message, key="")
        await one.append()
        await wait_until(lambda: two.seqs() == [1, 2])
        assert two.kinds() == []


@pytest.mark.parametrize("key", [0, 1])
async def test_keys_of_others_in_our_place(redis, key):
    """What needs them is unavailable until they are gone; other sessions are not affected."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        await two.follow("t")
        await one.append()
        await wait_until(lambda: two.seqs() == [1])
        await one.engine.client.execute("RENAME", session_keys("s")[key], "saved")
        await one.engine.client.execute("SET", session_keys("s")[key], "x")
        for use in (
            partial(two.engine.read, "s", 0, 10),
            partial(two.engine.append, msgspec.structs.replace(one.last, seq=2), [Event(2, "n", PAYLOAD, 1)]),
        ):
            with pytest.raises(EngineUnavailable, match="Redis refuses"):
                await use()
        redis.command("CLIENT", "KILL", "TYPE", "pubsub")  # two must read what it follows
        await one.append("t")
        await wait_until(lambda: two.seqs("t") == [1])
        await one.engine.client.execute("RENAME", "saved", session_keys("s")[key])
        await two.follow()
        await one.append()
        await wait_until(lambda: two.seqs() == [1, 2])
        assert two.kinds() == []


@pytest.mark.parametrize(
    ("deleted", "first", "seqs"), [((3,), 1, [1, 2]), ((1, 2), 3, [3, 4]), ((1, 2, 3, 4), 5, [])]
)
async def test_events_that_redis_has_lost(redis, deleted, first, seqs):
    """A page of a log from which some are evicted or deleted does not begin before what is left."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        for _ in range(4):
            await one.append()
        await wait_until(lambda: two.seqs() == [1, 2, 3, 4])
        key = session_keys("s")[1]
        await one.engine.client.execute("XDEL", key, *(f"{seq}-0" for seq in deleted))
        page = await one.engine.read("s", 0, 10)
        assert (page.first, [event.seq for event in page.events]) == (first, seqs)
        page = await one.engine.read("s", 2, 10)
        assert page.first == max(deleted) + 1 if max(deleted) > 2 else first


@pytest.mark.parametrize(
    ("rules", "is_enough"),
    [
        (["~sseserve*", "&*", "+@all", "-@dangerous", "+info"], True),
        (["~sseserve*", "+@all"], False),  # without channels, an append would be stored, and not acknowledged
        (["~other*", "&*", "+@all"], False),
        (["~sseserve*", "&*", "+@all", "-publish"], False),
        (["~sseserve*", "&*", "+@all", "-evalsha", "-eval"], False),
    ],
)
async def test_permissions(redis, rules, is_enough):
    """A user without those that are needed is refused at the start."""
    redis.command("ACL", "SETUSER", "app", "reset", "on", ">p", *rules)
    url = redis.url.replace("//", "//app:p@")
    if is_enough:
        async with instances(url) as (one, two):
            await two.follow()
            await one.append()
            await wait_until(lambda: two.seqs() == [1])
    else:
        with pytest.raises(ConfigError, match=r"lacks permissions .*: give it ~sseserve\*"):
            async with instances(url):
                pass
    redis.command("ACL", "DELUSER", "app")


async def test_redis_that_may_evict(redis, caplog):
    """The administrator is warned."""
    redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    async with instances(redis.url, count=1):
        assert "set its maxmemory-policy to noeviction (it is allkeys-lru)" in caplog.text
    redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")


# Redis is away


@pytest.mark.parametrize("fault", ["pause", "kill", "stop"])
async def test_redis_is_away(tmp_path, quick, fault):
    """Appends fail within a bounded time; when it is back everything goes on, with nothing missing."""
    with RedisServer(tmp_path / "redis", appendonly="yes") as redis:
        async with instances(redis.url) as (one, two):
            await one.follow()
            await two.follow()
            last = await one.append()
            getattr(redis, fault)()
            with trio.fail_after(10), pytest.raises(EngineUnavailable):
                await one.append()
            await wait_until(lambda: one.engine.problem and two.engine.problem)
            with trio.fail_after(1), pytest.raises(EngineUnavailable, match="Redis"):
                await one.engine.load("s")
            (redis.resume if fault == "pause" else redis.start)()
            await wait_until_up(one, two)
            last = await one.append()
            await wait_until(lambda: one.seqs()[-1:] == two.seqs()[-1:] == [last.seq])
            assert one.seqs() == two.seqs() == list(range(1, last.seq + 1))
            assert one.kinds() == two.kinds() == ["degraded", "restored"]


async def test_outage_is_logged_once(tmp_path, quick, caplog):
    """What coordinates the instances uses the connections of the engine, and outlives it a little."""
    caplog.set_level("INFO")
    with RedisServer(tmp_path / "redis") as redis:
        one = Instance(redis.url)
        coordination = open_coordination(Settings(engine=redis.url), one.engine, lambda _id: {})
        async with trio.open_nursery() as nursery:
            await nursery.start(one.engine.run)
            await nursery.start(coordination.run)
            redis.kill()
            await wait_until(lambda: one.engine.problem)
            redis.start()
            await wait_until_up(one)
            await wait_until(lambda: coordination.is_leader)
            nursery.cancel_scope.cancel()
        assert redis.command("EXISTS", "sseserve:{/instances}:leader") == b":0\r\n"
    messages = [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]
    assert [message.split(": ")[0] for message in messages] == [
        f"the Redis at 127.0.0.1:{redis.port} cannot be used",
        f"the Redis at 127.0.0.1:{redis.port} can be used again",
    ]


async def test_what_is_missed_is_delivered_before_all_is_well(tmp_path, quick):
    """An instance that was cut off has delivered what others have appended when it says so."""
    with RedisServer(tmp_path / "redis") as redis:
        async with instances(redis.url) as (one, two):
            await two.follow()
            await one.append()
            await wait_until(lambda: two.seqs() == [1])
            two.engine._on_availability("cut off")
            two.engine._feed.subscriptions.reopen()
            await one.append()
            two.engine._on_availability(None)
            await wait_until(lambda: "restored" in two.kinds())
            assert [kind for kind, *_ in two.told] == ["events", "degraded", "events", "restored"]


async def test_a_later_append_is_over_sooner(redis, monkeypatch):
    """It fails at once, say, as its connection is lost; the earlier one is acknowledged nevertheless."""
    async with instances(redis.url, 1) as (one,):
        await one.append()
        execute, go_on = one.engine._execute_append, trio.Event()

        async def delay(session: Session, *arguments: Any, **more: Any) -> Any:
            if session.seq == 3:
                raise EngineUnavailable("Redis does not respond")
            await go_on.wait()
            return await execute(session, *arguments, **more)

        monkeypatch.setattr(one.engine, "_execute_append", delay)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.append)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(EngineUnavailable):
                await one.append()
            go_on.set()
        monkeypatch.undo()
        assert (await one.append()).seq == 3


async def test_append_that_fails_after_the_end(redis, monkeypatch):
    """Its publisher gets the error of the engine, not one about tasks."""
    async with instances(redis.url, 1) as (one,):
        await one.follow()

    async def fail(*_arguments: Any, **_more: Any) -> Any:
        raise EngineUnavailable("the server stops")

    monkeypatch.setattr(one.engine, "_execute_append", fail)
    monkeypatch.setattr(one.engine._index, "note", lambda *_arguments, **_more: trio.sleep(0))
    with pytest.raises(EngineUnavailable):
        await one.engine.append(Session(id="s", epoch="e", seq=1), [Event(1, "note", PAYLOAD, 1.0)])


async def test_redis_goes_away_during_the_start(redis, monkeypatch):
    """That is an error which says what to do, as it is a moment sooner."""

    async def fail(*_arguments: Any) -> None:
        raise EngineUnavailable("Redis does not respond")

    monkeypatch.setattr(client_module.RedisClient, "evaluate", fail)
    with pytest.raises(ConfigError, match=r"cannot use the Redis at 127\.[^ ]+: Redis does not respond"):
        async with instances(redis.url, 1):
            pass


async def test_append_in_doubt(tmp_path, quick):
    """It was stored although its publisher was told that this is not known: its retry finds the receipt."""
    with RedisServer(tmp_path / "redis") as redis:
        async with instances(redis.url) as (one, two):
            await one.follow()
            await two.follow()
            await one.append()
            receipt = ("key", Receipt("x", Control.CONTINUE))
            redis.pause()
            with pytest.raises(EngineUnavailable):
                await one.append(receipt=receipt)
            redis.resume()
            await wait_until_up(one, two)
            with suppress(Repeated):
                await one.append(receipt=receipt)
            await wait_until(lambda: one.seqs() == two.seqs() == [1, 2])


async def test_memory_of_redis_is_full(redis, quick):
    """Publishers are told so, nothing is stored in part, and it goes on when there is room."""
    async with instances(redis.url, 1) as (one,):
        await one.append()
        try:
            redis.command("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(InsufficientStorage, match="OOM"):
                await one.append()
            with pytest.raises(InsufficientStorage, match="OOM"):
                await one.append("other")
            assert "OOM" in one.engine.problem
            assert (await one.engine.load("s")).seq == 1
            assert await one.engine.load("other") is None
        finally:
            redis.command("CONFIG", "SET", "maxmemory", "0")
        await wait_until(lambda: one.engine.problem is None)
        assert (await one.append()).seq == 2
        assert one.kinds() == ["degraded", "restored"]


# Redis has lost something


async def test_restart_with_append_only_file_loses_nothing(tmp_path, quick):
    """The epoch stays, also after the second restart, and nobody has to come back."""
    with RedisServer(tmp_path / "redis", appendonly="yes") as redis:
        async with instances(redis.url) as (one, two):
            await two.follow()
            first = await one.append()
            for _ in range(2):
                redis.kill()
                redis.start()
                await wait_until_up(one, two)
                last = await one.append()
                await wait_until(lambda last=last: two.seqs()[-1:] == [last.seq])
            assert last.epoch == first.epoch
            assert two.seqs() == [1, 2, 3]
            assert "resync" not in two.kinds()


@pytest.mark.parametrize(
    "options", [{"appendfsync": "everysec"}, {"appendfsync": "always", "without": "CONFIG"}]
)
async def test_restart_that_may_have_lost_something(tmp_path, quick, options):
    """Redis acknowledges what it writes up to two seconds later, or does not say: watchers come back."""
    without = options.pop("without", None)
    if without is not None:
        options["rename_command"] = f'{without} ""'
    with RedisServer(tmp_path / "redis", appendonly="yes", **options) as redis:
        async with instances(redis.url) as (one, two):
            await two.follow()
            first = await one.append()
            await wait_until(lambda: two.seqs() == [1])
            redis.kill()
            redis.start()
            await wait_until_up(one, two)
            last = await one.append()
            assert last.epoch != first.epoch
            assert last.seq in (1, 2)  # with everysec it may have lost the first one indeed
            await wait_until(lambda: "resync" in two.kinds())


async def test_generation_that_loses_nothing(redis):
    """Redis begins another one when a replica follows for the first time."""
    async with instances(redis.url) as (one, two):
        await two.follow()
        first = await one.append()
        before = redis.command("INFO", "replication")
        with RedisServer(redis.folder.parent / "replica", repl_diskless_sync_delay=0) as replica:
            replica.command("REPLICAOF", "127.0.0.1", redis.port)
            replica.wait_until(
                lambda: b"master_link_status:up" in replica.command("INFO", "replication"), "the replica"
            )
        generation = re.compile(rb"master_replid:(\w+)")
        assert generation.search(before)[1] != generation.search(redis.command("INFO", "replication"))[1]
        last = await one.append()
        assert last.epoch == first.epoch
        await wait_until(lambda: two.seqs() == [1, 2])
        assert two.kinds() == []


async def test_restart_without_persistence(tmp_path, quick):
    """The log is gone: watchers come back when there is another one, or after a while."""
    with RedisServer(tmp_path / "redis") as redis:
        async with instances(redis.url) as (one, two):
            for name in "ab":
                await two.follow(name)
                first = await one.append(name)
            await wait_until(lambda: two.seqs("b") == [1])
            redis.kill()
            redis.start()
            await wait_until_up(one, two)
            last = await one.append("b")
            assert (last.epoch == first.epoch, last.seq) == (False, 1)
            await wait_until(lambda: two.kinds().count("resync") == 2)
            assert ("resync", "a") in two.told
            assert ("resync", "b") in two.told


async def test_restart_with_older_snapshot(tmp_path, quick):
    """Events that were acknowledged are gone: the log gets another epoch, and keeps those that are left."""
    with RedisServer(tmp_path / "redis") as redis:
        async with instances(redis.url) as (one, two):
            await two.follow()
            await one.append()
            assert redis.command("SAVE") == b"+OK\r\n"
            lost = await one.append()
            await wait_until(lambda: two.seqs() == [1, 2])
            redis.kill()
            redis.start()
            await wait_until(lambda: "resync" in two.kinds())
            last = await one.append()
            assert (last.epoch == lost.epoch, last.seq) == (False, 2)
            await wait_until(lambda: two.told[-1] == ("events", "s", last.epoch, [2]))
            assert two.kinds().count("resync") == 1
            page = await two.engine.read("s", 0, 10)
            assert [event.seq for event in page.events] == [1, 2]


async def test_lost_events_that_were_replaced_before_anybody_looked(tmp_path, quick):
    """An instance that knows nothing of them goes on where the log ends; the others find out by the nonce."""
    with RedisServer(tmp_path / "redis", appendonly="yes") as redis:
        async with AsyncExitStack() as stack:
            one, two = await stack.enter_async_context(instances(redis.url))
            await two.follow()
            before = await one.append()
            redis.stop()
            shutil.copytree(redis.folder, tmp_path / "older")
            redis.start()
            await wait_until_up(one, two)
            await one.append()
            await one.append()
            await wait_until(lambda: two.seqs() == [1, 2, 3])
            redis.stop()
            with RedisServer(tmp_path / "older", port=redis.port, appendonly="yes"):
                async with instances(redis.url, 1) as (three,):
                    last = await three.append()
                    for _ in range(3):
                        last = await three.append()
                    await wait_until(lambda: "resync" in two.kinds())
                    last = await three.append()
                    await wait_until(lambda: two.told[-1] == ("events", "s", last.epoch, [last.seq]))
                    assert last.epoch != before.epoch
                    # Nothing that took the place of others was delivered under their epoch.
                    told = [told for told in two.told if told[:3] == ("events", "s", before.epoch)]
                    assert [seq for *_, seqs in told for seq in seqs] == [1, 2, 3]
                await stack.aclose()


@asynccontextmanager
async def sentinel(folder):
    """A primary, its replica and a Sentinel."""
    with (
        RedisServer(folder / "primary", repl_diskless_sync_delay=0) as primary,
        RedisServer(folder / "replica", replicaof=f"127.0.0.1 {primary.port}") as replica,
    ):
        replica.wait_until(
            lambda: b"master_link_status:up" in replica.command("INFO", "replication"), "the replica to sync"
        )
        with RedisSentinel(folder / "sentinel", primary) as guard:
            guard.wait_until(
                lambda: b"slaves=1" in guard.command("INFO", "sentinel"), "the Sentinel to see the replica"
            )
            yield primary, replica, guard


def wait_replicated(replica: RedisServer, seq: int) -> None:
    """Wait until a replica has the log of "s" up to an event."""
    has = f"\r\n{seq}\r\n".encode()
    replica.wait_until(
        lambda: replica.command("HGET", "sseserve:{s}:log", "seq").endswith(has), "replication"
    )


@pytest.mark.parametrize("loses", [False, True])
async def test_failover(tmp_path, quick, loses):
    """The epoch changes, as events may be lost. Those that the replica has are kept."""
    async with sentinel(tmp_path) as (primary, replica, guard), instances(guard.url) as (one, two):
        for instance in (one, two):
            await instance.follow()
        await one.append()
        wait_replicated(replica, 1)
        if loses:
            replica.pause()
            assert primary.command("CLIENT", "KILL", "TYPE", "replica") == b":1\r\n"
        before = await one.append()
        await wait_until(lambda: two.seqs() == [1, 2])
        if not loses:
            wait_replicated(replica, 2)
        primary.kill()
        replica.resume()
        await wait_until_up(one, two)
        assert b"role:master" in replica.command("INFO", "replication")
        last = await one.append()
        assert (last.epoch == before.epoch, last.seq) == (False, 2 if loses else 3)
        for instance in (one, two):
            await wait_until(lambda i=instance: i.told[-1] == ("events", "s", last.epoch, [last.seq]))
            assert instance.kinds().count("resync") == 1


async def test_planned_failover(tmp_path, quick):
    """The old primary becomes a replica, which is not written to. What it has not passed on is lost."""
    async with sentinel(tmp_path) as (_, replica, guard), instances(guard.url) as (one, two):
        for instance in (one, two):
            await instance.follow()
        await one.append()
        guard.wait_until(lambda: guard.command("SENTINEL", "FAILOVER", "main") == b"+OK\r\n", "a fail-over")
        epochs: dict[str, None] = {}
        with trio.fail_after(20):
            while len(epochs) < 2:
                with suppress(EngineUnavailable):
                    last = await one.append()
                    epochs[last.epoch] = None
                await trio.sleep(0.01)
        assert b"role:master" in replica.command("INFO", "replication")
        await wait_until(lambda: "resync" in one.kinds() and "resync" in two.kinds())
        last = await one.append()
        for instance in (one, two):
            await wait_until(lambda i=instance: last.seq in i.seqs()[-1:])
            for epoch in epochs:
                told = [told[3] for told in instance.told if told[:3] == ("events", "s", epoch)]
                seqs = [seq for some in told for seq in some]
                assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


async def test_node_of_a_cluster_that_has_lost_its_data(tmp_path, quick):
    """Only the sessions that were on it are concerned."""
    with RedisCluster(tmp_path) as cluster:
        async with instances(cluster.url) as (one, two):
            names = {hash_slot(name.encode()) // 5461: name for name in "abcdef"}
            assert len(names) == 3
            for name in names.values():
                await two.follow(name)
                await one.append(name)
            await wait_until(lambda: all(two.seqs(name) == [1] for name in names.values()))
            cluster.nodes[1].kill()
            await wait_until(lambda: one.engine.problem and two.engine.problem)
            cluster.nodes[1].start()
            await wait_until_up(one, two)
            for name in names.values():
                with suppress(EngineUnavailable):
                    await one.append(name)
            await wait_until(lambda: ("resync", names[1]) in two.told)
            await wait_until(lambda: two.seqs(names[0]) == two.seqs(names[2]) == [1, 2])
            assert two.kinds().count("resync") == 1


async def test_slot_that_is_moved(redis_cluster):
    """Appends and messages follow it. The other node may have lost something, so it is another log."""
    async with instances(redis_cluster.url) as (one, two):
        await two.follow()
        await one.append()
        await wait_until(lambda: two.seqs() == [1])
        slot = hash_slot(b"s")
        source, target = redis_cluster.nodes[slot // 5461], redis_cluster.nodes[(slot // 5461 + 1) % 3]
        ids = [node.command("CLUSTER", "MYID").split(b"\r\n")[1].decode() for node in (source, target)]
        try:
            target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            keys = ("KEYS", *session_keys("s"))
            moved = source.command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, *keys)
            assert moved == b"+OK\r\n"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.append)
                await trio.sleep(0.05)  # it is tried again and again
                for node in redis_cluster.nodes:
                    node.command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
            await wait_until(lambda: "resync" in two.kinds())
            last = await one.append()
            assert last.seq == 3
            await wait_until(lambda: two.told[-1] == ("events", "s", last.epoch, [3]))
        finally:
            redis_cluster.flush()
            for node in redis_cluster.nodes:
                node.command("CLUSTER", "SETSLOT", slot, "NODE", ids[0])


async def test_subscription_to_patterns_fails_twice_at_once():
    """Reading and the ping both find the connection lost: that is one error, and an expected one."""

    async def fail() -> None:
        lost = exceptions.ConnectionError("connection lost")
        raise ExceptionGroup("", [lost, exceptions.ConnectionError("again")])

    client = client_module.RedisClient("redis://127.0.0.1")
    subscription = PatternSubscription(client, ["a*"], lambda *_: None, lambda: None)
    subscription._run = fail  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable, match="connection lost"):
        await subscription.run()


# Limits


async def test_sessions_of_an_owner_on_all_instances(redis_url):
    """As many as there may be, if all create at once; those of another instance count, and can be deleted."""
    refused = 0

    async def create(instance: Instance, session_id: str) -> None:
        nonlocal refused
        try:
            await instance.append(session_id, owner="ann")
        except TooManySessions:
            refused += 1

    async with instances(redis_url, 3, max_sessions_per_owner=7) as every:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(create, every[number % 3], f"s{number}")
        assert (refused, await every[0].engine.count()) == (23, 7)
        (session, *_) = await every[0].engine.sessions()
        assert await every[1].engine.delete(session.id, session.epoch)
        await every[2].append("other", owner="ann")
        with pytest.raises(TooManySessions):
            await every[0].append("one more", owner="ann")


async def test_sessions_of_an_owner_that_vanished(redis, monkeypatch):
    """Whoever looks for them finds that, at times; an entry that may be new is left alone."""
    monkeypatch.setattr(index, "SPARE_TIME", 0.0)
    async with instances(redis.url, 1, max_sessions_per_owner=2) as (one,):
        for session_id in ("a", "b"):
            await one.append(session_id, owner="ann")
        with pytest.raises(TooManySessions):
            await one.append("c", owner="ann")
        for key in session_keys("a"):
            redis.command("DEL", key)
        with pytest.raises(TooManySessions):  # it has looked a short time ago
            await one.append("c", owner="ann")
        monkeypatch.setattr(index, "RECOUNT", 0.0)
        await one.append("c", owner="ann")
        assert redis.command("ZCARD", OWNER_KEY + "ann") == b":2\r\n"
        for session_id in ("b", "c"):
            await one.engine.delete(session_id, (await one.engine.load(session_id)).epoch)
        assert redis.command("EXISTS", OWNER_KEY + "ann") == b":0\r\n"


LARGE = msgspec.Raw(b'"%s"' % (b"x" * 20_000))
DONE = Progress(status="done", state=State.SUCCEEDED)


@pytest.fixture
def look_often(monkeypatch):
    """Let instances look often how much room the logs take."""
    monkeypatch.setattr(space, "INTERVAL", 0.02)
    monkeypatch.setattr(space, "REST", 0.0)
    monkeypatch.setattr(space, "AGAIN", 0.0)


async def test_ended_sessions_make_room(redis_url, look_often):
    """Those first that ended longest ago, whoever created and ended them; never one that runs."""
    async with instances(redis_url, 2, max_log_bytes=131_000) as (one, two):
        assert one.engine._space is not None
        one.engine._space._limit = 10**12  # what it deletes would be told in no particular order to the other
        await two.follow(ALL)
        await one.append("live", LARGE)
        for session_id in ("a", "b", "c"):
            await one.append(session_id, LARGE)
        for session_id in ("c", "a", "b"):
            await two.append(session_id, progress=DONE)
        for _ in range(2):
            await one.append("live", LARGE)  # 125,269 bytes are stored then, more than 95 %
        await wait_until(lambda: two.engine._space._measured.logs > 125_000)
        assert "removed" not in one.kinds() + two.kinds()
        await one.append("live", LARGE)
        await wait_until(lambda: two.engine._space._measured.logs < 125_000)
        assert [told[1] for told in two.told if told[0] == "removed"] == ["c"]
        for _ in range(4):
            with suppress(InsufficientStorage):
                await one.append("live", LARGE)
        await wait_until(lambda: len(two.kinds()) == 3)
        assert [told[1] for told in two.told if told[0] == "removed"] == ["c", "a", "b"]
        assert await one.engine.load("live") is not None


async def test_no_room_is_left(redis_url, look_often):
    """Publishers get 507 on all instances, nothing changes, the end is stored; then there is room again."""
    async with instances(redis_url, 2, max_log_bytes=100_000) as (one, two):
        for _ in range(6):
            with suppress(InsufficientStorage):
                await one.append("live", LARGE)
        await wait_until(lambda: one.engine._space.is_full and two.engine._space.is_full)
        before = await two.engine.load("live")
        for instance, session_id in ((one, "live"), (two, "live"), (two, "new")):
            with pytest.raises(InsufficientStorage, match="max_log_bytes = 100000") as caught:
                await instance.append(session_id)
            assert caught.value.limit == "max_log_bytes"
        with pytest.raises(InsufficientStorage):
            await two.append("new", progress=DONE)
        assert await two.engine.load("live") == before
        assert await two.engine.load("new") is None
        await one.append("live", progress=DONE)
        await wait_until(lambda: not (one.engine._space.is_full or two.engine._space.is_full))
        await two.append("new", LARGE)
        assert await one.engine.load("live") is None
        # As if Redis used less than the limit: then the sizes of the logs need not be known.
        two.engine._space.is_full, two.engine._space._limit = True, 10**12
        await wait_until(lambda: not two.engine._space.is_full)


async def test_what_others_keep_in_redis(redis, monkeypatch):
    """It is not counted as logs, and the sizes of these are not added up again and again because of it."""
    measured = 0
    measure = space.Space._measure

    async def count(self):
        nonlocal measured
        measured += 1
        return await measure(self)

    monkeypatch.setattr(space.Space, "_measure", count)
    monkeypatch.setattr(space, "INTERVAL", 0.02)
    redis.command("SET", "others", "x" * 3_000_000)
    async with instances(redis.url, 1, max_log_bytes=2_000_000) as (one,):
        await one.append("a", progress=DONE)
        await wait_until(lambda: measured)
        await trio.sleep(0.3)
        await one.append("b")
        assert measured <= 3
        assert not one.engine._space.is_full
        assert "removed" not in one.kinds()
