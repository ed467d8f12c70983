"""Live reconfiguration, and pauses that outlast whatever happens.

Where a link must be caught in one state the network, the servers and time are simulated, so that
it stays there for as long as it is looked at.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, Peer, held, peer_config, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from fsm_replication import (
    ConfigChange,
    ConfigError,
    CursorStoreError,
    DrainTimeoutError,
    EngineState,
    EngineStoppedError,
    MemorySyncEngine,
    PauseReason,
    PeerChange,
    PeerConfig,
    PeerState,
    Ports,
    ReplicationConfig,
    ReplicationEngine,
    SyncItem,
    UsageError,
)
from fsm_replication.config import CursorConfig, Settings, StoreConfig
from fsm_replication.config_change import compare_configs
from fsm_replication.current import Current
from fsm_replication.limiter import PrioritySlot
from fsm_replication.metrics import Metrics
from fsm_replication.ports import SystemClock, SystemWallClock
from fsm_replication.reports import LinkFact, Report
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.testing import LocalMesh, LoopClock, MemoryCursorStore, run, topology
from fsm_replication.testing.local_mesh import GRACE_SEC, TTL_SEC, LocalNode
from fsm_replication.workers.interlock import Interlock

MESH = {
    "hot_path": {"block_timeout": 20},
    "cold_path": {"interval_sec": 20},
    "tombstones": {"ttl": TTL_SEC, "grace": GRACE_SEC},
    "startup": {"when_no_peer": "run"},
}
ELSEWHERE = "redis://elsewhere"


def changed(base: Settings, **parts: dict[str, Any]) -> Settings:
    """Return settings with some fields of some parts changed."""
    return base.model_copy(
        update={name: getattr(base, name).model_copy(update=part) for name, part in parts.items()}
    )


class GatedStore(MemorySyncEngine):
    """Answers no call of a link while its gate is shut."""

    def __init__(self) -> None:
        super().__init__(node_id="b", tombstone_ttl_sec=TTL_SEC, tombstone_grace_sec=GRACE_SEC)
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.deaf = False

    async def _pass(self) -> None:
        self.waiting += 1
        try:
            while not self.gate.is_set():
                try:
                    await self.gate.wait()
                except asyncio.CancelledError:
                    if not self.deaf:
                        raise
        finally:
            self.waiting -= 1

    def holds(self, item: SyncItem) -> bool:
        """Say whether exactly this item is held."""
        return self._items.get(item.key) == item

    async def ping(self) -> None:
        """Answer: a look of the engine is no call of a link."""

    async def incarnation(self) -> str:
        """Return it once the gate is open."""
        await self._pass()
        return await super().incarnation()

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Apply once the gate is open."""
        await self._pass()
        return await super().apply_many(changes, received)


class Stage:
    """An engine of node b that reads node a, on a simulated network.

    The server of a answers under a second name too: as ``elsewhere``. Node c is at hand as well.
    """

    def __init__(self) -> None:
        self.mesh = LocalMesh("abc", topology("mesh", "abc"))
        self.mesh.servers["elsewhere"] = self.mesh.servers["a"]
        self.node: LocalNode = self.mesh.nodes["b"]
        self.node.transport.delay = lambda _name, _host: 0.02
        self.store = GatedStore()
        self.slot_holder = object()
        self.config = ReplicationConfig(
            local_node_id="b",
            peers=[PeerConfig(node_id="a", redis_url="redis://a")],
            settings=Settings.model_validate(MESH),
        )
        self.engine = self.make_engine()

    def make_engine(self, registry: CollectorRegistry | None = None) -> ReplicationEngine:
        """Return an engine of the node, as after a restart of its process."""
        node = self.node
        ports = Ports(
            transport=node.transport,
            cursor_store=node.cursors,
            clock=LoopClock(),
            wall_clock=node.wall_clock,
            random=random.Random(1),
        )
        return ReplicationEngine(self.config, self.store, ports=ports, registry=registry)

    async def restart(self) -> None:
        """Stop the engine, and start another on the same store and cursors."""
        await self.engine.shutdown()
        self.engine = self.make_engine()
        await self.engine.start()

    def with_peers(self, *peers: PeerConfig) -> ReplicationConfig:
        """Return the configuration in force with other peers."""
        return self.engine.config.model_copy(update={"peers": peers})

    def with_peer_a(self, **changes: Any) -> ReplicationConfig:
        """Return the configuration in force with a change of peer a."""
        peers = [
            peer.model_copy(update=changes) if peer.node_id == "a" else peer
            for peer in self.engine.config.peers
        ]
        return self.with_peers(*peers)

    def with_settings(self, **parts: dict[str, Any]) -> ReplicationConfig:
        """Return the configuration in force with some settings changed."""
        made = changed(self.engine.config.settings, **parts)
        return self.engine.config.model_copy(update={"settings": made})

    @property
    def hosts(self) -> list[str]:
        """The hosts that lines lead to, one for each line that is open at this end."""
        return open_lines(self.node)

    def moves(self, since: int = 0) -> list[str]:
        """Return the triggers of the link to a, without the first of them."""
        records = [record for record in self.engine.journal if record.machine == "link:a"]
        return [str(record.trigger) for record in records][since:]

    async def reaches(self, *states: PeerState, peer_id: str = "a") -> PeerState:
        """Wait until the link is in one of some states; returns it."""
        found = await self.engine.wait_for_state(*states, peer_id=peer_id, timeout=1000)
        assert isinstance(found, PeerState)
        return found

    async def replicates(self, *names: str) -> None:
        """Write at nodes, and wait for it to arrive."""
        for name in names:
            item = self.mesh.nodes[name].store.put(f"from.{name}", random.randbytes(4))
            await until_true(partial(self.store.holds, item))

    # Bringing the link into each state, and keeping it there.

    async def bring_to(self, state: PeerState) -> None:
        """Start the engine, and stop the link to a in this state."""
        self.mesh.nodes["a"].store.put("first", b"1")
        await getattr(self, f"_{state.name.lower()}")()
        assert self.engine.peers["a"] is state

    async def release(self) -> None:
        """Take away whatever holds the link where it is, but for a line that is cut."""
        self.store.gate.set()
        self.engine._copy_slot.release(self.slot_holder)

    async def _created(self) -> None:
        pass

    async def _connecting(self) -> None:
        self.node.transport.hang("a")
        await self.engine.start()
        await self.reaches(PeerState.CONNECTING)

    async def _resuming(self) -> None:
        self.store.gate.clear()
        await self.engine.start()
        await self.reaches(PeerState.RESUMING)

    async def _bootstrapping(self) -> None:
        await self.engine._copy_slot.acquire(self.slot_holder, lambda: 0)
        await self.engine.start()
        await self.reaches(PeerState.BOOTSTRAPPING)

    async def _tailing(self) -> None:
        await self.engine.start()
        await self.reaches(PeerState.TAILING)

    async def _catching_up(self) -> None:
        await self._tailing()
        await self.engine.pause("a")
        for _ in range(2):
            self.mesh.nodes["a"].store.put("second", random.randbytes(4))
            await asyncio.sleep(5)
        await self.engine.resume("a")
        # It decides while the gate is open, and settles nothing once it is shut.
        await self.reaches(PeerState.CATCHING_UP)
        self.store.gate.clear()
        await until_true(lambda: self.store.waiting)

    async def _standby(self) -> None:
        await self.engine.update_config(self.with_settings(hot_path={"enabled": False}))
        await self.engine.start()
        await self.reaches(PeerState.STANDBY)

    async def _paused(self) -> None:
        await self._tailing()
        await self.engine.pause("a")

    async def _disconnecting(self) -> None:
        await self._tailing()
        self.store.gate.clear()
        self.mesh.nodes["a"].store.put("second", b"2")
        await until_true(lambda: self.store.waiting)
        self.node.transport.cut("a")
        await self.reaches(PeerState.DISCONNECTING)

    async def _backoff(self) -> None:
        self.node.transport.cut("a")
        await self.engine.start()
        await self.reaches(PeerState.BACKOFF)

    async def _failed(self) -> None:
        await self.engine.update_config(self.with_peer_a(redis_url="redis://c"))
        await self.engine.start()
        await self.reaches(PeerState.FAILED)


