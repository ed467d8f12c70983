"""Reading foreign nodes: their trees and items, written here byte by byte as they are described."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, counts_entries, held, peer_config, until
from foreign_node import AT, ForeignNode, sha

from fsm_replication import (
    MemorySyncEngine,
    PeerConfig,
    PeerState,
    ReplicationEngine,
    SyncEngine,
)
from fsm_replication.config import ColdPathConfig, HotPathConfig, LimitsConfig, Settings
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.errors import PeerReplyError
from fsm_replication.items import SyncItem, content_hash
from fsm_replication.ports import Ports
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.transport import RedisConnection, RedisTransport
from fsm_replication.workers import foreign_walk
from fsm_replication.workers.foreign_walk import SettledHashes

BY_HAND = Settings(
    hot_path=HotPathConfig(enabled=False), cold_path=ColdPathConfig(interval_sec=3600)
)


class ModuleTransport(RedisTransport):
    """Answers JSON.GET as a Redis with the module does, from documents; counts flights."""

    def __init__(self, documents: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__()
        self.documents = documents
        self.flights: list[tuple[str, int]] = []

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> RedisConnection:
        """Connect, and look at what is sent."""
        connection = await super().connect(url, timeout_sec=timeout_sec, name=name)
        send = connection.send

        def looked_at(*commands: Sequence[bytes | str | int]) -> asyncio.Future[list[Any]]:
            verb = str(commands[0][0])
            self.flights.append((verb, len(commands)))
            if verb != "JSON.GET" or self.documents is None:
                return send(*commands)
            answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            answer.set_result([self._document(command[1]) for command in commands])
            return answer

        connection.send = looked_at  # type: ignore[method-assign]
        return connection

    def _document(self, name: bytes | str | int) -> Any:
        assert isinstance(name, bytes)
        assert self.documents is not None
        found = self.documents.get(name)
        wrong = "WRONGTYPE Operation against a key holding the wrong kind of value"
        return PeerReplyError(wrong) if found is None else found

    def count(self, verb: str) -> int:
        """Return how many flights began with a command."""
        return sum(name == verb for name, _ in self.flights)


@pytest.fixture
def foreign(redis_server: RedisServer) -> Iterator[ForeignNode]:
    """A foreign node on a server of its own."""
    node = ForeignNode(redis_server)
    yield node
    node.client.close()


def at(server: RedisServer, **more: Any) -> PeerConfig:
    """Return how the foreign node is reached."""
    return PeerConfig(node_id="a", redis_url=server.url, **more)


def engine_over(
    nodes: Nodes, tmp_path: Path, server: RedisServer, store: SyncEngine, transport: RedisTransport,
    settings: Settings = BY_HAND, **more: Any,
) -> ReplicationEngine:  # fmt: skip
    """Return an engine that reads the foreign node over a transport."""
    config = nodes.config(at(server, **more), settings=settings)
    ports = Ports(transport=transport, cursor_store=SqliteCursorStore(str(tmp_path / "c.db")))
    return ReplicationEngine(config, store, ports=ports)


async def test_a_node_of_any_size_is_passed_over(
    nodes: Nodes, foreign: ForeignNode, redis_server: RedisServer
) -> None:
    """If this fails one wide node takes more memory than is allowed, or breaks its link each time."""
    foreign.put("small.item", b"1")
    foreign.put("after", b"2")
    foreign.write_tree()
    pipe = foreign.client.pipeline(transaction=False)
    for number in range(4000):
        pipe.zadd("merkle:children:wide", {f"{number}{'x' * 1000}:{'0' * 64}": 0})
    pipe.zadd("merkle:children:", {"wide:" + "1" * 64: 0})
    pipe.set("merkle:hash:", "2" * 64)
    pipe.execute()
    foreign.publish("in.the.stream", b"3")
    store = MemorySyncEngine(node_id="b")
    settings = Settings(limits=LimitsConfig(batch_bytes=2**20, payload_bytes=2**18))
    link = peer_config(redis_server)
    async with nodes.engine(link, store=store, settings=settings) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        await until(lambda: len(store) == 3)
        for number in range(3, 6):
            foreign.client.set("merkle:hash:", f"{number}" * 64)
            stats = await engine.repair()
            assert (stats.errors, stats.peers_in_sync) == (0, 0)
        assert engine.peers["a"] is PeerState.TAILING
        assert "connection_lost" not in [record.trigger for record in engine.journal]


@pytest.mark.parametrize("bare", [False, True], ids=["segment:hash", "segment"])
@pytest.mark.parametrize("prefix", ["", "site-f:"])
async def test_a_foreign_node_is_copied_from_its_tree_and_then_read_on(
    tmp_path: Path, nodes: Nodes, redis_server: RedisServer, prefix: str, bare: bool
) -> None:
    """If this fails what a foreign stream no longer holds never arrives."""
    foreign = ForeignNode(redis_server, prefix, bare=bare)
    foreign.put("uk.nhs.patient.123", b"\x00\xff binary")
    foreign.put("uk.nhs.patient.124", b"")
    foreign.put("colons:in:it.and::there", b"x")
    foreign.put("flat", b"y")
    foreign.put_document(
        "uk.json", b'{"b":1,"a":[1.50,"\xc3\xa4"]}', b'{"b":1,"a":[1.50,"\xc3\xa4"]}'
    )
    foreign.put_document("uk.sorted", b'{"b":1,"a":2}', b'{"a": 2, "b": 1}')
    foreign.write_tree()
    foreign.publish("trimmed", b"0")
    foreign.client.xtrim(f"{prefix}cdc", maxlen=0, approximate=False)
    foreign.publish("in.the.stream", b"z")
    store = MemorySyncEngine(node_id="b")
    transport = ModuleTransport(foreign.documents)
    engine = engine_over(
        nodes, tmp_path, redis_server, store, transport, Settings(), redis_prefix=prefix
    )
    async with engine:
        await engine.wait_for_state(PeerState.BOOTSTRAPPING, peer_id="a", timeout=DEADLINE_SEC)
        await engine.wait_synced(DEADLINE_SEC)
        assert await held(store, *foreign.leaves, "in.the.stream") == {
            "uk.nhs.patient.123": b"\x00\xff binary",
            "uk.nhs.patient.124": b"",
            "colons:in:it.and::there": b"x",
            "flat": b"y",
            "uk.json": b'{"b":1,"a":[1.50,"\xc3\xa4"]}',
            "uk.sorted": b'{"a": 2, "b": 1}',
            "in.the.stream": b"z",
        }
        (json_item,) = await store.get_many(["uk.json"])
        assert json_item is not None
        assert (json_item.content_type, json_item.version, json_item.updated_at) == ("json", 1, AT)
        health = engine.health_check().peers[0]
        assert (health.layout, health.gaps_open) == ("dotted", 0)
        again = await engine.repair()
        assert (again.peers_in_sync, again.items_fetched, again.errors) == (1, 0, 0)
    foreign.client.close()


async def test_only_what_has_changed_is_looked_into(
    nodes: Nodes, tmp_path: Path, redis_server: RedisServer, foreign: ForeignNode
) -> None:
    """If this fails each cycle reads a foreign tree from end to end."""
    for number in range(2000):
        foreign.put(f"t{number % 20}.k{number}", b"%d" % number)
    foreign.write_tree()
    store = MemorySyncEngine(node_id="b")
    transport = ModuleTransport()
    engine = engine_over(nodes, tmp_path, redis_server, store, transport)
    foreign.publish("t0.k0", b"0")
    async with engine:
        first = await engine.repair()
        assert (first.items_submitted, first.errors) == (2000, 0)
        assert transport.count("JSON.GET") == 1, "the module is asked for once per connection"
        transport.flights.clear()
        assert (await engine.repair()).peers_in_sync == 1
        assert transport.flights == [("GET", 1)], "an equal root is one round trip"
        foreign.put("t7.k7", b"changed", version=2, at=AT + 1)
        foreign.put("t7.new", b"new")
        foreign.write_tree()
        transport.flights.clear()
        second = await engine.repair()
        assert (second.items_fetched, second.items_submitted) == (2, 2)
        read = [count for verb, count in transport.flights if verb == "ZRANGE"]
        assert read == [1, 1], "the root and one branch"
        assert len(transport.flights) <= 8, transport.flights
        assert await held(store, "t7.k7", "t7.new") == {"t7.k7": b"changed", "t7.new": b"new"}


async def test_content_that_is_held_is_current_and_what_is_older_is_not_taken(
    nodes: Nodes, tmp_path: Path, redis_server: RedisServer, foreign: ForeignNode
) -> None:
    """If this fails foreign stamps make nodes write the same content to each other for ever."""
    store = MemorySyncEngine(node_id="b")
    same = await store.put("same.content", b"equal")
    newer = await store.put("newer.here", b"ours")
    only_here = await store.put("only.here", b"stays")
    await store.put("deleted.here", b"x")
    await store.delete("deleted.here")
    await store.submit(SyncItem("older.here", b"old", "binary", content_hash(b"old"), 1, AT - 1))
    foreign.put("same.content", b"equal", version=9, at=same.updated_at + 50_000)
    foreign.put("newer.here", b"theirs")
    foreign.put("deleted.here", b"x")
    foreign.put("older.here", b"new", version=2)
    foreign.write_tree()
    foreign.publish("older.here", b"new", 2)
    engine = engine_over(nodes, tmp_path, redis_server, store, ModuleTransport())
    async with engine:
        before = [found async for found in engine.differences("a")]
        assert {(found.key, found.newer) for found in before} == {
            ("newer.here", "local"),
            ("deleted.here", "local"),
            ("older.here", "peer"),
        }
        stats = await engine.repair()
        assert (stats.items_fetched, stats.items_submitted, stats.errors) == (4, 1, 0)
        assert await store.get("same.content") == same
        assert await store.get("newer.here") == newer
        assert await store.get("only.here") == only_here
        assert await held(store, "older.here", "deleted.here") == {
            "older.here": b"new",
            "deleted.here": None,
        }
        assert (await engine.repair()).items_fetched == 0, "what was once seen to be old is left"
        told = await engine.explain("same.content")
        assert "same content" in told.peers[0].verdict
        told = await engine.explain("newer.here")
        assert "ours wins" in told.peers[0].verdict


async def test_the_order_of_a_foreign_stream_holds_over_chunks_too(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails a delete that comes a chunk after its put, in one millisecond, is lost."""
    foreign = ForeignNode(redis_server)
    foreign.put("k", b"x", version=5)
    foreign.write_tree()
    entries = [("k", b"x", 5), *((f"other{n}", b"y", 1) for n in range(240))]
    with foreign.client.pipeline(transaction=True) as together:
        for number, (key, content, version) in enumerate(entries):
            meta = {"content_type": "binary", "version": version, "updated_at": AT}
            fields = {"op": "PUT", "key": key, "data": content, "meta": json.dumps(meta)}
            together.xadd("cdc", fields, id=f"{AT}-{number + 1}")  # type: ignore[arg-type]
        together.xadd("cdc", {"op": "DEL", "key": "k"}, id=f"{AT}-{len(entries) + 1}")
        together.execute()
    foreign.client.delete("k")

    class Distant(MemorySyncEngine):
        """A store that takes a moment for each call."""

        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            await asyncio.sleep(0.05)
            return await super().apply_many(changes, received)

    store = Distant(node_id="b")
    async with nodes.engine(peer_config(redis_server), store=store) as engine:
        await until(lambda: engine.health_check().peers[0].events_read >= len(entries) + 1)
        await until(lambda: engine.health_check().peers[0].lag_events == 0)
        assert await held(store, "k", "other239") == {"k": None, "other239": b"y"}
    foreign.client.close()


