"""Retry profiles: growth, jitter, limits, and what is never retried."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import RetryError

from fsm_replication.ports import SystemClock
from fsm_replication.retry import DAEMON, STARTUP, TESTING, RetryProfile, call_with_retries

ONCE_MORE = RetryProfile(1.0, 2.0, 8.0, attempts=2)


class SteppedClock:
    """Time that passes only where somebody sleeps; limits on an attempt are asyncio's own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Return the present second."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Let the time pass at once, and others run."""
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Return asyncio's own timeout."""
        return asyncio.timeout(seconds)


class Flaky:
    """Fails with each of some errors in turn, then returns "done"."""

    def __init__(self, *errors: BaseException, clock: SteppedClock | None = None) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.clock = clock

    async def __call__(self) -> str:
        """Fail or return; with a clock, each call takes a second."""
        self.calls += 1
        if self.clock is not None:
            self.clock.now += 1.0
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class Fixed(random.Random):
    """Gives one share of every range, to see both of its ends."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def random(self) -> float:
        """Return the share."""
        return self.share


def profiles() -> st.SearchStrategy[RetryProfile]:
    """Return profiles of any shape that is allowed."""
    return st.builds(
        lambda first, factor, more: RetryProfile(first, factor, first * more),
        st.floats(0.001, 100),
        st.floats(1, 10) | st.integers(1, 10),
        st.floats(1, 1000),
    )


# Delays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (STARTUP, [0.5, 0.75, 1.125, 1.6875, 2.53125, 3.796875, 5.0, 5.0]),
        (DAEMON, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]),
        (TESTING, [0.01, 0.02, 0.04, 0.08, 0.1, 0.1]),
    ],
)
def test_a_profile_grows_as_documented(profile: RetryProfile, expected: list[float]) -> None:
    """A profile would wait longer or shorter than the specification says."""
    numbers = range(1, len(expected) + 1)
    assert [profile.delay(n, Fixed(1.0)) for n in numbers] == pytest.approx(expected)
    halves = [value / 2 for value in expected]
    assert [profile.delay(n, Fixed(0.0)) for n in numbers] == pytest.approx(halves)


def test_the_profiles_are_those_of_the_specification() -> None:
    """A profile would stop too early, too late or never."""
    assert (STARTUP.attempts, STARTUP.total_sec) == (None, 30.0)
    assert (DAEMON.attempts, DAEMON.total_sec) == (None, None)
    assert (TESTING.attempts, TESTING.attempt_timeout_sec) == (3, 0.5)


@given(profiles(), st.integers(1, 10**6), st.integers())
def test_a_delay_is_within_its_range(profile: RetryProfile, attempt: int, seed: int) -> None:
    """A delay would overflow, be over the maximum, or jitter by more than half."""
    longest = profile.delay(attempt, Fixed(1.0))
    assert longest <= profile.max_sec
    assert longest >= min(profile.initial_sec, profile.max_sec) * (1 - 1e-9)
    seconds = profile.delay(attempt, random.Random(seed))
    assert longest / 2 <= seconds <= longest * (1 + 1e-9)


@given(profiles(), st.integers(1, 10_000))
def test_delays_never_shrink(profile: RetryProfile, attempt: int) -> None:
    """A later failure would be tried again sooner than an earlier one."""
    now = profile.delay(attempt, Fixed(1.0))
    assert profile.delay(attempt + 1, Fixed(1.0)) >= now * (1 - 1e-9)


@pytest.mark.parametrize("profile", [DAEMON, RetryProfile(1, 2, 300), RetryProfile(1, 1, 1)])
@pytest.mark.parametrize("attempt", [1025, 10**6, 10**9])
def test_a_delay_after_very_many_failures(profile: RetryProfile, attempt: int) -> None:
    """A peer that is away for years would end its link by an overflow."""
    assert profile.delay(attempt, Fixed(1.0)) == profile.max_sec


def test_a_slow_growth_reaches_its_maximum() -> None:
    """A clamp on the exponent would stop a small factor below its maximum."""
    assert RetryProfile(1.0, 1.01, 300.0).delay(1000, Fixed(1.0)) == 300.0


def test_jitter_comes_from_the_given_generator() -> None:
    """A simulator could not replay a run, since the process's own dice were rolled."""
    random.seed(1)
    before = random.getstate()
    one = [DAEMON.delay(n, random.Random(7)) for n in range(1, 9)]
    two = [DAEMON.delay(n, random.Random(7)) for n in range(1, 9)]
    other = [DAEMON.delay(n, random.Random(8)) for n in range(1, 9)]
    assert one == two != other
    assert random.getstate() == before


