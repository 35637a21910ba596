"""Publishing, from the bytes of a request to the log: bodies, batches, idempotency keys."""

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
from sseserve.jsontext import decode
from sseserve.live import broker as broker_module
from sseserve.model import Control, Event

NDJSON = "application/x-ndjson"


async def chunks_of(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        await trio.lowlevel.checkpoint()
        yield part


class Publisher:
    """Publishes as a client of the server does, without a connection."""

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
        resource: str,
        body: bytes | list[bytes] | AsyncIterator[bytes],
        *,
        key: str | None = None,
        content_type: str = "application/json",
        session_id: str = "s",
    ) -> dict[str, Any]:
        """Post; return the body of a 202 response, or raise the error that the client would get."""
        path = f"/api/sessions/{session_id}/{resource}"
        headers = [(b"Content-Type", content_type.encode())]
        if key is not None:
            headers.append((b"Idempotency-Key", key.encode()))
        match = ROUTES.match("POST", path)
        assert match is not None
        if isinstance(body, bytes):
            body = [body]
        chunks = chunks_of(body) if isinstance(body, list) else body
        request = Request.create("POST", path, headers=headers, body=chunks)
        async with AsyncExitStack() as stack:
            if isinstance(chunks, AsyncGenerator):
                await stack.enter_async_context(aclosing(chunks))
            response = await self.publishing.handle(request, match)
        assert response.status == 202
        return msgspec.json.decode(response.body)

    async def ndjson(self, *lines: Any, key: str | None = None) -> dict[str, Any]:
        """Post a batch of values, one per line."""
        return await self.post(
            "events", b"\n".join(map(msgspec.json.encode, lines)), key=key, content_type=NDJSON
        )

    async def log(self) -> list[Event]:
        if await self.harness.memory.load("s") is None:
            return []
        return await self.harness.log("s")

    async def notes(self) -> list[Any]:
        """The data of all events but progress."""
        return [msgspec.json.decode(event.data) for event in await self.log() if event.progress is None]


@pytest.fixture
def harness(nursery) -> LiveHarness:
    return LiveHarness(nursery, max_body=1000)


@pytest.fixture
def publisher(harness) -> Publisher:
    return Publisher(harness)


def note(data: Any) -> dict[str, Any]:
    return {"type": "note", "data": data}


# Single requests


async def test_progress_and_events(publisher):
    """Each has its own path; the response has the cursor and the control request."""
    first = await publisher.post("progress", b'{"progress": 40, "stage": "tts"}')
    second = await publisher.post("events", b'{"type": "note", "data": {"a": 1}, "retry": 5}')
    epoch = (await publisher.harness.tracker.get("s")).epoch
    assert first == {"id": f"{epoch}-1", "control": "continue", "created": True}
    assert second == {"id": f"{epoch}-2", "control": "continue"}
    progress, event = await publisher.log()
    assert (progress.progress.percent, progress.progress.stage) == (40, "tts")
    assert (event.type, bytes(event.data), event.retry) == ("note", b'{"a": 1}', 5)


async def test_chunked_body(publisher):
    """A body is the same however many chunks it arrives in."""
    await publisher.post("progress", [b'{"pro', b"", b'gress":', b" 40}"])
    assert (await publisher.log())[0].progress.percent == 40


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{]", b"nonsense", b'{"progress": 1,}', b"{'progress': 1}", b'{"message": "\xff"}',
     b'{"data": "\xff"}', b'{"data": "a\nb"}', b'{"message": "\\ud800"}', b'{"data": "\\ud800"}',
     b'\xef\xbb\xbf{"progress": 1}', '{"progress": 1}'.encode("utf-16"), b'{"data":' + b"[" * 100_000,
     b'{"progress": 01}'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
