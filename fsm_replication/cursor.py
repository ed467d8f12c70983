"""The cursor store: how far each peer was read, and what could not be applied, in one SQLite file.

Theory of operation. Every call is one *unit*: a function that runs whole on the thread of the
connection, from BEGIN to COMMIT or ROLLBACK. A caller that is cancelled or out of time only stops
waiting; it cannot cut a transaction in two, so what it asked for is either there or not.

On disk: WAL with ``synchronous=FULL``. The cursor and the dead letters that it passes are one
transaction, so either both survive or neither, and a cursor is never ahead. NORMAL would keep that
too, and would lose nothing to kill -9; but it brings the log to the disk only at a checkpoint,
every 1,000 pages, which at one flush in five seconds is over an hour: a loss of power could then
set the cursor back further than the peer's stream remembers. FULL costs one fsync for each
transaction, off the event loop, and transactions are few: a flush, a batch with dead letters.

One engine at a time: an advisory lock (flock) on ``<file>.lock`` is held while the store is open.
It belongs to the open file and not to the process, so two engines in one process exclude each
other too, and the kernel drops it whatever end the process takes.

Texts may hold anything a ``str`` can, also NUL and lone surrogates: they come back as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import aiosqlite
import msgspec

from fsm_replication.errors import AlreadyRunningError, CursorStoreError
from fsm_replication.ports import (
    LETTERS_BYTES,
    BootstrapRow,
    Clock,
    Cursor,
    DeadLetter,
    GapRow,
    PeerRecord,
    Position,
    StreamId,
    SystemClock,
    dropped_letters,
)

# Elsewhere SQLite's own exclusive locking mode takes the place of the lock file.
_HAS_FLOCK: bool = os.name == "posix"
if _HAS_FLOCK:
    import fcntl

__all__ = ("SqliteCursorStore",)

APPLICATION_ID: Final = 0x46534D52  # "FSMR"
MEMORY: Final = ":memory:"
GAPS_KEPT: Final = 10_000
LOCKED_WAIT_SEC: Final = 0.1
LOCK_TRIES_MAX: Final = 10
THREAD_JOIN_SEC: Final = 1.0
# Units of callers that are gone wait behind a call in which the disk hangs.
UNITS_WAITING_MAX: Final = 64
INTEGER_MAX: Final = 2**63 - 1

_WRITE: Final = "BEGIN IMMEDIATE"
_READ: Final = "BEGIN"
_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# Waiting, or somebody who makes room, may mend these; nothing mends the second set.
_MAY_PASS: Final = _LOCKED | {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
_FINAL: Final = frozenset(
    {
        sqlite3.SQLITE_IOERR_CORRUPTFS,
        sqlite3.SQLITE_IOERR_DATA,
        sqlite3.SQLITE_READONLY_DBMOVED,
    }
)
_START_ANEW: Final = (
    "move it away, together with its -wal file, and start again; peers are then copied anew"
)
_HINTS: Final = {
    sqlite3.SQLITE_BUSY: "another process holds SQLite's lock on it; wait for its end, or end it",
    sqlite3.SQLITE_CANTOPEN: "see that this user may write to the file and its directory",
    sqlite3.SQLITE_CORRUPT: _START_ANEW,
    sqlite3.SQLITE_ERROR: f"it is not a whole cursor database; {_START_ANEW}",
    sqlite3.SQLITE_FULL: "free some space",
    sqlite3.SQLITE_IOERR: "see what is wrong with the disk",
    sqlite3.SQLITE_NOTADB: _START_ANEW,
    sqlite3.SQLITE_READONLY: "make the file and its directory writable",
}

_MOVED: Final = "it was removed or replaced while in use; restart the engine"

_SCHEMA_1: Final = (
    """CREATE TABLE peers (
        peer_id TEXT PRIMARY KEY,
        stream_id TEXT,
        entries_read INTEGER,
        incarnation TEXT,
        operator_pause INTEGER NOT NULL DEFAULT 0,
        synced INTEGER NOT NULL DEFAULT 0,
        agreed_at_ms INTEGER
    )""",
    """CREATE TABLE bootstraps (
        peer_id TEXT PRIMARY KEY,
        stream_id TEXT NOT NULL,
        entries_read INTEGER,
        walk TEXT NOT NULL,
        incarnation TEXT NOT NULL,
        reason TEXT NOT NULL
    )""",
    """CREATE TABLE dead_letters (
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
    )""",
    "CREATE INDEX dead_letters_by_peer ON dead_letters (peer_id, id)",
    """CREATE TABLE gaps (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        peer_id TEXT NOT NULL,
        found_at_ms INTEGER NOT NULL,
        missed INTEGER,
        reason TEXT NOT NULL,
        healed_at_ms INTEGER,
        healed_by TEXT NOT NULL
    )""",
    "CREATE INDEX gaps_by_peer ON gaps (peer_id, id)",
)
_SCHEMA_2: Final = (
    "ALTER TABLE gaps ADD COLUMN kind TEXT NOT NULL DEFAULT 'gap'",
    "ALTER TABLE dead_letters ADD COLUMN from_foreign INTEGER NOT NULL DEFAULT 0",
    # Nodes of ours name the origin in every entry, and foreign ones in none.
    """UPDATE dead_letters SET from_foreign = 1
    WHERE fields IS NOT NULL AND instr(fields, CAST('"origin"' AS BLOB)) = 0""",
)
# Each brings the schema of the number before to its own; a new file goes through all of them.
_SCHEMAS: Final = (_SCHEMA_1, _SCHEMA_2)
SCHEMA_VERSION: Final = len(_SCHEMAS)
# What is only read is not migrated, but looked at as if it were: a view hides a table of its name.
_VIEWS_OF_OLDER: Final = {
    1: (
        "PRAGMA temp_store = MEMORY",
        "CREATE TEMP VIEW gaps AS SELECT *, 'gap' AS kind FROM main.gaps",
        "CREATE TEMP VIEW dead_letters AS SELECT *, 0 AS from_foreign FROM main.dead_letters",
    ),
}
_SET_CURSOR: Final = """
INSERT INTO peers (peer_id, stream_id, entries_read, incarnation) VALUES (?, ?, ?, ?)
ON CONFLICT (peer_id) DO UPDATE SET stream_id = excluded.stream_id,
    entries_read = excluded.entries_read, incarnation = excluded.incarnation
