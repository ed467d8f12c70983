"""The worked example: the contract on it, and a second node that reads it through real Redis."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlite_store
from conftest import DEADLINE_SEC, Nodes, now_ms, until, until_async
from hypothesis import strategies as st
from sqlite_store import SqliteStore
from test_outbox import SOON_SEC, Fuse, Node, told

from fsm_replication import PeerConfig, PeerState, RedisSyncEngine, SyncEngine, SyncItem
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.servers import RedisServer
from fsm_replication.testing.contract import OutboxContract

HOUR_MS = 3_600_000
SETS = st.sampled_from([b"[]", b"[1]", b"[1,2]", b"[2, 1]", b'["a"]', b"{}", b"x"])


class TestSqliteStore(OutboxContract):
    """The store on SQLite; a place is a file."""

    durable = True
    shared = True
    examples = 6
    kills = 2
    merging = False
    _numbers = itertools.count()

    @pytest.fixture(autouse=True)
    def _a_folder(self, tmp_path: Path, full: bool) -> None:
        self.folder = tmp_path
        if full:
            self.examples, self.kills = 100, 10

    def new_place(self) -> Path:
        """Return a file that is not there yet."""
        return self.folder / f"{next(self._numbers)}.db"

    def open_store(self, place: Any, *, ttl_sec: float, grace_sec: float) -> SqliteStore:
        """Return the store of a file."""
        return SqliteStore(
            place,
            node_id="n",
            tombstone_ttl_sec=ttl_sec,
            tombstone_grace_sec=grace_sec,
            resolver=GrowOnlySet() if self.merging else None,
        )


class TestMergingSqliteStore(TestSqliteStore):
    """The same with a resolver that looks at contents."""

    # Processes are killed above; a resolver changes nothing about that.
    durable = False
    examples = 4
    merging = True

    def contents(self) -> st.SearchStrategy[bytes]:
        """Return arrays, and what is none."""
        return SETS


async def test_a_longer_ttl_makes_nothing_known_that_was_forgotten(tmp_path: Path) -> None:
    """If this fails what was deleted by a shorter ttl comes back with an old peer (G5)."""
    begin = now_ms()

    def aged(hours: int) -> SqliteStore:
        return SqliteStore(tmp_path / "store.db", node_id="n", tombstone_ttl_sec=hours * 3600)

    async with aged(1) as store:
        assert store.deletes_known_ms(now_ms()) == HOUR_MS
        await store.put("k", b"x")
        await store.delete("k")
        (held,) = await store.get_many(["k"])
        assert held is not None
    # The second opening with it finds what the first has noted.
    for _ in range(2):
        async with aged(3) as store:
            at = now_ms()
            assert HOUR_MS <= store.deletes_known_ms(at) <= HOUR_MS + at - begin
            assert store.deletes_known_ms(at + HOUR_MS) < 3 * HOUR_MS
            assert store.deletes_known_ms(at + 10 * HOUR_MS) == 3 * HOUR_MS
    with closing(sqlite3.connect(tmp_path / "store.db")) as file:
        (forget_at,) = file.execute("SELECT forget_at FROM items").fetchone()
    assert forget_at == held.updated_at + 3 * HOUR_MS + 24 * HOUR_MS
    async with aged(1) as store:
        assert store.deletes_known_ms(now_ms()) == HOUR_MS
    async with aged(5) as store:
        at = now_ms()
        assert HOUR_MS <= store.deletes_known_ms(at) <= HOUR_MS + at - begin


# A second node ----------------------------------------------------------------------------------


async def same_items(store: SqliteStore, other: SyncEngine) -> bool:
    """Say whether another node holds all that a store holds, and as it holds it."""
    items = await store.read_items("", 10_000)
    held = await other.stamps([item.key for item in items])
    return held == [item.stamp for item in items]


async def test_two_nodes_of_it_read_each_other(
    nodes: Nodes, redis_servers: Callable[[], RedisServer], tmp_path: Path
) -> None:
    """If this fails local writes of one store do not reach the other, or do not come to rest."""
    servers = {name: redis_servers() for name in ("a", "b")}
    async with AsyncExitStack() as stack:
        found: dict[str, Node] = {}
        for name, server in servers.items():
            store = SqliteStore(tmp_path / f"{name}-store.db", node_id=name)
            await stack.enter_async_context(store)
            node = found[name] = Node(server, store)
            stack.callback(node.client.close)
            publisher = await stack.enter_async_context(node.publisher(node_id=name))
            store.after_commit = publisher.wake
            await publisher.wait_published(SOON_SEC)
        engines = {}
        for name, other in (("a", "b"), ("b", "a")):
            peer = PeerConfig(node_id=other, redis_url=servers[other].url)
            engine = nodes.engine(peer, store=found[name].store, node_id=name)
            engines[name] = await stack.enter_async_context(engine)
            await engine.wait_for_state(PeerState.TAILING, peer_id=other, timeout=DEADLINE_SEC)
        a, b = found["a"].store, found["b"].store
        for number in range(20):
            await a.put(f"of.a.{number}", b"%d" % number)
            await b.put("of.both", b"b%d" % number)
            await a.put("of.both", b"a%d" % number)
            await b.delete(f"of.a.{number - 5}")

        async def agree() -> bool:
            return await same_items(a, b) and await same_items(b, a)

        await until_async(agree, "the same at both nodes")
        written = await a.put("last", b"from a")
        await until_async(lambda: b.is_current("last", written.stamp), "it tails")
        for node in found.values():
            await _until_published(node)
        before = [node.stream() for node in found.values()]
        for engine in engines.values():
            stats = await engine.repair()
            assert (stats.peers_checked, stats.items_fetched, stats.errors) == (1, 0, 0)
        assert [node.stream() for node in found.values()] == before, "it is quiet then"


async def _until_published(node: Node) -> None:
    async def is_empty() -> bool:
        return not await node.store.read_outbox(1)

    await until_async(is_empty, "the outbox is empty")


async def test_a_second_node_sees_every_change_whatever_crashes(
    nodes: Nodes, redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a crash between outbox, stream and forgetting reaches the readers."""
    async with SqliteStore(tmp_path / "store.db", node_id="n") as store:
        node = Node(redis_server, store)
        await node.publish()
        peer = PeerConfig(node_id="n", redis_url=redis_server.url)
        async with nodes.engine(peer, node_id="reader") as reader:
            await reader.wait_for_state(PeerState.TAILING, peer_id="n", timeout=DEADLINE_SEC)
            changes: list[SyncItem] = []
            for number in itertools.count():
                changes += await node.write(number)
                if not await node.crash(Fuse(number)):
                    break
                await node.publish()
                await until_async(
                    lambda: same_items(store, reader.sync_engine), f"crash at point {number}"
                )
            assert number > 12
            await until_async(lambda: same_items(store, reader.sync_engine), "all of it")
            assert node.stream() == told(changes)
            await until(lambda: reader.health_check().peers[0].lag_events == 0)
        node.client.close()


