"""What health_check() returns: immutable snapshots, made without I/O (guarantee G10)."""

from __future__ import annotations

from dataclasses import dataclass

from fsm_replication.reports import PauseReason
from fsm_replication.tables import CircuitState, EngineState, PeerState

__all__ = ("HealthCheck", "PeerHealth")


@dataclass(frozen=True, slots=True)
class PeerHealth:
    """One link, as it is now.

    ``since`` is the wall-clock time of its last move, in milliseconds since the epoch.
    ``lag_ms`` is 0 where nothing is unsettled; ``lag_events`` is None where the peer's Redis does
    not count entries. ``millis_since_success`` is None before the first success. ``bootstrap``
    tells how far a copy has come, "" where none runs. ``gaps_open`` counts the
    lines of the loss ledger that are not healed yet: gaps, and dropped dead letters.
    ``stale_held_back`` counts old items that wait for ``repair(accept_stale=...)`` or
    ``reject_stale``. ``stream_too_short``: the peer's stream was trimmed faster than it was read
    after a bootstrap; raise its ``stream_maxlen``. ``layout`` is the layout in which trees are compared
    with it, "" where there is none in common: then nothing mends what its stream does not bring. ``agreed_at`` is when all the peer held was last
    known to be here, in milliseconds since the epoch; 0 is longer ago than any tombstone is kept.
    ``agreed_except`` counts the keys that this leaves out, because they could not be taken.
    """

    node_id: str
    state: PeerState
    since: int
    connected: bool
    circuit_state: CircuitState
    circuit_open: bool
    failure_count: int
    millis_since_success: int | None
    lag_ms: int
    lag_events: int | None
    catching_up: bool
    pause_reasons: frozenset[PauseReason]
    last_error: str
    bootstrap: str
    gaps_open: int
    dead_letters: int
    events_read: int
    events_applied: int
    synced: bool
    stale_held_back: int = 0
    stream_too_short: bool = False
    layout: str = ""
    agreed_at: int | None = None
    agreed_except: int = 0


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The engine and its links, as they are now.

    ``ready``: Running and at least one peer connected, or none configured. ``healthy``: ready and
    the sync engine accepts writes. ``synced``: each configured peer was fully read or compared
    once. ``cursor_store_error`` is "" while cursors reach the disk.
    """

    state: EngineState
    ready: bool
    healthy: bool
    synced: bool
    sync_engine_accepting_writes: bool
    peers_total: int
    peers_connected: int
    peers_circuit_open: int
    peers_catching_up: int
    peers: tuple[PeerHealth, ...]
    cursor_store_error: str = ""

    def max_lag_ms(self) -> int:
        """Return the largest lag of any peer, in milliseconds."""
        return max((peer.lag_ms for peer in self.peers), default=0)

    def has_healthy_peer(self) -> bool:
        """Say whether any peer is connected with its circuit closed."""
        return any(peer.connected and not peer.circuit_open for peer in self.peers)

    def unhealthy_peers(self) -> tuple[PeerHealth, ...]:
        """Return the peers that are not connected or whose circuit is open."""
        return tuple(p for p in self.peers if not p.connected or p.circuit_open)
