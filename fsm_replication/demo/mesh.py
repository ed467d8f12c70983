"""Several whole nodes in one process, each on a real Redis server of its own."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from redis.asyncio import Redis

from fsm_replication.config import (
    CursorConfig,
    PeerConfig,
    ReplicationConfig,
    Settings,
    StartupConfig,
)
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.demo.outage import CuttableTransport
from fsm_replication.engine import ReplicationEngine
from fsm_replication.ports import Ports
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine

__all__ = ("NODES_MAX", "Mesh", "Node", "Topology", "links")

NODES_MAX: Final = 16


class Topology(StrEnum):
    """Who reads whom; every link goes both ways."""

    MESH = "mesh"
    CHAIN = "chain"
    RING = "ring"


def links(topology: Topology, nodes: int) -> list[set[int]]:
    """Return, for each node, the nodes that it reads."""
    reads: list[set[int]] = [set() for _ in range(nodes)]
    for a in range(nodes):
        for b in range(a + 1, nodes):
            beside = b == a + 1
            closing = topology is Topology.RING and (a, b) == (0, nodes - 1)
            if topology is Topology.MESH or beside or closing:
                reads[a].add(b)
                reads[b].add(a)
    return reads


class Node:
    """One node: a server, a store and an engine, and the lines to its peers."""

    def __init__(
        self,
        node_id: str,
        url: str,
        store: RedisSyncEngine,
        engine: ReplicationEngine,
        transport: CuttableTransport,
    ) -> None:
        self.node_id = node_id
        self.url = url
        self.store = store
        self.engine = engine
        self.transport = transport

    async def holds(self) -> dict[str, bytes]:
        """Return the SHA-256 of every live item, by key; reading an item verifies its content."""
        return {item.key: item.content_hash async for item in self.store.scan()}


class Mesh:
    """Starts ``nodes`` nodes, and leaves nothing behind when it ends."""

    def __init__(self, nodes: int, topology: Topology) -> None:
        self._count = nodes
        self._topology = topology
        self._stack = AsyncExitStack()
        self.nodes: list[Node] = []

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fsm-demo-")))
        names = [chr(ord("a") + index) for index in range(self._count)]
        servers = [await self._stack.enter_async_context(RedisServer()) for _ in range(self._count)]
        reads = links(self._topology, self._count)
        for index, name in enumerate(names):
            store = await self._stack.enter_async_context(
                RedisSyncEngine(servers[index].url, node_id=name)
            )
            config = ReplicationConfig(
                local_node_id=name,
                peers=[
                    PeerConfig(node_id=names[peer], redis_url=servers[peer].url)
                    for peer in sorted(reads[index])
                ],
                settings=Settings(startup=StartupConfig(when_no_peer="run")),
                cursor=CursorConfig(sqlite_path=str(folder / f"{name}.db")),
            )
            transport = CuttableTransport()
            cursors = SqliteCursorStore(str(folder / f"{name}.db"))
            ports = Ports(transport=transport, cursor_store=cursors)
            engine = ReplicationEngine(config, sync_engine=store, ports=ports)
            self._stack.push_async_callback(engine.shutdown)
            self.nodes.append(Node(name, servers[index].url, store, engine, transport))
        async with asyncio.TaskGroup() as starting:
            for node in self.nodes:
                starting.create_task(node.engine.start())

    def cut_off(self, node: Node) -> None:
        """Break every line to and from a node; its own Redis stays at its side."""
        for other in self.nodes:
            if other is not node:
                other.transport.cut(node.url)
                node.transport.cut(other.url)

    def rejoin(self, node: Node) -> None:
        """Mend the lines to and from a node."""
        for other in self.nodes:
            if other is not node:
                other.transport.heal(node.url)
                node.transport.heal(other.url)

    async def trim(self, entries: int) -> int:
        """Trim every stream to its last entries; returns how many entries that removed."""
        removed = 0
        for node in self.nodes:
            async with Redis.from_url(node.url) as client:
                removed += await client.xtrim(node.store.keys.stream, entries, approximate=False)
        return removed

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()
