"""Circuits: what counts, who may probe, and what a cancelled call comes to."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.circuits import Circuit
from fsm_replication.errors import CircuitOpenError
from fsm_replication.tables import CircuitState

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class ByHand:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Return asyncio's own timeout."""
        return asyncio.timeout(seconds)


def made(clock: ByHand, failures: int = 3, successes: int = 2) -> Circuit:
    """Return a circuit that rests for a minute."""
    return Circuit("c", failures=failures, reset_sec=60.0, successes=successes, clock=clock)


def call(circuit: Circuit, *, fails: bool) -> None:
    """Make a call that ends at once."""
    with contextlib.suppress(ZeroDivisionError), circuit.guard():
        _ = 1 / (not fails)


async def cancelled_call(circuit: Circuit) -> None:
    """Make a call that is cancelled on its way."""
    begun = asyncio.Event()

    async def hang() -> None:
        with circuit.guard():
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_call_is_neither_success_nor_failure() -> None:
    """If this fails a shutdown opens circuits, or closes one over a store that is down."""
    clock = ByHand()
    circuit = made(clock)
    for _ in range(10):
        await cancelled_call(circuit)
    assert (circuit.state, circuit.failure_count) == (CLOSED, 0)
    for _ in range(2):
        call(circuit, fails=True)
    await cancelled_call(circuit)
    assert (circuit.state, circuit.failure_count) == (CLOSED, 2)
    call(circuit, fails=True)
    assert circuit.state is OPEN
    clock.now += 60
    for _ in range(5):
        await cancelled_call(circuit)
        assert circuit.state is HALF_OPEN
        assert circuit.probe_in_sec == 0.0, "the next probe may come at once"
    call(circuit, fails=False)
    await cancelled_call(circuit)
    call(circuit, fails=False)
    assert circuit.state is CLOSED


async def test_one_probe_at_a_time() -> None:
    """If this fails every link storms a store that has just come back."""
    clock = ByHand()
    circuit = made(clock)
    for _ in range(3):
        call(circuit, fails=True)
    clock.now += 59.9
    with pytest.raises(CircuitOpenError), circuit.guard():
        pass
    clock.now += 0.1
    with circuit.guard():
        assert circuit.state is HALF_OPEN
        for _ in range(3):
            with pytest.raises(CircuitOpenError), circuit.guard():
                pass
    with circuit.guard():
        pass
    assert circuit.state is CLOSED


class Model:
    """What a circuit does, in as few words as possible."""

    def __init__(self, failures: int, successes: int) -> None:
        self.most, self.needed = failures, successes
        self.state, self.failed, self.well, self.opened = CLOSED, 0, 0, 0.0

    def call(self, now: float, outcome: str) -> bool:
        """Make a call; returns whether it was let through."""
        if self.state is OPEN:
            if now < self.opened + 60:
                return False
            self.state, self.well = HALF_OPEN, 0
        if outcome == "fail":
            self.failed += 1
            if self.state is HALF_OPEN or self.failed >= self.most:
                self.state, self.opened = OPEN, now
        elif outcome == "succeed":
            self.failed = 0
            self.well += 1
            if self.state is HALF_OPEN and self.well >= self.needed:
                self.state = CLOSED
        return True


_OUTCOMES = st.sampled_from(["fail", "fail", "succeed", "cancel"])
_RESTS = st.sampled_from([0.0, 1.0, 30.0, 60.0])


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.tuples(_OUTCOMES, _RESTS), max_size=40))
def test_a_circuit_does_what_the_model_does(
    failures: int, successes: int, calls: list[tuple[str, float]]
) -> None:
    """If this fails some order of outcomes and rests opens or closes a circuit wrongly."""

    async def run() -> None:
        clock = ByHand()
        circuit, model = made(clock, failures, successes), Model(failures, successes)
        for outcome, rest in calls:
            clock.now += rest
            through = model.call(clock.now, outcome)
            if not through:
                with pytest.raises(CircuitOpenError), circuit.guard():
                    pass
            elif outcome == "cancel":
                await cancelled_call(circuit)
            else:
                call(circuit, fails=outcome == "fail")
            assert circuit.state is model.state

    asyncio.run(run())
