"""What is configured for all peers alike.

The text below a field is its description: unit, what zero means, how it stands to other fields,
and what to choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fsm_replication.config.model import Location, Model, over
from fsm_replication.config.values import (
    BlockDuration,
    Count,
    CountOrZero,
    Duration,
    Flag,
    Milliseconds,
    PositiveDuration,
    Rate,
    Share,
    Size,
)

__all__ = (
    "CircuitConfig",
    "CircuitsConfig",
    "ColdPathConfig",
    "DeadLettersConfig",
    "HotPathConfig",
    "LimitsConfig",
    "PeerHealthConfig",
    "ReconnectConfig",
    "RepairConfig",
    "Settings",
    "SloConfig",
    "StartupConfig",
    "TimeoutsConfig",
    "TombstonesConfig",
    "WritesCircuitConfig",
)


class HotPathConfig(Model):
    """Tailing the peers' streams."""

    enabled: Flag = True
    """False: links stand by, and only the cold path brings changes. Leave it on."""
    batch_size: Count = 100
    """Entries per read at the head, at first where it adapts; at least 1. 100 keeps a quiet
    link quick while another catches up."""
    block_timeout: BlockDuration = 5.0
    """Seconds a read waits at the head, at least 1 ms: Redis would wait for ever at 0. Longer
    means fewer round trips; an event ends the wait at once. 1 to 10 s."""
    adaptive_batch_size: Flag = False
    """True: a full read doubles the size up to ``max_batch_size``, an empty one takes off a
    tenth or 10 down to ``min_batch_size``. For streams that come in bursts."""
    min_batch_size: Count = 50
    """Entries; the smallest size it adapts to. Not over ``max_batch_size``."""
    max_batch_size: Count = 1000
    """Entries; the largest size it adapts to, and what a read in bulk asks for. Over 1000
    gains little and makes other links wait."""
    rate_limit_enabled: Flag = False
    """True: one token bucket slows all peers together."""
    rate_limit_per_sec: Rate = 10_000
    """Events per second for all peers together, over 0. What the local store can bear."""
    rate_limit_burst: Count = 1000
    """Events let through at once after a rest, at least 1. About ``max_batch_size``."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        known = cls._known(data)
        yield from over(known, "min_batch_size", "max_batch_size")
        size, adapts = known.get("batch_size"), known.get("adaptive_batch_size")
        if not adapts or size is None:
            return
        low, high = known.get("min_batch_size"), known.get("max_batch_size")
        if low is not None and size < low:
            yield ("batch_size",), f"it adapts, and {size} is below min_batch_size, {low}"
        if high is not None and size > high:
            yield ("batch_size",), f"it adapts, and {size} is over max_batch_size, {high}"


class ColdPathConfig(Model):
    """Comparing trees with the peers, now and then."""

    enabled: Flag = True
    """False: what the hot path missed stays missed. Leave it on."""
    interval_sec: PositiveDuration = 60.0
    """Seconds between two cycles, over 0. 60; a comparison of equal trees is one round trip."""
    max_items_per_cycle: Count = 1000
    """Items fetched in one cycle, shared by all peers; what is left waits for the next one."""
    backoff_base_sec: PositiveDuration = 5.0
    """Seconds a peer rests after a failure, doubled with each one. Not over
    ``backoff_max_sec``."""
    backoff_max_sec: PositiveDuration = 300.0
    """Seconds; the longest rest of a peer."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from over(cls._known(data), "backoff_base_sec", "backoff_max_sec")


class PeerHealthConfig(Model):
    """Pinging peers that say nothing."""

    enabled: Flag = True
    """False: a dead peer shows only when a read fails or times out."""
    ping_interval_sec: PositiveDuration = 30.0
    """Seconds between two looks for idle peers, over 0."""
    idle_threshold_sec: Duration = 60.0
    """Seconds without an answer after which a peer is pinged; 0 pings every peer every time.
    Twice ``ping_interval_sec`` is a good choice."""


class CircuitConfig(Model):
    """When a circuit of the node's own store opens, and how it closes again."""

    failures: Count = 5
    """Failed calls in a row that open it, at least 1. With more, a store that is down is asked for
    longer."""
    successes: Count = 2
    """Probes in a row that must succeed before it closes, at least 1."""
    reset_first: PositiveDuration = 1.0
    """Seconds from its opening to the first probe, over 0; doubled each time that it opens again,
    and short again after a minute Closed. Not over ``reset_max``. Less than the store takes to
    restart."""
    reset_max: PositiveDuration = 30.0
    """Seconds; the longest wait for a probe. How long a store may be back without being used."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from over(cls._known(data), "reset_first", "reset_max")


class WritesCircuitConfig(CircuitConfig):
    """The same for calls that write, which do more harm to a store in trouble."""

    failures: Count = 3
    """Failed calls in a row that open it, at least 1."""
    successes: Count = 3
    """Probes in a row that must succeed before it closes, at least 1."""
    reset_max: PositiveDuration = 60.0
    """Seconds; the longest wait for a probe."""


class CircuitsConfig(Model):
    """The circuits that guard the node's own store, and how soon its outage is noticed."""

    writes: WritesCircuitConfig = WritesCircuitConfig()
    """For calls that write."""
    reads: CircuitConfig = CircuitConfig()
    """For calls that read."""
    look_interval: PositiveDuration = 2.0
    """Seconds without an answer from the store after which it is asked for a sign of life, over 0.
    Health tells of an outage within this and, where calls hang, ``timeouts.ping``."""


