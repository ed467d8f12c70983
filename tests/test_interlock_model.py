"""G14, on the books alone: the interlock beside a list of everything that ever happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsm_replication.config import RepairConfig, Settings
from fsm_replication.current import Current
from fsm_replication.errors import CursorStoreError
from fsm_replication.items import EMPTY_HASH, Stamp, SyncItem
from fsm_replication.ports import InterlockRow
from fsm_replication.stores.protocol import ApplyResult, Outcome
from fsm_replication.testing import MemoryCursorStore
from fsm_replication.workers.interlock import (
    GRAIN_SEC,
    TIDY_SEC,
    WINDOW_SEC,
    Claim,
    Interlock,
    deepest_fall,
)

ALLOWED = 100
START_MS = 1_700_000_000_000
# Ages are kept in whole milliseconds.
ROUNDING_SEC = 0.01


class FakeClock:
    """A monotonic clock, and a time of day that may be set."""

    def __init__(self) -> None:
        self.sec = 1000.0
        self.set_by_sec = 0.0

    def monotonic(self) -> float:
        """Return seconds."""
        return self.sec

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        return START_MS + round((self.sec + self.set_by_sec) * 1000)

    async def sleep(self, seconds: float) -> None:
        """Let others run."""
        await asyncio.sleep(0)

    @asynccontextmanager
    async def timeout(self, seconds: float | None) -> AsyncIterator[None]:
        """Never."""
        yield


class CountingStore(MemoryCursorStore):
    """Counts how often an interlock is written, and may answer too late that it was."""

    writes = 0
    is_late = False

    async def save_interlock(self, peer_id: str, row: InterlockRow) -> None:
        """Write it."""
        self.writes += 1
        await super().save_interlock(peer_id, row)
        if self.is_late:
            raise CursorStoreError("no answer", path="c.db", retryable=True)


def dead(number: int, at: int = 1) -> SyncItem:
    """Return a tombstone."""
    return SyncItem(f"k{number}", b"", "binary", EMPTY_HASH, 1, at, True, "a")


def told(deleted: int | None, added: int | None = 0, applied: int = 0) -> ApplyResult:
    """Return what a store answers."""
    return ApplyResult([Outcome.APPLIED] * applied, {}, deleted, added)


@dataclass
class Node:
    """An interlock with its disk, over restarts, and what has really happened to the store."""

    clock: FakeClock = field(default_factory=FakeClock)
    store: CountingStore = field(default_factory=CountingStore)
    live: int | None = None
    # When the sum left each value, by a clock that nobody sets, and the value.
    left: list[tuple[float, int]] = field(default_factory=list)
    level: int = 0
    bounds: RepairConfig = field(
        default_factory=lambda: RepairConfig(interlock_share=0.2, interlock_min=ALLOWED)
    )

    async def start(self) -> Interlock:
        """Begin, as a process would."""
        await self.store.close()
        await self.store.open()
        self.books = Interlock(
            "a",
            Current(Settings(repair=self.bounds)),
            self.clock,
            self.clock,
            self.store,
        )
        self.books.load((await self.store.load("a")).interlock)
        self.books.learn(self.live)
        return self.books

    def happen(self, change: int) -> None:
        """Note that the number of live items has changed, because of the peer."""
        self.left.append((self.clock.sec, self.level))
        self.level += change

    def fallen(self, within_sec: float = WINDOW_SEC) -> int:
        """Return how far the sum is below the highest value it had within a time."""
        begin = self.clock.sec - within_sec
        return max([self.level, *(level for at, level in self.left if at > begin)]) - self.level

    async def delete(self, count: int, added: int = 0) -> bool:
        """Have a batch applied, if it may be."""
        claim = await self.books.claim([dead(n) for n in range(count)], count)
        if claim is None:
            return False
        self.happen(added - count)
        self.books.settle(claim, told(count, added))
        return True


counts = st.integers(0, ALLOWED)
steps = st.one_of(
    st.tuples(st.just("batch"), counts, counts),
    st.tuples(st.just("batch"), st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.just("add"), st.integers(1, 500)),
    st.tuples(
        st.just("pass"), st.sampled_from([0.5, 10.0, 61.0, 600.0, 1800.0, 3595.0, 3600.0, 3700.0])
    ),
    st.tuples(st.just("tick")),
    st.tuples(st.just("jump"), st.sampled_from([-86_400.0, -3600.0, -60.0, 60.0, 3600.0, 1e6])),
    st.tuples(
        st.just("stop"), st.sampled_from([0.0, 30.0, 4000.0]), st.sampled_from([0.0, -7200.0])
    ),
    st.tuples(
        st.just("kill"), st.sampled_from([0.0, 30.0, 4000.0]), st.sampled_from([0.0, -7200.0])
    ),
    st.tuples(st.just("killed in a batch"), counts, counts),
    st.tuples(st.just("doubt"), counts, st.booleans()),
    st.tuples(st.just("disk"), st.booleans()),
    st.tuples(st.just("late")),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=25))
def test_whatever_happens_no_more_is_deleted_than_is_allowed(taken: list[tuple[Any, ...]]) -> None:
    """If this fails some order of batches, restarts, kills and set clocks deletes too much."""

    async def main() -> None:
        node = Node()
        await node.start()
        for name, *values in taken:
            await _take(node, name, values)
            assert node.fallen() <= ALLOWED
            assert node.fallen(WINDOW_SEC - ROUNDING_SEC) <= node.books.shrunk

    asyncio.run(main())


async def _take(node: Node, name: str, values: list[Any]) -> None:
    clock, store = node.clock, node.store
    if name == "batch":
        deleted, added = values
        # The store goes through a batch in order, so its worst moment is when all is deleted.
        try:
            await node.delete(deleted, added)
        except CursorStoreError:
            assert store.failure is not None
    elif name == "add":
        node.happen(values[0])
        node.books.settle(Claim(), told(0, values[0]))
    elif name == "pass":
        clock.sec += values[0]
    elif name in ("tick", "jump"):
        # An engine looks every five seconds, and what it cannot write then is not known to the next.
        if store.failure is None:
            clock.set_by_sec += values[0] if values else 0.0
            await node.books.tidy()
    elif name in ("stop", "kill"):
        store.failure = None
        if name == "stop":
            await node.books.tidy(at_end=True)
        clock.sec += values[0]
        clock.set_by_sec += values[1]
        await node.start()
    elif name == "killed in a batch":
        store.failure = None
        deleted, applied = values
        if await node.books.claim([dead(n) for n in range(deleted)], deleted) is not None:
            if applied % 2:
                clock.sec += 2 * TIDY_SEC
                await node.books.tidy()
            node.happen(-min(deleted, applied))
        await node.start()
    elif name == "late":
        clock.sec += 2 * TIDY_SEC
        store.is_late = True
        with suppress(CursorStoreError):
            await node.books.tidy()
        store.is_late = False
    elif name == "doubt":
        await _doubt(node, *values)
    elif name == "disk":
        full = CursorStoreError("full", path="c.db", retryable=True)
        store.failure = full if values[0] else None


async def _doubt(node: Node, count: int, applied: bool) -> None:
    """Have a store carry a batch out, or not, and fail; then take it again."""
    at = round(node.clock.sec * 1000)
    tombstones = [dead(n, at) for n in range(count)]
    try:
        claim = await node.books.claim(node.books.uncounted(tombstones), count)
        if claim is None:
            return
        claim.in_doubt = True
        node.happen(-count if applied else 0)
        node.books.give_up(claim)
        left = node.books.uncounted(tombstones)
        assert left == []
        again = await node.books.claim(left, len(left))
    except CursorStoreError:
        assert node.store.failure is not None
        return
    assert again is not None, "it was counted, and needs no more"
    if not applied:
        node.happen(-count)
    node.books.settle(again, told(0 if applied else count))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("batch"), st.integers(0, 30), st.integers(0, 30)),
            st.tuples(st.just("pass"), st.sampled_from([0.5, 10.0, 61.0, 600.0, 3600.0])),
            st.tuples(st.just("stop"), st.sampled_from([0.0, 30.0]), st.just(0.0)),
        ),
        max_size=30,
    )
)
def test_it_is_the_sum_and_nothing_more(taken: list[tuple[Any, ...]]) -> None:
    """If this fails an honest peer is stopped for what it has not done, or long ago."""

    async def main() -> None:
        node = Node()
        await node.start()
        for name, *values in taken:
            await _take(node, name, values)
            # What fell in one minute ages together, and ages lose a fraction at each restart.
            upper = node.fallen(WINDOW_SEC + 2 * GRAIN_SEC)
            assert node.fallen(WINDOW_SEC - ROUNDING_SEC) <= node.books.shrunk <= upper

    asyncio.run(main())


def on_node(scenario: Any, **options: Any) -> None:
    """Run a scenario on a fresh node."""

    async def main() -> None:
        node = Node(**options)
        await node.start()
        await scenario(node)

    asyncio.run(main())


def test_churn_of_a_large_store_never_trips_it_and_costs_few_writes() -> None:
    """If this fails nine puts to one delete stop replication, or each batch costs a transaction."""

    async def scenario(node: Node) -> None:
        for turn in range(5000):
            node.clock.sec += 0.5
            # 20 keys die, and 20 others come back; the 180 puts of live keys change nothing.
            assert await node.delete(20, 20)
            if turn % 10 == 0:
                await node.books.tidy()
        assert node.books.shrunk <= 20
        minutes = 5000 * 0.5 / 60
        assert node.store.writes <= 2 * minutes + 2

    on_node(scenario, live=100_000)


def test_a_mass_delete_costs_few_writes() -> None:
    """If this fails a mass delete that is allowed waits for the disk at each batch."""

    async def scenario(node: Node) -> None:
        batches = 0
        while await node.delete(100):
            batches += 1
            assert node.live is not None
        assert batches == 200, "a fifth of 100,000"
        assert node.store.writes <= 16

    on_node(scenario, live=100_000)


@pytest.mark.parametrize("jump_sec", [3700.0, 86_400.0 * 365])
@pytest.mark.parametrize("end", ["", "stop", "kill"])
def test_a_clock_set_ahead_frees_nothing(jump_sec: float, end: str) -> None:
    """If this fails whoever sets a clock by an hour has given a person's word."""

    async def scenario(node: Node) -> None:
        assert await node.delete(ALLOWED)
        node.clock.set_by_sec += jump_sec
        await node.books.tidy()
        if end:
            await _take(node, end, [30.0, 0.0])
        assert not await node.delete(1)

    on_node(scenario)


