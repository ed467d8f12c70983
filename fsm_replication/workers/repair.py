"""Repairs one peer's differences: compares the trees, fetches what is newer there, applies it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from fsm_replication.batch import Part
from fsm_replication.heavy import take_turns
from fsm_replication.items import EMPTY_HASH, Stamp, SyncItem, next_stamp
from fsm_replication.merkle import bucket_of, bucket_path
from fsm_replication.ports import Agreement
from fsm_replication.workers.applier import Applier, make_applier
from fsm_replication.workers.comparer import Comparer, Difference, Group
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.copier import make_comparer, make_source, make_walk
from fsm_replication.workers.fetcher import Fetched, Fetcher
from fsm_replication.workers.item_source import ItemSource
from fsm_replication.workers.peer_history import PeerHistory

__all__ = (
    "Budget",
    "KeyDifference",
    "PeerRepair",
    "StaleVerdict",
    "find_differences",
    "repair_peer",
)

FETCH_KEYS: Final = 1000


@dataclass(slots=True)
class Budget:
    """How many items a cycle may still fetch; None is no limit.

    ``is_late`` says whether the time for the present peer is over. It ends a part only after its
    first flight of items (G12): where comparing alone takes as long, each cycle would begin anew.
    """

    left: int | None = None
    is_late: Callable[[], bool] = lambda: False
    fetched: int = 0

    def begin_part(self, is_late: Callable[[], bool]) -> None:
        """Go on with another peer."""
        self.is_late, self.fetched = is_late, 0

    def time_is_up(self) -> bool:
        """Say whether the time for the present peer is over, and was of use."""
        return self.fetched > 0 and self.is_late()

    @property
    def spent(self) -> bool:
        """Whether nothing more may be fetched from the present peer."""
        return self.left == 0 or self.time_is_up()

    def take(self, wanted: int) -> int:
        """Return how many of these may be fetched now."""
        if self.time_is_up():
            return 0
        return wanted if self.left is None else min(wanted, self.left)

    def spend(self, fetched: int) -> None:
        """Note items that were fetched: only these count."""
        self.fetched += fetched
        if self.left is not None:
            self.left = max(0, self.left - fetched)


@dataclass(frozen=True, slots=True)
class StaleVerdict:
    """A person's word on old items of a peer: to take them, or to delete them everywhere."""

    accept: bool


@dataclass(slots=True)
class PeerRepair:
    """What one pass over one peer came to.

    ``after`` is the last place (bucket and key) that was fetched, where the next pass goes on if
    the budget ended this one; ``complete`` says that everything the peer holds is held here, but for
    the keys ``excepted``: those that could not be taken, and old ones that were left out before.
    ``deferred`` counts what was over the budget, ``passed_over`` keys that could not be taken within
    the last hour, ``held_back`` old items that wait for a person's word.
    """

    in_sync: bool = False
    complete: bool = False
    differing: int = 0
    deferred: int = 0
    passed_over: int = 0
    held_back: int = 0
    rejected: int = 0
    skipped: int = 0
    after: tuple[str, str] | None = None
    fetched: Fetched = field(default_factory=Fetched)
    excepted: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class KeyDifference:
    """A key that differs: what is held here and there, and what fetching it would transfer.

    ``size`` is in bytes, 0 where the peer's is not newer.
    """

    peer_id: str
    key: str
    ours: Stamp | None
    theirs: Stamp | None
    size: int

    @property
    def newer(self) -> str:
        """Which side is newer: "peer" or "local"."""
        if self.theirs is None or (self.ours is not None and self.ours > self.theirs):
            return "local"
        return "peer"


