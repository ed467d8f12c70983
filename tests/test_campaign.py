"""Simulated runs from seeds, and a crash tried at every await."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.errors import PeerReplyError
from fsm_replication.items import SyncItem
from fsm_replication.ports import Connection
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.tables import LINK
from fsm_replication.testing import campaign, fates
from fsm_replication.testing.campaign import Campaign, main, run_seeds
from fsm_replication.testing.fates import (
    COUNTING,
    BrokenPromiseError,
    Fate,
    Tally,
    random_fate,
    run_fate,
    shrink,
)
from fsm_replication.testing.local_mesh import (
    BLOCK_SEC,
    GRACE_SEC,
    START_MS,
    TTL_SEC,
    LocalMesh,
    topology,
)
from fsm_replication.testing.moves import EXEMPT, moves_of_the_tables
from fsm_replication.testing.sim_dialects import REDIS_6_2
from fsm_replication.testing.sim_store import SimStore
from fsm_replication.testing.sim_values import Status
from fsm_replication.testing.spin_watch import Given, Pace, SpinWatch
from fsm_replication.testing.virtual_time import VirtualTimeLoop, run
from fsm_replication.workers.reader import Read, StreamReader


def test_seeds_keep_every_promise(full: bool) -> None:
    """If this fails a fate was found in which something does not hold; its seed is told."""
    done = run_seeds(range(2000 if full else 40))
    assert not done.failures, done.failures[0]
    assert done.tally.runs == (2000 if full else 40)
    assert done.tally.seconds > 3600


# Seeds that have found something, with what it was.
@pytest.mark.parametrize(
    "seed",
    [
        2765,  # A stream was made anew, and what a killed node had read of the old one was forgotten.
        7845,
        987,  # Without trees nobody gave a store again what it had lost with its last second.
        94,  # A node without items was emptied, and its peers waited for its marker for ever.
        1159,  # A link gave up just after its peer was mended.
        6950,  # A repair waited for a link to decide while its engine ended: KeyError.
        4844,  # What was put and deleted before an agreement was read after it, and taken.
        351,
        535,
        4957,  # Our clock was days ahead, and what came meanwhile was passed over as old.
        8994,  # A server's clock jumped ahead, and a delete was forgotten before all had heard of it.
        # Without a hot path nobody looked whether a peer had come back older.
        pytest.param(710, marks=pytest.mark.slow),
        # A peer whose ids ran ahead of its clock came back older.
        pytest.param(3350, marks=pytest.mark.slow),
        # A delete was heard of late, and forgotten before a peer had heard of it.
        pytest.param(6045, marks=pytest.mark.slow),
    ],
)
def test_seeds_that_have_failed_before(seed: int) -> None:
    """If this fails something that was mended is broken again."""
    run_fate(random_fate(seed))


APART = (("cut", "a", "b"), ("cut", "b", "a"))
LONG = ("wait", 400.0)


# Nodes apart for longer than the ttl: somebody must give a word on what is held back.
@pytest.mark.parametrize(
    "fate",
    [
        Fate("mesh", 2, 0, (*APART, ("put", "a", "k", b"x"), LONG, LONG, LONG)),
        Fate("mesh", 2, 4862, (*APART, LONG, LONG, ("put", "a", "k", b"y"), LONG, LONG)),
        Fate(
            "chain", 3, 1328,
            (("stop", "c"), ("cut", "b", "a"), ("flood", "a"), LONG, ("hang", "a", "b"), LONG),
            strict=True,
        ),
    ],
)  # fmt: skip
def test_what_was_apart_for_too_long_agrees_once_somebody_said_so(fate: Fate) -> None:
    """If this fails nodes that were apart for longer than the ttl never agree again."""
    run_fate(fate)


def test_a_seed_gives_the_same_run() -> None:
    """If this fails a seed that fails cannot be looked into."""
    for seed in (3, 4, 5):
        one, two = run_fate(random_fate(seed)), run_fate(random_fate(seed))
        assert (one.seconds, one.moves, one.steps) == (two.seconds, two.moves, two.steps)


def test_a_broken_promise_is_found_and_made_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a campaign passes over a store that loses deletes."""
    apply_many = SimStore.apply_many

    async def forgets_deletes(
        self: SimStore, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        kept = [msgspec.structs.replace(change, deleted=False) for change in changes]
        return await apply_many(self, kept, received)

    monkeypatch.setattr(SimStore, "apply_many", forgets_deletes)
    monkeypatch.setattr(fates, "LIMIT_SEC", 4000.0)

    def fails(fate: Fate) -> bool:
        try:
            run_fate(fate)
        except (BrokenPromiseError, TimeoutError):
            return True
        return False

    put, delete = ("put", "a", "k", b"x"), ("delete", "a", "k")
    wordy = Fate("mesh", 2, 1, (put, ("wait", 3.0), ("skew", "b", 500), delete, ("wait", 3.0)))
    assert fails(wordy)
    assert shrink(wordy, fails).steps == (put, delete)


def test_fates_choose_a_dialect_for_each_server() -> None:
    """If this fails the runs prove nothing of servers other than one kind."""
    drawn = [random_fate(seed) for seed in range(50)]
    assert all(len(fate.dialects) == fate.nodes for fate in drawn)
    assert {name for fate in drawn for name in fate.dialects} >= {d.name for d in COUNTING}
    assert any(len(set(fate.dialects)) > 1 for fate in drawn)
    mixed = Fate("mesh", 3, 0, (("put", "a", "k", b"x"),), dialects=("redis-8.0", "valkey-8.1"))
    tally = run_fate(mixed)
    tally.add(run_fate(Fate("mesh", 2, 0, ())))
    assert tally.servers == {"redis-8.0": 1, "valkey-8.1": 2, "redis-7.0": 2}
    assert tally.peak[0] > 1


def test_events_are_counted_of_servers_that_do_not_count() -> None:
    """If this fails nobody can tell whether nodes on old servers come to rest."""

    async def trace() -> dict[str, int]:
        mesh = LocalMesh("ab", topology("mesh", "ab"), dialect=lambda _name: REDIS_6_2)
        mesh.nodes["a"].store.put("k", b"x")
        mesh.nodes["a"].store.put("k", b"y")
        mesh.trim("a", 0)
        return mesh.events()

    assert run(trace, start_ms=START_MS) == {"a": 2, "b": 0}


def test_moves_that_are_never_taken_fail_a_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a campaign passes that has proved nothing."""
    quiet = Fate("mesh", 2, 0, ())
    monkeypatch.setattr(campaign, "random_fate", lambda _seed: quiet)
    done = run_seeds([0])
    assert not done.failures
    assert ("link", "pause", "Tailing", "Paused") in done.never_taken
    assert not Campaign(done.tally).passed
    everything = Tally()
    everything.moves.update(moves_of_the_tables())
    assert Campaign(everything).passed
    assert EXEMPT.keys() <= moves_of_the_tables()
    assert all(EXEMPT.values())
    sources = sum(len(row.sources) for row in LINK.rows)
    assert sum(move[0] == "link" for move in moves_of_the_tables()) == sources


def test_the_command_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails nobody can tell what a campaign has covered."""
    code = main(["--runs", "3", "--first", "10", "--processes", "1", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["runs"], said["failed"]) == (3, [])
    assert said["virtual_hours"] > 0
    assert sum(said["servers"].values()) >= 6
    assert 0 < said["peak_in_vain"]["flights"] < 100
    assert code == (1 if said["moves_never_taken"] else 0)


# Nothing spins (G12) -----------------------------------------------------------------------------


@pytest.mark.parametrize("delay_sec", [0.0, 0.02])
def test_what_asks_for_ever_is_told(delay_sec: float) -> None:
    """If this fails a worker that asks without a pause burns a core, and every test passes.

    Without a delay time stands still: no timer ever comes, and with it no timeout and no end.
    """
    ended_at: list[float] = []

    async def trace() -> None:
        loop = asyncio.get_running_loop()
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        for name in "ab":
            await mesh.start(name)
        await mesh.settle()
        transport = mesh.nodes["b"].transport
        transport.delay = lambda _name, _host: delay_sec
        connection = await transport.connect("redis://a", timeout_sec=5, name="busy")
        began = loop.time()
        try:
            while True:
                await connection.call("PING")
        finally:
            ended_at.append(loop.time() - began)

    with pytest.raises(BrokenPromiseError, match=r"^G12: b spins on a: .*The last was PING"):
        run(trace, start_ms=START_MS)
    assert ended_at[0] == 0 if delay_sec == 0 else ended_at[0] < 10


def _reads_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    take = StreamReader.take

    def takes_and_stays(self: StreamReader, connection: Connection, replies: list[Any]) -> Read:
        before = self.position
        read = take(self, connection, replies)
        if read.entries:
            self.position = before
        return read

    monkeypatch.setattr(StreamReader, "take", takes_and_stays)


def test_a_reader_that_reads_again_for_ever_fails_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a run of a campaign hangs, or passes, while a link reads the same for ever."""
    _reads_again_for_ever(monkeypatch)
    steps = (("wait", 3.0), ("put", "a", "k", b"x"), ("wait", 3.0))
    fate = Fate("mesh", 2, 0, steps, cold=False)
    monkeypatch.setattr(campaign, "random_fate", lambda _seed: fate)
    (failure,) = run_seeds([0]).failures
    assert re.match("BrokenPromiseError: G12: (a spins on b|b spins on a): ", failure.error)
    assert "XREAD" in failure.error


def test_what_gets_on_may_ask_as_often_as_it_likes() -> None:
    """If this fails a link that reads much is taken for one that spins, or the other way round."""
    now, told = 0.0, list[BrokenPromiseError]()
    pace = Pace(flights=10, flights_per_sec=2, commands=30, commands_per_sec=6)
    watch = SpinWatch("b", pace, now_sec=lambda: now, fail=told.append)
    read = [b"XREAD", b"STREAMS", b"cdc", b"0"]
    get = [b"MGET", b"item:k", b"fsm:tree"]
    line: Given = set()

    def entry(number: int) -> list[Any]:
        return [[b"cdc", [[b"%d-0" % number, [b"f", b"v"]]]]]

    for number in range(50):
        watch.sending("a", [read])
        watch.replied("a", read, entry(number), line)
        watch.sending("a", [get])
        watch.replied("a", get, [b"%d" % number, b""], line)
    for _ in range(50):
        # Slow enough.
        now += 0.5
        watch.sending("a", [read])
    now += 60
    another: Given = set()
    for number in range(50):
        # What it had before comes again, but over another line.
        watch.sending("a", [read])
        watch.replied("a", read, entry(number), another)
    now += 60
    assert not told
    assert max(watch.peak) <= 2
    in_vain: list[tuple[list[bytes], Any]] = [
        (read, entry(7)),  # It had that before.
        (read, None),
        (read, PeerReplyError("ERR no")),
        (get, [b"7", b"another node of the tree"]),
        (get, [None, None]),
        ([b"PING"], Status(b"PONG")),
    ]
    for number in range(10):
        watch.sending("a", [read])
        watch.replied("a", *in_vain[number % len(in_vain)], line)
        watch.sending("c", [read])
    assert not told
    watch.connecting("a")
    assert len(told) == 1
    assert "b spins on a: 111 flights with 110 commands in 145 s" in str(told[0])
    assert "The last was (connect); of the last 100 flights" in str(told[0])
    watch.sending("c", [read] * 100)
    assert len(told) == 1, "it is told once"


def test_entries_within_a_transaction_are_seen() -> None:
    """If this fails a link that reads in transactions is taken for one that spins."""

    async def trace() -> tuple[float, float]:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        node = mesh.nodes["b"]
        connection = await node.transport.connect("redis://a", timeout_sec=5, name="reader")
        stream = mesh.nodes["a"].store.keys.stream
        for number in range(300):
            mesh.servers["a"].execute("XADD", stream, f"{number + 1}-0", "f", "v")
            read = ("XREAD", "STREAMS", stream, number)
            await connection.pipeline([("MULTI",), ("PING",), read, ("EXEC",)])
            await connection.pipeline([("MULTI",), ("DISCARD",), ("MULTI",), ("EXEC",)])
        assert node.transport.watch is not None
        return node.transport.watch.peak

    flights, commands = run(trace, start_ms=START_MS)
    assert flights <= 10
    assert commands <= 20


# A crash at every await ------------------------------------------------------------------------


async def _scenario(kill_at: int | None) -> int:
    """Copy and tail a few changes; kill the reader in a turn of the loop; returns the turns."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    # Nothing that trees would heal may hide what the hot path has lost.
    settings = Settings(
        hot_path=HotPathConfig(block_timeout=BLOCK_SEC),
        cold_path=ColdPathConfig(enabled=False),
        tombstones=TombstonesConfig(ttl=TTL_SEC, grace=GRACE_SEC),
        startup=StartupConfig(when_no_peer="run"),
    )
    mesh = LocalMesh("ab", topology("mesh", "ab"), seed=7, settings=settings)
    a = mesh.nodes["a"].store
    for number in range(3):
        a.put(f"k{number}", b"%d" % number)
    await mesh.start("a")
    began = loop.turns
    killing: list[asyncio.Task[None]] = []
    if kill_at is not None:
        loop.at_turn(began + kill_at, lambda: killing.append(loop.create_task(mesh.kill("b"))))
    # Whoever waits for a start that was killed waits for ever, as it would for a dead process.
    first_life = asyncio.create_task(mesh.start("b"))
    await asyncio.sleep(0.2)
    a.put("k0", b"again")
    a.delete("k1")
    await asyncio.sleep(6)
    # While this is on its way to the store the cursors are flushed.
    mesh.nodes["b"].store.delay_sec = 6
    a.put("k3", b"late")
    await asyncio.sleep(7)
    mesh.nodes["b"].store.delay_sec = 0
    took = loop.turns - began
    for task in killing:
        await task
    assert first_life.done() or killing
    await mesh.start("b")
    await mesh.settle()
    held = [{k: (i.stamp, i.content) for k, i in one.items()} for one in mesh.holdings()]
    assert held[0] == held[1]
    assert {key: content for key, (_, content) in held[1].items()} == {
        "k0": b"again", "k1": b"", "k2": b"2", "k3": b"late",
    }  # fmt: skip
    events = mesh.events()
    assert events["a"] == 6
    assert events["b"] <= 6, "what is read again is not published again"
    await mesh.close()
    first_life.cancel()
    return took


def test_a_crash_at_every_await_loses_nothing() -> None:
    """If this fails there is a point between read, apply and cursor commit where a crash hurts."""
    turns = run(_scenario, None, start_ms=START_MS)
    assert turns > 200
    for turn in range(1, turns):
        run(_scenario, turn, start_ms=START_MS)
