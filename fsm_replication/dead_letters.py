"""The entries that could not be applied, for whoever looks after a node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fsm_replication.errors import UsageError
from fsm_replication.ports import CursorStore, DeadLetter

__all__ = ("DeadLetters", "RetryStats")


OnRetry = Callable[[str | None, Sequence[int] | None], Awaitable["RetryStats"]]


@dataclass(frozen=True, slots=True)
class RetryStats:
    """What became of dead letters that were tried again.

    ``applied`` and ``superseded`` are gone, for they are settled. ``still_bad`` stay, each with the
    reason that holds now. ``left`` stay as they were, because the store could not take them now, or
    a person has to decide first: ``problems`` tells why, one line for each peer.
    """

    tried: int = 0
    applied: int = 0
    superseded: int = 0
    still_bad: int = 0
    left: int = 0
    problems: tuple[str, ...] = ()

    def plus(self, other: RetryStats) -> RetryStats:
        """Return the sum of both."""
        return RetryStats(
            self.tried + other.tried,
            self.applied + other.applied,
            self.superseded + other.superseded,
            self.still_bad + other.still_bad,
            self.left + other.left,
            self.problems + other.problems,
        )


class DeadLetters:
    """Reads, tries again and removes dead letters; bounded per peer by ``limits.dead_letters``.

    ``retry`` tries some again in the running engine; ``on_room`` is awaited after letters were
    removed, for there may be room again.
    """

    def __init__(
        self,
        store: CursorStore,
        *,
        retry: OnRetry,
        on_room: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._retry = retry
        self._on_room = on_room

    async def list(
        self, peer_id: str | None = None, *, after_id: int = 0, limit: int = 1000
    ) -> Sequence[DeadLetter]:
        """Return letters in the order they were stored, those after ``after_id`` first.

        Fewer than ``limit`` (1 or more) where they hold more than 16 MiB together: go on after the
        last id, until none comes.

        :raises CursorStoreError: if the cursor store cannot be read.
        """
        return await self._store.dead_letters(peer_id, after_id=after_id, limit=limit)

    async def count(self) -> dict[str, int]:
        """Return how many letters each peer has, those with none left out.

        :raises CursorStoreError: if the cursor store cannot be read.
        """
        return await self._store.dead_letter_counts()

    async def show(self, letter_id: int) -> DeadLetter:
        """Return one letter, by its id.

        :raises UsageError: if there is none of that id.
        :raises CursorStoreError: if the cursor store cannot be read.
        """
        found = await self._store.dead_letters(after_id=letter_id - 1, limit=1)
        if not found or found[0].id != letter_id:
            raise UsageError(f"there is no dead letter {letter_id}")
        return found[0]

    async def retry(
        self, peer_id: str | None = None, *, ids: Sequence[int] | None = None
    ) -> RetryStats:
        """Decode letters and hand them to the store once more: all, one peer's, or those of ``ids``.

        What is applied or superseded now is removed; what is still bad stays with the new reason.
        Letters of entries that were too large to keep hold nothing that could be tried.

        :raises UsageError: if both are given.
        :raises InvalidStateError: unless the engine is Running.
        :raises EngineStoppedError: if it ends before all were tried.
        :raises CursorStoreError: if the cursor store cannot be used.
        """
        if peer_id is not None and ids is not None:
            raise UsageError("letters are tried again by peer or by id, not by both")
        return await self._retry(peer_id, ids)

    async def purge(
        self,
        peer_id: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        everything: bool = False,
    ) -> int:
        """Remove letters for good: one peer's, those of ``ids``, or ``everything``.

        Returns how many there were. A link that was paused because there were too many goes on.

        :raises UsageError: unless exactly one of the three is given.
        :raises CursorStoreError: if the cursor store cannot be written.
        """
        if (peer_id is not None) + (ids is not None) + everything != 1:
            raise UsageError("letters are purged by peer, by id, or everything: one of the three")
        if ids is not None:
            count = await self._store.delete_dead_letters(ids)
        else:
            count = await self._store.purge_dead_letters(peer_id)
        await self._on_room()
        return count
