"""G4 over real Redis servers: fewer runs than on simulated ones, but nothing in them is a model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from conftest import until_async

from fsm_replication import PeerConfig, RedisSyncEngine, ReplicationConfig, ReplicationEngine
from fsm_replication.config import ColdPathConfig, CursorConfig, Settings, StartupConfig
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.demo.outage import CuttableTransport
from fsm_replication.items import SyncItem
from fsm_replication.merkle import OWN
from fsm_replication.ports import Ports
from fsm_replication.servers import RedisServer
from fsm_replication.testing import topology
from fsm_replication.testing.local_mesh import kill_engine

SETTINGS = Settings(
    cold_path=ColdPathConfig(interval_sec=0.3), startup=StartupConfig(when_no_peer="run")
)
KEYS = ["k", "k.1", "other"]
STEPS = 40


@dataclass
class Node:
    """One node on a real server."""

    name: str
    server: RedisServer
    store: RedisSyncEngine
    transport: CuttableTransport
    config: ReplicationConfig
    engine: ReplicationEngine | None = None
    emptied: bool = False

    async def start(self) -> None:
        """Start the engine, unless it runs."""
        if self.engine is None:
            cursors = SqliteCursorStore(self.config.cursor.sqlite_path)
            ports = Ports(transport=self.transport, cursor_store=cursors)
            self.engine = ReplicationEngine(self.config, self.store, ports=ports)
            await self.engine.start()

    async def stop(self, *, kill: bool = False) -> None:
        """Stop the engine, or end it where it stands."""
        if self.engine is not None:
            engine, self.engine = self.engine, None
            if kill:
                await kill_engine(engine)
                # The lock of the cursor file goes with the process.
                await engine._ports.cursor_store.close()
            else:
                await engine.shutdown()


async def held(nodes: list[Node]) -> list[dict[str, SyncItem]]:
    """Return what each node holds, tombstones included."""
    return [
        {item.key: item for item in await node.store.get_many(KEYS) if item is not None}
        for node in nodes
    ]


async def roots(nodes: list[Node]) -> set[bytes]:
    """Return the different roots."""
    found = set()
    for node in nodes:
        assert node.store.tree is not None
        found.add(await node.store.tree.root(OWN))
    return found


async def one_root(nodes: list[Node]) -> bool:
    """Say whether all agree."""
    return len(await roots(nodes)) == 1


async def step(rng: random.Random, nodes: list[Node]) -> None:
    """Let one thing happen."""
    node, other = rng.choice(nodes), rng.choice(nodes)
    kind = rng.choice(
        ["put", "put", "put", "delete", "delete", "wait", "wait", "cut", "heal", "trim", "drop",
         "kill", "stop", "start", "empty", "restart"]
    )  # fmt: skip
    if kind == "put":
        await node.store.put(rng.choice(KEYS), rng.choice([b"", b"x", b"y"]))
    elif kind == "delete":
        await node.store.delete(rng.choice(KEYS))
    elif kind == "wait":
        await asyncio.sleep(rng.choice([0, 0.01, 0.1]))
    elif kind == "cut" and node is not other:
        node.transport.cut(other.server.url)
    elif kind == "heal":
        node.transport.heal(other.server.url)
    elif kind == "trim":
        await node.store._call("XTRIM", node.store.keys.stream, "MAXLEN", rng.randrange(3))
    elif kind == "drop":
        await node.store._call("DEL", node.store.keys.stream)
    elif kind in ("kill", "stop"):
        await node.stop(kill=kind == "kill")
    elif kind == "start":
        await node.start()
    elif kind == "empty":
        flush(node.server)
        node.emptied = True
    elif kind == "restart":
        # Of what it held nothing is on disk.
        await asyncio.to_thread(node.server.restart)
        node.emptied = True


async def fate(seed: int, servers: Callable[[], RedisServer], folder: Path) -> None:
    """Run one random fate of a random mesh, mend everything, and compare."""
    rng = random.Random(seed)
    names = "abcd"[: rng.randint(2, 4)]
    pairs = topology(rng.choice(["mesh", "chain", "ring", "star"]), names)
    at = {name: servers() for name in names}
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for name in names:
            store = RedisSyncEngine(at[name].url, node_id=name)
            await stack.enter_async_context(store)
            peers = [
                PeerConfig(node_id=peer, redis_url=at[peer].url)
                for peer in names
                if peer != name and frozenset((name, peer)) in pairs
            ]
            path = str(folder / f"{seed}-{name}.db")
            config = ReplicationConfig(
                local_node_id=name,
                peers=peers,
                settings=SETTINGS,
                cursor=CursorConfig(sqlite_path=path),
            )
            nodes.append(Node(name, at[name], store, CuttableTransport(), config))
            stack.push_async_callback(nodes[-1].stop)
        for node in nodes:
            await node.start()
        for _ in range(STEPS):
            await step(rng, nodes)
        latest: dict[str, SyncItem] = {}
        for one in await held(nodes):
            for key, item in one.items():
                if key not in latest or latest[key].stamp < item.stamp:
                    latest[key] = item
        for node in nodes:
            for other in nodes:
                node.transport.heal(other.server.url)
            await node.start()
        await until_async(lambda: one_root(nodes), f"equal roots of seed {seed}")
        survived = {key: item.stamp for key, item in latest.items()}
        on_their_way = any(node.emptied for node in nodes)
        for one in await held(nodes):
            stamps = {key: item.stamp for key, item in one.items()}
            # What a node wrote before it was emptied may have been on its way to another.
            later = on_their_way and all(
                key in stamps and stamps[key] >= stamp for key, stamp in survived.items()
            )
            assert later or stamps == survived
        # And nothing moves any more.
        lengths = [await node.store._call("XLEN", node.store.keys.stream) for node in nodes]
        for node in nodes:
            assert node.engine is not None
            await node.engine.repair()
        assert lengths == [await node.store._call("XLEN", node.store.keys.stream) for node in nodes]


@pytest.mark.timeout(3600)
async def test_real_nodes_converge_whatever_happens(
    redis_servers: Callable[[], RedisServer], tmp_path: Path, full: bool
) -> None:
    """If this fails what is proved on simulated servers does not hold on real ones."""
    pool = [redis_servers() for _ in range(4)]
    for seed in range(200 if full else 6):
        for server in pool:
            flush(server)
        servers = iter(pool)
        await fate(seed, lambda servers=servers: next(servers), tmp_path)  # type: ignore[misc]


def flush(server: RedisServer) -> None:
    """Empty a server."""
    with redis.Redis(port=server.port) as client:
        client.flushall()