@pytest.mark.parametrize("attempt", [0, -1])
def test_failures_are_counted_from_one(attempt: int) -> None:
    """A caller that counts from 0 would wait half of what it should, and never notice."""
    with pytest.raises(ValueError, match="from 1"):
        DAEMON.delay(attempt, random.Random(1))


@pytest.mark.parametrize(
    "numbers",
    [
        {"initial_sec": 0},
        {"initial_sec": 9},
        {"factor": 0.5},
        {"factor": float("inf")},
        {"max_sec": float("nan")},
        {"max_sec": float("inf")},
        {"attempts": 0},
        {"total_sec": 0},
        {"attempt_timeout_sec": -1},
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(numbers: dict[str, Any]) -> None:
    """A profile would retry without pause, or for ever, by a slip."""
    with pytest.raises(ValueError, match=r"must be|over max_sec"):
        RetryProfile(**{"initial_sec": 1.0, "factor": 2.0, "max_sec": 8.0, **numbers})


def test_a_profile_cannot_be_changed() -> None:
    """One user of a profile would change it for all."""
    profile: Any = DAEMON
    with pytest.raises(AttributeError):
        profile.max_sec = 1.0


# Calls ------------------------------------------------------------------------------------------


async def call(
    function: Callable[[], Awaitable[str]],
    profile: RetryProfile = DAEMON,
    clock: SteppedClock | None = None,
    retry_on: tuple[type[BaseException], ...] = (OSError,),
    on_retry: Callable[[int, BaseException, float], None] | None = None,
) -> str:
    """Call with the longest delay each time."""
    clock = clock or SteppedClock()
    rng = Fixed(1.0)
    return await call_with_retries(
        profile, clock, rng, function, retry_on=retry_on, on_retry=on_retry
    )


async def test_a_success_is_returned_at_once() -> None:
    """A call that works would wait, or be made twice."""
    clock, function = SteppedClock(), Flaky()
    assert await call(function, clock=clock) == "done"
    assert (function.calls, clock.slept) == (1, [])


async def test_it_waits_the_profile_between_attempts_and_tells() -> None:
    """Attempts would follow each other without the profile's delays, or unseen."""
    clock, told = SteppedClock(), list[tuple[int, str, float]]()
    function = Flaky(OSError("one"), OSError("two"), OSError("three"))
    result = await call(
        function, clock=clock, on_retry=lambda n, error, sec: told.append((n, str(error), sec))
    )
    assert result == "done"
    assert clock.slept == [1.0, 2.0, 4.0]
    assert told == [(1, "one", 1.0), (2, "two", 2.0), (3, "three", 4.0)]


async def test_the_last_error_itself_is_raised_after_the_last_attempt() -> None:
    """Callers that catch their own error would meet tenacity's instead, or the first one."""
    first, last, never = OSError("first"), OSError("last"), OSError("never")
    function = Flaky(first, last, never)
    told: list[int] = []
    with pytest.raises(OSError, match="last") as caught:
        await call(function, ONCE_MORE, on_retry=lambda n, _error, _sec: told.append(n))
    assert caught.value is last
    assert not isinstance(caught.value.__cause__, RetryError)
    assert not isinstance(caught.value.__context__, RetryError)
    assert (function.calls, told) == (2, [1])


async def test_other_errors_are_not_retried() -> None:
    """A bug would be retried for ever as if the network were down."""
    error = KeyError("bug")
    function = Flaky(error)
    with pytest.raises(KeyError) as caught:
        await call(function)
    assert caught.value is error
    assert function.calls == 1


async def test_no_wait_goes_over_the_total() -> None:
    """A start would take longer than its budget by up to one delay."""
    clock = SteppedClock()
    profile = RetryProfile(1.0, 2.0, 8.0, total_sec=10.0)
    function = Flaky(*(OSError(str(n)) for n in range(99)), clock=clock)
    with pytest.raises(OSError, match="2"):
        await call(function, profile, clock)
    # 1 s a call and 1 + 2 s of waiting make 6; 4 more would end at the total, too late to begin.
    assert clock.slept == [1.0, 2.0]
    assert clock.now - 1000.0 == 6.0


async def test_both_limits_hold_together() -> None:
    """The one given would switch the other off."""
    profile = RetryProfile(1.0, 2.0, 8.0, attempts=2, total_sec=1000.0)
    function = Flaky(*(OSError() for _ in range(99)))
    with pytest.raises(OSError):  # noqa: PT011 - it has no text
        await call(function, profile)
    assert function.calls == 2


async def test_an_endless_profile_goes_on() -> None:
    """A link would give up on a peer that was away for long."""
    function = Flaky(*(OSError() for _ in range(3000)))
    assert await call(function) == "done"
    assert function.calls == 3001


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit()])
async def test_what_must_pass_is_never_retried(error: BaseException) -> None:
    """Ctrl-C or a shutdown would be taken for a failure, whatever the caller retries on."""
    function = Flaky(error)
    task = call(function, retry_on=(BaseException,))
    with pytest.raises(type(error)) as caught:
        await task
    assert caught.value is error
    assert function.calls == 1


