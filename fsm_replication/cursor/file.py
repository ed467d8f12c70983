"""The file of the cursor database: opening and closing it, and running units of work on it.

Every unit is a function that runs whole on the thread of the connection, from BEGIN to COMMIT or
ROLLBACK. Nothing here knows what is kept in the file but its schema's number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import aiosqlite
import msgspec

from fsm_replication.cursor.lock import (
    HAS_FLOCK,
    already_running,
    identity,
    release_lock,
    take_lock,
)
from fsm_replication.cursor.schema import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    migrate,
    one_number,
    view_as_newest,
)
from fsm_replication.errors import CursorStoreError
from fsm_replication.ports import Clock

__all__ = ("READ", "WRITE", "CursorFile", "Unit")

MEMORY: Final = ":memory:"
LOCKED_WAIT_SEC: Final = 0.1
THREAD_JOIN_SEC: Final = 1.0
# Units of callers that are gone wait behind a call in which the disk hangs.
UNITS_WAITING_MAX: Final = 64

WRITE: Final = "BEGIN IMMEDIATE"
READ: Final = "BEGIN"
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
    "move it away, together with its -wal file, and start again; peers are then copied anew, and the"
    " interlock begins with a new allowance"
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

_T = TypeVar("_T")


class Unit(Generic[_T]):
    """One piece of work for the thread; ``begin`` is "" where it takes no transaction."""

    __slots__ = ("abandoned", "begin", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], _T], begin: str) -> None:
        self.work = work
        self.begin = begin
        self.abandoned = False
        self.result: _T

    def run(self, db: sqlite3.Connection) -> None:
        """Do the work in a transaction of its own, unless nobody waits for it any more."""
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


class UnitConnection(sqlite3.Connection):
    """Runs one unit, whole, in each ``commit``.

    aiosqlite carries each call to its thread singly and has no public way to carry a function. A
    commit is such a call, so here it means: take the next unit, and run and commit that.

    ``last_words`` is called before it is closed and ``closed`` afterwards, both on the thread: a
    disk that hangs may let go of it long after anybody waits, and maybe after the event loop.
    """

    units: deque[Unit[Any]]
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


class CursorFile:
    """The cursor database at ``path``: locked and opened, and units of work run on its thread.

    ``timeout_sec`` (over 0) bounds every call; a database that another process has locked is tried
    again within it. ":memory:" keeps nothing. ``read_only`` opens an existing file beside a running
    engine, without the lock. The directory is not created.
    """

    def __init__(
        self,
        path: str,
        *,
        wal_mode: bool,
        timeout_sec: float,
        clock: Clock,
        read_only: bool,
        on_retry: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self._on_retry = on_retry
        self._wal_mode = wal_mode
        self._timeout_sec = timeout_sec
        self._clock = clock
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
        self._units: deque[Unit[Any]] = deque()
        self._turn = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether units can be run."""
        return self._connection is not None

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
                if HAS_FLOCK and not self._read_only:
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
            self._lock_handle = take_lock(lock_path, self.path)
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
            raw = UnitConnection(*args, **kwargs)
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
            await self.run(self._set_up, "")
        except CursorStoreError as error:
            cause = error.__cause__
            if (
                not HAS_FLOCK
                and isinstance(cause, sqlite3.Error)
                and _code(cause) & 0xFF in _LOCKED
            ):
                raise already_running(self.path) from cause
            raise

    def _set_up(self, db: sqlite3.Connection) -> None:
        if self.path != MEMORY and not HAS_FLOCK and not self._read_only:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        version, application = (
            one_number(db, "PRAGMA user_version"),
            one_number(db, "PRAGMA application_id"),
        )
        strange = version == application == 0 and one_number(
            db, "SELECT count(*) FROM sqlite_master"
        )
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
            view_as_newest(db, version)
        else:
            db.execute(f"PRAGMA journal_mode = {'WAL' if self._wal_mode else 'DELETE'}").fetchall()
            db.execute("PRAGMA synchronous = FULL")
            Unit(migrate, WRITE).run(db)
        if self.path != MEMORY:
            # Without its log a database looks whole, but what was written since is lost.
            log = f"{self._place}-wal"
            places = [self._place, *([log] if identity(log) else [])]
            self._watched = {place: identity(place) for place in places}

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
            release_lock(handle)

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

    async def run(self, work: Callable[[sqlite3.Connection], _T], begin: str = WRITE) -> _T:
        """Run a unit in its turn, and again while another process holds SQLite's lock.

        ``begin`` is the statement that opens its transaction, "" for none.

        :raises CursorStoreError: if the file cannot be used; ``may_pass`` tells whether trying
            again makes sense.
        """
        locked: sqlite3.Error | None = None
        try:
            async with self._clock.timeout(self._timeout_sec), self._turn:
                while True:
                    if self._connection is None:
                        raise self._error("it is not open; open the store first")
                    unit = Unit(self._guarded(work), begin)
                    try:
                        return await self._on_thread(self._connection, unit)
                    except sqlite3.OperationalError as error:
                        if _code(error) & 0xFF not in _LOCKED:
                            raise
                        locked = error
                        if self._on_retry is not None:
                            self._on_retry()
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

    async def _on_thread(self, connection: aiosqlite.Connection, unit: Unit[_T]) -> _T:
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
        return any(identity(place) != known for place, known in self._watched.items())

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


def _checkpoint(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


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
