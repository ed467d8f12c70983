"""Items and the order in which they replace each other.

An item is what a node knows about one key: its content, or the fact that it was deleted (a
tombstone). Every node picks the same winner of two items by comparing their *order tuples*
(:data:`Stamp`), so the order in which items arrive never matters (guarantees G3 and G4).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from fsm_replication.errors import InvalidKeyError, MergeError, StampAheadError

__all__ = (
    "CONTENT_TYPES",
    "DAY_MS",
    "EMPTY_HASH",
    "KEY_BYTES_MAX",
    "MINUTE_MS",
    "NUMBER_MAX",
    "LastWriterWins",
    "Resolver",
    "Stamp",
    "SyncItem",
    "check_content",
    "check_key",
    "content_hash",
    "encode_json",
    "is_key",
    "next_stamp",
    "resolve",
)

KEY_BYTES_MAX: Final = 1024
# Redis's Lua computes in doubles, and so do many JSON readers: beyond this they are not exact.
NUMBER_MAX: Final = 2**53 - 1
# What is stamped further ahead than that is refused by every node whose clock is right.
DAY_MS: Final = 86_400_000
MINUTE_MS: Final = 60_000
CONTENT_TYPES: Final = frozenset({"binary", "json"})
# Finds what is no JSON, and makes no objects of what is.
_JSON: Final = msgspec.json.Decoder(msgspec.Raw)
EMPTY_HASH: Final = hashlib.sha256(b"").digest()


class Stamp(NamedTuple):
    """The order tuple of an item: the larger one wins, field by field.

    ``updated_at`` is in milliseconds since the epoch; ``deleted`` sorts after live, so at equal
    time and version a delete wins; hash and type break what ties are left, so that no two
    different items compare equal.
    """

    updated_at: int
    version: int
    deleted: bool
    content_hash: bytes
    content_type: str


class SyncItem(msgspec.Struct, frozen=True, gc=False):
    """One version of one key; a tombstone has ``deleted`` set and empty content.

    ``updated_at`` is milliseconds since the epoch and ``version`` counts writes of the key, both
    0 .. 2**53-1. ``content_hash`` is the raw SHA-256 of ``content``. ``content_type`` is
    "binary" or "json". ``origin`` names the node that took the write; it decides nothing.
    """

    key: str
    content: bytes
    content_type: str
    content_hash: bytes
    version: int
    updated_at: int
    deleted: bool = False
    origin: str = ""

    @property
    def stamp(self) -> Stamp:
        """The order tuple."""
        return Stamp(
            self.updated_at, self.version, self.deleted, self.content_hash, self.content_type
        )


class Resolver(Protocol):
    """Decides between two live items of one key; tombstones never reach it.

    ``merge`` must be associative, commutative and idempotent, or nodes will not agree, and it must
    take any content, since a peer may send anything: where it raises the item that arrives is refused,
    and becomes a dead letter. Where ``by_stamp`` is true the winner is always the item of the larger stamp, which allows the
    hot path to drop events without looking at their content.
    """

    @property
    def name(self) -> str:
        """Published in the marker key: a link between different resolvers is refused."""

    @property
    def by_stamp(self) -> bool:
        """Whether the stamp alone decides."""

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return the item both nodes will hold after they have seen ``a`` and ``b``."""


