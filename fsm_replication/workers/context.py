"""What the workers of one link are given: settings, ports, and the books they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from structlog.stdlib import BoundLogger

from fsm_replication.circuits import Circuit
from fsm_replication.config import PeerConfig, Settings
from fsm_replication.current import Current
from fsm_replication.errors import CursorStoreError, ReplicationError
from fsm_replication.limiter import PrioritySlot, RateLimiter
from fsm_replication.metrics import PeerMetrics
from fsm_replication.ports import BEFORE_ALL, PeerRecord, Ports, Position, StreamId
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.workers.arrivals import Arrivals
from fsm_replication.workers.changes import ChangeFeed, Doubts
from fsm_replication.workers.cursor_flush import CursorBook
from fsm_replication.workers.foreign_walk import SettledHashes
from fsm_replication.workers.guards import Interlock, KeyMemory, StaleGuard
from fsm_replication.workers.slo import SloWatch

__all__ = ("HEAD_OF_EMPTY", "LinkContext", "LinkProgress")

HEAD_OF_EMPTY: Final = Position(BEFORE_ALL, 0)


@dataclass(slots=True)
class LinkProgress:
    """What one link has achieved; written by its workers, read by health without I/O.

    Times of the monotonic clock are in seconds, stream times in milliseconds. ``advances`` grows
    with each entry settled for the first time and each item fetched: nothing else is progress (G12).
    ``furthest`` is the id up to which entries were settled since the last copy,
    ``letter_bytes_needed`` what the dead letters hold for which there was no room last.
    """

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

    def lag_ms(self, now: float) -> int:
        """Return the lag in milliseconds: 0 where nothing is known to be unsettled."""
        if self.oldest_unsettled_ms is None:
            if not self.unread_events or self.settled is None:
                return 0
            # Nothing is in memory, but the stream was seen to hold more: between two reads of a
            # catch-up, while paused, after a connection was lost.
            return max(0, self.newest_ms - self.settled.stream_id.ms)
        behind = self.newest_ms - self.oldest_unsettled_ms
        waited = int((now - self.oldest_unsettled_seen) * 1000)
        return max(0, behind, waited)

    def lag_events(self) -> int | None:
        """Return how many events are not settled, None where the peer does not count them."""
        if self.unread_events is None:
            return None
        return self.unread_events + self.pending_events


@dataclass(frozen=True, slots=True)
class LinkContext:
    """Everything a link's workers may use.

    A link has one at a time, and another when its peer's configuration changes. Workers keep the
    one they were started with: their connections and the ``peer`` in it belong together. The
    ``settings`` are always those in force. ``starting`` says whether the engine fails
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
    progress: LinkProgress
    interlock: Interlock
    stale: StaleGuard
    unfetchable: KeyMemory
    settled: SettledHashes
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

    def letters_fit(self, record: PeerRecord) -> bool:
        """Say whether there is room for the dead letters for which there was none."""
        if self.settings.dead_letters.when_full != "pause" or not record.dead_letters:
            return True
        limits = self.settings.limits
        held_bytes = record.letter_bytes + self.progress.letter_bytes_needed
        fits = held_bytes <= limits.dead_letter_bytes
        return fits and record.dead_letters < limits.dead_letters

    async def agree(self, at_ms: int) -> None:
        """Note that everything the peer held at ``at_ms`` is held here: no gap is open any more."""
        self.stale.agreed(at_ms)
        self.progress.stream_too_short = False
        try:
            await self.ports.cursor_store.set_agreed(self.peer_id, at_ms, heal_gaps=True)
        except CursorStoreError as error:
            # It is found out again by the next comparison.
            self.cursors.failed(error)
            self.log.warning("agreement_not_kept", error=error)
        else:
            self.progress.gaps_open = 0
        await self.note_synced()

    async def note_synced(self) -> None:
        """Note that the peer was fully read or compared once."""
        if self.progress.synced:
            return
        self.progress.synced = True
        self.on_synced()
        try:
            await self.ports.cursor_store.set_synced(self.peer_id)
        except CursorStoreError as error:
            # It is found out again after the next start.
            self.cursors.failed(error)
            self.log.warning("synced_not_kept", error=error)
