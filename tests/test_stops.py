"""Stops: in every state, in the middle of everything, twice, cancelled anywhere; nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Nodes, Peer, peer_config, until

from fsm_replication import (
    AlreadyRunningError,
    CursorStoreError,
    DrainTimeoutError,
    EngineState,
    EngineStoppedError,
    MemorySyncEngine,
    NoPeerError,
    PauseReason,
    PeerConfig,
    PeerState,
    Ports,
    ReplicationConfig,
    ReplicationEngine,
    SyncItem,
    WorkerCrashedError,
)
from fsm_replication.config import (
    HotPathConfig,
    Settings,
    StartupConfig,
    TimeoutsConfig,
)
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.ports import CursorStore, StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.testing import (
    LoopClock,
    MemoryCursorStore,
    SimRedis,
    SimStore,
    SimTransport,
    SkewedWallClock,
    VirtualTimeLoop,
)

START_MS = 1_700_000_000_000
DRAIN_SEC = 10.0
WEEK_MS = 7 * 86_400_000
MARGIN_SEC = 1e-3


# A node on virtual time, and what may be left of it -----------------------------------------------


class Moody(MemorySyncEngine):
    """A store whose calls hang as long as they are told to."""

    def __init__(self) -> None:
        super().__init__(wall_clock=SkewedWallClock(LoopClock(), START_MS))
        self.hanging: set[str] = set()

    async def incarnation(self) -> str:
        """Name this store, unless it hangs."""
        await self._maybe("incarnation")
        return await super().incarnation()

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Apply, unless it hangs."""
        if changes:
            await self._maybe("apply")
        return await super().apply_many(changes, received)

    async def _maybe(self, call: str) -> None:
        if call in self.hanging:
            await asyncio.Event().wait()


class Rig:
    """Node b, which reads node a; everything but the engine is simulated."""

    def __init__(self, cursors: CursorStore | None = None, **settings: Any) -> None:
        self.clock = LoopClock()
        wall_clock = SkewedWallClock(self.clock, START_MS)
        self.server = SimRedis(now_ms=wall_clock.now_ms)
        rng = self.rng = random.Random(1)
        self.peer = SimStore(self.server, node_id="a", rng=rng, ttl_ms=WEEK_MS, grace_ms=WEEK_MS)
        self.peer.open()
        self.transport = SimTransport({"a": self.server}, self.clock, rng)
        self.cursors = cursors if cursors is not None else MemoryCursorStore()
        self.wall_clock = wall_clock
        self.settings = Settings(**settings)
        self.starting: asyncio.Task[None] | None = None
        self.store = Moody()
        self.remake()

    def remake(self) -> None:
        """Make the engine, for the store as it is now."""
        self.engine = ReplicationEngine(
            ReplicationConfig(
                local_node_id="b",
                peers=[PeerConfig(node_id="a", redis_url="redis://a")],
                settings=self.settings,
            ),
            self.store,
            ports=Ports(self.transport, self.cursors, self.clock, self.wall_clock, self.rng),
        )

    def begin(self) -> None:
        """Start the engine, without waiting for it."""
        self.starting = asyncio.create_task(self.engine.start())

    @property
    def link(self) -> PeerState:
        """The state of the link to a."""
        return self.engine.peers["a"]

    async def reach(self, state: PeerState) -> None:
        """Wait for a state of the link."""
        await self.engine.wait_for_state(state, peer_id="a", timeout=1000)

    async def settled(self) -> StreamId | None:
        """Return the cursor that is on disk."""
        await self.cursors.open()
        cursor = (await self.cursors.load("a")).cursor
        await self.cursors.close()
        return None if cursor is None else cursor.position.stream_id

    def owned(self) -> list[str]:
        """Name everything that the engine still owns."""
        engine = self.engine
        drivers = [engine._driver, *(link.driver for link in engine._links.values())]
        left = [name for driver in drivers for name in driver.workers]
        left += [repr(wire) for wire in self.transport._wires if wire._protocol is not None]
        if isinstance(self.cursors, MemoryCursorStore) and self.cursors._is_open:
            left.append("the cursor store")
        return left

    def assert_ended(self, *, tasks: int = 1) -> None:
        """Check that the engine is over, and that nothing of it is left."""
        assert self.engine.state in (EngineState.STOPPED, EngineState.FAILED)
        assert self.link is PeerState.STOPPED
        assert self.owned() == []
        assert len(asyncio.all_tasks()) == tasks, asyncio.all_tasks()


