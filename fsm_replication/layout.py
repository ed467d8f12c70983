"""What lies in a node's Redis, and under which names (the layout of our own nodes).

Item values begin with the order tuple as a fixed-width byte string, so that a script can compare
two of them from the first bytes alone, and end with the content exactly as the stream's ``data``
field spells it, so that a batch travels to Redis once and not twice.

======== ===== =======================================================
bytes    what  meaning
======== ===== =======================================================
0..7     time  updated_at, unsigned, big-endian
8..15    ver   version, unsigned, big-endian
16       del   1 for a tombstone
17..48   hash  SHA-256 of the content
49       type  0 binary, 1 json
50..57   leaf  digest of key and order tuple, as the tree folds it
58       len   bytes of the origin that follows, 0 .. 255
59..     node  origin, UTF-8
rest     data  the content as on the stream: zstd where that is smaller
======== ===== =======================================================
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from fsm_replication.errors import BadEntryError
from fsm_replication.items import NUMBER_MAX, Stamp, SyncItem, check_key
from fsm_replication.merkle import DIGEST_BYTES, EMPTY_ROOT, bucket_of, leaf_digest
from fsm_replication.stream import DataDecoder

__all__ = (
    "FORMAT",
    "HEAD_BYTES",
    "STAMP_BYTES",
    "Keys",
    "decode_item",
    "decode_stamp",
    "encode_item",
    "encode_origin",
    "encode_stamp",
    "encode_value",
    "glob_escape",
    "item_data",
)

FORMAT: Final = 1
STAMP_BYTES: Final = 50
HEAD_BYTES: Final = STAMP_BYTES + DIGEST_BYTES
_TYPE_CODES: Final = {"binary": 0, "json": 1}
_TYPE_NAMES: Final = ("binary", "json")
_STAMP: Final = struct.Struct(">QQB32sB")
_pack_stamp = _STAMP.pack
_ORIGIN_BYTES_MAX: Final = 255


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of a node's keys under its ``redis_prefix``."""

    prefix: str = ""

    @property
    def stream(self) -> str:
        """The CDC stream."""
        return f"{self.prefix}cdc"

    @property
    def marker(self) -> str:
        """The hash by which a node of ours is known."""
        return f"{self.prefix}fsm:node"

    @property
    def marker_copy(self) -> str:
        """A copy of the marker, from which it is written again where it alone is lost."""
        return f"{self.prefix}fsm:node:copy"

    @property
    def positions(self) -> str:
        """A hash: peer id to the stream position that was applied with its last batch."""
        return f"{self.prefix}fsm:positions"

    @property
    def tree(self) -> str:
        """The digests of the tree's inner nodes; what follows a colon after it are its leaves."""
        return f"{self.prefix}fsm:tree"

    @property
    def processes(self) -> str:
        """The processes of the node that have the store open, by when they count as gone."""
        return f"{self.prefix}fsm:processes"

    @property
    def live(self) -> str:
        """How many live items there are."""
        return f"{self.prefix}fsm:live"

    @property
    def dirty(self) -> str:
        """The keys whose leaves in the dotted tree are not up to date."""
        return f"{self.prefix}fsm:dotted:dirty"

    @property
    def unfolded(self) -> str:
        """The nodes of the dotted tree whose hashes are not up to date, by their depth."""
        return f"{self.prefix}fsm:dotted:unfolded"

    @property
    def kept_out(self) -> str:
        """The live keys that the dotted tree cannot hold."""
        return f"{self.prefix}fsm:dotted:out"

    @property
    def clearing(self) -> str:
        """There as long as the dotted layout is being removed."""
        return f"{self.prefix}fsm:dotted:clearing"

    @property
    def lease(self) -> str:
        """Which process of the node publishes the dotted layout."""
        return f"{self.prefix}fsm:dotted:lease"

    @property
    def item_prefix(self) -> str:
        """What every item key begins with."""
        return f"{self.prefix}item:"

    def item(self, key: str) -> str:
        """Return the Redis key that holds the item of ``key``."""
        return f"{self.prefix}item:{key}"


