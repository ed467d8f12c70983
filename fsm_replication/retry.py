"""Retry profiles: how long to wait between attempts, and when to give up.

Delays grow exponentially (tenacity's ``wait_exponential``) with jitter, so that nodes that lost the
same peer do not come back in step. Randomness comes from the port.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_never,
    wait_exponential,
)

from fsm_replication.ports import Clock

__all__ = ("DAEMON", "STARTUP", "TESTING", "RetryProfile", "call_with_retries")

# Beyond this the exponent no longer matters, and would only overflow.
ATTEMPT_MAX: Final = 64
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryProfile:
    """``initial_sec`` x ``factor`` per attempt, up to ``max_sec``.

    ``attempts`` and ``total_sec`` say when to stop, None for never; ``attempt_timeout_sec`` bounds
    one attempt.
    """

    initial_sec: float
    factor: float
    max_sec: float
    attempts: int | None = None
    total_sec: float | None = None
    attempt_timeout_sec: float | None = None

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after the ``attempt``-th failure, counted from 1.

        Between half of the exponential delay and all of it.
        """
        wait = wait_exponential(multiplier=self.initial_sec, max=self.max_sec, exp_base=self.factor)
        state = RetryCallState(AsyncRetrying(), None, (), {})
        state.attempt_number = max(1, min(attempt, ATTEMPT_MAX))
        return float(wait(state)) * (0.5 + rng.random() / 2)


STARTUP: Final = RetryProfile(0.5, 1.5, 5.0, total_sec=30.0)
DAEMON: Final = RetryProfile(1.0, 2.0, 300.0)
TESTING: Final = RetryProfile(0.01, 2.0, 0.1, attempts=3, attempt_timeout_sec=0.5)


async def call_with_retries(
    profile: RetryProfile,
    clock: Clock,
    rng: random.Random,
    function: Callable[[], Awaitable[_T]],
    *,
    retry_on: tuple[type[Exception], ...],
) -> _T:
    """Call ``function`` until it succeeds or the profile is exhausted.

    :raises Exception: the last error of ``function`` itself; TimeoutError if an attempt took
        longer than ``attempt_timeout_sec`` and is not retried.
    """
    began = clock.monotonic()

    def exhausted(state: RetryCallState) -> bool:
        if profile.attempts is not None and state.attempt_number >= profile.attempts:
            return True
        upcoming = state.upcoming_sleep or 0.0
        passed = clock.monotonic() - began
        return profile.total_sec is not None and passed + upcoming > profile.total_sec

    async def attempt() -> _T:
        async with clock.timeout(profile.attempt_timeout_sec):
            return await function()

    retrying = AsyncRetrying(
        sleep=clock.sleep,
        wait=lambda state: profile.delay(state.attempt_number, rng),
        stop=exhausted if profile.attempts or profile.total_sec is not None else stop_never,
        retry=retry_if_exception_type(retry_on),
        reraise=True,
    )
    result: _T = await retrying(attempt)
    return result
