"""Asks a peer whether what was known of its stream is still in its history.

A peer that was restored from a backup holds again what it has deleted since. Where neither trimming
nor anything else that servers do by themselves explains that an entry is gone, the peer *came back
older*, and no agreement counts as younger than what it still has (G5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fsm_replication.items import MINUTE_MS
from fsm_replication.layout import Keys
from fsm_replication.ports import BEFORE_ALL, LONG_AGO_MS, Agreement, Position, StreamId
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.history import (
    Gap,
    StreamInfo,
    ask_info,
    ask_run_id,
    check_history,
    find_newest,
    is_there,
)

__all__ = ("PeerHistory",)

_NOT_TOLD: Final = "not told: "


class PeerHistory:
    """The history of one peer's stream, asked over one pair of connections.

    Every call raises PeerError or NetworkError as its questions are answered; one that notes that the
    peer came back older raises CursorStoreError if that cannot be kept.
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

    async def run_id(self, *, anew: bool = False) -> str:
        """Return the run of the peer's server, or a name that is good for this connection alone.

        It is asked for once, and ``anew``: a server may take another's data while a line stands.
        """
        abilities = self._lines.abilities
        if not abilities.run_id or (anew and self._tells_its_run):
            told = await ask_run_id(self._lines.asking, self._timeout_sec)
            number = self._context.ports.random.getrandbits(64)
            abilities.run_id = told or f"{_NOT_TOLD}{number:016x}"
        return abilities.run_id

    @property
    def _tells_its_run(self) -> bool:
        return not self._lines.abilities.run_id.startswith(_NOT_TOLD)

    def check(
        self, position: Position, run_id: str, info: StreamInfo, *, entry_is_there: bool
    ) -> Gap | None:
        """Say what is missing after a position that was held in the run ``run_id``."""
        abilities = self._lines.abilities
        same_run = run_id == abilities.run_id
        # A server that was seen without a stream has counted all that came since.
        same_run = same_run or (position.stream_id == BEFORE_ALL and abilities.seen_empty)
        # Where each connection is another run, that would be a doubt with each.
        latest_ms = self._latest_ms(position.stream_id) if self._tells_its_run else None
        return check_history(
            position, info, entry_is_there=entry_is_there, same_run=same_run, latest_ms=latest_ms
        )

    def _latest_ms(self, at: StreamId) -> int:
        """Return what an id that is there is not later than, if the peer's clock was about right."""
        now, theirs = self._context.ports.wall_clock.now_ms(), self._context.peer_clock.now_ms()
        known = self._context.stale.agreement
        if known is not None and known.head is not None and at <= known.head.stream_id:
            # It was there when we agreed.
            theirs = min(theirs, known.at_ms + theirs - now)
        return theirs + MINUTE_MS

    async def begin_comparison(self) -> Agreement:
        """Return what a comparison that begins now may come to, with where the peer's stream ends."""
        context, progress = self._context, self._context.progress
        comparison, known = context.beginning(), context.stale.agreement
        head = None
        if not context.settings.hot_path.enabled:
            # Nobody reads the stream: so it is looked at for its age.
            await self.run_id(anew=True)
            if known is not None and known.head is not None:
                head = (await self.look_for_older_peer(known.head, known.run_id)).head
        elif progress.lag_events(context.ports.clock.monotonic()) == 0:
            # Whoever reads at the head knows it.
            head = progress.settled
        if head is None:
            head = (await self.info()).head
        return replace(comparison, head=head, run_id=self._lines.abilities.run_id)

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
        newest: StreamId | None = None
        if not gap.ids_tell_nothing:
            head = BEFORE_ALL if known.head is None else known.head.stream_id
            if at < head <= info.last_id and await self.has(head):
                return  # What came later is there.
            newest = info.last_id
            if at < newest:
                newest = await find_newest(self._lines.asking, self._stream, at, self._timeout_sec)
            if newest == at:
                return
        if newest is None or newest.ms > self._latest_ms(newest):
            as_of_ms = LONG_AGO_MS
        else:
            as_of_ms = newest.ms
        agreement = guard.as_of(as_of_ms)
        if agreement is None:
            return
        agreement = replace(agreement, head=None)
        context.log.warning(
            "peer_came_back_older", why=str(gap), agreed_at_ms=known.at_ms, as_of_ms=as_of_ms
        )
        guard.agreed(agreement)
        store = context.ports.cursor_store
        await store.set_agreed(context.peer_id, agreement, heal_gaps=False)
