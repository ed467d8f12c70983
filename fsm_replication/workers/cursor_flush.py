"""Settled positions, kept in memory and written behind.

The book is where links note what is settled; the flusher takes what is dirty to disk every few
seconds and at shutdown. A cursor on disk is therefore never ahead of what is settled (G2), only
behind it, and what was read since is read again after a crash.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from fsm_replication.errors import CursorStoreError
from fsm_replication.log import get_logger
from fsm_replication.metrics import Metrics
from fsm_replication.ports import Clock, Cursor, CursorStore
from fsm_replication.reports import EngineFact, Reporter

__all__ = ("FLUSH_INTERVAL_SEC", "CursorBook", "flush_cursors")

FLUSH_INTERVAL_SEC: Final = 5.0


class CursorBook:
    """The newest settled cursor of every peer, and which of them are not on disk yet."""

    def __init__(self, store: CursorStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._cursors: dict[str, Cursor] = {}
        self._dirty: set[str] = set()
        self.last_error: CursorStoreError | None = None

    def failed(self, error: CursorStoreError) -> None:
        """Note that the cursor store failed somebody; health tells it until it was written to."""
        self.last_error = error

    def get(self, peer_id: str) -> Cursor | None:
        """Return the newest cursor of a peer known to this process."""
        return self._cursors.get(peer_id)

    def settle(self, peer_id: str, cursor: Cursor) -> None:
        """Note that everything up to ``cursor`` is settled; written with the next flush."""
        self._cursors[peer_id] = cursor
        self._dirty.add(peer_id)

    def saved(self, peer_id: str, cursor: Cursor | None) -> None:
        """Note that this cursor is on disk already, or that there is none any more."""
        self.last_error = None
        self._dirty.discard(peer_id)
        if cursor is None:
            self._cursors.pop(peer_id, None)
        else:
            self._cursors[peer_id] = cursor
            self._metrics.get("cursor_persists").inc()

    def forget(self, peer_id: str) -> None:
        """Forget the cursor of a peer that was taken out, unless it is not on disk yet."""
        if peer_id not in self._dirty:
            self._cursors.pop(peer_id, None)

    async def flush(self) -> int:
        """Write what is dirty in one transaction; returns how many cursors that were.

        :raises CursorStoreError: if it cannot be written; it stays dirty.
        """
        return await self._write(sorted(self._dirty)) if self._dirty else 0

    async def look_after(self) -> None:
        """Flush; with nothing dirty see that the file is there and can be written.

        A file that was removed is noticed although nobody needs it. After an error everything is
        written anew, so that the error is forgotten as soon as it is over.

        :raises CursorStoreError: if it cannot be written.
        """
        await self._write(sorted(self._dirty if self.last_error is None else self._cursors))

    async def _write(self, peer_ids: Sequence[str]) -> int:
        written = [(peer_id, self._cursors[peer_id]) for peer_id in peer_ids]
        try:
            await self._store.save(written)
        except CursorStoreError as error:
            self.last_error = error
            self._metrics.get("cursor_flush_errors").inc()
            raise
        self.last_error = None
        # A cursor that was settled anew in the meantime is dirty still.
        self._dirty -= {peer for peer, cursor in written if self._cursors.get(peer) is cursor}
        if not written:
            return 0
        self._metrics.get("cursor_flushes").inc()
        self._metrics.get("cursor_persists").inc(len(written))
        return len(written)


async def flush_cursors(
    book: CursorBook, clock: Clock, report: Reporter, beside: Callable[[], Awaitable[None]]
) -> None:
    """Flush every five seconds until cancelled; reports BROKEN where the file is gone for good.

    ``beside`` writes what else is behind, and raises CursorStoreError as a flush does.
    An error that somebody else has met, and that nothing mends, is reported here too.
    """
    log = get_logger("cursor")
    while True:
        await clock.sleep(FLUSH_INTERVAL_SEC)
        error = book.last_error
        if error is None or error.may_pass:
            try:
                await book.look_after()
                await beside()
            except CursorStoreError as failed:
                error = failed
                log.warning("cursor_flush_failed", path=error.path, error=error)
        if error is not None and not error.may_pass:
            report(EngineFact.BROKEN, str(error), error)
            return
