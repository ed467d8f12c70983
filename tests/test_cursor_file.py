"""The cursor store: real files, real locks, real kills."""

# Tests look at files while nothing else runs in their loop.
# ruff: noqa: ASYNC240

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import fsm_replication
from fsm_replication.cursor import SqliteCursorStore, schema
from fsm_replication.cursor import file as file_module
from fsm_replication.cursor import store as store_module
from fsm_replication.cursor.schema import SCHEMA_VERSION
from fsm_replication.cursor.store import GAPS_KEPT
from fsm_replication.errors import AlreadyRunningError, CursorStoreError
from fsm_replication.ports import (
    Agreement,
    BootstrapRow,
    Cursor,
    CursorStore,
    DeadLetter,
    GapRow,
    PeerRecord,
    Position,
    StreamId,
    SystemClock,
    dropped_letters,
)

ROOT = Path(fsm_replication.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
NOBODY = 65534
INTEGER_MAX = 2**63 - 1

texts = st.text(st.characters(exclude_categories=()), max_size=20)
stream_ids = st.builds(
    StreamId, st.integers(min_value=0, max_value=2**64 - 1), st.integers(0, 2**64 - 1)
)
counts = st.none() | st.integers(min_value=0, max_value=INTEGER_MAX)
positions = st.builds(Position, stream_ids, counts)
cursors = st.builds(Cursor, positions, texts)
fields = st.none() | st.lists(st.binary(max_size=30), max_size=6).map(tuple)


def at(number: int, incarnation: str = "store") -> Cursor:
    """Return a cursor at entry ``number``."""
    return Cursor(Position(StreamId(number, 0), number), incarnation)


def letter(number: int, peer_id: str = "b", detail: str = "") -> DeadLetter:
    """Return a letter about entry ``number``."""
    return DeadLetter(peer_id, f"{number}-0", "op", detail, "key", (b"op", b"?"), 3, 1_000)


def gap(number: int, peer_id: str = "b") -> GapRow:
    """Return an open gap found at ``number`` ms."""
    return GapRow(peer_id, number, 5, "trimmed")


def begun(number: int = 1) -> BootstrapRow:
    """Return a copy that has just begun."""
    return BootstrapRow(at(number).position, "", "store", "no cursor")


def handles() -> set[str]:
    """Return what the open file handles of this process point to."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()))
    return found


def assert_nothing_left(directory: Path) -> None:
    """Check that no thread of ours and no handle into ``directory`` is left."""
    ours = [thread for thread in threading.enumerate() if "connection_worker" in thread.name]
    assert ours == []
    assert [name for name in handles() if name.startswith(str(directory))] == []


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A file that does not exist yet; what a test leaves open there fails it."""
    yield str(tmp_path / "cursors.db")
    assert_nothing_left(tmp_path)


@contextlib.asynccontextmanager
async def opened(path: str, **options: Any) -> Any:
    """An open store."""
    store = SqliteCursorStore(path, **options)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def without_privileges() -> Iterator[Path]:
    """A directory of a user to whom file modes apply, which they do not to root."""
    directory = Path(tempfile.mkdtemp(prefix="cursors-"))
    was = os.geteuid()
    try:
        if was == 0:
            os.chown(directory, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield directory
    finally:
        os.seteuid(was)
        directory.chmod(0o700)
        shutil.rmtree(directory)


# Every method -----------------------------------------------------------------------------------


async def test_unknown_peer_is_empty(path: str) -> None:
    """A new peer would be taken for a known one, or loading it would fail."""
    async with opened(path) as store:
        assert await store.load("b") == PeerRecord()


async def test_cursors_survive_reopening(path: str) -> None:
    """Cursors of a flush would be gone after a restart."""
    saved = {f"peer-{n}": at(n) for n in range(1_000)}
    async with opened(path) as store:
        await store.save(list(saved.items()))
        await store.save([])
    async with opened(path) as store:
        for peer_id in ("peer-0", "peer-1", "peer-999"):
            assert (await store.load(peer_id)).cursor == saved[peer_id]


@pytest.mark.parametrize("wal_mode", [True, False])
async def test_settle_stores_letters_and_cursor(path: str, wal_mode: bool) -> None:
    """An entry would be passed without its letter, or be listed twice when it is read again."""
    async with opened(path, wal_mode=wal_mode) as store:
        assert await store.settle("b", at(2), [letter(1), letter(2)], keep=10) == 0
        first = await store.dead_letters("b")
        assert await store.settle("b", at(2), [letter(2, detail="again"), letter(3)], keep=10) == 0
        record = await store.load("b")
        assert (record.cursor, record.dead_letters) == (at(2), 3)
        letters = await store.dead_letters()
        assert [found.stream_id for found in letters] == ["1-0", "2-0", "3-0"]
        assert [found.id for found in letters[:2]] == [found.id for found in first]
        assert letters[1].detail == "again"
        await store.settle("b", None, [letter(4)], keep=10)
        assert (await store.load("b")).cursor == at(2)


async def test_settle_keeps_the_newest(path: str) -> None:
    """Dead letters would grow without end, or one peer's would push out another's."""
    async with opened(path) as store:
        await store.settle("c", None, [letter(1, "c")], keep=1)
        assert await store.settle("b", None, [letter(n) for n in range(1, 8)], keep=5) == 2
        assert (await store.dead_letters("b"))[0].stream_id == "3-0"
        assert await store.settle("b", None, [], keep=2) == 3
        assert await store.settle("b", None, [letter(9)], keep=0) == 3
        assert [each.peer_id for each in await store.dead_letters()] == ["c"]


async def test_letters_of_another_peer_are_a_bug(path: str) -> None:
    """Letters under another peer's name would escape the bound of both."""
    async with opened(path) as store:
        with pytest.raises(ValueError, match="other peers"):
            await store.settle("b", at(1), [letter(1, "c")], keep=5)
        assert await store.load("b") == PeerRecord()


async def test_letters_are_paged_and_removed(path: str) -> None:
    """An operator could not page through letters, or would remove others than he named."""
    async with opened(path) as store:
        await store.settle("b", None, [letter(n) for n in range(1, 6)], keep=10)
        page = await store.dead_letters("b", limit=2)
        rest = await store.dead_letters("b", after_id=page[-1].id)
        assert [each.stream_id for each in (*page, *rest)] == [f"{n}-0" for n in range(1, 6)]
        assert await store.dead_letters(limit=-1) == []
        assert await store.dead_letters(after_id=2**70) == []
        assert len(await store.dead_letters(limit=2**70)) == 5
        ids = [page[0].id, page[0].id, page[1].id, 99, 2**70, -1]
        assert await store.delete_dead_letters(ids) == 2
        assert await store.delete_dead_letters([]) == 0
        # An id is never given twice, or a late "delete" would hit a newer letter.
        await store.delete_dead_letters([each.id for each in rest])
        await store.settle("b", None, [letter(9)], keep=10)
        assert (await store.dead_letters())[0].id > rest[-1].id


async def test_bootstrap_from_beginning_to_end(path: str) -> None:
    """A copy cut by a restart would begin anew or be forgotten, or its gap stay open for ever."""
    async with opened(path) as store:
        await store.save_walk("b", "nothing was begun")
        await store.begin_bootstrap("b", begun(7), gap(100))
        await store.begin_bootstrap("c", begun(8), None)
        await store.save_walk("b", "half")
    async with opened(path) as store:
        record = await store.load("b")
        assert record.bootstrap == begun(7)._replace(walk="half")
        assert record.cursor is None
        assert [(each.found_at_ms, each.healed_at_ms) for each in record.gaps] == [(100, None)]
        await store.finish_bootstrap("b", at(7), 200)
        record = await store.load("b")
        assert (record.cursor, record.bootstrap, record.gaps) == (at(7), None, ())
        assert (await store.load("c")).bootstrap == begun(8)
        (line,) = await store.gaps()
        assert (line.healed_at_ms, line.healed_by, line.missed) == (200, "bootstrap", 5)


async def test_a_copy_of_nothing_heals_nothing(path: str) -> None:
    """A gap would be called healed although nothing was copied."""
    async with opened(path) as store:
        await store.begin_bootstrap("b", begun(7), gap(100))
        await store.finish_bootstrap("b", at(7), None)
        record = await store.load("b")
        assert (record.cursor, record.bootstrap) == (at(7), None)
        assert [line.healed_at_ms for line in record.gaps] == [None]


async def test_wishes_survive_and_do_not_touch_the_cursor(path: str) -> None:
    """A peer the operator has paused would run again after a restart, or lose its cursor."""
    async with opened(path) as store:
        await store.set_operator_pause("b", True)
        await store.save([("b", at(3))])
    async with opened(path) as store:
        expected = PeerRecord(cursor=at(3), operator_pause=True)
        assert await store.load("b") == expected
        await store.set_operator_pause("b", False)
        assert (await store.load("b")).operator_pause is False


async def test_ledger_keeps_the_newest(path: str) -> None:
    """The loss ledger would grow without end, or list the wrong end of itself."""
    async with opened(path) as store:
        await store.begin_bootstrap("c", begun(), gap(1, "c"))
        await store.begin_bootstrap("b", begun(), gap(0))
        filler = [("b", n, "r", "") for n in range(1, GAPS_KEPT + 3)]
        await store._file.run(
            lambda db: db.executemany(
                "INSERT INTO gaps (peer_id, found_at_ms, reason, healed_by) VALUES (?, ?, ?, ?)",
                filler,
            )
        )
        await store.begin_bootstrap("b", begun(), gap(GAPS_KEPT + 3))
        lines = await store.gaps("b", limit=GAPS_KEPT * 2)
        assert [line.found_at_ms for line in lines] == list(range(4, GAPS_KEPT + 4))
        assert [line.found_at_ms for line in await store.gaps("b", limit=2)] == [
            GAPS_KEPT + 2,
            GAPS_KEPT + 3,
        ]
        assert len(await store.gaps("c")) == 1


async def test_is_the_port(path: str) -> None:
    """The engine could not be given this store."""
    port: CursorStore = SqliteCursorStore(path)
    assert "closed" in repr(port)
    with pytest.raises(CursorStoreError, match="not open"):
        await port.load("b")


async def test_memory_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of users would leave files, or two stores in memory would meet."""
    monkeypatch.chdir(tmp_path)
    async with opened(":memory:") as one, opened(":memory:") as other:
        await one.save([("b", at(1))])
        assert (await one.load("b")).cursor == at(1)
        assert (await other.load("b")).cursor is None
    assert list(tmp_path.iterdir()) == []


async def test_reading_beside_a_running_engine(path: str) -> None:
    """Dead letters could not be listed while a node runs, or listing would disturb it."""
    await denied(path, "no such file", read_only=True)
    async with opened(path) as store:
        await store.settle("b", at(1), [letter(1)], keep=5)
        async with opened(path, read_only=True) as reader:
            assert len(await reader.dead_letters()) == 1
            with pytest.raises(CursorStoreError, match="readonly"):
                await reader.save([("b", at(2))])
            await store.save([("b", at(3))])
            assert (await reader.load("b")).cursor == at(3)
    async with opened(path, read_only=True) as reader:
        assert (await reader.load("b")).cursor == at(3)


async def test_closing_empties_the_log(path: str) -> None:
    """A copy of the file alone would miss what was written last."""
    async with opened(path) as store, opened(path, read_only=True):
        await store.save([("b", at(1))])
        log = Path(f"{path}-wal")
        assert log.stat().st_size > 0
        await store.close()
        assert log.stat().st_size == 0


async def test_opening_is_fast(path: str) -> None:
    """A start would wait for the cursor store."""
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        async with opened(path):
            took.append(time.perf_counter() - begin)
    assert min(took) < 0.05


@pytest.mark.parametrize("wal_mode", [True, False])
async def test_every_transaction_reaches_the_disk(path: str, wal_mode: bool) -> None:
    """A loss of power could set cursors back by an hour, and forget an operator's wish."""
    async with opened(path, wal_mode=wal_mode) as store:
        asked = await store._file.run(
            lambda db: [
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous")
            ],
            "",
        )
    assert asked == ["wal" if wal_mode else "delete", 2]


# Any value --------------------------------------------------------------------------------------


def in_memory(work: Callable[[SqliteCursorStore], Awaitable[None]]) -> None:
    """Run ``work`` on a store in memory."""

    async def run() -> None:
        async with opened(":memory:") as store:
            await work(store)

    asyncio.run(run())


@given(peer_id=texts, cursor=cursors, letters=st.lists(st.tuples(*[texts] * 4, fields), max_size=5))
@settings(max_examples=80, deadline=None)
def test_any_letter_comes_back(
    peer_id: str, cursor: Cursor, letters: list[tuple[str, str, str, str, Any]]
) -> None:
    """A peer could make the store fail, or change an entry, by what it sends."""
    sent = {
        stream_id: DeadLetter(peer_id, stream_id, reason, detail, key, raw, 7, 9)
        for stream_id, reason, detail, key, raw in letters
    }

    async def work(store: SqliteCursorStore) -> None:
        await store.settle(peer_id, cursor, list(sent.values()), keep=100)
        found = await store.dead_letters(peer_id)
        plain = [
            DeadLetter(
                each.peer_id,
                each.stream_id,
                each.reason,
                each.detail,
                each.key,
                each.fields,
                each.size,
                each.at_ms,
            )
            for each in found
        ]
        assert plain == list(sent.values())
        record = await store.load(peer_id)
        assert (record.cursor, record.dead_letters) == (cursor, len(sent))

    in_memory(work)


@given(peer_id=texts, head=positions, walk=texts, reason=texts, missed=counts, end=cursors)
@settings(max_examples=50, deadline=None)
def test_any_bootstrap_comes_back(
    *, peer_id: str, head: Position, walk: str, reason: str, missed: int | None, end: Cursor
) -> None:
    """A copy would go on from another place than it had reached."""

    async def work(store: SqliteCursorStore) -> None:
        row = BootstrapRow(head, "", reason, reason)
        await store.begin_bootstrap(peer_id, row, GapRow(peer_id, 5, missed, reason))
        await store.save_walk(peer_id, walk)
        record = await store.load(peer_id)
        assert record.bootstrap == row._replace(walk=walk)
        assert record.gaps == (GapRow(peer_id, 5, missed, reason, id=record.gaps[0].id),)
        await store.finish_bootstrap(peer_id, end, 6)
        assert await store.load(peer_id) == PeerRecord(cursor=end)

    in_memory(work)


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, -(2**63) - 1, 10**30])
async def test_absurd_counts_are_not_known(path: str, claimed: int) -> None:
    """A peer that claims an absurd count would stop the flush of all cursors."""
    async with opened(path) as store:
        await store.save([("b", Cursor(Position(StreamId(1, 1), claimed), "i")), ("c", at(2))])
        row = BootstrapRow(Position(StreamId(1, 1), claimed), "", "i", "r")
        await store.begin_bootstrap("d", row, GapRow("d", 1, claimed, "r"))
        assert (await store.load("b")).cursor == Cursor(Position(StreamId(1, 1), None), "i")
        assert (await store.load("c")).cursor == at(2)
        assert (await store.gaps("d"))[0].missed is None


