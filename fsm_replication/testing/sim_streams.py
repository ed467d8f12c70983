"""The streams of the simulated Redis.

Entries stand in one list. Like Redis it fills nodes of up to 100 entries or 4 KiB, because a trim
with ``~`` removes whole nodes only; bytes are estimated, so where a node ends may differ a little.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

from fsm_replication.errors import PeerReplyError
from fsm_replication.ports import PART_MAX, StreamId
from fsm_replication.testing.sim_values import (
    SYNTAX,
    Keyspace,
    command,
    integer,
    wrong_arity,
)

__all__ = ("Stream", "Wait")

NODE_ENTRIES_MAX: Final = 100
NODE_BYTES_MAX: Final = 4096
TRIMMED_MAX: Final = 100 * NODE_ENTRIES_MAX
ZERO: Final = StreamId(0, 0)
LAST: Final = StreamId(PART_MAX, PART_MAX)
# As strtoull reads it.
_ID: Final = re.compile(rb"\s*\+?([0-9]+)(?:-\s*\+?([0-9]+))?")
BAD_ID: Final = "ERR Invalid stream ID specified as stream command argument"


class Entry(NamedTuple):
    """One entry; ``node`` numbers the node that holds it."""

    id: StreamId
    fields: tuple[bytes, ...]
    node: int

    def reply(self) -> list[Any]:
        """Return it as it is sent."""
        return [str(self.id).encode(), list(self.fields)]


class Stream:
    """One stream, with the counts that Redis keeps."""

    __slots__ = ("_node", "_node_bytes", "_node_entries", "added", "entries", "last", "max_deleted")
    kind: ClassVar[bytes] = b"stream"

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.added = 0
        self.last = ZERO
        self.max_deleted = ZERO
        self._node = 0
        self._node_entries = 0
        self._node_bytes = 0

    def copy(self) -> Stream:
        """Return a stream that changes on its own."""
        twin = Stream()
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.entries = list(self.entries)
        return twin

    def is_gone(self) -> bool:
        """Return False: empty streams stay."""
        return False

    @property
    def first(self) -> StreamId:
        """The oldest entry's id, 0-0 where there is none."""
        return self.entries[0].id if self.entries else ZERO

    @property
    def nodes(self) -> int:
        """How many nodes hold the entries."""
        return len({entry.node for entry in self.entries})

    def append(self, at: StreamId, fields: tuple[bytes, ...]) -> None:
        """Add an entry, whose id must be larger than all before."""
        size = 8 + sum(len(part) + 2 for part in fields)
        tail = self.entries[-1].node if self.entries else None
        full = self._node_entries >= NODE_ENTRIES_MAX or self._node_bytes + size >= NODE_BYTES_MAX
        if full or tail != self._node:
            self._node += 1
            self._node_entries = self._node_bytes = 0
        self._node_entries += 1
        self._node_bytes += size
        self.entries.append(Entry(at, fields, self._node))
        self.last = at
        self.added += 1

    def index(self, at: StreamId) -> int:
        """Return where the first entry of at least this id stands."""
        return bisect_left(self.entries, at, key=lambda entry: entry.id)

    def between(self, low: StreamId, high: StreamId) -> Sequence[Entry]:
        """Return the entries from one id to another, both included."""
        begin, end = self.index(low), self.index(high)
        if end < len(self.entries) and self.entries[end].id == high:
            end += 1
        return self.entries[begin:end]

    def delete(self, at: StreamId) -> bool:
        """Remove one entry."""
        where = self.index(at)
        if where == len(self.entries) or self.entries[where].id != at:
            return False
        del self.entries[where]
        self.max_deleted = max(self.max_deleted, at)
        return True

    def trim(self, goes: Callable[[int, Entry], bool], *, whole_nodes: bool, limit: int) -> int:
        """Remove entries from the front while ``goes(place, entry)``; returns how many."""
        count = 0
        while count < len(self.entries) and goes(count, self.entries[count]):
            count += 1
        if whole_nodes:
            if limit:
                count = min(count, limit)
            while 0 < count < len(self.entries) and (
                self.entries[count].node == self.entries[count - 1].node
            ):
                count -= 1
        del self.entries[:count]
        return count


