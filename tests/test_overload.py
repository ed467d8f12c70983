"""A store that cannot keep up, and peers that send too much: nothing is lost, and nobody starves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, Peer, until

from fsm_replication.bench.fairness import fairness_table, run_fairness_bench
from fsm_replication.circuits import CircuitState
from fsm_replication.config import (
    HotPathConfig,
    PeerConfig,
    ReconnectConfig,
    Settings,
    TimeoutsConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys
from fsm_replication.reports import PauseReason
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.stream import encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.testing import FaultProxy

pytestmark = pytest.mark.usefixtures("no_tasks_left")

BACKLOG = 5000
QUICK = Settings(
    timeouts=TimeoutsConfig(store_call=0.1, command=2, connect=2),
    reconnect=ReconnectConfig(first=0.05, longest=0.1),
)


class Troubled(MemorySyncEngine):
    """A store that is full, raises, hangs or takes its time, as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble = ""
        self.asked = 0
        self.calls = 0
        self.at_once = 0
        self.most_at_once = 0

    def should_accept_writes(self) -> bool:
        """Say no where it is full."""
        self.asked += 1
        return self.trouble != "full"

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Do what the trouble is."""
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.trouble == "raises":
                raise RuntimeError("the store is broken")
            if self.trouble == "hangs":
                await asyncio.Event().wait()
            if self.trouble == "takes its time":
                await asyncio.sleep(0.05)
            return await super().apply_many(changes, received)
        finally:
            self.at_once -= 1


@dataclass
class Reads:
    """Counts the reads of a stream that go through a proxy."""

    asked_from: list[bytes] = field(default_factory=list)

    def note(self, args: Sequence[bytes]) -> None:
        """Note from where a read goes on."""
        if args[0] == b"XREAD":
            self.asked_from.append(args[-1])


@asynccontextmanager
async def troubled(
    nodes: Nodes, peer: Peer, settings: Settings = QUICK
) -> AsyncIterator[tuple[ReplicationEngine, Troubled, FaultProxy, Reads]]:
    """Run a node that tails a peer through a proxy."""
    store, reads = Troubled(), Reads()
    async with FaultProxy(peer.server.port, on_request=reads.note) as proxy:
        link = PeerConfig(node_id="a", redis_url=proxy.url, circuit_reset_timeout_sec=0.1)
        async with nodes.engine(link, store=store, settings=settings) as engine:
            engine.circuit.writes.reset_sec = 0.2
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            yield engine, store, proxy, reads


def send_many(peer: Peer, count: int, prefix: str = "k") -> None:
    """Append many entries in one flight."""
    pipe: Any = peer.client.pipeline(transaction=False)
    for number in range(count):
        fields = encode_fields(peer.item(f"{prefix}{number}", b"content"))
        pipe.execute_command("XADD", Keys().stream, "*", *fields)
    pipe.execute()


def reasons(engine: ReplicationEngine) -> frozenset[PauseReason]:
    """Return why the link to a is paused."""
    return frozenset(engine.health_check().peers[0].pause_reasons)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("full", PauseReason.BACKPRESSURE),
        ("raises", PauseReason.CIRCUIT),
        ("hangs", PauseReason.CIRCUIT),
    ],
)
async def test_a_store_in_trouble_holds_the_link_where_it_was(
    nodes: Nodes, peer: Peer, trouble: str, reason: PauseReason
) -> None:
    """If this fails a store in trouble loses changes, or is flooded, or never read for again."""
    async with troubled(nodes, peer) as (engine, store, proxy, reads):
        store.trouble = trouble
        send_many(peer, BACKLOG)
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
        await until(lambda: reason in reasons(engine), "the reason")
        progress = engine._links["a"].context.progress
        await until(lambda: len(reads.asked_from) > 0)
        # Whether it has ended is looked for again and again, by asking or by a probe; meanwhile
        # nothing is read, and what was read is held.
        read, asked, calls = len(reads.asked_from), store.asked, store.calls
        if trouble == "full":
            await until(lambda: store.asked > asked + 20, "the store to be asked again")
        else:
            await until(lambda: store.calls >= calls + 3, "three probes")
        assert len(reads.asked_from) - read <= 1, "a read that was under way may come back once"
        assert progress.events_read < BACKLOG
        assert len(store) == 0
        assert reasons(engine) <= {reason}
        # A line that breaks meanwhile is found again; then it is paused again, for the same reason.
        await proxy.refuse()
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
        await proxy.heal()
        await engine.wait_for_state(PeerState.RESUMING, peer_id="a", timeout=DEADLINE_SEC)
        await until(
            lambda: engine.peers["a"] is PeerState.PAUSED and reason in reasons(engine),
            "another pause",
        )
        assert len(store) == 0
        store.trouble = ""
        await until(lambda: len(store) == BACKLOG, "everything")
        await until(lambda: engine.peers["a"] is PeerState.TAILING, "the head")
        health = engine.health_check()
        assert health.healthy
        # The cursor is from a time when there was no stream: what came first can be told where the
        # server counts, and has not been started again since.
        doubts = 0 if peer.counts else 1
        assert (health.peers[0].gaps_open, health.peers[0].dead_letters) == (doubts, 0)
        assert store.most_at_once <= 1 + (trouble == "hangs")


async def test_a_slow_store_slows_and_breaks_nothing(nodes: Nodes, peer: Peer) -> None:
    """If this fails a store that is merely slow is taken for a broken one, or read ahead of."""
    async with troubled(nodes, peer) as (engine, store, _, _):
        await engine.wait_synced(DEADLINE_SEC)
        store.trouble = "takes its time"
        send_many(peer, BACKLOG)
        await until(lambda: len(store) >= BACKLOG // 2, "half of it")
        assert engine.health_check().max_lag_ms()
        held = engine._links["a"].context.progress.events_read - len(store)
        assert held <= 3 * engine.config.settings.hot_path.max_batch_size
        await until(lambda: len(store) == BACKLOG, "all of it")
        moves = [str(record.dest) for record in engine.journal if record.machine == "link:a"]
        assert "Paused" not in moves
        assert engine.circuit.writes.state is CircuitState.CLOSED


async def test_one_probe_for_all_links(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails a store that comes back is stormed by every link at once."""
    store = Troubled()
    async with AsyncExitStack() as stack:
        peers = [Peer(redis_servers(), name) for name in "xyz"]
        for peer in peers:
            stack.callback(peer.close)
            peer.write_marker()
        links = [PeerConfig(node_id=one.node_id, redis_url=one.server.url) for one in peers]
        async with nodes.engine(*links, store=store, settings=QUICK) as engine:
            writes = engine.circuit.writes
            writes.reset_sec = 0.2
            for peer in peers:
                name = peer.node_id
                await engine.wait_for_state(PeerState.TAILING, peer_id=name, timeout=DEADLINE_SEC)
            store.trouble = "raises"
            for peer in peers:
                send_many(peer, 100, f"{peer.node_id}.")
            await until(lambda: writes.state is CircuitState.OPEN, "an open circuit")
            await until(
                lambda: all(
                    PauseReason.CIRCUIT in one.pause_reasons for one in engine.health_check().peers
                ),
                "all links to be paused",
            )
            # From here on the store is well, but slow: two calls would be seen side by side.
            store.trouble, store.most_at_once = "takes its time", 0
            seen_half_open = False
            async with asyncio.timeout(DEADLINE_SEC):
                # A probe that began before may still fail; then the circuit opens once more.
                while writes.state is not CircuitState.CLOSED:
                    if writes.state is CircuitState.HALF_OPEN:
                        seen_half_open = True
                        assert store.at_once <= 1
                    await asyncio.sleep(0)
            assert seen_half_open
            store.trouble = ""
            await until(lambda: len(store) == 300, "everything")


