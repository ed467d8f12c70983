"""Breadth first through all combined states, and back from those at rest.

The search stops at the first fault, so that its trace is a shortest one. Then it looks, over the
cooperative steps alone, from which states a state at rest can be reached: a run that is fair to
every such step comes to rest from there, and from any other it never does.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from fsm_replication.testing.model_check.product import (
    Combined,
    Move,
    Product,
    Scope,
    Taken,
)

__all__ = ("Result", "Violation", "explore")


@dataclass(frozen=True, slots=True)
class Violation:
    """What does not hold, and the shortest way there: a start, and the moves from it."""

    what: str
    start: Combined
    trace: tuple[Move, ...]


@dataclass(slots=True)
class Result:
    """What a search has come to; ``reached`` are the combinations of states of the machines."""

    scope: Scope
    product: Product
    states: int = 0
    moves: int = 0
    resting: int = 0
    depth: int = 0
    took_sec: float = 0.0
    violation: Violation | None = None
    taken: set[Taken] = field(default_factory=set)
    reached: list[Combined] = field(default_factory=list)


def _ordered(at: Combined) -> Combined:
    """Return the one of two states that differ in the names of links only."""
    engine, links, circuits = at
    if len(links) < 2 or links[0] <= links[1]:
        return at
    return engine, links[::-1], circuits


class _Search:
    def __init__(self, scope: Scope) -> None:
        self.product = Product(scope)
        self.numbers: dict[Combined, int] = {}
        self.states: list[Combined] = []
        self.parents = array("l")
        self.levels = array("l")
        # The cooperative steps: those of state n are helpful[begins[n] : begins[n + 1]].
        self.helpful = array("l")
        self.begins = array("l", [0])
        self.result = Result(scope, self.product)

    def run(self) -> Result:
        began = time.perf_counter()
        found = self._forward() or self._waits_for_ever()
        result = self.result
        if found is not None:
            number, what, last = found
            result.violation = Violation(what, self.states[0], self._trace(number, last))
        result.states = len(self.states)
        result.reached = self.states
        result.depth = self.levels[-1]
        result.taken = self.product.taken
        result.took_sec = time.perf_counter() - began
        return result

    def _forward(self) -> tuple[int, str, Move | None] | None:
        self._add(self.product.initial, -1)
        at = 0
        while at < len(self.states):
            for move in self.product.moves(self.states[at]):
                _, cooperative, after, faults = move
                self.result.moves += 1
                if faults:
                    return at, faults[0], move
                after = _ordered(after)
                number = self.numbers.get(after)
                if number is None:
                    number = self._add(after, at)
                    wrong = self.product.faults(after)
                    if wrong:
                        return at, wrong[0], move
                if cooperative:
                    self.helpful.append(number)
            self.begins.append(len(self.helpful))
            at += 1
        return None

    def _add(self, state: Combined, parent: int) -> int:
        number = self.numbers[state] = len(self.states)
        self.states.append(state)
        self.parents.append(parent)
        self.levels.append(self.levels[parent] + 1 if parent >= 0 else 0)
        return number

    def _waits_for_ever(self) -> tuple[int, str, Move | None] | None:
        good = bytearray(len(self.states))
        for number, state in enumerate(self.states):
            if self.product.rests(state):
                good[number] = 1
        self.result.resting = sum(good)
        changed = True
        while changed:
            changed = False
            # The way to rest leads mostly to states that were found later.
            for number in range(len(good) - 1, -1, -1):
                if not good[number] and any(good[after] for after in self._helped(number)):
                    good[number] = changed = True
        stuck = good.find(0)
        if stuck < 0:
            return None
        return stuck, "from here nothing that the world may do leads to rest", None

    def _helped(self, number: int) -> array[int]:
        return self.helpful[self.begins[number] : self.begins[number + 1]]

    def _trace(self, number: int, last: Move | None) -> tuple[Move, ...]:
        way = []
        while number > 0:
            way.append(self.states[number])
            number = self.parents[number]
        moves = list(self._walk(way[::-1]))
        if last is not None:
            here = moves[-1].after if moves else self.states[0]
            moves.append(self._same(here, last))
        return tuple(moves)

    def _walk(self, way: list[Combined]) -> Iterator[Move]:
        """Yield moves along a way, with each link in its own place throughout."""
        here = self.states[0]
        for wanted in way:
            move = next(m for m in self.product.moves(here) if _ordered(m.after) == wanted)
            here = move.after
            yield move

    def _same(self, here: Combined, move: Move) -> Move:
        """Return the move that is another's equal with the links in the places of ``here``."""
        wanted = (_ordered(move.after), move.faults)
        return next(m for m in self.product.moves(here) if (_ordered(m.after), m.faults) == wanted)


def explore(scope: Scope) -> Result:
    """Search all of one combination of machines, or up to the first fault."""
    return _Search(scope).run()