async def test_invalid_json_is_a_bad_request(nursery, body):
    """Status 400, and no session is created."""
    publisher = Publisher(LiveHarness(nursery))
    with pytest.raises(BadRequest) as caught:
        await publisher.post("progress", body)
    assert caught.value.status == 400
    assert await publisher.log() == []


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"40"', "[]", "101", "-1"]
)
async def test_invalid_percent_is_rejected(publisher, value):
    """Status 422, whether the JSON is valid or not; in a batch the error names the line."""
    with pytest.raises(InvalidProgress) as caught:
        await publisher.post("progress", b'{"progress": %s}' % value.encode())
    assert (caught.value.status, caught.value.code) == (422, "invalid_progress")
    with pytest.raises(InvalidProgress) as caught:
        await publisher.post(
            "events", b'{"progress": 1}\n{"progress": %s}' % value.encode(), content_type=NDJSON
        )
    assert caught.value.details == {"line": 2, "applied": 1}


@pytest.mark.parametrize(
    ("resource", "body"),
    [
        ("progress", b"[]"), ("progress", b"40"), ("progress", b'{"percent": 40}'),
        ("progress", b'{"status": 1}'),
        ("progress", b'{"artifacts": [{"nom": "a"}]}'), ("progress", b'{"type": "note"}'),
        ("events", b'{"data": 1}'), ("events", b'{"type": 1}'), ("events", b'{"type": "note", "date": 1}'),
        ("events", b'{"type": "progress"}'), ("events", b'{"type": "a\\nb"}'), ("events", b'{"type": ""}'),
        ("events", b'{"type": "note", "retry": -1}'), ("events", b'{"type": "note", "retry": 1.5}'),
    ],
)  # fmt: skip
async def test_invalid_members_are_rejected(publisher, resource, body):
    """Status 422; a misspelt member is an error and is not ignored."""
    with pytest.raises(Invalid) as caught:
        await publisher.post(resource, body)
    assert (caught.value.status, caught.value.code) == (422, "invalid")
    assert await publisher.log() == []


async def test_media_types(publisher):
    """JSON, or the default type of curl; parameters are ignored."""
    for content_type in (
        "application/json",
        "Application/JSON; charset=utf-8",
        "",
        "application/x-www-form-urlencoded",
    ):
        await publisher.post("progress", b"{}", content_type=content_type)
    for resource, content_type in [
        ("progress", "application/xml"),
        ("events", "image/png"),
        ("progress", NDJSON),
    ]:
        with pytest.raises(UnsupportedMediaType):
            await publisher.post(resource, b"{}", content_type=content_type)


async def test_body_size_is_limited(publisher):
    """A body of max_body bytes is accepted; of a longer one not much more than that is read."""
    body = b'{"message": "%s"}' % (b"x" * 985)
    assert len(body) == 1000
    await publisher.post("progress", body)

    async def endless() -> AsyncIterator[bytes]:
        read = 0
        while True:
            read += 100
            assert read <= 1100
            yield b" " * 100

    with pytest.raises(PayloadTooLarge):
        await publisher.post("progress", endless())


async def test_without_auto_create_the_session_must_exist(nursery):
    """Without auto_create an unknown session is an error, even before the body is read."""
    publisher = Publisher(LiveHarness(nursery, auto_create=False))
    with pytest.raises(SessionNotFound):
        await publisher.post("progress", b"nonsense")
    with pytest.raises(SessionNotFound):
        await publisher.ndjson(note(1))


async def test_control_is_in_each_response(publisher):
    """Responses to progress and to batches have the current control request."""
    await publisher.post("progress", b"{}")
    await publisher.harness.tracker.control("s", Control.PAUSE)
    assert (await publisher.post("progress", b"{}"))["control"] == "pause"
    assert (await publisher.ndjson(note(1)))["control"] == "pause"


# Batches


async def test_batch_is_applied_in_order(publisher):
    """Events and progress, with blank lines, CRLF or LF, and with or without a final line break."""
    body = b'{"progress":1}\r\n\r\n{"type":"note","data":1}\n \n{"progress":2}\n{"type":"note"}\n'
    result = await publisher.post("events", body, content_type=NDJSON)
    assert result["applied"] == 4
    log = await publisher.log()
    assert [event.type for event in log] == ["progress", "note", "progress", "note"]
    assert [event.progress.percent for event in log if event.progress] == [1, 2]
    assert result["id"].endswith("-4")


