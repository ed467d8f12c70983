"""The contract finds what is wrong with a store: each defect breaks the rule that names it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from sqlite_store import SqliteStore

from fsm_replication import ApplyResult, MemorySyncEngine, OutboxRow, Outcome, Received, SyncItem
from fsm_replication.items import Resolver, content_hash
from fsm_replication.merkle import OWN
from fsm_replication.ports import Position
from fsm_replication.testing.contract import OutboxContract, SyncEngineContract

Changes = Sequence[SyncItem]
Given = Received | None


class TakesEverything(MemorySyncEngine):
    """Does not compare."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Forget what is held first."""
        for change in changes:
            self._items.pop(change.key, None)
        return await super().apply_many(changes, received)


class IgnoresVersions(MemorySyncEngine):
    """Takes what is of the same time for the same."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply one by one."""
        outcomes = []
        for change in changes:
            held = self._items.get(change.key)
            if held is not None and held.updated_at == change.updated_at:
                outcomes.append(Outcome.SUPERSEDED)
            else:
                outcomes += (await super().apply_many([change], received)).outcomes
        return ApplyResult(outcomes)


class TakesEqualContentForCurrent(MemorySyncEngine):
    """Drops a later stamp of the same content."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply what has another content."""
        outcomes = []
        for change in changes:
            held = self._items.get(change.key)
            if held is not None and held.content == change.content and not change.deleted:
                outcomes.append(Outcome.SUPERSEDED)
            else:
                outcomes += (await super().apply_many([change], received)).outcomes
        return ApplyResult(outcomes)


class DropsDeletesOfTheUnknown(MemorySyncEngine):
    """Keeps no tombstone where it has no item."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Leave them out."""
        known = [change for change in changes if not change.deleted or change.key in self._items]
        return await super().apply_many(known, received)


class ForgetsDeletesAtOnce(MemorySyncEngine):
    """Removes what is deleted."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply, and remove tombstones."""
        result = await super().apply_many(changes, received)
        for key in {change.key for change in changes if change.deleted}:
            held = self._items.get(key)
            if held is not None and held.deleted:
                del self._items[key]
        return result


class DropsLateDeletes(MemorySyncEngine):
    """Takes no tombstone that has expired."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Say that they are superseded."""
        outcomes = []
        for change in changes:
            expired = change.updated_at + self._ttl_ms <= self._wall_clock.now_ms()
            if change.deleted and expired:
                outcomes.append(Outcome.SUPERSEDED)
            else:
                outcomes += (await super().apply_many([change], received)).outcomes
        return ApplyResult(outcomes)


class CountsEveryDelete(MemorySyncEngine):
    """Counts tombstones that replaced nothing live."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply."""
        result = await super().apply_many(changes, received)
        return ApplyResult(result.outcomes, live_deleted=sum(c.deleted for c in changes))


class HidesDeletes(MemorySyncEngine):
    """Answers None for a tombstone."""

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return live items only."""
        found = await super().get_many(keys)
        return [None if item is None or item.deleted else item for item in found]


class AnswersForEachKeyOnce(MemorySyncEngine):
    """Answers with what it found, as a query over the keys would."""

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what there is."""
        return [item for item in await super().get_many(sorted(set(keys))) if item is not None]


class SortsOutcomes(MemorySyncEngine):
    """Tells what was applied first."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply."""
        result = await super().apply_many(changes, received)
        return ApplyResult(sorted(result.outcomes), live_deleted=result.live_deleted)


class LooksBeforeItWrites(MemorySyncEngine):
    """Compares, waits, and sets."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply what was newer before others wrote."""
        before = [self._items.get(change.key) for change in changes]
        await asyncio.sleep(0)
        for change, held in zip(changes, before, strict=True):
            if held is None or held.stamp < change.stamp:
                self._items.pop(change.key, None)
        return await super().apply_many(changes, received)


