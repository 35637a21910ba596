"""The contenders, in the order in which they take turns and are shown."""

from __future__ import annotations

from .base import Peer
from .nchan import Nchan
from .send_loop import SendLoop
from .sseserve import Sseserve, SseserveToken, SseserveWebSocket

__all__ = ["PEERS", "Peer"]

PEERS: tuple[Peer, ...] = (Sseserve(), SseserveToken(), SseserveWebSocket(), Nchan(), SendLoop())
