"""A node's process is killed at random moments under load: nothing is lost, and little read again."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
from conftest import until, until_async

from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.layout import Keys
from fsm_replication.ports import StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine
from fsm_replication.testing import FaultProxy
from fsm_replication.testing.fault_books import Books, Writer

pytestmark = pytest.mark.usefixtures("no_tasks_left")

LOG = logging.getLogger(__name__)
BEGINNING = StreamId(0, 0)
RATE_PER_SEC = 600.0
CHANGES_PER_SEC_MIN = 500


@dataclass(slots=True)
class Killings:
    """The node b, which reads a over a proxy, and what was seen of its reading."""

    source: RedisServer
    target: RedisServer
    folder: Path
    commands: int = 0
    asked: list[StreamId] = field(default_factory=list)
    furthest: StreamId = BEGINNING
    read_again: list[int] = field(default_factory=list)
    resumed: int = 0

    def note(self, args: Sequence[bytes]) -> None:
        """Note from where each read of the stream goes on: all before that has been read."""
        self.commands += 1
        if args[0] == b"XREAD":
            self.asked.append(StreamId.parse(args[-1]))

    def write_config(self, url: str) -> Path:
        """Write the configuration of b."""
        path = self.folder / "node.yaml"
        path.write_text(
            "local_node_id: b\n"
            f"cursor: {{sqlite_path: {self.folder / 'cursors.db'}}}\n"
            f"store: {{kind: redis, redis_url: '{self.target.url}'}}\n"
            f"peers: [{{node_id: a, redis_url: '{url}'}}]\n"
        )
        return path

    async def on_disk(self) -> StreamId | None:
        """Return the cursor that the killed process left on disk, None where it had none yet."""
        if not (self.folder / "cursors.db").exists():
            return None
        store = SqliteCursorStore(str(self.folder / "cursors.db"))
        await store.open()
        try:
            record = await store.load("a")
        finally:
            await store.close()
        unfinished = record.cursor is None or record.bootstrap is not None
        return None if unfinished or record.cursor is None else record.cursor.position.stream_id

    def peek(self) -> tuple[str, ...] | None:
        """Return the cursor on disk beside a process that holds it."""
        path = self.folder / "cursors.db"
        if not path.exists():
            return None
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
            row: tuple[str, ...] | None = database.execute(
                "SELECT stream_id FROM peers WHERE peer_id = 'a'"
            ).fetchone()
        return row

    def applied(self) -> StreamId | None:
        """Return the position that b's store holds beside the items."""
        with redis.Redis(port=self.target.port) as client:
            raw = client.hget(Keys().positions, "a")
        return None if raw is None else StreamId.parse(raw.split(b" ")[0])

    def entries(self, after: StreamId, upto: StreamId) -> int:
        """Return how many entries of a's stream lie between two positions."""
        with redis.Redis(port=self.source.port) as client:
            return len(client.xrange(Keys().stream, f"({after}", str(upto)))

    def check(self, disk: StreamId | None, applied: StreamId | None) -> None:
        """Look at where a process went on that found this on its disks."""
        if disk is not None and self.asked:
            begin = self.asked[0]
            assert begin >= disk, "it read again what was settled and on disk"
            assert applied is None or begin <= max(disk, applied), "it passed over something"
            assert begin == (disk if applied is None else min(disk, applied))
            self.resumed += 1
            self.read_again.append(self.entries(begin, self.furthest))
        self.furthest = max([self.furthest, *self.asked])
        self.asked.clear()


async def spawn(config: Path) -> asyncio.subprocess.Process:
    """Start the node's process."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fsm_replication", "run", str(config), "--log-level", "error"
    )


@asynccontextmanager
async def writing(store: RedisSyncEngine, books: Books) -> AsyncIterator[None]:
    """Write to a all the while."""
    writer = Writer("a", store, books, rate_per_sec=RATE_PER_SEC, rng=random.Random(1))
    async with asyncio.TaskGroup() as group:
        group.create_task(writer.run())
        try:
            yield
        finally:
            writer.stop()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
async def test_a_killed_engine_loses_nothing_and_reads_little_again(
    new_redis_server: Callable[[], RedisServer],
    tmp_path: Path,
    full: bool,
    kills: int,
) -> None:
    """If this fails kill -9 of a node costs changes, or all that was read since it was set up."""
    rng = random.Random(7)
    kills = 200 if full and kills == 10 else kills
    # Most die while they connect, copy or catch up; some have flushed their cursors first.
    flushed_first = [number % 5 == 3 for number in range(kills)]
    rng.shuffle(flushed_first)
    site = Killings(new_redis_server(), new_redis_server(), tmp_path)
    books = Books()
    async with (
        FaultProxy(site.source.port, on_request=site.note) as proxy,
        RedisSyncEngine(site.source.url, node_id="a") as source,
        RedisSyncEngine(site.target.url, node_id="b") as target,
    ):
        config = site.write_config(proxy.url)
        disk: StreamId | None = None
        applied: StreamId | None = None
        began = time.monotonic()
        async with writing(source, books):
            for wait_for_flush in flushed_first:
                before, commands = site.peek(), site.commands
                node = await spawn(config)
                await until(lambda seen=commands: site.commands > seen, "the node to connect")  # type: ignore[misc]
                if wait_for_flush:
                    await until(lambda old=before: site.peek() != old, "a flush of the cursor")  # type: ignore[misc]
                await asyncio.sleep(rng.uniform(0.0, 1.5))
                node.send_signal(signal.SIGKILL)
                assert await node.wait() == -signal.SIGKILL
                site.check(disk, applied)
                disk, applied = await site.on_disk(), site.applied()
        wrote_sec = time.monotonic() - began
        commands = site.commands
        node = await spawn(config)
        # All may be there already; until it has come so far SIGTERM would just kill it.
        await until(lambda: site.commands > commands, "the node to connect")

        async def complete() -> bool:
            return not books.losses(await books.holdings({"b": target}))

        try:
            await until_async(complete, "all that was acknowledged at a, at b")
        finally:
            node.send_signal(signal.SIGTERM)
            assert await node.wait() == 0
        site.check(disk, applied)
    assert site.resumed >= kills // 2, "most were killed before they had read anything"
    assert len(books.writes) >= CHANGES_PER_SEC_MIN * wrote_sec
    LOG.info("%d writes; read again after each kill: %s", len(books.writes), site.read_again)
