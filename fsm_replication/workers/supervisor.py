"""Keeps a worker alive: one that dies unexpectedly is started again, a few times."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from fsm_replication.log import get_logger
from fsm_replication.metrics import Metrics
from fsm_replication.ports import Clock
from fsm_replication.reports import EngineFact, Reporter
from fsm_replication.retry import DAEMON
from fsm_replication.workers.crashes import CrashCounter

__all__ = ("supervise",)


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
            count = crashes.add(error)
            metrics.get("worker_restarts", name).inc()
            get_logger("supervisor").exception(
                "worker_died", machine="engine", worker=name, crashes=count, error=error
            )
            verdict = crashes.verdict(f"worker {name}")
            if verdict is not None:
                report(EngineFact.BROKEN, str(verdict), verdict)
                return
            await clock.sleep(DAEMON.delay(count, rng))
        else:
            return
