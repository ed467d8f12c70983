"""Workers that die, and a cursor database that is full, locked, corrupt or gone while it is used."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pkgutil
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, Peer, peer_config, until, until_async
from test_stops import Rig, virtual

from fsm_replication import (
    CursorStoreError,
    EngineState,
    HealthCheck,
    PeerState,
    ReplicationEngine,
    WorkerCrashedError,
)
from fsm_replication.config import PeerHealthConfig, Settings, StartupConfig, TimeoutsConfig
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.ports import StreamId
from fsm_replication.retry import RetryProfile
from fsm_replication.servers import RedisServer

# Workers that die ---------------------------------------------------------------------------------


class Dying:
    """Dies as often as it is told to, and does its work afterwards."""

    def __init__(self, times: int, work: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.left = times
        self.deaths: list[float] = []
        self._work = work

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Die of a bug, or work."""
        if self.left:
            self.left -= 1
            self.deaths.append(asyncio.get_running_loop().time())
            raise ZeroDivisionError("a bug")
        return await self._work(*args, **kwargs)


# Where each worker's bug is put; the names are those under which their deaths are told.
ENGINE_WORKERS = {
    "cursor-flush": ("fsm_replication.workers.cursor_flush:CursorBook", "look_after"),
    "cold-path": ("fsm_replication.workers.cold_path:ColdPath", "cycle"),
    "pinger": ("fsm_replication.engine", "ping_idle_peers"),
    "prober": ("fsm_replication.engine", "probe_circuits"),
    "slo-watch": ("fsm_replication.engine", "watch_lag"),
    "store-watch": ("fsm_replication.workers.own_store:StoreWatch", "run"),
}
LINK_WORKERS = {
    "tailer": ("fsm_replication.workers.tailer:Tailer", "_read_on"),
    "connector": ("fsm_replication.workers.connector", "open_lines"),
    "timer": ("fsm_replication.peer_link", "wait_to_retry"),
}


def put_bug(monkeypatch: pytest.MonkeyPatch, worker: str, times: int) -> Dying:
    """Let a worker die so many times."""
    where, name = {**ENGINE_WORKERS, **LINK_WORKERS}[worker]
    owner = pkgutil.resolve_name(where)
    dying = Dying(times, getattr(owner, name))

    async def die_or_work(*args: Any, **kwargs: Any) -> Any:
        return await dying(*args, **kwargs)

    monkeypatch.setattr(owner, name, die_or_work)
    return dying


QUICK = RetryProfile(0.01, 1.0, 0.01)


def disturb(rig: Rig, worker: str) -> None:
    """See that a worker has something to do; the timer has only after a connection was lost."""
    if worker == "timer":
        rig.transport.cut("a")
        rig.transport.heal("a")


SETTINGS: dict[str, Any] = {
    "startup": StartupConfig(when_no_peer="run"),
    "peer_health": PeerHealthConfig(ping_interval_sec=1, idle_threshold_sec=1),
}