# Arguments ----------------------------------------------------------------------------------------


def _stream_id(raw: bytes, missing_seq: int = 0) -> StreamId:
    found = _ID.fullmatch(raw)
    parts = [int(part) for part in found.groups(default=missing_seq)] if found is not None else []
    if not parts or max(parts) > PART_MAX:
        raise PeerReplyError(BAD_ID)
    return StreamId(*parts)


def _loose_id(raw: bytes, missing_seq: int = 0) -> StreamId:
    if raw in (b"-", b"+"):
        return ZERO if raw == b"-" else LAST
    return _stream_id(raw, missing_seq)


def _interval(low_raw: bytes, high_raw: bytes) -> tuple[StreamId, StreamId]:
    if low_raw[:1] == b"(" and len(low_raw) > 1:
        low = _stream_id(low_raw[1:])
        if low == LAST:
            raise PeerReplyError("ERR invalid start ID for the interval")
        low = low.next
    else:
        low = _loose_id(low_raw)
    if high_raw[:1] == b"(" and len(high_raw) > 1:
        high = _stream_id(high_raw[1:], PART_MAX)
        if high == ZERO:
            raise PeerReplyError("ERR invalid end ID for the interval")
        return low, high.previous
    return low, _loose_id(high_raw, PART_MAX)


@dataclass(slots=True)
class _Trim:
    """What XADD and XTRIM say about trimming."""

    maxlen: int | None = None
    minid: StreamId | None = None
    whole_nodes: bool = False
    limit: int | None = None
    make: bool = True

    def take(self, rest: list[bytes], *, adding: bool) -> bool:
        """Take one option off ``rest``; False if what comes is none."""
        option = rest[0].upper()
        if adding and option == b"NOMKSTREAM":
            rest.pop(0)
            self.make = False
        elif option in (b"MAXLEN", b"MINID") and len(rest) > 1:
            self._take_bound(rest)
        elif option == b"LIMIT" and len(rest) > 1:
            self.limit = integer(rest[1])
            if self.limit < 0:
                raise PeerReplyError("ERR The LIMIT argument must be >= 0.")
            del rest[:2]
        else:
            return False
        return True

    def _take_bound(self, rest: list[bytes]) -> None:
        if self.maxlen is not None or self.minid is not None:
            raise PeerReplyError(
                "ERR syntax error, MAXLEN and MINID options at the same time are not compatible"
            )
        option = rest.pop(0).upper()
        if rest[0] in (b"~", b"=") and len(rest) > 1:
            self.whole_nodes = rest.pop(0) == b"~"
        raw = rest.pop(0)
        if option == b"MINID":
            self.minid = _stream_id(raw)
            return
        self.maxlen = integer(raw)
        if self.maxlen < 0:
            raise PeerReplyError("ERR The MAXLEN argument must be >= 0.")

    def check(self, *, adding: bool) -> None:
        """Raise PeerReplyError if the options do not fit together."""
        trims = self.maxlen is not None or self.minid is not None
        if not trims and (self.limit or not adding):
            raise PeerReplyError("ERR syntax error, a trimming strategy is missing")
        if self.limit is not None and not self.whole_nodes:
            raise PeerReplyError(
                "ERR syntax error, LIMIT cannot be used without the special ~ option"
            )

    def run(self, stream: Stream) -> int:
        """Trim; returns how many entries went."""
        limit = TRIMMED_MAX if self.limit is None else self.limit
        maxlen, minid = self.maxlen, self.minid
        if maxlen is not None:
            surplus = len(stream.entries) - maxlen
            return stream.trim(
                lambda place, _: place < surplus, whole_nodes=self.whole_nodes, limit=limit
            )
        if minid is not None:
            return stream.trim(
                lambda _, entry: entry.id < minid, whole_nodes=self.whole_nodes, limit=limit
            )
        return 0


# Writing ------------------------------------------------------------------------------------------


