"""Publishes the changes of a store on any database, through an outbox.

Theory of operation. A node is read through its Redis; a store on another database cannot change
both in one transaction. It therefore writes each change, with the item itself, as a row of an
*outbox* in its own database. The publisher moves these rows to Redis in order, with the scripts
of :class:`RedisSyncEngine`, and then has them removed. A crash between the two moves some rows
twice, which changes nothing: what Redis holds already is superseded there, and what is superseded
makes no stream entry.

Redis may also come back empty, or without its last second, when the rows of what it lost are gone
from the outbox. So each batch leaves a random *mark*: in Redis, in the same transaction as the
batch and beside the mark before it, and in the store, with the removal of the rows. The store's
mark is one of the two that Redis holds, or Redis is not as it was left: then everything is published
anew from the items themselves. (So it is at the very first time, too.)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from fsm_replication.errors import (
    InvalidKeyError,
    ReplicationError,
    StoreError,
    StoreTimeoutError,
)
from fsm_replication.items import (
    CONTENT_TYPES,
    DAY_MS,
    NUMBER_MAX,
    Resolver,
    SyncItem,
    check_key,
    content_hash,
)
from fsm_replication.layout import Keys
from fsm_replication.log import get_logger
from fsm_replication.merkle import OWN, Tree
from fsm_replication.ports import Clock, Position, StreamId, SystemClock, Transport
from fsm_replication.retry import RetryProfile, call_with_retries
from fsm_replication.stores.protocol import Outcome, Received
from fsm_replication.stores.redis import RedisSyncEngine

__all__ = ("Outbox", "OutboxPublisher", "OutboxRow")

RETRIES: Final = RetryProfile(0.5, 2.0, 30.0)
# Where the marks lie among the positions in Redis; no peer can have this name.
LANE: Final = "\0outbox"
_MARK_BITS: Final = 63
_T = TypeVar("_T")


class OutboxRow(NamedTuple):
    """One change that waits to be published; numbers grow from row to row of a key."""

    number: int
    item: SyncItem


@runtime_checkable
class Outbox(Protocol):
    """What a store offers to have its changes published.

    A row is written in the transaction that changes the item, for changes of replication and of the
    application alike, and for nothing that was superseded. Any error of these calls is retried.
    """

    @property
    def resolver(self) -> Resolver:
        """That of the store, which ``SyncEngine`` has."""

    async def read_outbox(self, limit: int) -> Sequence[OutboxRow]:
        """Return the rows of the smallest numbers, in order, at most ``limit``."""

    async def forget_outbox(self, numbers: Sequence[int], mark: str) -> None:
        """Remove exactly these rows and keep the mark instead of the last, in one transaction.

        They are named one by one, because in many databases a transaction that began earlier may
        commit a row of a smaller number after the larger ones were read.
        """

    async def outbox_mark(self) -> str:
        """Return the mark that ``forget_outbox`` kept last, "" before the first."""

    async def read_items(self, after: str, limit: int) -> Sequence[SyncItem]:
        """Return the items of the keys after ``after``, tombstones included, at most ``limit``.

        In any order of keys that stays the same and in which "" is before all.
        """


class OutboxPublisher:
    """Moves the rows of an outbox to the node's Redis, where peers read them.

    Use it as an async context manager, or call ``open`` and ``close``; it owns one task, which tries
    again with growing delays for as long as Redis or the outbox fail. What is not published when it
    closes is published when it is opened the next time. One publisher at a time is enough for a node;
    two do no harm, but do everything twice.

    The store behind the outbox is the truth, and what was published follows it: a store must not
    offer the publisher's ``tree`` as its own, since after a restored backup it would tell of items
    the store has lost, and they would never be repaired.

    ``url``, ``redis_prefix``, ``stream_maxlen``, ``layouts``, ``allow_eviction`` and the times of
    tombstones (seconds, the same as the store's) mean what they mean for ``RedisSyncEngine``. One batch is ``batch_items``
    rows at most, 1 or more; memory for as many items is needed. ``poll_sec``, over 0, is how often
    it looks by itself for rows that nobody called ``wake`` for, as those of other processes.
    ``timeout_sec``, over 0, bounds each call to Redis and to the outbox. ``retries`` must have no end.

    :raises ConfigError: if the URL cannot be used, or a layout cannot be kept.
    :raises ValueError: if a number is out of its range, or ``retries`` would end.
    """

    def __init__(
        self,
        outbox: Outbox,
        url: str,
        *,
        node_id: str,
        redis_prefix: str = "",
        stream_maxlen: int = 100_000,
        layouts: Sequence[str] = (OWN,),
        tombstone_ttl_sec: float = 7 * 86_400,
        tombstone_grace_sec: float = 86_400,
        batch_items: int = 200,
        poll_sec: float = 1.0,
        timeout_sec: float = 10.0,
        allow_eviction: bool = False,
        retries: RetryProfile = RETRIES,
        clock: Clock | None = None,
        transport: Transport | None = None,
        rng: random.Random | None = None,
    ) -> None:
        if batch_items < 1 or poll_sec <= 0 or timeout_sec <= 0:
            raise ValueError("batch_items is 1 or more; poll_sec and timeout_sec are over 0")
        if retries.attempts is not None or retries.total_sec is not None:
            raise ValueError("a publisher never gives up: retries must have no end")
        self.node_id = node_id
        self._outbox = outbox
        self._batch_items = batch_items
        self._poll_sec = poll_sec
        self._timeout_sec = timeout_sec
        self._retries = retries
        self._clock = clock or SystemClock()
        self._rng = rng or random.SystemRandom()
        self._redis = RedisSyncEngine(
            url,
            node_id=node_id,
            redis_prefix=redis_prefix,
            stream_maxlen=stream_maxlen,
            layouts=layouts,
            resolver=_history_of(outbox.resolver),
            tombstone_ttl_sec=tombstone_ttl_sec,
            tombstone_grace_sec=tombstone_grace_sec,
            timeout_sec=timeout_sec,
            allow_eviction=allow_eviction,
            clock=self._clock,
            transport=transport,
            rng=self._rng,
        )
        self._log = get_logger("outbox", node_id=node_id)
        self._task: asyncio.Task[None] | None = None
        self._is_open = False
        # The mark of the store, None until it was found to agree with what Redis holds.
        self._mark: int | None = None
        self._incarnation = ""
        self._woken = asyncio.Event()
        # Who waits for the outbox to be empty has a number; those up to ``_answered`` need not
        # wait any more.
        self._asked = 0
        self._answered = 0
        self._news = asyncio.Condition()
        self._published = 0
        self._refused = 0
        self._republished = 0
        self._last_error: Exception | None = None

    # What can be seen.

    @property
    def keys(self) -> Keys:
        """The names under which stream, items and tree lie in Redis."""
        return self._redis.keys

    @property
    def tree(self) -> Tree | None:
        """The tree that peers read, None where ``layouts`` names none."""
        return self._redis.tree

    @property
    def published(self) -> int:
        """Rows moved since it was made, those that Redis held already included."""
        return self._published

    @property
    def refused(self) -> int:
        """Rows that could not be published and were passed over; each was logged."""
        return self._refused

    @property
    def republished(self) -> int:
        """How often everything was published anew."""
        return self._republished

    @property
    def last_error(self) -> Exception | None:
        """Why the last attempt failed, None after one that did not."""
        return self._last_error

    def wake(self) -> None:
        """Say that there may be a new row; for the event loop that runs the publisher."""
        self._woken.set()

    async def wait_published(self, timeout_sec: float) -> None:
        """Return when peers can read every change that was committed before this call.

        :raises StoreTimeoutError: if that takes longer than ``timeout_sec``.
        :raises StoreError: if the publisher is not open, or closes meanwhile.
        """
        self._asked += 1
        mine = self._asked
        self.wake()
        try:
            async with self._clock.timeout(timeout_sec), self._news:
                await self._news.wait_for(lambda: self._answered >= mine or self._task is None)
        except TimeoutError:
            why = f" ({self._last_error})" if self._last_error is not None else ""
            raise StoreTimeoutError(
                f"{self!r}: the outbox was not empty within {timeout_sec:g} s{why}"
            ) from None
        if self._answered < mine:
            raise StoreError(f"{self!r} is not open: nothing is published")

    # Its life.

    async def open(self) -> None:
        """Start publishing; no Redis needs to be there yet; a second call does nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"outbox:{self.node_id}")

    async def close(self) -> None:
        """Stop publishing and close all connections; a second call does nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
            self._is_open, self._mark = False, None
            async with self._news:
                self._news.notify_all()
        await self._redis.close()
        if task is not None and not task.cancelled():
            task.result()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # The task.

    async def _run(self) -> None:
        while True:
            asked = self._asked
            moved = await call_with_retries(
                self._retries,
                self._clock,
                self._rng,
                self._move_batch,
                # The outbox is somebody's own, and may raise anything.
                retry_on=(Exception,),
                on_retry=self._failed,
            )
            self._last_error = None
            if not moved:
                await self._answer(asked)
                await self._wait_for_rows()

    async def _move_batch(self) -> int:
        """Move the oldest rows; returns how many there were."""
        if self._mark is None:
            self._mark = await self._agree()
        before, self._mark = self._mark, None
        rows = await self._bounded(self._outbox.read_outbox(self._batch_items))
        if rows:
            after = self._new_mark()
            await self._publish([row.item for row in rows], after, before)
            await self._keep_mark([row.number for row in rows], after)
            self._published += len(rows)
            before = after
        # Only now: whatever goes wrong above, the next attempt looks at both marks again.
        self._mark = before
        return len(rows)

    async def _agree(self) -> int:
        """Return the store's mark; where Redis is not as it was left, publish everything before."""
        if not self._is_open:
            await self._redis.open()
            self._is_open = True
        self._incarnation = await self._redis.incarnation()
        kept = await self._bounded(self._outbox.outbox_mark())
        incarnation, _, text = kept.rpartition(":")
        mark = int(text) if text.isascii() and text.isdigit() else 0
        position = await self._redis.applied_position(LANE)
        known = () if position is None else position.stream_id
        if mark and incarnation == self._incarnation and mark in known:
            return mark
        return await self._publish_all(mark)

    async def _publish_all(self, before: int) -> int:
        self._log.info("publishing_everything", why="Redis is not as it was left, or it is new")
        after = ""
        while items := await self._bounded(self._outbox.read_items(after, self._batch_items)):
            await self._publish(items)
            after = items[-1].key
        mark = self._new_mark()
        await self._publish([], mark, before)
        await self._keep_mark([], mark)
        self._republished += 1
        return mark

    async def _publish(self, items: Sequence[SyncItem], mark: int = 0, before: int = 0) -> None:
        fine = [item for item in items if self._is_publishable(item)]
        # Two numbers that are kept in the same transaction as the items: a position's form will do.
        position = Position(StreamId(mark, before), None) if mark else None
        received = Received(LANE, position, incarnation=self._incarnation)
        result = await self._redis.apply_many(fine, received)
        for index, (item, outcome) in enumerate(zip(fine, result.outcomes, strict=True)):
            if outcome is Outcome.REFUSED:
                self._refuse(item, result.reasons[index])
        if Outcome.SUPERSEDED in result.outcomes:
            last = {item.key: item for item in fine}
            outcomes = zip(fine, result.outcomes, strict=True)
            keys = {item.key for item, outcome in outcomes if outcome is Outcome.SUPERSEDED}
            await self._step_back([last[key] for key in sorted(keys)])

    async def _step_back(self, items: Sequence[SyncItem]) -> None:
        """Follow the store where it gave up what a wrong clock had stamped far ahead.

        By its order tuple what was published before would win for as long as the clock was wrong by.
        """
        held = await self._redis.stamps([item.key for item in items])
        ahead = [
            (item, stamp)
            for item, stamp in zip(items, held, strict=True)
            if stamp is not None and stamp.updated_at > item.updated_at + DAY_MS
        ]
        if not ahead:
            return
        latest = await self._redis.now_ms() + DAY_MS
        for item, stamp in ahead:
            if item.updated_at <= latest < stamp.updated_at:
                await self._redis.replace(item, stamp)

    def _is_publishable(self, item: SyncItem) -> bool:
        """Whether every reader will take it; a row that nobody can read must not stop the others."""
        try:
            check_key(item.key)
        except InvalidKeyError as error:
            self._refuse(item, str(error))
            return False
        numbers = (item.updated_at, item.version)
        if item.content_type not in CONTENT_TYPES or not all(0 <= n <= NUMBER_MAX for n in numbers):
            self._refuse(item, "its content type or one of its numbers is none")
            return False
        if content_hash(item.content) != item.content_hash:
            self._refuse(item, "its content does not match its hash")
            return False
        return True

    def _refuse(self, item: SyncItem, why: str) -> None:
        self._refused += 1
        self._log.error("not_published", key=item.key, version=item.version, why=why)

    async def _keep_mark(self, numbers: Sequence[int], mark: int) -> None:
        await self._bounded(self._outbox.forget_outbox(numbers, f"{self._incarnation}:{mark}"))

    def _new_mark(self) -> int:
        return self._rng.getrandbits(_MARK_BITS) | 1

    async def _bounded(self, call: Awaitable[_T]) -> _T:
        async with self._clock.timeout(self._timeout_sec):
            return await call

    def _failed(self, attempt: int, error: BaseException, delay_sec: float) -> None:
        assert isinstance(error, Exception)
        self._last_error = error
        expected = isinstance(error, ReplicationError | TimeoutError)
        self._log.warning(
            "publishing_failed",
            attempt=attempt,
            error=error,
            again_in_sec=round(delay_sec, 3),
            exc_info=None if expected else error,
        )

    async def _answer(self, asked: int) -> None:
        async with self._news:
            self._answered = asked
            self._news.notify_all()

    async def _wait_for_rows(self) -> None:
        try:
            async with self._clock.timeout(self._poll_sec):
                await self._woken.wait()
        except TimeoutError:
            # There is time to see whether Redis is still as it was left.
            self._mark = None
        self._woken.clear()

    def __repr__(self) -> str:
        return f"<OutboxPublisher {self.node_id!r} of {self._outbox!r}>"


class _History:
    """Orders the versions of one key that one store has held, whatever its resolver.

    They come from one history, in which time and version never go back; and where both stay the same
    contents only grow by merging. So the later version wins whole, and is not merged with what a
    delete in between has ended.
    """

    by_stamp = False

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    @property
    def name(self) -> str:
        """That of the store's resolver, which peers compare with theirs."""
        return self._resolver.name

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return the later of the two."""
        at_a, at_b = (a.updated_at, a.version), (b.updated_at, b.version)
        if at_a == at_b:
            return self._resolver.merge(a, b)
        return a if at_a > at_b else b


def _history_of(resolver: Resolver) -> Resolver:
    return resolver if resolver.by_stamp else _History(resolver)
