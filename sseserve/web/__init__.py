"""The Quart-Trio app: everything that is no stream, and streams that arrive through Hypercorn."""
