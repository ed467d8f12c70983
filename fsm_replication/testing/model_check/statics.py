"""Each table by itself: a graph, and the names in it that code must know."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fsm_replication
from fsm_replication.reports import EngineFact, Fact, LinkFact
from fsm_replication.tables import Table

__all__ = ("SELF_LOOPS", "TableReport", "check_table", "requested_triggers")

SELF_LOOPS: Final = {
    ("engine", "abort", "ShuttingDown"): "a later error is taken note of; the first one is kept",
}
"""The only moves from a state to itself, and what each is for."""

_REQUESTS: Final = ("request", "request_if_legal")
_FACTS: Final[dict[str, type[Fact]]] = {"engine": EngineFact, "link": LinkFact}


@dataclass(frozen=True, slots=True)
class TableReport:
    """What is said of one table: its size, and what is wrong with it."""

    name: str
    states: int
    moves: int
    triggers: int
    faults: tuple[str, ...]


def requested_triggers(folder: Path | None = None) -> frozenset[str]:
    """Return every trigger that some call in the library's code asks a driver for by name."""
    root = folder or Path(fsm_replication.__file__).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        if "testing" in path.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _REQUESTS
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(str(node.args[0].value))
    return frozenset(found)


def check_table(
    table: Table, model: type | None, requested: frozenset[str] = frozenset()
) -> TableReport:
    """Check one table; ``model`` is the class that has its guards and effects.

    Without a ``model`` the table is run by somebody else, and only its graph is looked at.
    """
    faults = [*_graph_faults(table)]
    if model is not None:
        faults += _name_faults(table, model)
        faults += _use_faults(table, requested)
    moves = sum(len(row.sources) for row in table.rows)
    return TableReport(table.name, len(table.states), moves, len(table.triggers), tuple(faults))


def _graph_faults(table: Table) -> Iterator[str]:
    reached = table.reachable(table.initial)
    for state in table.states:
        if state not in reached:
            yield f"{state} cannot be reached"
        if table.final and not table.reachable(state) & table.final:
            yield f"{state} leads to no final state"
        if not table.legal(state) and state not in table.final:
            yield f"{state} is not final and has no way out"
    for row in table.rows:
        for source in row.sources:
            if source == row.dest and (table.name, row.trigger, str(source)) not in SELF_LOOPS:
                yield f"{row.trigger} leads from {source} to itself, and nobody says what for"


def _name_faults(table: Table, model: type) -> Iterator[str]:
    for kind, names, parameters in (("guard", table.guards, 1), ("effect", table.effects, 2)):
        for name in sorted(names):
            method = inspect.getattr_static(model, name, None)
            if not inspect.isfunction(method):
                yield f"{model.__name__} has no {kind} {name}()"
            elif len(inspect.signature(method).parameters) != parameters:
                yield f"{model.__name__}.{name}() does not take what a {kind} is given"
            elif inspect.iscoroutinefunction(method):
                yield f"{model.__name__}.{name}() is a coroutine: nobody waits inside a move"


def _use_faults(table: Table, requested: frozenset[str]) -> Iterator[str]:
    meant = {trigger for reaction in table.reactions for trigger in reaction.triggers}
    for trigger in table.triggers:
        if trigger not in meant | requested:
            yield f"{trigger} is meant by no fact and requested by no caller"
    yield from _fact_faults(table, {reaction.fact for reaction in table.reactions})


def _fact_faults(table: Table, known: Iterable[Fact]) -> Iterator[str]:
    for fact in _FACTS.get(table.name, ()):
        if fact not in known:
            yield f"the fact {fact} means nothing in any state"
