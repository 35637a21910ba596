"""Logs in an SQLite file, of which one server is the owner.

``durability`` says what has become of an event whose publisher was answered:

- ``normal``: it survives the end of this process, whatever ends it. A power cut, or a crash of the operating
  system, may lose the newest events (those since the last checkpoint of the WAL), always from the end: what
  survives has no gap. The logs have other epochs then, so whoever resumes is told ``reset``.
  ``PRAGMA synchronous = NORMAL``.
- ``full``: it survives a power cut too, as far as the disk writes what it is told to. Each commit waits for
  the disk (fsync). ``PRAGMA synchronous = FULL``.

Appends that wait for each other are one transaction: the more publishers, the more each commit stores. All
records are in memory; events and receipts are read in threads. Nothing in the event loop waits for the disk.

While the disk is full, or cannot be written, publishers get ``InsufficientStorage``; it is tried again with
each publish, and every second.
"""

from __future__ import annotations

from .engine import SqliteEngine

__all__ = ["SqliteEngine"]
