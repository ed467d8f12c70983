"""Asks a peer whether what was known of its stream is still in its history.

A peer that was restored from a backup holds again what it has deleted since. Where neither trimming
nor anything else that servers do by themselves explains that an entry is gone, the peer *came back
older*, and no agreement counts as younger than what it still has (G5).
"""

from __future__ import annotations

from dataclasses import replace

from fsm_replication.layout import Keys
from fsm_replication.ports import BEFORE_ALL, LONG_AGO_MS, Agreement, Position, StreamId
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.history import (
    Gap,
    StreamInfo,
    ask_info,
    check_history,
    find_newest,
    is_there,
)

__all__ = ("PeerHistory",)


class PeerHistory:
    """The history of one peer's stream, asked over one pair of connections.

    Every call raises PeerError or NetworkError as its questions are answered.
    """

    def __init__(self, context: LinkContext, lines: Lines) -> None:
        self._context = context
        self._lines = lines
        self._stream = Keys(context.peer.redis_prefix).stream

    @property
    def _timeout_sec(self) -> float:
        return self._context.settings.timeouts.command

    async def has(self, at: StreamId) -> bool:
        """Say whether the stream still has the entry of an id."""
        return await is_there(self._lines.asking, self._stream, at, self._timeout_sec)

    async def info(self) -> StreamInfo:
        """Return what the stream tells of itself, counts only where they are believed."""
        return await ask_info(
            self._lines.asking, self._stream, self._timeout_sec, self._lines.abilities
        )

    def check(
        self, position: Position, run_id: str, info: StreamInfo, *, entry_is_there: bool
    ) -> Gap | None:
        """Say what is missing after a position that was held in the run ``run_id``."""
        abilities = self._lines.abilities
        same_run = run_id == abilities.run_id
        # A server that was seen without a stream has counted all that came since.
        same_run = same_run or (position.stream_id == BEFORE_ALL and abilities.seen_empty)
        return check_history(
            position,
            info,
            entry_is_there=entry_is_there,
            same_run=same_run,
            now_ms=self._context.peer_clock.now_ms(),
        )

    async def with_head(self, comparison: Agreement, root: bytes | None = None) -> Agreement:
        """Return what a comparison may come to, with where the peer's stream ends.

        ``root`` is that of the peer's tree, where it was just asked for: as long as it stays the same
        nothing has come to a peer at rest.
        """
        progress, lines = self._context.progress, self._lines
        if self._context.settings.hot_path.enabled:
            lines.compared = None
            # Whoever reads at the head knows it.
            is_at_head = progress.unread_events == 0 and progress.pending_events == 0
            head = progress.settled if is_at_head and root is not None else None
            if head is None:
                head = (await self.info()).head
        elif lines.compared is not None and lines.compared[0] == root:
            head = lines.compared[1]
        else:
            head = await self._head_of_one_not_older()
            lines.compared = None if root is None else (root, head)
        return replace(comparison, head=head, run_id=lines.abilities.run_id)

    async def _head_of_one_not_older(self) -> Position:
        """Return where the stream ends; nobody reads it, so that it is also looked at for its age."""
        known = self._context.stale.agreement
        if known is None or known.head is None:
            return (await self.info()).head
        return (await self.look_for_older_peer(known.head, known.run_id)).head

    async def look_for_older_peer(self, position: Position, run_id: str) -> StreamInfo:
        """See whether the peer came back older than ``position``; returns what its stream tells."""
        # In this order: what is trimmed between the questions is seen by the last.
        held = await self.has(position.stream_id)
        info = await self.info()
        gap = self.check(position, run_id, info, entry_is_there=held)
        await self.note_older_peer(gap, position.stream_id, info)
        return info

    async def note_older_peer(self, gap: Gap | None, at: StreamId, info: StreamInfo) -> None:
        """Let no agreement be younger than the peer, where trimming does not explain a gap.

        The peer is then as old as the newest entry that it still has of those we have read. Ids of
        later entries tell nothing: they may have been written since it came back. Nor does an id that
        was given by a clock that was ahead: then the peer counts as old as can be.
        """
        context, guard = self._context, self._context.stale
        known = guard.agreement
        if gap is None or gap.is_trim or known is None:
            return
        oldest = info.last_id if info.first_id is None else info.first_id
        if at == BEFORE_ALL and oldest.ms >= known.at_ms:
            return  # Its stream was empty when we agreed, and everything in it came later.
        head = BEFORE_ALL if known.head is None else known.head.stream_id
        if at < head <= info.last_id and await self.has(head):
            return  # What came later is there.
        newest: StreamId | None = info.last_id
        if gap.ids_tell_nothing:
            newest = None
        elif at < info.last_id:
            newest = await find_newest(self._lines.asking, self._stream, at, self._timeout_sec)
        if newest == at:
            return
        if newest is None or newest.ms > context.peer_clock.now_ms():
            as_of_ms = LONG_AGO_MS
        else:
            as_of_ms = newest.ms
        agreement = guard.as_of(as_of_ms)
        if agreement is None:
            return
        context.log.warning(
            "peer_came_back_older", why=str(gap), agreed_at_ms=known.at_ms, as_of_ms=as_of_ms
        )
        guard.agreed(agreement)
        store = context.ports.cursor_store
        await store.set_agreed(context.peer_id, agreement, heal_gaps=False)
