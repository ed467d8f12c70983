"""Resolvers that look at contents: nodes merge in any order and come to the same end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import DEADLINE_SEC, Nodes, peer_config, until_async
from hypothesis import given
from hypothesis import strategies as st
from sqlite_store import SqliteStore
from test_repair import same

from fsm_replication import PeerConfig, PeerState
from fsm_replication.config import ColdPathConfig, Settings
from fsm_replication.items import EMPTY_HASH, SyncItem, content_hash, resolve
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine, SyncEngine
from fsm_replication.testing import strategies

NOW = 1_700_000_000_000
elements = st.lists(
    st.one_of(st.integers(-3, 3), st.sampled_from(["a", "\ud800", 1.0, None, {"x": [1]}])),
    max_size=3,
)
contents = st.one_of(
    elements.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"", b"x", b"{}", b"[1", b'["\xff"]', b"[" * 100_000, b"[ 1,2 ]", b"[2,1]"]),
)


def item_of(content: bytes, at: int = NOW, version: int = 1, kind: str = "json") -> SyncItem:
    """Return a live item of the one key there is."""
    return SyncItem("k", content, kind, content_hash(content), version, at, False, "o")


items = strategies.items(
    keys=st.just("k"),
    bodies=contents,
    times=st.integers(NOW, NOW + 2),
    versions=st.integers(1, 2),
)


@given(items, items, items)
def test_the_set_is_a_semilattice(a: SyncItem, b: SyncItem, c: SyncItem) -> None:
    """If this fails nodes that saw the same in another order do not agree."""
    merge = GrowOnlySet().merge

    def what(item: SyncItem) -> tuple[bytes, str]:
        return item.content, item.content_type

    assert what(merge(a, a)) == what(a)
    assert what(merge(a, b)) == what(merge(b, a))
    ab_c, a_bc = merge(merge(a, b), c), merge(a, merge(b, c))
    # An array that was never merged may be spelled otherwise; one more merge settles that.
    assert what(merge(ab_c, a_bc)) == what(merge(a_bc, ab_c))
    assert set(map(str, load(ab_c))) == set(map(str, load(a_bc)))


def load(item: SyncItem) -> list[object]:
    """Return the elements of a content."""
    try:
        parsed = json.loads(item.content)
    except (ValueError, RecursionError):
        return [item.content]
    return parsed if isinstance(parsed, list) else [item.content]


def test_the_merged_stamp_is_the_larger() -> None:
    """If this fails a merge looks like a new write, and nodes never come to rest."""
    old, new = item_of(b"[1]"), item_of(b"[2]", NOW + 5, 3)
    made = resolve(GrowOnlySet(), new, old)
    assert made is not None
    assert (made.updated_at, made.version, made.content) == (NOW + 5, 3, b"[1,2]")
    assert resolve(GrowOnlySet(), made, old) is None
    assert resolve(GrowOnlySet(), made, new) is None
    tombstone = SyncItem("k", b"", "binary", EMPTY_HASH, 1, NOW + 1, True, "o")
    assert resolve(GrowOnlySet(), old, tombstone) == tombstone
    assert resolve(GrowOnlySet(), tombstone, old) is None


@pytest_asyncio.fixture(params=["memory", "redis"])
async def store(
    request: pytest.FixtureRequest, redis_servers: Callable[[], RedisServer]
) -> AsyncIterator[MemorySyncEngine | RedisSyncEngine]:
    """A store that merges."""
    if request.param == "memory":
        yield MemorySyncEngine(node_id="n", resolver=GrowOnlySet())
        return
    async with RedisSyncEngine(redis_servers().url, node_id="n", resolver=GrowOnlySet()) as made:
        yield made


class Picky(GrowOnlySet):
    """A set that fails on one content, which no resolver should."""

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Merge unless one of them is a poison."""
        if b'"poison"' in a.content + b.content:
            raise ValueError("poison")
        return super().merge(a, b)


@pytest_asyncio.fixture(params=["memory", "redis", "sqlite"])
async def picky(
    request: pytest.FixtureRequest, redis_servers: Callable[[], RedisServer], tmp_path: Path
) -> AsyncIterator[SyncEngine]:
    """A store whose resolver fails on one content."""
    if request.param == "memory":
        yield MemorySyncEngine(node_id="n", resolver=Picky())
        return
    store: RedisSyncEngine | SqliteStore = (
        RedisSyncEngine(redis_servers().url, node_id="n", resolver=Picky())
        if request.param == "redis"
        else SqliteStore(tmp_path / "n.db", node_id="n", resolver=Picky())
    )
    async with store:
        yield store


