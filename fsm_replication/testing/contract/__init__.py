"""The rules every store must keep, as a test class that pytest runs on a store of yours.

::

    from fsm_replication.testing.contract import SyncEngineContract


    class TestMyStore(SyncEngineContract):
        def open_store(self, place, *, ttl_sec, grace_sec):
            return MyStore(tombstone_ttl_sec=ttl_sec, tombstone_grace_sec=grace_sec)

What else can be told of a store is in :class:`StoreRules`: ``durable``, ``shared``, ``new_place``,
``contents``, ``refused_item``. A rule about something a store does not have (a tree, local writes) is
skipped and says so. A store that is also an :class:`~fsm_replication.stores.Outbox` is tried with
:class:`OutboxContract`; a resolver alone with :class:`ResolverRules`.

The tests are plain functions that run a loop of their own, so no plugin for asyncio is needed.
"""

from __future__ import annotations

from fsm_replication.testing.needs import require

require("fsm_replication.testing.contract", "pytest", "hypothesis")

import pytest  # noqa: E402 - only where it is installed

# So that an assertion of these modules shows what it compared, as one of a test module does.
_MODULES = (
    "base", "concurrency", "crash", "local", "order", "outbox", "positions", "resolver",
    "tombstones", "tree",
)  # fmt: skip
pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in _MODULES))

from fsm_replication.testing.contract.base import StoreRules  # noqa: E402
from fsm_replication.testing.contract.concurrency import ConcurrencyRules  # noqa: E402
from fsm_replication.testing.contract.crash import CrashRules  # noqa: E402
from fsm_replication.testing.contract.local import LocalWriteRules  # noqa: E402
from fsm_replication.testing.contract.order import OrderRules  # noqa: E402
from fsm_replication.testing.contract.outbox import OutboxRules  # noqa: E402
from fsm_replication.testing.contract.positions import PositionRules  # noqa: E402
from fsm_replication.testing.contract.resolver import ResolverRules  # noqa: E402
from fsm_replication.testing.contract.tombstones import TombstoneRules  # noqa: E402
from fsm_replication.testing.contract.tree import TreeRules  # noqa: E402

__all__ = ("OutboxContract", "ResolverRules", "StoreRules", "SyncEngineContract")


class SyncEngineContract(
    OrderRules,
    TombstoneRules,
    PositionRules,
    ConcurrencyRules,
    ResolverRules,
    TreeRules,
    LocalWriteRules,
    CrashRules,
):
    """All rules of the store protocol; subclass it and give it ``open_store``."""


class OutboxContract(OutboxRules, SyncEngineContract):
    """The same for a store that writes its changes to an outbox, and the rules of the outbox."""
