"""The engine's life: starting, stopping, and what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Nodes, Peer, held, peer_config, until

from fsm_replication.config import PeerConfig, Settings, StartupConfig, TimeoutsConfig
from fsm_replication.errors import (
    AlreadyRunningError,
    CursorStoreError,
    DrainTimeoutError,
    EngineStoppedError,
    InvalidStateError,
    NoPeerError,
    UnreachableStateError,
    UsageError,
)
from fsm_replication.items import SyncItem
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.tables import EngineState, PeerState

NOWHERE = PeerConfig(node_id="a", redis_url="redis://127.0.0.1:1")
QUICK = Settings(startup=StartupConfig(timeout=0.2))
ALONE = Settings(startup=StartupConfig(when_no_peer="run"))


def open_files() -> int:
    """Return how many file descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_node_replicates_and_stops(nodes: Nodes, peer: Peer) -> None:
    """If this fails the library does not do its job."""
    engine = nodes.engine(peer_config(peer.server))
    assert engine.state is EngineState.CREATED
    async with engine:
        assert engine.is_running
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=5)
        peer.send("x", b"1")
        peer.send("y", b"2" * 500)
        peer.send("x", None)
        await until(lambda: engine.health_check().peers[0].events_read == 3)
        await engine.wait_synced(5)
        await until(lambda: engine.health_check().peers[0].lag_events == 0)
        assert await held(engine.sync_engine, "x", "y") == {"x": None, "y": b"2" * 500}
        health = engine.health_check()
        assert (health.ready, health.healthy, health.synced) == (True, True, True)
    assert engine.state is EngineState.STOPPED
    assert engine.peers == {"a": PeerState.STOPPED}
    assert engine.health_check().ready is False


async def test_start_is_legal_only_once(nodes: Nodes) -> None:
    """If this fails an engine can be started twice and owns everything twice."""
    engine = nodes.engine()
    await engine.start()
    with pytest.raises(InvalidStateError) as raised:
        await engine.start()
    assert (raised.value.expected, raised.value.actual) == ("Created", "Running")
    assert engine.is_running
    await engine.shutdown()
    with pytest.raises(InvalidStateError):
        await engine.start()


async def test_shutdown_from_created_ends_in_stopped(nodes: Nodes) -> None:
    """If this fails an engine that was never started cannot be put away."""
    engine = nodes.engine(NOWHERE)
    await engine.shutdown()
    await engine.shutdown()
    await engine.wait_closed()
    assert engine.state is EngineState.STOPPED


async def test_no_peer_in_time_fails_the_start(nodes: Nodes) -> None:
    """If this fails a node without peers looks as if it ran."""
    engine = nodes.engine(NOWHERE, settings=QUICK)
    with pytest.raises(NoPeerError, match=r"127\.0\.0\.1:1"):
        await engine.start()
    assert engine.state is EngineState.FAILED
    assert isinstance(engine.error, NoPeerError)
    with pytest.raises(NoPeerError):
        await engine.wait_closed()


async def test_without_peers_it_may_run_where_told_to(nodes: Nodes) -> None:
    """If this fails when_no_peer: run has no effect."""
    engine = nodes.engine(NOWHERE, settings=ALONE)
    async with engine:
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=5)
        health = engine.health_check()
        assert (health.state, health.ready) == (EngineState.RUNNING, False)
        assert health.peers[0].last_error


async def test_all_links_failed_ends_the_budget_at_once(nodes: Nodes, peer: Peer) -> None:
    """If this fails a node waits out its start-up budget for what waiting cannot mend."""
    peer.write_marker(tombstone_ttl_ms=5)
    engine = nodes.engine(peer_config(peer.server))
    with pytest.raises(NoPeerError, match="tombstone_ttl_ms '5'"):
        async with asyncio.timeout(10):
            await engine.start()
    assert engine.journal[-1].dest is EngineState.FAILED


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"node_id": "b"}, "this very node"),
        ({"node_id": "z"}, "calls itself 'z'"),
        ({"format": 99}, "format '99'"),
        ({"resolver": "other"}, "resolver 'other'"),
    ],
)
async def test_what_waiting_cannot_mend_fails_the_link(
    nodes: Nodes, peer: Peer, change: dict[str, str | int], told: str
) -> None:
    """If this fails a link replicates from a node it must not read."""
    peer.write_marker(**change)
    engine = nodes.engine(peer_config(peer.server), settings=ALONE)
    async with engine:
        await engine.wait_for_state(PeerState.FAILED, peer_id="a", timeout=5)
        assert told in engine.health_check().peers[0].last_error


async def test_an_empty_redis_is_waited_for(nodes: Nodes, redis_server: RedisServer) -> None:
    """If this fails a node that is not set up yet is taken for a foreign one."""
    engine = nodes.engine(peer_config(redis_server), settings=ALONE)
    async with engine:
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=5)
        assert "no node has written here yet" in engine.health_check().peers[0].last_error
        peer = Peer(redis_server)
        peer.write_marker()
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=10)
        peer.close()


async def test_shutdown_interrupts_a_start(nodes: Nodes) -> None:
    """If this fails a start that hangs cannot be stopped."""
    engine = nodes.engine(NOWHERE)
    starting = asyncio.create_task(engine.start())
    await engine.wait_for_state(EngineState.CONNECTING, timeout=5)
    await asyncio.gather(engine.shutdown(), engine.shutdown())
    with pytest.raises(EngineStoppedError):
        await starting
    assert engine.state is EngineState.STOPPED


