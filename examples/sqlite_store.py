"""A store of one's own: items in SQLite, read by other nodes through an outbox.

Every change is one transaction of SQLite: the item, the row that tells others of it, and how far the
peer's stream has been taken over. An ``OutboxPublisher`` moves the rows to the node's Redis.

    python examples/sqlite_store.py here.db redis://127.0.0.1:6379 there=redis://10.0.0.2:6379
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from fsm_replication import (
    ApplyResult,
    LastWriterWins,
    MergeError,
    OutboxPublisher,
    OutboxRow,
    Outcome,
    PeerConfig,
    Received,
    ReplicationConfig,
    ReplicationEngine,
    Resolver,
    Stamp,
    SyncEngine,
    SyncItem,
)
from fsm_replication.config import CursorConfig, Settings, StartupConfig
from fsm_replication.items import (
    CONTENT_TYPES,
    DAY_MS,
    EMPTY_HASH,
    NUMBER_MAX,
    check_key,
    content_hash,
    next_stamp,
    resolve,
)
from fsm_replication.ports import Position, StreamId

SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    key TEXT PRIMARY KEY, content BLOB, content_type TEXT, content_hash BLOB, version INTEGER,
    updated_at INTEGER, deleted INTEGER, origin TEXT, forget_at INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS forgettable ON items (forget_at) WHERE forget_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS outbox (number INTEGER PRIMARY KEY AUTOINCREMENT, item BLOB);
CREATE TABLE IF NOT EXISTS positions (peer TEXT PRIMARY KEY, stream_id TEXT, entries INTEGER);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS ttl (
    only INTEGER PRIMARY KEY, ttl_ms INTEGER, known_ms INTEGER, changed_ms INTEGER
);
"""
FIELDS = "key, content, content_type, content_hash, version, updated_at, deleted, origin"
BUSY_TIMEOUT_SEC = 5.0
FORGET_MAX = 100

T = TypeVar("T")
decode_item = msgspec.msgpack.Decoder(SyncItem).decode


