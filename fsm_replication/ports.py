"""What the engine takes from the world outside, as ports that a simulator can replace.

Time, wall clock, randomness, the Redis transport, the cursor store and the thread for heavy work are
given to constructors;
nothing above this module reads a clock, sleeps, opens a socket or rolls dice by itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from fsm_replication.heavy import HeavyWork, SideThread

__all__ = (
    "BEFORE_ALL",
    "LEAST_BYTES_PER_SEC",
    "LETTERS_BYTES",
    "LONG_AGO_MS",
    "PART_MAX",
    "Agreement",
    "BootstrapRow",
    "Clock",
    "Connection",
    "Cursor",
    "CursorStore",
    "DeadLetter",
    "GapRow",
    "InterlockRow",
    "Oversize",
    "PackedArguments",
    "PeerRecord",
    "Ports",
    "Position",
    "StreamId",
    "SystemClock",
    "SystemWallClock",
    "Transport",
    "WallClock",
    "dropped_letters",
)

# What a page of dead letters may hold; their number alone bounds no memory.
LETTERS_BYTES: Final = 16 * 1024 * 1024
# The time of an agreement that lies longer back than any tombstone is kept, nobody knows how long.
LONG_AGO_MS: Final = 0


LEAST_BYTES_PER_SEC: Final = 1024
"""What the line to a peer must bring. A reply has begun within its timeout, or is not waited for any
more; from then on each further timeout must bring this rate, which is an eighth of what a line of 64
kbit/s does: two connections of a link share it, and others may. So a reply of n bytes is waited for no longer
than two timeouts and n / 1024 seconds."""


# Time -----------------------------------------------------------------------------------------


class Clock(Protocol):
    """Elapsed time: for waiting, never for stamping."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; its zero means nothing."""

    async def sleep(self, seconds: float) -> None:
        """Wait; 0 lets others run once."""

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Raise TimeoutError in the body after ``seconds`` (None: never), as asyncio.timeout."""


class WallClock(Protocol):
    """The time of day, which may jump in both directions."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""


class SystemClock:
    """The clock of the running event loop."""

    def monotonic(self) -> float:
        """Return seconds on the machine's monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait; 0 lets others run once."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Return asyncio's own timeout."""
        return asyncio.timeout(seconds)


class SystemWallClock:
    """The machine's time of day."""

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        return time.time_ns() // 1_000_000


# Positions in a stream --------------------------------------------------------------------------

PART_MAX: Final = 2**64 - 1


class StreamId(NamedTuple):
    """A Redis stream id, ``<ms>-<seq>``; compared as numbers."""

    ms: int
    seq: int

    @classmethod
    def parse(cls, text: str | bytes) -> StreamId:
        """Parse ``b"1700000000000-3"`` or a bare ``"0"``.

        :raises ValueError: if it is not one or two unsigned 64-bit numbers.
        """
        raw = text.decode("ascii") if isinstance(text, bytes) else text
        ms, dash, seq = raw.partition("-")
        if not (ms.isascii() and ms.isdigit() and (not dash or (seq.isascii() and seq.isdigit()))):
            raise ValueError(f"not a stream id: {raw!r}")
        parsed = cls(int(ms), int(seq) if dash else 0)
        if max(parsed) > PART_MAX:
            raise ValueError(f"not a stream id: {raw!r}")
        return parsed

    @property
    def next(self) -> StreamId:
        """The smallest id after this one."""
        if self.seq == PART_MAX:
            return StreamId(self.ms + 1, 0)
        return StreamId(self.ms, self.seq + 1)

    @property
    def previous(self) -> StreamId:
        """The largest id before this one; 0-0 has none before it."""
        if self.seq:
            return StreamId(self.ms, self.seq - 1)
        return StreamId(self.ms - 1, PART_MAX) if self.ms else self

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"


BEFORE_ALL: Final = StreamId(0, 0)


