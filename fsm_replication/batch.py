"""From stream entries to changes worth applying.

Theory of operation. A chunk of entries becomes a :class:`Selection`: one candidate per key, the
newest by order tuple, and a dead letter for each entry that cannot be used. Only then, and only
for the candidates that the store does not hold already, is content decompressed and verified
(:meth:`BatchBuilder.materialise`). A candidate that turns out bad does not take the older entries
of its key with it: they were superseded by something that does not exist, so the next newest good
one is used (guarantee G1).

Contents can be a thousand times larger than their entries, so what comes out is cut into parts of
a bounded number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from fsm_replication.errors import BadEntryError
from fsm_replication.items import DAY_MS, NUMBER_MAX, Stamp, SyncItem, content_hash
from fsm_replication.ports import DeadLetter, StreamId
from fsm_replication.stream import DataDecoder, Entry, WireForm, parse_entry

__all__ = ("BatchBuilder", "Part", "RawEntry", "Selection")

MINUTE_MS: Final = 60_000

RawEntry = tuple[bytes, Sequence[bytes]]
"""A stream entry as the reader returns it: its id and the flat list of names and values."""


@dataclass(slots=True)
class Selection:
    """What a chunk comes to before anything is decompressed.

    ``held_back`` are the places of old entries that wait for a person's word.
    """

    entries: Sequence[Any]
    candidates: list[Entry]
    letters: list[DeadLetter] = field(default_factory=list)
    held_back: set[int] = field(default_factory=set)
    deduped: int = 0
    clock_ahead: int = 0


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
    it. ``foreign`` says that the peer's own stamps are not to be used.
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
    ) -> None:
        self.peer_id = peer_id
        self.coalesce = coalesce
        self.foreign = foreign
        self.decoder = DataDecoder(payload_bytes)
        self._decode = self.decoder.decode
        self._part_bytes = part_bytes
        self._now_ms = now_ms

    # Choosing

    def select(self, entries: Sequence[Any]) -> Selection:
        """Choose the newest entry of each key; nothing is decompressed."""
        now = self._now_ms()
        selection = Selection(entries, [])
        newest: dict[str | int, Entry] = {}
        minute_ahead, day_ahead = now + MINUTE_MS, now + DAY_MS
        coalesce, foreign = self.coalesce, self.foreign
        index = -1
        for stream_id, fields in entries:
            index += 1
            try:
                entry = parse_entry(fields, index)
                if foreign or not entry.stamped:
                    entry = _stamp_by_id(entry, stream_id)
                if entry.updated_at > minute_ahead:
                    _check_not_future(entry, day_ahead)
                    selection.clock_ahead += 1
            except BadEntryError as error:
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

    def materialise(self, selection: Selection) -> Iterator[Part]:
        """Decompress and verify the candidates, in parts of bounded size.

        Dead letters are added to the selection as they are found, so it is complete when the
        iterator is exhausted. At least one part comes, maybe an empty one.
        """
        part = Part()
        items, wire = part.items, part.wire
        filled, most = 0, self._part_bytes
        decode = self._decode
        for entry in selection.candidates:
            digest = entry.digest
            if entry.deleted or digest is None:
                made = self._make(selection, entry)
            else:
                # As _make does, without the call: this is the path of nearly every entry.
                try:
                    content = decode(entry.data, digest)
                except BadEntryError as error:
                    made = self._fall_back(selection, entry, error)
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
                    made = None
            if made is not None:
                filled += len(made[1].content)
                wire.append(made[0])
                items.append(made[1])
            if filled >= most:
                yield self._finish(part)
                part = Part()
                items, wire = part.items, part.wire
                filled = 0
        yield self._finish(part)

    def _finish(self, part: Part) -> Part:
        # A foreign entry was stamped anew, so its meta says something else than the item does.
        if self.foreign:
            part.wire[:] = [None] * len(part.wire)
        return part

    def _make(self, selection: Selection, entry: Entry) -> tuple[Entry, SyncItem] | None:
        """Make the item of an entry, or of the newest older one that is good."""
        content, digest = b"", entry.digest
        if not entry.deleted:
            try:
                content = self._decode(entry.data, digest)
            except BadEntryError as error:
                return self._fall_back(selection, entry, error)
        return entry, SyncItem(
            entry.key,
            content,
            entry.content_type,
            digest if digest is not None else content_hash(content),
            entry.version,
            entry.updated_at,
            entry.deleted,
            entry.origin,
        )

    def _fall_back(
        self, selection: Selection, bad: Entry, error: BadEntryError
    ) -> tuple[Entry, SyncItem] | None:
        """Bury a bad entry, and try the next older one of its key."""
        self._bury(selection, bad.index, error)
        older = self._next_older(selection, bad)
        return None if older is None else self._make(selection, older)

    def _next_older(self, selection: Selection, bad: Entry) -> Entry | None:
        """Return the newest entry of the same key that is older than a bad one; this is rare."""
        if not self.coalesce:
            return None
        older: Entry | None = None
        for index, (stream_id, fields) in enumerate(selection.entries):
            try:
                entry = parse_entry(fields, index)
                if self.foreign or not entry.stamped:
                    entry = _stamp_by_id(entry, stream_id)
                _check_not_future(entry, self._now_ms() + DAY_MS)
            except BadEntryError:
                continue  # It has its letter already.
            if entry.key == bad.key and self._rank(entry) < self._rank(bad):
                older = entry if older is None else max(older, entry, key=self._rank)
        return older

    def _rank(self, entry: Entry) -> tuple[Any, ...]:
        """Order entries of one key; equal stamps by place, so that none is tried twice."""
        if self.foreign:
            return (entry.index,)
        return (*_order(entry), entry.index)

    # Dead letters

    def _bury(self, selection: Selection, index: int, error: BadEntryError) -> None:
        stream_id, fields = selection.entries[index]
        selection.letters.append(self.letter(stream_id, fields, error))

    def letter(
        self, stream_id: bytes, fields: Sequence[bytes] | None, error: BadEntryError
    ) -> DeadLetter:
        """Return the dead letter of an entry."""
        raw = tuple(fields) if fields is not None else None
        key = dict(zip(raw[::2], raw[1::2], strict=False)).get(b"key") if raw else None
        return DeadLetter(
            peer_id=self.peer_id,
            stream_id=stream_id.decode("ascii", "replace"),
            reason=error.reason,
            detail=error.detail,
            key=None if key is None else key[:1024].decode("utf-8", "replace"),
            fields=raw,
            size=sum(map(len, raw)) if raw else 0,
            at_ms=self._now_ms(),
            foreign=self.foreign,
        )


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
        raise BadEntryError("future", "updated_at is more than a day ahead of this node's clock")


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
