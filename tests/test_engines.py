"""The contract of every engine, whatever its storage. Add a new engine to ``ENGINES``."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import msgspec
import pytest
import trio

from sseserve.config import Settings
from sseserve.engines import ALL, EngineListener, Page, Repeated, Stale, open_engine
from sseserve.engines import records as records_module
from sseserve.engines.base import receipt_size, record_size
from sseserve.errors import ConfigError, Forbidden, InsufficientStorage, TooManySessions
from sseserve.model import Artifact, Control, Event, OriginalPayload, Progress, Receipt, Session, State
from sseserve.progress.rules import NewEvent
from sseserve.progress.tracker import Tracker

ENGINES = ["memory:", "sqlite:", "redis:", "cluster:"]
NOW = 1_700_000_000.0


class EngineHarness(EngineListener):
    """An engine, what it has told its listener, and a minimal tracker."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.delivered: list[tuple[Session, Sequence[Event]]] = []
        self.removals: list[str] = []
        self.now = NOW
        self.engine = open_engine(Settings(engine=url, **settings), self, lambda: self.now)

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        self.delivered.append((session, list(events)))

    def removed(self, session: Session, *, own: bool = True) -> None:
        self.removals.append(session.id)

    async def advance_to(self, now: float) -> None:
        """Let the time be ``now``, as the engine measures it."""
        self.now = now

    async def append(
        self, session_id: str = "s", *, epoch: str = "e", at: float = NOW, **fields: Any
    ) -> Session:
        """Append one event; ``fields`` are those of the session, with ``ended=True`` for a terminal one."""
        await self.advance_to(at)
        before = await self.engine.load(session_id) or Session(id=session_id, epoch=epoch)
        data = fields.pop("data", msgspec.Raw(b"%d" % (before.seq + 1)))
        receipt = fields.pop("receipt", None)
        if fields.pop("ended", False):
            fields["progress"] = Progress(status="done", state=State.SUCCEEDED)
        session = msgspec.structs.replace(before, seq=before.seq + 1, touched_at=at, **fields)
        await self.engine.append(session, [Event(session.seq, "note", data, at)], receipt=receipt)
        return session

    async def seqs(self, after: int = 0, limit: int = 10_000, session_id: str = "s") -> list[int]:
        page = await self.engine.read(session_id, after, limit)
        assert page is not None
        return [event.seq for event in page.events]

    async def expire(self, seconds: float, watched: Any = lambda _id: False) -> list[str]:
        """Let so many seconds have passed since ``NOW``, and return what expires."""
        await self.advance_to(NOW + seconds)
        before = len(self.removals)
        await self.engine.expire(watched)
        return sorted(self.removals[before:])


OpenHarness = Callable[..., Awaitable[EngineHarness]]


@pytest.fixture(params=ENGINES)
def open_harness(request, nursery, tmp_path) -> OpenHarness:
    """A function that opens an engine with the settings that it is given. Each is empty at first."""
    numbers = count()

    async def open_(**settings: Any) -> EngineHarness:
        url = request.param
        if url == "sqlite:":
            url += str(tmp_path / f"{next(numbers)}.db")
        elif url == "redis:":
            url = request.getfixturevalue("redis").url.removesuffix("0") + str(next(numbers))
        elif url == "cluster:":
            cluster = request.getfixturevalue("redis_cluster")
            cluster.flush()
            url = cluster.url
        harness = EngineHarness(url, **settings)
        await nursery.start(harness.engine.run)
        harness.engine.follow(ALL)
        await harness.engine.wait_followed(ALL)
        return harness

    return open_


@pytest.fixture
async def harness(open_harness) -> EngineHarness:
    return await open_harness()


async def test_first_append_creates_the_session(harness):
    """Before it there is nothing; after it the session, the event and the delivery agree."""
    assert await harness.engine.load("s") is None
    assert await harness.engine.read("s", 0, 10) is None
    session = await harness.append(owner="o", viewers=("v",), control=Control.PAUSE, lease=3.0)
    assert await harness.engine.load("s") == session
    page = await harness.engine.read("s", 0, 10)
    assert page is not None
    assert (page.session, page.first) == (session, 1)
    assert harness.delivered == [(session, page.events)]