@command("XADD", -5)
def _xadd(db: Keyspace, args: list[bytes]) -> bytes | None:
    key, *rest = args
    trim = _Trim()
    while rest and trim.take(rest, adding=True):
        pass
    raw = rest.pop(0) if rest else None
    given: StreamId | None = None
    counts_on = db.dialect.half_ids and raw is not None and _is_half(raw)
    if raw is not None and raw != b"*":
        given = _stream_id(raw.removesuffix(b"-*") if counts_on else raw)
    trim.check(adding=True)
    if raw is None or not rest or len(rest) % 2:
        raise wrong_arity("xadd")
    if given == ZERO and not counts_on:
        raise PeerReplyError("ERR The ID specified in XADD must be greater than 0-0")
    stream = db.get(key, Stream)
    if stream is None and not trim.make:
        return None
    at = _next_id(stream or Stream(), given, counts_on=counts_on, now_ms=db.now_ms())
    stream = db.make(key, Stream)
    stream.append(at, tuple(rest))
    trim.run(stream)
    db.ready.append(key)
    return str(at).encode()


def _is_half(raw: bytes) -> bool:
    return raw.endswith(b"-*") and raw.count(b"-") == 1


def _next_id(stream: Stream, given: StreamId | None, *, counts_on: bool, now_ms: int) -> StreamId:
    last = stream.last
    if last == LAST:
        raise PeerReplyError(
            "ERR The stream has exhausted the last possible ID, unable to add more items"
        )
    if given is None:
        return StreamId(now_ms, 0) if now_ms > last.ms else last.next
    if counts_on and given.ms == last.ms and last.seq < PART_MAX:
        given = last.next
    if given <= last:
        raise PeerReplyError(
            "ERR The ID specified in XADD is equal or smaller than the target stream top item"
        )
    return given


@command("XDEL", -3)
def _xdel(db: Keyspace, args: list[bytes]) -> int:
    stream = db.get(args[0], Stream)
    if stream is None:
        return 0
    ids = [_stream_id(raw) for raw in args[1:]]
    return sum(stream.delete(at) for at in ids)


@command("XTRIM", -4)
def _xtrim(db: Keyspace, args: list[bytes]) -> int:
    key, *rest = args
    trim = _Trim()
    while rest:
        if not trim.take(rest, adding=False):
            raise PeerReplyError(SYNTAX)
    trim.check(adding=False)
    stream = db.get(key, Stream)
    return 0 if stream is None else trim.run(stream)


# Reading ------------------------------------------------------------------------------------------


@command("XLEN", 2)
def _xlen(db: Keyspace, args: list[bytes]) -> int:
    stream = db.get(args[0], Stream)
    return 0 if stream is None else len(stream.entries)


def _range(
    db: Keyspace, key: bytes, ends: tuple[bytes, bytes], rest: list[bytes], step: int
) -> Any:
    interval = _interval(*ends)
    count: int | None = None
    while rest:
        if rest.pop(0).upper() != b"COUNT" or not rest:
            raise PeerReplyError(SYNTAX)
        count = max(0, integer(rest.pop(0)))
    stream = db.get(key, Stream)
    if stream is None:
        return []
    if count == 0:
        return None
    found = stream.between(*interval)
    return [entry.reply() for entry in found[::step][:count]]


@command("XRANGE", -4)
def _xrange(db: Keyspace, args: list[bytes]) -> Any:
    key, low, high, *rest = args
    return _range(db, key, (low, high), rest, 1)


@command("XREVRANGE", -4)
def _xrevrange(db: Keyspace, args: list[bytes]) -> Any:
    key, high, low, *rest = args
    return _range(db, key, (low, high), rest, -1)


