"""What went wrong with the dotted layout between two steps of its publisher, or where it is garbage."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import Nodes, peer_config, until, until_async
from foreign_node import ForeignNode
from test_dotted import BOTH, published, tree_of, written_by_hand

from fsm_replication import ConfigError, MemorySyncEngine, RedisSyncEngine
from fsm_replication.foreign import DOTTED
from fsm_replication.servers import RedisServer
from fsm_replication.stores import dotted, redis_scripts


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dotted, "IDLE_SEC", 0.01)


async def test_a_key_published_before_what_is_deep_below_it_is_folded_is_not_lost(
    redis_server: RedisServer,
) -> None:
    """If this fails a live key is missing from the tree until it is written again."""
    node = ForeignNode(redis_server)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        publisher = store._publisher
        assert publisher is not None
        await publisher.stop()
        await store.put("a.b.c", b"deep")
        assert await publisher._lease()
        await publisher._publish(await publisher._dirty())
        # Nothing is folded yet, when a key above is written and published.
        await store.put("a", b"above")
        publisher.start()
        await published(store)
        assert await store.kept_out() == 1
        await store.delete("a.b.c")
        await published(store)
        assert await store.kept_out() == 0
        items = {item.key: (item.version, item.content) async for item in store.scan()}
    ours = tree_of(node)
    assert ours == written_by_hand(node, items)
    node.client.close()


async def test_a_node_of_before_is_not_kept_for_a_key(redis_server: RedisServer) -> None:
    """If this fails keys are counted as kept out that nobody ever wrote."""
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        publisher = store._publisher
        assert publisher is not None
        await store.put("a.x", b"1")
        await published(store)
        await publisher.stop()
        await store.delete("a.x")
        assert await publisher._lease()
        await publisher._publish(await publisher._dirty())
        await store.put("a.y", b"2")
        await publisher._publish(await publisher._dirty())
        assert await store.kept_out() == 0


@pytest.mark.parametrize("switched_on", [False, True])
async def test_a_removal_killed_half_way_is_finished(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, switched_on: bool
) -> None:
    """If this fails foreign nodes find leaves of items that were forgotten meanwhile."""
    node = ForeignNode(redis_server)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        await store.put_many({f"k.{n}": b"x" for n in range(40)})
        await published(store)
    run, left = RedisSyncEngine._run, 1

    async def killed_after_a_call(self: Any, text: str, keys: Any, args: Any) -> Any:
        nonlocal left
        if text == redis_scripts.CLEAR:
            if not left:
                raise asyncio.CancelledError
            left -= 1
        return await run(self, text, keys, args)

    with monkeypatch.context() as patch:
        patch.setattr(RedisSyncEngine, "_run", killed_after_a_call)
        with pytest.raises(asyncio.CancelledError):
            async with RedisSyncEngine(redis_server.url, node_id="n"):
                pass
    assert node.client.hget("fsm:node", "layouts") == b"own"
    # As when its tombstone is past expiry and grace.
    node.client.delete("item:k.3")
    if not switched_on:
        async with RedisSyncEngine(redis_server.url, node_id="n"):
            names = {name.decode() for name in node.client.scan_iter(count=1000)}
        assert not any(name.startswith(("merkle:", "fsm:dotted")) for name in names)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        await published(store)
        items = {item.key: (item.version, item.content) async for item in store.scan()}
    assert len(items) == 39
    ours = tree_of(node)
    assert ours == written_by_hand(node, items)
    node.client.close()


@pytest.mark.slow
async def test_a_lease_lost_while_a_wide_node_is_read_is_not_taken_back(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a hash of children of before is published, and stays."""
    monkeypatch.setattr(dotted, "CHILDREN_PER_PAGE", 20)
    node = ForeignNode(redis_server)
    async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as store:
        slow = store._publisher
        assert slow is not None
        await slow.stop()
        await store.put_many({f"u{n:03}": b"x" for n in range(100)})
        hash_nodes = DottedHashes(slow, node)
        monkeypatch.setattr(slow, "_ask", hash_nodes.ask)
        slow.start()
        await until(lambda: hash_nodes.pages == 2)
        # This process stands still; another one takes over, does its work, and leaves.
        node.client.delete("fsm:dotted:lease")
        async with RedisSyncEngine(redis_server.url, node_id="n", layouts=BOTH) as other:
            await other.put("u000", b"y")
            await published(other)
        hash_nodes.go_on.set()
        await until_async(hash_nodes.is_idle, "the slow one has looked again")
        items = {item.key: (item.version, item.content) async for item in store.scan()}
    ours = tree_of(node)
    assert ours == written_by_hand(node, items)
    node.client.close()


class DottedHashes:
    """Stops a publisher between two pages of a node."""

    def __init__(self, publisher: dotted.DottedPublisher, node: ForeignNode) -> None:
        self._ask = publisher._ask
        self._client = node.client
        self.pages = 0
        self.idle = 0
        self.go_on = asyncio.Event()

    async def ask(self, commands: Any) -> list[Any]:
        """Ask, but wait after the second page."""
        replies = await self._ask(commands)
        if commands and commands[0][0] == "ZRANGE" and len(commands[0]) == 4:
            if "merkle:children:" in commands[0][1] and commands[0][3] != -1:
                self.pages += 1
                if self.pages == 2:
                    await self.go_on.wait()
            elif commands[0][1] == "fsm:dotted:dirty" and self.go_on.is_set() and not replies[0]:
                self.idle += 1
        return replies

    async def is_idle(self) -> bool:
        """Say whether it has found nothing to do since."""
        return self.idle > 2


def test_the_dotted_layout_is_not_kept_alone() -> None:
    """If this fails nobody sees that foreign nodes may read this one, and echoes are let in."""
    with pytest.raises(ConfigError, match="own"):
        RedisSyncEngine("redis://h", node_id="n", layouts=(DOTTED,))


@pytest.mark.parametrize("garbage", ["text", "list"])
async def test_a_root_that_is_none_costs_neither_tree_nor_stream(
    nodes: Nodes, redis_server: RedisServer, garbage: str
) -> None:
    """If this fails one bad string at a foreign node keeps its link from ever reading on."""
    node = ForeignNode(redis_server)
    node.put("in.tree", b"1")
    node.write_tree()
    node.publish("trimmed", b"0")
    node.client.xtrim("cdc", maxlen=0, approximate=False)
    node.publish("in.stream", b"2")
    node.client.delete("merkle:hash:")
    if garbage == "text":
        node.client.set("merkle:hash:", "x" * 64)
    else:
        node.client.rpush("merkle:hash:", "x")
    store = MemorySyncEngine(node_id="b")
    async with nodes.engine(peer_config(redis_server), store=store) as engine:
        await until_async(lambda: store.get("in.stream"))
        assert await store.get("in.tree") is not None
        assert (await engine.repair()).errors == 0
    node.client.close()
