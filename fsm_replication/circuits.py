"""Circuit breakers on pybreaker, made right for asyncio.

pybreaker keeps the counters and the state. What it cannot do on an event loop is done here: it is
told outcomes *after* an await and never holds its lock across one; a cancelled call is neither a
success nor a failure (pybreaker alone would count it as one or the other); in HalfOpen one call
runs at a time (pybreaker alone lets every concurrent caller through); time comes from the port;
and an outcome belongs to the state in which its call began, so that a slow failure from before the
circuit opened cannot spoil a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final

import pybreaker

from fsm_replication.errors import CircuitOpenError
from fsm_replication.ports import Clock

__all__ = ("CLOSED_FOR_SEC", "CallOutcome", "Circuit", "CircuitState")

# A circuit that stays Closed for this long has left its trouble behind.
CLOSED_FOR_SEC: Final = 60.0


class CircuitState(StrEnum):
    """Where a circuit breaker is."""

    CLOSED = "Closed"
    OPEN = "Open"
    HALF_OPEN = "HalfOpen"


_STATES = {
    pybreaker.STATE_CLOSED: CircuitState.CLOSED,
    pybreaker.STATE_OPEN: CircuitState.OPEN,
    pybreaker.STATE_HALF_OPEN: CircuitState.HALF_OPEN,
}

CircuitListener = Callable[["Circuit", CircuitState, CircuitState], None]
CallListener = Callable[["Circuit", "CallOutcome"], None]


class CallOutcome(StrEnum):
    """What became of a call through a circuit; one that is cancelled says nothing about it."""

    SUCCESS = "success"
    FAILURE = "failure"
    CANCELLED = "cancelled"
    REJECTED = "rejected"


class Circuit(pybreaker.CircuitBreakerListener):
    """One circuit: opens after ``failures`` in a row, closes after ``successes`` probes in a row.

    ``reset_sec`` is the time in Open before the first probe may run, in seconds. It doubles with
    each further opening, up to ``reset_max_sec`` (by default it does not grow), and is short again
    after a minute Closed. ``on_call`` hears of every call, also of those that are not let through.
    ``last_error`` is what the last call that failed died of, "" where none has.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int,
        reset_sec: float,
        successes: int,
        clock: Clock,
        reset_max_sec: float | None = None,
        on_change: CircuitListener | None = None,
        on_call: CallListener | None = None,
    ) -> None:
        self.name = name
        self.reset_sec = reset_sec
        self.reset_max_sec = reset_sec if reset_max_sec is None else reset_max_sec
        self._clock = clock
        self._on_change = on_change
        self._on_call = on_call
        self._opened_at = 0.0
        # How long it stays Open this time; 0 before it has ever opened.
        self._wait_sec = 0.0
        self._closed_at = 0.0
        self._probing = False
        self._era = 0
        self.last_error = ""
        self.last_success: float | None = None
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=failures,
            success_threshold=successes,
            listeners=[self],
            name=name,
            throw_new_error_on_trip=False,
        )

    def configure(
        self, *, failures: int, successes: int, reset_sec: float, reset_max_sec: float
    ) -> None:
        """Put other numbers in force; the state stays, and a wait under way gets no longer."""
        self._breaker.fail_max = failures
        self._breaker.success_threshold = successes
        self.reset_sec, self.reset_max_sec = reset_sec, reset_max_sec
        self._wait_sec = min(self._wait_sec, reset_max_sec)

    @property
    def state(self) -> CircuitState:
        """The present state."""
        return _STATES[self._breaker.current_state]

    @property
    def failure_count(self) -> int:
        """Failures in a row since the last success."""
        return self._breaker.fail_counter

    @property
    def wait_sec(self) -> float:
        """Seconds from its last opening to the first probe; 0 before it has ever opened."""
        return self._wait_sec

    @property
    def probe_in_sec(self) -> float:
        """Seconds until a call would be let through; 0 where it would be now."""
        if self.state is CircuitState.CLOSED:
            return 0.0
        if self.state is CircuitState.HALF_OPEN:
            return self._wait_sec if self._probing else 0.0
        return max(0.0, self._opened_at + self._wait_sec - self._clock.monotonic())

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run a call inside; an Exception is a failure, a cancellation is nothing.

        :raises CircuitOpenError: if the call must not be made now.
        """
        if self.probe_in_sec > 0.0:
            self._note(CallOutcome.REJECTED)
            raise CircuitOpenError(self.name, self.last_error)
        if self.state is CircuitState.OPEN:
            self._breaker.half_open()
        probe = self.state is CircuitState.HALF_OPEN
        self._probing = self._probing or probe
        era, outcome = self._era, CallOutcome.CANCELLED
        try:
            yield
        except Exception as error:
            outcome = CallOutcome.FAILURE
            if era == self._era:
                self._tell(error)
            raise
        else:
            outcome = CallOutcome.SUCCESS
            self.last_success = self._clock.monotonic()
            if era == self._era:
                self._tell(None)
        finally:
            if probe and era == self._era:
                self._probing = False
            self._note(outcome)

    def _note(self, outcome: CallOutcome) -> None:
        if self._on_call is not None:
            self._on_call(self, outcome)

    def _tell(self, error: Exception | None) -> None:
        if error is not None:
            self.last_error = str(error) or type(error).__name__

        def outcome() -> None:
            if error is not None:
                raise error

        # The probe is over before pybreaker hears of it, since hearing may change the state.
        self._probing = False
        try:
            self._breaker.call(outcome)
        except Exception as raised:
            if raised is not error:
                raise

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Hear of a change from pybreaker."""
        self._era += 1
        self._probing = False
        now = self._clock.monotonic()
        if new_state.name == pybreaker.STATE_OPEN:
            self._wait_sec = self._next_wait(old_state.name, now)
            self._opened_at = now
        elif new_state.name == pybreaker.STATE_CLOSED:
            self._closed_at = now
        if self._on_change is not None and old_state is not None:
            self._on_change(self, _STATES[old_state.name], _STATES[new_state.name])

    def _next_wait(self, old_state: str, now: float) -> float:
        rested = old_state == pybreaker.STATE_CLOSED and now - self._closed_at >= CLOSED_FOR_SEC
        if rested or not self._wait_sec:
            return self.reset_sec
        return max(self.reset_sec, min(self.reset_max_sec, self._wait_sec * 2))

    def __repr__(self) -> str:
        return f"<Circuit {self.name} {self.state}>"
