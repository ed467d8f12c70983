"""The cursor store in memory, beside the one in SQLite: the same calls, the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.errors import AlreadyRunningError, CursorStoreError, LettersFullError
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
)
from fsm_replication.testing import MemoryCursorStore

NOTHING = PeerRecord()
AGREED = Agreement(
    77, "i", StreamId(5, 1), {"too large": 60, "never fetched\x00": None},
    Position(StreamId(6, 2), 40), "run\udc80",
)  # fmt: skip


def cursor(ms: int, read: int | None = 1, incarnation: str = "i") -> Cursor:
    """Return a cursor."""
    return Cursor(Position(StreamId(ms, 0), read), incarnation, "run")


def letter(number: int, peer_id: str = "a", at_ms: int = 5) -> DeadLetter:
    """Return a dead letter."""
    fields = (b"op", b"\xff")
    return DeadLetter(peer_id, f"{number}-0", "hash", "detail", "key", fields, 9, at_ms)


def row(walk: str = "", incarnation: str = "i") -> BootstrapRow:
    """Return a bootstrap that has begun."""
    return BootstrapRow(Position(StreamId(9, 1), 4), walk, incarnation, "why", "run")


def gap(at_ms: int, missed: int | None = 3, peer_id: str = "a") -> GapRow:
    """Return a line of the loss ledger."""
    return GapRow(peer_id, at_ms, missed, "trimmed")


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CursorStore]:
    """An open store of each kind."""
    made: CursorStore = MemoryCursorStore()
    if request.param == "sqlite":
        made = SqliteCursorStore(str(tmp_path / "c.db"))
    await made.open()
    yield made
    await made.close()


async def test_an_unknown_peer_has_an_empty_record(store: CursorStore) -> None:
    """If this fails a new peer is taken for a known one."""
    assert await store.load("a") == NOTHING
    await store.save_walk("a", "nowhere")
    await store.save([])
    assert await store.load("a") == NOTHING
    assert list(await store.dead_letters()) == []
    assert list(await store.gaps()) == []


async def test_everything_lasts_over_a_restart(store: CursorStore) -> None:
    """If this fails the engine forgets what it knew."""
    await store.save([("a", cursor(5, None)), ("b", cursor(6))])
    await store.settle("a", cursor(8), [letter(7)], keep=10)
    await store.begin_bootstrap("a", row(), gap(7, None))
    await store.save_walk("a", "half-way")
    await store.set_operator_pause("a", True)
    await store.set_agreed("a", AGREED, heal_gaps=False)
    await store.close()
    await store.close()
    await store.open()
    record = await store.load("a")
    assert record == PeerRecord(
        cursor=cursor(8),
        bootstrap=row("half-way"),
        operator_pause=True,
        agreement=AGREED,
        gaps=(replace(gap(7, None), id=record.gaps[0].id),),
        dead_letters=1,
        letter_bytes=9,
    )
    await store.set_operator_pause("a", False)
    assert not (await store.load("a")).operator_pause
    assert (await store.load("b")).cursor == cursor(6)
    await store.set_agreed("a", Agreement(78), heal_gaps=False)
    assert (await store.load("a")).agreement == Agreement(78), "of the one before nothing is left"
    await store.set_agreed("a", AGREED, heal_gaps=False)
    await store.forget_store("a")
    await store.forget_store("nobody")
    after = await store.load("a")
    assert (after.agreement, after.cursor) == (None, cursor(8))
    await store.set_agreed("a", Agreement(79), heal_gaps=False)
    assert (await store.load("a")).agreement == Agreement(79), "of the one before nothing is left"


async def test_the_end_of_a_bootstrap_heals_gaps_or_leaves_them(store: CursorStore) -> None:
    """If this fails losses are forgotten, or never end."""
    await store.begin_bootstrap("a", row(), gap(1))
    await store.begin_bootstrap("a", row(incarnation="j"), gap(2))
    await store.begin_bootstrap("b", row(), gap(3, peer_id="b"))
    await store.finish_bootstrap("a", cursor(20), None)
    record = await store.load("a")
    assert (record.cursor, record.bootstrap, len(record.gaps)) == (cursor(20), None, 2)
    await store.begin_bootstrap("a", row(), None)
    await store.finish_bootstrap("a", cursor(30), 99)
    assert (await store.load("a")).gaps == ()
    found = await store.gaps("a")
    assert [(one.found_at_ms, one.healed_at_ms, one.healed_by) for one in found] == [
        (1, 99, "bootstrap"),
        (2, 99, "bootstrap"),
    ]
    await store.set_agreed("b", Agreement(100), heal_gaps=True)
    assert [one.healed_by for one in await store.gaps()] == ["bootstrap", "bootstrap", "repair"]
    assert [one.found_at_ms for one in await store.gaps(limit=2)] == [2, 3]
    assert list(await store.gaps(limit=0)) == []


async def test_gaps_that_are_passed_one_after_the_other_are_one_line(store: CursorStore) -> None:
    """If this fails a stream that is always too short fills the ledger, or its cursor jumps back."""
    await store.begin_bootstrap("a", row(), None)
    await store.pass_gap("a", cursor(1), gap(1, 3))
    assert (await store.load("a")).bootstrap is None
    await store.pass_gap("b", cursor(9), gap(1, 1, "b"))
    await store.pass_gap("a", cursor(2), gap(2, 4))
    await store.pass_gap("a", cursor(3), replace(gap(3, 5), reason="another"))
    await store.pass_gap("a", cursor(4), None)
    record = await store.load("a")
    assert record.cursor == cursor(4)
    assert [(one.found_at_ms, one.missed) for one in record.gaps] == [(1, 7), (3, 5)]
    await store.pass_gap("a", cursor(5), gap(4, None))
    await store.pass_gap("a", cursor(6), gap(5, 6))
    assert [one.missed for one in (await store.load("a")).gaps] == [None, 5]
    await store.pass_gap("a", cursor(6), replace(gap(5, 2**63 - 2), reason="another"))
    assert [one.missed for one in (await store.load("a")).gaps] == [None, None]
    await store.set_agreed("a", Agreement(7), heal_gaps=True)
    await store.pass_gap("a", cursor(7), gap(8, 2))
    assert [one.missed for one in (await store.load("a")).gaps] == [2]


async def test_reading_an_entry_again_makes_no_second_letter(store: CursorStore) -> None:
    """If this fails dead letters multiply with every restart."""
    await store.settle("a", cursor(1), [letter(1), letter(2)], keep=10)
    first = await store.dead_letters()
    again = replace(letter(1, at_ms=999), reason="other", detail="new")
    assert await store.settle("a", cursor(1), [again, letter(2)], keep=10) == 0
    second = await store.dead_letters()
    assert second[0] == replace(first[0], reason="other", detail="new")
    assert second[1] == first[1]


async def test_letters_are_bounded_listed_and_removed(store: CursorStore) -> None:
    """If this fails dead letters grow without bound, or one peer's push out another's."""
    await store.settle("b", None, [letter(1, "b")], keep=3)
    assert await store.settle("a", None, [letter(n) for n in range(5)], keep=3) == 2
    kept = await store.dead_letters("a")
    assert [one.stream_id for one in kept] == ["2-0", "3-0", "4-0"]
    assert len(await store.dead_letters()) == 4
    assert list(await store.dead_letters("a", after_id=kept[0].id, limit=1)) == [kept[1]]
    assert list(await store.dead_letters(limit=0)) == []
    assert await store.delete_dead_letters([kept[0].id, kept[0].id, 12345, -1]) == 1
    assert (await store.load("a")).dead_letters == 2
    assert await store.settle("a", None, [], keep=0) == 2
    assert await store.settle("b", None, [letter(2, "b")], keep=3) == 0
    newest = (await store.dead_letters("b"))[-1]
    assert newest.id > kept[-1].id
    with pytest.raises(ValueError, match="other peers"):
        await store.settle("a", None, [letter(1, "b")], keep=3)


async def test_letters_of_one_key_and_reason_are_one(store: CursorStore) -> None:
    """If this fails a key that stays bad fills the store with letters that say the same."""

    def of(number: int, key: bytes, reason: str = "hash", text: str | None = "k") -> DeadLetter:
        fields = (b"op", b"PUT", b"key", key, b"data", b"%d" % number)
        return DeadLetter("a", f"{number}-0", reason, f"no {number}", text, fields, 20, number)

    async def settle(*letters: DeadLetter) -> list[DeadLetter]:
        assert await store.settle("a", cursor(1), letters, keep=10, fold=True) == 0
        return [replace(one, id=0) for one in await store.dead_letters()]

    assert await settle(of(1, b"k")) == [of(1, b"k")]
    folded = replace(of(9, b"k"), count=4, first_stream_id="1-0", at_ms=1)
    # In whatever order they are found: a bad entry is told before the older ones of its key.
    assert await settle(of(9, b"k"), of(2, b"k"), of(5, b"k")) == [folded]
    ids = [one.id for one in await store.dead_letters()]
    assert await settle(of(2, b"k"), of(9, b"k")) == [folded]
    assert [one.id for one in await store.dead_letters()] == ids
    # A letter that has grown is another one than was looked at.
    await settle(of(10, b"k"))
    assert await store.delete_dead_letters(ids) == 0
    await store.settle_retry([1], [])
    assert (await store.load("a")).dead_letters == 1
    other = [of(11, b"k", "size"), of(12, b"k2", text="k"), of(13, b"k3", text="k")]
    whole = [of(14, b"\xff", text="\ufffd"), of(15, b"\xff", text="\ufffd")]
    before = replace(of(0, b"k"), fields=(b"key", b"k"))
    none = replace(of(16, b"k"), fields=None, key=None)
    counts = [one.count for one in await settle(*other, *whole, before, none)]
    assert counts == [5, 1, 1, 1, 1, 1, 1, 1]
    # Equal in all their fields.
    same = replace(whole[1], stream_id="17-0")
    assert [one.count for one in await settle(same, replace(none, stream_id="18-0"))].count(2) == 1
    assert (await store.load("a")).dead_letters == 9


async def test_letters_are_bounded_in_bytes(store: CursorStore) -> None:
    """If this fails a hundred letters fill the disk."""

    def of(number: int, size: int) -> DeadLetter:
        fields = (b"key", b"k%d" % number, b"data", b"x" * (size - 9))
        return DeadLetter("a", f"{number}-0", "hash", "bad", f"k{number}", fields, size, 5)

    async def settle(*letters: DeadLetter, may_drop: bool) -> int:
        return await store.settle(
            "a", None, letters, keep=9, keep_bytes=1000, fold=True, may_drop=may_drop
        )

    # The first batch fits, or it never would.
    assert await settle(of(1, 600), of(2, 600), may_drop=False) == 0
    with pytest.raises(LettersFullError) as full:
        await settle(of(3, 100), may_drop=False)
    assert (full.value.letters, full.value.held_bytes, full.value.needed_bytes) == (2, 1200, 100)
    assert (await store.load("a")).letter_bytes == 1200
    assert await settle(of(3, 100), may_drop=True) == 1
    assert (await store.load("a")).letter_bytes == 700
    # One that takes the place of an earlier one needs no room of its own.
    assert await settle(replace(of(2, 500), stream_id="4-0"), may_drop=False) == 0
    assert await settle(of(5, 5000), may_drop=True) == 3
    (left,) = await store.dead_letters()
    assert left.size == 5000
    (line,) = await store.gaps("a")
    # Every entry that a letter stood for is counted.
    assert line.missed == 4


async def test_a_closed_store_is_of_no_use(store: CursorStore) -> None:
    """If this fails an engine that has ended still writes."""
    await store.close()
    for call in (
        store.load("a"),
        store.save([]),
        store.gaps(),
        store.set_operator_pause("a", True),
    ):
        with pytest.raises(CursorStoreError, match="not open"):
            await call


async def test_a_second_engine_is_kept_out(tmp_path: Path) -> None:
    """If this fails two engines move one cursor."""
    path = str(tmp_path / "c.db")
    one = MemoryCursorStore()
    for first, second in (
        (one, one),
        (SqliteCursorStore(path), SqliteCursorStore(path)),
    ):
        await first.open()
        with pytest.raises(AlreadyRunningError):
            await second.open()
        await first.save([("a", cursor(1))])
        await first.close()
        await second.open()
        assert (await second.load("a")).cursor == cursor(1)
        await second.close()


# Any calls in any order ---------------------------------------------------------------------------

Call = Callable[[CursorStore], Awaitable[Any]]
peers = st.sampled_from(["a", "b"])
reads = st.sampled_from([None, 0, 1, 2**63 - 1, 2**63, 2**70])
cursors = st.builds(cursor, st.integers(0, 9), reads, st.sampled_from(["i", "j"]))
times = st.integers(0, 99)
agreements = st.builds(
    Agreement,
    *(times, st.sampled_from(["", "i", "\ud800"]), st.builds(StreamId, times, times)),
    st.dictionaries(st.sampled_from(["k", "l", "\ud800"]), st.none() | times),
)


def keyed(number: int, peer_id: str, at_ms: int, size: int) -> DeadLetter:
    """Return a letter of one of three keys, or of none that can be told from its fields."""
    key = b"k%d" % (number % 3)
    fields = (b"key", key, b"data", b"x" * size)
    name = key.decode() if number % 4 else None
    reason = "hash" if number % 5 else "size"
    return DeadLetter(peer_id, f"{number}-0", reason, f"{number}", name, fields, 9 + size, at_ms)


def settling(
    peer_id: str,
    at: Cursor | None,
    numbers: list[int],
    at_ms: int,
    keep: int,
    keep_bytes: int | None,
    fold: bool,
    may_drop: bool,
) -> Call:
    """Return a call of settle, which tells whether there was room."""
    plain = [letter(number, peer_id, at_ms) for number in numbers]
    letters = [keyed(number, peer_id, at_ms, number) for number in numbers] if fold else plain

    async def call(store: CursorStore) -> int | str:
        try:
            return await store.settle(
                peer_id, at, letters, keep=keep, keep_bytes=keep_bytes, fold=fold, may_drop=may_drop
            )
        except LettersFullError as error:
            return f"{error}, {error.needed_bytes}"

    return call


def beginning(peer_id: str, walk: str, lost: int | None, with_gap: bool) -> Call:
    """Return a call of begin_bootstrap."""
    found = gap(1, lost, peer_id) if with_gap else None
    return lambda store: store.begin_bootstrap(peer_id, row(walk), found)


def passing(peer_id: str, at: Cursor, lost: int | None, reason: str) -> Call:
    """Return a call of pass_gap."""
    found = replace(gap(1, lost, peer_id), reason=reason)
    return lambda store: store.pass_gap(peer_id, at, found)


def deleting(places: list[int]) -> Call:
    """Return a call that deletes letters by their places, because ids may have holes."""

    async def call(store: CursorStore) -> int:
        held = [one.id for one in await store.dead_letters()]
        return await store.delete_dead_letters([-1, *(held[at] for at in places if at < len(held))])

    return call


def retrying(done: list[int], bad: list[int], reason: str) -> Call:
    """Return a call that settles letters by their places, and judges others anew."""

    async def call(store: CursorStore) -> None:
        held = await store.dead_letters()
        gone = [held[at].id for at in done if at < len(held)]
        judged = [replace(held[at], reason=reason) for at in bad if at < len(held)]
        await store.settle_retry([-1, *gone], judged)

    return call


calls: st.SearchStrategy[Call] = st.one_of(
    st.builds(
        settling,
        *(peers, st.none() | cursors, st.lists(st.integers(0, 20), max_size=4), times),
        *(st.integers(-1, 4), st.none() | st.integers(0, 60), st.booleans(), st.booleans()),
    ),
    st.builds(lambda p, c: lambda store: store.save([(p, c), ("b", c)]), peers, cursors),
    st.builds(beginning, peers, st.text("wxyz"), reads, st.booleans()),
    st.builds(passing, peers, cursors, reads, st.sampled_from(["trimmed", "again"])),
    st.builds(lambda p, w: lambda store: store.save_walk(p, w), peers, st.text("wxyz")),
    st.builds(
        lambda p, c, at: lambda store: store.finish_bootstrap(p, c, at),
        *(peers, cursors, st.none() | times),
    ),
    st.builds(lambda p, b: lambda store: store.set_operator_pause(p, b), peers, st.booleans()),
    st.builds(
        lambda p, made, heal: lambda store: store.set_agreed(p, made, heal_gaps=heal),
        *(peers, agreements, st.booleans()),
    ),
    st.builds(lambda p: lambda store: store.forget_store(p), peers),
    st.builds(deleting, st.lists(st.integers(0, 5), max_size=3)),
    st.builds(
        retrying,
        *(st.lists(st.integers(0, 5), max_size=3), st.lists(st.integers(0, 5), max_size=3)),
        st.text("xy"),
    ),
    st.builds(lambda p: lambda store: store.purge_dead_letters(p), st.none() | peers),
)


async def everything(store: CursorStore) -> list[Any]:
    """Return all that a store tells; letters without their ids, which may have holes."""
    letters = [
        list(await store.dead_letters(peer_id, limit=limit))
        for peer_id in (None, "a", "b")
        for limit in (-1, 2, 1000)
    ]
    letters += [list(await store.dead_letters(max_bytes=most)) for most in (-1, 0, 9, 20)]
    ids = [[one.id for one in found] for found in letters]
    assert all(numbers == sorted(set(numbers)) for numbers in ids)
    gaps = [list(await store.gaps(peer_id)) for peer_id in (None, "a", "b")]
    records = [await store.load(peer_id) for peer_id in ("a", "b", "c")]
    counts = await store.dead_letter_counts()
    return [[[replace(one, id=0) for one in found] for found in letters], gaps, records, counts]


@given(made=st.lists(calls, max_size=12))
def test_any_calls_have_the_same_answers(made: list[Call]) -> None:
    """If this fails a simulation tests another store than the one that ships."""

    async def scenario() -> None:
        stores: list[CursorStore] = [MemoryCursorStore(), SqliteCursorStore(":memory:")]
        async with AsyncExitStack() as stack:
            for store in stores:
                await store.open()
                stack.push_async_callback(store.close)
            for call in made:
                ours, theirs = [await call(store) for store in stores]
                assert ours == theirs
            ours, theirs = [await everything(store) for store in stores]
            assert ours == theirs

    asyncio.run(scenario())


# For tests of crashes -----------------------------------------------------------------------------


async def test_a_crash_sets_the_store_back_and_opens_its_lock() -> None:
    """If this fails a crash cannot be played: later rows stay, or the dead hold the lock."""
    store = MemoryCursorStore()
    await store.open()
    await store.save([("a", cursor(1))])
    await store.settle("a", None, [letter(1)], keep=9)
    kept = store.snapshot()
    for _ in range(2):
        await store.settle("a", cursor(2), [letter(2), letter(1, at_ms=9)], keep=9)
        await store.begin_bootstrap("a", row(), gap(1))
        store.restore(kept)
        with pytest.raises(CursorStoreError, match="not open"):
            await store.load("a")
        await store.open()
        assert await store.load("a") == PeerRecord(cursor=cursor(1), dead_letters=1, letter_bytes=9)
        assert list(await store.gaps()) == []
    other = MemoryCursorStore()
    other.restore(kept)
    await other.open()
    assert (await other.load("a")).cursor == cursor(1)


async def test_a_failure_is_raised_until_it_is_over() -> None:
    """If this fails a full disk cannot be played."""
    store = MemoryCursorStore()
    await store.open()
    store.failure = CursorStoreError("full", path="memory", retryable=True)
    with pytest.raises(CursorStoreError, match="full"):
        await store.save([("a", cursor(1))])
    await store.close()
    with pytest.raises(CursorStoreError, match="full"):
        await store.open()
    store.failure = None
    await store.open()
    assert await store.load("a") == NOTHING


async def test_a_call_that_is_cancelled_is_done_whole_or_not_at_all() -> None:
    """If this fails letters are stored without the cursor that passes them."""
    store = MemoryCursorStore()
    await store.open()
    call = asyncio.create_task(store.settle("a", cursor(1), [letter(1)], keep=9))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    record = await store.load("a")
    assert (record.cursor, record.dead_letters) == (cursor(1), 1)
