"""A store that keeps nothing."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from fsm_replication.items import Stamp, SyncItem
from fsm_replication.log import get_logger
from fsm_replication.ports import Position
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received, SyncEngine

__all__ = ("NoOpSyncEngine",)


class NoOpSyncEngine(SyncEngine):
    """Takes every change and keeps none, and says so once: for trying out a configuration."""

    def __init__(self) -> None:
        self._log = get_logger("noop")
        self._incarnation = uuid.uuid4().hex
        self._log.warning("noop_store", meaning="changes are read and thrown away")

    async def incarnation(self) -> str:
        """Return a name that is new for every object."""
        return self._incarnation

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Say that every change was applied."""
        self._log.debug("thrown_away", changes=len(changes))
        return ApplyResult([Outcome.APPLIED] * len(changes), live_deleted=0, live_added=0)

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return None for every key."""
        return [None] * len(keys)

    async def stamps(self, keys: Sequence[str]) -> list[Stamp | None]:
        """Return None for every key."""
        return [None] * len(keys)

    async def applied_position(self, peer_id: str) -> Position | None:
        """Return None: no position is kept."""
        return None
