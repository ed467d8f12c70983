"""What the workers of one link are given: settings, ports, and the books they keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from structlog.stdlib import BoundLogger

from fsm_replication.circuits import Circuit
from fsm_replication.config import PeerConfig, Settings
from fsm_replication.current import Current
from fsm_replication.errors import CursorStoreError, ReplicationError, shorten
from fsm_replication.limiter import PrioritySlot, RateLimiter
from fsm_replication.metrics import PeerMetrics
from fsm_replication.ports import BEFORE_ALL, Agreement, PeerRecord, Ports, Position, StreamId
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.workers.arrivals import Arrivals
from fsm_replication.workers.changes import ChangeFeed, Doubts
from fsm_replication.workers.crashes import CrashCounter
from fsm_replication.workers.cursor_flush import CursorBook
from fsm_replication.workers.foreign_walk import SettledHashes
from fsm_replication.workers.guards import KeyMemory, StaleGuard
from fsm_replication.workers.interlock import Interlock
from fsm_replication.workers.peer_clock import PeerClock
from fsm_replication.workers.slo import SloWatch

__all__ = ("LinkContext", "LinkProgress")


@dataclass(slots=True, weakref_slot=True)
class LinkProgress:
    """What one link has achieved; written by its workers, read by health without I/O.

    Times of the monotonic clock are in seconds, stream times in milliseconds. ``advances`` grows
    with each entry settled for the first time and each item fetched: nothing else is progress (G12).
    ``furthest`` is the id up to which entries were settled since the last copy,
    ``letter_bytes_needed`` what the dead letters hold for which there was no room last.
    ``incarnation`` is that of the local store when the link decided for the last time, "" before the
    first.

    ``wanted_since`` is when the link first tried to connect, ``head_reached_at`` when the last read
    that left nothing behind was answered, and until ``head_watched_until`` a read that waits at the
    head is under way, whose answer is not overdue.
    """

    wanted_since: float | None = None
    head_reached_at: float | None = None
    head_watched_until: float = -math.inf
    read: Position | None = None
    settled: Position | None = None
    events_read: int = 0
    events_applied: int = 0
    events_deduped: int = 0
    newest_ms: int = 0
    oldest_unsettled_ms: int | None = None
    oldest_unsettled_seen: float = 0.0
    unread_events: int | None = None
    pending_events: int = 0
    last_success: float | None = None
    last_error: str = ""
    failures: int = 0
    dead_letters: int = 0
    letter_bytes_needed: int = 0
    gaps_open: int = 0
    clock_ahead: int = 0
    bootstrap: str = ""
    copied: int = 0
    synced: bool = False
    stream_too_short: bool = False
    layout: str = ""
    advances: int = 0
    rounds_delayed: int = 0
    furthest: StreamId = BEFORE_ALL
    incarnation: str = ""

    def settled_to(self, end: Position, entries: int) -> None:
        """Note that entries are settled; those that had been before are no advance."""
        self.settled = end
        if end.stream_id > self.furthest:
            self.furthest = end.stream_id
            self.advances += entries

    def go_on_from(self, position: Position) -> None:
        """Note that reading goes on from a position that was decided, whatever was read before."""
        self.read = self.settled = position
        self.furthest = position.stream_id

    def succeeded(self, now: float) -> None:
        """Note that the peer answered and what it sent was dealt with."""
        self.last_success = now
        self.failures = 0
        self.last_error = ""

    def failed(self, error: ReplicationError) -> None:
        """Note an error of this link."""
        self.failures += 1
        self.last_error = str(error)

    def lag_ms(self, now: float) -> int | None:
        """Return the lag in milliseconds, None until the head was reached for the first time.

        It is 0 where nothing is unsettled and the head is being read. What a peer has written
        since nobody reads it is not known: from the last read that reached its head on, it grows.
        """
        if self.head_reached_at is None:
            return None
        unseen_sec = now - self.head_reached_at if now > self.head_watched_until else 0.0
        oldest_ms, settled = self.oldest_unsettled_ms, self.settled
        if oldest_ms is not None:
            waited_sec = now - self.oldest_unsettled_seen
            return round(max(1000 * unseen_sec, 1000 * waited_sec, self.newest_ms - oldest_ms, 0))
        if self.unread_events and settled is not None and settled.stream_id != BEFORE_ALL:
            # Nothing is in memory, but the stream was seen to hold more: between two reads of a
            # catch-up, while paused, after a connection was lost. ("Before all" was decided and
            # not read, and no time can be told by it.)
            return round(max(1000 * unseen_sec, self.newest_ms - settled.stream_id.ms, 0))
        return round(1000 * unseen_sec)

    def lag_at_least_sec(self, now: float) -> float:
        """Return how long this link may have been behind, in seconds.

        Where the lag is unknown that is the time since the link first tried to connect.
        """
        lag_ms = self.lag_ms(now)
        if lag_ms is not None:
            return lag_ms / 1000
        return 0.0 if self.wanted_since is None else now - self.wanted_since

    def lag_events(self, now: float) -> int | None:
        """Return how many events are known not to be settled.

        None where the peer does not count them; and where all that were seen are settled, but the
        head is not being read: there may be others.
        """
        if self.unread_events is None:
            return None
        known = self.unread_events + self.pending_events
        return known if known or now <= self.head_watched_until else None


@dataclass(frozen=True, slots=True)
class LinkContext:
    """Everything a link's workers may use.

    A link has one at a time, and another when its peer's configuration changes. Workers keep the
    one they were started with: their connections and the ``peer`` in it belong together. The
    ``settings`` are always those in force. ``crashes`` counts the unexpected errors of whoever works
    with this peer: after too many the link fails. ``starting`` says whether the engine fails
    unless a peer is up soon.
    """

    local_node_id: str
    peer: PeerConfig
    current: Current[Settings]
    ports: Ports
    store: SyncEngine
    writes: Circuit
    reads: Circuit
    peer_circuit: Circuit
    starting: Callable[[], bool]
    cursors: CursorBook
    metrics: PeerMetrics
    limiter: RateLimiter
    copy_slot: PrioritySlot
    feed: ChangeFeed
    doubts: Doubts
    arrivals: Arrivals
    slo: SloWatch
    peer_clock: PeerClock
    progress: LinkProgress
    interlock: Interlock
    stale: StaleGuard
    unfetchable: KeyMemory
    settled: SettledHashes
    crashes: CrashCounter
    on_synced: Callable[[], None]
    log: BoundLogger

    @property
    def peer_id(self) -> str:
        """The peer's node id."""
        return self.peer.node_id

    @property
    def settings(self) -> Settings:
        """The settings in force now; they may be others after the next await."""
        return self.current.value

    def crashed(self, error: Exception) -> None:
        """Count an unexpected error while working with this peer; it was logged, or will be."""
        self.crashes.add(error)
        self.progress.failures += 1
        self.progress.last_error = f"{type(error).__name__}: {shorten(str(error))}"

    def letters_fit(self, record: PeerRecord) -> bool:
        """Say whether there is room for the dead letters for which there was none."""
        if self.settings.dead_letters.when_full != "pause" or not record.dead_letters:
            return True
        limits = self.settings.limits
        held_bytes = record.letter_bytes + self.progress.letter_bytes_needed
        fits = held_bytes <= limits.dead_letter_bytes
        return fits and record.dead_letters < limits.dead_letters

    async def agree(self, agreement: Agreement) -> None:
        """Note that everything the peer held is held here, but for a few keys: gaps are healed.

        Where the store is no longer the one that was compared, or our clock and the peer's are more
        than a day apart, nothing is agreed.
        """
        settled = BEFORE_ALL if self.progress.settled is None else self.progress.settled.stream_id
        if self.peer_clock.is_day_off():
            # Nobody can tell by which of the two it would be dated.
            return
        if agreement.incarnation != self.progress.incarnation or settled < agreement.up_to:
            return
        self.stale.agreed(agreement)
        self.progress.stream_too_short = False
        try:
            await self.ports.cursor_store.set_agreed(self.peer_id, agreement, heal_gaps=True)
        except CursorStoreError as error:
            # It is found out again by the next comparison.
            self.cursors.failed(error)
            self.log.warning("agreement_not_kept", error=error)
        else:
            self.progress.gaps_open = 0
        self.note_synced()

    def beginning(self) -> Agreement:
        """Return the agreement that a comparison which begins now may come to."""
        settled = self.progress.settled
        return Agreement(
            self.ports.wall_clock.now_ms(),
            self.progress.incarnation,
            BEFORE_ALL if settled is None else settled.stream_id,
        )

    def excepting(
        self, keys: Iterable[str], undeleted: Mapping[str, int]
    ) -> dict[str, int | None] | None:
        """Return the exceptions of an agreement, see :class:`StaleGuard`; None where there is none."""
        exceptions = self.stale.excepting(keys, undeleted)
        if exceptions is None:
            self.log.warning("too_many_exceptions", then="trees that differ so are no agreement")
        return exceptions

    def distrust_store(self) -> None:
        """Forget what was seen to be in the local store: it may be as it was at an earlier time."""
        self.settled.clear()
        self.unfetchable.clear()

    async def forget_store(self) -> None:
        """Forget all that was true of the local store: in effect it is another one now.

        :raises CursorStoreError: if that cannot be noted.
        """
        self.distrust_store()
        self.stale.forget()
        self.progress.synced = False
        self.progress.head_reached_at = None
        await self.ports.cursor_store.forget_store(self.peer_id)

    def note_synced(self) -> None:
        """Note that the peer's head was reached, or its tree agreed with, since this start."""
        if not self.progress.synced:
            self.progress.synced = True
            self.on_synced()

    def judge_lag(self) -> None:
        """See whether the link is further behind than it may be; without a hot path none is."""
        if self.settings.hot_path.enabled:
            self.slo.lag(self.progress.lag_at_least_sec(self.ports.clock.monotonic()))
