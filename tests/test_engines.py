"""What every engine must do, whatever it keeps its logs in. A new one is added to ``ENGINES``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from live_harness import run

from sseserve.config import Settings
from sseserve.engines import Stale, open_engine
from sseserve.engines import memory as memory_module
from sseserve.errors import ConfigError
from sseserve.model import Artifact, Control, Event, OriginalPayload, Progress, Receipt, Session, State

ENGINES = ["memory:"]
NOW = 1_700_000_000.0


class Log:
    """One engine under test, with what it has delivered, and the least of a tracker."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.delivered: list[tuple[Session, Sequence[Event]]] = []
        self.engine = open_engine(url, Settings(**settings), self._deliver)

    def _deliver(self, session: Session, events: Sequence[Event]) -> None:
        self.delivered.append((session, list(events)))

    async def append(
        self, session_id: str = "s", *, epoch: str = "e", at: float = NOW, **fields: Any
    ) -> Session:
        """Append one event; ``ended``, ``lease`` and ``ttl`` are what a session is made of."""
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


@pytest.fixture(params=ENGINES)
def log(request) -> Log:
    return Log(request.param)


async def test_a_log_begins_with_its_first_event(log):
    """Before it there is nothing; behind it the record, the event and its delivery, all the same."""
    assert await log.engine.load("s") is None
    assert await log.engine.read("s", 0, 10) is None
    session = await log.append(owner="o", viewers=("v",), control=Control.PAUSE, lease=3.0)
    assert await log.engine.load("s") == session
    page = await log.engine.read("s", 0, 10)
    assert page is not None
    assert (page.session, page.first) == (session, 1)
    assert log.delivered == [(session, page.events)]


async def test_events_come_back_as_they_were(log):
    """Every field of every kind of event, and of the record with it."""
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
    await log.engine.append(session, events)
    page = await log.engine.read("s", 0, 10)
    assert page is not None
    assert (page.session, page.events) == (session, events)
    assert [event.conflatable for event in page.events] == [False, False]


async def test_pages(log):
    """At most so many, oldest first, behind a place; none behind the end."""
    for _ in range(10):
        await log.append()
    assert await log.seqs(0, 3) == [1, 2, 3]
    assert await log.seqs(3, 3) == [4, 5, 6]
    assert await log.seqs(8, 3) == [9, 10]
    assert await log.seqs(10, 3) == []
    assert await log.seqs(99, 3) == []
    assert await log.seqs(0, 0) == []


async def test_who_has_read_too_early_is_stale(log):
    """Neither event nor record nor receipt of a stale append is kept, and nothing is delivered."""
    session = await log.append()
    await log.append()
    delivered = list(log.delivered)
    stale = [
        msgspec.structs.replace(session, seq=2),  # somebody was faster
        msgspec.structs.replace(session, seq=4),  # a hole
        msgspec.structs.replace(session, seq=3, epoch="other"),  # another life
        Session(id="s", epoch="other", seq=1),
        Session(id="t", epoch="e", seq=2),  # it has been deleted
    ]
    for record in stale:
        with pytest.raises(Stale):
            await log.engine.append(
                record, [Event(record.seq, "note", msgspec.Raw(b"1"), NOW)],
                receipt=("k", Receipt("x", Control.CONTINUE)),
            )  # fmt: skip
    assert await log.seqs() == [1, 2]
    assert log.delivered == delivered
    assert await log.engine.receipt("s", "k") is None
    assert await log.engine.load("t") is None


async def test_of_many_writers_one_wins(log):
    """Each place in the log is given once, and delivery is in its order."""
    session = await log.append()
    won: list[int] = []

    async def write(number: int) -> None:
        try:
            await log.engine.append(
                msgspec.structs.replace(session, seq=2),
                [Event(2, "note", msgspec.Raw(b"%d" % number), NOW)],
            )
        except Stale:
            return
        won.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(write, number)
    assert len(won) == 1
    assert await log.seqs() == [1, 2]
    assert [events[0].seq for _, events in log.delivered] == [1, 2]


