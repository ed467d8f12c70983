"""Random fates of a simulated mesh: what happens to it, and what must hold all the same.

A :class:`Fate` is a mesh and a list of steps, made from a seed by :func:`random_fate` or by a test.
:func:`carry_out` runs it: first chaos, then everything is mended, and all nodes must come to rest
with the same items. What must hold:

- every node ends with the latest write, by order tuple, of those that some node still held when the
  chaos ended (G4), and nothing that nobody held (G5);
- without the cold path (half of the runs) a link that reads has everything that its peer holds, or
  its health says that something is missing (G1, G2): what trees would heal must not hide a loss;
- where no server lost anything, a node emits at most one event for each write (G11);
- with the cold path, which tells when two nodes last agreed, no node takes an item that was deleted
  after it was written, once it has known of the delete (G5), whatever came back from a backup and
  however long nodes were apart, until a person says so;
- one key spoils nothing (G13): with one that is too large for the others, or stamped days ahead, all
  other keys come to agree, links read, and trees agree but for it;
- peers take no more live items away than a person's word allows, over kills and restarts (G14);
- no engine ends of what its peers answer (G13);
- nothing spins (G12): what a node asks of a peer brings it entries or items that it did not have,
  or is far between (see :mod:`fsm_replication.testing.spin_watch`);
- every journal is a walk of the tables (G6), and nothing of an engine is left when it is down (G7).

The same fate gives the same run, to the last await.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    LimitsConfig,
    RepairConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import (
    CursorStoreError,
    DrainTimeoutError,
    NoPeerError,
    ReplicationError,
    StampAheadError,
    StoreError,
    WaitTimeoutError,
)
from fsm_replication.items import DAY_MS, SyncItem
from fsm_replication.journal import Transition
from fsm_replication.ports import PeerRecord, StreamId
from fsm_replication.reports import PauseReason
from fsm_replication.tables import EngineState, PeerState
from fsm_replication.testing.local_mesh import (
    BLOCK_SEC,
    COLD_INTERVAL_SEC,
    GRACE_SEC,
    SETTLE_SEC,
    START_MS,
    TTL_SEC,
    LocalMesh,
    LocalNode,
    topology,
)
from fsm_replication.testing.moves import Move, moves_of_the_tables
from fsm_replication.testing.sim_dialects import (
    REDIS_6_2,
    REDIS_7_0,
    REDIS_8_0,
    VALKEY_8_1,
    Dialect,
    dialect_named,
)
from fsm_replication.testing.sim_redis import SimState
from fsm_replication.testing.spin_watch import BrokenPromiseError
from fsm_replication.testing.store_witness import StoreWitness, Writes
from fsm_replication.testing.virtual_time import VirtualTimeLoop, run

__all__ = (
    "CONTENTS",
    "COUNTING",
    "KEYS",
    "NAMES",
    "SHAPES",
    "BrokenPromiseError",
    "Fate",
    "Step",
    "Tally",
    "carry_out",
    "random_fate",
    "run_fate",
    "shrink",
)

NAMES: Final = "abcde"
SHAPES: Final = ("mesh", "chain", "ring", "star")
KEYS: Final = ("k", "k.1", "other")
CONTENTS: Final = (b"", b"x", b"y", b"y")
WAITS: Final = (0.0, 0.001, 0.01, 0.05, 0.5, 3.0, 15.0)
SKEWS: Final = (-5000, -500, 0, 500, 5000)
# A run of this much virtual time has not come to rest and never will.
LIMIT_SEC: Final = 60_000.0
GIVE_UP_SEC: Final = 10.0
FLOOD: Final = 80
# Longer than a link waits before it tries rejected credentials, or a circuit of the store, again.
LONG_SEC: Final = 400.0
BACKOFF_MAX_SEC: Final = 300.0
# What is promised of deletes holds while changes reach every node within the ttl (G5); once all is
# mended a link may still wait for as long as it ever does.
CHAOS_MAX_SEC: Final = TTL_SEC - BACKOFF_MAX_SEC - 50.0
# Until all that was deleted before is forgotten.
AGES_SEC: Final = TTL_SEC + GRACE_SEC + 100.0
DAYS: Final = (-2, 2, 40)
TTLS_SEC: Final = (TTL_SEC, 1.5 * TTL_SEC, 3 * TTL_SEC)
# Under it all other contents stay, and over it what nobody else takes.
PAYLOAD_BYTES: Final = 4096
HUGE: Final = bytes(range(256)) * 20
# Keys that come and go in numbers, and how far their number may fall in one go.
CROWD: Final = tuple(f"crowd.{number}" for number in range(40))
INTERLOCK_MIN: Final = 10
# Cycles without a link that asks for a person's word, after which none will.
CALM_CYCLES: Final = 5
Step = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Fate:
    """A mesh and what happens to it.

    ``hot`` is false for nodes that only compare trees, ``cold`` for nodes that only read streams;
    ``strict`` nodes do not start without a peer; ``batch`` is how many entries they read at once.
    ``dialects`` names what each node's server speaks, the last of them also for further nodes; all
    speak that of Redis 7.0 where none is named.
    """

    shape: str
    nodes: int
    seed: int
    steps: tuple[Step, ...]
    hot: bool = True
    cold: bool = True
    strict: bool = False
    batch: int = 100
    dialects: tuple[str, ...] = ()

    def dialect(self, name: str) -> Dialect:
        """Return what a node's server speaks."""
        if not self.dialects:
            return REDIS_7_0
        return dialect_named(self.dialects[min(NAMES.index(name), len(self.dialects) - 1)])

    @property
    def names(self) -> str:
        """The names of the nodes."""
        return NAMES[: self.nodes]


