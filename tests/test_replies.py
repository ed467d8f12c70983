"""The shape of replies: what is taken, and what is one protocol error where it enters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fsm_replication import replies
from fsm_replication.config import PeerConfig, Settings
from fsm_replication.errors import PeerRefusedError, PeerReplyError, ProtocolError
from fsm_replication.ports import StreamId
from fsm_replication.workers import connector
from fsm_replication.workers.history import parse_info

INFO = [b"length", 1, b"last-generated-id", b"5-0", b"first-entry", [b"5-0", [b"f", b"v"]]]
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]

ODD: tuple[Any, ...] = (
    None, True, 1.5, float("inf"), -1, 2**70, b"", b"\xff", "²".encode(), b"9" * 5000, [], [None],
    [1], [[]], [b"a"], [b"a", 1], [b"a", b"b", b"c"], {}, {b"a": 1}, set(), DEEP,
)  # fmt: skip


def taken(read: Callable[..., Any], *more: Any) -> list[Any]:
    """Return which of the odd replies are taken; all others must be protocol errors."""
    found, told = [], []
    for odd in ODD:
        try:
            read(odd, "COMMAND", *more)
        except ProtocolError as error:
            told.append(str(error))
        else:
            found.append(odd)
    assert max(map(len, told)) < 300, "a reply of any size stands in its own error"
    return found


@pytest.mark.parametrize(
    ("read", "more", "expected"),
    [
        (replies.integer, (), [-1]),
        (replies.count, (), []),
        (replies.string, (4,), [b"", b"\xff", "²".encode()]),
        (replies.strings, (2,), [[], [b"a"]]),
        (replies.reply_list, (1,), [[None], [1], [[]], [b"a"], DEEP]),
        (replies.parts, (1,), [[None], [b"a"]]),
        (replies.table, (), [[]]),
        (replies.scanned, (10,), []),
        (replies.stream_id, (), []),
        (replies.entries, (), [[]]),
    ],
)
def test_a_reply_of_another_shape_is_a_protocol_error(
    read: Callable[..., Any], more: tuple[Any, ...], expected: list[Any]
) -> None:
    """If this fails an odd reply travels on, and something far away dies of it."""
    assert taken(read, *more) == expected
    with pytest.raises(PeerReplyError, match="LOADING"):
        read(PeerReplyError("LOADING"), "COMMAND", *more)


ENTRY = [b"5-0", [b"op", b"PUT"]]


@pytest.mark.parametrize(
    "odd",
    [
        [ENTRY, ENTRY, ENTRY],
        [[b"5-\xff", []]],
        [[b"5-0" * 20, []]],
        [[5, []]],
        [[b"5-0"]],
        [[b"5-0", [b"op", 1]]],
        [[b"5-0", [b"op", [b"PUT"]]]],
        [[b"5-0", b"op"]],
        [None],
    ],
)
def test_entries_of_another_shape_are_a_protocol_error(odd: Any) -> None:
    """If this fails the tailer dies of a field that is no string, or reads more than it asked for."""
    assert replies.entries([ENTRY, [b"6-0", None]], "XREAD", 2)
    with pytest.raises(ProtocolError):
        replies.entries(odd, "XREAD", 2)


@pytest.mark.parametrize("place", range(len(INFO)))
@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_stream_counts_of_another_shape_are_a_protocol_error(place: int, odd: Any) -> None:
    """If this fails ``,inf`` for a length ends the engine."""
    told = [*INFO[:place], odd, *INFO[place + 1 :]]
    try:
        info = parse_info(told)
    except ProtocolError:
        return
    assert info.length in (0, 1)
    assert info.last_id == StreamId(5, 0)


@pytest.mark.parametrize("form", ["²", "9" * 5000, "", "-1", "1.0", "2"])
def test_a_format_that_is_no_number_is_refused(form: str) -> None:
    """If this fails a marker with the format ``²`` ends the engine: it passes for a digit."""
    peer = PeerConfig(node_id="a", redis_url="redis://a")
    marker = {b"node_id": b"a", b"format": form.encode()}
    with pytest.raises(PeerRefusedError, match="has format") as raised:
        connector._check_marker(marker, connector._Found.OURS, peer, Settings(), "b", "lww")
    assert len(str(raised.value)) < 500
