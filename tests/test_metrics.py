"""What is counted and measured, and that what is declared is.

Every engine here is on virtual time and a simulated network, so that durations are exact.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import math
import random
import re
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Nodes, until

from fsm_replication import (
    MemorySyncEngine,
    NoPeerError,
    PauseReason,
    PeerConfig,
    PeerState,
    Ports,
    ReplicationConfig,
    ReplicationEngine,
    SyncItem,
)
from fsm_replication import metrics as declared
from fsm_replication.config import Settings
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.errors import CursorStoreError
from fsm_replication.items import DAY_MS, content_hash
from fsm_replication.ports import Connection
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.stream import encode_fields
from fsm_replication.tables import CircuitState
from fsm_replication.testing import (
    LoopClock,
    MemoryCursorStore,
    SimRedis,
    SimStore,
    SimTransport,
    SkewedWallClock,
)
from fsm_replication.testing.virtual_time import run
from fsm_replication.workers.slo import TimedConnection

ROOT = Path(__file__).parent.parent
START_MS = 1_700_000_000_000
WEEK_MS = 7 * DAY_MS
# As the specification of the wire names them.
SPECIFIED = {
    "engine_state",
    "connected_peers",
    "peer_connections",
    "peer_state",
    "peer_pings",
    "peer_ping_latency_seconds",
    "peer_circuit_transitions",
    "peer_operation_duration_seconds",
    "cdc_events_read",
    "cdc_events_applied",
    "cdc_events_deduped",
    "stream_reads",
    "stream_read_duration_seconds",
    "stream_trimmed",
    "backpressure_pauses",
    "batch_flush_duration_seconds",
    "batch_size",
    "batch_submitted",
    "batch_deleted",
    "batch_skipped",
    "batch_errors",
    "adaptive_batch_size",
    "lag_ms",
    "lag_seconds",
    "lag_events",
    "cursor_persists",
    "cursor_flushes",
    "cursor_flush_errors",
    "cursor_retries",
    "repair_cycles",
    "repair_cycle_duration_seconds",
    "repair_skipped",
    "repair_peers_checked",
    "repair_peers_in_sync",
    "repair_items_fetched",
    "repair_items_submitted",
    "repair_items_deleted",
    "repair_items_deferred",
    "repair_errors",
    "merkle_divergence",
    "circuit_state",
    "circuit_calls",
    "circuit_rejections",
    "slo_violations",
    "errors",
    "dead_letters",
    "transitions",
}
COUNTERS = {name for name, _, _ in declared._COUNTERS}
DECLARED = declared._LABELS


class Slow(MemorySyncEngine):
    """A store that takes its time, fails, hangs, or takes no writes, as it is told to."""

    def __init__(self) -> None:
        super().__init__(wall_clock=SkewedWallClock(LoopClock(), START_MS))
        self.takes_sec = 0.0
        self.failing = False

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Apply, as slowly as it is told to."""
        if self.takes_sec:
            await asyncio.sleep(self.takes_sec)
        if self.failing:
            raise OSError("it is broken")
        return await super().apply_many(changes, received)


class Rig:
    """Node b, which reads node a; everything but the engine is simulated."""

    def __init__(self, **settings: Any) -> None:
        self.clock = LoopClock()
        wall_clock = SkewedWallClock(self.clock, START_MS)
        rng = random.Random(1)
        self.server = SimRedis(now_ms=wall_clock.now_ms)
        self.peer = SimStore(self.server, node_id="a", rng=rng, ttl_ms=WEEK_MS, grace_ms=WEEK_MS)
        self.peer.open()
        self.transport = SimTransport({"a": self.server}, self.clock, rng)
        self.cursors = MemoryCursorStore()
        self.store = Slow()
        self.config = ReplicationConfig(
            local_node_id="b",
            peers=[PeerConfig(node_id="a", redis_url="redis://a")],
            settings=Settings.model_validate(settings),
        )
        self.ports = Ports(self.transport, self.cursors, self.clock, wall_clock, rng)
        self.engine = self.restarted()

    def restarted(self) -> ReplicationEngine:
        """Return another engine on the same store and cursors, which is not started."""
        return ReplicationEngine(self.config, self.store, ports=self.ports)

    def send(self, *entries: Sequence[bytes]) -> None:
        """Append entries to the peer's stream, in one turn."""
        for fields in entries:
            self.server.execute("XADD", self.peer.keys.stream, "*", *fields)

    async def tail(self) -> None:
        """Start, and wait until the link tails."""
        await self.engine.start()
        await self.reach(PeerState.TAILING)

    async def reach(self, state: PeerState) -> None:
        """Wait for a state of the link."""
        await self.engine.wait_for_state(state, peer_id="a", timeout=1000)

    def get(self, name: str, **labels: str) -> float | None:
        """Return a sample of node b, None where there is none."""
        return self.engine.metrics.registry.get_sample_value(
            f"replication_{name}", {"node_id": "b", **labels}
        )

    def of_a(self, *names: str, **labels: str) -> list[float | None]:
        """Return samples of the peer."""
        return [self.get(name, peer_id="a", **labels) for name in names]


