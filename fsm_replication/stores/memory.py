"""A store in the memory of this process: for followers, caches and tests."""

from __future__ import annotations

import asyncio
import heapq
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fsm_replication.errors import MergeError
from fsm_replication.items import (
    EMPTY_HASH,
    LastWriterWins,
    Resolver,
    Stamp,
    SyncItem,
    check_content,
    check_key,
    content_hash,
    encode_json,
    next_stamp,
    resolve,
)
from fsm_replication.layout import encode_stamp
from fsm_replication.merkle import OWN, MerkleTree, Tree
from fsm_replication.ports import Position, SystemWallClock, WallClock
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received, SyncEngine

__all__ = ("MemorySyncEngine",)

# Tombstones forgotten per call at most, so that no call takes long after a quiet week.
FORGET_MAX: Final = 256
# Leaves that are brought up to date before other tasks get their turn.
LEAVES_PER_TURN: Final = 500


class MemorySyncEngine(SyncEngine):
    """Holds items in a dict; a new object is a new incarnation and starts empty.

    Where ``resolver`` looks at contents, two live items of a key become what it makes of them.
    Tombstones are kept until max(expiry, arrival) + grace, both in seconds. Set
    ``accepting_writes`` to False to make links pause.
    """

    def __init__(
        self,
        *,
        node_id: str = "",
        tombstone_ttl_sec: float = 7 * 86_400,
        tombstone_grace_sec: float = 86_400,
        resolver: Resolver | None = None,
        wall_clock: WallClock | None = None,
    ) -> None:
        self.node_id = node_id
        self.accepting_writes = True
        self._ttl_ms = round(tombstone_ttl_sec * 1000)
        self._grace_ms = round(tombstone_grace_sec * 1000)
        self._wall_clock = wall_clock or SystemWallClock()
        self._resolver = resolver or LastWriterWins()
        self._incarnation = uuid.uuid4().hex
        self._items: dict[str, SyncItem] = {}
        self._live = 0
        # When each tombstone may be forgotten, with its time and version; one that was replaced
        # is passed over.
        self._forget_at: list[tuple[int, str, int, int]] = []
        self._tree = _LazyTree(self._items, self._ttl_ms, self._wall_clock)

    @property
    def resolver(self) -> Resolver:
        """How two live items of one key become one."""
        return self._resolver

    @property
    def tree(self) -> Tree:
        """The tree of what is held; it is made when it is first read, and costs nothing before."""
        return self._tree

    async def live_items(self) -> int:
        """Return how many live items are held."""
        return self._live

    async def incarnation(self) -> str:
        """Return a name that is new for every object."""
        return self._incarnation

    def should_accept_writes(self) -> bool:
        """Return ``accepting_writes``."""
        return self.accepting_writes

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Keep what is newer; only what the resolver cannot merge is refused."""
        items, applied, superseded = self._items, Outcome.APPLIED, Outcome.SUPERSEDED
        outcomes: list[Outcome] = []
        reasons: dict[int, str] = {}
        live_added = live_deleted = 0
        now = self._wall_clock.now_ms()
        self._forget(now)
        resolver, by_stamp = self._resolver, self._resolver.by_stamp
        for arrived in changes:
            change = arrived
            held = items.get(change.key)
            if held is None:
                pass
            elif not by_stamp:
                try:
                    made = resolve(resolver, held, change)
                except MergeError as error:
                    reasons[len(outcomes)] = str(error)
                    outcomes.append(Outcome.REFUSED)
                    continue
                if made is None:
                    outcomes.append(superseded)
                    continue
                change = made
            elif held.updated_at > change.updated_at or (
                held.updated_at == change.updated_at and held.stamp >= change.stamp
            ):
                outcomes.append(superseded)
                continue
            held_live = held is not None and not held.deleted
            if change.deleted:
                if held is None and change.updated_at + self._ttl_ms <= now:
                    # It expired on its way, and there is nothing here for it to delete.
                    outcomes.append(superseded)
                    continue
                self._remember(change, now)
                live_deleted += held_live
            live_added += not (change.deleted or held_live)
            items[change.key] = change
            outcomes.append(applied)
        self._live += live_added - live_deleted
        self._tree.touch(changes)
        return ApplyResult(outcomes, reasons, live_deleted, live_added)

    def _remember(self, tombstone: SyncItem, now: int) -> None:
        until = max(tombstone.updated_at + self._ttl_ms, now) + self._grace_ms
        entry = (until, tombstone.key, tombstone.updated_at, tombstone.version)
        heapq.heappush(self._forget_at, entry)

    def _forget(self, now: int) -> None:
        for _ in range(FORGET_MAX):
            if not self._forget_at or self._forget_at[0][0] > now:
                return
            _, key, updated_at, version = heapq.heappop(self._forget_at)
            held = self._items.get(key)
            if (
                held is not None
                and held.deleted
                and (held.updated_at, held.version) == (updated_at, version)
            ):
                del self._items[key]

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what is held, tombstones included."""
        return [self._items.get(key) for key in keys]

    async def stamps(self, keys: Sequence[str]) -> list[Stamp | None]:
        """Return the order tuples of what is held."""
        held = map(self._items.get, keys)
        return [None if item is None else item.stamp for item in held]

    async def applied_position(self, peer_id: str) -> Position | None:
        """Return None: positions are kept in the cursor store alone."""
        return None

    async def scan(self, prefix: str = "") -> AsyncIterator[SyncItem]:
        """Yield the live items whose keys start with ``prefix``, in the order of keys."""
        for key in sorted(key for key in self._items if key.startswith(prefix)):
            item = self._items.get(key)
            if item is not None and not item.deleted:
                yield item

    async def put(self, key: str, content: bytes, content_type: str = "binary") -> SyncItem:
        """Write locally; returns the item as it is held.

        :raises InvalidKeyError: if the key is not one.
        :raises TypeError: if the content is not bytes.
        :raises ValueError: if the content type is neither binary nor json, or if it is json and the
            content is not.
        :raises StampAheadError: if the held item is stamped more than a day ahead of the clock.
        """
        check_key(key)
        content = check_content(key, content, content_type)
        digest = content_hash(content)
        updated_at, version = self._next(key)
        item = SyncItem(
            key, content, content_type, digest, version, updated_at, False, self.node_id
        )
        await self.apply_many([item])
        return self._items[key]

    async def put_json(self, key: str, value: Any) -> SyncItem:
        """Write a value as compact JSON.

        :raises TypeError: if the value cannot be written as JSON.
        :raises ValueError: if it holds NaN or an infinite number; and as ``put`` does.
        """
        return await self.put(key, encode_json(key, value), "json")

    async def delete(self, key: str) -> bool:
        """Delete locally; returns whether there was a live item.

        :raises InvalidKeyError: if the key is not one.
        :raises StampAheadError: if the held item is stamped more than a day ahead of the clock.
        """
        check_key(key)
        held = self._items.get(key)
        if held is None or held.deleted:
            return False
        updated_at, version = self._next(key)
        tombstone = SyncItem(
            key, b"", "binary", EMPTY_HASH, version, updated_at, True, self.node_id
        )
        await self.apply_many([tombstone])
        return True

    async def now_ms(self) -> int:
        """Return the time by which it stamps, in milliseconds since the epoch."""
        return self._wall_clock.now_ms()

    async def replace(self, item: SyncItem, held: Stamp) -> bool:
        """Put an item in the place of exactly what ``held`` names, even if it is older.

        It is a person's way out where a wrong clock has stamped a key far ahead. False, and nothing has
        changed, if something else is held by now.

        :raises InvalidKeyError: if the key is not one.
        """
        check_key(item.key)
        known = self._items.get(item.key)
        if known is None or known.stamp != held:
            return False
        if item.deleted:
            self._remember(item, self._wall_clock.now_ms())
        self._live += (not item.deleted) - (not known.deleted)
        self._items[item.key] = item
        self._tree.touch([item])
        return True

    def _next(self, key: str) -> tuple[int, int]:
        held = self._items.get(key)
        now = self._wall_clock.now_ms()
        return next_stamp(None if held is None else held.stamp, now, key=key)

    def __len__(self) -> int:
        return self._live

    def __repr__(self) -> str:
        return f"<MemorySyncEngine {self.node_id!r} {len(self)} items>"


