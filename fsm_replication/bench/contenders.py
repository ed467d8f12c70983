"""What is compared: the drain, the hot path, and a straightforward reader."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import hiredis
import zstandard
from redis.asyncio import Redis

from fsm_replication.bench.workload import PEER_ID
from fsm_replication.config import CursorConfig, PeerConfig, ReplicationConfig
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.engine import ReplicationEngine
from fsm_replication.items import EMPTY_HASH, SyncItem
from fsm_replication.layout import Keys
from fsm_replication.merkle import OWN
from fsm_replication.ports import Cursor, Position, StreamId
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine, SyncEngine
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.stream import MAGIC
from fsm_replication.tables import PeerState

__all__ = ("Measure", "drain", "hot_path", "latency", "straightforward")

START: Final = Cursor(Position(StreamId(0, 0), 0), "")
DRAIN_COUNT: Final = 1000
STRAIGHT_COUNT: Final = 100
LATENCY_WARM_UP_SEC: Final = 0.5


@dataclass(frozen=True, slots=True)
class Measure:
    """One measurement: events in seconds, and the CPU seconds of this process for them."""

    events: int
    seconds: float
    cpu_seconds: float


class _Clock:
    def __init__(self) -> None:
        self._began = time.perf_counter()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._cpu = usage.ru_utime + usage.ru_stime

    def measure(self, events: int) -> Measure:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime - self._cpu
        return Measure(events, time.perf_counter() - self._began, cpu)


# The drain ------------------------------------------------------------------------------------


class _Drain(asyncio.Protocol):
    """Reads a stream to its end and throws the entries away."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._reader = hiredis.Reader()
        self.events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask(b"0")

    def _ask(self, after: bytes) -> None:
        assert self._transport is not None
        pack: Any = hiredis.pack_command
        self._transport.write(pack(("XREAD", "COUNT", DRAIN_COUNT, "STREAMS", self._key, after)))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        reply = self._reader.gets()
        if reply is False:
            return
        if reply is None:
            if not self.done.done():
                self.done.set_result(None)
            return
        entries = reply[0][1]
        self.events += len(entries)
        self._ask(entries[-1][0])

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server went away"))


async def drain(url: str) -> Measure:
    """Read the whole stream and keep nothing: the most that any reader here can do."""
    parts = urlsplit(url)
    clock = _Clock()
    transport, protocol = await asyncio.get_running_loop().create_connection(
        lambda: _Drain(Keys().stream), parts.hostname or "", parts.port or 0
    )
    await asyncio.wait_for(protocol.done, 120)
    measure = clock.measure(protocol.events)
    transport.close()
    return measure


# The hot path -----------------------------------------------------------------------------------


async def _open_store(stack: AsyncExitStack, target_url: str | None, *, tree: bool) -> SyncEngine:
    if target_url is None:
        return MemorySyncEngine(node_id="reader")
    async with Redis.from_url(target_url) as client:
        await client.flushall()
    return await stack.enter_async_context(
        RedisSyncEngine(target_url, node_id="reader", layouts=(OWN,) if tree else ())
    )


async def _engine(
    stack: AsyncExitStack, url: str, store: SyncEngine, folder: Path, cursor: Cursor | None
) -> ReplicationEngine:
    path = str(folder / "cursors.db")
    if cursor is not None:
        # A cursor at the beginning makes the engine replay the stream; without one it would copy, and
        # so it would where a store that keeps positions has none.
        incarnation = await store.incarnation()
        await store.apply_many([], Received(PEER_ID, cursor.position, incarnation=incarnation))
        cursors = SqliteCursorStore(path)
        await cursors.open()
        try:
            await cursors.save([(PEER_ID, cursor._replace(incarnation=incarnation))])
        finally:
            await cursors.close()
    config = ReplicationConfig(
        local_node_id="reader",
        peers=[PeerConfig(node_id=PEER_ID, redis_url=url)],
        cursor=CursorConfig(sqlite_path=path),
    )
    engine = ReplicationEngine(config, sync_engine=store)
    stack.push_async_callback(engine.shutdown)
    return engine