def open_lines(node: LocalNode) -> list[str]:
    """Return the hosts that a node has lines to, one for each line."""
    return sorted(wire.host for wire in node.transport._wires if not wire.is_closing())


async def until_true(condition: Callable[[], object]) -> None:
    """Let simulated time pass until a condition holds."""
    async with asyncio.timeout(1000):
        while not condition():  # noqa: ASYNC110 - there is nothing to be woken by
            await asyncio.sleep(0.01)


@asynccontextmanager
async def on_stage() -> AsyncIterator[Stage]:
    """Set a stage; afterwards the engine is stopped, and nothing of it may be left."""
    stage = Stage()
    try:
        yield stage
    finally:
        stage.store.deaf = False
        await stage.release()
        await stage.engine.shutdown()
    assert stage.engine.state is EngineState.STOPPED
    assert stage.hosts == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


def simulated(play: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    """Run a play on a stage, on virtual time."""

    async def main() -> None:
        async with on_stage() as stage:
            await play(stage)

    run(main)


# What differs -----------------------------------------------------------------------------------


def config_of(*peers: PeerConfig, **more: Any) -> ReplicationConfig:
    """Return a configuration of node b."""
    return ReplicationConfig(local_node_id="b", peers=peers, **more)


A, C, D = (PeerConfig(node_id=name, redis_url=f"redis://u:secret@{name}") for name in "acd")


def test_a_change_names_what_differs_and_no_value() -> None:
    """If this fails an operator is told something else than what happened, or a password."""
    old = config_of(A, C)
    new = config_of(
        C.model_copy(update={"priority": 3, "redis_url": "redis://u:other@c"}),
        D,
        settings=changed(Settings(), cold_path={"interval_sec": 5}),
    )
    change = compare_configs(old, new)
    assert change == ConfigChange(
        peers_added=("d",),
        peers_removed=("a",),
        peers_changed=(PeerChange("c", ("redis_url", "priority")),),
        settings=("settings.cold_path.interval_sec",),
    )
    assert str(change) == (
        "peers added: d; peers removed: a; peers changed: c (redis_url, priority);"
        " settings changed: settings.cold_path.interval_sec"
    )
    assert change
    nothing = compare_configs(old, config_of(C, A))
    assert not nothing
    assert str(nothing) == "nothing changed"


# Peers come and go --------------------------------------------------------------------------------


async def test_peers_are_added_and_taken_out_while_writing_goes_on(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails a node must be restarted when another joins or leaves."""
    first, second = Peer(redis_servers()), Peer(redis_servers(), "c")
    for peer in (first, second):
        peer.write_marker()
        peer.send(f"{peer.node_id}.0", b"0")
    store = MemorySyncEngine(node_id="b")
    both = [peer_config(first.server), peer_config(second.server, "c")]
    async with nodes.engine(both[0], store=store) as engine:
        config = engine.config
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        change = await engine.update_config(config.model_copy(update={"peers": both}))
        assert change == ConfigChange(peers_added=("c",))
        assert list(engine.peers) == ["a", "c"]
        assert not engine.health_check().synced
        await engine.wait_for_state(PeerState.TAILING, peer_id="c", timeout=DEADLINE_SEC)
        await engine.wait_synced(DEADLINE_SEC)
        second.send("c.1", b"1")
        await until(lambda: len(store) == 3)
        watcher = engine.watch_state("a")

        change = await engine.update_config(config.model_copy(update={"peers": both[1:]}))
        assert change == ConfigChange(peers_removed=("a",))
        assert list(engine.peers) == ["c"]
        assert [one.node_id for one in engine.health_check().peers] == ["c"]
        assert [record.dest async for record in watcher][-1] is PeerState.STOPPED
        await until(lambda: not clients_of(first), "the connections to a are closed")
        first.send("a.1", b"1")
        with pytest.raises(UsageError, match="no peer 'a'"):
            await engine.pause("a")

        change = await engine.update_config(config.model_copy(update={"peers": both}))
        await until(lambda: len(store) == 4, "what came while a was not configured")
        assert await held(store, "a.1") == {"a.1": b"1"}
        assert "bootstrap" not in moves_since_last_connect(engine, "a")
    for peer in (first, second):
        await until(lambda peer=peer: not clients_of(peer))  # type: ignore[misc]
        peer.close()


def clients_of(peer: Peer) -> list[str]:
    """Return the names of the engine's connections to a server."""
    listed: Any = peer.client.client_list()
    return [one["name"] for one in listed if one["name"].startswith("fsm_replication")]


def moves_since_last_connect(engine: ReplicationEngine, peer_id: str) -> list[str | None]:
    """Return the triggers of a link since it was last made."""
    triggers = [one.trigger for one in engine.journal if one.machine == f"link:{peer_id}"]
    return triggers[len(triggers) - triggers[::-1].index("connect") :]


def test_metrics_of_a_peer_that_was_taken_out_are_gone() -> None:
    """If this fails dashboards show peers for ever that are long gone."""

    async def play(stage: Stage) -> None:
        registry = CollectorRegistry()
        stage.engine = engine = stage.make_engine(registry)
        await engine.start()
        await stage.reaches(PeerState.TAILING)
        link = engine._links["a"]
        assert samples_about(registry, "a")
        await engine.update_config(stage.with_peers())
        await link.waiter(PeerState.STOPPED).wait()
        assert samples_about(registry, "a") == []
        # Calls that began before may still end, and count.
        link.context.metrics.error("Late")
        link.context.metrics.diverged()
        for _ in range(link.context.peer.circuit_failure_threshold):
            with pytest.raises(OSError, match="late"), link.context.peer_circuit.guard():
                raise OSError("late")
        ticket = link.driver.machine.ticket(str(link.state))
        link.driver.post(Report("ping", LinkFact.LOST, ticket, "late"))
        await asyncio.sleep(1)
        assert samples_about(registry, "a") == []
        assert samples_about(registry, "b")

    simulated(play)


def samples_about(registry: CollectorRegistry, peer_id: str) -> list[str]:
    """Return the samples one of whose labels names a peer."""
    names = {peer_id, f"link:{peer_id}", f"peer:{peer_id}"}
    return [
        f"{sample.name}{sample.labels}"
        for family in registry.collect()
        for sample in family.samples
        if names & set(sample.labels.values())
    ]


def test_a_peer_added_again_waits_until_its_old_link_is_stopped() -> None:
    """If this fails two links of one peer move one cursor."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        engine, whole = stage.engine, stage.engine.config
        stage.store.gate.clear()
        stage.mesh.nodes["a"].store.put("second", b"2")
        await until_true(lambda: stage.store.waiting)
        await engine.update_config(stage.with_peers())
        again = asyncio.create_task(engine.update_config(whole))
        await asyncio.sleep(5)
        assert not again.done()
        assert engine.peers == {}
        stage.store.gate.set()
        assert await again == ConfigChange(peers_added=("a",))
        moves = stage.moves()
        assert moves[moves.index("shutdown") :][:3] == ["shutdown", "stopped", "connect"]
        await stage.reaches(PeerState.TAILING)
        await stage.replicates("a")

    simulated(play)


def test_a_link_that_will_not_end_keeps_its_peer_out_and_nothing_else() -> None:
    """If this fails a store that hangs for ever makes every later change hang with it."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        engine, whole = stage.engine, stage.engine.config
        stage.store.gate.clear()
        stage.store.deaf = True
        stage.mesh.nodes["a"].store.put("second", b"2")
        await until_true(lambda: stage.store.waiting)
        await engine.update_config(stage.with_peers())
        with pytest.raises(DrainTimeoutError) as raised:
            await engine.update_config(whole)
        assert "link:a:tailer" in raised.value.left_behind
        assert engine.config.peers == ()
        change = await engine.update_config(stage.with_settings(slo={"max_replication_lag_sec": 1}))
        assert change.settings == ("settings.slo.max_replication_lag_sec",)
        stage.store.deaf = False
        stage.store.gate.set()
        await engine.update_config(whole)
        await stage.reaches(PeerState.TAILING)

    simulated(play)


def test_a_link_that_is_taken_out_ends_in_time() -> None:
    """If this fails a peer that was taken out is still written for as long as a store hangs."""

    async def play(stage: Stage) -> None:
        slow = stage.with_settings(timeouts={"store_call": 5000, "drain": 7})
        await stage.engine.update_config(slow)
        await stage.bring_to(PeerState.TAILING)
        link = stage.engine._links["a"]
        stage.store.gate.clear()
        stage.mesh.nodes["a"].store.put("second", b"2")
        await until_true(lambda: stage.store.waiting)
        await stage.engine.update_config(stage.with_peers())
        began = asyncio.get_running_loop().time()
        await link.waiter(PeerState.STOPPED).wait()
        assert asyncio.get_running_loop().time() - began <= 7.1
        assert not stage.store.waiting
        assert stage.engine.is_running

    simulated(play)


def test_a_shutdown_waits_for_links_that_were_taken_out() -> None:
    """If this fails an engine is Stopped while a link of it still writes to the store."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        stage.store.gate.clear()
        stage.mesh.nodes["a"].store.put("second", b"2")
        await until_true(lambda: stage.store.waiting)
        await stage.engine.update_config(stage.with_peers())
        stopping = asyncio.create_task(stage.engine.shutdown())
        await asyncio.sleep(1)
        assert not stopping.done()
        stage.store.gate.set()
        await stopping
        assert stage.moves()[-1] == "stopped"

    simulated(play)


# What a link does about it, in every state --------------------------------------------------------

IN_EVERY_STATE = [state for state in PeerState if state.name not in ("SHUTTING_DOWN", "STOPPED")]
RUNNING = [state for state in PeerState if state.is_running]
OTHER_WAY = {state: ["connection_lost"] for state in RUNNING} | {
    PeerState.CREATED: [],
    PeerState.CONNECTING: ["connect_failed", "retry"],
    PeerState.DISCONNECTING: [],
    PeerState.BACKOFF: ["retry"],
    PeerState.FAILED: ["connect"],
}


@pytest.mark.parametrize("state", IN_EVERY_STATE)
@pytest.mark.parametrize("field", ["redis_url", "redis_prefix"])
def test_another_way_to_a_peer_is_taken_in_every_state(state: PeerState, field: str) -> None:
    """If this fails a link reads on where its peer no longer is, or waits to look elsewhere."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(state)
        before = len(stage.moves())
        change = {field: ELSEWHERE if field == "redis_url" else "p:"}
        made = await stage.engine.update_config(stage.with_peer_a(**change))
        assert made.peers_changed
        assert stage.moves(before) == OTHER_WAY[state]
        if state is PeerState.CREATED:
            await stage.engine.start()
        await stage.release()
        if field == "redis_prefix":
            # There is no node behind that prefix yet.
            stage.node.transport.heal("a")
            peer = stage.engine.health_check
            await until_true(lambda: "no node has written" in peer().peers[0].last_error)
            return
        if state is PeerState.STANDBY:
            await stage.reaches(PeerState.STANDBY)
        elif state is PeerState.PAUSED:
            await stage.reaches(PeerState.CONNECTING)
            await stage.reaches(PeerState.PAUSED)
            await stage.engine.resume("a")
        if state is not PeerState.STANDBY:
            await stage.reaches(PeerState.TAILING)
            await stage.replicates("a")
        assert stage.hosts == ["elsewhere"] * 2

    simulated(play)


DECIDED = (PeerState.BOOTSTRAPPING, PeerState.CATCHING_UP, PeerState.TAILING, PeerState.STANDBY)


@pytest.mark.parametrize("state", IN_EVERY_STATE)
def test_what_was_decided_is_decided_again_in_every_state(state: PeerState) -> None:
    """If this fails a link goes on by settings that are no longer in force."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(state)
        before = len(stage.moves())
        enabled = state is PeerState.STANDBY
        made = await stage.engine.update_config(stage.with_settings(hot_path={"enabled": enabled}))
        assert made.settings == ("settings.hot_path.enabled",)
        assert stage.moves(before) == (["reconfigured"] if state in DECIDED else [])
        if state is PeerState.CREATED:
            await stage.engine.start()
        stage.node.transport.heal("a")
        if state is PeerState.FAILED:
            await stage.engine.update_config(stage.with_peer_a(redis_url="redis://a"))
        if state is PeerState.PAUSED:
            await stage.engine.resume("a")
        await stage.release()
        await stage.reaches(PeerState.TAILING if enabled else PeerState.STANDBY)
        before = len(stage.moves())
        await stage.engine.update_config(stage.with_settings(hot_path={"enabled": True}))
        await stage.reaches(PeerState.TAILING)
        await stage.replicates("a")
        assert "connection_lost" not in stage.moves(before)

    simulated(play)


def test_a_change_between_a_decision_and_its_report_is_not_lost() -> None:
    """If this fails a link that was just deciding keeps the old settings until it reconnects."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        for turns in range(40):
            await stage.engine.update_config(stage.with_settings(hot_path={"enabled": False}))
            for _ in range(turns):
                await asyncio.sleep(0)
            await stage.engine.update_config(stage.with_settings(hot_path={"enabled": True}))
            for _ in range(turns):
                await asyncio.sleep(0)
            await stage.engine.update_config(stage.with_settings(hot_path={"enabled": False}))
            await until_true(lambda: stage.engine.peers["a"] is PeerState.STANDBY)
            await asyncio.sleep(1)
            assert stage.engine.peers["a"] is PeerState.STANDBY
        assert "connection_lost" not in stage.moves()

    simulated(play)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("cold_path", {"interval_sec": 7, "max_items_per_cycle": 9}),
        ("slo", {"max_replication_lag_sec": 3}),
        ("limits", {"dead_letters": 5, "journal": 50}),
        ("hot_path", {"batch_size": 7, "block_timeout": 1, "max_batch_size": 70}),
        ("timeouts", {"connect": 3, "command": 3, "store_call": 3, "drain": 3}),
        ("repair", {"interlock_min": 3}),
        ("peer_health", {"ping_interval_sec": 3}),
        ("startup", {"timeout": 3}),
    ],
)
def test_what_needs_no_restart_of_a_link_gets_none(part: str, fields: dict[str, Any]) -> None:
    """If this fails a harmless change interrupts replication."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        before, lines = len(stage.moves()), list(stage.node.transport._wires)
        made = await stage.engine.update_config(stage.with_settings(**{part: fields}))
        assert len(made.settings) == len(fields)
        for change in ({"priority": 5}, {"allow_echo": True}, {"circuit_failure_threshold": 9}):
            made = await stage.engine.update_config(stage.with_peer_a(**change))
            assert made.peers_changed == (PeerChange("a", tuple(change)),)
        await stage.replicates("a")
        await asyncio.sleep(60)
        await stage.replicates("a")
        assert stage.moves(before) == []
        assert list(stage.node.transport._wires) == lines

    simulated(play)


def test_a_shorter_block_timeout_does_not_lose_the_read_under_way() -> None:
    """If this fails lowering block_timeout breaks every idle connection."""

    async def play(stage: Stage) -> None:
        await stage.engine.update_config(stage.with_settings(hot_path={"block_timeout": 600}))
        await stage.bring_to(PeerState.TAILING)
        await asyncio.sleep(1)
        before = len(stage.moves())
        await stage.engine.update_config(stage.with_settings(hot_path={"block_timeout": 1}))
        # Deciding anew, it comes back to the read that is still under way.
        await stage.engine.update_config(stage.with_settings(hot_path={"rate_limit_burst": 9}))
        await asyncio.sleep(500)
        assert stage.moves(before) == ["reconfigured", "tail"]

    simulated(play)


def test_priority_is_taken_up_by_links_that_wait_to_copy() -> None:
    """If this fails the links copy in the order of a configuration that is gone."""

    async def main() -> None:
        slot, order = PrioritySlot(LoopClock()), []
        ranks = {"x": 1, "y": 2}
        await slot.acquire("first", lambda: 0)

        async def copy(name: str) -> None:
            await slot.acquire(name, lambda: ranks[name])
            order.append(name)
            slot.release(name)

        waiting = [asyncio.create_task(copy(name)) for name in ranks]
        await asyncio.sleep(0)
        ranks["y"] = 0
        slot.release("first")
        await asyncio.gather(*waiting)
        assert order == ["y", "x"]

    run(main)


def test_links_are_served_in_the_order_of_their_new_priorities() -> None:
    """If this fails repair visits peers in the order of a configuration that is gone."""

    async def play(stage: Stage) -> None:
        peers = [PeerConfig(node_id=name, redis_url=f"redis://{name}") for name in "ac"]
        await stage.engine.update_config(stage.with_peers(*peers))
        await stage.bring_to(PeerState.TAILING)
        assert list(stage.engine.peers) == ["a", "c"]
        await stage.engine.update_config(stage.with_peer_a(priority=1))
        assert [target.context.peer_id for target in stage.engine._links.repair_targets()] == [
            "c",
            "a",
        ]

    simulated(play)


def test_a_changed_circuit_begins_a_new_count_and_is_tried_at_once() -> None:
    """If this fails a link waits out an hour that is no longer configured."""

    async def play(stage: Stage) -> None:
        await stage.engine.update_config(
            stage.with_peer_a(circuit_failure_threshold=1, circuit_reset_timeout_sec=3600)
        )
        await stage.bring_to(PeerState.BACKOFF)
        assert stage.engine.health_check().peers_circuit_open == 1
        stage.node.transport.heal("a")
        before = len(stage.moves())
        await stage.engine.update_config(stage.with_peer_a(circuit_reset_timeout_sec=1))
        assert stage.engine.health_check().peers_circuit_open == 0
        assert stage.moves(before) == ["retry"]
        await stage.reaches(PeerState.TAILING)

    simulated(play)


def test_the_rate_limit_in_force_ends_a_wait_for_the_old_one() -> None:
    """If this fails links wait for hours after a limit was lifted."""

    async def play(stage: Stage) -> None:
        await stage.engine.update_config(
            stage.with_settings(
                hot_path={
                    "rate_limit_enabled": True,
                    "rate_limit_per_sec": 0.001,
                    "rate_limit_burst": 1,
                },
                cold_path={"enabled": False},
            )
        )
        await stage.bring_to(PeerState.TAILING)
        source = stage.mesh.nodes["a"].store
        for number in range(5):
            source.put(f"k{number}", b"1")
        await asyncio.sleep(60)
        assert len(stage.store) < 4
        await stage.engine.update_config(
            stage.with_settings(hot_path={"rate_limit_enabled": False})
        )
        await asyncio.sleep(1)
        assert len(stage.store) == 6

    simulated(play)


def test_limits_on_bytes_in_force_are_those_of_the_next_read() -> None:
    """If this fails a payload limit stays what it was when the link connected."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        await stage.engine.update_config(
            stage.with_settings(limits={"payload_bytes": 100, "batch_bytes": 1000})
        )
        await stage.reaches(PeerState.TAILING)
        stage.mesh.nodes["a"].store.put("large", random.Random(1).randbytes(200))
        await stage.replicates("a")
        (letter,) = await stage.engine.dead_letters.list()
        assert letter.key == "large"

    simulated(play)


