"""What every store must do, asked of each that ships: in memory, and on each Redis at hand."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec
import pytest
import pytest_asyncio
import redis
from conftest import version_id
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.errors import InvalidKeyError
from fsm_replication.items import EMPTY_HASH, NUMBER_MAX, SyncItem, content_hash
from fsm_replication.ports import Position, StreamId
from fsm_replication.servers import RedisServer, find_all_redis_servers
from fsm_replication.stores import (
    MemorySyncEngine,
    NoOpSyncEngine,
    Outcome,
    Received,
    RedisSyncEngine,
)
from fsm_replication.stores import memory as memory_module
from fsm_replication.stream import MAGIC

pytestmark = pytest.mark.usefixtures("no_tasks_left")

TTL_SEC = 1000
GRACE_SEC = 500
APPLIED, SUPERSEDED = Outcome.APPLIED, Outcome.SUPERSEDED
Store: TypeAlias = MemorySyncEngine | RedisSyncEngine
# Examples of one test share a store; each takes keys of its own.
fresh = map("example{}.".format, itertools.count())


def now_ms() -> int:
    """Return the time of day, which is the stores' too."""
    return int(time.time() * 1000)


def put_of(
    key: str,
    at: int,
    content: bytes = b"content",
    *,
    version: int = 1,
    content_type: str = "binary",
) -> SyncItem:
    """Return a live item of another node."""
    return SyncItem(key, content, content_type, content_hash(content), version, at, False, "far")


def delete_of(key: str, at: int, *, version: int = 1) -> SyncItem:
    """Return a tombstone of another node."""
    return SyncItem(key, b"", "binary", EMPTY_HASH, version, at, True, "far")


def backend_id(param: str | Path) -> str:
    """Return the name of a kind of store in the ids of tests."""
    return param if isinstance(param, str) else version_id(param)


@pytest.fixture(scope="module", params=["memory", *find_all_redis_servers()], ids=backend_id)
def backend(request: pytest.FixtureRequest) -> Iterator[RedisServer | None]:
    """None for the store in memory, else a server of each version."""
    if request.param == "memory":
        yield None
        return
    with RedisServer(request.param) as server:
        yield server


@pytest_asyncio.fixture
async def store(backend: RedisServer | None) -> AsyncIterator[Store]:
    """An empty store."""
    if backend is None:
        yield MemorySyncEngine(
            node_id="here", tombstone_ttl_sec=TTL_SEC, tombstone_grace_sec=GRACE_SEC
        )
        return
    with redis.Redis(port=backend.port) as client:
        client.flushall()
    async with RedisSyncEngine(
        backend.url, node_id="here", tombstone_ttl_sec=TTL_SEC, tombstone_grace_sec=GRACE_SEC
    ) as engine:
        yield engine


async def everything(store: Store, prefix: str = "") -> dict[str, bytes]:
    """Return the live content of a store."""
    return {item.key: item.content async for item in store.scan(prefix)}


# Local writes.


async def test_what_is_put_is_held(store: Store) -> None:
    """If this fails an application does not get back what it wrote."""
    before = now_ms()
    item = await store.put("key", b"one", "json")
    assert (item.key, item.content, item.content_type) == ("key", b"one", "json")
    assert (item.version, item.deleted, item.origin) == (1, False, "here")
    assert item.content_hash == content_hash(b"one")
    assert before <= item.updated_at <= now_ms()
    assert await store.get("key") == item
    assert await store.get_many(["none", "key"]) == [None, item]
    assert await store.stamps(["key", "none"]) == [item.stamp, None]
    assert await store.get("none") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", MAGIC, MAGIC + b"not zstd at all" * 20, b"a" * 100_000, bytes(range(256)) * 3],
    ids=["empty", "zero", "magic", "long magic", "repeats", "all bytes"],
)
@pytest.mark.parametrize("key", ["k", "a:b", "é.日本", "x" * 1024, "{tag}\r\n\0"])
async def test_any_content_and_key_comes_back(store: Store, key: str, content: bytes) -> None:
    """If this fails some content or key is changed on its way through the store."""
    item = await store.put(key, content)
    assert await store.get(key) == item
    assert await everything(store) == {key: content}