class GivesPositionsAway(MemorySyncEngine):
    """Keeps positions, each before its batch."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.positions: dict[str, Position] = {}

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Note the position, and then apply."""
        if received is not None and received.position is not None:
            self.positions[self.peer(received.peer_id)] = received.position
        await asyncio.sleep(0)
        return await super().apply_many(changes, received)

    def peer(self, peer_id: str) -> str:
        """Return under which name to keep it."""
        return peer_id

    @property
    def keeps_positions(self) -> bool:
        """Return True: they change together with the items."""
        return True

    async def applied_position(self, peer_id: str) -> Position | None:
        """Return it."""
        return self.positions.get(self.peer(peer_id))


class MixesPeersUp(GivesPositionsAway):
    """Has one position for all peers."""

    def peer(self, peer_id: str) -> str:
        """Return the same for all."""
        return "all"


class KeepsTheLargestPosition(GivesPositionsAway):
    """Never goes back, although a stream may have been made anew."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply."""
        if received is not None and received.position is not None:
            held = self.positions.get(received.peer_id, received.position)
            if held.stream_id > received.position.stream_id:
                received = Received(received.peer_id, held)
        return await super().apply_many(changes, received)


class IsAlwaysTheSame(MemorySyncEngine):
    """Has one incarnation for all contents."""

    async def incarnation(self) -> str:
        """Return a constant."""
        return "store"


class PlantsNoTombstones(MemorySyncEngine):
    """Has a tree of live items."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply, and hide tombstones from the tree."""
        result = await super().apply_many(changes, received)
        live = {key: item for key, item in self._items.items() if not item.deleted}
        self._tree._items = live
        return result


class LeavesExpiredInTheTree(MemorySyncEngine):
    """Takes a tombstone out of the tree only when something changes."""

    async def apply_many(self, changes: Changes, received: Given = None) -> ApplyResult:
        """Apply, and forget what is to expire."""
        result = await super().apply_many(changes, received)
        await self._tree.root(OWN)
        self._tree._expiring.clear()
        return result


class TrustsItsClock(MemorySyncEngine):
    """Stamps local writes with the time of day, whatever it has seen."""

    def _next(self, key: str) -> tuple[int, int]:
        held = self._items.get(key)
        return self._wall_clock.now_ms(), 1 if held is None else held.version + 1


class TakesAnyKey(MemorySyncEngine):
    """Cuts keys that are too long."""

    async def put(self, key: str, content: bytes, content_type: str = "binary") -> SyncItem:
        """Write."""
        return await super().put(key[:1000] or "empty", content, content_type)


class Concatenates:
    """Is neither commutative nor idempotent."""

    name = "concatenates"
    by_stamp = False

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return both."""
        body = a.content + b.content
        return SyncItem(
            a.key, body, a.content_type, content_hash(body), a.version, a.updated_at, False, ""
        )


class KeepsTheFirst:
    """Is associative and idempotent, but not commutative."""

    name = "first"
    by_stamp = False

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return what was there."""
        return a


def resolving(resolver: Resolver) -> Callable[..., MemorySyncEngine]:
    """Return a maker of stores with a resolver."""

    def make(**more: Any) -> MemorySyncEngine:
        return MemorySyncEngine(resolver=resolver, **more)

    make.__name__ = f"resolver {resolver.name}"
    return make


def without_grace(**more: Any) -> MemorySyncEngine:
    """Return a store that forgets a tombstone when it expires."""
    return MemorySyncEngine(**more | {"tombstone_grace_sec": 0.0})


def without_end(**more: Any) -> MemorySyncEngine:
    """Return a store that never forgets a tombstone."""
    return MemorySyncEngine(**more | {"tombstone_grace_sec": 1e6})


