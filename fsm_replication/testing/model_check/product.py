"""The engine, its links and the circuits of its store, put together: all that can happen next.

States of the parts are numbered, and what a part can do in a state is computed once; a combined
state is a tuple of numbers. Links that are alike are kept in one order, so that two combinations
that differ only in which link is which count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, NamedTuple, TypeVar

from fsm_replication.circuits import CircuitState
from fsm_replication.engine import startup_verdict
from fsm_replication.reports import PauseReason
from fsm_replication.tables import CIRCUIT, EngineState, PeerState
from fsm_replication.testing.model_check.engines import (
    DRAIN,
    Command,
    EngineLocal,
    EngineModel,
    EngineStep,
    View,
    make_engine,
)
from fsm_replication.testing.model_check.links import (
    CALLS_STORE,
    Detail,
    LinkModel,
    LinkState,
    LinkStep,
    is_over,
)
from fsm_replication.testing.model_check.stage import Phase, StageLoop
from fsm_replication.workers.tailer import Mode

__all__ = ("Combined", "Move", "Product", "Scope", "Taken")

_H = TypeVar("_H", bound=Hashable)
Label = tuple[str, str, str]
Taken = tuple[str, str, str]
"""A move of a machine: its table, the trigger, the state before."""

MENDING: Final = frozenset({"probe", "mend"})
# The place of the circuit of reads among those of the store.
READS: Final = 1
OPERATORS: Final = frozenset({PauseReason.OPERATOR, PauseReason.INTERLOCK})


@dataclass(frozen=True)
class Scope:
    """What is combined: how many links (0 to 2) and circuits (0 to 2), and how much of each link."""

    name: str
    links: int
    circuits: int
    detail: Detail = field(default_factory=Detail)


Combined = tuple[int, tuple[int, ...], tuple[CircuitState, ...]]
"""The numbers of the states of the engine and of its links, and the states of the circuits."""


class Move(NamedTuple):
    """A step of the combination: whether the world would take it, and what is wrong afterwards.

    ``label`` says who acts on whom, and what is done.
    """

    label: Label
    cooperative: bool
    after: Combined
    faults: tuple[str, ...]


class _Numbers(Generic[_H]):
    """Numbers things in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[_H, int] = {}
        self.things: list[_H] = []

    def of(self, thing: _H) -> int:
        """Return the number of a thing."""
        number = self._numbers.get(thing)
        if number is None:
            number = self._numbers[thing] = len(self.things)
            self.things.append(thing)
        return number


_Ready = tuple[Label, bool, int, str, tuple[str, ...]]


class _Facts(NamedTuple):
    """What others want to know of a link in some state."""

    state: PeerState
    reasons: frozenset[PauseReason]
    holds_slot: bool
    calls_store: bool
    ended: bool
    rests: bool
    holds_lines: bool