async def test_events_are_read_unchanged(harness):
    """Every field of every kind of event, and of the session."""
    progress = Progress(
        status="s",
        state=State.RUNNING,
        percent=40.5,
        stage="tts",
        message="é\u2028",
        error={"a": [1, None]},
        data=msgspec.Raw(b'{"a":1}'),
        artifacts=(Artifact("a", size_bytes=3),),
        started_at=1.5,
        rate=0.25,
        eta=3.0,
        last_advance_at=2.5,
        weight=0.5,
        smoothed=0.125,
    )
    session = Session(
        id="s", epoch="e", seq=2, title="t", ttl=5.0, data=msgspec.Raw(b"[]"), progress=progress, stalled=True
    )
    events = [
        Event(1, "note", msgspec.Raw(b'"x"'), 1.25, retry=5),
        Event(2, "progress", progress, 2.25, ("stage",), original=OriginalPayload("d", msgspec.Raw(b"{}"))),
    ]
    await harness.engine.append(session, events)
    page = await harness.engine.read("s", 0, 10)
    assert page is not None
    assert (page.session, page.events) == (session, events)
    assert [event.conflatable for event in page.events] == [False, False]


async def test_what_is_read_is_written_like_what_was_delivered(harness):
    """To the byte: a client may get an event live, another one from the log."""
    for seq, percent in enumerate((0, 40, 40.5, 100), 1):
        progress = Progress(status="s", state=State.RUNNING, percent=percent, eta=3.0, started_at=1e9)
        session = Session(id="s", epoch="e", seq=seq, progress=progress)
        await harness.engine.append(session, [Event(seq, "progress", progress, NOW)])
    page = await harness.engine.read("s", 0, 10)
    delivered = [event for _, events in harness.delivered for event in events]
    assert msgspec.json.encode(page.events) == msgspec.json.encode(delivered)
    assert msgspec.json.encode(page.session) == msgspec.json.encode(session)
    assert msgspec.json.encode(await harness.engine.load("s")) == msgspec.json.encode(session)


async def test_pages(harness):
    """At most ``limit`` events after a position, oldest first; none after the end."""
    for _ in range(10):
        await harness.append()
    assert await harness.seqs(0, 3) == [1, 2, 3]
    assert await harness.seqs(3, 3) == [4, 5, 6]
    assert await harness.seqs(8, 3) == [9, 10]
    assert await harness.seqs(10, 3) == []
    assert await harness.seqs(99, 3) == []
    assert await harness.seqs(0, 0) == []


async def test_stale_append_is_rejected(harness):
    """It stores no event, session or receipt, and delivers nothing."""
    session = await harness.append()
    await harness.append()
    delivered = list(harness.delivered)
    stale = [
        msgspec.structs.replace(session, seq=2),  # another writer was first
        msgspec.structs.replace(session, seq=4),  # a gap
        msgspec.structs.replace(session, seq=3, epoch="other"),  # another epoch
        Session(id="s", epoch="other", seq=1),
        Session(id="t", epoch="e", seq=2),  # it does not exist
    ]
    for record in stale:
        with pytest.raises(Stale):
            await harness.engine.append(
                record, [Event(record.seq, "note", msgspec.Raw(b"1"), NOW)],
                receipt=("k", Receipt("x", Control.CONTINUE)),
            )  # fmt: skip
    assert await harness.seqs() == [1, 2]
    assert harness.delivered == delivered
    assert await harness.engine.receipt("s", "k") is None
    assert await harness.engine.load("t") is None


async def test_one_of_many_concurrent_writers_wins(harness):
    """Each position in the log is assigned once, and delivery is in that order."""
    session = await harness.append()
    winners: list[int] = []

    async def write(number: int) -> None:
        try:
            await harness.engine.append(
                msgspec.structs.replace(session, seq=2),
                [Event(2, "note", msgspec.Raw(b"%d" % number), NOW)],
            )
        except Stale:
            return
        winners.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(write, number)
    assert len(winners) == 1
    assert await harness.seqs() == [1, 2]
    assert [events[0].seq for _, events in harness.delivered] == [1, 2]


async def test_event_is_readable_when_delivered(harness):
    """Long-polls rely on it."""
    session = await harness.append()
    assert harness.delivered[-1][0] == session
    assert (await harness.engine.load("s")).seq == harness.delivered[-1][1][-1].seq


async def test_receipts(harness):
    """Found by key and session; the same key overwrites; deleted with the session."""
    one, two = Receipt("a", Control.CONTINUE, 1, b"d"), Receipt("b", Control.PAUSE, 2, b"e")
    assert await harness.engine.receipt("s", "k") is None
    await harness.append(receipt=("k", one))
    await harness.append()
    assert await harness.engine.receipt("s", "k") == one
    assert await harness.engine.receipt("s", "K") is None
    assert await harness.engine.receipt("t", "k") is None
    await harness.append(receipt=("k", two))
    assert await harness.engine.receipt("s", "k") == two
    await harness.engine.delete("s", "e")
    await harness.append(epoch="f")
    assert await harness.engine.receipt("s", "k") is None


