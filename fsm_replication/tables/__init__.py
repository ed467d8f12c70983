"""The heart: every machine as a literal table, one file each."""

from __future__ import annotations

from typing import Final

from fsm_replication.tables.circuit import CIRCUIT, CircuitState
from fsm_replication.tables.engine import ENGINE, EngineState
from fsm_replication.tables.link import LINK, PeerState
from fsm_replication.tables.table import Reaction, Row, Table, TableError

__all__ = (
    "CIRCUIT",
    "ENGINE",
    "LINK",
    "TABLES",
    "CircuitState",
    "EngineState",
    "PeerState",
    "Reaction",
    "Row",
    "Table",
    "TableError",
)

TABLES: Final = (ENGINE, LINK, CIRCUIT)
