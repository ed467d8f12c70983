"""Links to a peer that floods at one stage of the exchange; tells the peak: ``flood_child.py JSON``.

The peer, and the honest one beside it, run in the parent: memory here is the reader's alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from memory_child import in_ram

from fsm_replication import MemorySyncEngine, PeerConfig, PeerState, ReplicationConfig
from fsm_replication.config import ColdPathConfig, HotPathConfig, Settings, StartupConfig
from fsm_replication.engine import ReplicationEngine
from fsm_replication.ports import Ports
from fsm_replication.testing.memory_cursor import MemoryCursorStore
from fsm_replication.transport import RedisTransport


class Stalls:
    """The longest time for which the event loop gave nobody a turn."""

    longest_sec = 0.0

    async def watch(self) -> None:
        """Measure until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.001)
            now = time.monotonic()
            self.longest_sec, last = max(self.longest_sec, now - last), now


async def read(said: dict[str, Any]) -> dict[str, Any]:
    """Read both peers until the parent says, over standard input, that it is enough."""
    settings = Settings(
        startup=StartupConfig(when_no_peer="run"),
        hot_path=HotPathConfig(block_timeout=0.2),
        cold_path=ColdPathConfig(interval_sec=0.2, backoff_base_sec=0.2, backoff_max_sec=0.2),
    )
    peers = [PeerConfig(node_id=name, redis_url=url) for name, url in said["peers"].items()]
    config = ReplicationConfig(local_node_id="reader", peers=peers, settings=settings)
    ports = Ports(transport=RedisTransport(), cursor_store=MemoryCursorStore())
    engine = ReplicationEngine(config, MemorySyncEngine(node_id="reader"), ports=ports)
    before, stalls = in_ram("VmRSS"), Stalls()
    watching = asyncio.create_task(stalls.watch())
    left = []
    async with engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="honest", timeout=60)
        print("ready", flush=True)  # noqa: T201
        enough = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        while not enough.done():
            await asyncio.sleep(0.01)
            if engine.peers["honest"] is not PeerState.TAILING:
                left.append(str(engine.peers["honest"]))
        journal = sum(len(move.why) for move in engine.journal)
        error = engine.health_check().peers[1].last_error
    watching.cancel()
    return {
        "grown": in_ram("VmHWM") - before,
        "longest": stalls.longest_sec,
        "left": left,
        "journal": journal,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read(json.loads(sys.argv[1])))))  # noqa: T201
