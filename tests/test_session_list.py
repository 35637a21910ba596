"""The stream of the list of sessions: a snapshot, then what changes, at most once a second."""

from __future__ import annotations

import gc
import itertools

import msgspec
import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import RawConnection, request_bytes
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve import Grant
from sseserve.dialects import Encoding
from sseserve.dialects.sessions import SESSIONS
from sseserve.errors import Unauthorized
from sseserve.live import session_list
from sseserve.model import OriginalPayload, Progress, Session
from sseserve.server.application import Application

PATH = "/api/streams/sessions"


@pytest.fixture
async def harness(nursery):
    return ServerHarness(nursery)


async def next_message(stream, name):
    """The data of the next message of that name; what the server is doing is skipped."""
    while (message := await stream.next()).event == "server" and name != "server":
        pass
    assert message.event == name
    return message.data


def ids(data):
    return [record["session_id"] for record in data["sessions"]]


async def test_snapshot_then_changes(autojump_clock, harness):
    """The newest sessions first, then what was created, updated and deleted, together once a second."""
    await harness.tracker.create("a", title="A")
    await harness.tracker.create("b")
    stream = await harness.stream(PATH)
    snapshot = await next_message(stream, "snapshot")
    assert (ids(snapshot), snapshot["total"], snapshot["complete"]) == (["b", "a"], 2, True)
    assert snapshot["sessions"][1]["title"] == "A"
    server = await next_message(stream, "server")
    assert (server["status"], server["sessions"], "connections_per_job" in server) == ("ok", 2, False)
    await harness.tracker.update("a", progress=5)
    assert ids(await next_message(stream, "changes")) == ["a"]  # after a quiet time at once
    for percent in (10, 20, 30):
        await harness.tracker.update("a", progress=percent)
    await harness.tracker.create("c")
    await harness.tracker.delete("b")
    assert (await next_message(stream, "changes"))["removed"] == ["b"]
    changes = await next_message(stream, "changes")
    assert (changes["created"], ids(changes)) == (["c"], ["a", "c"])
    assert changes["sessions"][0]["progress"] == 30


async def test_changes_come_once_a_second(autojump_clock, harness):
    """However many updates there are, and a watcher that sees none is told what the server is doing."""
    await harness.tracker.create("a")
    stream = await harness.stream(PATH)
    await next_message(stream, "snapshot")
    times = []
    async with trio.open_nursery() as nursery:

        async def publish():
            for percent in range(100):
                await harness.tracker.update("a", progress=percent)
                await trio.sleep(0.05)

        nursery.start_soon(publish)
        while True:
            changes = await next_message(stream, "changes")
            times.append(trio.current_time())
            if changes["sessions"][0]["progress"] == 99:
                break
    assert len(times) <= 7
    assert all(later - earlier >= session_list.PERIOD for earlier, later in itertools.pairwise(times))
    before = trio.current_time()
    assert (await next_message(stream, "server"))["status"] == "ok"
    assert (await next_message(stream, "server"))["status"] == "ok"
    assert trio.current_time() - before <= 2 * session_list.QUIET


async def test_changes_are_encoded_once_and_only_for_watchers(autojump_clock, harness, monkeypatch):
    """Three watchers share the bytes of a change; without any, nothing is collected or encoded."""
    described = []
    describe = SESSIONS.describe_row
    # A Struct that is frozen: the function is replaced where it is called.
    monkeypatch.setattr(
        session_list,
        "_row",
        lambda dialect, session: (
            described.append(session.id) or msgspec.Raw(msgspec.json.encode(dialect.describe_row(session)))
        ),
    )
    assert describe is SESSIONS.describe_row
    await harness.tracker.update("a", progress=1)
    assert harness.broker.on_publish is None
    streams = [await harness.stream(PATH) for _ in range(3)]
    for stream in streams:
        await next_message(stream, "snapshot")
    described.clear()
    await harness.tracker.update("a", progress=2)
    for stream in streams:
        assert (await next_message(stream, "changes"))["sessions"][0]["progress"] == 2
    assert described == ["a"]
    for stream in streams:
        await stream.disconnect()
    await wait_all_tasks_blocked()
    assert harness.broker.on_publish is None
    await harness.tracker.update("a", progress=3)
    await harness.tracker.delete("a")
    assert not harness.app.session_list._has_changes