class CountingLoop(VirtualTimeLoop):
    """Virtual time, and a call before each turn: between two turns every task stands at an await."""

    def __init__(self) -> None:
        super().__init__()
        self.before_turn: Callable[[], None] | None = None

    def _run_once(self) -> None:
        if self.before_turn is not None:
            self.before_turn()
        super()._run_once()  # type: ignore[misc]


def virtual(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine on a loop whose turns are counted."""
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        return runner.run(main())


async def cancelled_at(turn: int, work: Awaitable[Any], *, again: bool) -> asyncio.Task[Any]:
    """Run ``work`` and cancel it before its ``turn``-th turn; ``again``: before each one after too.

    It may end before; that is seen by ``cancelling()`` being 0.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, CountingLoop)
    task = asyncio.ensure_future(work)
    turns = 0

    def step() -> None:
        nonlocal turns
        if turns == turn or (again and turns > turn):
            task.cancel()
        turns += 1

    loop.before_turn = step
    try:
        await asyncio.wait((task,))
    finally:
        loop.before_turn = None
    assert isinstance(task, asyncio.Task)
    return task


def every_turn(scenario: Callable[[int, bool], Coroutine[Any, Any, bool]], *, least: int) -> None:
    """Run a scenario with a cancellation at each turn, until one run ends before its turn comes."""
    for again in (False, True):
        turn = 0
        while virtual(lambda: scenario(turn, again)):  # noqa: B023 - it is over when that changes
            turn += 1
            assert turn < 5000, "it never ends by itself"
        assert turn >= least, "there was hardly anything to cancel"


# Every state --------------------------------------------------------------------------------------


async def connecting(rig: Rig) -> None:
    """Connect to a server that takes the connection and answers nothing."""
    rig.transport.hang("a")
    rig.begin()
    await rig.reach(PeerState.CONNECTING)
    await asyncio.sleep(1)


async def refused(rig: Rig) -> None:
    """Wait for a server that is down."""
    rig.transport.cut("a")
    rig.begin()
    await rig.reach(PeerState.BACKOFF)


async def hopeless(rig: Rig) -> None:
    """Meet a peer that must not be read."""
    rig.server.execute("HSET", rig.peer.keys.marker, "format", 99)
    rig.begin()
    await rig.reach(PeerState.FAILED)


async def resuming(rig: Rig) -> None:
    """Decide, with a store that does not even tell its name."""
    rig.store.hanging.add("incarnation")
    rig.begin()
    await rig.reach(PeerState.RESUMING)
    await asyncio.sleep(1)


async def bootstrapping(rig: Rig) -> None:
    """Copy a peer into a store that hangs."""
    rig.store.hanging.add("apply")
    rig.peer.put("k", b"1")
    rig.begin()
    await rig.reach(PeerState.BOOTSTRAPPING)
    await asyncio.sleep(1)


async def bootstrapping_frozen(rig: Rig) -> None:
    """Copy a peer that freezes in the middle."""
    for number in range(2000):
        rig.peer.put(f"k{number}", b"1")
    rig.transport.delay = lambda _name, _host: 0.5
    rig.begin()
    await rig.reach(PeerState.BOOTSTRAPPING)
    rig.transport.hang("a")
    await asyncio.sleep(1)


async def tailing(rig: Rig) -> None:
    """Wait at the head of a stream, in a blocked read."""
    rig.begin()
    await rig.reach(PeerState.TAILING)
    await asyncio.sleep(1)


async def tailing_frozen(rig: Rig) -> None:
    """Wait at the head of a stream whose server has frozen."""
    await tailing(rig)
    rig.transport.hang("a")


async def tailing_into_a_hanging_store(rig: Rig) -> None:
    """Hold an event that a store does not take."""
    await tailing(rig)
    rig.peer.put("settled", b"1")
    await asyncio.sleep(0.5)
    rig.store.hanging.add("apply")
    rig.peer.put("k", b"1")
    await asyncio.sleep(0.5)


async def catching_up(rig: Rig) -> None:
    """Read in bulk what a store does not take."""
    await tailing(rig)
    await rig.engine.pause("a")
    for number in range(50):
        rig.peer.put(f"k{number}", b"1")
        await asyncio.sleep(0.1)
    rig.store.hanging.add("apply")
    await rig.engine.resume("a")
    await rig.reach(PeerState.CATCHING_UP)
    await asyncio.sleep(0.5)