class _Pass:
    def __init__(
        self, context: LinkContext, lines: Lines, budget: Budget, verdict: StaleVerdict | None,
        on_progress: Callable[[PeerRepair], None],
    ) -> None:  # fmt: skip
        self._context = context
        self._lines = lines
        self._budget = budget
        self._verdict = verdict
        self._on_progress = on_progress
        self._applier = make_applier(context)
        self._source = make_source(context, lines)
        self._fetcher = Fetcher(context, self._applier, self._source, "repair")
        self.result = PeerRepair()
        # Old items that are held back, and no exceptions of the agreement so far.
        self._undecided = 0
        self._undeleted: dict[str, int] = {}

    async def run_foreign(self) -> PeerRepair:
        """Walk a foreign node's tree; it holds no deletes, so nothing can be agreed upon."""
        context, result = self._context, self.result
        walk = make_walk(context, self._lines, self._applier)
        if not await walk.begin():
            result.in_sync = True
            result.complete = walk.has_tree
            return result
        async with aclosing(walk.flights()) as flights:
            async for flight in flights:
                result.skipped += flight.skipped
                result.differing += len(flight.leaves)
                await self._take_leaves(flight.leaves)
                self._on_progress(result)
                if self._budget.spent:
                    result.deferred += 1
                    break
        result.in_sync = not (result.differing or result.skipped)
        result.complete = not (result.deferred or result.skipped)
        if result.complete:
            await self._applier.tell_doubtful()
            if not (result.passed_over or result.fetched.failed):
                walk.settle()
            context.note_synced()
        return result

    async def _take_leaves(self, leaves: Sequence[tuple[str, bytes]]) -> None:
        context, result = self._context, self.result
        wanted = [leaf for leaf in leaves if leaf[0] not in context.unfetchable]
        result.passed_over += len(leaves) - len(wanted)
        for begin in range(0, len(wanted), FETCH_KEYS):
            part = wanted[begin : begin + FETCH_KEYS]
            while part and (allowed := self._budget.take(len(part))):
                failed = len(result.fetched.failed)
                done = await self._fetch([key for key, _ in part[:allowed]])
                context.settled.add_all(part[:done], result.fetched.failed[failed:])
                part = part[done:]
            result.deferred += len(part)

    async def run(self, our_root: bytes | None, after: tuple[str, str] | None) -> PeerRepair:
        context, result = self._context, self.result
        comparison, comparer, buckets = await self._begin(our_root)
        result.skipped = comparer.skipped
        # The part before the last key of the pass before comes last: the walk wraps.
        begin = after[0] if after is not None else ""
        ordered = [path for path in buckets if path >= begin]
        ordered += [path for path in buckets if path < begin]
        first = True
        async with aclosing(comparer.groups(ordered)) as groups:
            async for group in groups:
                await self._take(group, after if first else None)
                first = False
                self._on_progress(result)
                if self._budget.spent and group.last != ordered[-1]:
                    # What may be fetched is fetched, and the leaves of all the rest would be read in
                    # every cycle until it is their turn.
                    result.deferred += 1
                    break
        result.in_sync = not (result.differing or result.skipped)
        waiting = result.deferred or result.skipped or self._undecided
        exceptions = context.excepting(
            result.excepted.union(result.fetched.failed), self._undeleted
        )
        if exceptions is not None and not waiting:
            result.complete = True
            await self._applier.tell_doubtful()
            await context.agree(replace(comparison, exceptions=exceptions))
        return result

    async def _begin(self, our_root: bytes | None) -> tuple[Agreement, Comparer, list[str]]:
        """Find the buckets that differ, and what comparing them may come to."""
        context, lines = self._context, self._lines
        history = PeerHistory(context, lines)
        compared, lines.compared = lines.compared, None
        if compared is not None and not context.settings.hot_path.enabled:
            comparer = make_comparer(context, lines, self._applier)
            buckets = await comparer.differing_buckets(our_root)
            if comparer.their_root == compared[0]:
                # Nothing has come to a peer at rest: one question is enough.
                lines.compared = compared
                head, run_id = compared[1], lines.abilities.run_id
                return replace(context.beginning(), head=head, run_id=run_id), comparer, buckets
        # In this order: what comes to the stream meanwhile is not taken for compared.
        comparison = await history.begin_comparison()
        comparer = make_comparer(context, lines, self._applier)
        buckets = await comparer.differing_buckets(our_root)
        assert comparison.head is not None
        lines.compared = comparer.their_root, comparison.head
        return comparison, comparer, buckets

    async def _take(self, group: Group, after: tuple[str, str] | None) -> None:
        context, result = self._context, self.result
        result.skipped += group.skipped
        result.differing += len(group.differences) + len(group.unreadable)
        result.excepted.update(group.unreadable)
        self._undeleted.update(group.undeleted)
        wanted: list[Difference] = []
        stale: list[Difference] = []
        for step, found in enumerate(group.differences):
            await take_turns(step)
            if context.stale.is_spent(found.theirs, found.ours):
                continue
            if found.key in context.unfetchable:
                result.passed_over += 1
                result.excepted.add(found.key)
            elif not context.stale.holds_back(found.key, found.theirs, found.ours) or (
                self._verdict is not None and self._verdict.accept
            ):
                wanted.append(found)
            else:
                stale.append(found)
        if after is not None:
            wanted.sort(key=lambda found: _place(found.key) <= after)
        await self._deal_with_stale(stale)
        for begin in range(0, len(wanted), FETCH_KEYS):
            part = wanted[begin : begin + FETCH_KEYS]
            # What cannot be fetched costs nothing, so there may be budget left for more.
            while part and (allowed := self._budget.take(len(part))):
                done = await self._fetch([found.key for found in part[:allowed]])
                result.after = _place(part[done - 1].key)
                part = part[done:]
            result.deferred += len(part)

    async def _fetch(self, keys: Sequence[str]) -> int:
        """Fetch items of which there is at least one; returns how many keys were dealt with."""
        fetched, context = self.result.fetched, self._context
        before, failed = fetched.items, len(fetched.failed)
        named = [(self._source.redis_key(key), key) for key in keys]
        # The first flight of this call is under way before it is asked.
        done = await self._fetcher.fetch(self._lines.asking, named, fetched, self._budget.is_late)
        context.unfetchable.add(fetched.failed[failed:])
        self._budget.spend(fetched.items - before)
        return done

    async def _deal_with_stale(self, stale: Sequence[Difference]) -> None:
        context = self._context
        if not stale:
            return
        if self._verdict is None:
            excepted = context.stale.exceptions
            for found in stale:
                context.stale.note(found.key, found.theirs)
                if found.key in excepted:
                    self.result.excepted.add(found.key)
                else:
                    self._undecided += 1
            self.result.held_back += len(stale)
            return
        # Rejected: a delete of our own, newer than what the peer holds, which reaches it and
        # everybody else as any other delete does.
        now = context.ports.wall_clock.now_ms()
        part = Part()
        for found in stale:
            at, version = next_stamp(found.theirs, now, key=found.key)
            part.items.append(
                SyncItem(
                    found.key, b"", "binary", EMPTY_HASH, version, at, True, context.local_node_id
                )
            )
            part.wire.append(None)
        await self._applier.hand_over(part, None, "repair")
        self.result.rejected += len(stale)


