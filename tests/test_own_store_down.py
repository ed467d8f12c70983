"""The node's own store is down: it is told without traffic, and over soon after it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, peer_config, until, until_async

from fsm_replication import HealthCheck, ReplicationEngine
from fsm_replication.circuits import Circuit, CircuitState
from fsm_replication.config import ReplicationConfig, Settings
from fsm_replication.errors import CircuitOpenError, StoreError
from fsm_replication.reports import PauseReason
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.tables import PeerState
from fsm_replication.testing import LocalMesh, LoopClock, run, topology
from fsm_replication.testing.sim_store import SimStore

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
LOOK_SEC = 2.0
PING_SEC = 5.0
PROBE_SEC = 0.25
DOWN = StoreError("the store is down")


def settings(**parts: Any) -> Settings:
    """Return settings of a node that may start without peers, and whose cold path rests."""
    startup = {"when_no_peer": "run"}
    return Settings.model_validate({"startup": startup, "cold_path": {"enabled": False}, **parts})


async def two_nodes(**parts: Any) -> tuple[LocalMesh, ReplicationEngine, SimStore]:
    """Return nodes a and b, and of b, which tails a, the engine and the store."""
    mesh = LocalMesh("ab", topology("mesh", "ab"), settings=settings(**parts))
    for name in "ab":
        await mesh.start(name)
    engine = mesh.nodes["b"].engine
    assert engine is not None
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=60)
    return mesh, engine, mesh.nodes["b"].store


def now() -> float:
    """Return virtual seconds."""
    return asyncio.get_running_loop().time()


async def sleep_until(condition: Callable[[], object], within_sec: float) -> float:
    """Let virtual time pass until a condition holds; returns how long that took."""
    began = now()
    while not condition():
        assert now() - began <= within_sec, f"not within {within_sec:g} s"
        await asyncio.sleep(0.01)
    return now() - began


def told(health: HealthCheck) -> tuple[bool, bool, bool]:
    """Return what a load balancer and an operator look at."""
    return health.ready, health.healthy, health.store_reachable


# What is told -------------------------------------------------------------------------------------


def test_an_outage_of_the_store_shows_without_traffic() -> None:
    """If this fails a node whose store is down is sent requests until the next change comes."""

    async def main() -> None:
        mesh, engine, store = await two_nodes()
        assert told(engine.health_check()) == (True, True, True)
        await asyncio.sleep(100)
        assert told(engine.health_check()) == (True, True, True)
        store.failure = DOWN
        await sleep_until(lambda: not engine.health_check().ready, LOOK_SEC + 0.1)
        health = engine.health_check()
        assert told(health) == (False, False, False)
        assert health.store_error == "the store is down"
        assert engine.peers["a"] is PeerState.TAILING, "the line to the peer is well"
        # It is asked more than once before the circuit opens, and that is told too.
        await sleep_until(lambda: engine.health_check().reads_circuit is OPEN, 5 * LOOK_SEC)
        store.failure = None
        await sleep_until(lambda: told(engine.health_check()) == (True, True, True), 5)
        assert engine.health_check().store_error == ""
        await mesh.close()

    run(main)


def test_a_store_that_hangs_is_told_as_well() -> None:
    """If this fails a frozen store passes for a quiet one."""

    async def main() -> None:
        mesh, engine, store = await two_nodes()
        store.delay_sec = 1e6
        await sleep_until(lambda: not engine.health_check().ready, LOOK_SEC + PING_SEC + 0.1)
        assert "longer than 5 s" in engine.health_check().store_error
        store.delay_sec = 0.0
        await sleep_until(lambda: engine.health_check().healthy, LOOK_SEC + PING_SEC)
        await mesh.close()

    run(main)


def test_a_store_that_is_down_from_the_start_is_told_at_once() -> None:
    """If this fails a node says for seconds that it is ready, and was never."""

    async def main() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"), settings=settings())
        mesh.nodes["b"].store.failure = DOWN
        await mesh.start("b")
        engine = mesh.nodes["b"].engine
        assert engine is not None
        await sleep_until(lambda: not engine.health_check().store_reachable, 0.1)
        await mesh.close()

    run(main)


def test_an_open_circuit_of_either_kind_is_not_healthy() -> None:
    """If this fails health is green over a circuit that lets nothing through."""

    async def main() -> None:
        mesh, engine, store = await two_nodes()

        async def refuse(*_: object) -> Any:
            raise DOWN

        # It can be read from, so the node is ready; but nothing can be written.
        store.apply_many = refuse  # type: ignore[method-assign,assignment]
        mesh.nodes["a"].store.put("key", b"1")
        await sleep_until(lambda: engine.health_check().writes_circuit is OPEN, 5)
        health = engine.health_check()
        assert (health.ready, health.healthy, health.reads_circuit) == (True, False, CLOSED)
        del store.apply_many
        await sleep_until(lambda: engine.health_check().healthy, 5)
        await mesh.close()

    run(main)


def test_a_store_with_traffic_is_not_asked_besides() -> None:
    """If this fails every node asks its store needlessly, however busy both are."""

    async def main() -> None:
        mesh, _, store = await two_nodes()
        looks = 0
        ping = store.ping

        async def count() -> None:
            nonlocal looks
            looks += 1
            await ping()

        store.ping = count  # type: ignore[method-assign]
        for number in range(50):
            mesh.nodes["a"].store.put(f"key{number}", b"1")
            await asyncio.sleep(LOOK_SEC / 2)
        assert looks <= 1
        await asyncio.sleep(50)
        assert 24 <= looks <= 27
        await mesh.close()

    run(main)


def test_a_store_without_a_ping_of_its_own_is_asked_for_its_incarnation() -> None:
    """If this fails an outage of a store that somebody wrote shows only with traffic."""

    class Asked(MemorySyncEngine):
        asked = 0

        async def incarnation(self) -> str:
            self.asked += 1
            return await super().incarnation()

    async def main() -> None:
        store = Asked()
        assert type(store).ping is SyncEngine.ping
        await store.ping()
        assert store.asked == 1

    asyncio.run(main())


# How long it takes until it is over ----------------------------------------------------------------


async def probes_of(circuit: Circuit, *, until_sec: float) -> list[float]:
    """Return when a failing circuit lets a probe through, counted from its opening."""
    clock, at = LoopClock(), []
    for _ in range(3):
        with pytest.raises(StoreError), circuit.guard():
            raise DOWN
    began = clock.monotonic()
    while clock.monotonic() - began < until_sec:
        await clock.sleep(0.125)
        try:
            with circuit.guard():
                at.append(clock.monotonic() - began)
                raise DOWN
        except StoreError:
            continue
    return at


def test_the_wait_for_a_probe_doubles_and_is_short_again_after_a_minute() -> None:
    """If this fails a short outage lasts a minute, or a long one is a storm of probes."""

    async def main() -> None:
        circuit = Circuit(
            "c", failures=3, successes=1, reset_sec=1, reset_max_sec=60, clock=LoopClock()
        )
        assert await probes_of(circuit, until_sec=250) == [1, 3, 7, 15, 31, 63, 123, 183, 243]
        await asyncio.sleep(60)
        with circuit.guard():
            pass
        assert circuit.state is CLOSED
        # It was closed for too short a time to be well.
        await asyncio.sleep(59)
        for _ in range(3):
            with pytest.raises(StoreError), circuit.guard():
                raise DOWN
        assert circuit.probe_in_sec == 60
        await asyncio.sleep(60)
        with circuit.guard():
            pass
        await asyncio.sleep(60)
        assert await probes_of(circuit, until_sec=10) == [1, 3, 7]

    run(main)


def test_a_circuit_takes_over_other_numbers_while_it_is_open() -> None:
    """If this fails a wait that was configured too long lasts to its end."""

    async def main() -> None:
        circuit = Circuit("c", failures=3, successes=1, reset_sec=100, clock=LoopClock())
        for _ in range(3):
            with pytest.raises(StoreError), circuit.guard():
                raise DOWN
        circuit.configure(failures=1, successes=2, reset_sec=1, reset_max_sec=4)
        assert circuit.probe_in_sec == 4
        await asyncio.sleep(4)
        with circuit.guard():
            pass
        assert circuit.state is HALF_OPEN
        with circuit.guard():
            pass
        assert circuit.state is CLOSED
        with pytest.raises(StoreError), circuit.guard():
            raise DOWN
        assert circuit.state is OPEN
        with pytest.raises(CircuitOpenError), circuit.guard():
            pass

    run(main)


def test_the_numbers_of_the_circuits_are_settings_of_a_running_node() -> None:
    """If this fails the circuits keep the numbers that somebody wrote into the code."""

    async def main() -> None:
        writes = {"failures": 4, "successes": 1, "reset_first": 3, "reset_max": 12}
        mesh, engine, store = await two_nodes(circuits={"writes": writes})
        store.failure = DOWN
        mesh.nodes["a"].store.put("key", b"1")
        await sleep_until(lambda: engine.circuit.writes.state is OPEN, 5)
        calls = engine.metrics.get("circuit_calls", "store-writes", "failure")
        assert calls._value.get() == 4
        assert 2.9 < engine.circuit.writes.probe_in_sec <= 3
        config = mesh.nodes["b"].config
        shorter = {"writes": {**writes, "reset_first": 0.5, "reset_max": 0.5}}
        await engine.update_config(
            config.model_copy(update={"settings": settings(circuits=shorter)})
        )
        assert engine.circuit.writes.probe_in_sec <= 0.5
        with pytest.raises(Exception, match="below reset_first"):
            ReplicationConfig.model_validate(
                {
                    "local_node_id": "b",
                    "settings": {"circuits": {"reads": {"reset_first": 9, "reset_max": 8}}},
                }
            )
        await mesh.close()

    run(main)


@pytest.mark.parametrize("outage_sec", [0.5, 3, 10])
@pytest.mark.parametrize("busy", [False, True])
def test_a_short_outage_of_the_store_is_a_short_pause(outage_sec: float, *, busy: bool) -> None:
    """If this fails a restart of the node's own Redis stops replication for a minute."""

    async def main() -> None:
        mesh, engine, store = await two_nodes()
        peer = mesh.nodes["a"].store
        store.failure = DOWN
        began = now()
        while now() - began < outage_sec:
            if busy:
                peer.put(f"during {now():.2f}", b"1")
            await asyncio.sleep(0.1)
        store.failure = None
        peer.put("after", b"1")
        # A probe comes at most as long after the end as the outage had lasted.
        await sleep_until(
            lambda: store.held("after") and engine.peers["a"] is PeerState.TAILING, outage_sec + 3
        )
        await sleep_until(lambda: told(engine.health_check()) == (True, True, True), 5)
        assert store.items().keys() == peer.items().keys()
        await mesh.close()

    run(main)


