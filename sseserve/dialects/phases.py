"""The phases of making a video, each a range of the whole job. No I/O, no clock.

The jobs dialect counts percent within a phase; the progress records of the sessions dialect name it.
"""

from __future__ import annotations

__all__ = ["PHASES", "job_percent", "phase_of", "step_percent"]

# Percent of the whole job at which a phase begins and ends.
PHASES = {"plan": (0, 15), "tts": (15, 35), "visuals": (35, 65), "compose": (65, 85), "render": (85, 100)}

_STAGES = {
    "plan": "initialization queued script planning brief plan",
    "tts": "tts audio voice",
    "visuals": "visuals images assets",
    "compose": "composition timeline compose",
    "render": "rendering render encode",
    "complete": "complete done",
}
_PHASE_OF = {stage: phase for phase, stages in _STAGES.items() for stage in stages.split()}


def phase_of(stage: str) -> str:
    """Return the phase that ``stage`` belongs to; an unknown one is ``processing``."""
    return _PHASE_OF.get(stage.lower(), "processing")


def job_percent(stage: str | None, percent: float) -> float:
    """Return the percent of the whole job for a percent of its stage (both 0 to 100)."""
    first, last = _range_of(stage)
    return _rounded(first + (last - first) * percent / 100)


def step_percent(stage: str | None, percent: float) -> float:
    """Return the percent of the stage for a percent of the whole job (both 0 to 100)."""
    first, last = _range_of(stage)
    return _rounded(min(max((percent - first) * 100 / (last - first), 0), 100))


def _range_of(stage: str | None) -> tuple[int, int]:
    return PHASES.get(phase_of(stage or ""), (0, 100))


def _rounded(value: float) -> float:
    """Round to four decimals; a whole number is written without a decimal point."""
    value = round(value, 4)
    return int(value) if value == int(value) else value
