"""When two dead letters are one: the same key could not be applied for the same reason, again.

A key that stays bad, because its writer's clock is wrong or its content is too large, would otherwise
fill the store with letters that all say the same. The newest entry of a key supersedes those before it,
so its raw fields are all that has to be kept (G1); that holds only where the order tuple alone decides,
so letters are not folded for a resolver that looks at contents: each entry keeps a letter of its own.

Letters that name no key, or one that is cut or no text, are one only if their raw fields are equal; an
entry that was too large to be held has neither, and always gets a letter of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from fsm_replication.errors import LettersFullError
from fsm_replication.ports import DeadLetter, StreamId

__all__ = ("check_room", "fold", "in_stream_order", "letters_that_stay", "same_as")


def same_as(letter: DeadLetter) -> bytes | None:
    """Return what is equal for letters of one key; None for one that is like no other."""
    if letter.fields is None:
        return None
    key = dict(zip(letter.fields[::2], letter.fields[1::2], strict=False)).get(b"key")
    # The key of a letter is cut and repaired to be shown: two of them may look alike.
    if key is not None and letter.key is not None and letter.key.encode("utf-8", "replace") == key:
        return hashlib.sha256(b"key\0" + key).digest()
    made = hashlib.sha256(b"fields\0")
    for part in letter.fields:
        made.update(b"%d:" % len(part) + part)
    return made.digest()


def in_stream_order(letters: Sequence[DeadLetter]) -> list[DeadLetter]:
    """Return letters by their places in the stream; where a place cannot be read, as they came."""
    places = [_place(letter.stream_id) for letter in letters]
    if any(place is None for place in places):
        return list(letters)
    return sorted(letters, key=lambda letter: _place(letter.stream_id) or StreamId(0, 0))


def fold(held: DeadLetter, letter: DeadLetter) -> DeadLetter | None:
    """Return what is to be kept instead of ``held``, an earlier letter of the same key and reason.

    ``held`` itself if it counts this entry already, because the entry is read again. None if the two
    are to be kept both: the entry stands before all that ``held`` stands for, as those of another
    stream may, so which of them is newer cannot be told.
    """
    place, newest = _place(letter.stream_id), _place(held.stream_id)
    first = _place(held.first_stream_id or held.stream_id)
    if place is None or newest is None or first is None or place < first:
        return None
    if place <= newest:
        return held
    since = held.first_stream_id or held.stream_id
    return replace(letter, at_ms=held.at_ms, count=held.count + 1, first_stream_id=since)


def letters_that_stay(sizes: Sequence[int], keep: int, keep_bytes: int) -> int:
    """Return how many of a peer's letters may stay, of which ``sizes`` are those in bytes, newest first.

    One may, whatever its size, unless ``keep`` is 0.
    """
    held = 0
    for number, size in enumerate(sizes):
        held += size
        if number >= keep or (number and held > keep_bytes):
            return number
    return len(sizes)


def check_room(before: Sequence[int], after: Sequence[int], keep: int, keep_bytes: int) -> None:
    """Check that there is room for letters, where none may be dropped.

    ``before`` and ``after`` are the number of a peer's letters, and the bytes they hold, without those
    that are to be added and with them. One batch may go over the number, and the first over the bytes:
    it would fit no better later.

    :raises LettersFullError: if there is none.
    """
    count, held = before
    more, more_bytes = after[0] - count, after[1] - held
    if (more > 0 and count >= keep) or (count and more_bytes > 0 and after[1] > keep_bytes):
        raise LettersFullError(count, held, max(0, more_bytes))


def _place(stream_id: str) -> StreamId | None:
    try:
        return StreamId.parse(stream_id)
    except ValueError:
        return None