async def test_a_spelling_nobody_finds_again_is_kept_under_its_own_hash(
    nodes: Nodes, tmp_path: Path, redis_server: RedisServer, foreign: ForeignNode
) -> None:
    """If this fails such an item is refused by every reader of our stream, or fetched for ever."""
    foreign.put_document("odd", b'{"a":1}', b'{ "a"  : 1 }')
    foreign.write_tree()
    foreign.publish("other", b"")
    store = MemorySyncEngine(node_id="b")
    engine = engine_over(nodes, tmp_path, redis_server, store, ModuleTransport(foreign.documents))
    async with engine:
        assert (await engine.repair()).items_submitted == 1
        item = await store.get("odd")
        assert item is not None
        assert (item.content, item.content_hash) == (b'{"a":1}', sha(b'{"a":1}'))
        assert (await engine.repair()).items_fetched == 0
        # The same content, as the stream would bring it, is current by the foreign hash.
        foreign.put_document("odd", b'{"a":1}', b'{"a":1}', version=1)
        foreign.write_tree()
        assert (await engine.repair()).items_submitted == 0


async def test_what_cannot_be_read_spoils_nothing_else(
    nodes: Nodes, tmp_path: Path, redis_server: RedisServer, foreign: ForeignNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """If this fails one broken node or item ends the repair of a foreign peer."""
    monkeypatch.setattr(foreign_walk, "CHILDREN_MAX", 40)
    for number in range(50):
        foreign.put(f"wide.k{number}", b"x")
    foreign.put(".".join(["deep"] * 70), b"x")
    foreign.put("broken.node", b"x")
    foreign.put("not.an.item", b"x")
    foreign.put("gone", b"x")
    foreign.put("bad.members", b"good")
    foreign.put("good", b"x")
    foreign.plant("cdc.reserved", 1, b"x")
    foreign.write_tree()
    foreign.publish("good", b"x")
    foreign.client.delete("merkle:children:broken")
    foreign.client.set("merkle:children:broken", "a string")
    foreign.client.set("not.an.item", b"{")
    foreign.client.delete("gone")
    foreign.client.zadd("merkle:children:bad", {b"\xff:" + b"0" * 64: 0, b"": 0, b"a.b": 0})
    store = MemorySyncEngine(node_id="b")
    engine = engine_over(nodes, tmp_path, redis_server, store, ModuleTransport())
    async with engine:
        stats = await engine.repair()
        assert stats.errors == 0
        assert await held(store, "good", "bad.members") == {"good": b"x", "bad.members": b"good"}
        assert len(store) == 2
        # The pass was not complete, so it looks again, but fetches nothing in vain.
        assert (await engine.repair()).items_fetched == 0


async def test_the_budget_is_kept_and_the_next_cycle_goes_on(
    nodes: Nodes, tmp_path: Path, redis_server: RedisServer, foreign: ForeignNode
) -> None:
    """If this fails a foreign node takes more than its share of a cycle, or is never done."""
    for number in range(250):
        foreign.put(f"k.{number}", b"x")
    foreign.write_tree()
    foreign.publish("k.0", b"x")
    store = MemorySyncEngine(node_id="b")
    settings = BY_HAND.model_copy(
        update={"cold_path": ColdPathConfig(interval_sec=3600, max_items_per_cycle=100)}
    )
    engine = engine_over(nodes, tmp_path, redis_server, store, ModuleTransport(), settings)
    async with engine:
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=DEADLINE_SEC)
        done = [await engine._cold_path.cycle() for _ in range(4)]
        assert [stats.items_fetched for stats in done] == [100, 100, 50, 0]
        assert done[-1].peers_in_sync == 1
        assert len(store) == 250


