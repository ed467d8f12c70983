"""What one link promises its operators: how long things may take, and what is said when they do.

A limit of ``settings.slo`` that is exceeded counts each time, and is warned of at most once a
minute and kind: a warning for each batch would bury the log just when somebody reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from structlog.stdlib import BoundLogger

from fsm_replication.config import Settings, SloConfig
from fsm_replication.current import Current
from fsm_replication.metrics import PeerMetrics
from fsm_replication.ports import Clock, Connection, PackedArguments

__all__ = ("SloWatch", "TimedConnection", "watch_lag")

WARN_INTERVAL_SEC: Final = 60.0
LAG_INTERVAL_SEC: Final = 5.0
Command = Sequence[bytes | str | int]


class SloWatch:
    """Compares durations of one link with the limits in force; times are in seconds."""

    def __init__(
        self, current: Current[Settings], clock: Clock, metrics: PeerMetrics, log: BoundLogger
    ) -> None:
        self._current = current
        self._clock = clock
        self._metrics = metrics
        self._log = log
        # When each kind was last warned of, and how often it was exceeded since.
        self._warned: dict[str, tuple[float, int]] = {}

    def stream_read(self, seconds: float) -> None:
        """Judge one read of the stream that did not wait for entries."""
        self._judge("stream_read_latency", seconds, self._slo.max_stream_read_latency_ms / 1000)

    def peer_operation(self, operation: str, seconds: float) -> None:
        """Record and judge any other command to the peer."""
        self._metrics.operation(operation, seconds)
        limit = self._slo.max_peer_op_latency_ms / 1000
        self._judge("peer_op_latency", seconds, limit, operation=operation)

    def batch_flush(self, seconds: float) -> None:
        """Judge one call that hands changes to the store."""
        self._judge("batch_flush_latency", seconds, self._slo.max_batch_flush_latency_ms / 1000)

    def lag(self, seconds: float) -> None:
        """Judge how far the link is behind its peer."""
        self._judge("replication_lag", seconds, self._slo.max_replication_lag_sec)

    @property
    def _slo(self) -> SloConfig:
        return self._current.value.slo

    def _judge(self, slo_type: str, seconds: float, limit_sec: float, **more: str) -> None:
        if seconds <= limit_sec:
            return
        self._metrics.slo(slo_type)
        now = self._clock.monotonic()
        warned_at, since = self._warned.get(slo_type, (-WARN_INTERVAL_SEC, 0))
        if now - warned_at < WARN_INTERVAL_SEC:
            self._warned[slo_type] = warned_at, since + 1
            return
        self._warned[slo_type] = now, 0
        self._log.warning(
            "slo_violated",
            slo=slo_type,
            seconds=round(seconds, 3),
            limit_sec=limit_sec,
            more_since_last_warning=since,
            **more,
        )


async def watch_lag(judge: Callable[[], None], clock: Clock) -> None:
    """Have the lag of all links judged every five seconds, until cancelled.

    A link that settles something is judged then too; this is for one that does not.
    """
    while True:
        await clock.sleep(LAG_INTERVAL_SEC)
        judge()


class TimedConnection:
    """A connection whose calls are timed, each under the name of its first command."""

    def __init__(self, inner: Connection, watch: SloWatch, clock: Clock) -> None:
        self._inner = inner
        self._watch = watch
        self._clock = clock

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used."""
        return self._inner.closed

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done as soon as the connection is closed."""
        return self._inner.lost

    @property
    def received_bytes(self) -> int:
        """Bytes received since it was opened."""
        return self._inner.received_bytes

    async def call(
        self,
        *args: bytes | str | int,
        timeout_sec: float | None = None,
        tail: PackedArguments | None = None,
    ) -> Any:
        """Send one command and return its reply."""
        with self._timed(args):
            return await self._inner.call(*args, timeout_sec=timeout_sec, tail=tail)

    async def pipeline(
        self, commands: Sequence[Command], timeout_sec: float | None = None
    ) -> list[Any]:
        """Send several commands in one flight and return their replies."""
        if not commands:
            return []
        with self._timed(commands[0]):
            return await self._inner.pipeline(commands, timeout_sec)

    async def skim(self, *args: bytes | str | int, timeout_sec: float) -> Any:
        """Send one command and keep no long string of its reply."""
        with self._timed(args):
            return await self._inner.skim(*args, timeout_sec=timeout_sec)

    @contextmanager
    def _timed(self, command: Command) -> Iterator[None]:
        """Measure a call, also one that fails; one that is cancelled says nothing of the peer."""
        began = self._clock.monotonic()
        try:
            yield
        except asyncio.CancelledError:
            raise
        except Exception:
            self._took(command, began)
            raise
        self._took(command, began)

    def _took(self, command: Command, began: float) -> None:
        name = command[0]
        text = name.decode() if isinstance(name, bytes) else str(name)
        self._watch.peer_operation(text.lower(), self._clock.monotonic() - began)

    def send(self, *commands: Command) -> asyncio.Future[list[Any]]:
        """Send now; when the replies come is for the caller to see, and is not timed."""
        return self._inner.send(*commands)

    def limit_reply(self, limit_bytes: int | None) -> None:
        """Drop the connection when one flight's replies exceed this many bytes (None: never)."""
        self._inner.limit_reply(limit_bytes)

    def close(self) -> None:
        """Close at once."""
        self._inner.close()

    async def wait_closed(self) -> None:
        """Return when nothing of it is left."""
        await self._inner.wait_closed()

    def __repr__(self) -> str:
        return f"<TimedConnection {self._inner!r}>"
