"""The streams of the table of routes as AsyncAPI 3.0.

The table has the same routes as in ``/openapi.json``, which cannot say what the messages of a stream are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ..dialects import MessageType
from ..http.messages import Request, Response, json_response
from ..http.routing import Kind, Match, Route, Routes
from .dispatch import Handler
from .openapi import query_schema

__all__ = ["AsyncApiHandlers"]

_REF = "#/components/schemas/{name}"
_INTRODUCTION = (
    "What the streams of sseserve send. Over Server-Sent Events the name of a message is its `event:`, its "
    "payload the `data:`, and its cursor, from which clients resume, the `id:`. Over WebSocket each message "
    "is a JSON object with the members `event`, `data` and `id`. Requests are in `/openapi.json`."
)


class AsyncApiHandlers:
    """The handler of the description; it is made when it is first asked for."""

    def __init__(self, routes: Routes, version: str) -> None:
        self._routes = routes
        self._version = version
        self._document: dict[str, Any] | None = None

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"asyncapi": self.asyncapi}

    async def asyncapi(self, _request: Request, _match: Match) -> Response:
        if self._document is None:
            self._document = _describe_streams(self._routes, self._version)
        return json_response(200, self._document)


def _describe_streams(routes: Routes, version: str) -> dict[str, Any]:
    streams = [route for route in routes if route.documented and route.kind in (Kind.STREAM, Kind.SOCKET)]
    types = {message.data for route in streams for message in route.messages}
    described = sorted(types, key=str)
    schemas, components = msgspec.json.schema_components(described, ref_template=_REF)
    schema_of = dict(zip(described, schemas, strict=True))
    messages: dict[str, Any] = {}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for route in streams:
        # Each refers to a message of the channel, which refers to one of the components.
        keys = {message.event or "message": _key(route, message) for message in route.messages}
        for message, key in zip(route.messages, keys.values(), strict=True):
            messages[key] = _message(route, message, schema_of[message.data])
        channels[route.name] = _channel(route, keys)
        operations[route.name] = _operation(route, keys)
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "sseserve", "version": version, "description": _INTRODUCTION},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": components},
    }


def _key(route: Route, message: MessageType) -> str:
    """Return the name of a message among the components; over WebSocket it has another shape."""
    family = route.dialect.name or "diagnostics"
    name = {None: "message", "*": "own"}.get(message.event, message.event)
    return f"{family}.{name}" + (".ws" if route.kind is Kind.SOCKET else "")


def _message(route: Route, message: MessageType, schema: dict[str, Any]) -> dict[str, Any]:
    payload = schema
    if route.kind is Kind.SOCKET:
        event: dict[str, Any] = {"type": "string"} if message.event == "*" else {"const": message.event}
        cursor = {"type": ["string", "null"], "description": "The cursor"}
        members = {"event": event, "data": schema, "id": cursor, "retry": {"type": "integer"}}
        payload = {"type": "object", "required": ["event", "data", "id"], "properties": members}
    return {"name": message.event or "message", "summary": message.summary, "payload": payload}


def _channel(route: Route, keys: dict[str, str]) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": route.path,
        "summary": route.summary,
        "messages": {name: {"$ref": f"#/components/messages/{key}"} for name, key in _names(keys)},
    }
    if route.parameters:
        channel["parameters"] = {name: {"description": "The session's id"} for name in route.parameters}
    if route.kind is Kind.SOCKET:
        channel["bindings"] = {"ws": {"method": "GET", "query": _query(route), "bindingVersion": "0.1.0"}}
    return channel


def _operation(route: Route, keys: dict[str, str]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": "send",
        "channel": {"$ref": f"#/channels/{route.name}"},
        "summary": route.summary,
        "messages": [{"$ref": f"#/channels/{route.name}/messages/{name}"} for name, _ in _names(keys)],
    }
    if route.kind is Kind.STREAM:
        binding = {"method": "GET", "query": _query(route), "bindingVersion": "0.3.0"}
        operation["bindings"] = {"http": binding}
    return operation


def _names(keys: dict[str, str]) -> Iterable[tuple[str, str]]:
    """Yield the names of a channel's messages, which cannot be ``*``, with their keys."""
    return (("own" if event == "*" else event, key) for event, key in keys.items())


def _query(route: Route) -> dict[str, Any]:
    members = {q.name: {**query_schema(q), "description": q.description} for q in route.query}
    return {"type": "object", "properties": members}
