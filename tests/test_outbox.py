"""The publisher: every change reaches Redis once and in order, whatever crashes and whenever."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import until, until_async
from sqlite_store import SqliteStore

from fsm_replication import (
    OutboxPublisher,
    OutboxRow,
    Publisher,
    RedisSyncEngine,
    StampAheadError,
    StoreError,
    StoreTimeoutError,
    SyncItem,
)
from fsm_replication.errors import ConfigError
from fsm_replication.items import Resolver, content_hash
from fsm_replication.layout import Keys, decode_item, encode_stamp
from fsm_replication.merkle import MerkleTree
from fsm_replication.ports import Clock, PackedArguments, SystemClock
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.retry import RetryProfile
from fsm_replication.servers import RedisServer
from fsm_replication.stores import Outbox
from fsm_replication.stream import DataDecoder, parse_entry
from fsm_replication.testing.contract.base import dead, live, now_ms
from fsm_replication.testing.contract.tree import walk_tree
from fsm_replication.transport import RedisConnection, RedisTransport

pytestmark = pytest.mark.usefixtures("no_tasks_left")

SOON_SEC = 20.0
QUICK = RetryProfile(0.01, 1.5, 0.05)


class Crash(BaseException):
    """The process ends here."""


class Fuse:
    """Ends a publisher when it comes past a point for the n-th time; without a number, never."""

    def __init__(self, number: int | None = None) -> None:
        self._left = number
        self.burnt: str | None = None

    def at(self, point: str) -> None:
        """Come past a point."""
        if self._left is None:
            return
        if self._left == 0:
            self._left = None
            self.burnt = point
            raise Crash(point)
        self._left -= 1


class FusedOutbox:
    """An outbox that a process which ends before or after each call is seen by."""

    def __init__(self, store: SqliteStore, fuse: Fuse) -> None:
        self._store = store
        self._fuse = fuse

    @property
    def resolver(self) -> Resolver:
        """That of the store."""
        return self._store.resolver

    async def read_outbox(self, limit: int) -> Sequence[OutboxRow]:
        """Read, and then perhaps end."""
        rows = await self._store.read_outbox(limit)
        self._fuse.at("rows read")
        return rows

    async def forget_outbox(self, numbers: Sequence[int], mark: str) -> None:
        """End before, or after."""
        self._fuse.at("before forget")
        await self._store.forget_outbox(numbers, mark)
        self._fuse.at("after forget")

    async def outbox_mark(self) -> str:
        """Read, and then perhaps end."""
        mark = await self._store.outbox_mark()
        self._fuse.at("mark read")
        return mark

    async def read_items(self, after: str, limit: int) -> Sequence[SyncItem]:
        """Read, and then perhaps end."""
        items = await self._store.read_items(after, limit)
        self._fuse.at("items read")
        return items


class FusedTransport(RedisTransport):
    """Connections on which a process ends before a command is sent, or before its reply comes."""

    def __init__(self, fuse: Fuse, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self._fuse = fuse

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> RedisConnection:
        """Connect."""
        made = await super().connect(url, timeout_sec=timeout_sec, name=name)
        call, fuse = made.call, self._fuse

        async def fused(
            *args: bytes | str | int,
            timeout_sec: float | None = None,
            tail: PackedArguments | None = None,
        ) -> Any:
            fuse.at("before apply")
            reply = await call(*args, timeout_sec=timeout_sec, tail=tail)
            fuse.at("after apply")
            return reply

        made.call = fused  # type: ignore[method-assign]
        return made


class Node:
    """A store in a file, and what is in the node's Redis."""

    def __init__(self, server: RedisServer, store: SqliteStore) -> None:
        self.server = server
        self.store = store
        self.client = redis.Redis(port=server.port)

    def publisher(self, fuse: Fuse | None = None, **more: Any) -> OutboxPublisher:
        """Return a publisher, as a new process has it."""
        outbox: Outbox = self.store if fuse is None else FusedOutbox(self.store, fuse)
        if fuse is not None:
            more["transport"] = FusedTransport(fuse)
        options: dict[str, Any] = {"node_id": "n", "batch_items": 2, "retries": QUICK} | more
        return OutboxPublisher(outbox, self.server.url, **options)

    async def publish(self) -> int:
        """Publish all there is in a process of its own; returns how often that was everything."""
        async with self.publisher() as publisher:
            await publisher.wait_published(SOON_SEC)
            return publisher.republished

    async def crash(self, fuse: Fuse, **more: Any) -> bool:
        """Publish until the fuse burns or all is published; returns whether it burnt."""
        publisher = self.publisher(fuse, **more)
        await publisher.open()
        assert publisher._task is not None
        done = asyncio.create_task(publisher.wait_published(SOON_SEC))
        await asyncio.wait((publisher._task, done), return_when=asyncio.FIRST_COMPLETED)
        burnt = fuse.burnt is not None
        if burnt:
            with pytest.raises(Crash):
                await publisher.close()
            # It may have been told just before that all is published.
            (told,) = await asyncio.gather(done, return_exceptions=True)
            assert told is None or isinstance(told, StoreError)
        else:
            await done
            await publisher.close()
        return burnt

    def stream(self) -> list[tuple[str, int, int, bool]]:
        """Return what the stream tells, in order."""
        found: Any = self.client.xrange(Keys().stream)
        seen = []
        for _, fields in found:
            entry = parse_entry([part for pair in fields.items() for part in pair])
            seen.append((entry.key, entry.updated_at, entry.version, entry.deleted))
        return seen

    def items(self) -> dict[str, SyncItem]:
        """Return the items in Redis."""
        decoder, found = DataDecoder(1_000_000), dict[str, SyncItem]()
        for raw in self.client.scan_iter("item:*"):
            key = raw.decode().removeprefix("item:")
            value = self.client.get(raw)
            assert isinstance(value, bytes)
            found[key] = decode_item(key, value, decoder)
        return found

    async def check(self) -> None:
        """Assert that Redis holds what the store holds, tree included, and nothing waits."""
        assert await self.store.read_outbox(10) == []
        held = {item.key: item for item in await self.store.read_items("", 10_000)}
        assert self.items() == held
        async with RedisSyncEngine(
            self.server.url, node_id="n", resolver=self.store.resolver
        ) as reader:
            assert reader.tree is not None
            root, leaves = await walk_tree(reader.tree)
            assert await reader.live_items() == await self.store.live_items()
        assert leaves == {item.key: encode_stamp(item) for item in held.values()}
        model = MerkleTree()
        for item in held.values():
            model.set(item.key, encode_stamp(item))
        assert root == model.root()

    async def write(self, number: int) -> list[SyncItem]:
        """Change the store in each way there is; returns the changes in order."""
        changes = [
            await self.store.put(f"put.{number}", b"[%d]" % number),
            await self.store.put("again", b"[1]", "json"),
        ]
        arrived = live(f"far.{number}", b"x" * 200)
        await self.store.apply_many([arrived, arrived, live("again", b"old", 5)])
        changes.append(arrived)
        assert await self.store.delete("again")
        changes += [item for item in await self.store.get_many(["again"]) if item is not None]
        changes.append(await self.store.put("again", b"[2]", "json"))
        return changes


