"""Whether a position is still in a stream's history: what XINFO says, and what is missing.

Theory of operation. Ids grow and entries are trimmed from the front, so where the oldest entry left
is at or before a position, or is the very next id after it, nothing after the position can have
been trimmed. Where it is not, a server that counts tells: what was ever trimmed, minus what was
read, is missing. One that does not count leaves a *doubt*: perhaps nothing is missing. A doubt is
worth one copy, which costs a round trip where the trees are equal, and never a second in a row.

Counts are believed within one run of the server. One that was started again may have been given an
older backup, and what came since may make its counts look as if entries were trimmed: so a position
of another run is looked for by its entry and by ids alone. Where neither finds it, the peer *came
back older*, unless the very run that held it has trimmed it since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

from fsm_replication.abilities import Abilities, Counts
from fsm_replication.errors import PeerReplyError
from fsm_replication.ports import BEFORE_ALL, Connection, Position, StreamId
from fsm_replication.replies import count, entries, raise_errors, reply_list, stream_id, unexpected

__all__ = (
    "Gap",
    "StreamInfo",
    "ask_info",
    "ask_run_id",
    "check_history",
    "find_gap",
    "find_newest",
    "is_there",
    "learn_info",
    "parse_info",
)

_COMMAND: Final = "XINFO STREAM"
_RUN_ID: Final = re.compile(rb"^run_id:([0-9a-f]{40})\r?$", re.MULTILINE)
_DATA_ID: Final = re.compile(rb"^master_replid:([0-9a-f]{40})\r?$", re.MULTILINE)
OTHER_STREAM: Final = "the stream's head is older than what was read: it is another stream"


@dataclass(frozen=True, slots=True)
class Gap:
    """Entries that the stream no longer holds; ``missed`` is None where it cannot be told.

    ``is_doubt`` says that perhaps none are missing, ``is_contradiction`` that the stream's counts
    and its entries cannot both be right, ``all_is_new`` that nothing of the stream was ever read.
    ``is_trim`` says that trimming explains it; where it does not, the peer may have come back older,
    and ``ids_tell_nothing`` says that its ids do not tell how old.
    """

    missed: int | None
    reason: str
    is_doubt: bool = False
    is_contradiction: bool = False
    all_is_new: bool = False
    is_trim: bool = False
    ids_tell_nothing: bool = False

    def __str__(self) -> str:
        return self.reason if self.missed is None else f"{self.missed} {self.reason}"


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What XINFO STREAM says. ``added`` is None where the server does not count.

    ``last_deleted`` is the largest id that XDEL has removed, None where that is not told.
    """

    length: int
    last_id: StreamId
    first_id: StreamId | None
    added: int | None
    last_deleted: StreamId | None = None

    @property
    def trimmed(self) -> int | None:
        """How many entries were ever removed."""
        return None if self.added is None else self.added - self.length

    @property
    def head(self) -> Position:
        """The position of a reader who has read everything."""
        return Position(self.last_id, self.added)

    @property
    def before_first(self) -> Position:
        """The position of a reader to whom the oldest entry is the next one."""
        assert self.first_id is not None, "an empty stream has no oldest entry"
        return Position(self.first_id.previous, self.trimmed)

    @property
    def start(self) -> Position:
        """The position before all that the stream holds."""
        return self.head if self.first_id is None else self.before_first

    def holds_all_after(self, at: StreamId) -> bool:
        """Whether no entry after ``at`` can have been trimmed, as ids alone tell."""
        if self.first_id is None:
            return at >= self.last_id
        return self.first_id <= at or self.first_id == at.next

    def may_lack(self, at: StreamId) -> bool:
        """Whether XDEL may have removed entries after ``at``."""
        return self.last_deleted is not None and self.last_deleted > at


EMPTY_STREAM: Final = StreamInfo(0, BEFORE_ALL, None, 0)


