"""Retry profiles: how long to wait between attempts, and when to give up.

Delays grow exponentially (tenacity's ``wait_exponential``) with jitter, so that nodes that lost the
same peer do not come back in step. Time and randomness come from the ports: tenacity's own jitter
would roll the dice of the process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential

from fsm_replication.ports import Clock

__all__ = ("DAEMON", "STARTUP", "TESTING", "RetryProfile", "call_with_retries")

OnRetry = Callable[[int, BaseException, float], None]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryProfile:
    """``initial_sec`` x ``factor`` per failure, up to ``max_sec``; all over 0, factor at least 1.

    ``attempts`` (at least 1) and ``total_sec`` (over 0) say when to stop, None for never: no
    attempt begins after ``total_sec`` seconds. ``attempt_timeout_sec`` bounds one attempt, None
    for not at all.

    :raises ValueError: if a number is outside its range or not finite.
    """

    initial_sec: float
    factor: float
    max_sec: float
    attempts: int | None = None
    total_sec: float | None = None
    attempt_timeout_sec: float | None = None

    def __post_init__(self) -> None:
        seconds = {
            "initial_sec": self.initial_sec,
            "max_sec": self.max_sec,
            "total_sec": self.total_sec,
            "attempt_timeout_sec": self.attempt_timeout_sec,
        }
        for name, value in seconds.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number over 0")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor is {self.factor}; it must be a finite number from 1")
        if self.initial_sec > self.max_sec:
            raise ValueError(f"initial_sec, {self.initial_sec}, is over max_sec, {self.max_sec}")
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; it must be at least 1")

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after the ``attempt``-th failure, counted from 1.

        Between half of the exponential delay and all of it, whatever the number.

        :raises ValueError: if ``attempt`` is below 1.
        """
        if attempt < 1:
            raise ValueError(f"failures are counted from 1, not {attempt}")
        # A power of floats overflows at once, which tenacity answers with the maximum; a power of
        # whole numbers would first be worked out to its last digit.
        wait = wait_exponential(
            multiplier=self.initial_sec, max=self.max_sec, exp_base=float(self.factor)
        )
        state = RetryCallState(AsyncRetrying(), None, (), {})
        state.attempt_number = attempt
        longest = wait(state)
        return rng.uniform(longest / 2, longest)


STARTUP: Final = RetryProfile(0.5, 1.5, 5.0, total_sec=30.0)
DAEMON: Final = RetryProfile(1.0, 2.0, 300.0)
TESTING: Final = RetryProfile(0.01, 2.0, 0.1, attempts=3, attempt_timeout_sec=0.5)


async def call_with_retries(
    profile: RetryProfile,
    clock: Clock,
    rng: random.Random,
    function: Callable[[], Awaitable[_T]],
    *,
    retry_on: tuple[type[BaseException], ...],
    on_retry: OnRetry | None = None,
) -> _T:
    """Call ``function`` until it succeeds, fails for good, or the profile is exhausted.

    Only errors of ``retry_on`` are retried, and of those only Exceptions: a cancellation always
    passes. An attempt that takes longer than ``attempt_timeout_sec`` fails with TimeoutError,
    which is retried where ``retry_on`` names it. A wait that would reach ``total_sec`` is not
    begun. ``on_retry`` is called with the number of the failed attempt from 1, its error and the
    seconds to wait, before each wait.

    :raises BaseException: the last error of ``function`` itself.
    :raises TimeoutError: if the last attempt took too long.
    """
    began = clock.monotonic()

    def worth_retrying(error: BaseException) -> bool:
        return isinstance(error, retry_on) and isinstance(error, Exception)

    def exhausted(state: RetryCallState) -> bool:
        if profile.attempts is not None and state.attempt_number >= profile.attempts:
            return True
        passed = clock.monotonic() - began
        return profile.total_sec is not None and passed + state.upcoming_sleep >= profile.total_sec

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if on_retry is not None and error is not None:
            on_retry(state.attempt_number, error, state.upcoming_sleep)

    async def attempt() -> _T:
        async with clock.timeout(profile.attempt_timeout_sec):
            return await function()

    retrying = AsyncRetrying(
        sleep=clock.sleep,
        wait=lambda state: profile.delay(state.attempt_number, rng),
        stop=exhausted,
        retry=retry_if_exception(worth_retrying),
        before_sleep=tell,
        reraise=True,
    )
    result: _T = await retrying(attempt)
    return result