async def test_receipts_are_bounded(harness):
    """The newest thousand are kept; storing a key again makes it new."""
    receipt = Receipt("a", Control.CONTINUE)
    for number in range(1000):
        await harness.append(receipt=(str(number), receipt))
    await harness.append(receipt=("0", msgspec.structs.replace(receipt, count=2)))
    await harness.append(receipt=("last", receipt))
    kept = [await harness.engine.receipt("s", key) is not None for key in ("0", "1", "2", "last")]
    assert kept == [True, False, True, True]


async def test_receipts_count_as_history(open_harness):
    """Events and receipts together are within ``history_bytes``, and receipts within a quarter of it."""
    harness = await open_harness(history_bytes=40_000)

    async def kept_receipts(keys: Sequence[str]) -> list[tuple[str, Receipt]]:
        found = [(key, await harness.engine.receipt("s", key)) for key in keys]
        return [(key, receipt) for key, receipt in found if receipt is not None]

    async def event_bytes() -> int:
        page = await harness.engine.read("s", 0, 10_000)
        assert page is not None
        return sum(event.weight for event in page.events)

    keys = [f"{number:0200}" for number in range(200)]
    for key in keys:
        await harness.append(receipt=(key, Receipt("e-1", Control.CONTINUE)))
    receipts = await kept_receipts(keys)
    size = sum(receipt_size(key, receipt) for key, receipt in receipts)
    assert [key for key, _ in receipts] == keys[-len(receipts) :]
    assert 9_000 < size <= 10_000
    for _ in range(300):
        await harness.append()
    assert 39_000 < size + await event_bytes() <= 40_000
    # The receipt of NDJSON is stored again with each line.
    for number in range(50):
        await harness.append(receipt=("lines", Receipt(f"e-{number}", Control.CONTINUE, number)))
    size = sum(receipt_size(key, receipt) for key, receipt in await kept_receipts([*keys, "lines"]))
    assert size <= 10_000
    assert 39_000 < size + await event_bytes() <= 40_000


async def test_a_request_is_stored_once(harness):
    """Of requests with one key the first is stored, the others get its receipt; further lines are stored."""
    first = Receipt("e-1", Control.CONTINUE, 1, b"d")
    session = await harness.append(receipt=("k", first))
    for seq in (2, 1, 9):  # whether it would be stale or not
        after = msgspec.structs.replace(session, seq=seq)
        with pytest.raises(Repeated) as caught:
            await harness.engine.append(
                after,
                [Event(seq, "note", msgspec.Raw(b"1"), NOW)],
                receipt=("k", Receipt("x", Control.PAUSE)),
            )
        assert caught.value.receipt == first
    assert await harness.seqs() == [1]
    assert len(harness.delivered) == 1
    await harness.append(receipt=("k", msgspec.structs.replace(first, count=2)))
    with pytest.raises(Repeated):
        await harness.append(receipt=("k", msgspec.structs.replace(first, count=2)))
    assert await harness.seqs() == [1, 2]


async def test_records_to_decide_on(harness):
    """``latest`` and ``settled`` are what is stored, when nothing is being stored."""
    assert await harness.engine.latest("s") is await harness.engine.settled("s") is None
    for _ in range(3):
        session = await harness.append()
        assert await harness.engine.latest("s") == await harness.engine.settled("s") == session
    await harness.engine.delete("s", "e")
    assert await harness.engine.latest("s") is await harness.engine.settled("s") is None


async def test_concurrent_appends_that_follow_each_other(harness):
    """Writers that decide on ``latest`` need not wait for each other; all is stored, in order."""
    await harness.append()

    async def write() -> None:
        while True:
            session = await harness.engine.latest("s")
            after = msgspec.structs.replace(session, seq=session.seq + 1)
            try:
                await harness.engine.append(after, [Event(after.seq, "note", msgspec.Raw(b"1"), NOW)])
            except Stale:
                continue
            return

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(write)
    assert await harness.seqs() == list(range(1, 52))
    assert [events[0].seq for _, events in harness.delivered] == list(range(1, 52))


