"""Lets an open store circuit be tried again.

pybreaker leaves Open only when somebody calls, and paused links do not call: without this worker
the circuit and the links would wait for each other for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fsm_replication.circuits import Circuit, CircuitState
from fsm_replication.ports import Clock

__all__ = ("PROBE_INTERVAL_SEC", "probe_circuits")

PROBE_INTERVAL_SEC: Final = 0.25


async def probe_circuits(
    writes: Circuit,
    reads: Circuit,
    grant_probe: Callable[[], bool],
    clock: Clock,
    changed: asyncio.Event,
) -> None:
    """When a reset time is over, let one paused link try; until cancelled.

    A link that goes on begins by reading, so it can try nothing while reads may not be tried.
    ``grant_probe`` lets one link go on and says whether there was one. ``changed`` is set when a
    circuit changes: as long as all are closed there is nothing to look after.
    """
    circuits = (writes, reads)
    while True:
        if all(circuit.state is CircuitState.CLOSED for circuit in circuits):
            changed.clear()
            await changed.wait()
            continue
        waits = [c.probe_in_sec for c in circuits if c.state is not CircuitState.CLOSED]
        if min(waits, default=1.0) <= 0 and reads.probe_in_sec <= 0:
            grant_probe()
        await clock.sleep(PROBE_INTERVAL_SEC)
