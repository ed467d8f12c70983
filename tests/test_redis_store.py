"""The store on Redis: what is in Redis, who else writes there, and what happens when it fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis
import zstandard
from conftest import delete_of, now_ms, put_of, raw, until
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.errors import ConfigError, StoreError, StoreReopenedError
from fsm_replication.items import NUMBER_MAX, Resolver, SyncItem
from fsm_replication.layout import encode_value
from fsm_replication.merkle import OWN
from fsm_replication.ports import Position, StreamId, SystemClock
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, Outcome, Received, RedisSyncEngine
from fsm_replication.stores import redis as redis_module
from fsm_replication.stream import DataDecoder, Encoded, encode_fields, parse_entry

pytestmark = pytest.mark.usefixtures("no_tasks_left")

MIB = 1024 * 1024
APPLIED, SUPERSEDED, REFUSED = Outcome.APPLIED, Outcome.SUPERSEDED, Outcome.REFUSED
AT = Position(StreamId(1_700_000_000_000, 7), 42)
SECRET = "hunter2"
# Examples of one test share a store; each takes keys of its own.
fresh = map("example{}.".format, itertools.count())


def entries(server: RedisServer, key: str = "cdc") -> list[list[bytes]]:
    """Return the fields of every entry of a stream, in the order they were written."""
    with raw(server) as client:
        found: Any = client.xrange(key)
        return [[part for pair in fields.items() for part in pair] for _, fields in found]


def calls_of(server: RedisServer, command: str) -> int:
    """Return how often a command was called since the statistics were reset."""
    with raw(server) as client:
        stats: Any = client.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def only_looking_on(server: RedisServer) -> None:
    """Wait until nobody but the test itself is connected."""
    with raw(server) as client:
        await until(lambda: len(client.client_list()) == 1, "the end of the store's connections")


# What is in Redis.


@pytest.mark.parametrize("node_id", ["here", 'quo"te\\d', "é\n\t\x01\x7f日"])
async def test_a_put_is_written_as_layout_and_stream_say(
    any_redis_server: RedisServer, node_id: str
) -> None:
    """If this fails scripts write items or entries that readers spell differently."""
    async with RedisSyncEngine(any_redis_server.url, node_id=node_id) as store:
        small = await store.put("small", b"tiny")
        item = await store.put("key", b'["%b"]' % (b"a" * 400), "json")
        assert await store.delete("key")
        (tombstone,) = await store.get_many(["key"])
    assert tombstone is not None
    written = entries(any_redis_server)
    assert written == [encode_fields(i) for i in (small, item, tombstone)]
    with raw(any_redis_server) as client:
        assert client.get("item:small") == encode_value(small, b"tiny")
        assert client.get("item:key") == encode_value(tombstone, b"")
    for fields, wanted in zip(written, (small, item, tombstone), strict=True):
        entry = parse_entry(fields)
        assert (entry.key, entry.version, entry.updated_at, entry.origin, entry.deleted) == (
            wanted.key,
            wanted.version,
            wanted.updated_at,
            node_id,
            wanted.deleted,
        )
        if not wanted.deleted:
            assert DataDecoder(MIB).decode(entry.data, entry.digest) == wanted.content


async def test_large_numbers_are_written_exactly(any_redis_server: RedisServer) -> None:
    """If this fails meta says 9.007e15, or another number than the item."""
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        # As late as a local write is still possible over it.
        at = now_ms() + 86_000_000
        await store.apply_many([put_of("key", at, version=NUMBER_MAX - 2)])
        item = await store.put("key", b"x")
        assert await store.get("key") == item
        assert await store.delete("key")
    metas = [json.loads(fields[-1]) for fields in entries(any_redis_server)]
    rising = [NUMBER_MAX - 2, NUMBER_MAX - 1, NUMBER_MAX]
    assert [meta["version"] for meta in metas] == rising
    assert [meta["updated_at"] for meta in metas] == [at, at + 1, at + 2]


async def test_only_what_was_applied_is_published(any_redis_server: RedisServer) -> None:
    """If this fails events go round in a ring for ever (G11)."""
    at = now_ms()
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        changes = [put_of("a", at), put_of("a", at), put_of("a", at - 1), delete_of("b", at)]
        for _ in range(2):
            await store.apply_many([*changes, delete_of("gone", 1)])
    assert entries(any_redis_server) == [encode_fields(changes[0]), encode_fields(changes[3])]


async def test_wire_forms_and_items_without_one_may_be_mixed(
    any_redis_server: RedisServer,
) -> None:
    """If this fails a delete or an item without a wire form is written as its neighbour."""
    at = now_ms()
    content = b"the same again " * 40
    item, dead, plain = put_of("key", at, content), delete_of("gone", at), put_of("plain", at)
    # A checksum makes it another spelling than the one we would choose.
    data = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    meta = b'{ "content_type":"binary","version":1,"updated_at":%d,"trace_parent":"00-1"}' % at
    dead_meta = b'{"version":1, "updated_at":%d, "origin":"far"}' % at
    wire = [Encoded(data, meta), Encoded(b"", dead_meta), None]
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        await store.apply_many([item, dead, plain], Received("far", AT, wire))
        assert await store.get_many(["key", "gone", "plain"]) == [item, dead, plain]
    digest = item.content_hash.hex().encode()
    assert entries(any_redis_server) == [
        [b"op", b"PUT", b"key", b"key", b"hash", digest, b"data", data, b"meta", meta],
        [b"op", b"DEL", b"key", b"gone", b"meta", dead_meta],
        encode_fields(plain),
    ]


async def test_two_nodes_with_prefixes_do_not_meet(redis_server: RedisServer) -> None:
    """If this fails two nodes in one Redis write into each other."""
    async with (
        RedisSyncEngine(redis_server.url, node_id="a", redis_prefix="a*:") as a,
        RedisSyncEngine(redis_server.url, node_id="b", redis_prefix="ab:") as b,
    ):
        await a.put("key", b"from a")
        await b.put("key", b"from b")
        await a.apply_many([put_of("other", now_ms())], Received("b", AT))
        assert [item.content async for item in b.scan()] == [b"from b"]
        assert sorted([item.content async for item in a.scan()]) == [b"content", b"from a"]
        assert await b.applied_position("b") is None
    with raw(redis_server) as client:
        assert {key.split(b":")[0] for key in client.scan_iter()} == {b"a*", b"ab"}
    assert len(entries(redis_server, "a*:cdc")) == 2


async def test_the_stream_is_trimmed(any_redis_server: RedisServer) -> None:
    """If this fails the stream fills the memory of its Redis."""
    async with RedisSyncEngine(any_redis_server.url, node_id="here", stream_maxlen=200) as store:
        await store.put_many([(f"k{i}", b"") for i in range(1000)])
        await store.apply_many([put_of(f"far{i}", now_ms()) for i in range(1000)])
    # "~" lets Redis keep what shares a node of its tree, 100 entries, with what must stay.
    assert 200 <= len(entries(any_redis_server)) < 400


@pytest.mark.parametrize("age_sec", [0, 1100], ids=["in time", "expired"])
async def test_redis_forgets_a_tombstone_after_its_grace(
    any_redis_server: RedisServer, age_sec: int
) -> None:
    """If this fails Redis fills with deletes, or a delete is forgotten too early."""
    at = now_ms() - age_sec * 1000
    async with RedisSyncEngine(
        any_redis_server.url, node_id="here", tombstone_ttl_sec=1000, tombstone_grace_sec=500
    ) as store:
        await store.apply_many([put_of("key", at - 1), delete_of("key", at)])
        with raw(any_redis_server) as client:
            left: Any = client.pttl("item:key")
            wanted = max(at + 1_000_000, now_ms()) + 500_000
            assert abs(now_ms() + left - wanted) < 2000
            # What replaces a tombstone must not go with it.
            await store.put("key", b"again")
            assert client.pttl("item:key") == -1
            await store.delete("key")
            left = client.pttl("item:key")
    assert 1_490_000 < left <= 1_501_000


# The order of two stamps.

numbers = st.integers(0, 3) | st.integers(2**31 - 1, 2**33) | st.integers(2**52, NUMBER_MAX)
hashes = st.binary(min_size=32, max_size=32) | st.builds(
    lambda place, byte: bytes(place) + bytes([byte]) + bytes(31 - place),
    st.integers(0, 31),
    st.sampled_from([0, 1, 0x41, 0x61, 0x7F, 0x80, 0xE9, 0xFF]),
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[SyncItem, SyncItem]:
    """Return two items that differ from some field of the order tuple on."""
    kind = st.sampled_from(["binary", "json"])
    a = SyncItem("", b"", draw(kind), draw(hashes), draw(numbers), draw(numbers))
    first = draw(st.integers(0, 3))
    return a, msgspec.structs.replace(
        a,
        updated_at=draw(numbers) if first < 1 else a.updated_at,
        version=draw(numbers) if first < 2 else a.version,
        content_hash=draw(hashes) if first < 3 else a.content_hash,
        content_type=draw(kind),
    )


@given(drawn=st.lists(pairs(), min_size=5, max_size=20))
async def test_the_script_orders_stamps_as_python_does(
    redis_server: RedisServer, drawn: list[tuple[SyncItem, SyncItem]]
) -> None:
    """If this fails the store picks other winners than every other node."""
    prefix = next(fresh)
    held = [msgspec.structs.replace(a, key=f"{prefix}{i}") for i, (a, _) in enumerate(drawn)]
    arriving = [msgspec.structs.replace(b, key=f"{prefix}{i}") for i, (_, b) in enumerate(drawn)]
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        await store.apply_many(held)
        result = await store.apply_many(arriving)
        stamps = await store.stamps([item.key for item in held])
    both = list(zip(held, arriving, strict=True))
    assert result.outcomes == [APPLIED if b.stamp > a.stamp else SUPERSEDED for a, b in both]
    assert stamps == [max(a.stamp, b.stamp) for a, b in both]


@given(data=st.data())
async def test_any_order_gives_the_same_store(
    any_redis_server: RedisServer, data: st.DataObject
) -> None:
    """If this fails nodes that have seen the same changes hold different data (G3, G4)."""
    # Hypothesis must find the same choices each time, so the time of day is added later.
    key, number = st.sampled_from("xyz"), st.integers(0, 2)
    content = st.sampled_from([b"", b"one", b"two" * 40])
    change = st.builds(delete_of, key, number, number) | st.builds(
        put_of, key, number, content, number
    )
    drawn = data.draw(st.lists(change, min_size=1, max_size=12))
    order = data.draw(st.permutations([*range(len(drawn)), *range(len(drawn) // 2)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    prefix, at = next(fresh), now_ms()
    changes = [
        msgspec.structs.replace(c, key=prefix + c.key, updated_at=at + c.updated_at) for c in drawn
    ]
    wanted: dict[str, SyncItem] = {}
    for item in changes:
        if item.key not in wanted or item.stamp > wanted[item.key].stamp:
            wanted[item.key] = item
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        for begin, end in itertools.pairwise([0, *cuts, len(order)]):
            await store.apply_many([changes[i] for i in order[begin:end]])
        assert await store.get_many(list(wanted)) == list(wanted.values())
        assert (await store.apply_many(changes)).applied == 0


# Positions.


@pytest.mark.parametrize("position", [AT, Position(StreamId(2**63, 2**63), None)])
async def test_a_position_comes_back(any_redis_server: RedisServer, position: Position) -> None:
    """If this fails a restarted node reads a peer from somewhere else."""
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        assert await store.applied_position("far") is None
        await store.apply_many([put_of("key", now_ms())], Received("far", position))
        assert await store.applied_position("far") == position
        assert await store.applied_position("another") is None
        await store.apply_many([put_of("key", 1)], Received("far", None))
        assert await store.applied_position("far") == position
        later = Position(StreamId(2**64 - 1, 0), None)
        await store.apply_many([], Received("far", later))
        assert await store.applied_position("far") == later


async def test_a_position_is_kept_with_the_last_part_only(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a crash between two parts of a batch skips the second (G2)."""
    at = now_ms()
    changes = [put_of(f"k{i}", at) for i in range(redis_module.ITEMS_PER_CALL + 1)]
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        apply, parts = store._apply, 0

        async def lose_the_second(*args: Any) -> tuple[bytes, int, int]:
            nonlocal parts
            parts += 1
            if parts == 2:
                store._lanes["far"].close()
            return await apply(*args)

        with monkeypatch.context() as patch:
            patch.setattr(store, "_apply", lose_the_second)
            with pytest.raises(StoreError):
                await store.apply_many(changes, Received("far", AT))
        # Whoever asks for the position is told of the loss by the answer.
        assert await store.applied_position("far") is None
        assert await store.stamps(["k0", changes[-1].key]) == [changes[0].stamp, None]
        result = await store.apply_many(changes, Received("far", AT))
        assert (result.applied, result.superseded) == (1, redis_module.ITEMS_PER_CALL)
        assert await store.applied_position("far") == AT


