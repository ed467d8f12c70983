"""The tree that our own nodes compare: a trie over a hash of the key, three levels deep.

Theory of operation. Every key belongs to one of 16,384 *buckets*, by the CRC-32 of its bytes, so
the shape of the key space does not matter: a flat space of a million keys spreads as evenly as any
other, and a key that is the prefix of another is nothing special. A bucket holds its keys with
their order tuples, tombstones among them. 128 buckets make a *branch*, and 128 branches the tree.

The digest of a leaf covers the key, its length before it, and the whole order tuple; a node's
digest is the *sum* of the digests of all leaves below it, in two 32-bit words that wrap. A change
therefore touches three digests (bucket, branch, root), whatever the number of keys, and takes the
old leaf out by subtracting it. Sums and truncated SHA-1 guard against accident, not against a
writer who forges: who can write to a node's Redis can change its items all the same.

In Redis the digests lie in one string, 8 bytes each: the root, the 128 branches, the 16,384
buckets. Each bucket that is not empty is a hash of key to order tuple. Comparing two nodes takes
one round trip if they are equal, and otherwise one for each level and one for the buckets.

What it costs: a change is three reads and writes of 8 bytes and one hash field; a comparison
transfers 1 KiB, 1 KiB for each branch that differs, and of each bucket that differs n / 16,384
leaves of about 60 bytes and a key each, where n is the number of keys of the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha1
from typing import Any, Final, Protocol
from zlib import crc32

__all__ = (
    "BRANCHES",
    "DIGEST_BYTES",
    "EMPTY_ROOT",
    "OWN",
    "PARTITIONS",
    "MerkleTree",
    "Tree",
    "bucket_of",
    "bucket_path",
    "children_command",
    "leaf_digest",
    "parse_children",
    "path_bucket",
)

OWN: Final = "own"
BRANCHES: Final = 128
PARTITIONS: Final = BRANCHES * BRANCHES
DIGEST_BYTES: Final = 8
EMPTY_ROOT: Final = bytes(DIGEST_BYTES)
_PARTITION_MASK: Final = PARTITIONS - 1
_WORD: Final = 1 << 32
_NAMES: Final = tuple(f"{index:02x}" for index in range(BRANCHES))
_LEVEL_BYTES: Final = BRANCHES * DIGEST_BYTES


def bucket_of(key: bytes) -> int:
    """Return the bucket of a key, 0 .. 16,383."""
    return crc32(key) & _PARTITION_MASK


def leaf_digest(key: bytes, stamp: bytes) -> bytes:
    """Return the 8 bytes by which a leaf counts; ``stamp`` is the order tuple as 50 bytes."""
    return sha1(len(key).to_bytes(2) + key + stamp, usedforsecurity=False).digest()[:DIGEST_BYTES]


def bucket_path(bucket: int) -> str:
    """Return the path of a bucket: the names of its branch and of itself, two digits each."""
    return _NAMES[bucket // BRANCHES] + _NAMES[bucket % BRANCHES]


def path_bucket(path: str) -> int:
    """Return the bucket that a path of four digits names."""
    branch, place = bytes.fromhex(path)
    return branch * BRANCHES + place


class Tree(Protocol):
    """A tree that can be compared with another of the same layout, its own or a peer's.

    The path of the root is "". Where a call needs I/O it is one round trip, however many paths.
    """

    @property
    def layouts(self) -> frozenset[str]:
        """The layouts this tree can be read in."""

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything."""

    async def children(
        self, layout: str, paths: Sequence[str]
    ) -> Sequence[dict[str, bytes] | None]:
        """Return, for each path, its children by name with their digests.

        The children of a bucket are its keys, with the order tuple as 50 bytes each. None stands
        for a node that cannot be read.
        """

    async def sizes(self, layout: str, paths: Sequence[str]) -> list[int]:
        """Return how many keys each bucket holds."""

    async def clean_branches(self, layout: str) -> Sequence[str]:
        """Return the paths below the root that are up to date."""

    async def is_branch_clean(self, layout: str, path: str) -> bool:
        """Say whether what is below a path is up to date."""


# How it lies in Redis.


