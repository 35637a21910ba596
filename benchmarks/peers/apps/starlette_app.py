"""A small application with sse-starlette: POST /publish/CHANNEL is sent to all who GET /watch/CHANNEL."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

channels: defaultdict[str, set[asyncio.Queue[str]]] = defaultdict(set)


async def watch(request: Request) -> EventSourceResponse:
    queues = channels[request.path_params["channel"]]
    queue: asyncio.Queue[str] = asyncio.Queue()
    queues.add(queue)

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            yield ServerSentEvent(comment="open")
            while True:
                yield ServerSentEvent(data=await queue.get())
        finally:
            queues.discard(queue)

    return EventSourceResponse(events())


async def publish(request: Request) -> Response:
    data = (await request.body()).decode()
    for queue in channels[request.path_params["channel"]]:
        queue.put_nowait(data)
    return Response(status_code=204)


app = Starlette(
    routes=[Route("/watch/{channel}", watch), Route("/publish/{channel}", publish, methods=["POST"])]
)