def parse_info(reply: Any) -> StreamInfo:
    """Read the reply of XINFO STREAM; a missing key is an empty stream.

    :raises PeerReplyError: if the server answered with another error.
    :raises ProtocolError: if the reply has another shape.
    """
    if isinstance(reply, PeerReplyError) and "no such key" in str(reply):
        return EMPTY_STREAM
    raise_errors(reply)
    if type(reply) is not list or len(reply) % 2:
        raise unexpected(_COMMAND, reply, "names with a value each")
    named = {
        name: value
        for name, value in zip(reply[::2], reply[1::2], strict=True)
        if isinstance(name, bytes)
    }
    added = named.get(b"entries-added")
    deleted = named.get(b"max-deleted-entry-id")
    info = StreamInfo(
        length=count(named.get(b"length"), f"{_COMMAND}, length"),
        last_id=stream_id(named.get(b"last-generated-id"), f"{_COMMAND}, last-generated-id"),
        first_id=_first_id(named),
        added=None if added is None else count(added, f"{_COMMAND}, entries-added"),
        last_deleted=None if deleted is None else stream_id(deleted, f"{_COMMAND}, max-deleted"),
    )
    if info.first_id is not None and info.first_id > info.last_id:
        raise unexpected(_COMMAND, reply, "a first entry that is not after the last")
    return info


def _first_id(named: dict[bytes, Any]) -> StreamId | None:
    """Return the id of the first entry, None where there is none."""
    if b"first-entry" not in named:
        raise unexpected(_COMMAND, None, "first-entry")
    first = named[b"first-entry"]
    if first is None:
        return None
    if type(first) is not list or not first:
        raise unexpected(f"{_COMMAND}, first-entry", first, "an entry")
    return stream_id(first[0], f"{_COMMAND}, first-entry")


def learn_info(info: StreamInfo, abilities: Abilities) -> StreamInfo:
    """Learn whether the server counts; returns ``info`` without counts that are not believed."""
    if info is EMPTY_STREAM:
        abilities.seen_empty = True
        return info
    abilities.learn(counted=info.added is not None)
    if abilities.counts is Counts.NONE and info.added is not None:
        return replace(info, added=None)
    return info


async def ask_info(
    connection: Connection, stream_key: str, timeout_sec: float, abilities: Abilities
) -> StreamInfo:
    """Ask for XINFO STREAM; entries of any size in the reply cost no memory.

    :raises PeerReplyError: if the server answered with an error.
    """
    try:
        reply = await connection.skim("XINFO", "STREAM", stream_key, timeout_sec=timeout_sec)
    except PeerReplyError as error:
        reply = error
    return learn_info(parse_info(reply), abilities)


async def ask_run_id(connection: Connection, timeout_sec: float) -> str:
    """Ask for the run of the server and the history of its data; "" where it does not tell both.

    The run is another after each start, the history after data of another server was taken.
    """
    # Redis 6.2 takes one section for each INFO.
    questions = (("INFO", "server"), ("INFO", "replication"))
    server, replication = await connection.pipeline(questions, timeout_sec=timeout_sec)
    run, data = _find(_RUN_ID, server), _find(_DATA_ID, replication)
    return f"{run} {data}" if run and data else ""


def _find(pattern: re.Pattern[bytes], reply: Any) -> str:
    found = pattern.search(reply) if isinstance(reply, bytes) else None
    return "" if found is None else found[1].decode()


async def find_newest(
    connection: Connection, stream_key: str, until: StreamId, timeout_sec: float
) -> StreamId | None:
    """Return the id of the newest entry up to an id that the stream still has.

    Where the user may not ask for it that is none: what is not known counts as long ago.

    :raises PeerReplyError: if the server answered with another error.
    :raises ProtocolError: if the reply has another shape.
    """
    try:
        found = await connection.skim(
            "XREVRANGE", stream_key, str(until), "-", "COUNT", 1, timeout_sec=timeout_sec
        )
    except PeerReplyError as error:
        if error.code != "NOPERM":
            raise
        return None
    if found == []:
        return None
    (entry,) = reply_list(found, "XREVRANGE", 1)
    name, _ = reply_list(entry, "XREVRANGE", 2)
    return stream_id(name, "XREVRANGE")


