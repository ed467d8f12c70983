"""Sees what replication does to a simulated store, apart from anything that the engine believes.

A witness knows what its store ever held and when each write was made. It tells of a *revival* (G5): an
item taken from a peer although the store had once known a delete of it that was made later. And it
tells of *shrinking* (G14): replication made fewer of the live items than a person's word allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fsm_replication.items import Stamp, SyncItem
from fsm_replication.testing.spin_watch import BrokenPromiseError

__all__ = ("StoreWitness", "Writes")

# A person's word lasts an hour, and somewhat longer where it is only noticed later.
WORD_SEC: Final = 3600.0 + 300.0
# When each write was made, by key and stamp, in seconds of virtual time.
Writes = dict[tuple[str, Stamp], float]


class StoreWitness:
    """Watches one store; ``fail`` ends the run.

    ``allowance`` is how many live items all peers together may take away, None where that is not
    looked at. ``revivals`` is false where the clocks of a run say nothing about before and after.
    """

    def __init__(
        self,
        name: str,
        writes: Writes,
        *,
        now_sec: Callable[[], float],
        fail: Callable[[BrokenPromiseError], None],
        allowance: int | None = None,
        revivals: bool = True,
    ) -> None:
        self._name = name
        self._writes = writes
        self._now_sec = now_sec
        self._fail = fail
        self._allowance = allowance
        self._revivals = revivals
        self._deletes: dict[str, Stamp] = {}
        self._sum = self._highest = 0
        self._word_until = 0.0
        self._takes_what_is_old = False

    def forget(self) -> None:
        """Begin anew: the store is another, or as it once was."""
        self._deletes.clear()
        self._sum = self._highest = 0

    def word_on_deletes(self) -> None:
        """Note that a person let deletes through."""
        self._word_until = self._now_sec() + WORD_SEC

    def word_on_what_is_old(self) -> None:
        """Note that a person has items taken that may have been deleted long ago."""
        self._takes_what_is_old = True

    def begin_anew(self) -> None:
        """Go on from a mesh in which all agree; what a person said of old items is over."""
        self._deletes.clear()
        self._takes_what_is_old = False

    def wrote(self, item: SyncItem) -> None:
        """Take in a local write; a live one settles what was deleted before."""
        if item.deleted:
            self._deletes[item.key] = item.stamp
        else:
            self._deletes.pop(item.key, None)

    def took(self, item: SyncItem, held: SyncItem | None) -> None:
        """Take in what replication is about to keep, in place of what is held."""
        self._look_for_revival(item)
        was_alive = held is not None and not held.deleted
        self._sum += (not item.deleted) - was_alive
        if self._now_sec() < self._word_until or self._sum > self._highest:
            self._highest = self._sum
        elif self._allowance is not None and self._highest - self._sum > self._allowance:
            self._fail(
                BrokenPromiseError(
                    f"G14: {self._name} has lost {self._highest - self._sum} live items to its peers,"
                    f" of which {self._allowance} may go without a person's word; the last was"
                    f" {item.key}"
                )
            )

    def _look_for_revival(self, item: SyncItem) -> None:
        if item.deleted:
            known = self._deletes.get(item.key)
            if known is None or known < item.stamp:
                self._deletes[item.key] = item.stamp
            return
        deleted = self._deletes.pop(item.key, None)
        if deleted is None or not self._revivals or self._takes_what_is_old:
            return
        made, gone = self._writes.get((item.key, item.stamp)), self._writes.get((item.key, deleted))
        if item.stamp < deleted and made is not None and gone is not None and made < gone:
            self._fail(
                BrokenPromiseError(
                    f"G5: {self._name} takes {item.key} as written at {made:g} s, which was deleted"
                    f" at {gone:g} s and known here to be"
                )
            )
