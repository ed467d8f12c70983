"""From stream entries to changes worth applying.

Theory of operation. A chunk of entries becomes a :class:`Selection`: one candidate per key, the
newest by order tuple, and a dead letter for each entry that cannot be used. Only then, and only
for the candidates that the store does not hold already, is content decompressed and verified
(:meth:`BatchBuilder.materialise`). A candidate that turns out bad does not take the older entries
of its key with it: they were superseded by something that does not exist, so the next newest good
one is used (guarantee G1).

Contents can be thirty thousand times larger than their entries, so what comes out is cut into parts
of a bounded number of bytes; the loop gets its turn after a bounded number of bytes, those of
contents that turned out bad included; and what is large is decoded on a thread. What turned out
bad is remembered with its chunk: however often that is tried again, nothing is decompressed twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import msgspec

from fsm_replication.errors import BadEntryError
from fsm_replication.heavy import HeavyWork, InTurn
from fsm_replication.items import (
    DAY_MS,
    EMPTY_HASH,
    MINUTE_MS,
    NUMBER_MAX,
    Stamp,
    SyncItem,
    content_hash,
)
from fsm_replication.ports import DeadLetter, StreamId
from fsm_replication.stream import (
    FIELDS_MAX,
    INLINE_BYTES,
    DataDecoder,
    Encoded,
    Entry,
    WireForm,
    encode_meta,
    parse_entry,
)

__all__ = ("FUTURE", "TURN_BYTES", "BatchBuilder", "Decoding", "Part", "RawEntry", "Selection")

# Why an entry that is stamped more than a day ahead becomes a dead letter.
FUTURE: Final = "future"
TURN_BYTES: Final = 1024 * 1024
"""Decoded by one link in one turn of the loop, good or bad: that takes 0.5 to 1.5 ms."""

RawEntry = tuple[bytes, Sequence[bytes]]
"""A stream entry as the reader returns it: its id and the flat list of names and values."""


@dataclass(slots=True)
class Selection:
    """What a chunk comes to before anything is decompressed.

    ``held_back`` are the places of old entries that wait for a person's word. ``bad`` is what was
    found wrong with contents, by place; it outlives the selection. ``now_ms`` is the time of day by
    which all of it is judged, ``too_far_ahead`` how many entries became letters by it.
    """

    entries: Sequence[Any]
    candidates: list[Entry]
    letters: list[DeadLetter] = field(default_factory=list)
    held_back: set[int] = field(default_factory=set)
    deduped: int = 0
    clock_ahead: int = 0
    bad: dict[int, BadEntryError] = field(default_factory=dict)
    now_ms: int = 0
    too_far_ahead: int = 0


@dataclass(slots=True)
class Part:
    """Items to be handed to the store in one call, with their wire forms aligned.

    ``encoded`` is what the store has made of them in advance.
    """

    items: list[SyncItem] = field(default_factory=list)
    wire: list[WireForm | None] = field(default_factory=list)
    encoded: object = None


class BatchBuilder:
    """Makes changes of one peer's entries.

    ``coalesce`` is false where a resolver looks at contents: then nothing may be dropped without
    it. ``foreign`` says that the peer's own stamps are not to be used. ``heavy`` does what takes long.
    """

    def __init__(
        self,
        peer_id: str,
        *,
        payload_bytes: int,
        part_bytes: int,
        now_ms: Callable[[], int],
        coalesce: bool = True,
        foreign: bool = False,
        heavy: HeavyWork | None = None,
    ) -> None:
        self.heavy = heavy if heavy is not None else InTurn()
        self.peer_id = peer_id
        self.coalesce = coalesce
        self.foreign = foreign
        self.decoder = DataDecoder(payload_bytes)
        self.part_bytes = part_bytes
        self._now_ms = now_ms

    # Choosing

    def select(
        self, entries: Sequence[Any], bad: dict[int, BadEntryError] | None = None
    ) -> Selection:
        """Choose the newest entry of each key; nothing is decompressed.

        ``bad`` is what was found wrong with contents of these very entries before, by place.
        """
        now = self._now_ms()
        selection = Selection(entries, [], now_ms=now)
        if bad is not None:
            selection.bad = bad
        known_bad = selection.bad
        newest: dict[str | int, Entry] = {}
        minute_ahead, day_ahead = now + MINUTE_MS, now + DAY_MS
        coalesce, foreign = self.coalesce, self.foreign
        index = -1
        for stream_id, fields in entries:
            index += 1
            if known_bad and index in known_bad:
                selection.letters.append(self.letter(stream_id, fields, known_bad[index]))
                continue
            try:
                entry = parse_entry(fields, index)
                if foreign or not entry.stamped:
                    entry = _stamp_by_id(entry, stream_id)
                if entry.updated_at > minute_ahead:
                    _check_not_future(entry, day_ahead)
                    selection.clock_ahead += 1
            except BadEntryError as error:
                selection.too_far_ahead += error.reason == FUTURE
                selection.letters.append(self.letter(stream_id, fields, error))
                continue
            slot = entry.key if coalesce else index
            rival = newest.get(slot)
            if rival is None:
                newest[slot] = entry
                continue
            selection.deduped += 1
            if foreign or not _is_older(entry, rival):
                newest[slot] = entry
        selection.candidates = list(newest.values())
        return selection

    def drop_current(self, selection: Selection, held: Sequence[Stamp | None]) -> None:
        """Drop the candidates of which something at least as new is held; ``held`` is aligned."""
        kept: list[Entry] = []
        for entry, stamp in zip(selection.candidates, held, strict=True):
            if stamp is None:
                kept.append(entry)
            elif self.foreign:
                renewed = _restamp_foreign(entry, stamp)
                if renewed is not None:
                    kept.append(renewed)
            elif not _at_least(stamp, entry):
                kept.append(entry)
        selection.deduped += len(selection.candidates) - len(kept)
        selection.candidates = kept

    # Looking into contents

    def materialise(self, selection: Selection) -> Decoding:
        """Decompress and verify the candidates, in parts of bounded size."""
        return Decoding(self, selection)

    def order(self, entry: Entry) -> tuple[Any, ...]:
        """Order entries of one key; equal stamps by place, so that none is tried twice."""
        if self.foreign:
            return (entry.index,)
        return (*_order(entry), entry.index)

    def usable(self, selection: Selection) -> dict[str, list[Entry]]:
        """Return what could be used of a selection's entries by key, the newest last."""
        found: dict[str, list[Entry]] = {}
        day_ahead = selection.now_ms + DAY_MS
        for index, (stream_id, fields) in enumerate(selection.entries):
            if index in selection.bad:
                continue
            try:
                entry = parse_entry(fields, index)
                if self.foreign or not entry.stamped:
                    entry = _stamp_by_id(entry, stream_id)
                _check_not_future(entry, day_ahead)
            except BadEntryError:
                continue  # It has its letter already.
            found.setdefault(entry.key, []).append(entry)
        for entries in found.values():
            entries.sort(key=self.order)
        return found

    # Dead letters

    def bury(self, selection: Selection, index: int, error: BadEntryError) -> None:
        """Add the dead letter of an entry whose content is bad."""
        stream_id, fields = selection.entries[index]
        # The traceback of the one that was raised would hold the content.
        selection.bad[index] = BadEntryError(error.reason, error.detail)
        selection.letters.append(self.letter(stream_id, fields, error))

    def letter(
        self, stream_id: bytes, fields: Sequence[bytes] | None, error: BadEntryError
    ) -> DeadLetter:
        """Return the dead letter of an entry."""
        # Of an entry with more fields than anybody looks at only the size is kept.
        looked_at = fields is not None and len(fields) <= FIELDS_MAX
        raw = tuple(fields) if fields is not None and looked_at else None
        key = dict(zip(raw[::2], raw[1::2], strict=False)).get(b"key") if raw else None
        return DeadLetter(
            peer_id=self.peer_id,
            stream_id=stream_id.decode("ascii", "replace"),
            reason=error.reason,
            detail=error.detail,
            key=None if key is None else key[:1024].decode("utf-8", "replace"),
            fields=raw,
            size=sum(map(len, fields)) if fields else 0,
            at_ms=self._now_ms(),
            foreign=self.foreign,
        )


