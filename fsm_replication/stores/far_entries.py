"""Takes the entries of a key out of a node's own stream that would win over what is held from now on.

Where a person gives up what a wrong clock has stamped far ahead, the stream still tells of it. A day
before its time has come such an entry is no longer too far ahead: a reader that is late by then would
take it, and everybody would follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fsm_replication.errors import BadEntryError
from fsm_replication.items import SyncItem
from fsm_replication.ports import Connection, Oversize
from fsm_replication.replies import entries as entries_of
from fsm_replication.stream import parse_entry

__all__ = ("find_later_entries", "is_later")

# Of a reply that is skimmed some 4,000 elements are kept, and an entry has thirteen.
ENTRIES_PER_CALL: Final = 100


def is_later(fields: Sequence[bytes] | None, item: SyncItem) -> bool:
    """Say whether an entry is one of the item's key that would win over it."""
    try:
        entry = parse_entry(fields)
    except BadEntryError:
        return False
    mine = (item.updated_at, item.version)
    return entry.stamped and entry.key == item.key and (entry.updated_at, entry.version) > mine


async def find_later_entries(
    lane: Connection, stream: str, item: SyncItem, timeout_sec: float
) -> AsyncIterator[list[bytes]]:
    """Yield the ids of the entries that would win over an item, a bounded slice of them at a time.

    Contents are not kept. What is added meanwhile may not be seen. ``timeout_sec`` is for each call.

    :raises ReplicationError: if Redis fails.
    """
    newest = await lane.skim("XREVRANGE", stream, "+", "-", "COUNT", 1, timeout_sec=timeout_sec)
    start = b"-"
    for last, _ in entries_of(newest, "XREVRANGE", 1):
        while True:
            reply = await lane.skim(
                "XRANGE", stream, start, last, "COUNT", ENTRIES_PER_CALL, timeout_sec=timeout_sec
            )
            page = entries_of(reply, "XRANGE", ENTRIES_PER_CALL)
            if not page:
                return
            yield [
                at
                for at, fields in page
                if await _is_later(lane, stream, at, fields, item, timeout_sec)
            ]
            start = b"(" + page[-1][0]


async def _is_later(
    lane: Connection, stream: str, at: bytes, fields: Sequence[Any] | None, item: SyncItem,
    timeout_sec: float,
) -> bool:  # fmt: skip
    """Judge a skimmed entry; one that was cut where it matters is read whole."""
    if fields is None:
        return False
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    key, meta = named.get(b"key"), named.get(b"meta")
    wanted = item.key.encode()
    was_cut = isinstance(key, Oversize)
    if key != (Oversize(len(wanted)) if was_cut else wanted):
        return False
    if not was_cut and not isinstance(meta, Oversize):
        return is_later([b"" if isinstance(part, Oversize) else part for part in fields], item)
    reply = await lane.call("XRANGE", stream, at, at, timeout_sec=timeout_sec)
    return any(is_later(whole, item) for _, whole in entries_of(reply, "XRANGE", 1))
