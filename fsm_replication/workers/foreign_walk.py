"""Finds what a foreign node may hold newer, by walking its dotted tree.

A leaf of that tree tells neither time nor order, only that key, version and content are some
others than ours; which side is newer shows when the item is there. So what was once looked at is
remembered by its hash, and passed over as long as that stays the same: nodes of which everything
below has been settled, and keys whose item was fetched and was not newer.

Two round trips to the peer for each level of a flight of nodes: how many children each has, and
which. Where this node keeps a dotted tree of its own, equal nodes are passed over at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fsm_replication.errors import ProtocolError
from fsm_replication.foreign import DOTTED, SEGMENTS_MAX, leaf_hash, reserved
from fsm_replication.heavy import take_turns
from fsm_replication.items import Stamp, is_key
from fsm_replication.redis_dotted import CHILDREN_MAX, DottedNode, DottedReader, child_path
from fsm_replication.workers.comparer import ReadableTree

__all__ = ("ForeignFlight", "ForeignWalk", "SettledHashes", "is_fetchable")

SETTLED_MAX: Final = 50_000
NODES_PER_FLIGHT: Final = 512
CHILDREN_PER_FLIGHT: Final = 10_000


class SettledHashes:
    """Paths of a foreign tree with the hash at which all below them was settled; bounded."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[str, bytes] = OrderedDict()

    def add(self, path: str, digest: bytes) -> None:
        """Remember a path; the oldest of too many are forgotten, and looked at again."""
        self._hashes[path] = digest
        self._hashes.move_to_end(path)
        if len(self._hashes) > SETTLED_MAX:
            self._hashes.popitem(last=False)

    def holds(self, path: str, digest: bytes) -> bool:
        """Say whether everything below a path was settled when it had this hash."""
        return bool(digest) and self._hashes.get(path) == digest

    def add_all(self, leaves: Sequence[tuple[str, bytes]], failed: Collection[str]) -> None:
        """Remember the leaves whose items were fetched, all but those that failed."""
        missing = set(failed)
        for key, digest in leaves:
            if key not in missing:
                self.add(key, digest)

    def update(self, other: SettledHashes) -> None:
        """Remember what another one does."""
        for path, digest in other._hashes.items():
            self.add(path, digest)

    def clear(self) -> None:
        """Forget all of them."""
        self._hashes.clear()

    def __len__(self) -> int:
        return len(self._hashes)


@dataclass(frozen=True, slots=True)
class ForeignFlight:
    """Keys that are to be fetched, with the hashes of their leaves.

    ``skipped`` counts nodes and members that could not be read.
    """

    leaves: Sequence[tuple[str, bytes]]
    skipped: int


@dataclass(frozen=True, slots=True)
class _ToCount:
    nodes: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class _ToRead:
    nodes: list[tuple[str, bytes]]


