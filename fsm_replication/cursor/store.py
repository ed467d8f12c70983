"""The cursor store's calls: what is written to and read from the file, each in one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

from fsm_replication.cursor.file import READ, CursorFile
from fsm_replication.cursor.rows import (
    INTEGER_MAX,
    agreement_of,
    agreement_row,
    cursor_row,
    from_text,
    gap_of,
    gap_row,
    id_rows,
    interlock_of,
    interlock_row,
    letter_of,
    letter_row,
    position_of,
    to_limit,
    to_number,
    to_text,
    to_text_or_none,
)
from fsm_replication.letter_folding import check_room, fold, in_stream_order, letters_that_stay
from fsm_replication.ports import (
    LETTERS_BYTES,
    Agreement,
    BootstrapRow,
    Clock,
    Cursor,
    DeadLetter,
    GapRow,
    InterlockRow,
    PeerRecord,
    SystemClock,
    dropped_letters,
)

__all__ = ("SqliteCursorStore",)

GAPS_KEPT: Final = 10_000

_SET_CURSOR: Final = """
INSERT INTO peers (peer_id, stream_id, entries_read, incarnation, run_id) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (peer_id) DO UPDATE SET stream_id = excluded.stream_id,
    entries_read = excluded.entries_read, incarnation = excluded.incarnation,
    run_id = excluded.run_id
"""
# A letter that is stored again keeps its id and its time: it is the same letter.
_ADD_LETTER: Final = """
INSERT INTO dead_letters
    (peer_id, stream_id, reason, detail, key, fields, size, at_ms, from_foreign,
        entries, first_stream_id, held_bytes, same_as)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (peer_id, stream_id) DO UPDATE SET reason = excluded.reason,
    detail = excluded.detail, key = excluded.key, fields = excluded.fields, size = excluded.size,
    from_foreign = excluded.from_foreign, held_bytes = excluded.held_bytes,
    same_as = excluded.same_as
"""
_SET_BOOTSTRAP: Final = """
INSERT OR REPLACE INTO bootstraps
    (peer_id, stream_id, entries_read, walk, incarnation, reason, run_id)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_END_BOOTSTRAP: Final = "DELETE FROM bootstraps WHERE peer_id = ?"
_ADD_GAP: Final = """
INSERT INTO gaps (peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, kind)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_MORE_DROPPED: Final = """
UPDATE gaps SET missed = missed + ? WHERE peer_id = ? AND kind = 'dropped' AND healed_at_ms IS NULL
"""
# A count that cannot be told, or not be held, makes the sum one that cannot be told.
_MORE_MISSED: Final = """
UPDATE gaps SET missed = CASE WHEN missed <= :most - :more THEN missed + :more END WHERE id =
    (SELECT max(id) FROM gaps WHERE peer_id = :peer AND kind = :kind AND reason = :reason
        AND healed_at_ms IS NULL)
"""
# Its raw fields are not asked for: they may be large.
_LETTER_ALIKE: Final = """
SELECT peer_id, stream_id, reason, detail, key, NULL, size, at_ms, id, from_foreign, entries,
    first_stream_id
FROM dead_letters WHERE peer_id = ? AND same_as = ? AND reason = ? AND from_foreign = ?
ORDER BY id DESC LIMIT 1
"""
_HAS_LETTER: Final = "SELECT 1 FROM dead_letters WHERE peer_id = ? AND stream_id = ?"
_LETTERS_HELD: Final = """
SELECT count(*), ifnull(sum(held_bytes), 0) FROM dead_letters WHERE peer_id = ?
"""
_LETTER_SIZES: Final = """
SELECT id, held_bytes, entries FROM dead_letters WHERE peer_id = ? ORDER BY id DESC
"""
_LETTERS: Final = """
SELECT peer_id, stream_id, reason, detail, key, fields, size, at_ms, id, from_foreign, entries,
    first_stream_id
