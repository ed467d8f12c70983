"""Puts real drivers into any state, lets them make one step, and reads the new state off.

The model of a machine is the machine: its table, its driver, its guards and effects are those of the
library. What is played are the workers. A :class:`StageLoop` stands in for the event loop, so that a
worker which an effect starts becomes a :class:`StageTask` that does only what the search makes it
do, and a report that is posted stays in the mailbox until the search has it handled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final, NamedTuple

from fsm_replication.driver import Driver, Observer, _Job
from fsm_replication.machine import Move
from fsm_replication.reports import Fact, Report, Ticket

__all__ = (
    "Books",
    "Job",
    "Letter",
    "Phase",
    "Stage",
    "StageClock",
    "StageLoop",
    "StageTask",
    "on_stage",
)

FIRST_ENTRY: Final = 1
_NO_ENTRY: Final = Ticket("", 0)


class Phase(StrEnum):
    """What a worker is doing, as far as it matters to others."""

    WORKS = "works"
    SAID = "said"
    """It has reported: a tailer then waits for its next mode, every other worker has ended."""
    CHANGES = "changes"
    """It was handed another mode and has not taken it up yet."""
    GIVES_UP = "gives up"
    """It has lost a connection and ends by itself."""
    WAITS = "waits"
    """The starter waits for a peer, the drainer for the end of the others."""
    CANCELLED = "cancelled"
    """The drainer has cancelled the others, and waits for their end."""
    CLOSES = "closes"
    """The drainer closes the cursor store."""
    LEAVES = "leaves"
    """The drainer closes the cursor store, and leaves behind what did not end."""


class Job(NamedTuple):
    """A task; ``scope`` is "" once the entry it belongs to is over."""

    name: str
    scope: str
    asked: bool = False
    phase: Phase = Phase.WORKS
    slot: bool = False


class Letter(NamedTuple):
    """A report in flight; ``scope`` is "" once the entry it came from is over."""

    sender: str
    fact: Fact
    scope: str
    payload: str = ""


class StageTask:
    """Stands for a task; ``end`` is called by whoever plays the worker."""

    def __init__(self, phase: Phase = Phase.WORKS, *, slot: bool = False) -> None:
        self.phase = phase
        self.slot = slot
        self._error: BaseException | None = None
        self._then: list[Callable[[StageTask], object]] = []

    def add_done_callback(self, then: Callable[[StageTask], object]) -> None:
        """Call ``then`` at the end."""
        self._then.append(then)

    def cancel(self) -> None:
        """Take no notice: the search decides when it ends."""

    def cancelled(self) -> bool:
        """Say that it was not: to a driver that has asked, it makes no difference."""
        return False

    def exception(self) -> BaseException | None:
        """Return what it died of."""
        return self._error

    def get_name(self) -> str:
        """Return a name for logs."""
        return "worker"

    def end(self, error: BaseException | None = None) -> None:
        """End now."""
        self._error = error
        for then in self._then:
            then(self)


class StageLoop(asyncio.AbstractEventLoop):
    """An event loop on which nothing runs."""

    def create_task(self, coro: Any, **_kwargs: Any) -> Any:
        """Return a task that is played; the coroutine itself never runs."""
        assert isinstance(coro, Coroutine)
        coro.close()
        return StageTask()

    def create_future(self) -> asyncio.Future[Any]:
        """Return a real future, which nobody waits for."""
        return asyncio.Future(loop=self)

    def get_debug(self) -> bool:
        """Return False."""
        return False


class StageClock:
    """Time stands still: when something is due is for the search to decide."""

    def monotonic(self) -> float:
        """Return 0."""
        return 0.0

    async def sleep(self, seconds: float) -> None:
        """Never be called: no worker runs."""
        raise NotImplementedError

    def timeout(self, seconds: float | None) -> Any:
        """Never be called: no worker runs."""
        raise NotImplementedError

    def now_ms(self) -> int:
        """Return 0."""
        return 0


@contextmanager
def on_stage(loop: StageLoop) -> Iterator[None]:
    """Make the stage the running loop of this thread."""
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(loop)
    try:
        yield
    finally:
        asyncio._set_running_loop(before)


class Books(Observer):
    """Notes the moves of one step, and the effects that raised in it."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.faults: list[str] = []

    def clear(self) -> None:
        """Begin anew."""
        self.moves.clear()
        self.faults.clear()

    def moved(self, machine: str, move: Move) -> None:
        """Note a move."""
        self.moves.append(move)

    def effect_failed(self, machine: str, move: Move | None, error: Exception) -> None:
        """Note that an effect raised."""
        self.faults.append(f"an effect raised {type(error).__name__}: {error}")