"""
# A letter that is stored again keeps its id and its time: it is the same letter.
_ADD_LETTER: Final = """
INSERT INTO dead_letters
    (peer_id, stream_id, reason, detail, key, fields, size, at_ms, from_foreign)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (peer_id, stream_id) DO UPDATE SET reason = excluded.reason,
    detail = excluded.detail, key = excluded.key, fields = excluded.fields, size = excluded.size,
    from_foreign = excluded.from_foreign
"""
_SET_BOOTSTRAP: Final = """
INSERT OR REPLACE INTO bootstraps (peer_id, stream_id, entries_read, walk, incarnation, reason)
VALUES (?, ?, ?, ?, ?, ?)
"""
_ADD_GAP: Final = """
INSERT INTO gaps (peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, kind)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_MORE_DROPPED: Final = """
UPDATE gaps SET missed = missed + ? WHERE peer_id = ? AND kind = 'dropped' AND healed_at_ms IS NULL
"""
_LETTERS: Final = """
SELECT peer_id, stream_id, reason, detail, key, fields, size, at_ms, id, from_foreign
FROM dead_letters WHERE id > ?1 AND (?2 IS NULL OR peer_id = ?2) ORDER BY id LIMIT ?3
"""
_COUNT_LETTERS: Final = """
SELECT peer_id, count(*) FROM dead_letters GROUP BY peer_id ORDER BY peer_id
"""
_PURGE_LETTERS: Final = "DELETE FROM dead_letters WHERE ?1 IS NULL OR peer_id = ?1"
_DELETE_LETTER: Final = "DELETE FROM dead_letters WHERE id = ?"
_STILL_BAD: Final = "UPDATE dead_letters SET reason = ?, detail = ? WHERE id = ?"
_TRIM_LETTERS: Final = """
DELETE FROM dead_letters WHERE peer_id = ?1 AND id <=
    (SELECT id FROM dead_letters WHERE peer_id = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)
"""
_GAPS: Final = """
SELECT peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, id, kind FROM gaps
WHERE ?1 IS NULL OR peer_id = ?1 ORDER BY id DESC LIMIT ?2
"""
_GAPS_OPEN: Final = """
SELECT peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, id, kind FROM gaps
WHERE peer_id = ? AND healed_at_ms IS NULL ORDER BY id
"""
_HEAL_GAPS: Final = """
UPDATE gaps SET healed_at_ms = ?, healed_by = ?
WHERE peer_id = ? AND healed_at_ms IS NULL
"""
_TRIM_GAPS: Final = """
DELETE FROM gaps WHERE peer_id = ?1 AND id <=
    (SELECT id FROM gaps WHERE peer_id = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)
"""
_SET_PAUSE: Final = """
INSERT INTO peers (peer_id, operator_pause) VALUES (?, ?)
ON CONFLICT (peer_id) DO UPDATE SET operator_pause = excluded.operator_pause
"""
_SET_SYNCED: Final = """
INSERT INTO peers (peer_id, synced) VALUES (?, 1) ON CONFLICT (peer_id) DO UPDATE SET synced = 1
"""
_SET_AGREED: Final = """
INSERT INTO peers (peer_id, agreed_at_ms) VALUES (?1, ?2)
ON CONFLICT (peer_id) DO UPDATE SET agreed_at_ms = ?2
"""
_T = TypeVar("_T")


