"""Handlers, one module for each resource, and the Quart-Trio app over them.

A handler is a function from a request to a response: ``async def handler(request, match) -> Response``.
"""
