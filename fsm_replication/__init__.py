"""Keep data the same at several sites without a central database.

Every lifecycle in here is an explicit finite-state machine, declared as a table in
:mod:`fsm_replication.tables`; start reading there.
"""

from __future__ import annotations

from fsm_replication.config import (
    ColdPathConfig,
    CursorConfig,
    HotPathConfig,
    PeerConfig,
    PeerHealthConfig,
    ReplicationConfig,
    Settings,
    SloConfig,
    StoreConfig,
)
from fsm_replication.config_change import ConfigChange, PeerChange
from fsm_replication.dead_letters import DeadLetters, RetryStats
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import (
    AlreadyRunningError,
    CircuitOpenError,
    ConfigError,
    ConnectionLostError,
    CursorStoreError,
    DrainTimeoutError,
    EngineStoppedError,
    InvalidKeyError,
    InvalidStateError,
    MergeError,
    NetworkError,
    NoPeerError,
    PeerError,
    PeerRefusedError,
    ReplicationError,
    StampAheadError,
    StartupError,
    StoreError,
    StoreTimeoutError,
    UnreachableStateError,
    UsageError,
    WaitTimeoutError,
    WatcherLagged,
    WorkerCrashedError,
)
from fsm_replication.health import HealthCheck, PeerHealth
from fsm_replication.items import LastWriterWins, Resolver, Stamp, SyncItem
from fsm_replication.journal import Transition
from fsm_replication.ports import DeadLetter, GapRow, Ports
from fsm_replication.reports import PauseReason
from fsm_replication.stores import (
    ApplyResult,
    MemorySyncEngine,
    NoOpSyncEngine,
    Outbox,
    OutboxPublisher,
    OutboxRow,
    Outcome,
    Publisher,
    Received,
    RedisSyncEngine,
    SyncEngine,
)
from fsm_replication.tables import CircuitState, EngineState, PeerState
from fsm_replication.workers.cold_path import RepairStats
from fsm_replication.workers.explain import Explanation, HeldVersion, PeerVersion
from fsm_replication.workers.repair import KeyDifference

__all__ = (
    "AlreadyRunningError",
    "ApplyResult",
    "CircuitOpenError",
    "CircuitState",
    "ColdPathConfig",
    "ConfigChange",
    "ConfigError",
    "ConnectionLostError",
    "CursorConfig",
    "CursorStoreError",
    "DeadLetter",
    "DeadLetters",
    "DrainTimeoutError",
    "EngineState",
    "EngineStoppedError",
    "Explanation",
    "GapRow",
    "HealthCheck",
    "HeldVersion",
    "HotPathConfig",
    "InvalidKeyError",
    "InvalidStateError",
    "KeyDifference",
    "LastWriterWins",
    "MemorySyncEngine",
    "MergeError",
    "NetworkError",
    "NoOpSyncEngine",
    "NoPeerError",
    "Outbox",
    "OutboxPublisher",
    "OutboxRow",
    "Outcome",
    "PauseReason",
    "PeerChange",
    "PeerConfig",
    "PeerError",
    "PeerHealth",
    "PeerHealthConfig",
    "PeerRefusedError",
    "PeerState",
    "PeerVersion",
    "Ports",
    "Publisher",
    "Received",
    "RedisSyncEngine",
    "RepairStats",
    "ReplicationConfig",
    "ReplicationEngine",
    "ReplicationError",
    "Resolver",
    "RetryStats",
    "Settings",
    "SloConfig",
    "Stamp",
    "StampAheadError",
    "StartupError",
    "StoreConfig",
    "StoreError",
    "StoreTimeoutError",
    "SyncEngine",
    "SyncItem",
    "Transition",
    "UnreachableStateError",
    "UsageError",
    "WaitTimeoutError",
    "WatcherLagged",
    "WorkerCrashedError",
)
