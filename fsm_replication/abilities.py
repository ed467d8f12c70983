"""What a server can do, as far as it matters here: asked of it, once per connection.

Servers differ, and forks and proxies tell versions of their own, so nothing is guessed from one:

==============================  =====================================  ==================================
what                            how it is asked                        where it is missing
==============================  =====================================  ==================================
exclusive ranges                ``XRANGE key (0-1 0-1`` when           it is refused: older servers are
(since Redis 6.2)               connecting, or opening the store       not supported
a stream's count of all its     ``entries-added`` in the first         entries are looked for by their ids,
entries (since Redis 7.0)       ``XINFO STREAM`` of a stream that is   and blocking reads ask XINFO in the
                                there                                  same flight, see ``history``
documents (RedisJSON)           ``JSON.GET`` at the first item of a    strings are read with GET
                                foreign node
which run of the server it is,  ``run_id`` in ``INFO server`` and      what was counted on a connection
and of which history its data   ``master_replid`` in ``INFO            is believed on that one alone
(a start makes others, and so   replication``, before the first
does another server's data)     decision
==============================  =====================================  ==================================

Counts may be there and yet be wrong: a proxy, a fork, or somebody's XSETID. Where they contradict the
entries that the same reply carries, the link copies its peer once, as for another stream; when
it happens again before they have agreed it believes them no longer, and reads as if there were none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

__all__ = ("TOO_OLD", "Abilities", "Counts", "is_too_old", "question_of_age")

TOO_OLD: Final = (
    "its server is older than Redis 6.2 (it rejects exclusive ranges), and 6.2 is the oldest that is"
    " supported: upgrade it"
)

_BAD_ID: Final = "invalid stream id"


class Counts(Enum):
    """What is known of a server's count of all entries that a stream ever had."""

    UNKNOWN = auto()
    """There was no stream yet whose count could have been asked for."""
    KEPT = auto()
    """The server counts."""
    DOUBTED = auto()
    """It counts, but the last time its counts contradicted its entries."""
    NONE = auto()
    """It does not count, or what it counts is wrong."""


@dataclass(slots=True)
class Abilities:
    """What was found out about the server that a link's connections lead to."""

    counts: Counts = Counts.UNKNOWN
    json_module: bool | None = None
    """Whether a foreign node's Redis has RedisJSON; None until it was used."""
    seen_empty: bool = False
    """Whether this server had no stream: then its count from there on is known, in any run of it."""
    run_id: str = ""
    """The run of the server and the history of its data, "" before it was asked.

    Where the server does not tell, a name that lasts as long as the connection: nothing that is
    kept beside such a name is believed of any other connection.
    """

    @property
    def asks_with_each_read(self) -> bool:
        """Whether a blocking read alone would not tell what is missing before its entries."""
        return self.counts in (Counts.UNKNOWN, Counts.NONE)

    def learn(self, *, counted: bool) -> None:
        """Take in whether a stream that is there is counted."""
        if self.counts is Counts.UNKNOWN or not counted:
            self.counts = Counts.KEPT if counted else Counts.NONE

    def agree(self) -> None:
        """Take in that counts agreed with entries that came since they agreed for the last time."""
        if self.counts is Counts.DOUBTED:
            self.counts = Counts.KEPT

    def doubt(self) -> bool:
        """Take in that counts contradict entries; returns whether they are still believed."""
        self.counts = Counts.DOUBTED if self.counts is Counts.KEPT else Counts.NONE
        return self.counts is Counts.DOUBTED


def question_of_age(stream_key: str) -> Sequence[str]:
    """Return the command that only servers since Redis 6.2 understand; it reads nothing."""
    return ("XRANGE", stream_key, "(0-1", "0-1")


def is_too_old(error_text: str) -> bool:
    """Say whether the error that answers ``question_of_age`` comes from a server before 6.2."""
    return _BAD_ID in error_text.lower()