class Position(NamedTuple):
    """How far a stream was read: the last id, and how many entries ever added that includes.

    ``entries_read`` is None where the peer's Redis does not count entries (before 7.0).

    A position was *read* where its id is that of an entry that was read or copied. It was *decided*
    where no entry has its id, and its id says so by its value: one before the oldest entry is that
    entry's ``previous``, so nothing can be missing between the two; the head of an empty stream is
    0-0, or the stream's last id, and what comes after it may have been trimmed meanwhile.
    """

    stream_id: StreamId
    entries_read: int | None


class Cursor(NamedTuple):
    """A settled position, which belongs to one incarnation of the local store (G2).

    ``run_id`` names the run of the peer's server whose stream was last seen to hold it, "" where
    that is not known: what another run counts tells nothing about it.
    """

    position: Position
    incarnation: str
    run_id: str = ""


# What the cursor store keeps --------------------------------------------------------------------


class BootstrapRow(NamedTuple):
    """A bootstrap in progress: where the stream's head was, and how far the copy has come.

    ``walk`` is opaque text that only the copying worker understands; "" is the beginning.
    ``run_id`` is the run of the peer's server that told the head.
    """

    head: Position
    walk: str
    incarnation: str
    reason: str
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """That all a peer held at ``at_ms`` (since the epoch) is held here, but for ``exceptions`` (G5).

    It belongs to the ``incarnation`` of the local store ("" where that is not known), as it was
    when the peer's stream was settled ``up_to`` an id. Each exception is a key that could not be
    taken, with the time of the last agreement that it was part of: None if it never was. ``head``
    is where the peer's stream ended before it was compared, in the run ``run_id`` of its server:
    entries up to there say nothing that the comparison did not see. None where that is not known.
    """

    at_ms: int
    incarnation: str = ""
    up_to: StreamId = BEFORE_ALL
    exceptions: Mapping[str, int | None] = field(default_factory=dict)
    head: Position | None = None
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that could not be applied, kept with the reason and its raw fields.

    ``id`` is 0 until the store has given it one. ``count`` is how many entries it stands for: those of
    one key that could not be applied for one reason are one letter, of which ``stream_id``, ``fields``
    and ``detail`` are those of the newest, ``first_stream_id`` is where the oldest stands ("" where it
    is the only one) and ``at_ms`` when that was found. A letter to which one more is added gets a new
    id: an id names what was looked at. ``fields`` is the flat list of names and values
    as received, or None where the entry was too large to keep; ``size`` is its bytes on the wire.
    ``foreign`` says that a foreign node sent it, whose own stamps are not to be used.
    """

    peer_id: str
    stream_id: str
    reason: str
    detail: str
    key: str | None
    fields: tuple[bytes, ...] | None
    size: int
    at_ms: int
    id: int = 0
    foreign: bool = False
    count: int = 1
    first_stream_id: str = ""

    @property
    def held_bytes(self) -> int:
        """Bytes of raw fields that this letter holds; 0 where the entry was too large to keep."""
        return 0 if self.fields is None else self.size


@dataclass(frozen=True, slots=True)
class GapRow:
    """A line of the loss ledger: entries that were not there when they were needed.

    Of ``kind`` "gap" are those that a stream no longer held, of ``kind`` "dropped" the dead letters
    that had to make room for newer ones. ``missed`` is None where their number cannot be known.
    ``healed_at_ms`` is None while open. ``healed_by`` says how: "bootstrap", "repair" or "" while
    open.
    """

    peer_id: str
    found_at_ms: int
    missed: int | None
    reason: str
    healed_at_ms: int | None = None
    healed_by: str = ""
    id: int = 0
    kind: str = "gap"


def dropped_letters(peer_id: str, at_ms: int, count: int) -> GapRow:
    """Return the ledger's line of dead letters that were dropped, until the peer is compared."""
    return GapRow(
        peer_id,
        at_ms,
        count,
        "dead letters over limits.dead_letters or limits.dead_letter_bytes",
        kind="dropped",
    )