@pytest.mark.parametrize("worker", [*ENGINE_WORKERS, *LINK_WORKERS])
def test_a_worker_that_dies_is_started_again(
    worker: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails one bug stops a worker for good, and nobody is told."""
    dying = put_bug(monkeypatch, worker, 3)

    async def main() -> None:
        rig = Rig(**SETTINGS)
        rig.begin()
        if worker == "timer":
            await rig.reach(PeerState.TAILING)
        for _ in range(4):
            disturb(rig, worker)
            await asyncio.sleep(70)
        assert dying.left == 0
        assert rig.engine.is_running
        assert rig.link is PeerState.TAILING
        assert rig.engine.metrics.get("worker_restarts", worker)._value.get() == 3
        rig.peer.put("k", b"1")
        await asyncio.sleep(10)
        assert await rig.store.get("k") is not None
        await rig.engine.shutdown()
        rig.assert_ended()
        assert rig.engine.error is None

    with caplog.at_level(logging.ERROR):
        virtual(main)
    told = [record for record in caplog.records if vars(record).get("event") == "worker_died"]
    assert [record.exc_info and record.exc_info[0] for record in told] == [ZeroDivisionError] * 3
    if worker in ENGINE_WORKERS:
        waits = [later - at for at, later in zip(dying.deaths, dying.deaths[1:], strict=False)]
        assert all(wait >= 0.5 for wait in waits), "it backs off"


@pytest.mark.parametrize("worker", [*ENGINE_WORKERS])
def test_a_worker_that_will_not_stay_up_ends_the_engine(
    worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a worker dies and is started again for ever, and the node looks alive."""
    dying = put_bug(monkeypatch, worker, 10**9)
    # What waits for its interval before it works dies sooner here.
    monkeypatch.setattr("fsm_replication.workers.cursor_flush.FLUSH_INTERVAL_SEC", 1.0)
    monkeypatch.setattr("fsm_replication.peer_link.DAEMON", QUICK)

    async def main() -> None:
        rig = Rig(**SETTINGS, cold_path={"interval_sec": 1})
        rig.begin()
        with pytest.raises(WorkerCrashedError, match="died 6 times within a minute") as raised:
            await rig.engine.wait_closed()
        assert worker in str(raised.value)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        assert rig.engine.state is EngineState.FAILED
        assert len(dying.deaths) == 6
        assert dying.deaths[-1] - dying.deaths[0] < 60
        rig.assert_ended()

    virtual(main)


@pytest.mark.parametrize("worker", ["tailer", "connector"])
def test_a_worker_of_a_link_that_will_not_stay_up_fails_that_link_alone(
    worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a defect in working with one peer takes the engine down, and every other link."""
    dying = put_bug(monkeypatch, worker, 6)
    monkeypatch.setattr("fsm_replication.peer_link.DAEMON", QUICK)

    async def main() -> None:
        rig = Rig(**SETTINGS, reconnect={"rejected": 120.0})
        rig.begin()
        await rig.engine.wait_for_state(PeerState.FAILED, peer_id="a", timeout=59)
        assert len(dying.deaths) == 6
        (health,) = rig.engine.health_check().peers
        assert "ZeroDivisionError" in health.last_error
        assert rig.engine.is_running
        began = asyncio.get_running_loop().time()
        await rig.engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=200)
        assert asyncio.get_running_loop().time() - began >= 119, "tried again after ``rejected``"
        await rig.engine.shutdown()
        rig.assert_ended()

    virtual(main)


OTHERS = {
    "pinger": ("fsm_replication.peer_link", "ping_once"),
    "cold path": ("fsm_replication.workers.cold_path", "repair_peer"),
    "look for a tree": ("fsm_replication.workers.cold_path", "look_for_tree"),
}


@pytest.mark.parametrize("worker", OTHERS)
def test_an_error_while_working_with_one_peer_counts_against_its_link(
    worker: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails the pinger or the cold path dies of one peer, and with it the engine."""
    owner = pkgutil.resolve_name(OTHERS[worker][0])
    dying = Dying(10**9, getattr(owner, OTHERS[worker][1]))

    async def die(*args: Any, **kwargs: Any) -> Any:
        return await dying(*args, **kwargs)

    monkeypatch.setattr(owner, OTHERS[worker][1], die)

    async def main() -> None:
        rig = Rig(
            **SETTINGS,
            cold_path={"interval_sec": 1, "backoff_base_sec": 1, "backoff_max_sec": 1},
            reconnect={"first": 0.1, "longest": 0.1},
        )
        rig.begin()
        await rig.engine.wait_for_state(PeerState.FAILED, peer_id="a", timeout=59)
        assert len(dying.deaths) == 6
        assert rig.engine.is_running
        moves = [move for move in rig.engine.journal if move.machine == "link:a"]
        assert [move.trigger for move in moves].count("connection_lost") == 6
        await rig.engine.shutdown()
        rig.assert_ended()

    with caplog.at_level(logging.ERROR):
        virtual(main)
    told = [record for record in caplog.records if vars(record).get("event") == "worker_died"]
    assert [record.exc_info and record.exc_info[0] for record in told] == [ZeroDivisionError] * 6


@pytest.mark.parametrize("at_head", [True, False])
def test_an_entry_at_which_its_reader_dies_costs_that_entry(
    at_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails one entry that finds a defect keeps a link from all that comes after it."""

    async def main() -> None:
        rig = Rig(**SETTINGS)
        encode = rig.store.encode

        def encode_or_die(items: Any, wire: Any) -> Any:
            if any(item.key == "poison" for item in items):
                raise ZeroDivisionError("a bug")
            return encode(items, wire)

        monkeypatch.setattr(rig.store, "encode", encode_or_die)
        rig.begin()
        await rig.reach(PeerState.TAILING)
        if not at_head:
            await rig.engine.pause("a")
        keys = [f"k{number}" for number in range(30)]
        for key in (*keys[:15], "poison", *keys[15:]):
            rig.peer.put(key, key.encode())
        if not at_head:
            await rig.engine.resume("a")

        async def has_all() -> bool:
            return None not in await rig.store.get_many(keys)

        await until_async(has_all)
        (letter,) = await rig.engine.dead_letters.list()
        assert (letter.key, letter.reason) == ("poison", "unexpected")
        assert "ZeroDivisionError" in letter.detail
        assert letter.fields
        assert "connection_lost" not in [move.trigger for move in rig.engine.journal]
        await rig.engine.shutdown()
        rig.assert_ended()

    virtual(main)


def test_deaths_far_apart_are_put_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails an engine that runs for a year ends after its sixth hiccup."""
    dying = put_bug(monkeypatch, "cursor-flush", 0)

    async def main() -> None:
        rig = Rig(**SETTINGS)
        rig.begin()
        for _ in range(20):
            dying.left = 2
            await asyncio.sleep(100)
        assert len(dying.deaths) == 40
        assert rig.engine.is_running
        await rig.engine.shutdown()
        rig.assert_ended()

    virtual(main)


def test_a_timer_that_somebody_cancels_is_missed() -> None:
    """If this fails a link waits for ever for a worker that is gone."""

    async def main() -> None:
        rig = Rig(**SETTINGS)
        rig.transport.cut("a")
        rig.begin()
        await rig.reach(PeerState.BACKOFF)
        for _ in range(3):
            (timer,) = [t for t in asyncio.all_tasks() if t.get_name() == "link:a:timer"]
            timer.cancel()
            await asyncio.sleep(0)
            await rig.reach(PeerState.CONNECTING)
            await rig.reach(PeerState.BACKOFF)
        rig.transport.heal("a")
        await rig.reach(PeerState.TAILING)
        await rig.engine.shutdown()
        rig.assert_ended()

    virtual(main)


# A cursor database that is full, locked, corrupt or gone, while it is used ------------------------


QUICKLY = Settings(timeouts=TimeoutsConfig(cursor=0.3), startup=StartupConfig(when_no_peer="run"))


@pytest.fixture
def quick_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush cursors every tenth of a second."""
    monkeypatch.setattr("fsm_replication.workers.cursor_flush.FLUSH_INTERVAL_SEC", 0.1)


@asynccontextmanager
async def reading(nodes: Nodes, peer: Peer) -> AsyncIterator[ReplicationEngine]:
    """An engine that tails, with a first event settled on the disk; it may end in an error."""
    engine = nodes.engine(peer_config(peer.server), settings=QUICKLY)
    await engine.start()
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
    await send_and_see(engine, peer, "first")
    await until(lambda: on_disk(nodes) == settled(engine), "the first flush")
    yield engine
    await engine.shutdown()


async def send_and_see(engine: ReplicationEngine, peer: Peer, key: str) -> None:
    """Write at the peer and wait until it is held here."""
    peer.send(key, b"1")
    await until_async(lambda: engine.sync_engine.get(key), f"{key} held")
    last = peer.client.xinfo_stream("cdc")["last-generated-id"].decode()
    await until(lambda: str(settled(engine)) == last, f"{key} settled")


def settled(engine: ReplicationEngine) -> StreamId | None:
    """Return the position that is settled in memory."""
    position = engine._links["a"].context.progress.settled
    return None if position is None else position.stream_id


def on_disk(nodes: Nodes) -> StreamId | None:
    """Return the cursor that is in the file."""
    with closing(sqlite3.connect(nodes.folder / "b.db", timeout=10)) as db:
        row = db.execute("SELECT stream_id FROM peers WHERE peer_id = 'a'").fetchone()
    return None if row is None or row[0] is None else StreamId.parse(row[0])


def complaint(engine: ReplicationEngine) -> str:
    """Return what health says of the cursor store."""
    health: HealthCheck = engine.health_check()
    return health.cursor_store_error


@pytest.mark.usefixtures("quick_flush")
async def test_a_locked_database_is_waited_for(nodes: Nodes, peer: Peer) -> None:
    """If this fails a backup of the cursor file stops a node, or loses a dead letter."""
    async with reading(nodes, peer) as engine:
        before = on_disk(nodes)
        with closing(sqlite3.connect(nodes.folder / "b.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            await send_and_see(engine, peer, "while locked")
            await until(lambda: complaint(engine), "health says so")
            assert "locked" in complaint(engine)
            health = engine.health_check()
            assert (health.state, health.ready, health.healthy) == ("Running", True, True)
            # A letter must be on the disk before the cursor passes it, so the link waits here.
            stuck = settled(engine)
            peer.send_fields([b"op", b"X", b"key", b"bad"])
            peer.send("behind", b"1")
            await until(lambda: "locked" in engine.health_check().peers[0].last_error)
            assert settled(engine) == stuck
            assert on_disk(nodes) == before
            other.execute("ROLLBACK")
        await until(lambda: not complaint(engine), "health is well again")
        await until_async(lambda: engine.sync_engine.get("behind"))
        assert [one.key for one in await engine.dead_letters.list()] == ["bad"]
        await until(lambda: on_disk(nodes) == settled(engine), "the cursors on the disk")
        assert engine.is_running
    assert engine.error is None


@pytest.mark.usefixtures("quick_flush")
async def test_a_full_database_takes_no_letter_and_loses_none(nodes: Nodes, peer: Peer) -> None:
    """If this fails a dead letter is lost where the disk is full, or the engine ends (G1)."""
    async with reading(nodes, peer) as engine:
        store = engine._ports.cursor_store
        assert isinstance(store, SqliteCursorStore)

        async def set_pages(count: int) -> None:
            await store._file.run(
                lambda db: db.execute(f"PRAGMA max_page_count = {count}").fetchall(), ""
            )

        pages = await store._file.run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await set_pages(pages)
        stuck = settled(engine)
        for number in range(20):
            peer.send_fields([b"op", b"X", b"key", b"bad.%d" % number, b"more", bytes(20_000)])
        await until(lambda: "full" in complaint(engine), "health says so")
        assert "free some space" in complaint(engine)
        assert settled(engine) == stuck
        assert await engine.dead_letters.list() == []
        errors = engine.metrics.get("errors", "a", "CursorStoreError")._value
        assert errors.get() == 0, "a full disk is no reason to give up a connection"
        await set_pages(100_000)
        await until_async(engine.dead_letters.list, "the letters")
        await until(lambda: engine.health_check().peers[0].dead_letters == 20)
        await until(lambda: not complaint(engine), "health is well again")
        await send_and_see(engine, peer, "after")
    assert engine.error is None
    assert on_disk(nodes) == settled(engine)


FILLING = """
import asyncio, json, resource, sys
from pathlib import Path
from fsm_replication import MemorySyncEngine, ReplicationConfig, ReplicationEngine, PeerState
from fsm_replication.workers import cursor_flush

cursor_flush.FLUSH_INTERVAL_SEC = 0.05
path, url = sys.argv[1:]

def tell(**what):
    print(json.dumps(what), flush=True)

async def main():
    config = ReplicationConfig.model_validate({
        "local_node_id": "b",
        "cursor": {"sqlite_path": path},
        "peers": [{"node_id": "a", "redis_url": url}],
    })
    loop = asyncio.get_running_loop()
    async with ReplicationEngine(config, MemorySyncEngine()) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=20)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            soft = resource.RLIM_INFINITY
            if line.strip() == "fill":
                soft = Path(path + "-wal").stat().st_size
            if line.strip() in ("fill", "free"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
            health = engine.health_check()
            tell(
                state=str(health.state), healthy=health.healthy,
                complaint=health.cursor_store_error, applied=health.peers[0].events_applied,
                settled=str(engine._links["a"].context.progress.settled.stream_id),
            )
    tell(state=str(engine.state))

asyncio.run(main())
"""


class Filling:
    """An engine in a process of its own, whose files cannot grow while it is told so."""

    def __init__(self, path: Path, server: RedisServer) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FILLING, str(path), server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )

    def ask(self, line: str = "") -> dict[str, Any]:
        """Tell it something, and return how it is."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what it says next."""
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def stop(self) -> dict[str, Any]:
        """Let it end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.answer()


@pytest.fixture
def filling(tmp_path: Path, peer: Peer) -> Iterator[Filling]:
    """A process whose disk can be filled."""
    made = Filling(tmp_path / "b.db", peer.server)
    yield made
    made.process.kill()
    made.process.wait()
    for pipe in (made.process.stdin, made.process.stdout):
        assert pipe is not None
        pipe.close()


async def test_a_full_disk_sets_no_cursor_back(
    nodes: Nodes, peer: Peer, filling: Filling, tmp_path: Path
) -> None:
    """If this fails a full disk ends a node, or loses a cursor, or nobody is told of it."""
    peer.send("first", b"1")
    last = "0-0"

    async def until_it_is(condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        answer: dict[str, Any] = {}

        async def asked() -> bool:
            answer.update(await asyncio.to_thread(filling.ask))
            return condition(answer)

        await until_async(asked, what)
        return answer

    def send(key: str) -> None:
        nonlocal last
        peer.send(key, b"1")
        last = peer.client.xinfo_stream("cdc")["last-generated-id"].decode()

    send("second")
    await until_it_is(lambda health: health["settled"] == last, "it follows")
    await until(lambda: str(on_disk(nodes)) == last, "the cursor on the disk")
    assert (await asyncio.to_thread(filling.ask, "fill"))["complaint"] == ""
    before = last
    for number in range(3):
        send(f"full.{number}")
        health = await until_it_is(
            lambda health: health["settled"] == last and bool(health["complaint"]), "it goes on"
        )
        assert (health["state"], health["healthy"]) == ("Running", True)
    assert str(on_disk(nodes)) == before
    await asyncio.to_thread(filling.ask, "free")
    await until_it_is(lambda health: health["complaint"] == "", "it is well again")
    await until(lambda: str(on_disk(nodes)) == last, "the cursor on the disk")
    send("after")
    await until_it_is(lambda health: health["settled"] == last, "it follows")
    assert (await asyncio.to_thread(filling.stop))["state"] == "Stopped"
    assert str(on_disk(nodes)) == last
    with closing(sqlite3.connect(tmp_path / "b.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def spoil(path: Path) -> None:
    """Overwrite everything but the first page, and empty the log."""
    Path(f"{path}-wal").write_bytes(b"")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * max(0, size - 4096))


def replace_file(path: Path) -> None:
    """Put a copy in its place, as some tools do that restore backups."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.rename(path)


LOSSES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "log removed": lambda path: Path(f"{path}-wal").unlink(),
    "replaced": replace_file,
}


@pytest.mark.usefixtures("quick_flush")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("what", LOSSES)
async def test_a_database_that_is_gone_ends_the_engine(
    nodes: Nodes, peer: Peer, what: str, busy: bool
) -> None:
    """If this fails a node goes on without a memory, and finds out at its next start."""
    async with reading(nodes, peer) as engine:
        LOSSES[what](nodes.folder / "b.db")
        if busy:
            peer.send("more", b"1")
        with pytest.raises(CursorStoreError, match="removed or replaced") as raised:
            async with asyncio.timeout(DEADLINE_SEC):
                await engine.wait_closed()
        assert str(nodes.folder / "b.db") in str(raised.value)
        assert not raised.value.may_pass
        assert engine.state is EngineState.FAILED
        assert engine.error is raised.value
        assert engine.peers == {"a": PeerState.STOPPED}
        aborts = [move.why for move in engine.journal if move.trigger == "abort"]
        assert "removed or replaced" in aborts[0]


@pytest.mark.usefixtures("quick_flush")
@pytest.mark.parametrize("found_by", ["flush", "letter", "pause"])
async def test_a_corrupt_database_ends_the_engine(nodes: Nodes, peer: Peer, found_by: str) -> None:
    """If this fails a node writes cursors into a file that nobody can read."""
    async with reading(nodes, peer) as engine:
        # What is read stands in SQLite's cache, so the file must be larger than that.
        store = engine._ports.cursor_store
        assert isinstance(store, SqliteCursorStore)
        await store._file.run(lambda db: db.execute("PRAGMA cache_size = 1").fetchall(), "")
        for number in range(30):
            peer.send_fields([b"op", b"X", b"key", b"bad.%d" % number, b"x", bytes(9000)])
        await until(lambda: engine.health_check().peers[0].dead_letters == 30)
        await store._file.run(lambda db: db.execute("PRAGMA wal_checkpoint").fetchall(), "")
        spoil(nodes.folder / "b.db")
        if found_by == "flush":
            peer.send("more", b"1")
        elif found_by == "letter":
            peer.send_fields([b"op", b"X", b"key", b"bad", b"x", bytes(9000)])
        else:
            with pytest.raises(CursorStoreError) as met:
                await engine.pause("a")
            assert not met.value.may_pass
        with pytest.raises(CursorStoreError, match=r"b\.db cannot be used") as raised:
            async with asyncio.timeout(DEADLINE_SEC):
                await engine.wait_closed()
        assert not raised.value.may_pass
        assert "move it away" in str(raised.value)
        assert engine.state is EngineState.FAILED


@pytest.mark.usefixtures("quick_flush")
async def test_the_first_error_is_the_one_that_is_kept(nodes: Nodes, peer: Peer) -> None:
    """If this fails the error that is told is what came of the first one, and not its cause."""
    async with reading(nodes, peer) as engine:
        first = CursorStoreError("the first", path="x")
        second = CursorStoreError("the second", path="x")
        engine._book.failed(first)
        engine._driver.request("abort", why="the first", payload=first)
        engine._driver.request("abort", why="the second", payload=second)
        (nodes.folder / "b.db").unlink()
        with pytest.raises(CursorStoreError, match="the first"):
            await engine.wait_closed()
        assert engine.error is first
