"""Reads peers up to their key "last" and tells its peak memory: ``memory_child.py JSON``."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsm_replication import MemorySyncEngine, PeerConfig, PeerState, ReplicationConfig
from fsm_replication.config import ColdPathConfig, CursorConfig, LimitsConfig, Settings
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.engine import ReplicationEngine
from fsm_replication.items import SyncItem
from fsm_replication.ports import Cursor, Position, StreamId
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received


class Forgets(MemorySyncEngine):
    """Takes everything and keeps nothing, slowly enough for reading to get ahead of it."""

    seconds = 0.0

    def __init__(self, peers: int) -> None:
        super().__init__(node_id="reader")
        self.missing = peers
        self.complete = asyncio.Event()

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Let go of what came."""
        await asyncio.sleep(self.seconds)
        self.missing -= sum(change.key == "last" for change in changes)
        if self.missing == 0:
            self.complete.set()
        return ApplyResult([Outcome.APPLIED] * len(changes))


def in_ram(what: str) -> int:
    """Return how many bytes this process has ("VmRSS"), or ever had ("VmHWM"), in RAM.

    As getrusage would tell, but without what the process had that this one was forked from.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024
    raise LookupError(what)


async def read(said: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read every peer to the head of its stream."""
    store = Forgets(len(said["peers"]))
    store.seconds = said["seconds"]
    path = str(folder / "cursors.db")
    start = Cursor(Position(StreamId(0, 0), 0), await store.incarnation())
    cursors = SqliteCursorStore(path)
    await cursors.open()
    # A cursor at the beginning lets the stream be read from there; without one it would be copied.
    await cursors.save([(name, start) for name in said["peers"]])
    await cursors.close()
    config = ReplicationConfig(
        local_node_id="reader",
        peers=[
            PeerConfig(node_id=name, redis_url=said["url"], redis_prefix=f"{name}:")
            for name in said["peers"]
        ],
        cursor=CursorConfig(sqlite_path=path),
        settings=Settings(
            limits=LimitsConfig(**said["limits"]), cold_path=ColdPathConfig(enabled=False)
        ),
    )
    engine = ReplicationEngine(config, store)
    before = in_ram("VmRSS")
    async with engine:
        await store.complete.wait()
        for name in said["peers"]:
            await engine.wait_for_state(PeerState.TAILING, peer_id=name)
        health = engine.health_check()
        letters = await engine.dead_letters.list()
        gaps = await engine.ledger()
    return {
        "read": {peer.node_id: peer.events_read for peer in health.peers},
        "letters": [(one.reason, one.size) for one in letters],
        "gaps": len(gaps),
        "grown": in_ram("VmHWM") - before,
    }


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    print(json.dumps(asyncio.run(read(chosen, Path(chosen["folder"])))))  # noqa: T201
