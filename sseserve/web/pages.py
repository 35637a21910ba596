"""The pages, their files, and the files that demonstration jobs have made."""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from importlib.resources import files

from ..demo.artifacts import ArtifactStore
from ..errors import NotFound
from ..http.messages import Request, Response
from ..http.routing import Match
from .dispatch import Handler

__all__ = ["PageHandlers"]

_POLICY = (
    ("Content-Security-Policy", "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml"}


@cache
def _file(folder: str, name: str) -> tuple[bytes, str, str] | None:
    """Return a packaged file: its bytes, media type and entity tag; None if there is none of that name."""
    items = {item.name: item for item in files(__package__).joinpath(folder).iterdir() if item.is_file()}
    if name not in items:
        return None
    body = items[name].read_bytes()
    suffix = name[name.rfind(".") :]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return body, kind, f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def _respond(folder: str, name: str, request: Request) -> Response:
    if (file := _file(folder, name)) is None:
        raise NotFound(f"there is nothing at {request.path}")
    body, kind, tag = file
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    headers = (("Content-Type", kind), ("ETag", tag), ("Cache-Control", "no-cache"), *_POLICY)
    if tag in request.headers.get("if-none-match", ""):
        return Response(304, headers=headers)
    return Response(200, body, headers)


class PageHandlers:
    """The handlers of pages and files; ``artifacts`` has what demonstration jobs have made."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {
            "index": self.index,
            "dashboard": self.dashboard,
            "static": self.static,
            "artifact": self.artifact,
        }

    async def index(self, request: Request, _match: Match) -> Response:
        return _respond("templates", "index.html", request)

    async def dashboard(self, request: Request, _match: Match) -> Response:
        return _respond("templates", "dashboard.html", request)

    async def static(self, request: Request, match: Match) -> Response:
        return _respond("static", match.params["name"], request)

    async def artifact(self, request: Request, match: Match) -> Response:
        file = self._artifacts.get(match.params["id"], match.params["name"])
        if file is None:
            raise NotFound(f"there is nothing at {request.path}")
        media_type, content = file
        return Response(200, content, (("Content-Type", media_type), *_POLICY))
