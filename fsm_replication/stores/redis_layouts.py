"""Brings the layouts that lie in a node's Redis in line with those it publishes.

The marker names our own layout only while its tree is whole: after it was built, and until before it
is removed. The dotted one is brought up to date in the background, and may lag behind. What a process
that was killed half way has left is finished by the next opening.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, Final

from fsm_replication.foreign import DOTTED, reserved
from fsm_replication.layout import Keys, glob_escape
from fsm_replication.merkle import BRANCHES, OWN, PARTITIONS, bucket_of
from fsm_replication.stores import redis_scripts as scripts
from fsm_replication.stores.dotted import Run

__all__ = ("LayoutKeeper",)

CLEAR_KEYS: Final = 2000

Call = Callable[..., Awaitable[Any]]
Build = Callable[[Sequence[Any]], Awaitable[Any]]
ScanKeys = Callable[[], AsyncIterator[list[str]]]
ScanRaw = Callable[[str], AsyncIterator[list[bytes]]]


class LayoutKeeper:
    """Builds the trees of ``wanted`` layouts that are missing, and removes all others.

    ``run`` runs a script, ``build`` the one that plants leaves, ``call`` sends a command, ``scan_keys`` yields the keys of all items,
    ``scan_raw`` the names in Redis that match a pattern. All of them raise StoreError.
    """

    def __init__(
        self, keys: Keys, wanted: Collection[str], run: Run, build: Build, call: Call,
        scan_keys: ScanKeys, scan_raw: ScanRaw,
    ) -> None:  # fmt: skip
        self._keys = keys
        self._wanted = frozenset(wanted)
        self._run = run
        self._build = build
        self._call = call
        self._scan_keys = scan_keys
        self._scan_raw = scan_raw

    async def keep(self, published: Collection[str]) -> None:
        """Go from the layouts that the marker names to the wanted ones.

        :raises StoreError: if Redis fails; the next call goes on.
        """
        now = set(published)
        unwanted = now - self._wanted
        if await self._call("EXISTS", self._keys.clearing):
            # Whoever began to remove the dotted layout was killed before its end.
            unwanted.add(DOTTED)
        for layout in sorted(unwanted):
            if layout == DOTTED:
                await self._call("SET", self._keys.clearing, "1")
            now.discard(layout)
            await self._announce(now)
            await (self._clear_own() if layout == OWN else self._clear_dotted())
        for layout in sorted(self._wanted - now):
            await (self._build_own() if layout == OWN else self._mark_all())
            now.add(layout)
            await self._announce(now)

    async def _announce(self, layouts: Collection[str]) -> None:
        partitions = PARTITIONS if OWN in layouts else 0
        names = ",".join(sorted(layouts, reverse=True))
        await self._call("HSET", self._keys.marker, "layouts", names, "partitions", partitions)

    async def _build_own(self) -> None:
        """Plant a leaf for every item that was written without a tree."""
        if await self._call("EXISTS", self._keys.tree):
            for branch in range(BRANCHES):
                await self._run(scripts.CLEAR_BRANCH, [], [self._keys.tree, branch])
        await self._call("UNLINK", f"{self._keys.tree}:expiring")
        async for keys in self._scan_keys():
            args: list[str | int] = []
            for key in keys:
                args += (key, bucket_of(key.encode()))
            if args:
                await self._build(args)

    async def _mark_all(self) -> None:
        """Leave all keys to the publisher of the dotted layout."""
        async for keys in self._scan_keys():
            if keys:
                marks = [part for key in keys for part in (0, key)]
                await self._call("ZADD", self._keys.dirty, *marks)

    async def _clear_dotted(self) -> None:
        """Remove the dotted tree and the items in the foreign form."""
        async for keys in self._scan_keys():
            names = [f"{self._keys.prefix}{key}" for key in keys if not reserved(key)]
            if names:
                await self._run(scripts.CLEAR, names, [])
        pattern = f"{glob_escape(self._keys.prefix)}merkle:*"
        async for raws in self._scan_raw(pattern):
            if raws:
                await self._run(scripts.CLEAR, raws, [])
        own = self._keys
        names = [own.dirty, own.unfolded, own.kept_out, own.lease, own.clearing]
        await self._run(scripts.CLEAR, names, [])

    async def _clear_own(self) -> None:
        """Forget a tree in which nobody plants any more."""
        tree = self._keys.tree
        if not await self._call("EXISTS", tree):
            return
        buckets = [f"{tree}:{number}" for number in range(PARTITIONS)]
        # The digests go last: where they are not, there is no leaf either.
        names = [*buckets, f"{tree}:deleted", tree]
        for begin in range(0, len(names), CLEAR_KEYS):
            await self._run(scripts.CLEAR, names[begin : begin + CLEAR_KEYS], [])
