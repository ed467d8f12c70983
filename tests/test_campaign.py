"""Simulated runs from seeds, and a crash tried at every await."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import msgspec
import pytest

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.items import SyncItem
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.tables import LINK
from fsm_replication.testing import campaign, fates
from fsm_replication.testing.campaign import Campaign, main, run_seeds
from fsm_replication.testing.fates import (
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
from fsm_replication.testing.sim_store import SimStore
from fsm_replication.testing.virtual_time import VirtualTimeLoop, run


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
        987,  # Without trees nobody gave a store again what it had lost with its last second.
        94,  # A node without items was emptied, and its peers waited for its marker for ever.
        1159,  # A link gave up just after its peer was mended.
        6950,  # A repair waited for a link to decide while its engine ended: KeyError.
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
    assert code == (1 if said["moves_never_taken"] else 0)


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