async def is_there(
    connection: Connection, stream_key: str, at: StreamId, timeout_sec: float
) -> bool:
    """Say whether the stream still has the entry of an id.

    :raises PeerReplyError: if the server answered with an error.
    :raises ProtocolError: if the reply has another shape.
    """
    found = await connection.skim(
        "XRANGE", stream_key, str(at), str(at), "COUNT", 1, timeout_sec=timeout_sec
    )
    return bool(entries(found, "XRANGE", 1))


def check_history(
    position: Position,
    info: StreamInfo,
    *,
    entry_is_there: bool,
    same_run: bool = True,
    latest_ms: int | None = None,
) -> Gap | None:
    """Say whether ``position`` is in this stream's history and nothing after it was trimmed.

    None means that reading can go on from there. Unless it is the ``same_run`` of the server in
    which the position was held, what is counted says nothing about it. Nor does the entry, where its
    id is later than ``latest_ms``, because the peer's clock was ahead: a server from a backup gives
    those ids again that it lacks.
    """
    at = position.stream_id
    if not same_run and latest_ms is not None and at.ms > latest_ms:
        reason = "the server was started again, and the ids in its stream are ahead of its clock"
        return Gap(None, reason, is_doubt=True, ids_tell_nothing=True)
    if entry_is_there:
        return None
    if at > info.last_id:
        return Gap(None, OTHER_STREAM)
    before_first = info.first_id is None or at < info.first_id
    if not same_run or info.trimmed is None or position.entries_read is None:
        if at == info.last_id or (before_first and info.holds_all_after(at)):
            return None
        return _doubt(at, is_trim=same_run and before_first)
    if not before_first and position != info.head:
        return Gap(None, "the entry last read is not in the stream: it is another stream")
    missed = info.trimmed - position.entries_read
    if before_first and missed < 0:
        return Gap(None, "the stream has fewer entries than were read: it is another stream")
    if before_first and missed > 0:
        return _trimmed(missed)
    return None


def find_gap(
    before: Position,
    end: Position,
    info: StreamInfo,
    count: int,
    *,
    at_head: bool,
    agreed_at: StreamId,
) -> Gap | None:
    """Say what is missing between ``before`` and the ``count`` entries that were read after it.

    ``end`` is the position after them, and ``at_head`` says that nothing came after it when ``info``
    was told. Up to ``agreed_at`` counts and entries agreed: what was read since, without asking for
    counts, may have jumped over a hole that shows only now.
    """
    if end.stream_id > info.last_id:
        return Gap(None, OTHER_STREAM)
    if info.trimmed is None or before.entries_read is None:
        at = before.stream_id
        return None if info.holds_all_after(at) else _doubt(at, is_trim=True)
    # What the counts say of trimming or deleting where ids tell that there was none.
    odd = info.holds_all_after(agreed_at) and not info.may_lack(agreed_at)
    missed = info.trimmed - before.entries_read
    if missed > 0:
        return replace(_trimmed(missed), is_contradiction=odd)
    if not at_head or end.entries_read == info.added:
        return None
    lost = (info.added or 0) - before.entries_read - count
    if lost > 0:
        reason = "entries were removed before they were read"
        return Gap(lost, reason, is_contradiction=odd, is_trim=True)
    reason = "the stream has fewer entries than were read: it is another stream"
    return Gap(None, reason, is_contradiction=odd)


def _doubt(at: StreamId, *, is_trim: bool) -> Gap:
    if at == BEFORE_ALL:
        reason = "entries came to a stream that was empty, and nothing tells which were the first"
        return Gap(None, reason, is_doubt=True, all_is_new=True, is_trim=is_trim)
    reason = "the entry last read is gone, and no count that can be believed tells what else is"
    return Gap(None, reason, is_doubt=True, is_trim=is_trim)


def _trimmed(missed: int) -> Gap:
    return Gap(missed, "entries were trimmed before they were read", is_trim=True)