class _LazyTree:
    """The tree of a dict of items, brought up to date when it is read."""

    layouts: Final = frozenset({OWN})

    def __init__(self, items: dict[str, SyncItem], ttl_ms: int, wall_clock: WallClock) -> None:
        self._items = items
        self._ttl_ms = ttl_ms
        self._wall_clock = wall_clock
        self._tree = MerkleTree()
        self._touched: set[str] | None = None
        # What readings wait for, in order: each for what was touched before it, and no more, so that
        # it ends however much is being written.
        self._due: deque[set[str]] = deque()
        self._asked = self._planted = 0
        self._expiring: list[tuple[int, str]] = []

    def touch(self, changes: Sequence[SyncItem]) -> None:
        """Note whose leaves may have changed; nothing as long as nobody reads the tree."""
        if self._touched is not None:
            self._touched.update([change.key for change in changes])

    async def _refresh(self) -> None:
        if self._touched is None:
            self._touched = set(self._items)
        if self._touched:
            self._due.append(self._touched)
            self._touched = set()
            self._asked += 1
        mine = self._asked
        while self._planted < mine:
            due = self._due[0]
            for _ in range(min(LEAVES_PER_TURN, len(due))):
                self._plant(due.pop())
            if not due:
                self._due.popleft()
                self._planted += 1
            await asyncio.sleep(0)
        now = self._wall_clock.now_ms()
        while self._expiring and self._expiring[0][0] <= now:
            _, key = heapq.heappop(self._expiring)
            self._plant(key)

    def _plant(self, key: str) -> None:
        item = self._items.get(key)
        expiry = 0 if item is None else item.updated_at + self._ttl_ms
        if item is None or (item.deleted and expiry <= self._wall_clock.now_ms()):
            self._tree.set(key, None)
            return
        self._tree.set(key, encode_stamp(item))
        if item.deleted:
            heapq.heappush(self._expiring, (expiry, key))

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything."""
        await self._refresh()
        return self._tree.root()

    async def children(self, layout: str, paths: Sequence[str]) -> list[dict[str, bytes]]:
        """Return the children of several nodes."""
        await self._refresh()
        return [self._tree.children(path) for path in paths]

    async def sizes(self, layout: str, paths: Sequence[str]) -> list[int]:
        """Return how many keys each bucket holds."""
        return [self._tree.size(path) for path in paths]

    async def clean_branches(self, layout: str) -> Sequence[str]:
        """Return the root: reading brings everything up to date."""
        return ("",)

    async def is_branch_clean(self, layout: str, path: str) -> bool:
        """Return True: reading brings everything up to date."""
        return True