class SqliteStore(SyncEngine):
    """Keeps items in a file; it may be opened by several processes at once.

    Use it as an async context manager. Times of tombstones are in seconds and must be those of the
    configuration. Set ``after_commit`` to be told that something changed.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        node_id: str,
        tombstone_ttl_sec: float = 7 * 86_400,
        tombstone_grace_sec: float = 86_400,
        resolver: Resolver | None = None,
    ) -> None:
        self.node_id = node_id
        self.after_commit: Callable[[], None] = lambda: None
        self._path = path
        self._ttl_ms = round(tombstone_ttl_sec * 1000)
        self._grace_ms = round(tombstone_grace_sec * 1000)
        self._resolver = resolver or LastWriterWins()
        # How far back deletes were known when the ttl was changed last, and when that was.
        self._known_ms = self._changed_ms = 0
        # One thread owns the connection: calls never block the event loop and never interleave, and
        # what a cancelled call has begun is still finished there, as a whole.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-store")

    @property
    def resolver(self) -> Resolver:
        """How two live items of one key become one."""
        return self._resolver

    async def __aenter__(self) -> Self:
        await self._in_thread(self._open)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        try:
            await self._in_thread(self._db.close)
        finally:
            self._thread.shutdown(wait=False)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _open(self) -> None:
        self._db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_SEC, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(SCHEMA)
        new = (uuid.uuid4().hex,)
        self._db.execute("INSERT OR IGNORE INTO about VALUES ('incarnation', ?)", new)
        with self._transaction():
            self._take_up_ttl(_now_ms())

    def _take_up_ttl(self, now: int) -> None:
        """Keep tombstones by the ttl of today, and note how far back deletes are known."""
        row = self._db.execute("SELECT ttl_ms, known_ms, changed_ms FROM ttl").fetchone()
        ttl_ms, known_ms, changed_ms = row or (self._ttl_ms, self._ttl_ms, now)
        if ttl_ms != self._ttl_ms:
            # A longer ttl brings nothing back that was forgotten by a shorter one.
            known_ms = min(ttl_ms, known_ms + max(0, now - changed_ms))
            changed_ms = now
            sql = "UPDATE items SET forget_at = max(updated_at + ?, ?) + ? WHERE deleted"
            self._db.execute(sql, (self._ttl_ms, now, self._grace_ms))
        kept = (self._ttl_ms, known_ms, changed_ms)
        self._db.execute("INSERT OR REPLACE INTO ttl VALUES (1, ?, ?, ?)", kept)
        self._known_ms, self._changed_ms = known_ms, changed_ms

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: nobody may write between what is compared and what is set.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # What replication needs.

    async def incarnation(self) -> str:
        """Return the random name this file was given when it was made."""
        return await self._in_thread(self._about, "incarnation")

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Keep what is newer, tell of it in the outbox, and note the position, all or nothing."""
        result = await self._in_thread(self._apply, changes, received)
        self.after_commit()
        return result

    def _apply(self, changes: Sequence[SyncItem], received: Received | None) -> ApplyResult:
        outcomes: list[Outcome] = []
        reasons: dict[int, str] = {}
        live_deleted = live_added = 0
        with self._transaction():
            for change in changes:
                held = self._held(change.key)
                try:
                    made = resolve(self._resolver, held, change)
                except MergeError as error:
                    reasons[len(outcomes)] = str(error)
                    outcomes.append(Outcome.REFUSED)
                    continue
                if made is None or (held is None and self._is_expired(change)):
                    outcomes.append(Outcome.SUPERSEDED)
                    continue
                self._keep(made)
                outcomes.append(Outcome.APPLIED)
                was_live = held is not None and not held.deleted
                live_deleted += made.deleted and was_live
                live_added += not (made.deleted or was_live)
            if received is not None and received.position is not None:
                at, entries = received.position
                row = (received.peer_id, str(at), entries)
                self._db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", row)
            self._forget_old_tombstones()
        return ApplyResult(outcomes, reasons, live_deleted, live_added)

    def deletes_known_ms(self, now_ms: int) -> int:
        """Return for how long before ``now_ms`` every delete is known."""
        return min(self._ttl_ms, self._known_ms + max(0, now_ms - self._changed_ms))

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what is held, tombstones included."""
        return await self._in_thread(lambda: [self._held(key) for key in keys])

    async def stamps(self, keys: Sequence[str]) -> list[Stamp | None]:
        """Return the order tuples of what is held."""
        return [None if item is None else item.stamp for item in await self.get_many(keys)]

    @property
    def keeps_positions(self) -> bool:
        """Return True: they change together with the items."""
        return True

    async def applied_position(self, peer_id: str) -> Position | None:
        """Return the position stored with the last batch from this peer."""
        sql = "SELECT stream_id, entries FROM positions WHERE peer = ?"
        row = await self._in_thread(lambda: self._db.execute(sql, (peer_id,)).fetchone())
        return None if row is None else Position(StreamId.parse(row[0]), row[1])

    async def live_items(self) -> int:
        """Return how many live items are held."""
        sql = "SELECT count(*) FROM items WHERE NOT deleted"
        row = await self._in_thread(lambda: self._db.execute(sql).fetchone())
        return int(row[0])

    # What the application needs.

    async def put(self, key: str, content: bytes, content_type: str = "binary") -> SyncItem:
        """Write an item; returns it as it is held."""
        if content_type not in CONTENT_TYPES:
            raise ValueError(f"content_type is 'binary' or 'json', not {content_type!r}")
        written = await self._in_thread(self._write, key, content, content_type)
        assert written is not None
        self.after_commit()
        return written

    async def delete(self, key: str) -> bool:
        """Delete an item; returns whether there was a live one."""
        tombstone = await self._in_thread(self._write, key, None, "binary")
        self.after_commit()
        return tombstone is not None

    def _write(self, key: str, content: bytes | None, content_type: str) -> SyncItem | None:
        check_key(key)
        with self._transaction():
            held = self._held(key)
            if content is None and (held is None or held.deleted):
                return None
            known = None if held is None else held.stamp
            updated_at, version = next_stamp(known, _now_ms(), key=key)
            digest = EMPTY_HASH if content is None else content_hash(content)
            item = SyncItem(
                key, content or b"", content_type, digest, version, updated_at, content is None,
                self.node_id,
            )  # fmt: skip
            made = resolve(self._resolver, held, item)
            assert made is not None, "a local write is later than what it replaces"
            self._keep(made)
            return made

    async def restamp(self, key: str) -> SyncItem | None:
        """Give a key that a wrong clock has stamped far ahead a stamp of now; None if there is none.

        Ask first what the peers hold: those that hold the far stamp will refuse this one.
        """

        def write() -> SyncItem | None:
            with self._transaction():
                held = self._held(key)
                if held is None or held.updated_at <= _now_ms() + DAY_MS:
                    return None
                version = min(held.version + 1, NUMBER_MAX)
                made = msgspec.structs.replace(held, updated_at=_now_ms(), version=version)
                self._keep(made)
                return made

        made = await self._in_thread(write)
        self.after_commit()
        return made

    # What the publisher needs.

    async def read_outbox(self, limit: int) -> list[OutboxRow]:
        """Return the oldest rows."""
        sql = "SELECT number, item FROM outbox ORDER BY number LIMIT ?"
        rows = await self._in_thread(lambda: self._db.execute(sql, (limit,)).fetchall())
        return [OutboxRow(number, decode_item(item)) for number, item in rows]

    async def forget_outbox(self, numbers: Sequence[int], mark: str) -> None:
        """Remove rows and keep the mark, in one transaction."""

        def forget() -> None:
            with self._transaction():
                rows = [(number,) for number in numbers]
                self._db.executemany("DELETE FROM outbox WHERE number = ?", rows)
                self._db.execute("INSERT OR REPLACE INTO about VALUES ('mark', ?)", (mark,))

        await self._in_thread(forget)

    async def outbox_mark(self) -> str:
        """Return the mark that was kept last."""
        return await self._in_thread(self._about, "mark")

    async def read_items(self, after: str, limit: int) -> list[SyncItem]:
        """Return the next items in the order of keys."""
        sql = f"SELECT {FIELDS} FROM items WHERE key > ? ORDER BY key LIMIT ?"
        rows = await self._in_thread(lambda: self._db.execute(sql, (after, limit)).fetchall())
        return [_item(row) for row in rows]

    # In the thread.

    def _held(self, key: str) -> SyncItem | None:
        sql = f"SELECT {FIELDS} FROM items WHERE key = ?"
        row = self._db.execute(sql, (key,)).fetchone()
        return None if row is None else _item(row)

    def _keep(self, item: SyncItem) -> None:
        """Store an item and the row that tells others of it."""
        forget_at = None
        if item.deleted:
            forget_at = max(item.updated_at + self._ttl_ms, _now_ms()) + self._grace_ms
        row = (*msgspec.structs.astuple(item), forget_at)
        self._db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        encoded = msgspec.msgpack.encode(item)
        self._db.execute("INSERT INTO outbox (item) VALUES (?)", (encoded,))

    def _is_expired(self, change: SyncItem) -> bool:
        return change.deleted and change.updated_at + self._ttl_ms <= _now_ms()

    def _forget_old_tombstones(self) -> None:
        sql = "SELECT key FROM items WHERE forget_at <= ? LIMIT ?"
        keys = self._db.execute(sql, (_now_ms(), FORGET_MAX)).fetchall()
        self._db.executemany("DELETE FROM items WHERE key = ?", keys)

    def _about(self, name: str) -> str:
        row = self._db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return "" if row is None else str(row[0])

    def __repr__(self) -> str:
        return f"<SqliteStore {self.node_id!r} at {self._path}>"


def _item(row: tuple[Any, ...]) -> SyncItem:
    key, content, content_type, digest, version, updated_at, deleted, origin = row
    return SyncItem(key, content, content_type, digest, version, updated_at, bool(deleted), origin)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# A node of it -----------------------------------------------------------------------------------


async def run_node(path: str, redis_url: str, peers: dict[str, str]) -> None:
    """Run a node that takes ``key=value`` lines, and lines ``key`` to delete, from its input."""
    node_id = Path(path).stem
    config = ReplicationConfig(
        local_node_id=node_id,
        peers=[PeerConfig(node_id=name, redis_url=url) for name, url in peers.items()],
        cursor=CursorConfig(sqlite_path=f"{path}.cursors"),
        settings=Settings(startup=StartupConfig(when_no_peer="run")),
    )
    async with (
        SqliteStore(path, node_id=node_id) as store,
        OutboxPublisher(store, redis_url, node_id=node_id) as publisher,
        ReplicationEngine(config, sync_engine=store),
    ):
        store.after_commit = publisher.wake
        while line := await asyncio.to_thread(sys.stdin.readline):
            key, equals, value = line.rstrip("\n").partition("=")
            if equals:
                done = f"version {(await store.put(key, value.encode())).version}"
            else:
                done = "deleted" if await store.delete(key) else "nothing to delete"
            print(f"{key}: {done}", flush=True)
        await publisher.wait_published(timeout_sec=10)


if __name__ == "__main__":
    file, url, *others = sys.argv[1:]
    asyncio.run(run_node(file, url, dict(other.split("=", 1) for other in others)))