class Process:
    """A node of the example in a process of its own."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        assert child.stdin is not None
        assert child.stdout is not None
        self._input = child.stdin
        self._output = child.stdout

    @classmethod
    async def start(cls, path: Path, url: str, *peers: str) -> Process:
        """Start it."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(sqlite_store.__file__)), str(path), url, *peers,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={"PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        return cls(child)

    def say(self, *lines: str) -> None:
        """Write lines to it."""
        self._input.writelines(f"{line}\n".encode() for line in lines)

    async def hear(self) -> str:
        """Return the next line it says."""
        async with asyncio.timeout(DEADLINE_SEC):
            return (await self._output.readline()).decode().rstrip()

    async def kill(self) -> list[str]:
        """Kill it; returns what it has said before."""
        if self._child.returncode is None:
            self._child.kill()
        rest = await self._output.read()
        await self._child.wait()
        return [line.decode() for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]

    async def end(self) -> int:
        """End its input and return its exit code."""
        self._input.close()
        async with asyncio.timeout(DEADLINE_SEC):
            return await self._child.wait()


async def test_what_a_killed_process_answered_reaches_the_second_node(
    nodes: Nodes, redis_servers: Callable[[], RedisServer], tmp_path: Path, full: bool
) -> None:
    """If this fails kill -9 loses a write that was acknowledged, or shows it to readers twice."""
    path, here, there = tmp_path / "here.db", redis_servers(), redis_servers()
    async with RedisSyncEngine(there.url, node_id="there") as far:
        await far.put("from there", b"1")
        answered: dict[str, int] = {}
        for round_ in range(20 if full else 3):
            child = await Process.start(path, here.url, f"there={there.url}")
            try:
                lines = [f"k{n % 7}={round_}.{n}" for n in range(60)]
                child.say(*lines)
                said = [await child.hear() for _ in range(1 + 17 * round_ % 60)]
            finally:
                said += await child.kill()
            for line in said:
                key, _, number = line.partition(": version ")
                answered[key] = int(number)
        last = await Process.start(path, here.url, f"there={there.url}")
        last.say("k0", "end=1")
        assert await last.hear() == "k0: deleted"
        assert (await last.hear()).startswith("end: version ")
        peer = PeerConfig(node_id="here", redis_url=here.url)
        async with (
            nodes.engine(peer, store=far, node_id="there") as engine,
            SqliteStore(path, node_id="here") as store,
        ):
            await engine.wait_for_state(PeerState.TAILING, peer_id="here", timeout=DEADLINE_SEC)
            await until_async(lambda: same_items(store, far), "all of it at the second node")
            await until_async(lambda: store.get("from there"), "it reads the second node, too")
            assert await last.end() == 0
            for key, version in answered.items():
                (stamp,) = await far.stamps([key])
                assert stamp is not None
                assert stamp.version >= version, key
            node = Node(here, store)
            seen = node.stream()
            node.client.close()
        for key in answered:
            versions = [version for k, _, version, _ in seen if k == key]
            assert versions == sorted(set(versions)), f"{key} was told twice, or not in order"
