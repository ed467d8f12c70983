"""Finds what a peer holds newer, by comparing its tree with ours.

One round trip to the peer for each level, however many nodes differ: the root, the branches, the
buckets of branches that differ; then the leaves of buckets that differ, in flights of a bounded
number of leaves. A leaf carries its order tuple, so what is older there is never fetched.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from fsm_replication.errors import BadEntryError
from fsm_replication.heavy import take_turns
from fsm_replication.items import Stamp
from fsm_replication.layout import decode_stamp
from fsm_replication.merkle import OWN, differing

__all__ = ("Comparer", "Difference", "Group", "ReadableTree", "is_wanted")

LEAVES_PER_FLIGHT: Final = 10_000
BUCKETS_PER_FLIGHT: Final = 512
# A node with more children than this is nobody's ordinary bucket, and is passed over.
CHILDREN_MAX: Final = 100_000


class ReadableTree(Protocol):
    """What is needed of our own tree."""

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything."""

    async def children(
        self, layout: str, paths: Sequence[str]
    ) -> Sequence[dict[str, bytes] | None]:
        """Return the children of several nodes by name, in one round trip."""


class SizedTree(ReadableTree, Protocol):
    """What is needed of a peer's tree: nobody knows how large it is."""

    async def sizes(self, layout: str, paths: Sequence[str]) -> list[int]:
        """Return how many keys each bucket holds, in one round trip."""


class Difference(NamedTuple):
    """A key that the peer holds newer; ``ours`` is None where we hold nothing, nor a tombstone."""

    key: str
    theirs: Stamp
    ours: Stamp | None


@dataclass(frozen=True, slots=True)
class Group:
    """The differences of some buckets, of which ``last`` is the path of the last.

    ``skipped`` counts whole buckets that could not be read, ``unreadable`` names the keys whose
    leaves could not, ``undeleted`` those that we have deleted, and when, and the peer not yet.
    ``newer_here`` holds, where it was asked for, key, our order tuple and theirs of what is newer
    here.
    """

    last: str
    differences: Sequence[Difference]
    skipped: int
    newer_here: Sequence[tuple[str, Stamp, Stamp | None]] = ()
    unreadable: Sequence[str] = ()
    undeleted: Mapping[str, int] = field(default_factory=dict)


def is_wanted(theirs: Stamp, ours: Stamp | None, *, by_stamp: bool) -> bool:
    """Say whether a peer's item is to be fetched: it is newer, or a resolver must see both."""
    if ours is None or theirs > ours:
        return True
    return not (by_stamp or theirs.deleted or ours.deleted or theirs == ours)


