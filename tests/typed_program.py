"""A user's program, for type checkers: ``mypy --strict``. ``assert_type`` holds that none is ``Any``.

python tests/typed_program.py
"""

from __future__ import annotations

from typing import assert_type

import msgspec
import trio

import sseserve
from sseserve.client import (
    Backoff,
    ClientError,
    Publisher,
    PublishResult,
    ReceivedMessage,
    RequestRejected,
    StatusPublisher,
    Transport,
    watch,
)


async def authenticate(request: sseserve.Request) -> sseserve.Grant:
    """Let one user in."""
    if request.headers.get("authorization") != "Bearer ann":
        raise sseserve.Unauthorized("ann only")
    return sseserve.Grant(subject="ann", role="admin")


async def run_job(tracker: sseserve.Tracker, job_id: str, request: msgspec.Raw) -> None:
    """Run a job of ``POST /api/jobs``."""
    if not bytes(request):
        raise sseserve.JobValidationError("no request")
    await tracker.update(job_id, status="completed", progress=100)


async def publish_here(server: sseserve.Server) -> None:
    """Publish from the process of the server."""
    receipt = await server.tracker.update("job-1", progress=40, stage="reading", message="almost half way")
    assert_type(receipt, sseserve.Receipt)
    cursor = sseserve.Cursor.parse(receipt.id)
    assert_type(cursor, sseserve.Cursor | None)
    if receipt.control is sseserve.Control.CANCEL:
        return
    await server.events.publish("job-1", "note", {"row": 7}, retry=1000)
    session = await server.tracker.get("job-1")
    assert_type(session, sseserve.Session)
    if session.progress is not None:
        assert_type(session.progress, sseserve.Progress)
        assert_type(session.progress.percent, int | float)
        assert_type(session.progress.state, sseserve.State)
        assert_type(session.progress.artifacts, tuple[sseserve.Artifact, ...])


async def publish_there(url: str) -> None:
    """Publish to a server elsewhere."""
    async with Publisher(url, token="ann", backoff=Backoff()) as publisher:
        result = await publisher.progress("job-1", progress=60, data={"rows": [1, 2]})
        assert_type(result, PublishResult)
        assert_type(result.control, sseserve.Control)
        try:
            await publisher.event("job-1", "note", key="k")
            await publisher.ndjson("job-1", [b'{"progress": 80}'], on_result=lambda result: print(result.id))
        except RequestRejected as error:
            assert_type(error.status, int)
        await publisher.progress("job-1", status="completed")


def publish_from_a_thread(url: str) -> None:
    """Publish from a program that is not asynchronous."""
    with StatusPublisher(url, token=lambda: "ann") as publisher:
        result = publisher.publish_status_update("job-2", {"status": "processing", "progress": 10})
        assert_type(result, PublishResult | None)


async def watch_there(url: str, transport: Transport) -> None:
    """Watch to the end."""
    try:
        async with watch(url, "job-1", transport=transport, token="ann") as messages:
            async for message in messages:
                assert_type(message, ReceivedMessage)
                assert_type(message.id, str | None)
                assert_type(message.is_final, bool)
            print(f"watched over {transport}, to {messages.cursor}")
    except ClientError as error:
        print(f"the server could not be watched: {error}")


def use_wrongly() -> None:
    """Each line is an error, or its comment would be one."""
    sseserve.serve(prot=8000)  # type: ignore[call-arg]
    sseserve.serve(port="8000")  # type: ignore[arg-type]
    sseserve.Settings(drain="4 s")  # type: ignore[arg-type]
    sseserve.nothing  # type: ignore[attr-defined] # noqa: B018
    watch("http://localhost", "job-1", transport="tcp")  # type: ignore[arg-type]


async def main() -> None:
    settings = sseserve.Settings(port=0, ttl=600, engine="memory:")
    async with sseserve.serve(settings, authenticate=authenticate, runner=run_job, drain=0.2) as server:
        assert_type(server, sseserve.Server)
        assert_type(server.url, str)
        await publish_here(server)
        await publish_there(server.url)
        await trio.to_thread.run_sync(publish_from_a_thread, server.url)
        await watch_there(server.url, "sse")
        await watch_there(server.url, "ws")
        await watch_there(server.url, "poll")


if __name__ == "__main__":
    trio.run(main)