async def test_cancelled_append_is_complete_or_not_begun(harness):
    """What is stored and what was delivered agree, whenever a writer is cancelled."""
    await harness.append()

    async def write() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            with suppress(Stale):
                session = await harness.engine.latest("s")
                after = msgspec.structs.replace(session, seq=session.seq + 1)
                await harness.engine.append(after, [Event(after.seq, "note", msgspec.Raw(b"1"), NOW)])

    for yields in range(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(write)
            for _ in range(yields):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await harness.append()
        stored = await harness.seqs()
        assert stored == list(range(1, len(stored) + 1))
        assert [events[0].seq for _, events in harness.delivered] == stored


async def test_one_large_receipt_is_kept(open_harness):
    """The newest always is, whatever the bound."""
    harness = await open_harness(history_bytes=1)
    for key in ("a" * 255, "b" * 255):
        await harness.append(receipt=(key, Receipt("e-1", Control.CONTINUE)))
    assert await harness.engine.receipt("s", "b" * 255) is not None
    assert await harness.engine.receipt("s", "a" * 255) is None
    assert len((await harness.engine.read("s", 0, 9)).events) == 1


async def test_listing(harness):
    """The newest comes first; an append does not change the order."""
    for number, session_id in enumerate("abc"):
        await harness.append(session_id, at=NOW + number)
    await harness.append("b", at=NOW + 3)
    await harness.append("a", at=NOW + 4, ended=True)
    assert [session.id for session in await harness.engine.sessions()] == ["c", "b", "a"]
    newest = [await harness.engine.sessions(number) for number in range(5)]
    assert [[session.id for session in sessions] for sessions in newest] == [
        [],
        ["c"],
        ["c", "b"],
        ["c", "b", "a"],
        ["c", "b", "a"],
    ]
    assert await harness.engine.count() == 3


async def test_deleting(harness):
    """Only the given epoch is deleted; a new session of that id starts at 1."""
    await harness.append()
    assert not await harness.engine.delete("s", "other")
    assert await harness.engine.delete("s", "e")
    assert not await harness.engine.delete("s", "e")
    assert await harness.engine.load("s") is None
    assert await harness.engine.count() == 0
    await harness.append(epoch="f")
    assert await harness.seqs() == [1]


async def test_leases(harness):
    """Sessions with a lease that have not ended or been deleted."""
    await harness.append("a", lease=5.0)
    await harness.append("b")
    await harness.append("c", lease=5.0)
    await harness.append("c", ended=True)
    await harness.append("d", lease=5.0)
    await harness.engine.delete("d", "e")
    assert [session.id for session in await harness.engine.leased()] == ["a"]


async def test_jobs(harness):
    """Sessions with a job that have not ended or been deleted, the oldest first."""
    for number, name in enumerate(("d", "b", "ended", "c", "deleted", "claimed", "a")):
        await harness.append(name, created_at=NOW + number, job="demo" if name == "b" else "")
    await harness.append("session", created_at=NOW + 9)
    await harness.append("ended", ended=True)
    await harness.append("claimed", job=None)
    await harness.engine.delete("deleted", "e")
    running = await harness.append("d", instance="i")
    jobs = await harness.engine.jobs()
    assert [session.id for session in jobs] == ["d", "b", "c", "a"]
    assert jobs[0] == running
    assert [session.is_waiting for session in jobs] == [False, True, True, True]


# Bounds


async def test_log_is_bounded_in_events(open_harness):
    """The newest events are kept, and ``first`` is the position of the oldest."""
    harness = await open_harness(history_events=3)
    for _ in range(10):
        await harness.append()
    assert await harness.seqs() == [8, 9, 10]
    assert await harness.seqs(8) == [9, 10]
    page = await harness.engine.read("s", 0, 1)
    assert page is not None
    assert page.first == 8


BIG = "x" * 10_000


@pytest.mark.parametrize(
    "event",
    [
        Event(1, "note", msgspec.Raw(b'"%s"' % BIG.encode()), NOW),
        *(
            Event(1, "progress", Progress(status="s", state=State.RUNNING, **fields), NOW)
            for fields in (
                {"message": BIG},
                {"stage": BIG},
                {"data": msgspec.Raw(b'"%s"' % BIG.encode())},
                {"error": BIG},
                {"error": {"deep": [{"down": BIG}]}},
                {"artifacts": (Artifact("a", url=BIG),)},
            )
        ),
        Event(1, "progress", Progress(status=BIG, state=State.RUNNING), NOW),
        Event(1, "progress", Progress(status="s", state=State.RUNNING), NOW,
              original=OriginalPayload("d", msgspec.Raw(b'"%s"' % BIG.encode()))),
    ],
    ids=["note", "message", "stage", "data", "error", "errors", "artifacts", "status", "published"],
)  # fmt: skip
async def test_log_is_bounded_in_bytes(open_harness, event):
    """Whichever field has the bytes. The last event is always kept."""
    harness = await open_harness(history_bytes=25_000)
    for seq in range(1, 6):
        await harness.engine.append(
            Session(id="s", epoch="e", seq=seq), [msgspec.structs.replace(event, seq=seq)]
        )
    assert await harness.seqs() == [4, 5]
    harness = await open_harness(history_bytes=1)
    await harness.engine.append(Session(id="s", epoch="e", seq=1), [event])
    assert await harness.seqs() == [1]


@pytest.mark.parametrize("seed", range(6))
async def test_trimmed_log_has_no_gap(open_harness, seed):
    """The log is always a suffix without a gap, and ends with its newest event."""
    rng = random.Random(seed)
    events, size = rng.randint(1, 20), rng.randint(1, 10_000)
    harness = await open_harness(history_events=events, history_bytes=size)
    sizes = [rng.randint(0, 3000) for _ in range(40)]
    for seq, length in enumerate(sizes, 1):
        await harness.append(data=msgspec.Raw(b'"%s"' % (b"x" * length)))
        kept = await harness.seqs()
        assert kept == list(range(kept[0], seq + 1))
        assert len(kept) <= events
        assert len(kept) == 1 or sum(sizes[at - 1] for at in kept) <= size


# Expiry


async def test_ended_session_is_kept_for_its_ttl(open_harness):
    """The session's own or the server's, counted from its end."""
    harness = await open_harness(ttl=100, idle_ttl=1000)
    await harness.append("a", ended=True)
    await harness.append("b", ttl=50.0)
    await harness.append("b", ended=True, at=NOW + 30)
    await harness.append("c")
    assert await harness.expire(79.9) == []
    assert await harness.expire(80) == ["b"]
    assert await harness.expire(99.9) == []
    assert await harness.expire(100) == ["a"]
    assert [session.id for session in await harness.engine.sessions()] == ["c"]
    assert await harness.engine.read("a", 0, 1) is None


async def test_active_session_is_kept_for_its_idle_time(open_harness):
    """Counted from its last event; a longer ttl of its own extends it."""
    harness = await open_harness(ttl=10, idle_ttl=100)
    await harness.append("a")
    await harness.append("b", ttl=150.0)
    await harness.append("c")
    await harness.append("c", at=NOW + 60)
    assert await harness.expire(99.9) == []
    assert await harness.expire(100) == ["a"]
    assert await harness.expire(150) == ["b"]
    assert await harness.expire(159.9) == []
    assert await harness.expire(160) == ["c"]


async def test_log_that_replaces_another(harness):
    """It begins anew under its own epoch, and keeps the receipts; only the log that was named is replaced."""
    receipt = Receipt("e-1", Control.CONTINUE)
    before = await harness.append(receipt=("k", receipt), ended=True, lease=3.0)
    after = msgspec.structs.replace(before, epoch="f", seq=1, progress=None)
    event = Event(1, "note", msgspec.Raw(b"1"), NOW)
    for session_id, epoch in (("s", "x"), ("s", None), ("other", "e")):
        with pytest.raises(Stale):
            await harness.engine.append(
                msgspec.structs.replace(after, id=session_id), [event], replaces=epoch
            )
    assert await harness.engine.load("s") == before
    await harness.engine.append(after, [event], replaces="e")
    assert await harness.engine.read("s", 0, 10) == Page(after, 1, [event])
    assert await harness.engine.receipt("s", "k") == receipt
    assert await harness.engine.leased() == [after]
    assert await harness.engine.sessions() == [after]
    with pytest.raises(Stale):
        await harness.engine.append(after, [event], replaces="e")


async def test_expiry_of_a_log_that_replaces_another(open_harness):
    """A session that failed and is tried again is kept as long as one that runs."""
    harness = await open_harness(ttl=10, idle_ttl=100)
    before = await harness.append(ended=True)
    after = msgspec.structs.replace(before, epoch="f", seq=1, progress=None)
    await harness.engine.append(after, [Event(1, "note", msgspec.Raw(b"1"), NOW)], replaces="e")
    assert await harness.expire(99) == []
    assert await harness.expire(100) == ["s"]


async def test_watched_session_is_kept_until_its_end(open_harness):
    """Watchers keep an active session, but not an ended one."""
    harness = await open_harness(ttl=10, idle_ttl=100)
    await harness.append("a")
    await harness.append("b", ended=True)
    assert await harness.expire(10, lambda session_id: True) == ["b"]
    assert await harness.expire(5000, lambda session_id: True) == []
    assert await harness.expire(5099) == []
    assert await harness.expire(5100) == ["a"]


async def test_recreated_session_has_its_own_expiry(open_harness):
    """The expiry noted for a deleted session does not apply to a new one of that id."""
    harness = await open_harness(idle_ttl=100)
    await harness.append("a")
    await harness.engine.delete("a", "e")
    await harness.append("a", epoch="f", at=NOW + 50)
    assert await harness.expire(100) == []
    assert await harness.expire(150) == ["a"]


async def test_expired_session_has_no_lease(open_harness):
    """A session that has expired is not among the leased ones, nor among the jobs."""
    harness = await open_harness(idle_ttl=100)
    await harness.append("a", lease=5.0, job="")
    assert await harness.expire(100) == ["a"]
    assert await harness.engine.leased() == []
    assert await harness.engine.jobs() == []


async def test_memory_does_not_grow_with_deleted_sessions(monkeypatch):
    """The number of noted expiry times stays proportional to the existing sessions."""
    monkeypatch.setattr(records_module, "SPARE_SECONDS", 10)
    harness = EngineHarness("memory:", ttl=10, idle_ttl=1e6)
    for number in range(500):
        await harness.append(f"s{number}", at=NOW + number)
        await harness.append(f"s{number}", ended=number % 2 == 0, at=NOW + number)
        if number % 2:
            await harness.engine.delete(f"s{number}", "e")
        await harness.expire(number)
        due = harness.engine._logs._due
        assert sum(map(len, due._records.values())) == await harness.engine.count()
        assert len(due._seconds) <= 2 * await harness.engine.count() + 13
    assert await harness.engine.count() < 10
    # All remaining sessions still expire.
    await harness.expire(1000)
    assert await harness.engine.count() == 0


def test_unknown_engine():
    """An error at startup that quotes the URL."""
    with pytest.raises(ConfigError, match="'oracle:'"):
        open_engine(Settings(engine="oracle:"), EngineListener())


# What the tracker builds on it


@pytest.mark.parametrize("change", ["control", "apply", "delete"])
async def test_a_check_is_made_of_what_is_stored(harness, monkeypatch, change):
    """A session that was created again by somebody else is not changed, although another one was read."""
    tracker = Tracker(harness.engine)
    earlier = await tracker.create("s", owner="ann")
    await tracker.delete("s")
    stored = await tracker.create("s", owner="bob")
    checked: list[str | None] = []

    def check(session: Session | None) -> None:
        checked.append(session and session.owner)
        if session is None or session.owner != "ann":
            raise Forbidden("not yours")

    async def read_earlier(_session_id: str) -> Session:
        monkeypatch.undo()
        return earlier

    for name in ("settled", "load", "latest"):
        monkeypatch.setattr(harness.engine, name, read_earlier)
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "control": lambda: tracker.control("s", Control.PAUSE, check=check),
        "apply": lambda: tracker.apply("s", NewEvent("x", 1), check=check),
        "delete": lambda: tracker.delete("s", check=check),
    }
    with pytest.raises(Forbidden):
        await changes[change]()
    assert checked == ["ann", "bob"]
    assert await harness.engine.load("s") == stored
    await tracker.delete("s")
    with pytest.raises(Forbidden):
        await tracker.apply("s", NewEvent("x", 1), check=check)
    assert await harness.engine.load("s") is None


