"""The tree of our own layout: the same in Redis as in memory, whatever was written and in what way."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from fsm_replication.items import EMPTY_HASH, SyncItem, content_hash
from fsm_replication.layout import Keys, encode_stamp
from fsm_replication.merkle import (
    EMPTY_ROOT,
    OWN,
    PARTITIONS,
    MerkleTree,
    bucket_of,
    bucket_path,
    differing,
    leaf_digest,
    path_bucket,
)
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine, SyncEngine
from fsm_replication.testing import strategies

NOW = int(time.time() * 1000)
WEEK_MS = 7 * 86_400_000
KEYS = ["a", "a.b", "user-1", "user-10", "ä", "x" * 200]


def put_of(key: str, at: int, content: bytes = b"", version: int = 1) -> SyncItem:
    """Return a live item."""
    return SyncItem(key, content, "binary", content_hash(content), version, at, False, "o")


def tomb_of(key: str, at: int, version: int = 1) -> SyncItem:
    """Return a tombstone."""
    return SyncItem(key, b"", "binary", EMPTY_HASH, version, at, True, "o")


async def everything(store: SyncEngine) -> tuple[bytes, dict[str, bytes]]:
    """Return the root of a tree and all its leaves, found from the root down."""
    tree = store.tree
    assert tree is not None
    root = await tree.root(OWN)
    paths = [""]
    leaves: dict[str, bytes] = {}
    for level in range(3):
        found = [children or {} for children in await tree.children(OWN, paths)]
        if level == 2:
            assert await tree.sizes(OWN, paths) == [len(children) for children in found]
            for children in found:
                leaves |= children
        paths = [
            path + name for path, children in zip(paths, found, strict=True) for name in children
        ]
    return root, leaves


def made_of(leaves: dict[str, bytes]) -> bytes:
    """Return the root of a tree that holds just these leaves."""
    tree = MerkleTree()
    for key, stamp in leaves.items():
        tree.set(key, stamp)
    assert len(tree) == len(leaves)
    return tree.root()


changes = strategies.histories(
    keys=st.sampled_from(KEYS),
    bodies=st.sampled_from([b"", b"x", b"xx"]),
    times=st.sampled_from([NOW - WEEK_MS - 1000, NOW - 2, NOW - 1, NOW]),
)


async def check_trees(
    redis_store: RedisSyncEngine, batches: list[list[SyncItem]], drops: list[int]
) -> None:
    """Apply the same to both stores; their trees hold what the items say, and are the same."""
    memory = MemorySyncEngine()
    await everything(memory)
    for number, batch in enumerate(batches):
        await redis_store.apply_many(batch)
        await memory.apply_many(batch)
        if number in drops:
            # As after a tombstone's grace: the item has gone, and a leaf may be left.
            await redis_store._call("DEL", redis_store.keys.item(KEYS[0]))
            memory._items.pop(KEYS[0], None)
            memory._tree._touched.add(KEYS[0])  # type: ignore[union-attr]
            await redis_store.apply_many([put_of(KEYS[0], NOW + number + 1)])
            await memory.apply_many([put_of(KEYS[0], NOW + number + 1)])
    root, leaves = await everything(redis_store)
    assert root == made_of(leaves)
    expected = {
        item.key: encode_stamp(item)
        for item in await redis_store.get_many(KEYS)
        if item is not None and not (item.deleted and item.updated_at + WEEK_MS <= NOW)
    }
    assert leaves == expected
    assert (root, leaves) == await everything(memory)
    live = sum(stamp[16] == 0 for stamp in leaves.values())
    # An item that somebody removed by hand is not counted off.
    assert drops or await redis_store.live_items() == live


def test_the_tree_in_redis_is_the_tree_in_memory(
    redis_servers: Callable[[], RedisServer],
) -> None:
    """If this fails two nodes that hold the same never agree, or two that differ do."""
    server = redis_servers()

    @settings(max_examples=40)
    @given(st.lists(changes, max_size=4), st.lists(st.integers(0, 3), max_size=2))
    def check(batches: list[list[SyncItem]], drops: list[int]) -> None:
        async def run() -> None:
            with redis.Redis(port=server.port) as client:
                client.flushall()
            async with RedisSyncEngine(server.url, node_id="n") as store:
                await check_trees(store, batches, drops)

        asyncio.run(run())

    check()


async def test_local_writes_are_in_the_tree(redis_server: RedisServer) -> None:
    """If this fails peers do not see what the application writes."""
    async with RedisSyncEngine(redis_server.url, node_id="n") as store:
        await store.put_many({f"user-{number}": b"x" for number in range(500)})
        await store.put("user-3", b"[]", "json")
        assert await store.delete("user-4")
        assert await store.delete("user-5")
        await store.put("user-5", b"again")
        root, leaves = await everything(store)
        held = await store.get_many(list(leaves))
        assert {i.key: encode_stamp(i) for i in held if i is not None} == leaves
        assert len(leaves) == 500
        assert root == made_of(leaves)
        assert await store.live_items() == 499


async def test_many_writers_at_once_keep_the_tree_true(redis_server: RedisServer) -> None:
    """If this fails the workers of a web server spoil their node's tree."""
    async with (
        RedisSyncEngine(redis_server.url, node_id="n") as one,
        RedisSyncEngine(redis_server.url, node_id="n") as two,
    ):

        async def write(store: RedisSyncEngine, number: int) -> None:
            for turn in range(10):
                await store.put(f"k{(number * turn) % 7}", b"%d" % turn)
                await store.delete(f"k{number % 5}")

        async with asyncio.TaskGroup() as writers:
            for number in range(8):
                writers.create_task(write((one, two)[number % 2], number))
        root, leaves = await everything(one)
        assert root == made_of(leaves)


