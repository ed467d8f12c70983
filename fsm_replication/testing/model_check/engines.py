"""The engine as a model: the real :class:`ReplicationEngine`, and all that its workers may do.

Two of its workers act upon the links, the one that starts and the one that drains. What they do is
a *command* to every link here, and the search carries it out on the models of the links.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from fsm_replication.circuits import CircuitState
from fsm_replication.config import PeerConfig, ReplicationConfig
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import CursorStoreError, DrainTimeoutError, NoPeerError
from fsm_replication.machine import Move
from fsm_replication.ports import Ports
from fsm_replication.reports import EngineFact, PauseReason
from fsm_replication.stores.memory import MemorySyncEngine
from fsm_replication.tables import EngineState
from fsm_replication.testing.memory_cursor import MemoryCursorStore
from fsm_replication.testing.model_check.stage import (
    Books,
    Job,
    Letter,
    Phase,
    Stage,
    StageClock,
    StageLoop,
    on_stage,
    ticket_of,
)

__all__ = ("Command", "EngineLocal", "EngineModel", "EngineStep", "View", "make_engine")

_F = EngineFact
# Such errors end the engine whichever worker dies of them; others, only if it is one of its own.
_BUG: Final = CursorStoreError("gone for good", path="c.db")
_LATER_BUG: Final = CursorStoreError("gone for good, later", path="c.db")
PEERS: Final = ("a", "b")
DRAIN: Final = "drain"
LASTING: Final = frozenset(
    {"cursor-flush", "store-watch", "prober", "cold-path", "slo-watch", "pinger"}
)
"""What Running owns: supervised workers that end only when they are asked, or broken."""
# Workers that were asked to end, where it does not matter which they are.
_ENDING: Final = Job("workers", "", asked=True)
LATER: Final = "later"
NOTED: Final = ", noted: "


class Command:
    """What the engine asks of every link."""

    NOTHING: Final = ""
    CONNECT: Final = "connect"
    SHUTDOWN: Final = "shutdown"
    CANCEL: Final = "cancel"


class View(NamedTuple):
    """What the engine's workers see of the links."""

    started: bool | None
    """What ``startup_verdict`` says of their states."""
    ended: bool
    """All are Stopped, and no task of theirs is left."""


class EngineLocal(NamedTuple):
    """All of an engine, but its links, that decides what may happen next.

    ``error`` is the one that is kept: "", "bug", or with "drain" in it where it names what was left;
    ``store`` tells whether the cursor store may be open.
    """

    state: EngineState
    jobs: tuple[Job, ...] = ()
    mail: tuple[Letter, ...] = ()
    error: str = ""
    store: bool = False


class EngineStep(NamedTuple):
    """One step, and what it asks of every link."""

    label: tuple[str, str]
    cooperative: bool
    command: str
    after: EngineLocal
    moves: tuple[Move, ...]
    faults: tuple[str, ...]


@dataclass(slots=True)
class _StandIn:
    """Stands for a link where the engine looks at pause reasons and clears one."""

    pause_reasons: frozenset[PauseReason]
    cleared: bool = False

    def clear(self, _reason: PauseReason, _why: str) -> None:
        """Note it."""
        self.cleared = True


def make_engine(loop: StageLoop, links: int) -> ReplicationEngine:
    """Return a real engine on a stage, with links to as many peers; nothing of it ever runs."""
    config = ReplicationConfig(
        local_node_id="local",
        peers=[PeerConfig(node_id=name, redis_url=f"redis://{name}") for name in PEERS[:links]],
    )
    unused: Any = None
    with on_stage(loop):
        return ReplicationEngine(
            config,
            MemorySyncEngine(),
            ports=Ports(
                transport=unused,
                cursor_store=MemoryCursorStore(),
                clock=StageClock(),
                wall_clock=StageClock(),
                random=random.Random(0),  # noqa: S311 - nothing depends on chance here
            ),
        )


class _Silent:
    """A logger that says nothing: millions of steps are taken that never happen."""

    def warning(self, *_args: object, **_fields: object) -> None:
        """Say nothing."""

    info = error = debug = log = warning