class Comparer:
    """Compares our tree with a peer's; without a tree of ours every bucket is looked into.

    ``stamps`` returns what is held for keys that our tree does not hold: a tombstone that expired
    has left the tree but still wins as long as it is kept. Where ``by_stamp`` is false a resolver
    looks at contents, and of two live items that differ the older is needed too. ``their_root`` is
    the root of the peer's tree as it was asked for last.
    """

    def __init__(
        self,
        ours: ReadableTree | None,
        theirs: SizedTree,
        stamps: Callable[[Sequence[str]], Awaitable[Sequence[Stamp | None]]],
        *,
        layout: str = OWN,
        by_stamp: bool = True,
    ) -> None:
        self._by_stamp = by_stamp
        self.skipped = 0
        self.their_root = b""
        self._ours = ours
        self._theirs = theirs
        self._stamps = stamps
        self._layout = layout

    async def differing_buckets(
        self, our_root: bytes | None = None, *, both: bool = False
    ) -> list[str]:
        """Return the paths of the buckets that differ, in order; none if the roots are equal.

        Buckets that are empty at the peer are left out, unless ``both`` sides are looked into.
        """
        layout, ours = self._layout, self._ours
        self.their_root = await self._theirs.root(layout)
        if ours is not None:
            mine = await ours.root(layout) if our_root is None else our_root
            if mine == self.their_root:
                return []
        paths = [""]
        for _ in range(2):
            theirs = await self._theirs.children(layout, paths)
            mine_too: Sequence[dict[str, bytes] | None] = [None] * len(paths)
            if ours is not None:
                mine_too = await ours.children(layout, paths)
            self.skipped += sum(there is None for there in theirs)
            paths = [
                path + name
                for path, there, here in zip(paths, theirs, mine_too, strict=True)
                if there is not None
                for name in differing(here or {}, there)
                if both or name in there
            ]
            if not paths:
                return []
        return paths

    async def groups(
        self, buckets: Sequence[str], *, both: bool = False
    ) -> AsyncGenerator[Group, None]:
        """Yield what differs in these buckets, in their order, a bounded number at a time."""
        for begin in range(0, len(buckets), BUCKETS_PER_FLIGHT):
            chunk = buckets[begin : begin + BUCKETS_PER_FLIGHT]
            sizes = await self._theirs.sizes(self._layout, chunk)
            flight: list[str] = []
            leaves = skipped = 0
            for path, size in zip(chunk, sizes, strict=True):
                if size > CHILDREN_MAX:
                    skipped += 1
                    continue
                if flight and leaves + size > LEAVES_PER_FLIGHT:
                    yield await self._look_into(flight, skipped, both=both)
                    flight, leaves, skipped = [], 0, 0
                flight.append(path)
                leaves += size
            if flight:
                yield await self._look_into(flight, skipped, both=both)
            elif skipped:
                yield Group(chunk[-1], (), skipped)

    async def _look_into(self, paths: Sequence[str], skipped: int, *, both: bool) -> Group:
        found = await self._theirs.children(self._layout, paths)
        mine: Sequence[dict[str, bytes] | None] = [None] * len(paths)
        if self._ours is not None:
            mine = await self._ours.children(self._layout, paths)
        look = _Look(self._by_stamp, both=both)
        for theirs, ours in zip(found, mine, strict=True):
            if theirs is None:
                skipped += 1
            else:
                await look.compare(theirs, ours or {})
        if look.unknown:
            stamps = await self._stamps([key for key, _ in look.unknown])
            pairs = zip(look.unknown, stamps, strict=True)
            for step, ((key, stamp), held) in enumerate(pairs):
                look.judge(key, stamp, held)
                await take_turns(step)
        return Group(
            paths[-1], look.newer, skipped, look.newer_here, look.unreadable, look.undeleted
        )


class _Look:
    """Sorts the leaves of some buckets into newer there, newer here, and not in our tree."""

    def __init__(self, by_stamp: bool, *, both: bool) -> None:
        self._by_stamp = by_stamp
        self._both = both
        self.newer: list[Difference] = []
        self.newer_here: list[tuple[str, Stamp, Stamp | None]] = []
        self.unknown: list[tuple[str, Stamp]] = []
        self.unreadable: list[str] = []
        self.undeleted: dict[str, int] = {}

    async def compare(self, theirs: Mapping[str, bytes], ours: Mapping[str, bytes]) -> None:
        """Look at the leaves of one bucket on both sides."""
        for step, key in enumerate(sorted(theirs)):
            await take_turns(step)
            raw, held = theirs[key], ours.get(key)
            if raw == held:
                continue
            try:
                stamp = decode_stamp(raw)
                our_stamp = None if held is None else decode_stamp(held)
            except BadEntryError:
                self.unreadable.append(key)
                continue
            if our_stamp is None:
                self.unknown.append((key, stamp))
            else:
                self.judge(key, stamp, our_stamp)
        if self._both:
            for key in sorted(ours.keys() - theirs.keys()):
                self.newer_here.append((key, decode_stamp(ours[key]), None))

    def judge(self, key: str, theirs: Stamp, ours: Stamp | None) -> None:
        """Note which side of a key is newer."""
        if ours is not None and ours.deleted and not theirs.deleted and ours > theirs:
            self.undeleted[key] = ours.updated_at
        if is_wanted(theirs, ours, by_stamp=self._by_stamp):
            self.newer.append(Difference(key, theirs, ours))
        elif self._both and ours is not None and theirs != ours:
            self.newer_here.append((key, ours, theirs))
