"""Fetches a peer's items by key, in flights of bounded size, and hands them to the store."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from fsm_replication.batch import TURN_BYTES, Part
from fsm_replication.errors import BadEntryError, InvalidKeyError, PeerReplyError
from fsm_replication.items import DAY_MS, SyncItem
from fsm_replication.ports import Connection
from fsm_replication.replies import count
from fsm_replication.stores.protocol import ApplyResult, Outcome
from fsm_replication.stream import INLINE_BYTES, WireForm
from fsm_replication.workers.applier import Applier
from fsm_replication.workers.connector import asking_bytes
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.item_source import ItemSource

__all__ = ("Fetched", "Fetcher", "check_replies")

APPLY_ITEMS: Final = 250
# A flight is no longer than the line brings in about this time: what waits for one, waits for that.
FLIGHT_SEC: Final = 10.0
FLIGHT_BYTES_FIRST: Final = 256 * 1024
FLIGHT_BYTES_LEAST: Final = 64 * 1024


def check_replies(replies: Sequence[Any]) -> None:
    """Tell "this key holds no item" from "could not tell".

    :raises PeerReplyError: if the peer could not answer: that says nothing about any item.
    """
    for reply in replies:
        if isinstance(reply, PeerReplyError) and reply.code != "WRONGTYPE":
            raise reply


@dataclass(slots=True)
class Fetched:
    """What became of keys that were asked for; ``failed`` could not be read or were refused."""

    items: int = 0
    submitted: int = 0
    deleted: int = 0
    failed: list[str] = field(default_factory=list)


class Fetcher:
    """Fetches items of one peer for a ``path``, "bootstrap" or "repair"; memory stays within a quarter of ``limits.batch_bytes`` a flight."""

    def __init__(
        self, context: LinkContext, applier: Applier, source: ItemSource, path: str
    ) -> None:
        self._path = path
        self._context = context
        self._applier = applier
        self._source = source
        self._flight_bytes = FLIGHT_BYTES_FIRST

    async def fetch(
        self,
        asking: Connection,
        named: Sequence[tuple[bytes, str]],
        result: Fetched,
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Fetch and apply the items of these Redis keys and keys; adds up in ``result``.

        Between two flights it ends where ``stop`` says so. Returns how many keys were dealt with,
        the first of them first, and at least one.

        :raises Blocked: if the link must pause; what is missing is not applied.
        """
        sized = await self._sized(asking, named, result)
        while sized:
            await self._fetch_group(asking, self._take_group(sized), result)
            if sized and stop():
                return named.index(sized[0][0])
        return len(named)

    def _adapt(self, took_sec: float) -> None:
        """Let flights grow on a fast line, and shrink on a slow one."""
        if took_sec > FLIGHT_SEC:
            self._flight_bytes = max(FLIGHT_BYTES_LEAST, self._flight_bytes // 2)
        elif took_sec < FLIGHT_SEC / 4:
            most = self._context.settings.limits.batch_bytes // 4
            self._flight_bytes = min(most, self._flight_bytes * 2)

    async def _sized(
        self, asking: Connection, named: Sequence[tuple[bytes, str]], result: Fetched
    ) -> deque[tuple[tuple[bytes, str], int]]:
        """Return the keys that can be fetched, each with about how many bytes its item takes."""
        settings = self._context.settings
        found: deque[tuple[tuple[bytes, str], int]] = deque()
        if not named:
            return found
        sizes = await asking.pipeline(
            [(*self._source.size_command, raw) for raw, _ in named],
            timeout_sec=settings.timeouts.command,
        )
        check_replies(sizes)
        for pair, size in zip(named, sizes, strict=True):
            if size is None:
                continue  # It has gone meanwhile.
            if isinstance(size, PeerReplyError):
                self._skip(pair[1], f"its key holds no item: {size}", result)
                continue
            if count(size, self._source.size_command[0]) > settings.limits.batch_bytes:
                self._skip(pair[1], f"an item of {size} bytes cannot be fetched", result)
                continue
            found.append((pair, size))
        return found

    def _take_group(self, sized: deque[tuple[tuple[bytes, str], int]]) -> list[tuple[bytes, str]]:
        """Take the keys of one flight, so that its replies stay within the limit in bytes."""
        budget = min(self._flight_bytes, self._context.settings.limits.batch_bytes // 4)
        group: list[tuple[bytes, str]] = []
        filled = 0
        while sized and len(group) < APPLY_ITEMS:
            pair, size = sized[0]
            if group and filled + size > budget:
                break
            sized.popleft()
            group.append(pair)
            filled += size
        return group

    async def peek(
        self, asking: Connection, named: Sequence[tuple[bytes, str]]
    ) -> AsyncIterator[SyncItem]:
        """Fetch items and yield them as they are; nothing is applied, and none that is bad comes."""
        passed_over = Fetched()
        sized = await self._sized(asking, named, passed_over)
        while sized:
            group = self._take_group(sized)
            replies = await self._read(asking, group)
            latest = self._context.ports.wall_clock.now_ms() + DAY_MS
            async with aclosing(self._decode(group, replies, passed_over)) as decoded:
                async for item, _ in decoded:
                    if item.updated_at <= latest:
                        yield item

    async def _read(self, asking: Connection, group: Sequence[tuple[bytes, str]]) -> Sequence[Any]:
        settings = self._context.settings
        # Sizes are estimates of the peer's: this is what holds whatever they are.
        asking.limit_reply(settings.limits.batch_bytes * 2)
        clock = self._context.ports.clock
        began = clock.monotonic()
        replies = await self._source.read(
            asking, [raw for raw, _ in group], settings.timeouts.command
        )
        asking.limit_reply(asking_bytes(settings))
        self._adapt(clock.monotonic() - began)
        check_replies(replies)
        return replies

    async def _fetch_group(
        self, asking: Connection, group: Sequence[tuple[bytes, str]], result: Fetched
    ) -> None:
        replies = await self._read(asking, group)
        async with aclosing(self._parts(group, replies, result)) as parts:
            async for part in parts:
                await self._apply(part, result)

    async def _apply(self, part: Part, result: Fetched) -> None:
        result.items += len(part.items)
        # What came over the wire is counted, whatever of it is handed on.
        if self._source.looks_at_held:
            part = await self._without_current(part)
        applied = await self._applier.hand_over(part, None, self._path)
        self._context.progress.advances += len(part.items)
        self._count(part, applied, result)

    async def _without_current(self, part: Part) -> Part:
        context = self._context
        held = await self._applier.call(
            context.reads, lambda: context.store.stamps([item.key for item in part.items])
        )
        forms = {item.key: form for item, form in zip(part.items, part.wire, strict=True)}
        items = self._source.not_current(part.items, held)
        return Part(items, [forms[item.key] for item in items])

    async def _parts(
        self, group: Sequence[tuple[bytes, str]], replies: Sequence[Any], result: Fetched
    ) -> AsyncGenerator[Part, None]:
        """Yield what can be applied, in parts of bounded size.

        :raises Blocked: if an item lies far ahead, and our clock and the peer's far apart.
        """
        part, filled = Part(), 0
        budget = self._context.settings.limits.batch_bytes // 4
        read_at = self._context.ports.clock.monotonic()
        async with aclosing(self._decode(group, replies, result)) as decoded:
            async for item, wire in decoded:
                if await self._is_too_far_ahead(item, read_at):
                    why = f"it is stamped more than a day ahead: {item.updated_at}"
                    self._skip(item.key, why, result)
                    continue
                part.items.append(item)
                part.wire.append(wire)
                filled += len(item.content)
                if filled >= budget:
                    yield part
                    part, filled = Part(), 0
        if part.items:
            yield part

    async def _is_too_far_ahead(self, item: SyncItem, read_at: float) -> bool:
        """Say whether an item is stamped more than a day ahead.

        :raises Blocked: if our clock and the peer's are so far apart that nobody can tell.
        """
        now_ms = self._context.ports.wall_clock.now_ms
        if item.updated_at <= now_ms() + DAY_MS:
            return False
        await self._applier.ask_time_since(read_at)
        ours_ms = now_ms()
        if item.updated_at <= ours_ms + DAY_MS:
            return False
        self._applier.check_clock(ours_ms)
        return True

    async def _decode(
        self, group: Sequence[tuple[bytes, str]], replies: Sequence[Any], result: Fetched
    ) -> AsyncGenerator[tuple[SyncItem, WireForm | None], None]:
        """Yield the items in some replies; those that are bad are skipped and counted."""
        turn_bytes = 0
        for (_, key), reply in zip(group, replies, strict=True):
            weight = self._source.weigh(reply)
            if turn_bytes >= TURN_BYTES:
                turn_bytes = 0
                await asyncio.sleep(0)
            try:
                decode = partial(self._source.decode, key, reply)
                if weight > INLINE_BYTES:
                    made = await self._context.ports.heavy.run(decode)
                else:
                    turn_bytes += weight
                    made = decode()
            except (BadEntryError, InvalidKeyError) as error:
                self._skip(key, str(error), result)
                continue
            if made is not None:
                yield made

    def _count(self, part: Part, applied: ApplyResult, result: Fetched) -> None:
        for index, outcome in enumerate(applied.outcomes):
            if outcome is Outcome.REFUSED:
                reason = applied.reasons.get(index, "no reason given")
                self._skip(part.items[index].key, f"the store refused it: {reason}", result)
            elif outcome is Outcome.APPLIED:
                if part.items[index].deleted:
                    result.deleted += 1
                else:
                    result.submitted += 1
        self._context.progress.events_applied += applied.applied

    def _skip(self, key: str, why: str, result: Fetched) -> None:
        result.failed.append(key)
        self._context.metrics.error("bad_item")
        self._context.log.warning("item_skipped", key=key, error=why)