async def standing_by(rig: Rig) -> None:
    """Stay connected for the cold path only."""
    rig.begin()
    await rig.reach(PeerState.STANDBY)


async def paused(rig: Rig) -> None:
    """Be paused by an operator, with an event held."""
    await tailing_into_a_hanging_store(rig)
    await rig.engine.pause("a")
    assert rig.engine.health_check().peers[0].pause_reasons == {PauseReason.OPERATOR}


async def paused_by_backpressure(rig: Rig) -> None:
    """Be paused by a store that takes no writes."""
    await tailing(rig)
    rig.store.accepting_writes = False
    rig.peer.put("k", b"1")
    await rig.reach(PeerState.PAUSED)


async def disconnecting(rig: Rig) -> None:
    """Try to flush what is held, after the connection was lost."""
    await tailing_into_a_hanging_store(rig)
    rig.transport.cut("a")
    await rig.reach(PeerState.DISCONNECTING)


async def created(_rig: Rig) -> None:
    """Do nothing."""


RUN: dict[str, Any] = {"startup": StartupConfig(when_no_peer="run")}
COLD: dict[str, Any] = {"hot_path": HotPathConfig(enabled=False)}
BLOCKING: dict[str, Any] = {"hot_path": HotPathConfig(block_timeout=60)}
HELD = 0.8 * DRAIN_SEC + MARGIN_SEC
# How the state is come to, the engine's state then, the link's, settings, the seconds it may take.
# A store that hangs is waited for until the last fifth of the drain timeout; nothing else is.
Situation = tuple[Callable[[Rig], Awaitable[None]], EngineState, PeerState, dict[str, Any], float]
SITUATIONS: list[Situation] = [
    (created, EngineState.CREATED, PeerState.CREATED, {}, 0),
    (connecting, EngineState.CONNECTING, PeerState.CONNECTING, {}, 0),
    (connecting, EngineState.RUNNING, PeerState.CONNECTING, RUN, 0),
    (refused, EngineState.CONNECTING, PeerState.BACKOFF, {}, 0),
    (hopeless, EngineState.RUNNING, PeerState.FAILED, RUN, 0),
    (resuming, EngineState.RUNNING, PeerState.RESUMING, {}, HELD),
    (bootstrapping, EngineState.RUNNING, PeerState.BOOTSTRAPPING, {}, HELD),
    (bootstrapping_frozen, EngineState.RUNNING, PeerState.BOOTSTRAPPING, {}, HELD),
    (catching_up, EngineState.RUNNING, PeerState.CATCHING_UP, {}, HELD),
    (tailing, EngineState.RUNNING, PeerState.TAILING, BLOCKING, 0),
    (tailing_frozen, EngineState.RUNNING, PeerState.TAILING, BLOCKING, 0),
    (tailing_into_a_hanging_store, EngineState.RUNNING, PeerState.TAILING, {}, HELD),
    (standing_by, EngineState.RUNNING, PeerState.STANDBY, COLD, 0),
    (paused, EngineState.RUNNING, PeerState.PAUSED, {}, HELD),
    (paused_by_backpressure, EngineState.RUNNING, PeerState.PAUSED, {}, 0),
    (disconnecting, EngineState.RUNNING, PeerState.DISCONNECTING, {}, HELD),
]


def test_every_state_is_stopped_in() -> None:
    """If this fails a state was added that nobody has ever stopped in."""
    ended = {PeerState.SHUTTING_DOWN, PeerState.STOPPED}
    assert {link for _, _, link, _, _ in SITUATIONS} | ended == set(PeerState)
    ended_engine = {EngineState.SHUTTING_DOWN, EngineState.STOPPED, EngineState.FAILED}
    assert {engine for _, engine, _, _, _ in SITUATIONS} | ended_engine == set(EngineState)


async def once(engine: ReplicationEngine) -> None:
    """Stop."""
    await engine.shutdown()


async def twice(engine: ReplicationEngine) -> None:
    """Stop, in two ways, and again what has stopped."""
    first = asyncio.create_task(engine.shutdown())
    await asyncio.sleep(0)
    if engine.state is not EngineState.STOPPED:
        assert engine.state is EngineState.SHUTTING_DOWN
    await engine.shutdown()
    await first
    await engine.shutdown()