async def test_a_check_is_not_made_of_what_may_never_be_stored(harness, monkeypatch):
    """What another writer is about to store may fail; nobody is refused because of it."""
    tracker = Tracker(harness.engine)
    session = await tracker.create("s", owner="ann")

    async def read_what_is_never_stored(_session_id: str) -> Session:
        return msgspec.structs.replace(session, owner="bob")

    def check(session: Session | None) -> None:
        if session is None or session.owner != "ann":
            raise Forbidden("not yours")

    monkeypatch.setattr(harness.engine, "latest", read_what_is_never_stored)
    await tracker.apply("s", NewEvent("x", 1), check=check)
    assert (await harness.engine.load("s")).seq == 2


async def test_the_owner_of_a_session_that_publishing_creates(harness):
    """It is stored with the session, and does not change with a later publisher."""
    tracker = Tracker(harness.engine)
    for owner in ("ann", "bob", None):
        await tracker.apply("s", NewEvent("x", 1), owner=owner)
    session = await harness.engine.load("s")
    assert (session.owner, session.seq) == ("ann", 3)


# Limits


async def test_sessions_of_an_owner(open_harness):
    """No more than the limit, however many are created at once; deleted and expired ones do not count."""
    harness = await open_harness(max_sessions_per_owner=3, ttl=10)
    created: list[str] = []
    refused: list[TooManySessions] = []

    async def create(session_id: str, owner: str | None) -> None:
        try:
            await harness.append(session_id, owner=owner)
            created.append(session_id)
        except TooManySessions as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(create, f"a{number}", "ann")
            nursery.start_soon(create, f"o{number}", None)
    assert len([session_id for session_id in created if session_id.startswith("a")]) == 3
    assert (len(created), len(refused)) == (13, 7)
    assert "max_sessions_per_owner = 3" in str(refused[0])
    assert (refused[0].status, refused[0].limit) == (429, "max_sessions_per_owner")
    assert await harness.engine.count() == 13
    kept = next(session_id for session_id in created if session_id.startswith("a"))
    await harness.append(kept)  # it exists already
    await create("b", "bob")
    before = len(harness.delivered)
    with pytest.raises(TooManySessions):
        await harness.append("more", owner="ann")
    assert await harness.engine.load("more") is None
    assert len(harness.delivered) == before
    await harness.engine.delete(kept, "e")
    await harness.append("x", owner="ann")
    with pytest.raises(TooManySessions):
        await harness.append("more", owner="ann")
    await harness.append("x", ended=True)
    assert await harness.expire(11) == ["x"]
    await harness.append("y", owner="ann")
    with pytest.raises(TooManySessions):
        await harness.append("more", owner="ann")


