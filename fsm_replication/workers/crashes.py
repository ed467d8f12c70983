"""Counts errors that nobody expected, and says when there were too many of them."""

from __future__ import annotations

from collections import deque
from typing import Final

from fsm_replication.errors import WorkerCrashedError, shorten
from fsm_replication.ports import Clock

__all__ = ("CRASHES_MAX", "CRASH_WINDOW_SEC", "CrashCounter")

CRASHES_MAX: Final = 5
CRASH_WINDOW_SEC: Final = 60.0


class CrashCounter:
    """Counts the unexpected errors of one worker, or with one peer, within the last minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=CRASHES_MAX + 1)
        self._last: BaseException | None = None

    def add(self, error: BaseException) -> int:
        """Count one more; returns how many there were within a minute, at most one too many."""
        self._times.append(self._clock.monotonic())
        self._last = error
        return self._count()

    def _count(self) -> int:
        now = self._clock.monotonic()
        while self._times and now - self._times[0] > CRASH_WINDOW_SEC:
            self._times.popleft()
        return len(self._times)

    @property
    def too_many(self) -> bool:
        """Whether there were more than five within a minute."""
        return self._count() > CRASHES_MAX

    def verdict(self, who: str) -> WorkerCrashedError | None:
        """Return the error to give up with; None as long as there were not too many.

        ``who`` says in it what died, such as "worker pinger".
        """
        error = self._last
        if error is None or not self.too_many:
            return None
        verdict = WorkerCrashedError(
            f"{who} died {len(self._times)} times within a minute, the last time of"
            f" {type(error).__name__}: {shorten(str(error))}"
        )
        verdict.__cause__ = error
        return verdict

    def clear(self) -> None:
        """Begin to count anew."""
        self._times.clear()
        self._last = None
