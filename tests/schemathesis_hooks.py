"""What schemathesis changes in the requests that it makes, so that they reach sessions and do not wait long.

Sessions of these names exist; streams are of the one that has ended, so that they end.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import schemathesis

RUNNING, ENDED = "running", "ended"
STREAMS = ("/stream", "/events", "/control", "/api/interaction/events/{id}")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    path, query = case.operation.path, case.query
    session_id = case.path_parameters.get("id")
    if case.method == "GET" and path.endswith(STREAMS):
        case.path_parameters["id"] = ENDED
    elif isinstance(session_id, str) and len(session_id) % 2:
        case.path_parameters["id"] = RUNNING  # of the others there is none
    if path == "/api/streams" and "session" in query:
        query["session"] = [ENDED]
    for name in ("wait", "interval", "quiet"):
        if name in query:
            with suppress(TypeError, ValueError):
                query[name] = min(float(query[name]), 0.01)
