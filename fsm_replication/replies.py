"""What a reply must look like: each is taken apart here, where it enters, or is a protocol error.

A server may answer anything, and a proxy or a fork does: integers where strings belong, arrays that
are too long, doubles, maps. Whoever reads a reply says by the function it calls what that reply is;
what is another thing raises :class:`ProtocolError`, and what is an error of the server is raised as
it is. Nothing further up has to doubt the type of what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.ports import Oversize, StreamId

__all__ = (
    "count",
    "entries",
    "has_other_type",
    "integer",
    "parts",
    "raise_errors",
    "reply_list",
    "scanned",
    "status",
    "stream_id",
    "string",
    "strings",
    "table",
    "unexpected",
    "values",
)

_ID_BYTES: Final = b"0123456789-"
_ID_BYTES_MAX: Final = 41
_NUMBER_MAX: Final = 2**63 - 1


def unexpected(what: str, reply: Any, wanted: str) -> ProtocolError:
    """Return the error that tells what was answered, by its type alone: it may be of any size."""
    found = "nothing" if reply is None else type(reply).__name__
    if isinstance(reply, bytes | list):
        found = f"{found} of {len(reply)}"
    return ProtocolError(f"{what}: unexpected reply, {found} instead of {wanted}")


def raise_errors(reply: Any) -> None:
    """Raise a reply that is an error of the server.

    :raises PeerReplyError: if it is one.
    """
    if isinstance(reply, PeerReplyError):
        raise reply


def integer(reply: Any, what: str) -> int:
    """Return an integer.

    :raises PeerReplyError: if the server answered with an error.
    :raises ProtocolError: if it is anything else, or has more than 64 bits.
    """
    raise_errors(reply)
    if type(reply) is not int or not -_NUMBER_MAX - 1 <= reply <= _NUMBER_MAX:
        raise unexpected(what, reply, "an integer")
    return reply


def count(reply: Any, what: str) -> int:
    """Return an integer that is not negative; raises as :func:`integer` does."""
    number = integer(reply, what)
    if number < 0:
        raise ProtocolError(f"{what}: unexpected reply, {number} instead of a count")
    return number


def string(reply: Any, what: str, at_most: int | None = None) -> bytes:
    """Return a string, of ``at_most`` so many bytes.

    :raises PeerReplyError: if the server answered with an error.
    :raises ProtocolError: if it is anything else, or longer.
    """
    raise_errors(reply)
    if type(reply) is not bytes or (at_most is not None and len(reply) > at_most):
        raise unexpected(what, reply, "a string" if at_most is None else f"up to {at_most} bytes")
    return reply


def status(reply: Any, what: str, wanted: bytes) -> None:
    """Take note of a status, such as OK or PONG.

    :raises PeerReplyError: if the server answered with an error.
    :raises ProtocolError: if it is anything else.
    """
    raise_errors(reply)
    if reply != wanted:
        raise unexpected(what, reply, wanted.decode())


def reply_list(reply: Any, what: str, length: int) -> list[Any]:
    """Return an array of exactly so many parts, which are not looked at.

    :raises PeerReplyError: if the server answered with an error.
    :raises ProtocolError: if it is anything else.
    """
    raise_errors(reply)
    if type(reply) is not list or len(reply) != length:
        raise unexpected(what, reply, f"an array of {length}")
    return reply


def strings(reply: Any, what: str, at_most: int | None = None) -> list[bytes]:
    """Return an array of strings, ``at_most`` so many; raises as :func:`reply_list` does."""
    raise_errors(reply)
    if type(reply) is not list or has_other_type(reply, bytes):
        raise unexpected(what, reply, "an array of strings")
    if at_most is not None and len(reply) > at_most:
        raise unexpected(what, reply, f"at most {at_most}")
    return reply


def parts(reply: Any, what: str, length: int) -> list[bytes | None]:
    """Return an array of so many strings, some of which may be missing."""
    found = reply_list(reply, what, length)
    if has_other_type(found, bytes, type(None)):
        raise unexpected(what, reply, "an array of strings")
    return found


def table(reply: Any, what: str) -> dict[bytes, bytes]:
    """Return the fields of a hash; raises as :func:`reply_list` does."""
    flat = strings(reply, what)
    if len(flat) % 2:
        raise unexpected(what, reply, "names with a value each")
    return dict(zip(flat[::2], flat[1::2], strict=True))


def values(replies: Sequence[Any], what: str) -> Sequence[Any]:
    """Return replies of which each is a string, None, or an error of the server.

    :raises ProtocolError: if one is anything else.
    """
    for reply in replies:
        if reply is not None and not isinstance(reply, bytes | PeerReplyError):
            raise unexpected(what, reply, "a string")
    return replies


def scanned(reply: Any, what: str, at_most: int) -> tuple[bytes, list[bytes]]:
    """Return the cursor of a SCAN, which is a number, and the keys that were found."""
    cursor, keys = reply_list(reply, what, 2)
    at = string(cursor, what, at_most=20)
    if not at.isdigit():
        raise unexpected(what, cursor, "a cursor")
    return at, strings(keys, what, at_most)


def stream_id(reply: Any, what: str) -> StreamId:
    """Return a stream id; raises as :func:`string` does."""
    text = string(reply, what, at_most=_ID_BYTES_MAX)
    try:
        return StreamId.parse(text)
    except ValueError:
        raise ProtocolError(f"{what}: {text[:_ID_BYTES_MAX]!r} is no stream id") from None


def entries(reply: Any, what: str, at_most: int | None = None) -> list[Any]:
    """Return stream entries: ids with their fields, all strings, or None where the fields are gone.

    Ids hold nothing but digits and a dash; whether they grow is for the reader to see. Checked whole
    and in a few calls, because this is the path of every event.

    :raises PeerReplyError: if the server answered with an error.
    :raises ProtocolError: if it is anything else, or more than was asked for.
    """
    raise_errors(reply)
    if type(reply) is not list or has_other_type(reply, list) or set(map(len, reply)) - {2}:
        raise unexpected(what, reply, "entries")
    if at_most is not None and len(reply) > at_most:
        raise unexpected(what, reply, f"at most {at_most} entries")
    if not reply:
        return reply
    ids = [entry[0] for entry in reply]
    fields = [entry[1] for entry in reply if entry[1] is not None]
    if has_other_type(ids, bytes) or max(map(len, ids)) > _ID_BYTES_MAX:
        raise unexpected(what, reply, "entries with an id each")
    if b"".join(ids).translate(None, _ID_BYTES):
        raise ProtocolError(f"{what}: an id that is none")
    if has_other_type(fields, list) or has_other_type(chain.from_iterable(fields), bytes, Oversize):
        raise unexpected(what, reply, "entries whose fields are strings")
    return reply


def has_other_type(values: Any, *types: type) -> bool:
    """Say whether any of these is of another type than these, subclasses included."""
    return not set(map(type, values)).issubset(types)
