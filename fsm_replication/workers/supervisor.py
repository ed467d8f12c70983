"""Keeps a worker alive: one that dies unexpectedly is started again, a few times."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Final

from fsm_replication.errors import WorkerCrashedError
from fsm_replication.log import get_logger
from fsm_replication.metrics import Metrics
from fsm_replication.ports import Clock
from fsm_replication.reports import EngineFact, Reporter
from fsm_replication.retry import DAEMON

__all__ = ("CrashCounter", "supervise")

CRASHES_MAX: Final = 5
CRASH_WINDOW_SEC: Final = 60.0


class CrashCounter:
    """Counts the crashes of one worker within the last minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=CRASHES_MAX + 1)

    def add(self) -> int:
        """Count one more; returns how many there were within a minute."""
        now = self._clock.monotonic()
        self._times.append(now)
        while now - self._times[0] > CRASH_WINDOW_SEC:
            self._times.popleft()
        return len(self._times)

    @staticmethod
    def verdict(worker: str, crashes: int, error: BaseException) -> WorkerCrashedError | None:
        """Return the error to abort with, once a worker has crashed too often."""
        if crashes <= CRASHES_MAX:
            return None
        verdict = WorkerCrashedError(
            f"worker {worker} died {crashes} times within a minute, the last time of"
            f" {type(error).__name__}: {error}"
        )
        verdict.__cause__ = error
        return verdict


async def supervise(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    *,
    clock: Clock,
    rng: Random,
    metrics: Metrics,
    report: Reporter,
) -> None:
    """Run ``work`` until it returns; BROKEN if it dies more than five times in a minute."""
    crashes = CrashCounter(clock)
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - it is logged, counted and judged
            count = crashes.add()
            metrics.get("worker_restarts", name).inc()
            get_logger("supervisor").exception(
                "worker_died", machine="engine", worker=name, crashes=count, error=error
            )
            verdict = crashes.verdict(name, count, error)
            if verdict is not None:
                report(EngineFact.BROKEN, str(verdict), verdict)
                return
            await clock.sleep(DAEMON.delay(count, rng))
        else:
            return
