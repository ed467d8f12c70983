"""Lets an open store circuit be tried again.

pybreaker leaves Open only when somebody calls, and paused links do not call: without this worker
the circuit and the links would wait for each other for ever.

Reads are probed by a look at the store, which is cheap and belongs to no link. What only a write
can show is left to a link: it may try with the batch that it holds, once a look has found the store
there at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from fsm_replication.circuits import Circuit, CircuitState
from fsm_replication.ports import Clock

__all__ = ("PROBE_INTERVAL_SEC", "probe_circuits")

PROBE_INTERVAL_SEC: Final = 0.25


async def probe_circuits(
    writes: Circuit,
    reads: Circuit,
    look: Callable[[], Awaitable[bool]],
    is_awaited: Callable[[], bool],
    grant_probe: Callable[[], object],
    clock: Clock,
    changed: asyncio.Event,
) -> None:
    """When a reset time is over, try the store, or let one paused link try; until cancelled.

    ``look`` asks the store for a sign of life and says whether it gave one, ``is_awaited`` whether
    a link waits for the store, and ``grant_probe`` lets one such link go on. ``changed`` is set
    when a circuit changes: as long as all are closed there is nothing to look after.
    """
    while True:
        if reads.state is writes.state is CircuitState.CLOSED:
            changed.clear()
            await changed.wait()
            continue
        if reads.state is not CircuitState.CLOSED:
            # A link that goes on begins by reading, so until this one is closed none can try.
            if reads.probe_in_sec <= 0:
                await look()
        elif writes.probe_in_sec <= 0 and is_awaited() and await look():
            grant_probe()
        await clock.sleep(PROBE_INTERVAL_SEC)
