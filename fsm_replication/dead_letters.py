"""The entries that could not be applied, for whoever looks after a node."""

from __future__ import annotations

from collections.abc import Sequence

from fsm_replication.ports import CursorStore, DeadLetter

__all__ = ("DeadLetters",)


class DeadLetters:
    """Reads and removes dead letters; bounded per peer by ``limits.dead_letters``."""

    def __init__(self, store: CursorStore) -> None:
        self._store = store

    async def list(
        self, peer_id: str | None = None, *, after_id: int = 0, limit: int = 1000
    ) -> Sequence[DeadLetter]:
        """Return letters in the order they were stored, those after ``after_id``.

        :raises CursorStoreError: if the cursor store cannot be read.
        """
        return await self._store.dead_letters(peer_id, after_id=after_id, limit=limit)

    async def delete(self, ids: Sequence[int]) -> int:
        """Remove letters by id; returns how many there were.

        :raises CursorStoreError: if the cursor store cannot be written.
        """
        return await self._store.delete_dead_letters(ids)