# Units, and the connection that runs them -------------------------------------------------------


class _Unit(Generic[_T]):
    """One piece of work for the thread; ``begin`` is "" where it takes no transaction."""

    __slots__ = ("abandoned", "begin", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], _T], begin: str) -> None:
        self.work = work
        self.begin = begin
        self.abandoned = False
        self.result: _T

    def run(self, db: sqlite3.Connection) -> None:
        if self.abandoned:
            return
        if not self.begin:
            self.result = self.work(db)
            return
        db.execute(self.begin)
        try:
            self.result = self.work(db)
            db.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors, such as a full disk.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


class _UnitConnection(sqlite3.Connection):
    """Runs one unit, whole, in each ``commit``.

    aiosqlite carries each call to its thread singly and has no public way to carry a function. A
    commit is such a call, so here it means: take the next unit, and run and commit that.

    ``last_words`` is called before it is closed and ``closed`` afterwards, both on the thread: a
    disk that hangs may let go of it long after anybody waits, and maybe after the event loop.
    """

    units: deque[_Unit[Any]]
    last_words: Callable[[], None]
    closed: Callable[[], None]
    is_open = True

    def commit(self) -> None:
        """Run the next unit."""
        self.units.popleft().run(self)

    def close(self) -> None:
        """Close, once."""
        if self.is_open:
            self.is_open = False
            self.last_words()
            super().close()
            self.closed()


# The lock against a second engine ---------------------------------------------------------------


_held_handles: Final[set[int]] = set()


def _drop_locks_in_child() -> None:
    """Close what a fork has copied: a child that lives on would keep a dead engine's lock."""
    while _held_handles:
        os.close(_held_handles.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks_in_child)