class Model(RuleBasedStateMachine):
    """The store against plain dictionaries, over restarts."""

    peers = st.sampled_from(["a", "b", "\0", "\ud800"])
    numbers = st.integers(1, 8)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.mkdtemp(prefix="cursors-")
        self.store = SqliteCursorStore(str(Path(self.directory, "c.db")))
        self.run(self.store.open())
        self.records: dict[str, dict[str, Any]] = {}
        self.letters: dict[str, list[tuple[str, str]]] = {}
        self.ledger: list[GapRow] = []

    def run(self, work: Any) -> Any:
        """Wait for one call."""
        return self.runner.run(work)

    def known(self, peer_id: str) -> dict[str, Any]:
        """Return the fields of a peer's record that differ from the default."""
        return self.records.setdefault(peer_id, {})

    @rule(cursors=st.dictionaries(peers, numbers.map(at), max_size=4))
    def save(self, cursors: dict[str, Cursor]) -> None:
        """Flush."""
        self.run(self.store.save(list(cursors.items())))
        for peer_id, cursor in cursors.items():
            self.known(peer_id)["cursor"] = cursor

    @rule(
        peer_id=peers,
        number=st.none() | numbers,
        sent=st.lists(st.tuples(numbers, texts), max_size=4),
        keep=st.integers(0, 5),
    )
    def settle(
        self, peer_id: str, number: int | None, sent: list[tuple[int, str]], keep: int
    ) -> None:
        """Settle a batch with dead letters."""
        rows = [letter(each, peer_id, detail) for each, detail in sent]
        cursor = None if number is None else at(number)
        dropped = self.run(self.store.settle(peer_id, cursor, rows, keep=keep))
        held = dict(self.letters.get(peer_id, []))
        held.update({row.stream_id: row.detail for row in rows})
        assert dropped == max(0, len(held) - keep)
        self.letters[peer_id] = list(held.items())[dropped:]
        self.drop(peer_id, max((row.at_ms for row in rows), default=0), dropped)
        if cursor is not None:
            self.known(peer_id)["cursor"] = cursor

    def drop(self, peer_id: str, at_ms: int, count: int) -> None:
        """Count dropped letters in the open line of them, or in a new one."""
        for place, line in enumerate(self.ledger):
            if (line.peer_id, line.kind, line.healed_at_ms) == (peer_id, "dropped", None) and count:
                self.ledger[place] = replace(line, missed=(line.missed or 0) + count)
                return
        if count:
            self.ledger.append(dropped_letters(peer_id, at_ms, count))

    @rule(peer_id=peers, number=numbers, with_gap=st.booleans())
    def begin(self, peer_id: str, number: int, with_gap: bool) -> None:
        """Begin a copy."""
        found = gap(number, peer_id) if with_gap else None
        self.run(self.store.begin_bootstrap(peer_id, begun(number), found))
        self.known(peer_id)["bootstrap"] = begun(number)
        if found:
            self.ledger.append(found)

    @rule(peer_id=peers, walk=texts)
    def walk(self, peer_id: str, walk: str) -> None:
        """Go on with a copy."""
        self.run(self.store.save_walk(peer_id, walk))
        if row := self.known(peer_id).get("bootstrap"):
            self.known(peer_id)["bootstrap"] = row._replace(walk=walk)

    @rule(peer_id=peers, number=numbers)
    def finish(self, peer_id: str, number: int) -> None:
        """End a copy."""
        self.run(self.store.finish_bootstrap(peer_id, at(number), number))
        self.known(peer_id).pop("bootstrap", None)
        self.known(peer_id)["cursor"] = at(number)
        self.ledger = [
            replace(line, healed_at_ms=number, healed_by="bootstrap")
            if line.peer_id == peer_id and line.healed_at_ms is None
            else line
            for line in self.ledger
        ]

    @rule(peer_id=peers, paused=st.booleans())
    def pause(self, peer_id: str, paused: bool) -> None:
        """Note a lasting wish."""
        self.run(self.store.set_operator_pause(peer_id, paused))
        self.known(peer_id)["operator_pause"] = paused

    @rule(pick=st.integers(0, 20))
    def delete(self, pick: int) -> None:
        """Remove one letter."""
        found = self.run(self.store.dead_letters())
        if found:
            chosen = found[pick % len(found)]
            assert self.run(self.store.delete_dead_letters([chosen.id])) == 1
            self.letters[chosen.peer_id].remove((chosen.stream_id, chosen.detail))

    @rule(done=st.sets(st.integers(0, 9)), bad=st.sets(st.integers(0, 9)), detail=texts)
    def retry(self, done: set[int], bad: set[int], detail: str) -> None:
        """Remove some letters, and change what is told of others, maybe of the same."""
        found = self.run(self.store.dead_letters())
        gone = [one for place, one in enumerate(found) if place in done]
        changed = [
            replace(one, detail=detail, fields=None)
            for place, one in enumerate(found)
            if place in bad
        ]
        self.run(self.store.settle_retry([one.id for one in gone], changed))
        for one in found:
            held = self.letters[one.peer_id]
            place = held.index((one.stream_id, one.detail))
            if one in gone:
                del held[place]
            elif any(each.id == one.id for each in changed):
                held[place] = (one.stream_id, detail)

    @rule(peer_id=st.none() | peers)
    def purge(self, peer_id: str | None) -> None:
        """Remove all letters, or those of one peer."""
        names = list(self.letters) if peer_id is None else [peer_id]
        count = sum(len(self.letters.pop(name, ())) for name in names)
        assert self.run(self.store.purge_dead_letters(peer_id)) == count

    @rule()
    def restart(self) -> None:
        """Close and open."""
        self.run(self.store.close())
        self.run(self.store.open())

    @invariant()
    def agrees(self) -> None:
        """Compare everything that can be asked."""
        for peer_id in ("a", "b", "\0", "\ud800"):
            record = self.run(self.store.load(peer_id))
            held = self.letters.get(peer_id, [])
            gaps = [
                line
                for line in self.ledger
                if line.peer_id == peer_id and line.healed_at_ms is None
            ]
            expected = PeerRecord(
                **self.records.get(peer_id, {}),
                gaps=record.gaps,
                dead_letters=len(held),
                letter_bytes=3 * len(held),
            )
            assert record == expected
            assert [replace(each, id=0) for each in record.gaps] == gaps
            found = self.run(self.store.dead_letters(peer_id))
            assert [(each.stream_id, each.detail) for each in found] == held
        counts = {name: len(held) for name, held in self.letters.items() if held}
        assert self.run(self.store.dead_letter_counts()) == counts
        lines = self.run(self.store.gaps())
        assert [replace(each, id=0) for each in lines] == self.ledger

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.directory)


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# What bad files get -----------------------------------------------------------------------------


