"""What all links of one engine share: a token bucket, and one place for copying."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fsm_replication.config import Settings
from fsm_replication.current import Current
from fsm_replication.ports import Clock

__all__ = ("SLOT_PATIENCE_SEC", "PrioritySlot", "RateLimiter")

SLOT_PATIENCE_SEC: Final = 30.0
"""How long who waits for a place lets its holder get nowhere."""


class RateLimiter:
    """Lets events through at the rate of the settings in force, where they limit it.

    A batch is taken whole: one that is larger than what the bucket holds goes into debt, and
    whoever took it waits until the debt is paid. So no batch is too large to pass, and waiting is
    one sleep per batch.
    """

    def __init__(self, settings: Current[Settings], clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._tokens = float(settings.value.hot_path.rate_limit_burst)
        self._filled_at = clock.monotonic()

    def reserve(self, events: int) -> float:
        """Take tokens for a batch; returns the seconds to wait before the next one."""
        hot_path = self._settings.value.hot_path
        if not hot_path.rate_limit_enabled:
            return 0.0
        rate, burst = hot_path.rate_limit_per_sec, float(hot_path.rate_limit_burst)
        now = self._clock.monotonic()
        refill = (now - self._filled_at) * rate
        self._tokens = min(burst, self._tokens + refill) - events
        self._filled_at = now
        return max(0.0, -self._tokens / rate)


class PrioritySlot:
    """Lets one holder in at a time, the one of the lowest priority number first.

    Among equal ones the first come is the first served. Priorities are asked for when the place
    becomes free, since they may change while somebody waits.

    A holder that makes no progress while others wait loses its place to the next one. It is told
    nothing and goes on beside that one: to stop it would undo what it is about to have done, and two
    slow ones would hinder each other for ever. So a peer that hardly answers delays each of the
    others once.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._progress: Callable[[], int] = _none
        # In the order in which they came.
        self._waiting: dict[asyncio.Future[None], Callable[[], int]] = {}
        self._holder: object | None = None

    async def acquire(
        self, holder: object, priority: Callable[[], int], progress: Callable[[], int] = lambda: 0
    ) -> None:
        """Wait until ``holder`` is let in; one that is in already stays.

        ``progress`` returns a number that grows as it gets on.
        """
        if self._holder is holder:
            return
        if self._holder is None and not self._waiting:
            self._holder, self._progress = holder, progress
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = priority
        try:
            await self._wait_for(turn)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            raise
        finally:
            self._waiting.pop(turn, None)
        self._holder, self._progress = holder, progress

    async def _wait_for(self, turn: asyncio.Future[None]) -> None:
        """Wait for a turn; let somebody in where the holder gets nowhere meanwhile."""
        while not turn.done():
            holder, reached = self._holder, self._progress()
            try:
                async with self._clock.timeout(SLOT_PATIENCE_SEC):
                    await asyncio.wait((turn,))
            except TimeoutError:
                if self._holder is holder and self._progress() == reached and not turn.done():
                    self._pass_on()

    def release(self, holder: object) -> None:
        """Let the next one in; does nothing if ``holder`` is not in."""
        if self._holder is holder:
            self._pass_on()

    def _pass_on(self) -> None:
        self._holder = None
        # Somebody who was cancelled may not have got to the end of waiting yet.
        self._waiting = {turn: rank for turn, rank in self._waiting.items() if not turn.done()}
        if self._waiting:
            turn = min(self._waiting, key=lambda one: self._waiting[one]())
            del self._waiting[turn]
            # The place is kept for whoever wakes up, so that nobody slips in between.
            self._holder, self._progress = turn, _none
            turn.set_result(None)


def _none() -> int:
    """Return the progress of nobody."""
    return 0
