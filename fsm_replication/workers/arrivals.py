"""Remembers along which link a version came, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fsm_replication.items import SyncItem
from fsm_replication.stores.protocol import ApplyResult, Outcome

__all__ = ("Arrival", "Arrivals")

ARRIVALS_KEPT: Final = 50_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a version came, along which link, and how: "stream", "bootstrap" or "repair"."""

    peer_id: str
    at_ms: int
    path: str


class Arrivals:
    """Remembers what links applied lately: whole batches, so that an event costs next to nothing."""

    def __init__(self) -> None:
        self._batches: deque[tuple[Arrival, Sequence[str], Sequence[int], Sequence[Outcome]]] = (
            deque()
        )
        self._count = 0

    def add(
        self, peer_id: str, at_ms: int, path: str, items: Sequence[SyncItem], result: ApplyResult
    ) -> None:
        """Take in one store call; the oldest are forgotten."""
        keys = [item.key for item in items]
        times = [item.updated_at for item in items]
        self._batches.append((Arrival(peer_id, at_ms, path), keys, times, result.outcomes))
        self._count += len(keys)
        while self._count > ARRIVALS_KEPT:
            self._count -= len(self._batches.popleft()[1])

    def find(self, key: str, updated_at: int) -> Arrival | None:
        """Return how this version came, or None where that is not known any more."""
        for arrival, keys, times, outcomes in reversed(self._batches):
            for index, name in enumerate(keys):
                if (
                    name == key
                    and times[index] == updated_at
                    and outcomes[index] is Outcome.APPLIED
                ):
                    return arrival
        return None
