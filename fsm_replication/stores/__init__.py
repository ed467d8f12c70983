"""Stores: the protocol, the three that ship with the library, and a publisher for any other."""

from __future__ import annotations

from fsm_replication.stores.memory import MemorySyncEngine
from fsm_replication.stores.noop import NoOpSyncEngine
from fsm_replication.stores.outbox import Outbox, OutboxPublisher, OutboxRow
from fsm_replication.stores.protocol import (
    ApplyResult,
    Outcome,
    Publisher,
    Received,
    SyncEngine,
    WireForm,
)
from fsm_replication.stores.redis import RedisSyncEngine

__all__ = (
    "ApplyResult",
    "MemorySyncEngine",
    "NoOpSyncEngine",
    "Outbox",
    "OutboxPublisher",
    "OutboxRow",
    "Outcome",
    "Publisher",
    "Received",
    "RedisSyncEngine",
    "SyncEngine",
    "WireForm",
)
