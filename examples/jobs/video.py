"""The work of the video generator: from a brief to a voice track, subtitles and an uncompressed video."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import write_recording

WIDTH, HEIGHT = 160, 90  # pixels
SCENE_FRAMES = 12
FRAME_RATE = 6  # frames per second

Step = tuple[str, float, str]  # stage, percent of the stage, message


class Video:
    """The files of one job, created step by step; the video is YUV4MPEG2."""

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
