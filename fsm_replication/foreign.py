"""The layout of foreign nodes: the dotted tree and the items, as they lie in a foreign Redis.

Nothing here does I/O: the functions name the Redis keys, take replies apart and make values.

Theory of operation. A JSON document comes back from RedisJSON as that module spells it, which need
not be how it was spelled when it was hashed. :func:`decode_foreign` therefore writes the payload in
each of the usual ways (keys as they stand or sorted, with or without spaces, with or without
escapes, numbers as the server or as Python writes them) until one has the hash that stands in the
document. Where none has, the content is kept in compact UTF-8 together with the foreign hash, so
that the trees still agree; such an item is known by ``content_hash(item.content)`` being another
than ``item.content_hash``. A payload of over 256 KiB is kept as it came, and tried in no other way.

:class:`DottedTree` is a trie over the segments of the keys. A change empties the hashes on the way
from its leaf to the root, and asking for a hash computes those that are empty below it, so a batch
of changes pays for a branch once. A node's hash covers all its children: what a change costs grows
with the number of siblings on its path, which is a property of the layout.
"""

from __future__ import annotations

import json
import re
from binascii import hexlify, unhexlify
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, Final, Literal

import msgspec

from fsm_replication.errors import BadEntryError, InvalidKeyError
from fsm_replication.items import CONTENT_TYPES, NUMBER_MAX, SyncItem, check_key, content_hash
from fsm_replication.nesting import is_too_deep

__all__ = (
    "DOTTED",
    "RESERVED",
    "SEGMENTS_MAX",
    "DottedTree",
    "children_key",
    "decode_foreign",
    "decode_hash",
    "dotted_problem",
    "encode_foreign",
    "hash_key",
    "interior_hash",
    "is_json_module_missing",
    "leaf_hash",
    "parent_paths",
    "parse_member",
    "reserved",
    "segments",
)

DOTTED: Final = "dotted"
SEGMENTS_MAX: Final = 64
RESERVED: Final = ("cdc", "merkle:", "item:", "fsm:")
_HASH_BYTES: Final = 32


# The dotted tree ------------------------------------------------------------------------------


def leaf_hash(key: str, version: int, content_hash: bytes) -> bytes:
    """Return the hash of a leaf; ``content_hash`` is the raw SHA-256 of the content."""
    return sha256(
        b"%b|%b|%b" % (key.encode(), version.to_bytes(8, "little"), content_hash)
    ).digest()