async def test_more_changes_than_are_kept_bring_a_snapshot(autojump_clock, harness, monkeypatch):
    """What is collected is bounded."""
    monkeypatch.setattr(session_list, "MAX_CHANGED", 3)
    stream = await harness.stream(PATH)
    assert (await next_message(stream, "snapshot"))["total"] == 0
    for number in range(10):
        await harness.tracker.create(f"s{number}")
        assert len(harness.app.session_list._changed) <= 3
    assert (await next_message(stream, "snapshot"))["total"] == 10


async def test_a_snapshot_is_encoded_once(autojump_clock, harness, monkeypatch):
    """Those who come together share it, and so do all when there are too many changes; nobody misses one."""
    monkeypatch.setattr(session_list, "MAX_CHANGED", 2)
    rows = []
    encode = session_list._row
    monkeypatch.setattr(session_list, "_row", lambda *args: rows.append(args[1].id) or encode(*args))
    for name in "abc":
        await harness.tracker.update(name, progress=1)
    streams = [await harness.stream(PATH)]
    await next_message(streams[0], "snapshot")
    await harness.tracker.update("a", progress=2)
    streams += [await harness.stream(PATH) for _ in range(4)]
    for stream in streams[1:]:
        await next_message(stream, "snapshot")
    for stream in streams:
        assert (await next_message(stream, "changes"))["sessions"][0]["progress"] == 2
    assert sorted(rows) == ["a", "a", "b", "c"]
    rows.clear()
    for name in "abc":
        await harness.tracker.update(name, progress=3)
    for stream in streams:
        snapshot = await next_message(stream, "snapshot")
        assert [record["progress"] for record in snapshot["sessions"]] == [3, 3, 3]
    assert sorted(rows) == ["a", "b", "c"]


async def test_large_lists_come_in_pages(autojump_clock, harness, monkeypatch):
    """The newest, in messages of bounded size: long texts are cut, and data and artifacts are left out."""
    monkeypatch.setattr(session_list, "PAGE", 2)
    monkeypatch.setattr(session_list, "MAX_LISTED", 5)
    for number in range(7):
        await harness.tracker.update(
            f"s{number}", message="m" * 5000, error={"message": "e" * 5000}, data={"a": 1}
        )
    stream = await harness.stream(PATH)
    pages = [await next_message(stream, "snapshot") for _ in range(3)]
    assert [ids(page) for page in pages] == [["s6", "s5"], ["s4", "s3"], ["s2"]]
    assert [page["complete"] for page in pages] == [False, False, True]
    assert {page["total"] for page in pages} == {7}
    record = pages[0]["sessions"][0]
    assert (len(record["message"]), len(record["error"]), "data" in record) == (300, 300, False)


async def test_a_slow_watcher_gets_the_snapshot_again(autojump_clock, harness, monkeypatch):
    """One that missed the batches that are kept; it holds up nobody else."""
    monkeypatch.setattr(session_list, "MAX_BATCHES", 2)
    feed = harness.app.session_list
    feed._batches = type(feed._batches)(maxlen=2)
    pages = feed.pages(Encoding(SESSIONS, "sse"), lambda: None, trio.Event(), 1)
    assert b"event: snapshot" in await anext(pages)
    await anext(pages)
    fast = await harness.stream(PATH)
    await next_message(fast, "snapshot")
    for percent in range(5):
        await harness.tracker.update("a", progress=percent)
        assert (await next_message(fast, "changes"))["sessions"][0]["progress"] == percent
    assert b"event: snapshot" in await anext(pages)
    await pages.aclose()


async def test_watchers_keep_no_data_of_old_records(autojump_clock, harness):
    """Neither what a snapshot or a batch was made of, nor what a watcher that does not read will get."""

    def count() -> int:
        gc.collect()
        records = [o for o in gc.get_objects() if isinstance(o, Session | Progress | OriginalPayload)]
        kept = {bytes(record.data) for record in records if record.data is not msgspec.UNSET}
        return sum(b"of this test" in data for data in kept)

    feed = harness.app.session_list
    slow = []
    for number in range(6):
        await harness.tracker.update(
            "a", progress=number, data={"number": number, "of this test": "x" * 10_000}
        )
        slow.append(feed.pages(Encoding(SESSIONS, "sse"), lambda: None, trio.Event(), 1))
        assert b"event: snapshot" in await anext(slow[-1])
        await anext(slow[-1])
        await trio.sleep(2)
    await harness.tracker.delete("a")
    await anext(slow[0])
    assert count() == 0
    for pages in slow:
        await pages.aclose()


