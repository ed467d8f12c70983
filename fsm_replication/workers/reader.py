"""Reads a peer's stream: what to ask for, what a reply means, and whether entries are missing.

Theory of operation. The *reading position* is how far entries were taken in; it runs ahead of the
settled position by what is in memory. Beside the id it counts the entries that were ever added up
to it, because ids alone cannot always tell what a trim has taken. Reads in bulk ask for entries and
the stream's own counts in one transaction: what was trimmed, minus what was read before this batch,
is the gap; and a read that ends at the head must leave both counts equal. Blocking reads at the head
ask for entries alone where the server counts: the next read in bulk sees what they have missed.
Where it does not, that would be too late, and they ask XINFO in the same flight.

COUNT bounds entries and not bytes, so it is chosen from the running mean size, and a reply that
goes over its limit all the same costs the connection: it is opened again and read with a quarter
of the COUNT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fsm_replication.abilities import Abilities
from fsm_replication.config import HotPathConfig, Settings
from fsm_replication.current import Current
from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.ports import BEFORE_ALL, Connection, Oversize, Position, StreamId
from fsm_replication.replies import entries as entries_of
from fsm_replication.replies import raise_errors, reply_list
from fsm_replication.workers.history import Gap, StreamInfo, find_gap, learn_info, parse_info

__all__ = ("Read", "StreamReader")

MEAN_BYTES_AT_FIRST: Final = 512.0
REPLY_SHARE: Final = 0.5
# MULTI, what is queued, EXEC.
TRANSACTION_REPLIES: Final = 4


@dataclass(slots=True)
class Read:
    """What one reply came to.

    ``at_head`` says that nothing was left unread when the server answered. ``gap`` is set where
    entries are missing before ``start``; what came after is used once that is noted.
    """

    entries: Sequence[Any]
    at_head: bool
    full: bool
    end: Position
    gap: Gap | None = None
    info: StreamInfo | None = None

    @property
    def start(self) -> Position:
        """Where reading goes on behind a gap: before the entries that came."""
        if not self.entries:
            return self.end
        count = self.end.entries_read
        first = StreamId.parse(self.entries[0][0])
        return Position(first.previous, None if count is None else count - len(self.entries))


class StreamReader:
    """Reads on from ``position``; one request at a time is under way."""

    def __init__(self, stream_key: str, current: Current[Settings], abilities: Abilities) -> None:
        self._key = stream_key
        self._current = current
        self._abilities = abilities
        # Where it adapts; it may lie outside bounds that have changed since.
        self._adapted = current.value.hot_path.batch_size
        self._mean_bytes = MEAN_BYTES_AT_FIRST
        self._count_max: int | None = None
        self._asked = 0
        self._received_before = 0
        self._position = Position(BEFORE_ALL, 0)
        # The id up to which the stream's counts and its entries agreed, or were made to.
        self._agreed_at = BEFORE_ALL

    @property
    def position(self) -> Position:
        """Where the next read begins."""
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        self._position, self._agreed_at = position, position.stream_id

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
        self._received_before = connection.received_bytes
        connection.limit_reply(self._reply_bytes)
        block_ms = max(1, round(self._settings.block_timeout * 1000))
        after = str(self.position.stream_id)
        read = ("XREAD", "COUNT", self._asked, "BLOCK", block_ms, "STREAMS", self._key, after)
        if self._abilities.asks_with_each_read:
            return connection.send(read, ("XINFO", "STREAM", self._key))
        return connection.send(read)

    # Understanding

    def take(self, connection: Connection, replies: list[Any]) -> Read:
        """Read a reply; the reading position moves on unless there is a gap.

        :raises PeerReplyError: if the server answered with an error.
        :raises ProtocolError: if the reply has another shape.
        """
        reply, about = self._take_apart(replies)
        atomic = len(replies) == TRANSACTION_REPLIES
        if isinstance(reply, PeerReplyError):
            raise reply
        info = None if about is None else learn_info(parse_info(about), self._abilities)
        read = self._interpret(self._entries(reply, self._asked), info, atomic=atomic)
        if read.gap is None:
            self._move_on(read)
        if read.entries:
            size = (connection.received_bytes - self._received_before) / len(read.entries)
            self._mean_bytes += (size - self._mean_bytes) / 4
        self.adapt(read)
        return read

    def _move_on(self, read: Read) -> None:
        self._position = read.end
        if read.info is None:
            return
        at = read.end.stream_id
        if read.at_head and read.end.entries_read is not None and at > self._agreed_at:
            self._abilities.agree()
        self._agreed_at = at

    @staticmethod
    def _take_apart(replies: list[Any]) -> tuple[Any, Any]:
        """Return the replies of XREAD and of XINFO, which is None where it was not asked."""
        if len(replies) < TRANSACTION_REPLIES:
            return replies[0], replies[1] if len(replies) > 1 else None
        executed = replies[-1]
        if isinstance(executed, PeerReplyError):
            # EXECABORT only says that something was wrong; what it was stands before it.
            raise next((r for r in replies if isinstance(r, PeerReplyError)), executed)
        reply, about = reply_list(executed, "EXEC", 2)
        return reply, about

    @staticmethod
    def _entries(reply: Any, at_most: int) -> Sequence[Any]:
        raise_errors(reply)
        if reply is None:
            return ()
        (stream,) = reply_list(reply, "XREAD", 1)
        _key, found = reply_list(stream, "XREAD", 2)
        # Checked whole and once, so that nothing further up has to doubt an entry's shape.
        return entries_of(found, "XREAD", at_most)

    def _interpret(
        self, entries: Sequence[Any], info: StreamInfo | None, *, atomic: bool = False
    ) -> Read:
        """Say what a reply means; ``atomic`` if entries and ``info`` are of the same moment."""
        before = self.position
        if info is not None and info.added is None:
            before = before._replace(entries_read=None)
        end = self._end_of(entries, before)
        full = len(entries) >= self._asked
        if info is None:
            return Read(entries, at_head=not full, full=full, end=end)
        # What was told a moment later may count entries that came in between.
        reached = end.stream_id >= info.last_id or (atomic and not full)
        gap = find_gap(before, end, info, len(entries), at_head=reached, agreed_at=self._agreed_at)
        if gap is not None and gap.is_contradiction and not self._abilities.doubt():
            return self._interpret(entries, learn_info(info, self._abilities), atomic=atomic)
        if gap is not None:
            end = self._end_behind_gap(entries, info, at_head=reached)
        elif reached and end.entries_read is None and info.added is not None:
            end = Position(end.stream_id, info.added)
        return Read(entries, reached or not full, full, end, gap, info)

    @staticmethod
    def _end_of(entries: Sequence[Any], before: Position) -> Position:
        if not entries:
            return before
        try:
            first, last = StreamId.parse(entries[0][0]), StreamId.parse(entries[-1][0])
        except (TypeError, ValueError, IndexError):
            raise ProtocolError("XREAD: an entry without an id") from None
        if not before.stream_id < first <= last:
            # Taken for new, they would be read for ever.
            raise ProtocolError(f"XREAD: entries {first} to {last}, asked after {before.stream_id}")
        count = before.entries_read
        return Position(last, None if count is None else count + len(entries))

    @staticmethod
    def _end_behind_gap(entries: Sequence[Any], info: StreamInfo, *, at_head: bool) -> Position:
        """Return the position after ``entries``, with a count that does not rely on those before."""
        if not entries:
            return info.start
        first, last = (StreamId.parse(entries[place][0]) for place in (0, -1))
        if info.trimmed is not None and first == info.first_id:
            return Position(last, info.trimmed + len(entries))
        return Position(last, info.added if at_head else None)

    def at_end(self, info: StreamInfo) -> Read:
        """Return a read that found nothing more, with counts that were asked for apart from it."""
        return self._interpret((), learn_info(info, self._abilities))

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
        entries = self._entries(reply, 1)
        if not entries:
            return None
        end, strings = self._end_of(entries, self.position), entries[0][1] or ()
        stream_id = end.stream_id
        size = sum(s.size if isinstance(s, Oversize) else len(s) for s in strings)
        count = self.position.entries_read
        return Position(stream_id, None if count is None else count + 1), size
