"""For tests of the engine and of what embeds it: a simulated Redis and network, virtual time.

Everything simulated is deterministic and needs no server, no socket, no thread and no file. For
tests with real servers there is ``FaultProxy``, which stands before one and breaks connections. Beside
it stand three modules that need test tools and are imported by name: ``contract``, the rules every
store must keep; ``strategies`` for hypothesis; and ``fixtures`` with real Redis servers for pytest.
"""

from __future__ import annotations

from fsm_replication.testing.fates import BrokenPromiseError, Fate, random_fate, run_fate, shrink
from fsm_replication.testing.fault_proxy import FaultProxy
from fsm_replication.testing.local_mesh import LocalMesh, LocalNode, topology
from fsm_replication.testing.memory_cursor import CursorSnapshot, MemoryCursorStore
from fsm_replication.testing.sim_dialects import (
    REDIS_6_2,
    REDIS_7_0,
    REDIS_8_0,
    VALKEY_8_1,
    Dialect,
)
from fsm_replication.testing.sim_redis import SimRedis, SimState
from fsm_replication.testing.sim_store import SimStore
from fsm_replication.testing.sim_transport import SimConnection, SimTransport
from fsm_replication.testing.virtual_time import (
    DeadlockError,
    LoopClock,
    SkewedWallClock,
    VirtualTimeLoop,
    run,
)

__all__ = (
    "REDIS_6_2",
    "REDIS_7_0",
    "REDIS_8_0",
    "VALKEY_8_1",
    "BrokenPromiseError",
    "CursorSnapshot",
    "DeadlockError",
    "Dialect",
    "Fate",
    "FaultProxy",
    "LocalMesh",
    "LocalNode",
    "LoopClock",
    "MemoryCursorStore",
    "SimConnection",
    "SimRedis",
    "SimState",
    "SimStore",
    "SimTransport",
    "SkewedWallClock",
    "VirtualTimeLoop",
    "random_fate",
    "run",
    "run_fate",
    "shrink",
    "topology",
)