@pytest.mark.parametrize("key", ["", "x" * 1025, "\ud800"])
async def test_a_key_that_is_none_is_refused(store: Store, key: str) -> None:
    """If this fails a key is stored that no peer would take."""
    with pytest.raises(InvalidKeyError):
        await store.put(key, b"x")
    with pytest.raises(InvalidKeyError):
        await store.delete(key)
    assert await everything(store) == {}


async def test_an_unknown_content_type_is_refused(store: Store) -> None:
    """If this fails an item is stored whose order tuple other nodes cannot spell."""
    with pytest.raises(ValueError, match="content_type"):
        await store.put("key", b"x", "text")
    assert await store.get("key") is None


async def test_a_delete_is_a_fact_that_is_kept(store: Store) -> None:
    """If this fails a deleted key comes back with the next old event."""
    item = await store.put("key", b"one")
    assert await store.delete("key")
    assert await store.get("key") is None
    (tombstone,) = await store.get_many(["key"])
    assert tombstone is not None
    assert (tombstone.deleted, tombstone.content, tombstone.version) == (True, b"", 2)
    assert tombstone.content_hash == EMPTY_HASH
    assert tombstone.updated_at > item.updated_at
    assert (await store.apply_many([item])).outcomes == [SUPERSEDED]
    assert await everything(store) == {}


async def test_deleting_nothing_is_no_change(store: Store) -> None:
    """If this fails deletes of absent keys travel through the mesh."""
    assert not await store.delete("key")
    assert await store.stamps(["key"]) == [None]
    await store.put("key", b"x")
    assert await store.delete("key")
    before = await store.stamps(["key"])
    assert not await store.delete("key")
    assert await store.stamps(["key"]) == before


async def test_a_write_counts_on_over_a_tombstone(store: Store) -> None:
    """If this fails a key written again after a delete loses against that delete."""
    await store.put("key", b"one")
    await store.delete("key")
    (dead,) = await store.stamps(["key"])
    item = await store.put("key", b"two")
    assert dead is not None
    assert item.stamp > dead
    assert item.version == 3


async def test_a_clock_that_went_back_does_not_lose_writes(store: Store) -> None:
    """If this fails a write that saw an item of the future is older than it."""
    future = now_ms() + 3_600_000
    await store.apply_many([put_of("key", future, version=7)])
    item = await store.put("key", b"mine")
    assert (item.updated_at, item.version) == (future + 1, 8)
    assert await store.delete("key")
    (dead,) = await store.stamps(["key"])
    assert dead is not None
    assert (dead.updated_at, dead.version) == (future + 2, 9)


@pytest.mark.parametrize("numbers", [(NUMBER_MAX, 5), (5, NUMBER_MAX)], ids=["time", "version"])
async def test_numbers_do_not_go_over_what_is_exact(store: Store, numbers: tuple[int, int]) -> None:
    """If this fails a stamp is written that readers take for another one."""
    at, version = numbers
    item = put_of("key", at, version=version)
    await store.apply_many([item])
    with pytest.raises(ValueError, match=r"2\*\*53-1"):
        await store.put("key", b"x")
    with pytest.raises(ValueError, match=r"2\*\*53-1"):
        await store.delete("key")
    assert await store.get_many(["key"]) == [item]


async def test_the_largest_numbers_are_exact(store: Store) -> None:
    """If this fails the last stamps below the limit are rounded."""
    await store.apply_many([put_of("key", NUMBER_MAX - 2, version=NUMBER_MAX - 2)])
    item = await store.put("key", b"x")
    assert (item.updated_at, item.version) == (NUMBER_MAX - 1, NUMBER_MAX - 1)
    assert await store.get("key") == item


async def test_many_writers_lose_no_version(store: Store) -> None:
    """If this fails two writes at once make one version, and one of them is lost."""
    items = await asyncio.gather(*(store.put("key", b"%d" % i) for i in range(100)))
    assert sorted(item.version for item in items) == list(range(1, 101))
    ordered = sorted(items, key=lambda item: item.version)
    assert all(a.updated_at < b.updated_at for a, b in itertools.pairwise(ordered))
    assert await store.get("key") == ordered[-1]


