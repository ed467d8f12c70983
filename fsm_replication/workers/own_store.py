"""Knows whether the node's own store answers, and asks it where nobody else does.

Without traffic nobody calls the store, and its outage would show only when the next change comes.
So it is asked for a sign of life whenever it has given none for ``circuits.look_interval``. Such a
look goes through the circuit of reads like any other call: it may open it, and it is the probe by
which it closes again.
"""

from __future__ import annotations

from functools import partial

from fsm_replication.circuits import Circuit, CircuitState
from fsm_replication.config import Settings
from fsm_replication.current import Current
from fsm_replication.errors import CircuitOpenError, StoreError, StoreReopenedError
from fsm_replication.log import get_logger
from fsm_replication.ports import Clock
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.workers.store_call import call_store

__all__ = ("StoreWatch",)


class StoreWatch:
    """Looks at one store; what it has seen can be asked without I/O."""

    def __init__(
        self,
        store: SyncEngine,
        *,
        reads: Circuit,
        writes: Circuit,
        current: Current[Settings],
        clock: Clock,
        node_id: str,
    ) -> None:
        self._store = store
        self._reads = reads
        self._writes = writes
        self._current = current
        self._clock = clock
        # When a look failed for the last time, and why.
        self._failure: tuple[float, str] | None = None
        self._looked_at = 0.0
        self._log = get_logger("store", node_id=node_id)

    @property
    def error(self) -> str:
        """Why the store does not answer, "" while it does as far as is known."""
        if self._failure is not None and self._failure[0] >= self._answered_at:
            return self._failure[1]
        if self._reads.state is CircuitState.OPEN:
            return str(CircuitOpenError(self._reads.name))
        return ""

    @property
    def reachable(self) -> bool:
        """Whether the store answers, as far as is known."""
        return not self.error

    @property
    def _answered_at(self) -> float:
        answers = (self._reads.last_success, self._writes.last_success)
        return max((at for at in answers if at is not None), default=-1.0)

    async def run(self) -> None:
        """Look whenever the store has not answered for the interval; until cancelled."""
        await self.look()
        while True:
            heard_at = max(self._looked_at, self._answered_at)
            spent = self._clock.monotonic() - heard_at
            await self._current.sleep(self._clock, partial(_rest_of_interval, spent_sec=spent))
            if self._answered_at > heard_at:
                continue
            if self._reads.state is CircuitState.CLOSED:
                await self.look()
            else:
                # Whoever probes the circuit looks.
                self._looked_at = self._clock.monotonic()

    async def look(self) -> bool:
        """Ask the store for a sign of life, and say whether it gave one."""
        self._looked_at = self._clock.monotonic()
        before = self.reachable
        limit = self._current.value.timeouts.ping
        try:
            await call_store(self._reads, self._store.ping, self._clock, limit)
        except CircuitOpenError:
            return False
        except StoreReopenedError:
            pass  # Whatever it has lost, it answers.
        except StoreError as error:
            self._failure = (self._clock.monotonic(), str(error))
            if before:
                self._log.warning("store_unreachable", error=error)
            return False
        self._failure = None
        if not before:
            self._log.info("store_reachable")
        return True

    def __repr__(self) -> str:
        return f"<StoreWatch of {self._store!r}: {self.error or 'it answers'}>"


def _rest_of_interval(settings: Settings, *, spent_sec: float) -> float:
    return settings.circuits.look_interval - spent_sec