async def test_delivery_finds_the_event_in_the_log(log):
    """Whoever hears of an event and looks, sees it: long-pollers rely on it."""
    session = await log.append()
    assert log.delivered[-1][0] == session
    assert (await log.engine.load("s")).seq == log.delivered[-1][1][-1].seq


async def test_receipts(log):
    """Under their key, of their session; the same key again overwrites; gone with the session."""
    one, two = Receipt("a", Control.CONTINUE, 1, b"d"), Receipt("b", Control.PAUSE, 2, b"e")
    assert await log.engine.receipt("s", "k") is None
    await log.append(receipt=("k", one))
    await log.append()
    assert await log.engine.receipt("s", "k") == one
    assert await log.engine.receipt("s", "K") is None
    assert await log.engine.receipt("t", "k") is None
    await log.append(receipt=("k", two))
    assert await log.engine.receipt("s", "k") == two
    await log.engine.delete("s", "e")
    await log.append(epoch="f")
    assert await log.engine.receipt("s", "k") is None


async def test_receipts_are_bounded(log):
    """The thousand newest are kept, and those that are used again are new."""
    receipt = Receipt("a", Control.CONTINUE)
    for number in range(1000):
        await log.append(receipt=(str(number), receipt))
    await log.append(receipt=("0", receipt))
    await log.append(receipt=("last", receipt))
    kept = [await log.engine.receipt("s", key) is not None for key in ("0", "1", "2", "last")]
    assert kept == [True, False, True, True]


async def test_listing(log):
    """The newest first; counted; an append does not change the order."""
    for session_id in "abc":
        await log.append(session_id)
    await log.append("a")
    assert [session.id for session in await log.engine.sessions()] == ["c", "b", "a"]
    assert await log.engine.count() == 3


async def test_deleting(log):
    """That life and no other; afterwards there is nothing, and a new one begins at 1."""
    await log.append()
    assert not await log.engine.delete("s", "other")
    assert await log.engine.delete("s", "e")
    assert not await log.engine.delete("s", "e")
    assert await log.engine.load("s") is None
    assert await log.engine.count() == 0
    await log.append(epoch="f")
    assert await log.seqs() == [1]


async def test_leases(log):
    """Sessions without an end that have one; not those that have ended or are gone."""
    await log.append("a", lease=5.0)
    await log.append("b")
    await log.append("c", lease=5.0)
    await log.append("c", ended=True)
    await log.append("d", lease=5.0)
    await log.engine.delete("d", "e")
    assert [session.id for session in await log.engine.leased()] == ["a"]


# Bounds


@pytest.mark.parametrize("url", ENGINES)
async def test_a_log_is_bounded_in_events(url):
    """The newest are kept, and ``first`` says from where."""
    log = Log(url, history_events=3)
    for _ in range(10):
        await log.append()
    assert await log.seqs() == [8, 9, 10]
    assert await log.seqs(8) == [9, 10]
    page = await log.engine.read("s", 0, 1)
    assert page is not None
    assert page.first == 8


BIG = "x" * 10_000


@pytest.mark.parametrize("url", ENGINES)
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
async def test_a_log_is_bounded_in_bytes(url, event):
    """Wherever an event carries them. The last event is always kept."""
    log = Log(url, history_bytes=25_000)
    for seq in range(1, 6):
        await log.engine.append(
            Session(id="s", epoch="e", seq=seq), [msgspec.structs.replace(event, seq=seq)]
        )
    assert await log.seqs() == [4, 5]
    log = Log(url, history_bytes=1)
    await log.engine.append(Session(id="s", epoch="e", seq=1), [event])
    assert await log.seqs() == [1]


@given(st.lists(st.integers(0, 3000), max_size=40), st.integers(1, 20), st.integers(1, 10_000))
def test_whatever_is_trimmed_the_rest_is_whole(sizes, events, size):
    """The log is always its own suffix, without a hole, and ends with its newest event."""

    async def check() -> None:
        for url in ENGINES:
            log = Log(url, history_events=events, history_bytes=size)
            for seq, length in enumerate(sizes, 1):
                await log.append(data=msgspec.Raw(b'"%s"' % (b"x" * length)))
                kept = await log.seqs()
                assert kept == list(range(kept[0], seq + 1))
                assert len(kept) <= events
                assert len(kept) == 1 or sum(sizes[at - 1] for at in kept) <= size

    run(check)


