"""Two instances over a real Redis that crashes, or hangs, and comes back: nothing is lost or doubled."""

from __future__ import annotations

import httpx
import pytest
import trio
from redis_server import RedisServer

from sseserve.client import TRANSPORTS, Backoff, Publisher, ReceivedMessage, watch
from sseserve.server import Server, serve

RETRY = Backoff(initial=0.1, maximum=0.3)


class Watchers:
    """One for each transport on an instance; ``received`` are their messages."""

    def __init__(self, nursery: trio.Nursery, server: Server) -> None:
        self.received: dict[str, list[ReceivedMessage]] = {transport: [] for transport in TRANSPORTS}
        for transport in TRANSPORTS:
            nursery.start_soon(self._watch, server.url, transport)

    async def _watch(self, url: str, transport) -> None:
        async with watch(url, "s", transport=transport, backoff=RETRY) as messages:
            async for message in messages:
                self.received[transport].append(message)

    def percents(self, transport: str) -> list[float]:
        records = [m for m in self.received[transport] if m.event in ("progress", "complete")]
        return [message.data["progress"] for message in records]

    def names(self, transport: str) -> list[str]:
        return [message.event for message in self.received[transport]]


async def wait_for(condition) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def status(server: Server, path: str) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(server.url + path, timeout=10)).status_code


@pytest.mark.parametrize("fault", ["crash", "hang"])
async def test_everything_catches_up(tmp_path, fault):
    """Open streams say what happens, publishers and watchers wait, and each event arrives once, in order."""
    redis = RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="always")
    with redis:
        async with (
            serve(port=0, engine=redis.url) as one,
            serve(port=0, engine=redis.url) as two,
            Publisher(one.url, backoff=RETRY) as publisher,
            trio.open_nursery() as nursery,
        ):
            await publisher.progress("s", progress=0)
            watchers = [Watchers(nursery, server) for server in (one, two)]
            everybody = [(w, transport) for w in watchers for transport in TRANSPORTS]
            await wait_for(lambda: all(w.percents(t) == [0] for w, t in everybody))

            published = []

            async def publish() -> None:
                for percent in range(1, 30):
                    await publisher.progress("s", progress=percent)
                    published.append(percent)
                    await trio.sleep(0.01)
                await publisher.progress("s", status="done")

            nursery.start_soon(publish)
            await wait_for(lambda: len(published) >= 10)
            if fault == "crash":
                redis.kill()
            else:
                redis.pause()
            for w, transport in everybody:
                if transport != "poll":
                    await wait_for(lambda w=w, t=transport: "degraded" in w.names(t))
            assert [await status(two, path) for path in ("/ready", "/health")] == [503, 200]
            late = Watchers(nursery, two)
            await wait_for(lambda: late.names("sse") == ["degraded"])
            if fault == "crash":
                redis.start()
            else:
                redis.resume()
            everybody += [(late, transport) for transport in TRANSPORTS]
            await wait_for(lambda: all("complete" in w.names(t) for w, t in everybody))
            for w in watchers:
                for transport in TRANSPORTS:
                    assert w.percents(transport) == [*range(30), 100], transport
                    resumed = [m.data["status"] for m in w.received[transport] if m.event == "resume"]
                    assert set(resumed) <= {"ok"}
                for transport in ("sse", "ws"):
                    notices = [n for n in w.names(transport) if n in ("degraded", "restored")]
                    assert notices[:2] == ["degraded", "restored"]
            for transport in TRANSPORTS:
                assert late.percents(transport) == sorted(set(late.percents(transport)))
            assert [await status(two, path) for path in ("/ready", "/health")] == [200, 200]
            nursery.cancel_scope.cancel()