async def test_a_batch_that_redis_refuses_leaves_nothing(any_redis_server: RedisServer) -> None:
    """If this fails a full Redis takes the position of a batch it did not take."""
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        with raw(any_redis_server) as client:
            client.config_set("maxmemory", "1kb")
            with pytest.raises(StoreError, match="maxmemory"):
                await store.apply_many([put_of("key", now_ms())], Received("far", AT))
            client.config_set("maxmemory", "0")
        assert await store.applied_position("far") is None
        assert await store.get("key") is None
    assert entries(any_redis_server) == []


# Parts.


async def test_calls_and_replies_are_cut(redis_server: RedisServer) -> None:
    """If this fails one batch keeps Redis from serving anybody else for long."""
    at, per_call = now_ms(), redis_module.ITEMS_PER_CALL
    big = [put_of(f"big{i}", at, os.urandom(3 * MIB)) for i in range(3)]
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        await store.apply_many([put_of("warm", at)])
        await store.get("warm")
        with raw(redis_server) as client:
            client.config_resetstat()
        await store.apply_many([put_of(f"k{i}", at) for i in range(2 * per_call + 1)])
        assert calls_of(redis_server, "evalsha") == 3
        await store.apply_many(big)
        assert calls_of(redis_server, "evalsha") == 3 + 3
        # The second item takes a reply over the limit, so the third comes by itself.
        assert await store.get_many([item.key for item in big]) == big
        assert calls_of(redis_server, "evalsha") == 3 + 3 + 2


