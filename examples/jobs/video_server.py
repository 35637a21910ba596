"""A video generator with the server in the same process: ``python video_server.py --port 8000``.

A job turns its brief into a voice track, subtitles and an uncompressed video (YUV4MPEG2). The environment
variable ``VIDEO_PACE`` is the time in seconds that it waits after each step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import trio

import sseserve
from sseserve.config import load
from sseserve.dialects.phases import job_percent

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import SAMPLE_TEXT, write_recording

WIDTH, HEIGHT = 160, 90  # pixels
SCENE_FRAMES = 12
FRAME_RATE = 6  # frames per second

Step = tuple[str, float, str]  # stage, percent of the stage, message


class Video:
    """The files of one job, created step by step."""

    def __init__(self, folder: Path, brief: str) -> None:
        self._folder = folder
        self._brief = brief
        self.files: list[tuple[Path, str]] = []

    def generate(self) -> Iterator[Step]:
        """Do the work; yield the progress after each step."""
        scenes = [sentence.strip() for sentence in self._brief.split(".") if sentence.strip()]
        yield "script", 100, f"{len(scenes)} scenes"
        voice = self._folder / "voice.wav"
        write_recording(voice, self._brief)
        self.files.append((voice, "audio/wav"))
        yield "tts", 100, f"Wrote {voice.name}, {voice.stat().st_size:,} bytes"
        scene_frames = []
        for count, scene in enumerate(scenes, 1):
            scene_frames.append([draw_frame(scene, number) for number in range(SCENE_FRAMES)])
            yield "visuals", 100 * count / len(scenes), f"Scene {count} of {len(scenes)}"
        subtitles = self._folder / "film.srt"
        subtitles.write_text("".join(format_subtitle(number, scene) for number, scene in enumerate(scenes)))
        self.files.append((subtitles, "application/x-subrip"))
        yield "compose", 100, f"Wrote {subtitles.name}, {len(scenes)} subtitles"
        video = self._folder / "film.y4m"
        with video.open("wb") as file:
            file.write(b"YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C420jpeg\n" % (WIDTH, HEIGHT, FRAME_RATE))
            for count, frames in enumerate(scene_frames, 1):
                file.writelines(b"FRAME\n" + frame for frame in frames)
                yield "render", 100 * count / len(scenes), f"{file.tell():,} bytes"
        self.files.insert(0, (video, "video/x-yuv4mpeg"))


def draw_frame(scene: str, number: int) -> bytes:
    """Draw a frame (planar YUV 4:2:0): a moving gradient in the scene's colour, which depends on its text."""
    digest = hashlib.sha256(scene.encode()).digest()
    offset = number * WIDTH // SCENE_FRAMES
    rows = [bytes(60 + (x + y + offset) % 120 for x in range(WIDTH)) for y in range(HEIGHT)]
    chroma_size = (WIDTH // 2) * (HEIGHT // 2)
    return b"".join(rows) + bytes([digest[0]]) * chroma_size + bytes([digest[1]]) * chroma_size


def format_subtitle(number: int, text: str) -> str:
    """Format one entry of a SubRip file."""

    def start_time(scene: int) -> str:
        minutes, seconds = divmod(scene * SCENE_FRAMES // FRAME_RATE, 60)
        return f"00:{minutes:02}:{seconds:02},000"

    return f"{number + 1}\n{start_time(number)} --> {start_time(number + 1)}\n{text}.\n\n"


def make_runner(files: Path, pace: float) -> sseserve.server.Runner:
    """Make the function that runs the server's jobs.

    Args:
        files: directory for the jobs' files.
        pace: seconds to wait after each step.
    """

    async def run(tracker: sseserve.Tracker, session_id: str, data: msgspec.Raw) -> None:
        request: dict[str, Any] = json.loads(bytes(data)) or {}
        folder = files / session_id
        folder.mkdir()
        video = Video(folder, str(request.get("brief", SAMPLE_TEXT)))
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
