"""Fetches a peer's items by key, in flights of bounded size, and hands them to the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fsm_replication.batch import Part
from fsm_replication.errors import BadEntryError, InvalidKeyError, PeerReplyError
from fsm_replication.items import DAY_MS, SyncItem
from fsm_replication.ports import Connection
from fsm_replication.stores.protocol import ApplyResult, Outcome
from fsm_replication.workers.applier import Applier
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.item_source import ItemSource

__all__ = ("Fetched", "Fetcher", "check_replies")

APPLY_ITEMS: Final = 250


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

    async def fetch(
        self, asking: Connection, named: Sequence[tuple[bytes, str]], result: Fetched
    ) -> None:
        """Fetch and apply the items of these Redis keys and keys; adds up in ``result``.

        :raises Blocked: if the link must pause; what is missing is not applied.
        """
        for group in await self._by_size(asking, named, result):
            await self._fetch_group(asking, group, result)

    async def _by_size(
        self, asking: Connection, named: Sequence[tuple[bytes, str]], result: Fetched
    ) -> list[list[tuple[bytes, str]]]:
        """Group keys so that the replies of a group stay within the limit in bytes."""
        settings = self._context.settings
        if not named:
            return []
        sizes = await asking.pipeline(
            [(*self._source.size_command, raw) for raw, _ in named],
            timeout_sec=settings.timeouts.command,
        )
        check_replies(sizes)
        budget = settings.limits.batch_bytes // 4
        groups: list[list[tuple[bytes, str]]] = [[]]
        filled = 0
        for pair, size in zip(named, sizes, strict=True):
            if size is None:
                continue  # It has gone meanwhile.
            if not isinstance(size, int) or size > settings.limits.batch_bytes:
                self._skip(pair[1], f"an item of {size} bytes cannot be fetched", result)
                continue
            if groups[-1] and (filled + size > budget or len(groups[-1]) >= APPLY_ITEMS):
                groups.append([])
                filled = 0
            groups[-1].append(pair)
            filled += size
        return [group for group in groups if group]

    async def peek(
        self, asking: Connection, named: Sequence[tuple[bytes, str]]
    ) -> AsyncIterator[SyncItem]:
        """Fetch items and yield them as they are; nothing is applied, and none that is bad comes."""
        passed_over = Fetched()
        for group in await self._by_size(asking, named, passed_over):
            replies = await self._read(asking, group)
            for part in self._parts(group, replies, passed_over):
                for item in part.items:
                    yield item

    async def _read(self, asking: Connection, group: Sequence[tuple[bytes, str]]) -> Sequence[Any]:
        settings = self._context.settings
        asking.limit_reply(settings.limits.batch_bytes * 2)
        replies = await self._source.read(
            asking, [raw for raw, _ in group], settings.timeouts.command
        )
        check_replies(replies)
        return replies

    async def _fetch_group(
        self, asking: Connection, group: Sequence[tuple[bytes, str]], result: Fetched
    ) -> None:
        replies = await self._read(asking, group)
        for part in self._parts(group, replies, result):
            result.items += len(part.items)
            # What came over the wire is counted, whatever of it is handed on.
            if self._source.looks_at_held:
                part = await self._without_current(part)  # noqa: PLW2901 - the rest of it
            applied = await self._applier.hand_over(part, None, self._path)
            self._context.progress.advances += len(part.items)
            self._count(part, applied, result)

    async def _without_current(self, part: Part) -> Part:
        context = self._context
        held = await self._applier.call(
            context.reads, lambda: context.store.stamps([item.key for item in part.items])
        )
        items = self._source.not_current(part.items, held)
        return Part(items, [None] * len(items))

    def _parts(
        self, group: Sequence[tuple[bytes, str]], replies: Sequence[Any], result: Fetched
    ) -> Iterator[Part]:
        part, filled = Part(), 0
        budget = self._context.settings.limits.batch_bytes // 4
        latest = self._context.ports.wall_clock.now_ms() + DAY_MS
        for (_, key), reply in zip(group, replies, strict=True):
            try:
                made = self._source.decode(key, reply)
            except (BadEntryError, InvalidKeyError) as error:
                self._skip(key, str(error), result)
                continue
            if made is None:
                continue
            item, wire = made
            if item.updated_at > latest:
                self._skip(key, f"it is stamped more than a day ahead: {item.updated_at}", result)
                continue
            part.items.append(item)
            part.wire.append(wire)
            filled += len(item.content)
            if filled >= budget:
                yield part
                part, filled = Part(), 0
        if part.items:
            yield part

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
