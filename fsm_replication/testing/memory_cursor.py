"""A cursor store in memory, with the meaning of the one in SQLite and without its thread.

Content belongs to the object and outlives closing, so an engine that is started again finds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Final

from fsm_replication.errors import AlreadyRunningError, CursorStoreError
from fsm_replication.letter_folding import check_room, in_stream_order, letters_that_stay, same_as
from fsm_replication.letter_folding import fold as fold_letters
from fsm_replication.ports import (
    LETTERS_BYTES,
    Agreement,
    BootstrapRow,
    Cursor,
    DeadLetter,
    GapRow,
    InterlockRow,
    PeerRecord,
    Position,
    dropped_letters,
)

__all__ = ("CursorSnapshot", "MemoryCursorStore")

NAME: Final = "memory"
GAPS_KEPT: Final = 10_000
INTEGER_MAX: Final = 2**63 - 1


@dataclass(slots=True)
class _Tables:
    """All rows; whatever is in them is immutable."""

    # Letters and open gaps of a peer stand in tables of their own.
    peers: dict[str, PeerRecord] = field(default_factory=dict)
    # Of each peer, by stream id, in the order in which they were stored.
    letters: dict[str, dict[str, DeadLetter]] = field(default_factory=dict)
    gaps: dict[int, GapRow] = field(default_factory=dict)
    last_letter: int = 0
    last_gap: int = 0

    def copy(self) -> _Tables:
        letters = {peer_id: dict(held) for peer_id, held in self.letters.items()}
        return replace(self, peers=dict(self.peers), letters=letters, gaps=dict(self.gaps))


class CursorSnapshot:
    """Everything a :class:`MemoryCursorStore` held at one moment."""

    __slots__ = ("_tables",)

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables.copy()

    def tables(self) -> _Tables:
        """Return the rows, to be changed freely."""
        return self._tables.copy()


class MemoryCursorStore:
    """Keeps cursors, dead letters and the loss ledger.

    Every call does what it does at once and then lets others run: whoever is cancelled in it may
    find it done. While ``failure`` is set, every call but ``close`` raises that.
    """

    def __init__(self) -> None:
        self.failure: CursorStoreError | None = None
        self._tables = _Tables()
        self._is_open = False

    # For tests of crashes.

    def snapshot(self) -> CursorSnapshot:
        """Return all rows as they are now."""
        return CursorSnapshot(self._tables)

    def restore(self, snapshot: CursorSnapshot) -> None:
        """Hold what was held when ``snapshot`` was taken, and be closed, as after a crash."""
        self._tables = snapshot.tables()
        self._is_open = False

    # The calls of the port.

    async def open(self) -> None:
        """Open and lock it.

        :raises AlreadyRunningError: if it is open.
        """
        if self.failure is not None:
            raise self.failure
        if self._is_open:
            raise AlreadyRunningError(f"{NAME} is in use by another engine", path=NAME)
        self._is_open = True
        await asyncio.sleep(0)

    async def close(self, *, timeout_sec: float | None = None) -> None:
        """Unlock it, at once; a second call does nothing."""
        self._is_open = False

    def _use(self) -> _Tables:
        if self.failure is not None:
            raise self.failure
        if not self._is_open:
            raise CursorStoreError(
                f"{NAME} cannot be used: it is not open; open the store first", path=NAME
            )
        return self._tables

    async def load(self, peer_id: str) -> PeerRecord:
        """Return what is known of a peer; an unknown peer has an empty record."""
        tables = self._use()
        record = replace(
            tables.peers.get(peer_id, PeerRecord()),
            gaps=tuple(gap for gap in tables.gaps.values() if _is_open(gap, peer_id)),
            dead_letters=len(tables.letters.get(peer_id, ())),
            letter_bytes=_held(tables.letters.get(peer_id, {}))[1],
        )
        await asyncio.sleep(0)
        return record

    async def save(self, cursors: Sequence[tuple[str, Cursor]]) -> None:
        """Store the settled cursors of several peers."""
        self._use()
        for peer_id, cursor in cursors:
            self._set_cursor(peer_id, cursor)
        await asyncio.sleep(0)

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
        """Store dead letters and the cursor that passes them (G1).

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
        tables = self._use()
        before = tables.letters.get(peer_id, {})
        held, last = dict(before), tables.last_letter
        for letter in in_stream_order(letters) if fold else letters:
            last += self._add_letter(held, letter, last + 1, fold=fold)
        keep, most = max(0, keep), INTEGER_MAX if keep_bytes is None else keep_bytes
        if not may_drop:
            check_room(_held(before), _held(held), keep, most)
        tables.letters[peer_id], tables.last_letter = held, last
        if cursor is not None:
            self._set_cursor(peer_id, cursor)
        newest = sorted(held.values(), key=lambda letter: -letter.id)
        stay = letters_that_stay([letter.held_bytes for letter in newest], keep, most)
        surplus = newest[stay:] if may_drop else []
        for letter in surplus:
            del held[letter.stream_id]
        dropped = sum(letter.count for letter in surplus)
        if surplus:
            now = max((letter.at_ms for letter in letters), default=0)
            self._count_dropped(peer_id, now, dropped)
        await asyncio.sleep(0)
        return dropped

    @staticmethod
    def _add_letter(
        held: dict[str, DeadLetter], letter: DeadLetter, number: int, *, fold: bool
    ) -> bool:
        """Add a letter to those of a peer; returns whether it got a new id."""
        known = held.get(letter.stream_id)
        if known is not None:
            # It is the same letter: it keeps its id and its time, and what it stands for.
            held[letter.stream_id] = replace(
                letter,
                id=known.id,
                at_ms=known.at_ms,
                count=known.count,
                first_stream_id=known.first_stream_id,
            )
            return False
        alike = _alike(held, letter) if fold else None
        made = None if alike is None else fold_letters(alike, letter)
        if made is not None and alike is not None:
            if made is alike:
                return False
            del held[alike.stream_id]
        held[letter.stream_id] = replace(made or letter, id=number)
        return True

    async def begin_bootstrap(self, peer_id: str, row: BootstrapRow, gap: GapRow | None) -> None:
        """Note that copying starts, with the gap that made it necessary.

        Of a peer's ledger the newest 10,000 lines stay.
        """
        self._use()
        self._change(peer_id, bootstrap=row._replace(head=_position(row.head)))
        if gap is not None:
            self._add_gap(gap)
        await asyncio.sleep(0)

    async def pass_gap(self, peer_id: str, cursor: Cursor, gap: GapRow | None) -> None:
        """Set the cursor to where reading goes on, and note what is missing.

        An open line of the ledger with the same reason grows, or one is added. A copy that was
        begun is given up.
        """
        self._use()
        self._set_cursor(peer_id, cursor)
        self._change(peer_id, bootstrap=None)
        if gap is not None and not self._extend_gap(gap):
            self._add_gap(gap)
        await asyncio.sleep(0)

    async def save_walk(self, peer_id: str, walk: str) -> None:
        """Note how far copying has come; without a copy begun there is nothing to note."""
        record = self._use().peers.get(peer_id)
        if record is not None and record.bootstrap is not None:
            self._change(peer_id, bootstrap=record.bootstrap._replace(walk=walk))
        await asyncio.sleep(0)

    async def finish_bootstrap(
        self, peer_id: str, cursor: Cursor, healed_at_ms: int | None
    ) -> None:
        """Set the cursor, remove the row, close the peer's open gaps.

        Where ``healed_at_ms`` is None the gaps stay open.
        """
        self._use()
        self._set_cursor(peer_id, cursor)
        self._change(peer_id, bootstrap=None)
        if healed_at_ms is not None:
            self._heal(peer_id, healed_at_ms, "bootstrap")
        await asyncio.sleep(0)

    async def set_operator_pause(self, peer_id: str, paused: bool) -> None:
        """Keep the operator's wish over restarts."""
        self._use()
        self._change(peer_id, operator_pause=paused)
        await asyncio.sleep(0)

    async def save_interlock(self, peer_id: str, row: InterlockRow) -> None:
        """Keep what the interlock knows of a peer."""
        self._use()
        self._change(peer_id, interlock=row)
        await asyncio.sleep(0)

    async def set_agreed(self, peer_id: str, agreement: Agreement, *, heal_gaps: bool) -> None:
        """Note when the peer's items were last known to be all here, instead of what was noted.

        With ``heal_gaps`` its open gaps are closed, as healed by repair.
        """
        self._use()
        kept = replace(agreement, exceptions=dict(agreement.exceptions))
        self._change(peer_id, agreement=kept)
        if heal_gaps:
            self._heal(peer_id, agreement.at_ms, "repair")
        await asyncio.sleep(0)

    async def forget_store(self, peer_id: str) -> None:
        """Forget what was true of a local store that is another one now: the agreement with it."""
        if peer_id in self._use().peers:
            self._change(peer_id, agreement=None)
        await asyncio.sleep(0)

    async def dead_letters(
        self,
        peer_id: str | None = None,
        *,
        after_id: int = 0,
        limit: int = 1000,
        max_bytes: int = LETTERS_BYTES,
    ) -> Sequence[DeadLetter]:
        """Return letters in the order they were stored, those after ``after_id`` first.

        Fewer than ``limit`` where they hold more than ``max_bytes`` together, but one at least.
        """
        tables = self._use()
        names = list(tables.letters) if peer_id is None else [peer_id]
        found = [
            letter
            for name in names
            for letter in tables.letters.get(name, {}).values()
            if letter.id > after_id
        ]
        found.sort(key=lambda letter: letter.id)
        page = found[: max(0, limit)]
        sizes = accumulate(letter.held_bytes for letter in page)
        fitting = sum(size <= max_bytes for size in sizes)
        await asyncio.sleep(0)
        return page[: max(1, fitting)]

    async def dead_letter_counts(self) -> dict[str, int]:
        """Return how many letters each peer has, those with none left out."""
        letters = self._use().letters
        await asyncio.sleep(0)
        return {peer_id: len(letters[peer_id]) for peer_id in sorted(letters) if letters[peer_id]}

    async def delete_dead_letters(self, ids: Sequence[int]) -> int:
        """Remove letters; returns how many there were."""
        self._use()
        count = self._delete_letters(ids)
        await asyncio.sleep(0)
        return count

    async def purge_dead_letters(self, peer_id: str | None = None) -> int:
        """Remove all letters, or all of one peer; returns how many there were."""
        letters = self._use().letters
        names = list(letters) if peer_id is None else [peer_id]
        count = sum(len(letters.pop(name, ())) for name in names)
        await asyncio.sleep(0)
        return count

    async def settle_retry(self, done: Sequence[int], still_bad: Sequence[DeadLetter]) -> None:
        """Remove the letters that are settled, and note why others are not."""
        tables = self._use()
        self._delete_letters(done)
        judged = {letter.id: letter for letter in still_bad}
        for held in tables.letters.values():
            for stream_id, letter in held.items():
                now = judged.get(letter.id, letter)
                held[stream_id] = replace(letter, reason=now.reason, detail=now.detail)
        await asyncio.sleep(0)

    async def gaps(self, peer_id: str | None = None, *, limit: int = 1000) -> Sequence[GapRow]:
        """Return the newest ``limit`` (0 or more) lines of the loss ledger, oldest first."""
        held = self._use().gaps.values()
        found = [gap for gap in held if peer_id is None or gap.peer_id == peer_id]
        await asyncio.sleep(0)
        return found[max(0, len(found) - max(0, limit)) :]

    # Rows.

    def _change(self, peer_id: str, **changes: object) -> None:
        peers = self._tables.peers
        peers[peer_id] = replace(peers.get(peer_id, PeerRecord()), **changes)  # type: ignore[arg-type]

    def _set_cursor(self, peer_id: str, cursor: Cursor) -> None:
        self._change(peer_id, cursor=cursor._replace(position=_position(cursor.position)))

    def _delete_letters(self, ids: Sequence[int]) -> int:
        doomed, count = set(ids), 0
        for held in self._tables.letters.values():
            for stream_id in [key for key, letter in held.items() if letter.id in doomed]:
                del held[stream_id]
                count += 1
        return count

    def _add_gap(self, gap: GapRow) -> None:
        tables = self._tables
        tables.last_gap += 1
        kept = replace(gap, id=tables.last_gap, missed=_number(gap.missed))
        tables.gaps[kept.id] = kept
        mine = [one.id for one in tables.gaps.values() if one.peer_id == gap.peer_id]
        for number in mine[: max(0, len(mine) - GAPS_KEPT)]:
            del tables.gaps[number]

    def _extend_gap(self, gap: GapRow) -> bool:
        same = [
            held
            for held in self._tables.gaps.values()
            if _is_open(held, gap.peer_id) and (held.kind, held.reason) == (gap.kind, gap.reason)
        ]
        for held in same[-1:]:
            known = held.missed is not None and _number(gap.missed) is not None
            total = (held.missed or 0) + (gap.missed or 0)
            self._tables.gaps[held.id] = replace(held, missed=_number(total) if known else None)
        return bool(same)

    def _count_dropped(self, peer_id: str, at_ms: int, count: int) -> None:
        for number, gap in self._tables.gaps.items():
            if _is_open(gap, peer_id) and gap.kind == "dropped":
                self._tables.gaps[number] = replace(gap, missed=(gap.missed or 0) + count)
                return
        self._add_gap(dropped_letters(peer_id, at_ms, count))

    def _heal(self, peer_id: str, at_ms: int, by: str) -> None:
        gaps = self._tables.gaps
        for number, gap in gaps.items():
            if _is_open(gap, peer_id):
                gaps[number] = replace(gap, healed_at_ms=at_ms, healed_by=by)

    def __repr__(self) -> str:
        return f"<MemoryCursorStore {'open' if self._is_open else 'closed'}>"


def _is_open(gap: GapRow, peer_id: str) -> bool:
    return gap.peer_id == peer_id and gap.healed_at_ms is None


def _held(letters: Mapping[str, DeadLetter]) -> tuple[int, int]:
    return len(letters), sum(letter.held_bytes for letter in letters.values())


def _alike(held: Mapping[str, DeadLetter], letter: DeadLetter) -> DeadLetter | None:
    """Return the newest letter of the same key and reason."""
    wanted = same_as(letter)
    found = [
        one
        for one in held.values()
        if wanted is not None
        and (one.reason, one.foreign) == (letter.reason, letter.foreign)
        and same_as(one) == wanted
    ]
    return max(found, key=lambda one: one.id, default=None)


def _number(value: int | None) -> int | None:
    # SQLite's numbers end there, and a count that it cannot hold is not known.
    return value if value is not None and -INTEGER_MAX <= value <= INTEGER_MAX else None


def _position(position: Position) -> Position:
    return position._replace(entries_read=_number(position.entries_read))