FROM dead_letters WHERE id > :after AND (:peer IS NULL OR peer_id = :peer) ORDER BY id LIMIT :limit
"""
_COUNT_LETTERS: Final = """
SELECT peer_id, count(*) FROM dead_letters GROUP BY peer_id ORDER BY peer_id
"""
_PURGE_LETTERS: Final = "DELETE FROM dead_letters WHERE :peer IS NULL OR peer_id = :peer"
_DELETE_LETTER: Final = "DELETE FROM dead_letters WHERE id = ?"
_STILL_BAD: Final = "UPDATE dead_letters SET reason = ?, detail = ? WHERE id = ?"
_TRIM_LETTERS: Final = "DELETE FROM dead_letters WHERE peer_id = ? AND id <= ?"
_GAPS: Final = """
SELECT peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, id, kind FROM gaps
WHERE :peer IS NULL OR peer_id = :peer ORDER BY id DESC LIMIT :limit
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
DELETE FROM gaps WHERE peer_id = :peer AND id <=
    (SELECT id FROM gaps WHERE peer_id = :peer ORDER BY id DESC LIMIT 1 OFFSET :keep)
"""
_SET_PAUSE: Final = """
INSERT INTO peers (peer_id, operator_pause) VALUES (?, ?)
ON CONFLICT (peer_id) DO UPDATE SET operator_pause = excluded.operator_pause
"""
_SET_INTERLOCK: Final = """
INSERT OR REPLACE INTO interlocks
    (peer_id, saved_at_ms, falls, reserved, forgiven_ms, tripped)
VALUES (?, ?, ?, ?, ?, ?)
"""
_SET_AGREED: Final = """
INSERT INTO peers (peer_id, agreed_at_ms, agreed_with, agreed_up_to, agreed_head,
    agreed_head_read, agreed_run_id)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (peer_id) DO UPDATE SET agreed_at_ms = excluded.agreed_at_ms,
    agreed_with = excluded.agreed_with, agreed_up_to = excluded.agreed_up_to,
    agreed_head = excluded.agreed_head, agreed_head_read = excluded.agreed_head_read,
    agreed_run_id = excluded.agreed_run_id
