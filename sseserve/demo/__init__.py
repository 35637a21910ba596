"""Demonstration jobs: real work that reports its progress as any worker does."""
