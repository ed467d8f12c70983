"""The engine's machine.

Theory of operation. An engine lives once: Created, Connecting, Running, ShuttingDown, and then
Stopped or Failed. Everything it ever owns is opened while Connecting and closed while
ShuttingDown, and there is only one way out, whatever went wrong: an error is *kept* and the engine
drains like any other. Which of the two final states it ends in is decided by whether an error was
kept. Losing every peer while Running moves nothing: the links look for their peers, the engine is
merely not ready.

Two rules: a state owns its workers (leaving it stops them), and the links belong to the group
Active, so they live through the move from Connecting to Running.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fsm_replication.reports import EngineFact
from fsm_replication.tables.table import Reaction, Row, Table

__all__ = ("ENGINE", "EngineState")


class EngineState(StrEnum):
    """Where an engine is in its life."""

    CREATED = "Created"
    CONNECTING = "Connecting"
    RUNNING = "Running"
    SHUTTING_DOWN = "ShuttingDown"
    STOPPED = "Stopped"
    FAILED = "Failed"


_S = EngineState

ENGINE: Final = Table(
    name="engine",
    states=EngineState,
    initial=_S.CREATED,
    final=frozenset({_S.STOPPED, _S.FAILED}),
    groups={"Active": frozenset({_S.CONNECTING, _S.RUNNING})},
    rows=(
        Row(
            "start",
            (_S.CREATED,),
            _S.CONNECTING,
            "open and lock the cursor store, connect the peer links side by side",
            effects=("start_up",),
        ),
        Row(
            "connected",
            (_S.CONNECTING,),
            _S.RUNNING,
            "a peer is up, or none is configured, or the engine may run without",
            effects=("start_workers",),
        ),
        Row(
            "abort",
            (_S.CONNECTING, _S.RUNNING),
            _S.SHUTTING_DOWN,
            "what cannot be mended: no peer in time, a worker that will not stay up, the cursor"
            " store corrupt or gone",
            effects=("keep_error", "drain"),
        ),
        Row(
            "abort",
            (_S.SHUTTING_DOWN,),
            _S.SHUTTING_DOWN,
            "something else broke while draining; the first error is the one that is kept",
            effects=("keep_error",),
        ),
        Row(
            "shutdown",
            (_S.CREATED, _S.CONNECTING, _S.RUNNING),
            _S.SHUTTING_DOWN,
            "stop reading, drain, close links, flush and checkpoint cursors",
            effects=("drain",),
        ),
        Row(
            "stopped",
            (_S.SHUTTING_DOWN,),
            _S.STOPPED,
            "nothing is owned any more; safe to drop",
            guard="no_error_kept",
            effects=("release",),
        ),
        Row(
            "failed",
            (_S.SHUTTING_DOWN,),
            _S.FAILED,
            "nothing is owned any more; engine.error says why",
            guard="error_kept",
            effects=("release",),
        ),
    ),
    reactions=(
        Reaction(EngineFact.READY, (_S.CONNECTING,), ("connected",)),
        Reaction(EngineFact.BROKEN, (_S.CONNECTING, _S.RUNNING, _S.SHUTTING_DOWN), ("abort",)),
        Reaction(EngineFact.DRAINED, (_S.SHUTTING_DOWN,), ("stopped", "failed")),
    ),
)