def entry(key: str, content: bytes | None, at_ms: int, version: int = 1) -> list[bytes]:
    """Return the fields of an entry."""
    body = content or b""
    return encode_fields(
        SyncItem(key, body, "binary", content_hash(body), version, at_ms, content is None, "a")
    )


def simulated(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on virtual time."""
    run(play, start_ms=START_MS)


# What is declared ---------------------------------------------------------------------------------


def test_every_metric_of_the_specification_is_declared() -> None:
    """If this fails a dashboard made for the specification stays empty."""
    assert set(DECLARED) >= SPECIFIED


def test_every_declared_metric_is_used() -> None:
    """If this fails a metric is shown that nobody ever counts."""
    own = ast.parse((ROOT / "fsm_replication/metrics.py").read_text(encoding="utf-8"))
    bound = {
        target.attr: node.value.args[0].value
        for node in ast.walk(own)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and node.value.args
        and isinstance(node.value.args[0], ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    used: set[Any] = set()
    for path in (ROOT / "fsm_replication").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
        if path.name == "metrics.py":
            # What is only bound is not used yet.
            held = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)}
            calls = [call for call in calls if id(call) not in held]
        else:
            used |= {bound.get(n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        for call in calls:
            name = call.args[0]
            if getattr(call.func, "attr", "") == "get" and isinstance(name, ast.Constant):
                used.add(name.value)
    repaired = {name for name in DECLARED if name.startswith("repair_")}
    assert set(DECLARED) - used <= repaired
    assert len(DECLARED) - len(repaired) > 30


def test_the_docs_name_every_metric() -> None:
    """If this fails an operator looks for a metric in vain, or does not know that it is there."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `replication_([a-z_]+)` \| (-|[`a-z_, ]+) \| (.*?) \|$", text, re.MULTILINE
    )
    told = {
        name.removesuffix("_total"): tuple(re.findall(r"`([a-z_]+)`", labels))
        for name, labels, _ in rows
    }
    assert told == {name: tuple(labels) for name, labels in DECLARED.items()}
    for name, _, meaning in rows:
        assert meaning
        base = name.removesuffix("_total")
        assert name.endswith("_total") == (base in COUNTERS)


# The hot path -------------------------------------------------------------------------------------


def test_what_the_hot_path_counts() -> None:
    """If this fails the numbers of the hot path are made up."""

    async def play() -> None:
        rig = Rig(hot_path={"max_batch_size": 50})
        await rig.tail()
        now = START_MS + 1000
        held = SyncItem("held", b"new", "binary", content_hash(b"new"), 5, now + 5, False, "b")
        await rig.store.submit(held)
        rig.send(
            entry("k1", b"1", now),
            entry("k1", b"2", now + 1),
            entry("k2", b"1", now),
            entry("held", b"old", now),
            entry("gone", None, now),
            entry("ahead", b"1", now + 5 * 60_000),
            [b"op", b"what"],
        )
        await asyncio.sleep(1)
        names = ("read", "applied", "deduped")
        assert rig.of_a(*(f"cdc_events_{name}_total" for name in names)) == [7, 4, 2]
        kinds = ("submitted", "deleted", "skipped", "errors")
        assert rig.of_a(*(f"batch_{kind}_total" for kind in kinds)) == [4, 1, 1, 0]
        assert rig.of_a("batch_size_sum", "batch_size_count") == [7, 1]
        assert rig.of_a("dead_letters_total", reason="field") == [1]
        assert rig.of_a("clock_ahead_total") == [1]
        reads, flushes = rig.of_a("stream_reads_total", "batch_flush_duration_seconds_count")
        assert reads
        assert flushes
        assert rig.of_a("lag_ms", "lag_events", "adaptive_batch_size") == [0, 0, 100]
        health = rig.engine.health_check().peers[0]
        assert health.events_read == 7
        await rig.engine.shutdown()
        # One of the bootstrap, and one beside the dead letter; there was nothing left to flush.
        assert rig.get("cursor_persists_total") == 2
        assert rig.get("cursor_flushes_total") is None

    simulated(play)