@pytest.mark.parametrize("prefix", ["", "a", "a*", "a[1]", "a?", "a\\", "a^-", "é"])
async def test_scan_takes_a_prefix_literally(store: Store, prefix: str) -> None:
    """If this fails a prefix with a sign that patterns know finds other keys."""
    keys = ["a", "a*b", "axb", "a[1]", "a1", "a?c", "a\\d", "a^-e", "é", "b"]
    for key in keys:
        await store.put(key, key.encode())
    await store.put("a*gone", b"")
    await store.delete("a*gone")
    wanted = {key: key.encode() for key in keys if key.startswith(prefix)}
    assert await everything(store, prefix) == wanted


# What other nodes wrote.


async def test_applying_twice_changes_nothing(store: Store) -> None:
    """If this fails events that are read again are published again, without end."""
    at = now_ms()
    changes = [put_of("a", at), delete_of("b", at), put_of("a", at)]
    assert (await store.apply_many(changes)).outcomes == [APPLIED, APPLIED, SUPERSEDED]
    assert (await store.apply_many(changes)).outcomes == [SUPERSEDED] * 3
    assert await store.get_many(["a", "b"]) == changes[:2]


async def test_applying_nothing_is_allowed(store: Store) -> None:
    """If this fails a batch of which everything was superseded cannot be settled."""
    result = await store.apply_many([], Received("peer", Position(StreamId(5, 0), 5)))
    assert list(result.outcomes) == []


async def test_outcomes_stand_in_the_order_of_the_changes(store: Store) -> None:
    """If this fails a long batch is told the outcomes of other changes."""
    at = now_ms()
    newer = {f"k{i}" for i in range(0, 1000, 3)}
    await store.apply_many([put_of(key, at + 1) for key in sorted(newer)])
    changes = [put_of(f"k{i}", at) for i in range(1000)]
    result = await store.apply_many(changes)
    assert result.outcomes == [SUPERSEDED if c.key in newer else APPLIED for c in changes]
    assert (result.applied, result.superseded) == (666, 334)
    assert await store.stamps([c.key for c in changes[:3]]) == [
        put_of("k0", at + 1).stamp, changes[1].stamp, changes[2].stamp,
    ]  # fmt: skip


async def test_equal_content_with_a_later_stamp_is_taken(store: Store) -> None:
    """If this fails nodes that hold the same bytes never agree on their stamp."""
    at = now_ms()
    assert await store.submit(put_of("key", at))
    later = put_of("key", at + 1)
    assert await store.submit(later)
    assert await store.get("key") == later


