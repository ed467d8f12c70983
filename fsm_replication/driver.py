"""Drives one machine: reports and requests in, moves out.

Theory of operation. Workers *post* reports; the driver handles them in a callback of its own on
the event loop, never in the worker's stack, so that a worker cannot be stopped in the middle of
its own report. The mailbox holds at most one unhandled report per worker: a newer fact replaces an
older one of the same sender, which nobody has acted on yet and which is no longer true. It
therefore cannot fill. A report whose entry is over when it comes is dropped at once.

The driver also owns the machine's tasks (:class:`Crew`). A task belongs to a state or group entry
and is asked to stop when that is over; when none of the tasks of entries that are over is left,
the driver posts ``ENDED`` to whatever state waits for it. A state entered with nothing to wait for
gets that report at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any

from fsm_replication.errors import InvalidStateError, WorkerCrashedError, shorten
from fsm_replication.journal import Journal, StateWaiter, Transition, Watcher
from fsm_replication.machine import Machine, Move
from fsm_replication.ports import WallClock
from fsm_replication.reports import Fact, Report, Reporter, Ticket
from fsm_replication.tables import Table

__all__ = ("Driver", "Observer")


class Observer:
    """Is told what a driver does; the base class ignores it all."""

    def moved(self, machine: str, move: Move) -> None:
        """A move was made; its effects come next."""

    def concluded(self, machine: str, move: Move) -> None:
        """The effects of a move are done; not called where one of them raised."""

    def dropped(self, machine: str, report: Report, state: StrEnum) -> None:
        """A report came from an entry that is over, or means nothing in this state."""

    def effect_failed(self, machine: str, move: Move | None, error: Exception) -> None:
        """An effect raised; this is a bug."""

    def worker_failed(self, machine: str, worker: str, error: BaseException) -> None:
        """A worker's task ended with an error that it did not report; this is a bug."""


class _Job:
    """One task of the crew, the entry it belongs to, and how it is asked to stop."""

    __slots__ = ("_ask", "asked", "name", "task", "ticket")

    def __init__(
        self,
        name: str,
        ticket: Ticket,
        task: asyncio.Task[None],
        ask: Callable[[], None] | None,
    ) -> None:
        self.name = name
        self.ticket = ticket
        self.task = task
        self.asked = False
        self._ask = ask

    def stop(self) -> None:
        """Ask the task to end; one that cannot be asked is cancelled."""
        self.asked = True
        if self._ask is not None:
            self._ask()
        else:
            self.task.cancel()


