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
    ``lag_ms`` is 0 where nothing is unsettled and the stream's head is being read. It grows from the
    last read that reached the head on where the link does not read, whatever the reason, and is None
    until the head was reached for the first time since this start; ``lag_events`` counts the events
    that are known not to be settled, and is None where the peer's Redis does not count entries, or
    where that would be 0 of a stream whose head is not being read. ``millis_since_success`` is None
    before the first success. ``bootstrap`` tells how far a copy has come, "" where none runs. ``gaps_open`` counts the
    lines of the loss ledger that are not healed yet: gaps, and dropped dead letters.
    ``shrunk`` is by how many live items this peer has made the store the poorer within the hour,
    below the most it held; beyond ``shrink_allowed`` the link pauses (interlock), by the live
    items that were last counted, and ``repair.interlock_min`` before they were. ``forgiven_until`` is until when a
    person has let everything through, in milliseconds since the epoch; None: nobody has.
    ``stale_held_back`` counts old items that wait for ``repair(accept_stale=...)`` or
    ``reject_stale``. ``stream_too_short``: the peer's stream was trimmed faster than it was read
    after a bootstrap; raise its ``stream_maxlen``. ``layout`` is the layout in which trees are compared
    with it, "" where there is none in common: then nothing mends what its stream does not bring. ``agreed_at`` is when all the peer held was last
    known to be here, in milliseconds since the epoch; 0 is longer ago than any tombstone is kept.
    ``agreed_except`` counts the keys that this leaves out, because they could not be taken.
    ``clock_skew_sec`` is the peer's clock minus ours in seconds, by its last answer; None where it
    has not told its time.
    """

    node_id: str
    state: PeerState
    since: int
    connected: bool
    circuit_state: CircuitState
    circuit_open: bool
    failure_count: int
    millis_since_success: int | None
    lag_ms: int | None
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
    shrunk: int = 0
    shrink_allowed: int = 0
    forgiven_until: int | None = None
    clock_skew_sec: float | None = None
    agreed_except: int = 0


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The engine and its links, as they are now.

    ``ready``: Running, at least one peer connected (or none configured), and the own store
    reachable. ``healthy``: ready, the sync engine accepts writes, and none of its circuits is open.
    ``synced``: since this start the head of each configured peer's stream was reached, or its tree
    agreed with. ``cursor_store_error`` is "" while cursors reach the disk. ``store_error`` says why the
    own store is not reachable, "" while it is as far as is known: where no call has succeeded for
    ``circuits.look_interval``, it is asked.
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
    store_reachable: bool = True
    store_error: str = ""
    reads_circuit: CircuitState = CircuitState.CLOSED
    writes_circuit: CircuitState = CircuitState.CLOSED

    def max_lag_ms(self) -> int | None:
        """Return the largest lag of any peer, in milliseconds; 0 without peers.

        None where the lag of any peer is unknown: it may be larger than all that are known.
        """
        lags = [peer.lag_ms for peer in self.peers]
        return None if None in lags else max((lag for lag in lags if lag is not None), default=0)

    def has_healthy_peer(self) -> bool:
        """Say whether any peer is connected with its circuit closed."""
        return any(peer.connected and not peer.circuit_open for peer in self.peers)

    def unhealthy_peers(self) -> tuple[PeerHealth, ...]:
        """Return the peers that are not connected or whose circuit is open."""
        return tuple(p for p in self.peers if not p.connected or p.circuit_open)