def test_the_interlock_goes_by_the_bounds_in_force() -> None:
    """If this fails a bound that was lowered lets a peer delete as much as before."""
    current = Current(Settings())
    interlock = Interlock("a", current, SystemClock(), SystemWallClock(), MemoryCursorStore())
    interlock.learn(10_000)
    assert interlock.fits(1500)
    current.replace(changed(Settings(), repair={"interlock_share": 0.1}))
    assert not interlock.fits(1500)
    current.replace(changed(Settings(), repair={"interlock_min": 1500}))
    assert interlock.fits(1500)


def test_links_that_wait_for_room_for_dead_letters_hear_that_none_is_needed() -> None:
    """If this fails a link stays Paused although dead letters may be dropped now."""

    async def play(stage: Stage) -> None:
        await stage.engine.update_config(stage.with_settings(limits={"dead_letters": 1}))
        await stage.bring_to(PeerState.TAILING)
        stream = stage.mesh.nodes["a"].store.keys.stream
        for number in range(2):
            stage.mesh.servers["a"].execute("XADD", stream, "*", "op", "X", "key", f"k{number}")
            await asyncio.sleep(1)
        await stage.reaches(PeerState.PAUSED)
        made = changed(stage.engine.config.settings)
        made = made.model_copy(update={"dead_letters": {"when_full": "drop_oldest"}})
        config = stage.engine.config.model_copy(update={"settings": made})
        await stage.engine.update_config(config)
        await stage.reaches(PeerState.TAILING)
        await stage.replicates("a")

    simulated(play)