@pytest.mark.parametrize("where", ["attempt", "wait"])
async def test_a_cancellation_ends_it(where: str) -> None:
    """A shutdown would hang on a retry, in an attempt or in a wait."""
    entered, forever, calls = asyncio.Event(), asyncio.Event(), 0

    class Waiting(SteppedClock):
        async def sleep(self, _seconds: float) -> None:
            entered.set()
            await forever.wait()

    async def function() -> str:
        nonlocal calls
        calls += 1
        if where == "wait":
            raise OSError
        entered.set()
        await forever.wait()
        return "done"

    task = asyncio.create_task(call(function, clock=Waiting(), retry_on=(BaseException,)))
    async with asyncio.timeout(5):
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert task.cancelled()
    assert calls == 1


async def test_a_slow_attempt_is_cut_off_and_retried_where_asked() -> None:
    """One hanging attempt would use up the time of all."""
    profile = RetryProfile(0.001, 2.0, 0.002, attempts=3, attempt_timeout_sec=0.01)
    calls = 0

    async def function() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            await asyncio.Event().wait()
        return "done"

    assert await call(function, profile, retry_on=(TimeoutError,)) == "done"
    assert calls == 3
    calls = 0
    with pytest.raises(TimeoutError):
        await call(function, profile, retry_on=(OSError,)[:0])
    assert calls == 1


async def test_it_runs_on_the_real_clock() -> None:
    """The port's real clock would not fit what tenacity awaits."""
    function = Flaky(OSError(), OSError())
    result = await call_with_retries(
        TESTING, SystemClock(), random.Random(3), function, retry_on=(OSError,)
    )
    assert (result, function.calls) == ("done", 3)


async def test_many_calls_side_by_side_keep_apart() -> None:
    """Calls would share a count or a delay."""
    clock = SteppedClock()
    functions = [Flaky(*(OSError() for _ in range(n))) for n in range(20)]
    results = await asyncio.gather(*(call(f, clock=clock) for f in functions))
    assert results == ["done"] * 20
    assert [f.calls for f in functions] == list(range(1, 21))
