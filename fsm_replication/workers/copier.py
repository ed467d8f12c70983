"""Bootstrap: copies a peer's items where its stream alone cannot bring this store up to date.

A row in the cursor store notes the stream's head *before* copying starts; when the copy is
complete, the cursor is set to that head and the row removed, in one transaction. Whatever changed
at the peer meanwhile stands in the stream after the head, and is read from there.

Items are found with SCAN. Its cursor means nothing after the peer's Redis restarts, so a copy that
a crash interrupted begins its walk anew, but compares order tuples first and fetches only what is
newer than what is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from fsm_replication.batch import Part
from fsm_replication.errors import BadEntryError, InvalidKeyError, ProtocolError
from fsm_replication.items import Stamp, SyncItem
from fsm_replication.layout import (
    STAMP_BYTES,
    Keys,
    decode_item,
    decode_stamp,
    glob_escape,
    item_data,
)
from fsm_replication.ports import BootstrapRow, Connection, Cursor, GapRow, Position
from fsm_replication.stream import DataDecoder, Encoded, WireForm, encode_meta
from fsm_replication.workers.applier import Applier
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.reader import Gap, ask_info

__all__ = ("Copier", "ItemSource", "OwnItems")

SCAN_COUNT: Final = 500
APPLY_ITEMS: Final = 250


class ItemSource(Protocol):
    """How the items of one kind of node are found and read."""

    match: str

    def key_of(self, redis_key: bytes) -> str | None:
        """Return the item's key, or None where this Redis key holds no item."""

    def fetch_command(self, redis_keys: Sequence[bytes]) -> Sequence[Sequence[bytes | str | int]]:
        """Return the commands that read these items, one reply each."""

    def decode(self, key: str, reply: Any) -> tuple[SyncItem, WireForm | None] | None:
        """Return the item in a reply, with its wire form; None where it has gone meanwhile.

        :raises BadEntryError: if it is not an item.
        """


class OwnItems:
    """The items of a node of ours."""

    def __init__(self, keys: Keys, decoder: DataDecoder) -> None:
        self._prefix = keys.item_prefix.encode()
        self._decoder = decoder
        self.match = glob_escape(keys.item_prefix) + "*"

    def key_of(self, redis_key: bytes) -> str | None:
        """Return the item's key, or None where it is not UTF-8."""
        try:
            return redis_key.removeprefix(self._prefix).decode() or None
        except UnicodeDecodeError:
            return None

    def fetch_command(self, redis_keys: Sequence[bytes]) -> Sequence[Sequence[bytes | str | int]]:
        """Read each by GET, so that one of a wrong type spoils no other."""
        return [("GET", redis_key) for redis_key in redis_keys]

    def decode(self, key: str, reply: Any) -> tuple[SyncItem, WireForm | None] | None:
        """Return the item in a reply; its content stands there as on the stream."""
        if reply is None:
            return None
        if not isinstance(reply, bytes):
            raise BadEntryError("item", f"the value is no string: {reply}")
        item = decode_item(key, reply, self._decoder)
        return item, Encoded(item_data(reply), encode_meta(item))


