"""The cursor store: how far each peer was read, and what could not be applied, in one SQLite file.

Theory of operation. Every change is one transaction, run to its end by a task of the store's own,
so that a caller that is cancelled or out of time leaves no transaction open: what it asked for is
either there or not. WAL with ``synchronous=NORMAL`` is used: a killed process loses nothing, and a
loss of power may lose the latest transactions but never their order, so a cursor on disk is never
ahead of the dead letters that it passes; it only lags, and what it lags is read again.

One engine at a time: an advisory lock (flock) on ``<file>.lock`` is held while the store is open.
It belongs to the open file and not to the process, so two engines in one process exclude each
other too, and the kernel drops it whatever end the process takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiosqlite
import msgspec

from fsm_replication.errors import AlreadyRunningError, CursorStoreError
from fsm_replication.ports import (
    BootstrapRow,
    Clock,
    Cursor,
    DeadLetter,
    GapRow,
    PeerRecord,
    Position,
    StreamId,
    SystemClock,
)

__all__ = ("SqliteCursorStore",)

SCHEMA_VERSION: Final = 1
APPLICATION_ID: Final = 0x46534D52  # "FSMR"
MEMORY: Final = ":memory:"
GAPS_KEPT: Final = 10_000
LOCKED_WAIT_MS: Final = 100
# Beyond these a code of SQLite says that waiting may help.
_MAY_PASS: Final = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
     sqlite3.SQLITE_READONLY}
)  # fmt: skip
_T = TypeVar("_T")

_SCHEMA: Final = """
CREATE TABLE peers (
    peer_id TEXT PRIMARY KEY,
    stream_id TEXT,
    entries_read INTEGER,
    incarnation TEXT,
    operator_pause INTEGER NOT NULL DEFAULT 0,
    synced INTEGER NOT NULL DEFAULT 0,
    agreed_at_ms INTEGER
);
CREATE TABLE bootstraps (
    peer_id TEXT PRIMARY KEY,
    stream_id TEXT NOT NULL,
    entries_read INTEGER,
    walk TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    reason TEXT NOT NULL
);
CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    peer_id TEXT NOT NULL,
    stream_id TEXT NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    key TEXT,
    fields BLOB,
    size INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    UNIQUE (peer_id, stream_id)
);
CREATE TABLE gaps (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    peer_id TEXT NOT NULL,
    found_at_ms INTEGER NOT NULL,
    missed INTEGER,
    reason TEXT NOT NULL,
    healed_at_ms INTEGER,
    healed_by TEXT NOT NULL
);
CREATE INDEX gaps_by_peer ON gaps (peer_id, id);
"""

_SET_CURSOR: Final = """
INSERT INTO peers (peer_id, stream_id, entries_read, incarnation) VALUES (?, ?, ?, ?)
ON CONFLICT (peer_id) DO UPDATE SET stream_id = excluded.stream_id,
    entries_read = excluded.entries_read, incarnation = excluded.incarnation