@dataclass(slots=True)
class Tally:
    """What runs have covered: virtual seconds, steps by kind, moves, and servers by dialect.

    ``peak`` is the most flights and commands that a node ever spent without getting on.
    """

    runs: int = 0
    seconds: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)
    moves: Counter[Move] = field(default_factory=Counter)
    servers: Counter[str] = field(default_factory=Counter)
    peak: tuple[float, float] = (0.0, 0.0)

    def add(self, other: Tally) -> None:
        """Add what other runs have covered."""
        self.runs += other.runs
        self.seconds += other.seconds
        self.steps.update(other.steps)
        self.moves.update(other.moves)
        self.servers.update(other.servers)
        self.spent(other.peak)

    def spent(self, peak: tuple[float, float]) -> None:
        """Note the most flights and commands that a node spent."""
        self.peak = (max(self.peak[0], peak[0]), max(self.peak[1], peak[1]))

    def never_taken(self) -> list[Move]:
        """Return the moves of the tables that no run has taken."""
        return sorted(moves_of_the_tables() - self.moves.keys())


# Making fates

# How often each kind of step comes, in tickets of a lottery.
_LOTTERY: Final = (
    ("put", 12), ("delete", 6), ("wait", 14), ("cut", 4), ("heal", 4), ("hang", 2), ("stop", 2),
    ("kill", 3), ("start", 5), ("lose", 2), ("drop", 1), ("trim", 2), ("skew", 2), ("pause", 2),
    ("resume", 2), ("full", 1), ("roomy", 1), ("break", 2), ("work", 2), ("disk", 1),
    ("corrupt", 1), ("repair", 1), ("stranger", 1), ("long", 2), ("slow", 1), ("flood", 2),
    ("reject", 1), ("unborn", 1), ("hasty", 1), ("reconfigure", 2),
)  # fmt: skip
_KINDS: Final = tuple(kind for kind, _ in _LOTTERY)
_TICKETS: Final = tuple(tickets for _, tickets in _LOTTERY)
# What backups, clocks, large items, mass deletes and peers that have lost their mind do; drawn apart,
# for the runs that have any of it.
_TROUBLE_LOTTERY: Final = (
    ("backup", 4), ("restore", 3), ("unread", 1), ("ages", 2), ("days", 2), ("slip", 2), ("huge", 3),
    ("crowd", 3), ("purge", 3), ("churn", 2), ("restart", 4), ("garble", 2), ("drip", 2),
    ("gush", 2), ("ttl", 2),
)  # fmt: skip
_TROUBLES: Final = tuple(kind for kind, _ in _TROUBLE_LOTTERY)
_TROUBLE_TICKETS: Final = tuple(tickets for _, tickets in _TROUBLE_LOTTERY)
TROUBLE_SHARE: Final = 0.5
TROUBLES_MAX: Final = 6
RELIC_SHARE: Final = 0.1
EXPIRE_SHARE: Final = 0.005
WIPE_SHARE: Final = 0.2
COLD_SHARE: Final = 0.5
# How often a server is one that does not count what is added to a stream.
UNCOUNTED_SHARE: Final = 0.4
# How many rounds of one link may come to nothing after those that are free: a few, by bad luck.
DELAYED_MAX: Final = 3
COUNTING: Final = (REDIS_7_0, REDIS_8_0, VALKEY_8_1)
# What an engine may end of: its own disk, its own store, and that it is told to need a peer.
_MAY_END: Final = (CursorStoreError, DrainTimeoutError, NoPeerError)
# After these what was deleted may be forgotten, or come back.
_LONG: Final = frozenset({"ages", "restore"})
# These keep a node from agreeing with its peers.
_KEEPS_APART: Final = frozenset(
    {"pause", "stop", "cut", "hang", "reject", "break", "full", "slow", "disk", "corrupt", "days"}
)
# After these a stream may begin anew.
_BREAKS: Final = frozenset({"lose", "drop", "wipe", "restore"})