"""
_FORGET_EXCEPTIONS: Final = "DELETE FROM exceptions WHERE peer_id = ?"
_ADD_EXCEPTION: Final = "INSERT INTO exceptions (peer_id, key, agreed_at_ms) VALUES (?, ?, ?)"
_FORGET_STORE: Final = "UPDATE peers SET agreed_at_ms = NULL WHERE peer_id = ?"


class SqliteCursorStore:
    """Keeps cursors, dead letters and the loss ledger in the file at ``path``.

    ``timeout_sec`` (over 0) bounds every call; a database that another process has locked is tried
    again within it. ":memory:" keeps nothing. ``read_only`` opens an existing file beside a
    running engine, without the lock. The directory is not created. ``on_retry`` is called before each
    further try.

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
        on_retry: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self._file = CursorFile(
            path,
            wal_mode=wal_mode,
            timeout_sec=timeout_sec,
            clock=clock or SystemClock(),
            read_only=read_only,
            on_retry=on_retry,
        )

    async def open(self) -> None:
        """Lock and open the file, and bring its schema up to date.

        :raises AlreadyRunningError: if another engine holds it.
        :raises CursorStoreError: if it cannot be used; the message says what to do.
        """
        await self._file.open()

    async def close(self, *, timeout_sec: float | None = None) -> None:
        """Empty the log, unlock and release everything; a second call does nothing.

        A caller that is cancelled gets the cancellation when all is released.

        :raises CursorStoreError: if that takes longer than ``timeout_sec`` (by default that of all
            calls) because the disk does not answer. The thread then releases everything by itself,
            the lock too, once the disk answers; another call waits for that.
        """
        await self._file.close(timeout_sec=timeout_sec)

    async def load(self, peer_id: str) -> PeerRecord:
        """Return what is known of a peer; an unknown peer has an empty record."""
        name = to_text(peer_id)
        return await self._file.run(lambda db: _load(db, name), READ)

    async def save(self, cursors: Sequence[tuple[str, Cursor]]) -> None:
        """Store the settled cursors of several peers in one transaction."""
        rows = [cursor_row(peer_id, cursor) for peer_id, cursor in cursors]

        def work(db: sqlite3.Connection) -> None:
            db.executemany(_SET_CURSOR, rows)

        await self._file.run(work)

    async def settle(
        self,
        peer_id: str,
        cursor: Cursor | None,
        letters: Sequence[DeadLetter],
        *,
        keep: int,
        keep_bytes: int | None = None,
        fold: bool = False,
        may_drop: bool = True,
    ) -> int:
        """Store dead letters and the cursor that passes them in one transaction (G1).

        At most ``keep`` letters of this peer stay, the newest, and as many as hold ``keep_bytes``
        together, but one at least; returns how many entries were dropped with the others, and counts
        them in the ledger. Where none ``may_drop``, nothing is stored once there are ``keep``, or as
        they would hold more than ``keep_bytes`` with those that are there. With ``fold``, letters of
        one key and reason become one. An entry that is read again does not become a second letter.

        :raises LettersFullError: if none may be dropped and there is no room.
        :raises ValueError: if a letter is another peer's: its bound would not hold.
        """
        if any(letter.peer_id != peer_id for letter in letters):
            raise ValueError(f"letters of other peers than {peer_id!r}")
        name = to_text(peer_id)
        alike = None if not fold else in_stream_order(letters)
        rows = [letter_row(letter) for letter in letters] if alike is None else []
        most = INTEGER_MAX if keep_bytes is None else keep_bytes
        cursors = [] if cursor is None else [cursor_row(peer_id, cursor)]
        now = max((letter.at_ms for letter in letters), default=0)

        def work(db: sqlite3.Connection) -> int:
            before = db.execute(_LETTERS_HELD, (name,)).fetchone()
            db.executemany(_ADD_LETTER, rows)
            for letter in alike or ():
                _fold_letter(db, letter)
            db.executemany(_SET_CURSOR, cursors)
            if not may_drop:
                check_room(before, db.execute(_LETTERS_HELD, (name,)).fetchone(), keep, most)
                return 0
            dropped = _trim_letters(db, name, to_limit(keep), most)
            if dropped and not db.execute(_MORE_DROPPED, (dropped, name)).rowcount:
                _add_gap(db, dropped_letters(peer_id, now, dropped))
            return dropped

        return await self._file.run(work)

    async def begin_bootstrap(self, peer_id: str, row: BootstrapRow, gap: GapRow | None) -> None:
        """Note that copying starts, with the gap that made it necessary, in one transaction.

        Of a peer's ledger the newest 10,000 lines stay.
        """
        name, head = to_text(peer_id), row.head
        begun = (name, str(head.stream_id), to_number(head.entries_read))
        texts = (row.walk, row.incarnation, row.reason, row.run_id)
        begun_texts = tuple(to_text(text) for text in texts)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_BOOTSTRAP, begun + begun_texts)
            if gap is not None:
                _add_gap(db, gap)

        await self._file.run(work)

    async def pass_gap(self, peer_id: str, cursor: Cursor, gap: GapRow | None) -> None:
        """Set the cursor to where reading goes on, and note what is missing, in one transaction.

        An open line of the ledger with the same reason grows, or one is added. A copy that was
        begun is given up.
        """
        name, row = to_text(peer_id), cursor_row(peer_id, cursor)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_CURSOR, row)
            db.execute(_END_BOOTSTRAP, (name,))
            if gap is not None and not _extend_gap(db, gap):
                _add_gap(db, gap)

        await self._file.run(work)

    async def save_walk(self, peer_id: str, walk: str) -> None:
        """Note how far copying has come; without a copy begun there is nothing to note."""
        statement = "UPDATE bootstraps SET walk = ? WHERE peer_id = ?"
        await self._do(statement, to_text(walk), to_text(peer_id))

    async def finish_bootstrap(
        self, peer_id: str, cursor: Cursor, healed_at_ms: int | None
    ) -> None:
        """Set the cursor, remove the row, close the peer's open gaps, in one transaction.

        ``healed_at_ms`` is milliseconds since the epoch; None leaves the gaps open.
        """
        name, row = to_text(peer_id), cursor_row(peer_id, cursor)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_CURSOR, row)
            db.execute(_END_BOOTSTRAP, (name,))
            if healed_at_ms is not None:
                db.execute(_HEAL_GAPS, (healed_at_ms, "bootstrap", name))

        await self._file.run(work)

    async def set_operator_pause(self, peer_id: str, paused: bool) -> None:
        """Keep the operator's wish over restarts."""
        await self._do(_SET_PAUSE, to_text(peer_id), int(paused))

    async def save_interlock(self, peer_id: str, row: InterlockRow) -> None:
        """Keep what the interlock knows of a peer; it is on the disk when this returns."""
        await self._do(_SET_INTERLOCK, *interlock_row(peer_id, row))

    async def set_agreed(self, peer_id: str, agreement: Agreement, *, heal_gaps: bool) -> None:
        """Note when the peer's items were last known to be all here, instead of what was noted.

        With ``heal_gaps`` its open gaps are closed in the same transaction, as healed by repair.
        """
        name, at_ms = to_text(peer_id), agreement.at_ms
        row = agreement_row(peer_id, agreement)
        exceptions = [(name, to_text(key), at) for key, at in agreement.exceptions.items()]

        def work(db: sqlite3.Connection) -> None:
            db.execute(_SET_AGREED, row)
            db.execute(_FORGET_EXCEPTIONS, (name,))
            db.executemany(_ADD_EXCEPTION, exceptions)
            if heal_gaps:
                db.execute(_HEAL_GAPS, (at_ms, "repair", name))

        await self._file.run(work)

    async def forget_store(self, peer_id: str) -> None:
        """Forget what was true of a local store that is another one now: the agreement with it."""
        one = (to_text(peer_id),)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_FORGET_STORE, one)
            db.execute(_FORGET_EXCEPTIONS, one)

        await self._file.run(work)

    async def _do(self, statement: str, *values: Any) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute(statement, values)

        await self._file.run(work)

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
        values = {
            "after": min(after_id, INTEGER_MAX),
            "peer": to_text_or_none(peer_id),
            "limit": to_limit(limit),
        }

        def work(db: sqlite3.Connection) -> Sequence[DeadLetter]:
            found: list[DeadLetter] = []
            held = 0
            for row in db.execute(_LETTERS, values):
                letter = letter_of(row)
                held += letter.held_bytes
                if found and held > max_bytes:
                    break
                found.append(letter)
            return found

        return await self._file.run(work, READ)

    async def dead_letter_counts(self) -> dict[str, int]:
        """Return how many letters each peer has, those with none left out."""
        rows = await self._file.run(lambda db: db.execute(_COUNT_LETTERS).fetchall(), READ)
        return {from_text(peer_id): count for peer_id, count in rows}

    async def delete_dead_letters(self, ids: Sequence[int]) -> int:
        """Remove letters; returns how many there were."""
        rows = id_rows(ids)
        return await self._file.run(
            lambda db: max(0, db.executemany(_DELETE_LETTER, rows).rowcount)
        )

    async def purge_dead_letters(self, peer_id: str | None = None) -> int:
        """Remove all letters, or all of one peer; returns how many there were."""
        values = {"peer": to_text_or_none(peer_id)}
        return await self._file.run(lambda db: db.execute(_PURGE_LETTERS, values).rowcount)

    async def settle_retry(self, done: Sequence[int], still_bad: Sequence[DeadLetter]) -> None:
        """Remove the letters that are settled, and note why others are not, in one transaction.

        A letter that was removed meanwhile does not come back.
        """
        gone = id_rows(done)
        rows = [(to_text(one.reason), to_text(one.detail), one.id) for one in still_bad]

        def work(db: sqlite3.Connection) -> None:
            db.executemany(_DELETE_LETTER, gone)
            db.executemany(_STILL_BAD, rows)

        await self._file.run(work)

    async def gaps(self, peer_id: str | None = None, *, limit: int = 1000) -> Sequence[GapRow]:
        """Return the newest ``limit`` (0 or more) lines of the loss ledger, oldest first."""
        values = {"peer": to_text_or_none(peer_id), "limit": to_limit(limit)}
        newest = await self._file.run(
            lambda db: [gap_of(row) for row in db.execute(_GAPS, values)], READ
        )
        return newest[::-1]

    def __repr__(self) -> str:
        state = "open" if self._file.is_open else "closed"
        return f"<SqliteCursorStore {self.path!r} {state}>"


