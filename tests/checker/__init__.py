"""Checks what publishers were told against what clients saw, while parts of the system fail.

``history``    what a run recorded: publish requests, and what each client saw.
``check``      reads a history and returns the guarantees that it violates. Pure.
``schedule``   makes a list of steps (publish, change transport, kill, cut, restart ...) from a seed. Pure.
``shrink``     reduces a failing list of steps. Knows nothing of the steps.
``clients``    publishers that retry under one Idempotency-Key; watchers over SSE, WebSocket and long-poll.
``instances``  a server in this process or in its own, which can be killed and started again.
``cluster``    several of them and the engine that they share; ``redis_store`` is a Redis with its faults.
``runner``     runs a schedule on a cluster and returns its history.
``killing``    kills a server with a SQLite file, as a process, and returns what its clients saw.
``campaign``   runs many, and reduces those that fail.

``python tests/fault_schedules.py --schedules 1000 --seed 7`` runs many; a failure prints its seed, its
shortest steps and the command that runs them again. ``tests/test_checker.py`` feeds ``check`` histories
that are wrong, and ``tests/test_fault_schedules.py`` runs what CI does.
"""
