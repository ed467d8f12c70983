"""The tailer: reads one peer's stream and takes it to the local store.

Theory of operation. One task lives from the moment the link is connected until it is not. It is
handed a *mode* by the link and takes it up between batches; what it finds out it reports, and then
waits for the next mode. Entries that were read stand in a queue of chunks until they are settled,
whatever the mode does meanwhile: a pause holds them, the next decision begins by settling them.

The next read is sent before the last one is worked on, and a chunk is decoded while the one before
is on its way to the store, so network, decoding and store overlap. A chunk is small, so that other
links of the same event loop get their turn.

Memory: at most one reply being worked on and one arriving, each of at most half of
``limits.batch_bytes``, and two decoded parts of a quarter; or one entry of up to ``batch_bytes``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from fsm_replication.batch import Part
from fsm_replication.circuits import CircuitState
from fsm_replication.config import Settings
from fsm_replication.errors import (
    ConnectionLostError,
    CursorStoreError,
    NetworkError,
    PeerError,
    ProtocolError,
    ReplicationError,
    ReplyTooLargeError,
    StoreReopenedError,
)
from fsm_replication.layout import Keys
from fsm_replication.ports import (
    BEFORE_ALL,
    LEAST_BYTES_PER_SEC,
    Cursor,
    GapRow,
    PeerRecord,
    Position,
)
from fsm_replication.replies import entries as entries_of
from fsm_replication.reports import LinkFact, PauseReason, Reporter
from fsm_replication.transport import too_slow
from fsm_replication.workers.applier import Applier, Blocked, Unsettled, make_builder
from fsm_replication.workers.chunks import ChunkQueue
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.copier import Copier, make_source
from fsm_replication.workers.history import Gap, StreamInfo
from fsm_replication.workers.peer_history import PeerHistory
from fsm_replication.workers.reader import Read, StreamReader
from fsm_replication.workers.rounds import Rounds

__all__ = ("Mode", "Tailer", "decided_by", "passed_reason")

BEHIND_MS: Final = 2000
BEHIND_BATCHES: Final = 10
HOLD_POLL_SEC: Final = 0.1
HOLD_POLLS_PER_COUNT: Final = 50
# How often in a row a peer is copied without the head being reached in between: where entries are
# missing, and where that is only a doubt.
COPIES_FOR_LOSS: Final = 1
COPIES_FOR_DOUBT: Final = 2


def decided_by(settings: Settings) -> tuple[object, ...]:
    """Return what a decision rests on: where it changes, a link decides again.

    All other settings are read anew whenever they are needed. The limit on the rate is among these,
    because whoever waits for it has worked out for how long.
    """
    hot_path, limits = settings.hot_path, settings.limits
    return (
        hot_path.enabled,
        hot_path.rate_limit_enabled,
        hot_path.rate_limit_per_sec,
        hot_path.rate_limit_burst,
        limits.payload_bytes,
        limits.batch_bytes,
    )


def passed_reason(
    reasons: frozenset[PauseReason],
    circuits: Sequence[CircuitState],
    *,
    accepts: bool,
    room: bool,
    clocks_agree: bool,
) -> tuple[PauseReason | None, str] | None:
    """Return a reason to pause that has gone by itself, and why; None where all still hold.

    The reason is None where there is none left at all. ``circuits`` are the store's, ``accepts``
    says whether it takes writes, ``room`` whether dead letters are known to have room again,
    ``clocks_agree`` whether ours and the peer's are not a day apart, as far as is known.
    """
    if not reasons:
        return None, "no reason to pause is left"
    if PauseReason.CIRCUIT in reasons and set(circuits) == {CircuitState.CLOSED}:
        return PauseReason.CIRCUIT, "the store's circuits are closed"
    if PauseReason.BACKPRESSURE in reasons and accepts:
        return PauseReason.BACKPRESSURE, "the store accepts writes"
    if PauseReason.DEAD_LETTERS_FULL in reasons and room:
        return PauseReason.DEAD_LETTERS_FULL, "there is room for dead letters"
    if PauseReason.CLOCK in reasons and clocks_agree:
        return PauseReason.CLOCK, "our clock and the peer's are not a day apart any more"
    return None


class Mode(Enum):
    """What a tailer is to do."""

    DECIDE = auto()
    COPY = auto()
    READ_IN_BULK = auto()
    READ_AT_HEAD = auto()
    HOLD = auto()
    IDLE = auto()
    STOP = auto()


@dataclass(frozen=True, slots=True, eq=False)
class _Orders:
    """A mode, and the reporter of the state entry that it was handed out in."""

    mode: Mode
    report: Reporter


class Tailer:
    """Reads one peer over one pair of connections.

    ``reasons`` returns the reasons to pause that hold now, ``priority`` the peer's as it is now.
    """

    def __init__(
        self,
        context: LinkContext,
        lines: Lines,
        reasons: Callable[[], frozenset[PauseReason]],
        priority: Callable[[], int],
    ) -> None:
        self._context = context
        self._lines = lines
        self._reasons = reasons
        self._priority = priority
        self._decided_by: tuple[object, ...] = ()
        self._limits = context.settings.limits
        self._builder = make_builder(context, foreign=lines.foreign)
        self._keys = Keys(context.peer.redis_prefix)
        self._history = PeerHistory(context, lines)
        self._reader = StreamReader(self._keys.stream, context.current, lines.abilities)
        self._rounds = Rounds(context.ports.clock, context.progress)
        self._queue = ChunkQueue(context)
        self._asked_at = self._answered_at = 0.0
        self._asked_bulk = False
        self._asked_to_block_sec = 0.0
        self._counts_seen_at = 0.0
        self._received_when_asked = 0
        self._outstanding: asyncio.Future[list[Any]] | None = None
        self._orders: _Orders | None = None
        self._obeyed: _Orders | None = None
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._applier: Applier | None = None
        self._copier: Copier | None = None
        self._incarnation = ""
        self._gap: tuple[Gap | None, str] = (None, "")
        # How often the peer was copied since a read has reached the head with nothing missing.
        self._copies = 0

    # What the link asks of it.

    def set_mode(self, mode: Mode, report: Reporter) -> None:
        """Hand over the next mode; it is taken up between batches."""
        self._orders = _Orders(mode, report)
        self._wake()

    def forgive(self) -> None:
        """Let what comes be a beginning: somebody asked for it."""
        self._rounds.forgive()

    def stop(self) -> None:
        """Ask it to flush once and end."""
        if self._orders is not None:
            self._orders = _Orders(Mode.STOP, self._orders.report)
        self._wake()

    def _wake(self) -> None:
        if not self._changed.done():
            self._changed.set_result(None)

    # Its life.

    async def run(self, report: Reporter) -> None:
        """Work until stopped or the connection is lost; reports LOST with the error."""
        try:
            try:
                await self._live()
            except (NetworkError, PeerError, CursorStoreError, StoreReopenedError) as error:
                if isinstance(error, CursorStoreError):
                    if not error.may_pass:
                        raise
                    self._context.cursors.failed(error)
                # A full or locked disk ends no engine: the link comes back and tries again.
                self._context.progress.failed(error)
                self._context.metrics.error(type(error).__name__)
                if isinstance(error, StoreReopenedError):
                    # A store that may have lost what came before must not be given what comes after.
                    self._context.distrust_store()
                    await self._queue.abandon()
                    self._queue.forget()
                report(LinkFact.LOST, str(error), error)
            await self._last_flush()
        finally:
            self._context.copy_slot.release(self)
            await self._queue.abandon()
            self._queue.forget()
            self._lines.close()
            await self._lines.wait_closed()

    async def _live(self) -> None:
        while True:
            orders = self._orders
            assert orders is not None, "a tailer is started with a mode"
            if orders.mode is Mode.STOP:
                return
            self._obeyed = orders
            if orders.mode is not Mode.COPY:
                self._context.copy_slot.release(self)
            try:
                await self._rest(orders)
                if self._orders is orders:
                    await self._obey(orders)
            except Blocked as blocked:
                if blocked.reason is PauseReason.BACKPRESSURE:
                    self._context.metrics.backpressure.inc()
                orders.report(LinkFact.BLOCKED, str(blocked), blocked.reason)
            except Unsettled:
                pass  # The mode has changed, and the next one begins with what is held.
            finally:
                self._context.progress.head_watched_until = -math.inf
            await self._until_changed(orders)

    async def _obey(self, orders: _Orders) -> None:
        if orders.mode not in (Mode.DECIDE, Mode.HOLD) and self._is_outdated():
            # They changed while the decision was on its way from here and back.
            orders.report(LinkFact.OUTDATED, "settings changed while it was decided")
        elif orders.mode is Mode.DECIDE:
            await self._decide(orders)
        elif orders.mode is Mode.COPY:
            await self._copy(orders)
        elif orders.mode in (Mode.READ_IN_BULK, Mode.READ_AT_HEAD):
            await self._read_on(orders)
            # The mode may have changed while the last chunk was on its way.
            await self._work_off(orders)
        elif orders.mode is Mode.HOLD:
            await self._hold(orders)

    async def _rest(self, orders: _Orders) -> None:
        """Begin a round; wait first, where those before have come to nothing."""
        if orders.mode in (Mode.HOLD, Mode.IDLE):
            return
        wait = self._rounds.begin(self._context.settings.hot_path.block_timeout)
        if wait > 0:
            self._note_delay(wait)
            await self._until_changed(orders, wait)

    def _note_delay(self, wait_sec: float) -> None:
        context = self._context
        context.progress.rounds_delayed += 1
        context.metrics.error("round_in_vain")
        if self._rounds.delays == 1:
            why = "the peer contradicts itself, the local store does, or this is a defect"
            context.log.warning("rounds_in_vain", seconds=wait_sec, why=why)

    # Waiting: always for the thing itself, a change of mode, or the loss of a connection.

    async def _until_changed(self, orders: _Orders, seconds: float | None = None) -> None:
        """Wait until the mode is another one, or ``seconds`` have passed."""
        clock = self._context.ports.clock
        try:
            async with clock.timeout(seconds):
                while self._orders is orders:
                    await self._wait_for(())
        except TimeoutError:
            return

    async def _wait_for(self, futures: tuple[asyncio.Future[Any], ...]) -> None:
        """Return when one of ``futures`` is done or the mode may have changed.

        :raises ConnectionLostError: if a connection is gone that nothing else would notice.
        """
        lost = (self._lines.asking.lost, self._lines.reading.lost)
        await asyncio.wait((*futures, self._changed, *lost), return_when=asyncio.FIRST_COMPLETED)
        if self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        elif any(future.done() for future in futures):
            return
        elif any(future.done() for future in lost):
            where = self._context.peer.display_url
            raise ConnectionLostError(f"{where} closed a connection")

    def _is_interrupted(self) -> bool:
        return self._orders is not self._obeyed

    def _is_outdated(self) -> bool:
        return self._decided_by != decided_by(self._context.settings)

    # Deciding what comes next.

    async def _decide(self, orders: _Orders) -> None:
        context = self._context
        self._decided_by = decided_by(context.settings)
        reasons = sorted(self._reasons())
        if reasons:
            # The reason is known already; named again it might outlive a resume() under way.
            why = context.interlock.tripped if reasons[0] is PauseReason.INTERLOCK else ""
            orders.report(LinkFact.BLOCKED, f"still paused: {reasons[0]}{why and f': {why}'}")
            return None
        applier = await self._get_applier()
        await self._work_off(orders)
        if self._is_interrupted():
            return None
        record = await context.ports.cursor_store.load(context.peer_id)
        context.progress.dead_letters = record.dead_letters
        context.progress.gaps_open = len(record.gaps)
        cursor = context.cursors.get(context.peer_id) or record.cursor
        await self._take_over(record, cursor)
        await self._look_for_older_peer(record, cursor)
        if not context.settings.hot_path.enabled:
            orders.report(LinkFact.NO_HOT_PATH, "hot_path.enabled is false")
            return None
        if self._copier is not None:
            return self._must_copy(orders, None, "the bootstrap goes on")
        row = record.bootstrap
        if row is not None and row.incarnation == self._incarnation:
            await self._history.look_for_older_peer(row.head, row.run_id)
            if row.walk:
                # What was copied so far may have been lost with the local store since.
                await context.ports.cursor_store.save_walk(context.peer_id, "")
            return self._must_copy(orders, None, "a bootstrap is unfinished")
        if cursor is None:
            return self._must_copy(orders, None, "no cursor")
        if cursor.incarnation != self._incarnation:
            return self._must_copy(orders, None, "the local store is another incarnation")
        applied = await applier.call(
            context.reads, lambda: context.store.applied_position(context.peer_id)
        )
        if applied is None and context.store.keeps_positions:
            await context.forget_store()
            why = "the local store came back as it was before this peer was read"
            return self._must_copy(orders, None, why)
        if applied is not None and applied.stream_id < cursor.position.stream_id:
            await self._note_older_store(applied)
        return await self._decide_by_stream(orders, cursor, applied)

    async def _take_over(self, record: PeerRecord, cursor: Cursor | None) -> None:
        """Take over what is known of the peer, as far as it belongs to the store as it is now."""
        context, agreement, now = self._context, record.agreement, self._incarnation
        before, context.progress.incarnation = context.progress.incarnation, now
        owner = "" if agreement is None else agreement.incarnation
        if not owner and cursor is not None:
            owner = cursor.incarnation
        if {before, owner} - {"", now}:
            await context.forget_store()
            return
        context.stale.agreed(agreement)

    async def _look_for_older_peer(self, record: PeerRecord, cursor: Cursor | None) -> None:
        """Where nothing is read from the stream, or was not, see whether the peer came back older."""
        agreement, row = self._context.stale.agreement, record.bootstrap
        if agreement is None:
            return
        read: list[tuple[Position, str]] = []
        if cursor is not None:
            read.append((cursor.position, cursor.run_id))
        if row is not None:
            read.append((row.head, row.run_id))
        compared = [] if agreement.head is None else [(agreement.head, agreement.run_id)]
        if not (read or compared):
            return
        # The others may have been trimmed since: where this one is there, that tells nothing.
        newest = max(compared + read, key=lambda one: one[0].stream_id)
        if newest in compared or not self._context.settings.hot_path.enabled:
            await self._history.look_for_older_peer(*newest)

    async def _note_older_store(self, applied: Position) -> None:
        """Handle a store that lost what it had of a peer's stream after ``applied``."""
        context, agreement = self._context, self._context.stale.agreement
        context.distrust_store()
        if agreement is not None and applied.stream_id < agreement.up_to:
            await context.forget_store()

    async def _get_applier(self) -> Applier:
        """Return what applies, for the store as it is now: it may have come back as another."""
        context = self._context
        limits = context.settings.limits
        if limits != self._limits:
            self._limits = limits
            self._builder = make_builder(context, foreign=self._lines.foreign)
            self._applier = None
        run_id = await self._history.run_id()
        asking = Applier(context, self._builder, "", self._is_interrupted)
        incarnation = await asking.call(context.reads, context.store.incarnation)
        if self._applier is None or incarnation != self._incarnation:
            if self._incarnation not in ("", incarnation):
                # What is held here was read for a store that had all that came before.
                await self._queue.abandon()
                self._queue.forget()
            self._incarnation = incarnation
            self._applier = Applier(
                context, self._builder, incarnation, self._is_interrupted, run_id
            )
            self._copier = None
        return self._applier

    async def _decide_by_stream(
        self, orders: _Orders, cursor: Cursor, applied: Position | None
    ) -> None:
        """Go on from the older of two positions, if nothing is missing after either.

        A stream that was made anew since may look as if all of it came after the older one.
        """
        known = {cursor.position.stream_id: cursor.position}
        if applied is not None:
            known.setdefault(applied.stream_id, applied)
        positions = [known[at] for at in sorted(known)]
        # In this order: what is trimmed between the questions is seen by the last.
        there = [await self._history.has(at.stream_id) for at in positions]
        info = await self._history.info()
        found = [
            self._history.check(at, cursor.run_id, info, entry_is_there=held)
            for at, held in zip(positions, there, strict=True)
        ]
        await self._history.note_older_peer(found[-1], positions[-1].stream_id, info)
        position, gap = positions[0], next(filter(None, found), None)
        if gap is None and cursor.run_id != self._lines.abilities.run_id:
            # From now on this run of the server vouches for it.
            held = cursor._replace(run_id=self._lines.abilities.run_id)
            self._context.cursors.settle(self._context.peer_id, held)
        if gap is not None:
            if self._must_copy_for(gap):
                self._must_copy(orders, gap, str(gap))
                return
            position = info.start
            await self._pass_gap(gap, position)
        elif self._reader.position != position:
            await self._read_from(position)
        self._context.progress.read = self._context.progress.settled = position
        self._report_distance(orders, position, info)

    async def _read_from(self, position: Position) -> None:
        """Read on from a position that was decided; what is asked for already is not taken."""
        if self._outstanding is not None:
            await self._reopen_reading()
        self._reader.position = position

    def _must_copy_for(self, gap: Gap) -> bool:
        """Say whether to copy the peer; if not, the gap is left to the cold path.

        A stream so short that it is trimmed while its peer is copied would be copied for ever; a
        doubt may have come of a head that was noted while the stream was empty.
        """
        return self._copies < (COPIES_FOR_DOUBT if gap.is_doubt else COPIES_FOR_LOSS)

    async def _pass_gap(self, gap: Gap, start: Position) -> None:
        """Note what is missing before ``start``, and read on from there.

        The gap stays open in ledger and health until trees were compared, which not every peer has.
        """
        context = self._context
        context.progress.stream_too_short = True
        why = f"{gap.reason}, right after a bootstrap"
        row = GapRow(context.peer_id, context.ports.wall_clock.now_ms(), gap.missed, why)
        cursor = Cursor(start, self._incarnation, self._lines.abilities.run_id)
        store = context.ports.cursor_store
        await store.pass_gap(context.peer_id, cursor, row)
        context.cursors.saved(context.peer_id, cursor)
        context.progress.gaps_open = len((await store.load(context.peer_id)).gaps)
        context.metrics.trimmed.inc()
        context.log.warning("gap_not_healed", missed=gap.missed, why=why)
        # The position in the store moves along, or the next decision finds the same gap again.
        assert self._applier is not None
        await self._applier.hand_over(Part(), start)
        context.progress.read = context.progress.settled = start
        await self._read_from(start)

    def _must_copy(self, orders: _Orders, gap: Gap | None, why: str) -> None:
        self._gap = (gap, why)
        orders.report(LinkFact.MUST_COPY, why)

    def _report_distance(self, orders: _Orders, position: Position, info: StreamInfo) -> None:
        behind = self._distance(position, info)
        if behind:
            orders.report(LinkFact.BEHIND, behind)
        else:
            orders.report(LinkFact.AT_HEAD, "close to the head")

    def _distance(self, position: Position, info: StreamInfo) -> str:
        """Return why the link should read in bulk; empty where it is close to the head."""
        progress = self._context.progress
        progress.newest_ms = info.last_id.ms
        progress.unread_events = None
        if info.added is not None and position.entries_read is not None:
            unread = progress.unread_events = max(0, info.added - position.entries_read)
            most = BEHIND_BATCHES * self._context.settings.hot_path.max_batch_size
            if unread > most:
                return f"{unread} events behind"
        if position.stream_id >= info.last_id:
            progress.unread_events = 0
            progress.head_reached_at = self._context.ports.clock.monotonic()
            return ""
        if position.stream_id == BEFORE_ALL:
            return "nothing of the stream was read yet"
        lag_ms = info.last_id.ms - position.stream_id.ms
        return f"{lag_ms} ms behind" if lag_ms > BEHIND_MS else ""

    # Bootstrapping.

    async def _copy(self, orders: _Orders) -> None:
        context = self._context
        applier = await self._get_applier()
        if not await self._enter_copy_slot(orders):
            return
        if self._copier is None:
            context.progress.copied = 0
            self._copier = Copier(
                context,
                self._lines,
                applier,
                make_source(context, self._lines),
                self._incarnation,
                self._is_interrupted,
            )
        head = await self._copier.run(*self._gap)
        if head is None:
            return
        self._copier = None
        context.copy_slot.release(self)
        if self._outstanding is not None:
            await self._reopen_reading()
        self._reader.position = head
        self._copies += 1
        context.progress.go_on_from(head)
        self._report_distance(orders, head, await self._history.info())

    async def _enter_copy_slot(self, orders: _Orders) -> bool:
        """Wait for the turn to copy; False if the mode changed first."""
        context = self._context
        context.progress.bootstrap = "waiting for another link's bootstrap"
        progress = context.progress
        turn = asyncio.ensure_future(
            context.copy_slot.acquire(self, self._priority, lambda: progress.advances)
        )
        try:
            while not turn.done() and self._orders is orders:
                await self._wait_for((turn,))
        finally:
            if not turn.done():
                turn.cancel()
                await asyncio.wait((turn,))
        if self._orders is orders:
            context.progress.bootstrap = "copying"
            return True
        return False

    # Reading on.

    async def _read_on(self, orders: _Orders) -> None:
        at_head = orders.mode is Mode.READ_AT_HEAD
        # The first read asks for counts, so that what was trimmed since deciding is noticed.
        ask_bulk = True
        while self._orders is orders:
            if self._outstanding is None:
                self._ask(bulk=ask_bulk)
            read = await self._next_read(orders)
            if read is None:
                await self._rest(orders)
                continue
            if read.gap is not None and not await self._get_past(read.gap, read, orders):
                return
            self._queue.take_in(read)
            if read.at_head and not at_head:
                await self._work_off(orders)
                self._note_head(read)
                orders.report(LinkFact.AT_HEAD, "a read reached the head")
                return
            # At the head a full read means there may be more, and an empty one that there is time
            # to compare counts: both ask for them once. A flow that never rests is looked at too.
            ask_bulk = not at_head or read.full or self._counts_are_due(read)
            await self._pace(orders, len(read.entries))
            if not read.entries:
                await self._rest(orders)
            if self._orders is orders:
                self._ask(bulk=ask_bulk)
            await self._work_off(orders, self._next_is_here)
            if read.at_head:
                self._note_head(read)
            elif at_head and read.info is not None:
                behind = self._distance(read.end, read.info)
                if behind:
                    orders.report(LinkFact.BEHIND, behind)
        return

    async def _get_past(self, gap: Gap, read: Read, orders: _Orders) -> bool:
        """Handle a gap before what was read; False if reading cannot go on behind it now."""
        await self._work_off(orders)
        if read.info is not None:
            at = self._reader.position.stream_id
            await self._history.note_older_peer(gap, at, read.info)
        if self._must_copy_for(gap):
            self._must_copy(orders, gap, str(gap))
            return False
        if self._queue:
            return False  # Interrupted; what came is read again.
        await self._pass_gap(gap, read.start)
        self._reader.position = read.end
        return True

    def _counts_are_due(self, read: Read) -> bool:
        now = self._context.ports.clock.monotonic()
        if read.info is not None:
            self._counts_seen_at = now
            return False
        waited = now - self._counts_seen_at >= self._context.settings.hot_path.block_timeout
        return waited or not read.entries

    def _ask(self, *, bulk: bool) -> None:
        reading, settings = self._lines.reading, self._context.settings
        self._asked_at = self._context.ports.clock.monotonic()
        self._asked_bulk = bulk
        self._received_when_asked = reading.received_bytes
        if bulk:
            self._asked_to_block_sec = 0.0
            self._outstanding = self._reader.ask_bulk(reading)
        else:
            self._asked_to_block_sec = settings.hot_path.block_timeout
            self._outstanding = self._reader.ask_blocking(reading)
        if self._obeyed is not None and self._obeyed.mode is Mode.READ_AT_HEAD:
            overdue_at = self._asked_at + self._asked_to_block_sec + settings.timeouts.command
            self._context.progress.head_watched_until = overdue_at
        # By the time that somebody looks at it the store may have worked for long.
        self._outstanding.add_done_callback(self._note_answered)

    def _note_answered(self, _: asyncio.Future[list[Any]]) -> None:
        self._answered_at = self._context.ports.clock.monotonic()

    async def _next_read(self, orders: _Orders) -> Read | None:
        """Wait for the outstanding reply; None if the mode changed or the read must be redone."""
        context, outstanding = self._context, self._outstanding
        assert outstanding is not None
        timeout = context.settings.timeouts.command
        limit = timeout + self._asked_to_block_sec
        received, least = self._received_when_asked, 1
        while not outstanding.done() and self._orders is orders:
            try:
                async with context.ports.clock.timeout(limit):
                    while not outstanding.done() and self._orders is orders:
                        await self._wait_for((outstanding,))
            except TimeoutError:
                # On a slow line a large reply takes its time, as long as enough bytes keep coming.
                before, received = received, self._lines.reading.received_bytes
                if received - before < least:
                    where = context.peer.display_url
                    raise too_slow(where, received - before, limit) from None
                limit, least = timeout, int(timeout * LEAST_BYTES_PER_SEC)
        if not outstanding.done():
            return None
        self._outstanding = None
        try:
            replies = outstanding.result()
        except ReplyTooLargeError:
            return await self._read_smaller(orders)
        read = self._reader.take(self._lines.reading, replies)
        self._measure_read()
        return read

    def _measure_read(self) -> None:
        context = self._context
        metrics = context.metrics
        metrics.reads.inc()
        if self._asked_bulk:
            took = self._answered_at - self._asked_at
            metrics.read_seconds.observe(took)
            context.slo.stream_read(took)
        metrics.adaptive_batch_size.set(self._reader.size)

    async def _pace(self, orders: _Orders, events: int) -> None:
        if not events:
            return
        wait = self._context.limiter.reserve(events)
        if wait > 0:
            await self._work_off(orders)
            await self._until_changed(orders, wait)

    # Replies that are too large.

    async def _read_smaller(self, orders: _Orders) -> Read | None:
        """Open the reading connection again; a single entry too large to hold is passed over.

        Returns a read of nothing where the head is reached: then it is the stream's counts that
        are too large, which carry its first and last entry.
        """
        context = self._context
        await self._reopen_reading()
        if self._reader.shrink():
            return None
        timeout = context.settings.timeouts.command
        ahead = await self._reader.look_ahead(self._lines.reading, timeout)
        if ahead is None:
            return self._reader.at_end(await self._history.info())
        await self._work_off(orders)
        if self._queue:
            return None
        end, size = ahead
        if size <= context.settings.limits.batch_bytes and await self._read_alone(end):
            await self._work_off(orders)
            return None
        applier = self._applier
        assert applier is not None
        await applier.bury(applier.oversize_letter(end, size), end)
        self._reader.position = context.progress.read = end
        context.progress.settled_to(end, 1)
        # The position in the store moves along, or it would seem to have lost something.
        await applier.hand_over(Part(), end)
        return None

    async def _read_alone(self, end: Position) -> bool:
        """Read one entry that fits alone, but not beside the stream's counts.

        False if it does not fit after all: its fields are too many for what they hold.
        """
        context, reading = self._context, self._lines.reading
        reading.limit_reply(context.settings.limits.batch_bytes * 2)
        at = str(end.stream_id)
        try:
            reply = await reading.call(
                "XRANGE", self._keys.stream, at, at, timeout_sec=context.settings.timeouts.command
            )
        except ReplyTooLargeError:
            await self._reopen_reading()
            return False
        entries = entries_of(reply, "XRANGE", 1)
        if entries and entries[0][0] != at.encode():
            raise ProtocolError(f"XRANGE: another entry than {at}")
        self._reader.position = end
        if entries:
            self._queue.take_in(Read(entries, at_head=False, full=True, end=end))
        return True

    async def _reopen_reading(self) -> None:
        context = self._context
        self._outstanding = None
        self._lines.reading.close()
        await self._lines.reading.wait_closed()
        self._lines.reading = await context.ports.transport.connect(
            context.peer.redis_url,
            timeout_sec=context.settings.timeouts.connect,
            name="fsm_replication",
        )

    # From entries to settled chunks.

    async def _work_off(self, orders: _Orders, more: Callable[[], bool] = lambda: False) -> None:
        """Settle the queued chunks in order, until all are or the mode changes."""
        assert self._applier is not None
        await self._queue.work_off(self._applier, lambda: self._orders is not orders, more)

    def _next_is_here(self) -> bool:
        return self._outstanding is not None and self._outstanding.done()

    def _note_head(self, read: Read) -> None:
        context, progress = self._context, self._context.progress
        progress.succeeded(context.ports.clock.monotonic())
        progress.head_reached_at = self._answered_at
        if read.info is not None or read.entries:
            progress.unread_events = 0
        if read.gap is None:
            self._copies = 0
        if not self._queue:
            context.note_synced()

    # Holding what is pending while paused.

    async def _hold(self, orders: _Orders) -> None:
        """Watch the reasons to pause that go away by themselves."""
        context = self._context
        polls = 0
        while self._orders is orders:
            await self._until_changed(orders, HOLD_POLL_SEC)
            polls += 1
            reasons, room = self._reasons(), False
            if PauseReason.CLOCK in reasons:
                await self._ask_time()
            if polls % HOLD_POLLS_PER_COUNT == 0:
                room = PauseReason.DEAD_LETTERS_FULL in reasons and await self._letters_fit()
            passed = passed_reason(
                reasons,
                (context.writes.state, context.reads.state),
                accepts=context.store.should_accept_writes(),
                room=room,
                clocks_agree=not context.peer_clock.is_day_off(),
            )
            if passed is not None:
                reason, why = passed
                orders.report(LinkFact.CLEARED, why, reason)

    async def _ask_time(self) -> None:
        """Ask the peer for its time as often as peers are pinged, whether or not they are.

        A jump of our own clock shows without that.
        """
        peer_clock, settings = self._context.peer_clock, self._context.settings
        due_at = (peer_clock.asked_at or 0.0) + settings.peer_health.ping_interval_sec
        if self._context.ports.clock.monotonic() >= due_at:
            await peer_clock.ask(settings.timeouts.ping)

    async def _letters_fit(self) -> bool:
        context = self._context
        settings = context.settings
        if settings.dead_letters.when_full != "pause":
            return True
        record = await context.ports.cursor_store.load(context.peer_id)
        return context.letters_fit(record)

    # The end.

    async def _last_flush(self) -> None:
        """Try once to settle what is held; what cannot be settled is read again later."""
        context = self._context
        if not self._queue or self._applier is None:
            return
        # Nothing is obeyed any more, so whatever fails counts as interrupted: there is one try.
        self._obeyed = None
        assert self._orders is not None
        try:
            async with context.ports.clock.timeout(context.settings.timeouts.store_call):
                await self._work_off(self._orders)
        except (Blocked, Unsettled, ReplicationError, TimeoutError) as error:
            context.log.info(
                "unsettled_dropped", events=context.progress.pending_events, error=error
            )
