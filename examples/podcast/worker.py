"""The podcast generator's services: they retrieve articles, analyze them, and write a script.

Their status updates are sent as a push subscription of Google Cloud Pub/Sub delivers them.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

_SUBJECTS = ("A small team", "The laboratory", "A student", "The city", "An old company")
_VERBS = ("has built", "gives away", "measures", "repairs", "forgets")
_OBJECTS = ("a quiet engine", "the oldest clock", "its archive", "a bridge of wood", "the northern line")


class StatusUpdatePublisher:
    """The Pub/Sub topic ``status-updates`` and its push subscription."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._ids = itertools.count(1)

    def publish(
        self, job_id: str, status: str, progress: float, stage: str, message: str, **more: Any
    ) -> None:
        update = {"jobId": job_id, "status": status, "progress": progress, "stage": stage, "message": message}
        update |= {"timestamp": datetime.now(UTC).isoformat(), **more}
        push = {
            "message": {
                "data": base64.b64encode(json.dumps(update).encode()).decode(),
                "messageId": f"{job_id}-{next(self._ids)}",
                "publishTime": update["timestamp"],
            },
            "subscription": "projects/example/subscriptions/sse-service-subscription",
        }
        self._client.post("/api/v1/pubsub/push", json=push).raise_for_status()


def process_jobs(server: str, files: Path, pace: float) -> None:
    """Process queued jobs one at a time. Never returns."""
    with httpx.Client(base_url=server) as client:
        seen: set[str] = set()
        while True:
            response = client.get("/api/sessions", params={"state": "queued"}).raise_for_status()
            for job in response.json()["sessions"]:
                if (job_id := job["session_id"]) in seen:
                    continue
                seen.add(job_id)
                # The list does not contain the job's request.
                request = client.get(f"/api/sessions/{job_id}/status").json().get("data")
                if "topics" in (request or {}):
                    generate_podcast(client, job_id, request, files, pace)
            time.sleep(0.1)  # between two looks at the list of jobs


def generate_podcast(
    client: httpx.Client, job_id: str, request: dict[str, Any], files: Path, pace: float
) -> None:
    """Generate the script of one podcast, and publish the job's status until it has completed or failed."""
    updates = StatusUpdatePublisher(client)
    folder = files / job_id
    folder.mkdir()
    try:
        sources = request.get("sources") or ["the web"]
        for count, source in enumerate(sources, 1):
            write_article(folder / f"{count}.txt", source, request["topics"])
            percent = 30 * count / len(sources)
            updates.publish(job_id, "processing", percent, "retrieving-content", f"Retrieved {source}")
            time.sleep(pace)  # the work is faster than anybody can watch
        words: Counter[str] = Counter()
        articles = sorted(folder.glob("*.txt"))
        for count, article in enumerate(articles, 1):
            words.update(re.findall(r"\w{4,}", article.read_text().lower()))
            percent = 30 + 40 * count / len(articles)
            message = f"{words.total()} words, {len(words)} different"
            updates.publish(job_id, "processing", percent, "processing-articles", message)
            time.sleep(pace)  # the work is faster than anybody can watch
        script = folder / "podcast.md"
        script.write_text(summarize(articles, words))
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        updates.publish(job_id, "processing", 95, "generating-summary", f"Wrote {script.name}")
        time.sleep(pace)  # the work is faster than anybody can watch
        result = {"script": script.name, "bytes": script.stat().st_size, "sha256": digest}
        updates.publish(job_id, "completed", 100, "generating-summary", "The podcast is ready", data=result)
    except Exception as error:
        updates.publish(job_id, "failed", 0, "failed", f"{type(error).__name__}: {error}")
        raise


def write_article(path: Path, source: str, topics: list[str]) -> None:
    """Write a made-up article about the topics, always the same one for the same source."""
    rng = random.Random(source)
    lines = (f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}" for _ in range(400))
    path.write_text("\n".join(f"{line}, says {rng.choice(topics)}." for line in lines))


def summarize(articles: list[Path], words: Counter[str]) -> str:
    """Pick from each article the sentence whose words are the most frequent ones."""

    def score(line: str) -> int:
        return sum(words[word] for word in re.findall(r"\w{4,}", line.lower()))

    sentences = (max(article.read_text().splitlines(), key=score) for article in articles)
    return "".join(f"- {sentence}\n" for sentence in sentences)