def children_command(tree_key: str, path: str) -> tuple[str | int, ...]:
    """Return the command that reads the children of a node.

    :raises ValueError: if there is no such path.
    """
    if not path:
        return ("GETRANGE", tree_key, DIGEST_BYTES, DIGEST_BYTES + _LEVEL_BYTES - 1)
    if len(path) == 2:
        begin = DIGEST_BYTES + _LEVEL_BYTES * (1 + int(path, 16))
        return ("GETRANGE", tree_key, begin, begin + _LEVEL_BYTES - 1)
    return ("HGETALL", f"{tree_key}:{path_bucket(path)}")


def parse_children(path: str, reply: Any) -> dict[str, bytes]:
    """Return the children that a reply to :func:`children_command` holds, empty ones left out.

    A key that is not UTF-8 is left out too: nobody could ask for it.

    :raises ValueError: if the reply is none.
    """
    if len(path) == 4:
        if not isinstance(reply, list) or not all(isinstance(part, bytes) for part in reply):
            raise ValueError("a bucket is a hash of bytes")
        leaves: dict[str, bytes] = {}
        for raw, stamp in zip(reply[::2], reply[1::2], strict=True):
            try:
                leaves[raw.decode()] = stamp
            except UnicodeDecodeError:
                continue
        return leaves
    if not isinstance(reply, bytes) or len(reply) > _LEVEL_BYTES:
        raise ValueError("the digests of a level are one string")
    padded = reply.ljust(_LEVEL_BYTES, b"\0")
    return {
        name: digest
        for name, digest in zip(_NAMES, _cut(padded), strict=True)
        if digest != EMPTY_ROOT
    }


def _cut(raw: bytes) -> Iterator[bytes]:
    for at in range(0, len(raw), DIGEST_BYTES):
        yield raw[at : at + DIGEST_BYTES]


# The same tree in memory.


class MerkleTree:
    """The tree in this process's memory: a change costs a hash and three additions."""

    def __init__(self) -> None:
        self._leaves: dict[int, dict[str, bytes]] = {}
        self._digests: list[tuple[int, int]] = [(0, 0)] * PARTITIONS
        self._branches: list[tuple[int, int]] = [(0, 0)] * BRANCHES
        self._root = (0, 0)

    def set(self, key: str, stamp: bytes | None) -> None:
        """Make ``stamp`` the leaf of a key; None takes the leaf out."""
        raw = key.encode()
        bucket = bucket_of(raw)
        leaves = self._leaves.setdefault(bucket, {})
        old = leaves.get(key)
        if old == stamp:
            return
        if old is not None:
            self._fold(bucket, leaf_digest(raw, old), -1)
        if stamp is None:
            leaves.pop(key, None)
        else:
            leaves[key] = stamp
            self._fold(bucket, leaf_digest(raw, stamp), 1)
        if not leaves:
            del self._leaves[bucket]

    def _fold(self, bucket: int, digest: bytes, sign: int) -> None:
        high = sign * int.from_bytes(digest[:4])
        low = sign * int.from_bytes(digest[4:])
        self._digests[bucket] = _add(self._digests[bucket], high, low)
        branch = bucket // BRANCHES
        self._branches[branch] = _add(self._branches[branch], high, low)
        self._root = _add(self._root, high, low)

    def root(self) -> bytes:
        """Return the digest of everything."""
        return _packed(self._root)

    def children(self, path: str) -> dict[str, bytes]:
        """Return the children of a node, empty ones left out."""
        if len(path) == 4:
            return dict(self._leaves.get(path_bucket(path), {}))
        if path:
            first = int(path, 16) * BRANCHES
            return _named(self._digests[first : first + BRANCHES])
        return _named(self._branches)

    def size(self, path: str) -> int:
        """Return how many keys a bucket holds."""
        return len(self._leaves.get(path_bucket(path), ()))

    def __len__(self) -> int:
        return sum(map(len, self._leaves.values()))


def _add(node: tuple[int, int], high: int, low: int) -> tuple[int, int]:
    return (node[0] + high) % _WORD, (node[1] + low) % _WORD


def _packed(node: tuple[int, int]) -> bytes:
    return node[0].to_bytes(4) + node[1].to_bytes(4)


def _named(nodes: Iterable[tuple[int, int]]) -> dict[str, bytes]:
    return {name: _packed(node) for name, node in zip(_NAMES, nodes, strict=True) if node != (0, 0)}


def differing(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> list[str]:
    """Return the names whose digests differ, sorted."""
    return sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
