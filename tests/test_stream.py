"""Stream entries: what the data field may hold, and what a reader refuses."""

from __future__ import annotations

import hashlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.errors import BadEntryError
from fsm_replication.items import SyncItem, content_hash
from fsm_replication.stream import (
    COMPRESS_FROM_BYTES,
    MAGIC,
    DataDecoder,
    encode_data,
    encode_fields,
    parse_entry,
)

LIMIT = 10_000
DECODER = DataDecoder(LIMIT)
TEXT = b"some text that gets smaller, " * 20


def refused(data: bytes, digest: bytes | None) -> str:
    """Return the reason for which a data field is refused."""
    with pytest.raises(BadEntryError) as caught:
        DECODER.decode(data, digest)
    return caught.value.reason


@given(st.binary(max_size=300) | st.binary(max_size=8).map(lambda part: part * 40))
def test_what_is_written_can_be_read(content: bytes) -> None:
    """If this fails an item arrives as another, or not at all."""
    item = SyncItem("k", content, "binary", content_hash(content), 3, 5, False, "n")
    entry = parse_entry(encode_fields(item))
    assert entry.digest == item.content_hash
    assert DECODER.decode(entry.data, entry.digest) == content
    assert len(entry.data) <= len(content)
    assert (entry.version, entry.updated_at, entry.origin) == (3, 5, "n")


def test_only_what_gets_smaller_is_compressed() -> None:
    """If this fails foreign readers find frames where they expect plain content."""
    short = b"a" * (COMPRESS_FROM_BYTES - 1)
    assert encode_data(short) == short
    assert encode_data(short + b"a").startswith(MAGIC)
    noise = hashlib.sha512(b"noise").digest() * 1
    assert encode_data(noise) == noise


def test_a_compressed_content_is_checked_against_its_hash() -> None:
    """If this fails a damaged content replaces a good one everywhere."""
    data = encode_data(TEXT)
    assert data.startswith(MAGIC)
    assert DECODER.decode(data, content_hash(TEXT)) == TEXT
    assert DECODER.decode(data, None) == TEXT
    assert refused(data, content_hash(b"other")) == "hash"
    assert refused(TEXT, content_hash(b"other")) == "hash"
    assert refused(data[:-3], content_hash(TEXT)) == "data"


def test_content_that_begins_with_the_magic_may_stand_as_it_is() -> None:
    """If this fails a foreign node's zstd files are refused, or unpacked."""
    plain = MAGIC + b" is no frame"
    assert DECODER.decode(plain, content_hash(plain)) == plain
    frame = encode_data(TEXT)
    assert DECODER.decode(frame, content_hash(frame)) == frame


@pytest.mark.parametrize("declared", [True, False])
def test_what_grows_over_the_limit_is_refused(declared: bool) -> None:
    """If this fails a few bytes of a peer fill this node's memory."""
    bomb = b"\0" * (LIMIT + 1)
    packed = zstandard.ZstdCompressor(write_content_size=declared).compress(bomb)
    if not declared:
        stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        packed = stream.compress(bomb) + stream.flush()
    assert len(packed) < 100
    assert refused(packed, content_hash(bomb)) in {"size", "data"}
    assert refused(packed, None) in {"size", "data"}
    assert refused(b"x" * (LIMIT + 1), None) == "size"
    whole = b"\0" * LIMIT
    assert DECODER.decode(encode_data(whole), content_hash(whole)) == whole
