"""Asks a node's peers beside the node, over connections of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fsm_replication.config import PeerConfig, ReplicationConfig
from fsm_replication.errors import ReplicationError, UsageError
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.connector import Lines, open_lines

__all__ = ("asked_peers", "check_peer")


def check_peer(config: ReplicationConfig, peer: str) -> None:
    """Check that a name is one of a configured peer.

    :raises UsageError: if it is not.
    """
    known = [one.node_id for one in config.peers]
    if peer not in known:
        raise UsageError(f"there is no peer {peer!r} (configured: {', '.join(known) or 'none'})")


@asynccontextmanager
async def asked_peers(
    config: ReplicationConfig, resolver: str
) -> AsyncIterator[Sequence[tuple[PeerConfig, Lines | str]]]:
    """Yield the lines to each peer, by priority; or why it cannot be asked, in place of them."""
    opened: dict[str, Lines | str] = {}

    async def ask(peer: PeerConfig) -> None:
        try:
            opened[peer.node_id] = await open_lines(
                local_node_id=config.local_node_id,
                peer=peer,
                settings=config.settings,
                resolver=resolver,
                transport=RedisTransport(),
            )
        except ReplicationError as error:
            opened[peer.node_id] = str(error)

    try:
        async with asyncio.TaskGroup() as group:
            for peer in config.peers:
                group.create_task(ask(peer), name=f"ask:{peer.node_id}")
        by_priority = sorted(config.peers, key=lambda one: one.priority)
        yield [(peer, opened[peer.node_id]) for peer in by_priority]
    finally:
        for lines in opened.values():
            if not isinstance(lines, str):
                lines.close()
                await lines.wait_closed()