async def test_a_gap_is_filled_from_the_tree_and_its_deletes_stay_open(
    nodes: Nodes, redis_server: RedisServer, foreign: ForeignNode
) -> None:
    """If this fails a trimmed foreign stream loses writes, or hides that deletes may be missing."""
    foreign.publish("k0", b"0")
    foreign.put("k0", b"0")
    foreign.write_tree()
    store = MemorySyncEngine(node_id="b")
    async with nodes.engine(at(redis_server), store=store) as engine:
        await engine.wait_synced(DEADLINE_SEC)
        await engine.pause("a")
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
        for number in range(1, 40):
            foreign.publish(f"k{number}", b"x")
            foreign.put(f"k{number}", b"x")
        foreign.write_tree()
        foreign.client.xtrim("cdc", maxlen=3, approximate=False)
        await engine.resume("a")
        await until(lambda: len(store) == 40)
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        (gap,) = await engine.ledger()
        missed = 36 if counts_entries(redis_server) else None
        assert (gap.missed, gap.healed_at_ms) == (missed, None)
        assert engine.health_check().peers[0].gaps_open == 1


async def test_memory_of_what_was_settled_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a large foreign tree fills this node's memory."""
    monkeypatch.setattr(foreign_walk, "SETTLED_MAX", 10)
    settled = SettledHashes()
    for number in range(100):
        settled.add(str(number), b"h")
    assert len(settled) == 10
    assert settled.holds("99", b"h")
    assert not settled.holds("99", b"i")
    assert not settled.holds("0", b"h")
    assert not settled.holds("unknown", b"")


async def test_documents_of_the_module_itself(
    nodes: Nodes, tmp_path: Path, redis_server: RedisServer, foreign: ForeignNode
) -> None:
    """If this fails the replies recorded for the other tests are not what RedisJSON answers."""
    modules: Any = foreign.client.module_list()
    if not any(module[b"name"] == b"ReJSON" for module in modules):
        pytest.skip("the server here has no RedisJSON: JSON.GET was tested with recorded replies")
    spelled = b'{"b": 1, "a": [1.5, "\xc3\xa4", null]}'
    foreign.put_document("uk.json", spelled, spelled)
    foreign.client.delete("uk.json")
    foreign.client.execute_command("JSON.SET", "uk.json", "$", foreign.documents[b"uk.json"])  # type: ignore[no-untyped-call]
    foreign.put("uk.string", b"x")
    foreign.write_tree()
    foreign.publish("uk.string", b"x")
    store = MemorySyncEngine(node_id="b")
    async with engine_over(nodes, tmp_path, redis_server, store, ModuleTransport()) as engine:
        assert (await engine.repair()).items_submitted == 2
        assert await held(store, "uk.json", "uk.string") == {"uk.json": spelled, "uk.string": b"x"}
