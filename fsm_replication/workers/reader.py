"""Reads a peer's stream: what to ask for, what a reply means, and whether entries are missing.

Theory of operation. The *reading position* is how far entries were taken in; it runs ahead of the
settled position by what is in memory. Beside the id it counts the entries that were ever added up
to it, because ids alone cannot tell what a trim has taken. Reads in bulk ask for entries and the
stream's own counts in one transaction: what was trimmed, minus what was read before this batch, is
the gap; and a read that ends at the head must leave both counts equal. Blocking reads at the head
ask for entries alone.

COUNT bounds entries and not bytes, so it is chosen from the running mean size, and a reply that
goes over its limit all the same costs the connection: it is opened again and read with a quarter
of the COUNT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fsm_replication.config import HotPathConfig, Settings
from fsm_replication.current import Current
from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.ports import Connection, Oversize, Position, StreamId

__all__ = ("Gap", "Read", "StreamInfo", "StreamReader", "ask_info", "check_history", "parse_info")

MEAN_BYTES_AT_FIRST: Final = 512.0
REPLY_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Gap:
    """Entries that the stream no longer holds; ``missed`` is None where it cannot be told."""

    missed: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What XINFO STREAM says. ``added`` is None before Redis 7.0, which does not count."""

    length: int
    last_id: StreamId
    first_id: StreamId | None
    added: int | None

    @property
    def trimmed(self) -> int | None:
        """How many entries were ever removed."""
        return None if self.added is None else self.added - self.length

    @property
    def head(self) -> Position:
        """The position of a reader who has read everything."""
        return Position(self.last_id, self.added)

    @property
    def before_first(self) -> Position:
        """The position of a reader to whom the oldest entry is the next one."""
        first = self.first_id
        assert first is not None, "an empty stream has no oldest entry"
        if first.seq:
            return Position(StreamId(first.ms, first.seq - 1), self.trimmed)
        # Entries of the millisecond before have ids up to the largest sequence number.
        return Position(StreamId(max(0, first.ms - 1), 2**64 - 1 if first.ms else 0), self.trimmed)


EMPTY_STREAM: Final = StreamInfo(0, StreamId(0, 0), None, 0)


def parse_info(reply: Any) -> StreamInfo:
    """Read the reply of XINFO STREAM; a missing key is an empty stream.

    :raises PeerReplyError: if the server answered with another error.
    :raises ProtocolError: if the reply has another shape.
    """
    if isinstance(reply, PeerReplyError):
        if "no such key" in str(reply):
            return EMPTY_STREAM
        raise reply
    try:
        named = dict(zip(reply[::2], reply[1::2], strict=True))
        first = named[b"first-entry"]
        added = named.get(b"entries-added")
        return StreamInfo(
            length=int(named[b"length"]),
            last_id=StreamId.parse(named[b"last-generated-id"]),
            first_id=StreamId.parse(first[0]) if first else None,
            added=None if added is None else int(added),
        )
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise ProtocolError(f"XINFO STREAM: unexpected reply ({error!r})") from None


async def ask_info(connection: Connection, stream_key: str, timeout_sec: float) -> StreamInfo:
    """Ask for XINFO STREAM; entries of any size in the reply cost no memory.

    :raises PeerReplyError: if the server answered with an error.
    """
    try:
        reply = await connection.skim("XINFO", "STREAM", stream_key, timeout_sec=timeout_sec)
    except PeerReplyError as error:
        return parse_info(error)
    return parse_info(reply)


def check_history(position: Position, info: StreamInfo, *, entry_is_there: bool) -> Gap | None:
    """Say whether ``position`` is in this stream's history and nothing after it was trimmed.

    None means that reading can go on from there.
    """
    if entry_is_there:
        return None
    if position.stream_id > info.last_id:
        return Gap(None, "the stream's head is older than what was read: it is another stream")
    before_first = info.first_id is None or position.stream_id < info.first_id
    if info.trimmed is None or position.entries_read is None:
        if position.stream_id == info.last_id:
            return None
        return Gap(None, "the entry last read is gone, and this server does not count entries")
    if not before_first:
        return Gap(None, "the entry last read is not in the stream: it is another stream")
    missed = info.trimmed - position.entries_read
    if missed < 0:
        return Gap(None, "the stream has fewer entries than were read: it is another stream")
    if missed > 0:
        return Gap(missed, f"{missed} entries were trimmed before they were read")
    return None