@pytest.mark.parametrize(
    "content_type", ["application/ndjson", "application/jsonl", "application/x-jsonlines"]
)
async def test_ndjson_media_types(publisher, content_type):
    """All names of the type are accepted."""
    assert (await publisher.post("events", b'{"type":"note"}\n{"type":"note"}', content_type=content_type))[
        "applied"
    ] == 2


@pytest.mark.parametrize("body", [b"", b"\n", b" \r\n\n"])
async def test_empty_batch_is_rejected(publisher, body):
    """A batch without lines has no event whose cursor could be returned."""
    with pytest.raises(Invalid, match="no lines"):
        await publisher.post("events", body, content_type=NDJSON)


BATCHES = {
    "good": b'{"progress":1}\n{"type":"note","data":"\xc3\xa9\xe2\x80\xa8"}\r\n\n{"progress":2}\n',
    "bad": b'{"type":"note"}\n\n{"progress":101}\n{"type":"note"}\n',
    "broken": b'{"type":"note"}\n{"type":',
    "long": b'{"type":"note"}\n{"type":"note","data":"' + b"x" * 1000 + b'"}\n{"type":"note"}',
    "long end": b'{"type":"note"}\n{"type":"note","data":"' + b"x" * 1000 + b'"}',
    "limit": b'{"type":"note","data":"' + b"x" * 975 + b'"}\n{"type":"note"}',
}


async def post_batch(parts: list[bytes]) -> Any:
    """Post a batch; return its result, or the error's code and details, and the events of the log."""
    async with trio.open_nursery() as nursery:
        publisher = Publisher(LiveHarness(nursery, max_body=1000))
        try:
            result: Any = await publisher.post("events", parts, content_type=NDJSON)
            result.pop("id")
        except SseserveError as error:
            result = (error.code, dict(error.details))
        log = await publisher.log()
        nursery.cancel_scope.cancel()
    return result, [(event.type, event.progress and event.progress.percent) for event in log]


@pytest.mark.parametrize(
    ("name", "result", "events"),
    [
        ("good", {"applied": 3, "control": "continue", "created": True}, 3),
        ("bad", ("invalid_progress", {"line": 3, "applied": 1}), 1),
        ("broken", ("bad_request", {"line": 2, "applied": 1}), 1),
        ("long", ("payload_too_large", {"line": 2, "applied": 1}), 1),
        ("long end", ("payload_too_large", {"line": 2, "applied": 1}), 1),
        ("limit", {"applied": 2, "control": "continue", "created": True}, 2),
    ],
)
async def test_batch_split_at_every_byte(name, result, events):
    """In one piece, in two at any byte, or byte by byte: the same result and the same log."""
    body = BATCHES[name]
    whole = await post_batch([body])
    assert (whole[0], len(whole[1])) == (result, events)
    step = 1 if len(body) < 200 else 7
    for at in (*range(0, len(body), step), len(body)):
        assert await post_batch([body[:at], body[at:]]) == whole
    assert await post_batch([body[at : at + 1] for at in range(len(body))]) == whole


async def test_invalid_line_stops_a_batch(publisher):
    """The lines before it are applied, those after it are not read; the error has the line number."""
    with pytest.raises(InvalidProgress) as caught:
        await publisher.post(
            "events", b'\n{"type":"note","data":1}\n{"progress":-1}\nnonsense', content_type=NDJSON
        )
    assert caught.value.details == {"line": 3, "applied": 1}
    assert await publisher.notes() == [1]


async def test_batch_cannot_continue_after_the_end(publisher):
    """The line after a terminal status is rejected with 409."""
    with pytest.raises(SessionEnded) as caught:
        await publisher.ndjson({"status": "done"}, note(1))
    assert caught.value.details == {"line": 2, "applied": 1}