async def test_the_largest_content_comes_back(any_redis_server: RedisServer) -> None:
    """If this fails contents up to the documented limit cannot be stored."""
    limit = 16 * MIB
    content = os.urandom(limit)
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        item = await store.put("mine", content)
        assert await store.get("mine") == item
        assert await store.submit(put_of("theirs", now_ms(), content))
        same = {item.key: item.content == content async for item in store.scan()}
        assert same == {"mine": True, "theirs": True}
        with pytest.raises(ValueError, match="limit"):
            await store.put_many({"small": b"", "more": content + b"x"})
        assert await store.stamps(["more", "small"]) == [None, None]
    entry = parse_entry(entries(any_redis_server)[-1])
    assert DataDecoder(limit).decode(entry.data, entry.digest) == content


async def test_put_many_writes_as_put_does(any_redis_server: RedisServer) -> None:
    """If this fails the quick way of writing makes other items or entries."""
    written = [(f"k{i % 300}", b"%d" % i) for i in range(500)]
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        items = await store.put_many(written)
        assert [(item.key, item.content) for item in items] == written
        assert [item.version for item in items] == [1 + i // 300 for i in range(500)]
        held = await store.get_many([f"k{i}" for i in range(300)])
        assert held == [*items[300:], *items[200:300]]
        assert await store.put_many({}) == []
    assert entries(any_redis_server) == [encode_fields(item) for item in items]


async def test_json_is_written_compactly(redis_server: RedisServer) -> None:
    """If this fails put_json stores something else than the value."""
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        item = await store.put_json("key", {"é": [1, None, True]})
        assert (item.content, item.content_type) == ('{"é":[1,null,true]}'.encode(), "json")
        with pytest.raises(TypeError):
            await store.put_json("other", object())
        assert await store.get("other") is None


# Several writers.


async def test_several_clients_lose_no_version(any_redis_server: RedisServer) -> None:
    """If this fails two workers of a web server overwrite each other unseen."""
    keys, clients, rounds = 3, 4, 60
    stores = [RedisSyncEngine(any_redis_server.url, node_id="here") for _ in range(clients)]

    async def write(store: RedisSyncEngine, number: int) -> None:
        for i in range(rounds):
            await store.put(f"k{i % keys}", b"%d %d" % (number, i))

    try:
        await asyncio.gather(*(store.open() for store in stores))
        assert len({await store.incarnation() for store in stores}) == 1
        await asyncio.gather(*(write(store, n) for n, store in enumerate(stores)))
        held = await stores[0].get_many([f"k{i}" for i in range(keys)])
    finally:
        for store in stores:
            await store.close()
    parsed = [parse_entry(fields) for fields in entries(any_redis_server)]
    assert len(parsed) == clients * rounds
    for item in held:
        assert item is not None
        of_key = [entry for entry in parsed if entry.key == item.key]
        assert item.version == len(of_key) == clients * rounds // keys
        assert [entry.version for entry in of_key] == list(range(1, len(of_key) + 1))
        times = [entry.updated_at for entry in of_key]
        assert times == sorted(set(times))
        assert of_key[-1].digest == item.content_hash


async def test_local_writes_and_replication_agree_with_the_stream(
    any_redis_server: RedisServer,
) -> None:
    """If this fails a reader of our stream ends with other items than we hold."""
    url, begin = any_redis_server.url, now_ms()
    async with (
        RedisSyncEngine(url, node_id="here") as mine,
        RedisSyncEngine(url, node_id="here") as other,
    ):

        async def local() -> None:
            for i in range(80):
                await mine.put(f"k{i % 4}", b"local %d" % i)
                if i % 7 == 0:
                    await mine.delete(f"k{i % 4}")

        async def remote(peer: str) -> None:
            for i in range(40):
                batch = [put_of(f"k{j}", begin + i * 3 + j, peer.encode(), i) for j in range(4)]
                batch.append(delete_of(f"k{i % 4}", begin + i * 2, i))
                await other.apply_many(batch, Received(peer, Position(StreamId(i, 0), i)))

        await asyncio.gather(local(), remote("p"), remote("q"))
        held = await mine.get_many([f"k{i}" for i in range(4)])
    by_key: dict[str, list[Any]] = {}
    for fields in entries(any_redis_server):
        entry = parse_entry(fields)
        stamp = (entry.updated_at, entry.version, entry.deleted, entry.digest, entry.content_type)
        by_key.setdefault(entry.key, []).append(stamp)
    for item in held:
        assert item is not None
        stamps = by_key[item.key]
        assert stamps == sorted(set(stamps)), "each applied change once, in the order of stamps"
        assert stamps[-1] == tuple(item.stamp)


async def test_more_calls_at_once_than_connections(any_redis_server: RedisServer) -> None:
    """If this fails an application that gathers many writes gets errors instead of waiting."""
    async with RedisSyncEngine(any_redis_server.url, node_id="here", connections_max=4) as store:
        await asyncio.gather(*(store.put(f"k{i}", b"") for i in range(200)))
        assert len([item async for item in store.scan()]) == 200
        with raw(any_redis_server) as client:
            assert len(client.client_list()) <= 4 + 1


async def test_calls_of_one_peer_share_one_connection(redis_server: RedisServer) -> None:
    """If this fails calls at once leave connections behind that nobody closes (G7)."""
    at = now_ms()
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        await asyncio.gather(
            *(store.apply_many([put_of(f"k{i}", at)], Received("p", None)) for i in range(20)),
            *(store.apply_many([put_of(f"l{i}", at)]) for i in range(20)),
        )
        with raw(redis_server) as client:
            names = [row["name"] for row in client.client_list()]
            assert names.count("fsm_replication:store") == 2
    await only_looking_on(redis_server)


# Scripts that Redis has forgotten.


async def test_forgotten_scripts_are_sent_again(any_redis_server: RedisServer) -> None:
    """If this fails SCRIPT FLUSH stops a node until it is restarted."""
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        calls: list[Callable[[], Any]] = [
            lambda: store.submit(put_of("far", now_ms())),
            lambda: store.put("key", b"x"),
            lambda: store.get("far"),
            lambda: store.delete("key"),
            store.open,
        ]
        for _ in range(2):
            for call in calls:
                with raw(any_redis_server) as client:
                    client.script_flush()
                await call()
        assert (await store.stamps(["key"]))[0] is not None


async def test_a_restarted_redis_is_used_again(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a node must be restarted with its Redis, or takes it for another one."""
    server = new_redis_server(persist=True)
    at = now_ms()
    async with RedisSyncEngine(server.url, node_id="here") as store:
        await store.apply_many([put_of("far", at)], Received("p", AT))
        item = await store.put("key", b"x")
        incarnation = await store.incarnation()
        await asyncio.to_thread(server.restart)
        await until(lambda: store._lanes["p"].closed, "the lost connection")
        # Whoever keeps positions is told, since what Redis holds may be older now.
        # A repair that comes first does not take that away.
        await store.apply_many([put_of("mended", at)], Received(""))
        with pytest.raises(StoreReopenedError):
            await store.apply_many([put_of("far", at)], Received("p", AT))
        assert (await store.apply_many([put_of("far", at)], Received("p", AT))).superseded == 1
        assert await store.get("key") == item
        assert await store.incarnation() == incarnation
        assert (await store.put("key", b"y")).version == 2


# Whose Redis it is.


async def test_the_marker_says_who_lives_here(any_redis_server: RedisServer) -> None:
    """If this fails peers take this node for a foreign one, or for another."""
    store = RedisSyncEngine(any_redis_server.url, node_id="here", tombstone_ttl_sec=1.5)
    async with store:
        incarnation = await store.incarnation()
    with raw(any_redis_server) as client:
        marker: Any = client.hgetall("fsm:node")
    assert {name.decode(): value.decode() for name, value in marker.items()} == {
        "node_id": "here",
        "format": "1",
        "layouts": "own",
        "tombstone_ttl_ms": "1500",
        "resolver": "last-writer-wins",
        "partitions": "16384",
        "incarnation": incarnation,
    }
    assert len(incarnation) == 32


@pytest.mark.parametrize(
    ("field", "value"), [("node_id", "somebody"), ("format", "2")], ids=["node", "format"]
)
async def test_a_refused_redis_is_left_as_it_is(
    redis_server: RedisServer, field: str, value: str
) -> None:
    """If this fails a start by mistake changes another node's marker, or leaves connections."""
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        await store.put("key", b"x")
    with raw(redis_server) as client:
        client.hset("fsm:node", field, value)
        before: Any = client.hgetall("fsm:node")
        with pytest.raises(StoreError, match=f"{field}.*{value}"):
            await RedisSyncEngine(redis_server.url, node_id="here").__aenter__()
        assert client.hgetall("fsm:node") == before
    await only_looking_on(redis_server)


async def test_an_old_redis_is_refused(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a Redis without the commands we need fails later and in the dark."""

    async def answer(*_command: str) -> None:
        # As Redis 6.0.16 does.
        raise redis.exceptions.ResponseError(
            "Invalid stream ID specified as stream command argument"
        )

    store = RedisSyncEngine(redis_server.url, node_id="here")
    monkeypatch.setattr(store._redis, "execute_command", answer)
    with pytest.raises(StoreError, match=r"older than Redis 6\.2"):
        await store.open()
    await store.close()


# What is no item of ours.


async def test_a_key_that_holds_no_item_is_refused_and_its_neighbours_are_not(
    any_redis_server: RedisServer,
) -> None:
    """If this fails one odd key stops replication for ever, or is overwritten."""
    at = now_ms()
    async with RedisSyncEngine(any_redis_server.url, node_id="here") as store:
        with raw(any_redis_server) as client:
            client.rpush("item:list", "theirs")
            client.set("item:short", "theirs")
            changes = [put_of(key, at) for key in ("a", "list", "short", "b")]
            result = await store.apply_many(changes, Received("far", AT))
            assert result.outcomes == [APPLIED, REFUSED, REFUSED, APPLIED]
            assert set(result.reasons) == {1, 2}
            assert await store.applied_position("far") == AT
            for key in ("list", "short"):
                with pytest.raises(StoreError, match=f"'{key}'.*no item"):
                    await store.put(key, b"x")
                with pytest.raises(StoreError, match=f"'{key}'.*no item"):
                    await store.delete(key)
            assert client.lrange("item:list", 0, -1) == [b"theirs"]
            assert client.get("item:short") == b"theirs"
        stamps = await store.stamps(["a", "list", "short", "b"])
        assert stamps == [changes[0].stamp, None, None, changes[3].stamp]
        assert await store.get_many(["a", "list"]) == [changes[0], None]
        with pytest.raises(StoreError, match="'short'"):
            await store.get("short")
    assert len(entries(any_redis_server)) == 2


@pytest.mark.parametrize("key", [b"item:\xff", b"item:"], ids=["not UTF-8", "empty"])
async def test_a_scan_says_what_it_cannot_read(redis_server: RedisServer, key: bytes) -> None:
    """If this fails an odd key makes scan raise what nobody expects."""
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        with raw(redis_server) as client:
            client.set(key, encode_value(put_of("k", 1), b"content"))
        with pytest.raises(StoreError):
            _ = [item async for item in store.scan()]


async def test_a_content_that_does_not_match_its_hash_is_not_given_out(
    redis_server: RedisServer,
) -> None:
    """If this fails an application reads damaged data without knowing."""
    async with RedisSyncEngine(redis_server.url, node_id="here") as store:
        with raw(redis_server) as client:
            client.set("item:key", encode_value(put_of("key", 1), b"other"))
        with pytest.raises(StoreError, match="hash"):
            await store.get("key")


# Failures.


class StepClock(SystemClock):
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.ahead_sec = 0.0

    def monotonic(self) -> float:
        """Return the time, and what was added to it."""
        return super().monotonic() + self.ahead_sec


@pytest.mark.parametrize("how", ["put", "apply"])
@pytest.mark.parametrize("why", ["memory", "read-only"])
async def test_a_redis_that_refuses_writes_makes_links_wait(
    any_redis_server: RedisServer, how: str, why: str
) -> None:
    """If this fails replication hammers on a full Redis, or waits when it is well again."""
    clock = StepClock()
    async with RedisSyncEngine(any_redis_server.url, node_id="here", clock=clock) as store:

        async def write() -> None:
            if how == "put":
                await store.put("key", b"x")
            else:
                await store.apply_many([put_of("key", now_ms())])

        with raw(any_redis_server) as client:
            assert store.should_accept_writes()
            if why == "memory":
                client.config_set("maxmemory", "1kb")
            else:
                client.replicaof("127.0.0.1", "1")
            with pytest.raises(StoreError):
                await write()
            assert not store.should_accept_writes()
            clock.ahead_sec += 1.5
            assert store.should_accept_writes()
            client.config_set("maxmemory", "0")
            client.replicaof("NO", "ONE")
            await write()
            assert store.should_accept_writes()


async def test_an_error_that_is_no_refusal_does_not_make_links_wait(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a lost connection shows as backpressure instead of an open circuit."""
    server = new_redis_server()
    async with RedisSyncEngine(server.url, node_id="OOM") as store:
        server.kill()
        for call in (store.put("OOM", b"x"), store.get("READONLY"), store.open()):
            with pytest.raises(StoreError):
                await call
        with pytest.raises(StoreError):
            await store.apply_many([put_of("OOM", 1)])
        assert store.should_accept_writes()


async def test_kill_in_the_middle_of_applying_is_a_store_error(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a crash of Redis loses changes, or keeps a position without its batch."""
    server = new_redis_server(persist=True)
    at = now_ms()
    chunk = [put_of(f"k{i}", at, os.urandom(2000)) for i in range(100)]
    sent = 0

    async def apply_without_end(store: RedisSyncEngine) -> None:
        nonlocal sent
        while True:
            batch = [msgspec.structs.replace(c, updated_at=at + sent + 1) for c in chunk]
            place = Position(StreamId(sent + 1, 0), sent + 1)
            await store.apply_many(batch, Received("far", place))
            sent += 1

    async with RedisSyncEngine(server.url, node_id="here") as store:
        task = asyncio.create_task(apply_without_end(store))
        await until(lambda: sent >= 15, "some batches")
        server.kill()
        with pytest.raises(StoreError):
            await task
    await asyncio.to_thread(server.restart)
    async with RedisSyncEngine(server.url, node_id="here") as again:
        place = await again.applied_position("far")
        held = await again.stamps([item.key for item in chunk])
    assert place is not None
    # With appendfsync always what was acknowledged is there, and the batch that was under way is
    # there with its position, or neither of them is.
    assert place.entries_read in (sent, sent + 1)
    assert {None if stamp is None else stamp.updated_at - at for stamp in held} == {
        place.entries_read
    }


async def test_a_frozen_redis_is_a_store_error_in_time(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a Redis that hangs stops the node for ever."""
    server = new_redis_server()
    async with RedisSyncEngine(server.url, node_id="here", timeout_sec=0.2) as store:
        await store.put("key", b"x")
        server.pause()
        began = time.monotonic()
        for call in (store.put("key", b"y"), store.get("key"), store.stamps(["key"])):
            with pytest.raises(StoreError):
                await call
        with pytest.raises(StoreError):
            await store.apply_many([put_of("other", now_ms())])
        assert time.monotonic() - began < 5
        server.resume()
        item = await store.get("key")
        assert item is not None
        assert item.content in (b"x", b"y")


async def test_a_cancelled_call_disturbs_no_other(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a reply that nobody waited for is taken for somebody else's."""
    server = new_redis_server()
    keys = [f"k{i}" for i in range(10)]
    async with RedisSyncEngine(server.url, node_id="here", connections_max=2) as store:
        for key in keys:
            await store.put(key, key.encode())
        at = now_ms()
        server.pause()
        doomed: list[asyncio.Task[Any]] = [
            asyncio.create_task(store.apply_many([put_of("x", at)])),
            asyncio.create_task(store.put("y", b"")),
            asyncio.create_task(store.get("k0")),
        ]
        others: list[asyncio.Task[Any]] = [
            asyncio.create_task(store.apply_many([put_of("z", at)])),
            asyncio.create_task(store.get_many(keys)),
        ]
        # All of them have sent what they have to send, or wait for one that has.
        await asyncio.wait(doomed + others, timeout=0.1)
        for task in doomed:
            task.cancel()
        ended = await asyncio.gather(*doomed, return_exceptions=True)
        assert [type(end) for end in ended] == [asyncio.CancelledError] * 3
        server.resume()
        result, items = await asyncio.gather(*others)
        assert result.applied == 1
        assert [item.content for item in items] == [key.encode() for key in keys]
        for key in keys:
            item = await store.get(key)
            assert item is not None
            assert item.content == key.encode()


async def test_a_closed_store_opens_no_connection(redis_server: RedisServer) -> None:
    """If this fails a call that comes late leaves a connection behind for ever."""
    store = RedisSyncEngine(redis_server.url, node_id="here")
    async with store:
        await store.apply_many([put_of("key", now_ms())])
    await store.close()
    for call in (
        store.put("key", b"x"),
        store.get("key"),
        store.stamps(["key"]),
        store.applied_position("p"),
        store.apply_many([put_of("key", 1)]),
    ):
        with pytest.raises(StoreError, match="closed"):
            await call
    await only_looking_on(redis_server)
    async with store:
        assert await store.get("key") is not None


async def test_closing_ends_calls_under_way(new_redis_server: Callable[..., RedisServer]) -> None:
    """If this fails close waits for a Redis that hangs, or callers wait for ever."""
    server = new_redis_server()
    store = RedisSyncEngine(server.url, node_id="here")
    await store.open()
    await store.apply_many([put_of("a", now_ms())])
    server.pause()
    tasks = [asyncio.create_task(store.apply_many([put_of("b", now_ms())])) for _ in range(3)]
    await asyncio.wait(tasks, timeout=0.05)
    async with asyncio.timeout(2):
        await store.close()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended] == [StoreError] * 3


# Secrets.


@pytest.mark.parametrize("password", [SECRET, f"wrong{SECRET}"], ids=["right", "wrong"])
async def test_credentials_are_shown_nowhere(
    new_redis_server: Callable[..., RedisServer], password: str
) -> None:
    """If this fails a password ends in a log file."""
    server = new_redis_server(config=[("requirepass", SECRET)])
    store = RedisSyncEngine(f"redis://:{password}@127.0.0.1:{server.port}", node_id="here")
    shown = [repr(store), str(store)]
    if password == SECRET:
        await store.open()
        assert await store.submit(put_of("key", now_ms()))
        await store.put("key", b"x")
        server.kill()
    for call in (store.open, store.incarnation):
        with pytest.raises(StoreError) as caught:
            await call()
        shown += [str(caught.value), repr(caught.value)]
    with pytest.raises(StoreError) as caught:
        await store.apply_many([put_of("other", now_ms())])
    shown += [str(caught.value), repr(caught.value)]
    await store.close()
    assert [text for text in shown if SECRET in text] == []


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}/x@host:1",
        f"http://:{SECRET}@host",
        f"redis://u:{SECRET}#@host:x",
        "host",
    ],
    ids=["slash", "scheme", "hash", "no URL"],
)
async def test_a_url_that_cannot_be_used_is_refused_without_being_shown(url: str) -> None:
    """If this fails a mistyped URL prints the password in it, or fails only when used."""
    with pytest.raises(ConfigError) as caught:
        RedisSyncEngine(url, node_id="here")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("resolver", [None, GrowOnlySet()], ids=["by stamp", "merging"])
async def test_a_redis_that_came_back_empty_is_opened_before_it_is_written(
    redis_server: RedisServer, resolver: Resolver | None
) -> None:
    """If this fails readers find a stream without a marker, and take the node for a foreign one."""
    with redis.Redis(port=redis_server.port) as client:
        async with RedisSyncEngine(redis_server.url, node_id="a", resolver=resolver) as store:
            before = await store.incarnation()
            for write in (store.put_json("k", [1]), store.delete("k")):
                client.flushall()
                await write
                assert client.hget("fsm:node", "node_id") == b"a"
                assert client.hget("fsm:node", "layouts") == b"own"
            item = await store.put_json("k", [2])
            assert await store.incarnation() != before
            client.flushall()
            position = Position(StreamId(1, 0), 1)
            with pytest.raises(StoreReopenedError, match="emptied or replaced"):
                await store.apply_many([item], Received("peer", position))
            assert client.keys() == []


@pytest.mark.parametrize("resolver", [None, GrowOnlySet()], ids=["by stamp", "merging"])
async def test_a_store_that_has_become_another_takes_nothing_meant_for_the_first(
    redis_server: RedisServer, resolver: Resolver | None
) -> None:
    """If this fails changes are applied to a store that misses what came before them (G2)."""
    with redis.Redis(port=redis_server.port) as client:
        async with RedisSyncEngine(redis_server.url, node_id="a", resolver=resolver) as store:
            meant = Received("peer", AT, incarnation=await store.incarnation())
            item = await store.put_json("late", [1])
            assert (await store.apply_many([item], meant)).superseded == 1
            client.flushall()
            await store.put_json("local", [1])
            for changes in ([item], []):
                with pytest.raises(StoreReopenedError, match="emptied or replaced"):
                    await store.apply_many(changes, meant)
            assert await store.get("late") is None
            assert await store.applied_position("peer") is None


async def test_a_tree_is_built_while_others_write(redis_server: RedisServer) -> None:
    """If this fails items stay out of the tree for good, and no comparison ever finds them."""
    url = redis_server.url
    async with (
        RedisSyncEngine(url, node_id="a") as one,
        RedisSyncEngine(url, node_id="a") as other,
    ):
        done = asyncio.Event()

        async def write() -> None:
            number = 0
            while not done.is_set():
                number += 1
                await other.put_many([(f"k{(number * 50 + i) % 1500}", b"x") for i in range(50)])
                await other.delete(f"k{number % 1500}")

        with redis.Redis(port=redis_server.port) as client:
            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                for _ in range(4):
                    client.hset("fsm:node", mapping={"layouts": "", "partitions": 0})
                    await one.open()
                done.set()
        memory = MemorySyncEngine(node_id="a")
        keys = [f"k{number}" for number in range(1500)]
        await memory.apply_many([item for item in await one.get_many(keys) if item is not None])
        assert one.tree is not None
        assert memory.tree is not None
        assert await one.tree.root(OWN) == await memory.tree.root(OWN)


async def test_two_openings_at_once_build_one_tree(redis_server: RedisServer) -> None:
    """If this fails a tree is announced while it is being built anew."""
    async with RedisSyncEngine(redis_server.url, node_id="a") as store:
        await store.put_many([(f"k{number}", b"x") for number in range(3000)])
        assert store.tree is not None
        root = await store.tree.root(OWN)
        with redis.Redis(port=redis_server.port) as client:
            client.hset("fsm:node", mapping={"layouts": "", "partitions": 0})

            async def look() -> None:
                await until(lambda: client.hget("fsm:node", "layouts") == b"own")
                for _ in range(200):
                    assert store.tree is not None
                    assert await store.tree.root(OWN) == root

            await asyncio.gather(store.open(), store.open(), look())