@dataclass(slots=True)
class Read:
    """What one reply came to.

    ``at_head`` says that nothing was left unread when the server answered. ``gap`` is set where
    entries are missing; then ``entries`` must not be used.
    """

    entries: Sequence[Any]
    at_head: bool
    full: bool
    end: Position
    gap: Gap | None = None
    info: StreamInfo | None = None


class StreamReader:
    """Reads on from ``position``; one request at a time is under way."""

    def __init__(self, stream_key: str, current: Current[Settings]) -> None:
        self._key = stream_key
        self._current = current
        # Where it adapts; it may lie outside bounds that have changed since.
        self._adapted = current.value.hot_path.batch_size
        self._mean_bytes = MEAN_BYTES_AT_FIRST
        self._count_max: int | None = None
        self._asked = 0
        self._bulk = False
        self._received_before = 0
        self.position = Position(StreamId(0, 0), 0)

    # How much to ask for

    @property
    def size(self) -> int:
        """Entries the next read at the head asks for."""
        settings = self._settings
        if not settings.adaptive_batch_size:
            return settings.batch_size
        return min(settings.max_batch_size, max(settings.min_batch_size, self._adapted))

    @property
    def _settings(self) -> HotPathConfig:
        return self._current.value.hot_path

    @property
    def _reply_bytes(self) -> int:
        return self._current.value.limits.batch_bytes // 2

    def _count(self, wanted: int) -> int:
        by_bytes = int(self._reply_bytes * REPLY_SHARE / max(1.0, self._mean_bytes))
        count = max(1, min(wanted, by_bytes))
        settings = self._settings
        if settings.rate_limit_enabled:
            # With a rate limit no read asks for more than may come at once.
            count = min(count, settings.rate_limit_burst)
        return count if self._count_max is None else min(count, self._count_max)

    def shrink(self) -> bool:
        """After a reply over its limit: ask for a quarter; False if it was a single entry."""
        if self._asked <= 1:
            return False
        self._count_max = max(1, self._asked // 4)
        return True

    def adapt(self, read: Read) -> None:
        """Adapt the size to a read at the head or in bulk: double it if full, shrink if empty."""
        if self._count_max is not None and not read.full:
            self._count_max = None
        elif self._count_max is not None:
            self._count_max *= 2
        settings, size = self._settings, self.size
        if not settings.adaptive_batch_size:
            self._adapted = settings.batch_size
        elif read.full:
            self._adapted = min(settings.max_batch_size, size * 2)
        elif not read.entries:
            self._adapted = max(settings.min_batch_size, size - max(10, size // 10))

    # Asking

    def ask_bulk(self, connection: Connection) -> asyncio.Future[list[Any]]:
        """Send a read that returns at once, with the stream's counts."""
        settings = self._settings
        wanted = self.size if settings.adaptive_batch_size else settings.max_batch_size
        self._asked = self._count(wanted)
        self._bulk = True
        self._received_before = connection.received_bytes
        connection.limit_reply(self._reply_bytes)
        after = str(self.position.stream_id)
        return connection.send(
            ("MULTI",),
            ("XREAD", "COUNT", self._asked, "STREAMS", self._key, after),
            ("XINFO", "STREAM", self._key),
            ("EXEC",),
        )

    def ask_blocking(self, connection: Connection) -> asyncio.Future[list[Any]]:
        """Send a read that waits at the head for up to ``block_timeout``."""
        self._asked = self._count(self.size)
        self._bulk = False
        self._received_before = connection.received_bytes
        connection.limit_reply(self._reply_bytes)
        block_ms = max(1, round(self._settings.block_timeout * 1000))
        after = str(self.position.stream_id)
        return connection.send(
            ("XREAD", "COUNT", self._asked, "BLOCK", block_ms, "STREAMS", self._key, after)
        )

    # Understanding

    def take(self, connection: Connection, replies: list[Any]) -> Read:
        """Read a reply; the reading position moves on unless there is a gap.

        :raises PeerReplyError: if the server answered with an error.
        :raises ProtocolError: if the reply has another shape.
        """
        info: StreamInfo | None = None
        if self._bulk:
            executed = replies[-1]
            if isinstance(executed, PeerReplyError):
                # EXECABORT only says that something was wrong; what it was stands before it.
                raise next((r for r in replies if isinstance(r, PeerReplyError)), executed)
            try:
                reply, about = executed
            except (TypeError, ValueError):
                raise ProtocolError("EXEC: unexpected reply") from None
            info = parse_info(about)
        else:
            (reply,) = replies
        if isinstance(reply, PeerReplyError):
            raise reply
        read = self._interpret(self._entries(reply), info)
        if read.gap is None:
            self.position = read.end
        if read.entries:
            size = (connection.received_bytes - self._received_before) / len(read.entries)
            self._mean_bytes += (size - self._mean_bytes) / 4
        self.adapt(read)
        return read

    @staticmethod
    def _entries(reply: Any) -> Sequence[Any]:
        if reply is None:
            return ()
        try:
            ((_key, entries),) = reply
        except (TypeError, ValueError):
            raise ProtocolError("XREAD: unexpected reply") from None
        # Checked whole and once, so that nothing further up has to doubt an entry's shape.
        rows: list[Any] = entries if isinstance(entries, list) else [None]
        for row in rows:
            if type(row) is not list or len(row) != 2 or type(row[0]) is not bytes:
                raise ProtocolError("XREAD: unexpected reply")
        return rows

    def _interpret(self, entries: Sequence[Any], info: StreamInfo | None) -> Read:
        before = self.position
        end = before
        if entries:
            try:
                last_id = StreamId.parse(entries[-1][0])
            except (TypeError, ValueError, IndexError):
                raise ProtocolError("XREAD: an entry without an id") from None
            count = before.entries_read
            end = Position(last_id, None if count is None else count + len(entries))
        full = len(entries) >= self._asked
        if info is None:
            return Read(entries, at_head=not full, full=full, end=end)
        gap = self._find_gap(before, end, info, len(entries))
        at_head = end.stream_id >= info.last_id or not full
        if gap is None and at_head and end.entries_read is None and info.added is not None:
            end = Position(end.stream_id, info.added)
        return Read(entries, at_head, full, end, gap, info)

    @staticmethod
    def _find_gap(before: Position, end: Position, info: StreamInfo, count: int) -> Gap | None:
        if info.trimmed is None or before.entries_read is None:
            # Without counts, a missing entry shows only in that ours is older than the first.
            if info.first_id is not None and before.stream_id < info.first_id:
                return Gap(None, "the entry last read is gone, and this server does not count")
            return None
        missed = info.trimmed - before.entries_read
        if missed > 0:
            return Gap(missed, f"{missed} entries were trimmed before they were read")
        if end.stream_id > info.last_id:
            return Gap(None, "the stream's head is older than what was read: it is another stream")
        at_head = end.stream_id >= info.last_id
        if at_head and end.entries_read != info.added:
            lost = None if info.added is None else info.added - before.entries_read - count
            if lost is not None and lost > 0:
                return Gap(lost, f"{lost} entries were removed before they were read")
            return Gap(None, "the stream has fewer entries than were read: it is another stream")
        return None

    def at_end(self, info: StreamInfo) -> Read:
        """Return a read that found nothing more, with counts that were asked for apart from it."""
        return self._interpret((), info)

    # One entry too large to hold

    async def look_ahead(
        self, connection: Connection, timeout_sec: float
    ) -> tuple[Position, int] | None:
        """Return where the next entry ends and its size in bytes, keeping no content.

        None if there is no next entry.
        """
        after = str(self.position.stream_id)
        reply = await connection.skim(
            "XREAD", "COUNT", 1, "STREAMS", self._key, after, timeout_sec=timeout_sec
        )
        entries = self._entries(reply)
        if not entries:
            return None
        try:
            stream_id, strings = StreamId.parse(entries[0][0]), entries[0][1] or ()
            size = sum(s.size if isinstance(s, Oversize) else len(s) for s in strings)
        except (TypeError, ValueError, IndexError):
            raise ProtocolError("XREAD: unexpected reply") from None
        count = self.position.entries_read
        return Position(stream_id, None if count is None else count + 1), size
