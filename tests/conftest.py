"""Real Redis servers, and whole nodes on them, for tests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, settings

from fsm_replication.batch import BatchBuilder, Part, Selection
from fsm_replication.config import CursorConfig, PeerConfig, ReplicationConfig, Settings
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import ReplicationError
from fsm_replication.items import EMPTY_HASH, LastWriterWins, SyncItem, content_hash
from fsm_replication.layout import FORMAT, Keys, encode_value
from fsm_replication.servers import (
    SERVER_VARIABLE,
    RedisServer,
    describe_redis_server,
    find_redis_server,
)
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine, SyncEngine
from fsm_replication.stream import encode_data, encode_fields
from fsm_replication.tables import Table

pytest_plugins = ["fsm_replication.testing.fixtures"]

DEADLINE_SEC = 20.0
WEEK_MS = 7 * 86_400_000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --full, which takes longer and tries more."""
    parser.addoption("--full", action="store_true", help="try far more cases (several hours)")


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many examples hypothesis tries."""
    quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
    settings.register_profile("quick", max_examples=60, **quiet)  # type: ignore[arg-type]
    settings.register_profile("full", max_examples=1000, **quiet)  # type: ignore[arg-type]
    settings.load_profile("full" if config.getoption("--full") else "quick")
    if config.getoption("--full") and config.option.markexpr == NOT_SLOW:
        config.option.markexpr = ""


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Leave the library's logging as it was: commands that run within a test configure it."""
    logger = logging.getLogger("fsm_replication")
    before = logger.level, logger.propagate, list(logger.handlers), logging.root.manager.disable
    yield
    logger.level, logger.propagate, logger.handlers[:], off = before
    logger.setLevel(logger.level)
    logging.disable(off)


def now_ms() -> int:
    """Return the time of day, in milliseconds since the epoch, which is every local Redis's too."""
    return time.time_ns() // 1_000_000


def put_of(key: str, at: int, content: bytes = b"content", version: int = 1) -> SyncItem:
    """Return a live item of another node."""
    return SyncItem(key, content, "binary", content_hash(content), version, at, False, "far")


def delete_of(key: str, at: int, version: int = 1) -> SyncItem:
    """Return a tombstone of another node."""
    return SyncItem(key, b"", "binary", EMPTY_HASH, version, at, True, "far")


def raw(server: RedisServer) -> redis.Redis:
    """Return a plain client, to look at what the store does not show."""
    return redis.Redis(port=server.port)


# What pyproject.toml sets, unless the command line chooses tests by other marks.
NOT_SLOW = "not slow"
# A test with one of these touches a real server.
SERVER_FIXTURES = {"any_redis_server", "new_redis_server", "real", "redis_server_pool"}
# What a test finds as FSM_REDIS_SERVER that is not marked so; the message of its error shows it.
UNMARKED = "(mark this test with @pytest.mark.server)"

# The longest first: what is left at the end is short then, and no core waits for another.
LONGEST = (
    "test_nodes_converge_whatever_happens",
    "test_a_killed_engine_loses_nothing_and_reads_little_again",
    "test_nothing_is_wrong_in_any_state_that_can_be_reached",
    "test_seeds_keep_every_promise",
    "test_all_views_agree_whatever_happens",
    "test_real_nodes_converge_whatever_happens",
    "test_a_defect_on_two_links_is_told_with_both",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, and mark those that touch a server by their fixtures."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    for item in items:
        if isinstance(item, pytest.Function) and SERVER_FIXTURES & set(item.fixturenames):
            item.add_marker("server")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test, or a process it starts, find no server unless it is marked ``server``.

    Not a fixture: one for each test comes after those that several share.
    """
    if item.get_closest_marker("server"):
        return (yield)
    before = os.environ.get(SERVER_VARIABLE)
    os.environ[SERVER_VARIABLE] = UNMARKED
    try:
        return (yield)
    finally:
        del os.environ[SERVER_VARIABLE]
        if before is not None:
            os.environ[SERVER_VARIABLE] = before


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests ran on a server, and on which."""
    if terminalreporter.config.option.collectonly:
        return
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    for outcome in counts:
        for report in terminalreporter.stats.get(outcome, ()):
            counts[outcome] += "server" in getattr(report, "keywords", ())
    try:
        server = describe_redis_server(find_redis_server())
    except ReplicationError:
        server = "no server"
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    terminalreporter.write_line(f"tests on {server}: {told}")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given."""
    return bool(request.config.getoption("--full"))


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition, not for a time; fail after a deadline that is far too long."""
    deadline = time.monotonic() + DEADLINE_SEC
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"this never came: {what or condition}")
        await asyncio.sleep(0.005)