async def test_lines_are_applied_as_they_arrive(publisher):
    """A worker may keep one batch request open for as long as it runs."""
    send, receive = trio.open_memory_channel[bytes](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: publisher.post("events", aiter(receive), content_type=NDJSON))
        async with send:
            for number in range(3):
                await send.send(b'{"type":"note","data":%d}\n' % number)
                await wait_all_tasks_blocked()
                assert await publisher.notes() == list(range(number + 1))


async def test_long_batch_yields_to_other_tasks(publisher):
    """Even if the whole body is available at once."""
    seen = []

    async def other() -> None:
        while len(await publisher.notes()) < 500:
            await trio.lowlevel.checkpoint()
            seen.append(len(await publisher.notes()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await publisher.post("events", b'{"type":"note"}\n' * 500, content_type=NDJSON)
    assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) <= 64


# Idempotency


async def test_repeated_key_gets_the_same_response(publisher):
    """No second event is added, even after the end of the session and whatever was published meanwhile."""
    results = [await publisher.post("progress", b'{"progress": 1}', key="k") for _ in range(2)]
    await publisher.post("progress", b'{"status": "done"}', key="end")
    results += [await publisher.post("progress", b'{"progress": 1}', key="k")]
    assert results[0] == results[1] == results[2]
    assert await publisher.post("progress", b'{"status": "done"}', key="end")
    assert len(await publisher.log()) == 2


async def test_keys_belong_to_a_path_and_a_session(publisher):
    """Without a key, or with another key, path or session, a repeated request is applied again."""
    for _ in range(2):
        await publisher.post("events", b'{"type":"note"}')
    await publisher.post("events", b'{"type":"note"}', key="a")
    await publisher.post("events", b'{"type":"note"}', key="b")
    await publisher.post("progress", b"{}", key="a")
    await publisher.post("events", b'{"type":"note"}', key="a", session_id="t")
    assert len(await publisher.log()) == 5


async def test_key_with_another_body_is_rejected(publisher):
    """For single requests and batches, in either order; nothing is applied."""
    await publisher.post("events", b'{"type":"note","data":1}', key="k")
    await publisher.ndjson(note(2), note(3), key="b")
    for attempt in (
        publisher.post("events", b'{"type":"note","data":2}', key="k"),
        publisher.ndjson(note(1), key="k"),
        publisher.ndjson(note(2), note(4), key="b"),
        publisher.ndjson(note(0), note(3), key="b"),
        publisher.ndjson(note(2), key="b"),
        publisher.post("events", b"", key="b", content_type=NDJSON),
        publisher.post("events", msgspec.json.encode(note(2)), key="b"),
    ):
        with pytest.raises(Invalid, match=r"was used with (another|other)"):
            await attempt
    assert await publisher.notes() == [1, 2, 3]


async def test_rejected_request_does_not_use_its_key(publisher):
    """A corrected request can be sent with the same key."""
    with pytest.raises(InvalidProgress):
        await publisher.post("progress", b'{"progress": 101}', key="k")
    await publisher.post("progress", b'{"progress": 100}', key="k")
    assert (await publisher.log())[0].progress.percent == 100


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_key_length_is_limited(publisher, key):
    """A key has 1 to 255 characters."""
    with pytest.raises(Invalid, match="Idempotency-Key"):
        await publisher.post("progress", b"{}", key=key)


async def test_repeated_batch_gets_the_same_response(publisher):
    """A repeated batch is not applied again and gets the receipt of its last line."""
    first = await publisher.ndjson(note(1), note(2), {"progress": 3}, key="k")
    assert await publisher.ndjson(note(1), note(2), {"progress": 3}, key="k") == first
    assert await publisher.notes() == [1, 2]


async def test_interrupted_batch_continues(publisher):
    """Lines applied before are skipped, the others applied; white space between lines does not matter."""

    async def interrupted() -> AsyncIterator[bytes]:
        yield b'{"type":"note","data":1}\n{"type":"note","data":2}\n{"type":"note","da'
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await publisher.post("events", interrupted(), key="k", content_type=NDJSON)
    assert await publisher.notes() == [1, 2]
    body = b'{"type":"note","data":1}\n\n {"type":"note","data":2}\r\n{"type":"note","data":3}\n'
    assert (await publisher.post("events", body, key="k", content_type=NDJSON))["applied"] == 3
    assert await publisher.notes() == [1, 2, 3]


async def test_corrected_batch_continues(publisher):
    """With the same key: the lines before the invalid one are not applied again."""
    with pytest.raises(Invalid):
        await publisher.ndjson(note(1), {"type": ""}, note(3), key="k")
    assert (await publisher.ndjson(note(1), note(2), note(3), key="k"))["applied"] == 3
    assert await publisher.notes() == [1, 2, 3]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.lists(st.integers(0, 200), max_size=5))