def test_a_store_that_is_back_is_not_kept_waiting_by_its_writes() -> None:
    """If this fails the wait for a write grows while nobody could have written anything."""

    async def main() -> None:
        mesh, engine, store = await two_nodes()
        store.failure = DOWN
        mesh.nodes["a"].store.put("key", b"1")
        await sleep_until(lambda: PauseReason.CIRCUIT in reasons(engine), 10)
        await asyncio.sleep(300)
        store.failure = None
        # The circuit of reads waits 30 s at most, and no write was tried in vain meanwhile.
        await sleep_until(lambda: engine.circuit.reads.state is CLOSED, 31)
        await sleep_until(lambda: store.held("key"), 2 * PROBE_SEC)
        await mesh.close()

    run(main)


def reasons(engine: ReplicationEngine) -> frozenset[PauseReason]:
    """Return why the link to a is paused."""
    return engine.health_check().peers[0].pause_reasons


# On real servers ----------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_real_store_that_is_killed_for_three_seconds(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails a restart of the node's own Redis is told late, or costs a minute."""
    with RedisServer(persist=True) as own:
        async with (
            RedisSyncEngine(redis_server.url, node_id="a") as peer,
            RedisSyncEngine(own.url, node_id="b") as store,
            nodes.engine(peer_config(redis_server), store=store, settings=settings()) as engine,
        ):
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            await peer.put("before", b"1")
            await until_async(lambda: store.get("before"), "what was written before")
            assert engine.health_check().healthy
            loop = asyncio.get_running_loop()
            own.kill()
            killed_at = loop.time()
            await until(lambda: not engine.health_check().ready, "the outage to be told")
            assert loop.time() - killed_at < LOOK_SEC + 1
            await peer.put("during", b"1")
            await until(lambda: PauseReason.CIRCUIT in reasons(engine), "the link to be paused")
            await asyncio.sleep(max(0.0, killed_at + 3 - loop.time()))
            await asyncio.to_thread(own.start)
            back_at = loop.time()
            await peer.put("after", b"1")

            async def arrived() -> object:
                try:
                    return await store.get("after")
                except StoreError:
                    return None  # A connection from before the restart.

            await until_async(arrived, "what was written after the restart")
            await until(lambda: engine.peers["a"] is PeerState.TAILING, "the head")
            await until(lambda: engine.health_check().ready, "the node to be ready")
            took = loop.time() - back_at
            assert took < 6, took
            assert (await store.get("during")) is not None