def _place(key: str) -> tuple[str, str]:
    return bucket_path(bucket_of(key.encode())), key


async def repair_peer(
    context: LinkContext,
    lines: Lines,
    *,
    budget: Budget,
    our_root: bytes | None = None,
    after: tuple[str, str] | None = None,
    verdict: StaleVerdict | None = None,
    on_progress: Callable[[PeerRepair], None] = lambda _result: None,
) -> PeerRepair:
    """Compare with one peer and fetch what is newer there, as far as ``budget`` goes.

    ``our_root`` is the root of our tree where it is known already, ``after`` where the pass before
    ended.

    :raises Blocked: if the link must pause.
    :raises Unsettled: if the store failed.
    :raises ReplicationError: if the peer cannot be read.
    """
    work = _Pass(context, lines, budget, verdict, on_progress)
    if lines.foreign:
        return await work.run_foreign()
    return await work.run(our_root, after)


async def find_differences(context: LinkContext, lines: Lines) -> AsyncIterator[KeyDifference]:
    """Yield every key that differs, with the side that is newer; nothing is changed.

    :raises ReplicationError: if the peer cannot be read.
    """
    applier, source = make_applier(context), make_source(context, lines)
    if lines.foreign:
        async for found in _find_foreign(context, lines, applier, source):
            yield found
        return
    comparer = make_comparer(context, lines, applier)
    buckets = await comparer.differing_buckets(both=True)
    async for group in comparer.groups(buckets, both=True):
        fetching = [found.key for found in group.differences]
        sizes = await lines.asking.pipeline(
            [("STRLEN", source.redis_key(key)) for key in fetching],
            timeout_sec=context.settings.timeouts.command,
        )
        for differing, size in zip(group.differences, sizes, strict=True):
            known = size if isinstance(size, int) else 0
            yield KeyDifference(
                context.peer_id, differing.key, differing.ours, differing.theirs, known
            )
        for key, ours, theirs in group.newer_here:
            yield KeyDifference(context.peer_id, key, ours, theirs, 0)


async def _find_foreign(
    context: LinkContext, lines: Lines, applier: Applier, source: ItemSource
) -> AsyncIterator[KeyDifference]:
    """Fetch what differs to see which side is newer: a foreign leaf does not tell."""
    walk = make_walk(context, lines, applier)
    fetcher = Fetcher(context, applier, source, "repair")
    if not await walk.begin():
        return
    async for flight in walk.flights():
        for begin in range(0, len(flight.leaves), FETCH_KEYS):
            keys = [key for key, _ in flight.leaves[begin : begin + FETCH_KEYS]]
            named = [(source.redis_key(key), key) for key in keys]
            async for item in fetcher.peek(lines.asking, named):
                (ours,) = await applier.call(
                    context.reads, partial(context.store.stamps, [item.key])
                )
                for theirs in source.not_current([item], [ours]):
                    yield KeyDifference(
                        context.peer_id, item.key, ours, theirs.stamp, len(theirs.content)
                    )
