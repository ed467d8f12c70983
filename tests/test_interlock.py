"""G14: a person decides on mass deletes, over restarts, kills, full disks and wrong clocks."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from conftest import until_async
from typer.testing import CliRunner

from fsm_replication import PauseReason, PeerHealth, PeerState, RedisSyncEngine, SyncItem
from fsm_replication.cli import commands
from fsm_replication.cli.pauses import resume_peer
from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    RepairConfig,
    ReplicationConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.cursor import SqliteCursorStore, schema
from fsm_replication.errors import AlreadyRunningError, CursorStoreError, StoreError
from fsm_replication.ports import CursorStore, InterlockRow, PeerRecord
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.testing import MemoryCursorStore
from fsm_replication.testing.local_mesh import LocalMesh, LocalNode
from fsm_replication.testing.virtual_time import run

ITEMS = 200
ALLOWED = 40
HOUR_SEC = 3600.0


def settings(*, cold: bool = False, least: int = 10, share: float = 0.2) -> Settings:
    """Return settings by which a fifth of the items may go, ten at least."""
    return Settings(
        hot_path=HotPathConfig(max_batch_size=20, min_batch_size=1),
        cold_path=ColdPathConfig(enabled=cold, interval_sec=20.0),
        tombstones=TombstonesConfig(ttl=30 * 86_400.0),
        startup=StartupConfig(when_no_peer="run"),
        repair=RepairConfig(interlock_share=share, interlock_min=least),
    )


def _live(node: LocalNode) -> int:
    return int(node.server.execute("GET", node.store.keys.live) or 0)


class Pair:
    """Node b reads node a, which holds items that b has, too."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        self.a, self.b = mesh.nodes["a"], mesh.nodes["b"]

    def put(self, *numbers: int) -> None:
        """Write items at node a."""
        for number in numbers:
            self.a.store.put(f"k{number}", b"x")

    def delete(self, *numbers: int) -> None:
        """Delete items at node a."""
        for number in numbers:
            self.a.store.delete(f"k{number}")

    @property
    def live(self) -> int:
        """How many live items node b holds."""
        return _live(self.b)

    @property
    def peer(self) -> PeerHealth:
        """What b's health says about a."""
        assert self.b.engine is not None
        return self.b.engine.health_check().peers[0]

    @property
    def reasons(self) -> frozenset[PauseReason]:
        """Why b's link to a is paused."""
        return self.peer.pause_reasons

    async def until(self, condition: Callable[[], bool], what: str, sec: float = 300.0) -> None:
        """Wait until something is so, on virtual time."""
        for _ in range(round(sec * 4)):
            if condition():
                return
            await asyncio.sleep(0.25)
        raise AssertionError(f"not within {sec:g} s: {what}")

    async def caught_up(self) -> None:
        """Wait until b holds as many live items as a."""
        there = _live(self.a)
        await self.until(lambda: self.live == there, "b holds what a holds")

    async def tripped(self) -> None:
        """Wait until b's link is Paused by the interlock."""

        def is_paused() -> bool:
            assert self.b.engine is not None
            paused = self.b.engine.peers["a"] is PeerState.PAUSED
            return paused and PauseReason.INTERLOCK in self.reasons

        await self.until(is_paused, "the interlock has tripped")


def on_pair(
    scenario: Callable[[Pair], Awaitable[None]], chosen: Settings | None = None, items: int = ITEMS
) -> None:
    """Run a scenario with b reading a, which wrote some items that b has read."""

    async def main() -> None:
        mesh = LocalMesh("ab", {frozenset("ab")}, settings=chosen or settings())
        pair = Pair(mesh)
        pair.put(*range(items))
        try:
            await mesh.start("b")
            await pair.until(lambda: pair.live == items, "everything is copied")
            await scenario(pair)
        finally:
            await mesh.close()

    run(main)


