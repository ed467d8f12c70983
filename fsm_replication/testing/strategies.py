"""Strategies of hypothesis for what the library works on.

Trigger sequences are made from the tables themselves, so they are those of the machines that run:

* :func:`walks`: sequences that are legal from the initial state on;
* :func:`missteps`: such a walk, and then one trigger that is illegal where it has led;
* :func:`triggers`: any sequence of a table's triggers, legal or not.

Items, order tuples and stream entries are valid unless the name says otherwise. Few keys and close
times are drawn, so that items meet: pass ``keys`` and ``times`` for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

from fsm_replication.testing.needs import require

require("fsm_replication.testing.strategies", "hypothesis")

from hypothesis import strategies as st  # noqa: E402 - only where it is installed

from fsm_replication.items import (  # noqa: E402
    EMPTY_HASH,
    KEY_BYTES_MAX,
    NUMBER_MAX,
    Stamp,
    SyncItem,
    content_hash,
)
from fsm_replication.stream import MAGIC, encode_fields  # noqa: E402
from fsm_replication.tables import Table  # noqa: E402

__all__ = (
    "BadEntry",
    "bad_entries",
    "contents",
    "entries",
    "histories",
    "item_keys",
    "items",
    "missteps",
    "stamps",
    "tombstones",
    "triggers",
    "walks",
)

# In milliseconds since the epoch; any fixed time will do for what is never compared with a clock.
SOME_TIME_MS: Final = 1_700_000_000_000
_FEW_KEYS: Final = ("k", "k.1", "other")
_KEY_CHARACTERS: Final = st.characters(exclude_categories=["Cs"])

# Trigger sequences ------------------------------------------------------------------------------


def triggers(table: Table, *, max_size: int = 40) -> st.SearchStrategy[list[str]]:
    """Return sequences of the table's triggers, whether they are legal or not."""
    return st.lists(st.sampled_from(table.triggers), max_size=max_size)


@st.composite
def walks(draw: st.DrawFn, table: Table, *, max_size: int = 40) -> list[str]:
    """Return sequences of triggers that are legal one after the other, guards left aside.

    They begin in the initial state, and end early where a final one is reached.
    """
    state, path = table.initial, list[str]()
    for _ in range(draw(st.integers(0, max_size))):
        legal = table.legal(state)
        if not legal:
            break
        path.append(draw(st.sampled_from(legal)))
        row = table.move(state, path[-1])
        assert row is not None, "the trigger was taken from the legal ones"
        state = row.dest
    return path


@st.composite
def missteps(draw: st.DrawFn, table: Table, *, max_size: int = 40) -> tuple[list[str], str]:
    """Return a legal walk, and a trigger that is illegal where it ends.

    The table must have a state in which some trigger is illegal, as all of ours have.
    """
    path = draw(
        walks(table, max_size=max_size).filter(lambda path: bool(_illegal_after(table, path)))
    )
    return path, draw(st.sampled_from(_illegal_after(table, path)))


def _illegal_after(table: Table, path: Sequence[str]) -> list[str]:
    state = table.initial
    for trigger in path:
        row = table.move(state, trigger)
        assert row is not None, "the path is legal"
        state = row.dest
    return [trigger for trigger in table.triggers if table.move(state, trigger) is None]


# Items ------------------------------------------------------------------------------------------


def item_keys() -> st.SearchStrategy[str]:
    """Return keys of any kind: every character UTF-8 can spell, patterns, the longest there are."""
    return st.one_of(
        st.text(_KEY_CHARACTERS, min_size=1, max_size=20),
        st.sampled_from(
            ["a", "a.b", "a:b", "a*", "[x]", "a\\", "é.日本", "\0", "\r\n", "x" * KEY_BYTES_MAX]
        ),
    )


def contents() -> st.SearchStrategy[bytes]:
    """Return contents: empty, short, worth compressing, or looking as if they were compressed."""
    return st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b"", b"{}", b"[1,2]", b"x" * 500, MAGIC, MAGIC + b"no frame" * 20]),
    )


_Drawn = TypeVar("_Drawn")


def _given(
    strategy: st.SearchStrategy[_Drawn] | None, otherwise: st.SearchStrategy[_Drawn]
) -> st.SearchStrategy[_Drawn]:
    # A strategy warns where it is asked whether it is true.
    return otherwise if strategy is None else strategy


def items(
    *,
    keys: st.SearchStrategy[str] | None = None,
    bodies: st.SearchStrategy[bytes] | None = None,
    times: st.SearchStrategy[int] | None = None,
    versions: st.SearchStrategy[int] | None = None,
    content_types: st.SearchStrategy[str] | None = None,
    origin: str = "origin",
) -> st.SearchStrategy[SyncItem]:
    """Return live items; ``times`` are milliseconds since the epoch."""
    return st.builds(
        lambda key, body, kind, version, at: SyncItem(
            key, body, kind, content_hash(body), version, at, False, origin
        ),
        _given(keys, st.sampled_from(_FEW_KEYS)),
        _given(bodies, contents()),
        _given(content_types, st.sampled_from(["binary", "json"])),
        _given(versions, st.integers(0, 3)),
        _given(times, st.integers(SOME_TIME_MS, SOME_TIME_MS + 3)),
    )


