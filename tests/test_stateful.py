"""Whole engines under any requests, outages and timings: after every step all views must agree.

The engine, its links, drivers and workers are the real ones; Redis, network, disk and time are
simulated. hypothesis chooses what happens, and reduces a failure to the fewest steps.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fsm_replication.circuits import Circuit, CircuitState
from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    LimitsConfig,
    PeerHealthConfig,
    Settings,
    StartupConfig,
    TimeoutsConfig,
    TombstonesConfig,
)
from fsm_replication.diagram import file_name
from fsm_replication.driver import Driver
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import (
    CursorStoreError,
    DrainTimeoutError,
    EngineStoppedError,
    InvalidStateError,
    ReplicationError,
    StoreError,
    UsageError,
)
from fsm_replication.items import SyncItem
from fsm_replication.peer_link import PeerLink
from fsm_replication.ports import Ports
from fsm_replication.reports import PauseReason
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.tables import ENGINE, LINK, EngineState, PeerState, Table
from fsm_replication.testing import LocalMesh, LoopClock, VirtualTimeLoop
from fsm_replication.testing.local_mesh import GRACE_SEC, START_MS, TTL_SEC
from fsm_replication.testing.model_check import Detail, Scope, explore

PEERS = ("a", "b")
peers = st.sampled_from(PEERS)
keys = st.sampled_from(["k", "other"])
mostly = st.sampled_from([True, True, True, False])
waits = st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.3, 3.0, 25.0, 400.0])
FINAL = (EngineState.STOPPED, EngineState.FAILED)
JOURNAL = 100_000
# Longer than any backoff, reset time or interval of what is tested.
REST_SEC = 1000.0
# Enough turns of the loop for what is over to be gone.
TURNS = 12
OWNED = {
    "Connecting": {"connector"},
    "Backoff": {"timer"},
    "Failed": {"timer"},
    "group:Running": {"tailer"},
}
ENGINE_OWNED = {
    "group:Active": {f"farewell to {peer}" for peer in PEERS},
    "Connecting": {"starter"},
    "Running": {
        "cursor-flush",
        "store-watch",
        "prober",
        "cold-path",
        "slo-watch",
        "pinger",
        "repair",
    },
    "ShuttingDown": {"drainer"},
}
DIAGRAMS = Path(__file__).parent.parent / "diagrams"
ARROW = re.compile(r"^ *(\w+) --> (\w+) : (.+)$", re.MULTILINE)
DISK_FULL = CursorStoreError("the disk is full", path="c.db", retryable=True)
DISK_GONE = CursorStoreError("not a database", path="c.db")

CIRCUIT_VALUES = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}

Combination = tuple[str, tuple[str, ...]]
seen: set[Combination] = set()


def find_moves(table: Table) -> set[tuple[str, str, str]]:
    """Return every move that a table allows."""
    return {
        (row.trigger, str(source), str(row.dest)) for row in table.rows for source in row.sources
    }


def find_drawn(table: Table) -> set[tuple[str, str, str]]:
    """Return every move that the diagram of a table shows."""
    drawn = set()
    text = (DIAGRAMS / file_name(table)).read_text(encoding="utf-8")
    for source, dest, labels in ARROW.findall(text):
        for label in labels.split("<br/>"):
            for state in table.groups.get(source, [source]):
                drawn.add((label.split(maxsplit=1)[0], str(state), dest))
    return drawn


MOVES = {"engine": find_moves(ENGINE), "link": find_moves(LINK)}


class Rig:
    """One engine that reads two peers, all simulated, and what must hold of it."""

    def __init__(self, *, hot: bool, when_no_peer: Literal["fail", "run"]) -> None:
        self.mesh = LocalMesh(
            ["n", *PEERS],
            [frozenset({"n", peer}) for peer in PEERS],
            settings=Settings(
                hot_path=HotPathConfig(enabled=hot, block_timeout=20.0),
                cold_path=ColdPathConfig(interval_sec=60.0),
                peer_health=PeerHealthConfig(ping_interval_sec=20.0, idle_threshold_sec=20.0),
                timeouts=TimeoutsConfig(command=1.0, ping=1.0, connect=1.0, store_call=2.0),
                tombstones=TombstonesConfig(ttl=TTL_SEC, grace=GRACE_SEC),
                startup=StartupConfig(when_no_peer=when_no_peer, timeout=5.0),
                limits=LimitsConfig(journal=JOURNAL),
            ),
        )
        self.node = self.mesh.nodes["n"]
        self.broken = False
        self._apply = self.node.store.apply_many
        self.node.store.apply_many = self._apply_many  # type: ignore[method-assign]
        self.calls: list[asyncio.Task[Any]] = []
        self.engine = self.make()

    def make(self) -> ReplicationEngine:
        """Return an engine as a new process would make it."""
        self.node.store.accepting_writes = True
        ports = Ports(
            transport=self.node.transport,
            cursor_store=self.node.cursors,
            clock=LoopClock(),
            wall_clock=self.node.wall_clock,
            random=self.node.transport.rng,
        )
        self.moves_checked = 0
        self._entries: list[int] = []
        self.states: dict[str, str] = {}
        # Links to these were there more than once; what was counted of them is forgotten in between.
        self.taken_out: set[str] = set()
        return ReplicationEngine(self.node.config, self.node.store, ports=ports)

    async def _apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        if self.broken:
            raise StoreError("the store is broken")
        return await self._apply(changes, received)

    async def reconfigure(self, hot: bool, names: Sequence[str], swapped: bool) -> None:
        """Change the configuration, as far as the engine takes it."""
        config = self.node.config
        settings = config.settings.model_copy(
            update={"hot_path": config.settings.hot_path.model_copy(update={"enabled": hot})}
        )
        peers = tuple(
            peer.model_copy(update={"priority": number if swapped else -number})
            for number, peer in enumerate(config.peers)
            if peer.node_id in names
        )
        changed = config.model_copy(update={"settings": settings, "peers": peers})
        change = await self.engine.update_config(changed)
        self.taken_out.update(change.peers_removed)

    def call(self, work: Coroutine[Any, Any, Any]) -> None:
        """Let a caller of the engine wait for something while other things happen."""
        self.calls.append(asyncio.ensure_future(work))

    @property
    def circuits(self) -> list[Circuit]:
        """The engine's circuits: the store's and the peers'."""
        links = self.engine._links.owned
        return [
            *(link.context.peer_circuit for link in links),
            self.engine.circuit.reads,
            self.engine.circuit.writes,
        ]

    @property
    def links(self) -> Mapping[str, PeerLink]:
        """The engine's links."""
        return self.engine._links

    # What must hold after every step

    def check(self) -> None:
        """Compare the state of every machine with all that tells of it or belongs to it."""
        self._check_journal()
        self._check_gauges()
        self._check_health()
        for link in self.links.values():
            self._check_lines(link)
        self.glance()
        over = self.engine.state in (EngineState.CREATED, *FINAL)
        assert not (over and self.node.cursors._is_open)

    def glance(self) -> None:
        """Look at what each turn of the loop leaves: who owns what, and which states go together."""
        engine = self.engine
        drivers = [engine._driver, *(link.driver for link in engine._links.owned)]
        entries = [driver.machine._count for driver in drivers]
        if entries == self._entries:
            return
        self._entries = entries
        self._check_owned(drivers[0], ENGINE_OWNED)
        for driver in drivers[1:]:
            self._check_owned(driver, OWNED)
        seen.add((str(engine.state), tuple(sorted(map(str, engine.peers.values())))))

    def _check_journal(self) -> None:
        records = self.engine.journal
        assert len(records) < JOURNAL
        for record in records[self.moves_checked :]:
            kind = record.machine.partition(":")[0]
            if kind == "circuit":
                continue
            assert (record.trigger, record.source, record.dest) in MOVES[kind], record
            before = self.states.get(record.machine, "Created")
            # A peer that was taken out and added again has a new link.
            again = before == "Stopped" and record.machine != "engine"
            assert record.source == ("Created" if again else before), record
            self.states[record.machine] = str(record.dest)
        self.moves_checked = len(records)
        now = {"engine": self.engine.state} | {
            f"link:{name}": state for name, state in self.engine.peers.items()
        }
        for machine, state in now.items():
            last = self.states.get(machine, "Created")
            again = last == "Stopped" and state == "Created"
            assert last == state or again, machine

    def _samples(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return the samples of the metrics that show states, by their labels beside the node."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for name in ("engine_state", "connected_peers", "peer_state", "circuit_state"):
            found[name] = {}
            for metric in self.engine.metrics._families[name].collect():
                for sample in metric.samples:
                    labels = {k: v for k, v in sample.labels.items() if k != "node_id"}
                    found[name][tuple(labels.values())] = sample.value
        return found

    def _check_gauges(self) -> None:
        engine, shown = self.engine, self._samples()
        assert shown["engine_state"] == {(): list(EngineState).index(engine.state)}
        running = sum(state.is_running for state in engine.peers.values())
        assert shown["connected_peers"] == {(): running}
        present = {labels for labels, value in shown["peer_state"].items() if value == 1}
        assert present == {(link.peer_id, str(link.state)) for link in engine._links.owned}
        assert shown["circuit_state"] == {
            (circuit.name,): CIRCUIT_VALUES[circuit.state] for circuit in self.circuits
        }

    def check_counts(self) -> None:
        """Compare the counted moves with the journal."""
        counted: dict[tuple[str, ...], float] = {
            tuple(sample.labels[name] for name in ("machine", "trigger", "source", "dest")):
                sample.value
            for metric in self.engine.metrics._families["transitions"].collect()
            for sample in metric.samples
            if sample.name == "replication_transitions_total"
        }  # fmt: skip
        made = Counter(
            (r.machine, str(r.trigger), str(r.source), str(r.dest)) for r in self.engine.journal
        )
        gone = {f"{kind}:{peer}" for peer in self.taken_out for kind in ("link", "circuit:peer")}
        assert {one: count for one, count in counted.items() if one[0] not in gone} == {
            one: count for one, count in made.items() if one[0] not in gone
        }

    def _check_health(self) -> None:
        engine, health = self.engine, self.engine.health_check()
        up = [peer for peer, state in engine.peers.items() if "Running" in LINK.groups_of(state)]
        assert health.state == engine.state
        is_ready = engine.is_running and (bool(up) or not engine.peers)
        assert health.ready == (is_ready and health.store_reachable)
        writes_open = health.writes_circuit is CircuitState.OPEN
        accepts = self.node.store.accepting_writes and health.store_reachable and not writes_open
        assert health.sync_engine_accepting_writes == accepts
        is_open = writes_open or health.reads_circuit is CircuitState.OPEN
        assert health.healthy == (health.ready and accepts and not is_open)
        assert {peer.node_id: peer.state for peer in health.peers} == engine.peers
        assert [peer.node_id for peer in health.peers if peer.connected] == up
        assert health.peers_connected == len(up)
        for peer in health.peers:
            if peer.state in (PeerState.TAILING, PeerState.CATCHING_UP, PeerState.BOOTSTRAPPING):
                assert not peer.pause_reasons, f"{peer.state} with {peer.pause_reasons}"

    def _check_owned(self, driver: Driver, owned: dict[str, set[str]]) -> None:
        machine = driver.machine
        for job in driver._jobs:
            if machine.is_current(job.ticket):
                assert job.name in owned[job.ticket.scope], f"{job.name} in {driver.state}"
            else:
                assert job.asked or job.task.done(), f"{job.name} was not asked to stop"
        if driver.state in machine.table.final:
            left = [job.name for job in driver._jobs if not job.task.done()]
            assert not left or self._is_named(left), f"{left} in {driver.state}"

    def _is_named(self, left: list[str]) -> bool:
        """Say whether the engine tells that it could not end these."""
        error = self.engine.error
        told = [str(error), *getattr(error, "__notes__", ())]
        return all(any(name in text for text in told) for name in left)

    def _check_lines(self, link: PeerLink) -> None:
        mine = [
            wire for wire in self.node.transport._wires
            if wire.host == link.peer_id and not wire.is_closing()
        ]  # fmt: skip
        assert (link.lines is not None) == link.state.is_running
        # The reading line may be opened anew while the old one is being closed.
        most = 2 if link.state.is_running else 0
        ending = bool(link.driver._jobs) or any(
            hasattr(report.payload, "close") for report in link.driver._mailbox.values()
        )
        assert len(mine) <= most or ending, f"{len(mine)} connections in {link.state}"

    # The end

    def mend(self) -> None:
        """Make the world well again."""
        for peer in PEERS:
            self.mesh.heal("n", peer)
        self.broken = False
        self.node.store.accepting_writes = True
        self.node.cursors.failure = None

    async def rest(self) -> None:
        """Mend everything; then a running engine must come to rest, and end when it is asked to."""
        self.mend()
        await asyncio.sleep(REST_SEC)
        self.check()
        if self.engine.is_running:
            for link in self.links.values():
                asked = {PauseReason.OPERATOR, PauseReason.INTERLOCK} & link.pause_reasons
                hot = self.engine.config.settings.hot_path.enabled
                well = PeerState.TAILING if hot else PeerState.STANDBY
                assert link.state is (PeerState.PAUSED if asked else well), (
                    f"{link} with {link.pause_reasons} after the world was well for a while"
                )
        else:
            assert self.engine.state in (EngineState.CREATED, *FINAL)
        await self.end()

    async def end(self) -> None:
        """Shut the engine down; nothing of it may be left."""
        await self.engine.shutdown()
        await asyncio.gather(*self.calls, return_exceptions=True)
        self.look_at_calls()
        for _ in range(TURNS):
            await asyncio.sleep(0)
        self.check()
        self.check_counts()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left or isinstance(self.engine.error, DrainTimeoutError), left
        for link in self.links.values():
            assert link.state is PeerState.STOPPED
        open_wires = [wire for wire in self.node.transport._wires if not wire.is_closing()]
        assert not open_wires

    def look_at_calls(self) -> None:
        """Take note of how callers fared: with a result, or an error of ours."""
        for call in [call for call in self.calls if call.done()]:
            self.calls.remove(call)
            if not call.cancelled() and call.exception() is not None:
                assert isinstance(call.exception(), ReplicationError), call.exception()


class WatchedLoop(VirtualTimeLoop):
    """A loop that lets somebody look after each of its turns."""

    look: Callable[[], None] | None = None
    fault: BaseException | None = None

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        if self.look is not None and self.fault is None:
            try:
                self.look()
            except AssertionError as fault:
                # Raised from here it would leave the loop in the middle of what it does.
                self.fault = fault


class Fates(RuleBasedStateMachine):
    """What may happen to one engine, in any order and at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = WatchedLoop(START_MS)
        self.runner = asyncio.Runner(loop_factory=lambda: self.loop)
        self.rig: Rig | None = None

    @property
    def engine(self) -> ReplicationEngine:
        """The engine as it is now."""
        assert self.rig is not None
        return self.rig.engine

    def then(self, work: Awaitable[None] | None = None) -> None:
        """Let something happen on the loop, and look at everything."""

        async def do() -> None:
            if work is not None:
                await work
            assert self.rig is not None
            self.rig.look_at_calls()
            self.rig.check()

        self.run(do())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something to its end."""
        self.runner.run(work)
        if self.loop.fault is not None:
            raise self.loop.fault

    @initialize(hot=mostly, strict=mostly.map(lambda yes: not yes), started=mostly)
    def begin(self, hot: bool, strict: bool, started: bool) -> None:
        """Make an engine, and mostly start it."""

        async def make() -> None:
            self.rig = Rig(hot=hot, when_no_peer="fail" if strict else "run")
            self.loop.look = self.rig.glance
            if started:
                self.rig.call(self.engine.start())

        self.then(make())

    # Requests

    @rule(what=st.sampled_from(["start", "start", "cancel", "shutdown"]))
    def call(self, what: str) -> None:
        """Call start() or shutdown() and do not wait, or cancel all who wait."""

        async def do() -> None:
            assert self.rig is not None
            if what == "shutdown":
                self.rig.call(self.engine.shutdown())
            elif what == "cancel":
                for call in self.rig.calls:
                    call.cancel()
            elif self.engine.state is EngineState.CREATED:
                self.rig.call(self.engine.start())
            else:
                await self._start_in_vain()
            await asyncio.sleep(0)

        self.then(do())

    async def _start_in_vain(self) -> None:
        before, records = self.engine.state, len(self.engine.journal)
        with pytest.raises(InvalidStateError) as raised:
            await self.engine.start()
        assert (raised.value.expected, raised.value.actual) == ("Created", before)
        assert (self.engine.state, len(self.engine.journal)) == (before, records)

    @rule(peer=peers, paused=st.booleans())
    def pause_or_resume(self, peer: str, paused: bool) -> None:
        """Ask for a pause of a link, or for its end."""

        async def do() -> None:
            ask = self.engine.pause if paused else self.engine.resume
            if peer not in self.engine.peers:
                with pytest.raises((UsageError, EngineStoppedError)):
                    await ask(peer)
                return
            if self.engine.state in FINAL:
                with pytest.raises(EngineStoppedError):
                    await ask(peer)
                return
            # Where the disk is closed or full, the wish is in force all the same.
            with suppress(CursorStoreError):
                await ask(peer)
            # The peer may have been taken out meanwhile.
            if peer in self.engine._links:
                reasons = self.engine._links[peer].pause_reasons
                assert (PauseReason.OPERATOR in reasons) == paused

        self.then(do())

    @rule(hot=st.booleans(), names=st.sampled_from([("a", "b"), ("a",), ("b",)]), swapped=mostly)
    def reconfigure(self, hot: bool, names: tuple[str, ...], swapped: bool) -> None:
        """Ask for another configuration: other peers, in another order, the hot path on or off."""

        async def do() -> None:
            assert self.rig is not None
            self.rig.call(self.rig.reconfigure(hot, names, swapped))
            await asyncio.sleep(0)

        self.then(do())

    @rule(peer=st.none() | peers, force=st.booleans())
    def repair(self, peer: str | None, force: bool) -> None:
        """Ask for a repair, and do not wait."""

        async def do() -> None:
            assert self.rig is not None
            if self.engine.is_running:
                self.rig.call(self.engine.repair(peer, force=force))
                await asyncio.sleep(0)
                return
            with pytest.raises(InvalidStateError):
                await self.engine.repair(peer, force=force)

        self.then(do())

    @precondition(lambda self: self.rig is not None and self.engine.state in FINAL)
    @rule()
    def begin_again(self) -> None:
        """Make a new engine on the same files, as a restart does."""

        async def do() -> None:
            assert self.rig is not None
            await self.rig.end()
            self.rig.engine = self.rig.make()

        self.then(do())

    # The world

    @rule(peer=peers, how=st.sampled_from(["cut", "hang", "heal", "heal", "blip"]))
    def line(self, peer: str, how: str) -> None:
        """Break or mend the line to a peer."""

        async def do() -> None:
            assert self.rig is not None
            mesh, transport = self.rig.mesh, self.rig.node.transport
            if how == "hang":
                transport.hang(peer)
            elif how != "heal":
                mesh.cut("n", peer)
            if how in ("heal", "blip"):
                mesh.heal("n", peer)

        self.then(do())

    @rule(broken=st.booleans())
    def store_fails(self, broken: bool) -> None:
        """Let every write into the local store fail, or succeed again."""
        assert self.rig is not None
        self.rig.broken = broken

    @rule(accepts=st.booleans())
    def store_is_full(self, accepts: bool) -> None:
        """Let the local store take no writes, or take them again."""
        assert self.rig is not None
        self.rig.node.store.accepting_writes = accepts

    @rule(failure=st.sampled_from([None, None, DISK_FULL, DISK_GONE]))
    def disk(self, failure: CursorStoreError | None) -> None:
        """Let the cursor store fail, or work again."""
        assert self.rig is not None
        self.rig.node.cursors.failure = failure

    @rule(peer=peers, key=keys, content=st.sampled_from([b"", b"x", b"y", None]))
    def write(self, peer: str, key: str, content: bytes | None) -> None:
        """Write at a peer."""

        async def do() -> None:
            assert self.rig is not None
            store = self.rig.mesh.nodes[peer].store
            if content is None:
                store.delete(key)
            else:
                store.put(key, content)

        self.then(do())

    @rule(peer=peers, whole=st.booleans())
    def lose_stream(self, peer: str, whole: bool) -> None:
        """Trim a peer's stream, or remove it."""

        async def do() -> None:
            assert self.rig is not None
            if whole:
                self.rig.mesh.delete_stream(peer)
            else:
                self.rig.mesh.trim(peer, 0)

        self.then(do())

    @rule(worker=st.sampled_from(["connector", "timer", "tailer", "cold-path"]), peer=peers)
    def stranger(self, worker: str, peer: str) -> None:
        """Cancel a worker from outside, as a host that cancels all tasks would."""

        async def do() -> None:
            names = {f"link:{peer}:{worker}", f"engine:{worker}"}
            for task in asyncio.all_tasks():
                if task.get_name() in names:
                    task.cancel()
            await asyncio.sleep(0)

        self.then(do())

    @rule(seconds=waits)
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.then(asyncio.sleep(seconds))

    @rule(turns=st.integers(1, 8))
    def turn(self, turns: int) -> None:
        """Let the loop turn a few times, while no time passes."""

        async def do() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
                assert self.rig is not None
                self.rig.check()

        self.then(do())

    def teardown(self) -> None:
        """Mend everything: all must come to rest, and nothing may be left."""
        try:
            if self.rig is not None:
                self.run(self.rig.rest())
        finally:
            self.runner.close()


@pytest.mark.parametrize("table", [ENGINE, LINK], ids=lambda table: table.name)
def test_the_diagrams_draw_the_moves_of_the_tables(table: Table) -> None:
    """If this fails a reader of the diagrams sees moves that are not there, or misses some."""
    assert find_drawn(table) == find_moves(table)


@pytest.mark.timeout(3600)
def test_all_views_agree_whatever_happens(full: bool) -> None:
    """If this fails some order of requests and failures leaves the table, or leaves something."""
    run_state_machine_as_test(
        Fates,
        settings=settings(
            max_examples=3000 if full else 40,
            stateful_step_count=50 if full else 30,
            suppress_health_check=list(HealthCheck),
            deadline=None,
            print_blob=True,
        ),
    )
    look_them_up_in_the_model()


def look_them_up_in_the_model() -> None:
    """See that the model of the tables leaves out nothing that these engines did."""
    # Changed settings lead to no other combination of states, but to many times as many details.
    detail = Detail((PauseReason.OPERATOR,), pings=False, late=False, reconfigures=False)
    result = explore(Scope("two links", links=2, circuits=0, detail=detail))
    assert result.violation is None
    product = result.product
    reached = {
        (
            str(product.engines.things[engine].state),
            tuple(sorted(str(product.links.things[link].state) for link in links)),
        )
        for engine, links, _ in result.reached
    }
    two = {combination for combination in seen if len(combination[1]) == 2}
    assert len(two) > 10
    assert two <= reached