async def test_a_session_of_one_second_is_not_announced(autojump_clock, harness):
    """Created and deleted before anybody was told; one that is deleted and created again is both."""
    await harness.tracker.create("old")
    stream = await harness.stream(PATH)
    await next_message(stream, "snapshot")
    await harness.tracker.create("short")
    await harness.tracker.delete("short")
    await harness.tracker.delete("old")
    await harness.tracker.create("old")
    removal = await next_message(stream, "changes")
    assert (removal["removed"], ids(removal)) == (["old"], [])
    creation = await next_message(stream, "changes")
    assert (creation["created"], ids(creation)) == (["old"], ["old"])


async def test_expired_sessions_are_removed(autojump_clock, nursery):
    """Watchers are told of sessions whose retention time is over."""
    harness = ServerHarness(nursery, ttl=3)
    await harness.tracker.update("a", status="done")
    stream = await harness.stream(PATH)
    await next_message(stream, "snapshot")
    assert (await next_message(stream, "changes"))["removed"] == ["a"]


async def authenticate(request):
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not token:
        raise Unauthorized("a token is needed")
    return Grant(subject=token, role="admin" if token == "root" else "patient")


async def test_each_sees_only_its_own_sessions(autojump_clock, nursery):
    """The snapshot, the changes and the deletions, as in the list; an admin sees all."""
    harness = ServerHarness(nursery)
    harness.app.admission.authenticate = authenticate
    await harness.tracker.create("a", owner="ann")
    await harness.tracker.create("b", owner="bob")
    ann, root = [
        await harness.stream(PATH, headers=[("Authorization", f"Bearer {name}")]) for name in ("ann", "root")
    ]
    snapshot = await next_message(ann, "snapshot")
    assert (ids(snapshot), snapshot["total"]) == (["a"], 1)
    assert ids(await next_message(root, "snapshot")) == ["b", "a"]
    await harness.tracker.update("b", progress=1)
    await harness.tracker.update("a", progress=1)
    assert ids(await next_message(ann, "changes")) == ["a"]
    assert ids(await next_message(root, "changes")) == ["b", "a"]
    await harness.tracker.delete("b")
    await harness.tracker.delete("a")
    assert (await next_message(ann, "changes"))["removed"] == ["a"]
    assert (await next_message(root, "changes"))["removed"] == ["b", "a"]
    assert b'"b"' not in ann.raw
    assert (await harness.get(PATH)).status == 401


async def test_who_may_see_all_share_what_is_encoded(autojump_clock, nursery, monkeypatch):
    """An admin costs no more than a watcher without authentication."""
    harness = ServerHarness(nursery)
    harness.app.admission.authenticate = authenticate
    headers = [("Authorization", "Bearer root")]
    streams = [await harness.stream(PATH, headers=headers) for _ in range(3)]
    for stream in streams:
        await next_message(stream, "snapshot")
    encoded, encode = [], session_list.encode_json
    monkeypatch.setattr(session_list, "encode_json", lambda value: encoded.append(value) or encode(value))
    await harness.tracker.update("a", progress=1)
    for stream in streams:
        assert ids(await next_message(stream, "changes")) == ["a"]
    assert sum(isinstance(value, dict) and "created" in value for value in encoded) == 1


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_a_stopping_server_asks_to_reconnect(autojump_clock, nursery, version):
    """The stream ends at once with a reconnection time, over HTTP/1.1 and HTTP/2."""
    harness = ServerHarness(nursery, drain=1)
    await harness.tracker.update("a", progress=1)
    app: Application = harness.app
    if version == "2":
        client, server = memory_stream_pair()
        nursery.start_soon(app.connections.serve, server)
        http2 = HTTP2Client(RawConnection(client))
        (number,) = await http2.request(PATH)
        await http2.read_until(lambda: b"event: server" in http2.bodies[number])
    else:
        stream = await harness.stream(PATH)
        await next_message(stream, "snapshot")
    app.stopping.set()
    app.broker.notify_all()
    started = trio.current_time()
    if version == "2":
        await http2.read_until(lambda: number in http2.ended)
        assert b"retry: " in http2.bodies[number]
    else:
        await stream.read_to_end()
        assert stream.retry is not None
    assert trio.current_time() - started < 1


async def test_slots_and_head(autojump_clock, nursery):
    """It counts as a stream of its user, and a HEAD has the headers of the stream."""
    harness = ServerHarness(nursery, max_streams_per_user=1, limit_loopback=True)
    response = await harness.request("HEAD", PATH)
    assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
    await harness.stream(PATH)
    connection = harness.connect()
    await connection.send(request_bytes("GET", PATH))
    assert (await connection.read_head()).status == 429
