"""Ends an engine: its workers, its links, and then the cursor store, all within the drain timeout (G9).

The last fifth of the timeout is kept for closing. What does not end when it is asked is cancelled;
what does not end even then is left behind, and named by the error that the engine ends with. So does
one that has ended whole, but late: something has held up the event loop, and whoever relies on the
timeout must know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fsm_replication.config import ReplicationConfig
from fsm_replication.driver import Driver
from fsm_replication.errors import CursorStoreError, DrainTimeoutError, ReplicationError
from fsm_replication.heavy import HeavyWork
from fsm_replication.links import Links
from fsm_replication.log import get_logger
from fsm_replication.ports import Clock, CursorStore
from fsm_replication.reports import EngineFact, Reporter
from fsm_replication.tables import PeerState
from fsm_replication.workers.cursor_flush import CursorBook

__all__ = ("DRAINER", "Drainer")

DRAIN_SHARE: Final = 0.8
DRAINER: Final = "drainer"


class Drainer:
    """The engine's last worker; it waits for all the others.

    ``config`` returns the configuration in force.
    """

    def __init__(
        self,
        *,
        driver: Driver,
        links: Links,
        book: CursorBook,
        store: CursorStore,
        heavy: HeavyWork,
        clock: Clock,
        config: Callable[[], ReplicationConfig],
    ) -> None:
        self._driver = driver
        self._links = links
        self._book = book
        self._store = store
        self._heavy = heavy
        self._clock = clock
        self._config = config
        self._log = get_logger("engine", node_id=config().local_node_id)

    async def run(self, report: Reporter) -> None:
        """Ask everything to end, wait for it, and close the cursor store; reports DRAINED."""
        clock, timeout = self._clock, self._timeout_sec
        left: tuple[str, ...] = ()
        began = clock.monotonic()
        self._ask_links()
        try:
            async with clock.timeout(timeout * DRAIN_SHARE):
                await self._all_ended()
        except TimeoutError:
            left = await self._cancel_all(timeout * (1 - DRAIN_SHARE) / 2)
        rest = max(timeout * (1 - DRAIN_SHARE) / 2, timeout - (clock.monotonic() - began))
        error = await self._close(rest, left)
        took = clock.monotonic() - began
        if error is None and took > timeout:
            error = DrainTimeoutError(left, timeout_sec=timeout, took_sec=took)
        report(EngineFact.DRAINED, "everything has ended", error)

    async def by_force(self, report: Reporter) -> None:
        """Do what is left to do where a drainer died, or was cancelled by somebody else."""
        rest = self._timeout_sec * (1 - DRAIN_SHARE) / 2
        self._ask_links()
        left = await self._cancel_all(rest)
        report(EngineFact.DRAINED, "everything has ended", await self._close(rest, left))

    @property
    def _timeout_sec(self) -> float:
        return self._config().settings.timeouts.drain

    def _ask_links(self) -> None:
        for link in self._links.owned:
            link.shutdown("the engine stops")

    async def _all_ended(self) -> None:
        for link in self._links.owned:
            await link.waiter(PeerState.STOPPED).wait()
        await self._driver.wait_ended(but=DRAINER)

    async def _cancel_all(self, timeout_sec: float) -> tuple[str, ...]:
        """Cancel every worker; returns the names of those that do not end all the same."""
        for link in self._links.owned:
            link.driver.cancel_all()
        self._driver.cancel_all(but=DRAINER)
        try:
            async with self._clock.timeout(timeout_sec):
                await self._all_ended()
        except TimeoutError:
            left = self._unfinished()
            self._log.error("drain_incomplete", left=left)
            return left
        return ()

    def _unfinished(self) -> tuple[str, ...]:
        names = [name for link in self._links.owned for name in link.driver.workers]
        names += [name for name in self._driver.workers if name != f"engine:{DRAINER}"]
        return tuple(sorted(names))

    async def _close(self, timeout_sec: float, left: tuple[str, ...]) -> ReplicationError | None:
        """Flush cursors and close their store in time; returns the error to end with.

        A file that hangs is released by its thread as soon as the disk answers; no task waits.
        """
        began = self._clock.monotonic()
        error: ReplicationError | None = None
        try:
            async with self._clock.timeout(timeout_sec / 2):
                await self._book.flush()
                await self._links.tidy(at_end=True)
        except CursorStoreError as failed:
            error = failed
        except TimeoutError:
            path = self._config().cursor.sqlite_path
            error = CursorStoreError(
                f"{path} could not be written within {timeout_sec / 2:g} s: the entries that were"
                " settled last are read again after the next start",
                path=path,
                retryable=True,
            )
        try:
            async with self._clock.timeout(timeout_sec / 4):
                await self._heavy.close()
        except TimeoutError:
            left = (*left, "decoding thread")
        try:
            await self._store.close(timeout_sec=timeout_sec - (self._clock.monotonic() - began))
        except CursorStoreError:
            left = (*left, "cursor store")
        if left:
            return DrainTimeoutError(left, timeout_sec=self._timeout_sec)
        return error