@dataclass(frozen=True, slots=True)
class InterlockRow:
    """What an engine that begins anew must assume about a peer's deletes (G14).

    ``falls`` tells of values that the running sum has left: how long before ``saved_at_ms`` (since
    the epoch) that was, in ms, and how far the sum was below each then; ``reserved`` how much further
    it may have fallen since. ``forgiven_ms`` is how long a person's word held on from there, 0 for
    none; ``tripped`` why a person's word is waited for, "" where it is not.
    """

    saved_at_ms: int
    falls: tuple[tuple[int, int], ...] = ()
    reserved: int = 0
    forgiven_ms: int = 0
    tripped: str = ""


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """Everything the cursor store knows about one peer."""

    cursor: Cursor | None = None
    bootstrap: BootstrapRow | None = None
    operator_pause: bool = False
    agreement: Agreement | None = None
    gaps: tuple[GapRow, ...] = field(default=())
    dead_letters: int = 0
    interlock: InterlockRow | None = None
    letter_bytes: int = 0


class CursorStore(Protocol):
    """Durable memory of the engine; one engine at a time.

    Every call may raise CursorStoreError, of which ``may_pass`` tells whether the engine should
    go on and try again (a full or locked disk) or give up (a corrupt or missing file).
    """

    async def open(self) -> None:
        """Open and lock it.

        :raises AlreadyRunningError: if another engine holds it.
        :raises CursorStoreError: if it cannot be used.
        """

    async def close(self, *, timeout_sec: float | None = None) -> None:
        """Checkpoint, unlock and release everything; a second call does nothing.

        :raises CursorStoreError: if it takes longer than ``timeout_sec``, by default as long as any
            call may take. It then goes on alone, without a task.
        """

    async def load(self, peer_id: str) -> PeerRecord:
        """Return what is known of a peer; an unknown peer has an empty record."""

    async def save(self, cursors: Sequence[tuple[str, Cursor]]) -> None:
        """Store the settled cursors of several peers in one transaction."""

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
        them in the ledger: its open line of them grows, or one is added. Where none ``may_drop``,
        nothing is stored once there are ``keep``, or as they would hold more than ``keep_bytes`` with
        those that are there. With ``fold``, letters of one key and reason become one, see
        ``letter_folding``. An entry that is read again does not become a second letter.

        :raises LettersFullError: if none may be dropped and there is no room.
        """

    async def begin_bootstrap(self, peer_id: str, row: BootstrapRow, gap: GapRow | None) -> None:
        """Note that copying starts, with the gap that made it necessary, in one transaction."""

    async def pass_gap(self, peer_id: str, cursor: Cursor, gap: GapRow | None) -> None:
        """Set the cursor to where reading goes on, and note what is missing, in one transaction.

        An open line of the ledger with the same reason grows, or one is added. A copy that was
        begun is given up.
        """

    async def save_walk(self, peer_id: str, walk: str) -> None:
        """Note how far copying has come."""

    async def finish_bootstrap(
        self, peer_id: str, cursor: Cursor, healed_at_ms: int | None
    ) -> None:
        """Set the cursor, remove the row, close the peer's open gaps, in one transaction.

        Where ``healed_at_ms`` is None the gaps stay open: nothing was copied.
        """

    async def set_operator_pause(self, peer_id: str, paused: bool) -> None:
        """Keep the operator's wish over restarts."""

    async def save_interlock(self, peer_id: str, row: InterlockRow) -> None:
        """Keep what the interlock knows of a peer; it is on the disk when this returns."""

    async def set_agreed(self, peer_id: str, agreement: Agreement, *, heal_gaps: bool) -> None:
        """Note when the peer's items were last known to be all here, instead of what was noted (G5).

        With ``heal_gaps`` its open gaps are closed in the same transaction, as healed by repair.
        """

    async def forget_store(self, peer_id: str) -> None:
        """Forget what was true of a local store that is another one now: the agreement with it."""

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

    async def dead_letter_counts(self) -> dict[str, int]:
        """Return how many letters each peer has, those with none left out."""

    async def delete_dead_letters(self, ids: Sequence[int]) -> int:
        """Remove letters; returns how many there were."""

    async def purge_dead_letters(self, peer_id: str | None = None) -> int:
        """Remove all letters, or all of one peer; returns how many there were."""

    async def settle_retry(self, done: Sequence[int], still_bad: Sequence[DeadLetter]) -> None:
        """Remove the letters that are settled, and note why others are not, in one transaction.

        Of a letter that is still bad, reason and detail are taken over. One that was removed
        meanwhile does not come back.
        """

    async def gaps(self, peer_id: str | None = None, *, limit: int = 1000) -> Sequence[GapRow]:
        """Return the newest lines of the loss ledger, oldest first."""


