"""Every fault of a peer, under load: the links come back by themselves and nothing is lost.

The times are those of the quick settings of the suite; ``docs/faults.md`` has the table.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import until

from fsm_replication.items import Stamp, SyncItem, content_hash
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine
from fsm_replication.testing.fault_books import Books, Rounds, Writer
from fsm_replication.testing.fault_suite import FAULTS, Fault, FaultResult, run_fault

pytestmark = pytest.mark.usefixtures("no_tasks_left")

CHANGES_PER_SEC_MIN = 500
# A run without the load proves nothing about it, and is made again.
ATTEMPTS = 3


async def run_and_check(fault: Fault, *, longer_sec: float = 0.0, seed: int = 0) -> None:
    """Fail unless a fault does what it should and nothing else."""
    for _ in range(ATTEMPTS):
        result = await run_fault(fault, longer_sec=longer_sec, seed=seed)
        check(result, fault)
        if result.changes_per_sec >= CHANGES_PER_SEC_MIN:
            return
    pytest.fail(f"this machine is too busy to write {CHANGES_PER_SEC_MIN} changes/s")


def check(result: FaultResult, fault: Fault) -> None:
    """Fail unless a fault did what it should and nothing else."""
    assert result.problem == ""
    assert result.lost == 0
    assert result.tailing_sec is not None
    assert (result.noticed_sec is not None) == fault.drops
    assert result.read_again is None or result.read_again >= 0
    assert fault.forgets or result.gone == 0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.server
async def test_a_link_comes_back_and_nothing_is_lost(fault: Fault, full: bool) -> None:
    """If this fails a node must be restarted after this fault, or changes are missing for good."""
    await run_and_check(fault)
    if full:
        for seed in range(1, 4):
            longer_sec = random.Random(seed).uniform(0, 10)
            await run_and_check(fault, longer_sec=longer_sec, seed=seed)


@pytest.mark.server
async def test_a_fault_that_is_not_mended_is_told() -> None:
    """If this fails the suite says that all is well when a link never comes back."""
    fault = next(fault for fault in FAULTS if fault.name == "behind a dead port")

    async def nothing(_site: object) -> None:
        """Mend nothing."""

    broken = Fault(fault.name, fault.begin, nothing, wait_sec=1.0)
    result = await run_fault(broken)
    assert result.tailing_sec is None
    assert result.lost > 0
    assert not result.well
    assert "does not tail again" in result.problem


def stamped(key: str, at: int) -> SyncItem:
    """Return an item with a time."""
    return SyncItem(key, b"x", "binary", content_hash(b"x"), 1, at, False, "a")


async def test_the_books_find_what_is_missing() -> None:
    """If this fails the suite cannot see a loss."""
    books = Books()
    books.note("a", [stamped("k", 5), stamped("k", 7), stamped("gone", 9)])
    held: dict[str, Stamp | None] = {"k": stamped("k", 7).stamp, "gone": None}
    newer: dict[str, Stamp | None] = {"k": stamped("k", 8).stamp, "gone": stamped("x", 9).stamp}
    older: dict[str, Stamp | None] = {"k": stamped("k", 6).stamp, "gone": stamped("x", 9).stamp}
    assert books.losses({"b": newer}) == []
    assert [(loss.write.key, loss.held) for loss in books.losses({"b": held})] == [("gone", None)]
    (loss,) = books.losses({"b": newer, "c": older})
    assert (loss.missing_at, loss.write.stamp.updated_at) == ("c", 7)
    assert books.losses({"b": held}, lambda write: write.key == "gone") == []
    now = asyncio.get_running_loop().time()
    assert books.count(0, now + 1) == 3
    assert books.count(now + 1, now + 2) == 0


async def test_commands_without_progress_are_counted() -> None:
    """If this fails the suite takes a link that spins for one that waits, or the other way."""
    got_on, busy = 0, True
    rounds = Rounds(lambda: got_on)
    counting = asyncio.create_task(rounds.run())

    async def ask() -> None:
        nonlocal got_on
        while True:
            for _ in range(10):
                rounds.note([b"XREAD"])
            got_on += busy
            await asyncio.sleep(0.01)

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0.5)
    assert rounds.most <= 200
    busy = False
    await until(lambda: rounds.most > 300)
    for task in (asking, counting):
        task.cancel()
    await asyncio.wait((asking, counting))


async def test_the_writer_keeps_its_rate_and_its_books(redis_server: RedisServer) -> None:
    """If this fails the faults are not under load, or the books say what is not there."""
    books = Books()
    async with RedisSyncEngine(redis_server.url, node_id="a") as store:
        writer = Writer("a", store, books, rate_per_sec=600, rng=random.Random(1))
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            began = loop.time()
            group.create_task(writer.run())
            await until(lambda: len(books.writes) >= 600)
            took = loop.time() - began
            writer.stop()
        assert 600 / took >= CHANGES_PER_SEC_MIN
        assert any(write.stamp.deleted for write in books.writes)
        holdings = await books.holdings({"a": store})
        assert books.losses(holdings) == []
        live = {write.key for write in books.writes if not write.stamp.deleted}
        assert len(live) > 300


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the suite's command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fsm_replication.testing.faults", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )


@pytest.mark.server
def test_the_command_prints_the_table() -> None:
    """If this fails the table of the docs cannot be made again."""
    ended = run_command("dead port", "--json")
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    assert [(result["fault"], result["lost"]) for result in results] == [("behind a dead port", 0)]
    ended = run_command("no such thing")
    assert ended.returncode == 2
    assert "frozen (SIGSTOP)" in ended.stderr


def test_the_table_of_the_docs_has_every_fault() -> None:
    """If this fails the docs tell of other faults than the suite runs."""
    text = (Path(__file__).parent.parent / "docs" / "faults.md").read_text(encoding="utf-8")
    table = text[text.index("| fault |") : text.index("*Noticed*")]
    rows = [line.split("|") for line in table.splitlines()[2:] if line]
    assert [row[1].strip() for row in rows] == [fault.name for fault in FAULTS]
    assert {row[5].strip() for row in rows} == {"0"}
