"""The simulated store is what the real one is: the same changes leave the same in both."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merkle import KEYS, changes

from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys
from fsm_replication.merkle import OWN
from fsm_replication.ports import Position, StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine, SyncEngine
from fsm_replication.stores.protocol import Received
from fsm_replication.testing import SimRedis, SimStore

WEEK_MS = 7 * 86_400_000
AT = Position(StreamId(5, 1), 7)


async def look(store: SyncEngine, batches: list[list[SyncItem]]) -> list[Any]:
    """Apply batches, and return all that can be seen of it."""
    seen: list[Any] = []
    for batch in batches:
        result = await store.apply_many(batch, Received("p", AT))
        seen.append((list(result.outcomes), result.live_deleted))
    seen.append(await store.get_many(KEYS))
    seen.append(await store.stamps(KEYS))
    seen.append(await store.applied_position("p"))
    assert store.tree is not None
    seen.append(await store.tree.root(OWN))
    return seen


def test_the_simulated_store_is_as_the_real_one(
    redis_servers: Callable[[], RedisServer],
) -> None:
    """If this fails the proofs on simulated nodes prove nothing about real ones."""
    server = redis_servers()

    @settings(max_examples=40)
    @given(st.lists(changes, max_size=4))
    def check(batches: list[list[SyncItem]]) -> None:
        async def run() -> None:
            sim = SimRedis(now_ms=lambda: int(time.time() * 1000))
            model = SimStore(
                sim, node_id="n", rng=random.Random(1), ttl_ms=WEEK_MS, grace_ms=86_400_000
            )
            model.open()
            with redis.Redis(port=server.port) as client:
                client.flushall()
                async with RedisSyncEngine(server.url, node_id="n") as store:
                    assert await look(store, batches) == await look(model, batches)
                entries: Any = client.execute_command("XRANGE", Keys().stream, "-", "+")
                real = [[part for pair in fields.items() for part in pair] for _, fields in entries]
                marker: Any = client.hgetall(Keys().marker)
            assert real == [list(fields) for _, fields in sim.execute("XRANGE", "cdc", "-", "+")]
            flat = sim.execute("HGETALL", Keys().marker)
            ours = dict(zip(flat[::2], flat[1::2], strict=True))
            assert ours | {b"incarnation": b""} == marker | {b"incarnation": b""}

        asyncio.run(run())

    check()
