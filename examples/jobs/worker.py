"""A worker of the video generator on a machine of its own: ``python worker.py http://127.0.0.1:8000``.

It claims queued jobs from a server that runs none itself (``SSESERVE_JOB_WORKERS=remote``), one at a time,
until Ctrl-C is pressed. Start as many workers as there are machines: no two of them get the same job.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent))
from video import Video

LEASE = 10.0  # seconds; a job whose worker publishes nothing for longer is stalled, for three times that lost
WAIT = 30.0  # seconds that a claim waits for a job


class Cancelled(Exception):
    """A watcher has cancelled the job."""


class Job:
    """A claimed job."""

    def __init__(self, client: httpx.Client, record: dict[str, Any]) -> None:
        self._client = client
        self._progress = record["links"]["progress"]
        self.id = record["jobId"]
        self.request = record["request"] or {}

    def publish(self, **update: Any) -> None:
        """Publish an update, and do what the response asks: wait while the job is paused, or stop.

        Raises:
            Cancelled: a watcher has cancelled the job.
            httpx.HTTPStatusError: the job has ended without this worker, or was deleted.
        """
        control = self._post(update)
        while control == "pause":
            time.sleep(1)  # until the next question; it also renews the lease
            control = self._post({"status": "paused", "message": "Paused"})
        if control == "cancel":
            raise Cancelled

    def end(self, status: str, **update: Any) -> None:
        """Publish the job's last update."""
        self._post({"status": status, **update})

    def _post(self, update: dict[str, Any]) -> str:
        response = self._client.post(self._progress, json=update)
        return response.raise_for_status().json()["control"]


def run_job(job: Job, folder: Path, pace: float) -> None:
    """Make the video of a job, and publish each step and the end."""
    try:
        if not (brief := str(job.request.get("brief", "")).strip()):
            job.end("failed", error={"code": "validation_error", "message": "the brief is empty"})
            return
        folder.mkdir()
        video = Video(folder, brief)
        for stage, percent, message in video.generate():
            job.publish(status="running", stage=stage, progress=percent, message=message)
            time.sleep(pace)  # the work is faster than anybody can watch
        artifacts = [
            {"name": path.name, "type": media_type, "path": str(path), "sizeBytes": path.stat().st_size}
            for path, media_type in video.files
        ]
        job.end("succeeded", message="Done", artifacts=artifacts)
    except Cancelled:
        job.end("cancelled", message="Cancelled")
    except httpx.HTTPError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary of a job: the worker goes on
        job.end("failed", error=f"{type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="URL of the server")
    parser.add_argument("--name", default=platform.node(), help="name in the server's log")
    parser.add_argument("--pace", type=float, default=0.2, help="seconds to wait after each step of the work")
    args = parser.parse_args()
    claim = {"wait": WAIT, "lease": LEASE, "worker": args.name}
    with (
        tempfile.TemporaryDirectory(prefix="sseserve-videos-") as files,
        httpx.Client(base_url=args.server, timeout=WAIT + 10) as client,
    ):
        while True:
            try:
                response = client.post("/api/claims", params=claim).raise_for_status()
                if response.status_code == 204:
                    continue  # no job has come
                job = Job(client, response.json())
                print(f"{args.name}: job {job.id}", flush=True)
                run_job(job, Path(files) / job.id, args.pace)
            except httpx.HTTPError as error:
                # The server cannot be reached, or the job has ended without us: on with the next one.
                print(f"{args.name}: {error}", file=sys.stderr, flush=True)
                time.sleep(1)  # not to ask a server that is away in a busy loop


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
