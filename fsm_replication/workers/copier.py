"""Bootstrap: copies a peer's items where its stream alone cannot bring this store up to date.

A row in the cursor store notes the stream's head *before* copying starts; when the copy is
complete, the cursor is set to that head and the row removed, in one transaction. Whatever changed
at the peer meanwhile stands in the stream after the head, and is read from there.

Where the peer has a tree, it is compared with ours and only what is newer is fetched: on equal
trees this is one round trip, and a copy that was interrupted finds equal what it has copied. A
store without a tree looks into every bucket, and notes in the row how far it has come.

Where the peer is a foreign node, its dotted tree is walked. That tree is brought up to date in the
background and holds no deletes: reading goes on from the oldest entry in the stream, and what the
gap held of deletes stays open in the ledger.

Where the peer has no tree, its items are found with SCAN. Its cursor means nothing after the peer's
Redis restarts, so a copy that a crash interrupted begins its walk anew, but compares order tuples
first. Nothing tells of deletes then: what the gap held of them stays open in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from fsm_replication.batch import Part
from fsm_replication.errors import BadEntryError, ProtocolError
from fsm_replication.foreign import DOTTED
from fsm_replication.items import Stamp
from fsm_replication.layout import STAMP_BYTES, Keys, decode_stamp
from fsm_replication.merkle import Tree
from fsm_replication.ports import Agreement, BootstrapRow, Cursor, GapRow, Position
from fsm_replication.redis_dotted import DottedReader
from fsm_replication.replies import scanned, values
from fsm_replication.stream import DataDecoder
from fsm_replication.workers.applier import Applier
from fsm_replication.workers.comparer import Comparer, Difference, is_wanted
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.fetcher import (
    Fetched,
    Fetcher,
    check_replies,
)
from fsm_replication.workers.foreign_items import ForeignItems
from fsm_replication.workers.foreign_walk import ForeignWalk
from fsm_replication.workers.history import Gap
from fsm_replication.workers.item_source import ItemSource, OwnItems
from fsm_replication.workers.peer_history import PeerHistory
from fsm_replication.workers.peer_tree import PeerTree

__all__ = ("Copier", "GuardedTree", "make_comparer", "make_source", "make_walk", "source_at")

SCAN_COUNT: Final = 500
# SCAN may find more than it was asked for, while the server's table of keys grows or shrinks.
SCANNED_MAX: Final = 20 * SCAN_COUNT
FETCH_KEYS: Final = 1000
LOG_INTERVAL_SEC: Final = 5.0
_WALK_MARK: Final = "own:"


class GuardedTree:
    """The local store's tree, read through the store's circuit and within its timeout."""

    def __init__(self, context: LinkContext, applier: Applier, tree: Tree) -> None:
        self._circuit = context.reads
        self._call = applier.call
        self._tree = tree

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything."""
        return await self._call(self._circuit, lambda: self._tree.root(layout))

    async def children(
        self, layout: str, paths: Sequence[str]
    ) -> Sequence[dict[str, bytes] | None]:
        """Return the children of several nodes."""
        return await self._call(self._circuit, lambda: self._tree.children(layout, paths))


def make_comparer(context: LinkContext, lines: Lines, applier: Applier) -> Comparer:
    """Return what compares a peer's tree with the one of the local store."""
    ours = context.store.tree
    return Comparer(
        None if ours is None else GuardedTree(context, applier, ours),
        PeerTree(context, lines),
        lambda keys: applier.call(context.reads, lambda: context.store.stamps(keys)),
        by_stamp=context.store.resolver.by_stamp,
    )


def make_walk(context: LinkContext, lines: Lines, applier: Applier) -> ForeignWalk:
    """Return what walks a foreign node's tree."""
    timeout, limits = context.settings.timeouts.command, context.settings.limits
    tree = context.store.tree
    ours = None
    if tree is not None and DOTTED in tree.layouts:
        ours = GuardedTree(context, applier, tree)
    return ForeignWalk(
        DottedReader(
            lambda commands: lines.asking.pipeline(commands, timeout_sec=timeout),
            context.peer.redis_prefix,
        ),
        ours,
        lambda keys: applier.call(context.reads, lambda: context.store.stamps(keys)),
        context.settled,
        flight_bytes=limits.batch_bytes,
    )


