"""The peer link's machine.

Theory of operation. A link is directed: it reads one peer. It never ends by itself: whatever
happens to the peer it goes round Connecting, Running, Disconnecting, Backoff for ever. Only what waiting
cannot mend brings it to Failed, and errors that nobody expected, if they come again and again
while working with this peer: they are defects of ours, and spoil this link alone.

The group Running owns the connections and one tailer task; moves inside the group hand the tailer
its next mode, which it takes up between batches, so no batch is ever cut in two by a change of mind.

Every way into reading leads through Resuming, which loads the cursor, looks at the stream and
decides afresh. There is thus one place where "what is next?" is answered, and a pause, a new
setting or a new connection cannot resume into a decision that has become wrong.

Where the tailer takes time to end, Disconnecting and ShuttingDown wait for it: they are left only
by the report that the last worker has ended.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fsm_replication.reports import LinkFact
from fsm_replication.tables.table import Reaction, Row, Table

__all__ = ("LINK", "PeerState")


class PeerState(StrEnum):
    """Where a link to a peer is in its life."""

    CREATED = "Created"
    CONNECTING = "Connecting"
    RESUMING = "Resuming"
    BOOTSTRAPPING = "Bootstrapping"
    CATCHING_UP = "CatchingUp"
    TAILING = "Tailing"
    STANDBY = "Standby"
    PAUSED = "Paused"
    DISCONNECTING = "Disconnecting"
    BACKOFF = "Backoff"
    FAILED = "Failed"
    SHUTTING_DOWN = "ShuttingDown"
    STOPPED = "Stopped"

    @property
    def is_running(self) -> bool:
        """Whether the link is connected: the group Running."""
        return self in _RUNNING


_S = PeerState
_RUNNING: Final = (
    _S.RESUMING,
    _S.BOOTSTRAPPING,
    _S.CATCHING_UP,
    _S.TAILING,
    _S.STANDBY,
    _S.PAUSED,
)
_AWAKE: Final = tuple(state for state in _RUNNING if state is not _S.PAUSED)
_DECIDED: Final = tuple(state for state in _AWAKE if state is not _S.RESUMING)

LINK: Final = Table(
    name="link",
    states=PeerState,
    initial=_S.CREATED,
    final=frozenset({_S.STOPPED}),
    groups={"Running": frozenset(_RUNNING)},
    rows=(
        Row(
            "connect",
            (_S.CREATED, _S.FAILED),
            _S.CONNECTING,
            "the engine starts; or what had failed for good may have been mended",
            effects=("open_connections",),
        ),
        Row(
            "connected",
            (_S.CONNECTING,),
            _S.RESUMING,
            "the peer's marker key was read: load the cursor, look at the stream, decide",
            effects=("start_tailer",),
        ),
        Row(
            "connect_failed",
            (_S.CONNECTING,),
            _S.BACKOFF,
            "down, or not well: waiting may mend it",
            effects=("wait_to_retry",),
        ),
        Row(
            "retry",
            (_S.BACKOFF,),
            _S.CONNECTING,
            "the wait is over and the peer's circuit lets an attempt through",
            effects=("open_connections",),
        ),
        Row(
            "bootstrap",
            (_S.RESUMING, _S.CATCHING_UP, _S.TAILING),
            _S.BOOTSTRAPPING,
            "no cursor, an unfinished bootstrap, a gap, another stream or another incarnation of"
            " the local store",
            effects=("copy",),
        ),
        Row(
            "catch_up",
            (_S.RESUMING, _S.BOOTSTRAPPING, _S.TAILING),
            _S.CATCHING_UP,
            "more than 2 s or 10 x max_batch_size events behind: read in bulk",
            effects=("read_in_bulk",),
        ),
        Row(
            "tail",
            (_S.RESUMING, _S.BOOTSTRAPPING, _S.CATCHING_UP),
            _S.TAILING,
            "a read reached the head: wait there for what is new",
            effects=("read_at_head",),
        ),
        Row(
            "stand_by",
            (_S.RESUMING,),
            _S.STANDBY,
            "the hot path is switched off: stay connected for the cold path only",
            effects=("idle",),
        ),
        Row(
            "pause",
            _AWAKE,
            _S.PAUSED,
            "an operator's wish, backpressure, an open circuit, the interlock, dead letters full,"
            " clocks that are more than a day apart",
            effects=("hold",),
        ),
        Row(
            "resume",
            (_S.PAUSED,),
            _S.RESUMING,
            "what was held is still held: decide again",
            guard="no_reason_left",
            effects=("decide",),
        ),
        Row(
            "reconfigured",
            _DECIDED,
            _S.RESUMING,
            "its settings changed, or the local store: decide again",
            effects=("decide",),
        ),
        Row(
            "connection_lost",
            _RUNNING,
            _S.DISCONNECTING,
            "one flush is tried; what it cannot settle is dropped from memory and read again",
            effects=("await_end",),
        ),
        Row(
            "disconnected",
            (_S.DISCONNECTING,),
            _S.BACKOFF,
            "the tailer has ended and both connections are closed",
            effects=("wait_to_retry",),
        ),
        Row(
            "give_up",
            (_S.CONNECTING, _S.BACKOFF),
            _S.FAILED,
            "an unusable URL, our own node id, a newer format; rejected credentials, another tombstone"
            " ttl or resolver, or more than five unexpected errors in a minute while working with this"
            " peer (these are tried again every ``reconnect.rejected`` s)",
            effects=("wait_for_mending",),
        ),
        Row(
            "shutdown",
            tuple(s for s in _S if s not in (_S.SHUTTING_DOWN, _S.STOPPED)),
            _S.SHUTTING_DOWN,
            "the engine stops, or the peer was taken out of the configuration",
            effects=("await_end",),
        ),
        Row(
            "stopped",
            (_S.SHUTTING_DOWN,),
            _S.STOPPED,
            "nothing is owned any more",
            effects=("release",),
        ),
    ),
    reactions=(
        Reaction(LinkFact.CONNECTED, (_S.CONNECTING,), ("connected",)),
        Reaction(LinkFact.UNREACHABLE, (_S.CONNECTING,), ("connect_failed",)),
        Reaction(LinkFact.HOPELESS, (_S.CONNECTING, _S.BACKOFF), ("give_up",)),
        Reaction(LinkFact.DUE, (_S.BACKOFF,), ("retry",)),
        Reaction(LinkFact.DUE, (_S.FAILED,), ("connect",)),
        Reaction(LinkFact.MUST_COPY, (_S.RESUMING, _S.CATCHING_UP, _S.TAILING), ("bootstrap",)),
        Reaction(LinkFact.BEHIND, (_S.RESUMING, _S.BOOTSTRAPPING, _S.TAILING), ("catch_up",)),
        Reaction(LinkFact.AT_HEAD, (_S.RESUMING, _S.BOOTSTRAPPING, _S.CATCHING_UP), ("tail",)),
        Reaction(LinkFact.NO_HOT_PATH, (_S.RESUMING,), ("stand_by",)),
        Reaction(LinkFact.BLOCKED, _AWAKE, ("pause",)),
        Reaction(LinkFact.CLEARED, (_S.PAUSED,), ("resume",)),
        Reaction(LinkFact.OUTDATED, _DECIDED, ("reconfigured",)),
        Reaction(LinkFact.LOST, _RUNNING, ("connection_lost",)),
        Reaction(LinkFact.MOVED, _RUNNING, ("connection_lost",)),
        Reaction(LinkFact.MOVED, (_S.CONNECTING,), ("connect_failed",)),
        Reaction(LinkFact.MOVED, (_S.BACKOFF,), ("retry",)),
        Reaction(LinkFact.MOVED, (_S.FAILED,), ("connect",)),
        Reaction(LinkFact.ENDED, (_S.DISCONNECTING,), ("disconnected",)),
        Reaction(LinkFact.ENDED, (_S.SHUTTING_DOWN,), ("stopped",)),
    ),
)