DEFECTS: list[tuple[Callable[..., MemorySyncEngine], str]] = [
    (TakesEverything, "test_what_is_newer_is_kept_and_the_rest_superseded"),
    (TakesEverything, "test_any_order_and_any_repetition_end_the_same"),
    (IgnoresVersions, "test_every_field_of_the_order_tuple_decides"),
    (IgnoresVersions, "test_it_does_what_the_protocol_says_whatever_comes"),
    (TakesEqualContentForCurrent, "test_equal_content_at_a_later_time_is_taken"),
    (TakesEqualContentForCurrent, "test_stores_that_exchange_what_they_hold_agree"),
    (DropsDeletesOfTheUnknown, "test_a_tombstone_is_held_like_an_item"),
    (ForgetsDeletesAtOnce, "test_a_tombstone_is_held_like_an_item"),
    (ForgetsDeletesAtOnce, "test_any_order_and_any_repetition_end_the_same"),
    (DropsLateDeletes, "test_an_expired_tombstone_deletes_what_is_older_and_nothing_else"),
    (CountsEveryDelete, "test_live_items_that_deletes_replace_are_counted"),
    (HidesDeletes, "test_a_tombstone_is_held_like_an_item"),
    (AnswersForEachKeyOnce, "test_an_empty_store_holds_nothing"),
    (AnswersForEachKeyOnce, "test_everything_comes_back_as_it_was"),
    (SortsOutcomes, "test_long_batches_are_answered_in_order"),
    (LooksBeforeItWrites, "test_one_item_from_many_peers_is_applied_once"),
    (LooksBeforeItWrites, "test_the_newest_wins_whoever_writes_at_once"),
    (GivesPositionsAway, "test_a_cancelled_call_leaves_the_store_whole"),
    (MixesPeersUp, "test_every_peer_has_a_position_of_its_own"),
    (KeepsTheLargestPosition, "test_a_position_is_kept_with_its_batch"),
    (IsAlwaysTheSame, "test_the_incarnation_is_that_of_one_content"),
    (PlantsNoTombstones, "test_the_tree_tells_what_is_held"),
    (LeavesExpiredInTheTree, "test_tombstones_leave_the_tree_when_they_expire"),
    (TrustsItsClock, "test_local_writes_come_after_all_they_have_seen"),
    (TakesAnyKey, "test_a_bad_key_is_refused"),
    (without_grace, "test_a_tombstone_is_kept_until_its_grace_is_over_and_then_forgotten"),
    (without_grace, "test_the_grace_is_that_of_the_last_tombstone"),
    (without_end, "test_a_tombstone_is_kept_until_its_grace_is_over_and_then_forgotten"),
    (resolving(Concatenates()), "test_merging_is_associative_commutative_and_idempotent"),
    (resolving(KeepsTheFirst()), "test_merging_is_associative_commutative_and_idempotent"),
    (resolving(KeepsTheFirst()), "test_stores_that_exchange_what_they_hold_agree"),
]


def named(defect: Any) -> str:
    """Return the name of a defect in the ids of tests."""
    return defect.removeprefix("test_") if isinstance(defect, str) else defect.__name__


@pytest.fixture
def unshrunk(full: bool) -> Iterator[None]:
    """Lets hypothesis be content with the first example that fails."""
    settings.register_profile(
        "unshrunk",
        max_examples=300,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        database=None,
        derandomize=True,
    )
    settings.load_profile("unshrunk")
    yield
    settings.load_profile("full" if full else "quick")


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(("store", "rule"), DEFECTS, ids=named)
def test_a_defect_breaks_its_rule(store: Callable[..., MemorySyncEngine], rule: str) -> None:
    """If this fails a store with this defect passes for one that keeps the rule."""

    class Contract(SyncEngineContract):
        deadline_sec = 2.0
        examples = 100

        def open_store(self, place: Any, *, ttl_sec: float, grace_sec: float) -> MemorySyncEngine:
            return store(tombstone_ttl_sec=ttl_sec, tombstone_grace_sec=grace_sec)

    arguments = ("k" * 1025,) if rule == "test_a_bad_key_is_refused" else ()
    with pytest.raises((AssertionError, TimeoutError, ValueError, pytest.fail.Exception)):
        getattr(Contract(), rule)(*arguments)


# Outboxes ---------------------------------------------------------------------------------------


class TellsTooMuch(SqliteStore):
    """Writes a row for what was superseded, too."""

    def _apply(self, changes: Changes, received: Given) -> ApplyResult:
        result = super()._apply(changes, received)
        for change, outcome in zip(changes, result.outcomes, strict=True):
            if outcome is Outcome.SUPERSEDED:
                with self._transaction():
                    self._keep(change)
        return result


class ForgetsUpToTheLast(SqliteStore):
    """Removes all rows up to the last that is named."""

    async def forget_outbox(self, numbers: Sequence[int], mark: str) -> None:
        """Remove them."""
        everything = [row.number for row in await self.read_outbox(10_000)]
        upto = max(numbers, default=0)
        await super().forget_outbox([n for n in everything if n <= upto], mark)


