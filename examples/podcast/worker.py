"""The podcast generator's services: they find articles, read them, and write a script.

Their status updates travel as a push subscription of Google Cloud Pub/Sub delivers them.
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

_WHO = ("A small team", "The laboratory", "A student", "The city", "An old company")
_DOES = ("has built", "gives away", "measures", "repairs", "forgets")
_WHAT = ("a quiet engine", "the oldest clock", "its archive", "a bridge of wood", "the northern line")


class StatusUpdates:
    """The topic ``status-updates``, and its push subscription."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._ids = itertools.count(1)

    def publish(
        self, job_id: str, status: str, progress: float, stage: str, message: str, **more: Any
    ) -> None:
        said = {"jobId": job_id, "status": status, "progress": progress, "stage": stage, "message": message}
        said |= {"timestamp": datetime.now(UTC).isoformat(), **more}
        push = {
            "message": {
                "data": base64.b64encode(json.dumps(said).encode()).decode(),
                "messageId": f"{job_id}-{next(self._ids)}",
                "publishTime": said["timestamp"],
            },
            "subscription": "projects/example/subscriptions/sse-service-subscription",
        }
        self._client.post("/api/v1/pubsub/push", json=push).raise_for_status()


def work_for_ever(server: str, files: Path, pace: float) -> None:
    """Take the jobs that wait, one after another, as they are created."""
    with httpx.Client(base_url=server) as client:
        done: set[str] = set()
        while True:
            waiting = client.get("/api/sessions", params={"state": "queued"}).raise_for_status()
            for job in waiting.json()["sessions"]:
                if (job_id := job["session_id"]) in done:
                    continue
                done.add(job_id)
                # The list leaves out what is asked for.
                asked = client.get(f"/api/sessions/{job_id}/status").json().get("data")
                if "topics" in (asked or {}):
                    make_podcast(client, job_id, asked, files, pace)
            time.sleep(0.1)


def make_podcast(client: httpx.Client, job_id: str, asked: dict[str, Any], files: Path, pace: float) -> None:
    """Make one podcast's script."""
    updates = StatusUpdates(client)
    folder = files / job_id
    folder.mkdir()
    try:
        sources = asked.get("sources") or ["the web"]
        for count, source in enumerate(sources, 1):
            retrieve(folder / f"{count}.txt", source, asked["topics"])
            said = f"Retrieved {source}"
            updates.publish(job_id, "processing", 30 * count / len(sources), "retrieving-content", said)
            time.sleep(pace)
        words: Counter[str] = Counter()
        articles = sorted(folder.glob("*.txt"))
        for count, article in enumerate(articles, 1):
            words.update(re.findall(r"\w{4,}", article.read_text().lower()))
            said = f"{words.total()} words, {len(words)} different"
            share = 30 + 40 * count / len(articles)
            updates.publish(job_id, "processing", share, "processing-articles", said)
            time.sleep(pace)
        script = folder / "podcast.md"
        script.write_text(summary(articles, words))
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        updates.publish(job_id, "processing", 95, "generating-summary", f"Wrote {script.name}")
        time.sleep(pace)
        made = {"script": script.name, "bytes": script.stat().st_size, "sha256": digest}
        updates.publish(job_id, "completed", 100, "generating-summary", "The podcast is ready", data=made)
    except Exception as error:
        updates.publish(job_id, "failed", 0, "failed", f"{type(error).__name__}: {error}")
        raise


def retrieve(path: Path, source: str, topics: list[str]) -> None:
    """Write what a source has to say about the topics; the same every time."""
    pick = random.Random(source)
    lines = (f"{pick.choice(_WHO)} {pick.choice(_DOES)} {pick.choice(_WHAT)}" for _ in range(400))
    path.write_text("\n".join(f"{line}, says {pick.choice(topics)}." for line in lines))


def summary(articles: list[Path], words: Counter[str]) -> str:
    """Choose of each article the sentence whose words are the most frequent of all."""

    def weight(line: str) -> int:
        return sum(words[word] for word in re.findall(r"\w{4,}", line.lower()))

    chosen = (max(article.read_text().splitlines(), key=weight) for article in articles)
    return "".join(f"- {line}\n" for line in chosen)
