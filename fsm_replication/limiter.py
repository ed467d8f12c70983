"""What all links of one engine share: a token bucket, and one place for copying."""

from __future__ import annotations

import asyncio
import heapq

from fsm_replication.ports import Clock

__all__ = ("PrioritySlot", "RateLimiter")


class RateLimiter:
    """Lets ``rate_per_sec`` events a second through, and ``burst`` at once after a rest.

    A batch is taken whole: one that is larger than what the bucket holds goes into debt, and
    whoever took it waits until the debt is paid. So no batch is too large to pass, and waiting is
    one sleep per batch.
    """

    def __init__(self, rate_per_sec: float, burst: int, clock: Clock) -> None:
        self.rate_per_sec = rate_per_sec
        self.burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock.monotonic()

    def reserve(self, events: int) -> float:
        """Take tokens for a batch; returns the seconds to wait before the next one."""
        now = self._clock.monotonic()
        refill = (now - self._filled_at) * self.rate_per_sec
        self._tokens = min(float(self.burst), self._tokens + refill) - events
        self._filled_at = now
        return max(0.0, -self._tokens / self.rate_per_sec)


class PrioritySlot:
    """Lets one holder in at a time, the one of the lowest priority number first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0
        self._holder: object | None = None

    async def acquire(self, holder: object, priority: int) -> None:
        """Wait until ``holder`` is let in; one that is in already stays."""
        if self._holder is holder:
            return
        if self._holder is None and not self._waiting:
            self._holder = holder
            return
        self._count += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self._count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            raise
        self._holder = holder

    def release(self, holder: object) -> None:
        """Let the next one in; does nothing if ``holder`` is not in."""
        if self._holder is holder:
            self._pass_on()

    def _pass_on(self) -> None:
        self._holder = None
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                # The place is kept for whoever wakes up, so that nobody slips in between.
                self._holder = turn
                turn.set_result(None)
                return