async def from_many_tasks(engine: ReplicationEngine) -> None:
    """Stop from several tasks, of which some lose patience."""
    tasks = [asyncio.create_task(engine.shutdown()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks[1:3]:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended].count(asyncio.CancelledError) == 2
    assert engine.state in (EngineState.STOPPED, EngineState.FAILED)


@pytest.mark.parametrize("how", [once, twice, from_many_tasks], ids=lambda how: how.__name__)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda one: f"{one[0].__name__}-{one[1]}")
def test_a_stop_in_every_state(
    situation: Situation, how: Callable[[ReplicationEngine], Awaitable[None]]
) -> None:
    """If this fails there is a state in which an engine cannot be stopped, or leaves something."""
    lead, engine_state, link_state, settings, limit_sec = situation

    async def main() -> None:
        rig = Rig(**settings)
        await lead(rig)
        assert (rig.engine.state, rig.link) == (engine_state, link_state)
        settled = rig.engine._links["a"].context.progress.settled
        began = rig.clock.monotonic()
        await how(rig.engine)
        took = rig.clock.monotonic() - began
        assert took <= max(limit_sec, MARGIN_SEC)
        assert took < DRAIN_SEC
        if rig.starting is not None and engine_state is EngineState.CONNECTING:
            with pytest.raises(EngineStoppedError):
                await rig.starting
        rig.assert_ended()
        assert (rig.engine.state, rig.engine.error) == (EngineState.STOPPED, None)
        await rig.engine.wait_closed()
        if settled is not None:
            assert await rig.settled() == settled.stream_id, "a settled cursor is not on disk"

    virtual(main)