class Driver:
    """Owns a machine, its mailbox and its tasks.

    ``model`` has the guards and effects that the table names. ``ended_fact`` is what is reported
    when the tasks of left states have ended; ``on_fact`` sees every report that is about to be acted
    on, so that the model can take in what it carries before guards are asked; ``on_crash`` is called
    when a task dies of an error it did not report.
    """

    def __init__(
        self,
        table: Table,
        model: object,
        *,
        name: str,
        journal: Journal,
        wall_clock: WallClock,
        observer: Observer,
        ended_fact: Fact | None = None,
        on_fact: Callable[[Report], None] | None = None,
        on_crash: Callable[[str, Ticket, Exception], None] | None = None,
    ) -> None:
        self.name = name
        self._journal = journal
        self._wall_clock = wall_clock
        self._observer = observer
        self._ended_fact = ended_fact
        self._on_fact = on_fact
        self._on_crash = on_crash
        self._mailbox: dict[str, Report] = {}
        self._scheduled = False
        self._jobs: set[_Job] = set()
        self._since_ms = wall_clock.now_ms()
        self.machine = Machine(
            table,
            model,
            name=name,
            on_move=self._moved,
            on_leave=self._left,
            on_done=self._concluded,
        )

    # What is asked of a driver.

    @property
    def state(self) -> StrEnum:
        """The machine's present state."""
        return self.machine.state

    @property
    def since_ms(self) -> int:
        """Wall-clock time of the last move, in milliseconds since the epoch."""
        return self._since_ms

    def watch(self) -> Watcher:
        """Follow this machine's moves, the present state first."""
        return Watcher(self._journal, self.machine.table, self._present())

    def waiter(self, wanted: frozenset[StrEnum]) -> StateWaiter:
        """Wait for any of some states, beginning now."""
        return StateWaiter(self._journal, self.machine.table, self._present(), wanted)

    def _present(self) -> Transition:
        return Transition(self.name, self._since_ms, None, None, self.state)

    # Requests, from callers.

    def request(self, trigger: str, *, why: str, payload: object = None) -> bool:
        """Make a move on behalf of a caller, now; False if its guard refuses.

        :raises InvalidStateError: if it is illegal here.
        """
        try:
            return self.machine.fire(trigger, why=why, payload=payload)
        except InvalidStateError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an effect raises is its bug
            self._observer.effect_failed(self.name, None, error)
            return True

    def request_if_legal(self, trigger: str, *, why: str, payload: object = None) -> bool:
        """Make a move if it is legal in the present state; False if nothing moved."""
        if self.machine.table.move(self.state, trigger) is None:
            return False
        return self.request(trigger, why=why, payload=payload)

    def react(self, fact: Fact, *, why: str) -> bool:
        """Make the move that a fact means in the present state; False if it means none.

        For facts that come from outside and not from a worker: they belong to no entry.
        """
        meaning = self.machine.table.meaning(fact, self.state)
        return any(self.request(trigger, why=why) for trigger in meaning)

    # Reports, from workers.

    def reporter(self, sender: str, ticket: Ticket) -> Reporter:
        """Return the callable that a worker of this entry reports with."""

        def report(fact: Fact, why: str = "", payload: object = None) -> None:
            self.post(Report(sender, fact, ticket, why, payload))

        return report

    def post(self, report: Report) -> None:
        """Put a report into the mailbox; it is handled in the loop's next turn."""
        if not self.machine.is_current(report.ticket):
            # It must not take the place of one that counts, from a later worker of that name.
            self._drop(report)
            return
        replaced = self._mailbox.pop(report.sender, None)
        if replaced is not None:
            self._drop(replaced)
        self._mailbox[report.sender] = report
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._handle_all)

    def _handle_all(self) -> None:
        self._scheduled = False
        while self._mailbox:
            sender = next(iter(self._mailbox))
            self._handle(self._mailbox.pop(sender))

    def _handle(self, report: Report) -> None:
        state = self.state
        triggers = self.machine.table.meaning(report.fact, state)
        if not self.machine.is_current(report.ticket) or not triggers:
            self._drop(report)
            return
        if self._on_fact is not None:
            self._on_fact(report)
        for trigger in triggers:
            if self.request(trigger, why=report.why, payload=report.payload):
                return
        self._drop(report)

    def _drop(self, report: Report) -> None:
        # A payload that nobody takes over may hold connections, and is closed by whoever drops it.
        close = getattr(report.payload, "close", None)
        if callable(close):
            close()
        self._observer.dropped(self.name, report, self.state)

    # Tasks.

    def start_worker(
        self,
        name: str,
        scope: str,
        work: Callable[[Reporter], Coroutine[Any, Any, None]],
        stop: Callable[[], None] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        """Start a task that belongs to the present entry of ``scope``.

        When that is over ``stop`` is called to ask it to end; without one it is cancelled.
        ``release`` is called when it has ended, however that came: a task that is cancelled before
        its first step never runs, and cannot give back what it was handed.
        """
        ticket = self.machine.ticket(scope)
        task = asyncio.get_running_loop().create_task(
            work(self.reporter(name, ticket)), name=f"{self.name}:{name}"
        )
        job = _Job(name, ticket, task, stop)
        self._jobs.add(job)
        if release is not None:
            task.add_done_callback(lambda _task: release())
        task.add_done_callback(lambda _task: self._job_ended(job))

    def note_death(self, worker: str, error: Exception) -> None:
        """Tell of somebody who died while working for this machine without being one of its tasks."""
        self._observer.worker_failed(self.name, worker, error)

    def await_end(self) -> None:
        """Report ``ENDED`` to the present state as soon as no task is left."""
        self._report_if_ended()

    @property
    def workers(self) -> tuple[str, ...]:
        """The names of the tasks that have not ended."""
        return tuple(sorted(job.task.get_name() for job in self._jobs))

    def cancel_all(self, *, but: str = "") -> None:
        """Cancel every task at once, but one: the drain deadline has passed."""
        for job in tuple(self._jobs):
            if job.name != but:
                job.asked = True
                job.task.cancel()

    async def wait_ended(self, *, but: str = "") -> None:
        """Return when no task is left, but one."""
        while tasks := [job.task for job in self._jobs if job.name != but]:
            await asyncio.wait(tasks)
            # The callbacks that take the jobs out of the set run in the next turn.
            await asyncio.sleep(0)

    def _job_ended(self, job: _Job) -> None:
        self._jobs.discard(job)
        error: BaseException | None = None
        if not job.task.cancelled():
            error = job.task.exception()
        elif not job.asked:
            # A state would be left without its worker, and nobody would know.
            error = WorkerCrashedError(f"{self.name}:{job.name} was cancelled by somebody else")
        if error is not None:
            self._observer.worker_failed(self.name, job.name, error)
            if isinstance(error, Exception) and self._on_crash is not None:
                self._on_crash(job.name, job.ticket, error)
        self._report_if_ended()

    def _report_if_ended(self) -> None:
        if self._ended_fact is None or self._jobs:
            return
        state = self.state
        if self.machine.table.meaning(self._ended_fact, state):
            ticket = self.machine.ticket(str(state))
            self.post(Report("crew", self._ended_fact, ticket, "nothing is left running"))

    # Called by the machine, in the middle of a move.

    def _moved(self, move: Move) -> None:
        self._since_ms = self._wall_clock.now_ms()
        # What others wrote may stand in it, and the journal keeps many.
        why = shorten(move.why)
        record = Transition(self.name, self._since_ms, move.trigger, move.source, move.dest, why)
        self._journal.append(record)
        self._observer.moved(self.name, move)

    def _concluded(self, move: Move) -> None:
        self._observer.concluded(self.name, move)

    def _left(self, ticket: Ticket) -> None:
        for job in tuple(self._jobs):
            if job.ticket == ticket:
                job.stop()
