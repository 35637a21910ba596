"""The W3C trace context (https://www.w3.org/TR/trace-context/) of a request: what its trace goes on by. Pure.

An event carries that of the request that has published it, so that whoever watches can go on with the trace.
"""

from __future__ import annotations

import re

import msgspec

__all__ = ["TraceContext", "parse_trace_context"]

MAX_STATE = 512  # characters of a tracestate (section 3.3.1.5: at least that many are to be passed on)
MAX_MEMBERS = 32  # of one (section 3.3.1.1)

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z0-9][a-z0-9_*/@-]{0,255}"
_VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER = re.compile(f"{_KEY}={_VALUE}")


class TraceContext(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """``traceparent`` and ``tracestate`` as in the headers of that name; ``tracestate`` may be empty."""

    traceparent: str
    tracestate: str = ""


def parse_trace_context(traceparent: str, tracestate: str | None = None) -> TraceContext | None:
    """Read the headers of a request.

    Returns:
        None: ``traceparent`` is malformed, and so both are ignored (section 3.2.2.3). A ``tracestate`` that
        is malformed or too long is left out (sections 3.3.1 and 4.3).
    """
    match = _PARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, parent_id, flags, more = match.groups()
    # A later version may have more fields; what is known of it is passed on as version 00 (section 3.2.4).
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    parent = f"00-{trace_id}-{parent_id}-{flags if version == '00' else f'{int(flags, 16) & 1:02x}'}"
    return TraceContext(parent, _valid_state(tracestate or ""))


def _valid_state(tracestate: str) -> str:
    members = [member for part in tracestate.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > MAX_MEMBERS or len(keys) < len(members) or not all(map(_MEMBER.fullmatch, members)):
        return ""
    text = ",".join(members)
    return text if len(text) <= MAX_STATE else ""
