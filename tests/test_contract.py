"""The contract, run on the stores that ship; and that it finds what is wrong with a store."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import strategies as st

from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.testing.contract import SyncEngineContract
from fsm_replication.testing.contract.base import live

SETS = st.sampled_from([b"[]", b"[1]", b"[1,2]", b"[2, 1]", b'["a"]', b"{}", b"", b"[[1]]", b"x"])


class MemoryContract(SyncEngineContract):
    """What both stores in memory need."""

    @pytest.fixture(autouse=True)
    def _many_examples(self, full: bool) -> None:
        if full:
            self.examples = 1000


class TestMemory(MemoryContract):
    """The store in memory."""

    def open_store(self, place: Any, *, ttl_sec: float, grace_sec: float) -> MemorySyncEngine:
        """Return a new one."""
        return MemorySyncEngine(
            node_id="n", tombstone_ttl_sec=ttl_sec, tombstone_grace_sec=grace_sec
        )


class TestMergingMemory(MemoryContract):
    """The store in memory with a resolver that looks at contents."""

    def open_store(self, place: Any, *, ttl_sec: float, grace_sec: float) -> MemorySyncEngine:
        """Return a new one."""
        return MemorySyncEngine(
            tombstone_ttl_sec=ttl_sec, tombstone_grace_sec=grace_sec, resolver=GrowOnlySet()
        )

    def contents(self) -> st.SearchStrategy[bytes]:
        """Return arrays, and what is none."""
        return SETS


class RedisContract(SyncEngineContract):
    """What both stores on Redis need; a place is a URL and a prefix."""

    durable = True
    shared = True
    examples = 10
    kills = 2
    merging = False
    _numbers = itertools.count()

    @pytest.fixture(autouse=True)
    def _a_server(self, redis_servers: Callable[[], RedisServer], full: bool) -> None:
        self.server = redis_servers()
        if full:
            self.examples, self.kills = 200, 10

    def new_place(self) -> tuple[str, str]:
        """Return a prefix that nobody has used yet."""
        return self.server.url, f"place{next(self._numbers)}:"

    def open_store(
        self, place: tuple[str, str], *, ttl_sec: float, grace_sec: float
    ) -> RedisSyncEngine:
        """Return a store on the server."""
        return RedisSyncEngine(
            place[0],
            node_id="n",
            redis_prefix=place[1],
            resolver=GrowOnlySet() if self.merging else None,
            tombstone_ttl_sec=ttl_sec,
            tombstone_grace_sec=grace_sec,
        )

    def refused_item(self, place: tuple[str, str]) -> SyncItem:
        """Return one whose key holds a list that somebody has put there."""
        with redis.Redis(port=self.server.port) as client:
            client.rpush(Keys(place[1]).item("taken"), "not ours")
        return live("taken")


class TestRedis(RedisContract):
    """The store on Redis."""


class TestMergingRedis(RedisContract):
    """The store on Redis with a resolver that looks at contents."""

    # Processes are killed above; a resolver changes nothing about that.
    durable = False
    merging = True

    def contents(self) -> st.SearchStrategy[bytes]:
        """Return arrays, and what is none."""
        return SETS
