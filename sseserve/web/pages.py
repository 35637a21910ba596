"""The pages and what they are made of, and what the demonstration jobs have made."""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from importlib.resources import files

from ..context import Context
from ..errors import NotFound
from ..http.messages import Answer, Request
from ..http.routes import Kind, Match, Route

__all__ = ["HANDLERS", "STATIC"]

STATIC = Route("GET", "/static/{name}", Kind.WEB, "static", "What the pages are made of")

_POLICY = (
    ("Content-Security-Policy", "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml"}


@cache
def _file(folder: str, name: str) -> tuple[bytes, str, str] | None:
    """A packaged file: its bytes, media type and entity tag. Only names that are there are read."""
    found = {item.name: item for item in files(__package__).joinpath(folder).iterdir() if item.is_file()}
    if name not in found:
        return None
    body = found[name].read_bytes()
    suffix = name[name.rfind(".") :]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return body, kind, f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def _serve(folder: str, name: str, asked: Request) -> Answer:
    if (found := _file(folder, name)) is None:
        raise NotFound(f"nothing lives at {asked.path}")
    body, kind, tag = found
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    headers = (("Content-Type", kind), ("ETag", tag), ("Cache-Control", "no-cache"), *_POLICY)
    if tag in asked.headers.get("if-none-match", ""):
        return Answer(304, headers=headers)
    return Answer(200, body, headers)


async def index(_context: Context, _match: Match, asked: Request) -> Answer:
    return _serve("templates", "index.html", asked)


async def dashboard(_context: Context, _match: Match, asked: Request) -> Answer:
    return _serve("templates", "dashboard.html", asked)


async def static(_context: Context, match: Match, asked: Request) -> Answer:
    return _serve("static", match.params["name"], asked)


async def artifact(context: Context, match: Match, asked: Request) -> Answer:
    found = context.artifacts.get(match.params["id"], match.params["name"])
    if found is None:
        raise NotFound(f"nothing lives at {asked.path}")
    kind, body = found
    return Answer(200, body, (("Content-Type", kind), *_POLICY))


HANDLERS = {
    "index": index,
    "dashboard": dashboard,
    "static": static,
    "artifact": artifact,
}