def interior_hash(children: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the hash of a node; its children are given as segment and raw hash, in any order."""
    return sha256(b"".join(b"%b:%b;" % child for child in sorted(children))).digest()


def parse_member(member: bytes) -> tuple[str, bytes | None]:
    """Return segment and raw hash of a member of a node's children.

    The hash is None where the writer put the bare segment: then it lies at :func:`hash_key` of
    the child. Whether what follows the last colon is 64 hexadecimal digits tells the two apart.

    :raises BadEntryError: if the segment is not UTF-8, or empty.
    """
    name, colon, digits = member.rpartition(b":")
    digest = decode_hash(digits) if colon else None
    if digest is None:
        name = member
    if not name:
        raise BadEntryError("item", "a child in the dotted tree has an empty segment")
    try:
        return name.decode(), digest
    except UnicodeDecodeError:
        raise BadEntryError("text", "a segment in the dotted tree is not UTF-8") from None


def decode_hash(digits: object) -> bytes | None:
    """Return the 32 bytes that 64 hexadecimal digits stand for; None if it is anything else."""
    if not isinstance(digits, str | bytes) or len(digits) != 2 * _HASH_BYTES:
        return None
    try:
        return unhexlify(digits)
    except ValueError:
        return None


def segments(key: str) -> list[str]:
    """Return the segments of a key or path; the root, whose path is "", has none."""
    return key.split(".") if key else []


def dotted_problem(key: str) -> str:
    """Say why a key cannot be in the dotted tree, or return "" if it can."""
    parts = key.split(".")
    if "" in parts:
        return "a segment is empty"
    if len(parts) > SEGMENTS_MAX:
        return f"{len(parts)} segments, the limit is {SEGMENTS_MAX}"
    return ""


def parent_paths(key: str) -> list[str]:
    """Return the paths of the nodes above a key, the nearest first and the root ("") last."""
    parts = segments(key)
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]


def reserved(key: str) -> bool:
    """Say whether a key is, or begins with, a name that the layout itself uses."""
    return key.startswith(RESERVED)


def hash_key(prefix: str, path: str) -> str:
    """Return the Redis key of the string that holds a node's hash, 64 hexadecimal digits."""
    return f"{prefix}merkle:hash:{path}"


def children_key(prefix: str, path: str) -> str:
    """Return the Redis key of the sorted set that holds a node's children."""
    return f"{prefix}merkle:children:{path}"


class _Node:
    """A node of the trie; a ``digest`` of b"" is to be computed, a ``leaf`` of b"" is none."""

    __slots__ = ("children", "digest", "leaf")

    def __init__(self) -> None:
        self.children: dict[str, _Node] | None = None
        self.leaf = b""
        self.digest = b""


class DottedTree:
    """A dotted tree in memory.

    It cannot hold a key that is the prefix of another ("user" and "user.1"): the shorter is kept
    out until the longer ones are gone. Keys with an empty segment or too many are kept out too.
    """

    __slots__ = ("_misfits", "_root", "_shadowed")

    def __init__(self) -> None:
        self._root = _Node()
        self._shadowed = 0
        self._misfits: set[str] = set()

    @property
    def kept_out(self) -> int:
        """How many of the keys that were set are not in the tree."""
        return self._shadowed + len(self._misfits)

    @property
    def root(self) -> bytes:
        """The hash of everything; of an empty tree it is the hash of no children."""
        return self._digest(self._root)

    def set(self, key: str, version: int, content_hash: bytes) -> None:
        """Put a key into the tree, or give it another version or content.

        :raises InvalidKeyError: if the key is empty, too long, or not encodable.
        """
        check_key(key)
        if dotted_problem(key):
            self._misfits.add(key)
            return
        leaf = leaf_hash(key, version, content_hash)
        node = self._root
        trail = [node]
        for segment in segments(key):
            if node.children is None:
                node.children = {}
                self._shadowed += bool(node.leaf)
            child = node.children.get(segment)
            if child is None:
                child = node.children[segment] = _Node()
            node = child
            trail.append(node)
        if node.children is not None:
            # Held back, so no hash changes.
            self._shadowed += not node.leaf
            node.leaf = leaf
        elif node.leaf != leaf:
            node.leaf = leaf
            _forget(trail)

    def remove(self, key: str) -> None:
        """Take a key out of the tree, if it is there; what it kept out comes back in."""
        self._misfits.discard(key)
        node = self._root
        trail = [node]
        steps: list[tuple[dict[str, _Node], str]] = []
        for segment in segments(key):
            children = node.children
            if children is None or segment not in children:
                return
            steps.append((children, segment))
            node = children[segment]
            trail.append(node)
        if not node.leaf:
            return
        node.leaf = b""
        if node.children is not None:
            self._shadowed -= 1
            return
        _forget(trail)
        for parent, (children, segment) in zip(reversed(trail[:-1]), reversed(steps), strict=True):
            del children[segment]
            if children:
                return
            parent.children = None
            if parent.leaf:
                self._shadowed -= 1
                return

    def hash_of(self, path: str) -> bytes | None:
        """Return the hash of the node or leaf at a path; None if there is none."""
        node = self._find(path)
        return None if node is None else self._digest(node)

    def children(self, path: str) -> dict[str, bytes]:
        """Return the children of a node, by segment with their hashes; a leaf has none."""
        node = self._find(path)
        if node is None or node.children is None:
            return {}
        return {name: self._digest(node.children[name]) for name in sorted(node.children)}

    def _find(self, path: str) -> _Node | None:
        node = self._root
        for segment in segments(path):
            if node.children is None or segment not in node.children:
                return None
            node = node.children[segment]
        return node

    @staticmethod
    def _digest(top: _Node) -> bytes:
        """Compute what is empty at and below a node, the lowest first, and return its hash."""
        stack = [] if top.digest else [top]
        while stack:
            node = stack[-1]
            if node.children is None:
                node.digest = node.leaf or interior_hash(())
                stack.pop()
                continue
            stale = [child for child in node.children.values() if not child.digest]
            if stale:
                stack += stale
                continue
            node.digest = interior_hash(
                (name.encode(), child.digest) for name, child in node.children.items()
            )
            stack.pop()
        return top.digest


def _forget(trail: Iterable[_Node]) -> None:
    for node in trail:
        node.digest = b""


# Foreign items --------------------------------------------------------------------------------

# What may stand in an item beside its content: names, numbers, an audit record.
_ENVELOPE_BYTES: Final = 64 * 1024
# Larger payloads stay as they came: some ms for each spelling, and there are up to twelve.
_RESPELLED_BYTES_MAX: Final = 256 * 1024
# A byte value takes up to three digits, a comma and perhaps a space.
_ARRAY_FACTOR: Final = 5
# Byte values are decoded and encoded in pieces: whole, a list of them is 8 times the content.
_PIECE_BYTES: Final = 64 * 1024
# Items have a state; which of its values there are is not part of the layout as we know it.
_STATE: Final = "default"
_BYTE_TEXTS: Final = tuple(b"%d" % value for value in range(256))
_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7e]")
_NUMBER_FIELDS: Final = ("`$.version`", "`$.timestamp`", "`$.updated_at`")
_BAD_JSON: Final = (msgspec.MsgspecError, ValueError, RecursionError)
_UNKNOWN_COMMAND: Final = re.compile(
    r"(?:^-?|: )(?:ERR )?unknown command(?:[\s,.]*$|[\s,]*[`'\"]?JSON\.)", re.IGNORECASE
)


