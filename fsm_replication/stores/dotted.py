"""Publishes a node's items in the layout of foreign nodes, in the background.

Theory of operation. Each write of an item marks its key as dirty, in the item's own script. The
publisher takes dirty keys, writes their items in the foreign form and their leaves into the dotted
tree, and marks the nodes above them as *unfolded*; after a round of keys it computes the hashes of
those nodes, the deepest first. Everything that is under way is written down in Redis in the same
script that makes it so, so a crash at any point leaves work to be done and nothing wrong.

One process of the node publishes at a time, whichever holds the lease; it is renewed with each
step, and the others look once in a while whether it is free.

What it costs: a key one script with a handful of commands; folding a node reads all its children,
so a node with a million of them costs 80 MB of reading for each round in which one of them changes.
A flat key space belongs into our own layout alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any, Final

from structlog.stdlib import BoundLogger

from fsm_replication.errors import BadEntryError, StoreError
from fsm_replication.foreign import (
    children_key,
    dotted_problem,
    encode_foreign,
    interior_hash,
    leaf_hash,
    parse_member,
    reserved,
)
from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys
from fsm_replication.ports import Clock
from fsm_replication.retry import DAEMON
from fsm_replication.stores import dotted_scripts as scripts

__all__ = ("DottedPublisher", "NodeHasher")

KEYS_PER_STEP: Final = 100
BYTES_PER_STEP: Final = 4 * 1024 * 1024
KEYS_PER_ROUND: Final = 10_000
NODES_PER_STEP: Final = 100
CHILDREN_PER_PAGE: Final = 10_000
LEASE_SEC: Final = 15.0
IDLE_SEC: Final = 0.5
# Turning a content into an array of numbers takes about 40 ms for a MiB.
_IN_A_THREAD_BYTES: Final = 256 * 1024

Run = Callable[[str, Sequence[str | bytes], Sequence[Any]], Awaitable[Any]]
Ask = Callable[[Sequence[Sequence[Any]]], Awaitable[list[Any]]]
Fetch = Callable[[Sequence[str]], Awaitable[Sequence[tuple[SyncItem | None, bytes]]]]


class NodeHasher:
    """Computes the hash of a node from members that come page by page, in the order of Redis."""

    def __init__(self) -> None:
        self._children: list[tuple[bytes, bytes]] = []

    def add(self, members: Sequence[bytes]) -> None:
        """Take in members; what is none was not written by us, and is left out."""
        for member in members:
            try:
                segment, digest = parse_member(member)
            except BadEntryError:
                continue
            if digest is not None:
                self._children.append((segment.encode(), digest))

    async def digest(self) -> bytes:
        """Return the hash; other tasks get their turn while it is computed. b"" for no children."""
        if len(self._children) <= CHILDREN_PER_PAGE:
            return interior_hash(self._children) if self._children else b""
        # Redis orders whole members, where a colon follows the segment: nearly the order wanted.
        self._children.sort()
        whole = sha256()
        for begin in range(0, len(self._children), CHILDREN_PER_PAGE):
            page = self._children[begin : begin + CHILDREN_PER_PAGE]
            whole.update(b"".join([b"%b:%b;" % child for child in page]))
            await asyncio.sleep(0)
        return whole.digest()


class DottedPublisher:
    """Brings the dotted layout up to date, as long as it is started.

    ``run`` runs a script, ``ask`` sends several commands in one flight, ``fetch`` returns items
    with their order tuples as they lie in Redis, for as many of the first keys as fit a bounded
    reply, and None for an item that cannot be read. All of them raise StoreError.
    """

    def __init__(
        self, keys: Keys, run: Run, ask: Ask, fetch: Fetch, clock: Clock,
        rng: random.Random, log: BoundLogger,
    ) -> None:  # fmt: skip
        self._keys = keys
        self._run = run
        self._ask = ask
        self._fetch = fetch
        self._clock = clock
        self._rng = rng
        self._log = log
        self._token = f"{rng.getrandbits(128):032x}"
        self._task: asyncio.Task[None] | None = None
        self._asked_to_stop = asyncio.Event()

    def start(self) -> None:
        """Begin to publish; does nothing if that has begun."""
        if self._task is None or self._task.done():
            self._asked_to_stop.clear()
            self._task = asyncio.create_task(self._publish_on(), name="dotted-publisher")

    async def stop(self) -> None:
        """Stop after the step under way; what is not published yet stays marked."""
        task, self._task = self._task, None
        if task is None:
            return
        self._asked_to_stop.set()
        try:
            await asyncio.wait((task,))
        finally:
            # Each call into Redis has its timeout; whoever stops may not want to wait for it.
            task.cancel()
        try:
            await self._run(scripts.RELEASE, [self._keys.lease], [self._token])
        except StoreError as error:
            # It ends by itself.
            self._log.debug("lease_not_released", error=error)

    async def _publish_on(self) -> None:
        failures = 0
        while not self._asked_to_stop.is_set():
            try:
                busy = await self._lease() and await self.round()
            except StoreError as error:
                if scripts.NOT_MINE in str(error):
                    # This process was away for too long, and another has taken over.
                    continue
                failures += 1
                self._log.warning("dotted_layout_not_up_to_date", error=error)
                await self._rest(DAEMON.delay(failures, self._rng))
                continue
            failures = 0
            if not busy:
                await self._rest(IDLE_SEC)

    async def _rest(self, seconds: float) -> None:
        try:
            async with self._clock.timeout(seconds):
                await self._asked_to_stop.wait()
        except TimeoutError:
            return

    async def _lease(self) -> bool:
        args = (self._token, round(LEASE_SEC * 1000))
        return bool(await self._run(scripts.LEASE, [self._keys.lease], args))

    async def _renew(self) -> None:
        """Keep the lease.

        :raises StoreError: also if another process holds it, or nobody does any more.
        """
        args = (self._token, round(LEASE_SEC * 1000))
        await self._run(scripts.RENEW, [self._keys.lease], args)

    async def round(self) -> bool:
        """Publish a bounded number of keys and fold; returns whether there was anything to do."""
        done = 0
        stopping = self._asked_to_stop.is_set
        while done < KEYS_PER_ROUND and not stopping() and (keys := await self._dirty()):
            done += await self._publish(keys)
            if not await self._lease():
                return False
        while not stopping() and await self._fold():
            done += 1
            if not await self._lease():
                return False
        return done > 0

    async def _dirty(self) -> list[str]:
        (raws,) = await self._ask([("ZRANGE", self._keys.dirty, 0, KEYS_PER_STEP - 1)])
        return [raw.decode() for raw in raws]

    async def _publish(self, keys: Sequence[str]) -> int:
        """Publish the first of these keys, as many as one step may take; returns how many."""
        named = [key for key in keys if not reserved(key)]
        if len(named) < len(keys):
            await self._pass_over([key for key in keys if reserved(key)])
        args: list[bytes | str] = []
        filled = count = 0
        for key, (item, stamp) in zip(named, await self._fetch(named), strict=False):
            value, leaf = await _foreign_form(item)
            if count and filled + len(value) > BYTES_PER_STEP:
                break
            args += (key, stamp, value, leaf)
            filled += len(value)
            count += 1
        if count:
            await self._step(scripts.PUBLISH, args)
        return count + len(keys) - len(named)

    async def _pass_over(self, keys: Sequence[str]) -> None:
        """Leave out keys under which the layouts keep their own: they were written before."""
        self._log.warning("reserved_keys_not_published", count=len(keys), first=keys[0])
        await self._ask([("SADD", self._keys.kept_out, *keys), ("ZREM", self._keys.dirty, *keys)])

    async def _fold(self) -> bool:
        """Compute the hashes of the deepest nodes that need it; False if none does."""
        (raws,) = await self._ask(
            [("ZREVRANGE", self._keys.unfolded, 0, NODES_PER_STEP - 1, "WITHSCORES")]
        )
        if not raws:
            return False
        deepest = raws[1]
        paths = [
            path.decode()
            for path, depth in zip(raws[::2], raws[1::2], strict=True)
            if depth == deepest
        ]
        args: list[str] = []
        for path, digest in zip(paths, await self._hash_nodes(paths), strict=True):
            if not path and not digest:
                digest = interior_hash(())  # noqa: PLW2901 - the root of an empty tree
            args += (path, digest.hex())
        await self._step(scripts.FOLD, args)
        return True

    async def _hash_nodes(self, paths: Sequence[str]) -> list[bytes]:
        names = [children_key(self._keys.prefix, path) for path in paths]
        sizes = await self._ask([("ZCARD", name) for name in names])
        small = [place for place, size in enumerate(sizes) if size <= CHILDREN_PER_PAGE // 10]
        replies = await self._ask([("ZRANGE", names[place], 0, -1) for place in small])
        known = dict(zip(small, replies, strict=True))
        digests: list[bytes] = []
        for place, name in enumerate(names):
            hasher = NodeHasher()
            if place in known:
                hasher.add(known[place])
            else:
                for begin in range(0, sizes[place], CHILDREN_PER_PAGE):
                    page = ("ZRANGE", name, begin, begin + CHILDREN_PER_PAGE - 1)
                    hasher.add((await self._ask([page]))[0])
                    await self._renew()
            digests.append(await hasher.digest())
        return digests

    async def _step(self, text: str, args: Sequence[Any]) -> None:
        await self._run(text, [self._keys.lease], [self._token, self._keys.prefix, *args])


async def _foreign_form(item: SyncItem | None) -> tuple[bytes, str]:
    """Return what lies at an item's key, and the hash of its leaf in hex; "" for what is not."""
    if item is None or item.deleted:
        return b"", ""
    if len(item.content) > _IN_A_THREAD_BYTES:
        _, value = await asyncio.to_thread(encode_foreign, item)
    else:
        _, value = encode_foreign(item)
    if dotted_problem(item.key):
        return value, ""
    return value, leaf_hash(item.key, item.version, item.content_hash).hex()