async def test_what_a_resolver_cannot_merge_is_refused(picky: SyncEngine) -> None:
    """If this fails one item holds its link for ever, for it is tried again and again."""
    other = SyncItem("l", b"[7]", "json", content_hash(b"[7]"), 1, NOW, False, "o")
    result = await picky.apply_many(
        [item_of(b"[1]"), item_of(b'["poison"]', NOW + 1), item_of(b"[2]", NOW + 2), other]
    )
    assert [int(outcome) for outcome in result.outcomes] == [0, 2, 0, 0]
    assert result.reasons[1].endswith("cannot merge 'k': ValueError: poison")
    held, aside = await picky.get_many(["k", "l"])
    assert held is not None
    assert held.content == b"[1,2]"
    assert aside is not None
    assert aside.content == b"[7]"
    assert await picky.submit(item_of(b"[3]", NOW + 3)), "an item that is fine is taken again"


async def test_what_cannot_be_merged_becomes_a_dead_letter(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails all that comes after it in the stream waits for ever."""
    store = MemorySyncEngine(node_id="b", resolver=Picky())
    await store.put("k", b"[1]", "json")
    async with (
        RedisSyncEngine(redis_server.url, node_id="a", resolver=GrowOnlySet()) as source,
        nodes.engine(peer_config(redis_server), store=store) as engine,
    ):
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        await source.put("k", b'["poison"]', "json")
        await source.put("after", b"[3]", "json")
        await until_async(partial(has, store, "after"), "what came after it")
        (letter,) = await engine.dead_letters.list()
        assert (letter.reason, letter.key) == ("refused", "k")
        assert "poison" in letter.detail
    held = await store.get("k")
    assert held is not None
    assert held.content == b"[1]"


async def has(store: SyncEngine, key: str) -> bool:
    """Say whether a store has a live item."""
    held = await store.get(key)
    return held is not None and not held.deleted


async def test_a_store_merges_what_arrives(store: MemorySyncEngine | RedisSyncEngine) -> None:
    """If this fails concurrent additions are lost."""
    result = await store.apply_many(
        [item_of(b"[1]", NOW + 2), item_of(b"[2]", NOW), item_of(b"[1]", NOW + 2)]
    )
    assert [int(outcome) for outcome in result.outcomes] == [0, 0, 1]
    held = await store.get("k")
    assert held is not None
    assert (held.content, held.updated_at) == (b"[1,2]", NOW + 2)
    written = await store.put("k", b"[3]", "json")
    assert written.content == b"[1,2,3]"
    assert await store.delete("k")
    assert not await store.submit(item_of(b"[9]", NOW + 3))
    assert (await store.put("k", b"[4]", "json")).content == b"[4]"


async def test_many_writers_lose_no_element(redis_server: RedisServer) -> None:
    """If this fails two workers of one node that add at the same time lose an element."""
    async with AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(
                RedisSyncEngine(redis_server.url, node_id="n", resolver=GrowOnlySet())
            )
            for _ in range(3)
        ]

        async def add(number: int) -> None:
            await stores[number % 3].put("k", b"[%d]" % number, "json")

        async with asyncio.TaskGroup() as adding:
            for number in range(30):
                adding.create_task(add(number))
        held = await stores[0].get("k")
        assert held is not None
        assert sorted(json.loads(held.content)) == list(range(30))


async def test_nodes_merge_to_the_same_set(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails a mesh with a merging resolver does not converge."""
    names = ("a", "b", "c")
    servers = {name: redis_servers() for name in names}
    settings = Settings(cold_path=ColdPathConfig(interval_sec=0.2))
    async with AsyncExitStack() as stack:
        stores: dict[str, RedisSyncEngine] = {}
        for name in names:
            made = RedisSyncEngine(servers[name].url, node_id=name, resolver=GrowOnlySet())
            stores[name] = await stack.enter_async_context(made)
            await made.put("k", json.dumps([name]).encode(), "json")
            await made.put(f"only.{name}", b"[]", "json")
        engines = []
        for name in names:
            peers = [
                PeerConfig(node_id=other, redis_url=servers[other].url)
                for other in names
                if other != name
            ]
            engine = nodes.engine(*peers, store=stores[name], node_id=name, settings=settings)
            engines.append(await stack.enter_async_context(engine))
        for name, other in permutations(names, 2):
            engine = engines[names.index(name)]
            await engine.wait_for_state(PeerState.TAILING, peer_id=other, timeout=DEADLINE_SEC)
        await stores["a"].put("k", b'["more"]', "json")
        await until_async(lambda: agreed(list(stores.values())), "equal roots")
        held = await stores["b"].get("k")
        assert held is not None
        assert json.loads(held.content) == ["a", "b", "c", "more"]
        # And it is quiet then.
        lengths = [await made._call("XLEN", made.keys.stream) for made in stores.values()]
        for engine in engines:
            assert (await engine.repair()).peers_in_sync == 2
        assert lengths == [await made._call("XLEN", made.keys.stream) for made in stores.values()]


async def agreed(stores: list[SyncEngine]) -> bool:
    """Say whether all roots are equal, and each holds the elements of all."""
    return all([await same(stores[0], other) for other in stores[1:]])
