"""What every store must do, tried on each that ships; and what is special about Redis's."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import redis
from conftest import WEEK_MS, Peer
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.errors import InvalidKeyError, StoreError
from fsm_replication.items import EMPTY_HASH, NUMBER_MAX, SyncItem, content_hash
from fsm_replication.layout import Keys, decode_item, encode_value
from fsm_replication.ports import Position, StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, NoOpSyncEngine, RedisSyncEngine
from fsm_replication.stores import memory as memory_module
from fsm_replication.stores.protocol import Outcome, Received
from fsm_replication.stream import (
    MAGIC,
    DataDecoder,
    Encoded,
    encode_data,
    encode_meta,
    parse_entry,
)

NOW = 1_700_000_000_000
STARTED = int(time.time() * 1000)
Store = MemorySyncEngine | RedisSyncEngine


def item(
    key: str = "k",
    content: bytes | None = b"v",
    *,
    at: int = 0,
    version: int = 1,
    content_type: str = "binary",
) -> SyncItem:
    """Return an item, or with None a tombstone, ``at`` ms after a fixed time."""
    body = b"" if content is None else content
    return SyncItem(
        key,
        body,
        content_type,
        content_hash(body),
        version,
        STARTED + at,
        content is None,
        "origin",
    )


@pytest_asyncio.fixture(params=["memory", "redis"])
async def store(
    request: pytest.FixtureRequest, redis_servers: Callable[[], RedisServer]
) -> AsyncIterator[Store]:
    """Each store that keeps something."""
    if request.param == "memory":
        yield MemorySyncEngine(node_id="n")
        return
    async with RedisSyncEngine(redis_servers().url, node_id="n") as made:
        yield made


@pytest_asyncio.fixture
async def redis_store(redis_server: RedisServer) -> AsyncIterator[RedisSyncEngine]:
    """The store on Redis."""
    async with RedisSyncEngine(redis_server.url, node_id="n") as made:
        yield made


async def test_what_is_newer_wins_and_the_rest_is_superseded(store: Store) -> None:
    """If this fails a store keeps something else than the largest order tuple."""
    first, second = item(content=b"1"), item(content=b"2", at=1)
    assert await store.submit(second)
    result = await store.apply_many([first, second, item("other")])
    assert list(result.outcomes) == [Outcome.SUPERSEDED, Outcome.SUPERSEDED, Outcome.APPLIED]
    assert await store.get_many(["k", "nothing"]) == [second, None]
    assert await store.stamps(["k", "nothing"]) == [second.stamp, None]
    assert await store.is_current("k", first.stamp)
    assert not await store.is_current("nothing", first.stamp)


@pytest.mark.parametrize(
    ("content", "content_type", "error", "told"),
    [
        ("text", "binary", TypeError, r"content is bytes, not str: pass text.encode\(\)"),
        ({"a": 1}, "json", TypeError, r"content is bytes, not dict: .* put_json\(key, value\)"),
        (None, "binary", TypeError, "content is bytes, not NoneType"),
        (b"{nope", "json", ValueError, r"the content is no JSON \(.*byte.*\): pass JSON"),
        (b'{"a": NaN}', "json", ValueError, "the content is no JSON"),
        (b'"\xff"', "json", ValueError, "the content is no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "json", ValueError, "the content is no JSON"),
        (b"x", "text", ValueError, "content_type is 'binary' or 'json', not 'text'"),
    ],
)
async def test_a_put_of_what_is_no_content_says_what_to_pass(
    store: Store, content: Any, content_type: str, error: type[Exception], told: str
) -> None:
    """If this fails a mistake of the caller is an error from the depths, or is published."""
    with pytest.raises(error, match=told):
        await store.put("k", content, content_type)
    assert await store.get("k") is None
    if isinstance(store, RedisSyncEngine):
        with pytest.raises(error, match=told):
            await store.put_many({"fine": b"1", "k": content}, content_type)
        assert await store.get("fine") is None


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (object(), TypeError, "cannot be written as JSON: .*object.*; pass dict, list, str"),
        ({"a": b"bytes"}, TypeError, "cannot be written as JSON: .*bytes"),
        ({"a": [math.nan]}, ValueError, "cannot be written as JSON: "),
        (math.inf, ValueError, "cannot be written as JSON: "),
        ("\ud800", ValueError, "cannot be written as JSON: "),
    ],
)
async def test_a_put_of_what_is_no_json_says_so(
    store: Store, value: object, error: type[Exception], told: str
) -> None:
    """If this fails NaN is published, which no reader of JSON takes."""
    with pytest.raises(error, match=told):
        await store.put_json("k", value)
    assert await store.get("k") is None


async def test_what_is_like_bytes_is_kept_as_bytes(store: Store) -> None:
    """If this fails a buffer that changes later changes what is held."""
    buffer: Any = bytearray(b"one")
    await store.put("k", buffer)
    buffer[:] = b"two"
    held = await store.get("k")
    assert held is not None
    assert (held.content, type(held.content)) == (b"one", bytes)
    assert (await store.put_json("j", {"a": [1, "é"]})).content == '{"a":[1,"é"]}'.encode()


async def test_every_field_of_the_order_tuple_decides(store: Store) -> None:
    """If this fails two nodes can hold different items of one key for ever."""
    hashes = sorted([b"a", b"b"], key=content_hash)
    ladder = [
        item(content=hashes[0], at=0, version=1),
        item(content=hashes[1], at=0, version=1),
        item(content=hashes[1], at=0, version=1, content_type="json"),
        item(content=None, at=0, version=1),
        item(content=hashes[0], at=0, version=2),
        item(content=hashes[0], at=0, version=300),
        item(content=hashes[0], at=1, version=1),
        item(content=hashes[0], at=300, version=1),
    ]
    for number, (older, newer) in enumerate(itertools.combinations(ladder, 2)):
        key = f"pair.{number}"
        a, b = _renamed(older, key), _renamed(newer, key)
        await store.submit(b)
        assert not await store.submit(a), (older, newer)
        key = f"reversed.{number}"
        a, b = _renamed(older, key), _renamed(newer, key)
        await store.submit(a)
        assert await store.submit(b), (older, newer)


def _renamed(old: SyncItem, key: str) -> SyncItem:
    return SyncItem(
        key,
        old.content,
        old.content_type,
        old.content_hash,
        old.version,
        old.updated_at,
        old.deleted,
        old.origin,
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from("xy"),
            st.sampled_from([None, b"", b"1", b"2"]),
            st.integers(0, 3),
            st.integers(1, 2),
        ),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_any_order_and_any_repetition_end_the_same(
    changes: list[tuple[str, bytes | None, int, int]], rng: random.Random
) -> None:
    """If this fails convergence depends on the order of arrival (G3)."""

    async def scenario() -> None:
        items = [item(key, content, at=at, version=v) for key, content, at, v in changes]
        ends = []
        for _ in range(3):
            store = MemorySyncEngine()
            shuffled = items + rng.sample(items, len(items) // 2)
            rng.shuffle(shuffled)
            while shuffled:
                count = rng.randint(1, 3)
                await store.apply_many(shuffled[:count])
                del shuffled[:count]
            ends.append(await store.stamps(["x", "y"]))
        assert ends[0] == ends[1] == ends[2]
        for key, held in zip("xy", ends[0], strict=True):
            assert held == max((i.stamp for i in items if i.key == key), default=None)

    asyncio.run(scenario())


async def test_any_order_ends_the_same_in_redis(redis_store: RedisSyncEngine) -> None:
    """If this fails the script compares order tuples in another way than Python does."""
    rng = random.Random(7)
    contents = [None, b"", b"1", bytes(range(256))]
    for round_ in range(60):
        key = f"k{round_}"
        items = [
            item(key, rng.choice(contents), at=rng.choice([0, 1, 255, 256]), version=v)
            for v in rng.choices([1, 2, 255, 256, 2**40], k=5)
        ]
        rng.shuffle(items)
        await redis_store.apply_many(items)
        (held,) = await redis_store.stamps([key])
        assert held == max(i.stamp for i in items)


async def test_equal_content_at_a_later_time_is_taken(store: Store) -> None:
    """If this fails a later write of the same content loses to one in between."""
    await store.submit(item(content=b"same"))
    later = item(content=b"same", at=10)
    assert await store.submit(later)
    assert not await store.submit(item(content=b"other", at=5))
    assert await store.get("k") == later


async def test_a_delete_wins_over_an_empty_put_of_the_same_stamp(store: Store) -> None:
    """If this fails an empty content and a deletion look alike."""
    await store.submit(item(content=b""))
    assert await store.delete_replicated(item(content=None))
    assert await store.get("k") is None
    assert not await store.submit(item(content=b""))
    with pytest.raises(ValueError, match="not a tombstone"):
        await store.delete_replicated(item())


async def test_a_delete_of_something_unknown_is_kept(store: Store) -> None:
    """If this fails an older put that arrives after its delete revives the key."""
    await store.submit(item(content=None, at=5))
    assert not await store.submit(item(content=b"old"))
    assert await store.get("k") is None


async def test_expired_tombstones(store: Store) -> None:
    """If this fails a late delete comes to no rest, or does not delete."""
    expired = -WEEK_MS - 10
    result = await store.apply_many([item("absent", None, at=expired)])
    assert list(result.outcomes) == [Outcome.SUPERSEDED]
    await store.submit(item("live", b"older", at=expired - 1))
    result = await store.apply_many([item("live", None, at=expired)])
    assert list(result.outcomes) == [Outcome.APPLIED]
    assert result.live_deleted == 1
    assert await store.get("live") is None
    assert not await store.submit(item("live", b"older", at=expired - 1))


async def test_local_writes_come_after_everything_they_have_seen(store: Store) -> None:
    """If this fails a local write loses to one it replaced, as where a clock has gone back."""
    ahead = item(content=b"ahead", at=3_600_000, version=7)
    await store.submit(ahead)
    mine = await store.put("k", b'"mine"', "json")
    assert (mine.updated_at, mine.version) == (ahead.updated_at + 1, 8)
    assert (mine.origin, mine.content_type) == ("n", "json")
    assert await store.get("k") == mine
    assert await store.delete("k")
    (held,) = await store.stamps(["k"])
    assert held is not None
    assert (held.updated_at, held.version, held.deleted) == (mine.updated_at + 1, 9, True)
    assert not await store.delete("k")
    assert not await store.delete("never")
    assert (await store.put("k", b"back")).version == 10


@pytest.mark.parametrize("key", ["", "k" * 1025, "é" * 513, "\ud800"])
async def test_a_bad_key_is_refused_locally(store: Store, key: str) -> None:
    """If this fails a node writes what no other node will take."""
    with pytest.raises(InvalidKeyError):
        await store.put(key, b"")
    with pytest.raises(InvalidKeyError):
        await store.delete(key)


async def test_scan_finds_live_items_with_a_prefix(store: Store) -> None:
    """If this fails listing shows deleted items, or takes a prefix for a pattern."""
    for key in ("a.1", "a.2", "b.1", "a*1", "[x]", "é"):
        await store.put(key, key.encode())
    await store.delete("a.2")
    assert {found.key async for found in store.scan("a.")} == {"a.1"}
    assert {found.key async for found in store.scan("a*")} == {"a*1"}
    assert {found.key async for found in store.scan("[x]")} == {"[x]"}
    assert len([found async for found in store.scan()]) == 5


async def test_memory_forgets_tombstones_after_their_grace() -> None:
    """If this fails a store in memory grows with every key that was ever deleted."""

    class Wall:
        now = NOW

        def now_ms(self) -> int:
            """Return the time that the test has set."""
            return self.now

    wall = Wall()
    store = MemorySyncEngine(tombstone_ttl_sec=10, tombstone_grace_sec=5, wall_clock=wall)
    dead = SyncItem("k", b"", "binary", EMPTY_HASH, 1, NOW, True, "")
    await store.submit(dead)
    wall.now = NOW + 15_001
    assert await store.get_many(["k"]) == [dead]
    await store.apply_many([])
    assert await store.get_many(["k"]) == [None]


async def test_noop_keeps_nothing() -> None:
    """If this fails the store that keeps nothing keeps something."""
    store = NoOpSyncEngine()
    assert await store.submit(item())
    assert await store.get("k") is None
    assert await store.incarnation() != await NoOpSyncEngine().incarnation()


# Redis ------------------------------------------------------------------------------------------


async def test_it_works_on_every_server(any_redis_server: RedisServer) -> None:
    """If this fails the scripts need a newer Redis than is promised."""
    async with RedisSyncEngine(any_redis_server.url, node_id="n", redis_prefix="p:") as store:
        await store.put_json("k", {"a": [1, "é"]})
        await store.submit(item("other", b"x" * 500))
        assert await store.delete("k")
        assert [found.key async for found in store.scan()] == ["other"]
        with redis.Redis(port=any_redis_server.port) as client:
            assert {key.split(b":")[0] for key in client.scan_iter()} == {b"p"}
            assert client.xlen("p:cdc") == 3
    async with RedisSyncEngine(any_redis_server.unix_url, node_id="n", redis_prefix="p:") as store:
        assert await store.get("other") == item("other", b"x" * 500)


async def test_the_stream_tells_exactly_what_was_applied(redis_server: RedisServer) -> None:
    """If this fails readers of this node see changes that did not happen, or miss some."""
    async with RedisSyncEngine(redis_server.url, node_id="n") as store:
        put = await store.put("k", b"content " * 20)
        await store.submit(item("r", b"x" * 100, at=5))
        await store.submit(item("r", b"older"))
        await store.delete("k")
        (held,) = await store.stamps(["k"])
    reader = Peer(redis_server)
    entries = reader.entries()
    reader.close()
    decoder = DataDecoder(10_000)
    seen = []
    for fields in entries:
        entry = parse_entry(fields)
        content = b"" if entry.deleted else decoder.decode(entry.data, entry.digest)
        seen.append((entry.key, content, entry.updated_at, entry.version, entry.deleted))
    assert held is not None
    assert seen == [
        ("k", put.content, put.updated_at, 1, False),
        ("r", b"x" * 100, item(at=5).updated_at, 1, False),
        ("k", b"", held.updated_at, 2, True),
    ]


async def test_a_wire_form_travels_on_unchanged(
    redis_store: RedisSyncEngine, redis_server: RedisServer
) -> None:
    """If this fails a change is encoded anew at every node, and loses its trace."""
    change = item(content=b"y" * 300)
    data = encode_data(change.content)
    meta = json.dumps(json.loads(encode_meta(change)) | {"trace_parent": "00-1"}).encode()
    received = Received("peer", Position(StreamId(3, 1), 9), [Encoded(data, meta)])
    await redis_store.apply_many([change], received)
    with redis.Redis(port=redis_server.port) as client:
        ((_, fields),) = client.xrange(Keys().stream)
        assert (fields[b"data"], fields[b"meta"]) == (data, meta)
        raw = client.get(Keys().item("k"))
    assert isinstance(raw, bytes)
    assert decode_item("k", raw, DataDecoder(1000)) == change
    assert raw == encode_value(change, data)
    assert await redis_store.applied_position("peer") == Position(StreamId(3, 1), 9)
    await redis_store.apply_many([], Received("peer", Position(StreamId(4, 0), None)))
    assert await redis_store.applied_position("peer") == Position(StreamId(4, 0), None)


async def test_several_writers_at_once_lose_no_version(
    redis_server: RedisServer, redis_store: RedisSyncEngine
) -> None:
    """If this fails two processes that write one key at once overwrite each other."""
    async with RedisSyncEngine(redis_server.url, node_id="n") as second:
        stores = (redis_store, second)

        async def write(number: int) -> None:
            store = stores[number % 2]
            for turn in range(25):
                if (number + turn) % 9 == 0:
                    await store.delete("hot")
                elif number == 3:
                    await store.submit(item("hot", b"remote", at=turn, version=1))
                else:
                    await store.put("hot", b"%d" % number)

        await asyncio.gather(*(write(number) for number in range(8)))
    reader = Peer(redis_server)
    entries = reader.entries()
    reader.close()
    stamps = [(e.updated_at, e.version) for e in (parse_entry(fields) for fields in entries)]
    assert stamps == sorted(set(stamps)), "each event is newer than all before it"
    (held,) = await redis_store.stamps(["hot"])
    assert held is not None
    assert (held.updated_at, held.version) == stamps[-1]


async def test_large_batches_and_large_items(redis_store: RedisSyncEngine) -> None:
    """If this fails a batch is cut wrongly, or an item of the largest size is refused."""
    many = [item(f"k{number}", b"%d" % number) for number in range(1000)]
    assert (await redis_store.apply_many(many)).applied == 1000
    assert (await redis_store.apply_many(many)).superseded == 1000
    assert await redis_store.get_many([i.key for i in many]) == many
    huge = os.urandom(16 * 1024 * 1024)
    assert (await redis_store.put("huge", huge)).content == huge
    found = await redis_store.get("huge")
    assert found is not None
    assert found.content == huge
    with pytest.raises(ValueError, match="the limit is"):
        await redis_store.put("more", huge + b"1")
    written = await redis_store.put_many({f"p{number}": b"x" for number in range(500)})
    assert len({stamp.updated_at for stamp in written if stamp.version == 1}) >= 1
    assert len(written) == 500


async def test_scripts_come_back_after_a_flush(
    redis_store: RedisSyncEngine, redis_server: RedisServer
) -> None:
    """If this fails a restarted Redis knows the scripts no more and nothing works."""
    await redis_store.put("k", b"1")
    await redis_store.submit(item("r"))
    with redis.Redis(port=redis_server.port) as client:
        client.script_flush()
    assert (await redis_store.put("k", b"2")).version == 2
    assert await redis_store.submit(item("r2"))
    assert await redis_store.delete("k")


async def test_a_redis_of_another_node_is_refused(
    redis_store: RedisSyncEngine, redis_server: RedisServer
) -> None:
    """If this fails two nodes write into one store by mistake."""
    with pytest.raises(StoreError, match="belongs to another node"):
        async with RedisSyncEngine(redis_server.url, node_id="other"):
            pass
    with redis.Redis(port=redis_server.port) as client:
        client.hset(Keys().marker, "format", 99)
    with pytest.raises(StoreError, match="format"):
        await redis_store.open()


async def test_the_incarnation_lasts_as_long_as_the_content(
    redis_store: RedisSyncEngine, redis_server: RedisServer
) -> None:
    """If this fails an emptied store keeps a cursor that belongs to what it held before."""
    first = await redis_store.incarnation()
    async with RedisSyncEngine(redis_server.url, node_id="n") as again:
        assert await again.incarnation() == first
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
    assert await redis_store.incarnation() != first


@pytest.mark.server
async def test_credentials_are_never_shown() -> None:
    """If this fails a password ends up in a log."""
    with RedisServer(config=[("requirepass", "s3cret")]) as server:
        url = server.url.replace("redis://", "redis://:s3cret@")
        async with RedisSyncEngine(url, node_id="n") as store:
            await store.put("k", b"1")
            assert "s3cret" not in repr(store)
        wrong = RedisSyncEngine(url.replace("s3cret", "wr0ng"), node_id="n")
        with pytest.raises(StoreError) as raised:
            await wrong.open()
        await wrong.close()
        assert "wr0ng" not in str(raised.value)


@pytest.mark.server
async def test_a_server_that_dies_is_a_store_error_and_comes_back() -> None:
    """If this fails the death of Redis surfaces as something else, or the store never recovers."""
    with RedisServer(persist=True) as server:
        async with RedisSyncEngine(server.url, node_id="n") as store:
            await store.put("k", b"1")
            await store.submit(item("r"))
            server.kill()
            for call in (store.put("k", b"2"), store.submit(item("r", at=9)), store.get("k")):
                with pytest.raises(StoreError):
                    await call
            server.start()
            assert (await store.put("k", b"3")).version == 2
            assert await store.submit(item("r", at=9))


@pytest.mark.server
async def test_a_full_redis_asks_for_a_pause() -> None:
    """If this fails replication keeps hammering a Redis that has no memory left."""
    with RedisServer(config=[("maxmemory", "3mb"), ("maxmemory-policy", "noeviction")]) as server:
        async with RedisSyncEngine(server.url, node_id="n") as store:
            assert store.should_accept_writes()
            many = [item(f"k{number}", os.urandom(50_000)) for number in range(200)]
            with pytest.raises(StoreError, match="OOM"):
                await store.apply_many(many)
            assert not store.should_accept_writes()


async def test_numbers_do_not_overflow(redis_store: RedisSyncEngine) -> None:
    """If this fails a version beyond 2**53 is rounded in Lua."""
    edge = SyncItem("k", b"", "binary", EMPTY_HASH, NUMBER_MAX, NOW, False, "")
    await redis_store.submit(edge)
    item = await redis_store.put("k", b"1")
    assert item.version == NUMBER_MAX
    assert item.updated_at > NOW
    assert await redis_store.get("k") == item


# What else holds for every store -----------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", MAGIC, MAGIC + b"not zstd at all" * 20, b"a" * 100_000, bytes(range(256)) * 3],
    ids=["empty", "zero", "magic", "long magic", "repeats", "all bytes"],
)
@pytest.mark.parametrize("key", ["a:b", "é.日本", "x" * 1024, "{tag}\r\n\0"])
async def test_any_content_and_key_comes_back(store: Store, key: str, content: bytes) -> None:
    """If this fails some content or key is changed on its way through the store."""
    held = await store.put(key, content)
    assert held.content == content
    assert await store.get(key) == held
    assert [found async for found in store.scan()] == [held]


async def test_an_unknown_content_type_is_refused(store: Store) -> None:
    """If this fails an item is stored whose order tuple other nodes cannot spell."""
    with pytest.raises(ValueError, match="content_type"):
        await store.put("k", b"x", "text")
    assert await store.stamps(["k"]) == [None]


async def test_a_delete_that_changes_nothing_leaves_no_trace(store: Store) -> None:
    """If this fails deletes of what is not there travel through the mesh."""
    assert not await store.delete("k")
    assert await store.stamps(["k"]) == [None]
    await store.put("k", b"x")
    await store.delete("k")
    before = await store.stamps(["k"])
    assert not await store.delete("k")
    assert await store.stamps(["k"]) == before


async def test_no_local_write_goes_over_what_is_exact(store: Store) -> None:
    """If this fails a stamp is written that readers refuse, or take for another one."""
    edge = SyncItem("k", b"v", "binary", content_hash(b"v"), 5, NUMBER_MAX, False, "")
    await store.submit(edge)
    with pytest.raises(ValueError, match="a day ahead"):
        await store.put("k", b"x")
    with pytest.raises(ValueError, match="a day ahead"):
        await store.delete("k")
    assert await store.get("k") == edge


async def test_writes_of_many_tasks_lose_no_version(store: Store) -> None:
    """If this fails two writes at once make one version, and one of them is lost."""
    items = await asyncio.gather(*(store.put("k", b"%d" % i) for i in range(100)))
    assert sorted(written.version for written in items) == list(range(1, 101))
    ordered = sorted(items, key=lambda written: written.version)
    assert all(a.updated_at < b.updated_at for a, b in itertools.pairwise(ordered))
    assert await store.get("k") == ordered[-1]


@pytest.mark.parametrize("prefix", ["a", "a?", "a\\", "a^-", "a[^1]"])
async def test_no_sign_of_a_pattern_means_anything_in_a_prefix(store: Store, prefix: str) -> None:
    """If this fails a prefix with a sign that patterns know finds other keys."""
    keys = ["a", "axb", "a1", "a?c", "a\\d", "a^-e", "a[^1]f", "b"]
    for key in keys:
        await store.put(key, b"")
    found = {held.key async for held in store.scan(prefix)}
    assert found == {key for key in keys if key.startswith(prefix)}


async def test_nothing_can_be_applied(store: Store) -> None:
    """If this fails a batch of which everything was superseded cannot be settled."""
    result = await store.apply_many([], Received("peer", Position(StreamId(5, 0), 5)))
    assert list(result.outcomes) == []


async def test_outcomes_stand_in_the_order_of_the_changes(store: Store) -> None:
    """If this fails a long batch is told the outcomes of other changes."""
    await store.apply_many([item(f"k{i}", at=1) for i in range(0, 1000, 3)])
    result = await store.apply_many([item(f"k{i}") for i in range(1000)])
    assert list(result.outcomes) == [
        Outcome.APPLIED if i % 3 else Outcome.SUPERSEDED for i in range(1000)
    ]
    assert (result.applied, result.superseded) == (666, 334)


async def test_live_items_that_deletes_replace_are_counted(store: Store) -> None:
    """If this fails the interlock does not see that a peer deletes everything."""
    await store.apply_many([item("a"), item("b"), item("c", at=9)])
    deletes = [item("a", None, at=1), item("a", None, at=2), item("c", None), item("d", None)]
    result = await store.apply_many(deletes)
    assert (result.applied, result.superseded, result.live_deleted) == (3, 1, 1)


async def test_an_expired_tombstone_loses_against_what_is_newer(store: Store) -> None:
    """If this fails an old delete removes what was written after it."""
    newer = item(at=-WEEK_MS - 9)
    await store.submit(newer)
    assert not await store.submit(item(content=None, at=-WEEK_MS - 10))
    assert await store.get("k") == newer


# What else the store in memory does ---------------------------------------------------------------


class SetClock:
    """A wall clock that stands where it is set."""

    def __init__(self) -> None:
        self.now = NOW

    def now_ms(self) -> int:
        """Return the time it was set to."""
        return self.now


def dead_at(at: int, key: str = "k", version: int = 1) -> SyncItem:
    """Return a tombstone of an absolute time."""
    return SyncItem(key, b"", "binary", EMPTY_HASH, version, at, True, "")


async def test_memory_keeps_an_expired_tombstone_for_its_grace() -> None:
    """If this fails what a late tombstone deleted comes back from the next old event."""
    clock = SetClock()
    store = MemorySyncEngine(tombstone_ttl_sec=10, tombstone_grace_sec=5, wall_clock=clock)
    dead = dead_at(NOW - 20_000)
    live = SyncItem("k", b"", "binary", EMPTY_HASH, 1, NOW - 20_001, False, "")
    await store.apply_many([live, dead])
    for clock.now, held in ((NOW + 4_999, dead), (NOW + 5_000, None)):
        await store.apply_many([])
        assert await store.get_many(["k"]) == [held]


async def test_memory_keeps_the_later_of_two_tombstones_of_one_time() -> None:
    """If this fails the end of the first one's grace ends that of the second."""
    clock = SetClock()
    store = MemorySyncEngine(tombstone_ttl_sec=10, tombstone_grace_sec=5, wall_clock=clock)
    at = NOW - 20_000
    await store.apply_many([SyncItem("k", b"", "binary", EMPTY_HASH, 1, at, False, "")])
    await store.apply_many([dead_at(at)])
    clock.now += 4_999
    await store.apply_many([dead_at(at, version=2)])
    clock.now += 1
    await store.apply_many([])
    assert await store.get_many(["k"]) == [dead_at(at, version=2)]


