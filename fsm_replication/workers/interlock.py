"""The interlock: a person decides on mass deletes (guarantee G14).

Theory of operation. What counts is how far one peer shrinks the number of live local items, on all
paths: the running sum of the keys that it brought to life minus the live keys that it deleted, taken
at the end of each batch. A stream that deletes and puts again keeps the sum level, and what a peer
has brought in is no credit: the sum is compared with its own highest value within an hour. Deletes
are applied as long as it stays within max(``interlock_share`` of the live items,
``interlock_min``) of that value. The live items are those there are now plus those that this peer has
shrunk them by, so the bound does not fall while it is used up.

On disk stands what an engine that begins anew must assume. Writing that for every batch would cost
a transaction each, so deletes are *reserved* in blocks before any of them is applied: the row says how
far the sum had fallen, and by how much more it may have fallen since. A process that is killed
gives nothing away: the next one takes the whole block for used. Blocks begin small and double up to
an eighth of the allowance, so kills cost an honest peer little, and a mass delete few writes. Where
a block cannot be reserved, the batch waits, and with it what comes after it on that link: the order
of a stream is kept. Batches without deletes need no block.

Within a process the hour is measured by the monotonic clock, which no setting of the time of day
moves. Between two processes the time of day is all there is: a clock that was set back lets no time
pass, one that was set ahead *while no engine ran* frees the allowance early. A running engine that
sees the time of day jump writes its row anew, so that such a jump is not taken for time that passed.

A person's word (``resume`` or ``repair --force``) lets everything through for an hour, over
restarts. The pause itself has no end but that word.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fsm_replication.config import Settings
from fsm_replication.current import Current
from fsm_replication.items import Stamp, SyncItem
from fsm_replication.ports import Clock, CursorStore, InterlockRow, WallClock
from fsm_replication.stores.protocol import ApplyResult

__all__ = ("WINDOW_SEC", "Claim", "Interlock", "RunningSum", "deepest_fall", "forgiving_row")

WINDOW_SEC: Final = 3600.0
# Falls of one minute are kept as one, of which the highest value and the last time count.
GRAIN_SEC: Final = 60.0
# How long a number of live items is taken for granted, so that deletes cost no call each.
KNOWN_SEC: Final = 60.0
# A block grows from the first of these shares of the allowance to the second.
BLOCK_FIRST: Final = 64
BLOCK_LAST: Final = 8
# A row is brought up to date this long after it was written, if it says too much or too little.
TIDY_SEC: Final = 60.0
# A time of day that moves this much otherwise than the monotonic clock has been set.
JUMP_SEC: Final = 5.0
DOUBTS_KEPT: Final = 10_000
NO_ROW: Final = InterlockRow(0)


class RunningSum:
    """A sum that rises and falls, and how far it is below its highest value within an hour.

    Times are in seconds and never go back. The hour is up to a minute longer: falls of one minute
    are kept together, so there are at most 62 of them.
    """

    def __init__(self) -> None:
        self._level = 0
        # Values that are higher than the present one and when each was left; later ones are lower.
        self._highs: deque[tuple[float, int]] = deque()

    def move(self, change: int, now: float) -> None:
        """Add ``change``, which may be negative."""
        self._forget(now)
        if change < 0:
            self._leave(now)
        self._level += change
        while self._highs and self._highs[-1][1] <= self._level:
            self._highs.pop()

    def _forget(self, now: float) -> None:
        while self._highs and self._highs[0][0] <= now - WINDOW_SEC:
            self._highs.popleft()

    def _leave(self, now: float) -> None:
        """Note that the present value was in force until now."""
        if self._highs and self._highs[-1][0] // GRAIN_SEC == now // GRAIN_SEC:
            self._highs[-1] = (now, self._highs[-1][1])
        else:
            self._highs.append((now, self._level))

    @property
    def level(self) -> int:
        """The sum, from an arbitrary zero."""
        return self._level

    def fallen(self, now: float) -> int:
        """Return how far it is below its highest value within the hour; changes nothing."""
        # Health and metrics may be read by another thread: a copy is taken in one step.
        begin, level = now - WINDOW_SEC, self._level
        highest = next((high for at, high in tuple(self._highs) if at > begin), level)
        return max(0, highest - level)

    def falls(self, now: float) -> tuple[tuple[int, int], ...]:
        """Return how long ago each value was left, in ms, and how far the sum is below it."""
        self._forget(now)
        return tuple(
            (max(0, round((now - at) * 1000)), high - self._level) for at, high in self._highs
        )

    def restore(self, falls: Sequence[tuple[int, int]], now: float) -> None:
        """Be as far below its highest values as :meth:`falls` has told."""
        self._highs = deque((now - age_ms / 1000, self._level + fall) for age_ms, fall in falls)


def deepest_fall(items: Sequence[SyncItem], held: Sequence[Stamp | None]) -> int:
    """Return by how many live items a store is the poorer at the worst moment of a batch.

    ``held`` are the stamps that are held under the keys of the items, which it applies in order.
    """
    known = {item.key: stamp for item, stamp in zip(items, held, strict=True)}
    change = deepest = 0
    for item in items:
        before = known[item.key]
        if before is not None and before >= item.stamp:
            continue
        was_live = before is not None and not before.deleted
        change += (not item.deleted) - was_live
        deepest = min(deepest, change)
        known[item.key] = item.stamp
    return -deepest


def forgiving_row(now_ms: int) -> InterlockRow:
    """Return the row of a peer that a person lets delete any number of items for an hour."""
    return InterlockRow(now_ms, forgiven_ms=round(WINDOW_SEC * 1000))


@dataclass(slots=True)
class Claim:
    """Deletes that may be applied: at most ``most`` live items less, at any moment.

    ``in_doubt`` is set when a call of the store came back without an answer. One that is ``free``
    is covered by a person's word and counts for nothing.
    """

    tombstones: Sequence[SyncItem] = ()
    most: int = 0
    free: bool = False
    in_doubt: bool = False


class Interlock:
    """Watches how far one peer shrinks the number of live items, and keeps that in ``store``.

    A batch is claimed before it goes to the local store, and settled or given up afterwards.
    """

    def __init__(
        self,
        peer_id: str,
        settings: Current[Settings],
        clock: Clock,
        wall_clock: WallClock,
        store: CursorStore,
    ) -> None:
        self._peer_id = peer_id
        self._settings = settings
        self._clock = clock
        self._wall_clock = wall_clock
        self._store = store
        self._sum = RunningSum()
        self._forgiven_until: float | None = None
        self._tripped = ""
        # Live items when they were last counted, by the monotonic time, and the sum at that moment.
        self._live: int | None = None
        self._counted_at: float | None = None
        self._level_then = 0
        # What is claimed and not settled. Tombstones that were counted and may be handed over again.
        self._claimed = 0
        self._doubts: OrderedDict[str, Stamp] = OrderedDict()
        # How far the sum may fall below its highest value since the row was written (``_peak``);
        # 0 where it is not known what stands on disk.
        self._reserved = 0
        self._peak = 0
        self._block = 0
        self._saving = asyncio.Lock()
        # When the row was written, and how far the time of day was ahead of the clock then.
        self._written_at = self._offset_sec = 0.0
        self._has_moved = False
        # Whether the row lacks what must not be lost: a trip, a word, what a killed process left.
        self._is_urgent = False

    # What is known.

    @property
    def tripped(self) -> str:
        """Why it waits for a person's word, "" unless it does."""
        return self._tripped

    @property
    def shrunk(self) -> int:
        """How far the peer has shrunk the number of live items within the hour, as far as counted."""
        return self._sum.fallen(self._clock.monotonic())

    @property
    def allowed(self) -> int:
        """How far it may, by the number of live items that was last known."""
        return self._allowance(self.shrunk)

    @property
    def counted_allowed(self) -> int | None:
        """The same; None until live items were counted since the start."""
        return None if self._live is None else self.allowed

    @property
    def forgiven_until_ms(self) -> int | None:
        """Until when everything is let through, in ms since the epoch; None without such a word."""
        left = self._forgiven_sec()
        return self._wall_clock.now_ms() + round(left * 1000) if left else None

    def _forgiven_sec(self) -> float:
        until = self._forgiven_until
        return 0.0 if until is None else max(0.0, until - self._clock.monotonic())

    def _allowance(self, shrunk: int) -> int:
        bounds = self._settings.value.repair
        if self._live is None:
            return bounds.interlock_min
        live = self._live + self._sum.level - self._level_then + shrunk
        return max(bounds.interlock_min, int(bounds.interlock_share * live))

    # Claiming.

    def uncounted(self, items: Sequence[SyncItem]) -> list[SyncItem]:
        """Return the tombstones among the items, but for those that were counted already."""
        doubts = self._doubts
        return [item for item in items if item.deleted and not (doubts and self._is_counted(item))]

    def _is_counted(self, item: SyncItem) -> bool:
        return self._doubts.get(item.key) == item.stamp

    def fits(self, more: int) -> bool:
        """Say whether so many live items less are allowed, by the live items that are known."""
        shrunk = self.shrunk
        if self._forgiven_sec():
            return True
        return shrunk + self._claimed + more <= self._allowance(shrunk)

    def wants_count(self, more: int) -> bool:
        """Say whether live items should be counted before so many less: the last count is old.

        As long as it is far from ``interlock_min``, how many there are does not matter.
        """
        now = self._clock.monotonic()
        if self._counted_at is not None and now - self._counted_at <= KNOWN_SEC:
            return False
        less = self._sum.fallen(now) + self._claimed + more
        return 2 * less > self._settings.value.repair.interlock_min

    def learn(self, live: int | None) -> None:
        """Take in how many live items there are now; None where that is not known."""
        self._live, self._counted_at = live, self._clock.monotonic()
        self._level_then = self._sum.level

    async def claim(self, tombstones: Sequence[SyncItem], most: int) -> Claim | None:
        """Reserve what may be deleted; None where that is more than is allowed.

        :raises CursorStoreError: if it cannot be reserved.
        """
        while most and not self._forgiven_sec():
            if not self.fits(most):
                return None
            if self._is_reserved(most):
                self._claimed += most
                return Claim(tombstones, most)
            async with self._saving:
                # Another may have reserved a block meanwhile.
                if self.fits(most) and not self._has_room(most):
                    await self._save(self._next_block(self._claimed + most))
        return Claim(tombstones, free=most > 0)

    def _is_reserved(self, more: int) -> bool:
        # What is claimed while a row is being written must hold by the old one and the new one.
        return self._has_room(more) and not self._saving.locked()

    def _has_room(self, more: int) -> bool:
        used = self._peak - self._sum.level
        return used + self._claimed + more <= self._reserved

    def settle(self, claim: Claim, result: ApplyResult) -> None:
        """Count what a batch has come to."""
        self._claimed -= claim.most
        was_doubtful = bool(self._doubts)
        for item in claim.tombstones if was_doubtful else ():
            self._doubts.pop(item.key, None)
        if claim.free:
            return
        if claim.in_doubt:
            # An earlier call may have deleted what this one found deleted.
            self._move(-claim.most)
            return
        deleted = result.live_deleted
        if deleted is None:
            deleted = min(result.applied, len(claim.tombstones))
        change = (result.live_added or 0) - deleted
        # Of what a call has deleted that was in doubt before, the most is counted already.
        self._move(max(change, -claim.most) if was_doubtful else change)

    def give_up(self, claim: Claim) -> None:
        """Count what a batch may have come to whose store calls have failed."""
        self._claimed -= claim.most
        if claim.free or not claim.in_doubt:
            return
        for item in claim.tombstones:
            self._doubts[item.key] = item.stamp
        while len(self._doubts) > DOUBTS_KEPT:
            self._doubts.popitem(last=False)
        self._move(-claim.most)

    def _move(self, change: int) -> None:
        if change and not self._forgiven_sec():
            self._sum.move(change, self._clock.monotonic())
            self._peak = max(self._peak, self._sum.level)
            self._has_moved = True

    # A person's word.

    def trip(self, why: str) -> None:
        """Let no delete through until a person has said so."""
        self._tripped = why
        self._is_urgent = True

    def forgive(self) -> None:
        """Let everything through for an hour, and begin anew then: a person has looked."""
        self._sum = RunningSum()
        self._live = self._counted_at = None
        self._doubts.clear()
        self._reserved = self._peak = 0
        self._tripped = ""
        self._forgiven_until = self._clock.monotonic() + WINDOW_SEC
        self._is_urgent = True

    # On disk.

    def load(self, row: InterlockRow | None) -> None:
        """Go on from what an engine before has left, at its worst."""
        row = row or NO_ROW
        now, passed_ms = self._clock.monotonic(), self._wall_clock.now_ms() - row.saved_at_ms
        later_ms = max(0, passed_ms)
        self._sum = RunningSum()
        self._sum.restore([(age_ms + later_ms, fall) for age_ms, fall in row.falls], now)
        self._sum.move(-row.reserved, now)
        self._live = self._counted_at = None
        self._reserved, self._peak = 0, self._sum.level
        self._tripped = row.tripped
        left_ms = min(row.forgiven_ms - later_ms, round(WINDOW_SEC * 1000))
        if passed_ms < -JUMP_SEC * 1000:
            # The time of day was set back: how long ago the word was given cannot be told.
            left_ms = 0
        self._forgiven_until = now + left_ms / 1000 if left_ms > 0 else None
        self._is_urgent = row.reserved > 0 or passed_ms < 0
        self._written_at, self._offset_sec = now, self._offset()

    async def tidy(self, *, at_end: bool = False) -> None:
        """Bring the row up to date if it lacks something, or says too much for a minute.

        :raises CursorStoreError: if it cannot be written; it is tried again by the next call.
        """
        if self._is_due(at_end):
            async with self._saving:
                if self._is_due(at_end):
                    await self._save(self._claimed)

    def _is_due(self, at_end: bool) -> bool:
        says_too_much = self._has_moved or self._reserved > self._claimed
        now = self._clock.monotonic()
        if self._is_urgent or (says_too_much and (at_end or now - self._written_at > TIDY_SEC)):
            return True
        tells_times = self._reserved or self._forgiven_sec() or self._sum.fallen(now)
        return bool(tells_times) and abs(self._offset() - self._offset_sec) > JUMP_SEC

    def _offset(self) -> float:
        """Return by how much the time of day is ahead of the monotonic clock, in seconds."""
        return self._wall_clock.now_ms() / 1000 - self._clock.monotonic()

    def _next_block(self, needed: int) -> int:
        """Return how much to reserve: ``needed`` at least, and more each time."""
        shrunk = self._sum.fallen(self._clock.monotonic())
        allowed = self._allowance(shrunk)
        first, last = allowed // BLOCK_FIRST, allowed // BLOCK_LAST
        self._block = min(last, max(first, 2 * self._block, 1))
        return max(needed, min(self._block, allowed - shrunk))

    async def _save(self, reserve: int) -> None:
        """Write the row; what was reserved before counts no more, whether or not this succeeds."""
        now = self._clock.monotonic()
        row = InterlockRow(
            saved_at_ms=self._wall_clock.now_ms(),
            falls=self._sum.falls(now),
            reserved=reserve,
            forgiven_ms=round(self._forgiven_sec() * 1000),
            tripped=self._tripped,
        )
        self._reserved, self._peak = 0, self._sum.level
        self._is_urgent = self._has_moved = False
        try:
            await self._store.save_interlock(self._peer_id, row)
        except BaseException:
            # It may be there all the same, now or later.
            self._is_urgent = True
            raise
        self._reserved = reserve
        self._written_at, self._offset_sec = now, self._offset()

    def __repr__(self) -> str:
        told = f"tripped: {self._tripped}" if self._tripped else f"{self.shrunk} of {self.allowed}"
        return f"<Interlock {self._peer_id!r} {told}>"
