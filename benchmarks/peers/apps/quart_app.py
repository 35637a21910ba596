"""A small application with Quart-Trio: POST /publish/CHANNEL is sent to all who GET /watch/CHANNEL."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import AsyncIterator

import trio
from quart import Response, request
from quart_trio import QuartTrio

app = QuartTrio(__name__)
channels: defaultdict[str, set[trio.MemorySendChannel[str]]] = defaultdict(set)


@app.get("/watch/<channel>")
async def watch(channel: str) -> Response:
    send, receive = trio.open_memory_channel[str](math.inf)
    channels[channel].add(send)

    async def events() -> AsyncIterator[str]:
        try:
            yield ":\n\n"
            async for data in receive:
                yield f"data: {data}\n\n"
        finally:
            channels[channel].discard(send)

    response = Response(events(), content_type="text/event-stream")
    response.timeout = None
    return response


@app.post("/publish/<channel>")
async def publish(channel: str) -> tuple[str, int]:
    data = (await request.get_data()).decode()
    for send in channels[channel]:
        send.send_nowait(data)
    return "", 204