def _take_lock(path: str, name: str) -> int:
    """Lock the file at ``path`` and write our pid into it; returns its handle.

    :raises AlreadyRunningError: if somebody holds it; ``name`` is the file it stands for.
    :raises OSError: if it cannot be opened or locked.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(LOCK_TRIES_MAX):
        handle = os.open(path, flags, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have removed the file between the two calls: the lock of a file that
            # nobody else can see is worth nothing.
            opened = os.fstat(handle)
            if _identity(path) == (opened.st_dev, opened.st_ino):
                _held_handles.add(handle)
                # The pid only serves the other's message: a full disk is no reason to stop here.
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise _already_running(
                name, f", process {holder}" if holder.isdigit() else ""
            ) from None
        except OSError:
            os.close(handle)
            raise
    raise OSError(f"{path} is removed again and again")


def _release_lock(handle: int) -> None:
    # In a forked child the number may stand for another file by now.
    if handle not in _held_handles:
        return
    # The file is never removed: whoever opened it just before would then lock a file that nobody
    # else can see. Unlocking, and not only closing, frees it of copies in forked children too.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        fcntl.flock(handle, fcntl.LOCK_UN)
    _held_handles.discard(handle)
    os.close(handle)


def _already_running(name: str, holder: str = "") -> AlreadyRunningError:
    return AlreadyRunningError(
        f"{name} is in use by another engine{holder}; stop that one, or give this engine a cursor"
        " file of its own",
        path=name,
    )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


# The store --------------------------------------------------------------------------------------


class SqliteCursorStore:
    """Keeps cursors, dead letters and the loss ledger in the file at ``path``.

    ``timeout_sec`` (over 0) bounds every call; a database that another process has locked is tried
    again within it. ":memory:" keeps nothing. ``read_only`` opens an existing file beside a
    running engine, without the lock. The directory is not created.

    Every call but ``close`` raises CursorStoreError if the file cannot be used; ``may_pass`` tells
    whether trying again makes sense.
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
        self._in_use = False
        self._place = path
        self._watched: dict[str, tuple[int, int] | None] = {}
        self._lock_handle: int | None = None
        self._connection: aiosqlite.Connection | None = None
        self._connecting: asyncio.Future[aiosqlite.Connection] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._raw: sqlite3.Connection | None = None
        self._thread: threading.Thread | None = None
        self._units: deque[_Unit[Any]] = deque()
        self._turn = asyncio.Lock()

    # Opening and closing.

    async def open(self) -> None:
        """Lock and open the file, and bring its schema up to date.

        :raises AlreadyRunningError: if another engine holds it.
        :raises CursorStoreError: if it cannot be used; the message says what to do.
        """
        if self._in_use:
            raise self._error("it is open already")
        self._in_use = True
        self._turn = asyncio.Lock()
        try:
            if self.path != MEMORY:
                self._place = self._check_place()
                if _HAS_FLOCK and not self._read_only:
                    self._lock()
            await self._connect()
        except BaseException:
            # What went wrong first is what the caller has to know.
            with contextlib.suppress(CursorStoreError):
                await self.close()
            raise

    def _check_place(self) -> str:
        """Return the file's real path, so that later changes of directory do not matter."""
        try:
            place = Path(os.path.realpath(self.path))
            directory = place.parent
            if not self.path or place.is_dir():
                raise self._error("it is a directory; cursor.sqlite_path names a file")
            if not directory.is_dir():
                raise self._error(f"the directory {directory} does not exist; create it")
            exists = place.exists()
            # A pipe in its place would be waited for without end.
            if exists and not stat.S_ISREG(place.stat().st_mode):
                raise self._error("it is not a regular file; cursor.sqlite_path names a file")
        except (OSError, ValueError) as error:
            raise self._error(f"{error}; see that cursor.sqlite_path is right") from None
        if self._read_only:
            if not exists:
                raise self._error("there is no such file; has a node run with it?")
            if not self._may(place, os.R_OK):
                raise self._error("it is not readable; make it readable for this user")
            return str(place)
        if exists and not self._may(place, os.R_OK | os.W_OK):
            raise self._error("it is read-only; make it writable for this user")
        if not self._may(directory, os.W_OK | os.X_OK):
            raise self._error(f"the directory {directory} is read-only; make it writable")
        return str(place)

    @staticmethod
    def _may(place: Path, mode: int) -> bool:
        return os.access(place, mode, effective_ids=os.access in os.supports_effective_ids)

    def _lock(self) -> None:
        lock_path = f"{self._place}.lock"
        try:
            self._lock_handle = _take_lock(lock_path, self.path)
        except OSError as error:
            raise self._error(
                f"its lock file {lock_path} cannot be opened and locked ({error}); see that this"
                " user may write to it, on a file system with locks"
            ) from None

    async def _connect(self) -> None:
        address = MEMORY
        if self.path != MEMORY:
            mode = "ro" if self._read_only else "rwc"
            address = f"file:{quote(os.fsencode(self._place))}?mode={mode}"

        loop = asyncio.get_running_loop()

        def closed() -> None:
            self._unlock()
            # A loop that was closed meanwhile needs to hear nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._thread_has_closed)

        def build(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            # This runs on the thread that is to be joined in the end.
            self._thread = threading.current_thread()
            raw = _UnitConnection(*args, **kwargs)
            raw.units = self._units
            raw.last_words = lambda: self._empty_log(raw)
            raw.closed = closed
            self._raw = raw
            return raw

        connection = aiosqlite.connect(
            address,
            uri=self.path != MEMORY,
            isolation_level=None,
            timeout=LOCKED_WAIT_SEC,
            check_same_thread=False,
            factory=build,
        )
        # A disk that hangs, or a host that forgets to stop its engine, must not keep the process from
        # ending: what is committed is on the disk. aiosqlite has no public way to ask for that.
        thread: Any = getattr(connection, "_thread", connection)
        thread.daemon = True
        # A connect that is cut would leave its thread behind: close() waits for it instead.
        connecting = self._connecting = asyncio.ensure_future(connection)
        try:
            async with self._clock.timeout(self._timeout_sec):
                await asyncio.shield(connecting)
        except TimeoutError:
            raise self._no_answer() from None
        except sqlite3.Error as error:
            raise self._translated(error) from error
        self._connection = connection
        try:
            await self._run(self._set_up, "")
        except CursorStoreError as error:
            cause = error.__cause__
            if (
                not _HAS_FLOCK
                and isinstance(cause, sqlite3.Error)
                and _code(cause) & 0xFF in _LOCKED
            ):
                raise _already_running(self.path) from cause
            raise

    def _set_up(self, db: sqlite3.Connection) -> None:
        if self.path != MEMORY and not _HAS_FLOCK and not self._read_only:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        version, application = _one(db, "PRAGMA user_version"), _one(db, "PRAGMA application_id")
        strange = version == application == 0 and _one(db, "SELECT count(*) FROM sqlite_master")
        if application not in (0, APPLICATION_ID) or strange:
            raise self._error("it is a database of another application; name another file")
        if version > SCHEMA_VERSION:
            raise self._error(
                f"it was written by a newer version (schema {version}, this one knows"
                f" {SCHEMA_VERSION}); upgrade fsm_replication"
            )
        if self._read_only:
            if version == 0:
                raise self._error("there is nothing in it yet; has a node run with it?")
            for statement in _VIEWS_OF_OLDER.get(version, ()):
                db.execute(statement)
        else:
            db.execute(f"PRAGMA journal_mode = {'WAL' if self._wal_mode else 'DELETE'}").fetchall()
            db.execute("PRAGMA synchronous = FULL")
            _Unit(_migrate, _WRITE).run(db)
        if self.path != MEMORY:
            # Without its log a database looks whole, but what was written since is lost.
            log = f"{self._place}-wal"
            places = [self._place, *([log] if _identity(log) else [])]
            self._watched = {place: _identity(place) for place in places}

    async def close(self, *, timeout_sec: float | None = None) -> None:
        """Empty the log, unlock and release everything; a second call does nothing.

        A caller that is cancelled gets the cancellation when all is released.

        :raises CursorStoreError: if that takes longer than ``timeout_sec`` (by default that of all
            calls) because the disk does not answer. The thread then releases everything by itself,
            the lock too, once the disk answers; another call waits for that.
        """
        if self._in_use:
            await _uncut(self._close(self._timeout_sec if timeout_sec is None else timeout_sec))

    async def _close(self, timeout_sec: float) -> None:
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
            self._stopping = asyncio.ensure_future(self._stop())
        try:
            async with self._clock.timeout(timeout_sec):
                await asyncio.shield(self._ended)
        except TimeoutError:
            await self._leave_it_to_the_thread()
            raise self._no_answer(timeout_sec) from None

    async def _stop(self) -> None:
        self._connection = None
        connecting = self._connecting
        if connecting is not None:
            await asyncio.wait((connecting,))
            if _succeeded(connecting):
                await connecting.result().close()
        self._let_go()

    async def _leave_it_to_the_thread(self) -> None:
        """End the task that waits for the thread; the close it has asked for stands in the queue.

        Where not even opening has come to its end, there is nothing yet that could be closed.
        """
        opened = self._connecting is not None and self._connecting.done()
        while opened and self._stopping is not None and not self._stopping.done():
            # aiosqlite waits once more after a cancellation, for the end of its thread.
            self._stopping.cancel()
            await asyncio.sleep(0)
        if opened:
            self._stopping = None

    def _thread_has_closed(self) -> None:
        if self._stopping is None and self._in_use:
            self._let_go()

    def _empty_log(self, db: sqlite3.Connection) -> None:
        if self._wal_mode and not self._read_only and not self._moved():
            # A reader beside us may keep the log from being emptied: that is no harm.
            with contextlib.suppress(sqlite3.Error):
                _checkpoint(db)

    def _unlock(self) -> None:
        handle, self._lock_handle = self._lock_handle, None
        if handle is not None:
            _release_lock(handle)

    def _let_go(self) -> None:
        if self._thread is not None:
            # It has been told to stop and has nothing left to do: this is over at once.
            self._thread.join(THREAD_JOIN_SEC)
            if self._raw is not None and not self._thread.is_alive():
                self._raw.close()
        self._unlock()
        self._units.clear()
        self._watched = {}
        self._connecting = self._stopping = None
        self._thread = self._raw = None
        self._in_use = False
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        self._ended = None

    # Running a unit.

    async def _run(self, work: Callable[[sqlite3.Connection], _T], begin: str = _WRITE) -> _T:
        """Run a unit in its turn, and again while another process holds SQLite's lock."""
        locked: sqlite3.Error | None = None
        try:
            async with self._clock.timeout(self._timeout_sec), self._turn:
                while True:
                    if self._connection is None:
                        raise self._error("it is not open; open the store first")
                    unit = _Unit(self._guarded(work), begin)
                    try:
                        return await self._on_thread(self._connection, unit)
                    except sqlite3.OperationalError as error:
                        if _code(error) & 0xFF not in _LOCKED:
                            raise
                        locked = error
                    await self._clock.sleep(LOCKED_WAIT_SEC / 2)
        except TimeoutError:
            if locked is not None:
                raise self._translated(locked) from locked
            raise self._no_answer() from None
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _guarded(
        self, work: Callable[[sqlite3.Connection], _T]
    ) -> Callable[[sqlite3.Connection], _T]:
        def guarded(db: sqlite3.Connection) -> _T:
            # SQLite goes on writing into a file that has been removed, and reports success.
            if self._moved():
                raise self._error(_MOVED)
            try:
                return work(db)
            except (ValueError, msgspec.MsgspecError) as error:
                raise self._error(
                    f"it holds what no node wrote ({error}); {_START_ANEW}"
                ) from error

        return guarded

    async def _on_thread(self, connection: aiosqlite.Connection, unit: _Unit[_T]) -> _T:
        if len(self._units) >= UNITS_WAITING_MAX:
            raise self._no_answer()
        self._units.append(unit)
        try:
            await connection.commit()
        finally:
            # A unit that has not begun when its caller leaves need not begin any more.
            unit.abandoned = True
        return unit.result

    def _moved(self) -> bool:
        return any(_identity(place) != known for place, known in self._watched.items())

    # What went wrong.

    def _error(self, what: str, *, may_pass: bool = False) -> CursorStoreError:
        return CursorStoreError(
            f"{self.path} cannot be used: {what}", path=self.path, retryable=may_pass
        )

    def _no_answer(self, timeout_sec: float | None = None) -> CursorStoreError:
        waited = self._timeout_sec if timeout_sec is None else timeout_sec
        return self._error(
            f"no answer within {waited:g} s; see what is wrong with the disk", may_pass=True
        )

    def _translated(self, error: sqlite3.Error) -> CursorStoreError:
        if self._moved():
            return self._error(_MOVED)
        code = _code(error)
        hint = _HINTS.get(code & 0xFF)
        return self._error(
            f"{error}{f'; {hint}' if hint else ''}",
            may_pass=code & 0xFF in _MAY_PASS and code not in _FINAL,
        )

    # The calls of the port.

    async def load(self, peer_id: str) -> PeerRecord:
        """Return what is known of a peer; an unknown peer has an empty record."""
        name = _text(peer_id)
        return await self._run(lambda db: _load(db, name), _READ)

    async def save(self, cursors: Sequence[tuple[str, Cursor]]) -> None:
        """Store the settled cursors of several peers in one transaction."""
        rows = [_cursor_row(peer_id, cursor) for peer_id, cursor in cursors]

        def work(db: sqlite3.Connection) -> None:
            db.executemany(_SET_CURSOR, rows)

        await self._run(work)

    async def settle(
        self, peer_id: str, cursor: Cursor | None, letters: Sequence[DeadLetter], *, keep: int
    ) -> int:
        """Store dead letters and the cursor that passes them in one transaction (G1).

        At most ``keep`` letters of this peer stay, the newest; returns how many were dropped, and
        counts them in the ledger. An entry that is read again does not become a second letter.

        :raises ValueError: if a letter is another peer's: its bound would not hold.
        """
        if any(letter.peer_id != peer_id for letter in letters):
            raise ValueError(f"letters of other peers than {peer_id!r}")
        name = _text(peer_id)
        rows = [_letter_row(letter) for letter in letters]
        cursors = [] if cursor is None else [_cursor_row(peer_id, cursor)]
        now = max((letter.at_ms for letter in letters), default=0)

        def work(db: sqlite3.Connection) -> int:
            db.executemany(_ADD_LETTER, rows)
            db.executemany(_SET_CURSOR, cursors)
            dropped = db.execute(_TRIM_LETTERS, (name, _limit(keep))).rowcount
            if dropped and not db.execute(_MORE_DROPPED, (dropped, name)).rowcount:
                _add_gap(db, dropped_letters(peer_id, now, dropped))
            return dropped

        return await self._run(work)

    async def begin_bootstrap(self, peer_id: str, row: BootstrapRow, gap: GapRow | None) -> None:
        """Note that copying starts, with the gap that made it necessary, in one transaction.

        Of a peer's ledger the newest 10,000 lines stay.
        """
        name, head = _text(peer_id), row.head
        begun = (name, str(head.stream_id), _number(head.entries_read))
        begun_texts = (_text(row.walk), _text(row.incarnation), _text(row.reason))

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_BOOTSTRAP, begun + begun_texts)
            if gap is not None:
                _add_gap(db, gap)

        await self._run(work)

    async def save_walk(self, peer_id: str, walk: str) -> None:
        """Note how far copying has come; without a copy begun there is nothing to note."""
        statement = "UPDATE bootstraps SET walk = ? WHERE peer_id = ?"
        await self._do(statement, _text(walk), _text(peer_id))

    async def finish_bootstrap(
        self, peer_id: str, cursor: Cursor, healed_at_ms: int | None
    ) -> None:
        """Set the cursor, remove the row, close the peer's open gaps, in one transaction.

        ``healed_at_ms`` is milliseconds since the epoch; None leaves the gaps open.
        """
        name, row = _text(peer_id), _cursor_row(peer_id, cursor)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_CURSOR, row)
            db.execute("DELETE FROM bootstraps WHERE peer_id = ?", (name,))
            if healed_at_ms is not None:
                db.execute(_HEAL_GAPS, (healed_at_ms, "bootstrap", name))

        await self._run(work)

    async def set_operator_pause(self, peer_id: str, paused: bool) -> None:
        """Keep the operator's wish over restarts."""
        await self._do(_SET_PAUSE, _text(peer_id), int(paused))

    async def set_synced(self, peer_id: str) -> None:
        """Note that the peer was fully read or compared once."""
        await self._do(_SET_SYNCED, _text(peer_id))

    async def set_agreed(self, peer_id: str, at_ms: int, *, heal_gaps: bool) -> None:
        """Note when the peer's items were last known to be all here, in ms since the epoch.

        With ``heal_gaps`` its open gaps are closed in the same transaction, as healed by repair.
        """
        name = _text(peer_id)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_AGREED, (name, at_ms))
            if heal_gaps:
                db.execute(_HEAL_GAPS, (at_ms, "repair", name))

        await self._run(work)

    async def _do(self, statement: str, *values: Any) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute(statement, values)

        await self._run(work)

    async def dead_letters(
        self,
        peer_id: str | None = None,
        *,
        after_id: int = 0,
        limit: int = 1000,
        max_bytes: int = LETTERS_BYTES,
    ) -> Sequence[DeadLetter]:
        """Return letters in the order they were stored, those after ``after_id`` first.

        At most ``limit`` (0 or more) are returned, of all peers unless ``peer_id`` names one, and
        fewer where they hold more than ``max_bytes`` together; one at least, whatever its size.
        """
        values = (min(after_id, INTEGER_MAX), _text_or_none(peer_id), _limit(limit))

        def work(db: sqlite3.Connection) -> Sequence[DeadLetter]:
            found: list[DeadLetter] = []
            held = 0
            for row in db.execute(_LETTERS, values):
                letter = _letter(row)
                held += letter.held_bytes
                if found and held > max_bytes:
                    break
                found.append(letter)
            return found

        return await self._run(work, _READ)

    async def dead_letter_counts(self) -> dict[str, int]:
        """Return how many letters each peer has, those with none left out."""
        rows = await self._run(lambda db: db.execute(_COUNT_LETTERS).fetchall(), _READ)
        return {_str(peer_id): count for peer_id, count in rows}

    async def delete_dead_letters(self, ids: Sequence[int]) -> int:
        """Remove letters; returns how many there were."""
        rows = _id_rows(ids)
        return await self._run(lambda db: max(0, db.executemany(_DELETE_LETTER, rows).rowcount))

    async def purge_dead_letters(self, peer_id: str | None = None) -> int:
        """Remove all letters, or all of one peer; returns how many there were."""
        values = (_text_or_none(peer_id),)
        return await self._run(lambda db: db.execute(_PURGE_LETTERS, values).rowcount)

    async def settle_retry(self, done: Sequence[int], still_bad: Sequence[DeadLetter]) -> None:
        """Remove the letters that are settled, and note why others are not, in one transaction.

        A letter that was removed meanwhile does not come back.
        """
        gone = _id_rows(done)
        rows = [(_text(one.reason), _text(one.detail), one.id) for one in still_bad]

        def work(db: sqlite3.Connection) -> None:
            db.executemany(_DELETE_LETTER, gone)
            db.executemany(_STILL_BAD, rows)

        await self._run(work)

    async def gaps(self, peer_id: str | None = None, *, limit: int = 1000) -> Sequence[GapRow]:
        """Return the newest ``limit`` (0 or more) lines of the loss ledger, oldest first."""
        values = (_text_or_none(peer_id), _limit(limit))
        newest = await self._run(lambda db: [_gap(row) for row in db.execute(_GAPS, values)], _READ)
        return newest[::-1]

    def __repr__(self) -> str:
        state = "closed" if self._connection is None else "open"
        return f"<SqliteCursorStore {self.path!r} {state}>"