def encode_stamp(item: SyncItem | Stamp) -> bytes:
    """Return the order tuple as 50 bytes that compare like the tuple."""
    return _pack_stamp(
        item.updated_at,
        item.version,
        item.deleted,
        item.content_hash,
        _TYPE_CODES[item.content_type],
    )


def encode_origin(origin: str) -> bytes:
    """Return the origin with its length before it; names over 255 bytes are cut."""
    # Cut before it is kept: what others call themselves has no bound of its own.
    return _encode_origin(origin[:_ORIGIN_BYTES_MAX])


@lru_cache(maxsize=256)
def _encode_origin(origin: str) -> bytes:
    raw = origin.encode()[:_ORIGIN_BYTES_MAX]
    return bytes((len(raw),)) + raw


def encode_item(item: SyncItem, data: bytes, *, tree: bool = True) -> tuple[bytes, bytes, int]:
    """Return the key as bytes, the value of its item key, and its bucket in the tree.

    ``data`` is the content as on the stream. Where no ``tree`` is kept the leaf's digest is left
    out, and filled in when one is built. One call for all three, because this is the path of every
    change.
    """
    key = item.key.encode()
    stamp = _pack_stamp(
        item.updated_at,
        item.version,
        item.deleted,
        item.content_hash,
        _TYPE_CODES[item.content_type],
    )
    origin = encode_origin(item.origin)
    if not tree:
        return key, stamp + EMPTY_ROOT + origin + data, 0
    return key, stamp + leaf_digest(key, stamp) + origin + data, bucket_of(key)


def encode_value(item: SyncItem, data: bytes) -> bytes:
    """Return the value of an item key; ``data`` is the content as on the stream."""
    return encode_item(item, data)[1]


def decode_stamp(raw: bytes) -> Stamp:
    """Return the order tuple at the beginning of an item value.

    :raises BadEntryError: if it is not one.
    """
    try:
        updated_at, version, deleted, digest, code = _STAMP.unpack_from(raw)
        content_type = _TYPE_NAMES[code]
    except (struct.error, IndexError):
        raise BadEntryError("item", "the value does not begin with an order tuple") from None
    if updated_at > NUMBER_MAX or version > NUMBER_MAX or deleted > 1:
        raise BadEntryError("range", "updated_at, version or deleted flag out of range")
    return Stamp(updated_at, version, deleted == 1, digest, content_type)


def decode_item(key: str, raw: bytes, decoder: DataDecoder) -> SyncItem:
    """Return the item in a value, its content decompressed and its hash verified.

    :raises BadEntryError: if anything about it is wrong.
    :raises InvalidKeyError: if the key is not one.
    """
    check_key(key)
    stamp = decode_stamp(raw)
    begin = HEAD_BYTES + 1
    if len(raw) < begin or len(raw) < begin + raw[HEAD_BYTES]:
        raise BadEntryError("item", "the value ends within the origin")
    end = begin + raw[HEAD_BYTES]
    origin = raw[begin:end].decode("utf-8", "replace")
    content = b"" if stamp.deleted else decoder.decode(raw[end:], stamp.content_hash)
    return SyncItem(
        key,
        content,
        stamp.content_type,
        stamp.content_hash,
        stamp.version,
        stamp.updated_at,
        stamp.deleted,
        origin,
    )


def item_data_head(raw: bytes) -> bytes:
    """Return the beginning of what ``item_data`` returns, enough for the header of a zstd frame."""
    begin = HEAD_BYTES + 1 + (raw[HEAD_BYTES] if len(raw) > HEAD_BYTES else 0)
    return raw[begin : begin + 32]


def item_data(raw: bytes) -> bytes:
    """Return the tail of an item value: its content as on the stream."""
    return raw[HEAD_BYTES + 1 + raw[HEAD_BYTES] :]


def glob_escape(text: str) -> str:
    """Return ``text`` so that a glob pattern of Redis matches it literally."""
    return "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in text)