# Who gets how much.


@asynccontextmanager
async def reading(
    nodes: Nodes,
    redis_servers: Callable[[], RedisServer],
    names: str,
    settings: Settings,
    *,
    slow: str = "",
) -> AsyncIterator[tuple[ReplicationEngine, dict[str, Peer]]]:
    """Run a node that has read several peers, one of them over a line of half a second."""
    async with AsyncExitStack() as stack:
        peers = {name: Peer(redis_servers(), name) for name in names}
        links = []
        for name, peer in peers.items():
            stack.callback(peer.close)
            peer.write_marker()
            url = peer.server.url
            if name == slow:
                proxy = await stack.enter_async_context(FaultProxy(peer.server.port))
                proxy.delay(0.25, 0.25)
                url = proxy.url
            links.append(PeerConfig(node_id=name, redis_url=url))
        engine = nodes.engine(*links, store=Troubled(), settings=settings)
        await stack.enter_async_context(engine)
        await engine.wait_synced(DEADLINE_SEC)
        yield engine, peers


def applied(engine: ReplicationEngine) -> dict[str, int]:
    """Return how many events of each peer were applied."""
    return {name: link.context.progress.events_applied for name, link in engine._links.items()}


async def test_a_rate_limit_is_shared_fairly(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails the first peer to come takes all that the limit allows."""
    hot = HotPathConfig(rate_limit_enabled=True, rate_limit_per_sec=4000, rate_limit_burst=200)
    settings = QUICK.model_copy(update={"hot_path": hot})
    async with reading(nodes, redis_servers, "xyz", settings) as (engine, peers):
        for name in "xyz":
            await engine.pause(name)
        for name, peer in peers.items():
            send_many(peer, BACKLOG, f"{name}.")
        for name in "xyz":
            await engine.resume(name)
        await until(lambda: sum(applied(engine).values()) >= 6000, "much of it")
        shares = {name: count / 6000 for name, count in applied(engine).items()}
        assert min(shares.values()) > 0.15, shares


async def test_a_flood_does_not_starve_a_quiet_peer(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails what one peer sends waits until another has sent everything."""
    flood = 40_000
    async with reading(nodes, redis_servers, "fq", QUICK) as (engine, peers):
        await engine.pause("f")
        send_many(peers["f"], flood, "f.")
        store = engine.sync_engine
        assert isinstance(store, MemorySyncEngine)
        began = time.monotonic()
        await engine.resume("f")
        delays: list[float] = []
        while f"f.{flood - 1}" not in store._items:
            before, sent = len(store), time.monotonic()
            key = f"q.{len(delays)}"
            peers["q"].send(key, b"1")
            await until(lambda key=key: key in store._items, "a quiet peer's change")  # type: ignore[misc]
            if before > len(delays):
                delays.append(time.monotonic() - sent)
        took = time.monotonic() - began
        # While so many came from the one, each change of the other was there in a part of the time.
        assert len(delays) >= 10
        assert sorted(delays)[len(delays) // 2] < took / 8, (delays, took)


async def test_a_slow_line_slows_nobody_else(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails the slowest line of a mesh is the pace of all."""
    async with reading(nodes, redis_servers, "gs", QUICK, slow="s") as (engine, peers):
        store = engine.sync_engine
        assert isinstance(store, MemorySyncEngine)
        took = []
        for round_number in range(2):
            with_slow = round_number == 1
            if with_slow:
                send_many(peers["s"], 2000, "s.")
            began = time.monotonic()
            send_many(peers["g"], 10_000, f"g{round_number}.")
            last = f"g{round_number}.9999"
            await until(lambda last=last: last in store._items, "the quick peer's")  # type: ignore[misc]
            took.append(time.monotonic() - began)
        await until(lambda: "s.1999" in store._items, "the slow peer's")
        assert all(later < 4 * earlier for earlier, later in pairwise(took)), took


@pytest.mark.server
async def test_the_bench_shows_what_each_peer_gets() -> None:
    """If this fails the command that shows the shares does not work, or shows nothing."""
    shares = await run_fairness_bench(5000, 0.5)
    assert [one.peer for one in shares] == ["flood", "steady", "slow line"]
    assert sum(one.share for one in shares) == pytest.approx(1)
    assert all(one.events > 0 for one in shares)
    _, steady, slow = shares
    assert slow.p50_alone_ms is not None
    assert steady.p50_alone_ms is not None
    # Of the line alone; how long a busy machine takes beside it says nothing.
    assert slow.p50_alone_ms > 25
    assert steady.p50_alone_ms > 0
    assert "slow line" in fairness_table(shares).columns[0]._cells