PAIRS = {
    "time": (put_of("k", 1, version=9), put_of("k", 2)),
    "version": (put_of("k", 1, b"zz"), put_of("k", 1, b"a", version=2)),
    "tombstone over empty": (put_of("k", 1, b""), delete_of("k", 1)),
    "hash": tuple(sorted((put_of("k", 1, b"a"), put_of("k", 1, b"b")), key=lambda i: i.stamp)),
    "type": (put_of("k", 1), put_of("k", 1, content_type="json")),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("together", [False, True])
async def test_the_larger_order_tuple_wins(
    store: Store, name: str, turned: bool, together: bool
) -> None:
    """If this fails two nodes pick different winners of the same two items."""
    # Tombstones near the epoch have expired, so everything is moved to now.
    at = now_ms()
    older, newer = (
        msgspec.structs.replace(item, updated_at=at + item.updated_at) for item in PAIRS[name]
    )
    changes = [newer, older] if turned else [older, newer]
    for part in [changes] if together else [[change] for change in changes]:
        await store.apply_many(part)
    assert await store.get_many(["k"]) == [newer]


def stamped() -> st.SearchStrategy[SyncItem]:
    """Return items that often have the same key, time and version."""
    # Hypothesis must find the same choices each time, so the day is added later.
    numbers = st.tuples(st.integers(0, 2), st.integers(0, 2))
    key = st.sampled_from("xyz")
    content = st.sampled_from([b"", b"one", b"two" * 40, MAGIC])
    live = st.builds(
        lambda key, n, content, kind: put_of(
            key, n[0], content, version=n[1], content_type=kind
        ),
        key, numbers, content, st.sampled_from(["binary", "json"]),
    )  # fmt: skip
    dead = st.builds(lambda key, n: delete_of(key, n[0], version=n[1]), key, numbers)
    return live | dead


@given(data=st.data())
async def test_any_order_gives_the_same_store(store: Store, data: st.DataObject) -> None:
    """If this fails nodes that have seen the same changes hold different data (G3, G4)."""
    drawn = data.draw(st.lists(stamped(), min_size=1, max_size=12))
    order = data.draw(st.permutations([*range(len(drawn)), *range(len(drawn) // 2)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    prefix, at = next(fresh), now_ms()
    changes = [
        msgspec.structs.replace(c, key=prefix + c.key, updated_at=at + c.updated_at) for c in drawn
    ]
    wanted: dict[str, SyncItem] = {}
    for change in changes:
        held = wanted.get(change.key)
        if held is None or change.stamp > held.stamp:
            wanted[change.key] = change
    for begin, end in itertools.pairwise([0, *cuts, len(order)]):
        await store.apply_many([changes[i] for i in order[begin:end]])
    assert await store.get_many(list(wanted)) == list(wanted.values())
    live = {item.key: item.content for item in wanted.values() if not item.deleted}
    assert await everything(store, prefix) == live
    assert (await store.apply_many(changes)).applied == 0


async def test_live_items_that_deletes_replace_are_counted(store: Store) -> None:
    """If this fails the interlock does not see that a peer deletes everything."""
    at = now_ms()
    await store.apply_many([put_of("a", at), put_of("b", at), put_of("c", at + 9)])
    result = await store.apply_many(
        [delete_of("a", at + 1), delete_of("a", at + 2), delete_of("c", at), delete_of("d", at)]
    )
    assert result.outcomes == [APPLIED, APPLIED, SUPERSEDED, APPLIED]
    assert result.live_deleted == 1


async def test_the_single_forms(store: Store) -> None:
    """If this fails the conveniences say something else than the bulk calls."""
    at = now_ms()
    item, dead = put_of("key", at), delete_of("key", at + 1)
    assert not await store.is_current("key", item.stamp)
    assert await store.submit(item)
    assert not await store.submit(item)
    assert await store.is_current("key", item.stamp)
    assert not await store.is_current("key", dead.stamp)
    assert await store.delete_replicated(dead)
    assert not await store.delete_replicated(dead)
    with pytest.raises(ValueError, match="tombstone"):
        await store.delete_replicated(item)


# Tombstones.


async def test_a_tombstone_in_time_is_kept_also_where_nothing_is(store: Store) -> None:
    """If this fails a put that comes after its delete brings the key back."""
    at = now_ms() - TTL_SEC * 500
    assert await store.submit(delete_of("key", at))
    assert not await store.submit(put_of("key", at - 1))
    assert await store.get("key") is None


async def test_an_expired_tombstone_is_superseded_where_nothing_is(store: Store) -> None:
    """If this fails deletes that all nodes have forgotten go round for ever."""
    assert not await store.submit(delete_of("key", now_ms() - TTL_SEC * 1000 - 1))
    assert await store.stamps(["key"]) == [None]


async def test_an_expired_tombstone_deletes_an_older_item_and_is_kept(store: Store) -> None:
    """If this fails a node that was away keeps, or gets back, what was deleted meanwhile."""
    at = now_ms() - TTL_SEC * 1000 - 5000
    old = put_of("key", at - 1)
    await store.apply_many([old])
    result = await store.apply_many([delete_of("key", at)])
    assert (result.outcomes, result.live_deleted) == ([APPLIED], 1)
    assert not await store.submit(old)
    assert await store.get_many(["key"]) == [delete_of("key", at)]


async def test_an_expired_tombstone_loses_against_what_is_newer(store: Store) -> None:
    """If this fails an old delete removes what was written after it."""
    at = now_ms() - TTL_SEC * 1000 - 5000
    item = put_of("key", at + 1)
    await store.apply_many([item])
    assert not await store.submit(delete_of("key", at))
    assert await store.get("key") == item


# What only one of them does.


class SetClock:
    """A wall clock that stands where it is set."""

    def __init__(self, now: int) -> None:
        self.now = now

    def now_ms(self) -> int:
        """Return the time it was set to."""
        return self.now


def memory_at(clock: SetClock) -> MemorySyncEngine:
    """Return a store in memory on a clock of its own."""
    return MemorySyncEngine(
        tombstone_ttl_sec=TTL_SEC, tombstone_grace_sec=GRACE_SEC, wall_clock=clock
    )


@pytest.mark.parametrize("age_sec", [0, TTL_SEC + 100], ids=["in time", "expired"])
async def test_memory_forgets_a_tombstone_after_its_grace(age_sec: int) -> None:
    """If this fails memory fills with deletes, or a delete is forgotten too early."""
    clock = SetClock(10**12)
    store = memory_at(clock)
    at = clock.now - age_sec * 1000
    await store.apply_many([put_of("key", at - 1), delete_of("key", at)])
    until = max(at + TTL_SEC * 1000, clock.now) + GRACE_SEC * 1000
    for clock.now, kept in ((until - 1, True), (until, False)):
        await store.apply_many([])
        assert (await store.stamps(["key"]) != [None]) is kept


async def test_memory_does_not_forget_what_replaced_a_tombstone() -> None:
    """If this fails a written item vanishes when the delete before it is forgotten."""
    clock = SetClock(10**12)
    store = memory_at(clock)
    await store.put("key", b"one")
    await store.delete("key")
    item = await store.put("key", b"two")
    clock.now += (TTL_SEC + GRACE_SEC) * 1000 + 1
    await store.apply_many([])
    assert await store.get("key") == item


async def test_memory_keeps_the_later_of_two_tombstones_of_one_time() -> None:
    """If this fails the end of the first one's grace ends that of the second."""
    clock = SetClock(10**12)
    store = memory_at(clock)
    at = clock.now - TTL_SEC * 1000 - 1
    await store.apply_many([put_of("key", at - 1), delete_of("key", at)])
    clock.now += GRACE_SEC * 1000 - 1
    await store.apply_many([delete_of("key", at, version=2)])
    clock.now += 1
    await store.apply_many([])
    assert await store.stamps(["key"]) == [delete_of("key", at, version=2).stamp]


async def test_memory_forgets_a_bounded_number_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails one call after a quiet week stops the event loop for long."""
    monkeypatch.setattr(memory_module, "FORGET_MAX", 10)
    clock = SetClock(10**12)
    store = memory_at(clock)
    keys = [f"k{i}" for i in range(25)]
    await store.apply_many([delete_of(key, clock.now) for key in keys])
    clock.now += (TTL_SEC + GRACE_SEC) * 1000
    left = []
    for _ in range(3):
        await store.apply_many([])
        left.append(len(keys) - (await store.stamps(keys)).count(None))
    assert left == [15, 5, 0]


async def test_memory_counts_live_items_and_sorts_them() -> None:
    """If this fails len() or the promised order of scan is wrong."""
    store = MemorySyncEngine()
    for key in ("b", "c", "a", "b"):
        await store.put(key, b"")
    await store.delete("c")
    assert len(store) == 2
    assert [item.key async for item in store.scan()] == ["a", "b"]


async def test_memory_keeps_no_positions_and_is_new_each_time() -> None:
    """If this fails a follower that was restarted empty goes on where it was."""
    store = MemorySyncEngine()
    await store.apply_many([], Received("peer", Position(StreamId(5, 0), 5)))
    assert await store.applied_position("peer") is None
    assert await store.incarnation() == await store.incarnation()
    assert await store.incarnation() != await MemorySyncEngine().incarnation()


async def test_memory_says_whether_it_takes_writes() -> None:
    """If this fails an application cannot make replication wait."""
    store = MemorySyncEngine()
    assert store.should_accept_writes()
    store.accepting_writes = False
    assert not store.should_accept_writes()


async def test_noop_takes_everything_and_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """If this fails a configuration cannot be tried out, or nobody is told that nothing is kept."""
    caplog.set_level(logging.DEBUG, "fsm_replication")
    store = NoOpSyncEngine()
    item = put_of("key", now_ms())
    assert (await store.apply_many([item, item])).outcomes == [APPLIED, APPLIED]
    assert await store.get_many(["key"]) == [None]
    assert await store.stamps(["key"]) == [None]
    assert await store.applied_position("peer") is None
    assert await store.incarnation() == await store.incarnation()
    assert await store.incarnation() != await NoOpSyncEngine().incarnation()
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "DEBUG", "WARNING"]
