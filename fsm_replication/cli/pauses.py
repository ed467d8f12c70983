"""Pauses and resumes links of a node that is not running: a person's word, kept in its cursor file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fsm_replication.cli.ask import check_peer
from fsm_replication.cli.cursors import opened_cursors
from fsm_replication.config import ReplicationConfig
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.errors import AlreadyRunningError
from fsm_replication.ports import SystemWallClock
from fsm_replication.workers.interlock import forgiving_row

__all__ = ("pause_peer", "resume_peer")


@asynccontextmanager
async def _opened(
    config: ReplicationConfig, peer: str, call: str
) -> AsyncIterator[SqliteCursorStore]:
    check_peer(config, peer)
    try:
        async with opened_cursors(config, read_only=False) as store:
            yield store
    except AlreadyRunningError as error:
        raise AlreadyRunningError(
            f"{error}. Call engine.{call}({peer!r}) in it; or stop the node, say this again, and"
            " start it",
            path=error.path,
        ) from None


async def pause_peer(config: ReplicationConfig, peer: str) -> None:
    """Have a node pause the link to a peer as soon as it starts, until it is resumed.

    :raises UsageError: if there is no such peer.
    :raises AlreadyRunningError: if an engine runs on the cursor file.
    :raises CursorStoreError: if that cannot be used.
    """
    async with _opened(config, peer, "pause") as store:
        await store.set_operator_pause(peer, True)


async def resume_peer(config: ReplicationConfig, peer: str) -> tuple[str, ...]:
    """End an operator's pause and one of the interlock; returns what has ended, in words.

    Where the interlock has tripped, the peer may delete any number of items for an hour from now.

    :raises UsageError: if there is no such peer.
    :raises AlreadyRunningError: if an engine runs on the cursor file.
    :raises CursorStoreError: if that cannot be used.
    """
    ended = []
    async with _opened(config, peer, "resume") as store:
        record = await store.load(peer)
        if record.operator_pause:
            await store.set_operator_pause(peer, False)
            ended.append("an operator had paused it")
        if record.interlock is not None and record.interlock.tripped:
            await store.save_interlock(peer, forgiving_row(SystemWallClock().now_ms()))
            ended.append(f"the interlock had tripped: {record.interlock.tripped}")
    return tuple(ended)
