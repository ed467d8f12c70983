"""The dotted layout that a node of ours publishes for foreign readers."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, peer_config, until, until_async
from foreign_node import ForeignNode, sha
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_replication import (
    ConfigError,
    InvalidKeyError,
    MemorySyncEngine,
    PeerConfig,
    PeerState,
    RedisSyncEngine,
)
from fsm_replication.config import HotPathConfig, Settings
from fsm_replication.foreign import DOTTED, RESERVED, DottedTree
from fsm_replication.merkle import OWN
from fsm_replication.servers import RedisServer
from fsm_replication.stores import dotted
from fsm_replication.stores.dotted import DottedPublisher

BOTH = (OWN, DOTTED)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dotted, "IDLE_SEC", 0.01)


async def published(store: RedisSyncEngine) -> None:
    """Wait until everything is."""

    async def clean() -> bool:
        assert store.tree is not None
        return await store.tree.is_branch_clean(DOTTED, "")

    await until_async(clean, "the dotted layout up to date")


def tree_of(node: ForeignNode) -> dict[bytes, Any]:
    """Return every key of the dotted tree with what it holds."""
    found: dict[bytes, Any] = {}
    for name in node.client.scan_iter(f"{node.prefix}merkle:*", count=1000):
        is_node = name.startswith(f"{node.prefix}merkle:children:".encode())
        found[name] = (
            sorted(node.client.zrange(name, 0, -1, withscores=True))
            if is_node
            else node.client.get(name)
        )
    return found


def written_by_hand(node: ForeignNode, items: dict[str, tuple[int, bytes]]) -> dict[bytes, Any]:
    """Return what the tree of some items must be, by writing it as a foreign node would."""
    node.leaves.clear()
    for key, (version, content) in items.items():
        node.plant(key, version, content)
    node.write_tree()
    return tree_of(node)


async def test_tree_and_items_are_what_foreign_nodes_read(redis_server: RedisServer) -> None:
    """If this fails no foreign node finds anything in ours, or finds something else."""
    node = ForeignNode(redis_server, "n:")
    async with RedisSyncEngine(
        redis_server.url, node_id="n", redis_prefix="n:", layouts=BOTH
    ) as store:
        await store.put("uk.nhs.patient.1", b"one")
        await store.put("uk.nhs.patient.1", b"\x00\xff")
        await store.put_json("uk.nhs.patient.2", {"a": [1]})
        await store.put("a:b.c::d", b"")
        await store.put("flat", b"x" * 300_000)
        await store.put("gone.for.ever", b"x")
        await store.delete("gone.for.ever")
        await published(store)
        ours = tree_of(node)
        assert node.client.exists("n:gone.for.ever") == 0
        for key, content, kind in (
            ("uk.nhs.patient.1", b"\x00\xff", "binary"),
            ("uk.nhs.patient.2", b'{"a":[1]}', "json"),
            ("flat", b"x" * 300_000, "binary"),
        ):
            raw: Any = node.client.get(f"n:{key}")
            whole = json.loads(raw)
            held = await store.get(key)
            assert held is not None
            assert bytes(whole["content"]) == content
            assert (whole["content_type"], whole["object_id"]) == (kind, key)
            assert (whole["version"], whole["updated_at"]) == (held.version, held.updated_at)
            assert whole["content_hash"] == sha(content).hex()
    assert node.client.hget("n:fsm:node", "layouts") == b"own,dotted"
    assert ours == written_by_hand(
        node,
        {
            "uk.nhs.patient.1": (2, b"\x00\xff"),
            "uk.nhs.patient.2": (1, b'{"a":[1]}'),
            "a:b.c::d": (1, b""),
            "flat": (1, b"x" * 300_000),
        },
    )
    node.client.close()


_KEYS = st.sampled_from(["a", "a.b", "a.b.c", "a.c", "b", "b.x", "b..x", "c!", "c", "c.d"])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(st.tuples(_KEYS, st.sampled_from(["put", "delete", "wait"])), max_size=25))
def test_whatever_is_written_the_tree_is_that_of_what_is_held(
    redis_server: RedisServer, steps: list[tuple[str, str]]
) -> None:
    """If this fails the tree keeps what is gone, or loses what is there: prefixes most of all."""
    node = ForeignNode(redis_server)
    node.client.flushall()

    async def run() -> tuple[bytes, int]:
        async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
            for key, step in steps:
                if step == "put":
                    await store.put(key, key.encode())
                elif step == "delete":
                    await store.delete(key)
                else:
                    await published(store)
            await published(store)
            model = DottedTree()
            async for item in store.scan():
                model.set(item.key, item.version, item.content_hash)
                assert node.client.exists(item.key)
            assert store.tree is not None
            assert await store.kept_out() == model.kept_out
            for path in ("a", "a.b", "b", "c"):
                assert await store.tree.children(DOTTED, [path]) == [model.children(path)]
            return model.root, model.kept_out

    root, _ = asyncio.run(run())
    held: Any = node.client.get("merkle:hash:")
    assert held is None or bytes.fromhex(held.decode()) == root
    empty_root = sha(b"")
    assert held is not None or root == empty_root
    node.client.close()


async def test_what_was_kept_out_comes_in_once_there_is_room(redis_server: RedisServer) -> None:
    """If this fails a key stays unknown to foreign nodes because of one that is long gone."""
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        await store.put("user", b"short")
        await published(store)
        await store.put("user.1", b"long")
        await published(store)
        tree = store.tree
        assert tree is not None
        assert await store.kept_out() == 1
        assert await tree.children(DOTTED, ["", "user"]) != [{}, {}]
        await store.delete("user.1")
        await published(store)
        assert await store.kept_out() == 0
        alone = DottedTree()
        alone.set("user", 1, sha(b"short"))
        assert await tree.root(DOTTED) == alone.root


async def test_another_process_takes_over_where_one_was_killed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a crash between two steps leaves the tree wrong for ever."""
    monkeypatch.setattr(dotted, "KEYS_PER_STEP", 3)
    monkeypatch.setattr(dotted, "LEASE_SEC", 0.2)
    rng = random.Random(4)
    node = ForeignNode(redis_server)
    step = DottedPublisher._step

    async def killed_now_and_then(self: DottedPublisher, text: str, args: Any) -> None:
        if rng.random() < 0.3:
            # As kill -9 would: nothing of this publisher runs any more, and its lease stays.
            await asyncio.Event().wait()
        await step(self, text, args)

    monkeypatch.setattr(DottedPublisher, "_step", killed_now_and_then)
    monkeypatch.setattr(DottedPublisher, "stop", _just_die)
    versions: dict[str, int] = {}
    for life in range(12):
        async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
            for _ in range(10):
                key = f"t{rng.randrange(3)}.k{rng.randrange(6)}"
                versions[key] = (await store.put(key, b"%d" % life)).version
            await asyncio.sleep(0.02)
    monkeypatch.setattr(DottedPublisher, "_step", step)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        await published(store)
        items = {item.key: (item.version, item.content) async for item in store.scan()}
    ours = tree_of(node)
    assert ours == written_by_hand(node, items)
    node.client.close()