async def test_another_attempt_is_no_other_session(open_harness):
    """Its owner need not have room for one more."""
    harness = await open_harness(max_sessions_per_owner=1)
    before = await harness.append(owner="ann", ended=True)
    after = msgspec.structs.replace(before, epoch="f", seq=1, progress=None)
    await harness.engine.append(after, [Event(1, "note", msgspec.Raw(b"1"), NOW)], replaces="e")
    await harness.engine.delete("s", "f")
    await harness.append("t", owner="ann")


async def test_sessions_of_an_owner_without_a_limit(open_harness):
    """None: no limit."""
    harness = await open_harness(max_sessions_per_owner=None)
    for number in range(5):
        await harness.append(f"s{number}", owner="ann")


@pytest.fixture(params=["memory:", "sqlite:"])
def open_exact(request, nursery, tmp_path):
    """A function that opens an engine that counts exactly what its sessions take."""

    async def open_(**settings: Any) -> EngineHarness:
        url = request.param + (str(tmp_path / "logs.db") if request.param == "sqlite:" else "")
        harness = EngineHarness(url, **settings)
        await nursery.start(harness.engine.run)
        return harness

    return open_


def taken(harness: EngineHarness) -> int:
    """How many bytes the engine has counted."""
    count: int = harness.engine._logs.total
    return count