class EngineModel:
    """Steps of the engine; the search keeps their results."""

    def __init__(self, engine: ReplicationEngine, loop: StageLoop, *, late: bool) -> None:
        self.engine = engine
        self._late = late
        silent: Any = _Silent()
        engine._log = silent
        self._loop = loop
        self._links = dict(engine._links)
        left = DrainTimeoutError(("a worker",), timeout_sec=10.0)
        self._errors = {
            "": None,
            "bug": _BUG,
            LATER: _LATER_BUG,
            DRAIN: left,
            "no peer": NoPeerError("none"),
            "disk": CursorStoreError("gone", path="c.db"),
        }
        self._stage = Stage(engine._driver, self._errors)
        self._store = False

    @property
    def books(self) -> Books:
        """What happened in the last step."""
        return self._stage.books

    # Loading and reading.

    def _load(self, at: EngineLocal) -> None:
        engine = self.engine
        engine._error = self._kept(at.error)
        engine._drain_tries = 1
        self._store = at.store
        self._stage.set(at.state, at.jobs, at.mail, lambda _job: None, self._stage.payload)

    def _kept(self, error: str) -> BaseException | None:
        first, _, noted = error.partition(NOTED)
        for known in filter(None, self._errors.values()):
            known.__notes__ = []
        kept = self._errors[first]
        if kept is not None and noted:
            kept.add_note(str(self._errors[DRAIN]))
        return kept

    def _read(self) -> EngineLocal:
        engine, stage = self.engine, self._stage
        kept = engine._error
        error = next((n for n in ("", DRAIN, LATER) if self._errors[n] is kept), "bug")
        if any(str(self._errors[DRAIN]) in note for note in getattr(kept, "__notes__", ())):
            error += NOTED + DRAIN
        jobs, mail = stage.jobs(), stage.mail()
        if not self._late:
            mail = tuple(letter for letter in mail if letter.scope)
            jobs = tuple(sorted({_ENDING if job.asked else job for job in jobs}))
        return EngineLocal(engine.state, jobs, tuple(map(_plain, mail)), error, self._store)

    def act(self, at: EngineLocal, do: Callable[[], object]) -> tuple[EngineLocal, list[str]]:
        """Return the state after ``do``, and what is wrong with it."""
        with on_stage(self._loop):
            self._load(at)
            try:
                do()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
                self._stage.books.faults.append(f"{type(error).__name__}: {error}")
            if not self._late:
                self._stage.end_what_is_over(is_over)
            after = self._read()
        return after, [*self._stage.books.faults, *self._faults(at, after)]

    def _faults(self, at: EngineLocal, after: EngineLocal) -> Iterator[str]:
        for job in after.jobs:
            if not job.scope and not job.asked and not is_over(job):
                yield f"the {job.name} was not asked to stop though its entry is over (G7)"
        if at.error and not after.error.startswith(at.error):
            yield "the first error was not kept"
        if after.state is EngineState.STOPPED and after.error:
            yield "it is Stopped with an error kept"
        if after.state is EngineState.FAILED and not after.error:
            yield "it is Failed and no error was kept"
        if after.state in self.engine._driver.machine.table.final and DRAIN not in after.error:
            if any(not is_over(job) for job in after.jobs):
                yield "a final state was entered while a task was left (G7)"
            if after.store:
                yield "a final state was entered while the cursor store was open (G7)"

    # What may happen next.

    def steps(self, at: EngineLocal, view: View) -> list[EngineStep]:
        """Return every step from a state."""
        found = []
        for label, cooperative, command, do in self._choices(at, view):
            after, faults = self.act(at, do)
            if label[1].startswith("late") and after != at._replace(mail=at.mail[1:]):
                faults.append("a report was obeyed whose entry is over (G6)")
            moves = tuple(self._stage.books.moves)
            found.append(EngineStep(label, cooperative, command, after, moves, tuple(faults)))
        return found

    def _choices(
        self, at: EngineLocal, view: View
    ) -> Iterator[tuple[tuple[str, str], bool, str, Callable[[], object]]]:
        """Yield label, cooperation, command to the links, and the step itself."""
        if at.mail:
            letter = at.mail[0]
            late = "" if letter.scope else "late "
            text = f"{late}{letter.sender}: {letter.fact}"
            yield ("driver", text), True, "", self._stage.handle
        for trigger in ("start", "shutdown"):
            if self.engine._driver.machine.table.move(at.state, trigger) is not None:
                yield ("operator", f"{trigger}()"), False, "", self._asking(trigger)
        if (
            self._late
            and at.state is EngineState.RUNNING
            and not any(job.name == "repair" for job in at.jobs)
        ):
            yield ("operator", "repair()"), False, "", self._repair
        if any(job.asked or is_over(job) for job in at.jobs):
            # Nobody looks at them one by one, so they may as well end together.
            yield ("workers", "end"), True, "", self._end_all
        for job in at.jobs:
            if not job.asked and not is_over(job):
                yield from self._job_choices(at, view, job)
            elif self._late and not is_over(job):
                yield (job.name, "dies late"), False, "", self._dying(at, job)

    def _job_choices(self, at: EngineLocal, view: View, job: Job) -> Iterator[Any]:
        if job.name == "starter":
            yield from self._starter_choices(view, job)
        elif job.name == "drainer":
            yield from self._drainer_choices(at, view, job)
        elif job.name == "repair":
            yield ("repair", "is done"), True, "", self._stage.tasks[job].end
        elif job.name not in LASTING:
            raise NotImplementedError(f"nobody has written down what a {job.name} may do")
        if job.name == "cursor-flush":
            # One of them stands for all: they are started and stopped together.
            gone = self._saying(job, _F.BROKEN, "disk", Phase.SAID)
            yield (job.name, "broken"), False, "", gone
        if job.name in ("starter", "drainer", "repair", "cursor-flush"):
            yield (job.name, "dies"), False, "", self._dying(at, job)

    def _starter_choices(self, view: View, job: Job) -> Iterator[Any]:
        ready = self._saying(job, _F.READY, "", Phase.SAID)
        hopeless = self._saying(job, _F.BROKEN, "no peer", Phase.SAID)
        if job.phase is Phase.WORKS:
            bad = self._saying(job, _F.BROKEN, "disk", Phase.SAID)
            yield ("starter", "the cursor store cannot be opened"), False, "", bad
            if self._links:
                wait = self._turning(job, Phase.WAITS)
                yield ("starter", "connects the links"), True, Command.CONNECT, wait
            runs = "may run without peers: ready"
            yield ("starter", runs), True, Command.CONNECT, ready
        elif view.started:
            yield ("starter", "ready"), True, "", ready
        elif view.started is False:
            yield ("starter", "broken: all have failed"), True, "", hopeless
        if job.phase is Phase.WAITS:
            yield ("starter", "broken: no peer in time"), False, "", hopeless

    def _drainer_choices(self, at: EngineLocal, view: View, job: Job) -> Iterator[Any]:
        alone = all(other.name == "drainer" or is_over(other) for other in at.jobs)
        if job.phase is Phase.WORKS:
            wait = self._turning(job, Phase.WAITS)
            yield ("drainer", "asks the links to stop"), True, Command.SHUTDOWN, wait
        elif job.phase in (Phase.WAITS, Phase.CANCELLED):
            if view.ended and alone:
                close = self._turning(job, Phase.CLOSES)
                yield ("drainer", "everything has ended"), True, "", close
            elif job.phase is Phase.WAITS:
                cancel = self._turning(job, Phase.CANCELLED)
                yield ("drainer", "deadline: cancels all"), False, Command.CANCEL, cancel
            else:
                leave = self._turning(job, Phase.LEAVES)
                yield ("drainer", "something does not end"), False, "", leave
        else:
            late = job.phase is Phase.LEAVES
            told = DRAIN if late else ""
            yield ("drainer", "closes: drained"), True, "", self._closing(job, told)
            yield ("drainer", "the disk hangs: drained"), False, "", self._closing(job, DRAIN)
            if not late:
                yield ("drainer", "the disk fails: drained"), False, "", self._closing(job, "disk")

    # The steps themselves.

    def _asking(self, trigger: str) -> Callable[[], object]:
        def ask() -> None:
            self._store = self._store or trigger == "start"
            self.engine._driver.request(trigger, why="asked")

        return ask

    def _repair(self) -> None:
        async def work() -> None:
            """Stand for a pass."""

        self.engine._cold_path._start(work)

    def _saying(self, job: Job, fact: EngineFact, error: str, then: Phase) -> Callable[[], None]:
        def say() -> None:
            self._stage.tasks[job].phase = then
            report = self.engine._driver.reporter(job.name, ticket_of(job.scope))
            report(fact, payload=self._errors[error])

        return say

    def _turning(self, job: Job, phase: Phase) -> Callable[[], None]:
        def turn() -> None:
            self._stage.tasks[job].phase = phase
            if phase is Phase.CANCELLED:
                self.engine._driver.cancel_all(but="drainer")

        return turn

    def _closing(self, job: Job, error: str) -> Callable[[], None]:
        def close() -> None:
            self._store = error == DRAIN and job.phase is not Phase.LEAVES
            self._saying(job, _F.DRAINED, error, Phase.SAID)()

        return close

    def _dying(self, at: EngineLocal, job: Job) -> Callable[[], None]:
        error = _LATER_BUG if at.error else _BUG
        return lambda: self._stage.tasks[job].end(error)

    def _end_all(self) -> None:
        for job, task in self._stage.tasks.items():
            if job.asked or is_over(job):
                task.end()

    # What links, circuits and the prober do to the engine, and it to them.

    def crashed(self, at: EngineLocal, how: str) -> tuple[EngineLocal, list[str]]:
        """Return the state after a link has told that a worker of it died: of a bug, or for good."""
        error: Exception = _LATER_BUG if at.error else _BUG
        if how == "bug":
            error = RuntimeError("a bug")
        return self.act(at, lambda: self.engine._crashed("link:a:tailer", error))

    def cleared(
        self, reasons: tuple[frozenset[PauseReason], ...], closed: CircuitState | None
    ) -> tuple[bool, ...]:
        """Say which links the engine clears of the reason CIRCUIT.

        With ``closed`` because a circuit of the store has closed, without because one of them may
        probe it.
        """
        stand_ins = [_StandIn(one) for one in reasons]
        links: Any = dict(zip(PEERS, stand_ins, strict=False))
        engine, kept = self.engine, self.engine._links._links
        engine._links._links = links
        try:
            if closed is None:
                engine._links.grant_probe()
            else:
                engine._circuit_changed(engine.circuit.writes, CircuitState.HALF_OPEN, closed)
        finally:
            engine._links._links = kept
        return tuple(one.cleared for one in stand_ins)


def _plain(letter: Letter) -> Letter:
    """Return a letter in which all errors are one, but for what names that something was left."""
    return letter if letter.payload in ("", DRAIN) else letter._replace(payload="bug")


def is_over(job: Job) -> bool:
    """Say whether a task has done all it ever does: its report was its last act."""
    return job.phase is Phase.SAID