# Statements -------------------------------------------------------------------------------------


def _one(db: sqlite3.Connection, query: str, *values: Any) -> int:
    found: int = db.execute(query, values).fetchone()[0]
    return found


def _migrate(db: sqlite3.Connection) -> None:
    """Bring a file of any older schema, or an empty one, to the newest."""
    version = _one(db, "PRAGMA user_version")
    for statements in _SCHEMAS[version:]:
        for statement in statements:
            db.execute(statement)
    if version < SCHEMA_VERSION:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _add_gap(db: sqlite3.Connection, gap: GapRow) -> None:
    db.execute(_ADD_GAP, _gap_row(gap))
    db.execute(_TRIM_GAPS, (_text(gap.peer_id), GAPS_KEPT))


def _checkpoint(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _load(db: sqlite3.Connection, peer_id: str | bytes) -> PeerRecord:
    one = (peer_id,)
    known = db.execute(
        "SELECT stream_id, entries_read, incarnation, operator_pause, synced, agreed_at_ms"
        " FROM peers WHERE peer_id = ?",
        one,
    ).fetchone()
    stream_id, read, incarnation, paused, synced, agreed = known or (None, None, None, 0, 0, None)
    copying = db.execute(
        "SELECT stream_id, entries_read, walk, incarnation, reason FROM bootstraps"
        " WHERE peer_id = ?",
        one,
    ).fetchone()
    return PeerRecord(
        cursor=None if stream_id is None else Cursor(_position(stream_id, read), _str(incarnation)),
        bootstrap=copying
        and BootstrapRow(_position(*copying[:2]), *(_str(text) for text in copying[2:])),
        operator_pause=bool(paused),
        synced=bool(synced),
        agreed_at_ms=agreed,
        gaps=tuple(_gap(row) for row in db.execute(_GAPS_OPEN, one)),
        dead_letters=_one(db, "SELECT count(*) FROM dead_letters WHERE peer_id = ?", peer_id),
    )


# Rows and values --------------------------------------------------------------------------------


def _text(text: str) -> str | bytes:
    """Return what stands for ``text``: SQLite's texts are UTF-8, which knows no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _text_or_none(text: str | None) -> str | bytes | None:
    return None if text is None else _text(text)


def _str(value: Any) -> str:
    return value if isinstance(value, str) else bytes(value).decode("utf-8", "surrogatepass")


def _number(value: int | None) -> int | None:
    # A peer may claim any count. "Not known" is what makes a reader look for a gap himself.
    return value if value is not None and -INTEGER_MAX <= value <= INTEGER_MAX else None


def _id_rows(ids: Sequence[int]) -> list[tuple[int]]:
    return [(number,) for number in ids if 0 < number <= INTEGER_MAX]


def _limit(limit: int) -> int:
    # SQLite takes a negative limit for none at all.
    return min(max(limit, 0), INTEGER_MAX)


def _position(stream_id: str, entries_read: int | None) -> Position:
    return Position(StreamId.parse(stream_id), entries_read)


def _cursor_row(peer_id: str, cursor: Cursor) -> tuple[Any, ...]:
    stream_id, entries_read = cursor.position
    return _text(peer_id), str(stream_id), _number(entries_read), _text(cursor.incarnation)


_decode_fields: Final[Callable[[bytes], tuple[bytes, ...]]] = msgspec.msgpack.Decoder(
    tuple[bytes, ...]
).decode


def _letter_row(letter: DeadLetter) -> tuple[Any, ...]:
    return (
        _text(letter.peer_id),
        _text(letter.stream_id),
        _text(letter.reason),
        _text(letter.detail),
        _text_or_none(letter.key),
        None if letter.fields is None else msgspec.msgpack.encode(letter.fields),
        letter.size,
        letter.at_ms,
        int(letter.foreign),
    )


def _letter(row: tuple[Any, ...]) -> DeadLetter:
    peer_id, stream_id, reason, detail, key, fields, size, at_ms, number, foreign = row
    return DeadLetter(
        _str(peer_id),
        _str(stream_id),
        _str(reason),
        _str(detail),
        None if key is None else _str(key),
        None if fields is None else _decode_fields(fields),
        size,
        at_ms,
        number,
        bool(foreign),
    )


def _gap_row(gap: GapRow) -> tuple[Any, ...]:
    return (
        _text(gap.peer_id),
        gap.found_at_ms,
        _number(gap.missed),
        _text(gap.reason),
        gap.healed_at_ms,
        _text(gap.healed_by),
        _text(gap.kind),
    )


def _gap(row: tuple[Any, ...]) -> GapRow:
    peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, number, kind = row
    return GapRow(
        _str(peer_id),
        found_at_ms,
        missed,
        _str(reason),
        healed_at_ms,
        _str(healed_by),
        number,
        _str(kind),
    )


# Small helpers ----------------------------------------------------------------------------------


def _code(error: sqlite3.Error) -> int:
    # The module's own errors, such as text that is not UTF-8, carry no code of SQLite.
    return getattr(error, "sqlite_errorcode", None) or -1


def _succeeded(future: asyncio.Future[Any]) -> bool:
    return not future.cancelled() and future.exception() is None


async def _uncut(work: Coroutine[Any, Any, _T]) -> _T:
    """Run ``work`` to its end even where the caller is cancelled; he gets that afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        _succeeded(task)
        raise cancelled
    return task.result()