def test_the_interval_of_the_cold_path_and_of_pings_counts_at_once() -> None:
    """If this fails a worker sleeps through a change, for as long as the old interval was."""

    async def play(stage: Stage) -> None:
        off = {"enabled": False}
        await stage.engine.update_config(stage.with_settings(cold_path=off, peer_health=off))
        await stage.bring_to(PeerState.TAILING)
        cycles = stage.engine.metrics.get("repair_cycles")._value
        pings = stage.engine.metrics.get("peer_pings", "a", "ok")._value
        await asyncio.sleep(600)
        assert (cycles.get(), pings.get()) == (0, 0)
        hour: dict[str, Any] = {"interval_sec": 3600, "enabled": True}
        health = {"ping_interval_sec": 3600, "idle_threshold_sec": 0, "enabled": True}
        await stage.engine.update_config(stage.with_settings(cold_path=hour, peer_health=health))
        await asyncio.sleep(600)
        assert (cycles.get(), pings.get()) == (0, 0)
        await stage.engine.update_config(
            stage.with_settings(
                cold_path={"interval_sec": 700}, peer_health={"ping_interval_sec": 700}
            )
        )
        await asyncio.sleep(99)
        assert (cycles.get(), pings.get()) == (0, 0)
        await asyncio.sleep(2)
        assert (cycles.get(), pings.get()) == (1, 1)

    simulated(play)


