"""The tables as data, and the bare machines that run them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import pytest
from conftest import shortest_way
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.circuits import Circuit
from fsm_replication.diagram import render_all
from fsm_replication.errors import InvalidStateError
from fsm_replication.machine import Machine, Move
from fsm_replication.ports import SystemClock
from fsm_replication.reports import LinkFact, Ticket
from fsm_replication.tables import (
    CIRCUIT,
    ENGINE,
    LINK,
    TABLES,
    CircuitState,
    EngineState,
    PeerState,
    Reaction,
    Row,
    Table,
    TableError,
)
from fsm_replication.testing import strategies

RUN_TABLES = (ENGINE, LINK)
PAIRS = [(t, state, trigger) for t in RUN_TABLES for state in t.states for trigger in t.triggers]


class Model:
    """Has every guard and effect a table names; effects are noted, guards pass unless told."""

    def __init__(self, table: Table, refuse: frozenset[str] = frozenset()) -> None:
        self.called: list[str] = []
        for guard in table.guards:
            setattr(self, guard, self._guard(guard not in refuse))
        for effect in table.effects:
            setattr(self, effect, self._effect(effect))

    @staticmethod
    def _guard(answer: bool) -> Callable[[], bool]:
        return lambda: answer

    def _effect(self, name: str) -> Callable[[Move], None]:
        return lambda _move: self.called.append(name)


class Bare:
    """A machine with nothing around it, and the books of what it did."""

    def __init__(self, table: Table, refuse: frozenset[str] = frozenset()) -> None:
        self.model = Model(table, refuse)
        self.moves: list[Move] = []
        self.left: list[Ticket] = []
        self.machine = Machine(
            table,
            self.model,
            name=table.name,
            on_move=self.moves.append,
            on_leave=self.left.append,
        )

    def drive_to(self, state: StrEnum) -> None:
        """Walk the shortest way to a state."""
        table = self.machine.table
        for trigger in shortest_way(table, table.initial, state):
            assert self.machine.fire(trigger)
        assert self.machine.state == state
        self.moves.clear()
        self.left.clear()
        self.model.called.clear()


@pytest.mark.parametrize(
    ("table", "state", "trigger"), PAIRS, ids=[f"{t.name}-{s}-{g}" for t, s, g in PAIRS]
)
def test_every_trigger_in_every_state_does_what_the_table_says(
    table: Table, state: StrEnum, trigger: str
) -> None:
    """If this fails the running machine makes a move that no row allows, or refuses one."""
    bare = Bare(table)
    bare.drive_to(state)
    row = table.move(state, trigger)
    if row is None:
        with pytest.raises(InvalidStateError) as raised:
            bare.machine.fire(trigger)
        assert raised.value.actual == state
        assert raised.value.trigger == trigger
        assert raised.value.legal == table.legal(state)
        assert bare.machine.state == state
        assert not bare.moves
        assert not bare.model.called
    else:
        assert bare.machine.fire(trigger, why="because", payload=7)
        assert bare.machine.state == row.dest
        assert bare.moves == [Move(trigger, state, row.dest, "because", 7)]
        assert tuple(bare.model.called) == row.effects


@pytest.mark.parametrize("table", RUN_TABLES, ids=lambda t: t.name)
def test_a_refusing_guard_moves_nothing(table: Table) -> None:
    """If this fails a guard in a table is decoration."""
    for row in table.rows:
        if row.guard is None:
            continue
        bare = Bare(table, refuse=frozenset({row.guard}))
        bare.drive_to(row.sources[0])
        assert not bare.machine.fire(row.trigger)
        assert bare.machine.state == row.sources[0]
        assert not bare.moves


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_every_state_is_reachable_and_can_end(table: Table) -> None:
    """If this fails a state is dead, or a machine can be caught where it never ends."""
    assert table.reachable(table.initial) == frozenset(table.states)
    for state in table.states:
        if table.final:
            assert table.reachable(state) & table.final, state


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_rows_are_explained_and_self_loops_are_meant(table: Table) -> None:
    """If this fails a row has no reason, or leads back to its own state by mistake."""
    for row in table.rows:
        assert len(row.why) > 10, row.trigger
        for source in row.sources:
            assert source != row.dest or (table.name, row.trigger) == ("engine", "abort")


def test_the_tables_hold_exactly_the_specified_moves() -> None:
    """If this fails the tables have drifted from the specification of the machines."""
    engine = {
        (trigger, source, row.dest) for row in ENGINE.rows for source in row.sources
        for trigger in [row.trigger]
    }  # fmt: skip
    e = EngineState
    assert engine == {
        ("start", e.CREATED, e.CONNECTING),
        ("connected", e.CONNECTING, e.RUNNING),
        ("abort", e.CONNECTING, e.SHUTTING_DOWN),
        ("abort", e.RUNNING, e.SHUTTING_DOWN),
        ("abort", e.SHUTTING_DOWN, e.SHUTTING_DOWN),
        ("shutdown", e.CREATED, e.SHUTTING_DOWN),
        ("shutdown", e.CONNECTING, e.SHUTTING_DOWN),
        ("shutdown", e.RUNNING, e.SHUTTING_DOWN),
        ("stopped", e.SHUTTING_DOWN, e.STOPPED),
        ("failed", e.SHUTTING_DOWN, e.FAILED),
    }
    p = PeerState
    running = (p.RESUMING, p.BOOTSTRAPPING, p.CATCHING_UP, p.TAILING, p.STANDBY, p.PAUSED)
    expected = {
        "connect": ({p.CREATED, p.FAILED}, p.CONNECTING),
        "connected": ({p.CONNECTING}, p.RESUMING),
        "connect_failed": ({p.CONNECTING}, p.BACKOFF),
        "retry": ({p.BACKOFF}, p.CONNECTING),
        "bootstrap": ({p.RESUMING, p.CATCHING_UP, p.TAILING}, p.BOOTSTRAPPING),
        "catch_up": ({p.RESUMING, p.BOOTSTRAPPING, p.TAILING}, p.CATCHING_UP),
        "tail": ({p.RESUMING, p.BOOTSTRAPPING, p.CATCHING_UP}, p.TAILING),
        "stand_by": ({p.RESUMING}, p.STANDBY),
        "pause": (set(running) - {p.PAUSED}, p.PAUSED),
        "resume": ({p.PAUSED}, p.RESUMING),
        "reconfigured": ({p.BOOTSTRAPPING, p.CATCHING_UP, p.TAILING, p.STANDBY}, p.RESUMING),
        "connection_lost": (set(running), p.DISCONNECTING),
        "disconnected": ({p.DISCONNECTING}, p.BACKOFF),
        "give_up": ({p.CONNECTING, p.BACKOFF}, p.FAILED),
        "shutdown": (set(p) - {p.SHUTTING_DOWN, p.STOPPED}, p.SHUTTING_DOWN),
        "stopped": ({p.SHUTTING_DOWN}, p.STOPPED),
    }
    assert {row.trigger: (set(row.sources), row.dest) for row in LINK.rows} == expected
    assert {state for state in p if state.is_running} == set(running)


@given(st.data())
def test_any_sequence_of_triggers_walks_the_table(data: st.DataObject) -> None:
    """If this fails some history of legal and illegal triggers leaves the table."""
    table = data.draw(st.sampled_from(RUN_TABLES))
    bare = Bare(table)
    triggers = data.draw(strategies.triggers(table))
    state = table.initial
    for trigger in triggers:
        row = table.move(state, trigger)
        if row is None:
            with pytest.raises(InvalidStateError):
                bare.machine.fire(trigger)
        else:
            assert bare.machine.fire(trigger)
            state = row.dest
        assert bare.machine.state == state
    for before, after in itertools.pairwise(bare.moves):
        assert before.dest == after.source


@given(strategies.triggers(LINK))
def test_entries_are_numbered_anew_and_groups_last_across_their_states(
    triggers: list[str],
) -> None:
    """If this fails a report of an earlier entry could pass for one of the present."""
    bare = Bare(LINK)
    machine = bare.machine
    seen: set[Ticket] = set()
    for trigger in triggers:
        before = machine.state
        scopes = [str(before), *(f"group:{g}" for g in LINK.groups_of(before))]
        tickets = [machine.ticket(scope) for scope in scopes]
        try:
            machine.fire(trigger)
        except InvalidStateError:
            assert all(machine.is_current(ticket) for ticket in tickets)
            continue
        after = machine.state
        assert not machine.is_current(tickets[0])
        seen.add(tickets[0])
        assert machine.ticket(str(after)) not in seen
        for group_ticket in tickets[1:]:
            stays = "Running" in LINK.groups_of(after)
            assert machine.is_current(group_ticket) == stays
            assert (group_ticket in bare.left) == (not stays)


class _Toy(StrEnum):
    A = "A"
    B = "B"


def _toy(**changes: object) -> Table:
    row = Row("go", (_Toy.A,), _Toy.B, "to get there")
    parts: dict[str, object] = {
        "name": "toy",
        "states": _Toy,
        "initial": _Toy.A,
        "final": frozenset({_Toy.B}),
        "rows": (row,),
    }
    return Table(**(parts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"initial": PeerState.CREATED},
        {"final": frozenset({PeerState.STOPPED})},
        {"groups": {"G": frozenset({PeerState.STOPPED})}},
        {"groups": {"A": frozenset({_Toy.B})}},
        {"rows": (Row("go", (PeerState.CREATED,), _Toy.B, "unknown source"),)},
        {"rows": (Row("go", (_Toy.A,), PeerState.CREATED, "unknown dest"),)},
        {"rows": (Row("go", (_Toy.B,), _Toy.A, "leaves a final state"),)},
        {"rows": (Row("go", (_Toy.A, _Toy.A), _Toy.B, "twice"),)},
        {"reactions": (Reaction(LinkFact.DUE, (_Toy.A,), ("nowhere",)),)},
        {"reactions": (Reaction(LinkFact.DUE, (_Toy.A,), ("go",)),) * 2},
    ],
)
def test_a_table_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    """If this fails a misspelt name in a table is found in production."""
    assert _toy().reachable(_Toy.A) == {_Toy.A, _Toy.B}
    with pytest.raises(TableError):
        _toy(**changes)


def test_a_model_without_a_named_effect_is_refused() -> None:
    """If this fails a table may name an effect that does not exist."""
    with pytest.raises(TableError, match="object has no"):
        Machine(ENGINE, object(), name="x", on_move=print, on_leave=print)


def test_pybreaker_walks_the_circuit_table() -> None:
    """If this fails the circuit's diagram tells something else than pybreaker does."""
    walked: set[tuple[str, str]] = set()
    circuit = Circuit(
        "c",
        failures=2,
        reset_sec=0.0,
        successes=2,
        clock=SystemClock(),
        on_change=lambda _c, old, new: walked.add((old, new)),
    )

    def call(*, fail: bool) -> None:
        with circuit.guard():
            if fail:
                raise OSError("down")

    for fail in (True, True, True, False, False):
        if fail:
            with pytest.raises(OSError, match="down"):
                call(fail=True)
        else:
            call(fail=False)
    assert circuit.state is CircuitState.CLOSED
    assert walked == {(s, row.dest) for row in CIRCUIT.rows for s in row.sources}


def test_the_committed_diagrams_are_those_of_the_tables() -> None:
    """If this fails the diagrams for review are not what the code does: regenerate them."""
    folder = Path(__file__).parent.parent / "diagrams"
    committed = {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if p.is_file()}
    assert committed == render_all()