@pytest.mark.parametrize("end", ["", "stop", "kill"])
def test_a_clock_set_back_blocks_for_an_hour_and_not_for_ever(end: str) -> None:
    """If this fails a clock that was wrong for a moment stops a peer for years."""

    async def scenario(node: Node) -> None:
        assert await node.delete(ALLOWED)
        node.clock.set_by_sec -= 86_400.0 * 365
        if end:
            await _take(node, end, [0.0, 0.0])
        assert not await node.delete(1)
        await node.books.tidy()
        for _ in range(3):
            node.clock.sec += 1300.0
            if not end:
                await _take(node, "kill", [0.0, 0.0])
        assert await node.delete(1)

    on_node(scenario)


def test_a_persons_word_lasts_an_hour_over_restarts() -> None:
    """If this fails a person must say it again after each restart, or has said it for ever."""

    async def scenario(node: Node) -> None:
        node.books.trip("too many")
        await node.books.tidy()
        await _take(node, "kill", [3 * WINDOW_SEC, 0.0])
        assert node.books.tripped == "too many"
        node.books.forgive()
        await node.books.tidy()
        for _ in range(3):
            await _take(node, "kill", [1000.0, 0.0])
            assert not node.books.tripped
            assert node.books.fits(10 * ALLOWED)
            assert await node.delete(10 * ALLOWED)
            assert node.books.shrunk == 0
            assert node.books.forgiven_until_ms is not None
        await _take(node, "kill", [600.0, 0.0])
        assert node.books.forgiven_until_ms is None
        assert not await node.delete(ALLOWED + 1)
        assert await node.delete(ALLOWED)

    on_node(scenario)


