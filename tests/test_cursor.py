"""The cursor store: what is on disk after whatever happened."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import until
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.cursor.schema import SCHEMA_VERSION
from fsm_replication.errors import AlreadyRunningError, CursorStoreError
from fsm_replication.ports import (
    BootstrapRow,
    Cursor,
    DeadLetter,
    GapRow,
    PeerRecord,
    Position,
    StreamId,
)


def cursor(ms: int, read: int | None = 1, incarnation: str = "i") -> Cursor:
    """Return a cursor."""
    return Cursor(Position(StreamId(ms, 0), read), incarnation)


def letter(number: int, peer_id: str = "a") -> DeadLetter:
    """Return a dead letter."""
    return DeadLetter(peer_id, f"{number}-0", "hash", "detail", "key", (b"op", b"\xff"), 9, 5)


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteCursorStore]:
    """An open store in a file."""
    made = SqliteCursorStore(str(tmp_path / "c.db"))
    await made.open()
    yield made
    await made.close()


async def test_an_unknown_peer_has_an_empty_record(store: SqliteCursorStore) -> None:
    """If this fails a new peer is taken for a known one."""
    assert await store.load("a") == PeerRecord()


async def test_everything_lasts_over_a_restart(store: SqliteCursorStore) -> None:
    """If this fails the engine forgets what it knew."""
    gap = GapRow("a", 7, None, "trimmed")
    await store.save([("a", cursor(5, None)), ("b", cursor(6))])
    await store.settle("a", cursor(8), [letter(7)], keep=10)
    await store.begin_bootstrap("a", BootstrapRow(Position(StreamId(9, 1), 4), "", "i", "why"), gap)
    await store.save_walk("a", "half-way")
    await store.set_operator_pause("a", True)
    await store.close()
    await store.open()
    record = await store.load("a")
    assert record.cursor == cursor(8)
    assert record.bootstrap == BootstrapRow(Position(StreamId(9, 1), 4), "half-way", "i", "why")
    assert (record.operator_pause, record.dead_letters) == (True, 1)
    assert [found.reason for found in record.gaps] == ["trimmed"]
    await store.finish_bootstrap("a", cursor(20), 99)
    record = await store.load("a")
    assert (record.cursor, record.bootstrap, record.gaps) == (cursor(20), None, ())
    (healed,) = await store.gaps("a")
    assert (healed.healed_at_ms, healed.healed_by) == (99, "bootstrap")
    assert (await store.load("b")).cursor == cursor(6)


@given(
    peer_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    ms=st.integers(0, 2**64 - 1),
    seq=st.integers(0, 2**64 - 1),
    fields=st.lists(st.binary(max_size=20), max_size=6),
)
def test_any_id_and_any_bytes_come_back(
    peer_id: str, ms: int, seq: int, fields: list[bytes]
) -> None:
    """If this fails some id, name or field is stored as something else."""

    async def scenario() -> None:
        store = SqliteCursorStore(":memory:")
        await store.open()
        at = Cursor(Position(StreamId(ms, seq), None), "i")
        kept = DeadLetter(peer_id, f"{ms}-{seq}", "r", "d", None, tuple(fields), 0, 0)
        await store.settle(peer_id, at, [kept], keep=5)
        assert (await store.load(peer_id)).cursor == at
        (found,) = await store.dead_letters(peer_id)
        assert found.fields == tuple(fields)
        await store.close()

    asyncio.run(scenario())


async def test_reading_an_entry_again_makes_no_second_letter(store: SqliteCursorStore) -> None:
    """If this fails dead letters multiply with every restart."""
    for _ in range(3):
        await store.settle("a", cursor(1), [letter(1), letter(2)], keep=10)
    assert len(await store.dead_letters()) == 2


async def test_letters_are_bounded_listed_and_removed(store: SqliteCursorStore) -> None:
    """If this fails dead letters grow without bound, or one peer's push out another's."""
    await store.settle("b", None, [letter(1, "b")], keep=3)
    dropped = await store.settle("a", None, [letter(number) for number in range(5)], keep=3)
    assert dropped == 2
    kept = await store.dead_letters("a")
    assert [found.stream_id for found in kept] == ["2-0", "3-0", "4-0"]
    assert len(await store.dead_letters(limit=2)) == 2
    after = await store.dead_letters("a", after_id=kept[0].id)
    assert [found.id for found in after] == [found.id for found in kept[1:]]
    assert await store.delete_dead_letters([kept[0].id, 999]) == 1
    assert len(await store.dead_letters()) == 3


async def test_a_second_engine_is_refused(store: SqliteCursorStore, tmp_path: Path) -> None:
    """If this fails two engines move the same cursors, in one process or two."""
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "c.db")
    for path in (tmp_path / "c.db", link):
        with pytest.raises(AlreadyRunningError, match=str(os.getpid())):
            await SqliteCursorStore(str(path)).open()
    code = (
        "import asyncio, sys\n"
        "from fsm_replication.cursor import SqliteCursorStore\n"
        "asyncio.run(SqliteCursorStore(sys.argv[1]).open())"
    )
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, str(tmp_path / "c.db")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "AlreadyRunningError" in ended.stderr
    await store.close()
    again = SqliteCursorStore(str(tmp_path / "c.db"))
    await again.open()
    await again.close()


async def test_it_can_be_read_beside_a_running_engine(
    store: SqliteCursorStore, tmp_path: Path
) -> None:
    """If this fails nobody can look at the dead letters of a node that runs."""
    await store.settle("a", cursor(1), [letter(1)], keep=10)
    reader = SqliteCursorStore(str(tmp_path / "c.db"), read_only=True)
    await reader.open()
    assert len(await reader.dead_letters()) == 1
    with pytest.raises(CursorStoreError):
        await reader.set_operator_pause("a", True)
    await reader.close()
    await store.set_operator_pause("a", True)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.mkdir(), "it is a directory"),
        (lambda path: path.write_bytes(b"x" * 5000), "not a database"),
        (lambda path: _database(path, "PRAGMA application_id = 7"), "another application"),
        (lambda path: _database(path, "CREATE TABLE t (x)"), "another application"),
        (
            lambda path: _database(
                path,
                "PRAGMA application_id = 1179864402",
                f"PRAGMA user_version = {SCHEMA_VERSION + 1}",
            ),
            "upgrade",
        ),
    ],
)
async def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, make: object, told: str) -> None:
    """If this fails the error does not say which file, or what is wrong with it."""
    path = tmp_path / "c.db"
    make(path)  # type: ignore[operator]
    threads = threading.active_count()
    with pytest.raises(CursorStoreError, match=told) as raised:
        await SqliteCursorStore(str(path)).open()
    assert str(path) in str(raised.value)
    assert not raised.value.may_pass
    await until(lambda: threading.active_count() <= threads, "the thread ended")


def _database(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """If this fails a mistyped path is created, or ends in an error of SQLite."""
    with pytest.raises(CursorStoreError, match="create it"):
        await SqliteCursorStore(str(tmp_path / "no" / "c.db")).open()
    assert not (tmp_path / "no").exists()


async def test_locked_is_waited_for_and_may_pass(store: SqliteCursorStore, tmp_path: Path) -> None:
    """If this fails somebody who looks into the file with sqlite3 stops the engine."""
    other = sqlite3.connect(tmp_path / "c.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(store.set_operator_pause("a", True))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    other.execute("ROLLBACK")
    await waiting
    assert (await store.load("a")).operator_pause
    other.execute("BEGIN IMMEDIATE")
    store._file._timeout_sec = 0.2
    with pytest.raises(CursorStoreError) as raised:
        await store.save([("a", cursor(1))])
    assert raised.value.may_pass
    other.execute("ROLLBACK")
    other.close()
    store._file._timeout_sec = 5.0
    await store.save([("a", cursor(2))])
    assert (await store.load("a")).cursor == cursor(2)


async def test_a_full_disk_passes(store: SqliteCursorStore) -> None:
    """If this fails a full disk ends the engine, or leaves a transaction open."""
    connection = store._file._connection
    assert connection is not None
    (pages,) = next(iter(await connection.execute_fetchall("PRAGMA page_count")))
    await connection.execute_fetchall(f"PRAGMA max_page_count = {pages}")
    many = [letter(number) for number in range(2000)]
    with pytest.raises(CursorStoreError, match="free some space") as raised:
        await store.settle("a", cursor(9), many, keep=5000)
    assert raised.value.may_pass
    assert (await store.load("a")).cursor is None
    await connection.execute_fetchall("PRAGMA max_page_count = 1000000")
    await store.settle("a", cursor(9), many, keep=5000)
    assert (await store.load("a")).dead_letters == 2000


async def test_a_file_removed_in_use_is_noticed(store: SqliteCursorStore, tmp_path: Path) -> None:
    """If this fails cursors are written into a file that nobody will ever find."""
    (tmp_path / "c.db").unlink()
    with pytest.raises(CursorStoreError, match="removed or replaced") as raised:
        await store.save([("a", cursor(1))])
    assert not raised.value.may_pass


async def test_a_cancelled_call_leaves_all_or_nothing(store: SqliteCursorStore) -> None:
    """If this fails cancelling a call leaves half of it, or blocks the next one."""
    for number in range(1, 60):
        task = asyncio.create_task(store.settle("a", cursor(number), [letter(number)], keep=1000))
        for _ in range(number % 7):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        # A call that was begun is finished by the store; the next one waits for it.
        record = await store.load("a")
        ids = {found.stream_id for found in await store.dead_letters("a")}
        newest = 0 if record.cursor is None else record.cursor.position.stream_id.ms
        assert (f"{number}-0" in ids) == (newest == number)


async def test_closing_twice_and_after_a_failed_open_is_harmless(tmp_path: Path) -> None:
    """If this fails cleaning up raises, or leaks the thread or the lock."""
    threads = threading.active_count()
    store = SqliteCursorStore(str(tmp_path / "c.db"))
    await store.close()
    await store.open()
    await store.close()
    await store.close()
    with pytest.raises(CursorStoreError, match="not open"):
        await store.set_operator_pause("a", True)
    await until(lambda: threading.active_count() <= threads, "the thread ended")


WRITER = """
import asyncio, sys
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.ports import Cursor, DeadLetter, Position, StreamId

async def main():
    store = SqliteCursorStore(sys.argv[1])
    await store.open()
    record = await store.load("a")
    number = 0 if record.cursor is None else record.cursor.position.stream_id.ms
    while True:
        number += 1
        cursor = Cursor(Position(StreamId(number, 0), number), "i")
        letter = DeadLetter("a", f"{number}-0", "r", "d", None, None, 0, 0)
        await store.settle("a", cursor, [letter], keep=10**6)
        print(number, flush=True)

asyncio.run(main())
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, full: bool) -> None:
    """If this fails a killed process loses cursors or letters, or blocks its successor."""
    path = tmp_path / "c.db"
    for _ in range(40 if full else 4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        acknowledged = int(lines[-1]) if lines else acknowledged
        with sqlite3.connect(path) as connection:
            (row,) = connection.execute("SELECT stream_id FROM peers")
            (letters,) = connection.execute("SELECT count(*) FROM dead_letters").fetchone()
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        on_disk = StreamId.parse(row[0]).ms
        assert on_disk >= acknowledged
        assert letters == on_disk, "the cursor and the letters it passes are one transaction"
