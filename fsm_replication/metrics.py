"""Prometheus metrics, named as in the wire specification.

The host owns the exporter and may inject its registry; without one an engine has a registry of
its own, and the default registry of prometheus_client is never touched. Every metric carries
``node_id``, so that two engines may share a registry. Children are bound once per peer, because
looking one up by its labels costs more than counting.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

__all__ = ("Metrics", "PeerMetrics", "weakly")

_T = TypeVar("_T")

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_EVENTS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)

# (attribute, metric, labels beside node_id, meaning); "replication_" stands before each name.
_GAUGES: Final[tuple[tuple[str, tuple[str, ...], str], ...]] = (
    ("engine_state", (), "0 Created, 1 Connecting, 2 Running, 3 ShuttingDown, 4 Stopped, 5 Failed"),
    ("connected_peers", (), "Links in the group Running"),
    ("peer_state", ("peer_id", "state"), "1 for the state a link is in, 0 for all others"),
    ("adaptive_batch_size", ("peer_id",), "Entries the next read at the head asks for"),
    ("peer_pause_reason", ("peer_id", "reason"), "1 while a reason to pause the link holds"),
    (
        "lag_ms",
        ("peer_id",),
        "How far the link is behind, in milliseconds; NaN: its head was never reached",
    ),
    ("lag_seconds", ("peer_id",), "The same in seconds"),
    ("lag_events", ("peer_id",), "Events of the stream known not to be settled; NaN: unknown"),
    ("interlock_shrunk", ("peer_id",), "Live items less within an hour because of a peer"),
    (
        "interlock_allowed",
        ("peer_id",),
        "How many it may be before the link pauses; NaN until live items were counted",
    ),
    ("circuit_state", ("circuit",), "0 Closed, 1 HalfOpen, 2 Open"),
    ("store_reachable", (), "1 while the own store answers, 0 while it does not"),
    ("clock_skew_seconds", ("peer_id",), "The peer's clock minus ours; NaN: unknown"),
)
_COUNTERS: Final[tuple[tuple[str, tuple[str, ...], str], ...]] = (
    ("peer_connections", ("peer_id", "status"), "Attempts to connect, by outcome"),
    ("peer_pings", ("peer_id", "status"), "Pings of idle peers, by outcome"),
    ("peer_circuit_transitions", ("peer_id", "source", "dest"), "State changes of peer circuits"),
    ("cdc_events_read", ("peer_id",), "Events read from the stream"),
    ("cdc_events_applied", ("peer_id",), "Events that changed the store"),
    ("cdc_events_deduped", ("peer_id",), "Events found superseded or current"),
    ("stream_reads", ("peer_id",), "Replies to stream reads"),
    ("stream_trimmed", ("peer_id",), "Gaps found in the stream"),
    ("backpressure_pauses", ("peer_id",), "Pauses because the store took no writes"),
    ("batch_submitted", ("peer_id",), "Puts handed to the store"),
    ("batch_deleted", ("peer_id",), "Tombstones handed to the store"),
    ("batch_skipped", ("peer_id",), "Changes the store found superseded"),
    ("batch_errors", ("peer_id",), "Batches whose store call failed"),
    ("clock_ahead", ("peer_id",), "Events stamped more than a minute ahead of this node"),
    ("cursor_persists", (), "Cursors written to disk"),
    ("cursor_flushes", (), "Flushes of dirty cursors"),
    ("cursor_flush_errors", (), "Flushes that failed"),
    ("cursor_retries", (), "Retries of cursor store calls"),
    ("repair_cycles", (), "Passes of the cold path"),
    ("repair_skipped", ("reason",), "Peers left out of a pass"),
    ("repair_peers_checked", (), "Peers compared"),
    ("repair_peers_in_sync", (), "Peers found equal"),
    ("repair_items_fetched", (), "Items fetched by the cold path"),
    ("repair_items_submitted", (), "Items applied by the cold path"),
    ("repair_items_deleted", (), "Tombstones applied by the cold path"),
    ("repair_items_deferred", (), "Items left for the next pass"),
    ("repair_errors", (), "Errors of the cold path"),
    ("merkle_divergence", ("peer_id",), "Comparisons that found a difference"),
    ("circuit_calls", ("circuit", "outcome"), "Calls through a circuit, by outcome"),
    ("circuit_rejections", ("circuit",), "Calls that an open circuit refused"),
    ("slo_violations", ("peer_id", "slo_type"), "Limits of settings.slo that were exceeded"),
    ("errors", ("peer_id", "error_type"), "Errors by kind"),
    ("dead_letters", ("peer_id", "reason"), "Entries that could not be applied"),
    ("transitions", ("machine", "trigger", "source", "dest"), "Moves of all machines"),
    ("stale_reports", ("machine", "fact"), "Reports from entries that were over"),
    ("worker_restarts", ("worker",), "Workers started again after an unexpected error"),
)
_HISTOGRAMS: Final[tuple[tuple[str, tuple[str, ...], tuple[float, ...], str], ...]] = (
    ("peer_ping_latency_seconds", ("peer_id",), _SECONDS, "Round trip of a ping"),
    (
        "peer_operation_duration_seconds",
        ("peer_id", "operation"),
        _SECONDS,
        'Calls to a peer; and "connect", "repair" as a whole',
    ),
    ("stream_read_duration_seconds", ("peer_id",), _SECONDS, "Stream reads, without blocking"),
    ("batch_flush_duration_seconds", ("peer_id",), _SECONDS, "Store calls of the hot path"),
    ("batch_size", ("peer_id",), _EVENTS, "Events per batch"),
    ("repair_cycle_duration_seconds", (), _SECONDS, "Passes of the cold path"),
)

_LABELS: Final = {
    **{name: labels for name, labels, _ in (*_GAUGES, *_COUNTERS)},
    **{name: labels for name, labels, _, _ in _HISTOGRAMS},
}

_families: WeakKeyDictionary[CollectorRegistry, dict[str, Any]] = WeakKeyDictionary()


def _declare(registry: CollectorRegistry) -> dict[str, Any]:
    """Return the metrics of a registry, declared once however many engines share it."""
    known = _families.get(registry)
    if known is not None:
        return known
    made: dict[str, MetricWrapperBase] = {}
    for name, labels, text in _GAUGES:
        made[name] = Gauge(f"replication_{name}", text, ("node_id", *labels), registry=registry)
    for name, labels, text in _COUNTERS:
        made[name] = Counter(f"replication_{name}", text, ("node_id", *labels), registry=registry)
    for name, labels, buckets, text in _HISTOGRAMS:
        made[name] = Histogram(
            f"replication_{name}",
            text,
            ("node_id", *labels),
            buckets=buckets,
            registry=registry,
        )
    _families[registry] = made
    return made


def weakly(owner: _T, read: Callable[[_T], float | None]) -> Callable[[], float]:
    """Return what reads a gauge of its owner as long as that lives; NaN stands for unknown.

    A registry keeps its gauges, and must not keep with them an engine that nobody else knows any more.
    """
    held = weakref.ref(owner)

    def value() -> float:
        found = held()
        known = None if found is None else read(found)
        return math.nan if known is None else known

    return value


class Metrics:
    """The metrics of one node."""

    def __init__(self, node_id: str, registry: CollectorRegistry | None = None) -> None:
        self.node_id = node_id
        self.registry = registry if registry is not None else CollectorRegistry()
        self._families = _declare(self.registry)
        self._bound: dict[tuple[str, ...], Any] = {}

    def get(self, name: str, *labels: str) -> Any:
        """Return the child of a metric (named without ``replication_``), bound once and kept."""
        key = (name, *labels)
        child = self._bound.get(key)
        if child is None:
            child = self._bound[key] = self._families[name].labels(self.node_id, *labels)
        return child

    def peer(self, peer_id: str) -> PeerMetrics:
        """Return the children that the hot path of one peer needs."""
        return PeerMetrics(self, peer_id)

    def forget_peer(self, peer_id: str) -> None:
        """Remove everything that was counted about a peer, its link and its circuit."""
        told = {
            ("peer_id", peer_id),
            ("circuit", f"peer:{peer_id}"),
            ("machine", f"link:{peer_id}"),
            ("machine", f"circuit:peer:{peer_id}"),
        }
        for key in list(self._bound):
            if not told.isdisjoint(self._labels(key)):
                self._remove(key)

    def forget_all(self) -> None:
        """Remove everything that this node has counted."""
        for key in list(self._bound):
            self._remove(key)

    def _labels(self, key: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        name, *values = key
        return zip(_LABELS[name], values, strict=True)

    def _remove(self, key: tuple[str, ...]) -> None:
        name, *values = key
        del self._bound[key]
        self._families[name].remove(self.node_id, *values)


class PeerMetrics:
    """What one link counts, bound in advance.

    A peer that was taken out is forgotten, but some call to it may still come to its end: from
    :meth:`detach` on, what is counted goes to a registry that nobody reads.
    """

    def __init__(self, metrics: Metrics, peer_id: str) -> None:
        self._metrics = metrics
        self.peer_id = peer_id
        self.read = metrics.get("cdc_events_read", peer_id)
        self.applied = metrics.get("cdc_events_applied", peer_id)
        self.deduped = metrics.get("cdc_events_deduped", peer_id)
        self.reads = metrics.get("stream_reads", peer_id)
        self.read_seconds = metrics.get("stream_read_duration_seconds", peer_id)
        self.flush_seconds = metrics.get("batch_flush_duration_seconds", peer_id)
        self.batch_size = metrics.get("batch_size", peer_id)
        self.submitted = metrics.get("batch_submitted", peer_id)
        self.deleted = metrics.get("batch_deleted", peer_id)
        self.skipped = metrics.get("batch_skipped", peer_id)
        self.batch_errors = metrics.get("batch_errors", peer_id)
        self.adaptive_batch_size = metrics.get("adaptive_batch_size", peer_id)
        self.trimmed = metrics.get("stream_trimmed", peer_id)
        self.clock_ahead = metrics.get("clock_ahead", peer_id)
        self.backpressure = metrics.get("backpressure_pauses", peer_id)

    def show_lag(self, lag_ms: Callable[[], float], lag_events: Callable[[], float]) -> None:
        """Have the lag worked out whenever it is read: it grows where nothing is settled."""
        self._metrics.get("lag_ms", self.peer_id).set_function(lag_ms)
        self._metrics.get("lag_seconds", self.peer_id).set_function(lambda: lag_ms() / 1000)
        self._metrics.get("lag_events", self.peer_id).set_function(lag_events)

    def pause_reason(self, reason: str, *, holds: bool) -> None:
        """Show whether a reason to pause holds."""
        self._metrics.get("peer_pause_reason", self.peer_id, reason).set(holds)

    def show_interlock(self, shrunk: Callable[[], float], allowed: Callable[[], float]) -> None:
        """Have what the interlock has counted worked out whenever it is read."""
        self._metrics.get("interlock_shrunk", self.peer_id).set_function(shrunk)
        self._metrics.get("interlock_allowed", self.peer_id).set_function(allowed)

    def show_skew(self, skew_sec: Callable[[], float]) -> None:
        """Have the skew of the peer's clock worked out whenever it is read."""
        self._metrics.get("clock_skew_seconds", self.peer_id).set_function(skew_sec)

    def detach(self) -> None:
        """Let whatever is counted from now on be lost."""
        self._metrics = Metrics(self._metrics.node_id)

    def diverged(self) -> None:
        """Count a comparison of trees that found a difference."""
        self._metrics.get("merkle_divergence", self.peer_id).inc()

    def connection(self, status: str) -> None:
        """Count an attempt to connect by its outcome."""
        self._metrics.get("peer_connections", self.peer_id, status).inc()

    def ping(self, status: str, seconds: float | None = None) -> None:
        """Count a ping by its outcome, and how long it took."""
        self._metrics.get("peer_pings", self.peer_id, status).inc()
        if seconds is not None:
            self._metrics.get("peer_ping_latency_seconds", self.peer_id).observe(seconds)

    def error(self, error_type: str) -> None:
        """Count one error of a kind."""
        self._metrics.get("errors", self.peer_id, error_type).inc()

    def dead_letters(self, reason: str, count: int = 1) -> None:
        """Count entries that became dead letters."""
        self._metrics.get("dead_letters", self.peer_id, reason).inc(count)

    def slo(self, slo_type: str) -> None:
        """Count a limit that was exceeded."""
        self._metrics.get("slo_violations", self.peer_id, slo_type).inc()

    def operation(self, operation: str, seconds: float) -> None:
        """Record how long a call to the peer took."""
        self._metrics.get("peer_operation_duration_seconds", self.peer_id, operation).observe(
            seconds
        )
