"""Peers that go away, freeze, come back older or empty; and stores that lose their memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
from conftest import Nodes, Peer, held, peer_config, until, until_async

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    PeerHealthConfig,
    ReconnectConfig,
    Settings,
    StartupConfig,
    TimeoutsConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import CursorStoreError
from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.tables import EngineState, PeerState

QUICK = Settings(
    hot_path=HotPathConfig(block_timeout=0.2),
    timeouts=TimeoutsConfig(connect=0.3, command=0.3, ping=0.2),
    startup=StartupConfig(when_no_peer="run"),
    peer_health=PeerHealthConfig(ping_interval_sec=0.1, idle_threshold_sec=0),
)


@pytest.fixture
def server(new_redis_server: Callable[..., RedisServer]) -> RedisServer:
    """A server of the test's own, to be killed and frozen, that keeps what it acknowledged."""
    return new_redis_server(persist=True)


async def reaches(engine: ReplicationEngine, state: PeerState) -> None:
    """Wait for a state of the link to a."""
    await engine.wait_for_state(state, peer_id="a", timeout=15)


async def holds(store: RedisSyncEngine, items: Mapping[str, bytes]) -> bool:
    """Say whether a store holds all of these."""
    return await held(store, *items) == items


async def test_a_frozen_peer_is_noticed_and_found_again(nodes: Nodes, server: RedisServer) -> None:
    """If this fails a peer that hangs holds its link for ever."""
    peer = Peer(server)
    peer.write_marker()
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(server), store=store, settings=QUICK) as engine:
        await reaches(engine, PeerState.TAILING)
        peer.send("x", b"1")
        await until(lambda: len(store) == 1)
        server.pause()
        await reaches(engine, PeerState.BACKOFF)
        server.resume()
        peer.send("y", b"2")
        await until(lambda: len(store) == 2)
        await reaches(engine, PeerState.TAILING)
    peer.close()


@pytest.mark.parametrize("when", ["tailing", "backoff", "connecting"])
async def test_a_frozen_peer_does_not_delay_a_shutdown(
    nodes: Nodes, server: RedisServer, when: str
) -> None:
    """If this fails stopping a node takes as long as a peer pleases."""
    peer = Peer(server)
    peer.write_marker()
    peer.close()
    engine = nodes.engine(peer_config(server), settings=QUICK)
    await engine.start()
    await reaches(engine, PeerState.TAILING)
    server.pause()
    try:
        if when != "tailing":
            await reaches(engine, PeerState.BACKOFF)
        if when == "connecting":
            await reaches(engine, PeerState.CONNECTING)
        began = time.monotonic()
        await engine.shutdown()
        assert time.monotonic() - began < 1
        assert engine.state is EngineState.STOPPED
    finally:
        server.resume()


async def test_a_peer_that_is_killed_loses_nothing(nodes: Nodes, server: RedisServer) -> None:
    """If this fails a restart of a peer's Redis leaves a hole."""
    peer = Peer(server)
    peer.write_marker()
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(server), store=store, settings=QUICK) as engine:
        await reaches(engine, PeerState.TAILING)
        for number in range(300):
            peer.send(f"k{number}", b"1")
        server.kill()
        await reaches(engine, PeerState.BACKOFF)
        server.start()
        peer.send("after", b"1")
        await until(lambda: len(store) == 301)
        await reaches(engine, PeerState.TAILING)
        triggers = {record.trigger for record in engine.journal}
        assert {"connection_lost", "disconnected", "retry"} <= triggers
    peer.close()


async def test_a_peer_that_is_down_at_start_joins_later(nodes: Nodes, server: RedisServer) -> None:
    """If this fails a node must be restarted when a peer comes up after it."""
    peer = Peer(server)
    peer.write_marker()
    peer.send("x", b"1")
    server.kill()
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(server), store=store, settings=QUICK) as engine:
        await reaches(engine, PeerState.BACKOFF)
        assert not engine.health_check().ready
        server.start()
        await until(lambda: len(store) == 1)
        assert engine.health_check().ready
    peer.close()


