"""Recordings of simulated speech with noise: writing them, and the work of transcribing them.

A byte is two tones, one for each half, and a tone has one of sixteen frequencies. The noise is louder than
the tones, so each tone is compared with all sixteen.
"""

from __future__ import annotations

import math
import random
import wave
from array import array
from collections.abc import Iterator
from operator import mul
from pathlib import Path

SAMPLE_RATE = 8000  # Hz
TONE_LENGTH = 1600  # samples
FREQUENCIES = [500 + 200 * n for n in range(16)]  # Hz; whole periods fit into a tone


def _wave_of(frequency: int, phase: float) -> list[float]:
    step = 2 * math.pi * frequency / SAMPLE_RATE
    return [math.sin(step * n + phase) for n in range(TONE_LENGTH)]


_SINES = [_wave_of(frequency, 0) for frequency in FREQUENCIES]
_COSINES = [_wave_of(frequency, math.pi / 2) for frequency in FREQUENCIES]


class TruncatedRecordingError(Exception):
    """The file has less than its header says: it is still being uploaded."""


def write_recording(path: Path, text: str) -> None:
    """Encode ``text`` as simulated speech with noise in a WAV file."""
    noise = random.Random(text)
    hiss = [noise.gauss(0, 6000) for _ in range(4 * TONE_LENGTH)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        for byte in text.encode():
            for nibble in (byte >> 4, byte & 15):
                start = noise.randrange(len(hiss) - TONE_LENGTH)
                pairs = zip(_SINES[nibble], hiss[start : start + TONE_LENGTH], strict=True)
                samples = (max(-32768, min(32767, round(4000 * tone + rest))) for tone, rest in pairs)
                file.writeframesraw(array("h", samples).tobytes())


def transcribe(path: Path) -> Iterator[tuple[float, str]]:
    """Decode a recording.

    Yields:
        After each word: the fraction of the recording that is transcribed (0 to 1), and the text so far.

    Raises:
        TruncatedRecordingError: the file ends before its recording does.
    """
    with wave.open(str(path), "rb") as file:
        count = file.getnframes()
        text = bytearray()
        for start in range(0, count, 2 * TONE_LENGTH):
            samples = array("h", file.readframes(2 * TONE_LENGTH))
            if len(samples) < 2 * TONE_LENGTH:
                raise TruncatedRecordingError(f"the recording ends after {start / count:.0%}")
            text.append(_decode_tone(samples[:TONE_LENGTH]) << 4 | _decode_tone(samples[TONE_LENGTH:]))
            if text.endswith(b" "):
                yield start / count, text.decode().rstrip()
    yield 1.0, text.decode()


def _decode_tone(samples: array[int]) -> int:
    """Return which frequency has the most energy."""
    energies = [
        sum(map(mul, samples, sine)) ** 2 + sum(map(mul, samples, cosine)) ** 2
        for sine, cosine in zip(_SINES, _COSINES, strict=True)
    ]
    return energies.index(max(energies))