class Stubborn(Moody):
    """A store that cannot even be cancelled while it hangs, and may fail in the end."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.released = asyncio.Event()
        self.fails = fails

    async def _maybe(self, call: str) -> None:
        while call in self.hanging and not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.released.wait()
        if call in self.hanging and self.fails:
            raise OSError("it was in vain")


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "fails"])
@pytest.mark.parametrize("lead", [resuming, bootstrapping, catching_up, disconnecting])
def test_a_store_that_cannot_be_cancelled_is_named(
    lead: Callable[[Rig], Awaitable[None]], fails: bool
) -> None:
    """If this fails a stop outlasts its timeout, or says nothing of what goes on (G7, G9).

    What goes on ends as soon as the store lets it: a cancellation that it swallowed is not lost.
    """

    async def main() -> None:
        rig = Rig()
        rig.store = Stubborn(fails=fails)
        rig.remake()
        await lead(rig)
        began = rig.clock.monotonic()
        await rig.engine.shutdown()
        assert rig.clock.monotonic() - began <= DRAIN_SEC
        assert rig.engine.state is EngineState.FAILED
        assert isinstance(rig.engine.error, DrainTimeoutError)
        # What asks the store which incarnation it is hangs like the link that asks for the same.
        asks = "incarnation" in rig.store.hanging
        asking = ("engine:cold-path", "engine:store-watch") if asks else ()
        assert rig.engine.error.left_behind == (*asking, "link:a:tailer")
        assert rig.owned()[: len(asking) + 1] == [*asking, "link:a:tailer"]
        assert "the cursor store" not in rig.owned()
        rig.store.released.set()
        await asyncio.sleep(1)
        assert rig.owned() == []
        assert len(asyncio.all_tasks()) == 1

    virtual(main)


# Cancelled at every await -------------------------------------------------------------------------


@pytest.mark.parametrize("peer_is", ["well", "frozen", "down"])
def test_a_start_cancelled_at_every_await(peer_is: str) -> None:
    """If this fails a start that is cancelled at some await leaves something behind."""

    async def scenario(turn: int, again: bool) -> bool:
        rig = Rig(startup=StartupConfig(timeout=3))
        rig.peer.put("k", b"1")
        if peer_is == "frozen":
            rig.transport.hang("a")
        elif peer_is == "down":
            rig.transport.cut("a")
        states: list[EngineState] = []
        starting = asyncio.ensure_future(rig.engine.start())
        starting.add_done_callback(lambda _: states.append(rig.engine.state))
        task = await cancelled_at(turn, starting, again=again)
        if task.cancelled():
            # Cancelled before its first step it has done nothing, and otherwise it has drained.
            if not turn:
                assert states == [EngineState.CREATED]
            elif states != [EngineState.STOPPED]:
                # It was about to fail already.
                assert states == [EngineState.FAILED]
                assert isinstance(rig.engine.error, NoPeerError)
        elif peer_is == "well":
            assert states == [EngineState.RUNNING]
        else:
            assert isinstance(task.exception(), NoPeerError)
            assert states == [EngineState.FAILED]
        await rig.engine.shutdown()
        rig.assert_ended()
        return task.cancelled()

    every_turn(scenario, least=8)


def test_a_shutdown_cancelled_at_every_await() -> None:
    """If this fails a stop whose caller loses patience is left half-way."""

    async def scenario(turn: int, again: bool) -> bool:
        rig = Rig()
        rig.begin()
        await rig.reach(PeerState.TAILING)
        for number in range(5):
            rig.peer.put(f"k{number}", b"1")
        await asyncio.sleep(0.1)
        rig.peer.put("last", b"1")
        task = await cancelled_at(turn, rig.engine.shutdown(), again=again)
        began = rig.clock.monotonic()
        await rig.engine.shutdown()
        assert rig.clock.monotonic() - began < DRAIN_SEC
        rig.assert_ended()
        if rig.engine.state is EngineState.STOPPED and turn:
            progress = rig.engine._links["a"].context.progress
            assert progress.settled is not None
            assert await rig.settled() == progress.settled.stream_id
        return task.cancelled()

    every_turn(scenario, least=8)


@pytest.mark.parametrize("body", ["waits", "returns", "raises"])
def test_a_block_cancelled_at_every_await(body: str) -> None:
    """If this fails `async with` leaves an engine behind when its task is cancelled somewhere."""

    async def scenario(turn: int, again: bool) -> bool:
        rig = Rig()
        rig.peer.put("k", b"1")
        states: list[EngineState] = []

        async def block() -> None:
            async with rig.engine as engine:
                assert engine.is_running
                if body == "raises":
                    raise ZeroDivisionError
                if body == "waits":
                    await rig.reach(PeerState.TAILING)
                    rig.peer.put("more", b"1")
                    await asyncio.sleep(0.2)

        task = asyncio.ensure_future(block())
        task.add_done_callback(lambda _: states.append(rig.engine.state))
        await cancelled_at(turn, task, again=again)
        assert states == [EngineState.STOPPED if turn else EngineState.CREATED]
        if not task.cancelled():
            assert isinstance(task.exception(), ZeroDivisionError) == (body == "raises")
        await rig.engine.shutdown()
        rig.assert_ended()
        return task.cancelled() or task.cancelling() > 0

    every_turn(scenario, least=12)


def test_somebody_else_cancels_everything_at_every_await() -> None:
    """If this fails a host that cancels all tasks, as some do on their way out, leaves a lock."""

    async def scenario(turn: int, again: bool) -> bool:
        rig = Rig()
        rig.peer.put("k", b"1")
        mine = asyncio.current_task()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        turns = 0

        def step() -> None:
            nonlocal turns
            if turns == turn or (again and turns == turn + 2):
                for task in asyncio.all_tasks() - {mine}:
                    task.cancel()
            turns += 1

        rig.begin()
        loop.before_turn = step
        with contextlib.suppress(asyncio.CancelledError, WorkerCrashedError, EngineStoppedError):
            assert rig.starting is not None
            await asyncio.wait((rig.starting,))
            rig.peer.put("more", b"1")
            await asyncio.sleep(0.1)
        await rig.engine.shutdown()
        loop.before_turn = None
        await asyncio.sleep(1)
        rig.assert_ended()
        return turns > turn

    every_turn(scenario, least=12)


# A start that fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["no peer", "locked", "no cursor store", "body"])
def test_a_block_that_fails_leaves_nothing(why: str) -> None:
    """If this fails an `async with` that raises leaves tasks, lines or the cursor store open."""

    async def main() -> None:
        rig = Rig(startup=StartupConfig(timeout=3))
        assert isinstance(rig.cursors, MemoryCursorStore)
        expected: type[Exception] = ZeroDivisionError
        if why == "no peer":
            rig.transport.hang("a")
            expected = NoPeerError
        elif why == "locked":
            await rig.cursors.open()
            expected = AlreadyRunningError
        elif why == "no cursor store":
            rig.cursors.failure = CursorStoreError("gone", path="gone")
            expected = CursorStoreError
        with pytest.raises(expected):
            async with rig.engine:
                raise ZeroDivisionError
        if why == "body":
            assert rig.engine.state is EngineState.STOPPED
        else:
            assert rig.engine.state is EngineState.FAILED
            assert isinstance(rig.engine.error, expected)
            with pytest.raises(expected):
                await rig.engine.wait_closed()
        rig.assert_ended()

    virtual(main)


# Real files, real sockets -------------------------------------------------------------------------


def handles() -> Counter[str]:
    """Count this process's open file handles by what they point to; sockets are one kind."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            found["socket" if target.startswith("socket:") else target] += 1
    return found