async def test_a_cancelled_start_leaves_nothing_behind(nodes: Nodes) -> None:
    """If this fails cancelling a start leaks tasks, a thread or the lock of the cursor file."""
    files, threads = open_files(), threading.active_count()
    for ticks in (0, 1, 2, 3, 5, 8, 20, 60):
        engine = nodes.engine(NOWHERE)
        starting = asyncio.create_task(engine.start())
        for _ in range(ticks):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert engine.state in (EngineState.STOPPED, EngineState.CREATED)
        await engine.shutdown()
    await until(lambda: threading.active_count() <= threads, "all threads ended")
    assert open_files() <= files


async def test_a_second_engine_on_the_same_cursor_file_is_refused(nodes: Nodes) -> None:
    """If this fails two engines move the same cursors."""
    async with nodes.engine():
        second = nodes.engine()
        with pytest.raises(AlreadyRunningError, match=r"b\.db"):
            await second.start()
        assert second.state is EngineState.FAILED


async def test_a_missing_directory_is_named(nodes: Nodes, tmp_path: Path) -> None:
    """If this fails the error about the cursor file does not say what to do."""
    nodes.folder = tmp_path / "gone"
    engine = nodes.engine()
    with pytest.raises(CursorStoreError, match="create it"):
        await engine.start()


class HangingStore(MemorySyncEngine):
    """Never finishes an apply, and does not let itself be cancelled for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.released = asyncio.Event()

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Hang until released, unless there is nothing to apply."""
        if not changes:
            return ApplyResult([])
        self.calls += 1
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                continue
        return ApplyResult([])


async def test_a_store_that_will_not_end_is_named(nodes: Nodes, peer: Peer) -> None:
    """If this fails shutdown waits for ever, or says that all is well when it is not."""
    store = HangingStore()
    timeouts = TimeoutsConfig(drain=0.5, store_call=30)
    engine = nodes.engine(
        peer_config(peer.server), store=store, settings=Settings(timeouts=timeouts)
    )
    try:
        await engine.start()
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=5)
        peer.send("x", b"1")
        await until(lambda: store.calls)
        await asyncio.wait_for(engine.shutdown(), 5)
    finally:
        store.released.set()
    assert engine.state is EngineState.FAILED
    assert isinstance(engine.error, DrainTimeoutError)
    assert "link:a:tailer" in engine.error.left_behind
    await until(lambda: len(asyncio.all_tasks()) == 1)


async def test_watching_begins_with_the_present_and_ends_with_the_end(nodes: Nodes) -> None:
    """If this fails a watcher misses moves, or hangs after the engine's end."""
    engine = nodes.engine()
    watcher = engine.watch_state()
    await engine.start()
    await engine.shutdown()
    seen = [record async for record in watcher]
    assert [record.dest for record in seen] == [
        EngineState.CREATED,
        EngineState.CONNECTING,
        EngineState.RUNNING,
        EngineState.SHUTTING_DOWN,
        EngineState.STOPPED,
    ]
    assert seen[0].trigger is None
    assert [r async for r in engine.watch_state()] == [
        r for r in [seen[-1]] for r in [r.__class__(r.machine, r.at_ms, None, None, r.dest)]
    ]


async def test_waiting_for_a_state_that_cannot_come_ends(nodes: Nodes) -> None:
    """If this fails somebody waits for ever."""
    engine = nodes.engine()
    async with engine:
        with pytest.raises(UnreachableStateError):
            await engine.wait_for_state(EngineState.CONNECTING, timeout=5)
        waiting = asyncio.create_task(engine.wait_for_state(EngineState.FAILED))
        await asyncio.sleep(0)
    with pytest.raises(UnreachableStateError):
        await waiting
    with pytest.raises(UsageError):
        await engine.wait_for_state(PeerState.TAILING)
    with pytest.raises(UsageError, match="no peer 'zz'"):
        engine.watch_state("zz")


async def test_an_error_of_the_body_is_not_hidden(nodes: Nodes, peer: Peer) -> None:
    """If this fails the kept error of an engine hides what the body raised."""
    with pytest.raises(ZeroDivisionError):
        async with nodes.engine(peer_config(peer.server)):
            raise ZeroDivisionError


async def test_an_operators_pause_lasts_over_a_restart(nodes: Nodes, peer: Peer) -> None:
    """If this fails a link that an operator paused goes on by itself."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=5)
        await engine.pause("a")
        assert engine.peers["a"] is PeerState.PAUSED
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=5)
        item: SyncItem = peer.send("x", b"1")
        await engine.resume("a")
        await until(lambda: len(store) == 1)
        assert await store.get("x") == item


async def test_changes_tells_what_was_applied(nodes: Nodes, peer: Peer) -> None:
    """If this fails a cache that follows the changes goes stale."""
    async with nodes.engine(peer_config(peer.server)) as engine:
        await engine.wait_synced(5)
        changes = engine.changes("user.")
        peer.send("other", b"0")
        sent = peer.send("user.1", b"1")
        assert await asyncio.wait_for(anext(changes), 5) == sent
    assert [item async for item in changes] == []
