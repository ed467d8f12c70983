"""Entries that were read and are not settled yet, in chunks.

Whatever the mode of a link does meanwhile, a chunk leaves the queue only when it is settled, or
when the connection it came by is given up: then it is read again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from fsm_replication.errors import ProtocolError, ReplicationError
from fsm_replication.ports import Position, StreamId
from fsm_replication.workers.applier import Applier, Blocked, Chunk, Prepared, Unsettled
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.reader import Read

__all__ = ("CHUNK_EVENTS", "ChunkQueue", "cut")

# Bounds the work of one loop turn; another link's event waits no longer than one chunk takes.
CHUNK_EVENTS: Final = 200
# Names and values; ordinary entries have ten, so this cuts none of their chunks.
CHUNK_FIELDS: Final = 20_000


class ChunkQueue:
    """The unsettled chunks of one link, oldest first, and the link's lag."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._pending: deque[Chunk] = deque()
        # The oldest chunk while the store has it, and the task that waits for that.
        self._under_way: tuple[Prepared, asyncio.Task[None]] | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def take_in(self, read: Read) -> None:
        """Queue what was read, cut into chunks."""
        progress = self._context.progress
        entries = read.entries
        if not entries:
            progress.read = read.end
            return
        chunks: list[Chunk] = []
        before_all = StreamId(-1, 0)
        now = self._context.ports.clock.monotonic()
        count = read.end.entries_read
        before = None if count is None else count - len(entries)
        begin = 0
        for part in cut(entries):
            begin += len(part)
            done = None if before is None else before + begin
            try:
                first, last = StreamId.parse(part[0][0]), StreamId.parse(part[-1][0])
            except ValueError as error:
                raise ProtocolError(f"XREAD: {error}") from None
            if not before_all < first <= last <= read.end.stream_id:
                # A cursor at its end would pass entries that come after it.
                raise ProtocolError(f"XREAD: the ids {first} and {last} are out of order")
            before_all = last
            chunks.append(Chunk(part, Position(last, done), first.ms, now))
        progress.read = read.end
        progress.events_read += len(entries)
        self._context.metrics.read.inc(len(entries))
        self._pending += chunks
        progress.pending_events += len(entries)
        progress.newest_ms = max(progress.newest_ms, read.end.stream_id.ms)
        if read.info is not None:
            progress.newest_ms = read.info.last_id.ms
            added, seen = read.info.added, read.end.entries_read
            progress.unread_events = None if added is None or seen is None else added - seen
        elif read.at_head:
            progress.unread_events = 0
        self._mark_oldest()

    def _mark_oldest(self) -> None:
        progress = self._context.progress
        if self._pending:
            progress.oldest_unsettled_ms = self._pending[0].first_ms
            progress.oldest_unsettled_seen = self._pending[0].seen_at
        else:
            progress.oldest_unsettled_ms = None

    async def work_off(
        self,
        applier: Applier,
        interrupted: Callable[[], bool],
        more: Callable[[], bool] = lambda: False,
    ) -> None:
        """Settle the chunks in order, until all are or the work is interrupted.

        A chunk is decoded while the one before is on its way to the store, and the books of one are
        kept once the next is on its way. Where ``more`` says that the next entries are here, the
        last chunk is left on its way, for the next call or ``finish``.

        An entry at which it dies of an error that nobody expected costs that entry (G13): it becomes a
        dead letter, unless such errors have become too many for one peer.

        :raises Blocked: if the link must pause.
        :raises Unsettled: if a store call failed and the mode has changed meanwhile.
        :raises CursorStoreError: if dead letters cannot be kept, for good.
        """
        while True:
            try:
                await self._work_off(applier, interrupted, more)
            except (Blocked, Unsettled, ReplicationError):
                raise
            except Exception as error:
                self._context.crashed(error)
                self._context.log.exception("chunk_died", then="its entries are taken singly")
                if not self._pending or self._context.crashes.too_many:
                    raise
                await self._work_off_singly(applier)
            else:
                return

    async def _work_off(
        self, applier: Applier, interrupted: Callable[[], bool], more: Callable[[], bool]
    ) -> None:
        if len(self._pending) == 1 and self._under_way is None and not more():
            # At the head: nothing to overlap with, and no task to be made.
            self._settle(applier, await _apply_one(applier, self._pending[0]))
            return
        try:
            while len(self._pending) > bool(self._under_way) and not interrupted():
                if applier.must_see_applied:
                    await self.finish(applier)
                prepared = await applier.prepare(self._pending[bool(self._under_way)])
                before = await self._arrive(applier)
                self._under_way = prepared, asyncio.create_task(applier.apply(prepared))
                if len(self._pending) > 1:
                    # It goes out now, before anything else is done.
                    await self._context.ports.clock.sleep(0)
                if before is not None:
                    self._settle(applier, before)
            if not (more() and not interrupted()):
                await self.finish(applier)
        except BaseException:
            await self.abandon()
            raise

    async def _work_off_singly(self, applier: Applier) -> None:
        """Settle the chunks that may have died, entry by entry; what dies alone is buried."""
        await self.abandon()
        # One was on its way to the store, the next was being decoded.
        suspects = [self._pending.popleft() for _ in range(min(2, len(self._pending)))]
        singles = [single for chunk in suspects for single in _singles(chunk)]
        self._pending.extendleft(reversed(singles))
        for single in singles:
            try:
                prepared = await _apply_one(applier, single)
            except (Blocked, Unsettled, ReplicationError):
                raise
            except Exception as error:
                self._context.log.exception("entry_died", stream_id=str(single.end.stream_id))
                await applier.bury(applier.unexpected_letter(single, error), single.end)
                self._settled()
            else:
                self._settle(applier, prepared)

    async def finish(self, applier: Applier) -> None:
        """Settle the chunk that is on its way, if one is; raises as ``work_off`` does."""
        before = await self._arrive(applier)
        if before is not None:
            self._settle(applier, before)

    async def _arrive(self, applier: Applier) -> Prepared | None:
        """Wait for the store to have applied what is on its way, and for its letters to be kept."""
        if self._under_way is None:
            return None
        prepared, task = self._under_way
        try:
            await task
        finally:
            if task.done():
                self._under_way = None
        if prepared.has_letters:
            await applier.keep_letters(prepared)
        return prepared

    async def abandon(self) -> None:
        """Cancel what is on its way; its chunk is pending as before."""
        if self._under_way is None:
            return
        _, task = self._under_way
        self._under_way = None
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()

    def _settle(self, applier: Applier, prepared: Prepared) -> None:
        applier.settle(prepared)
        self._settled()

    def _settled(self) -> None:
        chunk = self._pending.popleft()
        progress = self._context.progress
        progress.pending_events -= len(chunk.entries)
        progress.settled_to(chunk.end, len(chunk.entries))
        self._mark_oldest()
        self._context.judge_lag()

    def forget(self) -> None:
        """Drop what is not settled; it is read again."""
        progress = self._context.progress
        self._pending.clear()
        if progress.unread_events is not None:
            progress.unread_events += progress.pending_events
        progress.pending_events = 0
        progress.oldest_unsettled_ms = None


async def _apply_one(applier: Applier, chunk: Chunk) -> Prepared:
    prepared = await applier.prepare(chunk)
    await applier.apply(prepared)
    if prepared.has_letters:
        await applier.keep_letters(prepared)
    return prepared


def cut(entries: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Cut entries into chunks that are parsed in a short time."""
    for begin in range(0, len(entries), CHUNK_EVENTS):
        part = entries[begin : begin + CHUNK_EVENTS]
        if sum([len(fields or ()) for _, fields in part]) <= CHUNK_FIELDS:
            yield part
            continue
        first = held = 0
        for place, (_, fields) in enumerate(part):
            wide = len(fields or ())
            if place > first and held + wide > CHUNK_FIELDS:
                yield part[first:place]
                first, held = place, 0
            held += wide
        yield part[first:]


def _singles(chunk: Chunk) -> Iterator[Chunk]:
    """Cut a chunk into its entries."""
    count = chunk.end.entries_read
    for place, entry in enumerate(chunk.entries, 1):
        at = StreamId.parse(entry[0])
        read = None if count is None else count - len(chunk.entries) + place
        yield Chunk([entry], Position(at, read), at.ms, chunk.seen_at)