def random_fate(seed: int) -> Fate:
    """Return the fate that a seed stands for."""
    rng = random.Random(seed)  # noqa: S311 - a seed must give the same run
    names = NAMES[: rng.randint(2, len(NAMES))]
    steps: list[Step] = []
    waited = 0.0
    for kind in rng.choices(_KINDS, _TICKETS, k=rng.randint(5, 30)):
        step = _random_step(kind, names, rng)
        if step[0] == "wait":
            waited += step[1]
            if waited > CHAOS_MAX_SEC:
                waited -= step[1]
                continue
        steps.append(step)
        if rng.random() < EXPIRE_SHARE:
            steps.append(("expire",))
    # Drawn apart, so that a seed that failed before there were wipes is still the same run.
    apart = random.Random(f"wipe {seed}")  # noqa: S311 - as above
    if apart.random() < WIPE_SHARE:
        steps.insert(apart.randint(0, len(steps)), ("wipe", apart.choice(names)))
    _add_troubles(steps, names, random.Random(f"troubles {seed}"))  # noqa: S311 - as above
    _add_relic(steps, names, random.Random(f"relic {seed}"))  # noqa: S311 - as above
    kinds = random.Random(f"dialects {seed}")  # noqa: S311 - as above
    dialects = tuple(_random_dialect(kinds).name for _ in names)
    shape, hot = rng.choice(SHAPES), rng.random() > 0.1
    return Fate(
        shape,
        len(names),
        seed,
        tuple(steps),
        hot=hot,
        cold=not hot or apart.random() < COLD_SHARE,
        strict=rng.random() < 0.1,
        batch=rng.choice((1, 100)),
        dialects=dialects,
    )


def _add_troubles(steps: list[Step], names: str, rng: random.Random) -> None:
    """Put troubles among the steps, or none."""
    if rng.random() >= TROUBLE_SHARE:
        return
    kinds = rng.choices(_TROUBLES, _TROUBLE_TICKETS, k=rng.randint(1, TROUBLES_MAX))
    for kind in kinds:
        node, other = rng.choice(names), rng.choice(names)
        at = rng.randint(0, len(steps))
        if kind == "ages":
            # Often with nodes that are apart meanwhile.
            apart = [("cut", node, name) for name in names] if rng.random() < 0.7 else []
            apart += [("cut", name, node) for name in names] if apart else []
            steps[at:at] = [*apart, ("ages",)]
        elif kind == "days":
            steps.insert(at, (kind, node, rng.choice(DAYS)))
        elif kind == "ttl":
            steps.insert(at, (kind, node, rng.choice(TTLS_SEC)))
        elif kind in ("garble", "drip", "gush"):
            steps.insert(at, (kind, node, other))
        else:
            steps.insert(at, (kind, node))


def _add_relic(steps: list[Step], names: str, rng: random.Random) -> None:
    """Let a node come back with a key that all have known to be deleted, and have forgotten; or not.

    By chance alone these steps would hardly ever come in this order.
    """
    if rng.random() >= RELIC_SHARE:
        return
    node, reader, key = rng.choice(names), rng.choice(names), rng.choice(KEYS)
    story: list[Step] = [("put", node, key, b"relic"), ("wait", LONG_SEC), ("backup", node)]
    story += [("delete", node, key), ("wait", LONG_SEC), ("ages",), ("restore", node)]
    if rng.random() < 0.5:
        story.append(("put", node, rng.choice(KEYS), b"x"))
    if rng.random() < 0.5:
        story.insert(rng.randint(0, len(story)), ("reconfigure", reader, "hot"))
    at = rng.randint(0, len(steps))
    steps[at:at] = story


def _random_dialect(rng: random.Random) -> Dialect:
    counting = rng.choice(COUNTING)
    return REDIS_6_2 if rng.random() < UNCOUNTED_SHARE else counting


def _random_step(kind: str, names: str, rng: random.Random) -> Step:
    node = rng.choice(names)
    if kind == "put":
        return kind, node, rng.choice(KEYS), rng.choice(CONTENTS)
    if kind == "delete":
        return kind, node, rng.choice(KEYS)
    if kind == "wait":
        return kind, rng.choice(WAITS)
    if kind == "long":
        return "wait", LONG_SEC
    if kind in ("cut", "heal", "hang", "reject"):
        return kind, node, rng.choice(names)
    if kind in ("slow", "hasty"):
        return kind, node, rng.choice(WAITS)
    if kind == "trim":
        return kind, node, rng.randint(0, 2)
    if kind == "reconfigure":
        return kind, node, rng.choice(("hot", "limits", "limits"))
    if kind == "skew":
        return kind, node, rng.choice(SKEWS)
    return kind, node


# Running them


