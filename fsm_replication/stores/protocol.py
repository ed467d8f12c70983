"""The store protocol: what replication needs from a node's own store, and what its readers do.

It has two parts. :class:`SyncEngine` is needed: five bulk calls, and single forms that are
conveniences over them. A store decides by order tuple what is newer, keeps tombstones, and answers
per item; it may be called by several tasks at once and must then still compare and set atomically
per item. :class:`Publisher` is for a store that others read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, runtime_checkable

from fsm_replication.errors import StoreError
from fsm_replication.items import LastWriterWins, Resolver, Stamp, SyncItem
from fsm_replication.layout import Keys
from fsm_replication.merkle import Tree
from fsm_replication.ports import Position
from fsm_replication.stream import WireForm

__all__ = ("ApplyResult", "Outcome", "Publisher", "Received", "SyncEngine", "WireForm")


class Outcome(IntEnum):
    """What became of one item that was handed to a store."""

    APPLIED = 0
    """It is newer than what was held, and is held now."""
    SUPERSEDED = 1
    """Something at least as new was held already."""
    REFUSED = 2
    """The store will never take it: it becomes a dead letter."""
    FAILED = 3
    """It could not be stored now: it is tried again."""


@dataclass(frozen=True, slots=True)
class Received:
    """Where changes came from.

    ``peer_id`` is "" where they are no part of a peer's stream or of a copy of all its items: they
    were repaired, or tried again. ``position`` is the peer's stream position that is settled once all
    of them are; a durable store keeps it in the same transaction, and keeps nothing of it if any item
    failed. ``wire``, where given, is aligned with the changes; None in it means the item must be
    encoded. ``encoded`` is what the store's own ``encode`` has made of the changes. ``incarnation``,
    where given, is that of the store they are meant for; one that has become another since takes
    nothing, and raises StoreReopenedError.
    """

    peer_id: str
    position: Position | None = None
    wire: Sequence[WireForm | None] | None = None
    encoded: object = None
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """One outcome per change, in order.

    ``reasons`` tells, by index, why a change was refused or failed. ``live_deleted`` counts the
    live items that tombstones among the changes replaced, ``live_added`` the keys that held a
    tombstone or nothing and hold a live item now; both count each time, where keys repeat. None is
    "not told": then every tombstone that was applied counts as a live item deleted, and none as added,
    so ordinary deletes may trip the interlock sooner than they should.
    """

    outcomes: Sequence[Outcome]
    reasons: Mapping[int, str] = field(default_factory=dict)
    live_deleted: int | None = None
    live_added: int | None = None

    @property
    def applied(self) -> int:
        """How many changes are held now and were not before."""
        return self.outcomes.count(Outcome.APPLIED)

    @property
    def superseded(self) -> int:
        """How many changes were not newer than what is held."""
        return self.outcomes.count(Outcome.SUPERSEDED)

    @property
    def refused(self) -> int:
        """How many changes the store will never take."""
        return self.outcomes.count(Outcome.REFUSED)

    @property
    def failed(self) -> int:
        """How many changes should be tried again."""
        return self.outcomes.count(Outcome.FAILED)


class SyncEngine(ABC):
    """A node's own store, as replication sees it."""

    node_id: str = ""
    """The node it was opened for; an engine of another node refuses it. "" fits any."""

    @property
    def resolver(self) -> Resolver:
        """How two live items of one key become one; the same at every node of a mesh."""
        return LastWriterWins()

    @abstractmethod
    async def incarnation(self) -> str:
        """Return a name of this store's content: it changes when the store starts empty again."""

    async def ping(self) -> None:
        """Return if the store can be reached, and raise anything if it cannot.

        Called every few seconds while nothing else is, so it should be cheap and change nothing:
        one round trip. Here it asks for the incarnation.
        """
        await self.incarnation()

    @abstractmethod
    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Compare each change with what is held, by order tuple, and keep the newer.

        Idempotent. The keys of one call may repeat. An exception means that any part of it may
        have been applied; the caller will hand in all of it again.
        """

    def encode(self, changes: Sequence[SyncItem], wire: Sequence[WireForm | None]) -> object:
        """Do what of applying these changes needs no I/O; None, as here, if there is nothing.

        Called while the batch before is on its way; what it returns comes back to ``apply_many`` as
        ``received.encoded``, with the same changes.
        """
        return None

    @abstractmethod
    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what is held for each key, tombstones included, None where nothing is."""

    @abstractmethod
    async def stamps(self, keys: Sequence[str]) -> list[Stamp | None]:
        """Return the order tuple held for each key, tombstones included."""

    @abstractmethod
    async def applied_position(self, peer_id: str) -> Position | None:
        """Return the position stored with the last batch from this peer, if the store keeps it.

        A store that does says so with ``keeps_positions``: None then means that it never had what
        the peer's cursor tells of, or came back from before it had, and the peer is copied.
        """

    @property
    def keeps_positions(self) -> bool:
        """Whether positions are stored in one step with the batches that they belong to."""
        return False

    @property
    def tree(self) -> Tree | None:
        """The tree of what is held, tombstones included until they expire; None without one.

        A store without a tree is repaired and bootstrapped all the same; only must every key be
        compared then, where otherwise equal parts are passed over.
        """
        return None

    async def live_items(self) -> int | None:
        """Return how many live items are held, None where that is not known at once.

        The interlock allows a share of them to be deleted within an hour; where the number is not
        known, ``repair.interlock_min`` deletes are all that one peer is allowed.
        """
        return None

    def deletes_known_ms(self, now_ms: int) -> int | None:
        """Return for how long before ``now_ms`` the store knows every delete; None: for its whole ttl.

        That is less for a while after ``tombstones.ttl`` was raised: what had been forgotten by then
        stays forgotten, and old items of a peer are held back accordingly (G5). Without I/O.
        """
        return None

    def should_accept_writes(self) -> bool:
        """Say without I/O whether replication may write now; False pauses the links."""
        return True

    # Conveniences over the bulk calls.

    async def submit(self, item: SyncItem) -> bool:
        """Apply one item; returns whether it was newer than what was held.

        :raises StoreError: if the store refused it or could not store it.
        """
        result = await self.apply_many([item])
        if result.outcomes[0] in (Outcome.REFUSED, Outcome.FAILED):
            raise StoreError(f"{item.key!r} was not stored: {result.reasons.get(0, 'no reason')}")
        return result.outcomes[0] is Outcome.APPLIED

    async def delete_replicated(self, tombstone: SyncItem) -> bool:
        """Apply one delete that another node made; returns whether it was newer.

        :raises ValueError: if the item is not a tombstone.
        """
        if not tombstone.deleted:
            raise ValueError(f"{tombstone.key!r} is not a tombstone")
        return await self.submit(tombstone)

    async def is_current(self, key: str, stamp: Stamp) -> bool:
        """Say whether what is held is at least as new as ``stamp``."""
        held = (await self.stamps([key]))[0]
        return held is not None and held >= stamp

    async def get(self, key: str) -> SyncItem | None:
        """Return the live item, or None where there is none or only a tombstone."""
        item = (await self.get_many([key]))[0]
        return None if item is None or item.deleted else item


@runtime_checkable
class Publisher(Protocol):
    """Keeps what others read of a node: stream, items and tree in the node's Redis.

    ``RedisSyncEngine`` is store and publisher in one; a store on another database leaves it to an
    ``OutboxPublisher``.
    """

    @property
    def keys(self) -> Keys:
        """The names under which stream, items and tree lie in Redis."""

    @property
    def tree(self) -> Tree | None:
        """The tree that peers read, None where none is kept."""

    async def wait_published(self, timeout_sec: float) -> None:
        """Return when peers can read every change that was committed before this call.

        :raises StoreTimeoutError: if that takes longer than ``timeout_sec``.
        """