class SloConfig(Model):
    """Limits over which a metric counts and a warning is logged; nothing else depends on them."""

    max_stream_read_latency_ms: Milliseconds = 100.0
    """Milliseconds of one read, over 0; time spent blocked at the head does not count."""
    max_peer_op_latency_ms: Milliseconds = 500.0
    """Milliseconds of any other command to a peer, over 0."""
    max_batch_flush_latency_ms: Milliseconds = 200.0
    """Milliseconds of applying one batch, over 0. Well under ``timeouts.store_call``."""
    max_replication_lag_sec: PositiveDuration = 30.0
    """Seconds a link may be behind its peer's head, over 0."""


class StartupConfig(Model):
    """Starting."""

    timeout: PositiveDuration = 30.0
    """Seconds until the first peer must be up, over 0. Several times ``timeouts.connect``."""
    when_no_peer: Literal["fail", "run"] = "fail"
    """"fail": a start without any peer raises; "run": it goes on, and links keep trying."""


class ReconnectConfig(Model):
    """How long a link waits before it tries its peer again; it never gives up.

    The peer's circuit may make it wait longer: see ``peers[].circuit_reset_timeout_sec``.
    """

    first: PositiveDuration = 1.0
    """Seconds after the first failure, over 0, doubled with each further one; up to half of it
    is left out at random, so that nodes do not come back in step. Not over ``longest``."""
    longest: PositiveDuration = 30.0
    """Seconds; no wait is longer. How long a peer may be back without being read."""
    rejected: PositiveDuration = 300.0
    """Seconds until a peer is tried again that rejected the credentials, or has another tombstone
    ttl or resolver, over 0. Minutes, so that a server that locks users out after some failures does
    not."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from over(cls._known(data), "first", "longest")


class TimeoutsConfig(Model):
    """How long a call may take. None may be 0: every wait on something outside has an end."""

    connect: PositiveDuration = 10.0
    """Seconds to connect to a peer and log in. Below ``startup.timeout``."""
    command: PositiveDuration = 5.0
    """Seconds until a peer's answer begins; a blocking read gets ``hot_path.block_timeout`` more. From
    then on each further ``command`` must bring 1 KiB a second."""
    store_call: PositiveDuration = 10.0
    """Seconds for one call into the local store."""
    ping: PositiveDuration = 5.0
    """Seconds for a ping; one that takes longer is a lost connection."""
    cursor: PositiveDuration = 5.0
    """Seconds for a call to the cursor store."""
    drain: PositiveDuration = 10.0
    """Seconds for the whole shutdown, of which a fifth is kept for closing. Below what your
    service manager grants before it kills."""


class LimitsConfig(Model):
    """Bounds on memory; sizes are bytes or text like "16 MiB"."""

    payload_bytes: Size = 16 * 1024**2
    """Bytes of one content after decompression. Not over ``batch_bytes``."""
    batch_bytes: Size = 64 * 1024**2
    """Bytes of one batch; a link holds at most two and one entry. The memory you can spare,
    divided by twice the number of peers."""
    dead_letters: Count = 10_000
    """Dead letters kept per peer, at least 1; see ``dead_letters.when_full``."""
    dead_letter_bytes: Size = 256 * 1024**2
    """Bytes of raw fields that the dead letters of one peer hold on disk; likewise. Those of one
    batch are kept whatever they hold: several times ``batch_bytes``."""
    journal: Count = 1000
    """Moves of machines kept in memory, at least 1."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from over(cls._known(data), "payload_bytes", "batch_bytes")


class DeadLettersConfig(Model):
    """Entries that could not be applied."""

    when_full: Literal["pause", "drop_oldest"] = "pause"
    """At ``limits.dead_letters`` or ``limits.dead_letter_bytes`` of one peer: "pause" its link, or
    "drop_oldest" and count it."""


class TombstonesConfig(Model):
    """How long deletes are remembered."""

    ttl: PositiveDuration = 7 * 86_400.0
    """Seconds, over 0, and the same at every node: links between others are refused. Longer
    than any outage after which a node shall come back."""
    grace: Duration = 86_400.0
    """Seconds more that the store keeps an expired one; 0 keeps none. A day outlasts slow
    links."""


class RepairConfig(Model):
    """The interlock: a link pauses when its peer shrinks the number of live keys too far in an hour.

    What counts is the sum of the keys that it brought to life minus the live keys that it deleted,
    below the highest value of that sum within the hour, over restarts. Too far is more than the
    larger of the two bounds.
    """

    interlock_share: Share = 0.2
    """Share of the live keys, those that went within the hour included; 0 to 1. At 0
    ``interlock_min`` decides alone; at 1 it never trips."""
    interlock_min: CountOrZero = 1000
    """Keys, for small stores; at 0 ``interlock_share`` decides alone."""


class Settings(Model):
    """Everything that is the same for all peers."""

    hot_path: HotPathConfig = HotPathConfig()
    """Tailing the peers' streams."""
    cold_path: ColdPathConfig = ColdPathConfig()
    """Comparing trees."""
    peer_health: PeerHealthConfig = PeerHealthConfig()
    """Pinging idle peers."""
    circuits: CircuitsConfig = CircuitsConfig()
    """The circuits of the own store."""
    slo: SloConfig = SloConfig()
    """When a metric counts."""
    startup: StartupConfig = StartupConfig()
    """Starting."""
    reconnect: ReconnectConfig = ReconnectConfig()
    """How long to wait between attempts to connect."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """How long calls may take."""
    limits: LimitsConfig = LimitsConfig()
    """Bounds on memory."""
    dead_letters: DeadLettersConfig = DeadLettersConfig()
    """Entries that could not be applied."""
    tombstones: TombstonesConfig = TombstonesConfig()
    """How long deletes are remembered."""
    repair: RepairConfig = RepairConfig()
    """What the cold path must not do."""
