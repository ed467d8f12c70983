"""The form of a table: plain data from which the machine, the diagrams and the tests are made.

A table says everything about legality and nothing about how work is done. Names are checked when
it is built, so a misspelt state fails at import, not in production.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fsm_replication.reports import Fact

__all__ = ("Reaction", "Row", "Table", "TableError")


class TableError(Exception):
    """A table contradicts itself; raised when the module that declares it is imported."""


@dataclass(frozen=True, slots=True)
class Row:
    """From each of ``sources``, ``trigger`` leads to ``dest`` if ``guard`` holds.

    ``effects`` name methods of the model, called in order after the move; they start workers or
    ask them to stop, and return. ``why`` is for the reader.
    """

    trigger: str
    sources: tuple[StrEnum, ...]
    dest: StrEnum
    why: str
    guard: str | None = None
    effects: tuple[str, ...] = ()

    def label(self) -> str:
        """Return ``trigger [guard] / effect, effect`` as it stands on the arrow."""
        text = self.trigger
        if self.guard:
            text += f" [{self.guard}]"
        if self.effects:
            text += f" / {', '.join(self.effects)}"
        return text


@dataclass(frozen=True, slots=True)
class Reaction:
    """What a reported fact means: in each of ``states`` the first of ``triggers`` that may move.

    In any other state the fact moves nothing.
    """

    fact: Fact
    states: tuple[StrEnum, ...]
    triggers: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One machine, whole.

    ``groups`` are named sets of states; entering one from outside and leaving it are events that
    ownership can be tied to, just as with a state.
    """

    name: str
    states: type[StrEnum]
    initial: StrEnum
    final: frozenset[StrEnum]
    rows: tuple[Row, ...]
    reactions: tuple[Reaction, ...] = ()
    groups: Mapping[str, frozenset[StrEnum]] = field(default_factory=dict)
    _moves: dict[tuple[StrEnum, str], Row] = field(init=False, repr=False, default_factory=dict)
    _meanings: dict[tuple[Fact, StrEnum], tuple[str, ...]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._check_states()
        for row in self.rows:
            for source in row.sources:
                self._add_move(source, row)
        for reaction in self.reactions:
            for state in reaction.states:
                self._add_meaning(state, reaction)

    def _check_states(self) -> None:
        known = set(self.states)
        named: dict[str, Iterable[StrEnum]] = {"initial": [self.initial], "final": self.final}
        named |= {f"group {name}": members for name, members in self.groups.items()}
        named |= {f"row {r.trigger}": (*r.sources, r.dest) for r in self.rows}
        named |= {f"reaction {r.fact}": r.states for r in self.reactions}
        for name in self.groups:
            if name in known:
                raise TableError(f"{self.name}: {name} is a group and a state")
        for place, states in named.items():
            for state in states:
                if state not in known:
                    raise TableError(f"{self.name}: {place} names no state of it: {state!r}")

    def _add_move(self, source: StrEnum, row: Row) -> None:
        key = (source, row.trigger)
        if source in self.final:
            raise TableError(f"{self.name}: {row.trigger} leaves the final state {source}")
        if key in self._moves:
            raise TableError(f"{self.name}: two rows for {row.trigger} in {source}")
        self._moves[key] = row

    def _add_meaning(self, state: StrEnum, reaction: Reaction) -> None:
        key = (reaction.fact, state)
        if key in self._meanings:
            raise TableError(f"{self.name}: {reaction.fact} means two things in {state}")
        for trigger in reaction.triggers:
            if (state, trigger) not in self._moves:
                raise TableError(f"{self.name}: {reaction.fact} in {state}: {trigger} is illegal")
        self._meanings[key] = reaction.triggers

    # What a table is asked.

    @property
    def triggers(self) -> tuple[str, ...]:
        """Every trigger, in the order of the rows."""
        return tuple(dict.fromkeys(row.trigger for row in self.rows))

    @property
    def guards(self) -> frozenset[str]:
        """The names of all guards."""
        return frozenset(row.guard for row in self.rows if row.guard)

    @property
    def effects(self) -> frozenset[str]:
        """The names of all effects."""
        return frozenset(effect for row in self.rows for effect in row.effects)

    def move(self, state: StrEnum, trigger: str) -> Row | None:
        """Return the row for ``trigger`` in ``state``, or None where it is illegal."""
        return self._moves.get((state, trigger))

    def legal(self, state: StrEnum) -> tuple[str, ...]:
        """Return the triggers that ``state`` allows, guards left aside."""
        return tuple(trigger for trigger in self.triggers if (state, trigger) in self._moves)

    def sources(self, trigger: str) -> tuple[StrEnum, ...]:
        """Return the states in which ``trigger`` is legal."""
        return tuple(state for state in self.states if (state, trigger) in self._moves)

    def meaning(self, fact: Fact, state: StrEnum) -> tuple[str, ...]:
        """Return the triggers a fact means in ``state``; empty where it means nothing."""
        return self._meanings.get((fact, state), ())

    def groups_of(self, state: StrEnum) -> frozenset[str]:
        """Return the names of the groups that hold ``state``."""
        return frozenset(name for name, members in self.groups.items() if state in members)

    def reachable(self, state: StrEnum) -> frozenset[StrEnum]:
        """Return all states that some sequence of triggers leads to, ``state`` itself included."""
        seen = {state}
        todo = [state]
        while todo:
            here = todo.pop()
            for trigger in self.legal(here):
                dest = self._moves[here, trigger].dest
                if dest not in seen:
                    seen.add(dest)
                    todo.append(dest)
        return frozenset(seen)