class Census:
    """Tasks, threads, sockets and files of this process; and connections at a server."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        gc.collect()
        self.tasks = len(asyncio.all_tasks())
        self.threads = threading.active_count()
        self.handles = handles()
        self.clients = self._clients()

    def _clients(self) -> int:
        return len(self._peer.client.client_list())

    def left(self) -> dict[str, Any]:
        """Return what there is more of than there was."""
        more = {
            "tasks": len(asyncio.all_tasks()) - self.tasks,
            "threads": threading.active_count() - self.threads,
            "handles": dict(handles() - self.handles),
            "clients": self._clients() - self.clients,
        }
        return {name: count for name, count in more.items() if count}


async def run_a_block(nodes: Nodes, peer: Peer, number: int) -> None:
    """Start, replicate, stop."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await engine.wait_synced(10)
        peer.send(f"k{number % 7}", b"%d" % number)
        await until(lambda: len(store) > 0)


async def cancel_a_start(nodes: Nodes, peer: Peer, number: int) -> None:
    """Cancel a start somewhere in the middle of it."""
    engine = nodes.engine(peer_config(peer.server))
    starting = asyncio.create_task(engine.start())
    for _ in range(number % 40):
        await asyncio.sleep(0.0002 if number % 2 else 0)
    starting.cancel()
    await asyncio.wait((starting,))
    await engine.shutdown()


async def fail_a_start(nodes: Nodes, peer: Peer, number: int) -> None:
    """Start where the only peer refuses connections, or another engine has the cursor file."""
    nowhere = PeerConfig(node_id="a", redis_url="redis://127.0.0.1:1")
    quick = Settings(startup=StartupConfig(timeout=0.02))
    if number % 2:
        with pytest.raises(NoPeerError):
            async with nodes.engine(nowhere, settings=quick):
                pass
        return
    async with nodes.engine(peer_config(peer.server)):
        with pytest.raises(AlreadyRunningError):
            await nodes.engine(nowhere, settings=quick).start()


async def lose_the_lines(nodes: Nodes, peer: Peer, number: int) -> None:
    """Stop an engine that has just lost its connections."""
    engine = nodes.engine(peer_config(peer.server))
    await engine.start()
    for client in peer.client.client_list():
        if client["name"].startswith("fsm_replication"):
            peer.client.client_kill(client["addr"])
    if number % 2:
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=10)
    await engine.shutdown()


KINDS = (run_a_block, cancel_a_start, fail_a_start, lose_the_lines)


@pytest.mark.timeout(900)
async def test_cycles_leave_nothing_behind(nodes: Nodes, peer: Peer, full: bool) -> None:
    """If this fails each start and stop leaks a task, a socket, a file handle or a thread."""
    peer.send("x", b"1")
    for kind in KINDS:
        await kind(nodes, peer, 1)
    before = Census(peer)
    for number in range(1000 if full else 50):
        await KINDS[number % len(KINDS)](nodes, peer, number)
        # A server hears of a closed connection when it gets to it.
        await until(lambda: not before.left(), f"nothing left after cycle {number}")


async def test_an_engine_that_has_ended_is_forgotten(nodes: Nodes, peer: Peer) -> None:
    """If this fails each engine of a process stays in memory, with its store, for ever."""

    async def run_one() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        config = nodes.config(peer_config(peer.server))
        async with ReplicationEngine(config, sync_engine=MemorySyncEngine(node_id="b")) as engine:
            await engine.wait_synced(10)
        return weakref.ref(engine), weakref.ref(engine.metrics.registry)

    engine, registry = await run_one()
    # A callback of the loop may still be on its way.
    await asyncio.sleep(0)
    gc.collect()
    assert (engine(), registry()) == (None, None)