class Copier:
    """Copies all items of one peer; may be interrupted between steps and goes on later."""

    def __init__(
        self,
        context: LinkContext,
        lines: Lines,
        applier: Applier,
        source: ItemSource,
        incarnation: str,
        interrupted: Callable[[], bool],
    ) -> None:
        self._context = context
        self._lines = lines
        self._applier = applier
        self._source = source
        self._incarnation = incarnation
        self._interrupted = interrupted
        self._row: BootstrapRow | None = None
        self._scan = b"0"
        self._compare_first = False
        self._skipped = 0

    async def run(self, gap: Gap | None, why: str) -> Position | None:
        """Copy; returns the position to read on from, or None if it was interrupted."""
        if self._row is None:
            self._row = await self._begin(gap, why)
        done = False
        while not done:
            if self._interrupted():
                return None
            done = await self._step()
        return await self._finish(self._row)

    async def _begin(self, gap: Gap | None, why: str) -> BootstrapRow:
        context = self._context
        store = context.ports.cursor_store
        row = (await store.load(context.peer_id)).bootstrap
        if row is not None and row.incarnation == self._incarnation:
            self._compare_first = True
            context.log.info("bootstrap_resumed", head=str(row.head.stream_id))
            return row
        stream = Keys(context.peer.redis_prefix).stream
        info = await ask_info(self._lines.asking, stream, context.settings.timeouts.command)
        row = BootstrapRow(info.head, "", self._incarnation, why)
        entry = None
        if gap is not None:
            entry = GapRow(context.peer_id, context.ports.wall_clock.now_ms(), gap.missed, why)
            context.progress.gaps_open += 1
            context.metrics.trimmed.inc()
        await store.begin_bootstrap(context.peer_id, row, entry)
        context.log.info("bootstrap_started", why=why, head=str(info.last_id))
        return row

    # One step of the walk

    async def _step(self) -> bool:
        """Copy what one SCAN call finds; True at the end of the walk."""
        context, asking = self._context, self._lines.asking
        timeout = context.settings.timeouts.command
        reply = await asking.call(
            "SCAN", self._scan, "MATCH", self._source.match, "COUNT", SCAN_COUNT,
            timeout_sec=timeout,
        )  # fmt: skip
        try:
            next_scan, found = reply
        except (TypeError, ValueError):
            raise ProtocolError("SCAN: unexpected reply") from None
        named = [(raw, key) for raw in found if (key := self._source.key_of(raw)) is not None]
        self._skipped += len(found) - len(named)
        if named and self._compare_first:
            named = await self._only_newer(named)
        for group in await self._by_size(named):
            await self._copy_group(asking, group, timeout)
        self._scan = next_scan
        return bool(next_scan == b"0")

    async def _only_newer(self, named: list[tuple[bytes, str]]) -> list[tuple[bytes, str]]:
        context = self._context
        raws = await self._lines.asking.pipeline(
            [("GETRANGE", raw, 0, STAMP_BYTES - 1) for raw, _ in named],
            timeout_sec=context.settings.timeouts.command,
        )
        held = await self._applier.call(
            context.reads, lambda: context.store.stamps([key for _, key in named])
        )
        return [
            pair
            for pair, raw, mine in zip(named, raws, held, strict=True)
            if mine is None or not _is_current(mine, raw)
        ]

    async def _by_size(self, named: Sequence[tuple[bytes, str]]) -> list[list[tuple[bytes, str]]]:
        """Group keys so that the replies of a group stay within the limit in bytes."""
        context = self._context
        if not named:
            return []
        sizes = await self._lines.asking.pipeline(
            [("STRLEN", raw) for raw, _ in named], timeout_sec=context.settings.timeouts.command
        )
        budget = context.settings.limits.batch_bytes // 4
        groups: list[list[tuple[bytes, str]]] = [[]]
        filled = 0
        for pair, size in zip(named, sizes, strict=True):
            if not isinstance(size, int) or size > context.settings.limits.batch_bytes:
                self._skip(pair[1], f"an item of {size} bytes cannot be copied")
                continue
            if groups[-1] and (filled + size > budget or len(groups[-1]) >= APPLY_ITEMS):
                groups.append([])
                filled = 0
            groups[-1].append(pair)
            filled += size
        return [group for group in groups if group]

    async def _copy_group(
        self, asking: Connection, group: Sequence[tuple[bytes, str]], timeout_sec: float
    ) -> None:
        asking.limit_reply(self._context.settings.limits.batch_bytes * 2)
        replies = await asking.pipeline(
            self._source.fetch_command([raw for raw, _ in group]), timeout_sec=timeout_sec
        )
        for part in self._parts(group, replies):
            result = await self._applier.hand_over(part, None)
            self._context.progress.copied += len(part.items)
            self._context.progress.events_applied += result.applied
        self._context.progress.bootstrap = f"{self._context.progress.copied} items copied"

    def _parts(self, group: Sequence[tuple[bytes, str]], replies: Sequence[Any]) -> Iterator[Part]:
        part, filled = Part(), 0
        budget = self._context.settings.limits.batch_bytes // 4
        for (_, key), reply in zip(group, replies, strict=True):
            try:
                made = self._source.decode(key, reply)
            except (BadEntryError, InvalidKeyError) as error:
                self._skip(key, str(error))
                continue
            if made is None:
                continue
            item, wire = made
            part.items.append(item)
            part.wire.append(wire)
            filled += len(item.content)
            if filled >= budget:
                yield part
                part, filled = Part(), 0
        if part.items:
            yield part

    def _skip(self, key: str, why: str) -> None:
        self._skipped += 1
        self._context.metrics.error("bad_item")
        self._context.log.warning("item_skipped", key=key, error=why)

    async def _finish(self, row: BootstrapRow) -> Position:
        context = self._context
        # The position in the store moves along, or the next start would go on from the old one.
        await self._applier.hand_over(Part(), row.head)
        cursor = Cursor(row.head, self._incarnation)
        now = context.ports.wall_clock.now_ms()
        await context.ports.cursor_store.finish_bootstrap(context.peer_id, cursor, now)
        context.cursors.saved(context.peer_id, cursor)
        context.log.info("bootstrap_finished", items=context.progress.copied, skipped=self._skipped)
        context.progress.bootstrap = ""
        context.progress.gaps_open = 0
        self._row = None
        self._scan = b"0"
        return row.head


def _is_current(held: Stamp, raw: Any) -> bool:
    if not isinstance(raw, bytes):
        return False
    try:
        return held >= decode_stamp(raw)
    except BadEntryError:
        return False
