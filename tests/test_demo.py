"""The demonstration: the film it makes, its worker, and the artifact store."""

from __future__ import annotations

import io
import itertools
import json
import logging
import struct
import wave
import zlib

import pytest
import trio

from sseserve.demo.artifacts import ArtifactStore, File
from sseserve.demo.film import Film, Step
from sseserve.demo.worker import run_demo, run_demos
from sseserve.dialects.phases import PHASES
from sseserve.errors import SessionEnded, SessionExists, SessionNotFound
from sseserve.model import Control, Progress, Receipt, Session, State, state_of


class FakeTracker:
    """Records each update with its time; ``controls`` maps a percent to a control request."""

    def __init__(self, controls: dict[float, Control] | None = None) -> None:
        self.updates: list[tuple[float, dict]] = []
        self.sessions: dict[str, Session] = {}
        self.controls = controls or {}
        self.deleted: set[str] = set()

    def __repr__(self) -> str:
        return f"<FakeTracker {len(self.updates)} updates, last {self.updates[-1:]}>"

    async def create(self, session_id, *, title, **_fields):
        await trio.lowlevel.checkpoint()
        if session_id in self.sessions:
            raise SessionExists("the id is taken")
        self.sessions[session_id] = Session(id=session_id, epoch="e", title=title)

    async def update(self, session_id, **update):
        await trio.lowlevel.checkpoint()
        before = self.sessions.get(session_id, Session(id=session_id, epoch="e"))
        if before.ended:
            raise SessionEnded("the session has ended")
        self.updates.append((trio.current_time(), update))
        percent = update.get("progress", before.progress.percent if before.progress else 0)
        control = before.control
        for at in [at for at in self.controls if at <= percent]:
            control = self.controls.pop(at)
        progress = Progress(status=update["status"], state=state_of(update["status"]), percent=percent)
        self.sessions[session_id] = Session(
            id=session_id, epoch="e", seq=before.seq + 1, progress=progress, control=control
        )
        return Receipt(str(self.sessions[session_id].cursor), control)

    async def get(self, session_id):
        await trio.lowlevel.checkpoint()
        if session_id in self.deleted or session_id not in self.sessions:
            raise SessionNotFound("there is no such session")
        return self.sessions[session_id]

    def request_control(self, session_id, control):
        self.sessions[session_id] = Session(
            id=session_id, epoch="e", progress=self.sessions[session_id].progress, control=control
        )

    def statuses(self):
        return [status for status, _ in itertools.groupby(update["status"] for _, update in self.updates)]


def make_film(seed: int) -> tuple[list[Step], dict[str, File]]:
    film = Film(seed)
    steps = list(film.make())
    return steps, {file.name: file for file in film.artifacts}


@pytest.fixture(scope="module")
def film() -> tuple[list[Step], dict[str, File]]:
    return make_film(1)


def test_percentages_match_their_phases(film):
    """Each step is in its phase's range, the phases are in order, and percent never decreases."""
    steps, _ = film
    assert [stage for stage, _ in itertools.groupby(step.stage for step in steps)] == list(PHASES)
    for step in steps:
        low, high = PHASES[step.stage]
        assert low <= step.percent <= high, step
    assert all(a.percent <= b.percent for a, b in itertools.pairwise(steps))
    assert steps[-1].percent == 100
    assert 100 <= len(steps) <= 150
    assert all(step.message for step in steps)


def test_film_depends_only_on_its_seed(film):
    """The same seed makes the same bytes, and another seed another film."""
    assert make_film(1) == film
    assert make_film(2)[1]["film.png"] != film[1]["film.png"]


def test_no_artifacts_before_the_end():
    """A film that is not finished has no artifacts."""
    film = Film(3)
    steps = film.make()
    for _ in itertools.islice(steps, 90):
        assert film.artifacts == ()