async def test_the_census_sees_what_is_left(nodes: Nodes, peer: Peer) -> None:
    """If this fails the test above could not fail."""
    before = Census(peer)
    engine = nodes.engine(peer_config(peer.server))
    await engine.start()
    left = before.left()
    assert left["tasks"] >= 3
    assert left["threads"] == 1
    assert left["clients"] == 2
    assert left["handles"].pop("socket") == 2
    assert {Path(name).name for name in left["handles"]} >= {"b.db", "b.db-wal", "b.db.lock"}
    await engine.shutdown()
    await until(lambda: not before.left())


async def test_a_block_on_real_files_cancelled_anywhere(nodes: Nodes, peer: Peer) -> None:
    """If this fails a real thread, file or lock is left where a block is cancelled."""
    peer.send("k", b"1")
    await run_a_block(nodes, peer, 0)
    before = Census(peer)

    async def block() -> None:
        async with nodes.engine(peer_config(peer.server)) as engine:
            await engine.wait_synced(10)
            peer.send("k", b"2")

    turns = 0
    cancelled = True
    while cancelled:
        task = asyncio.create_task(block())
        for _ in range(turns):
            await asyncio.sleep(0)
            if task.done():
                break
        cancelled = not task.done()
        task.cancel()
        await asyncio.wait((task,))
        # The file is free at once: whoever starts again next must not be refused.
        again = SqliteCursorStore(str(nodes.folder / "b.db"))
        await again.open()
        await again.close()
        await until(lambda: not before.left(), f"nothing left after {turns} turns")
        turns += 1 + turns // 8
    assert turns > 50


# A disk or a database that does not answer --------------------------------------------------------