def _fold_letter(db: sqlite3.Connection, letter: DeadLetter) -> None:
    """Store a letter, as one with an earlier one of its key and reason where there is one."""
    row = letter_row(letter)
    name, alike = row[0], row[-1]
    if alike is not None and db.execute(_HAS_LETTER, row[:2]).fetchone() is None:
        which = (name, alike, to_text(letter.reason), int(letter.foreign))
        found = db.execute(_LETTER_ALIKE, which).fetchone()
        held = None if found is None else letter_of(found)
        made = None if held is None else fold(held, letter)
        if held is not None and made is held:
            return
        if held is not None and made is not None:
            db.execute(_DELETE_LETTER, (held.id,))
            row = letter_row(made)
    db.execute(_ADD_LETTER, row)


def _trim_letters(db: sqlite3.Connection, name: str | bytes, keep: int, keep_bytes: int) -> int:
    """Remove a peer's oldest letters over its bounds; returns how many entries they stood for."""
    count, held = db.execute(_LETTERS_HELD, (name,)).fetchone()
    if count <= keep and (held <= keep_bytes or count <= 1):
        return 0
    sizes = db.execute(_LETTER_SIZES, (name,)).fetchall()
    stay = letters_that_stay([size for _, size, _ in sizes], keep, keep_bytes)
    db.execute(_TRIM_LETTERS, (name, sizes[stay][0]))
    return sum(entries for _, _, entries in sizes[stay:])