# Restarts


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("cold", [False, True])
def test_restarts_add_no_allowance(end: str, cold: bool) -> None:
    """If this fails some restarts are all it takes to lose every item."""

    async def scenario(pair: Pair) -> None:
        for begin in range(0, ITEMS, 40):
            pair.delete(*range(begin, begin + 35))
            await asyncio.sleep(10.0)
            await getattr(pair.mesh, end)("b")
            await pair.mesh.start("b")
            await asyncio.sleep(10.0)
            assert pair.live >= ITEMS - ALLOWED
        await pair.tripped()
        assert pair.live >= ITEMS - ALLOWED
        if end == "stop":
            assert pair.live <= ITEMS - ALLOWED + 20, "what is allowed is used, but for a batch"

    on_pair(scenario, settings(cold=cold))


def test_a_pause_outlasts_restarts_and_the_hour() -> None:
    """If this fails time or a restart decides what a person should."""

    async def scenario(pair: Pair) -> None:
        pair.delete(*range(150))
        await pair.tripped()
        held = pair.live
        await pair.mesh.kill("b")
        await asyncio.sleep(2 * HOUR_SEC)
        await pair.mesh.start("b")
        await asyncio.sleep(60.0)
        await pair.tripped()
        assert pair.live == held
        assert pair.b.engine is not None
        assert "live items" in next(
            row.why for row in reversed(pair.b.engine.journal) if row.trigger == "pause"
        )
        await pair.b.engine.resume("a")
        await pair.caught_up()
        assert pair.reasons == frozenset()

    on_pair(scenario)


def test_a_peer_that_has_just_brought_everything_may_not_delete_it() -> None:
    """If this fails what a peer has brought in counts as its own to delete."""

    async def scenario(pair: Pair) -> None:
        pair.put(*range(1000, 1300))
        await pair.caught_up()
        pair.delete(*range(ITEMS), *range(1000, 1300))
        await pair.tripped()
        assert pair.live >= (ITEMS + 300) * 0.8

    on_pair(scenario)


def test_churn_never_trips_it() -> None:
    """If this fails a stream that deletes and puts again stops replication."""

    async def scenario(pair: Pair) -> None:
        for turn in range(10):
            some = range(turn % 5 * 30, turn % 5 * 30 + 30)
            pair.delete(*some)
            await asyncio.sleep(1.0)
            pair.put(*some, *range(ITEMS, ITEMS + 20))
            await asyncio.sleep(1.0)
        await pair.caught_up()
        assert pair.reasons == frozenset()

    on_pair(scenario)


def test_many_restarts_and_kills_in_between_add_no_allowance() -> None:
    """If this fails a process that a supervisor starts again and again empties the store."""

    async def scenario(pair: Pair) -> None:
        rng = random.Random(7)
        for turn in range(12):
            pair.delete(*range(turn * 15, turn * 15 + 15))
            await asyncio.sleep(rng.random() * 2)
            await (pair.mesh.kill if turn % 3 else pair.mesh.stop)("b")
            if turn % 2:
                # While nothing runs, the time of day is set back: no time has passed.
                pair.b.wall_clock.skew_ms -= 7_200_000
            await pair.mesh.start("b")
            await asyncio.sleep(rng.random() * 2)
            assert pair.live >= ITEMS - ALLOWED
        await pair.tripped()

    on_pair(scenario)


def test_deletes_wait_where_they_cannot_be_reserved() -> None:
    """If this fails a full disk is a way around the interlock."""

    async def scenario(pair: Pair) -> None:
        pair.b.cursors.failure = CursorStoreError("disk full", path="c.db", retryable=True)
        pair.put(1000)
        await pair.until(lambda: pair.live == ITEMS + 1, "puts go on")
        pair.delete(*range(5))
        await asyncio.sleep(60.0)
        assert pair.live == ITEMS + 1
        assert "disk full" in pair.peer.last_error
        pair.b.cursors.failure = None
        await pair.caught_up()

    on_pair(scenario)


def test_a_store_that_fails_after_it_has_deleted_counts_all_the_same() -> None:
    """If this fails a store that answers too late lets everything be deleted, uncounted."""

    async def scenario(pair: Pair) -> None:
        apply, calls = pair.b.store.apply_many, 0

        async def late(
            changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            nonlocal calls
            calls += 1
            result = await apply(changes, received)
            if calls % 2:
                raise StoreError("no answer")
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pair.b.store, "apply_many", late)
            pair.delete(*range(ITEMS))
            await pair.tripped()
        assert pair.live >= ITEMS - ALLOWED
        assert pair.peer.shrunk >= ITEMS - pair.live

    on_pair(scenario)


