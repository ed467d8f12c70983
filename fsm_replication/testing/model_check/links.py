"""One link as a model: the real :class:`PeerLink`, and all that its workers and callers may do.

What a worker may do is written down here; what then happens is done by the link's own code. The
steps are *cooperative* where a healthy world would take them sooner or later: peers answer, stores
take writes, tasks that were asked to stop end. All others are moves of an adversary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from fsm_replication.abilities import Abilities
from fsm_replication.circuits import CircuitState
from fsm_replication.errors import ConnectionLostError, PeerRefusedError, WorkerCrashedError
from fsm_replication.machine import Move
from fsm_replication.peer_link import RUNNING, PeerLink
from fsm_replication.reports import LinkFact, PauseReason, Report
from fsm_replication.tables import PeerState
from fsm_replication.testing.model_check.stage import (
    Books,
    Job,
    Letter,
    Phase,
    Stage,
    StageLoop,
    on_stage,
    ticket_of,
)
from fsm_replication.workers.crashes import CRASHES_MAX
from fsm_replication.workers.tailer import Mode, Tailer, _Orders, passed_reason

__all__ = ("CALLS_STORE", "Detail", "LinkModel", "LinkState", "LinkStep", "Needs", "is_over")

_F = LinkFact
_R = PauseReason

READING: Final = frozenset({Mode.COPY, Mode.READ_IN_BULK, Mode.READ_AT_HEAD})
CALLS_STORE: Final = READING | {Mode.DECIDE}
TAILER_FACTS: Final = {
    Mode.DECIDE: (_F.AT_HEAD, _F.BEHIND, _F.MUST_COPY, _F.NO_HOT_PATH),
    Mode.COPY: (_F.AT_HEAD, _F.BEHIND),
    Mode.READ_IN_BULK: (_F.AT_HEAD, _F.MUST_COPY),
    Mode.READ_AT_HEAD: (_F.BEHIND, _F.MUST_COPY),
    Mode.HOLD: (),
    Mode.IDLE: (),
}
"""What a tailer may find out in each mode, beside LOST, BLOCKED, CLEARED and OUTDATED."""
CONNECTOR_SAYS: Final = (
    (_F.CONNECTED, "lines"),
    (_F.UNREACHABLE, "lost"),
    (_F.HOPELESS, "refused"),
    (_F.HOPELESS, "credentials"),
)
_HEALTHY: Final = frozenset({_F.CONNECTED, _F.AT_HEAD})
# Reasons that end by themselves once the world is well again.
PASSING: Final = frozenset({_R.CIRCUIT, _R.BACKPRESSURE, _R.DEAD_LETTERS_FULL, _R.CLOCK})


class Needs:
    """What must hold outside a link for a step of it."""

    NOTHING: Final = 0
    SLOT: Final = 1
    """No other link copies."""
    ALL_CLOSED: Final = 2
    """All circuits of the store are closed."""
    NOT_CLOSED: Final = 3
    """Some circuit of the store is not closed."""
    RUNNING: Final = 4
    """The engine is Running."""


class LinkState(NamedTuple):
    """All of a link that decides what may happen next.

    ``mode`` is what the tailer was told, ``orders`` the scope its reports then belong to; ``ping``
    is None, or the scope of a ping that is under way. ``worn`` says that there were more unexpected
    errors within a minute than are put up with.
    """

    state: PeerState
    jobs: tuple[Job, ...] = ()
    mail: tuple[Letter, ...] = ()
    reasons: tuple[PauseReason, ...] = ()
    mode: str = ""
    orders: str = ""
    lines: bool = False
    ping: str | None = None
    worn: bool = False


class LinkStep(NamedTuple):
    """One step: ``crash`` is "" or says what a worker died of.

    That is a "bug", or that the cursor store is "gone".
    """

    label: tuple[str, str]
    cooperative: bool
    needs: int
    crash: str
    after: LinkState
    moves: tuple[Move, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """How much of a link is modelled.

    With ``late`` a task that has reported may take its time to be gone, and a report whose entry
    is over is kept until it is handled; without, both happen at once. ``reconfigures`` lets the
    configuration of the link change. With ``wears`` unexpected errors may come too often.
    """

    reasons: tuple[PauseReason, ...] = tuple(PauseReason)
    pings: bool = True
    late: bool = True
    crashes: bool = True
    reconfigures: bool = True
    wears: bool = False


class _Lines:
    """Stands for a pair of connections."""

    foreign = False

    def __init__(self) -> None:
        self.abilities = Abilities()
        self.closed = False

    def close(self) -> None:
        """Note it."""
        self.closed = True


class LinkModel:
    """Steps of one link; every result is computed once and kept."""

    def __init__(self, link: PeerLink, loop: StageLoop, detail: Detail) -> None:
        self.link = link
        self.detail = detail
        self._loop = loop
        self._crashed = False
        link._on_crash = self._note_crash
        self._stage = Stage(
            link.driver,
            {
                "": None,
                "lost": ConnectionLostError("lost"),
                "refused": PeerRefusedError("refused"),
                "credentials": PeerRefusedError("refused", credentials=True),
                "worn": WorkerCrashedError("too often"),
                "bug": RuntimeError("a bug"),
                **{reason.value: reason for reason in PauseReason},
            },
        )
        self._made: list[_Lines] = []
        self._given = _Lines()
        with on_stage(loop):
            lines: Any = _Lines()
            self._tailer = Tailer(link.context, lines, lambda: link.pause_reasons, lambda: 0)
        self._told: _Orders | None = None
        self._before = LinkState(PeerState.CREATED)

    @property
    def books(self) -> Books:
        """What happened in the last step."""
        return self._stage.books

    def _note_crash(self, _worker: str, _error: Exception) -> None:
        self._crashed = True

    # Loading and reading.

    def _load(self, at: LinkState) -> None:
        link, stage = self.link, self._stage
        self._before, self._crashed = at, False
        self._made.clear()
        link._reasons = frozenset(at.reasons)
        link.context.crashes.clear()
        if at.worn:
            self._wear_out(CRASHES_MAX + 1)
        link._tailer = self._tailer if at.mode else None
        self._given = self._new_lines()
        # The tailer closes the connections it was given when it ends.
        self._given.closed = not any(job.name == "tailer" for job in at.jobs)
        lines: Any = self._given if at.lines else None
        link._lines = lines
        stage.set(at.state, at.jobs, at.mail, self._stop_of, self._payload)
        if at.mode:
            report = link.driver.reporter("tailer", ticket_of(at.orders))
            self._told = self._tailer._orders = _Orders(Mode[at.mode], report)

    def _wear_out(self, times: int) -> None:
        for _ in range(times):
            self.link.context.crashes.add(RuntimeError("a bug"))

    def _stop_of(self, job: Job) -> Callable[[], None] | None:
        return self._tailer.stop if job.name == "tailer" else None

    def _new_lines(self) -> _Lines:
        self._made.append(_Lines())
        return self._made[-1]

    def _payload(self, letter: Letter) -> object:
        return self._new_lines() if letter.payload == "lines" else self._stage.payload(letter)

    def _read(self) -> LinkState:
        link, tailer = self.link, self.link._tailer
        mode = orders = ""
        if tailer is not None:
            assert tailer._orders is not None
            mode, orders = tailer._orders.mode.name, self._scope_of(tailer._orders)
            if tailer._orders is not self._told:
                self._take_note_of_new_orders()
        ping = self._before.ping
        if ping and ping not in link.driver.machine._entries:
            ping = ""
        mail = tuple(self._letter(report) for report in link.driver._mailbox.values())
        if not self.detail.late:
            # Without lines in it, a report whose entry is over is as good as dropped.
            mail = tuple(letter for letter in mail if letter.scope or letter.payload == "lines")
        return LinkState(
            link.state,
            self._stage.jobs(),
            mail,
            tuple(sorted(link.pause_reasons)),
            mode,
            orders,
            link.lines is not None,
            ping,
            link.context.crashes.too_many,
        )

    def _letter(self, report: Report) -> Letter:
        if isinstance(report.payload, _Lines):
            name = "lines"
        elif isinstance(report.payload, WorkerCrashedError):
            name = "worn"
        else:
            name = self._stage.name_of(report)
        return Letter(report.sender, report.fact, self._stage.scope(report.ticket), name)

    def _scope_of(self, orders: _Orders) -> str:
        """Return the scope that a report in these orders would carry, by making one."""
        driver = self.link.driver
        kept, driver._mailbox = driver._mailbox, {}
        orders.report(LinkFact.LOST)
        made, driver._mailbox = driver._mailbox.get("tailer"), kept
        return self._stage.scope(made.ticket) if made is not None else ""

    def _take_note_of_new_orders(self) -> None:
        for job in self.link.driver._jobs:
            task: Any = job.task
            if job.name == "tailer" and not job.asked and task.phase is not Phase.GIVES_UP:
                task.phase = Phase.CHANGES if task.slot else Phase.WORKS

    def act(self, at: LinkState, do: Callable[[], object]) -> tuple[LinkState, bool, list[str]]:
        """Return the state after ``do``, whether a worker's death was told, and what is wrong."""
        with on_stage(self._loop):
            self._load(at)
            try:
                do()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
                self._stage.books.faults.append(f"{type(error).__name__}: {error}")
            if not self.detail.late:
                self._stage.end_what_is_over(is_over)
            after = self._read()
        faults = [*self._stage.books.faults, *self._faults(after)]
        return after, self._crashed, faults

    # What must hold in every state of a link.

    def _faults(self, after: LinkState) -> Iterator[str]:
        is_running = RUNNING in self.link.driver.machine._entries
        if after.lines != is_running:
            yield "connections are held outside the group Running, or missing in it (G7)"
        for job in after.jobs:
            if not job.scope and not job.asked and not is_over(job):
                yield f"the {job.name} was not asked to stop though its entry is over (G7)"
        if any(not lines.closed for lines in self._unowned_lines(after)):
            yield "connections are left open that nobody owns (G7)"
        if after.reasons and after.mode and Mode[after.mode] in (READING | {Mode.IDLE}):
            yield f"its tailer is told {after.mode} while there is a reason to pause"
        for move in self._stage.books.moves:
            if move.trigger == "resume" and after.reasons:
                yield "it resumed with a reason to pause"
        if after.state in self.link.driver.machine.table.final and any(
            not is_over(job) for job in after.jobs
        ):
            yield "a final state was entered while a task was left (G7)"

    def _unowned_lines(self, after: LinkState) -> list[_Lines]:
        owned = {id(report.payload) for report in self.link.driver._mailbox.values()}
        if any(job.name == "tailer" for job in after.jobs):
            owned |= {id(self._given), id(self.link._lines)}
        return [lines for lines in self._made if id(lines) not in owned]

    # What may happen next.

    def steps(self, at: LinkState) -> list[LinkStep]:
        """Return every step from a state."""
        found = []
        for label, cooperative, needs, do in self._choices(at):
            after, crashed, faults = self.act(at, do)
            moves = tuple(self._stage.books.moves)
            if label[1].startswith("late") and after != at._replace(mail=at.mail[1:]):
                faults.append("a report was obeyed whose entry is over (G6)")
            if after.state != at.state and after.state is PeerState.FAILED:
                hopeless = bool(at.mail) and at.mail[0].fact is _F.HOPELESS
                if not hopeless:
                    faults.append("it has Failed, and nobody said that it was hopeless")
            step = LinkStep(label, cooperative, needs, "", after, moves, tuple(faults))
            if not crashed:
                found.append(step)
                continue
            found += [step._replace(crash=how) for how in ("bug", "gone")]
        return found

    def _choices(
        self, at: LinkState
    ) -> Iterator[tuple[tuple[str, str], bool, int, Callable[[], object]]]:
        """Yield label, cooperation, needs and the step itself."""
        if at.mail:
            letter = at.mail[0]
            late = "" if letter.scope else "late "
            yield ("driver", f"{late}{letter.sender}: {letter.fact}"), True, 0, self._stage.handle
        for job in at.jobs:
            yield from self._job_choices(at, job)
        yield from self._requests(at)
        if at.ping is not None:
            yield ("pinger", "ping: lost"), False, 0, self._ping_fails
            yield ("pinger", "ping: ok"), True, 0, self._forget_ping
        elif self.detail.pings and at.lines:
            yield ("pinger", "ping begins"), False, Needs.RUNNING, self._begin_ping

    def _job_choices(self, at: LinkState, job: Job) -> Iterator[Any]:
        name = job.name
        if job.asked or job.phase is Phase.GIVES_UP or (is_over(job)):
            yield (name, "ends"), True, 0, lambda: self._end(job, None)
            if self.detail.late and name == "tailer" and job.phase is not Phase.GIVES_UP:
                yield (name, "lost"), False, 0, self._saying(job, _F.LOST, "lost")
        elif name == "connector":
            for fact, payload in CONNECTOR_SAYS:
                say = self._saying(job, fact, payload)
                yield (name, f"{fact} ({payload})"), fact in _HEALTHY, 0, say
        elif name == "timer":
            yield (name, "due"), True, 0, self._saying(job, _F.DUE, "")
        elif name == "tailer":
            yield from self._tailer_choices(at, job)
        else:
            raise NotImplementedError(f"nobody has written down what a {name} may do")
        if self.detail.crashes and not is_over(job):
            yield (name, "dies"), False, 0, lambda: self._end(job, RuntimeError("a bug"))
            if self.detail.wears and not at.worn:
                yield (name, "dies too often"), False, 0, lambda: self._die_too_often(job)

    def _tailer_choices(self, at: LinkState, job: Job) -> Iterator[Any]:
        mode = Mode[at.mode]
        yield ("tailer", "lost"), False, 0, self._saying(job, _F.LOST, "lost")
        if job.phase is Phase.CHANGES:
            yield ("tailer", "takes up its next mode"), True, 0, lambda: self._take_up(job)
        if job.phase is not Phase.WORKS:
            return
        if mode is Mode.HOLD:
            yield from self._hold_choices(at, job)
        elif mode is Mode.DECIDE and at.reasons:
            yield ("tailer", "blocked, still"), True, 0, self._ordered(job, _F.BLOCKED, "")
        else:
            yield from self._reading_choices(mode, job)

    def _reading_choices(self, mode: Mode, job: Job) -> Iterator[Any]:
        if self.detail.reconfigures and mode is not Mode.DECIDE and not job.slot:
            yield ("tailer", str(_F.OUTDATED)), False, 0, self._ordered(job, _F.OUTDATED, "")
        if mode is Mode.COPY and not job.slot:
            yield ("tailer", "may copy"), True, Needs.SLOT, lambda: self._take_slot(job)
        else:
            for fact in TAILER_FACTS[mode]:
                good = fact in _HEALTHY or mode in (Mode.DECIDE, Mode.COPY)
                yield ("tailer", str(fact)), good, 0, self._ordered(job, fact, "")
        if mode in CALLS_STORE:
            for reason in self.detail.reasons:
                if reason is not _R.OPERATOR:
                    needs = Needs.NOT_CLOSED if reason is _R.CIRCUIT else 0
                    say = self._ordered(job, _F.BLOCKED, reason.value)
                    yield ("tailer", f"blocked ({reason})"), False, needs, say

    def _hold_choices(self, at: LinkState, job: Job) -> Iterator[Any]:
        """Yield what a poll may find, by the very rule that the tailer goes by."""
        if any(letter.sender == "tailer" for letter in at.mail):
            return
        for closed in (True, False):
            circuit = CircuitState.CLOSED if closed else CircuitState.OPEN
            passed = passed_reason(
                frozenset(at.reasons), (circuit,), accepts=True, room=True, clocks_agree=True
            )
            if passed is not None:
                reason = passed[0]
                needs = Needs.ALL_CLOSED if closed else Needs.NOT_CLOSED
                say = self._ordered(job, _F.CLEARED, reason.value if reason else "")
                yield ("tailer", f"cleared ({reason or 'all'})"), True, needs, say

    def _requests(self, at: LinkState) -> Iterator[Any]:
        link = self.link
        if _R.OPERATOR in self.detail.reasons:
            if _R.OPERATOR not in at.reasons:
                yield ("operator", "pause()"), False, 0, link.pause
            if {_R.OPERATOR, _R.INTERLOCK} & set(at.reasons):
                yield ("operator", "resume()"), False, 0, link.resume
        if _R.INTERLOCK in self.detail.reasons:
            if _R.INTERLOCK not in at.reasons:
                block = lambda: link.block(_R.INTERLOCK, "too many deletes")  # noqa: E731
                yield ("cold path", "block(interlock)"), False, Needs.RUNNING, block
            else:
                yield ("operator", "repair(force)"), False, Needs.RUNNING, link.force
        if self.detail.wears and at.lines:
            bug = RuntimeError("a bug")
            yield ("cold path", "dies"), False, Needs.RUNNING, partial(link.blame, "cold path", bug)
            if not at.worn:
                yield ("cold path", "dies too often"), False, Needs.RUNNING, self._blame_too_often
        if _R.CLOCK in self.detail.reasons and _R.CLOCK not in at.reasons:
            block = lambda: link.block(_R.CLOCK, "clocks are days apart")  # noqa: E731
            yield ("cold path", "block(clock)"), False, Needs.RUNNING, block
        if self.detail.reconfigures:
            meaning = link.driver.machine.table.meaning
            if meaning(_F.OUTDATED, at.state):
                yield (
                    ("configuration", "other settings"),
                    False,
                    Needs.RUNNING,
                    partial(link.decide_anew, "settings changed"),
                )
            if meaning(_F.MOVED, at.state):
                yield ("configuration", "another URL"), False, Needs.RUNNING, link._take_other_way

    # The steps themselves.

    def _saying(self, job: Job, fact: LinkFact, payload: str) -> Callable[[], None]:
        def say() -> None:
            task = self._stage.tasks[job]
            task.phase = Phase.GIVES_UP if job.name == "tailer" else Phase.SAID
            carried = self._payload(Letter(job.name, fact, job.scope, payload))
            self.link.driver.reporter(job.name, ticket_of(job.scope))(fact, payload=carried)

        return say

    def _ordered(self, job: Job, fact: LinkFact, payload: str) -> Callable[[], None]:
        def say() -> None:
            task, orders = self._stage.tasks[job], self._tailer._orders
            assert orders is not None
            if orders.mode is Mode.COPY and fact is not _F.BLOCKED:
                task.slot = False
            goes_on = orders.mode is Mode.HOLD or (
                orders.mode is Mode.READ_AT_HEAD and fact is _F.BEHIND
            )
            task.phase = Phase.WORKS if goes_on else Phase.SAID
            orders.report(fact, payload=self._payload(Letter("tailer", fact, "", payload)))

        return say

    def _end(self, job: Job, error: BaseException | None) -> None:
        if job.name == "tailer":
            # It closes its connections whatever it ends of.
            self._given.close()
        self._stage.tasks[job].end(error)

    def _die_too_often(self, job: Job) -> None:
        self._wear_out(CRASHES_MAX)
        self._end(job, RuntimeError("a bug"))

    def _blame_too_often(self) -> None:
        self._wear_out(CRASHES_MAX)
        self.link.blame("cold path", RuntimeError("a bug"))

    def _take_up(self, job: Job) -> None:
        task = self._stage.tasks[job]
        task.slot, task.phase = False, Phase.WORKS

    def _take_slot(self, job: Job) -> None:
        self._stage.tasks[job].slot = True

    def _begin_ping(self) -> None:
        self._before = self._before._replace(ping=RUNNING)

    def _ping_fails(self) -> None:
        report = self.link.driver.reporter("ping", ticket_of(self._before.ping or ""))
        self._forget_ping()
        report(_F.LOST, payload=self._stage.payload(Letter("", _F.LOST, "", "lost")))

    def _forget_ping(self) -> None:
        self._before = self._before._replace(ping=None)


def is_over(job: Job) -> bool:
    """Say whether a task has done all it ever does: its report was its last act."""
    return job.phase is Phase.SAID and job.name != "tailer"
