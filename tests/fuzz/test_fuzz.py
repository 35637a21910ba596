"""Hostile input of every kind: the invariant is in ``world``. ``run.py`` does the same for hours."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("number", range(len(HAND_OVER.seeds)))
def test_hand_over_at_every_byte(number):
    """What follows the request that takes a connection over is read by who takes it, wherever it is cut."""
    data = HAND_OVER.seeds[number]
    (whole,) = play((Step("send", 0, data), Step("wait", 2)))
    script: list[Step] = []
    for cut in range(1, len(data)):
        script += [Step("send", cut, data[:cut]), Step("send", cut, data[cut:])]
        script += [Step("wait", 2), Step("close", cut)]
    for output in play(tuple(script)):
        assert statuses(output) == statuses(whole)


def statuses(output: bytes) -> list[bytes]:
    """The statuses of HTTP/1.1 responses, or the kinds of what HTTP/2 has sent."""
    if output.startswith(b"HTTP/1"):
        return [part[:3] for part in output.split(b"HTTP/1.1 ")[1:]]
    return [output[3:4]]