def test_health_tells_how_far_it_is() -> None:
    """If this fails an operator learns of a mass delete when it is over."""

    async def scenario(pair: Pair) -> None:
        assert (pair.peer.shrunk, pair.peer.forgiven_until) == (0, None)
        pair.delete(*range(30))
        await pair.caught_up()
        assert (pair.peer.shrunk, pair.peer.shrink_allowed) == (30, ALLOWED)
        pair.delete(*range(30, 100))
        await pair.tripped()
        assert pair.peer.shrunk <= ALLOWED
        held = pair.live
        assert pair.b.engine is not None
        await pair.b.engine.resume("a")
        await pair.until(lambda: pair.live == ITEMS - 100, f"all but {held} are let through")
        assert pair.peer.shrunk == 0
        until = pair.peer.forgiven_until
        assert until is not None
        assert 0 < until - pair.b.wall_clock.now_ms() <= HOUR_SEC * 1000
        await pair.mesh.kill("b")
        await pair.mesh.start("b")
        assert pair.peer.forgiven_until == pytest.approx(until, abs=100)

    on_pair(scenario)


def test_a_repair_deletes_no_more_than_that_until_it_is_forced() -> None:
    """If this fails some repairs, each in a process of its own, delete everything."""

    async def scenario(pair: Pair) -> None:
        pair.delete(*range(150))

        def state() -> PeerState:
            assert pair.b.engine is not None
            return pair.b.engine.peers["a"]

        for _ in range(4):
            await pair.mesh.stop("b")
            await pair.mesh.start("b")
            engine = pair.b.engine
            assert engine is not None
            await pair.until(lambda: state().is_running, "b is connected")
            stats = await engine.repair()
            assert stats.errors == 1
            assert pair.live >= ITEMS - ALLOWED
        assert "more would follow" in stats.problems[0]
        assert engine is not None
        await engine.repair(force=True)
        await pair.mesh.kill("b")
        await pair.mesh.start("b")
        await pair.until(lambda: state() is PeerState.STANDBY, "it goes on")
        again = pair.b.engine
        assert again is not None
        assert (await again.repair()).errors == 0
        assert pair.live == ITEMS - 150

    chosen = settings()
    hot = chosen.hot_path.model_copy(update={"enabled": False})
    cold = ColdPathConfig(interval_sec=20.0)
    on_pair(scenario, chosen.model_copy(update={"hot_path": hot, "cold_path": cold}))


def test_resume_may_be_said_before_the_start() -> None:
    """If this fails a host must start an engine, and wait for it, to say that deletes are meant."""

    async def scenario(pair: Pair) -> None:
        pair.delete(*range(150))
        await pair.tripped()
        await pair.mesh.stop("b")
        engine = pair.mesh.make_engine("b")
        await engine.resume("a")
        await engine.start()
        pair.b.engine = engine
        await pair.caught_up()

    on_pair(scenario)


# The cursor file


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_both_cursor_stores_keep_it(kind: str, tmp_path: Path) -> None:
    """If this fails simulated restarts say nothing about real ones."""
    path = str(tmp_path / "c.db")
    store: CursorStore = MemoryCursorStore() if kind == "memory" else SqliteCursorStore(path)
    row = InterlockRow(17, ((3_600_000, 12), (0, 1)), 5, 9, "why\x00\ud800")
    await store.open()
    assert (await store.load("a")).interlock is None
    await store.save_interlock("a", InterlockRow(16))
    await store.save_interlock("a", row)
    await store.set_operator_pause("a", True)
    await store.close()
    if kind == "sqlite":
        store = SqliteCursorStore(path)
    await store.open()
    assert (await store.load("a")).interlock == row
    assert (await store.load("b")).interlock is None
    await store.close()


@pytest.mark.parametrize("version", [1, 2])
async def test_an_older_file_knows_of_none(version: int, tmp_path: Path) -> None:
    """If this fails a file of the version before cannot be read, or not be upgraded."""
    path = str(tmp_path / "c.db")
    with closing(sqlite3.connect(path)) as db:
        for statements in schema._SCHEMAS[:version]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    for read_only in (True, False):
        store = SqliteCursorStore(path, read_only=read_only)
        await store.open()
        assert (await store.load("a")).interlock is None
        await store.close()


