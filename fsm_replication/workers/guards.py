"""What keeps replication from doing harm that cannot be undone.

The *stale guard* holds back old items that come from a peer we have not agreed with for longer than
tombstones are kept: what they are absent here for may be a delete that everybody has forgotten by now
(G5). What keeps a peer from deleting far too much is in ``interlock``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

from fsm_replication.items import DAY_MS, Stamp, is_key
from fsm_replication.ports import Agreement, Clock, StreamId, WallClock

__all__ = ("EXCEPTIONS_MAX", "KeyMemory", "StaleGuard")

PASS_OVER_SEC: Final = 3600.0
KEYS_KEPT: Final = 10_000
# Where more keys than this cannot be taken, a comparison is no agreement: something else is wrong.
EXCEPTIONS_MAX: Final = 1000


class StaleGuard:
    """Holds back old items of a peer we have not agreed with for longer than the ttl.

    Each key is judged by the last agreement that it was part of: that is the link's, or, where the
    key is one of its exceptions, an earlier one. A key that was never part of any is taken, as is
    everything on a link that never agreed.
    """

    def __init__(
        self,
        ttl_ms: int,
        wall_clock: WallClock,
        deletes_known_ms: Callable[[int], int | None] = lambda _now_ms: None,
    ) -> None:
        self._ttl_ms = ttl_ms
        self._wall_clock = wall_clock
        self._deletes_known_ms = deletes_known_ms
        self._agreement: Agreement | None = None
        # The oldest agreement that any key is judged by.
        self._oldest_ms: int | None = None
        self._held_back: OrderedDict[str, Stamp] = OrderedDict()
        self.count = 0

    @property
    def agreement(self) -> Agreement | None:
        """The last full agreement of this link, as far as it counts; None if it never agreed."""
        return self._agreement

    @property
    def agreed_at_ms(self) -> int | None:
        """When this link last agreed in full, as far as it counts; None if it never did."""
        return None if self._agreement is None else self._agreement.at_ms

    @property
    def exceptions(self) -> Mapping[str, int | None]:
        """The keys that the agreement leaves out, each with the time of the last that did not."""
        return {} if self._agreement is None else self._agreement.exceptions

    def agreed(self, agreement: Agreement | None) -> None:
        """Take over when the link last agreed; what was held back until then is settled."""
        self._agreement = agreement
        if agreement is None:
            self._oldest_ms = None
            return
        times = (at for at in agreement.exceptions.values() if at is not None)
        self._oldest_ms = min(times, default=agreement.at_ms)
        self._oldest_ms = min(self._oldest_ms, agreement.at_ms)
        if not self._is_old(agreement.at_ms):
            left = {key: at for key, at in self._held_back.items() if self.suspects(key)}
            self._held_back = OrderedDict(left)
            self.count = len(left)

    @property
    def agreed_up_to(self) -> StreamId | None:
        """Up to where the last agreement has seen what the peer's stream tells; None if not known."""
        head = None if self._agreement is None else self._agreement.head
        return None if head is None else head.stream_id

    def forget(self) -> None:
        """Be as on a link that never agreed: the local store is another one."""
        self.agreed(None)
        self._held_back.clear()
        self.count = 0

    def excepting(
        self, keys: Iterable[str], undeleted: Mapping[str, int]
    ) -> dict[str, int | None] | None:
        """Return the exceptions of an agreement on all but these keys; None if they are too many.

        Each keeps the time of the last agreement that it was part of. The peer still holds what is
        ``undeleted``, by key with the time of our delete, which may be forgotten before the peer has
        heard of it, and sooner than a ttl from now if we have heard of it late ourselves: such a key
        is judged by that time at the latest, also where it was never part of an agreement.
        """
        known, before = self.exceptions, self.agreed_at_ms
        # A name in a peer's tree that can be no key can never be taken, today or later.
        made = {key: known.get(key, before) for key in keys if is_key(key)}
        if len(made) > EXCEPTIONS_MAX:
            return None
        for key, deleted_ms in undeleted.items():
            dates = (known.get(key), before, deleted_ms)
            made[key] = min(at for at in dates if at is not None)
        return made if len(made) <= EXCEPTIONS_MAX + KEYS_KEPT else None

    def as_of(self, at_ms: int) -> Agreement | None:
        """Return the agreement as it counts where the peer's store is as it was at ``at_ms``.

        None where it counts as before.
        """
        agreement = self._agreement
        if agreement is None or at_ms >= agreement.at_ms:
            return None
        earlier = {
            key: None if at is None else min(at, at_ms) for key, at in agreement.exceptions.items()
        }
        return replace(agreement, at_ms=at_ms, exceptions=earlier)

    @property
    def floor_ms(self) -> int:
        """Items older than this may have been deleted by a tombstone nobody keeps any more."""
        # Where we agreed at a later time than our clock tells now, that is behind.
        now = max(self._wall_clock.now_ms(), self.agreed_at_ms or 0)
        known = self._deletes_known_ms(now)
        # A raised ttl brings back no tombstone that was forgotten by the old one.
        return now - (self._ttl_ms if known is None else min(known, self._ttl_ms))

    def _is_old(self, agreed_at_ms: int | None) -> bool:
        if agreed_at_ms is None:
            return False
        # Our clock was ahead then, or is behind now: how long ago that was cannot be told.
        is_dated_wrong = agreed_at_ms > self._wall_clock.now_ms() + min(DAY_MS, self._ttl_ms)
        return is_dated_wrong or agreed_at_ms < self.floor_ms

    @property
    def active(self) -> bool:
        """Whether old items of any key are held back."""
        return self._is_old(self._oldest_ms) or self._is_old(self.agreed_at_ms)

    def suspects(self, key: str) -> bool:
        """Say whether old items of this key are held back."""
        agreement = self._agreement
        if agreement is None:
            return False
        return self._is_old(agreement.exceptions.get(key, agreement.at_ms))

    def holds_back(self, key: str, theirs: Stamp, ours: Stamp | None) -> bool:
        """Say whether this item must not be taken without a person's word."""
        return (
            ours is None
            and not theirs.deleted
            and theirs.updated_at < self.floor_ms
            and self.suspects(key)
        )

    def is_spent(self, theirs: Stamp, ours: Stamp | None) -> bool:
        """Say whether this is a tombstone that expired, of a key that is absent here."""
        expired = theirs.updated_at <= self._wall_clock.now_ms() - self._ttl_ms
        return ours is None and theirs.deleted and expired

    def note(self, key: str, stamp: Stamp) -> None:
        """Remember an item that was held back, to be listed; the oldest of many are forgotten."""
        if key not in self._held_back:
            self.count += 1
        self._held_back[key] = stamp
        if len(self._held_back) > KEYS_KEPT:
            self._held_back.popitem(last=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are held back, as many as are remembered."""
        return tuple(self._held_back)


class KeyMemory:
    """Keys that could not be fetched, or were refused: passed over for an hour."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, keys: Iterable[str]) -> None:
        """Remember keys for an hour; the oldest of too many are forgotten."""
        until = self._clock.monotonic() + PASS_OVER_SEC
        for key in keys:
            self._until[key] = until
            self._until.move_to_end(key)
        while len(self._until) > KEYS_KEPT:
            self._until.popitem(last=False)

    def clear(self) -> None:
        """Forget all of them."""
        self._until.clear()

    def __contains__(self, key: str) -> bool:
        until = self._until.get(key)
        if until is None:
            return False
        if until <= self._clock.monotonic():
            del self._until[key]
            return False
        return True

    def __len__(self) -> int:
        return len(self._until)
