"""From a request's bytes to the log: bodies, batches, idempotency keys."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from live_harness import LiveHarness, YieldingEngine, run
from trio.testing import wait_all_tasks_blocked

from sseserve.errors import (
    BadRequest,
    Conflict,
    Invalid,
    InvalidProgress,
    PayloadTooLarge,
    SessionEnded,
    SessionNotFound,
    SseserveError,
    UnsupportedMediaType,
)
from sseserve.http.messages import Request
from sseserve.http.publishing import Publishing
from sseserve.http.routes import ROUTES
from sseserve.live import broker as broker_module
from sseserve.model import Control, Event

NDJSON = "application/x-ndjson"


async def chunks_of(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        await trio.lowlevel.checkpoint()
        yield part


class Door:
    """Publishes as a client of the server does."""

    def __init__(self, harness: LiveHarness) -> None:
        self.harness = harness
        self.publishing = Publishing(
            harness.tracker,
            harness.broker,
            max_body=harness.settings.max_body,
            auto_create=harness.settings.auto_create,
        )

    async def post(
        self,
        what: str,
        body: bytes | list[bytes] | AsyncIterator[bytes],
        *,
        key: str | None = None,
        kind: str = "application/json",
        session_id: str = "s",
    ) -> dict[str, Any]:
        """Post; returns the answer to what was taken, raises what was wrong."""
        path = f"/api/sessions/{session_id}/{what}"
        headers = [(b"Content-Type", kind.encode())]
        if key is not None:
            headers.append((b"Idempotency-Key", key.encode()))
        found = ROUTES.match("POST", path)
        assert found is not None
        if isinstance(body, bytes):
            body = [body]
        chunks = chunks_of(body) if isinstance(body, list) else body
        request = Request.create("POST", path, headers=headers, body=chunks)
        async with AsyncExitStack() as stack:
            if isinstance(chunks, AsyncGenerator):
                await stack.enter_async_context(aclosing(chunks))
            answer = await self.publishing.handle(request, found)
        assert answer.status == 202
        return msgspec.json.decode(answer.body)

    async def batch(self, *lines: Any, key: str | None = None) -> dict[str, Any]:
        """Post a batch of values, a line each."""
        return await self.post("events", b"\n".join(map(msgspec.json.encode, lines)), key=key, kind=NDJSON)

    async def log(self) -> list[Event]:
        if await self.harness.memory.load("s") is None:
            return []
        return await self.harness.log("s")

    async def notes(self) -> list[Any]:
        """The data of all events that are no progress."""
        return [msgspec.json.decode(event.data) for event in await self.log() if event.progress is None]


@pytest.fixture
def harness(nursery) -> LiveHarness:
    return LiveHarness(nursery, max_body=1000)


@pytest.fixture
def door(harness) -> Door:
    return Door(harness)


def note(data: Any) -> dict[str, Any]:
    return {"type": "note", "data": data}


# Single requests


async def test_progress_and_events(door):
    """Each by its path; the answer has the cursor and what the watchers ask."""
    first = await door.post("progress", b'{"progress": 40, "stage": "tts"}')
    second = await door.post("events", b'{"type": "note", "data": {"a": 1}, "retry": 5}')
    epoch = (await door.harness.tracker.get("s")).epoch
    assert first == {"id": f"{epoch}-1", "control": "continue"}
    assert second == {"id": f"{epoch}-2", "control": "continue"}
    progress, event = await door.log()
    assert (progress.progress.percent, progress.progress.stage) == (40, "tts")
    assert (event.type, bytes(event.data), event.retry) == ("note", b'{"a": 1}', 5)


async def test_a_body_in_pieces(door):
    """However many chunks it comes in."""
    await door.post("progress", [b'{"pro', b"", b'gress":', b" 40}"])
    assert (await door.log())[0].progress.percent == 40


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{]", b"nonsense", b'{"progress": 1,}', b"{'progress': 1}", b'{"message": "\xff"}',
     b'{"data": "\xff"}', b'{"data": "a\nb"}', b'{"message": "\\ud800"}', b'{"data": "\\ud800"}',
     b'\xef\xbb\xbf{"progress": 1}', '{"progress": 1}'.encode("utf-16"), b'{"data":' + b"[" * 100_000,
     b'{"progress": 01}'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
async def test_what_is_no_json_is_a_bad_request(nursery, body):
    """400, and nothing is begun."""
    door = Door(LiveHarness(nursery))
    with pytest.raises(BadRequest) as caught:
        await door.post("progress", body)
    assert caught.value.status == 400
    assert await door.log() == []


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"40"', "[]", "101", "-1"]
)
async def test_what_is_no_percentage_is_invalid(door, value):
    """422, whether the JSON could be read or not; a batch names the line."""
    with pytest.raises(InvalidProgress) as caught:
        await door.post("progress", b'{"progress": %s}' % value.encode())
    assert (caught.value.status, caught.value.code) == (422, "invalid_progress")
    with pytest.raises(InvalidProgress) as caught:
        await door.post("events", b'{"progress": 1}\n{"progress": %s}' % value.encode(), kind=NDJSON)
    assert caught.value.details == {"line": 2, "applied": 1}


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("progress", b"[]"), ("progress", b"40"), ("progress", b'{"percent": 40}'),
        ("progress", b'{"status": 1}'),
        ("progress", b'{"artifacts": [{"nom": "a"}]}'), ("progress", b'{"type": "note"}'),
        ("events", b'{"data": 1}'), ("events", b'{"type": 1}'), ("events", b'{"type": "note", "date": 1}'),
        ("events", b'{"type": "progress"}'), ("events", b'{"type": "a\\nb"}'), ("events", b'{"type": ""}'),
        ("events", b'{"type": "note", "retry": -1}'), ("events", b'{"type": "note", "retry": 1.5}'),
    ],
)  # fmt: skip
async def test_what_says_nothing_that_can_be_is_invalid(door, what, body):
    """422; a misspelt member is an error, not lost in silence."""
    with pytest.raises(Invalid) as caught:
        await door.post(what, body)
    assert (caught.value.status, caught.value.code) == (422, "invalid")
    assert await door.log() == []


async def test_media_types(door):
    """JSON, or what curl says it is; parameters do not matter."""
    for kind in (
        "application/json",
        "Application/JSON; charset=utf-8",
        "",
        "application/x-www-form-urlencoded",
    ):
        await door.post("progress", b"{}", kind=kind)
    for what, kind in [("progress", "application/xml"), ("events", "image/png"), ("progress", NDJSON)]:
        with pytest.raises(UnsupportedMediaType):
            await door.post(what, b"{}", kind=kind)


async def test_a_body_has_a_limit(door):
    """At it is taken, over it is not, and no more of it is read."""
    body = b'{"message": "%s"}' % (b"x" * 985)
    assert len(body) == 1000
    await door.post("progress", body)

    async def endless() -> AsyncIterator[bytes]:
        read = 0
        while True:
            read += 100
            assert read <= 1100
            yield b" " * 100

    with pytest.raises(PayloadTooLarge):
        await door.post("progress", endless())


async def test_nothing_is_created_where_it_may_not(nursery):
    """Not before the body has been read either."""
    door = Door(LiveHarness(nursery, auto_create=False))
    with pytest.raises(SessionNotFound):
        await door.post("progress", b"nonsense")
    with pytest.raises(SessionNotFound):
        await door.batch(note(1))


async def test_the_worker_learns_what_is_asked(door):
    """In the answer to either kind."""
    await door.post("progress", b"{}")
    await door.harness.tracker.control("s", Control.PAUSE)
    assert (await door.post("progress", b"{}"))["control"] == "pause"
    assert (await door.batch(note(1)))["control"] == "pause"


# Batches


async def test_a_batch_is_applied_in_order(door):
    """Events and progress, blank lines between them, CRLF or LF, with or without one at the end."""
    body = b'{"progress":1}\r\n\r\n{"type":"note","data":1}\n \n{"progress":2}\n{"type":"note"}\n'
    answer = await door.post("events", body, kind=NDJSON)
    assert answer["applied"] == 4
    log = await door.log()
    assert [event.type for event in log] == ["progress", "note", "progress", "note"]
    assert [event.progress.percent for event in log if event.progress] == [1, 2]
    assert answer["id"].endswith("-4")


@pytest.mark.parametrize("kind", ["application/ndjson", "application/jsonl", "application/x-jsonlines"])
async def test_other_names_of_ndjson(door, kind):
    """All mean the same."""
    assert (await door.post("events", b'{"type":"note"}\n{"type":"note"}', kind=kind))["applied"] == 2


@pytest.mark.parametrize("body", [b"", b"\n", b" \r\n\n"])
async def test_an_empty_batch_is_invalid(door, body):
    """It says nothing, so there is nothing to answer with."""
    with pytest.raises(Invalid, match="empty"):
        await door.post("events", body, kind=NDJSON)


BATCHES = {
    "good": b'{"progress":1}\n{"type":"note","data":"\xc3\xa9\xe2\x80\xa8"}\r\n\n{"progress":2}\n',
    "bad": b'{"type":"note"}\n\n{"progress":101}\n{"type":"note"}\n',
    "broken": b'{"type":"note"}\n{"type":',
    "long": b'{"type":"note"}\n{"type":"note","data":"' + b"x" * 1000 + b'"}\n{"type":"note"}',
    "long end": b'{"type":"note"}\n{"type":"note","data":"' + b"x" * 1000 + b'"}',
    "limit": b'{"type":"note","data":"' + b"x" * 975 + b'"}\n{"type":"note"}',
}


async def outcome(parts: list[bytes]) -> Any:
    """What a batch is answered, and what it leaves in the log."""
    async with trio.open_nursery() as nursery:
        door = Door(LiveHarness(nursery, max_body=1000))
        try:
            answer: Any = await door.post("events", parts, kind=NDJSON)
            answer.pop("id")
        except SseserveError as error:
            answer = (error.code, dict(error.details))
        log = await door.log()
        nursery.cancel_scope.cancel()
    return answer, [(event.type, event.progress and event.progress.percent) for event in log]


@pytest.mark.parametrize(
    ("name", "answer", "events"),
    [
        ("good", {"applied": 3, "control": "continue"}, 3),
        ("bad", ("invalid_progress", {"line": 3, "applied": 1}), 1),
        ("broken", ("bad_request", {"line": 2, "applied": 1}), 1),
        ("long", ("payload_too_large", {"line": 2, "applied": 1}), 1),
        ("long end", ("payload_too_large", {"line": 2, "applied": 1}), 1),
        ("limit", {"applied": 2, "control": "continue"}, 2),
    ],
)
async def test_a_batch_cut_at_every_byte_does_the_same(name, answer, events):
    """In one piece, in two at any place, or a byte at a time: the same answer and the same log."""
    body = BATCHES[name]
    whole = await outcome([body])
    assert (whole[0], len(whole[1])) == (answer, events)
    step = 1 if len(body) < 200 else 7
    for at in (*range(0, len(body), step), len(body)):
        assert await outcome([body[:at], body[at:]]) == whole
    assert await outcome([body[at : at + 1] for at in range(len(body))]) == whole


async def test_a_bad_line_stops_a_batch(door):
    """What was before it stands, what is behind it is not looked at; the error says where."""
    with pytest.raises(InvalidProgress) as caught:
        await door.post("events", b'\n{"type":"note","data":1}\n{"progress":-1}\nnonsense', kind=NDJSON)
    assert caught.value.details == {"line": 3, "applied": 1}
    assert await door.notes() == [1]


async def test_a_batch_cannot_go_on_behind_the_end(door):
    """The line that follows a terminal one is refused with 409."""
    with pytest.raises(SessionEnded) as caught:
        await door.batch({"status": "done"}, note(1))
    assert caught.value.details == {"line": 2, "applied": 1}


async def test_lines_are_applied_as_they_come(door):
    """A worker may keep one batch open for its whole life."""
    send, receive = trio.open_memory_channel[bytes](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: door.post("events", aiter(receive), kind=NDJSON))
        async with send:
            for number in range(3):
                await send.send(b'{"type":"note","data":%d}\n' % number)
                await wait_all_tasks_blocked()
                assert await door.notes() == list(range(number + 1))


async def test_a_long_batch_lets_others_run(door):
    """Even if all of it is there at once."""
    seen = []

    async def other() -> None:
        while len(await door.notes()) < 500:
            await trio.lowlevel.checkpoint()
            seen.append(len(await door.notes()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await door.post("events", b'{"type":"note"}\n' * 500, kind=NDJSON)
    assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) <= 64


# Idempotency


async def test_the_same_key_again_is_the_same_answer(door):
    """And no second event; even behind the end, and whatever has happened since."""
    answers = [await door.post("progress", b'{"progress": 1}', key="k") for _ in range(2)]
    await door.post("progress", b'{"status": "done"}', key="end")
    answers += [await door.post("progress", b'{"progress": 1}', key="k")]
    assert answers[0] == answers[1] == answers[2]
    assert await door.post("progress", b'{"status": "done"}', key="end")
    assert len(await door.log()) == 2


async def test_without_a_key_twice_is_twice(door):
    """And other keys, paths and sessions are others."""
    for _ in range(2):
        await door.post("events", b'{"type":"note"}')
    await door.post("events", b'{"type":"note"}', key="a")
    await door.post("events", b'{"type":"note"}', key="b")
    await door.post("progress", b"{}", key="a")
    await door.post("events", b'{"type":"note"}', key="a", session_id="t")
    assert len(await door.log()) == 5


async def test_a_key_with_another_body_is_invalid(door):
    """Single or batch, in either order; nothing changes."""
    await door.post("events", b'{"type":"note","data":1}', key="k")
    await door.batch(note(2), note(3), key="b")
    for attempt in (
        door.post("events", b'{"type":"note","data":2}', key="k"),
        door.batch(note(1), key="k"),
        door.batch(note(2), note(4), key="b"),
        door.batch(note(0), note(3), key="b"),
        door.batch(note(2), key="b"),
        door.post("events", b"", key="b", kind=NDJSON),
        door.post("events", msgspec.json.encode(note(2)), key="b"),
    ):
        with pytest.raises(Invalid, match="was used with another"):
            await attempt
    assert await door.notes() == [1, 2, 3]


async def test_a_refused_request_uses_up_no_key(door):
    """Put right, it can be sent under the same key."""
    with pytest.raises(InvalidProgress):
        await door.post("progress", b'{"progress": 101}', key="k")
    await door.post("progress", b'{"progress": 100}', key="k")
    assert (await door.log())[0].progress.percent == 100


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_keys_have_a_length(door, key):
    """1 to 255 characters."""
    with pytest.raises(Invalid, match="Idempotency-Key"):
        await door.post("progress", b"{}", key=key)


async def test_a_batch_again_is_no_second_batch(door):
    """Its last receipt is the answer, as at first."""
    first = await door.batch(note(1), note(2), {"progress": 3}, key="k")
    assert await door.batch(note(1), note(2), {"progress": 3}, key="k") == first
    assert await door.notes() == [1, 2]


async def test_a_batch_that_was_broken_off_goes_on(door):
    """The lines that stand are passed over, the others applied; layout between the lines does not matter."""

    async def breaks() -> AsyncIterator[bytes]:
        yield b'{"type":"note","data":1}\n{"type":"note","data":2}\n{"type":"note","da'
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await door.post("events", breaks(), key="k", kind=NDJSON)
    assert await door.notes() == [1, 2]
    body = b'{"type":"note","data":1}\n\n {"type":"note","data":2}\r\n{"type":"note","data":3}\n'
    assert (await door.post("events", body, key="k", kind=NDJSON))["applied"] == 3
    assert await door.notes() == [1, 2, 3]


async def test_a_batch_with_a_bad_line_is_put_right(door):
    """Under the same key: what stood before the bad line stands."""
    with pytest.raises(Invalid):
        await door.batch(note(1), {"type": ""}, note(3), key="k")
    assert (await door.batch(note(1), note(2), note(3), key="k"))["applied"] == 3
    assert await door.notes() == [1, 2, 3]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.lists(st.integers(0, 200), max_size=5))
def test_however_often_a_batch_breaks_off_it_is_applied_once(values, breaks):
    """Any number of attempts, each broken off at any byte, and then a whole one: every line once."""
    body = b"".join(msgspec.json.encode(note(value)) + b"\n" for value in values)

    async def attempt(door: Door, until: int) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield body[:until]
            raise ConnectionError

        with pytest.raises(ConnectionError):
            await door.post("events", chunks(), key="k", kind=NDJSON)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            door = Door(LiveHarness(nursery))
            for until in breaks:
                await attempt(door, until)
            answer = await door.post("events", body, key="k", kind=NDJSON)
            assert answer["applied"] == len(values)
            assert await door.notes() == values

    run(main)


async def test_two_at_once_under_one_key_conflict(door):
    """The second is told to wait; when the first is done, it gets its answer."""
    send, receive = trio.open_memory_channel[bytes](1)
    answers = []

    async def first() -> None:
        answers.append(await door.post("progress", aiter(receive), key="k"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await wait_all_tasks_blocked()
        with pytest.raises(Conflict, match="being served") as caught:
            await door.post("progress", b'{"progress": 1}', key="k")
        assert caught.value.status == 409
        await door.post("progress", b'{"progress": 1}', key="other")
        await door.post("progress", b"{}", key="k", session_id="t")
        await send.send(b'{"progress": 1}')
        await send.aclose()
    assert await door.post("progress", b'{"progress": 1}', key="k") == answers[0]
    assert len(await door.log()) == 2


async def test_a_key_is_free_again_when_its_request_has_gone(door):
    """Cancelled or failed, it does not lock the key for ever."""
    send, receive = trio.open_memory_channel[bytes](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: door.post("progress", aiter(receive), key="k"))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await door.post("progress", b"{}", key="k")
    send.close()


async def test_two_at_once_over_an_engine_that_waits(nursery):
    """Two workers of one session never take the same place in its log."""
    harness = LiveHarness(nursery)
    harness.tracker.engine = YieldingEngine(harness.memory)
    door = Door(harness)
    async with trio.open_nursery() as both:
        for worker in range(2):
            both.start_soon(lambda worker=worker: door.batch(*(note([worker, n]) for n in range(20))))
    notes = await door.notes()
    assert len(notes) == 40
    for worker in range(2):
        assert [n for who, n in notes if who == worker] == list(range(20))


# Pace


async def test_a_publisher_waits_for_a_topic_far_behind(door, monkeypatch):
    """It is answered when the fan-out has caught up, and nothing is lost."""
    monkeypatch.setattr(broker_module, "MAX_BACKLOG", 8)
    await door.post("progress", b"{}")
    watcher = await door.harness.watch()
    topic = door.harness.broker._topics["s"]
    most = 0
    body = b'{"type":"note"}\n'

    async def lines() -> AsyncIterator[bytes]:
        nonlocal most
        for _ in range(100):
            most = max(most, topic.backlog)
            yield body

    await door.post("events", lines(), kind=NDJSON)
    assert 1 < most <= 8
    await wait_all_tasks_blocked()
    assert watcher.seqs == list(range(1, 102))
    watcher.disconnect()


def test_the_json_module_reads_what_we_refuse():
    """NaN is what Python writes for a number that is none: the reason why we tell it from nonsense."""
    assert json.dumps({"progress": float("nan")}) == '{"progress": NaN}'
