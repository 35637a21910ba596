"""Hostile input of every kind: the invariant is in ``world``. ``run.py`` does the same for hours."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from targets import HAND_OVER, TARGETS, scripts
from world import Step, decode_script, play

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = int(os.environ.get("SSESERVE_FUZZ_EXAMPLES", "150"))  # for each target


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_corpus(path):
    """What once broke the invariant, or reaches what little else does."""
    play(decode_script(path.read_text()), **TARGETS[path.parent.name].settings)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input(name):
    """Any script of a target leaves the invariant as it is."""
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(scripts(target))
    def check(script):
        play(script, **target.settings)

    check()


# What the seeds of the hand-over get: statuses, then the first bytes of WebSocket frames (text, pong, close).
RESPONSES = ("202 200", "202 101 81 8a 88", "200 505", "HTTP/2", "200 202 101 81", "404 200")


@pytest.mark.parametrize(
    ("data", "expected"), list(zip(HAND_OVER.seeds, RESPONSES, strict=True)), ids=range(len(RESPONSES))
)
def test_hand_over_at_every_byte(data, expected):
    """What follows the request that takes a connection over is read by who takes it, wherever it is cut."""
    script: list[Step] = []
    for cut in range(1, len(data)):
        script += [Step("send", cut, data[:cut]), Step("send", cut, data[cut:])]
        script += [Step("wait", 2), Step("close", cut)]
    outputs = play(tuple(script))
    assert len(outputs) == len(data) - 1
    for cut, output in enumerate(outputs, 1):
        assert describe(output) == expected, cut


def describe(output: bytes) -> str:
    """Name the responses in what a client got."""
    if not output.startswith(b"HTTP/"):
        kinds = [frame_type for frame_type, _ in split_frames(output)]
        # Whether a response comes before the connection ends depends on the cut.
        return "HTTP/2" if (kinds[0], kinds[-1]) == (SETTINGS, GOAWAY) else str(kinds)
    http, _, frames = output.partition(b"\r\n\r\n\x81")
    names = re.findall(r"HTTP/1\.1 (\d+) ", http.decode())
    frames = frames and b"\x81" + frames
    while frames:
        names.append(f"{frames[0]:x}")
        size, at = (frames[1], 2) if frames[1] < 126 else (int.from_bytes(frames[2:4]), 4)
        frames = frames[at + size :]
    return " ".join(names)


SETTINGS, GOAWAY = 4, 7


def split_frames(output: bytes) -> list[tuple[int, bytes]]:
    """Split what HTTP/2 has sent into the types and payloads of frames."""
    frames = []
    while output:
        size = int.from_bytes(output[:3])
        frames.append((output[3], output[9 : 9 + size]))
        output = output[9 + size :]
    return frames