@dataclass(slots=True)
class Wait:
    """Stands for the reply to a read that blocks; ``timeout_ms`` 0 is for ever."""

    streams: list[tuple[bytes, StreamId]]
    count: int
    timeout_ms: int
    wake: Callable[[Any], None] = field(default=lambda _: None)

    def waits_for(self, key: bytes) -> bool:
        """Whether an entry of a stream may end this."""
        return any(name == key for name, _ in self.streams)

    def answer(self, db: Keyspace, key: bytes) -> Any:
        """Return the reply now that a stream has got an entry, or None to wait on."""
        stream = db.find(key)
        if not isinstance(stream, Stream):
            return None
        if db.dialect.reads_again:
            try:
                return _read(db, self.streams, self.count)
            except PeerReplyError as error:
                return PeerReplyError(str(error))
        # The first place of a key that is named twice is the one that counts.
        after = next(at for name, at in self.streams if name == key)
        if stream.last <= after:
            return None
        return [[key, _entries_after(stream, after, self.count)]]


def _entries_after(stream: Stream, after: StreamId, count: int) -> list[Any]:
    begin = stream.index(after.next)
    entries = stream.entries[begin : begin + count if count else None]
    return [entry.reply() for entry in entries]


def _read(db: Keyspace, streams: Sequence[tuple[bytes, StreamId]], count: int) -> Any:
    found: list[Any] = []
    for key, after in streams:
        stream = db.get(key, Stream)
        if stream is not None and stream.entries and stream.entries[-1].id > after:
            found.append([key, _entries_after(stream, after, count)])
    return found or None


def _reads_after(db: Keyspace, key: bytes, raw: bytes) -> StreamId:
    stream = db.get(key, Stream)
    if raw == b"$":
        return stream.last if stream is not None else ZERO
    if raw == b">":
        raise PeerReplyError("ERR The > ID can be specified only when calling XREADGROUP")
    if raw != b"+" or not db.dialect.plus_is_last_entry:
        return _stream_id(raw)
    if stream is None:
        return ZERO
    if db.dialect.plus_passes_over_deleted and stream.entries:
        return stream.entries[-1].id.previous
    return stream.last.previous


@command("XREAD", -4)
def _xread(db: Keyspace, args: list[bytes]) -> Any:
    rest = list(args)
    count, timeout_ms = 0, None
    while True:
        option = rest.pop(0).upper() if rest else b""
        if option == b"STREAMS" and rest:
            break
        if option == b"COUNT" and rest:
            count = max(0, integer(rest.pop(0)))
        elif option == b"BLOCK" and rest:
            timeout_ms = integer(rest.pop(0), "ERR timeout is not an integer or out of range")
            if timeout_ms < 0:
                raise PeerReplyError("ERR timeout is negative")
        else:
            raise PeerReplyError(SYNTAX)
    if len(rest) % 2:
        raise PeerReplyError(
            "ERR Unbalanced XREAD list of streams: for each stream key an ID or '$' must be"
            " specified."
        )
    half = len(rest) // 2
    wanted = [
        (key, _reads_after(db, key, raw)) for key, raw in zip(rest[:half], rest[half:], strict=True)
    ]
    found = _read(db, wanted, count)
    if found is not None:
        return found
    return None if timeout_ms is None else Wait(wanted, count, timeout_ms)


@command("XINFO|STREAM", -3)
def _xinfo_stream(db: Keyspace, args: list[bytes]) -> list[Any]:
    key, *rest = args
    stream = db.get(key, Stream)
    if stream is None:
        raise PeerReplyError("ERR no such key")
    if rest:
        raise PeerReplyError(SYNTAX)
    nodes = stream.nodes
    counts: tuple[Any, ...] = ()
    if db.dialect.counts_entries:
        counts = (
            *(b"max-deleted-entry-id", str(stream.max_deleted).encode()),
            *(b"entries-added", stream.added),
            *(b"recorded-first-entry-id", str(stream.first).encode()),
        )
    return [
        *(b"length", len(stream.entries)),
        *(b"radix-tree-keys", nodes),
        *(b"radix-tree-nodes", nodes + 1),
        *(b"last-generated-id", str(stream.last).encode()),
        *counts,
        *(b"groups", 0),
        *(b"first-entry", stream.entries[0].reply() if stream.entries else None),
        *(b"last-entry", stream.entries[-1].reply() if stream.entries else None),
    ]
