"""Stores: the protocol, and the three that ship with the library."""

from __future__ import annotations

from fsm_replication.stores.memory import MemorySyncEngine
from fsm_replication.stores.noop import NoOpSyncEngine
from fsm_replication.stores.protocol import (
    ApplyResult,
    Outcome,
    Received,
    SyncEngine,
    WireForm,
)
from fsm_replication.stores.redis import RedisSyncEngine

__all__ = (
    "ApplyResult",
    "MemorySyncEngine",
    "NoOpSyncEngine",
    "Outcome",
    "Received",
    "RedisSyncEngine",
    "SyncEngine",
    "WireForm",
)
