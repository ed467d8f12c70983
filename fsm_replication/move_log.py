"""How loudly a move is told in the log: what a person may have to act on is a warning."""

from __future__ import annotations

import logging
from typing import Final

from fsm_replication.machine import Move
from fsm_replication.reports import PauseReason
from fsm_replication.tables import CircuitState, EngineState, PeerState

__all__ = ("level_of_circuit", "level_of_move")

_LOST: Final = frozenset({"connection_lost", "give_up"})


def level_of_move(move: Move, *, attempts: int = 0) -> int:
    """Return the level at which a move of the engine or a link is logged.

    ``attempts`` counts the link's attempts since it was last connected. A peer that stays away is
    warned of once, and not at each attempt.
    """
    if move.dest is EngineState.FAILED:
        return logging.ERROR
    if move.trigger in _LOST or (move.trigger == "connect_failed" and attempts <= 1):
        return logging.WARNING
    if move.dest is PeerState.PAUSED and isinstance(move.payload, PauseReason):
        # Without a reason it pauses again for one that was told before.
        return logging.INFO if move.payload is PauseReason.OPERATOR else logging.WARNING
    return logging.INFO


def level_of_circuit(new: CircuitState) -> int:
    """Return the level at which the change of a circuit is logged."""
    return logging.WARNING if new is CircuitState.OPEN else logging.INFO
