"""The table of routes as OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from ..errors import SseserveError
from ..http.messages import Request, Response, json_response
from ..http.routing import COMMON_ERRORS, Kind, Match, Query, Route, Routes
from ..http.schemas import Error
from .dispatch import Handler

__all__ = ["OpenApiHandlers", "query_schema"]

_REF = "#/components/schemas/{name}"


class OpenApiHandlers:
    """The handler of the description; it is made when it is first asked for."""

    def __init__(self, routes: Routes, version: str) -> None:
        self._routes = routes
        self._version = version
        self._document: dict[str, Any] | None = None

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"openapi": self.openapi}

    async def openapi(self, _request: Request, _match: Match) -> Response:
        if self._document is None:
            self._document = await _describe_routes(self._routes, self._version)
        return json_response(200, self._document)


async def _describe_routes(routes: Routes, version: str) -> dict[str, Any]:
    """Return the OpenAPI document of a table of routes. It takes a while, so other tasks run meanwhile."""
    documented = [route for route in routes if route.documented]
    types: dict[type[Any], None] = {Error: None}
    for route in documented:
        types |= dict.fromkeys(_types_of(route))
    schema_of: dict[type[Any], Any] = {}
    components: dict[str, Any] = {}
    for described in types:
        (schema_of[described],), parts = msgspec.json.schema_components([described], ref_template=_REF)
        components |= parts
        await trio.lowlevel.checkpoint()
    paths: dict[str, dict[str, Any]] = {}
    for route in documented:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sseserve", "version": version},
        "paths": paths,
        "components": {"schemas": components},
    }


def _types_of(route: Route) -> list[type[Any]]:
    contents = [content for content in route.responses.values() if isinstance(content, type)]
    return contents if route.body is None else [*contents, route.body]


def _operation(route: Route, schema_of: dict[type[Any], Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.parameters
    ]
    responses: dict[str, Any] = {
        str(status): _response(_DESCRIPTIONS.get(status, route.summary), content, schema_of)
        for status, content in route.responses.items()
    }
    for status, errors in _errors_by_status(route).items():
        names = " or ".join(f"`{error.code}`" for error in errors)
        responses[str(status)] = _response(names, Error, schema_of)
    operation: dict[str, Any] = {
        "operationId": route.name,
        "tags": [route.dialect.name or "server"],
        "summary": route.summary,
        "parameters": [*parameters, *map(_query, route.query)],
        "responses": responses,
    }
    if (body := _request_body(route, schema_of)) is not None:
        operation["requestBody"] = body
    return operation


_DESCRIPTIONS = {101: "The WebSocket is open", 204: "No content", 304: "Not modified"}


def _response(description: str, content: Any, schema_of: dict[type[Any], Any]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": description}
    if content == "text/event-stream":
        # OpenAPI 3.1 cannot describe events; some tools take a schema for that of each.
        response["content"] = {content: {}}
    elif isinstance(content, str):
        kind = "object" if content == "application/json" else "string"
        response["content"] = {content: {"schema": {"type": kind}}}
    elif content is not None:
        response["content"] = {"application/json": {"schema": schema_of[content]}}
    return response


def _errors_by_status(route: Route) -> dict[int, list[type[SseserveError]]]:
    by_status: dict[int, list[type[SseserveError]]] = {}
    for error in (*route.errors, *COMMON_ERRORS):
        by_status.setdefault(error.status, []).append(error)
    return by_status


def _query(query: Query) -> dict[str, Any]:
    return {
        "name": query.name,
        "in": "query",
        "description": query.description,
        "schema": query_schema(query),
    }


def query_schema(query: Query) -> dict[str, Any]:
    """Return the JSON Schema of a query parameter."""
    schema: dict[str, Any] = {"type": query.type}
    if query.maximum is not None:
        schema |= {"minimum": 0, "maximum": query.maximum}
    if query.repeated:
        schema = {"type": "array", "items": schema}
    return schema


def _request_body(route: Route, schema_of: dict[type[Any], Any]) -> dict[str, Any] | None:
    if route.any_body:
        return {"content": {"application/json": {"schema": {"type": "object"}}}}
    if route.body is None:
        return None
    content = {"application/json": {"schema": schema_of[route.body]}}
    if route.parse_line is not None:
        content["application/x-ndjson"] = {"schema": {"type": "string"}}
    return {"content": content, "required": route.kind is Kind.PUBLISH}
