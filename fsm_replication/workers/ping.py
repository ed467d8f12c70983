"""Pings peers that have been idle, so that a dead connection is noticed without traffic.

With the ping a peer is asked for its time; so one that is not idle is pinged as well, where it was
not asked for as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from fsm_replication.config import Settings
from fsm_replication.current import Current
from fsm_replication.errors import NetworkError, PeerError
from fsm_replication.ports import Clock, Connection
from fsm_replication.replies import status
from fsm_replication.reports import LinkFact, Reporter
from fsm_replication.workers.context import LinkContext, LinkProgress
from fsm_replication.workers.peer_clock import ASK_TIME, PeerClock

__all__ = ("IdlePeer", "ping_idle_peers", "ping_once")


class IdlePeer(NamedTuple):
    """What is needed to see whether a peer is idle, and to ping it."""

    progress: LinkProgress
    peer_clock: PeerClock
    ping: Callable[[], Coroutine[Any, Any, None]]

    def is_due(self, before: float) -> bool:
        """Say whether it has not succeeded, or not told its time, since ``before``."""
        last = (self.progress.last_success, self.peer_clock.asked_at)
        return any(at is None or at <= before for at in last)


async def ping_once(context: LinkContext, connection: Connection, report: Reporter) -> None:
    """Ping over the connection that never blocks, and ask for the time.

    It reports LOST if there is no answer.
    """
    clock = context.ports.clock
    began = clock.monotonic()
    try:
        pong, time = await connection.pipeline(
            [("PING",), ASK_TIME], timeout_sec=context.settings.timeouts.ping
        )
        status(pong, "PING", b"PONG")
        context.peer_clock.take(time, began)
    except (NetworkError, PeerError) as error:
        context.progress.failed(error)
        context.metrics.ping("failed")
        report(LinkFact.LOST, f"ping: {error}", error)
        return
    now = clock.monotonic()
    context.progress.last_success = now
    context.metrics.ping("ok", now - began)


async def ping_idle_peers(
    peers: Callable[[], Sequence[IdlePeer]], current: Current[Settings], clock: Clock
) -> None:
    """Ping, every interval, each peer that has been idle for the threshold; until cancelled.

    While ``peer_health`` is not enabled it waits for that.
    """
    while True:
        await current.wait_until(lambda settings: settings.peer_health.enabled)
        await current.sleep(clock, lambda settings: settings.peer_health.ping_interval_sec)
        health, now = current.value.peer_health, clock.monotonic()
        if not health.enabled:
            continue
        async with asyncio.TaskGroup() as pings:
            for peer in peers():
                if peer.is_due(now - health.idle_threshold_sec):
                    pings.create_task(peer.ping())
