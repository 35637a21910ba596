"""The applications and programs of contenders that are libraries."""