def test_a_gap_is_counted() -> None:
    """If this fails nobody learns that a peer's stream is too short."""

    async def play() -> None:
        rig = Rig()
        await rig.tail()
        rig.transport.cut("a")
        await rig.reach(PeerState.BACKOFF)
        for number in range(20):
            rig.peer.put(f"k{number}", b"x")
        rig.server.execute("XTRIM", rig.peer.keys.stream, "MAXLEN", "1")
        rig.transport.heal("a")
        await rig.reach(PeerState.BOOTSTRAPPING)
        await rig.reach(PeerState.TAILING)
        assert rig.of_a("stream_trimmed_total") == [1]
        await rig.engine.shutdown()

    simulated(play)


def test_lag_grows_while_nothing_is_settled() -> None:
    """If this fails the lag that is shown of a link that stands still is that of its best days."""

    async def play() -> None:
        rig = Rig(slo={"max_replication_lag_sec": 20})
        assert all(map(math.isnan, rig.of_a("lag_events")))  # type: ignore[arg-type]
        await rig.tail()
        rig.store.accepting_writes = False
        rig.send(entry("k", b"1", START_MS))
        await rig.reach(PeerState.PAUSED)
        assert rig.of_a("backpressure_pauses_total") == [1]
        await asyncio.sleep(60)
        (lag_ms, lag_sec, events) = rig.of_a("lag_ms", "lag_seconds", "lag_events")
        health = rig.engine.health_check().peers[0]
        assert (lag_ms, events) == (health.lag_ms, 1)
        assert lag_sec == pytest.approx(60, abs=1)
        assert rig.of_a("slo_violations_total", slo_type="replication_lag")[0]
        rig.store.accepting_writes = True
        await rig.reach(PeerState.TAILING)
        await asyncio.sleep(1)
        assert rig.of_a("lag_ms", "lag_seconds", "lag_events") == [0, 0, 0]
        await rig.engine.shutdown()

    simulated(play)


# Limits -------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture, event: str) -> list[Any]:
    """Return the records of a warning."""
    return [record for record in caplog.records if vars(record).get("event") == event]