def told(changes: Sequence[SyncItem]) -> list[tuple[str, int, int, bool]]:
    """Return changes as the stream tells them."""
    return [(item.key, item.updated_at, item.version, item.deleted) for item in changes]


POINTS = {
    "mark read", "rows read", "before apply", "after apply", "before forget", "after forget",
}  # fmt: skip


async def test_a_crash_at_any_point_publishes_each_change_once_and_in_order(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a crash loses a change, publishes one twice, or in another order."""
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        assert await node.publish() == 1, "the first time everything is published"
        changes: list[SyncItem] = []
        burnt: set[str] = set()
        number = 0
        while True:
            changes += await node.write(number)
            fuse = Fuse(number)
            if not await node.crash(fuse):
                break
            assert fuse.burnt is not None
            burnt.add(fuse.burnt)
            assert await node.publish() == 0, f"needless work after {fuse.burnt}"
            await node.check()
            assert node.stream() == told(changes), f"after {fuse.burnt}"
            number += 1
        assert burnt == POINTS
        assert number > 12, "three batches with five points each were tried"
        await node.check()
        node.client.close()


async def test_a_process_that_crashes_again_and_again_still_comes_through(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a crash while it recovers undoes what the recovery did before."""
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        await node.publish()
        changes = [change for number in range(3) for change in await node.write(number)]
        # The largest number that still lets each attempt finish a batch comes last.
        for number in (*range(6), *range(6), 6, 6, 6):
            assert await node.crash(Fuse(number))
        assert await node.publish() == 0
        await node.check()
        assert node.stream() == told(changes)
        node.client.close()


async def test_a_crash_while_everything_is_published_loses_nothing(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a node that is published for the first time is never published whole."""
    for number in range(100):
        async with SqliteStore(tmp_path / f"{number}.db", node_id="n") as store:
            node = Node(redis_server, store)
            node.client.flushall()
            await node.write(1)
            burnt = await node.crash(Fuse(number))
            await node.publish()
            await node.check()
            seen = node.stream()
            assert len(set(seen)) == len(seen), "nothing is published twice"
            node.client.close()
        if not burnt:
            break
    assert number > 10


async def test_what_a_merging_store_deleted_does_not_come_back_by_a_crash(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails an older version that is moved again is merged with what followed a delete."""
    async with SqliteStore(tmp_path / "n.db", node_id="n", resolver=GrowOnlySet()) as store:
        node = Node(redis_server, store)
        await node.publish()
        number = 0
        while True:
            await node.write(number)
            # Content that is merged with what is held keeps the stamp of the larger.
            at = now_ms()
            await store.submit(live("set", b'["b"]', at + 10_000, content_type="json"))
            await store.submit(live("set", b'["%d"]' % number, at, content_type="json"))
            # One batch, so that what came before a delete is moved again after what came later.
            if not await node.crash(Fuse(number), batch_items=100):
                break
            await node.publish()
            await node.check()
            number += 1
        assert number > 5
        (again,) = await store.get_many(["again"])
        assert again is not None
        assert again.content == b"[2]"
        await node.check()
        node.client.close()


async def test_a_redis_that_came_back_empty_or_older_is_filled_again(
    new_redis_server: Callable[..., RedisServer], tmp_path: Path
) -> None:
    """If this fails what Redis lost stays unpublished until it is written again."""
    server = new_redis_server()
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(server, store)
        async with node.publisher(poll_sec=0.05) as publisher:
            store.after_commit = publisher.wake
            await node.write(1)
            await publisher.wait_published(SOON_SEC)
            # Keys that stand right after the last of a page, and begin with it.
            for key in ("again.more", "far.1.more", "far.1.more.2", "put.1.more"):
                await store.put(key, b"[1]")
            await publisher.wait_published(SOON_SEC)
            node.client.save()
            await node.write(2)
            await publisher.wait_published(SOON_SEC)
            await node.check()
            assert publisher.republished == 1
            server.kill()
            server.start()
            await until(lambda: publisher.republished == 2, "everything anew, as it was saved")
            await publisher.wait_published(SOON_SEC)
            await node.check()
            server.kill()
            (server.folder / "dump.rdb").unlink()
            server.start()
            await until(lambda: publisher.republished == 3, "everything anew, into nothing")
            await publisher.wait_published(SOON_SEC)
            await node.check()
        assert await node.publish() == 0
        node.client.close()


async def test_a_redis_that_came_back_older_is_noticed_before_what_waits_is_moved(
    new_redis_server: Callable[..., RedisServer], tmp_path: Path
) -> None:
    """If this fails a batch hides that Redis has lost the batches before it."""
    server = new_redis_server()
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(server, store)
        async with node.publisher(poll_sec=3600) as publisher:
            store.after_commit = publisher.wake
            await node.write(1)
            await publisher.wait_published(SOON_SEC)
            node.client.save()
            await node.write(2)
            await publisher.wait_published(SOON_SEC)
            server.kill()
            await node.write(3)
            await until(lambda: publisher.last_error is not None, "it tries in vain")
            server.start()
            await publisher.wait_published(SOON_SEC)
            await node.check()
            assert publisher.republished == 2
        node.client.close()


@pytest.mark.parametrize("opened_by", ["the publisher", "another process"])
async def test_a_redis_that_was_emptied_under_it_is_noticed(
    redis_server: RedisServer, tmp_path: Path, opened_by: str
) -> None:
    """If this fails FLUSHALL leaves a node unreadable, or in part, until its publisher restarts."""
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        # One that is never idle has no time to look whether Redis is as it was left.
        async with node.publisher(poll_sec=3600) as publisher:
            store.after_commit = publisher.wake
            await node.write(1)
            await publisher.wait_published(SOON_SEC)
            node.client.flushall()
            if opened_by == "another process":
                async with RedisSyncEngine(redis_server.url, node_id="n"):
                    pass
            # What is written first goes to a Redis without marker.
            await node.write(2)
            await until(lambda: publisher.republished == 2, "everything anew")
            await publisher.wait_published(SOON_SEC)
            await node.check()
            assert node.client.exists(Keys().marker)
        node.client.close()


async def test_a_restored_backup_of_the_store_is_published_again(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a store that came back older is taken for the one that was published last."""
    path = tmp_path / "n.db"
    async with SqliteStore(path, node_id="n") as store:
        node = Node(redis_server, store)
        await node.write(1)
        await node.publish()
    shutil.copy(path, tmp_path / "backup.db")
    async with SqliteStore(path, node_id="n") as store:
        node = Node(redis_server, store)
        lost = await node.write(2)
        await node.publish()
        lost += await node.write(3)
        await node.publish()
    shutil.copy(tmp_path / "backup.db", path)
    async with SqliteStore(path, node_id="n") as store:
        restored = Node(redis_server, store)
        assert await restored.publish() == 1
        # What it lost comes back from peers, who can still read it in Redis.
        assert restored.items().keys() >= {change.key for change in lost}
        written = await store.put("put.1", b"[new]")
        assert await restored.publish() == 0
        assert restored.items()["put.1"] == written
        restored.client.close()
    node.client.close()


async def test_two_publishers_do_no_harm(redis_server: RedisServer, tmp_path: Path) -> None:
    """If this fails two processes that both publish spoil what is published."""
    async with (
        SqliteStore(tmp_path / "n.db", node_id="n") as store,
        SqliteStore(tmp_path / "n.db", node_id="n") as other,
    ):
        node, second = Node(redis_server, store), Node(redis_server, other)
        async with node.publisher(poll_sec=0.02) as a, second.publisher(poll_sec=0.02) as b:
            changes = [change for number in range(5) for change in await node.write(number)]
            await a.wait_published(SOON_SEC)
            await b.wait_published(SOON_SEC)
        await node.publish()
        await node.check()
        seen = node.stream()
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(told(changes))
        for each in (node, second):
            each.client.close()


async def test_without_redis_writes_go_on_and_are_published_later(
    new_redis_server: Callable[..., RedisServer], tmp_path: Path
) -> None:
    """If this fails an outage of a node's Redis stops its application, or loses its writes."""
    server = new_redis_server()
    server.kill()
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(server, store)
        async with node.publisher() as publisher:
            await node.write(1)
            with pytest.raises(StoreTimeoutError, match=r"not empty within 0\.1 s.*127\.0\.0\.1"):
                await publisher.wait_published(0.1)
            assert isinstance(publisher.last_error, StoreError)
            server.start()
            await publisher.wait_published(SOON_SEC)
            assert publisher.last_error is None
            await node.check()
            server.kill()
            changes = await node.write(2)
            server.start()
            await until_async(lambda: _all_told(node, changes), "what was written meanwhile")
        node.client.close()


async def _all_told(node: Node, changes: Sequence[SyncItem]) -> bool:
    try:
        return {change.key for change in changes} <= node.items().keys()
    except redis.ConnectionError:
        return False


async def test_what_cannot_be_published_stops_nothing_else(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails one bad row keeps all later changes from the peers for ever."""
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        await node.publish()
        node.client.rpush(Keys().item("taken"), "not ours")
        fine = live("fine")
        bad = [
            live("taken"),
            live("x" * 2000),
            live("type", content_type="text"),
            live("range", version=2**53),
            SyncItem("hash", b"content", "binary", content_hash(b"other"), 1, now_ms()),
        ]
        await store.apply_many([*bad, fine, dead("gone")])
        caplog.set_level(logging.ERROR, "fsm_replication.outbox")
        async with node.publisher() as publisher:
            await publisher.wait_published(SOON_SEC)
            assert publisher.refused == len(bad)
            assert publisher.published == len(bad) + 2
        assert len(caplog.records) == len(bad)
        assert told([fine]) == node.stream()[:1]
        assert await store.read_outbox(10) == []
        node.client.close()


@pytest.mark.parametrize("in_one_batch", [False, True])
async def test_a_stamp_far_ahead_that_the_store_gave_up_is_given_up_by_redis(
    redis_server: RedisServer, tmp_path: Path, in_one_batch: bool
) -> None:
    """If this fails peers hear for years nothing of a key whose writer's clock was wrong once."""
    far = live("far", b"content", at_ms=now_ms() + 400 * 86_400_000)
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        await store.apply_many([far, live("old", at_ms=5)])
        if not in_one_batch:
            await node.publish()
        for write in (store.put("far", b"never"), store.delete("far")):
            with pytest.raises(StampAheadError):
                await write
        mended = await store.restamp("far")
        assert mended is not None
        assert await store.restamp("far") is None
        assert await store.restamp("none") is None
        # What is only older is no reason to go back.
        await store.apply_many([live("old", b"newer", at_ms=6)])
        await node.publish()
        await node.check()
        after = await store.put("far", b"after")
        await node.publish()
        await node.check()
        stream = [one for one in node.stream() if one[0] == "far"]
        assert stream[-2:] == told([mended, after])
        # A reader that comes a day late must not find it.
        assert told([far])[0] not in stream
        node.client.close()


class FailingOutbox(FusedOutbox):
    """An outbox whose database is sometimes locked, and sometimes gives no answer."""

    def __init__(self, store: SqliteStore, clock: Clock) -> None:
        super().__init__(store, Fuse())
        self.failures = 3
        self.hangs = 1
        self._clock = clock

    async def read_outbox(self, limit: int) -> Sequence[OutboxRow]:
        """Fail, hang, and then read."""
        if self.failures:
            self.failures -= 1
            raise sqlite3.OperationalError("database is locked")
        if self.hangs:
            self.hangs -= 1
            await self._clock.sleep(3600)
        return await super().read_outbox(limit)


class SlowOutbox(FusedOutbox):
    """An outbox that has read its rows some time before it returns them."""

    def __init__(self, store: SqliteStore) -> None:
        super().__init__(store, Fuse())
        self.has_read = asyncio.Event()
        self.may_return = asyncio.Event()

    async def read_outbox(self, limit: int) -> Sequence[OutboxRow]:
        """Read, and wait until it may return."""
        rows = await super().read_outbox(limit)
        self.has_read.set()
        await self.may_return.wait()
        return rows


async def test_published_means_what_was_committed_before_the_question(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails an answer comes from an outbox that was read before the write."""
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        outbox = SlowOutbox(store)
        async with OutboxPublisher(outbox, redis_server.url, node_id="n") as publisher:
            await outbox.has_read.wait()
            written = await store.put("k", b"[1]")
            asked = asyncio.create_task(publisher.wait_published(SOON_SEC))
            await asyncio.sleep(0)
            outbox.may_return.set()
            await asked
            assert node.stream() == told([written])
        node.client.close()


async def test_an_outbox_that_fails_is_asked_again(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails a locked database ends publishing for good, or in silence."""
    caplog.set_level(logging.WARNING, "fsm_replication.outbox")
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        node = Node(redis_server, store)
        await node.write(1)
        outbox = FailingOutbox(store, SystemClock())
        async with OutboxPublisher(
            outbox, redis_server.url, node_id="n", retries=QUICK, timeout_sec=0.3
        ) as publisher:
            await publisher.wait_published(SOON_SEC)
        assert (outbox.failures, outbox.hangs) == (0, 0)
        await node.check()
        tracebacks = [record.exc_info is not None for record in caplog.records]
        assert tracebacks == [True, True, True, False], "an error nobody foresaw shows where"
        node.client.close()


async def test_it_ends_when_it_is_told_to(redis_server: RedisServer, tmp_path: Path) -> None:
    """If this fails a publisher that waits for its store or Redis cannot be closed."""
    async with SqliteStore(tmp_path / "n.db", node_id="n") as store:
        outbox = FailingOutbox(store, SystemClock())
        outbox.failures, outbox.hangs = 0, 1
        publisher = OutboxPublisher(outbox, redis_server.url, node_id="n")
        with pytest.raises(StoreError, match="not open"):
            await publisher.wait_published(SOON_SEC)
        await publisher.open()
        await publisher.open()
        await until(lambda: not outbox.hangs, "it asks the outbox")
        waiting = asyncio.create_task(publisher.wait_published(SOON_SEC))
        await asyncio.sleep(0)
        await publisher.close()
        with pytest.raises(StoreError, match="not open"):
            await waiting
        await publisher.close()
        # And it can be opened again.
        async with publisher:
            await publisher.wait_published(SOON_SEC)


async def test_stores_and_publishers_are_what_they_claim(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """If this fails a store cannot be handed to what needs it, or a bad argument is found late."""
    store = SqliteStore(tmp_path / "n.db", node_id="n")
    publisher: Publisher = OutboxPublisher(store, redis_server.url, node_id="n", redis_prefix="p:")
    assert isinstance(store, Outbox)
    assert isinstance(publisher, Publisher)
    assert publisher.keys == Keys("p:")
    assert publisher.tree is not None
    async with RedisSyncEngine(redis_server.url, node_id="n") as both, store:
        as_publisher: Publisher = both
        await as_publisher.wait_published(SOON_SEC)
        assert not isinstance(both, Outbox)
    assert "s3cret" not in repr(OutboxPublisher(store, "redis://u:s3cret@h", node_id="n"))
    with pytest.raises(ConfigError):
        OutboxPublisher(store, "http://nowhere", node_id="n")
    for wrong in ({"batch_items": 0}, {"poll_sec": 0}, {"timeout_sec": 0}):
        with pytest.raises(ValueError, match="batch_items is"):
            OutboxPublisher(store, redis_server.url, node_id="n", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no end"):
        OutboxPublisher(
            store, redis_server.url, node_id="n", retries=RetryProfile(1, 2, 3, attempts=3)
        )
