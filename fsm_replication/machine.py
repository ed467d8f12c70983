"""Runs a table on ``transitions``: the only module that knows that library.

The plain synchronous Machine is used, with flat states: a move is atomic on the event loop and
cannot be cancelled half-way. Automatic transitions are off (they would add a way from every state
to every other that no diagram shows), invalid triggers raise, guards are pure, and effects run
after the state has been written and journalled.

The library tells each callback and each state in a log line of level INFO. Our moves are told by
whoever drives the machine, with their reasons, and a host must not have to silence the logger of
somebody else for them: so the two methods that log are overridden here, and nothing is configured.
At DEBUG it still tells its steps, under the machine's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from transitions import EventData, State
from transitions import Machine as TransitionsMachine

from fsm_replication.errors import InvalidStateError
from fsm_replication.reports import Ticket
from fsm_replication.tables import Table, TableError

__all__ = ("Machine", "Move")


@dataclass(frozen=True, slots=True)
class Move:
    """What an effect is told about the move it belongs to."""

    trigger: str
    source: StrEnum
    dest: StrEnum
    why: str = ""
    payload: object = None


class _QuietState(State):
    """A state of ``transitions`` without callbacks of its own: there is nothing to run or tell."""

    def enter(self, event_data: EventData) -> None:
        """Do nothing: what a move does stands in its row."""

    def exit(self, event_data: EventData) -> None:
        """Do nothing, as above."""


class _QuietMachine(TransitionsMachine):
    """A machine of ``transitions`` that does not tell each callback."""

    state_cls = _QuietState

    def callbacks(
        self, funcs: Iterable[str | Callable[..., bool | None]], event_data: EventData
    ) -> None:
        """Run callbacks in their order."""
        for func in funcs:
            self.callback(func, event_data)


class _Core:
    """The object whose ``state`` the library writes; it has nothing that could be shadowed."""

    state: str


class Machine:
    """One running instance of a table.

    ``model`` provides the guards and effects by name: a guard is a method without arguments that
    returns a bool, an effect takes the :class:`Move`. ``on_move`` is called once per move, before
    its effects, ``on_done`` after them; ``on_leave`` with the scope (state or group) that is over.
    """

    def __init__(
        self,
        table: Table,
        model: object,
        *,
        name: str,
        on_move: Callable[[Move], None],
        on_leave: Callable[[Ticket], None],
        on_done: Callable[[Move], None] = lambda _move: None,
    ) -> None:
        self.table = table
        self.name = name
        self._on_move = on_move
        self._on_leave = on_leave
        self._on_done = on_done
        self._entries: dict[str, int] = {}
        self._count = 0
        self._core = _Core()
        self._guards = {guard: self._method(model, guard) for guard in table.guards}
        self._effects = {effect: self._method(model, effect) for effect in table.effects}
        self._machine = _QuietMachine(
            model=self._core,
            name=name,
            states=[str(state) for state in table.states],
            initial=str(table.initial),
            transitions=self._transitions(),
            auto_transitions=False,
            ignore_invalid_triggers=False,
            send_event=True,
        )
        self._enter(table.initial, frozenset())

    def _method(self, model: object, name: str) -> Callable[..., Any]:
        method = getattr(model, name, None)
        if not callable(method):
            raise TableError(f"{self.table.name}: {type(model).__name__} has no {name}()")
        found: Callable[..., Any] = method
        return found

    def _transitions(self) -> list[dict[str, Any]]:
        return [
            {
                "trigger": row.trigger,
                "source": str(source),
                "dest": str(row.dest),
                "conditions": [self._guard(row.guard)] if row.guard else [],
                "after": [self._record, *map(self._effect, row.effects), self._conclude],
            }
            for row in self.table.rows
            for source in row.sources
        ]

    def _guard(self, name: str) -> Callable[[EventData], bool]:
        guard = self._guards[name]
        return lambda _event: bool(guard())

    def _effect(self, name: str) -> Callable[[EventData], None]:
        effect = self._effects[name]
        return lambda event: effect(event.kwargs["move"])

    # States and entries.

    @property
    def state(self) -> StrEnum:
        """The present state."""
        return self.table.states(self._core.state)

    def ticket(self, scope: str) -> Ticket:
        """Return the number of the present entry into ``scope``, a state or group.

        :raises KeyError: if the machine is not in it.
        """
        return Ticket(scope, self._entries[scope])

    def is_current(self, ticket: Ticket) -> bool:
        """Say whether the entry that this ticket belongs to still lasts."""
        return self._entries.get(ticket.scope) == ticket.entry

    def _enter(self, state: StrEnum, from_groups: frozenset[str]) -> None:
        self._count += 1
        self._entries[str(state)] = self._count
        for group in self.table.groups_of(state) - from_groups:
            self._entries[f"group:{group}"] = self._count

    def _leave(self, state: StrEnum, to_groups: frozenset[str]) -> None:
        scopes = [str(state)]
        scopes += [f"group:{group}" for group in self.table.groups_of(state) - to_groups]
        for scope in scopes:
            self._on_leave(Ticket(scope, self._entries.pop(scope)))

    # Moves.

    def fire(self, trigger: str, *, why: str = "", payload: object = None) -> bool:
        """Make the move that ``trigger`` means here; False if its guard refuses.

        An exception of an effect passes through; the new state stands.

        :raises InvalidStateError: if the present state has no such trigger; nothing changes.
        """
        source = self.state
        row = self.table.move(source, trigger)
        if row is None:
            raise InvalidStateError(
                machine=self.name,
                trigger=trigger,
                expected=" or ".join(self.table.sources(trigger)),
                actual=str(source),
                legal=self.table.legal(source),
            )
        move = Move(trigger, source, row.dest, why, payload)
        return bool(self._machine.events[trigger].trigger(self._core, move=move))

    def _record(self, event: EventData) -> None:
        move: Move = event.kwargs["move"]
        if move.source != move.dest:
            groups = self.table.groups_of(move.dest)
            self._leave(move.source, groups)
            self._enter(move.dest, self.table.groups_of(move.source))
        self._on_move(move)

    def _conclude(self, event: EventData) -> None:
        self._on_done(event.kwargs["move"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} in {self.state}>"
