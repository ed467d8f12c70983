"""The events that are measured: a stream like that of a busy node."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import islice
from typing import Final

import zstandard

from fsm_replication.items import EMPTY_HASH, LastWriterWins, SyncItem, content_hash
from fsm_replication.layout import FORMAT, Keys
from fsm_replication.merkle import OWN, PARTITIONS
from fsm_replication.ports import Connection
from fsm_replication.stream import encode_data, encode_fields

__all__ = ("EVENTS", "KEYS", "PEER_ID", "TTL_MS", "fill", "make_event")

EVENTS: Final = 200_000
KEYS: Final = 100_000
PEER_ID: Final = "writer"
TTL_MS: Final = 7 * 86_400_000
HOUR_MS: Final = 3_600_000
PUTS_PER_DELETE: Final = 9
ENTRIES_PER_FLIGHT: Final = 1000
TIMEOUT_SEC: Final = 30.0
_WORDS: Final = [
    "ward",
    "bed",
    "blood",
    "pressure",
    "pulse",
    "note",
    "nurse",
    "visit",
    "result",
    "sample",
    "allergy",
    "dose",
    "tablet",
    "review",
    "referral",
    "clinic",
    "follow",
    "plan",
    "home",
    "family",
    "test",
    "normal",
    "raised",
    "stable",
    "discharge",
    "urgent",
]


def make_event(number: int, rng: random.Random, at_ms: int, *, deletes: bool = True) -> SyncItem:
    """Return one change: nine puts of about 300 bytes of JSON to one delete."""
    key = f"site.patient.{rng.randrange(KEYS)}"
    if deletes and number % (PUTS_PER_DELETE + 1) == PUTS_PER_DELETE:
        return SyncItem(key, b"", "binary", EMPTY_HASH, number + 1, at_ms, True, PEER_ID)
    text = " ".join(rng.choices(_WORDS, k=24))
    content = json.dumps(
        {"id": number, "name": f"Person {rng.randrange(10**6)}", "seen": at_ms, "note": text,
         "values": [rng.randrange(1000) for _ in range(8)]}
    ).encode()  # fmt: skip
    return SyncItem(key, content, "json", content_hash(content), number + 1, at_ms, False, PEER_ID)


def _commands(events: int, *, deletes: bool) -> Iterator[tuple[bytes, ...]]:
    rng = random.Random(20)  # noqa: S311 - the same stream in every run is the point
    # What is older than tombstones are kept, and absent, would be held back.
    begin_ms = time.time_ns() // 1_000_000 - HOUR_MS
    compressor = zstandard.ZstdCompressor(level=3)
    for number in range(events):
        item = make_event(number, rng, begin_ms + number, deletes=deletes)
        data = None if item.deleted else encode_data(item.content, compressor)
        fields = encode_fields(item, data)
        stream_id = f"{item.updated_at}-0".encode()
        yield (b"XADD", Keys().stream.encode(), stream_id, *fields)


async def fill(connection: Connection, events: int = EVENTS, *, deletes: bool = True) -> None:
    """Write the marker of a node and its stream of events.

    Without ``deletes`` these are puts alone, of which the interlock has nothing to say.
    """
    await connection.call("FLUSHALL", timeout_sec=TIMEOUT_SEC)
    marker: dict[str, str | int] = {
        "node_id": PEER_ID,
        "format": FORMAT,
        "layouts": OWN,
        "tombstone_ttl_ms": TTL_MS,
        "resolver": LastWriterWins.name,
        "partitions": PARTITIONS,
        "incarnation": "bench",
    }
    flat = [part for pair in marker.items() for part in pair]
    await connection.call("HSET", Keys().marker, *flat, timeout_sec=TIMEOUT_SEC)
    commands = _commands(events, deletes=deletes)
    while flight := list(islice(commands, ENTRIES_PER_FLIGHT)):
        await connection.pipeline(flight, timeout_sec=TIMEOUT_SEC)
