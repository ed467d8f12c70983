"""Who gets how much: a peer that floods, one that writes steadily, and one behind a slow line.

The steady peer and the slow one are read for a while alone, and then for as long beside the flood.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from fsm_replication.bench.workload import fill
from fsm_replication.config import CursorConfig, PeerConfig, ReplicationConfig
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.engine import ReplicationEngine
from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys
from fsm_replication.ports import Cursor, Position, StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.tables import PeerState
from fsm_replication.testing.fault_proxy import FaultProxy
from fsm_replication.transport import RedisTransport

__all__ = ("FLOOD_EVENTS", "PeerShare", "fairness_table", "run_fairness_bench")

FLOOD: Final = "flood"
STEADY: Final = "steady"
SLOW: Final = "slow line"
FLOOD_EVENTS: Final = 400_000
SECONDS: Final = 2.5
ONE_WAY_SEC: Final = 0.025
TIMEOUT_SEC: Final = 60.0
START_TIMEOUT_SEC: Final = 120.0
_READING: Final = (PeerState.TAILING, PeerState.CATCHING_UP)


@dataclass(frozen=True, slots=True)
class PeerShare:
    """What one peer got while all were read; delays are from XADD to applied, in milliseconds.

    ``share`` is that of the events applied until the writers ended. Delays are None for the flood,
    whose events lay there before.
    """

    peer: str
    events: int
    share: float
    p50_alone_ms: float | None = None
    p99_alone_ms: float | None = None
    p50_beside_ms: float | None = None
    p99_beside_ms: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(slots=True)
class _Books:
    """What was applied of one peer, and how late."""

    events: int = 0
    delays_ms: list[float] = field(default_factory=list)

    def percentile(self, percent: int) -> float | None:
        """Return a delay that so many are not over."""
        delays = sorted(self.delays_ms)
        return delays[len(delays) * percent // 100] if delays else None


class _Watched(MemorySyncEngine):
    """Notes of which peer each change came, and how long it took to come here."""

    def __init__(self) -> None:
        super().__init__(node_id="reader")
        self.books = {name: _Books() for name in (FLOOD, STEADY, SLOW)}

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        result = await super().apply_many(changes, received)
        assert received is not None
        if received.peer_id not in self.books:
            # The engine looks at its store with a call that comes of no peer.
            return result
        books, now = self.books[received.peer_id], time.time_ns()
        books.events += len(changes)
        if received.peer_id != FLOOD:
            books.delays_ms += [
                (now - json.loads(item.content)["at"]) / 1e6 for item in changes if item.content
            ]
        return result


async def run_fairness_bench(
    flood_events: int = FLOOD_EVENTS,
    seconds: float = SECONDS,
    *,
    note: Callable[[str], None] = lambda _text: None,
) -> list[PeerShare]:
    """Start three servers and read them, first without and then with the flood.

    :raises RedisServerNotFoundError: if there is no Redis server to be found.
    """
    async with AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(RedisServer()) for name in (FLOOD, STEADY, SLOW)
        }
        note(f"filling a stream with {flood_events:,} events")
        for name, server in servers.items():
            # The first entries of an empty stream may cost a copy, which is not what is measured.
            await _prepare(server.url, name, flood_events if name == FLOOD else 1)
        proxy = await stack.enter_async_context(FaultProxy(servers[SLOW].port))
        proxy.delay(ONE_WAY_SEC, ONE_WAY_SEC)
        urls = {STEADY: servers[STEADY].url, SLOW: proxy.url}
        # Each writes keys of its own: of two writes of one key the earlier would count as nothing.
        writers = {"steady": servers[STEADY].url, "slow": servers[SLOW].url}
        note("reading without the flood")
        alone = await _read(urls, writers, seconds)
        note("reading beside the flood")
        beside = await _read({FLOOD: servers[FLOOD].url, **urls}, writers, seconds)
    whole = sum(books.events for books in beside.values())
    return [
        PeerShare(
            name,
            books.events,
            books.events / max(1, whole),
            alone[name].percentile(50),
            alone[name].percentile(99),
            books.percentile(50),
            books.percentile(99),
        )
        for name, books in beside.items()
    ]


async def _prepare(url: str, name: str, events: int) -> None:
    connection = await RedisTransport().connect(url, timeout_sec=TIMEOUT_SEC, name="bench")
    try:
        await fill(connection, events, deletes=False)
        marker = ("HSET", Keys().marker, "node_id", name)
        await connection.call(*marker, timeout_sec=TIMEOUT_SEC)
    finally:
        connection.close()


async def _read(urls: dict[str, str], writers: dict[str, str], seconds: float) -> dict[str, _Books]:
    """Read peers while writers write to some; returns the books as they are when these end."""
    store = _Watched()
    with tempfile.TemporaryDirectory(prefix="fsm-bench-") as folder:
        path = str(Path(folder) / "cursors.db")
        if FLOOD in urls:
            # A cursor at the beginning makes the engine replay the stream; without one it would copy.
            cursors = SqliteCursorStore(path)
            await cursors.open()
            start = Cursor(Position(StreamId(0, 0), 0), await store.incarnation())
            await cursors.save([(FLOOD, start)])
            await cursors.close()
        config = ReplicationConfig(
            local_node_id="reader",
            peers=[PeerConfig(node_id=name, redis_url=url) for name, url in urls.items()],
            cursor=CursorConfig(sqlite_path=path),
        )
        # The two that are written to are there before the flood begins.
        async with ReplicationEngine(config, sync_engine=store) as engine:
            for name in (STEADY, SLOW):
                await engine.wait_for_state(*_READING, peer_id=name, timeout=START_TIMEOUT_SEC)
            async with asyncio.TaskGroup() as writing:
                for prefix, url in writers.items():
                    writing.create_task(_write(url, seconds, prefix))
            # Copies: what is read from here on does not count.
            return {
                name: _Books(one.events, list(one.delays_ms)) for name, one in store.books.items()
            }


async def _write(url: str, seconds: float, prefix: str) -> None:
    command = ["-m", "fsm_replication.bench.one", "write", "--url", url]
    command += ["--seconds", str(seconds), "--prefix", prefix]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await asyncio.wait_for(process.wait(), seconds + START_TIMEOUT_SEC)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def fairness_table(shares: Sequence[PeerShare]) -> Table:
    """Return what was measured as a table."""
    table = Table(title="500 events/s from a steady peer, and over a slow line, beside a flood")
    table.add_column("peer")
    for head in ("events", "share", "p50 ms", "beside it", "p99 ms", "beside it"):
        table.add_column(head, justify="right")
    for one in shares:
        delays = (one.p50_alone_ms, one.p50_beside_ms, one.p99_alone_ms, one.p99_beside_ms)
        told = ["" if delay is None else f"{delay:.1f}" for delay in delays]
        table.add_row(one.peer, f"{one.events:,}", f"{one.share:.1%}", *told)
    return table