async def hot_path(url: str, target_url: str | None, events: int, *, tree: bool = False) -> Measure:
    """Replay the stream through a whole engine, into memory or into another Redis.

    ``tree`` says whether the other Redis keeps a tree of what it holds.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fsm-bench-")))
        store = await _open_store(stack, target_url, tree=tree)
        engine = await _engine(stack, url, store, folder, START)
        clock = _Clock()
        async with asyncio.TaskGroup() as both:
            both.create_task(engine.wait_for_state(PeerState.TAILING, peer_id=PEER_ID, timeout=300))
            both.create_task(engine.start())
        measure = clock.measure(engine.health_check().peers[0].events_read)
        letters = engine.health_check().peers[0].dead_letters
        assert (measure.events, letters) == (events, 0), "the engine did not read every event"
        return measure


class _Stopwatch(MemorySyncEngine):
    """Notes how long each change took from its XADD to here."""

    def __init__(self) -> None:
        super().__init__(node_id="reader")
        self.delays_ms: list[float] = []

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        result = await super().apply_many(changes, received)
        now = time.time_ns()
        self.delays_ms += [(now - json.loads(item.content)["at"]) / 1e6 for item in changes]
        return result


async def latency(url: str, seconds: float, writer: Sequence[str]) -> list[float]:
    """Tail a quiet stream while another process writes; returns delays in milliseconds."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fsm-bench-")))
        store = _Stopwatch()
        engine = await _engine(stack, url, store, folder, None)
        await engine.start()
        await engine.wait_synced(30)
        process = await asyncio.create_subprocess_exec(*writer, stdout=asyncio.subprocess.DEVNULL)
        try:
            await asyncio.wait_for(process.wait(), seconds + 30)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return store.delays_ms


# A straightforward version --------------------------------------------------------------------


@dataclass(frozen=True)
class _Event:
    """An entry of the stream, as one would model it at first."""

    op: str
    key: str
    data: bytes
    digest: str
    content_type: str
    version: int
    updated_at: int
    origin: str


async def straightforward(url: str) -> Measure:
    """Read as one would at first: 100 entries a read, one task and one await per event.

    redis-py as it comes, a model object per event, and the store's call for a single item.
    """
    store = MemorySyncEngine(node_id="reader")
    clock = _Clock()
    events = 0
    # Typed loosely on purpose: nobody who writes this first would take more care.
    client: Any = Redis.from_url(url)
    try:
        last: Any = "0"
        while True:
            reply = await client.xread({Keys().stream: last}, count=STRAIGHT_COUNT)
            if not reply:
                break
            streams = reply.values() if isinstance(reply, dict) else [e for _, e in reply]
            for entries in streams:
                # Under RESP3 redis-py wraps the entries of a stream once more.
                rows = entries[0] if isinstance(entries[0], list) else entries
                tasks = [asyncio.create_task(_apply_one(store, fields)) for _, fields in rows]
                for task in tasks:
                    await task
                events += len(rows)
                last = rows[-1][0]
    finally:
        await client.aclose()
    return clock.measure(events)


async def _apply_one(store: SyncEngine, fields: dict[bytes, bytes]) -> None:
    meta = json.loads(fields[b"meta"])
    event = _Event(
        op=fields[b"op"].decode(),
        key=fields[b"key"].decode(),
        data=fields.get(b"data", b""),
        digest=fields.get(b"hash", b"").decode(),
        content_type=meta.get("content_type", "binary"),
        version=meta["version"],
        updated_at=meta["updated_at"],
        origin=meta.get("origin", ""),
    )
    content, digest = b"", EMPTY_HASH
    if event.op == "PUT":
        content = event.data
        if content.startswith(MAGIC):
            content = zstandard.ZstdDecompressor().decompress(content)
        digest = hashlib.sha256(content).digest()
        if digest.hex() != event.digest:
            return
    await store.submit(
        SyncItem(
            event.key,
            content,
            event.content_type,
            digest,
            event.version,
            event.updated_at,
            event.op == "DEL",
            event.origin,
        )
    )