def test_a_slow_store_counts_each_time_and_is_warned_of_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If this fails a limit of settings.slo does nothing, or fills the log."""

    async def play() -> None:
        rig = Rig()
        await rig.tail()
        rig.store.takes_sec = 0.3
        for number in range(10):
            rig.send(entry(f"k{number}", b"1", START_MS))
            await asyncio.sleep(1)
        assert rig.of_a("slo_violations_total", slo_type="batch_flush_latency") == [10]
        (told,) = warnings_of(caplog, "slo_violated")
        assert (told.slo, told.peer_id, told.limit_sec) == ("batch_flush_latency", "a", 0.2)
        assert told.seconds == pytest.approx(0.3)
        await asyncio.sleep(60)
        rig.send(entry("late", b"1", START_MS))
        await asyncio.sleep(1)
        again = warnings_of(caplog, "slo_violated")[1:]
        assert [record.more_since_last_warning for record in again] == [9]
        await rig.engine.shutdown()

    with caplog.at_level(logging.WARNING, "fsm_replication"):
        simulated(play)


def test_a_slow_peer_counts(caplog: pytest.LogCaptureFixture) -> None:
    """If this fails nobody learns that the line to a peer is slow."""

    async def play() -> None:
        rig = Rig(slo={"max_peer_op_latency_ms": 400, "max_stream_read_latency_ms": 400})
        await rig.tail()
        assert rig.of_a("slo_violations_total", slo_type="peer_op_latency") == [None]
        assert rig.of_a("peer_operation_duration_seconds_count", operation="xinfo")[0]
        assert rig.of_a("peer_operation_duration_seconds_count", operation="connect") == [1]
        # At the head a read waits for entries, which is no fault of anybody.
        await asyncio.sleep(60)
        assert rig.of_a("slo_violations_total", slo_type="stream_read_latency") == [None]
        rig.transport.delay = lambda _name, _host: 0.5
        await rig.engine.repair()
        (compared,) = rig.of_a("slo_violations_total", slo_type="peer_op_latency")
        assert compared
        assert warnings_of(caplog, "slo_violated")[0].operation in {"getrange", "hgetall", "ping"}
        await rig.engine.pause("a")
        await rig.engine.resume("a")
        await rig.reach(PeerState.TAILING)
        rig.send(*(entry(f"k{number}", b"1", START_MS) for number in range(3000)))
        await asyncio.sleep(30)
        assert rig.of_a("slo_violations_total", slo_type="stream_read_latency")[0]
        await rig.engine.shutdown()

    with caplog.at_level(logging.WARNING, "fsm_replication"):
        simulated(play)


def test_a_timed_connection_is_the_connection() -> None:
    """If this fails a call of the port goes past, or is not passed on."""
    port = {name for name in vars(Connection) if not name.startswith("_")}
    assert port <= {name for name in vars(TimedConnection) if not name.startswith("__")}


def test_pings_are_counted() -> None:
    """If this fails nobody sees whether idle peers answer."""

    async def play() -> None:
        rig = Rig(hot_path={"block_timeout": "10m"}, cold_path={"enabled": False})
        await rig.tail()
        await asyncio.sleep(200)
        assert rig.of_a("peer_pings_total", status="ok")[0]
        assert rig.of_a("peer_ping_latency_seconds_count")[0]
        assert rig.of_a("peer_pings_total", status="failed") == [None]
        rig.transport.hang("a")
        await asyncio.sleep(200)
        assert rig.of_a("peer_pings_total", status="failed")[0]
        rig.transport.heal("a")
        await rig.engine.shutdown()

    simulated(play)


# Circuits -----------------------------------------------------------------------------------------


def test_calls_through_circuits_are_counted() -> None:
    """If this fails an open circuit shows in no graph."""

    async def play() -> None:
        rig = Rig(cold_path={"enabled": False})
        await rig.tail()
        circuit = {"circuit": "store-writes"}
        (before,) = [rig.get("circuit_calls_total", outcome="success", **circuit)]
        rig.send(entry("k", b"1", START_MS))
        await asyncio.sleep(1)
        assert rig.get("circuit_calls_total", outcome="success", **circuit) == (before or 0) + 1
        rig.store.failing = True
        rig.send(entry("k", b"2", START_MS + 1))
        await rig.reach(PeerState.PAUSED)
        assert rig.engine.health_check().peers[0].pause_reasons == {PauseReason.CIRCUIT}
        assert rig.get("circuit_calls_total", outcome="failure", **circuit) == 3
        assert rig.of_a("batch_errors_total") == [3]
        assert rig.get("circuit_state", **circuit) == 2
        with pytest.raises(Exception, match="store-writes"), rig.engine.circuit.writes.guard():
            pass
        assert rig.get("circuit_rejections_total", **circuit) == 1
        rig.store.failing = False
        await rig.reach(PeerState.TAILING)
        await asyncio.sleep(300)
        assert rig.engine.circuit.writes.state is not CircuitState.OPEN
        rig.transport.cut("a")
        await rig.reach(PeerState.BACKOFF)
        await asyncio.sleep(100)
        assert rig.get("circuit_calls_total", outcome="failure", circuit="peer:a")
        assert rig.of_a("peer_connections_total", status="failed")[0]
        assert rig.of_a("errors_total", error_type="ConnectionLostError")[0]
        moved = rig.of_a("peer_circuit_transitions_total", source="Closed", dest="Open")
        assert moved == [1]
        await rig.engine.shutdown()

    simulated(play)


# The cold path ------------------------------------------------------------------------------------


def test_what_repairs_count_is_what_they_return() -> None:
    """If this fails the metrics of the cold path and its answers tell two stories."""

    async def play() -> None:
        rig = Rig(hot_path={"enabled": False}, cold_path={"interval_sec": 3600})
        for number in range(5):
            rig.peer.put(f"k{number}", b"x")
        rig.peer.delete("k0")
        await rig.engine.start()
        await rig.reach(PeerState.STANDBY)
        stats = await rig.engine.repair()
        assert (stats.items_fetched, stats.items_submitted, stats.items_deleted) == (5, 4, 1)
        for name in ("peers_checked", "items_fetched", "items_submitted", "items_deleted"):
            assert rig.get(f"repair_{name}_total") == getattr(stats, name)
        assert rig.of_a("merkle_divergence_total") == [1]
        assert (await rig.engine.repair()).peers_in_sync == 1
        assert rig.get("repair_peers_in_sync_total") == 1
        assert rig.of_a("merkle_divergence_total") == [1]
        await asyncio.sleep(3700)
        assert rig.get("repair_cycles_total") == 1
        assert rig.get("repair_cycle_duration_seconds_count") == 1
        await rig.engine.pause("a")
        await asyncio.sleep(3700)
        assert rig.get("repair_skipped_total", reason="not at rest") == 1
        assert (await rig.engine.repair()).errors == 1
        assert rig.of_a("peer_operation_duration_seconds_count", operation="repair") == [3]
        await rig.engine.shutdown()

    simulated(play)


# The cursor store ---------------------------------------------------------------------------------


def test_flushes_that_fail_are_counted() -> None:
    """If this fails a full disk shows in no graph."""

    async def play() -> None:
        rig = Rig()
        await rig.tail()
        save = rig.cursors.save

        async def full(_cursors: Any) -> None:
            raise CursorStoreError("the disk is full", path="memory", retryable=True)

        rig.cursors.save = full  # type: ignore[method-assign, assignment]
        rig.send(entry("k", b"1", START_MS))
        await asyncio.sleep(11)
        assert rig.get("cursor_flush_errors_total") == 2
        rig.cursors.save = save  # type: ignore[method-assign]
        await asyncio.sleep(6)
        assert rig.get("cursor_persists_total") == 2
        assert rig.get("cursor_flushes_total") == 1
        await rig.engine.shutdown()

    simulated(play)


async def test_tries_of_a_locked_cursor_file_are_counted(tmp_path: Path) -> None:
    """If this fails nobody sees that something else holds on to the file."""
    path, retries = str(tmp_path / "c.db"), []
    store = SqliteCursorStore(path, on_retry=lambda: retries.append(1))
    await store.open()
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        locked.set()
        release.wait(20)
        other.execute("ROLLBACK")
        other.close()

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        await asyncio.to_thread(locked.wait, 20)
        saving = asyncio.create_task(store.set_operator_pause("a", True))
        await until(lambda: retries)
        release.set()
        await saving
    finally:
        release.set()
        holder.join()
        await store.close()


async def test_an_engine_counts_the_tries_of_its_own_cursor_file(nodes: Nodes) -> None:
    """If this fails the metric is there and nobody counts."""
    engine = nodes.engine()
    store: Any = engine._ports.cursor_store
    store._file._on_retry()
    value = engine.metrics.registry.get_sample_value(
        "replication_cursor_retries_total", {"node_id": engine.node_id}
    )
    assert value == 1
    await engine.shutdown()


# While it starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("up_after_sec", [1.0, 12.0, 24.0])
def test_a_peer_that_comes_up_within_the_budget_is_met(up_after_sec: float) -> None:
    """If this fails services that start side by side fail, though each was up in time."""

    async def play() -> None:
        rig = Rig()
        rig.transport.cut("a")
        starting = asyncio.create_task(rig.engine.start())
        await asyncio.sleep(up_after_sec)
        rig.transport.heal("a")
        await starting
        # The start-up profile waits five seconds at most.
        assert rig.clock.monotonic() <= up_after_sec + 5.1
        assert rig.engine.health_check().peers[0].circuit_state is CircuitState.CLOSED
        await rig.engine.shutdown()

    simulated(play)


def test_after_the_start_waits_begin_anew_and_the_circuit_counts() -> None:
    """If this fails a peer that was down at the start is looked for rarely, or without end."""

    async def play() -> None:
        rig = Rig()
        rig.engine = ReplicationEngine(
            ReplicationConfig(
                local_node_id="b",
                peers=[
                    PeerConfig(node_id="a", redis_url="redis://a"),
                    PeerConfig(node_id="c", redis_url="redis://c"),
                ],
            ),
            rig.store,
            ports=rig.engine._ports,
        )
        rig.transport.cut("a")
        starting = asyncio.create_task(rig.engine.start())
        await asyncio.sleep(20)
        rig.transport.heal("a")
        await starting
        tried = rig.get("peer_connections_total", peer_id="c", status="failed") or 0
        assert tried >= 6
        await asyncio.sleep(12)
        more = (rig.get("peer_connections_total", peer_id="c", status="failed") or 0) - tried
        # One, two, four seconds, each shortened by up to a half; not minutes.
        assert more >= 3
        await asyncio.sleep(300)
        assert rig.engine.health_check().peers_circuit_open == 1
        await rig.engine.shutdown()

    simulated(play)


def test_a_peer_that_does_not_come_up_fails_the_start_in_time() -> None:
    """If this fails a start outlasts its budget."""

    async def play() -> None:
        rig = Rig(startup={"timeout": 8})
        rig.transport.cut("a")
        began = rig.clock.monotonic()
        with pytest.raises(NoPeerError):
            await rig.engine.start()
        assert rig.clock.monotonic() - began <= 8.1

    simulated(play)