def test_a_wait_for_a_value_follows_the_value() -> None:
    """If this fails whoever sleeps by a setting wakes too early, too late or never."""

    async def main() -> None:
        clock, current = LoopClock(), Current(10.0)
        sleeping = asyncio.create_task(current.sleep(clock, lambda value: value))
        await asyncio.sleep(4)
        current.replace(20.0)
        await asyncio.sleep(15)
        assert not sleeping.done()
        current.replace(3.0)
        await asyncio.sleep(0.001)
        assert sleeping.done()
        waiting = asyncio.create_task(current.wait_until(lambda value: value > 5))
        current.replace(4.0)
        await asyncio.sleep(1)
        assert not waiting.done()
        current.replace(6.0)
        await waiting

    run(main)


# Refused whole ------------------------------------------------------------------------------------


def test_what_cannot_change_is_refused_whole_and_named() -> None:
    """If this fails half of a configuration is in force, or nobody knows why it was refused."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        old, before = stage.engine.config, len(stage.engine.journal)
        wrong = ReplicationConfig(
            local_node_id="z",
            peers=[D],
            settings=changed(old.settings, tombstones={"ttl": 60}, timeouts={"cursor": 1}),
            cursor=CursorConfig(sqlite_path="other.db", wal_mode=False),
            store=StoreConfig(kind="memory"),
        )
        with pytest.raises(ConfigError) as raised:
            await stage.engine.update_config(wrong)
        assert [problem.partition(":")[0] for problem in raised.value.problems] == [
            "cursor.sqlite_path",
            "cursor.wal_mode",
            "local_node_id",
            "settings.timeouts.cursor",
            "settings.tombstones.ttl",
            "store",
        ]
        assert stage.engine.config is old
        assert len(stage.engine.journal) == before
        assert list(stage.engine.peers) == ["a"]
        with pytest.raises(ConfigError, match=r"peers\[0\]\.redis_url"):
            await stage.engine.update_config({"local_node_id": "b", "peers": [{"node_id": "a"}]})  # type: ignore[arg-type]
        assert stage.engine.config is old
        await stage.replicates("a")

    simulated(play)


def test_a_cursor_store_that_cannot_be_read_refuses_the_whole_change() -> None:
    """If this fails a new peer is read from the wrong place, or half of a change is in force."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        new = stage.with_peers(PeerConfig(node_id="c", redis_url="redis://c"))
        stage.node.cursors.failure = CursorStoreError("locked", path="x", retryable=True)
        with pytest.raises(CursorStoreError, match="locked"):
            await stage.engine.update_config(new)
        stage.node.cursors.failure = None
        assert list(stage.engine.peers) == ["a"]
        await stage.engine.update_config(new)
        assert list(stage.engine.peers) == ["c"]
        await stage.reaches(PeerState.TAILING, peer_id="c")
        await stage.replicates("c")

    simulated(play)


# In every state of the engine ---------------------------------------------------------------------