class LastWriterWins:
    """The default resolver: the larger order tuple wins whole."""

    name = "last-writer-wins"
    by_stamp = True

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return whichever of the two has the larger stamp."""
        return a if a.stamp >= b.stamp else b

    def __repr__(self) -> str:
        return "LastWriterWins()"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, LastWriterWins)

    def __hash__(self) -> int:
        return hash(LastWriterWins)


def resolve(resolver: Resolver, held: SyncItem | None, change: SyncItem) -> SyncItem | None:
    """Return what is to be held instead of ``held`` when ``change`` arrives; None if nothing changes.

    The order tuple decides, unless both are live and the resolver looks at contents: then what it
    makes of them gets the larger of the two stamps.

    :raises MergeError: if the resolver fails; a store should refuse the change then.
    """
    if held is None:
        return change
    if resolver.by_stamp or held.deleted or change.deleted:
        return change if change.stamp > held.stamp else None
    try:
        merged = resolver.merge(held, change)
        digest = content_hash(merged.content)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise MergeError(f"resolver {resolver.name!r} cannot merge {held.key!r}: {told}") from error
    top = held if held.stamp >= change.stamp else change
    made = SyncItem(
        held.key,
        merged.content,
        merged.content_type,
        digest,
        top.version,
        top.updated_at,
        False,
        top.origin,
    )
    return None if made.stamp == held.stamp else made


def content_hash(content: bytes) -> bytes:
    """Return the raw SHA-256 of ``content``."""
    return hashlib.sha256(content).digest()


def check_key(key: str) -> bytes:
    """Return ``key`` as UTF-8.

    :raises InvalidKeyError: if it is empty, over 1,024 bytes, or holds lone surrogates.
    """
    if not isinstance(key, str):
        raise InvalidKeyError(f"a key is a str, not {type(key).__name__}")
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise InvalidKeyError("a key must be encodable as UTF-8; this one is not") from None
    if not encoded:
        raise InvalidKeyError("a key must not be empty")
    if len(encoded) > KEY_BYTES_MAX:
        raise InvalidKeyError(f"a key has at most {KEY_BYTES_MAX} bytes, not {len(encoded)}")
    return encoded


def is_key(name: str) -> bool:
    """Say whether a name can be the key of an item."""
    try:
        check_key(name)
    except InvalidKeyError:
        return False
    return True


def check_content(key: str, content: object, content_type: str) -> bytes:
    """Return the content of a local write, as bytes.

    :raises TypeError: if it is none; the message says what to pass.
    :raises ValueError: if the type is neither binary nor json, or if it is json and the content is not.
    """
    if content_type not in CONTENT_TYPES:
        raise ValueError(f"content_type is 'binary' or 'json', not {content_type!r}")
    if isinstance(content, bytearray | memoryview):
        content = bytes(content)
    if not isinstance(content, bytes):
        way = "text.encode()" if isinstance(content, str) else "bytes, or use put_json(key, value)"
        raise TypeError(f"{key!r}: content is bytes, not {type(content).__name__}: pass {way}")
    if content_type == "json":
        try:
            _JSON.decode(content)
            content.decode()
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{key!r}: the content is no JSON ({error}): pass JSON in UTF-8, use"
                " put_json(key, value), or leave content_type out"
            ) from None
    return content


def encode_json(key: str, value: object) -> bytes:
    """Return a value as compact JSON.

    :raises TypeError: if it holds something that JSON has no form for.
    :raises ValueError: if it holds NaN, an infinite number, itself, or text that cannot be encoded.
    """
    told = f"{key!r}: the value cannot be written as JSON: "
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except TypeError as error:
        raise TypeError(
            f"{told}{error}; pass dict, list, str, int, float, bool and None, or bytes to put()"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{told}{error}") from None


def next_stamp(known: Stamp | None, now_ms: int, *, key: str) -> tuple[int, int]:
    """Return (updated_at, version) for a local write of ``key`` over ``known``, tombstones included.

    Together they are a hybrid logical clock per key (Kulkarni et al., "Logical Physical Clocks",
    2014): a write that has seen another is always stamped later, even where the clock has gone
    back in between. The time decides first, so a version that cannot go up any more stays.

    :raises StampAheadError: if ``known`` is stamped more than a day ahead of ``now_ms``: peers would
        refuse what is written over it.
    """
    if known is None:
        return now_ms, 1
    if known.updated_at > now_ms + DAY_MS:
        raise StampAheadError(key, known.updated_at)
    return max(now_ms, known.updated_at + 1), min(known.version + 1, NUMBER_MAX)