def test_batch_interrupted_repeatedly_is_applied_once(values, interrupted):
    """After any number of attempts, each cut at any byte, a complete one applies every line once."""
    body = b"".join(msgspec.json.encode(note(value)) + b"\n" for value in values)

    async def attempt(publisher: Publisher, until: int) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield body[:until]
            raise ConnectionError

        with pytest.raises(ConnectionError):
            await publisher.post("events", chunks(), key="k", content_type=NDJSON)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            publisher = Publisher(LiveHarness(nursery))
            for until in interrupted:
                await attempt(publisher, until)
            result = await publisher.post("events", body, key="k", content_type=NDJSON)
            assert result["applied"] == len(values)
            assert await publisher.notes() == values

    run(main)


async def test_retry_takes_the_place_of_a_request_that_hangs(publisher):
    """A client that repeats a request has given the first one up: that gets 409, the retry its response."""
    send, receive = trio.open_memory_channel[bytes](1)
    errors = []

    async def first() -> None:
        with pytest.raises(Conflict, match="later request") as caught:
            await publisher.post("progress", aiter(receive), key="k")
        errors.append(caught.value.status)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await wait_all_tasks_blocked()
        await publisher.post("progress", b'{"progress": 1}', key="other")
        await publisher.post("progress", b"{}", key="k", session_id="t")
        assert errors == []
        result = await publisher.post("progress", b'{"progress": 1}', key="k")
    assert errors == [409]
    assert await publisher.post("progress", b'{"progress": 1}', key="k") == result
    assert len(await publisher.log()) == 2
    send.close()


async def test_retry_continues_ndjson_that_hangs(publisher):
    """The lines that the first attempt has applied are not applied again."""
    send, receive = trio.open_memory_channel[bytes](1)

    async def first() -> None:
        with pytest.raises(Conflict):
            await publisher.post("events", aiter(receive), key="k", content_type=NDJSON)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await send.send(b'{"type":"note","data":1}\n{"type":"note","data":2}\n{"type":')
        await wait_all_tasks_blocked()
        result = await publisher.ndjson(note(1), note(2), note(3), key="k")
    assert result["applied"] == 3
    assert await publisher.notes() == [1, 2, 3]
    send.close()


async def test_cancelled_request_releases_its_key(publisher):
    """A request that was cancelled does not lock its key."""
    send, receive = trio.open_memory_channel[bytes](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: publisher.post("progress", aiter(receive), key="k"))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await publisher.post("progress", b"{}", key="k")
    send.close()


async def test_concurrent_batches_on_a_slow_engine(nursery):
    """Two workers of one session never get the same position in its log."""
    harness = LiveHarness(nursery)
    harness.tracker.engine = YieldingEngine(harness.memory)
    publisher = Publisher(harness)
    async with trio.open_nursery() as both:
        for worker in range(2):
            both.start_soon(lambda worker=worker: publisher.ndjson(*(note([worker, n]) for n in range(20))))
    notes = await publisher.notes()
    assert len(notes) == 40
    for worker in range(2):
        assert [n for sender, n in notes if sender == worker] == list(range(20))