async def _just_die(self: DottedPublisher) -> None:
    task, self._task = self._task, None
    assert task is not None
    self._asked_to_stop.set()
    await asyncio.wait((task,), timeout=0.2)
    task.cancel()
    await asyncio.wait((task,))


async def test_several_processes_write_and_one_publishes(redis_server: RedisServer) -> None:
    """If this fails two publishers overwrite each other's nodes."""
    node = ForeignNode(redis_server)
    async with (
        RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as one,
        RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as two,
    ):

        async def write(store: RedisSyncEngine, mark: bytes) -> None:
            for number in range(150):
                await store.put(f"t{number % 7}.k{number % 50}", mark + b"%d" % number)

        await asyncio.gather(write(one, b"1"), write(two, b"2"))
        await published(one)
        items = {item.key: (item.version, item.content) async for item in one.scan()}
    ours = tree_of(node)
    assert ours == written_by_hand(node, items)
    node.client.close()


async def test_unclean_branches_are_known(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a branch that lags is compared as if it did not."""
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        tree = store.tree
        assert tree is not None
        await store.put("a.b.c", b"x")
        await store.put("other.x", b"x")
        await published(store)
        assert await tree.clean_branches(DOTTED) == ("",)
        assert store._publisher is not None
        await store._publisher.stop()
        await store.put("a.b.c", b"y")
        assert await tree.clean_branches(DOTTED) == ["other"]
        assert not await tree.is_branch_clean(DOTTED, "a")
        assert not await tree.is_branch_clean(DOTTED, "a.b.c")
        assert await tree.is_branch_clean(DOTTED, "a.b.cc")
        assert await tree.clean_branches(OWN) == ("",)
        store._publisher.start()
        await published(store)


async def test_the_layout_is_switched_on_and_off(redis_server: RedisServer) -> None:
    """If this fails old items are never published, or published ones never go."""
    node = ForeignNode(redis_server)
    node.client.set("somebody", "else's")
    async with RedisSyncEngine(redis_server.url, node_id="n") as store:
        await store.put_many({f"k.{n}": b"%d" % n for n in range(700)})
        await store.put("cdc.written.before", b"x")
        await store.delete("k.3")
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        await published(store)
        assert await store.kept_out() == 1
        items = {item.key: (item.version, item.content) async for item in store.scan()}
        assert len(items) == 700
        assert node.client.exists("k.5", "k.3") == 1
        assert node.client.type("cdc") == b"stream"
    ours = tree_of(node)
    del items["cdc.written.before"]
    assert ours == written_by_hand(node, items)
    async with RedisSyncEngine(redis_server.url, node_id="n") as store:
        assert (await store.get("k.5")) is not None
    left = {name.decode() for name in node.client.scan_iter(count=1000)}
    assert {name for name in left if not name.startswith(("item:", "fsm:"))} == {"cdc", "somebody"}
    assert not any(name.startswith("fsm:dotted") for name in left)
    node.client.close()


@pytest.mark.parametrize("name", RESERVED)
async def test_reserved_names_are_refused(
    nodes: Nodes, redis_server: RedisServer, redis_servers: Any, name: str
) -> None:
    """If this fails an item overwrites the stream, a tree or another item."""
    target = redis_servers()
    key = f"{name}x"
    async with (
        RedisSyncEngine(redis_server.url, node_id="a") as peer_store,
        RedisSyncEngine(target.url, node_id="b", layouts=BOTH) as store,
    ):
        with pytest.raises(InvalidKeyError, match="dotted"):
            await store.put(key, b"x")
        with pytest.raises(InvalidKeyError, match="dotted"):
            await store.delete(key)
        async with nodes.engine(peer_config(redis_server), store=store) as engine:
            await engine.wait_synced(DEADLINE_SEC)
            await peer_store.put(key, b"x")
            await peer_store.put("good", b"x")
            await until(lambda: engine.health_check().peers[0].dead_letters == 1)
            (letter,) = await engine.dead_letters.list()
            assert (letter.reason, letter.key) == ("refused", key)
            assert "dotted" in letter.detail
            await until_async(lambda: store.get("good"))
            assert await store.get(key) is None


async def test_a_foreign_node_is_read_only_one_way_unless_echoes_are_allowed(
    nodes: Nodes, redis_server: RedisServer, redis_servers: Any
) -> None:
    """If this fails a foreign node's echoes come back under new times, and nobody was asked."""
    foreign = ForeignNode(redis_server)
    foreign.put("f.1", b"1")
    foreign.write_tree()
    foreign.publish("f.1", b"1")
    async with RedisSyncEngine(redis_servers().url, node_id="b", layouts=BOTH) as store:
        waiting = Settings(hot_path=HotPathConfig(enabled=True))
        engine = nodes.engine(
            peer_config(redis_server),
            store=store,
            settings=waiting.model_copy(
                update={"startup": waiting.startup.model_copy(update={"when_no_peer": "run"})}
            ),
        )
        async with engine:
            await engine.wait_for_state(PeerState.FAILED, peer_id="a", timeout=DEADLINE_SEC)
            assert "allow_echo" in engine.health_check().peers[0].last_error
        allowed = PeerConfig(node_id="a", redis_url=redis_server.url, allow_echo=True)
        async with nodes.engine(allowed, store=store) as engine:
            await engine.wait_synced(DEADLINE_SEC)
            assert await store.get("f.1") is not None
            await published(store)
            # Both publish the same now, so the roots are the same, and one round trip tells.
            stats = await engine.repair()
            assert (stats.peers_in_sync, stats.items_fetched) == (1, 0)
            assert store.tree is not None
            root = foreign.client.get("merkle:hash:")
            assert (await store.tree.root(DOTTED)).hex().encode() == root
    foreign.client.close()


async def test_what_we_publish_can_be_read_as_foreign(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails the two halves of the foreign layout do not fit each other."""
    node = ForeignNode(redis_server)
    async with RedisSyncEngine(redis_server.url, node_id="a", layouts=BOTH) as store:
        await store.put_many({f"t{n % 9}.k{n}": b"%d" % n * 40 for n in range(500)})
        await store.put_json("doc.1", {"ä": 1.5})
        await published(store)
    # A foreign node has none of our own keys.
    node.client.delete(*node.client.keys("fsm:*"))
    node.client.xtrim("cdc", maxlen=0, approximate=False)
    reader = MemorySyncEngine(node_id="b")
    async with nodes.engine(peer_config(redis_server), store=reader) as engine:
        await engine.wait_synced(DEADLINE_SEC)
        assert len(reader) == 501
        doc = await reader.get("doc.1")
        assert doc is not None
        assert (doc.content, doc.content_type) == ('{"ä":1.5}'.encode(), "json")
    node.client.close()


async def test_an_item_that_cannot_be_read_holds_nothing_up(redis_server: RedisServer) -> None:
    """If this fails the publisher comes back to one bad item for ever."""
    node = ForeignNode(redis_server)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        assert store._publisher is not None
        await store._publisher.stop()
        await store.put_many({"bad.1": b"x", "bad.2": b"x", "good.1": b"x"})
        node.client.set("item:bad.1", b"z" * 70)
        node.client.delete("item:bad.2")
        node.client.hset("item:bad.2", "a", "b")
        store._publisher.start()
        await published(store)
        assert store.tree is not None
        assert list((await store.tree.children(DOTTED, ["good"]))[0] or {}) == ["1"]
    node.client.close()


async def test_a_wide_node_is_hashed_in_pages(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a flat key space has another root once it is large, or stops the loop."""
    monkeypatch.setattr(dotted, "CHILDREN_PER_PAGE", 50)
    node = ForeignNode(redis_server)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        # A colon sorts after "!" and before letters, so Redis has another order than segments.
        await store.put_many({f"u{n}{'!' * (n % 3)}": b"x" for n in range(700)})
        await published(store)
        items = {item.key: (item.version, item.content) async for item in store.scan()}
    ours = tree_of(node)
    assert ours == written_by_hand(node, items)
    node.client.close()


def test_unknown_layouts_are_refused() -> None:
    """If this fails a misspelled layout is silently left out."""
    with pytest.raises(ConfigError, match="there is no layout doted"):
        RedisSyncEngine("redis://h", node_id="n", layouts=(OWN, "doted"))
