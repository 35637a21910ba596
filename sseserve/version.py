"""The version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["package_version"]


def package_version() -> str:
    """Return the version, ``unknown`` if the package is used from a folder without having been installed."""
    try:
        return version("sseserve")
    except PackageNotFoundError:
        return "unknown"
