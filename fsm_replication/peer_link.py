"""A peer link: the effects of the link table, for one peer.

Everything here runs synchronously inside a move or a request; it starts workers and hands out
modes, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, cast

from fsm_replication.circuits import Circuit
from fsm_replication.config import PeerConfig
from fsm_replication.driver import Driver, Observer
from fsm_replication.errors import PeerRefusedError, WorkerCrashedError, shorten
from fsm_replication.health import PeerHealth
from fsm_replication.journal import Journal, StateWaiter, Watcher
from fsm_replication.machine import Move
from fsm_replication.reports import LinkFact, PauseReason, Report, Ticket
from fsm_replication.retry import DAEMON, STARTUP, RetryProfile
from fsm_replication.tables import LINK, CircuitState, PeerState
from fsm_replication.workers.connector import (
    Lines,
    connect,
    mending_wait_sec,
    retry_wait_sec,
    wait_for_mending,
    wait_to_retry,
)
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.ping import ping_once
from fsm_replication.workers.tailer import Mode, Tailer

__all__ = ("PeerLink",)

RUNNING: Final = "group:Running"
# What it comes to for the link when one of its workers dies unexpectedly.
DEATHS: Final = {
    "tailer": LinkFact.LOST,
    "connector": LinkFact.UNREACHABLE,
    "timer": LinkFact.DUE,
}


class PeerLink:
    """Reads one peer; made by the engine, which also stops it.

    ``on_crash`` is called when a worker of this link died of an error nobody expected.
    """

    def __init__(
        self,
        context: LinkContext,
        *,
        journal: Journal,
        observer: Observer,
        on_crash: Callable[[str, Exception], None],
        reasons: frozenset[PauseReason] = frozenset(),
    ) -> None:
        self.context = context
        # Never changed, but replaced: other threads read it.
        self._reasons: frozenset[PauseReason] = frozenset()
        self._hold_reasons(reasons)
        self._tailer: Tailer | None = None
        self._lines: Lines | None = None
        self._attempts = 0
        self._next_attempt_at: float | None = None
        self._advances_seen = 0
        self._connected_at: float | None = None
        self._profile = DAEMON
        self._on_crash = on_crash
        self.driver = Driver(
            LINK,
            self,
            name=f"link:{context.peer_id}",
            journal=journal,
            wall_clock=context.ports.wall_clock,
            observer=observer,
            ended_fact=LinkFact.ENDED,
            on_fact=self._on_fact,
            on_crash=self._crashed,
        )

    # What may be asked of it.

    @property
    def peer_id(self) -> str:
        """The peer's node id."""
        return self.context.peer_id

    @property
    def state(self) -> PeerState:
        """The present state."""
        return cast("PeerState", self.driver.state)

    @property
    def pause_reasons(self) -> frozenset[PauseReason]:
        """The reasons to pause that hold now, in force or not."""
        return self._reasons

    @property
    def attempts(self) -> int:
        """How often in a row connecting has failed, or a connection was lost that was of no use."""
        return self._attempts

    @property
    def next_attempt_sec(self) -> float | None:
        """Seconds until the next attempt to connect; None where none is planned."""
        at = self._next_attempt_at
        return None if at is None else max(0.0, at - self.context.ports.clock.monotonic())

    def describe(self) -> str:
        """Return the state with what explains it: reasons, the last error, the next attempt."""
        error = self.context.progress.last_error
        parts = [str(self.state)]
        if self.state is PeerState.PAUSED:
            parts[0] += f" ({', '.join(sorted(self._reasons))})"
        if error and not self.state.is_running:
            parts.append(error)
        wait_sec = self.next_attempt_sec
        if wait_sec is not None:
            parts.append(f"next attempt in {wait_sec:.1f} s")
        return parts[0] + (": " + ", ".join(parts[1:]) if parts[1:] else "")

    def _hold_reasons(self, reasons: frozenset[PauseReason]) -> None:
        """Put other reasons to pause in the place of those that held."""
        before, self._reasons = self._reasons, reasons
        for reason in before ^ reasons:
            self.context.metrics.pause_reason(reason, holds=reason in reasons)

    def watch(self) -> Watcher:
        """Follow this link's moves, the present state first."""
        return self.driver.watch()

    def waiter(self, *states: PeerState) -> StateWaiter:
        """Wait for any of some states, beginning now."""
        return self.driver.waiter(frozenset(states))

    def connect(self) -> None:
        """Begin to connect.

        :raises InvalidStateError: unless the link is Created or Failed.
        """
        self.driver.request("connect", why="asked to connect")

    def shutdown(self, why: str) -> None:
        """Begin to end; does nothing if that has begun."""
        self.driver.request_if_legal("shutdown", why=why)

    def _forgive(self) -> None:
        if self._tailer is not None:
            self._tailer.forgive()

    def pause(self) -> None:
        """Take in an operator's wish to pause; in force at once or at the next Resuming."""
        self._forgive()
        self._hold_reasons(self._reasons | {PauseReason.OPERATOR})
        self.driver.request_if_legal(
            "pause", why="an operator paused it", payload=PauseReason.OPERATOR
        )

    def resume(self) -> None:
        """End an operator's pause, and what only an operator can end."""
        if PauseReason.INTERLOCK in self._reasons or self.context.interlock.tripped:
            self.context.interlock.forgive()
        self._hold_reasons(self._reasons - {PauseReason.OPERATOR, PauseReason.INTERLOCK})
        self._forgive()
        self.driver.request_if_legal("resume", why="an operator resumed it")

    def clear(self, reason: PauseReason, why: str) -> None:
        """Take a reason to pause away."""
        self._hold_reasons(self._reasons - {reason})
        self.driver.request_if_legal("resume", why=why)

    def block(self, reason: PauseReason, why: str) -> None:
        """Take in a reason to pause that somebody else than the tailer has found."""
        self._hold_reasons(self._reasons | {reason})
        self.driver.request_if_legal("pause", why=why, payload=reason)

    def lost(self, lines: Lines, why: str) -> None:
        """Take in that somebody else than the tailer has found connections to be of no use."""
        if self._lines is lines:
            self.driver.react(LinkFact.LOST, why=why)

    def blame(self, worker: str, error: Exception) -> None:
        """Take in that somebody else than the tailer died of an error nobody expected.

        It counts against this link, which connects anew: what was on its connections is in doubt.
        """
        self.driver.note_death(worker, error)
        self.context.crashed(error)
        why = f"the {worker} died working with this peer: {shorten(str(error))}"
        self.driver.react(LinkFact.LOST, why=why)

    def decide_anew(self, why: str) -> None:
        """Have what was decided decided again, by the settings in force, for the store as it is.

        A link that is about to decide, or will, needs no telling.
        """
        self._forgive()
        self.driver.react(LinkFact.OUTDATED, why=why)

    def equip(self, context: LinkContext) -> None:
        """Give a link that was never started everything anew."""
        self.context = context
        for reason in self._reasons:
            context.metrics.pause_reason(reason, holds=True)

    def configure(self, peer: PeerConfig, new_circuit: Callable[[PeerConfig], Circuit]) -> None:
        """Take over what is configured for the peer from now on.

        A change of the way to it begins a new connection; a change of that or of the circuit's
        settings begins a new circuit, since failures of the old one say nothing about it.
        """
        old, self.context = self.context.peer, replace(self.context, peer=peer)
        moved = self._way_changed(old, peer)
        if not moved and _circuit_settings(old) == _circuit_settings(peer):
            return
        self.context = replace(self.context, peer_circuit=new_circuit(peer))
        if moved:
            self._take_other_way()
        elif self.state is PeerState.BACKOFF:
            self.driver.request("retry", why="the circuit's settings changed")

    def _way_changed(self, old: PeerConfig, new: PeerConfig) -> bool:
        if (old.redis_url, old.redis_prefix) != (new.redis_url, new.redis_prefix):
            return True
        if old.allow_echo == new.allow_echo:
            return False
        # Whether it allows echoes only matters for a foreign node, and is asked when it is connected.
        return self._lines is None or (self._lines.foreign and not new.allow_echo)

    def _take_other_way(self) -> None:
        why = f"another way to the peer is configured: {self.context.peer.display_url}"
        connecting = self.state is PeerState.CONNECTING
        self.driver.react(LinkFact.MOVED, why=why)
        if connecting:
            # The attempt under way is given up; there is nothing to wait for before the next.
            self.driver.react(LinkFact.MOVED, why=why)
        self._attempts = 0

    def force(self) -> None:
        """Let any number of deletes through for an hour, and try again what failed."""
        self.context.interlock.forgive()
        self.context.unfetchable.clear()
        self.context.settled.clear()
        if PauseReason.INTERLOCK in self._reasons:
            self.clear(PauseReason.INTERLOCK, "an operator forced it")

    @property
    def lines(self) -> Lines | None:
        """The connections, while the link has them."""
        return self._lines

    async def ping(self) -> None:
        """Ping the peer; a ping that fails is a lost connection."""
        if self._lines is not None and self.state.is_running:
            report = self.driver.reporter("ping", self.driver.machine.ticket(RUNNING))
            try:
                await ping_once(self.context, self._lines.asking, report)
            except Exception as error:  # noqa: BLE001 - it is logged, and counts against this link
                self.blame("pinger", error)

    # Guards and effects, named in the table.

    def no_reason_left(self) -> bool:
        """Guard of resume."""
        return not self._reasons

    def open_connections(self, _move: Move) -> None:
        """Start the connector."""
        self._next_attempt_at = None
        work = partial(connect, self.context)
        self.driver.start_worker("connector", str(PeerState.CONNECTING), work)

    def start_tailer(self, move: Move) -> None:
        """Take the connections over and start reading."""
        lines = cast("Lines", move.payload)
        self._lines = lines
        self._connected_at = self.context.ports.clock.monotonic()
        self._tailer = Tailer(
            self.context,
            lines,
            reasons=lambda: self.pause_reasons,
            priority=lambda: self.context.peer.priority,
        )
        self._hand(Mode.DECIDE)
        self.driver.start_worker(
            "tailer", RUNNING, self._tailer.run, stop=self._tailer.stop, release=lines.close
        )

    def _hand(self, mode: Mode) -> None:
        assert self._tailer is not None
        ticket = self.driver.machine.ticket(str(self.state))
        self._tailer.set_mode(mode, self.driver.reporter("tailer", ticket))

    def decide(self, _move: Move) -> None:
        """Have the tailer decide what comes next."""
        self._hand(Mode.DECIDE)

    def copy(self, _move: Move) -> None:
        """Have the tailer copy the peer's items."""
        self._hand(Mode.COPY)

    def read_in_bulk(self, _move: Move) -> None:
        """Have the tailer read in bulk."""
        self._hand(Mode.READ_IN_BULK)

    def read_at_head(self, _move: Move) -> None:
        """Have the tailer wait at the head."""
        self._hand(Mode.READ_AT_HEAD)

    def idle(self, _move: Move) -> None:
        """Have the tailer do nothing but stay connected."""
        self._hand(Mode.IDLE)

    def hold(self, _move: Move) -> None:
        """Have the tailer hold what it has."""
        self._hand(Mode.HOLD)

    def await_end(self, _move: Move) -> None:
        """Wait until what was asked to stop has ended."""
        self._next_attempt_at = None
        self._lines = None
        self._tailer = None
        self.driver.await_end()

    def wait_to_retry(self, _move: Move) -> None:
        """Start the timer of the next attempt, longer each time until there was progress.

        After too many unexpected errors there is none: the link fails.
        """
        verdict = self.context.crashes.verdict(f"whoever works with peer {self.peer_id!r}")
        if verdict is not None:
            self.context.crashes.clear()
            self._attempts = 0
            ticket = self.driver.machine.ticket(str(PeerState.BACKOFF))
            self.driver.post(Report("crashes", LinkFact.HOPELESS, ticket, str(verdict), verdict))
            return
        profile = self._retry_profile()
        if self._has_advanced():
            self._attempts = 0
        if profile != self._profile:
            # What failed while the engine started does not make later waits long.
            self._attempts, self._profile = 0, profile
        self._attempts += 1
        delay = profile.delay(self._attempts, self.context.ports.random)
        wait = self._plan_attempt(retry_wait_sec(self.context, delay))
        work = partial(wait_to_retry, self.context, wait)
        self.driver.start_worker("timer", str(PeerState.BACKOFF), work)

    def _plan_attempt(self, wait_sec: float) -> float:
        self._next_attempt_at = self.context.ports.clock.monotonic() + wait_sec
        return wait_sec

    def _has_advanced(self) -> bool:
        """Whether the last connection made progress, or was of use for long enough."""
        progress, settings = self.context.progress, self.context.settings
        connected_at, self._connected_at = self._connected_at, None
        came, self._advances_seen = progress.advances != self._advances_seen, progress.advances
        if came or connected_at is None:
            return came
        lasted = self.context.ports.clock.monotonic() - connected_at
        answered = (progress.last_success or connected_at) - connected_at
        return answered > settings.hot_path.block_timeout or lasted > settings.reconnect.longest

    def _retry_profile(self) -> RetryProfile:
        reconnect = self.context.settings.reconnect
        if not self.context.starting():
            return replace(DAEMON, initial_sec=reconnect.first, max_sec=reconnect.longest)
        first = min(STARTUP.initial_sec, reconnect.first)
        return replace(
            STARTUP, initial_sec=first, max_sec=max(first, min(STARTUP.max_sec, reconnect.longest))
        )

    def wait_for_mending(self, move: Move) -> None:
        """Start the timer that tries again what may be mended without a word to this node."""
        error = move.payload
        if isinstance(error, WorkerCrashedError) or (
            isinstance(error, PeerRefusedError) and error.mendable
        ):
            wait = self._plan_attempt(mending_wait_sec(self.context))
            work = partial(wait_for_mending, self.context, wait)
            self.driver.start_worker("timer", str(PeerState.FAILED), work)

    def release(self, _move: Move) -> None:
        """Forget what has ended."""
        self._lines = None
        self._tailer = None

    # What workers say.

    def _on_fact(self, report: Report) -> None:
        if isinstance(report.payload, PauseReason):
            if report.fact is LinkFact.BLOCKED:
                self._hold_reasons(self._reasons | {report.payload})
            elif report.fact is LinkFact.CLEARED:
                self._hold_reasons(self._reasons - {report.payload})

    def _crashed(self, name: str, ticket: Ticket, error: Exception) -> None:
        # The link goes on as after any other loss, unless that happens too often.
        self.context.crashed(error)
        why = f"the {name} died: {shorten(str(error))}"
        self.driver.post(Report(name, DEATHS[name], ticket, why))
        self._on_crash(f"{self.driver.name}:{name}", error)

    def health(self) -> PeerHealth:
        """Return a snapshot, from memory alone."""
        context, progress, state = self.context, self.context.progress, self.state
        now = context.ports.clock.monotonic()
        success = progress.last_success
        circuit = context.peer_circuit.state
        return PeerHealth(
            node_id=self.peer_id,
            state=state,
            since=self.driver.since_ms,
            connected=state.is_running,
            circuit_state=circuit,
            circuit_open=circuit is CircuitState.OPEN,
            failure_count=progress.failures,
            millis_since_success=None if success is None else int((now - success) * 1000),
            lag_ms=progress.lag_ms(now),
            lag_events=progress.lag_events(now),
            catching_up=state in (PeerState.CATCHING_UP, PeerState.BOOTSTRAPPING),
            pause_reasons=self.pause_reasons,
            last_error=progress.last_error,
            bootstrap=progress.bootstrap if state is PeerState.BOOTSTRAPPING else "",
            gaps_open=progress.gaps_open,
            dead_letters=progress.dead_letters,
            events_read=progress.events_read,
            events_applied=progress.events_applied,
            synced=progress.synced,
            stale_held_back=context.stale.count,
            shrunk=context.interlock.shrunk,
            shrink_allowed=context.interlock.allowed,
            forgiven_until=context.interlock.forgiven_until_ms,
            stream_too_short=progress.stream_too_short,
            layout=progress.layout,
            agreed_at=context.stale.agreed_at_ms,
            clock_skew_sec=context.peer_clock.skew_sec,
            agreed_except=len(context.stale.exceptions),
        )

    def __repr__(self) -> str:
        return f"<PeerLink {self.peer_id} {self.state}>"


def _circuit_settings(peer: PeerConfig) -> tuple[int, float]:
    return peer.circuit_failure_threshold, peer.circuit_reset_timeout_sec
