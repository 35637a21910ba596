"""A server with a SQLite file loses nothing by kill -9; ``python -m benchmarks sqlite-kill`` does more."""

from __future__ import annotations

import pytest
from checker.killing import run_kills


@pytest.mark.parametrize(("durability", "kills"), [("normal", 15), ("full", 5)])
async def test_kill(tmp_path, durability, kills):
    """What was acknowledged is there once and in order; nobody who resumes is told of a gap or a reset."""
    result = await run_kills(tmp_path / "logs.db", kills, 1, durability=durability)
    assert result.violations == []
    assert result.kills == kills
    assert result.counts["acknowledged"] >= kills
    assert result.counts["ok"] > 0
    assert result.counts["reset"] == result.counts["gap"] == 0
