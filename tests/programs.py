"""System programs that tests run: browsers, nginx, curl and clients not written in Python."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["require_program"]


def require_program(program: str) -> str:
    """Return the path of a program. If it is not installed, skip the test, or fail it where ``CI=true``."""
    path = shutil.which(program)
    if path is not None:
        return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"{program} is not installed; with CI=true no test is skipped")
    pytest.skip(f"{program} is not installed")