async def test_a_reading_ends_however_much_is_written() -> None:
    """If this fails a node that is flooded by one peer compares itself with none."""
    store = MemorySyncEngine()
    tree = store.tree
    assert tree is not None
    await tree.root(OWN)

    async def flood() -> None:
        at = 0
        while True:
            at += 1
            await store.apply_many([put_of(f"k{n}", at) for n in range(3000)])
            await asyncio.sleep(0)

    flooding = asyncio.create_task(flood())
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        roots = await asyncio.gather(*(tree.root(OWN) for _ in range(5)))
        found = await tree.children(OWN, [""])
    flooding.cancel()
    assert EMPTY_ROOT not in roots
    assert found[0]
    # What was written meanwhile is in the next.
    assert await everything(store) == await everything_anew(store)


async def everything_anew(store: MemorySyncEngine) -> tuple[bytes, dict[str, bytes]]:
    """Return the tree that a store with the same items has which never was read before."""
    other = MemorySyncEngine()
    await other.apply_many([item async for item in store.scan()])
    return await everything(other)


async def test_tombstones_leave_the_tree_when_they_expire(redis_server: RedisServer) -> None:
    """If this fails the trees of two nodes differ for as long as one was not asked."""
    async with RedisSyncEngine(
        redis_server.url, node_id="n", tombstone_ttl_sec=0.2, tombstone_grace_sec=60
    ) as store:
        memory = MemorySyncEngine(tombstone_ttl_sec=0.2, tombstone_grace_sec=60)
        await store.put("k", b"x")
        await store.delete("k")
        tombstone = (await store.get_many(["k"]))[0]
        assert tombstone is not None
        await memory.submit(tombstone)
        before = await everything(store)
        if int(time.time() * 1000) < tombstone.updated_at + 150:
            assert before == await everything(memory)
            assert before[1]
        await asyncio.sleep(max(0, tombstone.updated_at + 201 - time.time() * 1000) / 1000)
        assert await everything(store) == (EMPTY_ROOT, {}) == await everything(memory)
        # It is still held, and still wins.
        assert not await store.submit(put_of("k", tombstone.updated_at - 1))


async def test_a_tree_is_built_for_items_written_without_one(redis_server: RedisServer) -> None:
    """If this fails a node that switches trees on looks empty to its peers."""
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=()) as store:
        assert store.tree is None
        await store.put_many({f"k{number}": b"x" for number in range(1200)})
        await store.delete("k7")
        await store.apply_many([put_of(f"r{number}", NOW) for number in range(300)])
    with redis.Redis(port=redis_server.port) as client:
        assert client.hget("fsm:node", "layouts") == b""
        assert not client.exists("fsm:tree")
    async with RedisSyncEngine(redis_server.url, node_id="n") as store:
        root, leaves = await everything(store)
        assert len(leaves) == 1500
        assert root == made_of(leaves)
        assert await store.live_items() == 1499
        # What was written without a tree is taken out of it again when it changes.
        await store.apply_many([put_of(f"r{number}", NOW + 1) for number in range(100)])
        await store.put("k8", b"y")
        root, leaves = await everything(store)
        assert root == made_of(leaves)
    with redis.Redis(port=redis_server.port) as client:
        assert client.hget("fsm:node", "layouts") == b"own"
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=()) as store:
        with redis.Redis(port=redis_server.port) as client:
            assert client.hget("fsm:node", "layouts") == b""
            assert not list(client.scan_iter(f"{Keys().tree}*"))


async def test_a_key_of_a_wrong_type_spoils_no_other(redis_server: RedisServer) -> None:
    """If this fails one foreign key leaves the tree without what was written beside it."""
    with redis.Redis(port=redis_server.port) as client:
        client.lpush("item:k1", "x")
        client.set("item:k3", "short")
    async with RedisSyncEngine(redis_server.url, node_id="n") as store:
        result = await store.apply_many([put_of(f"k{number}", NOW) for number in range(5)])
        assert [int(outcome) for outcome in result.outcomes] == [0, 2, 0, 2, 0]
        root, leaves = await everything(store)
        assert sorted(leaves) == ["k0", "k2", "k4"]
        assert root == made_of(leaves)


def test_a_leaf_covers_all_of_its_item() -> None:
    """If this fails two items that differ look alike."""
    items = [
        put_of("k", NOW),
        put_of("k", NOW + 1),
        put_of("k", NOW, version=2),
        put_of("k", NOW, b"x"),
        tomb_of("k", NOW),
        put_of("k2", NOW),
    ]
    digests = {leaf_digest(item.key.encode(), encode_stamp(item)) for item in items}
    assert len(digests) == len(items)


def test_a_flat_space_spreads_evenly() -> None:
    """If this fails some change of an ordinary key space costs far more than others."""
    sizes = Counter(bucket_of(b"user-%d" % number) for number in range(1_000_000))
    mean = 1_000_000 / PARTITIONS
    assert len(sizes) == PARTITIONS
    assert max(sizes.values()) < 3 * mean


@pytest.mark.parametrize("bucket", [0, 1, 127, 128, 16_383])
def test_a_bucket_has_a_path(bucket: int) -> None:
    """If this fails a walk reads other buckets than it means."""
    assert path_bucket(bucket_path(bucket)) == bucket
    tree = MerkleTree()
    key = next(f"k{n}" for n in range(1_000_000) if bucket_of(b"k%d" % n) == bucket)
    tree.set(key, b"s" * 50)
    path = bucket_path(bucket)
    assert list(tree.children("")) == [path[:2]]
    assert list(tree.children(path[:2])) == [path[2:]]
    assert list(tree.children(path)) == [key]
    assert differing(tree.children(""), {}) == [path[:2]]
    tree.set(key, None)
    assert tree.root() == EMPTY_ROOT
    assert tree.children("") == {}