class Decoding:
    """Decompresses and verifies the candidates of a selection: an asynchronous iterator of parts.

    Dead letters are added to the selection as they are found, so it is complete when the iterator
    is exhausted. At least one part comes, maybe an empty one.
    """

    __slots__ = ("_builder", "_done", "_left", "_older", "_selection", "_turn_bytes")

    def __init__(self, builder: BatchBuilder, selection: Selection) -> None:
        self._builder = builder
        self._selection = selection
        self._left = iter(selection.candidates)
        self._done = False
        self._older: dict[str, list[Entry]] | None = None
        self._turn_bytes = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Part:
        if self._done:
            raise StopAsyncIteration
        part = Part()
        items, wire = part.items, part.wire
        filled, most = 0, self._builder.part_bytes
        # Where others get their turn next; what was decoded in vain brings it nearer.
        mark = min(most, TURN_BYTES)
        decode = self._builder.decoder.decode_light
        for entry in self._left:
            digest = entry.digest
            made: tuple[Entry, SyncItem] | None = None
            if entry.deleted or digest is None:
                made = await self._make(entry)
            else:
                # As _make does, without the call: this is the path of nearly every entry.
                try:
                    content = decode(entry.data, digest)
                except BadEntryError as error:
                    mark -= INLINE_BYTES
                    made = await self._fall_back(entry, error)
                else:
                    if content is None:
                        made = await self._make(entry)
                    else:
                        filled += len(content)
                        items.append(
                            SyncItem(
                                entry.key,
                                content,
                                entry.content_type,
                                digest,
                                entry.version,
                                entry.updated_at,
                                False,
                                entry.origin,
                            )
                        )
                        wire.append(entry)
            if made is not None:
                filled += len(made[1].content)
                wire.append(made[0])
                items.append(made[1])
            if filled >= mark:
                if filled >= most:
                    return self._finish(part)
                mark = min(most, filled + TURN_BYTES)
                await asyncio.sleep(0)
        self._done = True
        return self._finish(part)

    def _finish(self, part: Part) -> Part:
        # A foreign entry was stamped anew, so its meta says something else than the item does.
        if self._builder.foreign:
            part.wire[:] = [
                Encoded(form.data if form is not None else b"", encode_meta(item))
                for item, form in zip(part.items, part.wire, strict=True)
            ]
        return part

    async def _make(self, entry: Entry) -> tuple[Entry, SyncItem] | None:
        """Make the item of an entry, or of the newest older one that is good."""
        candidate: Entry | None = entry
        while candidate is not None:
            try:
                content, digest = await self._content(candidate)
            except BadEntryError as error:
                candidate = self._bury(candidate, error)
                continue
            return candidate, SyncItem(
                candidate.key,
                content,
                candidate.content_type,
                digest,
                candidate.version,
                candidate.updated_at,
                candidate.deleted,
                candidate.origin,
            )
        return None

    async def _content(self, entry: Entry) -> tuple[bytes, bytes]:
        """Return the content of an entry and its hash."""
        if entry.deleted:
            return b"", EMPTY_HASH
        decoder, heavy = self._builder.decoder, self._builder.heavy
        decode = partial(_decode, decoder, entry.data, entry.digest)
        if decoder.is_heavy(entry.data):
            return await heavy.run(decode)
        self._turn_bytes += INLINE_BYTES
        if self._turn_bytes >= TURN_BYTES:
            self._turn_bytes = 0
            await asyncio.sleep(0)
        return decode()

    async def _fall_back(self, bad: Entry, error: BadEntryError) -> tuple[Entry, SyncItem] | None:
        """Bury a bad entry, and try the next older one of its key."""
        older = self._bury(bad, error)
        return None if older is None else await self._make(older)

    def _bury(self, bad: Entry, error: BadEntryError) -> Entry | None:
        """Bury a bad entry; returns the newest of the same key that is older."""
        self._builder.bury(self._selection, bad.index, error)
        if not self._builder.coalesce:
            return None
        if self._older is None:
            self._older = self._builder.usable(self._selection)
        rivals, order = self._older.get(bad.key, []), self._builder.order
        while rivals:
            older = rivals.pop()
            if order(older) < order(bad):
                return older
        return None