def test_before_the_start_anything_may_change(tmp_path: Path) -> None:
    """If this fails an engine must be made anew to correct its configuration."""
    registry = CollectorRegistry()
    first = config_of(A, C, cursor={"sqlite_path": str(tmp_path / "missing" / "c.db")})
    engine = ReplicationEngine(first, MemorySyncEngine(), registry=registry)
    second = ReplicationConfig(
        local_node_id="n",
        peers=[C.model_copy(update={"redis_url": "redis://127.0.0.1:1"}), D],
        settings=Settings.model_validate({"startup": {"when_no_peer": "run"}}),
        cursor=CursorConfig(sqlite_path=str(tmp_path / "c.db")),
    )

    async def main() -> None:
        await engine.pause("c")
        waiting = asyncio.create_task(
            engine.wait_for_state(PeerState.STOPPED, peer_id="a", timeout=DEADLINE_SEC)
        )
        await asyncio.sleep(0)
        change = await engine.update_config(second)
        assert (change.peers_added, change.peers_removed) == (("d",), ("a",))
        assert set(change.settings) >= {"local_node_id", "cursor.sqlite_path"}
        assert engine.node_id == "n"
        assert engine.state is EngineState.CREATED
        await waiting
        assert samples_about(registry, "b") == []
        async with engine:
            assert list(engine.peers) == ["c", "d"]
            assert engine.health_check().peers[0].pause_reasons == {PauseReason.OPERATOR}
            assert (await engine._ports.cursor_store.load("c")).operator_pause
        assert (tmp_path / "c.db").exists()

    asyncio.run(main())


def test_while_it_connects_a_better_configuration_lets_it_run() -> None:
    """If this fails a start that waits for a wrong peer cannot be helped."""

    async def play(stage: Stage) -> None:
        await stage.engine.update_config(
            stage.with_settings(startup={"when_no_peer": "fail", "timeout": 600})
        )
        stage.node.transport.cut("a")
        for way in ("peer", "rule", "none"):
            starting = asyncio.create_task(stage.engine.start())
            await asyncio.sleep(0)
            assert stage.engine.state is EngineState.CONNECTING
            if way == "peer":
                new = stage.with_peers(PeerConfig(node_id="c", redis_url="redis://c"))
            elif way == "rule":
                new = stage.with_settings(startup={"when_no_peer": "run"})
            else:
                new = stage.with_peers()
            # The cursor store is not open yet when the first of these is called.
            await stage.engine.update_config(new)
            async with asyncio.timeout(10):
                await starting
            assert stage.engine.state is EngineState.RUNNING
            await stage.engine.shutdown()
            stage.engine = stage.make_engine()
            await stage.engine.update_config(
                stage.with_settings(startup={"when_no_peer": "fail", "timeout": 600})
            )

    simulated(play)


def test_a_shorter_budget_ends_a_start_in_time() -> None:
    """If this fails a start keeps a budget that is no longer configured."""

    async def play(stage: Stage) -> None:
        slow = stage.with_settings(startup={"when_no_peer": "fail", "timeout": 600})
        await stage.engine.update_config(slow)
        stage.node.transport.cut("a")
        starting = asyncio.create_task(stage.engine.start())
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        await stage.engine.update_config(stage.with_settings(startup={"timeout": 20}))
        assert not starting.done()
        with pytest.raises(Exception, match="no peer could be reached within 20 s"):
            await starting
        assert asyncio.get_running_loop().time() - began <= 15.1
        with pytest.raises(EngineStoppedError, match="Failed"):
            await stage.engine.update_config(slow)
        stage.engine = stage.make_engine()

    simulated(play)


@pytest.mark.parametrize("call", ["update_config", "pause", "resume"])
def test_once_it_has_ended_nothing_can_change(call: str) -> None:
    """If this fails a call on an engine that has ended seems to have worked."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        engine = stage.engine
        await engine.shutdown()
        argument: Any = engine.config if call == "update_config" else "a"
        with pytest.raises(EngineStoppedError, match="Stopped"):
            await getattr(engine, call)(argument)

    simulated(play)


@pytest.mark.parametrize("turns", range(12))
def test_a_shutdown_in_the_middle_of_a_change_ends_it(turns: int) -> None:
    """If this fails a change that waits outlives its engine, or starts links in a stopped one."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        new = stage.with_peers(PeerConfig(node_id="c", redis_url="redis://c"))
        changing = asyncio.create_task(stage.engine.update_config(new))
        for _ in range(turns):
            await asyncio.sleep(0)
        await stage.engine.shutdown()
        (outcome,) = await asyncio.gather(changing, return_exceptions=True)
        assert isinstance(outcome, EngineStoppedError | ConfigChange)
        assert list(stage.engine.peers) == [peer.node_id for peer in stage.engine.config.peers]
        assert set(stage.engine.peers.values()) == {PeerState.STOPPED}

    simulated(play)


@pytest.mark.parametrize("turns", range(8))
def test_a_change_that_is_cancelled_has_changed_nothing_or_all(turns: int) -> None:
    """If this fails a caller's timeout leaves an engine between two configurations."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        old = stage.engine.config
        new = stage.with_peers(PeerConfig(node_id="c", redis_url="redis://c"))
        changing = asyncio.create_task(stage.engine.update_config(new))
        for _ in range(turns):
            await asyncio.sleep(0)
        changing.cancel()
        await asyncio.wait((changing,))
        in_force = old if changing.cancelled() else new
        assert stage.engine.config is in_force
        assert list(stage.engine.peers) == [peer.node_id for peer in in_force.peers]
        await stage.engine.update_config(new)
        await stage.reaches(PeerState.TAILING, peer_id="c")

    simulated(play)


def test_two_calls_at_once_are_taken_in_order() -> None:
    """If this fails the configuration in force is neither of two."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        c = PeerConfig(node_id="c", redis_url="redis://c")
        first, second = stage.with_peers(c), stage.with_peers(*stage.config.peers, c)
        changes = await asyncio.gather(
            stage.engine.update_config(first), stage.engine.update_config(second)
        )
        assert list(changes) == [
            ConfigChange(peers_added=("c",), peers_removed=("a",)),
            ConfigChange(peers_added=("a",)),
        ]
        assert stage.engine.config is second
        for name in "ac":
            await stage.reaches(PeerState.TAILING, peer_id=name)
        await stage.replicates("a", "c")

    simulated(play)


