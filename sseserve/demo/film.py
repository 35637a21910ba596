"""A film of one boat's day: animated PNG, sound and captions, made with the standard library.

No I/O and no clock. The work is cut into steps of at most about two milliseconds, so that it can run in
the event loop beside streams without delaying them. The same seed gives the same film, byte for byte.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import struct
import wave
import zlib
from array import array
from collections.abc import Callable, Iterator

import msgspec

from ..dialects.phases import PHASES
from .artifacts import File

__all__ = ["Film", "Step"]


class Step(msgspec.Struct, frozen=True):
    """One small piece of work is done: its phase, the percent of the whole job, and what it was."""

    stage: str
    percent: float
    message: str


WIDTH, HEIGHT = 240, 136  # pixels
HORIZON, SHORE = 64, 108  # rows: where the sky has its last colour, where the sea begins
SCENES, FRAMES, RATE = 4, 12, 8  # frames a scene, frames a second
NOTES, SAMPLE_RATE = 24, 16_000  # notes of the whole melody, samples a second

_SECONDS = FRAMES / RATE  # of one scene
_TOTAL = SCENES * FRAMES
_PANORAMA = 720  # columns until the hills repeat
_COLOURS = 32  # palette entries of one scene: the sky first, then the ones named here
_SKY = 24
_LIGHT, _GLOW, _FAR, _MIDDLE, _NEAR, _SEA, _INK, _SHADE = range(_SKY, _COLOURS)

_PENTATONIC = (0, 2, 4, 7, 9)
_TITLES = ("A Crossing", "The Long Bay", "One Boat, One Day", "Slow Water")
_BOATS = ("Marit", "Halcyon", "Petrel", "Isolde", "Juniper")


class Scene(msgspec.Struct, frozen=True):
    """One time of the day. ``palette`` is top of the sky, horizon, light, far, middle, near hills, sea."""

    name: str
    lines: tuple[str, ...]
    palette: tuple[int, ...]
    light: int  # row of the sun or the moon
    stars: bool = False


_DAY = (
    Scene(
        "dawn",
        ("The harbour wakes", "First light on the water", "A boat casts off"),
        (0x4A5A8C, 0xF2B8A0, 0xFFF0C8, 0x8C82A8, 0x62608C, 0x3C4468, 0x7C88B4),
        50,
    ),
    Scene(
        "noon",
        ("Wind from the west", "Gulls above the mast", "The bay lies open"),
        (0x3C8CCC, 0xC4E4F0, 0xFFFFE8, 0x88B0A8, 0x5C9078, 0x386850, 0x4C9CC4),
        40,
    ),
    Scene(
        "dusk",
        ("Lamps along the pier", "The hills turn to copper", "The sails come down"),
        (0x3C2C5C, 0xF08848, 0xFFD070, 0x9C5468, 0x6C3C58, 0x3C2444, 0x8C5470),
        53,
    ),
    Scene(
        "night",
        ("The moon keeps watch", "All the stars are out", "The harbour sleeps"),
        (0x080C20, 0x283460, 0xF0F0DC, 0x28305C, 0x1C2448, 0x101430, 0x1C2850),
        38,
        stars=True,
    ),
)

# Letters of three by five pixels: five octal digits each, a row a digit.
_FONT = (
    "2575565656344436555674647746443455355755722271115255655444475775565555"
    "255526564425563656553421672222555575555255775552555522271247"
)

# What a phase has done so far, 0 to 1, and what it did last.
_Work = Iterator[tuple[float, str]]


class Film:
    """A film of one boat's day, drawn pixel by pixel. ``artifacts`` is empty until it is made."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.artifacts: tuple[File, ...] = ()
        self._random = random.Random(seed)  # noqa: S311 - the same seed has to give the same film

    def make(self) -> Iterator[Step]:
        """Do the work. Each ``next`` does one step; after the last one ``artifacts`` is complete."""
        phases: dict[str, Callable[[], _Work]] = {
            "plan": self._plan,
            "tts": self._narrate,
            "visuals": self._draw,
            "compose": self._compose,
            "render": self._render,
        }
        for stage, phase in phases.items():
            low, high = PHASES[stage]
            for done, message in phase():
                yield Step(stage, round(low + (high - low) * done, 2), message)

    def _plan(self) -> _Work:
        """Choose the title, the lines, the palette, the hills and the tune."""
        pick = self._random
        self.title, boat = pick.choice(_TITLES), pick.choice(_BOATS)
        yield 0.0, f"Writing “{self.title}”"
        self.lines = []
        for number, scene in enumerate(_DAY, 1):
            self.lines.append(pick.choice(scene.lines))
            yield number / 10, f"Scene {number} of {SCENES}, {scene.name}: {self.lines[-1]}"
        self._palette = b"".join(map(_colours, _DAY))
        yield 0.5, "Mixing the colours of the day"
        self._hills = []
        for number, (base, swing) in enumerate(((52, 14), (66, 16), (86, 12)), 1):
            self._hills.append(_ridge(pick, base, swing))
            yield 0.5 + number / 10, f"Raising the hills, ridge {number} of 3"
        self._stars = [pick.randrange(SHORE // 2) * WIDTH + pick.randrange(WIDTH) for _ in range(90)]
        self._tune = [pick.choice(_PENTATONIC) + 12 * pick.randrange(2) for _ in range(NOTES)]
        self._envelope = _envelope(round(SCENES * _SECONDS * SAMPLE_RATE / NOTES))
        yield 0.9, "Finding the tune"
        times = [f"{scene.name}: {line}" for scene, line in zip(_DAY, self.lines, strict=True)]
        self._script = "\n".join([self.title, f"The boat is the {boat}.", "", *times, ""])
        yield 1.0, "The script is ready"

    def _narrate(self) -> _Work:
        """Play the melody that tells the story, one note a step."""
        self._samples = array("h")
        for number, semitone in enumerate(self._tune, 1):
            scene = (number - 1) * SCENES // NOTES
            self._samples.extend(_note(220 * 2 ** ((semitone + (0, 5, 2, -3)[scene]) / 12), self._envelope))
            yield number / NOTES, f"Voice of scene {scene + 1}: note {number} of {NOTES}"

    def _draw(self) -> _Work:
        """Draw the frames without their captions, one a step."""
        self._frames: list[bytearray] = []
        for number in range(_TOTAL):
            self._frames.append(self._frame(number))
            yield (number + 1) / _TOTAL, f"Frame {number + 1} of {_TOTAL}: {_DAY[number // FRAMES].name}"

    def _frame(self, number: int) -> bytearray:
        scene, base = _DAY[number // FRAMES], number // FRAMES * _COLOURS
        bands = (base + min(row * _SKY // HORIZON, _SKY - 1) for row in range(SHORE))
        frame = bytearray(b"".join(bytes((band,)) * WIDTH for band in bands))
        frame.extend(bytes((base + _SEA,)) * (WIDTH * (HEIGHT - SHORE)))
        if scene.stars:
            for index, star in enumerate(self._stars):
                if (index + number) % 5:  # the rest twinkles
                    frame[star] = base + _LIGHT
        light = 196 - number
        _disc(frame, light, scene.light, 15, base + _GLOW)
        _disc(frame, light, scene.light, 11, base + _LIGHT)
        for speed, (ridge, colour) in enumerate(zip(self._hills, (_FAR, _MIDDLE, _NEAR), strict=True), 1):
            _skyline(frame, ridge, number * speed, bytes((base + colour,)) * HEIGHT)
        for row in range(SHORE + 1, HEIGHT, 3):  # what the sea gives back of the light
            sway = round(4 * math.sin(row + number * 0.7))
            _row(frame, row, light + sway - (row - SHORE) // 2, 6 + (row - SHORE), base + _GLOW)
        _boat(frame, 12 + number * 4, 122 + number // 2 % 2, base + _SHADE, base + _LIGHT)
        return frame

    def _compose(self) -> _Work:
        """Put captions on the frames, and lay sound and captions on the time line."""
        for number, frame in enumerate(self._frames):
            scene = number // FRAMES
            _caption(frame, self.lines[scene], scene * _COLOURS + _INK, scene * _COLOURS + _SHADE)
            if number % 2:
                yield (number + 1) / _TOTAL * 0.8, f"Caption on frame {number + 1} of {_TOTAL}"
        self._captions = "\n".join(
            f"{number + 1}\n{_timecode(number * _SECONDS)} --> {_timecode((number + 1) * _SECONDS)}\n{line}\n"
            for number, line in enumerate(self.lines)
        )
        yield 0.85, "Writing the captions' times"
        self._sound = _wav(self._samples)
        yield 0.95, "Mixing the sound"
        cuts = [{"at": number * _SECONDS, "scene": scene.name} for number, scene in enumerate(_DAY)]
        self._timeline = json.dumps({"title": self.title, "seed": self.seed, "rate": RATE, "cuts": cuts})
        yield 1.0, "The time line stands"

    def _render(self) -> _Work:
        """Encode the frames as an animated PNG (PNG Specification, third edition), two a step."""
        size = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
        chunks = [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", size),
            _chunk(b"acTL", struct.pack(">II", _TOTAL, 0)),
            _chunk(b"PLTE", self._palette),
        ]
        sequence = itertools.count()
        for number, frame in enumerate(self._frames, 1):
            shown = struct.pack(">IIIIIHHBB", next(sequence), WIDTH, HEIGHT, 0, 0, 1, RATE, 0, 0)
            chunks.append(_chunk(b"fcTL", shown))
            pixels = zlib.compress(_scanlines(frame), 5)
            if number == 1:
                chunks.append(_chunk(b"IDAT", pixels))
            else:
                chunks.append(_chunk(b"fdAT", struct.pack(">I", next(sequence)) + pixels))
            if number % 2 == 0:
                yield number / _TOTAL * 0.96, f"Encoding frame {number} of {_TOTAL}"
        chunks.append(_chunk(b"IEND", b""))
        self.artifacts = (
            File("film.png", "image/apng", b"".join(chunks)),
            File("narration.wav", "audio/wav", self._sound),
            File("captions.srt", "application/x-subrip", self._captions.encode()),
            File("script.txt", "text/plain;charset=utf-8", self._script.encode()),
            File("timeline.json", "application/json", self._timeline.encode()),
        )
        self._frames = []
        yield 1.0, f"“{self.title}” is finished"


def _colours(scene: Scene) -> bytes:
    """Lay out the palette entries of a scene, three bytes each."""
    top, horizon, light, far, middle, near, sea = (value.to_bytes(3, "big") for value in scene.palette)
    sky = [_blend(top, horizon, band / (_SKY - 1)) for band in range(_SKY)]
    glow = _blend(_blend(top, horizon, scene.light / HORIZON), light, 0.45)
    return b"".join([*sky, light, glow, far, middle, near, sea, b"\xff\xff\xff", b"\x10\x12\x1c"])


def _blend(first: bytes, second: bytes, share: float) -> bytes:
    return bytes(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def _ridge(pick: random.Random, base: int, swing: int) -> list[int]:
    """Return the top row of a range of hills for each column of the panorama."""
    waves = [(turns, pick.uniform(0, math.tau), swing / turns**0.7) for turns in (3, 5, 11)]
    angle = math.tau / _PANORAMA
    return [
        min(SHORE, round(base - sum(h * math.sin(turns * x * angle + p) for turns, p, h in waves) / 2))
        for x in range(_PANORAMA)
    ]


def _skyline(frame: bytearray, ridge: list[int], offset: int, fill: bytes) -> None:
    """Fill the frame from a ridge down to the shore, a column at a time."""
    end = SHORE * WIDTH
    for x in range(WIDTH):
        top = ridge[(x + offset) % _PANORAMA]
        frame[top * WIDTH + x : end : WIDTH] = fill[: SHORE - top]


def _row(frame: bytearray, y: int, x: int, length: int, colour: int) -> None:
    """Draw a horizontal line, clipped at the frame's edges."""
    if not 0 <= y < HEIGHT:
        return
    left, right = max(0, x), min(WIDTH, x + length)
    if left < right:
        frame[y * WIDTH + left : y * WIDTH + right] = bytes((colour,)) * (right - left)


def _disc(frame: bytearray, x: int, y: int, radius: int, colour: int) -> None:
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius * radius - dy * dy)
        _row(frame, y + dy, x - half, 2 * half + 1, colour)


def _boat(frame: bytearray, x: int, y: int, hull: int, sail: int) -> None:
    """Draw a hull, a mast and two sails, the bow to the right."""
    for dy in range(4):
        _row(frame, y + dy, x - 11 + dy, 22 - 2 * dy, hull)
    for dy in range(1, 20):
        _row(frame, y - dy, x, 1, hull)
    for dy in range(2, 18):
        _row(frame, y - dy, x + 2, (18 - dy) // 2 + 1, sail)
        _row(frame, y - dy, x - 1 - (18 - dy) // 3, (18 - dy) // 3, sail)


def _caption(frame: bytearray, text: str, ink: int, shade: int) -> None:
    """Write a line of letters at twice their size in the upper left corner, with a shadow."""
    for dx, dy, colour in ((1, 1, shade), (0, 0, ink)):
        for index, letter in enumerate(text.upper()):
            glyph = 5 * (ord(letter) - ord("A"))
            for row, bits in enumerate(map(int, _FONT[glyph : glyph + 5] if letter.isalpha() else "")):
                for column in range(3):
                    if bits & 4 >> column:
                        x, y = 8 + dx + index * 8 + column * 2, 8 + dy + row * 2
                        _row(frame, y, x, 2, colour)
                        _row(frame, y + 1, x, 2, colour)


def _envelope(count: int) -> list[float]:
    """Return how loud a note of ``count`` samples is: struck and fading."""
    attack, fade = count / 40, 4.0 / count
    return [9000 * min(1.0, i / attack, (count - i) / attack) / (1 + fade * i) for i in range(count)]


def _note(frequency: float, envelope: list[float]) -> array[int]:
    """Play one note of two partials as 16-bit samples."""
    step, sine = math.tau * frequency / SAMPLE_RATE, math.sin
    return array("h", [int(e * (sine(i * step) + 0.4 * sine(2 * i * step))) for i, e in enumerate(envelope)])


def _wav(samples: array[int]) -> bytes:
    """Write mono PCM samples as a WAV file."""
    if struct.pack("=h", 1) != struct.pack("<h", 1):
        samples.byteswap()  # WAV is little-endian on every machine
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return target.getvalue()


def _timecode(seconds: float) -> str:
    """Write a time as SubRip does: ``00:00:01,500``."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{milliseconds:03}"


def _scanlines(frame: bytearray) -> bytes:
    """Put PNG's filter type "none" before each row; palette images compress best with it."""
    return b"".join(b"\0" + frame[at : at + WIDTH] for at in range(0, len(frame), WIDTH))


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
