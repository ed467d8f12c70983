"""What happened: a bounded record of every move, and watchers that follow it.

A watcher never delays a machine. Each has a bounded queue of its own; one that falls behind is
told once how much it missed and goes on with the oldest record still kept.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fsm_replication.errors import UnreachableStateError, WatcherLagged
from fsm_replication.tables import Table

__all__ = ("Journal", "StateWaiter", "Transition", "Watcher")

WATCHER_RECORDS: Final = 1000


@dataclass(frozen=True, slots=True)
class Transition:
    """One move of one machine.

    ``at_ms`` is wall-clock time in milliseconds since the epoch. ``trigger`` and ``source`` are
    None in the record with which a watcher is told the present state.
    """

    machine: str
    at_ms: int
    trigger: str | None
    source: StrEnum | None
    dest: StrEnum
    why: str = ""


class Journal:
    """The latest ``limit`` moves of all machines of one engine, oldest first."""

    def __init__(self, limit: int) -> None:
        self._records: deque[Transition] = deque(maxlen=limit)
        # Held weakly: a watcher that was dropped in the middle of a loop is gone.
        self._listeners: list[weakref.WeakMethod[Callable[[Transition], None]]] = []

    def keep(self, limit: int) -> None:
        """Keep the latest ``limit`` moves from now on."""
        self._records = deque(self._records, maxlen=limit)

    def append(self, record: Transition) -> None:
        """Keep a record and hand it to every listener; listeners must not block."""
        self._records.append(record)
        for reference in tuple(self._listeners):
            listener = reference()
            if listener is not None:
                listener(record)

    def snapshot(self) -> tuple[Transition, ...]:
        """Return what is kept; safe from any thread, as one C call makes the copy."""
        return tuple(self._records.copy())

    def subscribe(self, listener: Callable[[Transition], None]) -> None:
        """Call ``listener``, a method, for every later record, as long as its object lives."""
        self._listeners = [known for known in self._listeners if known() is not None]
        self._listeners.append(weakref.WeakMethod(listener))

    def unsubscribe(self, listener: Callable[[Transition], None]) -> None:
        """Stop calling it; unknown ones are ignored."""
        self._listeners = [known for known in self._listeners if known() not in (None, listener)]


class Watcher(AsyncIterator[Transition]):
    """An iterator of one machine's moves: the present state first, the end after a final state.

    A class and not a generator, because it goes on after it has raised WatcherLagged.
    """

    def __init__(self, journal: Journal, table: Table, present: Transition) -> None:
        self._journal = journal
        self._table = table
        self._machine = present.machine
        self._queue: deque[Transition] = deque([present])
        self._missed = 0
        self._ended = present.dest in table.final
        self._woken = asyncio.Event()
        if not self._ended:
            journal.subscribe(self._on_record)

    def _on_record(self, record: Transition) -> None:
        if record.machine != self._machine:
            return
        if len(self._queue) >= WATCHER_RECORDS:
            self._queue.popleft()
            self._missed += 1
        self._queue.append(record)
        if record.dest in self._table.final:
            self._ended = True
            self._journal.unsubscribe(self._on_record)
        self._woken.set()

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Transition:
        """Return the next move.

        :raises WatcherLagged: once, if records were dropped since the last call.
        """
        while True:
            if self._missed:
                missed, self._missed = self._missed, 0
                raise WatcherLagged(missed)
            if self._queue:
                return self._queue.popleft()
            if self._ended:
                raise StopAsyncIteration
            self._woken.clear()
            await self._woken.wait()

    def close(self) -> None:
        """Stop watching; iteration ends after what is queued."""
        self._ended = True
        self._journal.unsubscribe(self._on_record)
        self._woken.set()

    async def aclose(self) -> None:
        """Stop watching, for ``contextlib.aclosing``."""
        self.close()


class StateWaiter:
    """Waits until a machine passes through one of ``wanted``, however briefly."""

    def __init__(
        self, journal: Journal, table: Table, present: Transition, wanted: frozenset[StrEnum]
    ) -> None:
        self._journal = journal
        self._table = table
        self._machine = present.machine
        self._wanted = wanted
        self._reached: asyncio.Future[StrEnum] = asyncio.get_running_loop().create_future()
        journal.subscribe(self._on_record)
        self._on_record(present)

    def _on_record(self, record: Transition) -> None:
        if record.machine != self._machine or self._reached.done():
            return
        if record.dest in self._wanted:
            self._reached.set_result(record.dest)
        elif not self._table.reachable(record.dest) & self._wanted:
            names = ", ".join(sorted(self._wanted))
            self._reached.set_exception(
                UnreachableStateError(
                    f"{self._machine} is {record.dest}, from where {names} can no longer come"
                )
            )

    async def wait(self) -> StrEnum:
        """Return the state that came.

        :raises UnreachableStateError: once none of the wanted states can come any more.
        """
        try:
            return await self._reached
        finally:
            self._journal.unsubscribe(self._on_record)
