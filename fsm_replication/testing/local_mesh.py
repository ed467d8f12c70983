"""Several whole nodes in one process, on virtual time, with everything that can happen to them.

Engines, links, workers and tables are the real ones; only what they reach through ports is
simulated: servers, lines, clocks, cursor files and chance. The same seed and the same calls give
the same run.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from fsm_replication.config import (
    CircuitsConfig,
    ColdPathConfig,
    HotPathConfig,
    PeerConfig,
    ReplicationConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.heavy import InTurn
from fsm_replication.items import Resolver, SyncItem
from fsm_replication.merkle import OWN
from fsm_replication.ports import Ports
from fsm_replication.tables import PeerState
from fsm_replication.testing.memory_cursor import MemoryCursorStore
from fsm_replication.testing.sim_dialects import REDIS_7_0, Dialect
from fsm_replication.testing.sim_redis import SimRedis, SimState
from fsm_replication.testing.sim_store import SimStore
from fsm_replication.testing.sim_streams import Stream
from fsm_replication.testing.sim_transport import SimTransport
from fsm_replication.testing.spin_watch import BrokenPromiseError, Pace, SpinWatch
from fsm_replication.testing.virtual_time import LoopClock, SkewedWallClock, VirtualTimeLoop

__all__ = ("LocalMesh", "LocalNode", "kill_engine", "topology")

START_MS: Final = 1_700_000_000_000
TTL_SEC: Final = 900.0
GRACE_SEC: Final = 300.0
COLD_INTERVAL_SEC: Final = 20.0
BLOCK_SEC: Final = 20.0
# A Redis that fsyncs every second loses no more than this.
LOST_SEC: Final = 1.0
SETTLE_SEC: Final = 3_000.0
# Turns of the loop without any task after which a killed engine is gone.
CALM_TURNS: Final = 5
_AT_REST: Final = frozenset({PeerState.TAILING, PeerState.STANDBY})


def topology(shape: str, names: Sequence[str]) -> set[frozenset[str]]:
    """Return the pairs of nodes that read each other: mesh, chain, ring or star.

    :raises ValueError: if there is no such shape.
    """
    beside = list(pairwise(names))
    pairs = {
        "mesh": [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]],
        "chain": beside,
        "ring": [*beside, (names[-1], names[0])],
        "star": [(names[0], other) for other in names[1:]],
    }
    if shape not in pairs:
        raise ValueError(f"there is no shape {shape!r}: {', '.join(pairs)}")
    return {frozenset(pair) for pair in pairs[shape] if pair[0] != pair[1]}


@dataclass(slots=True)
class LocalNode:
    """One node; ``engine`` is None while its process is down."""

    name: str
    server: SimRedis
    store: SimStore
    cursors: MemoryCursorStore
    transport: SimTransport
    wall_clock: SkewedWallClock
    config: ReplicationConfig
    engine: ReplicationEngine | None = None
    saved: deque[tuple[float, SimState]] = field(default_factory=deque)


def _end_run(error: BrokenPromiseError) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.fail(error)


async def kill_engine(engine: ReplicationEngine) -> None:
    """End every task of an engine where it stands, as kill -9 ends a process."""
    drivers = [engine._driver, *(link.driver for link in engine._links.owned)]
    calm = 0
    while calm < CALM_TURNS:
        # A machine that learns of the end of one task may start another, as it would on its way
        # down; a process that is gone starts nothing.
        left = any(driver.workers for driver in drivers)
        for driver in drivers:
            driver.cancel_all()
        calm = 0 if left else calm + 1
        await asyncio.sleep(0)


class LocalMesh:
    """Nodes that read each other in pairs; use it inside a coroutine run on virtual time.

    Every call that lets time pass is a coroutine; what is written and broken happens at once.
    ``dialect`` chooses what kind of server a node has, by its name. A node that asks a peer for
    more than ``pace`` allows without getting on ends the run with BrokenPromiseError.
    """

    def __init__(
        self,
        names: Sequence[str],
        pairs: Iterable[frozenset[str]],
        *,
        seed: int = 0,
        settings: Settings | None = None,
        resolver: Resolver | None = None,
        dialect: Callable[[str], Dialect] = lambda _name: REDIS_7_0,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._rng = random.Random(seed)  # noqa: S311 - a seed must give the same run
        self._clock = LoopClock()
        self._pairs = set(pairs)
        self._settings = settings or Settings(
            hot_path=HotPathConfig(block_timeout=BLOCK_SEC),
            cold_path=ColdPathConfig(interval_sec=COLD_INTERVAL_SEC),
            circuits=CircuitsConfig(look_interval=COLD_INTERVAL_SEC),
            tombstones=TombstonesConfig(ttl=TTL_SEC, grace=GRACE_SEC),
            startup=StartupConfig(when_no_peer="run"),
        )
        self.servers: dict[str, SimRedis] = {}
        self.nodes: dict[str, LocalNode] = {}
        for name in names:
            self._add(name, resolver, dialect(name))

    def _add(self, name: str, resolver: Resolver | None, dialect: Dialect) -> None:
        wall_clock = SkewedWallClock(self._clock, START_MS)
        server = self.servers[name] = SimRedis(now_ms=wall_clock.now_ms, dialect=dialect)
        tombstones = self._settings.tombstones
        store = SimStore(
            server,
            node_id=name,
            rng=self._rng,
            ttl_ms=round(tombstones.ttl * 1000),
            grace_ms=round(tombstones.grace * 1000),
            resolver=resolver,
        )
        store.open()
        transport = SimTransport(self.servers, self._clock, self._rng)
        transport.delay = lambda _name, _host: self._rng.choice((0.0, 0.001, 0.02))
        transport.watch = SpinWatch(name, self._pace, now_sec=self._clock.monotonic, fail=_end_run)
        config = ReplicationConfig(
            local_node_id=name,
            peers=[
                PeerConfig(node_id=peer, redis_url=f"redis://{peer}") for peer in self.read_by(name)
            ],
            settings=self._settings,
        )
        cursors = MemoryCursorStore()
        self.nodes[name] = LocalNode(name, server, store, cursors, transport, wall_clock, config)

    def read_by(self, name: str) -> list[str]:
        """Return whom a node reads."""
        return sorted(next(iter(pair - {name})) for pair in self._pairs if name in pair)

    # Processes

    async def start(self, name: str) -> None:
        """Start a node's engine, unless it runs."""
        node = self.nodes[name]
        if node.engine is None:
            node.store.open_if_empty()
            node.engine = self.make_engine(name)
            await node.engine.start()

    def make_engine(self, name: str) -> ReplicationEngine:
        """Return a new engine for a node, which is not started, nor the node's before it is."""
        node = self.nodes[name]
        ports = Ports(
            transport=node.transport,
            cursor_store=node.cursors,
            clock=self._clock,
            wall_clock=node.wall_clock,
            random=self._rng,
            heavy=InTurn(),
        )
        return ReplicationEngine(node.config, node.store, ports=ports)

    async def stop(self, name: str) -> None:
        """Stop a node's engine as an operator would, unless it is down."""
        node = self.nodes[name]
        if node.engine is not None:
            engine, node.engine = node.engine, None
            await engine.shutdown()

    async def kill(self, name: str) -> None:
        """Kill a node's process: nothing is flushed, what is on its disks stays."""
        node = self.nodes[name]
        if node.engine is None:
            return
        engine, node.engine = node.engine, None
        on_disk = node.cursors.snapshot()
        await kill_engine(engine)
        node.cursors.restore(on_disk)

    async def close(self) -> None:
        """Stop every engine; where one spins they are killed, for it may not let time pass."""
        watches = [node.transport.watch for node in self.nodes.values()]
        spins = any(watch is not None and watch.failed for watch in watches)
        for name in self.nodes:
            await (self.kill(name) if spins else self.stop(name))

    async def change_ttl(self, name: str, ttl_sec: float, grace_sec: float = GRACE_SEC) -> None:
        """Stop a node, and start it with another ``tombstones.ttl``."""
        await self.stop(name)
        node = self.nodes[name]
        tombstones = TombstonesConfig(ttl=ttl_sec, grace=grace_sec)
        settings = node.config.settings.model_copy(update={"tombstones": tombstones})
        node.config = node.config.model_copy(update={"settings": settings})
        node.store.reopen(ttl_ms=round(ttl_sec * 1000), grace_ms=round(grace_sec * 1000))
        await self.start(name)

    # Lines and servers

    def cut(self, reader: str, peer: str) -> None:
        """Break the line by which one node reads another."""
        self.nodes[reader].transport.cut(peer)

    def heal(self, reader: str, peer: str) -> None:
        """Mend a line."""
        self.nodes[reader].transport.heal(peer)

    def remember(self, name: str) -> None:
        """Note what a node's server holds now, to lose what comes later."""
        node = self.nodes[name]
        now = self._clock.monotonic()
        node.saved.append((now, node.server.dump()))
        while len(node.saved) > 1 and now - node.saved[1][0] > LOST_SEC:
            node.saved.popleft()

    def lose_last_second(self, name: str) -> bool:
        """Crash a node's server, which comes back as it was up to a second ago."""
        node = self.nodes[name]
        now = self._clock.monotonic()
        fresh = [state for at, state in node.saved if now - at <= LOST_SEC]
        if not fresh:
            return False
        self.restore(name, fresh[0])
        return True

    def snapshot(self, name: str) -> SimState:
        """Return what a node's server holds now, as a backup would."""
        return self.nodes[name].server.dump()

    def restore(self, name: str, state: SimState) -> None:
        """Start a node's server again from a snapshot; connections to it are lost."""
        node = self.nodes[name]
        node.server.load(state)
        node.store.crashed()
        node.saved.clear()
        for other in self.nodes.values():
            was_down = name in other.transport.down
            other.transport.cut(name)
            if not was_down:
                other.transport.heal(name)

    def wipe(self, name: str) -> None:
        """Empty a node's server, marker and all, while every connection to it stands."""
        node = self.nodes[name]
        node.server.execute("FLUSHALL")
        node.saved.clear()

    def trim(self, name: str, entries: int) -> None:
        """Trim a node's stream to its last entries."""
        self.servers[name].execute("XTRIM", self.nodes[name].store.keys.stream, "MAXLEN", entries)

    def delete_stream(self, name: str) -> None:
        """Remove a node's stream; the next write makes a new one."""
        self.servers[name].execute("DEL", self.nodes[name].store.keys.stream)

    # The end

    async def mend(self) -> None:
        """Mend every line, and start every node."""
        for reader in self.nodes:
            for peer in self.read_by(reader):
                self.heal(reader, peer)
        for name in self.nodes:
            await self.start(name)

    def events(self) -> dict[str, int]:
        """Return how many entries were ever added to each stream as it is now."""
        counts = {}
        for name, node in self.nodes.items():
            # Not every server tells.
            stream = node.server.db.get(node.store.keys.stream.encode(), Stream)
            counts[name] = 0 if stream is None else stream.added
        return counts

    async def roots(self) -> set[bytes]:
        """Return the different roots of all nodes."""
        return {await node.store.tree.root(OWN) for node in self.nodes.values()}

    def holdings(self) -> list[dict[str, SyncItem]]:
        """Return what each node holds."""
        return [node.store.items() for node in self.nodes.values()]

    async def settle(self, timeout_sec: float = SETTLE_SEC, *, agreed: bool = True) -> None:
        """Wait until all nodes hold the same and nothing moves any more.

        With ``agreed`` false, only until nothing moves.

        :raises TimeoutError: after ``timeout_sec`` of virtual time.
        """
        deadline = self._clock.monotonic() + timeout_sec
        quiet_since: float | None = None
        before: dict[str, int] = {}
        while True:
            events = self.events()
            still = events == before and self._at_rest()
            still = still and (not agreed or len(await self.roots()) == 1)
            now = self._clock.monotonic()
            if not still:
                quiet_since, before = None, events
            elif quiet_since is None:
                quiet_since = now
            elif now - quiet_since > 2 * COLD_INTERVAL_SEC:
                return
            if now > deadline:
                raise TimeoutError(
                    f"no rest after {timeout_sec:g} s: events {events}, links"
                    f" {[node.engine and node.engine.peers for node in self.nodes.values()]}"
                )
            await asyncio.sleep(COLD_INTERVAL_SEC / 4)

    def _at_rest(self) -> bool:
        return all(
            state in _AT_REST
            for node in self.nodes.values()
            for state in (node.engine.peers if node.engine is not None else {}).values()
        )