def _add_gap(db: sqlite3.Connection, gap: GapRow) -> None:
    db.execute(_ADD_GAP, gap_row(gap))
    db.execute(_TRIM_GAPS, {"peer": to_text(gap.peer_id), "keep": GAPS_KEPT})


def _extend_gap(db: sqlite3.Connection, gap: GapRow) -> bool:
    """Count what is missing in the newest open line of its kind and reason, if there is one."""
    values = {
        "peer": to_text(gap.peer_id),
        "kind": to_text(gap.kind),
        "reason": to_text(gap.reason),
        "more": to_number(gap.missed),
        "most": INTEGER_MAX,
    }
    return bool(db.execute(_MORE_MISSED, values).rowcount)


def _agreement(db: sqlite3.Connection, peer_id: str | bytes) -> Agreement | None:
    one = (peer_id,)
    found = db.execute(
        "SELECT agreed_at_ms, agreed_with, agreed_up_to, agreed_head, agreed_head_read,"
        " agreed_run_id FROM peers WHERE peer_id = ? AND agreed_at_ms IS NOT NULL",
        one,
    ).fetchone()
    if found is None:
        return None
    rows = db.execute("SELECT key, agreed_at_ms FROM exceptions WHERE peer_id = ?", one)
    exceptions = {from_text(key): at for key, at in rows}
    return agreement_of(found, exceptions)


def _load(db: sqlite3.Connection, peer_id: str | bytes) -> PeerRecord:
    one = (peer_id,)
    known = db.execute(
        "SELECT operator_pause, stream_id, entries_read, incarnation, run_id"
        " FROM peers WHERE peer_id = ?",
        one,
    ).fetchone()
    paused, stream_id, read, *names = known or (0, None, None)
    copying = db.execute(
        "SELECT stream_id, entries_read, walk, incarnation, reason, run_id FROM bootstraps"
        " WHERE peer_id = ?",
        one,
    ).fetchone()
    interlock = db.execute(
        "SELECT saved_at_ms, falls, reserved, forgiven_ms, tripped FROM interlocks"
        " WHERE peer_id = ?",
        one,
    ).fetchone()
    count, held = db.execute(_LETTERS_HELD, one).fetchone()
    return PeerRecord(
        cursor=None
        if stream_id is None
        else Cursor(position_of(stream_id, read), *(from_text(text) for text in names)),
        bootstrap=copying
        and BootstrapRow(position_of(*copying[:2]), *(from_text(text) for text in copying[2:])),
        operator_pause=bool(paused),
        agreement=_agreement(db, peer_id),
        gaps=tuple(gap_of(row) for row in db.execute(_GAPS_OPEN, one)),
        dead_letters=count,
        letter_bytes=held,
        interlock=interlock and interlock_of(interlock),
    )
