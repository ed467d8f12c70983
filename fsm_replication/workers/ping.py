"""Pings peers that have been idle, so that a dead connection is noticed without traffic."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fsm_replication.config import Settings
from fsm_replication.current import Current
from fsm_replication.errors import NetworkError, PeerError
from fsm_replication.ports import Clock, Connection
from fsm_replication.replies import status
from fsm_replication.reports import LinkFact, Reporter
from fsm_replication.workers.context import LinkContext, LinkProgress

__all__ = ("IdlePeer", "ping_idle_peers", "ping_once")

IdlePeer = tuple[LinkProgress, Callable[[], Coroutine[Any, Any, None]]]


async def ping_once(context: LinkContext, connection: Connection, report: Reporter) -> None:
    """Ping over the connection that never blocks; reports LOST if there is no answer."""
    clock = context.ports.clock
    began = clock.monotonic()
    try:
        reply = await connection.call("PING", timeout_sec=context.settings.timeouts.ping)
        status(reply, "PING", b"PONG")
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
            for progress, ping in peers():
                last = progress.last_success
                if last is None or now - last >= health.idle_threshold_sec:
                    pings.create_task(ping())
