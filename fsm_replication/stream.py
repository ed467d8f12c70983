"""The entries of a CDC stream: how they are written, and what a reader makes of them.

Theory of operation. Reading happens in two steps, because most of the work of an entry is in its
content and most entries need not be looked into: :func:`parse_entry` takes the fields apart and
validates the stamp, which is all that is needed to see that something newer is held; only what
survives goes through :class:`DataDecoder`, which decompresses and checks the hash. One decoder is
made per link and reused: a new zstd context costs five times the decompression of a small entry.
What takes long is told from what does not by its declared size, before anything is decompressed.
"""

from __future__ import annotations

import hashlib
from binascii import Error as HexError
from binascii import unhexlify
from collections.abc import Sequence
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec
import zstandard

from fsm_replication.errors import BadEntryError
from fsm_replication.items import (
    EMPTY_HASH,
    KEY_BYTES_MAX,
    NUMBER_MAX,
    SyncItem,
    content_hash,
)
from fsm_replication.nesting import is_too_deep

__all__ = (
    "COMPRESS_FROM_BYTES",
    "FIELDS_MAX",
    "INLINE_BYTES",
    "MAGIC",
    "META_BYTES_MAX",
    "DataDecoder",
    "Encoded",
    "Entry",
    "WireForm",
    "encode_data",
    "encode_fields",
    "encode_meta",
    "parse_entry",
)

META_BYTES_MAX: Final = 4096
"""What the ``meta`` field may take: a type, two numbers, the name of a node, what others add."""
ORIGIN_CHARS_MAX: Final = 255
_META_LEVELS_MAX: Final = 64
_SHALLOW_BYTES: Final = 1024
MAGIC: Final = b"\x28\xb5\x2f\xfd"
COMPRESS_FROM_BYTES: Final = 64
FIELDS_MAX: Final = 100_000
"""Names and values of one entry; an ordinary one has ten."""
INLINE_BYTES: Final = 256 * 1024
"""Contents up to this size are decoded in the loop's own turn: that takes 0.1 to 0.35 ms, and to hand
one over to a thread 0.06 ms of the loop and 0.2 ms until it is back."""
_ZSTD_LEVEL: Final = 3

_Number = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]


class _PutMeta(msgspec.Struct, frozen=True, gc=False):
    content_type: Literal["json", "binary"]
    version: _Number
    updated_at: _Number
    origin: str = ""


