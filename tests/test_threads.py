"""What may be read from any thread, while the loop changes what it is about."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsm_replication import (
    EngineState,
    MemorySyncEngine,
    PeerConfig,
    PeerState,
    Ports,
    ReplicationConfig,
    ReplicationEngine,
)
from fsm_replication.config import LimitsConfig, Settings, StartupConfig
from fsm_replication.testing import MemoryCursorStore
from fsm_replication.transport import RedisTransport

HAMMERED_SEC = 0.8
# Nobody listens at this port.
URL = "redis://127.0.0.1:1"
NOBODY = PeerConfig(node_id="a", redis_url=URL)
OTHERS = [PeerConfig(node_id=f"p{n}", redis_url=URL) for n in range(5)]


@contextmanager
def hammered(*looks: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Call each of these in a thread of its own, again and again, switching as often as may be."""
    failures: list[BaseException] = []
    done = threading.Event()

    def hammer(look: Callable[[], object]) -> None:
        while not done.is_set():
            try:
                look()
            except BaseException as error:  # noqa: BLE001 - it is handed to the test
                failures.append(error)
                return

    threads = [threading.Thread(target=hammer, args=(look,)) for look in looks]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        yield failures
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)


async def test_what_is_shown_may_be_read_while_the_configuration_changes() -> None:
    """If this fails a health endpoint of another thread crashes when a peer is added."""
    settings = Settings(startup=StartupConfig(when_no_peer="run"), limits=LimitsConfig(journal=50))
    config = ReplicationConfig(local_node_id="b", peers=[NOBODY], settings=settings)
    whole = config.model_copy(update={"peers": (NOBODY, *OTHERS)})
    ports = Ports(transport=RedisTransport(), cursor_store=MemoryCursorStore())
    engine = ReplicationEngine(config, MemorySyncEngine(), ports=ports)

    def look_at_health() -> None:
        health = engine.health_check()
        assert health.peers_total == len(health.peers)
        assert health.max_lag_ms() is None
        assert len(health.unhealthy_peers()) == len(health.peers)

    def look_at_the_rest() -> None:
        assert engine.peers["a"] in PeerState
        assert repr(engine._links)
        assert engine.state is EngineState.RUNNING
        assert all(move.machine for move in engine.journal)
        assert engine.stale_keys("a") == ()
        assert engine.config.peers

    async with engine:
        with hammered(look_at_health, look_at_the_rest) as failures:
            until = time.monotonic() + HAMMERED_SEC
            while time.monotonic() < until and not failures:
                await engine.update_config(whole)
                await engine.pause("a")
                await engine.update_config(config)
                await engine.resume("a")
        assert failures == []
