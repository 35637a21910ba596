"""The contenders, in the order in which they take turns and are shown."""

from __future__ import annotations

from .base import Peer
from .better_sse import BetterSse
from .centrifugo import Centrifugo
from .mercure import Mercure, MercureBolt
from .nchan import Nchan
from .python_apps import QuartTrio, SseStarlette
from .send_loop import SendLoop
from .sseserve import Sseserve, SseserveToken, SseserveWebSocket

__all__ = ["PEERS", "Peer"]

PEERS: tuple[Peer, ...] = (
    *(Sseserve(), SseserveToken(), SseserveWebSocket()),
    *(Nchan(), Centrifugo(), Mercure(), MercureBolt()),
    *(SseStarlette(), QuartTrio(), BetterSse()),
    SendLoop(),
)
