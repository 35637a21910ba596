"""A server whose engine fails after SIGUSR1, and is back after SIGUSR2. Run as a program."""

from __future__ import annotations

import signal

import trio
from faulty_engine import FaultyEngine

from sseserve.config import Settings
from sseserve.engines import EngineListener
from sseserve.server import application, serve


async def main() -> None:
    engines: list[FaultyEngine] = []

    def open_engine(settings: Settings, listener: EngineListener) -> FaultyEngine:
        engines.append(FaultyEngine(settings, listener))
        return engines[0]

    application.open_engine = open_engine  # type: ignore[assignment]
    with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM) as signals:
        async with serve(port=0) as server:
            print(f"serving at {server.url}", flush=True)
            async for number in signals:
                match number:
                    case signal.SIGUSR1:
                        engines[0].fail()
                    case signal.SIGUSR2:
                        engines[0].recover()
                    case _:
                        return


if __name__ == "__main__":
    trio.run(main)
