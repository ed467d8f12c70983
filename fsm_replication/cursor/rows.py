"""What the rows of the cursor database stand for.

Texts may hold anything a ``str`` can, also NUL and lone surrogates: they come back as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from fsm_replication.letter_folding import same_as
from fsm_replication.ports import (
    Agreement,
    Cursor,
    DeadLetter,
    GapRow,
    InterlockRow,
    Position,
    StreamId,
)

__all__ = (
    "INTEGER_MAX",
    "agreement_of",
    "agreement_row",
    "cursor_row",
    "from_text",
    "gap_of",
    "gap_row",
    "id_rows",
    "interlock_of",
    "interlock_row",
    "letter_of",
    "letter_row",
    "position_of",
    "to_limit",
    "to_number",
    "to_text",
    "to_text_or_none",
)

INTEGER_MAX: Final = 2**63 - 1


def to_text(text: str) -> str | bytes:
    """Return what stands for ``text``: SQLite's texts are UTF-8, which knows no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def to_text_or_none(text: str | None) -> str | bytes | None:
    """Return what stands for a text, if there is one."""
    return None if text is None else to_text(text)


def from_text(value: Any) -> str:
    """Return the text that a value of the database stands for."""
    return value if isinstance(value, str) else bytes(value).decode("utf-8", "surrogatepass")


def to_number(value: int | None) -> int | None:
    """Return a count, or None where the database cannot hold it."""
    # A peer may claim any count. "Not known" is what makes a reader look for a gap himself.
    return value if value is not None and -INTEGER_MAX <= value <= INTEGER_MAX else None


def id_rows(ids: Sequence[int]) -> list[tuple[int]]:
    """Return those numbers that may be ids, a row each."""
    return [(number,) for number in ids if 0 < number <= INTEGER_MAX]


def to_limit(limit: int) -> int:
    """Return a limit on rows that the database takes for one."""
    # SQLite takes a negative limit for none at all.
    return min(max(limit, 0), INTEGER_MAX)


def position_of(stream_id: str, entries_read: int | None) -> Position:
    """Return a position in a stream.

    :raises ValueError: if ``stream_id`` is none.
    """
    return Position(StreamId.parse(stream_id), entries_read)


def agreement_row(peer_id: str, agreement: Agreement) -> tuple[Any, ...]:
    """Return the columns of an agreement, but for its exceptions."""
    head = agreement.head
    return (
        to_text(peer_id),
        agreement.at_ms,
        to_text(agreement.incarnation),
        str(agreement.up_to),
        *((None, None) if head is None else (str(head.stream_id), to_number(head.entries_read))),
        to_text(agreement.run_id),
    )


def agreement_of(row: Sequence[Any], exceptions: Mapping[str, int | None]) -> Agreement:
    """Return an agreement of these columns without the peer's, and of its exceptions.

    :raises ValueError: if an id is none.
    """
    at_ms, incarnation, up_to, head, head_read, run_id = row
    return Agreement(
        at_ms,
        from_text(incarnation),
        StreamId.parse(up_to),
        exceptions,
        None if head is None else position_of(head, head_read),
        from_text(run_id),
    )


def cursor_row(peer_id: str, cursor: Cursor) -> tuple[Any, ...]:
    """Return the row of a peer's cursor."""
    stream_id, entries_read = cursor.position
    names = to_text(cursor.incarnation), to_text(cursor.run_id)
    return to_text(peer_id), str(stream_id), to_number(entries_read), *names


_decode_fields: Final[Callable[[bytes], tuple[bytes, ...]]] = msgspec.msgpack.Decoder(
    tuple[bytes, ...]
).decode


def letter_row(letter: DeadLetter) -> tuple[Any, ...]:
    """Return the row of a dead letter, without its id."""
    return (
        to_text(letter.peer_id),
        to_text(letter.stream_id),
        to_text(letter.reason),
        to_text(letter.detail),
        to_text_or_none(letter.key),
        None if letter.fields is None else msgspec.msgpack.encode(letter.fields),
        letter.size,
        letter.at_ms,
        int(letter.foreign),
        to_number(letter.count),
        to_text(letter.first_stream_id),
        letter.held_bytes,
        same_as(letter),
    )


def letter_of(row: tuple[Any, ...]) -> DeadLetter:
    """Return the dead letter of a row, its id among the columns.

    :raises msgspec.MsgspecError: if its fields are not what a node wrote.
    """
    peer_id, stream_id, reason, detail, key, fields, size, at_ms, number, foreign, *more = row
    count, first_stream_id = more
    return DeadLetter(
        from_text(peer_id),
        from_text(stream_id),
        from_text(reason),
        from_text(detail),
        None if key is None else from_text(key),
        None if fields is None else _decode_fields(fields),
        size,
        at_ms,
        number,
        bool(foreign),
        count,
        from_text(first_stream_id),
    )


def gap_row(gap: GapRow) -> tuple[Any, ...]:
    """Return the row of a line of the ledger, without its id."""
    return (
        to_text(gap.peer_id),
        gap.found_at_ms,
        to_number(gap.missed),
        to_text(gap.reason),
        gap.healed_at_ms,
        to_text(gap.healed_by),
        to_text(gap.kind),
    )


def gap_of(row: tuple[Any, ...]) -> GapRow:
    """Return the line of the ledger of a row, its id among the columns."""
    peer_id, found_at_ms, missed, reason, healed_at_ms, healed_by, number, kind = row
    return GapRow(
        from_text(peer_id),
        found_at_ms,
        missed,
        from_text(reason),
        healed_at_ms,
        from_text(healed_by),
        number,
        from_text(kind),
    )


_decode_falls: Final[Callable[[str], tuple[tuple[int, int], ...]]] = msgspec.json.Decoder(
    tuple[tuple[int, int], ...]
).decode


def interlock_row(peer_id: str, row: InterlockRow) -> tuple[Any, ...]:
    """Return the row of a peer's interlock."""
    return (
        to_text(peer_id),
        row.saved_at_ms,
        msgspec.json.encode(row.falls).decode(),
        row.reserved,
        row.forgiven_ms,
        to_text(row.tripped),
    )


def interlock_of(row: tuple[Any, ...]) -> InterlockRow:
    """Return a peer's interlock from its row, without the peer's name.

    :raises msgspec.MsgspecError: if its falls are not what a node wrote.
    """
    saved_at_ms, falls, reserved, forgiven_ms, tripped = row
    return InterlockRow(
        saved_at_ms, _decode_falls(falls), reserved, forgiven_ms, from_text(tripped)
    )
