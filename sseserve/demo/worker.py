"""A worker as any other: it makes a film, publishes each step, and does what the watchers ask."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar
from urllib.parse import quote

import msgspec
import trio

from ..errors import (
    InsufficientStorage,
    SessionEnded,
    SessionExists,
    SessionNotFound,
    SseserveError,
    Unavailable,
)
from ..logs import Line
from ..model import Artifact, Control
from ..progress.tracker import Tracker
from .artifacts import ArtifactStore, File
from .film import Film

__all__ = ["DEMO", "TITLE", "DemoRunner", "run_demo", "run_demos"]

log = logging.getLogger(__name__)

TITLE = "Demonstration"  # of the sessions; the page shows their phases before they begin
DEMO = "demo"  # the name of this runner
_POLL = 0.25  # seconds between two reads of a paused session
_RETRY = 1.0  # seconds until what the engine could not do is tried again

P = ParamSpec("P")
T = TypeVar("T")


class DemoRunner:
    """Runs a job as a demonstration. The same request makes the same film.

    Args:
        store: gets the files.
        pace: seconds that a demonstration takes.
    """

    def __init__(self, store: ArtifactStore, pace: float) -> None:
        self._store = store
        self._pace = pace

    async def __call__(self, tracker: Tracker, session_id: str, data: msgspec.Raw) -> None:
        """Run one; see ``progress.queue.Runner``."""
        await run_demo(tracker, session_id, seed=_seed(data), pace=self._pace, store=self._store)

    async def find_file(self, tracker: Tracker, session_id: str, name: str) -> tuple[str, bytes] | None:
        """Return the media type and the content of a file of a demonstration; None if there is no such file.

        One that is not in the store, as another instance has made it or there were many others since, is made
        again. Another session may have this id meanwhile, and another owner: it has no such file.
        """
        session = await tracker.engine.load(session_id)
        if session is None or session.job is None or session.progress is None:
            return None
        address = _address(session_id, name)
        if not any(artifact.url == address for artifact in session.progress.artifacts):
            return None
        if (file := self._store.get(session_id, name)) is None:
            self._store.put(session_id, await trio.to_thread.run_sync(_make, _seed(session.data)))
            file = self._store.get(session_id, name)
        return file


def _seed(data: msgspec.Raw | msgspec.UnsetType) -> int:
    """Return the seed of the film that a job's data asks for."""
    text = b"null" if data is msgspec.UNSET else bytes(data)
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest())


def _make(seed: int) -> tuple[File, ...]:
    film = Film(seed)
    for _ in film.make():
        pass
    return film.artifacts


def _address(session_id: str, name: str) -> str:
    return f"/api/artifacts/{quote(session_id, safe='')}/{quote(name)}"


async def run_demo(
    tracker: Tracker, session_id: str, *, seed: int, pace: float = 20.0, store: ArtifactStore
) -> None:
    """Make a film as the session ``session_id``, in about ``pace`` seconds, and publish each step.

    It pauses, continues and stops as the watchers ask, and ends early if the session was ended or deleted.
    It raises nothing but a cancellation: a failure is logged and published.
    """
    try:
        await _film(tracker, session_id, seed, pace, store)
    except (SessionEnded, SessionNotFound) as reason:
        log.info(Line("the demonstration stops", session_id=session_id, error=str(reason)))
    except Exception:
        log.exception(Line("the demonstration has failed", session_id=session_id))
        with contextlib.suppress(SseserveError):  # the tracker itself may be what failed
            await _retry(
                tracker.update,
                session_id,
                status="failed",
                error="the demonstration failed; see the server log",
            )


async def _film(tracker: Tracker, session_id: str, seed: int, pace: float, store: ArtifactStore) -> None:
    film, percent = Film(seed), 0.0
    jitter = random.Random(seed)  # noqa: S311 - only to look natural
    receipt = await _retry(
        tracker.update, session_id, status="running", progress=0, stage="plan", message="Starting"
    )
    for step in film.make():
        if step.percent > percent:
            await trio.sleep(pace * (step.percent - percent) / 100 * jitter.uniform(0.6, 1.4))
            percent = step.percent
        # An update would bring a deleted session back to life; this raises.
        control = (await _retry(tracker.get, session_id)).control
        if control is Control.CONTINUE:
            control = receipt.control
        if control is Control.PAUSE:
            control = await _pause(tracker, session_id, step.stage)
        if control is Control.CANCEL:
            await _retry(tracker.update, session_id, status="cancelled", message="Cancelled by a watcher")
            return
        if percent < 100:
            receipt = await _retry(
                tracker.update,
                session_id,
                status="running",
                progress=percent,
                stage=step.stage,
                message=step.message,
            )
    store.put(session_id, film.artifacts)
    await _retry(
        tracker.update,
        session_id,
        status="succeeded",
        progress=100,
        stage="render",
        message=f"“{film.title}” is finished",
        artifacts=tuple(
            Artifact(file.name, file.type, _address(session_id, file.name), size_bytes=len(file.content))
            for file in film.artifacts
        ),
    )


async def _pause(tracker: Tracker, session_id: str, stage: str) -> Control:
    """Publish the pause and return what ends it."""
    receipt = await _retry(
        tracker.update, session_id, status="paused", stage=stage, message="Paused by a watcher"
    )
    control = receipt.control
    while control is Control.PAUSE:
        await trio.sleep(_POLL)
        control = (await _retry(tracker.get, session_id)).control
    return control


async def _retry(function: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs) -> T:
    """Call a function of the tracker, again while the engine is unavailable: the work done so far counts."""
    while True:
        try:
            return await function(*args, **options)
        except (Unavailable, InsufficientStorage):
            await trio.sleep(_RETRY)


async def run_demos(
    tracker: Tracker, store: ArtifactStore, *, instance: str, pace: float = 20.0, rest: float = 3.0
) -> None:
    """Run one demonstration after the other, ``demo-1``, ``demo-2`` and so on, ``rest`` seconds apart.

    ``instance`` is the one of the server in which this is called.

    An id that exists already is skipped.
    """
    for number in itertools.count(1):
        session_id = f"demo-{number}"
        try:
            data = msgspec.Raw(b"%d" % number)
            await tracker.create(session_id, title=TITLE, data=data, job=DEMO, instance=instance)
        except SessionExists:
            continue
        except SseserveError as reason:
            log.warning(Line("the demonstration cannot begin", session_id=session_id, error=str(reason)))
        else:
            await run_demo(tracker, session_id, seed=_seed(data), pace=pace, store=store)
        await trio.sleep(rest)