class _Document(msgspec.Struct, frozen=True, gc=False):
    """What is read of a RedisJSON document."""

    version: int
    timestamp: int
    payload: msgspec.Raw
    payload_hash: Any = None


class _Whole(msgspec.Struct, frozen=True, gc=False):
    """What is read of an item that is one string."""

    version: int
    updated_at: int
    content: msgspec.Raw
    content_hash: Any = None
    content_type: str = "binary"
    object_id: str | None = None


_decode_document = msgspec.json.Decoder(_Document).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_bytes = msgspec.json.Decoder(list[int]).decode
# Fractions stay as they are spelled: no two writers agree on how to write 1e16.
_decode_payload = msgspec.json.Decoder(float_hook=lambda text: msgspec.Raw(text.encode())).decode
_encode_json = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


def decode_foreign(
    key: str, raw: bytes | str, *, kind: Literal["json", "string"], payload_limit: int
) -> SyncItem:
    """Return the item that a foreign node holds at ``key``.

    ``kind`` says what ``raw`` is the reply to: "json" to JSON.GET without a path, "string" to GET.
    A content of over ``payload_limit`` bytes is refused, and so is, before it is looked into, a
    reply that is too large to hold a smaller one.

    :raises BadEntryError: if anything about it is wrong.
    """
    try:
        check_key(key)
    except InvalidKeyError as error:
        raise BadEntryError("key", str(error)) from None
    limit = payload_limit * (1 if kind == "json" else _ARRAY_FACTOR) + _ENVELOPE_BYTES
    if not isinstance(raw, bytes | str):
        raise BadEntryError("item", f"the reply is no string but {type(raw).__name__}")
    if len(raw) > limit:
        raise BadEntryError("size", f"{len(raw)} bytes of item, the limit is {limit}")
    try:
        # Either way round it is shown to be UTF-8, which the parser does not do where it skips.
        if isinstance(raw, str):
            raw = raw.encode()
        else:
            raw.decode()
        if is_too_deep(raw):
            raise RecursionError
        if kind == "json":
            return _from_document(key, raw, payload_limit)
        return _from_whole(key, raw, payload_limit)
    except _BAD_JSON as error:
        raise _bad_item(error) from None


def _from_document(key: str, raw: bytes, payload_limit: int) -> SyncItem:
    document = _decode_document(raw)
    _check_numbers(document.version, document.timestamp)
    payload = bytes(document.payload)
    if len(payload) > _RESPELLED_BYTES_MAX:
        # To spell it anew makes objects of twenty times its size, in calls that nothing interrupts.
        _check_size(len(payload), payload_limit)
        known = decode_hash(document.payload_hash) or content_hash(payload)
        return SyncItem(key, payload, "json", known, document.version, document.timestamp)
    value = _decode_payload(payload)
    content = _encode_json(value)
    digest = decode_hash(document.payload_hash)
    if digest is None:
        digest = content_hash(content)
    else:
        for spelling in _spellings(payload, value, content):
            if content_hash(spelling) == digest:
                content = spelling
                break
    _check_size(len(content), payload_limit)
    return SyncItem(key, content, "json", digest, document.version, document.timestamp)


