"""Takes chunks of entries to the local store, and settles them.

A chunk is settled (guarantee G1) once each of its entries was applied, found superseded, or kept
as a dead letter. Only then does the cursor move. Store calls go through the write circuit, each
with its own timeout; what fails is tried again until the circuit opens or the mode changes, and
stays in the hands of the caller meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from fsm_replication.batch import BatchBuilder, Decoding, Part, Selection
from fsm_replication.circuits import Circuit
from fsm_replication.errors import (
    BadEntryError,
    CircuitOpenError,
    CursorStoreError,
    LettersFullError,
    StoreError,
)
from fsm_replication.items import Stamp, SyncItem
from fsm_replication.ports import Cursor, DeadLetter, Position, StreamId
from fsm_replication.reports import PauseReason
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received
from fsm_replication.stream import Entry
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.interlock import Claim, deepest_fall
from fsm_replication.workers.store_call import call_store

__all__ = (
    "Applier",
    "Blocked",
    "Chunk",
    "Prepared",
    "Unsettled",
    "make_applier",
    "make_builder",
)

# Where this share of a chunk was superseded, the next is first compared with what is held.
CHECK_FIRST_SHARE: Final = 0.2
RETRY_FIRST_SEC: Final = 0.05
RETRY_MAX_SEC: Final = 1.0
# On these paths what comes later relies on what came before; a repair compares anew each time.
_ORDERED: Final = frozenset({"stream", "bootstrap"})
_T = TypeVar("_T")


class Blocked(Exception):  # noqa: N818 - it is an outcome, not an error
    """Applying must pause; the chunk is not settled and stays with the caller."""

    def __init__(self, reason: PauseReason, why: str) -> None:
        self.reason = reason
        super().__init__(why)


class Unsettled(Exception):  # noqa: N818 - it is an outcome, not an error
    """A store call failed while the mode changed; the chunk stays with the caller."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Entries that are settled together, and the position that this settles.

    ``first_ms`` is the stream time of the first; ``seen_at`` the monotonic time it was read at.
    ``bad`` is what was found wrong with contents so far, by place.
    """

    entries: Sequence[Any]
    end: Position
    first_ms: int
    seen_at: float
    bad: dict[int, BadEntryError] = field(default_factory=dict)


@dataclass(slots=True)
class Prepared:
    """A chunk whose first part is decoded; later parts are decoded when their turn comes.

    ``applied`` and ``superseded`` count what became of its items once it is applied.
    """

    chunk: Chunk
    selection: Selection
    first: Part
    rest: Decoding
    applied: int = 0
    superseded: int = 0

    @property
    def has_letters(self) -> bool:
        """Whether something must be kept on disk before the cursor passes this chunk."""
        return bool(self.selection.letters)


class Applier:
    """Applies the chunks of one link, one after the other."""

    def __init__(
        self,
        context: LinkContext,
        builder: BatchBuilder,
        incarnation: str,
        interrupted: Callable[[], bool],
        run_id: str = "",
    ) -> None:
        self._context = context
        self._builder = builder
        self._incarnation = incarnation
        self._run_id = run_id
        self._interrupted = interrupted
        self._check_first = False
        self._warned_ahead = False

    @property
    def must_see_applied(self) -> bool:
        """Whether a chunk cannot be prepared before the store has the one before.

        A foreign entry is stamped after what is held.
        """
        return self._builder.foreign

    # Step one: decide and decode, while the chunk before may still be on its way to the store.

    async def prepare(self, chunk: Chunk, *, distrust_old: bool = False) -> Prepared:
        """Choose what to apply, and decode the first part of it.

        With ``distrust_old`` items older than a tombstone lasts are held back where the key is
        absent, whatever was agreed with the peer: the chunk itself may have lain for long. What lies
        far ahead then becomes a letter whatever the clocks are: it was one before.
        """
        builder = self._builder
        if distrust_old:
            selection = builder.select(chunk.entries, chunk.bad)
        else:
            selection = await self._select(chunk)
        if selection.candidates and (builder.foreign or (self._check_first and builder.coalesce)):
            await self._drop_current(selection)
        if self._context.stale.active or distrust_old or self._predates_agreement(chunk):
            await self._hold_back(selection, chunk, distrust_old)
        parts = builder.materialise(selection)
        first = await anext(parts)
        if first.items:
            first.encoded = self._context.store.encode(first.items, first.wire)
        return Prepared(chunk, selection, first, parts)

    async def _select(self, chunk: Chunk) -> Selection:
        """Choose what to apply; what lies far ahead is judged only by a clock that is about right.

        :raises Blocked: if ours and the peer's are more than a day apart.
        """
        selection = self._builder.select(chunk.entries, chunk.bad)
        if not selection.too_far_ahead:
            return selection
        await self.ask_time_since(chunk.seen_at)
        # Our clock may have been set meanwhile.
        selection = self._builder.select(chunk.entries, chunk.bad)
        if selection.too_far_ahead:
            self.check_clock(selection.now_ms)
        return selection

    async def ask_time_since(self, seen_at: float) -> None:
        """Ask the peer for its time, unless it was told since ``seen_at`` of the monotonic clock."""
        timeout = self._context.settings.timeouts.command
        await self._context.peer_clock.ask_since(seen_at, timeout)

    def check_clock(
        self, ours_ms: int, looks: str = "lies more than a day ahead of our time"
    ) -> None:
        """See that by our time of day, ``ours_ms``, it may be judged how something ``looks``.

        :raises Blocked: if the peer's clock is more than a day off from that.
        """
        peer_clock = self._context.peer_clock
        if peer_clock.is_day_off(ours_ms):
            raise Blocked(
                PauseReason.CLOCK,
                f"{peer_clock.tell()}, and what it sends {looks}: set the clock that is wrong",
            )

    def check_age(self) -> None:
        """See that items may be judged to be old: without a cold path nothing brings them later.

        :raises Blocked: if our clock and the peer's are more than a day apart.
        """
        if not self._context.settings.cold_path.enabled:
            now = self._context.ports.wall_clock.now_ms()
            self.check_clock(now, "looks older than tombstones are kept")

    async def _drop_current(self, selection: Selection) -> None:
        context = self._context
        keys = [entry.key for entry in selection.candidates]
        try:
            held = await self._call_once(context.reads, lambda: context.store.stamps(keys))
        except StoreError:
            # Looking first only saves work: the store compares again when it applies. A foreign
            # entry, though, cannot be stamped without knowing what is held.
            if not self._builder.foreign:
                return
            held = await self.call(context.reads, lambda: context.store.stamps(keys))
        self._builder.drop_current(selection, held)

    def _predates_agreement(self, chunk: Chunk) -> bool:
        agreed_up_to = self._context.stale.agreed_up_to
        return agreed_up_to is not None and chunk.first_ms <= agreed_up_to.ms

    async def _hold_back(self, selection: Selection, chunk: Chunk, distrust_old: bool) -> None:
        """Take out old items that are absent here; the trees bring them once a person agrees.

        So are those that the last comparison would have brought if the peer still held them: what
        deleted them may be forgotten by now, or stands in the stream after them.

        :raises Blocked: if our clock and the peer's are more than a day apart.
        """
        context, stale = self._context, self._context.stale
        floor, agreed_up_to = stale.floor_ms, stale.agreed_up_to

        def was_compared(entry: Entry) -> bool:
            if agreed_up_to is None or entry.key in stale.exceptions:
                return False
            return StreamId.parse(chunk.entries[entry.index][0]) <= agreed_up_to

        old = [
            e
            for e in selection.candidates
            if not e.deleted
            and e.updated_at < floor
            and (distrust_old or stale.suspects(e.key) or was_compared(e))
        ]
        if not old:
            return
        held = await self.call(
            context.reads, lambda: context.store.stamps([entry.key for entry in old])
        )
        if None in held and not (distrust_old or context.settings.cold_path.enabled):
            await self.ask_time_since(chunk.seen_at)
        for entry, ours in zip(old, held, strict=True):
            if ours is not None:
                continue
            if not distrust_old:
                self.check_age()
            if not distrust_old or stale.suspects(entry.key):
                digest = entry.digest or b""
                theirs = Stamp(entry.updated_at, entry.version, False, digest, entry.content_type)
                stale.note(entry.key, theirs)
            selection.held_back.add(entry.index)
        selection.candidates = [
            e for e in selection.candidates if e.index not in selection.held_back
        ]

    # Step two: apply.

    async def apply(self, prepared: Prepared) -> None:
        """Hand a chunk to the store.

        :raises Blocked: if the link must pause.
        :raises Unsettled: if it failed and the mode has changed meanwhile.
        """
        await self.take(prepared, prepared.chunk.end)

    async def take(self, prepared: Prepared, end: Position | None, path: str = "stream") -> None:
        """Hand over all parts of a chunk; the selection's dead letters are complete afterwards.

        ``end`` is the position that the store keeps with the last part. Parts are decoded once
        only; a chunk that is tried again is prepared again.
        """
        part: Part | None = prepared.first
        while part is not None:
            following = await anext(prepared.rest, None)
            position = end if following is None else None
            result = await self.hand_over(part, position, path, end and end.stream_id)
            prepared.applied += result.applied
            prepared.superseded += result.superseded
            prepared.selection.letters.extend(self._refused(prepared, part, result))
            part = following
        if end is not None and self._context.doubts:
            await self.tell_doubtful(end.stream_id)

    # Step three: settle.

    async def keep_letters(self, prepared: Prepared) -> None:
        """Keep the dead letters of an applied chunk, and with them the cursor that passes them.

        :raises Blocked: if there is no room for them.
        :raises Unsettled: if they cannot be kept and the mode has changed meanwhile.
        :raises CursorStoreError: if they cannot be kept, for good.
        """
        chunk = prepared.chunk
        places = {entry[0].decode(): place for place, entry in enumerate(chunk.entries)}
        letters = sorted(prepared.selection.letters, key=lambda x: places[x.stream_id])
        await self._keep_letters(self._cursor(chunk.end), letters)

    def settle(self, prepared: Prepared) -> None:
        """Let the cursor pass an applied chunk, whose letters are kept if there are any."""
        context = self._context
        if not prepared.has_letters:
            context.cursors.settle(context.peer_id, self._cursor(prepared.chunk.end))
        self._count(prepared)

    async def hand_over(
        self,
        part: Part,
        position: Position | None,
        path: str = "stream",
        until: StreamId | None = None,
    ) -> ApplyResult:
        """Hand one part to the store, again and again until it takes it.

        ``path`` tells how it came: "stream", "bootstrap", "repair" or "dead letter"; ``until`` the
        end of its chunk, if it came by the stream.
        """
        context = self._context
        ordered = path in _ORDERED
        received = Received(
            context.peer_id if ordered else "",
            position,
            part.wire,
            part.encoded,
            self._incarnation if ordered else "",
        )
        claim = await self._claim(part.items)
        began = context.ports.clock.monotonic()
        try:
            result = await self.call(
                context.writes,
                lambda: self._apply_many(part.items, received, until, claim),
                writing=True,
            )
        except BaseException:
            context.interlock.give_up(claim)
            raise
        context.interlock.settle(claim, result)
        took = context.ports.clock.monotonic() - began
        now = context.ports.wall_clock.now_ms()
        context.arrivals.add(context.peer_id, now, path, part.items, result)
        context.metrics.flush_seconds.observe(took)
        context.slo.batch_flush(took)
        if context.feed.known:
            self._publish(part.items, result)
        return result

    async def _claim(self, items: Sequence[SyncItem]) -> Claim:
        """Reserve what a batch may delete, before it goes to the store (G14).

        :raises Blocked: if it is too much.
        :raises Unsettled: if it cannot be reserved and the mode has changed meanwhile.
        :raises CursorStoreError: if it cannot be reserved, for good.
        """
        interlock = self._context.interlock
        tombstones = interlock.uncounted(items)
        if not tombstones:
            return Claim()
        most, is_exact = len(tombstones), False
        if interlock.wants_count(most):
            await self._count_live()
        while True:
            if interlock.tripped:
                raise Blocked(PauseReason.INTERLOCK, interlock.tripped)
            claim = await self._reserve(tombstones, most)
            if claim is not None:
                return claim
            live = await self._count_live()
            if is_exact and not interlock.fits(most):
                await self._trip(most, live)
                continue
            most, is_exact = await self._count_dying(items), True

    async def _count_live(self) -> int | None:
        live = await self.call(self._context.reads, self._context.store.live_items)
        self._context.interlock.learn(live)
        return live

    async def _count_dying(self, items: Sequence[SyncItem]) -> int:
        """Return by how many live items the store would be the poorer, at worst on the way."""
        context = self._context
        held = await self.call(
            context.reads, lambda: context.store.stamps([item.key for item in items])
        )
        return deepest_fall(items, held)

    async def _reserve(self, tombstones: Sequence[SyncItem], most: int) -> Claim | None:
        """Claim as much; deletes wait where that cannot be kept on disk."""
        context = self._context
        wait = RETRY_FIRST_SEC
        while True:
            try:
                return await context.interlock.claim(tombstones, most)
            except CursorStoreError as error:
                if not error.may_pass:
                    raise
                context.progress.failed(error)
                context.cursors.failed(error)
                context.log.warning("deletes_wait", error=error, path=error.path)
                if self._interrupted():
                    raise Unsettled from error
            await context.ports.clock.sleep(wait)
            wait = min(RETRY_MAX_SEC, wait * 2)

    async def _trip(self, more: int, live: int | None) -> None:
        """Let no delete through, over restarts, until a person says so; that may be meanwhile."""
        context, interlock = self._context, self._context.interlock
        whole = "an unknown number of" if live is None else f"{live + interlock.shrunk}"
        why = (
            f"the peer has taken away {interlock.shrunk} of {whole} live items within an hour and {more}"
            f" more would follow; {interlock.allowed} are allowed: resume the peer if that is meant"
        )
        if live is None:
            why += "; a store whose live_items() tells the number allows a share of it"
        interlock.trip(why)
        context.log.warning(
            "interlock_tripped",
            shrunk=interlock.shrunk,
            more=more,
            allowed=interlock.allowed,
            live=live,
        )
        try:
            await interlock.tidy()
        except CursorStoreError as error:
            # It is in force, and written with the next flush that succeeds.
            context.cursors.failed(error)
            context.log.warning("interlock_not_kept", error=error, path=error.path)

    async def _apply_many(
        self,
        items: Sequence[SyncItem],
        received: Received,
        until: StreamId | None,
        claim: Claim,
    ) -> ApplyResult:
        try:
            return await self._apply_all(items, received)
        except BaseException:
            # It may have been carried out, or a part of it, and nobody was told.
            claim.in_doubt = True
            if self._context.feed.known:
                self._context.doubts.add([item.key for item in items], until)
            raise

    async def _apply_all(self, items: Sequence[SyncItem], received: Received) -> ApplyResult:
        result = await self._context.store.apply_many(items, received)
        if len(result.outcomes) != len(items):
            raise StoreError(
                f"the store answered {len(result.outcomes)} outcomes for {len(items)} changes"
            )
        if Outcome.FAILED in result.outcomes:
            why = next(iter(result.reasons.values()), "no reason given")
            raise StoreError(f"{result.failed} changes could not be stored: {why}")
        return result

    async def call(
        self,
        circuit: Circuit,
        function: Callable[[], Awaitable[_T]],
        *,
        writing: bool = False,
    ) -> _T:
        """Call the store until it succeeds, unless the link must pause or the mode changes."""
        context = self._context
        wait = RETRY_FIRST_SEC
        while True:
            if writing and not context.store.should_accept_writes():
                raise Blocked(PauseReason.BACKPRESSURE, "the store accepts no writes")
            try:
                return await self._call_once(circuit, function)
            except CircuitOpenError as error:
                raise Blocked(PauseReason.CIRCUIT, str(error)) from None
            except StoreError as error:
                context.progress.failed(error)
                context.metrics.batch_errors.inc()
                context.log.warning("store_call_failed", error=error, circuit=circuit.name)
                if self._interrupted():
                    raise Unsettled from error
                if circuit.probe_in_sec:
                    # It opened by this failure: whoever may try next is for the prober to say.
                    why = str(CircuitOpenError(circuit.name, circuit.last_error))
                    raise Blocked(PauseReason.CIRCUIT, why) from None
            await context.ports.clock.sleep(wait * (0.5 + context.ports.random.random() / 2))
            wait = min(RETRY_MAX_SEC, wait * 2)

    async def _call_once(self, circuit: Circuit, function: Callable[[], Awaitable[_T]]) -> _T:
        context = self._context
        limit = context.settings.timeouts.store_call
        return await call_store(circuit, function, context.ports.clock, limit)

    # Dead letters

    def _refused(self, prepared: Prepared, part: Part, result: ApplyResult) -> Iterator[DeadLetter]:
        if Outcome.REFUSED not in result.outcomes:
            return
        by_key = {entry.key: entry.index for entry in prepared.selection.candidates}
        for index, outcome in enumerate(result.outcomes):
            if outcome is Outcome.REFUSED:
                stream_id, fields = prepared.chunk.entries[by_key[part.items[index].key]]
                error = BadEntryError("refused", result.reasons.get(index, "no reason given"))
                yield self._builder.letter(stream_id, fields, error)

    async def _keep_letters(self, cursor: Cursor, letters: Sequence[DeadLetter]) -> None:
        context = self._context
        limits = context.settings.limits
        store, progress = context.ports.cursor_store, context.progress
        wait = RETRY_FIRST_SEC
        while True:
            try:
                dropped = await store.settle(
                    context.peer_id,
                    cursor,
                    letters,
                    keep=limits.dead_letters,
                    keep_bytes=limits.dead_letter_bytes,
                    # Of what a resolver merges the newest entry does not supersede the others.
                    fold=context.store.resolver.by_stamp,
                    may_drop=context.settings.dead_letters.when_full != "pause",
                )
                if dropped:
                    context.metrics.dead_letters("dropped", dropped)
                    context.log.warning(
                        "dead_letters_dropped",
                        count=dropped,
                        letters=limits.dead_letters,
                        held_bytes=limits.dead_letter_bytes,
                    )
                record = await store.load(context.peer_id)
                progress.dead_letters = record.dead_letters
                progress.gaps_open = len(record.gaps)
                break
            except LettersFullError as error:
                progress.dead_letters = error.letters
                progress.letter_bytes_needed = error.needed_bytes
                raise Blocked(
                    PauseReason.DEAD_LETTERS_FULL, f"{error}: retry or purge them"
                ) from None
            except CursorStoreError as error:
                # Without the letters on disk the cursor must not pass them.
                if not error.may_pass:
                    raise
                progress.failed(error)
                context.cursors.failed(error)
                context.log.warning("dead_letters_not_kept", error=error, path=error.path)
                if self._interrupted():
                    raise Unsettled from error
            await context.ports.clock.sleep(wait)
            wait = min(RETRY_MAX_SEC, wait * 2)
        context.cursors.saved(context.peer_id, cursor)
        reasons: dict[str, int] = {}
        for letter in letters:
            reasons[letter.reason] = reasons.get(letter.reason, 0) + 1
        for reason, count in reasons.items():
            context.metrics.dead_letters(reason, count)
        context.log.warning("dead_letters", count=len(letters), reasons=reasons)

    def oversize_letter(self, position: Position, size: int) -> DeadLetter:
        """Return the dead letter of an entry too large to be read."""
        letter = self._builder.letter(
            str(position.stream_id).encode(),
            None,
            BadEntryError("size", f"an entry of {size} bytes is over limits.batch_bytes"),
        )
        return replace(letter, size=size)

    def unexpected_letter(self, single: Chunk, error: Exception) -> DeadLetter:
        """Return the dead letter of the one entry of a chunk, at which its reader has died."""
        stream_id, fields = single.entries[0]
        why = BadEntryError("unexpected", f"{type(error).__name__}: {error}")
        return self._builder.letter(stream_id, fields, why)

    async def bury(self, letter: DeadLetter, end: Position) -> None:
        """Settle a position that passes one entry which was never held."""
        await self._keep_letters(self._cursor(end), [letter])

    def _cursor(self, position: Position) -> Cursor:
        return Cursor(position, self._incarnation, self._run_id)

    # Books

    async def tell_doubtful(self, settled: StreamId | None = None) -> None:
        """Tell what is held under the keys in doubt that are due, see :class:`Doubts`.

        :raises Blocked: if the link must pause; they are told later.
        :raises Unsettled: if the store fails and the mode has changed meanwhile; likewise.
        """
        context = self._context
        keys, lost = context.doubts.take(settled)
        watchers = context.feed.watchers
        for watcher in watchers if lost else ():
            watcher.miss(lost)
        try:
            while keys and watchers:
                # One at a time: what several hold together has no bound.
                held = await self.call(context.reads, lambda: context.store.get_many(keys[-1:]))
                keys.pop()
                for watcher in watchers:
                    watcher.offer([item for item in held if item is not None])
        except BaseException:
            context.doubts.add(keys, settled)
            raise

    def _publish(self, items: Sequence[SyncItem], result: ApplyResult) -> None:
        taken = [
            item
            for item, outcome in zip(items, result.outcomes, strict=True)
            if outcome is Outcome.APPLIED
        ]
        for watcher in self._context.feed.watchers:
            watcher.offer(taken)

    def _count(self, prepared: Prepared) -> None:
        context, selection = self._context, prepared.selection
        metrics, progress = context.metrics, context.progress
        applied, superseded = prepared.applied, prepared.superseded
        events = len(prepared.chunk.entries)
        deduped = selection.deduped + superseded
        self._check_first = deduped > events * CHECK_FIRST_SHARE
        deletes = sum([entry.deleted for entry in selection.candidates])
        metrics.batch_size.observe(events)
        metrics.applied.inc(applied)
        metrics.deduped.inc(deduped)
        metrics.skipped.inc(superseded)
        metrics.deleted.inc(deletes)
        metrics.submitted.inc(max(0, len(selection.candidates) - deletes))
        progress.events_applied += applied
        progress.events_deduped += deduped
        if selection.clock_ahead:
            progress.clock_ahead += selection.clock_ahead
            metrics.clock_ahead.inc(selection.clock_ahead)
            if not self._warned_ahead:
                self._warned_ahead = True
                context.log.warning("peer_clock_ahead", events=selection.clock_ahead)


def make_builder(context: LinkContext, *, foreign: bool = False) -> BatchBuilder:
    """Return what makes batches of a link's entries, by the limits of this moment."""
    limits = context.settings.limits
    return BatchBuilder(
        context.peer_id,
        payload_bytes=limits.payload_bytes,
        part_bytes=limits.batch_bytes // 4,
        now_ms=context.ports.wall_clock.now_ms,
        coalesce=context.store.resolver.by_stamp,
        foreign=foreign,
        heavy=context.ports.heavy,
    )


def make_applier(context: LinkContext, *, foreign: bool = False) -> Applier:
    """Return what applies items beside the stream; it gives up at the first call that fails."""
    return Applier(context, make_builder(context, foreign=foreign), "", lambda: True)