async def denied(path: str, match: str, **options: Any) -> CursorStoreError:
    """Check that the store does not open; one that does is closed, or its thread would stay."""
    store = SqliteCursorStore(path, **options)
    try:
        with pytest.raises(CursorStoreError, match=match) as caught:
            await store.open()
    finally:
        await store.close()
    return caught.value


async def refused(path: str, match: str, **options: Any) -> CursorStoreError:
    """Check that the store refuses this file, and leaves nothing behind."""
    caught = await denied(path, match, **{"timeout_sec": 2, **options})
    assert caught.path == path
    assert path in str(caught)
    assert_nothing_left(Path(path).parent)
    return caught


async def test_missing_directory(tmp_path: Path) -> None:
    """A mistyped path would be created, or give a riddle of SQLite."""
    await refused(str(tmp_path / "no" / "c.db"), "does not exist; create it")
    assert not (tmp_path / "no").exists()


async def test_directory_in_its_place(tmp_path: Path) -> None:
    """A directory's name would give a riddle."""
    await refused(str(tmp_path), "is a directory")
    await refused("", "is a directory")


async def test_strange_places(tmp_path: Path) -> None:
    """A pipe in its place would be waited for without end; an impossible name would crash."""
    os.mkfifo(tmp_path / "pipe")
    await refused(str(tmp_path / "pipe"), "not a regular file")
    await refused(f"{tmp_path}/a\0b", "sqlite_path")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    await refused(str(tmp_path / "loop"), "cannot be used")