# The Redis transport -----------------------------------------------------------------------------


class Oversize(NamedTuple):
    """Stands for a string of ``size`` bytes that was not kept."""

    size: int


class Connection(Protocol):
    """One connection to one Redis server.

    A reply is what hiredis makes of it: bytes, int, None, lists of these. An error reply to a
    command raises PeerReplyError from ``call``, and stands as the exception object in its place
    in the list that ``pipeline`` returns. Anything else that goes wrong closes the connection and
    raises ConnectionLostError, ProtocolError or ReplyTooLargeError; so does a cancelled call,
    because its reply could no longer be told from the next one.

    A reply must begin within ``timeout_sec``; after that each further ``timeout_sec`` must bring at
    least :data:`LEAST_BYTES_PER_SEC`, or the peer has given no answer.
    """

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used."""

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done as soon as the connection is closed, for whatever reason; never fails."""

    @property
    def received_bytes(self) -> int:
        """Bytes received since it was opened."""

    async def call(
        self,
        *args: bytes | str | int,
        timeout_sec: float | None = None,
        tail: PackedArguments | None = None,
    ) -> Any:
        """Send one command and return its reply; ``tail`` are arguments that come after ``args``."""

    async def pipeline(
        self, commands: Sequence[Sequence[bytes | str | int]], timeout_sec: float | None = None
    ) -> list[Any]:
        """Send several commands in one flight and return their replies."""

    def send(self, *commands: Sequence[bytes | str | int]) -> asyncio.Future[list[Any]]:
        """Send now, and return a future of the replies, to overlap waiting with work.

        The future may be waited for with ``asyncio.wait``; there is no timeout on it.
        """

    def limit_reply(self, limit_bytes: int | None) -> None:
        """Drop the connection when one flight's replies exceed this many bytes (None: never).

        Replies that are small by their nature, such as statuses and numbers, have a limit anyway.
        """

    async def skim(self, *args: bytes | str | int, timeout_sec: float) -> Any:
        """Send one command and keep no long string of its reply: each becomes an :class:`Oversize`.

        For replies that may be of any size; memory stays bounded whatever arrives.
        """

    def close(self) -> None:
        """Close at once."""

    async def wait_closed(self) -> None:
        """Return when nothing of it is left."""


class PackedArguments(NamedTuple):
    """Arguments of a command that are in the Redis protocol already, and how many they are.

    To pack many of them takes time, which may be had while another call is under way.
    """

    number: int
    data: bytes


class Transport(Protocol):
    """Opens connections."""

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> Connection:
        """Connect, authenticate and select the database, within ``timeout_sec``.

        :raises PeerRefusedError: if the URL cannot be used or the credentials are rejected.
        :raises ConnectionLostError: if the server cannot be reached in time.
        :raises PeerReplyError: if the server answers with an error that may pass.
        """


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything that a simulator replaces, in one hand."""

    transport: Transport
    cursor_store: CursorStore
    clock: Clock = field(default_factory=SystemClock)
    wall_clock: WallClock = field(default_factory=SystemWallClock)
    random: random.Random = field(default_factory=random.Random)
    heavy: HeavyWork = field(default_factory=SideThread)
