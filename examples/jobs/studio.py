"""The video studio: a server whose jobs are run by this program. ``python studio.py --port 8000``.

A job's brief becomes scenes, a voice, pictures, subtitles and a film that any player shows (YUV4MPEG2).
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
from common import WORDS, record

WIDTH, HEIGHT, FRAMES = 160, 90, 12  # pixels, pixels, pictures of a scene
RATE = 6  # pictures a second

Step = tuple[str, float, str]  # stage, percent of it, message


class Film:
    """One job's work, a step at a time."""

    def __init__(self, folder: Path, brief: str) -> None:
        self._folder = folder
        self._brief = brief
        self.files: list[tuple[Path, str]] = []

    def make(self) -> Iterator[Step]:
        """Do the work; after each step say how far it is."""
        scenes = [line.strip() for line in self._brief.split(".") if line.strip()]
        yield "script", 100, f"{len(scenes)} scenes"
        voice = self._folder / "voice.wav"
        record(voice, self._brief)
        self.files.append((voice, "audio/wav"))
        yield "tts", 100, f"The voice has {voice.stat().st_size:,} bytes"
        pictures = []
        for count, scene in enumerate(scenes, 1):
            pictures.append([picture(scene, frame) for frame in range(FRAMES)])
            yield "visuals", 100 * count / len(scenes), f"Scene {count} of {len(scenes)}"
        subtitles = self._folder / "film.srt"
        subtitles.write_text("".join(subtitle(number, scene) for number, scene in enumerate(scenes)))
        self.files.append((subtitles, "application/x-subrip"))
        yield "compose", 100, "Subtitles are in time"
        film = self._folder / "film.y4m"
        with film.open("wb") as file:
            file.write(b"YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C420jpeg\n" % (WIDTH, HEIGHT, RATE))
            for count, scene_pictures in enumerate(pictures, 1):
                file.writelines(b"FRAME\n" + each for each in scene_pictures)
                yield "render", 100 * count / len(scenes), f"{file.tell():,} bytes"
        self.files.insert(0, (film, "video/x-yuv4mpeg"))


def picture(scene: str, frame: int) -> bytes:
    """Draw one picture (planar YUV 4:2:0): the scene's own two colours, and a light that wanders."""
    digest = hashlib.sha256(scene.encode()).digest()
    wander = frame * WIDTH // FRAMES
    rows = [bytes(60 + (x + y + wander) % 120 for x in range(WIDTH)) for y in range(HEIGHT)]
    small = (WIDTH // 2) * (HEIGHT // 2)
    return b"".join(rows) + bytes([digest[0]]) * small + bytes([digest[1]]) * small


def subtitle(number: int, text: str) -> str:
    """Write one entry of a SubRip file."""

    def time(scene: int) -> str:
        return f"00:{scene * FRAMES // RATE // 60:02}:{scene * FRAMES // RATE % 60:02},000"

    return f"{number + 1}\n{time(number)} --> {time(number + 1)}\n{text}.\n\n"


def studio(files: Path, pace: float) -> sseserve.server.Runner:
    """Make the runner of this studio's jobs."""

    async def run(tracker: sseserve.Tracker, session_id: str, data: msgspec.Raw) -> None:
        asked: dict[str, Any] = json.loads(bytes(data)) or {}
        folder = files / session_id
        folder.mkdir()
        film = Film(folder, str(asked.get("brief", WORDS)))
        for stage, percent, message in film.make():
            said = {"progress": job_percent(stage, percent), "stage": stage, "message": message}
            control = (await tracker.update(session_id, status="running", **said)).control
            await trio.sleep(pace)
            while control is sseserve.Control.PAUSE:
                await tracker.update(session_id, status="paused", message="Paused")
                while control is sseserve.Control.PAUSE:
                    await trio.sleep(0.1)
                    control = (await tracker.get(session_id)).control
            if control is sseserve.Control.CANCEL:
                await tracker.update(session_id, status="cancelled", message="Cancelled")
                return
        made = [
            sseserve.Artifact(path.name, kind, path=str(path), size_bytes=path.stat().st_size)
            for path, kind in film.files
        ]
        await tracker.update(session_id, status="succeeded", progress=100, message="Done", artifacts=made)

    return run


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    pace = float(os.environ.get("STUDIO_PACE", "0.2"))
    with tempfile.TemporaryDirectory(prefix="studio-") as files:
        settings = load(flags={"port": args.port})
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with sseserve.serve(settings, runner=studio(Path(files), pace)) as server:
                logging.info("serving at %s", server.url)
                await anext(signals)


if __name__ == "__main__":
    trio.run(main)