# Error messages


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"type" 1}', "Expecting ':' delimiter at column 9"),
        (b'{\n  "type": "note",\n  data: 1\n}', "quotes at line 3, column 3"),
        (b'{"type": "note"', "at column 16"),
        (b"{'type': 1}", "at column 2"),
        (b'{"type": "\xff"}', "byte 0xff at position 10 is not UTF-8"),
        (b'{"type": "\\ud800"}', "a lone surrogate is not a character"),
        (b" ", "it is empty"),
    ],
)
async def test_bad_json_names_the_place(publisher, body, place):
    """Line and column, as editors count them; in NDJSON the line is the body's."""
    with pytest.raises(BadRequest, match="invalid JSON: ") as caught:
        await publisher.post("events", body)
    assert place in str(caught.value)
    if body.strip() and b"\n" not in body:
        with pytest.raises(BadRequest) as caught:
            await publisher.post("events", b'{"progress":1}\n' + body, content_type=NDJSON)
        assert str(caught.value).endswith(place)
        assert caught.value.details["line"] == 2


def test_json_that_is_nested_too_deep():
    """The parser's recursion limit is an error of the request."""
    with pytest.raises(BadRequest, match="it is nested too deep"):
        decode(b"[" * 100_000, Any)


@pytest.mark.parametrize("body", [b'{"progress":1}\n{"type":"note"}\n', b'{"progress":1}'])
async def test_lines_without_their_type(publisher, body):
    """The message names the content type that came, and the one for lines."""
    for content_type, came in (
        ("application/x-www-form-urlencoded", "content type application/x-www-form-urlencoded"),
        ("application/json; charset=utf-8", "content type application/json"),
        ("", "no content type"),
    ):
        with pytest.raises((BadRequest, Invalid)) as caught:
            await publisher.post("events", body, content_type=content_type)
        assert str(caught.value).endswith(
            f"; with {came} the body is one event; lines of events and progress are application/x-ndjson"
        )
    with pytest.raises(UnsupportedMediaType, match="application/json or application/x-ndjson, not text/csv"):
        await publisher.post("events", body, content_type="text/csv")
    assert await publisher.post("events", body, content_type=NDJSON)


async def test_created(publisher):
    """The response to what has created the session says so, also when it is repeated; no other does."""
    body = b'{"type":"note"}\n{"progress":5}\n'
    for _ in range(2):
        assert (await publisher.post("events", body, content_type=NDJSON, key="k"))["created"] is True
        assert "created" not in await publisher.post("events", body, content_type=NDJSON)
    await publisher.harness.tracker.create("other")
    assert "created" not in await publisher.post("progress", b"{}", session_id="other")


# Pace


async def test_publisher_waits_for_the_backlog(publisher, monkeypatch):
    """Above the maximum backlog publishing waits for the fan-out, and no event is lost."""
    monkeypatch.setattr(broker_module, "MAX_BACKLOG", 8)
    await publisher.post("progress", b"{}")
    watcher = await publisher.harness.watch()
    topic = publisher.harness.broker._topics["s"]
    largest_backlog = 0
    body = b'{"type":"note"}\n'

    async def lines() -> AsyncIterator[bytes]:
        nonlocal largest_backlog
        for _ in range(100):
            largest_backlog = max(largest_backlog, topic.backlog)
            yield body

    await publisher.post("events", lines(), content_type=NDJSON)
    assert 1 < largest_backlog <= 8
    await wait_all_tasks_blocked()
    assert watcher.seqs == list(range(1, 102))
    watcher.disconnect()


def test_json_module_writes_nan():
    """Python's json module encodes NaN, so NaN gets an error of its own and not the one for invalid JSON."""
    assert json.dumps({"progress": float("nan")}) == '{"progress": NaN}'