class UsesNumbersAgain(SqliteStore):
    """Numbers rows from 1 each time the outbox was empty."""

    async def forget_outbox(self, numbers: Sequence[int], mark: str) -> None:
        """Remove them, and begin again."""
        await super().forget_outbox(numbers, mark)
        await self._in_thread(lambda: self._db.execute("DELETE FROM sqlite_sequence"))


class ReadsTheNewestFirst(SqliteStore):
    """Reads rows from the wrong end."""

    async def read_outbox(self, limit: int) -> list[OutboxRow]:
        """Return the newest."""
        return [*reversed(await super().read_outbox(10_000))][:limit]


class HidesTombstones(SqliteStore):
    """Leaves deletes out where everything is asked for."""

    async def read_items(self, after: str, limit: int) -> list[SyncItem]:
        """Return live items."""
        return [item for item in await super().read_items(after, limit) if not item.deleted]


class CommitsPositionsFirst(SqliteStore):
    """Notes a position in a transaction of its own, long before the items."""

    def _apply(self, changes: Changes, received: Given) -> ApplyResult:
        super()._apply([], received)
        for change in changes:
            super()._apply([change], None)
        return super()._apply([], None)


class CommitsRowsLater(SqliteStore):
    """Writes the rows of a batch in another transaction than its items."""

    def _apply(self, changes: Changes, received: Given) -> ApplyResult:
        (before,) = self._db.execute("SELECT coalesce(max(number), 0) FROM outbox").fetchone()
        result = super()._apply(changes, received)
        rows = self._db.execute("SELECT * FROM outbox WHERE number > ?", (before,)).fetchall()
        self._db.execute("DELETE FROM outbox WHERE number > ?", (before,))
        for row in rows:
            self._db.execute("INSERT INTO outbox VALUES (?, ?)", row)
        return result


OUTBOX_DEFECTS: list[tuple[type[SqliteStore], str]] = [
    (TellsTooMuch, "test_the_outbox_tells_exactly_what_was_applied"),
    (ForgetsUpToTheLast, "test_rows_are_read_in_order_and_forgotten_by_number"),
    (UsesNumbersAgain, "test_rows_are_read_in_order_and_forgotten_by_number"),
    (ReadsTheNewestFirst, "test_rows_are_read_in_order_and_forgotten_by_number"),
    (HidesTombstones, "test_all_items_are_read_page_by_page"),
]


class _Contract(OutboxContract):
    durable = True
    examples = 100
    store: type[SqliteStore] = SqliteStore
    folder = Path()
    _numbers = itertools.count()

    def new_place(self) -> Path:
        return self.folder / f"{next(self._numbers)}.db"

    def open_store(self, place: Any, *, ttl_sec: float, grace_sec: float) -> SqliteStore:
        return self.store(
            place, node_id="n", tombstone_ttl_sec=ttl_sec, tombstone_grace_sec=grace_sec
        )


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(("store", "rule"), OUTBOX_DEFECTS, ids=named)
def test_a_defect_of_an_outbox_breaks_its_rule(
    store: type[SqliteStore], rule: str, tmp_path: Path
) -> None:
    """If this fails a store whose readers see something else passes for one that keeps the rule."""
    contract = _Contract()
    contract.store, contract.folder = store, tmp_path
    with pytest.raises(AssertionError):
        getattr(contract, rule)()


class _CommitsPositionsFirst(_Contract):
    store = CommitsPositionsFirst


class _CommitsRowsLater(_Contract):
    store = CommitsRowsLater


@pytest.mark.parametrize("contract", [_CommitsPositionsFirst, _CommitsRowsLater], ids=named)
def test_a_process_that_is_killed_shows_what_is_not_one_transaction(
    contract: type[_Contract], tmp_path: Path, full: bool
) -> None:
    """If this fails a store whose crash loses a change passes for a durable one."""
    if not full:
        pytest.skip("--full kills up to 20 processes until it shows")
    made = contract()
    made.folder, made.kills = tmp_path, 20
    with pytest.raises(AssertionError, match="batch"):
        made.test_what_was_answered_outlives_the_process()
