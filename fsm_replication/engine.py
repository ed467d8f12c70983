"""The front door: a replication engine, and the effects of the engine table.

``async with ReplicationEngine(config, sync_engine=store): ...`` connects to every peer of the
configuration and keeps the local store up to date until the block ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypedDict, cast

from prometheus_client import CollectorRegistry

from fsm_replication.circuits import CallOutcome, Circuit
from fsm_replication.config import CircuitConfig, PeerConfig, ReplicationConfig
from fsm_replication.config_change import ConfigChange, compare_configs, refuse_what_is_fixed
from fsm_replication.current import Current
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.dead_letters import DeadLetters, RetryStats
from fsm_replication.drain import DRAINER, Drainer
from fsm_replication.driver import Driver, Observer
from fsm_replication.errors import (
    ConfigError,
    ConnectionLostError,
    CursorStoreError,
    EngineStoppedError,
    InvalidStateError,
    NoPeerError,
    ProtocolError,
    ReplicationError,
    StartupError,
    StoreError,
    UsageError,
    WaitTimeoutError,
    shorten,
)
from fsm_replication.health import HealthCheck
from fsm_replication.journal import Journal, StateWaiter, Transition, Watcher
from fsm_replication.limiter import PrioritySlot, RateLimiter
from fsm_replication.links import Links
from fsm_replication.log import get_logger
from fsm_replication.machine import Move
from fsm_replication.metrics import Metrics, weakly
from fsm_replication.move_log import level_of_circuit, level_of_move
from fsm_replication.peer_link import PeerLink
from fsm_replication.ports import GapRow, PeerRecord, Ports
from fsm_replication.reports import EngineFact, PauseReason, Report, Reporter
from fsm_replication.stores.noop import NoOpSyncEngine
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.tables import CIRCUIT, ENGINE, CircuitState, EngineState, PeerState
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.applier import Blocked, Unsettled
from fsm_replication.workers.arrivals import Arrivals
from fsm_replication.workers.changes import ChangeFeed, ChangeWatcher, Doubts
from fsm_replication.workers.cold_path import ColdPath, RepairStats
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext, LinkProgress
from fsm_replication.workers.crashes import CrashCounter
from fsm_replication.workers.cursor_flush import CursorBook, flush_cursors
from fsm_replication.workers.explain import Explanation, explain_key
from fsm_replication.workers.foreign_walk import SettledHashes
from fsm_replication.workers.guards import KeyMemory, StaleGuard
from fsm_replication.workers.interlock import Interlock
from fsm_replication.workers.letter_retry import LetterRetry
from fsm_replication.workers.own_store import StoreWatch
from fsm_replication.workers.peer_clock import PeerClock
from fsm_replication.workers.ping import ping_idle_peers
from fsm_replication.workers.prober import probe_circuits
from fsm_replication.workers.repair import KeyDifference, StaleVerdict, find_differences
from fsm_replication.workers.slo import SloWatch, watch_lag
from fsm_replication.workers.supervisor import supervise
from fsm_replication.workers.tailer import decided_by

__all__ = ("Circuits", "ReplicationEngine", "startup_verdict")

DRAIN_TRIES_MAX: Final = 5
_FINAL: Final = frozenset({EngineState.STOPPED, EngineState.FAILED})
_CIRCUIT_VALUES: Final = {
    CircuitState.CLOSED: 0,
    CircuitState.HALF_OPEN: 1,
    CircuitState.OPEN: 2,
}


class Circuits:
    """The circuits that guard the local sync engine."""

    __slots__ = ("reads", "writes")

    def __init__(self, reads: Circuit, writes: Circuit) -> None:
        self.reads = reads
        self.writes = writes


class ReplicationEngine(Observer):
    """Replicates from the peers of ``config`` into ``sync_engine``; lives once.

    ``ports`` replaces the world outside (time, wall clock, randomness, Redis transport, cursor
    store); ``registry`` is where metrics are registered, by default a registry of its own.

    :raises ConfigError: if ``sync_engine`` was opened for another node.
    """

    def __init__(
        self,
        config: ReplicationConfig,
        sync_engine: SyncEngine | None = None,
        *,
        ports: Ports | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._config = config
        self._settings = Current(config.settings)
        self._store = sync_engine if sync_engine is not None else NoOpSyncEngine()
        _refuse_other_node(config, self._store)
        self._given_ports = ports
        self.metrics = Metrics(config.local_node_id, registry)
        self._ports = ports if ports is not None else _system_ports(config, self.metrics)
        self._journal = Journal(config.settings.limits.journal)
        self._error: BaseException | None = None
        self._drain_tries = 0
        self._feed = ChangeFeed()
        self._arrivals = Arrivals()
        self._limiter = RateLimiter(self._settings, self._ports.clock)
        self._copy_slot = PrioritySlot(self._ports.clock)
        # One change of the configuration at a time, in the order of the calls.
        self._changing = asyncio.Lock()
        self._records_taken = False
        self._link_moved = asyncio.Event()
        self._circuit_moved = asyncio.Event()
        self.circuit = Circuits(
            reads=self._store_circuit("store-reads", config.settings.circuits.reads),
            writes=self._store_circuit("store-writes", config.settings.circuits.writes),
        )
        self._store_watch = StoreWatch(
            self._store,
            reads=self.circuit.reads,
            writes=self.circuit.writes,
            current=self._settings,
            clock=self._ports.clock,
            node_id=config.local_node_id,
        )
        self._driver = Driver(
            ENGINE,
            self,
            name="engine",
            journal=self._journal,
            wall_clock=self._ports.wall_clock,
            observer=self,
            on_fact=self._on_fact,
            on_crash=lambda name, _ticket, error: self._crashed(f"engine:{name}", error),
        )
        self._links = Links(
            new_context=self._link_context,
            new_circuit=self._peer_circuit,
            journal=self._journal,
            observer=self,
            on_crash=self._crashed,
            clock=self._ports.clock,
            patience=lambda: self._settings.value.timeouts.drain,
            start_worker=lambda name, work: self._driver.start_worker(
                name, "group:Active", lambda _report: work()
            ),
        )
        self._equip()
        self._make_links()

    def _equip(self) -> None:
        """Make what depends on the configuration and can no longer change once it is used."""
        config = self._config
        self._log = get_logger("engine", node_id=config.local_node_id)
        reachable = weakly(self._store_watch, lambda watch: watch.reachable)
        self.metrics.get("store_reachable").set_function(reachable)
        self._book = CursorBook(self._ports.cursor_store, self.metrics)
        self._drainer = Drainer(
            driver=self._driver,
            links=self._links,
            book=self._book,
            store=self._ports.cursor_store,
            heavy=self._ports.heavy,
            clock=self._ports.clock,
            config=lambda: self._config,
        )
        self._cold_path = ColdPath(
            self._settings,
            self._store,
            self._ports,
            self.metrics,
            self._links.repair_targets,
            partial(self._start_asked, "repair"),
            self._links.doubt_store,
        )
        self._letter_retry = LetterRetry(
            self._ports.cursor_store,
            lambda: {link.peer_id: link.context for link in self._links.values()},
            self._links.block,
            self._links.blame,
            self._note_room,
            partial(self._start_asked, "letter-retry"),
            self._links.doubt_store,
        )

    def _store_circuit(self, name: str, config: CircuitConfig) -> Circuit:
        return self._circuit(name, **_numbers_of(config))

    def _circuit(
        self,
        name: str,
        *,
        failures: int,
        reset_sec: float,
        successes: int,
        reset_max_sec: float | None = None,
    ) -> Circuit:
        self.metrics.get("circuit_state", name).set(_CIRCUIT_VALUES[CircuitState.CLOSED])
        return Circuit(
            name,
            failures=failures,
            reset_sec=reset_sec,
            successes=successes,
            clock=self._ports.clock,
            reset_max_sec=reset_max_sec,
            on_change=self._circuit_changed,
            on_call=self._circuit_called,
        )

    def _peer_circuit(self, peer: PeerConfig) -> Circuit:
        return self._circuit(
            f"peer:{peer.node_id}",
            failures=peer.circuit_failure_threshold,
            reset_sec=peer.circuit_reset_timeout_sec,
            successes=1,
        )

    def _make_links(self) -> None:
        """Make the links of an engine that was not started, or give them everything anew."""
        for peer in self._config.peers:
            if peer.node_id in self._links:
                self._links.equip_anew(peer)
            else:
                self._links.add(peer)
        self._links.arrange(self._config.peers)
        self._show_state()

    def _link_context(self, peer: PeerConfig) -> LinkContext:
        self.metrics.get("peer_state", peer.node_id, PeerState.CREATED).set(1)
        clock, metrics, progress = (
            self._ports.clock,
            self.metrics.peer(peer.node_id),
            LinkProgress(),
        )
        log = get_logger("link", node_id=self._config.local_node_id, peer_id=peer.node_id)
        metrics.show_lag(
            weakly(progress, lambda one: one.lag_ms(clock.monotonic())),
            weakly(progress, lambda one: one.lag_events(clock.monotonic())),
        )
        interlock = Interlock(
            peer.node_id, self._settings, clock, self._ports.wall_clock, self._ports.cursor_store
        )
        metrics.show_interlock(
            weakly(interlock, lambda one: one.shrunk),
            weakly(interlock, lambda one: one.counted_allowed),
        )
        peer_clock = PeerClock(clock, self._ports.wall_clock, log)
        metrics.show_skew(weakly(peer_clock, lambda one: one.skew_sec))
        return LinkContext(
            local_node_id=self._config.local_node_id,
            peer=peer,
            current=self._settings,
            ports=self._ports,
            store=self._store,
            writes=self.circuit.writes,
            reads=self.circuit.reads,
            peer_circuit=self._peer_circuit(peer),
            starting=self._needs_peer,
            cursors=self._book,
            metrics=metrics,
            limiter=self._limiter,
            copy_slot=self._copy_slot,
            feed=self._feed,
            doubts=Doubts(),
            arrivals=self._arrivals,
            slo=SloWatch(self._settings, clock, metrics, log),
            peer_clock=peer_clock,
            progress=progress,
            interlock=interlock,
            stale=StaleGuard(
                round(self._config.settings.tombstones.ttl * 1000),
                self._ports.wall_clock,
                self._store.deletes_known_ms,
            ),
            unfetchable=KeyMemory(clock),
            settled=SettledHashes(),
            crashes=CrashCounter(clock),
            on_synced=self._link_moved.set,
            log=log,
        )

    def _needs_peer(self) -> bool:
        """Say whether the engine fails unless a peer is up soon."""
        startup = self._settings.value.startup
        return self.state is EngineState.CONNECTING and startup.when_no_peer == "fail"

    # What may be asked at any time, from any thread.

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return cast("EngineState", self._driver.state)

    @property
    def error(self) -> BaseException | None:
        """The error that was kept, or None."""
        return self._error

    @property
    def is_running(self) -> bool:
        """Whether the engine is in Running."""
        return self.state is EngineState.RUNNING

    @property
    def node_id(self) -> str:
        """This node."""
        return self._config.local_node_id

    @property
    def config(self) -> ReplicationConfig:
        """The configuration in force."""
        return self._config

    @property
    def sync_engine(self) -> SyncEngine:
        """The local store."""
        return self._store

    @property
    def peers(self) -> dict[str, PeerState]:
        """The state of every link, by the peer's node id."""
        return {peer_id: link.state for peer_id, link in self._links.items()}

    @property
    def journal(self) -> tuple[Transition, ...]:
        """The latest moves of the engine and its links, oldest first."""
        return self._journal.snapshot()

    @property
    def dead_letters(self) -> DeadLetters:
        """The entries that could not be applied: to be listed, tried again, and purged."""
        return DeadLetters(
            self._ports.cursor_store, retry=self._retry_letters, on_room=self._note_room
        )

    def health_check(self) -> HealthCheck:
        """Return how the engine is, from memory alone."""
        peers = tuple(link.health() for link in self._links.values())
        connected = sum(peer.connected for peer in peers)
        watch, circuits = self._store_watch, self.circuit
        accepting = self._store.should_accept_writes() and watch.reachable
        accepting = accepting and circuits.writes.state is not CircuitState.OPEN
        ready = self.is_running and (connected > 0 or not peers)
        ready = ready and watch.reachable
        is_open = CircuitState.OPEN in (circuits.reads.state, circuits.writes.state)
        error = self._book.last_error
        return HealthCheck(
            state=self.state,
            ready=ready,
            healthy=ready and accepting and not is_open,
            synced=all(peer.synced for peer in peers),
            sync_engine_accepting_writes=accepting,
            peers_total=len(peers),
            peers_connected=connected,
            peers_circuit_open=sum(peer.circuit_open for peer in peers),
            peers_catching_up=sum(peer.catching_up for peer in peers),
            peers=peers,
            cursor_store_error="" if error is None else str(error),
            store_reachable=watch.reachable,
            store_error=watch.error,
            reads_circuit=circuits.reads.state,
            writes_circuit=circuits.writes.state,
        )

    # Starting and stopping.

    async def start(self) -> None:
        """Open the cursor store, connect to the peers, and return when the engine runs.

        A start that fails or is cancelled leaves nothing behind.

        :raises InvalidStateError: unless the engine is Created.
        :raises EngineStoppedError: if ``shutdown()`` interrupted it.
        :raises CursorStoreError: if the cursor store cannot be used.
        :raises NoPeerError: if no peer was reached in time and ``when_no_peer`` is ``fail``.
        """
        self._driver.request("start", why="start() was called")
        waiter = self._waiter(frozenset({EngineState.RUNNING}) | _FINAL)
        try:
            state = await waiter.wait()
        except asyncio.CancelledError:
            self._driver.request_if_legal("shutdown", why="start() was cancelled")
            await self._drained()
            raise
        if state is EngineState.RUNNING:
            return
        if self._error is not None:
            raise self._error
        raise EngineStoppedError("start() was interrupted by shutdown()")

    async def shutdown(self) -> None:
        """Stop within the drain timeout; safe to call in any state and more than once.

        A caller that is cancelled only stops waiting: the engine goes on to its end.
        """
        self._driver.request_if_legal("shutdown", why="shutdown() was called")
        await self._waiter(_FINAL).wait()

    async def wait_closed(self) -> None:
        """Return when the engine has stopped.

        :raises ReplicationError: the kept error, if it ended in Failed.
        """
        await self._waiter(_FINAL).wait()
        if self._error is not None:
            raise self._error

    async def _drained(self) -> None:
        """Wait for the end whatever happens: it is bounded by the drain timeout."""
        cancelled: asyncio.CancelledError | None = None
        ended = asyncio.ensure_future(self._waiter(_FINAL).wait())
        while not ended.done():
            try:
                await asyncio.shield(ended)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._driver.request_if_legal("shutdown", why="the async with block ended")
        await self._drained()
        if exc is None and self._error is not None:
            raise self._error

    # Watching.

    def watch_state(self, peer_id: str | None = None) -> Watcher:
        """Follow the engine's moves, or a link's: the present state first, the end after a final.

        :raises UsageError: if there is no such peer.
        """
        return self._driver.watch() if peer_id is None else self._link(peer_id).watch()

    async def wait_for_state(
        self, *states: EngineState | PeerState, peer_id: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the port's clock measures it
    ) -> EngineState | PeerState:  # fmt: skip
        """Wait until the engine, or a link, passes through one of ``states``.

        :raises UnreachableStateError: once none of them can come any more.
        :raises WaitTimeoutError: after ``timeout`` seconds; it is a ``TimeoutError``.
        """
        driver = self._driver if peer_id is None else self._link(peer_id).driver
        for state in states:
            if state not in set(driver.machine.table.states):
                raise UsageError(f"{driver.name} has no state {state!r}")
        waiter = driver.waiter(frozenset[StrEnum](states))
        try:
            async with self._ports.clock.timeout(timeout):
                return cast("EngineState | PeerState", await waiter.wait())
        except TimeoutError:
            wanted = " or ".join(states)
            now = self.state if peer_id is None else self._link(peer_id).describe()
            raise WaitTimeoutError(
                f"{driver.name} did not become {wanted} within {timeout:g} s: it is {now}"
            ) from None

    async def wait_synced(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait until, since this start, each configured peer was read to its head, or compared.

        A peer counts once the head of its stream was reached, or its tree was found to agree or
        was made to. Peers that ``update_config`` adds meanwhile are waited for too.

        :raises WaitTimeoutError: after ``timeout`` seconds; it names the peers that are missing,
            and their states. It is a ``TimeoutError``.
        :raises EngineStoppedError: if the engine ends first.
        """
        try:
            async with self._ports.clock.timeout(timeout):
                while self._unmet():
                    if self.state in _FINAL:
                        raise EngineStoppedError("the engine ended before all peers were read")
                    self._link_moved.clear()
                    await self._link_moved.wait()
        except TimeoutError:
            missing = "; ".join(
                f"peer {link.peer_id!r} is {link.describe()}" for link in self._unmet()
            )
            raise WaitTimeoutError(
                f"not synced after {timeout:g} s: the engine is {self.state}; {missing}"
            ) from None

    def _unmet(self) -> list[PeerLink]:
        """Return the links that have not reached their peer's head since this start."""
        return [link for link in self._links.values() if not link.context.progress.synced]

    def changes(self, prefix: str = "") -> ChangeWatcher:
        """Follow what replication applies to keys with a prefix, for cache invalidation.

        Each change is told at least once, when the store holds it or a newer one; after a failing
        call of the store it may be told late, or twice. Two changes of one key that came from two
        peers may be told in either order: the larger ``stamp`` is what is held. A watcher that is
        10,000 changes or 64 MiB behind gets ``WatcherLagged`` once, and then the newest.
        """
        return self._feed.watch(prefix)

    async def ledger(self, peer_id: str | None = None) -> Sequence[GapRow]:
        """Return the loss ledger: every gap that was found in a stream, and how it was healed.

        Dead letters that were dropped stand in it too, of ``kind`` "dropped".
        """
        return await self._ports.cursor_store.gaps(peer_id)

    # Operating.

    async def pause(self, peer_id: str) -> None:
        """Pause a link until ``resume``, whatever state it is in.

        A link that reads is Paused at once, any other as soon as it would decide to read. The wish
        is kept over reconnects and restarts; before ``start()`` it is written when that is called.

        :raises UsageError: if there is no such peer.
        :raises EngineStoppedError: if the engine has ended.
        :raises CursorStoreError: if the wish cannot be kept on disk; it is in force all the same.
        """
        self._check_not_over("pause", EngineState.SHUTTING_DOWN)
        await self._wish(peer_id, paused=True)

    async def resume(self, peer_id: str) -> None:
        """End a pause of an operator, and one of the interlock, whatever state the link is in.

        Where the interlock has tripped, the peer may delete any number of items for an hour, over
        restarts. Where there are other reasons the link stays Paused until they have gone.

        :raises UsageError: if there is no such peer.
        :raises EngineStoppedError: if the engine has ended.
        :raises CursorStoreError: if the wish cannot be kept on disk; it is in force all the same.
        """
        self._check_not_over("resume", EngineState.SHUTTING_DOWN)
        await self._wish(peer_id, paused=False)

    async def _wish(self, peer_id: str, *, paused: bool) -> None:
        """Put it in force, and write it to disk as soon as the cursor store is open."""
        self._link(peer_id)
        self._links.wish(peer_id, paused=paused)
        await self._until_records_taken()
        if self.state is not EngineState.CREATED:
            with self._noting_errors():
                await self._links.write_wish(peer_id, self._ports.cursor_store)

    async def update_config(self, config: ReplicationConfig) -> ConfigChange:
        """Put another configuration in force, whole or not at all; returns what changed.

        Nothing is restarted that need not be. Peers that were taken out are left; new ones are
        connected to side by side, and nobody waits for them here. Of the peers that stay, a link
        connects anew where the way to its peer changed, and decides anew where what it decided by
        did; everything else is read anew when it is next needed. Before ``start()`` anything may
        change. After it, ``local_node_id``, ``store``, ``cursor``, ``settings.tombstones`` and
        ``settings.timeouts.cursor`` may not. Calls take effect in the order in which they are made.

        A peer that is added again waits until its old link is Stopped, at most twice
        ``timeouts.drain``. A call that is cancelled has changed nothing.

        :raises ConfigError: if it is wrong or changes what cannot change now; it names each fault.
        :raises EngineStoppedError: if the engine has ended, or ends before the change.
        :raises CursorStoreError: if what is known of a new peer cannot be read.
        :raises DrainTimeoutError: if the old link of a peer that is added again does not end.
        """
        config = ReplicationConfig.model_validate(config)
        async with self._changing:
            change, records = await self._prepare_change(config)
            if self.state is EngineState.CREATED:
                self._begin_with(config, change)
            else:
                self._change_to(config, change, records)
        if change:
            self._log.info("config_changed", change=str(change))
        return change

    async def _prepare_change(
        self, config: ReplicationConfig
    ) -> tuple[ConfigChange, dict[str, PeerRecord]]:
        """Do all that may fail or take time; nothing is changed by it."""
        change = compare_configs(self._config, config)
        while True:
            self._check_not_over("update_config")
            created = self.state is EngineState.CREATED
            if created:
                _refuse_other_node(config, self._store)
            else:
                refuse_what_is_fixed(change)
            await self._links.wait_gone(change.peers_added)
            records = {} if created else await self._load_records(change.peers_added)
            self._check_not_over("update_config")
            # It may have been started meanwhile, and then has other rules.
            if created == (self.state is EngineState.CREATED):
                return change, records

    async def _load_records(self, peer_ids: Sequence[str]) -> dict[str, PeerRecord]:
        await self._until_records_taken()
        store = self._ports.cursor_store
        try:
            return {peer_id: await store.load(peer_id) for peer_id in peer_ids}
        except CursorStoreError:
            # Where the engine has ended meanwhile, the store is closed because of that.
            self._check_not_over("update_config")
            raise

    async def _until_records_taken(self) -> None:
        """Wait, where the engine is just starting, until it has opened and read its cursor store."""
        while self.state is EngineState.CONNECTING and not self._records_taken:
            self._link_moved.clear()
            await self._link_moved.wait()

    def _begin_with(self, config: ReplicationConfig, change: ConfigChange) -> None:
        """Take over any configuration: nothing was opened by the old one."""
        if config.local_node_id != self.node_id:
            self.metrics.forget_all()
            self.metrics = Metrics(config.local_node_id, self.metrics.registry)
        if self._given_ports is None:
            self._ports = _system_ports(config, self.metrics)
        self._put_in_force(config)
        self._equip()
        for peer_id in change.peers_removed:
            self._links.take_out(peer_id)
        self._make_links()

    def _change_to(
        self, config: ReplicationConfig, change: ConfigChange, records: Mapping[str, PeerRecord]
    ) -> None:
        """Take over a configuration while links are at work, all in one turn of the loop."""
        decided = decided_by(self._config.settings)
        self._put_in_force(config)
        peers = {peer.node_id: peer for peer in config.peers}
        for peer_id in change.peers_removed:
            self._links.take_out(peer_id)
        for changed in change.peers_changed:
            self._links.configure(peers[changed.node_id])
        for peer_id in change.peers_added:
            self._links.add(peers[peer_id], records[peer_id])
        self._links.arrange(config.peers)
        if decided_by(config.settings) != decided:
            self._links.decide_anew("settings changed")
        for peer_id, link in self._links.items():
            if peer_id in records:
                link.connect()
        self._show_state()
        self._link_moved.set()

    def _put_in_force(self, config: ReplicationConfig) -> None:
        self._config = config
        self._settings.replace(config.settings)
        circuits = config.settings.circuits
        self.circuit.reads.configure(**_numbers_of(circuits.reads))
        self.circuit.writes.configure(**_numbers_of(circuits.writes))
        self._journal.keep(config.settings.limits.journal)

    async def repair(
        self,
        peer_id: str | None = None,
        *,
        force: bool = False,
        accept_stale: bool = False,
        reject_stale: bool = False,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> RepairStats:
        """Compare trees with one peer, or all, now, and fetch everything that is newer there.

        There is no limit on the items; a second call for the same peers joins the first. ``force``
        lets any number of deletes through for an hour, over restarts, ends a pause of the interlock,
        and tries again what could not be fetched. ``accept_stale`` takes the old items that were held back,
        ``reject_stale`` deletes them everywhere; both need ``peer_id``. ``on_progress`` is called
        with the peer, the keys known to differ and the items fetched.

        What goes wrong with one peer is counted and told in ``problems``, and the others go on.

        :raises UsageError: if there is no such peer, or the choices contradict each other.
        :raises InvalidStateError: unless the engine is Running.
        :raises EngineStoppedError: if it ends before the repair does.
        """
        self._check_running("repair")
        if (accept_stale or reject_stale) and (peer_id is None or accept_stale == reject_stale):
            raise UsageError("accept_stale or reject_stale, one of them, is for one named peer")
        if peer_id is not None:
            self._link(peer_id)
        if force:
            for link in self._links.values():
                if peer_id in (None, link.peer_id):
                    link.force()
            await self._keep_words()
        await self._decided(peer_id)
        if not self.is_running:
            raise EngineStoppedError("the engine ended before the repair began")
        verdict = StaleVerdict(accept=accept_stale) if accept_stale or reject_stale else None
        return await self._cold_path.repair(peer_id, verdict, on_progress)

    async def _keep_words(self) -> None:
        """Write down what a person has just allowed, so that it holds over restarts."""
        try:
            await self._links.tidy()
        except CursorStoreError as error:
            # It is in force, and written with the next flush that succeeds.
            self._book.failed(error)
            self._log.warning("words_not_kept", path=error.path, error=error)

    async def _decided(self, peer_id: str | None) -> None:
        """Wait until links that have just connected have decided what comes next."""
        decided = tuple(state for state in PeerState if state is not PeerState.RESUMING)
        for link in tuple(self._links.values()):
            if peer_id in (None, link.peer_id) and link.state is PeerState.RESUMING:
                try:
                    async with self._ports.clock.timeout(self._config.settings.timeouts.command):
                        await link.waiter(*decided).wait()
                except TimeoutError:
                    continue

    async def differences(self, peer_id: str) -> AsyncIterator[KeyDifference]:
        """Yield every key that differs from a peer's, and which side is newer; changes nothing.

        :raises UsageError: if there is no such peer, or it publishes no tree.
        :raises InvalidStateError: unless the engine is Running.
        :raises PeerError: if the peer is not connected or cannot be read.
        :raises StoreError: if the own store cannot be read.
        """
        self._check_running("differences")
        link = self._link(peer_id)
        await self._decided(peer_id)
        lines = link.lines
        if lines is None:
            raise ConnectionLostError(f"peer {peer_id!r} is not connected: it is {link.describe()}")
        if not lines.layout:
            raise UsageError(f"peer {peer_id!r} publishes no tree that could be compared")
        found = find_differences(link.context, lines)
        while True:
            try:
                one = await anext(found, None)
            except ProtocolError as error:
                link.lost(lines, str(error))
                raise
            except ReplicationError:
                raise
            except (Blocked, Unsettled) as outcome:
                # It is our own store that fails, and no fault of the peer's.
                why = outcome.__cause__ or outcome
                raise StoreError(f"the own store cannot be read: {why}") from outcome
            except Exception as error:
                link.blame("comparison", error)
                raise ProtocolError(f"peer {peer_id!r} cannot be compared: {error}") from error
            if one is None:
                return
            yield one

    async def explain(self, key: str) -> Explanation:
        """Tell which version of a key is held here and at each peer, and which wins by which rule.

        :raises InvalidKeyError: if the key is not one.
        :raises StoreError: if the local store fails.
        """
        peers: list[tuple[PeerConfig, Lines | str]] = [
            (link.context.peer, link.lines or f"the link is {link.describe()}")
            for link in self._links.values()
        ]
        timeout = self._config.settings.timeouts
        async with self._ports.clock.timeout(timeout.store_call + timeout.command * len(peers)):
            return await explain_key(
                key,
                self._store,
                peers,
                timeout_sec=timeout.command,
                arrivals=self._arrivals,
                blame=self._links.blame,
                excepted_by=[
                    link.peer_id
                    for link in self._links.values()
                    if key in link.context.stale.exceptions
                ],
            )

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """See that what a caller finds wrong with the cursor store is shown, and judged, by all."""
        try:
            yield
        except CursorStoreError as error:
            if self.is_running:
                self._book.failed(error)
            raise

    async def _retry_letters(self, peer_id: str | None, ids: Sequence[int] | None) -> RetryStats:
        self._check_running("dead_letters.retry")
        with self._noting_errors():
            return await self._letter_retry.retry(peer_id, ids)

    async def _note_room(self) -> None:
        """Count the letters that are left, and let links go on that were paused for too many."""
        store = self._ports.cursor_store
        counts = await store.dead_letter_counts()
        for link in tuple(self._links.values()):
            link.context.progress.dead_letters = counts.get(link.peer_id, 0)
            if PauseReason.DEAD_LETTERS_FULL not in link.pause_reasons:
                continue
            if link.context.letters_fit(await store.load(link.peer_id)):
                link.clear(PauseReason.DEAD_LETTERS_FULL, "there is room for dead letters")

    def stale_keys(self, peer_id: str) -> tuple[str, ...]:
        """Return the keys of a peer's old items that wait for a person's word, at most 10,000.

        :raises UsageError: if there is no such peer.
        """
        return self._link(peer_id).context.stale.keys

    def excepted_keys(self, peer_id: str) -> tuple[str, ...]:
        """Return the keys that the last agreement with a peer leaves out, at most 1,000.

        They could not be taken: too large, unreadable, refused or stamped too far ahead.

        :raises UsageError: if there is no such peer.
        """
        return tuple(sorted(self._link(peer_id).context.stale.exceptions))

    def _check_not_over(self, call: str, *but: EngineState) -> None:
        over = _FINAL | {EngineState.SHUTTING_DOWN} - set(but)
        if self.state in over:
            raise EngineStoppedError(f"{call}: the engine is {self.state}")

    def _check_running(self, call: str) -> None:
        if not self.is_running:
            raise InvalidStateError(
                machine="engine", trigger=call, expected="Running", actual=self.state
            )

    def _link(self, peer_id: str) -> PeerLink:
        try:
            return self._links[peer_id]
        except KeyError:
            known = ", ".join(self._links) or "none"
            raise UsageError(f"there is no peer {peer_id!r} (configured: {known})") from None

    def _waiter(self, states: frozenset[EngineState]) -> StateWaiter:
        return self._driver.waiter(frozenset[StrEnum](states))

    # Guards and effects, named in the table.

    def no_error_kept(self) -> bool:
        """Guard of stopped."""
        return self._error is None

    def error_kept(self) -> bool:
        """Guard of failed."""
        return self._error is not None

    def start_up(self, _move: Move) -> None:
        """Start the worker that opens the cursor store and connects the links."""
        self._driver.start_worker("starter", str(EngineState.CONNECTING), self._start_up)

    def start_workers(self, _move: Move) -> None:
        """Start what Running owns."""
        clock = self._ports.clock
        self._supervise(
            "cursor-flush", lambda r: flush_cursors(self._book, clock, r, self._links.tidy)
        )
        watch = self._store_watch
        self._supervise("store-watch", lambda _r: watch.run())
        self._supervise(
            "prober",
            lambda _r: probe_circuits(
                self.circuit.writes,
                self.circuit.reads,
                watch.look,
                lambda: self._links.await_store,
                self._links.grant_probe,
                clock,
                self._circuit_moved,
            ),
        )
        # These two do nothing while they are not enabled, which may change.
        self._supervise("cold-path", lambda _r: self._cold_path.run())
        self._supervise("slo-watch", lambda _r: watch_lag(self._links.judge_lag, clock))
        self._supervise(
            "pinger", lambda _r: ping_idle_peers(self._links.to_be_pinged, self._settings, clock)
        )

    def _supervise(self, name: str, work: Callable[[Reporter], Coroutine[Any, Any, None]]) -> None:
        def supervised(report: Reporter) -> Coroutine[Any, Any, None]:
            return supervise(
                name,
                partial(work, report),
                clock=self._ports.clock,
                rng=self._ports.random,
                metrics=self.metrics,
                report=report,
            )

        self._driver.start_worker(name, str(EngineState.RUNNING), supervised)

    def _start_asked(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start what somebody asked for as a worker, so that it ends with Running."""
        self._driver.start_worker(name, str(EngineState.RUNNING), lambda _report: work())

    def keep_error(self, move: Move) -> None:
        """Keep the first error."""
        if self._error is None:
            error = move.payload
            self._error = error if isinstance(error, BaseException) else ReplicationError(move.why)

    def drain(self, _move: Move) -> None:
        """Start the worker that ends everything."""
        self._drain_tries = 1
        self._driver.start_worker(DRAINER, str(EngineState.SHUTTING_DOWN), self._drainer.run)

    def release(self, _move: Move) -> None:
        """Tell whoever follows that nothing more will come."""
        self._feed.close()
        self._cold_path.close()
        self._letter_retry.close()
        self._link_moved.set()

    # The work of starting.

    async def _start_up(self, report: Reporter) -> None:
        store = self._ports.cursor_store
        try:
            await store.open()
            await self._links.take_records(store)
        except CursorStoreError as error:
            report(EngineFact.BROKEN, str(error), error)
            return
        for link in self._links.values():
            link.connect()
        self._records_taken = True
        self._link_moved.set()
        no_peer = await self._first_peer()
        if no_peer is None:
            report(EngineFact.READY, "a peer is up, or it may run without")
        else:
            report(EngineFact.BROKEN, str(no_peer), no_peer)

    async def _first_peer(self) -> StartupError | None:
        """Return None when the engine may run, or an error when that will not come in time.

        Peers and settings may change meanwhile.
        """
        clock = self._ports.clock
        began = clock.monotonic()
        while True:
            startup = self._settings.value.startup
            states = [link.state for link in self._links.values()]
            if not states or startup.when_no_peer == "run":
                return None
            verdict = startup_verdict(states)
            if verdict is not None:
                return None if verdict else self._no_peer("and waiting will not help")
            rest = began + startup.timeout - clock.monotonic()
            if rest <= 0:
                return self._no_peer(f"within {startup.timeout:g} s")
            self._link_moved.clear()
            try:
                async with clock.timeout(rest):
                    await self._link_moved.wait()
            except TimeoutError:
                continue

    def _no_peer(self, when: str) -> NoPeerError:
        told = "; ".join(
            f"{link.peer_id}: {link.context.progress.last_error or link.state}"
            for link in self._links.values()
        )
        return NoPeerError(
            f"no peer could be reached {when} ({told}); set startup.when_no_peer to 'run' to start"
            " without"
        )

    # What circuits say.

    def _circuit_changed(self, circuit: Circuit, old: CircuitState, new: CircuitState) -> None:
        peer_id = circuit.name.removeprefix("peer:")
        if peer_id != circuit.name and not self._is_in_use(peer_id, circuit):
            return
        self._circuit_moved.set()
        why = ""
        if new is CircuitState.OPEN:
            # It is told before the circuit is Open, so when a probe may run is not asked of that.
            failures, wait_sec = circuit.failure_count, circuit.wait_sec
            why = f"{failures} failures in a row, the last of them: {circuit.last_error};"
            why += f" a probe may run in {wait_sec:.1f} s"
        level = level_of_circuit(new)
        self._log.log(level, "circuit_changed", circuit=circuit.name, source=old, dest=new, why=why)
        trigger = next(
            row.trigger for row in CIRCUIT.rows if old in row.sources and row.dest is new
        )
        machine, now = f"circuit:{circuit.name}", self._ports.wall_clock.now_ms()
        self._journal.append(Transition(machine, now, trigger, old, new, why))
        self.metrics.get("transitions", machine, trigger, old, new).inc()
        self.metrics.get("circuit_state", circuit.name).set(_CIRCUIT_VALUES[new])
        if peer_id != circuit.name:
            self.metrics.get("peer_circuit_transitions", peer_id, old, new).inc()
        elif new is CircuitState.CLOSED:
            for link in self._links.values():
                link.clear(PauseReason.CIRCUIT, "the store's circuit closed")

    def _circuit_called(self, circuit: Circuit, outcome: CallOutcome) -> None:
        peer_id = circuit.name.removeprefix("peer:")
        if peer_id != circuit.name and not self._is_in_use(peer_id, circuit):
            return
        if outcome is CallOutcome.REJECTED:
            self.metrics.get("circuit_rejections", circuit.name).inc()
        else:
            self.metrics.get("circuit_calls", circuit.name, outcome).inc()

    def _is_in_use(self, peer_id: str, circuit: Circuit) -> bool:
        """Say whether a circuit was not replaced yet; a call that began before may still end."""
        link = self._links.get(peer_id)
        return link is not None and link.context.peer_circuit is circuit

    # What drivers say.

    def _on_fact(self, report: Report) -> None:
        if report.fact is EngineFact.DRAINED and isinstance(report.payload, BaseException):
            if self._error is None:
                self._error = report.payload
            else:
                # The first error is the one that is kept, but what was left behind must be named.
                self._error.add_note(str(report.payload))

    def _crashed(self, worker: str, error: Exception) -> None:
        if worker == "engine:drainer":
            self._drainer_died(error)
            return
        # What happens while working with one peer is for its link to count.
        gone = isinstance(error, CursorStoreError) and not error.may_pass
        if gone or worker.startswith("engine:"):
            why = f"{worker} died: {shorten(str(error))}"
            self._driver.request_if_legal("abort", why=why, payload=error)

    def _drainer_died(self, error: Exception) -> None:
        """See that the engine ends all the same: nobody else would end it."""
        state = str(EngineState.SHUTTING_DOWN)
        if self._drain_tries < DRAIN_TRIES_MAX:
            self._drain_tries += 1
            self._driver.request_if_legal("abort", why=f"the drainer died: {error}", payload=error)
            self._driver.start_worker(DRAINER, state, self._drainer.by_force)
            return
        ticket = self._driver.machine.ticket(state)
        self._driver.post(Report("drainer", EngineFact.DRAINED, ticket, str(error), error))

    def moved(self, machine: str, move: Move) -> None:
        """Count every move of every machine."""
        self.metrics.get("transitions", machine, move.trigger, move.source, move.dest).inc()
        peer_id = machine.removeprefix("link:")
        if peer_id != machine:
            self.metrics.get("peer_state", peer_id, move.source).set(0)
            self.metrics.get("peer_state", peer_id, move.dest).set(1)
            if move.dest is PeerState.STOPPED:
                self._forget_if_taken_out(peer_id)
        self._show_state()
        self._link_moved.set()

    def concluded(self, machine: str, move: Move) -> None:
        """Log every move of every machine, with its reason and what comes of it."""
        link = self._links.get(machine.removeprefix("link:")) if machine != "engine" else None
        attempts, wait_sec = (0, None) if link is None else (link.attempts, link.next_attempt_sec)
        self._log.log(
            level_of_move(move, attempts=attempts),
            "transition",
            machine=machine,
            trigger=move.trigger,
            source=move.source,
            dest=move.dest,
            why=move.why,
            next_attempt_sec=wait_sec,
        )

    def _forget_if_taken_out(self, peer_id: str) -> None:
        link = self._links.note_stopped(peer_id)
        if link is None:
            return
        self._book.forget(peer_id)
        self.metrics.forget_peer(peer_id)
        link.context.metrics.detach()

    def _show_state(self) -> None:
        self.metrics.get("engine_state").set(list(EngineState).index(self.state))
        connected = sum(link.state.is_running for link in self._links.values())
        self.metrics.get("connected_peers").set(connected)

    def dropped(self, machine: str, report: Report, state: StrEnum) -> None:
        """Count reports that came too late or moved nothing."""
        peer_id = machine.removeprefix("link:")
        if peer_id == machine or peer_id in self._links:
            self.metrics.get("stale_reports", machine, report.fact).inc()
        self._log.debug("report_dropped", machine=machine, fact=report.fact, state=state)

    def effect_failed(self, machine: str, move: Move | None, error: Exception) -> None:
        """Give up: an effect that raises is a bug, and nothing it owns can be trusted."""
        self._log.error("effect_failed", machine=machine, exc_info=error)
        self._driver.request_if_legal("abort", why=f"an effect of {machine} failed", payload=error)

    def worker_failed(self, machine: str, worker: str, error: BaseException) -> None:
        """Log a worker's death with its traceback."""
        self._log.error("worker_died", machine=machine, worker=worker, exc_info=error)
        self.metrics.get("worker_restarts", worker).inc()

    def __repr__(self) -> str:
        return f"<ReplicationEngine {self.node_id!r} {self.state}>"


def startup_verdict(states: Sequence[PeerState]) -> bool | None:
    """Say whether a start has come to an end: well, as a link is up, or badly, as none will be."""
    if any(state.is_running for state in states):
        return True
    return False if all(state is PeerState.FAILED for state in states) else None


class _Numbers(TypedDict):
    """The numbers of a circuit, as it is made and configured with."""

    failures: int
    successes: int
    reset_sec: float
    reset_max_sec: float


def _numbers_of(config: CircuitConfig) -> _Numbers:
    return _Numbers(
        failures=config.failures,
        successes=config.successes,
        reset_sec=config.reset_first,
        reset_max_sec=config.reset_max,
    )


def _refuse_other_node(config: ReplicationConfig, store: SyncEngine) -> None:
    """Refuse a store of another node: its stream would tell of writes of that one.

    :raises ConfigError: if it is one.
    """
    if store.node_id not in ("", config.local_node_id):
        raise ConfigError(
            [
                f"local_node_id: the sync engine was made for {store.node_id!r}, not {config.local_node_id!r}"
            ]
        )


def _system_ports(config: ReplicationConfig, metrics: Metrics) -> Ports:
    cursor = config.cursor
    return Ports(
        transport=RedisTransport(),
        cursor_store=SqliteCursorStore(
            cursor.sqlite_path,
            wal_mode=cursor.wal_mode,
            timeout_sec=config.settings.timeouts.cursor,
            on_retry=metrics.get("cursor_retries").inc,
        ),
    )