@pytest.mark.parametrize("name", ["a?mode=memory", "a#b%20c d", "file:x", "\udcff", "ü"])
async def test_any_name_is_a_file(tmp_path: Path, name: str) -> None:
    """A name with a meaning in URIs would go to another file, or nowhere."""
    async with opened(str(tmp_path / name)) as store:
        await store.save([("b", at(1))])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, f"{name}.lock"])


async def test_not_a_database(path: str) -> None:
    """A file of something else would be overwritten."""
    Path(path).write_bytes(b"not a database, but long enough to be looked at" * 50)
    error = await refused(path, "not a database; move it away")
    assert not error.may_pass
    assert Path(path).read_bytes().startswith(b"not a database")


async def test_database_of_another_application(path: str) -> None:
    """Our tables would be put among somebody else's."""
    for statement in ("CREATE TABLE theirs (x)", "PRAGMA application_id = 7"):
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute(statement)
        await refused(path, "another application")
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


async def test_newer_schema(path: str) -> None:
    """An older version would damage what a newer one wrote."""
    async with opened(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    error = await refused(path, "newer version .* upgrade")
    assert not error.may_pass
    await refused(path, "upgrade", read_only=True)


async def test_read_only_places() -> None:
    """A missing permission would show only at the first flush, or as a riddle."""
    with without_privileges() as directory:
        path = str(directory / "c.db")
        async with opened(path):
            pass
        Path(path).chmod(0o400)
        await refused(path, "read-only; make it writable")
        Path(path).chmod(0o000)
        await refused(path, "not readable", read_only=True)
        Path(path).chmod(0o600)
        Path(f"{path}.lock").chmod(0o400)
        await refused(path, "lock file .* this user may write")
        Path(f"{path}.lock").chmod(0o600)
        directory.chmod(0o500)
        await refused(path, "directory .* is read-only")


def write_first_schema(path: str) -> None:
    """Write a file as the first schema was, with a letter of ours, a foreign one and a gap."""
    ours = msgspec.msgpack.encode((b"op", b"X", b"meta", b'{"origin":"a"}'))
    theirs = msgspec.msgpack.encode((b"op", b"DEL", b"key", b"\xff"))
    add = "INSERT INTO dead_letters VALUES (?, 'b', ?, 'op', 'd', NULL, ?, 9, 5)"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in schema._SCHEMA_1:
            db.execute(statement)
        known = "'b', '7-0', 'i', 9"
        columns = "peer_id, stream_id, incarnation, agreed_at_ms"
        db.execute(f"INSERT INTO peers ({columns}) VALUES ({known})")
        db.execute("INSERT INTO bootstraps VALUES ('b', '8-0', NULL, 'w', 'i', 'why')")
        db.execute(add, (1, "1-0", ours))
        db.execute(add, (2, "2-0", theirs))
        db.execute("INSERT INTO gaps VALUES (1, 'b', 3, 4, 'trimmed', NULL, '')")
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize("read_only", [False, True])
async def test_an_older_schema_is_understood(path: str, read_only: bool) -> None:
    """A node that is upgraded would forget its cursors, or could not start."""
    write_first_schema(path)
    async with opened(path, read_only=read_only) as store:
        record = await store.load("b")
        assert record.cursor == Cursor(Position(StreamId(7, 0), None), "i", "")
        assert record.bootstrap == BootstrapRow(Position(StreamId(8, 0), None), "w", "i", "why", "")
        # A link has agreed with the store that its cursor belongs to.
        assert record.agreement == Agreement(9, "i")
        assert await store.gaps() == [GapRow("b", 3, 4, "trimmed", id=1)]
        letters = await store.dead_letters()
        assert [one.stream_id for one in letters] == ["1-0", "2-0"]
        if not read_only:
            assert [one.foreign for one in letters] == [False, True]
            await store.settle("b", None, [letter(3)], keep=1)
            assert [line.kind for line in await store.gaps()] == ["gap", "dropped"]
    with contextlib.closing(sqlite3.connect(path)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        assert version == (1 if read_only else SCHEMA_VERSION)


def test_an_older_schema_is_upgraded_whole_or_not_at_all(path: str) -> None:
    """A process that is killed in the middle of an upgrade would leave a file nobody can read."""
    write_first_schema(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        unit = file_module.Unit(schema.migrate, "BEGIN IMMEDIATE")
        db.set_authorizer(
            lambda action, *_: (
                sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_UPDATE else sqlite3.SQLITE_OK
            )
        )
        with pytest.raises(sqlite3.DatabaseError):
            unit.run(db)
        db.set_authorizer(None)
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1
        assert "kind" not in [row[1] for row in db.execute("PRAGMA table_info(gaps)")]


async def test_a_page_of_letters_is_bounded_in_bytes(path: str) -> None:
    """A few thousand letters of 16 MiB each would end the process that lists them."""
    async with opened(path) as store:
        large = [
            DeadLetter("b", f"{n}-0", "op", "", None, (bytes(1000),), 1000, 1) for n in range(1, 6)
        ]
        await store.settle("b", None, [*large, letter(6)], keep=10)
        first = await store.dead_letters(max_bytes=2500)
        assert [one.stream_id for one in first] == ["1-0", "2-0"]
        rest = await store.dead_letters(after_id=first[-1].id, max_bytes=3010)
        assert [one.stream_id for one in rest] == ["3-0", "4-0", "5-0", "6-0"]
        assert len(await store.dead_letters(max_bytes=1)) == 1


async def test_empty_file_is_new(path: str) -> None:
    """A file made by ``touch`` would be refused; a reader would find no table in it."""
    Path(path).touch()
    await refused(path, "nothing in it", read_only=True)
    async with opened(path) as store:
        await store.save([("b", at(1))])


async def test_corrupt_pages(path: str) -> None:
    """The engine would go on for ever on a file that nothing can mend."""
    async with opened(path) as store:
        await store.settle("b", at(1), [letter(n) for n in range(1, 500)], keep=1000)
    raw = bytearray(Path(path).read_bytes())
    raw[4096:] = b"\xa5" * (len(raw) - 4096)
    Path(path).write_bytes(raw)
    async with opened(path) as store:
        with pytest.raises(CursorStoreError, match=r"malformed.*move it away") as caught:
            await store.settle("b", at(2), [letter(1)], keep=1000)
        assert not caught.value.may_pass


async def test_missing_table(path: str) -> None:
    """The engine would go on for ever without a table to write to."""
    async with opened(path) as store:
        await store._file.run(lambda db: db.execute("DROP TABLE gaps"))
        with pytest.raises(CursorStoreError, match="no such table") as caught:
            await store.gaps()
        assert not caught.value.may_pass


async def test_values_nobody_wrote(path: str) -> None:
    """An edited value would end in an error of no kind that the engine knows."""
    async with opened(path) as store:
        await store.settle("b", at(1), [letter(1)], keep=5)
        await store._file.run(lambda db: db.execute("UPDATE peers SET stream_id = 'x'"))
        await store._file.run(lambda db: db.execute("UPDATE dead_letters SET fields = x'c1'"))
        for call in (store.load("b"), store.dead_letters()):
            with pytest.raises(CursorStoreError, match="no node wrote") as caught:
                await call
            assert not caught.value.may_pass


async def test_full_disk_passes(path: str) -> None:
    """A full disk would end the engine, lose a letter, or leave half of a flush behind."""
    async with opened(path) as store:
        await store.save([("b", at(1))])
        pages = await store._file.run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await store._file.run(
            lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall(), ""
        )
        many = [(f"peer-{n}", at(n)) for n in range(5_000)]
        letters = [letter(n) for n in range(5_000)]
        for call in (store.save(many), store.settle("b", at(2), letters, keep=10_000)):
            with pytest.raises(CursorStoreError, match="full; free some space") as caught:
                await call
            assert caught.value.may_pass
        assert (await store.load("b")).cursor == at(1)
        assert (await store.load("peer-0")).cursor is None
        assert await store.dead_letters() == []
        await store._file.run(
            lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall(), ""
        )
        await store.save(many)
        assert (await store.load("peer-4999")).cursor == at(4_999)


async def test_read_only_for_now_passes(path: str) -> None:
    """A file system that is remounted read-only for a while would end the engine."""
    async with opened(path) as store:
        await store._file.run(lambda db: db.execute("PRAGMA query_only = 1"), "")
        with pytest.raises(CursorStoreError, match=r"readonly.*writable") as caught:
            await store.save([("b", at(1))])
        assert caught.value.may_pass
        await store._file.run(lambda db: db.execute("PRAGMA query_only = 0"), "")
        await store.save([("b", at(1))])


@pytest.mark.parametrize("wal_mode", [True, False])
@pytest.mark.parametrize("what", ["removed", "replaced", "log removed", "directory removed"])
async def test_file_gone_while_running(tmp_path: Path, what: str, wal_mode: bool) -> None:
    """Cursors would be written into a file that nobody can open again."""
    if what == "log removed" and not wal_mode:
        return
    path = tmp_path / "d" / "c.db"
    path.parent.mkdir()
    async with opened(str(path), wal_mode=wal_mode) as store:
        await store.save([("b", at(1))])
        if what == "replaced":
            copy = tmp_path / "copy"
            shutil.copy(path, copy)
            copy.rename(path)
        elif what == "directory removed":
            shutil.rmtree(path.parent)
        else:
            Path(f"{path}-wal" if what == "log removed" else path).unlink()
        for call in (
            store.save([("b", at(2))]),
            store.settle("b", at(2), [letter(2)], keep=5),
            store.load("b"),
        ):
            with pytest.raises(CursorStoreError, match="removed or replaced") as caught:
                await call
            assert not caught.value.may_pass
    assert_nothing_left(tmp_path)


class SlowClock(SystemClock):
    """A clock on which a pause lasts until somebody ends it."""

    def __init__(self) -> None:
        self.pausing = asyncio.Event()
        self.go_on = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        """Wait for ``go_on``, however short the pause."""
        self.pausing.set()
        await self.go_on.wait()


async def test_locked_is_tried_again(path: str) -> None:
    """A backup that locks the file for a moment would be an error, or set a cursor back."""
    clock = SlowClock()
    async with opened(path, clock=clock) as store:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            saving = asyncio.ensure_future(store.save([("b", at(1))]))
            async with asyncio.timeout(5):
                await clock.pausing.wait()
            other.execute("ROLLBACK")
            # What is asked later must not overtake what waits: the older cursor would stay.
            later = asyncio.ensure_future(store.save([("b", at(2))]))
            await asyncio.wait((later,), timeout=0.1)
            clock.go_on.set()
            await asyncio.gather(saving, later)
        assert (await store.load("b")).cursor == at(2)


async def test_locked_for_too_long_passes(path: str) -> None:
    """A lock would be waited for without end, also by a shutdown, or end the engine."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        async with opened(path, timeout_sec=0.3) as store:
            other.execute("BEGIN IMMEDIATE")
            begin = time.monotonic()
            with pytest.raises(CursorStoreError, match="locked") as caught:
                await store.settle("b", at(1), [letter(1)], keep=5)
            assert caught.value.may_pass
            assert (await store.load("b")).cursor is None
            await store.close()
            assert time.monotonic() - begin < 2
        other.execute("ROLLBACK")
        other.execute("BEGIN EXCLUSIVE")
        await denied(path, "locked", timeout_sec=0.3, wal_mode=False)


# One engine at a time ---------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
from fsm_replication.cursor import SqliteCursorStore
async def main():
    store = SqliteCursorStore(sys.argv[1])
    await store.open()
    print("open", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@contextlib.contextmanager
def another_process(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process, killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


async def test_second_engine_in_this_process(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of one process would move each other's cursors."""
    async with opened(path) as store:
        link = Path(path).with_name("link.db")
        link.symlink_to(path)
        monkeypatch.chdir(link.parent)
        for name in (path, "cursors.db", "./cursors.db", str(link)):
            caught = await denied(name, f"process {os.getpid()}")
            assert isinstance(caught, AlreadyRunningError)
            assert name in str(caught)
            assert not caught.may_pass
        with pytest.raises(CursorStoreError, match="open already"):
            await store.open()
        await store.save([("b", at(1))])
    async with opened(str(link)) as store:
        assert (await store.load("b")).cursor == at(1)


async def test_second_engine_in_another_process(path: str) -> None:
    """Two processes would move each other's cursors, or a killed one would keep its lock."""
    with another_process(HOLDER, path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        assert isinstance(await denied(path, f"process {holder.pid}"), AlreadyRunningError)
        holder.kill()
        holder.wait()
        async with opened(path) as store:
            await store.save([("b", at(1))])


FORKER = """
import asyncio, os, signal, sys
from fsm_replication.cursor import SqliteCursorStore
async def main():
    store = SqliteCursorStore(sys.argv[1])
    await store.open()
    child = os.fork()
    if child == 0:
        print("forked", os.getpid(), flush=True)
        signal.pause()
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_children_do_not_inherit_the_lock(path: str) -> None:
    """A killed engine's forked child would keep the next engine from starting."""
    with another_process(FORKER, path) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().split()[1])
        try:
            assert isinstance(await denied(path, "in use"), AlreadyRunningError)
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            async with opened(path):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_lock_file_stays_and_is_not_followed(path: str, tmp_path: Path) -> None:
    """A removed lock file would let two engines in; a link in its place would empty its target."""
    async with opened(path):
        pass
    assert Path(f"{path}.lock").exists()
    Path(f"{path}.lock").unlink()
    target = tmp_path / "precious"
    target.write_text("content")
    Path(f"{path}.lock").symlink_to(target)
    await refused(path, "lock file")
    assert target.read_text() == "content"


@pytest.mark.parametrize("wal_mode", [True, False])
async def test_without_flock(path: str, monkeypatch: pytest.MonkeyPatch, wal_mode: bool) -> None:
    """Where there is no flock two engines would share a file."""
    monkeypatch.setattr(file_module, "HAS_FLOCK", False)
    async with opened(path, wal_mode=wal_mode) as store:
        assert isinstance(
            await denied(path, "in use", wal_mode=wal_mode, timeout_sec=0.3), AlreadyRunningError
        )
        await store.save([("b", at(1))])
    async with opened(path, wal_mode=wal_mode) as store:
        assert (await store.load("b")).cursor == at(1)


# Kill, cancel, hang -----------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.ports import Cursor, DeadLetter, Position, StreamId
async def main():
    store = SqliteCursorStore(sys.argv[1], wal_mode=sys.argv[2] == "wal")
    await store.open()
    cursor = (await store.load("b")).cursor
    number = cursor.position.stream_id.ms if cursor else 0
    print("begin", number, flush=True)
    while True:
        number += 1
        letter = DeadLetter("b", f"{number}-0", "op", "x" * 3000, None, (b"a",), 1, number)
        await store.settle("b", Cursor(Position(StreamId(number, 0), number), "i"), [letter],
                           keep=10**6)
        print("settled", number, flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize(("mode", "rounds"), [("wal", 4), ("delete", 2)])
async def test_kill_loses_nothing_acknowledged(path: str, mode: str, rounds: int) -> None:
    """A cursor would be ahead of its letters after kill -9, or behind what was acknowledged."""
    dice = random.Random(mode)
    reached = 0
    for _ in range(rounds):
        with another_process(WRITER, path, mode) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == f"begin {reached}\n".encode()
            for _ in range(dice.randrange(1, 150)):
                writer.stdout.readline()
            # The kill falls anywhere in a transaction, and not only just after one.
            await asyncio.sleep(dice.random() * 0.005)
            writer.kill()
            acknowledged = [line for line in writer.stdout if line.endswith(b"\n")]
            writer.wait()
        last = int(acknowledged[-1].split()[1]) if acknowledged else reached + 1
        begin = time.monotonic()
        async with opened(path, wal_mode=mode == "wal") as store:
            assert time.monotonic() - begin < 1
            cursor = (await store.load("b")).cursor
            assert cursor is not None
            reached = cursor.position.stream_id.ms
            assert reached >= last
            letters = await store.dead_letters("b", limit=10**6)
            assert [each.stream_id for each in letters] == [f"{n}-0" for n in range(1, reached + 1)]
            whole = await store._file.run(
                lambda db: db.execute("PRAGMA integrity_check").fetchall(), "BEGIN"
            )
            assert whole == [("ok",)]
    assert reached > rounds


async def test_cancelled_calls_do_it_all_or_nothing(path: str) -> None:
    """A cancelled caller would leave a transaction open, or half of one done."""
    dice = random.Random(5)
    before = after = 0
    async with opened(path) as store:
        for number in range(1, 250):
            call = asyncio.ensure_future(
                store.settle("b", at(number), [letter(number)], keep=10**6)
            )
            await asyncio.sleep(0)
            if dice.random() < 0.8:
                await asyncio.wait((call,), timeout=dice.random() * 0.003)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            record = await store.load("b")
            assert store._file._raw is not None
            assert not store._file._raw.in_transaction
            letters = {each.stream_id for each in await store.dead_letters("b", limit=10**6)}
            done = f"{number}-0" in letters
            assert (record.cursor == at(number)) == done
            before, after = before + (not done), after + done
    assert before
    assert after


async def test_cancelled_waiting_and_reading(path: str) -> None:
    """A caller cancelled in the queue would keep those behind it from their turn."""
    async with opened(path) as store:
        calls = [asyncio.ensure_future(store.save([("b", at(n))])) for n in range(1, 40)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert all(error is None for error in ended[1::2])
        assert (await store.load("b")).cursor == at(38)


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_open_leaves_nothing(path: str, turns: int) -> None:
    """A cancelled start would leave a thread, a handle or the lock."""
    store = SqliteCursorStore(path)
    opening = asyncio.ensure_future(store.open())
    for _ in range(turns):
        await asyncio.sleep(0.0005 if turns % 2 else 0)
    opening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await opening
        await store.close()
    assert_nothing_left(Path(path).parent)
    async with opened(path):
        pass


@pytest.mark.parametrize("turns", range(1, 7))
async def test_cancelled_close_closes(path: str, turns: int) -> None:
    """A shutdown that is cancelled twice would leave a thread, a handle or the lock."""
    store = SqliteCursorStore(path)
    await store.open()
    saving = asyncio.ensure_future(store.save([("b", at(1))]))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(store.close())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    try:
        assert_nothing_left(Path(path).parent)
    finally:
        await store.close()
    with contextlib.suppress(CursorStoreError):
        await saving
    async with opened(path) as again:
        assert (await again.load("b")).cursor in (None, at(1))


async def test_closing_twice_and_before_opening(path: str) -> None:
    """Cleaning up twice, or after a failure, would be an error."""
    store = SqliteCursorStore(path)
    await store.close()
    await store.open()
    await asyncio.gather(store.close(), store.close())
    await store.close()
    with pytest.raises(CursorStoreError, match="not open"):
        await store.save([("b", at(1))])


def test_stores_move_between_loops(path: str) -> None:
    """A store could not be opened again in another event loop."""
    store = SqliteCursorStore(path)
    for number in range(3):
        with asyncio.Runner() as runner:
            runner.run(store.open())
            saves = [store.save([("b", at(number))]) for _ in range(3)]
            runner.run(_all(*saves))
            runner.run(store.close())


async def _all(*calls: Any) -> None:
    await asyncio.gather(*calls)


def test_ending_loop_cuts_no_transaction(path: str) -> None:
    """The end of ``asyncio.run``, which cancels every task, would leave a transaction open."""

    async def main(store: SqliteCursorStore) -> None:
        await store.open()
        tasks = [asyncio.ensure_future(store.save([("b", at(n))])) for n in range(1, 9)]
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.save([("b", at(99))])
        assert (await store.load("b")).cursor == at(99)
        await store.close()

    asyncio.run(main(SqliteCursorStore(path)))


async def test_hanging_disk(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not answer would hold up calls and shutdown, or pile up memory."""
    answer = threading.Event()
    begun_reading = threading.Event()

    def hang(db: sqlite3.Connection, peer_id: str) -> PeerRecord:
        begun_reading.set()
        answer.wait()
        return PeerRecord()

    store = SqliteCursorStore(path)
    await store.open()
    monkeypatch.setattr(store._file, "_timeout_sec", 0.05)
    monkeypatch.setattr(store_module, "_load", hang)
    begin = time.monotonic()
    try:
        for call in (store.load("b"), store.save([("b", at(1))]), store.close()):
            with pytest.raises(CursorStoreError, match=r"no answer within 0\.05 s") as caught:
                await call
            assert caught.value.may_pass
        assert begun_reading.is_set()
        assert time.monotonic() - begin < 2
        # Until the thread has ended the file is not free.
        assert isinstance(await denied(path, "in use"), AlreadyRunningError)
    finally:
        answer.set()
    monkeypatch.undo()
    await store.close()
    async with opened(path) as again:
        # A unit whose caller had left before it began was not run any more.
        assert (await again.load("b")).cursor is None


async def test_waiting_units_are_bounded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs for days would fill the memory with flushes."""
    answer = threading.Event()
    monkeypatch.setattr(store_module, "_load", lambda *_: answer.wait())
    monkeypatch.setattr(file_module, "UNITS_WAITING_MAX", 5)
    async with opened(path) as store:
        # Only what hangs is to be short: to open a file may take longer on a busy machine.
        monkeypatch.setattr(store._file, "_timeout_sec", 0.05)
        try:
            for call in (store.load("b"), *(store.save([]) for _ in range(9))):
                with pytest.raises(CursorStoreError):
                    await call
            assert len(store._file._units) == 5
        finally:
            answer.set()
            monkeypatch.undo()


async def test_nothing_is_left_after_many_openings(path: str) -> None:
    """Threads or handles would pile up in a host that starts and stops engines."""
    threads = threading.active_count()
    async with opened(path):
        pass
    held = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        async with opened(path) as store:
            await store.save([("b", at(1))])
            assert isinstance(await denied(path, "in use"), AlreadyRunningError)
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == held