def _from_whole(key: str, raw: bytes, payload_limit: int) -> SyncItem:
    whole = _decode_whole(raw)
    _check_numbers(whole.version, whole.updated_at)
    if whole.object_id is not None and whole.object_id != key:
        raise BadEntryError("item", "object_id names another key")
    content_type = whole.content_type.lower()
    if content_type not in CONTENT_TYPES:
        raise BadEntryError("item", f"unknown content_type {content_type[:32]!r}")
    content = _byte_values(bytes(whole.content), payload_limit)
    computed = content_hash(content)
    digest = decode_hash(whole.content_hash) or computed
    # JSON may have come here through a document in a spelling that is not the one hashed.
    if digest != computed and content_type == "binary":
        raise BadEntryError("hash", "the content does not match its hash")
    return SyncItem(key, content, content_type, digest, whole.version, whole.updated_at)


def _check_numbers(version: int, updated_at: int) -> None:
    if not (0 <= version <= NUMBER_MAX and 0 <= updated_at <= NUMBER_MAX):
        raise BadEntryError("range", "version or time out of range")


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BadEntryError("size", f"{size} bytes of content, the limit is {limit}")


def _byte_values(array: bytes, payload_limit: int) -> bytes:
    """Return the bytes whose values a well-formed JSON value lists, if that is what it does."""
    if not array.startswith(b"["):
        raise BadEntryError("item", "the content is not an array")
    _check_size(array.count(b","), payload_limit)
    content = bytearray()
    at, end = 1, len(array) - 1
    while at < end:
        comma = array.find(b",", at + _PIECE_BYTES, end)
        until = end if comma < 0 else comma
        # Whatever is no number fails here: a piece of something nested is not well-formed.
        content += bytes(_decode_bytes(b"[%b]" % array[at:until]))
        at = until + 1
    _check_size(len(content), payload_limit)
    return bytes(content)


def _spellings(payload: bytes, value: Any, compact: bytes) -> Iterator[bytes]:
    """Yield the ways in which a payload may have been spelled, the likely ones first."""
    yield payload
    yield from _variants(compact)
    yield from _variants(_encode_sorted(value))
    value = json.loads(payload)
    try:
        pythonic = _dump(value, sort=False)
    except ValueError:
        return  # A number is too large for Python's floats.
    if pythonic != compact:
        yield from _variants(pythonic)
        yield from _variants(_dump(value, sort=True))


def _variants(compact: bytes) -> Iterator[bytes]:
    for spelling in (compact, msgspec.json.format(compact, indent=0)):
        yield spelling
        text = spelling.decode()
        if _BEYOND_ASCII.search(text):
            yield _BEYOND_ASCII.sub(_escape, text).encode()


def _dump(value: Any, *, sort: bool) -> bytes:
    return json.dumps(
        value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort
    ).encode()


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _bad_item(error: Exception) -> BadEntryError:
    if isinstance(error, RecursionError):
        return BadEntryError("item", "it is nested too deeply")
    if isinstance(error, UnicodeError):
        return BadEntryError("item", "it is not UTF-8")
    text = str(error)
    if "out of range" in text and text.endswith(_NUMBER_FIELDS):
        return BadEntryError("range", text)
    return BadEntryError("item", text[:200])


def encode_foreign(item: SyncItem) -> tuple[Literal["string"], bytes]:
    """Return how an item is stored for foreign readers: the kind of the value, and the value.

    It is one string whatever the content's type, which needs no module in Redis.

    :raises InvalidKeyError: if the key is not one, or is reserved.
    :raises ValueError: if it is a tombstone: the layout has none, the key is to be removed.
    """
    check_key(item.key)
    if reserved(item.key):
        raise InvalidKeyError(f"keys must not begin with any of {', '.join(RESERVED)}")
    if item.deleted:
        raise ValueError("a tombstone has no foreign form")
    content = item.content
    pieces = (
        b",".join([_BYTE_TEXTS[value] for value in content[at : at + _PIECE_BYTES]])
        for at in range(0, len(content), _PIECE_BYTES)
    )
    return "string", _encode_json(
        {
            "object_id": item.key,
            "version": item.version,
            "updated_at": item.updated_at,
            "content_type": item.content_type,
            "content_hash": hexlify(item.content_hash).decode(),
            "content": msgspec.Raw(b"[%b]" % b",".join(pieces)),
            "state": _STATE,
        }
    )


def is_json_module_missing(error_text: str) -> bool:
    """Say whether the error that answers JSON.GET means that Redis lacks the module.

    Then GET is to be used on this connection. Any other error (WRONGTYPE, NOPERM, ...) is a
    failure. The text may come with its code or without, and after the name of a peer and a colon.
    """
    return _UNKNOWN_COMMAND.search(error_text) is not None