async def test_a_peer_that_came_back_empty_takes_nothing_away(
    nodes: Nodes, server: RedisServer
) -> None:
    """If this fails an emptied peer deletes the items of others, or is never read again (G5)."""
    peer = Peer(server)
    peer.write_marker()
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(server), store=store, settings=QUICK) as engine:
        await reaches(engine, PeerState.TAILING)
        for number in range(20):
            peer.send(f"k{number}", b"1")
        await until(lambda: len(store) == 20)
        peer.client.flushall()
        peer.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await reaches(engine, PeerState.BACKOFF)
        peer.write_marker(incarnation="another")
        peer.send("new", b"2")
        await until(lambda: len(store) == 21)
        await reaches(engine, PeerState.TAILING)
        assert (await held(store, "k0", "new")) == {"k0": b"1", "new": b"2"}
    peer.close()


@pytest.fixture
def both(redis_servers: Callable[[], RedisServer]) -> Iterator[tuple[Peer, Peer]]:
    """A peer that can be read, and a look into the Redis of the node that reads it."""
    peer, mine = Peer(redis_servers()), Peer(redis_servers(), "b")
    peer.write_marker()
    yield peer, mine
    peer.close()
    mine.close()


async def test_a_local_store_that_came_back_empty_is_filled_again(
    nodes: Nodes, both: tuple[Peer, Peer]
) -> None:
    """If this fails a node whose Redis was emptied goes on from a cursor and stays empty (G2)."""
    peer, mine = both
    async with RedisSyncEngine(mine.server.url, node_id="b") as store:
        async with nodes.engine(peer_config(peer.server), store=store) as engine:
            await reaches(engine, PeerState.TAILING)
            sent = {f"k{n}": peer.send(f"k{n}", b"%d" % n).content for n in range(50)}
            await until(lambda: mine.client.xlen(Keys().stream) == 50)
        mine.client.flushall()
    async with (
        RedisSyncEngine(mine.server.url, node_id="b") as store,
        nodes.engine(peer_config(peer.server), store=store) as engine,
    ):
        await reaches(engine, PeerState.TAILING)
        assert await held(store, *sent) == sent
        whys = [r.why for r in engine.journal if r.dest is PeerState.BOOTSTRAPPING]
        assert whys == ["the local store is another incarnation"]


async def test_a_local_store_that_lost_its_last_second_reads_it_again(
    nodes: Nodes, both: tuple[Peer, Peer]
) -> None:
    """If this fails what a local Redis forgot in a crash is never read again (G2)."""
    peer, mine = both
    async with RedisSyncEngine(mine.server.url, node_id="b") as store:
        async with nodes.engine(peer_config(peer.server), store=store) as engine:
            await reaches(engine, PeerState.TAILING)
            peer.send("first", b"1")
            await until(lambda: mine.client.xlen(Keys().stream) == 1)
            before = mine.client.hgetall(Keys().positions)
            peer.send("lost", b"2")
            await until(lambda: mine.client.xlen(Keys().stream) == 2)
        # As after a crash with appendfsync everysec: the item and its position are gone together.
        mine.client.delete(Keys().item("lost"))
        mine.client.hset(Keys().positions, mapping=before)  # type: ignore[arg-type]
        async with nodes.engine(peer_config(peer.server), store=store) as engine:
            await reaches(engine, PeerState.TAILING)
            await until(lambda: mine.client.exists(Keys().item("lost")))