@pytest.mark.parametrize("set_by_sec", [-7200.0, 7200.0])
def test_a_persons_word_does_not_outlast_a_clock_that_was_set(set_by_sec: float) -> None:
    """If this fails a clock that is set back makes an hour of any length."""

    async def scenario(node: Node) -> None:
        node.books.forgive()
        await node.books.tidy()
        await _take(node, "kill", [0.0, set_by_sec])
        assert node.books.forgiven_until_ms is None

    on_node(scenario)


def test_kills_cost_an_honest_peer_little() -> None:
    """If this fails a process that crashes now and then stops a peer that does nothing wrong."""

    async def scenario(node: Node) -> None:
        for _ in range(10):
            assert await node.delete(2, 2)
            await node.start()
        assert node.books.shrunk <= 10 * max(2, ALLOWED // 64)

    on_node(scenario)


def test_deletes_wait_for_the_disk_and_puts_do_not() -> None:
    """If this fails deletes are applied that a restart knows nothing of."""

    async def scenario(node: Node) -> None:
        node.store.failure = CursorStoreError("full", path="c.db", retryable=True)
        with pytest.raises(CursorStoreError):
            await node.delete(1)
        node.books.settle(Claim(), told(0, 5))
        node.store.failure = None
        assert await node.delete(1)

    on_node(scenario)


def test_batches_at_the_same_time_share_one_allowance() -> None:
    """If this fails the cold path deletes as much again as the hot path."""

    async def scenario(node: Node) -> None:
        made = await asyncio.gather(*(node.books.claim([dead(n)], 30) for n in range(5)))
        claims = [claim for claim in made if claim is not None]
        assert len(claims) == 3
        for claim in claims:
            node.books.settle(claim, told(30))
        assert node.books.shrunk == 90

    on_node(scenario)


def test_a_store_that_does_not_tell_is_taken_at_its_worst() -> None:
    """If this fails a store that counts nothing has no interlock."""

    async def scenario(node: Node) -> None:
        claim = await node.books.claim([dead(n) for n in range(50)], 50)
        assert claim is not None
        node.books.settle(claim, told(None, None, applied=50))
        assert node.books.shrunk == 50

    on_node(scenario)


def test_a_row_is_left_alone_while_it_is_right() -> None:
    """If this fails a quiet node writes to its disk without end."""

    async def scenario(node: Node) -> None:
        assert await node.delete(10)
        for _ in range(200):
            node.clock.sec += TIDY_SEC / 4
            await node.books.tidy()
        assert node.store.writes == 2, "the block, and what it came to"

    on_node(scenario)


def test_the_worst_moment_of_a_batch_counts() -> None:
    """If this fails a batch that puts and deletes in turn is taken for a mass delete."""

    def stamp(deleted: bool) -> Stamp:
        return Stamp(0, 1, deleted, b"", "binary")

    def live(number: int, at: int = 1) -> SyncItem:
        return SyncItem(f"k{number}", b"x", "binary", b"\1" * 32, 1, at, False, "a")

    turns = [live(10), dead(1), live(11), dead(2)]
    assert deepest_fall(turns, [None, stamp(False), stamp(True), stamp(False)]) == 0
    first = [dead(1), dead(2), live(10), live(11)]
    assert deepest_fall(first, [stamp(False), stamp(False), None, None]) == 2
    again = [dead(1), live(1, 2), dead(1, 3)]
    assert deepest_fall(again, [stamp(False)] * 3) == 1
    assert deepest_fall([dead(1), dead(2)], [None, stamp(True)]) == 0
    assert deepest_fall([dead(1, -1)], [stamp(False)]) == 0, "superseded"