class _Run:
    """One run of a fate: takes its steps, and knows what was written and what was lost."""

    def __init__(self, fate: Fate, tally: Tally) -> None:
        self._tally = tally
        self._cold = fate.cold
        kinds = {step[0] for step in fate.steps}
        crowded = self._crowded = bool(kinds & {"crowd", "purge", "churn"})
        self.mesh = LocalMesh(
            fate.names,
            topology(fate.shape, fate.names),
            seed=fate.seed,
            dialect=fate.dialect,
            settings=Settings(
                hot_path=HotPathConfig(
                    enabled=fate.hot,
                    block_timeout=BLOCK_SEC,
                    batch_size=fate.batch,
                    min_batch_size=1,
                    max_batch_size=fate.batch,
                ),
                cold_path=ColdPathConfig(enabled=fate.cold, interval_sec=COLD_INTERVAL_SEC),
                tombstones=TombstonesConfig(ttl=TTL_SEC, grace=GRACE_SEC),
                startup=StartupConfig(when_no_peer="fail" if fate.strict else "run"),
                limits=LimitsConfig(payload_bytes=PAYLOAD_BYTES),
                repair=RepairConfig(interlock_share=0.0, interlock_min=INTERLOCK_MIN)
                if crowded
                else RepairConfig(),
            ),
        )
        self._days_off = "days" in kinds
        self._written: Writes = {}
        self._backups: dict[str, SimState] = {}
        for name, node in self.mesh.nodes.items():
            node.store.witness = StoreWitness(
                name,
                self._written,
                now_sec=asyncio.get_running_loop().time,
                fail=_end_run,
                allowance=INTERLOCK_MIN * len(self.mesh.read_by(name)) if crowded else None,
                revivals=fate.cold and not (self._days_off or _passes_on(fate.steps)),
            )
            self._backups[name] = self.mesh.snapshot(name)
        self._lost = self._wiped = False
        self._strangers: set[str] = set()
        self._ttl_sec = TTL_SEC
        # Readers, with the peer whose stream was removed before they had read any of it.
        self._blind: set[tuple[str, str]] = set()

    async def run(self, steps: Sequence[Step]) -> None:
        """Begin, take the steps, mend everything, and look at what has come of it."""
        try:
            for name in self.mesh.nodes:
                await self._start(name)
            if self._cold and any(step[0] in _LONG for step in steps):
                # A link that has never agreed takes all (G5).
                await self.mesh.settle()
            for step in steps:
                await self._take(step)
            await self._rest()
            for name in self.mesh.nodes:
                await self._stop(name)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            _promise(not left, f"tasks are left behind: {left}")
            for node in self.mesh.nodes.values():
                assert node.transport.watch is not None
                self._tally.spent(node.transport.watch.peak)
        finally:
            await self.mesh.close()

    async def _take(self, step: Step) -> None:
        kind, *args = step
        self._tally.steps[kind] += 1
        for name in self.mesh.nodes:
            self.mesh.remember(name)
        act: Callable[..., Any] = getattr(self, f"_{kind}")
        done = act(*args)
        if asyncio.iscoroutine(done):
            await done
        if kind in _BREAKS and not self._cold:
            # A stream that is made anew within the millisecond gives the same ids again.
            await asyncio.sleep(0.002)

    # Steps, by their names

    def _put(self, name: str, key: str, content: bytes) -> None:
        with suppress(StampAheadError):
            self.mesh.nodes[name].store.put(key, content)
            self._note(name, key)

    def _delete(self, name: str, key: str) -> None:
        with suppress(StampAheadError):
            if self.mesh.nodes[name].store.delete(key):
                self._note(name, key)

    def _note(self, name: str, key: str) -> None:
        item = self.mesh.nodes[name].store.held(key)
        assert item is not None
        self._written[key, item.stamp] = asyncio.get_running_loop().time()
        self._witness(name).wrote(item)

    def _witness(self, name: str) -> StoreWitness:
        witness = self.mesh.nodes[name].store.witness
        assert witness is not None
        return witness

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _cut(self, reader: str, peer: str) -> None:
        if reader != peer:
            self.mesh.cut(reader, peer)

    def _heal(self, reader: str, peer: str) -> None:
        if reader != peer:
            self.mesh.heal(reader, peer)

    def _hang(self, reader: str, peer: str) -> None:
        if reader != peer:
            self.mesh.nodes[reader].transport.hang(peer)

    def _reject(self, reader: str, peer: str) -> None:
        """Let a peer take no new line of a reader, as after a password was changed."""
        if reader != peer:
            transport = self.mesh.nodes[reader].transport
            transport.cut(peer)
            transport.heal(peer)
            transport.reject(peer)

    def _flood(self, name: str) -> None:
        """Write more at once than a link reads at once."""
        for number in range(FLOOD):
            self._put(name, KEYS[number % len(KEYS)], b"%d" % number)

    async def _unborn(self, name: str) -> None:
        """Stop an engine that was never started."""
        if self.mesh.nodes[name].engine is None:
            engine = self.mesh.make_engine(name)
            await engine.shutdown()
            self._look_at(engine)

    async def _hasty(self, name: str, after_sec: float) -> None:
        """Stop an engine while it starts, or soon after."""
        node = self.mesh.nodes[name]
        if node.engine is not None:
            return
        node.engine = self.mesh.make_engine(name)
        starting = asyncio.create_task(node.engine.start())
        await asyncio.sleep(after_sec)
        await self._stop(name)
        try:
            await starting
        except ReplicationError:
            return  # It was interrupted, or had failed before.

    async def _start(self, name: str) -> None:
        node = self.mesh.nodes[name]
        if node.engine is not None and node.engine.state in (
            EngineState.FAILED,
            EngineState.STOPPED,
        ):
            await self._stop(name)
        try:
            await self.mesh.start(name)
        except ReplicationError:
            # It is strict, or its disk is broken; its books are looked at all the same.
            await self._stop(name)

    async def _stop(self, name: str) -> None:
        engine = self.mesh.nodes[name].engine
        await self.mesh.stop(name)
        self._look_at(engine)

    async def _kill(self, name: str) -> None:
        engine = self.mesh.nodes[name].engine
        self._look_at(engine)
        await self.mesh.kill(name)

    def _look_at(self, engine: Any) -> None:
        """Check that an engine's journal is a walk of the tables, and count its moves."""
        error = None if engine is None else engine.error
        mended = error is None or isinstance(error, _MAY_END)
        _promise(mended, f"G13: an engine has ended of {type(error).__name__}: {error}")
        for name, link in {} if engine is None else dict(engine._links).items():
            delayed = link.context.progress.rounds_delayed
            told = f"G12: {delayed} rounds of the link to {name} came to nothing and were delayed"
            _promise(delayed <= DELAYED_MAX, told)
        states: dict[str, str] = {}
        for record in () if engine is None else cast("tuple[Transition, ...]", engine.journal):
            move = _move_of(record)
            _promise(move in moves_of_the_tables(), f"{record} is in no table")
            before = states.get(record.machine, move[2])
            _promise(before == move[2], f"{record} begins where {before} was the state")
            states[record.machine] = move[3]
            self._tally.moves[move] += 1

    def _lose(self, name: str) -> None:
        if self.mesh.lose_last_second(name):
            self._witness(name).forget()
            self._lost = True

    def _backup(self, name: str) -> None:
        self._backups[name] = self.mesh.snapshot(name)

    def _restore(self, name: str) -> None:
        """Start a server again from its backup, the empty one of the beginning if there is no other."""
        self.mesh.restore(name, self._backups[name])
        self._witness(name).forget()
        self._lost = True

    async def _unread(self, name: str) -> None:
        """Restore a node from before it had read any peer, with what its engine remembers of them."""
        await self._stop(name)
        store = self.mesh.nodes[name].store
        store.server.execute("DEL", store.keys.positions)
        await self._start(name)

    async def _restart(self, name: str) -> None:
        await self._kill(name)
        await self._start(name)

    async def _ttl(self, name: str, ttl_sec: float) -> None:
        """Start a node with another ttl of tombstones; in the end all others follow."""
        self._ttl_sec = ttl_sec
        await self._stop(name)
        with suppress(ReplicationError):
            await self.mesh.change_ttl(name, ttl_sec)

    async def _ages(self) -> None:
        """Wait until deletes from before are forgotten; without trees nobody would learn of them then."""
        if self._cold:
            await asyncio.sleep(AGES_SEC)

    def _days(self, name: str, days: int) -> None:
        """Let a node's clock be days off until somebody sets it, or everything is mended."""
        self._skew(name, days * DAY_MS)

    def _slip(self, name: str) -> None:
        """Let a node's clock be wrong for one write."""
        clock = self.mesh.nodes[name].wall_clock
        before, clock.skew_ms = clock.skew_ms, 40 * DAY_MS
        self._put(name, f"far.{name}", b"x")
        clock.skew_ms = before

    def _huge(self, name: str) -> None:
        """Write what is over the limits of all others."""
        self._put(name, f"huge.{name}", HUGE)

    def _crowd(self, name: str) -> None:
        for key in CROWD:
            self._put(name, key, b"")

    def _purge(self, name: str) -> None:
        for key in CROWD:
            self._delete(name, key)

    def _churn(self, name: str) -> None:
        """Delete and write again, one after the other: many deletes, and hardly an item less."""
        for key in CROWD:
            self._put(name, key, b"")
            self._delete(name, key)
            self._put(name, key, b"again")

    def _garble(self, reader: str, peer: str) -> None:
        if reader != peer:
            self.mesh.nodes[reader].transport.garble(peer)

    def _gush(self, reader: str, peer: str) -> None:
        if reader != peer:
            self.mesh.nodes[reader].transport.flood(peer)

    def _drip(self, reader: str, peer: str) -> None:
        if reader != peer:
            self.mesh.nodes[reader].transport.drip(peer, 1)

    def _drop(self, name: str) -> None:
        # Nobody can tell a stream that was made anew from one of which nothing was read.
        self._blind |= {
            (reader, name)
            for reader, node in self.mesh.nodes.items()
            if name in self.mesh.read_by(reader) and not _has_read(node, name)
        }
        self.mesh.delete_stream(name)
        self._lost = True

    def _wipe(self, name: str) -> None:
        self.mesh.wipe(name)
        self._witness(name).forget()
        self._lost = self._wiped = True

    def _trim(self, name: str, entries: int) -> None:
        self.mesh.trim(name, entries)

    def _skew(self, name: str, by_ms: int) -> None:
        self.mesh.nodes[name].wall_clock.skew_ms = by_ms

    async def _pause(self, name: str) -> None:
        await self._ask_links(name, "pause")

    async def _resume(self, name: str) -> None:
        self._witness(name).word_on_deletes()
        await self._ask_links(name, "resume")

    async def _ask_links(self, name: str, what: str) -> None:
        engine = self.mesh.nodes[name].engine
        if engine is None or not engine.is_running:
            return
        for peer in engine.peers:
            try:
                await getattr(engine, what)(peer)
            except CursorStoreError:
                continue  # The wish is in force all the same.

    async def _reconfigure(self, name: str, what: str) -> None:
        """Change something by which links decide, and change it back the next time."""
        engine = self.mesh.nodes[name].engine
        if engine is None:
            return
        settings = engine.config.settings
        if what == "hot" and self._cold:
            part: Any = settings.hot_path
            changed = {"hot_path": part.model_copy(update={"enabled": not part.enabled})}
        else:
            part = settings.limits
            changed = {"limits": part.model_copy(update={"payload_bytes": part.payload_bytes ^ 1})}
        new = engine.config.model_copy(update={"settings": settings.model_copy(update=changed)})
        try:
            await engine.update_config(new)
        except ReplicationError:
            return  # The engine has ended, or its disk is broken: nothing has changed then.

    def _full(self, name: str) -> None:
        self.mesh.nodes[name].store.accepting_writes = False

    def _roomy(self, name: str) -> None:
        self.mesh.nodes[name].store.accepting_writes = True

    def _break(self, name: str) -> None:
        self.mesh.nodes[name].store.failure = StoreError("the store is broken")

    def _slow(self, name: str, delay_sec: float) -> None:
        self.mesh.nodes[name].store.delay_sec = delay_sec

    def _work(self, name: str) -> None:
        store = self.mesh.nodes[name].store
        store.failure, store.delay_sec = None, 0.0

    def _disk(self, name: str) -> None:
        error = CursorStoreError("the disk is full", path="c.db", retryable=True)
        self.mesh.nodes[name].cursors.failure = error

    def _corrupt(self, name: str) -> None:
        error = CursorStoreError("not a database", path="c.db")
        self.mesh.nodes[name].cursors.failure = error

    async def _repair(self, name: str) -> None:
        engine = self.mesh.nodes[name].engine
        if engine is None or not engine.is_running:
            return
        try:
            await engine.repair()
        except ReplicationError:
            return  # The engine has ended meanwhile.

    def _stranger(self, name: str) -> None:
        """Let a node publish another tombstone ttl, as one that is configured wrongly would."""
        node = self.mesh.nodes[name]
        node.server.execute("HSET", node.store.keys.marker, "tombstone_ttl_ms", "1")
        self._strangers.add(name)

    async def _expire(self) -> None:
        await self._rest()
        await asyncio.sleep(TTL_SEC + 1)
        await self._rest()

    # The end

    async def _mend_configuration(self) -> None:
        """Set every clock right, and let all nodes have the ttl that was chosen last."""
        for node in self.mesh.nodes.values():
            if abs(node.wall_clock.skew_ms) >= DAY_MS:
                node.wall_clock.skew_ms = 0
        for name in sorted(self._strangers):
            node = self.mesh.nodes[name]
            # It kept its tombstones by the right one all the time.
            ttl_ms = round(node.config.settings.tombstones.ttl * 1000)
            node.server.execute("HSET", node.store.keys.marker, "tombstone_ttl_ms", ttl_ms)
            node.store.open()
        self._strangers.clear()
        for name, node in self.mesh.nodes.items():
            if node.config.settings.tombstones.ttl != self._ttl_sec:
                await self._ttl(name, self._ttl_sec)

    async def _mend(self) -> None:
        await self._mend_configuration()
        for node in self.mesh.nodes.values():
            node.store.failure = node.cursors.failure = None
            node.store.accepting_writes, node.store.delay_sec = True, 0.0
            for peer in self.mesh.read_by(node.name):
                self.mesh.heal(node.name, peer)
        if self._wiped:
            # A node that runs sees in its next cycle that it was emptied; one that does not is started
            # together with those that need it, and opens its store first.
            self._wiped = False
            for node in self.mesh.nodes.values():
                if node.engine is None:
                    node.store.open_if_empty()
            await asyncio.sleep(COLD_INTERVAL_SEC + GIVE_UP_SEC)
        for _ in range(2):
            for name, node in self.mesh.nodes.items():
                if node.engine is not None and _has_given_up(node.engine):
                    # What waiting cannot mend was mended, and somebody starts the node again.
                    await self._stop(name)
                await self.mesh.start(name)
                await self._resume(name)
            # A link may just have read what is mended now, and give up only after this.
            await asyncio.sleep(GIVE_UP_SEC)

    async def _take_what_is_old(self) -> None:
        """Give a person's word on items of nodes that were apart for longer than the ttl (G5)."""
        if asyncio.get_running_loop().time() > CHAOS_MAX_SEC:
            # A link that has waited for long is not even connected yet.
            await asyncio.sleep(BACKOFF_MAX_SEC)
        for _ in self.mesh.nodes:
            # What one node takes is as old for the next, which learns of it by then.
            await asyncio.sleep(2 * COLD_INTERVAL_SEC)
            for name in self.mesh.nodes:
                # What is taken at one node goes on to all that read it.
                self._witness(name).word_on_what_is_old()
            for node in self.mesh.nodes.values():
                assert node.engine is not None
                for peer in node.engine.health_check().peers:
                    if peer.stale_held_back and peer.connected:
                        await node.engine.repair(peer.node_id, accept_stale=True)

    async def _rest(self) -> None:
        """Mend everything; then all must agree on what survived, and nothing may move any more."""
        mesh = self.mesh
        if not self._cold:
            # Without the cold path a store that was lost is noticed with the next change.
            for name in mesh.nodes:
                self._put(name, f"last.{name}", b"")
        expected = self._survivors()
        loop = asyncio.get_running_loop()
        now = START_MS + loop.time() * 1000
        await self._mend()
        await self._take_what_is_old()
        if self._crowded:
            await self._let_deletes_through()
        if not self._cold:
            await self._read_everything()
        began_ms = START_MS + loop.time() * 1000
        spoiled = await self._settle()
        holdings = mesh.holdings()
        for name, held in zip(mesh.nodes, holdings, strict=True):
            self._compare(name, held, expected, now, spoiled)
        _promise(*self._agree_but_for(spoiled))
        await self._look_at_links(began_ms)
        if not self._lost:
            for name, events in mesh.events().items():
                # A clock that jumps ahead makes young tombstones expire, so that a write comes again.
                most = len(self._written) * (2 if self._days_off else 1)
                _promise(events <= most, f"{name} emitted {events} events of {most} writes")
        for name in mesh.nodes:
            self._witness(name).begin_anew()

    async def _let_deletes_through(self) -> None:
        """Give a person's word wherever the interlock asks for it, until nobody asks any more (G14)."""
        calm = 0
        while calm < CALM_CYCLES:
            await asyncio.sleep(2 * COLD_INTERVAL_SEC)
            calm += 1
            for name, node in self.mesh.nodes.items():
                assert node.engine is not None
                for peer in node.engine.health_check().peers:
                    if PauseReason.INTERLOCK in peer.pause_reasons:
                        calm = 0
                        self._witness(name).word_on_deletes()
                        await node.engine.resume(peer.node_id)

    async def _settle(self) -> frozenset[str]:
        """Wait until nothing moves and all agree but for keys that are spoiled; returns those (G13)."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SEC
        while True:
            spoiled = self._spoiled()
            await self.mesh.settle(agreed=not spoiled)
            agree, _ = self._agree_but_for(spoiled)
            if agree or asyncio.get_running_loop().time() > deadline:
                return spoiled
            await asyncio.sleep(COLD_INTERVAL_SEC)

    def _agree_but_for(self, spoiled: frozenset[str]) -> tuple[bool, str]:
        live = [
            {
                key: (item.stamp, item.content)
                for key, item in held.items()
                if not item.deleted and key not in spoiled
            }
            for held in self.mesh.holdings()
        ]
        return all(one == live[0] for one in live), f"nodes differ: {live}"

    def _spoiled(self) -> frozenset[str]:
        """Return the keys that some node holds, and others must not or cannot take."""
        now = START_MS + asyncio.get_running_loop().time() * 1000
        spoiled = {
            key
            for held in self.mesh.holdings()
            for key, item in held.items()
            if item.updated_at > now + DAY_MS or len(item.content) > PAYLOAD_BYTES
        }
        if self._days_off and not self._cold:
            # A server whose clock jumps days ahead forgets deletes before others have heard of them.
            spoiled |= {
                key
                for key, item in self._survivors().items()
                if not item.deleted and self._was_deleted_long_ago(item, now)
            }
        return frozenset(spoiled)

    async def _look_at_links(self, since_ms: float) -> None:
        """See that every link says that all is well, whatever single keys are spoiled (G13)."""
        for name, node in self.mesh.nodes.items():
            engine = node.engine
            assert engine is not None
            # A peer that could not be compared for long rests for as long as any.
            with suppress(WaitTimeoutError):
                await engine.wait_synced(2 * BACKOFF_MAX_SEC)
            health = engine.health_check()
            _promise(health.synced, f"{name} says that it is not synced: {health}")
            for peer in health.peers if self._cold else ():
                agreed = (
                    peer.agreed_at is not None and peer.agreed_at > since_ms - SETTLE_SEC * 1000
                )
                told = f"G13: {name} has not agreed with {peer.node_id} any more: {peer}"
                _promise(agreed, told)

    async def _read_everything(self) -> None:
        """See that links have what their peers hold, or say that they do not; repair those alone."""
        mesh = self.mesh
        for _ in mesh.nodes:
            await mesh.settle(agreed=False)
            behind = self._behind()
            for reader, peer in behind:
                engine = mesh.nodes[reader].engine
                assert engine is not None
                (health,) = [one for one in engine.health_check().peers if one.node_id == peer]
                told = health.gaps_open or health.stream_too_short or health.stale_held_back
                told = told or (reader, peer) in self._blind
                _promise(bool(told), f"{reader} lacks {behind[reader, peer]} of {peer}: {health}")
                await engine.repair(peer, accept_stale=bool(health.stale_held_back))
            if not behind:
                return

    def _behind(self) -> dict[tuple[str, str], list[str]]:
        """Return, for each reader and peer, the keys that the reader does not hold as new."""
        held = dict(zip(self.mesh.nodes, self.mesh.holdings(), strict=True))
        spoiled = self._spoiled()
        now = START_MS + asyncio.get_running_loop().time() * 1000
        found: dict[tuple[str, str], list[str]] = {}
        for reader in self.mesh.nodes:
            for peer in self.mesh.read_by(reader):
                keys = [
                    key
                    for key, item in held[peer].items()
                    if key not in spoiled
                    and (key in held[reader] or not self._was_deleted_long_ago(item, now))
                    # A clock that is days ahead lets a node forget deletes early.
                    and not (self._days_off and item.deleted and key not in held[reader])
                    and (key not in held[reader] or held[reader][key].stamp < item.stamp)
                ]
                if keys:
                    found[reader, peer] = keys
        return found

    def _compare(
        self,
        name: str,
        held: dict[str, SyncItem],
        expected: dict[str, SyncItem],
        now: float,
        spoiled: frozenset[str],
    ) -> None:
        for key, item in expected.items():
            if key in spoiled:
                continue
            mine = held.get(key)
            # A delete that was due to be forgotten already holds back nothing any more.
            spent = item.deleted and item.updated_at + TTL_SEC * 1000 < now
            if mine is None:
                gone = item.deleted and item.updated_at + TTL_SEC * 1000 < now + 1e7
                gone = gone or self._was_deleted_long_ago(item, now)
                _promise(gone, f"{name} holds nothing of {key}, and {item} had survived")
                continue
            on_its_way = self._was_on_its_way(mine, item)
            # Of what was deleted long ago a person may have had an older version taken.
            old = (key, mine.stamp) in self._written and self._was_deleted_long_ago(item, now)
            _promise(
                mine.stamp == item.stamp or spent or on_its_way or old,
                f"{name} holds {mine} of {key}, and {item} had survived",
            )
        extra = [held[key] for key in held.keys() - expected.keys()]
        late = [item for item in extra if self._lost and (item.key, item.stamp) in self._written]
        _promise(extra == late, f"{name} holds {extra}, which nobody held")

    def _was_deleted_long_ago(self, item: SyncItem, now: float) -> bool:
        """Say whether a stream may still have had a delete that every node has forgotten."""
        return any(
            key == item.key
            and stamp.deleted
            and stamp > item.stamp
            and stamp.updated_at + TTL_SEC * 1000 < now
            for key, stamp in self._written
        )

    def _was_on_its_way(self, mine: SyncItem, survivor: SyncItem) -> bool:
        """Say whether a later write that its own node had lost reached another all the same."""
        return (
            self._lost and mine.stamp > survivor.stamp and (mine.key, mine.stamp) in self._written
        )

    def _survivors(self) -> dict[str, SyncItem]:
        """Return, for each key, the latest write that some node holds."""
        latest: dict[str, SyncItem] = {}
        for held in self.mesh.holdings():
            for key, item in held.items():
                if key not in latest or latest[key].stamp < item.stamp:
                    latest[key] = item
        return latest


def _passes_on(steps: Sequence[Step]) -> bool:
    """Say whether a node begins anew where something old may come back.

    It takes all that its peers hold, as whoever has no record of them does (G5), and passes it on.
    """
    backed_up: set[str] = set()
    new: set[str] = set()
    is_old = False
    for kind, *args in steps:
        if kind == "backup":
            backed_up.add(args[0])
        elif kind in ("wipe", "unread") or (kind == "restore" and args[0] not in backed_up):
            if is_old:
                return True
            new.add(args[0])
        elif kind in _LONG:
            is_old = True
    # One that was kept from agreeing with its peers before is as new as ever.
    kept = {args[0] for kind, *args in steps if kind in _KEEPS_APART}
    return is_old and bool(new & kept)


def _has_given_up(engine: ReplicationEngine) -> bool:
    ended = engine.state in (EngineState.FAILED, EngineState.STOPPED)
    return ended or PeerState.FAILED in engine.peers.values()


def _has_read(node: LocalNode, peer: str) -> bool:
    """Whether a node knows of anything that it has read of a peer's stream as it is now."""
    position = None
    if node.engine is not None:
        position = node.engine._links[peer].context.progress.settled
    if position is None:
        cursor = node.cursors.snapshot().tables().peers.get(peer, PeerRecord()).cursor
        position = None if cursor is None else cursor.position
    if position is None:
        return False
    if position.entries_read is None:
        # The server does not count; who has read something stands at an id.
        return position.stream_id > StreamId(0, 0)
    return position.entries_read > 0


