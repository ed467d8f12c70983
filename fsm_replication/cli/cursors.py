"""Opens a node's cursor file beside the node, or in its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fsm_replication.config import ReplicationConfig
from fsm_replication.cursor import SqliteCursorStore

__all__ = ("opened_cursors",)


@asynccontextmanager
async def opened_cursors(
    config: ReplicationConfig, *, read_only: bool
) -> AsyncIterator[SqliteCursorStore]:
    """Open the cursor file, and close it in the end.

    :raises AlreadyRunningError: if it is to be changed and an engine runs on it.
    :raises CursorStoreError: if it cannot be used.
    """
    store = SqliteCursorStore(
        config.cursor.sqlite_path,
        wal_mode=config.cursor.wal_mode,
        timeout_sec=config.settings.timeouts.cursor,
        read_only=read_only,
    )
    try:
        await store.open()
        yield store
    finally:
        await store.close()