class Stage:
    """One real driver, whose state can be set and read.

    ``payloads`` are the objects that reports may carry, by the names that letters have for them.
    """

    def __init__(self, driver: Driver, payloads: Mapping[str, object]) -> None:
        self.driver = driver
        self.books = Books()
        self.tasks: dict[Job, StageTask] = {}
        driver._observer = self.books
        self._payloads = dict(payloads)
        self._names = {id(value): name for name, value in self._payloads.items()}

    # Setting the state.

    def set(
        self,
        state: StrEnum,
        jobs: Iterable[Job],
        mail: Iterable[Letter],
        stop: Callable[[Job], Callable[[], None] | None],
        payload: Callable[[Letter], object],
    ) -> None:
        """Put the driver into a state, with these tasks and these reports in its mailbox."""
        self.books.clear()
        self.driver._jobs = set()
        machine = self.driver.machine
        machine._core.state = str(state)
        machine._count = FIRST_ENTRY
        groups = (f"group:{group}" for group in machine.table.groups_of(state))
        machine._entries = dict.fromkeys((str(state), *groups), FIRST_ENTRY)
        self.tasks = {job: self._job(job, stop(job)) for job in jobs}
        self.driver._mailbox = {
            letter.sender: Report(
                letter.sender, letter.fact, ticket_of(letter.scope), payload=payload(letter)
            )
            for letter in mail
        }
        # The search handles what is posted; the driver need not.
        self.driver._scheduled = True

    def _job(self, job: Job, stop: Callable[[], None] | None) -> StageTask:
        task = StageTask(job.phase, slot=job.slot)
        stand_in: Any = task
        made = _Job(job.name, ticket_of(job.scope), stand_in, stop)
        made.asked = job.asked
        task.add_done_callback(lambda _task: self.driver._job_ended(made))
        self.driver._jobs.add(made)
        return task

    def payload(self, letter: Letter) -> object:
        """Return the object that a letter's payload stands for."""
        return self._payloads[letter.payload]

    # Reading the state.

    def scope(self, ticket: Ticket) -> str:
        """Return the scope of a ticket, "" if its entry is over."""
        entries = self.driver.machine._entries
        return ticket.scope if entries.get(ticket.scope) == ticket.entry else ""

    def jobs(self) -> tuple[Job, ...]:
        """Return the tasks there are; of two that cannot be told apart only one counts."""
        found = []
        for job in self.driver._jobs:
            task: Any = job.task
            found.append(Job(job.name, self.scope(job.ticket), job.asked, task.phase, task.slot))
        return tuple(sorted(set(found)))

    def mail(self) -> tuple[Letter, ...]:
        """Return the reports in flight, oldest first."""
        return tuple(
            Letter(report.sender, report.fact, self.scope(report.ticket), self.name_of(report))
            for report in self.driver._mailbox.values()
        )

    def name_of(self, report: Report) -> str:
        """Return the name for a report's payload."""
        return self._names[id(report.payload)]

    def end_what_is_over(self, is_over: Callable[[Job], bool]) -> None:
        """Let the tasks end that have done all they ever do."""
        for job in tuple(self.driver._jobs):
            task: Any = job.task
            if is_over(Job(job.name, "", job.asked, task.phase)):
                task.end()

    def handle(self) -> None:
        """Handle the oldest report, as the driver does in a turn of the loop."""
        mailbox = self.driver._mailbox
        self.driver._handle(mailbox.pop(next(iter(mailbox))))


def ticket_of(scope: str) -> Ticket:
    """Return the ticket of the present entry into a scope, or one that is over for ""."""
    return Ticket(scope, FIRST_ENTRY) if scope else _NO_ENTRY