def tombstones(
    *,
    keys: st.SearchStrategy[str] | None = None,
    times: st.SearchStrategy[int] | None = None,
    versions: st.SearchStrategy[int] | None = None,
    origin: str = "origin",
) -> st.SearchStrategy[SyncItem]:
    """Return tombstones; ``times`` are milliseconds since the epoch."""
    return st.builds(
        lambda key, version, at: SyncItem(
            key, b"", "binary", EMPTY_HASH, version, at, True, origin
        ),
        _given(keys, st.sampled_from(_FEW_KEYS)),
        _given(versions, st.integers(0, 3)),
        _given(times, st.integers(SOME_TIME_MS, SOME_TIME_MS + 3)),
    )


def histories(
    *,
    keys: st.SearchStrategy[str] | None = None,
    bodies: st.SearchStrategy[bytes] | None = None,
    times: st.SearchStrategy[int] | None = None,
    max_size: int = 12,
) -> st.SearchStrategy[list[SyncItem]]:
    """Return items and tombstones in any order and with repetitions, as peers may send them."""
    live = items(keys=keys, bodies=bodies, times=times)
    return st.lists(live | tombstones(keys=keys, times=times), max_size=max_size).flatmap(
        lambda made: (
            st.lists(st.sampled_from(made), max_size=3).map(lambda more: made + more)
            if made
            else st.just(made)
        )
    )


def stamps() -> st.SearchStrategy[Stamp]:
    """Return order tuples, over the whole range of each field, often equal in the first ones."""
    numbers = st.integers(0, 3) | st.integers(2**31 - 1, 2**33) | st.integers(2**52, NUMBER_MAX)
    # Hashes that differ in one byte find comparisons that are not bytewise and unsigned.
    one_byte = st.builds(
        lambda place, byte: bytes(place) + bytes([byte]) + bytes(31 - place),
        st.integers(0, 31),
        st.sampled_from([0, 1, 0x41, 0x61, 0x7F, 0x80, 0xE9, 0xFF]),
    )
    hashes = st.binary(min_size=32, max_size=32) | one_byte
    live = st.builds(
        Stamp, numbers, numbers, st.just(False), hashes, st.sampled_from(["binary", "json"])
    )
    dead = st.builds(Stamp, numbers, numbers, st.just(True), st.just(EMPTY_HASH), st.just("binary"))
    return live | dead


# Stream entries ---------------------------------------------------------------------------------


def entries(drawn: st.SearchStrategy[SyncItem] | None = None) -> st.SearchStrategy[list[bytes]]:
    """Return the fields of valid entries as flat lists, in any order and with fields of others."""
    extra = st.sampled_from([[], [b"trace", b"00-1"], [b"", b""]])
    return st.builds(
        lambda item, order, more: [
            part for pair in order([*_pairs(encode_fields(item)), *_pairs(more)]) for part in pair
        ],
        _given(drawn, items() | tombstones()),
        st.sampled_from([list, lambda pairs: list(reversed(pairs))]),
        extra,
    )


class BadEntry(NamedTuple):
    """The fields of an entry that is none, and the reason its dead letter has."""

    fields: list[bytes]
    reason: str


@st.composite
def bad_entries(draw: st.DrawFn) -> BadEntry:
    """Return entries with just one thing wrong, of each kind a reader must survive."""
    item = draw(items(bodies=st.just(b"content " * 20)))
    named = dict(_pairs(encode_fields(item)))
    long_ago = b'{"content_type":"binary","version":-1,"updated_at":0}'
    changes: list[tuple[bytes, bytes | None, str]] = [
        (b"op", b"MERGE", "op"),
        (b"op", None, "field"),
        (b"key", None, "field"),
        (b"key", b"", "key"),
        (b"key", b"x" * (KEY_BYTES_MAX + 1), "key"),
        (b"key", b"\xff", "text"),
        (b"data", None, "field"),
        (b"data", MAGIC + b"no frame", "data"),
        (b"data", b"other", "hash"),
        (b"hash", b"zz" * 32, "hash"),
        (b"hash", b"00", "hash"),
        (b"meta", None, "field"),
        (b"meta", b"{", "meta"),
        (b"meta", b'{"version":1,"updated_at":1}', "meta"),
        (b"meta", long_ago, "range"),
        (b"meta", b'{"content_type":"binary","version":1,"updated_at":%d}' % 2**53, "range"),
    ]
    name, value, reason = draw(st.sampled_from(changes))
    if value is None:
        del named[name]
    else:
        named[name] = value
    return BadEntry([part for pair in named.items() for part in pair], reason)


def _pairs(fields: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(fields[::2], fields[1::2], strict=True))
