"""A video generator with the server in the same process: ``python video_server.py --port 8000``.

The environment variable ``VIDEO_PACE`` is the time in seconds that a job waits after each step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import trio

import sseserve
from sseserve.config import load
from sseserve.dialects.phases import job_percent

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from common import SAMPLE_TEXT
from video import Video


def make_runner(files: Path, pace: float) -> sseserve.server.Runner:
    """Make the function that runs the server's jobs.

    Args:
        files: directory for the jobs' files.
        pace: seconds to wait after each step.
    """

    async def run(tracker: sseserve.Tracker, session_id: str, data: msgspec.Raw) -> None:
        request: dict[str, Any] = json.loads(bytes(data)) or {}
        if not (brief := str(request.get("brief", SAMPLE_TEXT)).strip()):
            raise sseserve.JobValidationError("the brief is empty")
        folder = files / session_id
        folder.mkdir()
        video = Video(folder, brief)
        for stage, percent, message in video.generate():
            progress = {"progress": job_percent(stage, percent), "stage": stage, "message": message}
            control = (await tracker.update(session_id, status="running", **progress)).control
            await trio.sleep(pace)
            while control is sseserve.Control.PAUSE:
                await tracker.update(session_id, status="paused", message="Paused")
                while control is sseserve.Control.PAUSE:
                    await trio.sleep(0.1)
                    control = (await tracker.get(session_id)).control
            if control is sseserve.Control.CANCEL:
                await tracker.update(session_id, status="cancelled", message="Cancelled")
                return
        artifacts = [
            sseserve.Artifact(path.name, media_type, path=str(path), size_bytes=path.stat().st_size)
            for path, media_type in video.files
        ]
        await tracker.update(
            session_id, status="succeeded", progress=100, message="Done", artifacts=artifacts
        )

    return run


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    pace = float(os.environ.get("VIDEO_PACE", "0.2"))
    with tempfile.TemporaryDirectory(prefix="sseserve-videos-") as files:
        settings = load(flags={"port": args.port})
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with sseserve.serve(settings, runner=make_runner(Path(files), pace)) as server:
                logging.info("serving at %s", server.url)
                await anext(signals)


if __name__ == "__main__":
    trio.run(main)
