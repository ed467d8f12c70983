"""What keeps replication from doing harm that cannot be undone.

The *interlock* counts live items that one peer's tombstones delete within an hour: a peer that
asks for far too many has probably lost its mind, and a person should look first. The *stale guard*
holds back old items that come from a peer we have not agreed with for longer than tombstones are
kept: what they are absent here for may be a delete that everybody has forgotten by now (G5).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Final

from fsm_replication.config import Settings
from fsm_replication.current import Current
from fsm_replication.items import Stamp
from fsm_replication.ports import Clock, WallClock

__all__ = ("Interlock", "KeyMemory", "StaleGuard")

WINDOW_SEC: Final = 3600.0
# How long a number of live items is taken for granted, so that deletes cost no call each.
KNOWN_SEC: Final = 60.0
KEYS_KEPT: Final = 10_000


class Interlock:
    """Counts the live items that one peer deleted within the last hour."""

    def __init__(self, settings: Current[Settings], clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._deleted: deque[tuple[float, int]] = deque()
        self._count = 0
        self._forgiven_until = 0.0
        # Live items within the last hour, those that were deleted since included; 0 if not known.
        self._live = 0
        self._known_until = 0.0

    def add(self, live_deleted: int) -> None:
        """Count live items that were deleted now."""
        if live_deleted:
            self._deleted.append((self._clock.monotonic(), live_deleted))
            self._count += live_deleted

    @property
    def count(self) -> int:
        """Live items deleted within the last hour."""
        begin = self._clock.monotonic() - WINDOW_SEC
        while self._deleted and self._deleted[0][0] <= begin:
            self._count -= self._deleted.popleft()[1]
        return self._count

    def may_trip(self, more: int) -> bool:
        """Say whether ``more`` deletes could be too many, as far as the live items are known."""
        now = self._clock.monotonic()
        if now < self._forgiven_until:
            return False
        if now > self._known_until:
            self._live = 0
        bounds = self._settings.value.repair
        return self.count + more > max(bounds.interlock_min, bounds.interlock_share * self._live)

    def learn(self, live: int | None) -> None:
        """Take in how many live items there are, for a minute; None where that is not known.

        What has been deleted within the hour was live too, and counts among all.
        """
        self._live = 0 if live is None else live + self.count
        self._known_until = self._clock.monotonic() + KNOWN_SEC

    def forgive(self) -> None:
        """Let everything through for an hour: a person has looked."""
        self._deleted.clear()
        self._count = 0
        self._forgiven_until = self._clock.monotonic() + WINDOW_SEC


class StaleGuard:
    """Holds back old items of a peer we have not agreed with for longer than the ttl."""

    def __init__(
        self,
        ttl_ms: int,
        wall_clock: WallClock,
        deletes_known_ms: Callable[[int], int | None] = lambda _now_ms: None,
    ) -> None:
        self._ttl_ms = ttl_ms
        self._wall_clock = wall_clock
        self._deletes_known_ms = deletes_known_ms
        self._agreed_at_ms: int | None = None
        self._held_back: OrderedDict[str, Stamp] = OrderedDict()
        self.count = 0

    @property
    def agreed_at_ms(self) -> int | None:
        """When this link last agreed in full, as far as it counts; None if it never did."""
        return self._agreed_at_ms

    def agreed(self, at_ms: int | None) -> None:
        """Take over when the link last agreed; what was held back until then is settled."""
        self._agreed_at_ms = at_ms
        if at_ms is not None and not self.active:
            self._held_back.clear()
            self.count = 0

    def peer_came_back(self, as_of_ms: int) -> None:
        """Note that the peer's store is as it was at ``as_of_ms``: no agreement is younger."""
        if self._agreed_at_ms is not None:
            self._agreed_at_ms = min(self._agreed_at_ms, as_of_ms)

    @property
    def floor_ms(self) -> int:
        """Items older than this may have been deleted by a tombstone nobody keeps any more."""
        now = self._wall_clock.now_ms()
        known = self._deletes_known_ms(now)
        # A raised ttl brings back no tombstone that was forgotten by the old one.
        return now - (self._ttl_ms if known is None else min(known, self._ttl_ms))

    @property
    def active(self) -> bool:
        """Whether old items are held back."""
        return self._agreed_at_ms is not None and self._agreed_at_ms < self.floor_ms

    def holds_back(self, theirs: Stamp, ours: Stamp | None) -> bool:
        """Say whether this item must not be taken without a person's word."""
        return (
            ours is None
            and not theirs.deleted
            and theirs.updated_at < self.floor_ms
            and self.active
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
        until = self._clock.monotonic() + WINDOW_SEC
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