async def test_memory_does_not_forget_what_replaced_a_tombstone() -> None:
    """If this fails a written item vanishes when the delete before it is forgotten."""
    clock = SetClock()
    store = MemorySyncEngine(tombstone_ttl_sec=10, tombstone_grace_sec=5, wall_clock=clock)
    await store.put("k", b"1")
    await store.delete("k")
    written = await store.put("k", b"2")
    clock.now += 20_000
    await store.apply_many([])
    assert await store.get("k") == written


async def test_memory_forgets_a_bounded_number_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails one call after a quiet week stops the event loop for long."""
    monkeypatch.setattr(memory_module, "FORGET_MAX", 10)
    clock = SetClock()
    store = MemorySyncEngine(tombstone_ttl_sec=10, tombstone_grace_sec=5, wall_clock=clock)
    keys = [f"k{i}" for i in range(25)]
    await store.apply_many([dead_at(NOW, key) for key in keys])
    clock.now += 15_000
    left = []
    for _ in range(3):
        await store.apply_many([])
        left.append(len(keys) - (await store.stamps(keys)).count(None))
    assert left == [15, 5, 0]


async def test_memory_counts_live_items_sorts_them_and_is_new_each_time() -> None:
    """If this fails len(), the order of scan, or what a restart means to links is wrong."""
    store = MemorySyncEngine()
    for key in ("b", "c", "a", "b"):
        await store.put(key, b"")
    await store.delete("c")
    assert len(store) == 2
    assert [found.key async for found in store.scan()] == ["a", "b"]
    await store.apply_many([], Received("peer", Position(StreamId(5, 0), 5)))
    assert await store.applied_position("peer") is None
    assert await store.incarnation() == await store.incarnation()
    assert await store.incarnation() != await MemorySyncEngine().incarnation()
    assert store.should_accept_writes()
    store.accepting_writes = False
    assert not store.should_accept_writes()


async def test_noop_says_that_it_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """If this fails nobody is told that what was replicated is thrown away."""
    caplog.set_level(logging.DEBUG, "fsm_replication.noop")
    store = NoOpSyncEngine()
    await store.apply_many([item(), item("other")])
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]