class HungDisk:
    """A disk that answers no checkpoint until it is told to."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.asked = threading.Event()

    def checkpoint(self, _db: sqlite3.Connection) -> None:
        """Hang."""
        self.asked.set()
        self.answer.wait(60)


@pytest.fixture
def hung_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[HungDisk]:
    """A disk that hangs from the next checkpoint on, and answers in the end."""
    disk = HungDisk()
    monkeypatch.setattr("fsm_replication.cursor.file._checkpoint", disk.checkpoint)
    yield disk
    disk.answer.set()


def is_unlocked(path: Path) -> bool:
    """Say whether the lock file is free, without a loop."""
    with Path(f"{path}.lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


async def test_a_disk_that_hangs_leaves_no_task(
    nodes: Nodes, peer: Peer, hung_disk: HungDisk
) -> None:
    """If this fails a stop waits for the disk, or its lock is given up before its thread is."""
    settings = Settings(timeouts=TimeoutsConfig(drain=0.6))
    engine = nodes.engine(peer_config(peer.server), settings=settings)
    before = Census(peer)
    await engine.start()
    await engine.wait_synced(10)
    began = time.monotonic()
    await engine.shutdown()
    assert time.monotonic() - began < 0.6 + 0.4
    assert hung_disk.asked.is_set()
    assert engine.state is EngineState.FAILED
    assert isinstance(engine.error, DrainTimeoutError)
    assert engine.error.left_behind == ("cursor store",)
    assert len(asyncio.all_tasks()) == before.tasks
    assert before.left()["threads"] == 1
    # As long as the thread may still write, nobody else may.
    path = nodes.folder / "b.db"
    assert not is_unlocked(path)
    hung_disk.answer.set()
    # The thread lets go by itself: nothing runs on this loop meanwhile.
    deadline = time.monotonic() + 10
    while not is_unlocked(path):
        assert time.monotonic() < deadline
        time.sleep(0.005)  # noqa: ASYNC251 - that the loop stands still is the point
    await until(lambda: not before.left(), "the thread ended")
    with sqlite3.connect(path) as db:
        (row,) = db.execute("SELECT stream_id FROM peers")
    db.close()
    settled = engine._links["a"].context.progress.settled
    assert settled is not None
    assert row[0] == str(settled.stream_id)


async def test_a_store_that_hung_can_be_closed_and_opened_again(
    tmp_path: Path, hung_disk: HungDisk
) -> None:
    """If this fails a host that waits for its disk cannot go on with the same objects."""
    store = SqliteCursorStore(str(tmp_path / "c.db"))
    await store.open()
    for _ in range(2):
        with pytest.raises(CursorStoreError, match=r"no answer within 0\.05 s"):
            await store.close(timeout_sec=0.05)
        assert len(asyncio.all_tasks()) == 1
    hung_disk.answer.set()
    await store.close()
    await store.open()
    await store.close()
    assert [t for t in threading.enumerate() if "connection_worker" in t.name] == []


async def test_a_locked_database_does_not_hold_up_a_stop(nodes: Nodes, peer: Peer) -> None:
    """If this fails a backup of the cursor file holds up a stop, or hides that cursors are old."""
    settings = Settings(timeouts=TimeoutsConfig(drain=1.0, cursor=30))
    store = MemorySyncEngine()
    peer.send("before", b"0")
    engine = nodes.engine(peer_config(peer.server), store=store, settings=settings)
    before = Census(peer)
    await engine.start()
    await engine.wait_synced(10)
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=10)
    other = sqlite3.connect(nodes.folder / "b.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    peer.send("k", b"1")
    await until(lambda: len(store) == 2)
    began = time.monotonic()
    await engine.shutdown()
    assert time.monotonic() - began < 1.4
    assert engine.state is EngineState.FAILED
    assert isinstance(engine.error, CursorStoreError)
    assert "could not be written" in str(engine.error)
    other.execute("ROLLBACK")
    other.close()
    await until(lambda: not before.left())
    async with nodes.engine(peer_config(peer.server), store=store) as again:
        await until(lambda: again.health_check().peers[0].events_read == 1, "read again")


# Peers that are stopped by a signal ---------------------------------------------------------------


@pytest.mark.parametrize("when", ["connecting", "resuming", "copying", "tailing"])
async def test_a_frozen_server_holds_up_no_stop(
    nodes: Nodes, new_redis_server: Callable[..., RedisServer], when: str
) -> None:
    """If this fails a peer whose process is stopped decides how long a stop takes."""
    server = new_redis_server()
    peer = Peer(server)
    peer.write_marker()
    if when == "copying":
        for number in range(3000):
            peer.item(f"k{number}", b"1")
        with peer.client.pipeline() as pipeline:
            for number in range(3000):
                pipeline.set(f"item:k{number}", b"x")
            pipeline.execute()
    peer.close()
    store = Moody()
    engine = nodes.engine(peer_config(server), store=store)
    if when == "connecting":
        server.pause()
    elif when == "resuming":
        store.hanging.add("incarnation")
    starting = asyncio.create_task(engine.start())
    state = {
        "connecting": PeerState.CONNECTING,
        "resuming": PeerState.RESUMING,
        "copying": PeerState.BOOTSTRAPPING,
        "tailing": PeerState.TAILING,
    }[when]
    await engine.wait_for_state(state, peer_id="a", timeout=20)
    server.pause()
    store.hanging.clear()
    try:
        began = time.monotonic()
        await engine.shutdown()
        took = time.monotonic() - began
    finally:
        server.resume()
    # Only what waits for an answer in the middle of a step is waited for, and no longer than that.
    assert took < (1.0 if when in ("connecting", "tailing") else 8.5)
    assert (engine.state, engine.error) == (EngineState.STOPPED, None)
    await asyncio.wait((starting,))
    starting.exception()


# Hosts that just end ------------------------------------------------------------------------------

FORGETFUL = """
import asyncio, sys, threading
from fsm_replication import CursorConfig, MemorySyncEngine, ReplicationConfig, ReplicationEngine
from fsm_replication.cursor import file

if sys.argv[2] == "hung disk":
    file._checkpoint = lambda _db: threading.Event().wait()

async def main():
    global kept
    kept = ReplicationEngine(
        ReplicationConfig.model_validate({
            "local_node_id": "b",
            "cursor": {"sqlite_path": sys.argv[1]},
            "settings": {"timeouts": {"drain": 0.2}},
        }),
        MemorySyncEngine(),
    )
    await kept.start()
    if sys.argv[2] == "hung disk":
        await kept.shutdown()
    print(kept.state, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("how", "state"), [("forgets", EngineState.RUNNING), ("hung disk", EngineState.FAILED)]
)
def test_a_process_can_end_all_the_same(tmp_path: Path, how: str, state: EngineState) -> None:
    """If this fails a process hangs at its end: an engine was forgotten, or its disk is gone."""
    path = tmp_path / "c.db"
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, str(path), how],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert (done.returncode, done.stdout.strip()) == (0, state), done.stderr
    assert is_unlocked(path)
