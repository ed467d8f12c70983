"""The node's own Redis: writes that fail half way, a changed ttl, who else has it open, and its settings."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import delete_of, now_ms, put_of, raw, until, until_async
from rich.console import Console
from sqlite_store import SqliteStore

from fsm_replication.cli.node import check_node
from fsm_replication.config import CursorConfig, ReplicationConfig, StoreConfig
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import ConfigError, StoreError, StoreReopenedError
from fsm_replication.items import SyncItem
from fsm_replication.layout import decode_item, encode_stamp
from fsm_replication.merkle import OWN, MerkleTree, bucket_of
from fsm_replication.ports import Agreement, Position, StreamId
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.retry import RetryProfile
from fsm_replication.servers import RedisServer
from fsm_replication.stores import (
    MemorySyncEngine,
    OutboxPublisher,
    Received,
    RedisSyncEngine,
    redis_scripts,
    redis_upkeep,
)
from fsm_replication.stores.redis_upkeep import TtlMemory
from fsm_replication.stream import DataDecoder
from fsm_replication.tables import PeerState
from fsm_replication.testing import LocalMesh
from fsm_replication.testing.local_mesh import COLD_INTERVAL_SEC, GRACE_SEC, TTL_SEC, topology
from fsm_replication.testing.virtual_time import run
from fsm_replication.workers.guards import StaleGuard

pytestmark = pytest.mark.usefixtures("no_tasks_left")

MIB = 1024 * 1024
AT = Position(StreamId(1_700_000_000_000, 7), 42)
BOTH = ("own", "dotted")
# What the scripts of the store use, and a user may therefore not be allowed to.
COMMANDS = (
    "set", "get", "getrange", "setrange", "hset", "hsetnx", "hget", "hdel", "hmget", "xadd", "zadd", "zrem",
    "zrangebyscore", "time", "incrby",
)  # fmt: skip
LAST_ID = "18446744073709551615-18446744073709551615"


def everything(client: Any) -> dict[bytes, Any]:
    """Return all that Redis holds, save for who has the store open, and counts of zero."""
    found: dict[bytes, Any] = {}
    for name in client.scan_iter(count=1000):
        kind = client.type(name)
        if kind == b"string":
            found[name] = client.get(name)
        elif kind == b"hash":
            found[name] = client.hgetall(name)
        elif kind == b"zset" and not name.endswith(b"fsm:processes"):
            found[name] = client.zrange(name, 0, -1, withscores=True)
        elif kind == b"stream":
            found[name] = client.xrange(name)
        elif kind == b"list":
            found[name] = client.lrange(name, 0, -1)
    return found


def items_in(client: Any, prefix: bytes = b"item:") -> dict[str, SyncItem]:
    """Return every item that lies in Redis."""
    decoder, found = DataDecoder(MIB), {}
    for name in client.scan_iter(match=prefix + b"*", count=1000):
        key = name.removeprefix(prefix).decode()
        found[key] = decode_item(key, client.get(name), decoder)
    return found


def root_of(client: Any) -> bytes:
    """Return the root of the tree as readers find it."""
    found: bytes = client.getrange("fsm:tree", 0, 7)
    return found or bytes(8)


def assert_is_whole(client: Any) -> None:
    """Items, tree, stream and the number of live items must tell of the same."""
    items, tree = items_in(client), MerkleTree()
    for key, item in items.items():
        tree.set(key, encode_stamp(item))
    assert root_of(client) == tree.root()
    assert int(client.get("fsm:live") or 0) == sum(not item.deleted for item in items.values())
    told = {fields[b"key"].decode() for _, fields in client.xrange("cdc")}
    assert items.keys() <= told


Write = Callable[[RedisSyncEngine], Awaitable[object]]


def writes() -> dict[str, Write]:
    """Return every way to write, over nothing and over what is held."""
    later = now_ms() + 1000
    from_peer = Received("far", AT)
    return {
        "a put of a new key": lambda store: store.put("new", b"x"),
        "a put over an item": lambda store: store.put("held", b"y"),
        "a put over a tombstone": lambda store: store.put("gone", b"y"),
        "a delete": lambda store: store.delete("held3"),
        "an item of a peer": lambda store: store.apply_many([put_of("new3", later)], from_peer),
        "a newer item of a peer": lambda store: store.apply_many([put_of("held4", later)], from_peer),
        "a delete of a peer": lambda store: store.apply_many([delete_of("held5", later)], from_peer),
        "a delete of what is not here": lambda store: store.apply_many([delete_of("new4", later)]),
    }  # fmt: skip


@asynccontextmanager
async def prepared(server: RedisServer, **options: Any) -> AsyncIterator[RedisSyncEngine]:
    """Open a store that holds something, for a user whose rights may be taken away."""
    with raw(server) as client:
        client.execute_command("ACL", "SETUSER", "writer", "on", "nopass", "~*", "+@all")
    url = f"redis://writer:none@127.0.0.1:{server.port}"
    async with RedisSyncEngine(url, node_id="here", **options) as store:
        await store.put_many({"held": b"0", **{f"held{n}": b"0" for n in range(2, 6)}, "gone": b""})
        await store.delete("gone")
        yield store


async def each_write_is_whole_or_not_at_all(
    store: RedisSyncEngine, client: Any, broken: str = ""
) -> int:
    """Try every write; returns how many were refused, each of which must have changed nothing."""
    refused = 0
    for name, write in writes().items():
        before = everything(client)
        try:
            await write(store)
        except StoreError:
            refused += 1
            assert everything(client) == before, (
                f"{name} was refused and changed something: {broken}"
            )
    return refused


# A write that fails half way.


@pytest.mark.parametrize(
    "commands", [("set", "xadd", "hset"), pytest.param(COMMANDS, marks=pytest.mark.slow)]
)
async def test_a_user_who_lacks_a_command_writes_whole_or_not_at_all(
    any_redis_server: RedisServer, commands: tuple[str, ...]
) -> None:
    """If this fails an item is held that the stream never tells of, or the tree is wrong (G1)."""
    refused: dict[str, int] = {}
    async with prepared(any_redis_server) as store:
        with raw(any_redis_server) as client:
            for command in commands:
                client.execute_command("ACL", "SETUSER", "writer", f"-{command}")
                refused[command] = await each_write_is_whole_or_not_at_all(store, client, command)
                client.execute_command("ACL", "SETUSER", "writer", f"+{command}")
                await store.put("held3", b"again")
            assert await each_write_is_whole_or_not_at_all(store, client) == 0
            assert_is_whole(client)
    assert refused["xadd"] == refused["set"] == len(writes())
    assert refused.get("incrby", 0) == 0


@pytest.mark.parametrize("others", [0, pytest.param(10, marks=pytest.mark.slow)])
async def test_a_key_of_another_type_spoils_no_write_half_way(
    any_redis_server: RedisServer, others: int
) -> None:
    """If this fails a stream or tree that somebody has overwritten leaves items nobody hears of."""
    async with prepared(any_redis_server, layouts=BOTH) as store:
        await store._publisher.stop()  # type: ignore[union-attr]
        with raw(any_redis_server) as client:
            buckets = [b"fsm:tree:%d" % bucket_of(key) for key in (b"held", b"gone", b"new4")]
            names = [b"cdc", b"fsm:tree", buckets[0], b"fsm:live", b"fsm:positions"]
            names += [b"fsm:dotted:dirty", b"fsm:tree:deleted", *buckets[1:]]
            for name in names[: 3 + others]:
                await store.put("held3", b"again")
                there = client.exists(name)
                if there:
                    client.rename(name, "saved")
                client.rpush(name, "a list")
                broken = await each_write_is_whole_or_not_at_all(store, client, name.decode())
                client.delete(name)
                if there:
                    client.rename("saved", name)
                assert broken, name
            assert await each_write_is_whole_or_not_at_all(store, client) == 0


@pytest.mark.parametrize("left", [0, 1])
async def test_a_stream_without_ids_left_takes_no_item(
    any_redis_server: RedisServer, left: int
) -> None:
    """If this fails a stream at its end keeps taking items that no reader hears of."""
    async with prepared(any_redis_server) as store:
        with raw(any_redis_server) as client:
            client.execute_command(
                "XADD", "cdc", f"{LAST_ID[:-1]}{5 - left}", "op", "PUT", "key", "held"
            )
            position = await store.applied_position("far")
            batch = [put_of(f"b{n}", now_ms()) for n in range(4)]
            with pytest.raises(StoreError, match="exhausted"):
                await store.apply_many(batch, Received("far", AT))
            assert await store.applied_position("far") == position
            assert [key for key in sorted(items_in(client)) if key < "c"] == ["b0"][:left]
            assert await each_write_is_whole_or_not_at_all(store, client) == len(writes())
            assert_is_whole(client)


@pytest.mark.parametrize("layouts", [("own",), ()])
async def test_a_merged_write_that_is_refused_changes_nothing(
    redis_server: RedisServer, layouts: tuple[str, ...]
) -> None:
    """If this fails a resolver's items escape the rule, or those of a node without a tree."""
    with raw(redis_server) as client:
        client.execute_command("ACL", "SETUSER", "writer", "on", "nopass", "~*", "+@all")
        url = f"redis://writer:none@127.0.0.1:{redis_server.port}"
        async with RedisSyncEngine(
            url, node_id="here", layouts=layouts, resolver=GrowOnlySet()
        ) as store:
            await store.put_json("held", ["a"])
            for command in COMMANDS:
                client.execute_command("ACL", "SETUSER", "writer", f"-{command}")
                before = everything(client)
                for write in (store.put_json("held", ["b"]), store.put_json("new", ["b"])):
                    try:
                        await write
                    except StoreError:
                        assert everything(client) == before, command
                    else:
                        before = everything(client)
                client.execute_command("ACL", "SETUSER", "writer", f"+{command}")
                client.delete("item:new")
        client.execute_command("ACL", "DELUSER", "writer")