class Product:
    """All steps of one combination of machines."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        # Nothing runs on it, so most of what a loop can do is not there.
        loop = StageLoop()  # type: ignore[abstract]
        self.engine = EngineModel(make_engine(loop, scope.links), loop, late=not scope.links)
        # For their steps all links are one; the other engine's is not touched by this one.
        self.link = (
            LinkModel(next(iter(make_engine(loop, 1)._links.values())), loop, scope.detail)
            if scope.links
            else None
        )
        self._health = make_engine(loop, scope.links)
        self.engines = _Numbers[EngineLocal]()
        self.links = _Numbers[LinkState]()
        self.facts: list[_Facts] = []
        self.taken: set[Taken] = set()
        self._ready: dict[Hashable, list[_Ready]] = {}
        self._memo: dict[Hashable, Any] = {}
        self.initial: Combined = (
            self.engines.of(EngineLocal(EngineState(self._health._driver.machine.table.initial))),
            (self._number(LinkState(PeerState.CREATED)),) * scope.links,
            (CircuitState.CLOSED,) * scope.circuits,
        )

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = make()
        return found

    # Parts.

    def _note(self, table: str, moves: tuple[Any, ...]) -> None:
        self.taken.update((table, move.trigger, str(move.source)) for move in moves)

    def _link_steps(self, number: int) -> list[tuple[LinkStep, int]]:
        def make() -> list[tuple[LinkStep, int]]:
            assert self.link is not None
            steps = self.link.steps(self.links.things[number])
            for step in steps:
                self._note("link", step.moves)
            return [(step, self._number(step.after)) for step in steps]

        return self._once(("steps", number), make)  # type: ignore[no-any-return]

    def _told(self, number: int, what: str) -> tuple[int, tuple[str, ...]]:
        """Return the state of a link after a command, and what is wrong with it."""

        def make() -> tuple[int, tuple[str, ...]]:
            assert self.link is not None
            link = self.link.link
            commands: dict[str, Callable[[], object]] = {
                Command.CONNECT: link.connect,
                Command.SHUTDOWN: partial(link.shutdown, "the engine stops"),
                Command.CANCEL: link.driver.cancel_all,
                "clear": partial(link.clear, PauseReason.CIRCUIT, "it may go on"),
            }
            after, _, faults = self.link.act(self.links.things[number], commands[what])
            self._note("link", tuple(self.link.books.moves))
            return self._number(after), tuple(faults)

        return self._once((what, number), make)  # type: ignore[no-any-return]

    def _number(self, link: LinkState) -> int:
        number = self.links.of(link)
        if number == len(self.facts):
            self.facts.append(_facts_of(link))
        return number

    # What can happen next.

    def moves(self, at: Combined) -> Iterator[Move]:
        """Yield every step; the links of the new state are in the order of those before."""
        engine, links, circuits = at
        for place, number in enumerate(links):
            for label, cooperative, after, crash, faults in self._open_to(at, place, number):
                others = (*links[:place], after, *links[place + 1 :])
                if crash:
                    told, more = self._crashed(engine, crash)
                    yield Move(label, cooperative, (told, others, circuits), faults + more)
                else:
                    yield Move(label, cooperative, (engine, others, circuits), faults)
        yield from self._engine_moves(at)
        if circuits:
            yield from self._circuit_moves(at)
            yield from self._probes(at)

    def _open_to(self, at: Combined, place: int, number: int) -> list[_Ready]:
        """Return the steps of one link that all around it allows."""
        engine, links, circuits = at
        closed = circuits.count(CircuitState.CLOSED) == len(circuits)
        slot = not any(self.facts[other].holds_slot for other in links[:place] + links[place + 1 :])
        running = self.engines.things[engine].state is EngineState.RUNNING
        key = (number, place, closed, slot, running)
        found = self._ready.get(key)
        if found is None:
            met = (True, slot, closed, not closed, running)
            name = "ab"[place]
            found = self._ready[key] = [
                ((step.label[0], name, step.label[1]), step.cooperative, after, step.crash,
                 step.faults)
                for step, after in self._link_steps(number)
                if met[step.needs]
            ]  # fmt: skip
        return found

    def _crashed(self, number: int, how: str) -> tuple[int, tuple[str, ...]]:
        def make() -> tuple[int, tuple[str, ...]]:
            after, faults = self.engine.crashed(self.engines.things[number], how)
            self._note("engine", tuple(self.engine.books.moves))
            return self.engines.of(after), tuple(faults)

        return self._once(("crashed", how, number), make)  # type: ignore[no-any-return]

    def _engine_moves(self, at: Combined) -> Iterator[Move]:
        engine, links, circuits = at
        facts = [self.facts[number] for number in links]
        verdict = startup_verdict([one.state for one in facts]) if facts else None
        view = View(verdict, all(one.ended for one in facts))
        for step, number in self._engine_steps(engine, view):
            after, faults = links, step.faults
            if step.command:
                told = [self._told(link, step.command) for link in links]
                after = tuple(one for one, _ in told)
                faults += tuple(fault for _, more in told for fault in more)
            who, what = step.label
            label = (who, "engine", what)
            yield Move(label, step.cooperative, (number, after, circuits), faults)

    def _engine_steps(self, number: int, view: View) -> list[tuple[EngineStep, int]]:
        def make() -> list[tuple[EngineStep, int]]:
            steps = self.engine.steps(self.engines.things[number], view)
            for step in steps:
                self._note("engine", step.moves)
            return [(step, self.engines.of(step.after)) for step in steps]

        return self._once((number, view), make)  # type: ignore[no-any-return]

    def _circuit_moves(self, at: Combined) -> Iterator[Move]:
        """Yield what calls into the store may do to its circuits, row by row."""
        engine, links, circuits = at
        called = any(self.facts[number].calls_store for number in links)
        if not called and self.engines.things[engine].state is not EngineState.RUNNING:
            return
        for place, state in enumerate(circuits):
            for row in CIRCUIT.rows:
                if state in row.sources:
                    dest = CircuitState(row.dest)
                    others = (*circuits[:place], dest, *circuits[place + 1 :])
                    after: Combined = (engine, links, others)
                    faults: tuple[str, ...] = ()
                    if dest is CircuitState.CLOSED:
                        after, faults = self._cleared(after, dest)
                    self.taken.add(("circuit", row.trigger, str(state)))
                    label = ("store", "engine", f"{('writes', 'reads')[place]}: {row.trigger}")
                    # The cold path may be switched off, so only what links do is relied upon, and
                    # what the prober does: it probes the circuit of reads by itself.
                    mends = called or (place == READS and self._probes_are_made(engine))
                    yield Move(label, row.trigger in MENDING and mends, after, faults)

    def _cleared(
        self, at: Combined, closed: CircuitState | None
    ) -> tuple[Combined, tuple[str, ...]]:
        engine, links, circuits = at
        reasons = tuple(self.facts[number].reasons for number in links)
        cleared = self._once((reasons, closed), lambda: self.engine.cleared(reasons, closed))
        told = [
            self._told(number, "clear") if one else (number, ())
            for number, one in zip(links, cleared, strict=True)
        ]
        faults = tuple(fault for _, more in told for fault in more)
        return (engine, tuple(number for number, _ in told), circuits), faults

    def _probes(self, at: Combined) -> Iterator[Move]:
        """Yield what the prober may do; either link may come first by priority."""
        engine, links, circuits = at
        if all(circuit is CircuitState.CLOSED for circuit in circuits):
            return
        # A link begins by reading, so it is not let through while reads are not.
        if circuits[READS:] not in ((), (CircuitState.CLOSED,)):
            return
        if not self._probes_are_made(engine):
            return
        label = ("prober", "engine", "grants a probe")
        after, faults = self._cleared(at, None)
        if after != at:
            yield Move(label, True, after, faults)
        (_, turned, _), faults = self._cleared((engine, links[::-1], circuits), None)
        other: Combined = (engine, turned[::-1], circuits)
        if other not in (at, after):
            yield Move(label, True, other, faults)

    def _probes_are_made(self, engine: int) -> bool:
        return any(job.name == "prober" and job.scope for job in self.engines.things[engine].jobs)

    # What must hold.

    def faults(self, at: Combined) -> list[str]:
        """Return what is wrong with a combined state."""
        number, links, _ = at
        engine = self.engines.things[number]
        facts = [self.facts[link] for link in links]
        found = []
        is_final = engine.state in (EngineState.STOPPED, EngineState.FAILED)
        if is_final and DRAIN not in engine.error and not all(one.ended for one in facts):
            found.append(f"the engine is {engine.state} while a link owns something (G7)")
        if any(one.state is PeerState.STOPPED and one.holds_lines for one in facts):
            found.append("a Stopped link holds connections (G7)")
        states = tuple(one.state for one in facts)
        found += self._once((engine.state, states), lambda: self._unready(engine.state, states))
        return found

    def _unready(self, state: EngineState, peers: tuple[PeerState, ...]) -> list[str]:
        """Compare what health says with what is promised; it depends on states alone."""
        engine = self._health
        engine._driver.machine._core.state = str(state)
        links = list(engine._links.values())
        for link, peer in zip(links, peers, strict=True):
            link.driver.machine._core.state = str(peer)
        health = engine.health_check()
        up = [
            str(peer)
            for link, peer in zip(links, peers, strict=True)
            if "Running" in link.driver.machine.table.groups_of(peer)
        ]
        ready = state is EngineState.RUNNING and (bool(up) or not peers)
        found = []
        if health.ready != ready:
            found.append(f"health says ready={health.ready} with {state} and {up} connected")
        if (health.peers_connected, health.peers_total) != (len(up), len(peers)):
            found.append(f"health counts {health.peers_connected} connected peers, not {len(up)}")
        return found

    def rests(self, at: Combined) -> bool:
        """Say whether all is as it was asked to be, and nobody waits for anything."""
        number, links, _ = at
        engine = self.engines.things[number]
        if engine.state in (EngineState.STOPPED, EngineState.FAILED, EngineState.CREATED):
            return not engine.mail
        if engine.state is not EngineState.RUNNING or engine.mail:
            return False
        return all(self.facts[link].rests for link in links)


def _facts_of(at: LinkState) -> _Facts:
    tailer = next((job for job in at.jobs if job.name == "tailer"), None)
    works = tailer is not None and not tailer.asked and tailer.phase is Phase.WORKS
    return _Facts(
        state=at.state,
        reasons=frozenset(at.reasons),
        holds_slot=tailer is not None and tailer.slot,
        calls_store=works and bool(at.mode) and Mode[at.mode] in CALLS_STORE,
        ended=at.state is PeerState.STOPPED and all(is_over(job) for job in at.jobs),
        rests=_rests(at, works=works),
        holds_lines=at.lines or any(letter.payload == "lines" for letter in at.mail),
    )


def _rests(at: LinkState, *, works: bool) -> bool:
    if any(letter.scope for letter in at.mail):
        return False
    if at.state is PeerState.PAUSED:
        return works and bool(OPERATORS & set(at.reasons))
    if at.state in (PeerState.TAILING, PeerState.STANDBY):
        return works
    return at.state is PeerState.FAILED