def _decode(decoder: DataDecoder, data: bytes, digest: bytes | None) -> tuple[bytes, bytes]:
    content = decoder.decode(data, digest)
    return content, digest if digest is not None else content_hash(content)


def _order(entry: Entry) -> tuple[int, int, bool, bytes, str]:
    return (
        entry.updated_at,
        entry.version,
        entry.deleted,
        entry.digest or b"",
        entry.content_type,
    )


def _is_older(entry: Entry, rival: Entry) -> bool:
    # Of two with equal stamps the later is taken: should its content turn out bad, the earlier one
    # is still looked at.
    if entry.updated_at != rival.updated_at:
        return entry.updated_at < rival.updated_at
    return _order(entry) < _order(rival)


def _at_least(held: Stamp, entry: Entry) -> bool:
    """Say whether ``held`` is at least as new; where a hash is missing ties cannot be told."""
    if held.updated_at != entry.updated_at:
        return held.updated_at > entry.updated_at
    if entry.digest is None:
        return (held.version, held.deleted) > (entry.version, entry.deleted)
    return held >= _order(entry)


def _check_not_future(entry: Entry, day_ahead_ms: int) -> None:
    if entry.updated_at > day_ahead_ms:
        raise BadEntryError(FUTURE, "updated_at is more than a day ahead of this node's clock")


def _stamp_by_id(entry: Entry, stream_id: bytes) -> Entry:
    """Foreign nodes stamp arrivals anew: the time of an entry is its id's."""
    try:
        at_ms = StreamId.parse(stream_id).ms
    except ValueError:
        raise BadEntryError("range", "the stream id does not parse") from None
    if at_ms > NUMBER_MAX:
        raise BadEntryError("range", "the stream id's time is out of range")
    return msgspec.structs.replace(entry, updated_at=at_ms)


def _restamp_foreign(entry: Entry, held: Stamp) -> Entry | None:
    """Return a foreign entry as it compares with what is held; None where it is current.

    A foreign node counts versions anew after a delete and gives its deletes none, so within one
    millisecond the stream's order decides: what comes later gets the larger version.
    """
    if entry.updated_at < held.updated_at or (entry.deleted and held.deleted):
        return None
    if not entry.deleted and not held.deleted and entry.digest == held.content_hash:
        return None
    if entry.deleted or entry.updated_at == held.updated_at:
        version = min(NUMBER_MAX, max(entry.version, held.version + 1))
        return msgspec.structs.replace(entry, version=version)
    return entry
