"""The process that is killed: it applies one batch after the other and says when each is answered."""

from __future__ import annotations

import asyncio
import importlib
import operator
import pickle
import sys
from typing import Any, Final, NamedTuple

from fsm_replication.items import SyncItem, content_hash
from fsm_replication.ports import Position, StreamId
from fsm_replication.stores.protocol import Received

__all__ = ("PEER", "SHARED_KEY", "Order", "batch", "main", "received", "run")

PEER: Final = "peer"
SHARED_KEY: Final = "shared"
BATCH_ITEMS: Final = 20
BATCHES_MAX: Final = 100_000
# Later than any clock: whatever the day, no tombstone is involved and nothing expires.
AT_MS: Final = 1_700_000_000_000


class Order(NamedTuple):
    """What to import, where the store is, and with which batch to begin."""

    path: list[str]
    module: str
    name: str
    place: Any
    first: int


def batch(number: int) -> list[SyncItem]:
    """Return the items of a batch: some of its own, and one that every batch has."""
    items = [
        _item(f"batch.{number}.{n}", b"[%d]" % n * (1 + n * 10), AT_MS) for n in range(BATCH_ITEMS)
    ]
    return [*items, _item(SHARED_KEY, b"[%d]" % number, AT_MS + number, number)]


def _item(key: str, content: bytes, at_ms: int, version: int = 1) -> SyncItem:
    return SyncItem(key, content, "binary", content_hash(content), version, at_ms, False, PEER)


def received(number: int) -> Received:
    """Return where a batch came from."""
    return Received(PEER, Position(StreamId(number, 0), number))


async def main(order: Order) -> None:
    """Apply batches until somebody kills the process."""
    contract = operator.attrgetter(order.name)(importlib.import_module(order.module))()
    async with contract.opened(order.place) as store:
        for number in range(order.first, order.first + BATCHES_MAX):
            await store.apply_many(batch(number), received(number))
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


def run() -> None:
    """Do what the process that started this one wrote to the standard input."""
    given: Order = pickle.load(sys.stdin.buffer)  # noqa: S301 - from whoever may run code here anyway
    sys.path[:] = given.path
    asyncio.run(main(given))
