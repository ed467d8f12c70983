"""The cold path: what the hot path missed is found by comparing trees, and mended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, counts_entries, held, now_ms, until, until_async

from fsm_replication import (
    EngineStoppedError,
    InvalidStateError,
    MemorySyncEngine,
    PeerConfig,
    PeerState,
    RedisSyncEngine,
    ReplicationConfig,
    ReplicationEngine,
    SyncEngine,
    UsageError,
)
from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    LimitsConfig,
    RepairConfig,
    Settings,
    TombstonesConfig,
)
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.items import EMPTY_HASH, SyncItem, content_hash
from fsm_replication.merkle import OWN
from fsm_replication.ports import Agreement, Ports
from fsm_replication.reports import PauseReason
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received
from fsm_replication.transport import RedisConnection, RedisTransport

WEEK_MS = 7 * 86_400_000
BY_HAND = ColdPathConfig(interval_sec=3600)
COLD_ONLY = Settings(hot_path=HotPathConfig(enabled=False), cold_path=BY_HAND)


def put_of(key: str, content: bytes, at: int, version: int = 1) -> SyncItem:
    """Return a live item."""
    return SyncItem(key, content, "binary", content_hash(content), version, at, False, "a")


def tomb_of(key: str, at: int, version: int = 2) -> SyncItem:
    """Return a tombstone."""
    return SyncItem(key, b"", "binary", EMPTY_HASH, version, at, True, "a")


def a_at(server: RedisServer, **more: Any) -> PeerConfig:
    """Return how node a is reached."""
    return PeerConfig(node_id="a", redis_url=server.url, **more)


async def same(one: SyncEngine, two: SyncEngine) -> bool:
    """Say whether two stores have the same root."""
    assert one.tree is not None
    assert two.tree is not None
    return await one.tree.root(OWN) == await two.tree.root(OWN)


class CountingTransport(RedisTransport):
    """Counts flights and bytes of connections to peers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[RedisConnection] = []
        self.flights = 0

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> RedisConnection:
        """Connect, and count what is sent."""
        connection = await super().connect(url, timeout_sec=timeout_sec, name=name)
        send = connection.send

        def counted(*commands: Sequence[bytes | str | int]) -> asyncio.Future[list[Any]]:
            self.flights += 1
            return send(*commands)

        connection.send = counted  # type: ignore[method-assign]
        self.made.append(connection)
        return connection

    @property
    def received(self) -> int:
        """Bytes received over all connections."""
        return sum(connection.received_bytes for connection in self.made)


def counting_engine(
    folder: Path, config: ReplicationConfig, store: SyncEngine
) -> tuple[ReplicationEngine, CountingTransport]:
    """Return an engine whose round trips are counted."""
    transport = CountingTransport()
    ports = Ports(transport=transport, cursor_store=SqliteCursorStore(str(folder / "c.db")))
    return ReplicationEngine(config, store, ports=ports), transport


