"""Sees that nothing spins, from what goes over the simulated lines and from nothing else.

A reader may ask a peer as often as it needs while it gets on: while it is given entries or items
that it did not have. Without that it has a budget, of flights and of commands, which time alone
fills up again. A worker that asks again and again without a pause soon has none left.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fsm_replication.errors import PeerReplyError
from fsm_replication.testing.sim_values import Status

__all__ = ("BrokenPromiseError", "Given", "Pace", "SpinWatch")

SHOWN_BYTES: Final = 200
REMEMBERED: Final = 100
READS_OF_ITEMS: Final = frozenset({b"GET", b"MGET", b"GETRANGE"})

# Ids of entries with their stream, and values of items with their key.
Given = set[tuple[bytes, bytes]]


class BrokenPromiseError(AssertionError):
    """A run in which something did not hold."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much one node may ask of one peer without getting on: at once, and each second.

    To connect takes some ten flights, and a cycle that compares trees no more; a flight may ask for
    a thousand items and more.
    """

    flights: float = 100.0
    flights_per_sec: float = 20.0
    commands: float = 20_000.0
    commands_per_sec: float = 2_000.0


@dataclass(slots=True)
class _Budget:
    """What one reader has spent with one peer, and what it was given."""

    at_sec: float
    began_sec: float
    flights: float = 0.0
    commands: float = 0.0
    # How many commands the last flight had.
    last: int = 0
    # Since it got on for the last time.
    flights_in_vain: int = 0
    commands_in_vain: int = 0
    sent: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    given: Given = field(default_factory=set)


class SpinWatch:
    """Watches what one node sends; ``fail`` is called once, when a budget is exceeded.

    ``peak`` is the most that was ever spent: flights and commands.
    """

    def __init__(
        self,
        reader: str,
        pace: Pace,
        *,
        now_sec: Callable[[], float],
        fail: Callable[[BrokenPromiseError], None],
    ) -> None:
        self.failed = False
        self.peak = (0.0, 0.0)
        self._reader = reader
        self._pace = pace
        self._now_sec = now_sec
        self._fail = fail
        self._budgets: dict[str, _Budget] = {}

    def connecting(self, peer: str) -> None:
        """Count an attempt to connect as one flight."""
        self._spend(peer, 0, "(connect)")

    def sending(self, peer: str, commands: Sequence[Sequence[bytes]]) -> None:
        """Count one flight."""
        self._spend(peer, len(commands), _show(commands))

    def _spend(self, peer: str, commands: int, what: str) -> None:
        now, pace = self._now_sec(), self._pace
        budget = self._budgets.setdefault(peer, _Budget(now, now))
        passed = now - budget.at_sec
        budget.at_sec = now
        budget.flights = max(0.0, budget.flights - passed * pace.flights_per_sec) + 1
        budget.commands = max(0.0, budget.commands - passed * pace.commands_per_sec) + commands
        budget.last = commands
        budget.flights_in_vain += 1
        budget.commands_in_vain += commands
        budget.sent.append(what)
        self.peak = (max(self.peak[0], budget.flights), max(self.peak[1], budget.commands))
        spun = budget.flights > pace.flights or budget.commands > pace.commands
        if spun and not self.failed:
            self.failed = True
            self._fail(BrokenPromiseError(self._tell(peer, budget)))

    def _tell(self, peer: str, budget: _Budget) -> str:
        often, times = Counter(budget.sent).most_common(1)[0]
        return (
            f"G12: {self._reader} spins on {peer}: {budget.flights_in_vain} flights with"
            f" {budget.commands_in_vain} commands in {budget.at_sec - budget.began_sec:g} s without"
            f" an entry or an item that it did not have. The last was {budget.sent[-1]}; of the"
            f" last {len(budget.sent)} flights {times} were {often}"
        )

    def replied(self, peer: str, command: Sequence[bytes], reply: Any, line: Given) -> None:
        """Look whether a reply lets the reader get on; it then has all of its budget again.

        ``line`` is what came over this line before. Who has lost its place reads again over a new
        one; what it had once costs nothing then, but gives nothing back either.
        """
        news = _news(command, reply)
        budget = self._budgets.get(peer)
        if budget is None or news <= line:
            return
        line |= news
        if news <= budget.given:
            budget.flights = max(0.0, budget.flights - 1)
            budget.commands = max(0.0, budget.commands - budget.last)
            return
        budget.given |= news
        budget.began_sec = self._now_sec()
        budget.flights = budget.commands = 0.0
        budget.flights_in_vain = budget.commands_in_vain = 0


def _news(command: Sequence[bytes], reply: Any) -> Given:
    name = command[0].upper()
    if reply is None or isinstance(reply, (PeerReplyError, Status)):
        return set()
    if name == b"XREAD":
        return {(key, entry[0]) for key, entries in reply for entry in entries}
    if name not in READS_OF_ITEMS:
        return set()
    keys = command[1:] if name == b"MGET" else [b" ".join(command[1:])]
    values = reply if name == b"MGET" else [reply]
    return {
        (key, value)
        for key, value in zip(keys, values, strict=True)
        if b"item:" in key and value is not None
    }


def _show(commands: Sequence[Sequence[bytes]]) -> str:
    shown = ", ".join(b" ".join(command).decode("utf-8", "replace") for command in commands)
    return shown if len(shown) <= SHOWN_BYTES else shown[:SHOWN_BYTES] + "..."
