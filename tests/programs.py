"""System programs that tests run: browsers, proxies, curl, and clients not written in Python."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["require_program", "skip_without"]


def require_program(program: str) -> str:
    """Return the path of a program. If it is not installed, skip the test, or fail it where ``CI=true``."""
    if os.environ.get("CI") == "true" and shutil.which(program) is None:
        pytest.fail(f"{program} is not installed; with CI=true no test is skipped for that")
    return skip_without(program)


def skip_without(program: str) -> str:
    """Return the path of a program, such as a compiler; skip the test if it is not installed."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path