async def test_what_differs_is_fetched_and_deletes_travel(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails the cold path misses, or loses, what only it can see."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"%d" % n for n in range(300)})
    for item in await peer_store.get_many([f"k{n}" for n in range(200)]):
        assert item is not None
        await store.submit(item)
    await store.put("only.here", b"stays")
    newer_here = await store.put("k5", b"newer here")
    await peer_store.delete("k7")
    await peer_store.delete("k250")
    await peer_store.put("k8", b"newer there")
    async with nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine:
        stats = await engine.repair()
        assert (stats.peers_checked, stats.peers_in_sync, stats.errors) == (1, 0, 0)
        assert (stats.items_submitted, stats.items_deleted) == (100, 2)
        assert stats.items_fetched == 102
        assert engine.health_check().synced
        assert await store.get("k7") is None
        assert await store.get("k5") == newer_here
        assert (await store.get("k8")) == await peer_store.get("k8")
        assert await store.get("only.here") is not None
        # What only we have is no concern of this link: the second pass finds nothing to do.
        again = await engine.repair("a")
        assert (again.items_fetched, again.errors) == (0, 0)


async def test_equal_trees_cost_one_round_trip(
    tmp_path: Path, nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails nodes at rest read each other's trees again and again."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(5000)})
    config = nodes.config(a_at(redis_server), settings=COLD_ONLY)
    engine, transport = counting_engine(tmp_path, config, store)
    async with engine:
        await engine.repair()
        assert await same(store, peer_store)
        before, received = transport.flights, transport.received
        stats = await engine.repair()
        assert stats.peers_in_sync == 1
        assert transport.flights - before == 1
        size = transport.received - received
        assert size < 120
        sys.stdout.write(f"\nequal trees: one round trip, {size} bytes received\n")


@pytest.mark.timeout(120)
async def test_finding_100_keys_among_100_000_takes_few_round_trips(
    tmp_path: Path,
    nodes: Nodes,
    redis_server: RedisServer,
    peer_store: RedisSyncEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If this fails a repair over a long line takes minutes."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"user-{n}": b"%d" % n for n in range(100_000)})
    config = nodes.config(a_at(redis_server), settings=COLD_ONLY)
    engine, transport = counting_engine(tmp_path, config, store)
    async with engine:
        await engine.repair()
        assert len(store) == 100_000
        await peer_store.put_many({f"user-{n * 997}": b"changed" for n in range(100)})
        before, received = transport.flights, transport.received
        stats = await engine.repair()
        flights, size = transport.flights - before, transport.received - received
        assert stats.items_submitted == 100
        assert await same(store, peer_store)
        with capsys.disabled():
            sys.stdout.write(
                f"\n100 of 100,000 keys: {flights} round trips, {size:,} bytes received\n"
            )
        assert flights <= 12


async def test_a_store_without_a_tree_is_repaired_too(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails users' own stores need a tree of their own."""

    class Plain(MemorySyncEngine):
        @property
        def tree(self) -> None:  # type: ignore[override]
            return None

    store = Plain(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(500)})
    async with nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine:
        assert (await engine.repair()).items_submitted == 500
        await peer_store.put("k1", b"y")
        assert (await engine.repair()).items_fetched == 1
        stats = await engine.repair()
        assert (stats.items_fetched, stats.peers_in_sync) == (0, 1)


# The budget, and what cannot be fetched.


async def test_a_cycle_has_a_budget_and_the_next_goes_on(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails the cold path takes over the node, or never gets past the first keys."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(250)})
    settings = COLD_ONLY.model_copy(
        update={"cold_path": ColdPathConfig(interval_sec=3600, max_items_per_cycle=100)}
    )
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
        done = [await engine._cold_path.cycle() for _ in range(3)]
        assert [stats.items_fetched for stats in done] == [100, 100, 50]
        assert [stats.items_deferred for stats in done] == [150, 50, 0]
        assert len(store) == 250
        assert not engine.health_check().peers[0].gaps_open


async def test_a_cycle_reads_no_more_leaves_than_it_has_a_budget_for(
    tmp_path: Path, nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a node far behind reads all of its peer's leaves in every cycle."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(60_000)})
    settings = COLD_ONLY.model_copy(
        update={"cold_path": ColdPathConfig(interval_sec=3600, max_items_per_cycle=100)}
    )
    config = nodes.config(a_at(redis_server), settings=settings)
    engine, transport = counting_engine(tmp_path, config, store)
    async with engine:
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
        sizes, received = [], transport.received
        for _ in range(3):
            stats = await engine._cold_path.cycle()
            assert stats.items_fetched == 100
            assert stats.items_deferred > 100
            assert not engine.health_check().synced
            sizes.append(transport.received - received)
            received = transport.received
        assert len(store) == 300
        await engine.repair()
        assert await same(store, peer_store)
        # A leaf is 50 bytes and its key.
        assert max(sizes) < (transport.received - received) / 3


async def test_keys_that_cannot_be_fetched_stand_in_nobody_s_way(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails 5,000 bad keys that sort before 100 good ones use the budget up for ever."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"bad-{n}": b"x" for n in range(5000)})
    await peer_store.put_many({f"good-{n}": b"x" for n in range(100)})
    for begin in range(0, 5000, 500):
        commands = [
            ("SETRANGE", peer_store.keys.item(f"bad-{n}"), 58, "\xff\xff\xff")
            for n in range(begin, begin + 500)
        ]
        await peer_store._call_many(commands)
    settings = COLD_ONLY.model_copy(
        update={"cold_path": ColdPathConfig(interval_sec=3600, max_items_per_cycle=50)}
    )
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
        cycles = 0
        while len(store) < 100:
            await engine._cold_path.cycle()
            cycles += 1
            assert cycles < 10
        assert (await engine.repair()).items_fetched == 0


async def test_a_peer_that_fails_rests_and_the_others_are_served(
    nodes: Nodes,
    redis_server: RedisServer,
    redis_servers: Callable[[], RedisServer],
    peer_store: RedisSyncEngine,
) -> None:
    """If this fails one bad peer keeps the cold path from all others."""
    other = redis_servers()
    store = MemorySyncEngine(node_id="b")
    async with RedisSyncEngine(other.url, node_id="c") as third:
        await third.put("from.c", b"x")
        await peer_store.put("from.a", b"x")
        await peer_store._call("SET", peer_store.keys.tree, b"x" * 3)
        peers = (a_at(redis_server), PeerConfig(node_id="c", redis_url=other.url, priority=5))
        async with nodes.engine(*peers, store=store, settings=COLD_ONLY) as engine:
            await engine.wait_for_state(PeerState.STANDBY, peer_id="c", timeout=DEADLINE_SEC)
            await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
            stats = await engine._cold_path.cycle()
            assert (stats.peers_checked, stats.errors) == (1, 1)
            assert "'a'" in stats.problems[0]
            assert await store.get("from.c") is not None
            # It rests now: the next cycle does not even ask.
            assert (await engine._cold_path.cycle()).errors == 0
            assert (await engine.repair("a")).errors == 1


# Gaps


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_a_trimmed_stream_heals_completely(
    nodes: Nodes,
    redis_server: RedisServer,
    redis_servers: Callable[[], RedisServer],
    peer_store: RedisSyncEngine,
    kind: str,
) -> None:
    """If this fails entries trimmed while a node was away are lost, deletes among them."""
    async with AsyncExitStack() as stack:
        store: SyncEngine = MemorySyncEngine(node_id="b")
        if kind == "redis":
            store = await stack.enter_async_context(
                RedisSyncEngine(redis_servers().url, node_id="b")
            )
        await peer_store.put_many({f"k{n}": b"1" for n in range(2000)})
        async with nodes.engine(a_at(redis_server), store=store) as engine:
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            assert await same(store, peer_store)
        await peer_store.put_many({f"k{n}": b"2" for n in range(0, 2000, 3)})
        for n in range(1, 200, 3):
            await peer_store.delete(f"k{n}")
        await peer_store._call("XTRIM", peer_store.keys.stream, "MAXLEN", 10)
        async with nodes.engine(a_at(redis_server), store=store) as engine:
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            assert await same(store, peer_store)
            (gap,) = await engine.ledger("a")
            missed = 724 if counts_entries(redis_server) else None
            assert (gap.missed, gap.healed_by) == (missed, "bootstrap")
            assert engine.health_check().peers[0].gaps_open == 0
            # Only what differs was fetched, not all that there is.
            assert engine._links["a"].context.progress.copied == 667 + 67


async def test_a_stream_shorter_than_a_copy_does_not_copy_for_ever(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails a busy peer with a short stream is copied again and again."""
    store = MemorySyncEngine(node_id="b")
    async with RedisSyncEngine(redis_server.url, node_id="a", stream_maxlen=50) as peer_store:
        await peer_store.put_many({f"k{n}": b"1" for n in range(500)})

        class Trimming(MemorySyncEngine):
            writes = 0

            async def apply_many(
                self, changes: Sequence[SyncItem], received: Received | None = None
            ) -> ApplyResult:
                if changes and self.writes < 2:
                    self.writes += 1
                    await peer_store.put_many({f"m{self.writes}.{n}": b"2" for n in range(300)})
                    await peer_store._call("XTRIM", peer_store.keys.stream, "MAXLEN", 5)
                return await super().apply_many(changes, received)

        store = Trimming(node_id="b")
        settings = Settings(cold_path=ColdPathConfig(interval_sec=0.2))
        async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            ways = [move.trigger for move in engine.journal if move.machine == "link:a"]
            # Without counts it is only a doubt, and worth one copy more.
            most = 1 if counts_entries(redis_server) else 2
            assert ways.count("bootstrap") <= most
            await until_async(lambda: same(store, peer_store), "equal roots")
            await until(lambda: engine.health_check().peers[0].gaps_open == 0, "gaps closed")
            healed_by = [row.healed_by for row in await engine.ledger()]
            assert set(healed_by) == ({"repair"} if most == 1 else set(healed_by) - {""})
            assert len(healed_by) <= most
            ways = [move.trigger for move in engine.journal if move.machine == "link:a"]
            assert ways.count("bootstrap") <= most


# The interlock


async def test_the_interlock_stops_a_mass_delete_on_the_hot_path(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a peer that lost its mind empties every node."""
    store = MemorySyncEngine(node_id="b")
    settings = Settings(
        cold_path=BY_HAND, repair=RepairConfig(interlock_share=0.2, interlock_min=10)
    )
    await peer_store.put_many({f"k{n}": b"x" for n in range(200)})
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        for n in range(100):
            await peer_store.delete(f"k{n}")
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
        assert PauseReason.INTERLOCK in engine.health_check().peers[0].pause_reasons
        assert len(store) >= 160
        await engine.resume("a")
        await until(lambda: len(store) == 100, "the operator let them through")
        assert engine.health_check().peers[0].pause_reasons == frozenset()


async def test_the_interlock_guards_repairs_until_forced(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails what the hot path refuses comes in by the cold path."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(200)})
    settings = COLD_ONLY.model_copy(
        update={"repair": RepairConfig(interlock_share=0.2, interlock_min=10)}
    )
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.repair()
        for n in range(100):
            await peer_store.delete(f"k{n}")
        await peer_store.put("new", b"x")
        stats = await engine.repair()
        assert stats.errors == 1
        assert "more would follow" in stats.problems[0]
        assert engine.peers["a"] is PeerState.PAUSED
        await engine.repair(force=True)
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
        assert (await engine.repair(force=True)).errors == 0
        assert len(store) == 101


# Old items that come back (G5)


async def agreed_long_ago(nodes: Nodes, days: float) -> None:
    """Make the link's last full agreement older."""
    cursors = SqliteCursorStore(str(nodes.folder / "b.db"))
    await cursors.open()
    agreement = Agreement(now_ms() - round(days * 86_400_000))
    await cursors.set_agreed("a", agreement, heal_gaps=False)
    await cursors.close()


@pytest.mark.parametrize("path", ["hot", "cold", "bootstrap"])
@pytest.mark.parametrize("verdict", ["accept", "reject"])
async def test_old_items_wait_for_a_persons_word(
    nodes: Nodes,
    redis_server: RedisServer,
    peer_store: RedisSyncEngine,
    path: str,
    verdict: str,
) -> None:
    """If this fails keys come back that were deleted before anybody's tombstones began."""
    store = MemorySyncEngine(node_id="b")
    settings = COLD_ONLY if path == "cold" else Settings(cold_path=BY_HAND)
    await peer_store.put("first", b"x")
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        if path != "cold":
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        assert (await engine.repair()).peers_in_sync == (path != "cold")
    await agreed_long_ago(nodes, 8)
    old = put_of("old", b"deleted elsewhere?", now_ms() - WEEK_MS - 60_000)
    await peer_store.apply_many([old, put_of("new", b"y", now_ms())])
    if path == "bootstrap":
        await peer_store._call("XTRIM", peer_store.keys.stream, "MAXLEN", 0)
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        if path == "cold":
            await engine.repair()
        else:
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            await until_async(lambda: store.get("new"))
        assert await store.get("new") is not None
        assert await store.get("old") is None
        assert engine.stale_keys("a") == ("old",)
        assert engine.health_check().peers[0].stale_held_back == 1
        with pytest.raises(UsageError):
            await engine.repair(accept_stale=True)
        if verdict == "accept":
            stats = await engine.repair("a", accept_stale=True)
            assert stats.items_submitted == 1
            assert (await store.get("old")) == old
        else:
            stats = await engine.repair("a", reject_stale=True)
            assert stats.items_rejected == 1
            tombstone = (await store.get_many(["old"]))[0]
            assert tombstone is not None
            assert tombstone.deleted
            assert tombstone.stamp > old.stamp
        health = engine.health_check().peers[0]
        assert health.stale_held_back == 0
        assert (await engine.repair()).items_deferred == 0
        assert engine.stale_keys("a") == ()


async def test_a_peer_restored_from_an_old_backup_is_told_apart(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a Redis restored from last month revives what was deleted since."""
    store = MemorySyncEngine(node_id="b")
    settings = Settings(cold_path=BY_HAND)
    month_ago = now_ms() - 30 * 86_400_000
    await peer_store.put("a", b"x")
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        await engine.repair()
    # The backup: an item that was deleted long ago, and a stream that ends then.
    await peer_store.apply_many([put_of("revived", b"x", month_ago)])
    await peer_store._call("DEL", peer_store.keys.stream)
    await peer_store._call("XADD", peer_store.keys.stream, f"{month_ago}-0", "op", "DEL", "key", "k",
                           "meta", f'{{"version":1,"updated_at":{month_ago}}}')  # fmt: skip
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        assert await store.get("revived") is None
        assert engine.stale_keys("a") == ("revived",)
    # And it is still known after another start.
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        stats = await engine.repair()
        assert stats.items_deferred == 1
        assert await store.get("revived") is None


async def test_a_link_with_no_record_takes_all(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a new node stays empty of everything older than a week."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.apply_many([put_of("old", b"x", now_ms() - 5 * WEEK_MS)])
    async with nodes.engine(a_at(redis_server), store=store) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        assert await store.get("old") is not None


# Asking for it


async def test_a_second_call_joins_the_first(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails impatient operators multiply the load."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(300)})
    engine = nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY)
    async with engine:
        one, two = await asyncio.gather(engine.repair(), engine.repair())
        assert one is two
        first = asyncio.create_task(engine.repair())
        await asyncio.sleep(0)
        second = asyncio.create_task(engine.repair())
        await asyncio.sleep(0)
        first.cancel()
        # The pass goes on for whoever joined a call that was cancelled.
        assert (await second).peers_in_sync == 1
        with pytest.raises(asyncio.CancelledError):
            await first
        await peer_store.put("more", b"x")
        third = asyncio.create_task(engine.repair())
        await asyncio.sleep(0)
        await engine.shutdown()
        with pytest.raises(EngineStoppedError):
            await third
    with pytest.raises(InvalidStateError):
        await engine.repair()


async def test_an_engine_that_ends_before_a_repair_begins_says_so(
    nodes: Nodes, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a caller gets a KeyError from inside the library."""
    async with (
        RedisSyncEngine(redis_server.url, node_id="a"),
        nodes.engine(a_at(redis_server), settings=COLD_ONLY) as engine,
    ):

        async def end_meanwhile(_peer_id: str | None) -> None:
            await engine.shutdown()

        monkeypatch.setattr(engine, "_decided", end_meanwhile)
        with pytest.raises(EngineStoppedError, match="before the repair"):
            await engine.repair()


async def test_differences_are_shown_and_nothing_is_changed(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a dry run lies about what a repair would do."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put("there", b"x" * 30)
    await store.put("here", b"x")
    await peer_store.put("both", b"1")
    item = await peer_store.get("both")
    assert item is not None
    await store.apply_many([item])
    await store.put("both", b"2")
    await peer_store.put("same", b"1")
    for kept in await peer_store.get_many(["same"]):
        assert kept is not None
        await store.submit(kept)
    async with nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine:
        found = {one.key: one async for one in engine.differences("a")}
        assert {key: one.newer for key, one in found.items()} == {
            "there": "peer",
            "here": "local",
            "both": "local",
        }
        assert found["there"].size > 30
        assert found["here"].size == 0
        assert await store.get("there") is None
        assert engine.stale_keys("a") == ()


async def test_a_peer_without_a_tree_is_named(nodes: Nodes, redis_server: RedisServer) -> None:
    """If this fails a repair that cannot work looks as if it had."""
    async with (
        RedisSyncEngine(redis_server.url, node_id="a", layouts=()) as peer_store,
        nodes.engine(a_at(redis_server), settings=COLD_ONLY) as engine,
    ):
        await peer_store.put("k", b"x")
        stats = await engine.repair()
        assert stats.problems == ("peer 'a' publishes no tree that could be compared",)
        with pytest.raises(UsageError, match="no tree"):
            _ = [one async for one in engine.differences("a")]


async def test_a_tree_that_is_built_later_is_found(nodes: Nodes, redis_server: RedisServer) -> None:
    """If this fails a peer that gets its tree while we read it is never compared."""
    store = MemorySyncEngine(node_id="b")
    async with (
        RedisSyncEngine(redis_server.url, node_id="a", layouts=()) as treeless,
        nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine,
    ):
        await treeless.put("k", b"x")
        assert (await engine.repair()).errors == 1
        assert engine.health_check().peers[0].layout == ""
        async with RedisSyncEngine(redis_server.url, node_id="a"):
            assert (await engine.repair()).items_submitted == 1
        assert engine.health_check().peers[0].layout == OWN
        assert await store.get("k") == await treeless.get("k")


@pytest.mark.parametrize("becomes", ["empty", "another", "treeless"])
async def test_another_store_behind_a_living_connection_is_noticed(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine, becomes: str
) -> None:
    """If this fails a peer that lost everything passes for one we agree with."""
    store = MemorySyncEngine(node_id="b")
    await peer_store.put("k", b"x")
    async with nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine:
        assert (await engine.repair()).items_submitted == 1
        if becomes == "treeless":
            async with RedisSyncEngine(redis_server.url, node_id="a", layouts=()):
                pass
        else:
            await peer_store._call("FLUSHALL")
        if becomes == "another":
            async with RedisSyncEngine(redis_server.url, node_id="a") as other:
                await other.put("l", b"y")
        stats = await engine.repair()
        assert (stats.peers_in_sync, stats.errors) == (0, 1)
        assert "another store" in stats.problems[0]
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
        if becomes == "another":
            await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
            assert (await engine.repair()).items_submitted == 1
            assert await held(store, "k", "l") == {"k": b"x", "l": b"y"}


async def test_a_busy_peer_is_repaired_all_the_same(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a peer that never stops writing is never repaired."""
    store = MemorySyncEngine(node_id="b")
    settings = Settings(cold_path=ColdPathConfig(interval_sec=0.05))
    await peer_store.put_many({f"k{n}": b"x" for n in range(100)})
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        stop = asyncio.Event()

        async def write() -> None:
            number = 0
            while not stop.is_set():
                await peer_store.put_many({f"w{(number + n) % 1000}": b"y" for n in range(250)})
                number += 250
                await asyncio.sleep(0.05)

        writer = asyncio.create_task(write())
        # Lost here, and in no stream: only the trees can tell.
        lost = {f"k{n}" for n in range(0, 100, 2)}
        for key in lost:
            store._items.pop(key, None)
        store._tree.touch([put_of(key, b"", 0) for key in lost])
        try:
            await until(lambda: lost.issubset(store._items), "lost keys came back")
        finally:
            stop.set()
            await writer


async def test_refused_items_are_remembered(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails what the store will never take is fetched in every cycle."""

    class Picky(MemorySyncEngine):
        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            good = [change for change in changes if change.key != "bad"]
            done = iter((await super().apply_many(good, received)).outcomes)
            outcomes = [Outcome.REFUSED if c.key == "bad" else next(done) for c in changes]
            reasons = {i: "never" for i, c in enumerate(changes) if c.key == "bad"}
            return ApplyResult(outcomes, reasons)

    store = Picky(node_id="b")
    await peer_store.put_many({"bad": b"x", "good": b"y"})
    async with nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine:
        assert (await engine.repair()).items_fetched == 2
        stats = await engine.repair()
        assert (stats.items_fetched, stats.items_deferred) == (0, 1)
        assert (await engine.repair(force=True)).items_fetched == 1


async def test_a_bucket_that_is_too_large_or_broken_is_passed_over(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """If this fails one bad node of a tree stops the repair of all others."""
    monkeypatch.setattr("fsm_replication.workers.comparer.CHILDREN_MAX", 3)
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": b"x" for n in range(50)})
    tree = peer_store.keys.tree
    await peer_store._call(
        "HSET", f"{tree}:5", *[x for n in range(5) for x in (f"z{n}", b"s" * 50)]
    )
    await peer_store._call("SETRANGE", tree, 1032 + 8 * 5, b"12345678")
    # And one that is no node at all.
    await peer_store._call("SET", f"{tree}:6", b"x")
    await peer_store._call("SETRANGE", tree, 1032 + 8 * 6, b"12345678")
    await peer_store._call("SETRANGE", tree, 8, b"12345678")
    await peer_store._call("SETRANGE", tree, 0, b"12345678")
    async with nodes.engine(a_at(redis_server), store=store, settings=COLD_ONLY) as engine:
        stats = await engine.repair()
        assert (stats.items_submitted, stats.errors) == (50, 0)
        # Something could not be read, so this is no full agreement.
        assert engine.health_check().peers[0].agreed_at is None


async def test_tombstones_that_expired_at_the_peer_alone_do_no_harm(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails nodes that sweep at different times repair each other without end."""
    ttl = TombstonesConfig(ttl=0.3, grace=60)
    settings = COLD_ONLY.model_copy(update={"tombstones": ttl})
    store = MemorySyncEngine(node_id="b", tombstone_ttl_sec=0.3, tombstone_grace_sec=60)
    async with RedisSyncEngine(
        redis_server.url, node_id="a", tombstone_ttl_sec=0.3, tombstone_grace_sec=60
    ) as peer_store:
        await peer_store.put("k", b"x")
        await peer_store.delete("k")
        await asyncio.sleep(0.4)
        async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
            stats = await engine.repair()
            assert (stats.items_fetched, stats.errors) == (0, 0)
            assert await peer_store.tree.root(OWN) == bytes(8)  # type: ignore[union-attr]
            assert (await engine.repair()).peers_in_sync == 1


async def test_limits_in_bytes_hold_while_repairing(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a repair of large items takes unbounded memory."""
    settings = COLD_ONLY.model_copy(
        update={"limits": LimitsConfig(payload_bytes=100_000, batch_bytes=400_000)}
    )
    store = MemorySyncEngine(node_id="b")
    await peer_store.put_many({f"k{n}": os.urandom(90_000) for n in range(20)})
    await peer_store.put("too-large", os.urandom(500_000))
    async with nodes.engine(a_at(redis_server), store=store, settings=settings) as engine:
        stats = await engine.repair()
        assert stats.items_submitted == 20
        assert (await engine.repair()).items_deferred == 1
