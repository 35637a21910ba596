"""Programs of seeds 003 and 004 that use Redis, with the classes as the documents print them.

    python redis_programs.py {publish,track,subscribe} REDIS_URL SESSION_ID

The document's ``StatusSubscriber`` does not await what redis.asyncio's ``subscribe``, ``unsubscribe`` and
``close`` return, and so never subscribes: the three ``await`` are ours. So is the URL of the tracker.
"""

import asyncio
import json
import logging
import sys
from datetime import datetime

import redis
import redis.asyncio

logger = logging.getLogger(__name__)


class StatusPublisher:
    def __init__(self, redis_client):
        self.redis = redis_client

    def publish_status_update(self, session_id: str, status_data: dict):
        """Publish status update to Redis channel."""
        channel = f"transcription:status:{session_id}"
        message = json.dumps({
            "session_id": session_id,
            "status": status_data.get("status"),
            "progress": status_data.get("progress"),
            "message": status_data.get("message"),
            "timestamp": datetime.utcnow().isoformat(),  # noqa: DTZ003 - the seed's own line
            **status_data
        })  # fmt: skip

        self.redis.publish(channel, message)
        logger.debug(f"Published status update to {channel}: {message}")


class StatusSubscriber:
    def __init__(self, redis_client):
        self.redis = redis_client

    async def subscribe_to_session(self, session_id: str):
        """Subscribe to status updates for a specific session."""
        pubsub = self.redis.pubsub()
        channel = f"transcription:status:{session_id}"
        await pubsub.subscribe(channel)

        try:
            async for message in pubsub.listen():
                if message["type"] == "message":
                    yield json.loads(message["data"])
        finally:
            await pubsub.unsubscribe(channel)
            await pubsub.close()


class RedisProgressTracker:
    def __init__(self, url):
        self.redis = redis.asyncio.from_url(url)

    async def update_progress(self, session_id, status, progress, message):
        key = f"session:{session_id}:progress"
        data = {
            "status": status,
            "progress": progress,
            "message": message,
            "updated_at": datetime.utcnow().isoformat(),  # noqa: DTZ003 - the seed's own line
        }
        await self.redis.setex(key, 3600, json.dumps(data))  # 1 hour TTL
        await self.redis.publish(f"session:{session_id}:updates", json.dumps(data))


def publish(url: str, session_id: str) -> None:
    """Publish what the document's Celery task does."""
    publisher = StatusPublisher(redis.from_url(url))
    publisher.publish_status_update(session_id, {
        "status": "processing",
        "progress": 10,
        "message": "Starting audio processing..."
    })  # fmt: skip
    for progress in [25, 50, 75, 90]:
        publisher.publish_status_update(session_id, {
            "status": "processing",
            "progress": progress,
            "message": f"at {progress}"
        })  # fmt: skip
    publisher.publish_status_update(session_id, {
        "status": "completed",
        "progress": 100,
        "message": "Transcription completed successfully!"
    })  # fmt: skip


async def track(url: str, session_id: str) -> None:
    """Update the progress of a session to its end."""
    tracker = RedisProgressTracker(url)
    await tracker.update_progress(session_id, "transcribing", 45, "Transcribing")
    await tracker.update_progress(session_id, "processed", 100, "Session processing complete")
    await tracker.redis.aclose()


async def subscribe(url: str, session_id: str) -> None:
    """Print each status, one a line, to the end."""
    client = redis.asyncio.from_url(url)
    async for status in StatusSubscriber(client).subscribe_to_session(session_id):
        print(json.dumps(status), flush=True)
        if status.get("status") in ["completed", "failed"]:
            break
    await client.aclose()


if __name__ == "__main__":
    program, url, session_id = sys.argv[1:]
    if program == "publish":
        publish(url, session_id)
    else:
        asyncio.run({"track": track, "subscribe": subscribe}[program](url, session_id))