async def until_async(condition: Callable[[], Awaitable[object]], what: str = "") -> None:
    """Wait for a condition that must be asked for, as ``until`` does."""
    deadline = time.monotonic() + DEADLINE_SEC
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"this never came: {what or condition}")
        await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def no_tasks_left() -> AsyncIterator[None]:
    """Fails a test that leaves tasks of asyncio behind."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks were left behind: {left}"


def counts_entries(server: RedisServer) -> bool:
    """Ask a server whether it counts all entries that a stream ever had (since Redis 7.0)."""
    with redis.Redis(port=server.port) as client:
        client.xadd("counted?", {"f": "v"})
        told: Any = client.execute_command("XINFO", "STREAM", "counted?")
        client.delete("counted?")
    return "entries-added" in told or b"entries-added" in told


class Peer:
    """A node to be read, written by hand: its marker and its stream."""

    def __init__(self, server: RedisServer, node_id: str = "a") -> None:
        self.server = server
        self.node_id = node_id
        self.client = redis.Redis(port=server.port)
        self.sent = 0

    def marker(self) -> dict[str, str | int]:
        """Return the fields of the marker key of a node of ours without a tree."""
        return {
            "node_id": self.node_id,
            "format": FORMAT,
            "layouts": "",
            "tombstone_ttl_ms": WEEK_MS,
            "resolver": LastWriterWins.name,
            "partitions": 0,
            "incarnation": "by hand",
        }

    def write_marker(self, **changes: str | int) -> None:
        """Write the marker key."""
        self.client.hset(Keys().marker, mapping=self.marker() | changes)  # type: ignore[arg-type]

    def item(self, key: str, content: bytes | None, at_ms: int | None = None) -> SyncItem:
        """Return an item, or with None a tombstone, newer than all before it."""
        self.sent += 1
        body = b"" if content is None else content
        at = int(time.time() * 1000) if at_ms is None else at_ms
        return SyncItem(
            key, body, "binary", content_hash(body), self.sent, at, content is None, self.node_id
        )

    def send(self, key: str, content: bytes | None, at_ms: int | None = None) -> SyncItem:
        """Write an item and append it to the stream, as a node does."""
        item = self.item(key, content, at_ms)
        self.client.set(Keys().item(key), encode_value(item, encode_data(item.content)))
        self.send_fields(encode_fields(item))
        return item

    def send_fields(self, fields: list[bytes]) -> str:
        """Append an entry as it is; returns its id."""
        stream_id: bytes = self.client.execute_command("XADD", Keys().stream, "*", *fields)
        return stream_id.decode()

    def entries(self) -> list[list[bytes]]:
        """Return the fields of all entries of the stream, as flat lists."""
        found: Any = self.client.xrange(Keys().stream)
        return [[part for pair in fields.items() for part in pair] for _, fields in found]

    @property
    def counts(self) -> bool:
        """Whether the server counts all entries that its streams ever had (since Redis 7.0)."""
        return counts_entries(self.server)

    def close(self) -> None:
        """Close the connection that writes."""
        self.client.close()


@pytest.fixture
def peer(redis_server: RedisServer) -> Iterator[Peer]:
    """A node of ours to be read, without items."""
    made = Peer(redis_server)
    made.write_marker()
    yield made
    made.close()


@pytest_asyncio.fixture
async def peer_store(redis_server: RedisServer) -> AsyncIterator[RedisSyncEngine]:
    """The store of node a, which is read."""
    async with RedisSyncEngine(redis_server.url, node_id="a") as store:
        yield store


class Nodes:
    """Makes engines whose files are in one folder, and shuts all of them down."""

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        self._stack = stack
        self.folder = folder

    def config(
        self, *peers: PeerConfig, node_id: str = "b", settings: Settings | None = None
    ) -> ReplicationConfig:
        """Return the configuration of a node."""
        return ReplicationConfig(
            local_node_id=node_id,
            peers=peers,
            settings=settings or Settings(),
            cursor=CursorConfig(sqlite_path=str(self.folder / f"{node_id}.db")),
        )

    def engine(
        self,
        *peers: PeerConfig,
        store: SyncEngine | None = None,
        node_id: str = "b",
        settings: Settings | None = None,
    ) -> ReplicationEngine:
        """Return an engine that is not started."""
        engine = ReplicationEngine(
            self.config(*peers, node_id=node_id, settings=settings),
            sync_engine=store if store is not None else MemorySyncEngine(node_id=node_id),
        )
        self._stack.push_async_callback(engine.shutdown)
        return engine


@pytest_asyncio.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """A maker of engines; after the test nothing of them may be left."""
    async with AsyncExitStack() as stack:
        yield Nodes(stack, tmp_path)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"tasks were left behind: {left}"


def peer_config(server: RedisServer, node_id: str = "a") -> PeerConfig:
    """Return the configuration of a peer on a server."""
    return PeerConfig(node_id=node_id, redis_url=server.url)


async def held(store: SyncEngine, *keys: str) -> dict[str, bytes | None]:
    """Return the live content of some keys."""
    items = await store.get_many(keys)
    return {
        key: None if item is None or item.deleted else item.content
        for key, item in zip(keys, items, strict=True)
    }


def all_parts(builder: BatchBuilder, selection: Selection) -> list[Part]:
    """Return all that a selection is made into; no loop may be running."""

    async def collect() -> list[Part]:
        return [part async for part in builder.materialise(selection)]

    return asyncio.run(collect())


def digest(content: bytes) -> bytes:
    """Return the hex digest that a stream entry carries."""
    return hashlib.sha256(content).hexdigest().encode()


def shortest_way(table: Table, start: StrEnum, dest: StrEnum) -> list[str]:
    """Return the fewest triggers that lead from one state to another."""
    ways: dict[StrEnum, list[str]] = {start: []}
    queue = [start]
    while dest not in ways:
        here = queue.pop(0)
        for trigger in table.legal(here):
            row = table.move(here, trigger)
            assert row is not None
            if row.dest not in ways:
                ways[row.dest] = [*ways[here], trigger]
                queue.append(row.dest)
    return ways[dest]