async def counted(harness: EngineHarness, sessions: Sequence[str], receipts: Any = ()) -> int:
    """How many bytes there really are."""
    size = 0
    for session_id in sessions:
        page = await harness.engine.read(session_id, 0, 10_000)
        if page is not None:
            size += record_size(page.session) + sum(event.weight for event in page.events)
        for key in receipts:
            if (receipt := await harness.engine.receipt(session_id, key)) is not None:
                size += receipt_size(key, receipt)
    return size


LARGE = msgspec.Raw(b'"%s"' % (b"x" * 3000))


async def test_ended_sessions_make_room(open_exact):
    """Those that ended longest ago first, whoever was created first; their watchers are told."""
    harness = await open_exact(max_log_bytes=40_000)
    for session_id in "abcd":
        await harness.append(session_id, data=LARGE)
    for at, session_id in enumerate("cad"):
        await harness.append(session_id, data=LARGE, ended=True, at=NOW + at)
    for number in range(3, 30):
        before = taken(harness)
        with suppress(InsufficientStorage):
            await harness.append("b", data=LARGE, at=NOW + number)
        assert taken(harness) <= 40_000
        assert taken(harness) == await counted(harness, "abcd")
        if taken(harness) == before:
            break
    assert harness.removals == ["c", "a", "d"]
    assert [await harness.engine.load(session_id) is None for session_id in "abcd"] == [1, 0, 1, 1]
    # The one that runs is never deleted.
    with pytest.raises(InsufficientStorage, match="max_log_bytes = 40000") as caught:
        await harness.append("b", data=LARGE)
    assert caught.value.limit == "max_log_bytes"


