"""Logs in Redis, which several instances share."""