# On the command line


def node_file(folder: Path, ours: str = "redis://127.0.0.1:1", theirs: str = "redis://h") -> Path:
    """Write the configuration of node b, which reads a."""
    path = folder / "node.yaml"
    path.write_text(
        "local_node_id: b\n"
        f"cursor: {{sqlite_path: {folder / 'c.db'}}}\n"
        f"store: {{kind: redis, redis_url: '{ours}'}}\n"
        f"peers: [{{node_id: a, redis_url: '{theirs}'}}]\n"
        "settings: {repair: {interlock_share: 0.2, interlock_min: 20}}\n"
    )
    return path


def test_a_person_may_say_it_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a node that is run as a process can only be resumed by a program."""
    # The settings of a process of its own are none for this one.
    monkeypatch.setattr(commands, "run_async", asyncio.run)
    path = node_file(tmp_path)

    async def rows(*, trip: bool = False) -> PeerRecord:
        store = SqliteCursorStore(str(tmp_path / "c.db"))
        await store.open()
        if trip:
            await store.save_interlock("a", InterlockRow(1, ((0, 9),), 3, 0, "too many"))
        record = await store.load("a")
        await store.close()
        return record

    def say(word: str, peer: str = "a", code: int = 0) -> str:
        done = CliRunner().invoke(commands.app, [word, str(path), peer])
        assert done.exit_code == code
        return done.output

    say("pause")
    assert asyncio.run(rows(trip=True)).operator_pause
    told = say("resume")
    assert "too many" in told
    assert "operator" in told
    record = asyncio.run(rows())
    assert not record.operator_pause
    assert record.interlock is not None
    assert (record.interlock.falls, record.interlock.tripped) == ((), "")
    assert record.interlock.forgiven_ms == 3_600_000
    assert abs(record.interlock.saved_at_ms - time.time() * 1000) < 60_000
    assert "nothing" in say("resume")
    say("resume", "x", code=1)


async def test_a_running_node_is_not_resumed_behind_its_back(tmp_path: Path) -> None:
    """If this fails what the running engine knows overwrites what a person has said."""
    config = ReplicationConfig.load(node_file(tmp_path))
    store = SqliteCursorStore(str(tmp_path / "c.db"))
    await store.open()
    with pytest.raises(AlreadyRunningError, match=r"engine\.resume\('a'\)"):
        await resume_peer(config, "a")
    await store.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_kill_minus_nine_gives_no_allowance_away(
    redis_servers: Callable[[], RedisServer], tmp_path: Path
) -> None:
    """If this fails a supervisor that starts a killed node again empties it."""
    a, b = redis_servers(), redis_servers()
    path, items, rng = node_file(tmp_path, b.url, a.url), 500, random.Random(3)
    command = [sys.executable, "-m", "fsm_replication"]

    async def live() -> int:
        return await held.live_items()

    async def once(*words: str) -> int:
        child = await asyncio.create_subprocess_exec(
            *command, *words, stdout=DEVNULL, stderr=DEVNULL
        )
        return await child.wait()

    async with (
        RedisSyncEngine(a.url, node_id="a") as peer,
        RedisSyncEngine(b.url, node_id="b") as held,
    ):
        await peer.put_many({f"k{n}": b"x" for n in range(items)})
        for turn in range(8):
            node = await asyncio.create_subprocess_exec(
                *command, "run", str(path), stdout=DEVNULL, stderr=DEVNULL
            )
            try:
                if turn == 0:
                    await until_async(lambda: _is(live, items), "all is copied")
                for n in range(turn * 60, turn * 60 + 60):
                    await peer.delete(f"k{n}")
                # It takes a second to start, and then deletes as fast as it can.
                await asyncio.sleep(0.5 + rng.random() * 2)
                assert await live() >= items * 0.8
            finally:
                node.kill()
                await node.wait()
        assert await live() >= items * 0.8
        assert await once("repair", str(path)) == 1, "the rest waits for a person's word"
        assert await live() >= items * 0.8
        assert await once("repair", str(path), "--force") == 0
        assert await live() == items - 480


async def _is(number: Callable[[], Awaitable[int]], expected: int) -> bool:
    return await number() == expected