def make_source(context: LinkContext, lines: Lines) -> ItemSource:
    """Return how the peer's items are found and read."""
    return source_at(lines, context.peer.redis_prefix, context.settings.limits.payload_bytes)


def source_at(lines: Lines, redis_prefix: str, payload_bytes: int) -> ItemSource:
    """Return how the items of a peer are found and read, each of so many bytes of content at most."""
    if lines.foreign:
        return ForeignItems(lines, redis_prefix, payload_bytes)
    return OwnItems(Keys(redis_prefix), DataDecoder(payload_bytes))


class Copier:
    """Copies all items of one peer; may be interrupted between steps and goes on later."""

    def __init__(
        self,
        context: LinkContext,
        lines: Lines,
        applier: Applier,
        source: ItemSource,
        incarnation: str,
        interrupted: Callable[[], bool],
    ) -> None:
        self._context = context
        self._lines = lines
        self._applier = applier
        self._source = source
        self._history = PeerHistory(context, lines)
        self._fetcher = Fetcher(context, applier, source, "bootstrap")
        self._incarnation = incarnation
        self._interrupted = interrupted
        self._row: BootstrapRow | None = None
        self._fetched = Fetched()
        self._began_at = 0.0
        self._differing = 0
        self._held_back = 0
        self._unreadable = 0
        self._comparison = Agreement(0)
        # Keys that this copy leaves out, as far as an agreement may.
        self._excepted: set[str] = set()
        self._undeleted: dict[str, int] = {}
        self._logged_at = 0.0

    async def run(self, gap: Gap | None, why: str) -> Position | None:
        """Copy; returns the position to read on from, or None if it was interrupted."""
        if self._row is None:
            self._began_at = self._context.ports.clock.monotonic()
            self._row = await self._begin(gap, why)
        if self._lines.has_tree and self._context.store.tree is not None:
            self._comparison = await self._history.begin_comparison()
        else:
            # Without trees nothing is agreed; without ours some buckets may have been copied long ago.
            head, run_id = self._row.head, self._row.run_id
            self._comparison = replace(self._context.beginning(), head=head, run_id=run_id)
        if self._lines.foreign:
            done = await self._walk_foreign()
        elif self._lines.has_tree:
            done = await self._walk_tree(self._row)
        else:
            done = await self._walk_scan()
        return await self._finish(self._row) if done else None

    async def _begin(self, gap: Gap | None, why: str) -> BootstrapRow:
        context = self._context
        store = context.ports.cursor_store
        record = await store.load(context.peer_id)
        row = record.bootstrap
        if row is not None and row.incarnation == self._incarnation and await self._is_ours(row):
            context.log.info("bootstrap_resumed", head=str(row.head.stream_id))
            return row
        info = await self._history.info()
        # What came to a stream that was empty is there to be read, whatever else may be missing.
        head = info.start if gap is not None and gap.all_is_new else info.head
        if self._lines.foreign and info.first_id is not None:
            # Its tree is brought up to date in the background: what is not in it yet is in the
            # stream, where the head of now may already be past it.
            head = info.before_first
            walk = make_walk(context, self._lines, self._applier)
            if gap is None and info.trimmed != 0 and not await walk.begin() and not walk.has_tree:
                gap = Gap(info.trimmed, "no tree to copy items from")
        row = BootstrapRow(head, "", self._incarnation, why, self._lines.abilities.run_id)
        entry = None
        if gap is not None:
            entry = GapRow(context.peer_id, context.ports.wall_clock.now_ms(), gap.missed, why)
            context.progress.gaps_open += 1
            context.metrics.trimmed.inc()
        await store.begin_bootstrap(context.peer_id, row, entry)
        context.log.info(
            "bootstrap_started",
            why=why,
            head=str(info.last_id),
            by=f"{self._lines.layout} tree" if self._lines.layout else "scan",
        )
        return row

    async def _is_ours(self, row: BootstrapRow) -> bool:
        """Say whether a head that was noted is one of this stream: its server may be an older one."""
        if row.run_id == self._lines.abilities.run_id:
            return True
        return await self._history.has(row.head.stream_id)

    def _show(self) -> None:
        now = self._context.ports.clock.monotonic()
        took = now - self._began_at
        rate = self._fetched.items / took if took > 0 else 0.0
        known = f"{self._differing} keys known to differ, " if self._lines.layout else ""
        self._context.progress.copied = self._fetched.items
        self._context.progress.bootstrap = (
            f"{known}{self._fetched.items} items copied, {rate:.0f}/s"
        )
        if now - self._logged_at >= LOG_INTERVAL_SEC:
            self._logged_at = now
            self._context.log.info(
                "bootstrap_progress",
                differing=self._differing,
                copied=self._fetched.items,
                per_sec=round(rate),
            )

    # By the trees

    async def _walk_tree(self, row: BootstrapRow) -> bool:
        """Fetch what differs, bucket by bucket; False if it was interrupted."""
        context = self._context
        comparer = make_comparer(context, self._lines, self._applier)
        buckets = await comparer.differing_buckets()
        if context.store.tree is None and row.walk.startswith(_WALK_MARK):
            # Nothing here tells what was copied already, but the row does.
            buckets = [path for path in buckets if path > row.walk.removeprefix(_WALK_MARK)]
        # What an interrupted walk knew to differ was fetched, or is found again.
        self._differing = self._fetched.items
        self._unreadable = comparer.skipped
        async for group in comparer.groups(buckets):
            self._differing += len(group.differences) + len(group.unreadable)
            self._excepted.update(group.unreadable)
            self._undeleted.update(group.undeleted)
            wanted = [found for found in group.differences if not self._holds_back(found)]
            for begin in range(0, len(wanted), FETCH_KEYS):
                if self._interrupted():
                    return False
                await self._fetch([found.key for found in wanted[begin : begin + FETCH_KEYS]])
            if group.skipped or group.unreadable:
                self._unreadable += group.skipped
                context.metrics.error("bad_node")
                count = group.skipped + len(group.unreadable)
                context.log.warning("tree_nodes_skipped", count=count)
            if context.store.tree is None:
                await context.ports.cursor_store.save_walk(
                    context.peer_id, f"{_WALK_MARK}{group.last}"
                )
            if self._interrupted():
                return False
        return True

    async def _fetch(self, keys: list[str]) -> None:
        named = [(self._source.redis_key(key), key) for key in keys]
        await self._fetcher.fetch(self._lines.asking, named, self._fetched)
        self._show()

    def _holds_back(self, found: Difference) -> bool:
        guard = self._context.stale
        if not guard.holds_back(found.key, found.theirs, found.ours):
            return False
        self._applier.check_age()
        guard.note(found.key, found.theirs)
        if found.key in guard.exceptions:
            self._excepted.add(found.key)
        else:
            self._held_back += 1
        return True

    # By the tree of a foreign node

    async def _walk_foreign(self) -> bool:
        """Fetch what differs; False if it was interrupted: then what was fetched is passed over."""
        context = self._context
        # What was settled before the gap may have been lost since.
        context.settled.clear()
        walk = make_walk(context, self._lines, self._applier)
        if not await walk.begin():
            if not walk.has_tree:
                context.log.warning("no_tree_yet", then="its stream is read from the oldest entry")
            return True
        self._differing = self._fetched.items
        async for flight in walk.flights():
            self._differing += len(flight.leaves)
            if flight.skipped:
                self._unreadable += flight.skipped
                context.metrics.error("bad_node")
                context.log.warning("tree_nodes_skipped", count=flight.skipped)
            for begin in range(0, len(flight.leaves), FETCH_KEYS):
                if self._interrupted():
                    return False
                part = flight.leaves[begin : begin + FETCH_KEYS]
                failed = len(self._fetched.failed)
                await self._fetch([key for key, _ in part])
                context.settled.add_all(part, self._fetched.failed[failed:])
            if self._interrupted():
                return False
        if not (self._unreadable or self._fetched.failed):
            walk.settle()
        return True

    # By SCAN

    async def _walk_scan(self) -> bool:
        """Copy what SCAN finds; False if it was interrupted: then the walk begins anew."""
        scan, mark, steps, lap = b"0", b"", 0, 1
        while not self._interrupted():
            scan = await self._step(scan)
            if scan == b"0":
                return True
            # A repeated cursor means an endless loop (cycle detection by Brent, BIT 20, 1980).
            if scan == mark:
                raise ProtocolError(f"SCAN goes round and never ends: cursor {scan[:32]!r} again")
            steps += 1
            if steps == lap:
                mark, steps, lap = scan, 0, lap * 2
        return False

    async def _step(self, scan: bytes) -> bytes:
        context, asking = self._context, self._lines.asking
        timeout = context.settings.timeouts.command
        reply = await asking.call(
            "SCAN", scan, "MATCH", self._source.match, "COUNT", SCAN_COUNT, timeout_sec=timeout
        )
        next_scan, found = scanned(reply, "SCAN", SCANNED_MAX)
        # COUNT is a wish: how many come is the peer's choice.
        for begin in range(0, len(found), FETCH_KEYS):
            part = found[begin : begin + FETCH_KEYS]
            named = [(raw, key) for raw in part if (key := self._source.key_of(raw)) is not None]
            if named:
                named = await self._only_newer(named)
            await self._fetcher.fetch(asking, named, self._fetched)
        self._show()
        return next_scan

    async def _only_newer(self, named: list[tuple[bytes, str]]) -> list[tuple[bytes, str]]:
        context = self._context
        raws = await self._lines.asking.pipeline(
            [("GETRANGE", raw, 0, STAMP_BYTES - 1) for raw, _ in named],
            timeout_sec=context.settings.timeouts.command,
        )
        check_replies(values(raws, "GETRANGE"))
        held = await self._applier.call(
            context.reads, lambda: context.store.stamps([key for _, key in named])
        )
        return [
            pair
            for pair, raw, mine in zip(named, raws, held, strict=True)
            if self._is_wanted(pair[1], raw, mine)
        ]

    def _is_wanted(self, key: str, raw: Any, ours: Stamp | None) -> bool:
        if not isinstance(raw, bytes):
            return True
        try:
            theirs = decode_stamp(raw)
        except BadEntryError:
            return True
        if not is_wanted(theirs, ours, by_stamp=self._context.store.resolver.by_stamp):
            return False
        return not self._holds_back(Difference(key, theirs, ours))

    # The end

    async def _finish(self, row: BootstrapRow) -> Position:
        context = self._context
        # The position in the store moves along, or the next start would go on from the old one.
        await self._applier.hand_over(Part(), row.head)
        await self._applier.tell_doubtful()
        cursor = Cursor(row.head, self._incarnation, row.run_id)
        store, now = context.ports.cursor_store, context.ports.wall_clock.now_ms()
        exceptions = context.excepting(self._excepted.union(self._fetched.failed), self._undeleted)
        whole = self._lines.has_tree and not (self._held_back or self._unreadable)
        whole = whole and exceptions is not None
        await store.finish_bootstrap(context.peer_id, cursor, now if whole else None)
        context.cursors.saved(context.peer_id, cursor)
        context.log.info(
            "bootstrap_finished",
            items=self._fetched.items,
            skipped=len(self._fetched.failed),
            held_back=self._held_back,
        )
        if whole and exceptions is not None:
            await context.agree(replace(self._comparison, exceptions=exceptions))
        context.progress.gaps_open = len((await store.load(context.peer_id)).gaps)
        context.unfetchable.add(self._fetched.failed)
        context.progress.bootstrap = ""
        self._row = None
        return row.head