def test_narration(film):
    """The WAV file is valid, as long as the film, and not silent."""
    file = film[1]["narration.wav"]
    assert file.type == "audio/wav"
    with wave.open(io.BytesIO(file.content)) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 16_000)
        assert sound.getnframes() == 6 * 16_000
        samples = struct.unpack(f"<{sound.getnframes()}h", sound.readframes(sound.getnframes()))
    assert 2_000 < max(samples) < 32_767
    assert -32_768 < min(samples) < -2_000


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """Split a PNG file into its chunks, checking each one's CRC."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(png):
        length, name = struct.unpack_from(">I4s", png, at)
        content = png[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from(">I", png, at + 8 + length)
        assert crc == zlib.crc32(name + content), name
        chunks.append((name, content))
        at += 12 + length
    return chunks


@pytest.mark.parametrize("seed", [1, 2, 1234567])
def test_film_is_an_animated_png(seed):
    """Chunks are complete and in order, sequence numbers have no gap, and each frame has all its pixels."""
    file = make_film(seed)[1]["film.png"]
    assert file.type == "image/apng"
    chunks = chunks_of(file.content)
    assert [name for name, _ in chunks[:5]] == [b"IHDR", b"acTL", b"PLTE", b"fcTL", b"IDAT"]
    assert chunks[-1] == (b"IEND", b"")
    width, height, depth, colours, *_ = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, colours) == (8, 3)
    frames, _plays = struct.unpack(">II", chunks[1][1])
    entries = len(chunks[2][1]) // 3
    animation = [(name, data) for name, data in chunks if name in {b"fcTL", b"fdAT"}]
    assert [struct.unpack(">I", data[:4])[0] for _, data in animation] == list(range(2 * frames - 1))
    pictures = [data if name == b"IDAT" else data[4:] for name, data in chunks if name in {b"IDAT", b"fdAT"}]
    assert len(pictures) == frames
    for picture in pictures:
        rows = zlib.decompress(picture)
        assert len(rows) == (width + 1) * height
        assert max(rows) < entries
        assert set(rows[:: width + 1]) == {0}
    assert len(set(pictures)) == frames


def test_captions_cover_the_film(film):
    """The captions follow each other from the start to the end of the film."""
    captions = film[1]["captions.srt"].content.decode()
    times = [line for line in captions.splitlines() if "-->" in line]
    assert times == [
        "00:00:00,000 --> 00:00:01,500",
        "00:00:01,500 --> 00:00:03,000",
        "00:00:03,000 --> 00:00:04,500",
        "00:00:04,500 --> 00:00:06,000",
    ]
    assert [cut["at"] for cut in json.loads(film[1]["timeline.json"].content)["cuts"]] == [0, 1.5, 3, 4.5]


async def test_job_keeps_its_pace_and_stores_artifacts(autojump_clock):
    """A job takes about as long as ``pace`` says, and its artifacts are at the URLs it reports."""
    tracker, store = FakeTracker(), ArtifactStore()
    await run_demo(tracker, "job a/1", seed=5, pace=20, store=store)
    assert tracker.statuses() == ["running", "succeeded"]
    assert 100 <= len(tracker.updates) <= 150
    assert 17 < trio.current_time() - tracker.updates[0][0] < 23
    percents = [update["progress"] for _, update in tracker.updates]
    assert percents == sorted(percents)
    assert (percents[0], percents[-1]) == (0, 100)
    assert percents.count(100) == 1
    last = tracker.updates[-1][1]
    assert [artifact.name for artifact in last["artifacts"]][:2] == ["film.png", "narration.wav"]
    for artifact in last["artifacts"]:
        assert artifact.url == f"/api/artifacts/job%20a%2F1/{artifact.name}"
        media_type, content = store.get("job a/1", artifact.name)
        assert (media_type, len(content)) == (artifact.type, artifact.size_bytes)


async def test_pause_and_continue(autojump_clock):
    """A paused job reports it, publishes nothing until it is continued, and then finishes."""
    tracker = FakeTracker({40: Control.PAUSE})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_demo(tracker, "j", seed=1, pace=20, store=ArtifactStore()))
        await trio.sleep(60)
        assert tracker.statuses() == ["running", "paused"]
        before = len(tracker.updates)
        await trio.sleep(60)
        assert len(tracker.updates) == before
        resumed = trio.current_time()
        tracker.request_control("j", Control.CONTINUE)
    assert tracker.statuses() == ["running", "paused", "running", "succeeded"]
    assert tracker.updates[before][0] - resumed <= 0.25


@pytest.mark.parametrize("paused", [False, True])
async def test_cancel(autojump_clock, paused):
    """A job that is asked to cancel, running or paused, reports it once and stores no artifacts."""
    tracker, store = FakeTracker({50: Control.PAUSE if paused else Control.CANCEL}), ArtifactStore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_demo(tracker, "j", seed=1, pace=20, store=store))
        if paused:
            await trio.sleep(60)
            tracker.request_control("j", Control.CANCEL)
    assert tracker.statuses() == ["running", *(["paused"] if paused else []), "cancelled"]
    assert tracker.sessions["j"].progress.percent < 55
    assert store.get("j", "film.png") is None


@pytest.mark.parametrize("paused", [False, True])
async def test_deleted_session_stays_deleted(autojump_clock, paused):
    """A job whose session is deleted ends without another update, which would create it again."""
    tracker = FakeTracker({20: Control.PAUSE} if paused else {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_demo(tracker, "j", seed=1, pace=20, store=ArtifactStore()))
        await trio.sleep(10)
        tracker.deleted.add("j")
        before = len(tracker.updates)
    assert len(tracker.updates) == before


async def test_session_ended_by_another_client(autojump_clock):
    """A job whose session has ended publishes nothing more."""
    tracker = FakeTracker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_demo(tracker, "j", seed=1, pace=20, store=ArtifactStore()))
        await trio.sleep(5)
        await tracker.update("j", status="failed")
    assert tracker.statuses() == ["running", "failed"]


async def test_failure_is_published_and_logged(autojump_clock, caplog):
    """An unexpected exception ends the session as failed, and the log has the reason."""

    class FullStore(ArtifactStore):
        def put(self, session_id, files):
            raise OSError("no space left")

    tracker = FakeTracker()
    with caplog.at_level(logging.ERROR):
        await run_demo(tracker, "j", seed=1, pace=20, store=FullStore())
    assert tracker.statuses() == ["running", "failed"]
    assert "log" in tracker.updates[-1][1]["error"]
    assert "no space left" in caplog.text


async def test_jobs_run_one_after_another(autojump_clock):
    """Each job has a new id, skipping existing ones, until cancelled."""
    tracker, store = FakeTracker(), ArtifactStore()
    await tracker.update("demo-2", status="succeeded", progress=100)
    with trio.move_on_after(100) as scope:
        await run_demos(tracker, store, instance="i", pace=20, rest=3)
    assert scope.cancelled_caught
    assert list(tracker.sessions)[:4] == ["demo-2", "demo-1", "demo-3", "demo-4"]
    states = {name: session.progress.state for name, session in tracker.sessions.items()}
    assert states["demo-1"] is states["demo-3"] is states["demo-4"] is State.SUCCEEDED
    assert store.get("demo-4", "film.png") is not None


def test_store_keeps_the_latest_jobs():
    """The oldest job's files are removed; a job stored again is the newest."""
    store = ArtifactStore(jobs=2)
    files = (File("a.txt", "text/plain", b"a"),)
    for name in ("one", "two", "one", "three"):
        store.put(name, files)
    assert store.get("one", "a.txt") == store.get("three", "a.txt") == ("text/plain", b"a")
    assert store.get("two", "a.txt") is None
    assert store.get("one", "b.txt") is None