async def test_a_store_emptied_and_written_to_while_it_runs_is_filled_again(
    nodes: Nodes, both: tuple[Peer, Peer]
) -> None:
    """If this fails a FLUSHALL followed by a local write leaves a node without what it had (G2)."""
    peer, mine = both
    async with (
        RedisSyncEngine(mine.server.url, node_id="b") as store,
        nodes.engine(peer_config(peer.server), store=store) as engine,
    ):
        await reaches(engine, PeerState.TAILING)
        sent = {f"k{n}": peer.send(f"k{n}", b"%d" % n).content for n in range(50)}
        await until(lambda: mine.client.xlen(Keys().stream) == 50)
        mine.client.flushall()
        # The marker is there again, and every connection stands.
        await store.put("local", b"1")
        sent["next"] = peer.send("next", b"2").content
        await until_async(lambda: holds(store, sent))
        assert await held(store, "local") == {"local": b"1"}
        whys = [r.why for r in engine.journal if r.dest is PeerState.BOOTSTRAPPING]
        assert whys[-1] == "the local store is another incarnation"


async def test_a_store_emptied_while_peers_are_quiet_is_copied_and_not_repaired_bit_by_bit(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails a node whose Redis was emptied fills by a thousand items a minute."""
    source, target = redis_servers(), redis_servers()
    mine = Peer(target, "b")
    a_little = Settings(cold_path=ColdPathConfig(interval_sec=0.1, max_items_per_cycle=1))
    async with (
        RedisSyncEngine(source.url, node_id="a") as far,
        RedisSyncEngine(target.url, node_id="b") as store,
        nodes.engine(peer_config(source), store=store, settings=a_little) as engine,
    ):
        written = {f"k{n}": b"%d" % n for n in range(300)}
        await far.put_many(written)
        await until_async(lambda: holds(store, written))
        # Until the first copy is done there is no cursor, and that would be why.
        await reaches(engine, PeerState.TAILING)
        mine.client.flushall()
        await until_async(lambda: holds(store, written))
        whys = [r.why for r in engine.journal if r.dest is PeerState.BOOTSTRAPPING]
        assert whys[-1] == "the local store is another incarnation"
    mine.close()


async def test_a_store_emptied_before_a_letter_is_tried_again_is_copied(
    nodes: Nodes, both: tuple[Peer, Peer]
) -> None:
    """If this fails only the one who retries a letter hears that the store is another one."""
    peer, mine = both
    async with (
        RedisSyncEngine(mine.server.url, node_id="b") as store,
        nodes.engine(peer_config(peer.server), store=store) as engine,
    ):
        await reaches(engine, PeerState.TAILING)
        mine.client.lpush(Keys().item("taken"), "no item")
        sent = {key: peer.send(key, b"1").content for key in ("first", "taken")}
        await until(lambda: engine.health_check().peers[0].dead_letters == 1)
        mine.client.flushall()
        stats = await engine.dead_letters.retry()
        assert (stats.left, len(stats.problems)) == (1, 1)
        await until_async(lambda: holds(store, sent))
        assert (await engine.dead_letters.retry()).superseded == 1


class Hesitant(RedisSyncEngine):
    """Takes nothing while it is told not to."""

    accepts = True

    def should_accept_writes(self) -> bool:
        """Return what is set."""
        return self.accepts


async def test_what_a_paused_link_holds_is_not_written_to_another_store(
    nodes: Nodes, both: tuple[Peer, Peer]
) -> None:
    """If this fails a store that is emptied during backpressure misses what came before (G2)."""
    peer, mine = both
    async with (
        Hesitant(mine.server.url, node_id="b") as store,
        nodes.engine(peer_config(peer.server), store=store) as engine,
    ):
        await reaches(engine, PeerState.TAILING)
        sent = {f"k{n}": peer.send(f"k{n}", b"%d" % n).content for n in range(50)}
        await until(lambda: mine.client.xlen(Keys().stream) == 50)
        store.accepts = False
        sent["held"] = peer.send("held", b"2").content
        await reaches(engine, PeerState.PAUSED)
        mine.client.flushall()
        store.accepts = True
        await until_async(lambda: holds(store, sent))


async def test_a_slow_peer_does_not_slow_the_others(
    nodes: Nodes, redis_servers: Callable[[], RedisServer], server: RedisServer
) -> None:
    """If this fails one bad peer holds up what the others send (G8)."""
    good = Peer(redis_servers(), "good")
    bad = Peer(server, "a")
    for peer in (good, bad):
        peer.write_marker()
    store = MemorySyncEngine()
    peers = [peer_config(good.server, "good"), peer_config(server)]
    async with nodes.engine(*peers, store=store, settings=QUICK) as engine:
        await engine.wait_synced(10)
        server.pause()
        began = time.monotonic()
        for number in range(50):
            good.send(f"k{number}", b"1")
        await until(lambda: len(store) == 50)
        assert time.monotonic() - began < 5
        server.resume()
    good.close()
    bad.close()


async def test_a_worker_that_keeps_dying_fails_its_link(
    nodes: Nodes, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a bug in a worker makes a link spin for ever, looking alive, or ends the engine."""
    from fsm_replication.workers import tailer

    peer = Peer(redis_server)
    peer.write_marker()
    peer.close()

    async def broken(_self: object, _orders: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(tailer.Tailer, "_decide", broken)
    at_once = ReconnectConfig(first=0.01, longest=0.01)
    settings = QUICK.model_copy(update={"reconnect": at_once})
    async with nodes.engine(peer_config(redis_server), settings=settings) as engine:
        await reaches(engine, PeerState.FAILED)
        (health,) = engine.health_check().peers
        assert "a bug" in health.last_error
        assert engine.is_running


async def test_a_removed_cursor_file_ends_the_engine(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails a node goes on without a memory, and nobody is told."""
    peer = Peer(redis_server)
    peer.write_marker()
    engine = nodes.engine(peer_config(redis_server), settings=QUICK)
    await engine.start()
    await reaches(engine, PeerState.TAILING)
    (nodes.folder / "b.db").unlink()
    peer.send_fields([b"op", b"X"])
    with pytest.raises(CursorStoreError, match="removed or replaced"):
        async with asyncio.timeout(15):
            await engine.wait_closed()
    assert engine.state is EngineState.FAILED
    peer.close()


class SlowStore(MemorySyncEngine):
    """Takes its time for every batch."""

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Apply, slowly."""
        await asyncio.sleep(0.3 if changes else 0)
        return await super().apply_many(changes, received)


async def test_what_is_held_is_flushed_at_shutdown(nodes: Nodes, redis_server: RedisServer) -> None:
    """If this fails a clean stop throws away what was read (and reads it again next time)."""
    peer = Peer(redis_server)
    peer.write_marker()
    peer.send("before", b"0")
    store = SlowStore()
    engine = nodes.engine(peer_config(redis_server), store=store)
    await engine.start()
    await reaches(engine, PeerState.TAILING)
    peer.send("x", b"1")
    await until(lambda: engine.health_check().peers[0].events_read == 1)
    assert len(store) == 1
    await engine.shutdown()
    assert len(store) == 2
    async with nodes.engine(peer_config(redis_server), store=store) as again:
        await reaches(again, PeerState.TAILING)
        assert again.health_check().peers[0].events_read == 0
    peer.close()


async def test_an_operators_pause_outlives_the_connection(
    nodes: Nodes, server: RedisServer
) -> None:
    """If this fails a peer that somebody has paused is read again as soon as its line breaks."""
    peer = Peer(server)
    peer.write_marker()
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(server), store=store, settings=QUICK) as engine:
        await reaches(engine, PeerState.TAILING)
        await engine.pause("a")
        await reaches(engine, PeerState.PAUSED)
        server.kill()
        await reaches(engine, PeerState.BACKOFF)
        peer_states = engine.watch_state("a")
        server.start()
        peer.write_marker()
        peer.send("k", b"1")
        seen = []
        async for record in peer_states:
            seen.append(record.dest)
            if record.dest is PeerState.PAUSED:
                break
        assert not {PeerState.TAILING, PeerState.CATCHING_UP, PeerState.BOOTSTRAPPING} & {*seen}
        assert len(store) == 0
        await engine.resume("a")
        await until(lambda: len(store) == 1)
    peer.close()