# Expiry


def nobody(session_id: str) -> bool:
    return False


async def gone(log: Log, seconds: float, watched: Any = nobody) -> list[str]:
    return sorted(session.id for session in await log.engine.expire(NOW + seconds, watched))


@pytest.mark.parametrize("url", ENGINES)
async def test_an_ended_session_is_kept_for_its_ttl(url):
    """Its own, or the server's; from its end, whenever it began."""
    log = Log(url, ttl=100, idle_ttl=1000)
    await log.append("a", ended=True)
    await log.append("b", ttl=50.0)
    await log.append("b", ended=True, at=NOW + 30)
    await log.append("c")
    assert await gone(log, 79.9) == []
    assert await gone(log, 80) == ["b"]
    assert await gone(log, 99.9) == []
    assert await gone(log, 100) == ["a"]
    assert [session.id for session in await log.engine.sessions()] == ["c"]
    assert await log.engine.read("a", 0, 1) is None


@pytest.mark.parametrize("url", ENGINES)
async def test_a_session_without_an_end_is_kept_for_its_idle_time(url):
    """From its last event; a longer ttl of its own lengthens it."""
    log = Log(url, ttl=10, idle_ttl=100)
    await log.append("a")
    await log.append("b", ttl=150.0)
    await log.append("c")
    await log.append("c", at=NOW + 60)
    assert await gone(log, 99.9) == []
    assert await gone(log, 100) == ["a"]
    assert await gone(log, 150) == ["b"]
    assert await gone(log, 159.9) == []
    assert await gone(log, 160) == ["c"]


@pytest.mark.parametrize("url", ENGINES)
async def test_a_watched_session_is_kept_until_its_end(url):
    """Somebody may still hope; behind its end nobody need."""
    log = Log(url, ttl=10, idle_ttl=100)
    await log.append("a")
    await log.append("b", ended=True)
    assert await gone(log, 10, lambda session_id: True) == ["b"]
    assert await gone(log, 5000, lambda session_id: True) == []
    assert await gone(log, 5099) == []
    assert await gone(log, 5100) == ["a"]


@pytest.mark.parametrize("url", ENGINES)
async def test_another_life_has_its_own_time(url):
    """What was noted for a session that is gone does not end the next of that name."""
    log = Log(url, idle_ttl=100)
    await log.append("a")
    await log.engine.delete("a", "e")
    await log.append("a", epoch="f", at=NOW + 50)
    assert await gone(log, 100) == []
    assert await gone(log, 150) == ["a"]


@pytest.mark.parametrize("url", ENGINES)
async def test_an_expired_lease_is_no_lease(url):
    """A session that is gone by its time is silent for good."""
    log = Log(url, idle_ttl=100)
    await log.append("a", lease=5.0)
    assert await gone(log, 100) == ["a"]
    assert await log.engine.leased() == []


async def test_memory_does_not_grow_with_history(monkeypatch):
    """Sessions come and go; what is noted of their times does not outnumber those that are here."""
    monkeypatch.setattr(memory_module, "SPARE_DUE", 10)
    log = Log("memory:", ttl=10, idle_ttl=1e6)
    for number in range(500):
        await log.append(f"s{number}", at=NOW + number)
        await log.append(f"s{number}", ended=number % 2 == 0, at=NOW + number)
        if number % 2:
            await log.engine.delete(f"s{number}", "e")
        await gone(log, number)
        assert len(log.engine._due) <= 2 * await log.engine.count() + 11
    assert await log.engine.count() < 10
    # None of those that are here has been forgotten with the rest.
    await gone(log, 1000)
    assert await log.engine.count() == 0


def test_no_such_engine():
    """An error at start-up, with the URL as it was given."""
    with pytest.raises(ConfigError, match="'oracle:'"):
        open_engine("oracle:", Settings(), lambda session, events: None)