"""
_ADD_LETTER: Final = """
INSERT INTO dead_letters (peer_id, stream_id, reason, detail, key, fields, size, at_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (peer_id, stream_id) DO UPDATE SET reason = excluded.reason,
    detail = excluded.detail, key = excluded.key, fields = excluded.fields, size = excluded.size
"""
_GAP_COLUMNS: Final = "peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, id"
_LETTER_COLUMNS: Final = "peer_id, stream_id, reason, detail, key, fields, size, at_ms, id"


class SqliteCursorStore:
    """Keeps cursors, dead letters and the loss ledger in the file at ``path``.

    ``timeout_sec`` bounds every call. ":memory:" keeps nothing. ``read_only`` opens an existing
    file beside a running engine, without the lock.
    """

    def __init__(
        self,
        path: str,
        *,
        wal_mode: bool = True,
        timeout_sec: float = 5.0,
        clock: Clock | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self._wal_mode = wal_mode
        self._timeout_sec = timeout_sec
        self._clock = clock or SystemClock()
        self._read_only = read_only
        self._connection: aiosqlite.Connection | None = None
        self._lock_file: int | None = None
        self._inode: tuple[int, int] | None = None
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    # Opening and closing.

    async def open(self) -> None:
        """Lock and open the file, and bring its schema up to date.

        :raises AlreadyRunningError: if another engine holds it.
        :raises CursorStoreError: if it cannot be used; the message says what to do.
        """
        if self._connection is not None:
            raise CursorStoreError(f"{self.path} is open already", path=self.path)
        try:
            self._check_place()
            if self.path != MEMORY and not self._read_only:
                self._lock()
            await self._bounded(self._open())
        except BaseException:
            await self.close()
            raise

    def _check_place(self) -> None:
        if self.path == MEMORY:
            return
        path = Path(self.path)
        if path.is_dir():
            raise self._error("it is a directory; cursor.sqlite_path names a file")
        if not path.parent.is_dir():
            raise self._error(f"the directory {path.parent} does not exist; create it")
        if self._read_only and not path.exists():
            raise self._error("there is no such file; has a node run with it?")
        if not self._read_only:
            if path.exists() and not os.access(path, os.W_OK):
                raise self._error("it is read-only; make it writable for this user")
            if not os.access(path.parent, os.W_OK):
                raise self._error(f"the directory {path.parent} is read-only; make it writable")

    def _lock(self) -> None:
        # The lock file is never removed: whoever opened it just before would hold a lock on a file
        # that nobody else can see.
        lock_path = f"{os.path.realpath(self.path)}.lock"
        try:
            handle = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._error(f"its lock file {lock_path} cannot be opened: {error}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise AlreadyRunningError(
                f"{self.path} is in use by another engine"
                + (f", process {holder}" if holder else "")
                + "; each engine needs a cursor file of its own",
                path=self.path,
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock_file = handle

    async def _open(self) -> None:
        address = self._address()
        connector = aiosqlite.connect(
            address, isolation_level=None, uri=self.path != MEMORY, timeout=LOCKED_WAIT_MS / 1000
        )
        with self._mapped():
            self._connection = await connector
            connection = self._connection
            version, application = await self._retry_locked(lambda: self._identify(connection))
            if application not in (0, APPLICATION_ID):
                raise self._error("it is a database of another application")
            if version > SCHEMA_VERSION:
                raise self._error(
                    f"it was written by a newer version (schema {version}, this one knows"
                    f" {SCHEMA_VERSION}); upgrade fsm_replication"
                )
            if not self._read_only:
                await self._retry_locked(lambda: self._prepare(connection, version))
        if self.path != MEMORY:
            self._inode = self._identity()

    def _address(self) -> str:
        if self.path == MEMORY:
            return MEMORY
        mode = "?mode=ro" if self._read_only else ""
        return f"file:{quote(str(Path(self.path).absolute()))}{mode}"

    async def _identify(self, connection: aiosqlite.Connection) -> tuple[int, int]:
        version = await _one(connection, "PRAGMA user_version")
        application = await _one(connection, "PRAGMA application_id")
        tables = await _one(connection, "SELECT count(*) FROM sqlite_master")
        if version == 0 and application == 0 and tables and not self._read_only:
            raise self._error("it is a database of another application")
        return version, application

    async def _prepare(self, connection: aiosqlite.Connection, version: int) -> None:
        mode = "WAL" if self._wal_mode else "DELETE"
        await connection.execute_fetchall(f"PRAGMA journal_mode = {mode}")
        level = "NORMAL" if self._wal_mode else "FULL"
        await connection.execute_fetchall(f"PRAGMA synchronous = {level}")
        if version < SCHEMA_VERSION:
            await connection.executescript(
                f"BEGIN IMMEDIATE;{_SCHEMA}"
                f"PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {SCHEMA_VERSION};COMMIT;"
            )

    async def _retry_locked(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Try again while another process holds SQLite's own lock; bounded by the caller."""
        while True:
            try:
                return await work()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (
                    sqlite3.SQLITE_BUSY,
                    sqlite3.SQLITE_LOCKED,
                ):
                    raise
            await self._clock.sleep(LOCKED_WAIT_MS / 1000)

    async def close(self) -> None:
        """Finish what runs, checkpoint, and release everything; a second call does nothing."""
        while self._running:
            await asyncio.wait(tuple(self._running))
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                if self._wal_mode and not self._read_only:
                    # A reader beside us may keep the log from being emptied: that is no harm.
                    with contextlib.suppress(sqlite3.Error):
                        await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
                with self._mapped():
                    await connection.close()
        finally:
            handle, self._lock_file = self._lock_file, None
            if handle is not None:
                os.close(handle)

    # Running a piece of work.

    async def _bounded(self, work: Any) -> Any:
        """Run ``work`` as a task of our own: cancelled callers do not cut it in two."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._forget)
        try:
            async with self._clock.timeout(self._timeout_sec):
                return await asyncio.shield(task)
        except TimeoutError:
            if self._connection is None:
                task.cancel()
            raise CursorStoreError(
                f"{self.path} gave no answer within {self._timeout_sec:g} s",
                path=self.path,
                retryable=True,
            ) from None

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Whoever waited has the error; if nobody did any more, nobody misses it.
            task.exception()

    async def _transact(self, work: Callable[[aiosqlite.Connection], Awaitable[_T]]) -> _T:
        result: _T = await self._bounded(self._in_transaction(work))
        return result

    async def _in_transaction(self, work: Callable[[aiosqlite.Connection], Awaitable[_T]]) -> _T:
        async with self._turn:
            connection = self._usable()
            with self._mapped():
                await self._retry_locked(
                    lambda: connection.execute_fetchall(
                        "BEGIN" if self._read_only else "BEGIN IMMEDIATE"
                    )
                )
                try:
                    result = await work(connection)
                    await connection.execute_fetchall("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        await connection.execute_fetchall("ROLLBACK")
                    raise
                return result

    def _usable(self) -> aiosqlite.Connection:
        if self._connection is None:
            raise self._error("it is not open")
        if self._inode is not None and self._identity() != self._inode:
            raise self._error("it was removed or replaced while in use; restart the engine")
        return self._connection

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = Path(self.path).stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    @contextlib.contextmanager
    def _mapped(self) -> Any:
        """Turn what sqlite3 raises into CursorStoreError."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            may_pass = code is not None and code & 0xFF in _MAY_PASS
            hint = ""
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                hint = "; move it away and start again: peers are then copied anew"
            if code == sqlite3.SQLITE_FULL:
                hint = "; free some space"
            raise CursorStoreError(
                f"{self.path} cannot be used: {error}{hint}", path=self.path, retryable=may_pass
            ) from error

    def _error(self, what: str) -> CursorStoreError:
        return CursorStoreError(f"{self.path} cannot be used: {what}", path=self.path)

    # The calls of the port.

    async def load(self, peer_id: str) -> PeerRecord:
        """Return what is known of a peer; an unknown peer has an empty record."""

        async def work(db: aiosqlite.Connection) -> PeerRecord:
            rows = await _rows(
                db,
                "SELECT stream_id, entries_read, incarnation, operator_pause, synced, agreed_at_ms"
                " FROM peers WHERE peer_id = ?",
                (peer_id,),
            )
            copying = await _rows(
                db,
                "SELECT stream_id, entries_read, walk, incarnation, reason FROM bootstraps"
                " WHERE peer_id = ?",
                (peer_id,),
            )
            gaps = await _rows(
                db,
                f"SELECT {_GAP_COLUMNS} FROM gaps WHERE peer_id = ? AND healed_at_ms IS NULL"
                " ORDER BY id",
                (peer_id,),
            )
            letters = await _one(
                db, "SELECT count(*) FROM dead_letters WHERE peer_id = ?", (peer_id,)
            )
            stream, read, incarnation, paused, synced, agreed = (
                rows[0] if rows else (None, None, None, 0, 0, None)
            )
            cursor = None
            if stream is not None:
                cursor = Cursor(Position(StreamId.parse(stream), read), incarnation)
            bootstrap = None
            if copying:
                head, count, walk, copied_into, reason = copying[0]
                position = Position(StreamId.parse(head), count)
                bootstrap = BootstrapRow(position, walk, copied_into, reason)
            return PeerRecord(
                cursor=cursor,
                bootstrap=bootstrap,
                operator_pause=bool(paused),
                synced=bool(synced),
                agreed_at_ms=agreed,
                gaps=tuple(GapRow(*gap) for gap in gaps),
                dead_letters=letters,
            )

        return await self._transact(work)

    async def save(self, cursors: Sequence[tuple[str, Cursor]]) -> None:
        """Store the settled cursors of several peers in one transaction."""

        async def work(db: aiosqlite.Connection) -> None:
            await _write(db, _SET_CURSOR, [_cursor_row(peer, c) for peer, c in cursors])

        await self._transact(work)

    async def settle(
        self, peer_id: str, cursor: Cursor | None, letters: Sequence[DeadLetter], *, keep: int
    ) -> int:
        """Store dead letters and the cursor that passes them in one transaction (G1).

        At most ``keep`` letters of this peer stay, the newest; returns how many were dropped.
        """
        rows = [
            (
                letter.peer_id,
                letter.stream_id,
                letter.reason,
                letter.detail,
                letter.key,
                None if letter.fields is None else msgspec.msgpack.encode(letter.fields),
                letter.size,
                letter.at_ms,
            )
            for letter in letters
        ]

        async def work(db: aiosqlite.Connection) -> int:
            await _write(db, _ADD_LETTER, rows)
            if cursor is not None:
                await _write(db, _SET_CURSOR, [_cursor_row(peer_id, cursor)])
            before = db.total_changes
            await _write(
                db,
                "DELETE FROM dead_letters WHERE peer_id = ? AND id <= (SELECT id FROM dead_letters"
                " WHERE peer_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                [(peer_id, peer_id, keep)],
            )
            return db.total_changes - before

        return await self._transact(work)

    async def begin_bootstrap(self, peer_id: str, row: BootstrapRow, gap: GapRow | None) -> None:
        """Note that copying starts, with the gap that made it necessary, in one transaction."""

        async def work(db: aiosqlite.Connection) -> None:
            await _write(
                db,
                "INSERT OR REPLACE INTO bootstraps"
                " (peer_id, stream_id, entries_read, walk, incarnation, reason)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        peer_id,
                        str(row.head.stream_id),
                        row.head.entries_read,
                        row.walk,
                        row.incarnation,
                        row.reason,
                    )
                ],
            )
            if gap is not None:
                await _write(
                    db,
                    "INSERT INTO gaps"
                    " (peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (
                            gap.peer_id,
                            gap.found_at_ms,
                            gap.missed,
                            gap.reason,
                            gap.healed_at_ms,
                            gap.healed_by,
                        )
                    ],
                )
                await _write(
                    db,
                    "DELETE FROM gaps WHERE peer_id = ? AND id <= (SELECT id FROM gaps"
                    " WHERE peer_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    [(peer_id, peer_id, GAPS_KEPT)],
                )

        await self._transact(work)

    async def save_walk(self, peer_id: str, walk: str) -> None:
        """Note how far copying has come."""

        async def work(db: aiosqlite.Connection) -> None:
            await _write(db, "UPDATE bootstraps SET walk = ? WHERE peer_id = ?", [(walk, peer_id)])

        await self._transact(work)

    async def finish_bootstrap(
        self, peer_id: str, cursor: Cursor, healed_at_ms: int | None
    ) -> None:
        """Set the cursor, remove the row, close the peer's open gaps, in one transaction."""
        healed = [] if healed_at_ms is None else [(healed_at_ms, peer_id)]

        async def work(db: aiosqlite.Connection) -> None:
            await _write(db, _SET_CURSOR, [_cursor_row(peer_id, cursor)])
            await _write(db, "DELETE FROM bootstraps WHERE peer_id = ?", [(peer_id,)])
            await _write(
                db,
                "UPDATE gaps SET healed_at_ms = ?, healed_by = 'bootstrap'"
                " WHERE peer_id = ? AND healed_at_ms IS NULL",
                healed,
            )

        await self._transact(work)

    async def set_operator_pause(self, peer_id: str, paused: bool) -> None:
        """Keep the operator's wish over restarts."""
        await self._set(peer_id, "operator_pause", int(paused))

    async def set_synced(self, peer_id: str) -> None:
        """Note that the peer was fully read or compared once."""
        await self._set(peer_id, "synced", 1)

    async def _set(self, peer_id: str, column: str, value: int) -> None:
        async def work(db: aiosqlite.Connection) -> None:
            await _write(
                db,
                f"INSERT INTO peers (peer_id, {column}) VALUES (?, ?)"
                f" ON CONFLICT (peer_id) DO UPDATE SET {column} = excluded.{column}",
                [(peer_id, value)],
            )

        await self._transact(work)

    async def dead_letters(
        self, peer_id: str | None = None, *, after_id: int = 0, limit: int = 1000
    ) -> Sequence[DeadLetter]:
        """Return letters in the order they were stored, those after ``after_id`` first."""

        async def work(db: aiosqlite.Connection) -> list[DeadLetter]:
            rows = await _rows(
                db,
                f"SELECT {_LETTER_COLUMNS} FROM dead_letters"
                " WHERE id > ? AND (? IS NULL OR peer_id = ?) ORDER BY id LIMIT ?",
                (after_id, peer_id, peer_id, limit),
            )
            return [_letter(row) for row in rows]

        return await self._transact(work)

    async def delete_dead_letters(self, ids: Sequence[int]) -> int:
        """Remove letters; returns how many there were."""

        async def work(db: aiosqlite.Connection) -> int:
            before = db.total_changes
            await _write(db, "DELETE FROM dead_letters WHERE id = ?", [(i,) for i in ids])
            return db.total_changes - before

        return await self._transact(work)

    async def gaps(self, peer_id: str | None = None, *, limit: int = 1000) -> Sequence[GapRow]:
        """Return the newest lines of the loss ledger, oldest first."""

        async def work(db: aiosqlite.Connection) -> list[GapRow]:
            rows = await _rows(
                db,
                f"SELECT {_GAP_COLUMNS} FROM gaps WHERE ? IS NULL OR peer_id = ?"
                " ORDER BY id DESC LIMIT ?",
                (peer_id, peer_id, limit),
            )
            return [GapRow(*row) for row in reversed(rows)]

        return await self._transact(work)

    def __repr__(self) -> str:
        return f"<SqliteCursorStore {self.path}>"


_decode_fields: Callable[[bytes], tuple[bytes, ...]] = msgspec.msgpack.Decoder(
    tuple[bytes, ...]
).decode


def _letter(row: tuple[Any, ...]) -> DeadLetter:
    peer_id, stream_id, reason, detail, key, raw, size, at_ms, number = row
    fields = None if raw is None else _decode_fields(raw)
    return DeadLetter(peer_id, stream_id, reason, detail, key, fields, size, at_ms, number)


def _cursor_row(peer_id: str, cursor: Cursor) -> tuple[str, str, int | None, str]:
    position = cursor.position
    return peer_id, str(position.stream_id), position.entries_read, cursor.incarnation


async def _rows(
    db: aiosqlite.Connection, query: str, values: Iterable[Any] = ()
) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await db.execute_fetchall(query, values)]


async def _one(db: aiosqlite.Connection, query: str, values: Iterable[Any] = ()) -> int:
    value: int = (await _rows(db, query, values))[0][0]
    return value


async def _write(db: aiosqlite.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        async with db.executemany(statement, rows):
            pass