async def test_what_does_not_fit_changes_nothing(open_exact):
    """Nothing is stored, delivered or deleted if all sessions that have ended would not be enough."""
    harness = await open_exact(max_log_bytes=17_000)
    for _ in range(4):
        await harness.append("a", data=LARGE)
    await harness.append("b", ended=True)
    receipt = "k", Receipt("x", Control.CONTINUE)
    before, delivered, size = await harness.engine.load("a"), list(harness.delivered), taken(harness)
    huge = msgspec.Raw(b'"%s"' % (b"x" * 9000))
    for session_id in ("a", "new"):
        with pytest.raises(InsufficientStorage):
            await harness.append(session_id, data=huge, receipt=receipt)
        assert await harness.engine.receipt(session_id, "k") is None
    assert (await harness.engine.load("a"), harness.delivered) == (before, delivered)
    assert await harness.engine.load("new") is None
    assert await harness.engine.load("b") is not None
    assert taken(harness) == size
    assert harness.removals == []
    await harness.append("a", data=LARGE, receipt=receipt)  # that fits, without b
    assert harness.removals == ["b"]


async def test_the_end_of_a_session_is_stored_all_the_same(open_exact):
    """It can be deleted then, and its publisher need not try for ever; a new session gets no such room."""
    harness = await open_exact(max_log_bytes=10_000)
    with suppress(InsufficientStorage):
        for _ in range(10):
            await harness.append("a", data=LARGE)
    with pytest.raises(InsufficientStorage):
        await harness.append("b", data=LARGE, ended=True)
    session = await harness.append("a", data=LARGE, ended=True)
    assert session.ended
    again = msgspec.structs.replace(session, epoch="f", seq=1)
    with pytest.raises(InsufficientStorage):  # another attempt is no end
        await harness.engine.append(again, [Event(1, "note", LARGE, NOW)], replaces="e")
    assert taken(harness) == await counted(harness, "ab")
    await harness.append("b", data=LARGE)
    assert harness.removals == ["a"]
    assert taken(harness) == await counted(harness, "b")


async def test_what_all_sessions_take_is_counted_exactly(open_exact):
    """Whatever happens: records, events and receipts, trimmed, replaced, deleted and expired."""
    harness = await open_exact(history_events=4, history_bytes=12_000, ttl=10)
    chance = random.Random(7)
    sessions, keys = "abcdef", [f"k{number}" for number in range(5)]
    for number in range(300):
        session_id = chance.choice(sessions)
        current = await harness.engine.load(session_id)
        data = msgspec.Raw(b'"%s"' % (b"x" * chance.randrange(3000)))
        receipt = None
        if chance.random() < 0.5:
            receipt = chance.choice(keys), Receipt("r" * chance.randrange(50), Control.CONTINUE, count=number)
        if current is None or not current.ended:
            owner, title = chance.choice(["ann", None]), chance.choice(["t" * 100, None])
            ended, at = chance.random() < 0.1, NOW + number
            await harness.append(
                session_id, data=data, receipt=receipt, ended=ended, at=at, owner=owner, title=title
            )
        elif chance.random() < 0.3:
            await harness.engine.delete(session_id, current.epoch)
        else:
            again = msgspec.structs.replace(current, epoch=f"e{number}", seq=1, progress=None)
            await harness.engine.append(
                again, [Event(1, "note", data, NOW)], receipt=receipt, replaces=current.epoch
            )
        if number % 20 == 0:
            await harness.expire(number)
        assert taken(harness) == await counted(harness, sessions, keys)
    for session_id in sessions:
        if (current := await harness.engine.load(session_id)) is not None:
            await harness.engine.delete(session_id, current.epoch)
    assert (taken(harness), harness.engine._logs._ended_total) == (0, 0)


async def test_many_at_once_take_no_more_than_there_may_be(open_exact):
    """What is being stored counts, and so does what fails."""
    harness = await open_exact(max_log_bytes=50_000)
    refused = 0

    async def append(session_id: str) -> None:
        nonlocal refused
        try:
            await harness.append(session_id, data=LARGE)
        except InsufficientStorage:
            refused += 1

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(append, f"s{number}")
    assert 45_000 < taken(harness) <= 50_000
    assert refused == 30 - await harness.engine.count()


async def test_no_limit_of_space(open_exact):
    """None: there is none."""
    harness = await open_exact(max_log_bytes=None)
    for _ in range(3):
        await harness.append("a", data=LARGE)
    assert await harness.seqs(session_id="a") == [1, 2, 3]


async def test_no_more_is_deleted_than_needed(open_exact):
    """Also if many need room at once: what is being deleted for one of them is not counted for another."""
    harness = await open_exact(max_log_bytes=10 * 4100)
    for number in range(10):
        await harness.append(f"ended{number}", data=LARGE, ended=True, at=NOW + number)
    assert harness.removals == []
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(partial(harness.append, f"new{number}", data=LARGE, ended=True))
    assert harness.removals == [f"ended{number}" for number in range(4)]