class ForeignWalk:
    """One walk over a foreign tree, depth first, so that what it keeps in memory is bounded.

    ``stamps`` returns what is held here; ``ours`` is this node's tree where it has a dotted one. What
    is read in one flight takes about ``flight_bytes`` at the peer; a larger node is passed over.
    """

    def __init__(
        self,
        theirs: DottedReader,
        ours: ReadableTree | None,
        stamps: Callable[[Sequence[str]], Awaitable[Sequence[Stamp | None]]],
        settled: SettledHashes,
        *,
        flight_bytes: int,
    ) -> None:
        self._flight_bytes = flight_bytes
        self._theirs = theirs
        self._ours = ours
        self._stamps = stamps
        self._settled = settled
        # Nodes that were looked into, to be settled once the whole walk is.
        self._seen = SettledHashes()
        # None where there is no tree, b"" where what stands there is no hash.
        self._root: bytes | None = None

    async def begin(self) -> bool:
        """Read the root; returns whether there is anything to look into."""
        try:
            self._root = await self._theirs.root()
        except ProtocolError:
            # Only whether anything differs is not known then: what is below can be read all the same.
            self._root = b""
            return True
        if self._root is None or self._settled.holds("", self._root):
            return False
        return self._ours is None or await self._ours.root(DOTTED) != self._root

    @property
    def has_tree(self) -> bool:
        """Whether the peer has published a tree at all, as far as ``begin`` saw."""
        return self._root is not None

    async def flights(self) -> AsyncGenerator[ForeignFlight, None]:
        """Yield the keys that differ, a bounded number at a time."""
        assert self._root is not None
        if not self._root:
            yield ForeignFlight([], 1)
        # What is next is on top: nodes to be counted, or, once counted, nodes to be read.
        stack: list[_ToCount | _ToRead] = [_ToCount([("", self._root)])]
        while stack:
            top = stack.pop()
            if isinstance(top, _ToRead):
                deeper, skipped = await self._look_into(top.nodes)
                if deeper:
                    stack.append(_ToCount(deeper))
                leaves: list[tuple[str, bytes]] = []
            else:
                if len(top.nodes) > NODES_PER_FLIGHT:
                    stack.append(_ToCount(top.nodes[NODES_PER_FLIGHT:]))
                leaves, inner, skipped = await self._count(top.nodes[:NODES_PER_FLIGHT])
                stack += reversed(inner)
            if leaves or skipped:
                yield ForeignFlight(leaves, skipped)

    async def _count(
        self, nodes: Sequence[tuple[str, bytes]]
    ) -> tuple[list[tuple[str, bytes]], list[_ToRead], int]:
        """Tell leaves from nodes that are to be read, and count what is neither."""
        sizes = await self._theirs.sizes([path for path, _ in nodes])
        leaves: list[tuple[str, bytes]] = []
        inner: list[_ToRead] = []
        skipped, filled, held = 0, CHILDREN_PER_FLIGHT, 0
        for (path, digest), found in zip(nodes, sizes, strict=True):
            size, in_bytes = found or (0, 0)
            if found is None or size > CHILDREN_MAX or in_bytes > self._flight_bytes:
                skipped += 1
            elif size:
                if filled + size > CHILDREN_PER_FLIGHT or held + in_bytes > self._flight_bytes:
                    inner.append(_ToRead([]))
                    filled = held = 0
                inner[-1].nodes.append((path, digest))
                filled += size
                held += in_bytes
            elif path and is_fetchable(path):
                leaves.append((path, digest))
            elif path:
                skipped += 1
        return leaves, inner, skipped

    async def _look_into(
        self, nodes: Sequence[tuple[str, bytes]]
    ) -> tuple[list[tuple[str, bytes]], int]:
        """Return the children that differ, and how many could not be read."""
        paths = [path for path, _ in nodes]
        theirs = await self._theirs.children(paths)
        mine: Sequence[Mapping[str, bytes] | None] = [None] * len(paths)
        if self._ours is not None:
            mine = await self._ours.children(DOTTED, paths)
        unknown: list[tuple[str, bytes]] = []
        bad = 0
        for (path, digest), there, here in zip(nodes, theirs, mine, strict=True):
            if there is None or (path.count(".") + 1 >= SEGMENTS_MAX and there.children):
                bad += 1
                continue
            bad += there.bad
            self._seen.add(path, digest)
            unknown += await self._differing(path, there, here or {})
        return await self._not_held(unknown), bad

    async def _not_held(self, children: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        """Leave out the leaves whose version and content are held here."""
        keys: list[str] = []
        for step, (path, _) in enumerate(children):
            await take_turns(step)
            if is_fetchable(path):
                keys.append(path)
        held = dict(zip(keys, await self._stamps(keys), strict=True)) if keys else {}
        found: list[tuple[str, bytes]] = []
        for step, child in enumerate(children):
            await take_turns(step)
            if not _is_leaf_of(child, held.get(child[0])):
                found.append(child)
        return found

    async def _differing(
        self, path: str, there: DottedNode, here: Mapping[str, bytes]
    ) -> list[tuple[str, bytes]]:
        found = []
        for step, segment in enumerate(sorted(there.children)):
            await take_turns(step)
            digest = there.children[segment]
            child = child_path(path, segment)
            if digest and (here.get(segment) == digest or self._settled.holds(child, digest)):
                continue
            found.append((child, digest))
        return found

    def settle(self) -> None:
        """Note that everything the walk has found was dealt with."""
        assert self._root is not None
        self._settled.update(self._seen)
        # Last, so that it is the last to be forgotten.
        self._settled.add("", self._root)


def _is_leaf_of(child: tuple[str, bytes], held: Stamp | None) -> bool:
    if held is None or held.deleted:
        return False
    return leaf_hash(child[0], held.version, held.content_hash) == child[1]


def is_fetchable(path: str) -> bool:
    """Say whether a path can be the key of a foreign node's item."""
    return is_key(path) and not reserved(path)
