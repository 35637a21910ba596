"""Programs of the system that tests need: browsers and clients that are not Python's."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["need"]


def need(program: str) -> str:
    """Return the path of a program. Without it the test is skipped, but fails where ``CI=true``."""
    path = shutil.which(program)
    if path is not None:
        return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"{program} is not installed, and on CI nothing is skipped")
    pytest.skip(f"{program} is not installed")