# Pauses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", IN_EVERY_STATE)
def test_a_pause_in_every_state_outlasts_reconnects_and_restarts(state: PeerState) -> None:
    """If this fails a link that an operator paused goes on by itself, or never again."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(state)
        await stage.engine.pause("a")
        awake = state.is_running and state is not PeerState.PAUSED
        assert (stage.engine.peers["a"] is PeerState.PAUSED) == (awake or state.name == "PAUSED")
        stage.node.transport.heal("a")
        if state is PeerState.CREATED:
            await stage.engine.start()
        if state is PeerState.FAILED:
            await stage.engine.update_config(stage.with_peer_a(redis_url="redis://a"))
        await stage.release()
        await stage.reaches(PeerState.PAUSED)
        stage.node.transport.cut("a")
        await stage.reaches(PeerState.BACKOFF)
        stage.node.transport.heal("a")
        await stage.reaches(PeerState.PAUSED)
        stage.config = stage.engine.config
        await stage.restart()
        await stage.reaches(PeerState.PAUSED)
        whole = stage.engine.config
        await stage.engine.update_config(stage.with_peers())
        await stage.engine.update_config(whole)
        await stage.reaches(PeerState.PAUSED)
        await asyncio.sleep(600)
        assert stage.engine.peers["a"] is PeerState.PAUSED
        assert stage.engine.health_check().peers[0].pause_reasons == {PauseReason.OPERATOR}
        goal = PeerState.STANDBY if state is PeerState.STANDBY else PeerState.TAILING
        await stage.engine.resume("a")
        await stage.reaches(goal)
        await stage.restart()
        await stage.reaches(goal)
        assert stage.engine.health_check().peers[0].pause_reasons == frozenset()

    simulated(play)


@pytest.mark.parametrize("state", IN_EVERY_STATE)
def test_a_pause_can_be_ended_in_every_state(state: PeerState) -> None:
    """If this fails a wish that was taken back comes into force all the same."""

    async def play(stage: Stage) -> None:
        await stage.node.cursors.open()
        await stage.node.cursors.set_operator_pause("a", state is PeerState.CREATED)
        await stage.node.cursors.close()
        await stage.bring_to(state)
        if state is not PeerState.CREATED:
            await stage.engine.pause("a")
        await stage.engine.resume("a")
        if state is PeerState.CREATED:
            await stage.engine.start()
        stage.node.transport.heal("a")
        if state is PeerState.FAILED:
            await stage.engine.update_config(stage.with_peer_a(redis_url="redis://a"))
        await stage.release()
        await stage.reaches(PeerState.STANDBY if state.name == "STANDBY" else PeerState.TAILING)
        await asyncio.sleep(60)
        assert stage.engine.peers["a"] is not PeerState.PAUSED
        assert not (await stage.node.cursors.load("a")).operator_pause

    simulated(play)


def test_the_last_wish_is_the_one_that_is_kept() -> None:
    """If this fails a link that was resumed is paused again after the next restart."""

    async def play(stage: Stage) -> None:
        await stage.engine.start()
        await stage.reaches(PeerState.TAILING)
        gate, write = asyncio.Event(), stage.node.cursors.set_operator_pause

        async def slowly(peer_id: str, paused: bool) -> None:
            await gate.wait()
            await write(peer_id, paused)

        stage.node.cursors.set_operator_pause = slowly  # type: ignore[method-assign]
        pausing = asyncio.create_task(stage.engine.pause("a"))
        await stage.reaches(PeerState.PAUSED)
        resuming = asyncio.create_task(stage.engine.resume("a"))
        await stage.reaches(PeerState.TAILING)
        gate.set()
        await asyncio.gather(pausing, resuming)
        assert not (await stage.node.cursors.load("a")).operator_pause
        await stage.restart()
        await stage.reaches(PeerState.TAILING)
        assert stage.engine.health_check().peers[0].pause_reasons == frozenset()

    simulated(play)


@pytest.mark.parametrize("turns", range(6))
def test_a_pause_while_the_engine_starts_is_kept(turns: int) -> None:
    """If this fails a pause is lost because the cursor store was not open yet."""

    async def play(stage: Stage) -> None:
        starting = asyncio.create_task(stage.engine.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await stage.engine.pause("a")
        await starting
        await stage.reaches(PeerState.PAUSED)
        assert (await stage.node.cursors.load("a")).operator_pause

    simulated(play)


def test_a_pause_while_it_shuts_down_holds_after_the_next_start() -> None:
    """If this fails an operator's last word before a restart is not heard."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        stage.store.gate.clear()
        stage.mesh.nodes["a"].store.put("second", b"2")
        await until_true(lambda: stage.store.waiting)
        stopping = asyncio.create_task(stage.engine.shutdown())
        await stage.engine.wait_for_state(EngineState.SHUTTING_DOWN, timeout=10)
        await stage.engine.pause("a")
        stage.store.gate.set()
        await stopping
        await stage.restart()
        await stage.reaches(PeerState.PAUSED)

    simulated(play)


def test_a_pause_that_cannot_be_written_is_in_force_all_the_same() -> None:
    """If this fails a full disk keeps an operator from pausing a link."""

    async def play(stage: Stage) -> None:
        await stage.bring_to(PeerState.TAILING)
        stage.node.cursors.failure = CursorStoreError("full", path="x", retryable=True)
        with pytest.raises(CursorStoreError, match="full"):
            await stage.engine.pause("a")
        assert stage.engine.peers["a"] is PeerState.PAUSED
        stage.node.cursors.failure = None
        whole = stage.engine.config
        await stage.engine.update_config(stage.with_peers())
        await stage.engine.update_config(whole)
        await stage.reaches(PeerState.PAUSED)
        await stage.engine.pause("a")
        await stage.restart()
        await stage.reaches(PeerState.PAUSED)

    simulated(play)


# Any sequence -------------------------------------------------------------------------------------

NAMES = "abcd"
Step = tuple[Any, ...]