class _DelMeta(msgspec.Struct, frozen=True, gc=False):
    version: _Number
    updated_at: _Number
    origin: str = ""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One stream entry, taken apart but not looked into; it is also its own :class:`WireForm`.

    ``digest`` is None where the writer left the hash out. ``stamped`` is false for the deletes of
    foreign nodes, which carry no meta: their time is the stream id's. ``index`` is the entry's
    place in its chunk.
    """

    key: str
    updated_at: int
    version: int
    deleted: bool
    digest: bytes | None
    content_type: str
    origin: str
    data: bytes
    meta: bytes
    index: int = 0
    stamped: bool = True


class WireForm(Protocol):
    """An item as its stream entry spelled it, so that a store need not encode it once more."""

    @property
    def data(self) -> bytes:
        """The ``data`` field; empty for a delete."""

    @property
    def meta(self) -> bytes:
        """The ``meta`` field."""


class Encoded(NamedTuple):
    """A wire form made here."""

    data: bytes
    meta: bytes


_decode_put_meta = msgspec.json.Decoder(_PutMeta).decode
_decode_del_meta = msgspec.json.Decoder(_DelMeta).decode
_encode_json = msgspec.json.Encoder().encode
# Copying a fresh state is faster than asking OpenSSL for a new one.
_fresh_sha256 = hashlib.sha256().copy
_declared_size = zstandard.frame_content_size
_DELETE_OPS: Final = frozenset({b"DEL", b"DELETE"})
# zstd contexts are not thread-safe; one engine, and all its stores, live on one event loop, but
# two engines may live on two threads. Compression contexts are therefore made per writer.


def encode_data(content: bytes, compressor: zstandard.ZstdCompressor | None = None) -> bytes:
    """Return ``content`` as the ``data`` field holds it: zstd where that makes it smaller."""
    if len(content) < COMPRESS_FROM_BYTES:
        return content
    smaller = (compressor or zstandard.ZstdCompressor(level=_ZSTD_LEVEL)).compress(content)
    return smaller if len(smaller) < len(content) else content


def encode_meta(item: SyncItem) -> bytes:
    """Return the ``meta`` field of an item or tombstone as JSON."""
    if item.deleted:
        return _encode_json(_DelMeta(item.version, item.updated_at, item.origin))
    return _encode_json(
        {
            "content_type": item.content_type,
            "version": item.version,
            "updated_at": item.updated_at,
            "origin": item.origin,
        }
    )


def encode_fields(item: SyncItem, data: bytes | None = None) -> list[bytes]:
    """Return the fields of the entry that announces ``item``, as a flat list."""
    key = item.key.encode()
    if item.deleted:
        return [b"op", b"DEL", b"key", key, b"meta", encode_meta(item)]
    if data is None:
        data = encode_data(item.content)
    digest = item.content_hash.hex().encode()
    meta = encode_meta(item)
    return [b"op", b"PUT", b"key", key, b"hash", digest, b"data", data, b"meta", meta]


def parse_entry(fields: Sequence[bytes] | None, index: int = 0) -> Entry:
    """Take the fields of an entry apart; extra fields are ignored, order does not matter.

    :raises BadEntryError: if a field is missing or cannot be what it should be.
    """
    if fields is None:
        raise BadEntryError("field", "the entry holds no fields")
    if len(fields) == 10:
        # The order in which every writer we know writes them, and all in one function, because
        # this is the path of nearly every entry; whatever is unusual is looked at again below.
        n_op, op, n_key, key, n_hash, digest, n_data, data, n_meta, meta = fields
        if (
            op == b"PUT"
            and n_op == b"op"
            and n_key == b"key"
            and n_hash == b"hash"
            and n_data == b"data"
            and n_meta == b"meta"
            and 0 < len(key) <= KEY_BYTES_MAX
            and len(digest) == 64
            and len(meta) <= _SHALLOW_BYTES
        ):
            try:
                parsed = _decode_put_meta(meta)
                return Entry(
                    key.decode(),
                    parsed.updated_at,
                    parsed.version,
                    False,
                    unhexlify(digest),
                    parsed.content_type,
                    parsed.origin[:ORIGIN_CHARS_MAX],
                    data,
                    meta,
                    index,
                )
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass
    if len(fields) > FIELDS_MAX:
        raise BadEntryError(
            "field", f"{len(fields)} names and values, at most {FIELDS_MAX} are read"
        )
    if len(fields) % 2:
        raise BadEntryError("field", "a field has a name but no value")
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    try:
        op, key = named[b"op"][:32].upper(), named[b"key"]
    except KeyError as missing:
        raise _missing(missing) from None
    if op in _DELETE_OPS:
        return _parse_del(key, named.get(b"meta"), index)
    if op != b"PUT":
        raise BadEntryError("op", f"unknown operation {op!r}")
    try:
        return _parse_put(key, named.get(b"hash"), named[b"data"], named[b"meta"], index)
    except KeyError as missing:
        raise _missing(missing) from None


def _missing(error: KeyError) -> BadEntryError:
    name: bytes = error.args[0]
    return BadEntryError("field", f"field {name.decode()!r} is missing")


def _parse_key(key: bytes) -> str:
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise BadEntryError("key", f"a key has 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise BadEntryError("text", "the key is not UTF-8") from None


def _parse_put(key: bytes, digest: bytes | None, data: bytes, meta: bytes, index: int) -> Entry:
    text = _parse_key(key)
    _check_meta(meta)
    try:
        parsed = _decode_put_meta(meta)
        # A digest of one character too many is none either.
        raw_digest = None if digest is None else unhexlify(digest[:66])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad_meta(error) from None
    except (HexError, ValueError):
        raise BadEntryError("hash", "the hash is not hexadecimal") from None
    if raw_digest is not None and len(raw_digest) != 32:
        raise BadEntryError("hash", "the hash is not 64 hexadecimal characters")
    return Entry(
        text,
        parsed.updated_at,
        parsed.version,
        False,
        raw_digest,
        parsed.content_type,
        parsed.origin[:ORIGIN_CHARS_MAX],
        data,
        meta,
        index,
    )


def _parse_del(key: bytes, meta: bytes | None, index: int) -> Entry:
    text = _parse_key(key)
    if meta is None:
        return Entry(text, 0, 0, True, EMPTY_HASH, "binary", "", b"", b"", index, stamped=False)
    _check_meta(meta)
    try:
        parsed = _decode_del_meta(meta)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad_meta(error) from None
    return Entry(
        text,
        parsed.updated_at,
        parsed.version,
        True,
        EMPTY_HASH,
        "binary",
        parsed.origin[:ORIGIN_CHARS_MAX],
        b"",
        meta,
        index,
    )


def _check_meta(meta: bytes) -> None:
    if len(meta) > META_BYTES_MAX:
        raise BadEntryError("meta", f"{len(meta)} bytes of meta, the limit is {META_BYTES_MAX}")
    if len(meta) > _SHALLOW_BYTES and is_too_deep(meta, _META_LEVELS_MAX):
        raise BadEntryError("meta", "meta: it is nested too deeply")


def _bad_meta(error: Exception) -> BadEntryError:
    text = str(error)
    reason = "range" if "`int`" in text and ("<=" in text or ">=" in text) else "meta"
    if "out of range" in text:
        reason = "range"
    return BadEntryError(reason, f"meta: {text}")


class DataDecoder:
    """Turns ``data`` fields into verified contents, none larger than ``payload_bytes``.

    What is heavy (see ``is_heavy``) may be decoded on any thread, all else by one thread at a time.
    """

    __slots__ = ("_decompress", "_inline_bytes", "payload_bytes")

    def __init__(self, payload_bytes: int) -> None:
        self.payload_bytes = payload_bytes
        self._inline_bytes = min(INLINE_BYTES, payload_bytes)
        self._decompress = zstandard.ZstdDecompressor().decompress

    def is_heavy(self, data: bytes) -> bool:
        """Say whether decoding takes, or may take, so long that a thread is to do it."""
        return len(data) > INLINE_BYTES or self.declared_bytes(data) > INLINE_BYTES

    def declared_bytes(self, data: bytes) -> int:
        """Return what ``data``, or its first 32 bytes, say that they grow to; 0 if to nothing."""
        if not data.startswith(MAGIC):
            return 0
        try:
            declared = _declared_size(data)
        except zstandard.ZstdError:
            return 0
        # Some writers stream, and leave the size out.
        return declared if declared >= 0 else self.payload_bytes

    def decode_light(self, data: bytes, digest: bytes | None) -> bytes | None:
        """Return the content, or None where it is for ``decode`` on a thread.

        :raises BadEntryError: as ``decode``.
        """
        if len(data) > INLINE_BYTES:
            return None
        if not data.startswith(MAGIC):
            return self._check(data, digest)
        most = self._inline_bytes
        try:
            declared = _declared_size(data)
            if declared > most:
                return None
            try:
                content = self._decompress(data, most)
            except zstandard.ZstdError:
                if declared < 0:
                    return None  # It does not fit, or is broken: only then is it begun anew.
                raise
        except zstandard.ZstdError as error:
            return self._as_it_stands(data, digest, _bad_data(error))
        if digest is not None:
            check = _fresh_sha256()
            check.update(content)
            if check.digest() != digest:
                # An error holds the frames that it has passed, and what stands in them.
                del content
                return self._as_it_stands(data, digest, _wrong_hash())
        return content

    def decode(self, data: bytes, digest: bytes | None) -> bytes:
        """Return the content; with a digest of None any content that decompresses will do.

        :raises BadEntryError: if it is too large, does not decompress or has another hash.
        """
        if not data.startswith(MAGIC):
            return self._check(data, digest)
        # A context is no thread's but its own.
        heavy = self.is_heavy(data)
        decompress = zstandard.ZstdDecompressor().decompress if heavy else self._decompress
        try:
            # The declared size is looked at first: zstd allocates what the header asks for.
            declared = _declared_size(data)
            if declared > self.payload_bytes:
                return self._as_it_stands(data, digest, self._too_large(declared))
            content = decompress(data, self.payload_bytes)
        except zstandard.ZstdError as error:
            return self._as_it_stands(data, digest, _bad_data(error))
        if digest is None or content_hash(content) == digest:
            return content
        del content
        return self._as_it_stands(data, digest, _wrong_hash())

    def _check(self, data: bytes, digest: bytes | None) -> bytes:
        if len(data) > self.payload_bytes:
            raise self._too_large(len(data))
        if digest is not None and content_hash(data) != digest:
            raise _wrong_hash()
        return data

    def _as_it_stands(self, data: bytes, digest: bytes | None, error: BadEntryError) -> bytes:
        """Return a content that itself begins with the magic, or raise why it is none."""
        if digest is not None and len(data) <= self.payload_bytes and content_hash(data) == digest:
            return data
        raise error

    def _too_large(self, size: int) -> BadEntryError:
        return BadEntryError("size", f"{size} bytes of content, the limit is {self.payload_bytes}")


def _wrong_hash() -> BadEntryError:
    return BadEntryError("hash", "the content does not match its hash")


def _bad_data(error: Exception) -> BadEntryError:
    return BadEntryError("data", f"the content does not decompress: {error}")
