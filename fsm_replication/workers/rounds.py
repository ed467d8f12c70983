"""Sees to it that a link's rounds make progress, or wait (G12).

A *round* is one decision, one copy or one read. It made progress where an entry was settled that
had not been settled before, or an item was fetched; it waited where it took a second, or as long as
a blocking read may. A link needs a few rounds that do neither, to get from connecting to the head.
Whatever goes on like that, though, is a peer that contradicts itself, a store that changes its mind,
or a defect of ours: then each round begins later after the one before, twice as long each time, up
to a second. What somebody asked for, an operator or a change of settings, is no such round.
"""

from __future__ import annotations

from typing import Final

from fsm_replication.ports import Clock
from fsm_replication.workers.context import LinkProgress

__all__ = ("FREE_ROUNDS", "Rounds")

FREE_ROUNDS: Final = 12
FIRST_WAIT_SEC: Final = 0.01
# A round at least this long counts as having waited, or one with this share of ``block_timeout``: the
# share allows for imprecise timers.
WAITED_SEC: Final = 1.0
WAITED_SHARE: Final = 0.9


class Rounds:
    """Counts the rounds of one connection that have come to nothing."""

    def __init__(self, clock: Clock, progress: LinkProgress) -> None:
        self._clock = clock
        self._progress = progress
        self._advances = progress.advances
        self._began = clock.monotonic()
        self._vain = 0
        self.delays = 0
        """How many rounds in a row had to wait by now."""

    def forgive(self) -> None:
        """Count anew: somebody asked for the round that comes."""
        self._vain = self.delays = 0

    def begin(self, longest_sec: float) -> float:
        """Begin a round; returns the seconds to wait first, at most a second or ``longest_sec``."""
        now = self._clock.monotonic()
        # A wait may have been cut short; then this round begins before the last one should have.
        took, self._began = max(0.0, now - self._began), now
        waited = took >= min(WAITED_SEC, longest_sec * WAITED_SHARE)
        if waited or self._advances != self._progress.advances:
            self._advances = self._progress.advances
            self._vain = self.delays = 0
            return 0.0
        self._vain += 1
        doublings = self._vain - FREE_ROUNDS - 1
        if doublings < 0:
            return 0.0
        self.delays += 1
        wait = min(longest_sec, WAITED_SEC, FIRST_WAIT_SEC * 2.0 ** min(doublings, 30))
        self._began += max(0.0, wait - took)
        return max(0.0, wait - took)
