"""What workers may say.

A worker reports a *fact*; it never asks for a move and does not know that a machine exists. The
driver of the machine that owns it looks up, in the machine's table, which trigger the fact means
in the present state. A report carries the :class:`Ticket` of the state or group entry that
started its sender, so that one which arrives after that entry is over can be told apart and
dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

__all__ = ("EngineFact", "Fact", "LinkFact", "PauseReason", "Report", "Reporter", "Ticket")


class EngineFact(StrEnum):
    """What the engine's workers report."""

    READY = "ready"
    """Enough peers are up to run."""
    BROKEN = "broken"
    """Something that cannot be mended; the payload is the error."""
    DRAINED = "drained"
    """Everything has ended and cursors are on disk; the payload is an error or None."""


class LinkFact(StrEnum):
    """What a peer link's workers report."""

    CONNECTED = "connected"
    """Both connections stand and the peer's marker was accepted; the payload holds them."""
    UNREACHABLE = "unreachable"
    """The attempt to connect failed, but may succeed later; the payload is the error."""
    HOPELESS = "hopeless"
    """Waiting cannot mend it; the payload is the error."""
    DUE = "due"
    """The wait before the next attempt is over."""
    MUST_COPY = "must_copy"
    """The stream alone cannot bring this store up to date."""
    BEHIND = "behind"
    """So much is unread that it should be read in bulk."""
    AT_HEAD = "at_head"
    """All that the stream holds was read and handed over."""
    NO_HOT_PATH = "no_hot_path"
    """The hot path is switched off."""
    BLOCKED = "blocked"
    """Something keeps batches from being applied; the payload is a PauseReason."""
    CLEARED = "cleared"
    """A reason to pause has gone; the payload is the PauseReason."""
    OUTDATED = "outdated"
    """What the last decision rests on is configured otherwise by now."""
    MOVED = "moved"
    """The way to the peer is configured otherwise: its URL, its prefix, who may be read."""
    LOST = "lost"
    """A connection is gone; the payload is the error."""
    ENDED = "ended"
    """The last worker of the states left behind has ended."""


Fact = EngineFact | LinkFact


class PauseReason(StrEnum):
    """Why a link is paused; several may hold at once."""

    OPERATOR = "operator"
    BACKPRESSURE = "backpressure"
    CIRCUIT = "circuit"
    INTERLOCK = "interlock"
    DEAD_LETTERS_FULL = "dead letters full"
    CLOCK = "clock"


class Ticket(NamedTuple):
    """The number of one entry into a state or group; issued by the machine."""

    scope: str
    entry: int


@dataclass(frozen=True, slots=True)
class Report:
    """One fact, from ``sender``, valid as long as the entry of its ticket lasts."""

    sender: str
    fact: Fact
    ticket: Ticket
    why: str = ""
    payload: object = None


class Reporter(Protocol):
    """The callable that a worker is given: it returns at once and never raises."""

    def __call__(self, fact: Fact, why: str = "", payload: object = None) -> None:
        """Hand a fact to the driver."""
