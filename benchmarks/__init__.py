"""Benchmarks of sseserve: beside other servers, of its transports, and of how it is operated.

Run ``python -m benchmarks`` in a checkout; README.md says what each measures.
"""