def peers_of_b() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Return peers for node b: some of the others, each reached in one of two ways."""
    one = st.fixed_dictionaries(
        {
            "node_id": st.sampled_from("acd"),
            "redis_url": st.sampled_from(["", "-too", "-nowhere"]),
            "priority": st.integers(0, 2),
            "circuit_failure_threshold": st.sampled_from([1, 5]),
        }
    )
    return st.lists(one, max_size=3, unique_by=lambda peer: peer["node_id"])


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("configure"),
            peers_of_b(),
            st.booleans(),
            st.sampled_from([5, 20]),
            st.sampled_from([1000, 10**6]),
        ),
        st.tuples(st.just("put"), st.sampled_from(NAMES), st.sampled_from("xyz")),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.02, 1.0, 30.0])),
        st.tuples(st.sampled_from(["pause", "resume"]), st.sampled_from("acd")),
        st.tuples(st.sampled_from(["cut", "heal"]), st.sampled_from("acd")),
        st.tuples(st.just("restart")),
    ),
    max_size=14,
)


def test_any_sequence_of_configurations_ends_in_agreement(full: bool) -> None:
    """If this fails some history of changes leaves a link too many or too few, or loses data."""

    @settings(max_examples=2000 if full else 25, suppress_health_check=list(HealthCheck))
    @given(STEPS, st.integers(0, 2**16))
    def history(steps: list[Step], seed: int) -> None:
        run(play_history, steps, seed)

    history()


async def play_history(steps: list[Step], seed: int) -> None:
    """Let node b go through changes of its configuration while all write."""
    mesh = LocalMesh(NAMES, topology("mesh", NAMES), seed=seed)
    for name in NAMES:
        mesh.servers[f"{name}-too"] = mesh.servers[name]
    whole = mesh.nodes["b"].config
    for name in NAMES:
        await mesh.start(name)
    for number, step in enumerate(steps):
        await play_step(mesh, step, number)
        engine = mesh.nodes["b"].engine
        assert engine is not None
        assert set(engine.peers) == {peer.node_id for peer in engine.config.peers}
        assert engine.health_check().peers_total == len(engine.config.peers)
    engine = mesh.nodes["b"].engine
    assert engine is not None
    await engine.update_config(whole)
    for name in "acd":
        await engine.resume(name)
    await mesh.mend()
    await mesh.settle()
    assert set(engine.peers) == set("acd")
    assert len(engine._links.owned) == 3
    assert open_lines(mesh.nodes["b"]) == sorted("acd" * 2)
    # Nothing works for a peer that is gone: three tailers and what Running owns.
    await engine.update_config(whole.model_copy(update={"peers": ()}))
    await until_true(lambda: not engine._links.owned)
    assert open_lines(mesh.nodes["b"]) == []
    assert engine._driver.workers == tuple(
        f"engine:{name}"
        for name in ("cold-path", "cursor-flush", "pinger", "prober", "slo-watch", "store-watch")
    )
    assert [
        sample for name in "acd" for sample in samples_about(engine.metrics.registry, name)
    ] == []
    await mesh.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def play_step(mesh: LocalMesh, step: Step, number: int) -> None:
    """Do one thing to node b or its peers."""
    node = mesh.nodes["b"]
    engine = node.engine
    assert engine is not None
    match step:
        case ("configure", peers, hot, interval, payload):
            rows = [
                peer | {"redis_url": f"redis://{peer['node_id']}{peer['redis_url']}"}
                for peer in peers
            ]
            made = changed(
                engine.config.settings,
                hot_path={"enabled": hot},
                cold_path={"interval_sec": interval},
                limits={"payload_bytes": payload},
            )
            config = engine.config.model_copy(update={"peers": rows, "settings": made})
            change = await engine.update_config(config)
            assert engine.config is config
            assert set(change.peers_added) <= {peer.node_id for peer in config.peers}
        case ("put", name, key):
            mesh.nodes[name].store.put(key, b"%d" % number)
        case ("wait", seconds):
            await asyncio.sleep(seconds)
        case ("pause" | "resume" as call, name):
            if name in engine.peers:
                await getattr(engine, call)(name)
        case ("cut", name):
            mesh.cut("b", name)
        case ("heal", name):
            mesh.heal("b", name)
        case ("restart",):
            node.config = engine.config
            await mesh.stop("b")
            await mesh.start("b")


# Metrics ------------------------------------------------------------------------------------------


def test_what_is_forgotten_of_a_peer_is_nothing_of_another() -> None:
    """If this fails taking one peer out removes the metrics of another, or of another node."""
    registry = CollectorRegistry()
    ours, theirs = Metrics("b", registry), Metrics("z", registry)
    for metrics in (ours, theirs):
        for peer_id in ("a", "a:1"):
            metrics.peer(peer_id).error("X")
            metrics.get("transitions", f"link:{peer_id}", "t", "s", "d").inc()
            metrics.get("circuit_state", f"peer:{peer_id}").set(2)
    before = {name: len(samples_about(registry, name)) for name in ("a", "a:1", "b", "z")}
    ours.forget_peer("a")
    after = {name: len(samples_about(registry, name)) for name in before}
    assert after["a:1"] == before["a:1"]
    assert after["z"] == before["z"]
    assert after["a"] == before["a"] / 2
    assert ours.get("errors", "a", "X")._value.get() == 0
    ours.forget_all()
    assert samples_about(registry, "b") == []
    assert len(samples_about(registry, "z")) == before["z"]


# The process --------------------------------------------------------------------------------------


class NodeProcess:
    """A node run by the command line, whose log is read as it comes."""

    def __init__(self, config: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fsm_replication", "run", str(config), "--log-format", "json"],
            stderr=subprocess.PIPE,
            text=True,
        )

    def waits_for(self, event: str, **fields: str) -> dict[str, Any]:
        """Read the log until an event with these fields comes; returns it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found: dict[str, Any] = json.loads(line)
            if found["event"] == event and all(found.get(k) == v for k, v in fields.items()):
                return found
        raise AssertionError(f"the process ended without {event} {fields}")


def test_run_reloads_on_sighup(redis_servers: Callable[[], RedisServer], tmp_path: Path) -> None:
    """If this fails a node must be stopped to change its configuration, or dies of a bad one."""
    mine, theirs = redis_servers(), redis_servers()
    peer = Peer(theirs)
    peer.write_marker()
    path = tmp_path / "node.yaml"
    head = (
        f"local_node_id: b\ncursor: {{sqlite_path: {tmp_path / 'c.db'}}}\n"
        f"store: {{kind: redis, redis_url: '{mine.url}'}}\n"
    )
    with_peer = f"peers: [{{node_id: a, redis_url: '{theirs.url}'}}]\n"
    path.write_text(head)
    node = NodeProcess(path)
    try:
        node.waits_for("transition", machine="engine", dest="Running")
        path.write_text(head + with_peer)
        node.process.send_signal(signal.SIGHUP)
        assert node.waits_for("configuration_reloaded")["change"] == "peers added: a"
        node.waits_for("transition", machine="link:a", dest="Tailing")
        bad = {
            "peers: [{node_id: a}]\n": "peers[0].redis_url",
            with_peer + "settings: {tombstones: {ttl: 1d}}\n": "settings.tombstones.ttl",
            with_peer + "settings: {limits: {payload_bytes: 1 MiB}}\n": "settings.limits.payload_b",
        }
        for text, told in bad.items():
            path.write_text(head + text)
            node.process.send_signal(signal.SIGHUP)
            refused = node.waits_for("configuration_refused", in_force="the old one")
            assert told in refused["error"]
            assert refused["level"] == "error"
        path.write_text(head + "settings: {cold_path: {interval_sec: 5}}\n")
        node.process.send_signal(signal.SIGHUP)
        assert node.waits_for("configuration_reloaded")["change"] == (
            "peers removed: a; settings changed: settings.cold_path.interval_sec"
        )
        node.waits_for("transition", machine="link:a", dest="Stopped")
        node.process.send_signal(signal.SIGTERM)
        node.waits_for("transition", machine="engine", dest="Stopped")
        node.process.communicate(timeout=30)
        assert node.process.returncode == 0
    finally:
        if node.process.poll() is None:
            node.process.kill()
            node.process.communicate()
        peer.close()