async def test_memory_that_ends_within_a_batch_leaves_whole_items(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a Redis that gets full in the middle of a batch keeps a part of it."""
    server = new_redis_server(config=[("maxmemory", "4mb"), ("maxmemory-policy", "noeviction")])
    async with RedisSyncEngine(server.url, node_id="here") as store:

        async def fill() -> None:
            for number in range(1000):
                batch = [put_of(f"k{number}.{n}", now_ms(), os.urandom(4000)) for n in range(50)]
                await store.apply_many(batch, Received("far", AT))

        with pytest.raises(StoreError, match=r"(?i)memory|OOM"):
            await fill()
        with raw(server) as client:
            assert client.dbsize() > 50
            assert_is_whole(client)


async def test_dotted_nodes_stay_marked_where_folding_fails(redis_server: RedisServer) -> None:
    """If this fails a hash of the dotted tree is never computed again after one refused command."""
    async with prepared(redis_server, layouts=BOTH) as store:
        publisher = store._publisher
        assert publisher is not None

        async def published() -> bool:
            return await store._tree.is_branch_clean("dotted", "")

        await until_async(published)
        await publisher.stop()
        with raw(redis_server) as client:
            before = client.get("merkle:hash:")
            await store.put_many({f"uk.{n}.x": b"1" for n in range(3)})
            assert await publisher._lease()
            await publisher._publish(await publisher._dirty())
            client.execute_command("ACL", "SETUSER", "writer", "-set")
            with pytest.raises(StoreError):
                await publisher._fold()
            client.execute_command("ACL", "SETUSER", "writer", "+set")
            publisher.start()
            await until_async(published)
            names = {b"merkle:hash:" + path for path in (b"uk", b"uk.0", b"uk.1", b"uk.2")}
            assert names <= set(client.keys("merkle:hash:*"))
            assert client.get("merkle:hash:") != before
            client.execute_command("ACL", "DELUSER", "writer")


async def test_an_outbox_keeps_what_redis_has_refused(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a row is gone from the outbox that no reader has ever heard of (G1)."""
    url = f"redis://writer:none@127.0.0.1:{redis_server.port}"
    quick = RetryProfile(0.01, 1.0, 0.01)
    with raw(redis_server) as client:
        client.execute_command("ACL", "SETUSER", "writer", "on", "nopass", "~*", "+@all")
        async with (
            SqliteStore(tmp_path / "items.db", node_id="here") as store,
            OutboxPublisher(store, url, node_id="here", retries=quick, poll_sec=0.01) as publisher,
        ):
            await publisher.wait_published(10)
            for command in ("xadd", "set", "hset"):
                client.execute_command("ACL", "SETUSER", "writer", f"-{command}")
                before = everything(client)
                await store.put(command, b"x")
                publisher.wake()
                await until(lambda: publisher.last_error is not None)
                assert everything(client) == before
                client.execute_command("ACL", "SETUSER", "writer", f"+{command}")
                await publisher.wait_published(10)
                assert_is_whole(client)
                assert command in items_in(client)
        client.execute_command("ACL", "DELUSER", "writer")


# A changed ttl.

HOUR_MS = 3_600_000
HOUR_SEC = 3600.0


def marker(client: Any) -> dict[str, str]:
    """Return the marker key."""
    return {name.decode(): value.decode() for name, value in client.hgetall("fsm:node").items()}


def leaves(client: Any) -> set[str]:
    """Return the keys whose leaves are in the tree."""
    return {
        key.decode()
        for name in client.scan_iter("fsm:tree:*", count=1000)
        if client.type(name) == b"hash"
        for key in client.hkeys(name)
    }


def aged(server: RedisServer, ttl_hours: float) -> RedisSyncEngine:
    """Return a store whose tombstones count for so many hours, and are kept for one more."""
    return RedisSyncEngine(
        server.url, node_id="here", tombstone_ttl_sec=ttl_hours * HOUR_SEC,
        tombstone_grace_sec=HOUR_SEC,
    )  # fmt: skip


async def announced(client: Any, ttl_hours: float) -> None:
    """Wait until the marker names a ttl, and none that is still to come."""
    wanted = str(round(ttl_hours * HOUR_MS))

    def is_announced() -> bool:
        fields = marker(client)
        return fields["tombstone_ttl_ms"] == wanted and "tombstone_ttl_next_ms" not in fields

    await until(is_announced, f"a ttl of {ttl_hours} h")


async def delete_at(store: RedisSyncEngine, key: str, at: int) -> None:
    """Have a store hold an item, and then its delete of long ago."""
    await store.apply_many([put_of(key, at - 1), delete_of(key, at)])


async def assert_tree_is_right(store: RedisSyncEngine, client: Any, *keys: str) -> None:
    """The tree must hold these keys and no others, and its root must be theirs."""
    tree, items = MerkleTree(), items_in(client)
    for key in keys:
        tree.set(key, encode_stamp(items[key]))
    assert store.tree is not None
    assert await store.tree.root(OWN) == tree.root()
    assert leaves(client) == set(keys)


async def test_a_raised_ttl_holds_for_tombstones_that_exist(any_redis_server: RedisServer) -> None:
    """If this fails old tombstones still vanish by the old ttl, or the root is wrong for ever (G4, G5)."""
    now = now_ms()
    with raw(any_redis_server) as client:
        async with aged(any_redis_server, 1) as store:
            await delete_at(store, "young", now - HOUR_MS // 2)
            await delete_at(store, "expired", now - 3 * HOUR_MS // 2)
            await store.put("live", b"x")
            await assert_tree_is_right(store, client, "young", "live")
        # What is not ours must not keep a ttl from being announced.
        client.rpush("item:strange", "a list")
        client.set(b"item:\xff", b"no text")
        async with aged(any_redis_server, 3) as store:
            await announced(client, 3)
            client.delete("item:strange", b"item:\xff")
            await announced(client, 3)
            await assert_tree_is_right(store, client, "young", "expired", "live")
            for key, at in (("young", now - HOUR_MS // 2), ("expired", now - 3 * HOUR_MS // 2)):
                assert client.pttl(f"item:{key}") + now_ms() >= at + 4 * HOUR_MS - 1000
            older = [put_of("young", now - HOUR_MS), put_of("expired", now - 2 * HOUR_MS)]
            assert (await store.apply_many(older)).superseded == 2
        async with aged(any_redis_server, 1) as store:
            await announced(client, 1)
            await assert_tree_is_right(store, client, "young", "live")
            assert client.pttl("item:young") + now_ms() < now + 2 * HOUR_MS


async def test_a_ttl_is_announced_when_all_is_in_line_and_not_before(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails readers compare a tree that is half by one ttl and half by another."""
    now, reached, change = now_ms(), asyncio.Event(), RedisSyncEngine._change
    monkeypatch.setattr(redis_upkeep, "KEYS_PER_SLICE", 5)

    async def stuck(self: Any, text: str, args: Any) -> Any:
        # As a process that is killed after some of the slices.
        if text == redis_scripts.REALIGN and reached.is_set():
            await asyncio.Event().wait()
        if text == redis_scripts.REALIGN:
            reached.set()
        return await change(self, text, args)

    keys = [f"k{n}" for n in range(40)]
    with raw(redis_server) as client:
        async with aged(redis_server, 1) as store:
            for key in keys:
                await delete_at(store, key, now - 3 * HOUR_MS // 2)
        for ttl in (3, 2, 1):
            # The last goes back to what is announced, over slices that were done by another.
            reached.clear()
            with monkeypatch.context() as patch:
                patch.setattr(RedisSyncEngine, "_change", stuck)
                async with aged(redis_server, ttl) as store:
                    await reached.wait()
                    assert marker(client)["tombstone_ttl_ms"] == str(HOUR_MS)
                    assert store.deletes_known_ms(now_ms()) == HOUR_MS
                    await store.put("live", b"x")
        async with aged(redis_server, 3) as store:
            await announced(client, 3)
            await assert_tree_is_right(store, client, *keys, "live")
            known = store.deletes_known_ms(now_ms() + 1000)
            assert HOUR_MS + 1000 <= known < HOUR_MS + 20_000
            assert store.deletes_known_ms(now_ms() + 10 * HOUR_MS) == 3 * HOUR_MS
        async with aged(redis_server, 3) as again:
            known = again.deletes_known_ms(now_ms() + 1000)
            assert HOUR_MS + 1000 <= known < HOUR_MS + 20_000
            assert "tombstone_ttl_next_ms" not in marker(client)
        reached.clear()
        with monkeypatch.context() as patch:
            patch.setattr(RedisSyncEngine, "_change", stuck)
            async with aged(redis_server, 5) as store:
                await reached.wait()
                # Raised twice, it knows no more than after the first time.
                assert store.deletes_known_ms(now_ms()) < HOUR_MS + 20_000


async def test_a_longer_ttl_keeps_no_leaf_whose_item_is_gone(redis_server: RedisServer) -> None:
    """If this fails a node's tree names tombstones that nobody can fetch, until the new ttl is over."""
    now = now_ms()
    with raw(redis_server) as client:
        async with aged(redis_server, 1) as store:
            await delete_at(store, "gone", now - HOUR_MS // 2)
            await store.put("live", b"x")
        # As where the item went after its grace, and nobody has compared since the leaf was due.
        client.delete("item:gone")
        client.hset("fsm:node", "tombstone_ttl_ms", HOUR_MS // 4)
        async with aged(redis_server, 1) as store:
            await announced(client, 1)
            await assert_tree_is_right(store, client, "live")


async def test_writes_while_a_ttl_changes_are_kept_by_the_longer_one(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a tombstone written during the walk expires by a ttl that is no more in force."""
    now, reached, go_on = now_ms(), asyncio.Event(), asyncio.Event()
    change = RedisSyncEngine._change

    async def slow(self: Any, text: str, args: Any) -> Any:
        if text == redis_scripts.ANNOUNCE:
            reached.set()
            await go_on.wait()
        return await change(self, text, args)

    with raw(redis_server) as client:
        async with aged(redis_server, 1) as store:
            await store.put("live", b"x")
        for ttl, longest in ((3, 3), (1, 3)):
            reached.clear()
            go_on.clear()
            key, at = f"k{ttl}", now - 3 * HOUR_MS // 2
            with monkeypatch.context() as patch:
                patch.setattr(RedisSyncEngine, "_change", slow)
                async with aged(redis_server, ttl) as store:
                    await reached.wait()
                    await delete_at(store, key, at)
                    assert client.pttl(f"item:{key}") + now_ms() >= at + longest * HOUR_MS
                    assert key in leaves(client)
                    go_on.set()
                    await announced(client, ttl)
                    await assert_tree_is_right(store, client, "live", *([key] if ttl == 3 else []))


class FixedWallClock:
    """A time of day that a test sets."""

    def __init__(self, ms: int) -> None:
        self.ms = ms

    def now_ms(self) -> int:
        """Return the time that was set."""
        return self.ms


def test_a_delete_that_was_heard_of_late_is_not_undone_by_a_peer_that_has_not() -> None:
    """If this fails a key comes back as soon as the grace of its tombstone is over (G5)."""
    now = 100 * HOUR_MS
    guard = StaleGuard(10 * HOUR_MS, FixedWallClock(now))
    late, fresh = now - 20 * HOUR_MS, now - HOUR_MS
    guard.agreed(Agreement(now - HOUR_MS))
    made = guard.excepting((), {"late": late, "fresh": fresh})
    assert made == {"late": late, "fresh": fresh}
    guard.agreed(Agreement(now, exceptions=made))
    old = put_of("k", now - 30 * HOUR_MS).stamp
    assert guard.holds_back("late", old, None)
    assert not guard.holds_back("fresh", old, None)
    assert not guard.holds_back("another", old, None)


def test_an_old_agreement_stays_old_when_the_ttl_is_raised() -> None:
    """If this fails an item is revived whose delete was forgotten by the old ttl (G5)."""
    now = 10 * HOUR_MS
    wall = FixedWallClock(now)
    guard = StaleGuard(7 * HOUR_MS, wall, TtlMemory(HOUR_MS, now - HOUR_MS // 2).known_at)
    guard.agreed(Agreement(now - 2 * HOUR_MS))
    old = put_of("k", now - 3 * HOUR_MS).stamp
    assert guard.holds_back("k", old, None)
    # What expired is asked of the new ttl, by which tombstones are kept from now on.
    assert not guard.is_spent(delete_of("k", now - 3 * HOUR_MS).stamp, None)
    wall.ms = now + 7 * HOUR_MS
    guard.agreed(Agreement(wall.ms - HOUR_MS))
    assert not guard.holds_back("k", old, None)


def test_an_agreement_that_a_wrong_clock_has_dated_is_not_believed() -> None:
    """If this fails a clock that was days ahead for a moment lets old items in for days (G5)."""
    wall = FixedWallClock(100 * HOUR_MS)
    guard = StaleGuard(HOUR_MS, wall)
    old = put_of("k", 10 * HOUR_MS).stamp
    guard.agreed(Agreement(wall.ms + 48 * HOUR_MS))
    assert guard.active
    assert guard.holds_back("k", old, None)
    guard.agreed(Agreement(wall.ms + HOUR_MS // 2))
    assert not guard.holds_back("k", old, None)


def test_a_raised_ttl_revives_no_item_whose_delete_was_forgotten() -> None:
    """If this fails two days away and a ttl of seven days bring back what was deleted (G5)."""

    async def scenario() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        for name in "ab":
            await mesh.start(name)
        mesh.nodes["b"].store.put("doomed", b"x")
        await mesh.settle()
        mesh.cut("a", "b")
        mesh.cut("b", "a")
        mesh.nodes["a"].store.delete("doomed")
        await asyncio.sleep(TTL_SEC + 2 * GRACE_SEC)
        assert mesh.nodes["a"].store.held("doomed") is None
        for name in "ab":
            await mesh.change_ttl(name, 100 * TTL_SEC)
        mesh.heal("a", "b")
        mesh.nodes["b"].store.put("other", b"y")
        await asyncio.sleep(10 * COLD_INTERVAL_SEC)
        a = mesh.nodes["a"]
        assert a.store.held("other") is not None
        assert a.store.held("doomed") is None
        assert a.engine is not None
        assert a.engine.health_check().peers[0].stale_held_back == 1
        await mesh.close()

    run(scenario)


@pytest.mark.parametrize(
    ("names", "factor"),
    [("ab", 3.0), *(pytest.param("abc", factor, marks=pytest.mark.slow) for factor in (3.0, 0.5))],
)
def test_the_ttl_of_a_whole_mesh_changes_node_by_node(names: str, factor: float) -> None:
    """If this fails what docs/tombstones.md says breaks the mesh, or brings back deleted items."""

    async def scenario() -> None:
        mesh = LocalMesh(names, topology("mesh", names))
        for name in names:
            await mesh.start(name)
        store = mesh.nodes["a"].store
        deleted = [f"gone{n}" for n in range(9)]
        for key in [*deleted, "live"]:
            store.put(key, b"x")
        await mesh.settle()
        # Some are only kept for their grace, some are older than half of the ttl, some are new.
        for keys in (deleted[:3], deleted[3:6], deleted[6:]):
            for key in keys:
                store.delete(key)
            await asyncio.sleep(0.6 * TTL_SEC)
        await mesh.settle()
        for name in names:
            await mesh.change_ttl(name, factor * TTL_SEC)
            await asyncio.sleep(2 * COLD_INTERVAL_SEC)
            # The others have noticed, and do not read this one before they are changed too.
            states = [node.engine.peers for node in mesh.nodes.values() if node.engine]
            assert name == names[-1] or PeerState.FAILED in states[-1].values()
        await mesh.settle()
        for node in mesh.nodes.values():
            live = [key for key, item in node.store.items().items() if not item.deleted]
            assert live == ["live"]
        assert len(await mesh.roots()) == 1
        await mesh.close()

    run(scenario)


@pytest.mark.parametrize("field", ["tombstone_ttl_ms", "resolver"])
def test_a_reader_notices_what_its_peer_has_changed(field: str) -> None:
    """If this fails a link goes on comparing trees that are kept by two different rules."""

    async def scenario() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        for name in "ab":
            await mesh.start(name)
        await mesh.settle()
        b = mesh.nodes["b"].engine
        assert b is not None
        server = mesh.servers["a"]
        before = server.execute("HGET", "fsm:node", field)
        server.execute("HSET", "fsm:node", field, "5")
        await b.wait_for_state(PeerState.FAILED, peer_id="a", timeout=3 * COLD_INTERVAL_SEC)
        assert field in b.health_check().peers[0].last_error
        server.execute("HSET", "fsm:node", field, before)
        await b.wait_for_state(PeerState.TAILING, peer_id="a", timeout=600)
        await mesh.close()

    run(scenario)


# Whose Redis it is.


def test_a_node_that_lost_its_marker_is_no_foreign_one() -> None:
    """If this fails its stream is read as a foreign one's, and its items get new times (G3)."""

    async def scenario() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        for name in "ab":
            await mesh.start(name)
        mesh.nodes["a"].store.put("k", b"x")
        await mesh.settle()
        await mesh.stop("a")
        b = mesh.nodes["b"].engine
        assert b is not None
        mesh.servers["a"].execute("DEL", "fsm:node")
        await b.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=3 * COLD_INTERVAL_SEC)
        await asyncio.sleep(60)
        assert not b.peers["a"].is_running
        assert "lost its marker" in b.health_check().peers[0].last_error
        await mesh.start("a")
        await mesh.settle()
        assert b.peers["a"] is PeerState.TAILING
        await mesh.close()

    run(scenario)


async def test_a_lost_marker_is_written_again_without_any_write(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a node at rest is not to be read any more, and nobody knows why."""
    monkeypatch.setattr(redis_upkeep, "BEAT_SEC", 0.01)
    with raw(redis_server) as client:
        async with RedisSyncEngine(redis_server.url, node_id="here") as store:
            await store.put("k", b"x")
            client.delete("fsm:node")
            await until(lambda: client.hget("fsm:node", "layouts") == b"own")
            assert_is_whole(client)
            assert await store.incarnation() == marker(client)["incarnation"]


async def test_a_marker_that_is_lost_alone_is_that_of_the_same_data(
    any_redis_server: RedisServer,
) -> None:
    """If this fails each agreement goes with one key, and what is forgotten may come back (G5)."""
    with raw(any_redis_server) as client:
        async with aged(any_redis_server, 1) as store:
            await store.put("k", b"x")
        # A store of before, which has no copy, gets one the next time.
        client.delete("fsm:node:copy")
        async with aged(any_redis_server, 3) as store:
            await announced(client, 3)
            before = marker(client)
            client.delete("fsm:node")
            assert await store.incarnation() == before["incarnation"]
            assert marker(client) == before
            assert store.deletes_known_ms(now_ms()) < HOUR_MS + 20_000
            await assert_tree_is_right(store, client, "k")
        client.delete("fsm:node")
        with pytest.raises(StoreError, match="belongs to another node"):
            async with RedisSyncEngine(any_redis_server.url, node_id="somebody"):
                pass
        # What lost its data, too, is another store.
        client.delete(*(name for name in client.scan_iter() if name != b"fsm:node:copy"))
        async with aged(any_redis_server, 3) as store:
            assert await store.incarnation() != before["incarnation"]
            assert marker(client)["incarnation"] == await store.incarnation()


@pytest.mark.parametrize("ttl_hours", [1, 3])
async def test_something_else_at_the_place_of_the_copy_changes_nothing(
    redis_server: RedisServer, ttl_hours: int
) -> None:
    """If this fails what is somebody's is overwritten, or a marker is left half written."""
    with raw(redis_server) as client:
        async with aged(redis_server, 1) as store:
            await store.put("k", b"x")
        client.delete("fsm:node:copy")
        client.set("fsm:node:copy", "somebody's")
        before = everything(client)
        with pytest.raises(StoreError, match="WRONGTYPE"):
            async with aged(redis_server, ttl_hours):
                pass
        assert everything(client) == before


async def test_an_engine_refuses_the_store_of_another_node(redis_server: RedisServer) -> None:
    """If this fails a node's changes travel under the name of another."""
    store = RedisSyncEngine(redis_server.url, node_id="here")
    config = ReplicationConfig(local_node_id="there")
    with pytest.raises(ConfigError, match=r"local_node_id.*'here'.*'there'"):
        ReplicationEngine(config, store)
    engine = ReplicationEngine(ReplicationConfig(local_node_id="here"), store)
    with pytest.raises(ConfigError, match="local_node_id"):
        await engine.update_config(config)
    ReplicationEngine(config, MemorySyncEngine())
    await store.close()


async def test_a_process_cannot_change_what_others_run_with(any_redis_server: RedisServer) -> None:
    """If this fails a script with a default of its own makes every link of the node fail."""
    url = any_redis_server.url
    with raw(any_redis_server) as client:
        async with aged(any_redis_server, 1):
            before = marker(client)
            with pytest.raises(StoreError, match=r"another process.*tombstone_ttl_ms.*stop all"):
                await aged(any_redis_server, 2).__aenter__()
            with pytest.raises(StoreError, match=r"another process.*resolver"):
                await RedisSyncEngine(
                    url, node_id="here", tombstone_ttl_sec=HOUR_SEC, resolver=GrowOnlySet()
                ).__aenter__()
            assert marker(client) == before
            async with aged(any_redis_server, 1) as other:
                await other.put("k", b"x")
        # Each has told that it is gone.
        async with aged(any_redis_server, 2):
            await announced(client, 2)


async def test_a_killed_process_counts_for_a_while_only(redis_server: RedisServer) -> None:
    """If this fails a node whose process was killed can never be started with another ttl."""
    killed = aged(redis_server, 1)
    killed._token = "killed"
    with raw(redis_server) as client:
        async with aged(redis_server, 1):
            client.zadd("fsm:processes", {"killed": now_ms() + 20_000})
        with pytest.raises(StoreError, match="another process"):
            await aged(redis_server, 2).__aenter__()
        client.zadd("fsm:processes", {"killed": now_ms() - 1})
        async with aged(redis_server, 2):
            await announced(client, 2)
            assert client.zscore("fsm:processes", "killed") is None


@pytest.mark.parametrize("how", ["put", "delete", "apply", "root"])
async def test_a_process_that_comes_back_late_writes_nothing_by_old_rules(
    redis_server: RedisServer, how: str
) -> None:
    """If this fails a process that was suspended expires tombstones by a ttl that is no more."""
    late = aged(redis_server, 1)
    with raw(redis_server) as client:
        async with late:
            await late.put("k", b"x")
            # As when nothing was heard of it for longer than it counts.
            client.delete("fsm:processes")
            async with aged(redis_server, 2):
                await announced(client, 2)
                before = everything(client)

                async def write() -> None:
                    if how == "put":
                        await late.put("k", b"y")
                    elif how == "delete":
                        await late.delete("k")
                    elif how == "apply":
                        await late.apply_many([put_of("k", now_ms() + 1000)], Received("far", AT))
                    else:
                        assert late.tree is not None
                        await late.tree.root(OWN)

                with pytest.raises(StoreError, match="another process"):
                    await write()
                assert everything(client) == before
            # It is alone again, and what it was configured with holds.
            if how == "apply":
                with pytest.raises(StoreReopenedError):
                    await write()
            await write()
            await announced(client, 1)


# What its Redis is configured to do.


async def test_an_evicting_redis_is_refused_unless_that_is_allowed(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails tombstones are thrown away when Redis is full, and deletes are undone (G5)."""
    server = new_redis_server(config=[("maxmemory-policy", "volatile-lru")])
    why = r"maxmemory-policy is volatile-lru.*tombstones.*store\.allow_eviction"
    with raw(server) as client:
        with pytest.raises(StoreError, match=why):
            await RedisSyncEngine(server.url, node_id="here").__aenter__()
        assert client.dbsize() == 0
        async with RedisSyncEngine(server.url, node_id="here", allow_eviction=True) as store:
            assert "volatile-lru" in store.warnings[0]
        for forbidden in ("-config", "-info"):
            client.execute_command(
                "ACL", "SETUSER", "writer", "on", "nopass", "~*", "+@all", "-config", forbidden
            )
            url = f"redis://writer:none@127.0.0.1:{server.port}"
            if forbidden == "-config":
                with pytest.raises(StoreError, match=why):
                    await RedisSyncEngine(url, node_id="here").__aenter__()
                continue
            async with RedisSyncEngine(url, node_id="here") as store:
                assert "cannot be asked" in store.warnings[0]


async def test_a_redis_without_persistence_is_told_of(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails nobody knows that a restart of Redis loses what no peer had read."""
    for options, wanted in (({}, 1), ({"persist": "everysec"}, 0)):
        server = new_redis_server(**options)
        async with RedisSyncEngine(server.url, node_id="here") as store:
            told = [text for text in store.warnings if "nothing on disk" in text]
            assert len(told) == wanted


async def test_check_tells_what_the_store_may_lose(
    redis_server: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails an operator learns of eviction when deleted items are back."""
    with raw(redis_server) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            for allowed in (False, True):
                config = ReplicationConfig(
                    local_node_id="here",
                    cursor=CursorConfig(sqlite_path=str(tmp_path / "c.db")),
                    store=StoreConfig(
                        kind="redis", redis_url=redis_server.url, allow_eviction=allowed
                    ),
                )
                assert await check_node(config, Console(width=400)) is allowed
                told = capsys.readouterr().out
                assert "allkeys-lru" in told
                assert ("store.allow_eviction" in told) is not allowed
                assert ("nothing on disk" in told) is allowed
        finally:
            client.config_set("maxmemory-policy", "noeviction")
