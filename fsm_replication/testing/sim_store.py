"""A node's store on a simulated Redis: what ``RedisSyncEngine`` is on a real one.

It lays everything out in the same keys, and changes what a script would change in one go without
letting anybody else run in between. Tests compare it with the real store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from fsm_replication.errors import StoreError, StoreReopenedError
from fsm_replication.items import (
    EMPTY_HASH,
    LastWriterWins,
    Resolver,
    Stamp,
    SyncItem,
    check_key,
    content_hash,
    next_stamp,
    resolve,
)
from fsm_replication.layout import (
    FORMAT,
    STAMP_BYTES,
    Keys,
    decode_item,
    decode_stamp,
    encode_stamp,
    encode_value,
)
from fsm_replication.merkle import (
    BRANCHES,
    DIGEST_BYTES,
    OWN,
    PARTITIONS,
    Tree,
    bucket_of,
    leaf_digest,
)
from fsm_replication.ports import Position, StreamId
from fsm_replication.redis_tree import RedisTree
from fsm_replication.stores.far_entries import is_later
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received, SyncEngine
from fsm_replication.stream import DataDecoder, encode_data, encode_fields
from fsm_replication.testing.sim_redis import SimRedis
from fsm_replication.testing.store_witness import StoreWitness

__all__ = ("SimStore",)

WORD = 1 << 32
PAYLOAD_BYTES = 16 * 1024 * 1024


class SimStore(SyncEngine):
    """Keeps items, tree, stream and positions in a :class:`SimRedis`.

    ``ttl_ms`` and ``grace_ms`` are those of tombstones. ``accepting_writes`` may be set to False to
    make links pause. While ``failure`` is set, every call of replication raises that,
    and each takes ``delay_sec``. The server's clock stamps local writes. After ``crashed()`` each peer
    is told once that the server may be as it was before. ``witness`` sees what replication takes.
    """

    def __init__(
        self,
        server: SimRedis,
        *,
        node_id: str,
        rng: random.Random,
        ttl_ms: int,
        grace_ms: int,
        stream_maxlen: int = 100_000,
        resolver: Resolver | None = None,
    ) -> None:
        self.node_id = node_id
        self.server = server
        self.keys = Keys()
        self.accepting_writes = True
        self.failure: StoreError | None = None
        self.delay_sec = 0.0
        self.witness: StoreWitness | None = None
        self._crashes = 0
        # How many crashes each peer knows of.
        self._told: dict[str, int] = {}
        self._rng = rng
        self._ttl_ms = ttl_ms
        self._grace_ms = grace_ms
        self._maxlen = stream_maxlen
        self._resolver = resolver or LastWriterWins()
        self._decoder = DataDecoder(PAYLOAD_BYTES)
        self._tree = RedisTree(self._ask, self.keys, self._sweep)
        self._do = server.execute

    # The marker

    def open(self) -> None:
        """Write the node's marker key, unless it is there."""
        marker, copy = self.keys.marker, self.keys.marker_copy
        has_data = self._do("EXISTS", self.keys.tree, self.keys.stream)
        if has_data and self._do("HGET", marker, "incarnation") is None:
            # It alone is lost.
            held = self._do("HGETALL", copy)
            if held:
                self._do("HSET", marker, *held)
        self._do("HSETNX", marker, "incarnation", f"{self._rng.getrandbits(64):016x}")
        self._do("HSETNX", marker, "tombstone_ttl_ms", self._ttl_ms)
        self._do(
            "HSET", marker, "node_id", self.node_id, "format", FORMAT, "layouts", OWN,
            "resolver", self._resolver.name, "partitions", PARTITIONS,
        )  # fmt: skip
        announced = int(self._do("HGET", marker, "tombstone_ttl_ms"))
        if announced != self._ttl_ms:
            self._realign(announced)
        self._do("HSET", copy, *self._do("HGETALL", marker))

    def reopen(self, *, ttl_ms: int, grace_ms: int) -> None:
        """Open with other times for tombstones, as a process that starts with another configuration.

        What is kept is brought in line at once, for which the real store takes its time.
        """
        self._ttl_ms, self._grace_ms = ttl_ms, grace_ms
        self.open()

    def _realign(self, announced_ms: int) -> None:
        now = self._now()
        self._sweep_by(announced_ms)
        for key, item in self.items().items():
            if item.deleted:
                expiry = item.updated_at + self._ttl_ms
                name, until = self.keys.item(key), max(expiry, now) + self._grace_ms
                self._do("SET", name, self._do("GET", name), "PXAT", until)
                if expiry > now:
                    self._plant(key, encode_stamp(item))
                    self._remember(item)
        known = self.deletes_known_ms(now)
        known = announced_ms if known is None else min(known, announced_ms)
        self._do(
            "HSET", self.keys.marker, "tombstone_ttl_ms", self._ttl_ms,
            "tombstone_ttl_was_ms", known, "tombstone_ttl_changed_ms", now,
        )  # fmt: skip

    def deletes_known_ms(self, now_ms: int) -> int | None:
        """Return for how long before ``now_ms`` every delete is known, None for the whole ttl."""
        names = ("tombstone_ttl_was_ms", "tombstone_ttl_changed_ms")
        known, changed = self._do("HMGET", self.keys.marker, *names)
        if known is None or changed is None:
            return None
        return min(self._ttl_ms, int(known) + max(0, now_ms - int(changed)))

    def crashed(self) -> None:
        """Note that the server was lost and is back, maybe without its last second."""
        self._crashes += 1
        if self._do("EXISTS", self.keys.marker):
            # It may be from before the ttl was changed.
            self.open()

    def _look_for_loss(self, received: Received | None) -> None:
        name = None if received is None else received.peer_id
        known = self._crashes if name is None else self._told.setdefault(name, self._crashes)
        if name is not None and known < self._crashes:
            self._told[name] = self._crashes
            raise StoreReopenedError(f"{self!r} was lost and is back")
        held = self._do("HGET", self.keys.marker, "incarnation")
        meant = "" if received is None else received.incarnation
        if held is None or (meant and meant.encode() != held):
            raise StoreReopenedError(f"{self!r} was emptied or replaced")

    def open_if_empty(self) -> None:
        """Write the marker key of a server that has none."""
        if self._do("EXISTS", self.keys.marker) == 0:
            self.open()

    async def incarnation(self) -> str:
        """Return the id written when this server was first opened, or was found empty."""
        await self._turn()
        self.open_if_empty()
        raw: bytes = self._do("HGET", self.keys.marker, "incarnation")
        return raw.decode()

    async def ping(self) -> None:
        """Return unless calls fail."""
        await self._turn()

    async def _turn(self) -> None:
        """Let others run, as I/O would, and fail if that is asked for."""
        await asyncio.sleep(self.delay_sec)
        if self.failure is not None:
            raise self.failure

    @property
    def resolver(self) -> Resolver:
        """How two live items of one key become one."""
        return self._resolver

    @property
    def tree(self) -> Tree:
        """The tree of what is held."""
        return self._tree

    async def live_items(self) -> int:
        """Return how many live items there are."""
        await self._turn()
        return int(self._do("GET", self.keys.live) or 0)

    def should_accept_writes(self) -> bool:
        """Return ``accepting_writes``."""
        return self.accepting_writes

    # Items

    def held(self, key: str) -> SyncItem | None:
        """Return what is held, tombstones included, at once."""
        raw = self._do("GET", self.keys.item(key))
        return None if raw is None else decode_item(key, raw, self._decoder)

    def items(self) -> dict[str, SyncItem]:
        """Return everything that is held, at once."""
        cut = len(self.keys.item_prefix)
        found: dict[str, SyncItem] = {}
        cursor: Any = b"0"
        while True:
            cursor, raws = self._do("SCAN", cursor, "MATCH", self.keys.item_prefix + "*")
            for raw in raws:
                key = raw[cut:].decode()
                item = self.held(key)
                if item is not None:
                    found[key] = item
            if cursor == b"0":
                return found

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what is held, tombstones included."""
        await self._turn()
        return [self.held(key) for key in keys]

    async def stamps(self, keys: Sequence[str]) -> list[Stamp | None]:
        """Return the order tuples of what is held."""
        await self._turn()
        heads = [self._do("GETRANGE", self.keys.item(key), 0, STAMP_BYTES - 1) for key in keys]
        return [decode_stamp(head) if head else None for head in heads]

    @property
    def keeps_positions(self) -> bool:
        """Return True: they change together with the items."""
        return True

    async def applied_position(self, peer_id: str) -> Position | None:
        """Return the position stored with the last batch from this peer."""
        await self._turn()
        raw = self._do("HGET", self.keys.positions, peer_id)
        if raw is None:
            return None
        stream_id, _, count = raw.decode().partition(" ")
        return Position(StreamId.parse(stream_id), None if count == "-" else int(count))

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Keep what is newer, publish it, and note the peer's position."""
        await self._turn()
        self._look_for_loss(received)
        outcomes: list[Outcome] = []
        live_deleted = live_added = 0
        for change in changes:
            held = self.held(change.key)
            made = resolve(self._resolver, held, change)
            expired = change.deleted and change.updated_at + self._ttl_ms <= self._now()
            if made is None or (held is None and expired):
                outcomes.append(Outcome.SUPERSEDED)
                continue
            was_live = held is not None and not held.deleted
            live_deleted += made.deleted and was_live
            live_added += not (made.deleted or was_live)
            if self.witness is not None:
                self.witness.took(made, held)
            self._keep(made, held)
            outcomes.append(Outcome.APPLIED)
        if received is not None and received.position is not None:
            count = received.position.entries_read
            text = f"{received.position.stream_id} {'-' if count is None else count}"
            self._do("HSET", self.keys.positions, received.peer_id, text)
        # Whoever is cancelled here does not learn that it was done.
        await asyncio.sleep(0)
        return ApplyResult(outcomes, live_deleted=live_deleted, live_added=live_added)

    def put(self, key: str, content: bytes, content_type: str = "binary") -> SyncItem:
        """Write locally, at once.

        :raises StampAheadError: if what is held is stamped more than a day ahead of the clock.
        """
        check_key(key)
        self.open_if_empty()
        held = self.held(key)
        updated_at, version = next_stamp(None if held is None else held.stamp, self._now(), key=key)
        item = SyncItem(
            key, content, content_type, content_hash(content), version, updated_at, False,
            self.node_id,
        )  # fmt: skip
        made = resolve(self._resolver, held, item)
        assert made is not None, "a local write is later than what it replaces"
        self._keep(made, held)
        return made

    def delete(self, key: str) -> bool:
        """Delete locally, at once; returns whether there was a live item.

        :raises StampAheadError: if what is held is stamped more than a day ahead of the clock.
        """
        self.open_if_empty()
        held = self.held(key)
        if held is None or held.deleted:
            return False
        updated_at, version = next_stamp(held.stamp, self._now(), key=key)
        self._keep(
            SyncItem(key, b"", "binary", EMPTY_HASH, version, updated_at, True, self.node_id), held
        )
        return True

    def replace(self, item: SyncItem, held: Stamp) -> bool:
        """Put an item in the place of exactly what ``held`` names, at once, even if it is older.

        The entries that would win over it leave the stream.
        """
        known = self.held(item.key)
        if known is None or known.stamp != held:
            return False
        if item.stamp < held:
            entries = self._do("XRANGE", self.keys.stream, "-", "+")
            for at in [at for at, fields in entries if is_later(fields, item)]:
                self._do("XDEL", self.keys.stream, at)
        self._keep(item, known)
        return True

    def _now(self) -> int:
        return self.server.db.now_ms()

    def _keep(self, item: SyncItem, held: SyncItem | None) -> None:
        data = encode_data(item.content)
        value, name = encode_value(item, data), self.keys.item(item.key)
        # First, as it is all that can be refused: a stream may have no ids left.
        fields = encode_fields(item, data)
        self._do("XADD", self.keys.stream, "MAXLEN", "~", self._maxlen, "*", *fields)
        stamp: bytes | None = encode_stamp(item)
        if item.deleted:
            expiry = item.updated_at + self._ttl_ms
            self._do("SET", name, value, "PXAT", max(expiry, self._now()) + self._grace_ms)
            if expiry <= self._now():
                stamp = None
            else:
                self._remember(item)
        else:
            self._do("SET", name, value)
        self._plant(item.key, stamp)
        was_live = held is not None and not held.deleted
        if more := (not item.deleted) - was_live:
            live = int(self._do("GET", self.keys.live) or 0)
            self._do("SET", self.keys.live, live + more)

    def _remember(self, tombstone: SyncItem) -> None:
        member = f"{bucket_of(tombstone.key.encode())}:{tombstone.key}"
        self._do("ZADD", f"{self.keys.tree}:deleted", tombstone.updated_at, member)

    # The tree

    def _plant(self, key: str, stamp: bytes | None) -> None:
        bucket = bucket_of(key.encode())
        leaves = f"{self.keys.tree}:{bucket}"
        old = self._do("HGET", leaves, key)
        if old is not None:
            self._fold(bucket, leaf_digest(key.encode(), old), -1)
            self._do("HDEL", leaves, key)
        if stamp is not None:
            self._do("HSET", leaves, key, stamp)
            self._fold(bucket, leaf_digest(key.encode(), stamp), 1)

    def _fold(self, bucket: int, digest: bytes, sign: int) -> None:
        tree = self.keys.tree
        branch = bucket // BRANCHES
        for node in (0, 1 + branch, 1 + BRANCHES + bucket):
            begin = node * DIGEST_BYTES
            old = self._do("GETRANGE", tree, begin, begin + DIGEST_BYTES - 1) or bytes(DIGEST_BYTES)
            words = (
                (int.from_bytes(old[at : at + 4]) + sign * int.from_bytes(digest[at : at + 4]))
                % WORD
                for at in (0, 4)
            )
            self._do("SETRANGE", tree, begin, b"".join(word.to_bytes(4) for word in words))

    async def _sweep(self) -> None:
        self._sweep_by(self._ttl_ms)

    def _sweep_by(self, ttl_ms: int) -> None:
        deleted = f"{self.keys.tree}:deleted"
        for member in self._do("ZRANGEBYSCORE", deleted, "-inf", self._now() - ttl_ms):
            bucket, _, key = member.decode().partition(":")
            stamp = self._do("HGET", f"{self.keys.tree}:{bucket}", key)
            if stamp is not None:
                leaf = decode_stamp(stamp)
                if leaf.deleted and leaf.updated_at + ttl_ms <= self._now():
                    self._plant(key, None)
            self._do("ZREM", deleted, member)

    async def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        await asyncio.sleep(0)
        return [self._do(*command) for command in commands]

    def __repr__(self) -> str:
        return f"<SimStore {self.node_id!r}>"