def _end_run(error: BrokenPromiseError) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.fail(error)


def _promise(kept: bool, otherwise: str) -> None:
    if not kept:
        raise BrokenPromiseError(otherwise)


def _move_of(record: Transition) -> Move:
    assert record.trigger is not None
    kind = record.machine.partition(":")[0]
    return kind, record.trigger, str(record.source), str(record.dest)


async def carry_out(fate: Fate, tally: Tally) -> None:
    """Run a fate on the running loop, which must be one of virtual time.

    :raises BrokenPromiseError: if something does not hold.
    :raises TimeoutError: if the nodes do not come to rest.
    """
    async with asyncio.timeout(LIMIT_SEC):
        await _Run(fate, tally).run(fate.steps)
    tally.runs += 1
    tally.servers.update(fate.dialect(name).name for name in fate.names)
    tally.seconds += asyncio.get_running_loop().time()


def run_fate(fate: Fate) -> Tally:
    """Run a fate on a loop of its own, and return what it has covered; raises as ``carry_out``."""
    tally = Tally()
    run(carry_out, fate, tally, start_ms=START_MS)
    return tally


def shrink(fate: Fate, fails: Callable[[Fate], bool]) -> Fate:
    """Return a fate with as few steps as are needed to fail (delta debugging, Zeller 2002)."""
    steps = list(fate.steps)
    size = max(1, len(steps) // 2)
    while size:
        begin = 0
        while begin < len(steps):
            fewer = steps[:begin] + steps[begin + size :]
            if fails(replace(fate, steps=tuple(fewer))):
                steps = fewer
            else:
                begin += size
        size //= 2
    return replace(fate, steps=tuple(steps))
