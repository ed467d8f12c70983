"""What the tree costs: a change, and a comparison, in a small and in a large flat key space."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

from redis.asyncio import Redis
from rich.table import Table

from fsm_replication.items import Stamp
from fsm_replication.merkle import BRANCHES, OWN, MerkleTree, bucket_path
from fsm_replication.ports import Connection
from fsm_replication.redis_tree import RedisTree
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.comparer import Comparer

__all__ = ("SIZES", "TreeCost", "run_tree_bench", "tree_table")

SIZES: Final = (1_000, 100_000, 1_000_000)
CHANGES: Final = 3_000
DIFFERING: Final = 100
FILL_BATCH: Final = 5_000
TIMEOUT_SEC: Final = 60.0


@dataclass(frozen=True, slots=True)
class TreeCost:
    """What was measured at one number of keys.

    Times of a change are the server's own, in microseconds, medians of batches; the comparison's
    are from asking for the root to knowing every key that differs.
    """

    keys: int
    change_us: float
    change_without_tree_us: float
    equal_round_trips: int
    equal_bytes: int
    differing_round_trips: int
    differing_bytes: int
    differing_ms: float

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


async def run_tree_bench(
    sizes: Sequence[int] = SIZES, *, note: Callable[[str], None] = lambda _text: None
) -> list[TreeCost]:
    """Fill real servers with flat keys and measure; about a minute for a million.

    :raises RedisServerNotFoundError: if there is no Redis server to be found.
    """
    return [await _measure(size, note) for size in sizes]


async def _measure(size: int, note: Callable[[str], None]) -> TreeCost:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(RedisServer())
        plain = await stack.enter_async_context(RedisServer())
        store = await stack.enter_async_context(RedisSyncEngine(server.url, node_id="tree"))
        bare = await stack.enter_async_context(
            RedisSyncEngine(plain.url, node_id="bare", layouts=())
        )
        for one, url, name in ((store, server.url, "with"), (bare, plain.url, "without")):
            note(f"{size:,} keys: filling a store {name} a tree")
            await _fill(one, size)
            async with Redis.from_url(url) as client:
                await client.xtrim(one.keys.stream, 1000, approximate=False)
        note(f"{size:,} keys: changing")
        with_tree = await _change(store, server.url, size)
        without = await _change(bare, plain.url, size)
        note(f"{size:,} keys: comparing")
        connection = await RedisTransport().connect(server.url, timeout_sec=10, name="bench")
        stack.callback(connection.close)
        return await _compare(store, connection, size, with_tree, without)


async def _fill(store: RedisSyncEngine, size: int) -> None:
    for begin in range(0, size, FILL_BATCH):
        end = min(size, begin + FILL_BATCH)
        await store.put_many([(f"user-{n}", b"x" * 40) for n in range(begin, end)])


async def _change(store: RedisSyncEngine, url: str, size: int) -> float:
    """Return the server's microseconds for the change of one key, by itself."""
    rng = random.Random(1)  # noqa: S311 - the same keys in every run
    taken: list[float] = []
    async with Redis.from_url(url) as client:
        for _ in range(5):
            await client.config_resetstat()
            for _ in range(CHANGES // 5):
                await store.put(f"user-{rng.randrange(size)}", b"%d" % rng.randrange(10**9))
            stats: Any = (await client.info("commandstats"))["cmdstat_evalsha"]
            taken.append(stats["usec"] / stats["calls"])
    return statistics.median(taken)


class _Mirror:
    """A copy of a node's tree in memory, to compare the node with."""

    def __init__(self, tree: MerkleTree) -> None:
        self._tree = tree

    async def root(self, _layout: str) -> bytes:
        return self._tree.root()

    async def children(
        self, _layout: str, paths: Sequence[str]
    ) -> Sequence[dict[str, bytes] | None]:
        return [self._tree.children(path) for path in paths]


async def _compare(
    store: RedisSyncEngine, connection: Connection, size: int, with_tree: float, without: float
) -> TreeCost:
    flights = 0

    async def ask(commands: Sequence[Sequence[Any]]) -> list[Any]:
        nonlocal flights
        flights += 1
        return await connection.pipeline(commands, timeout_sec=TIMEOUT_SEC)

    async def absent(keys: Sequence[str]) -> list[Stamp | None]:
        return [None] * len(keys)

    there = RedisTree(ask, store.keys)
    mirror = MerkleTree()
    for branch in range(BRANCHES):
        paths = [bucket_path(branch * BRANCHES + place) for place in range(BRANCHES)]
        for leaves in await there.children(OWN, paths):
            for key, stamp in (leaves or {}).items():
                mirror.set(key, stamp)
    comparer = Comparer(_Mirror(mirror), there, absent)
    flights, received = 0, connection.received_bytes
    equal = await comparer.differing_buckets()
    if equal:
        raise RuntimeError("the copy of a tree is not equal to it")
    equal_cost = flights, connection.received_bytes - received
    rng = random.Random(2)  # noqa: S311 - the same keys in every run
    changed = rng.sample(range(size), DIFFERING)
    await store.put_many([(f"user-{number}", b"changed") for number in changed])
    flights, received, began = 0, connection.received_bytes, time.perf_counter()
    found = 0
    async for group in comparer.groups(await comparer.differing_buckets()):
        found += len(group.differences)
    if found != DIFFERING:
        raise RuntimeError(f"{found} keys were found to differ, not {DIFFERING}")
    return TreeCost(
        size,
        round(with_tree, 1),
        round(without, 1),
        *equal_cost,
        flights,
        connection.received_bytes - received,
        round((time.perf_counter() - began) * 1000, 1),
    )


def tree_table(costs: Sequence[TreeCost]) -> Table:
    """Return what a person wants to see."""
    table = Table(
        "keys", "change us", "without tree", "equal: trips", "bytes",
        f"{DIFFERING} differ: trips", "bytes", "ms",
        title="what the tree costs, in a flat key space",
    )  # fmt: skip
    for cost in costs:
        table.add_row(
            f"{cost.keys:,}",
            f"{cost.change_us:.1f}",
            f"{cost.change_without_tree_us:.1f}",
            str(cost.equal_round_trips),
            f"{cost.equal_bytes:,}",
            str(cost.differing_round_trips),
            f"{cost.differing_bytes:,}",
            f"{cost.differing_ms:.1f}",
        )
    return table
