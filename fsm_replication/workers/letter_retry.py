"""Tries dead letters again: what could not be applied once may be good, or superseded, by now.

The raw fields go through the same decoding and the same bulk call of the store as entries of the
stream do; whether they were sent by a foreign node, whose stamps are not used, stands in the
letter, so the peer itself is not asked and may be away.

A letter is removed only after the store has taken what it holds. A crash in between leaves it, and
trying it once more finds it superseded.

A letter that was too far ahead is superseded as well where its key has a stamp from after it was judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final

from fsm_replication.batch import FUTURE
from fsm_replication.dead_letters import RetryStats
from fsm_replication.errors import EngineStoppedError, ReplicationError, StoreReopenedError
from fsm_replication.log import get_logger
from fsm_replication.ports import CursorStore, DeadLetter, Position, StreamId
from fsm_replication.reports import PauseReason
from fsm_replication.workers.applier import Applier, Blocked, Chunk, Unsettled, make_applier
from fsm_replication.workers.context import LinkContext

__all__ = ("LetterRetry",)

# As many as a chunk of the hot path: other links get their turn in between.
PAGE_LETTERS: Final = 200
_COUNTS: Final = ("tried", "applied", "superseded", "still_bad", "left")


class LetterRetry:
    """Tries letters again, one request after the other.

    ``contexts`` returns the links' contexts by peer, ``block`` pauses a link for a reason, ``blame``
    counts an unexpected error against one, ``on_room`` is awaited when letters may have gone,
    ``start`` starts a worker of the engine, and ``reopened`` has every link decide anew: the store
    may be another, or as it was before.
    """

    def __init__(
        self,
        store: CursorStore,
        contexts: Callable[[], Mapping[str, LinkContext]],
        block: Callable[[str, PauseReason, str], None],
        blame: Callable[[str, str, Exception], None],
        on_room: Callable[[], Awaitable[None]],
        start: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
        reopened: Callable[[str], None],
    ) -> None:
        self._store = store
        self._contexts = contexts
        self._block = block
        self._blame = blame
        self._on_room = on_room
        self._start = start
        self._reopened = reopened
        self._one_at_a_time = asyncio.Lock()
        self._asked: set[asyncio.Future[RetryStats]] = set()
        self._log = get_logger("dead_letters")

    async def retry(self, peer_id: str | None, ids: Sequence[int] | None) -> RetryStats:
        """Try letters again as a worker of the engine, whether or not the caller goes on waiting.

        :raises EngineStoppedError: if the engine ends first.
        :raises CursorStoreError: if the cursor store cannot be used.
        """
        done: asyncio.Future[RetryStats] = asyncio.get_running_loop().create_future()
        self._asked.add(done)
        done.add_done_callback(self._asked.discard)

        async def work() -> None:
            try:
                async with self._one_at_a_time:
                    stats = await self._retry(peer_id, ids)
                    await self._on_room()
                    done.set_result(stats)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                done.set_exception(error)
                # Whoever asked may have gone away without waiting.
                done.exception()

        self._start(work)
        return await asyncio.shield(done)

    def close(self) -> None:
        """Tell whoever waits that the engine has ended."""
        for done in tuple(self._asked):
            if not done.done():
                done.set_exception(EngineStoppedError("the engine ended during the retry"))
                done.exception()

    async def _retry(self, peer_id: str | None, ids: Sequence[int] | None) -> RetryStats:
        stats = RetryStats()
        async for page in self._pages(peer_id, ids):
            stats = stats.plus(await self._try_page(page))
        counts = {name: getattr(stats, name) for name in _COUNTS}
        self._log.info("dead_letters_retried", peer_id=peer_id, **counts)
        return stats

    async def _pages(
        self, peer_id: str | None, ids: Sequence[int] | None
    ) -> AsyncIterator[Sequence[DeadLetter]]:
        if ids is not None:
            for number in sorted(set(ids)):
                found = await self._store.dead_letters(after_id=number - 1, limit=1)
                yield [letter for letter in found if letter.id == number]
            return
        after = 0
        while page := await self._store.dead_letters(peer_id, after_id=after, limit=PAGE_LETTERS):
            yield page
            after = page[-1].id

    async def _try_page(self, page: Sequence[DeadLetter]) -> RetryStats:
        stats = RetryStats()
        by_peer = sorted(page, key=lambda one: (one.peer_id, one.foreign, one.id))
        for (peer_id, foreign), found in groupby(by_peer, lambda one: (one.peer_id, one.foreign)):
            letters = list(found)
            held = [letter for letter in letters if letter.fields is not None]
            empty = RetryStats(tried=len(letters), still_bad=len(letters) - len(held))
            stats = stats.plus(empty)
            if held:
                stats = stats.plus(await self._try_peer(peer_id, foreign, held))
        return stats

    async def _try_peer(
        self, peer_id: str, foreign: bool, letters: Sequence[DeadLetter]
    ) -> RetryStats:
        context = self._contexts().get(peer_id)
        if context is None:
            return _left(letters, f"peer {peer_id!r} is not configured: purge its letters")
        try:
            return await self._apply(context, foreign, letters)
        except Blocked as blocked:
            if blocked.reason is PauseReason.INTERLOCK:
                self._block(peer_id, blocked.reason, str(blocked))
            return _left(letters, f"peer {peer_id!r}: {blocked}")
        except Unsettled as unsettled:
            return _left(letters, f"peer {peer_id!r}: {unsettled.__cause__ or unsettled}")
        except StoreReopenedError as error:
            self._reopened(str(error))
            return _left(letters, f"peer {peer_id!r}: {error}")
        except ReplicationError:
            raise
        except Exception as error:  # noqa: BLE001 - it is logged, and counts against this link
            self._blame(peer_id, "letter retry", error)
            return _left(letters, f"peer {peer_id!r}: {type(error).__name__}")

    async def _apply(
        self, context: LinkContext, foreign: bool, letters: Sequence[DeadLetter]
    ) -> RetryStats:
        # A store call that fails is not tried again: the letters stay, and so does the reason.
        applier = make_applier(context, foreign=foreign)
        given_up = await _given_up(context, applier, letters)
        letters = [letter for letter in letters if letter.id not in given_up]
        if letters:
            return await self._apply_rest(context, applier, letters, given_up)
        await self._store.settle_retry(given_up, [])
        return RetryStats(superseded=len(given_up))

    async def _apply_rest(
        self,
        context: LinkContext,
        applier: Applier,
        letters: Sequence[DeadLetter],
        given_up: Sequence[int],
    ) -> RetryStats:
        """Apply letters, and settle them together with those that were given up."""
        entries = [(letter.stream_id.encode(), letter.fields) for letter in letters]
        now = context.ports.clock.monotonic()
        chunk = Chunk(entries, Position(StreamId(0, 0), None), 0, now)
        prepared = await applier.prepare(chunk, distrust_old=True)
        await applier.take(prepared, None, "dead letter")
        applied = prepared.applied
        context.metrics.applied.inc(applied)
        context.progress.events_applied += applied
        selection = prepared.selection
        bad = {letter.stream_id: letter for letter in selection.letters}
        waiting = set[str]()
        if context.peer_clock.is_day_off(selection.now_ms):
            # Nobody can tell what lies far ahead until the clocks agree.
            waiting = {name for name, letter in bad.items() if letter.reason == FUTURE}
            bad = {name: letter for name, letter in bad.items() if name not in waiting}
        held_back = {entries[index][0].decode() for index in selection.held_back}
        kept = [_judged(one, bad[one.stream_id]) for one in letters if one.stream_id in bad]
        stay = bad.keys() | held_back | waiting
        gone = [*given_up, *(one.id for one in letters if one.stream_id not in stay)]
        await self._store.settle_retry(gone, kept)
        problems = []
        if held_back:
            problems.append(
                f"peer {context.peer_id!r}: {len(held_back)} are older than tombstones.ttl and absent"
                " here, maybe deleted since: trees bring what the peer still holds; purge them"
            )
        if waiting:
            problems.append(
                f"peer {context.peer_id!r}: {len(waiting)} lie more than a day ahead, and"
                f" {context.peer_clock.tell()}: set the clock that is wrong"
            )
        return RetryStats(
            applied=applied,
            superseded=len(gone) - applied,
            still_bad=len(kept),
            left=len(held_back) + len(waiting),
            problems=tuple(problems),
        )


async def _given_up(
    context: LinkContext, applier: Applier, letters: Sequence[DeadLetter]
) -> list[int]:
    """Return the ids of the letters that were too far ahead, and whose keys have been stamped since.

    By its order tuple such an entry would win as soon as it is no longer too far ahead, and undo what
    a person has restamped or written meanwhile. What the peer still holds is for the trees to bring.
    """
    if not context.store.resolver.by_stamp:
        # What is merged is not lost.
        return []
    far = [(one, one.key) for one in letters if one.reason == FUTURE and one.key is not None]
    if not far:
        return []
    held = await applier.call(context.reads, lambda: context.store.stamps([key for _, key in far]))
    return [
        letter.id
        for (letter, _), stamp in zip(far, held, strict=True)
        if stamp is not None and stamp.updated_at > letter.at_ms
    ]


def _left(letters: Sequence[DeadLetter], problem: str) -> RetryStats:
    return RetryStats(left=len(letters), problems=(problem,))


def _judged(letter: DeadLetter, now: DeadLetter) -> DeadLetter:
    return replace(letter, reason=now.reason, detail=now.detail)
