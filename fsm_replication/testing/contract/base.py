"""What the rules share: how a store is opened, what is handed to it, and what it must then hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_replication.errors import StoreReopenedError
from fsm_replication.items import EMPTY_HASH, Resolver, SyncItem, content_hash, resolve
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received, SyncEngine
from fsm_replication.testing import strategies

__all__ = (
    "DAY_SEC",
    "WEEK_SEC",
    "Model",
    "StoreRules",
    "apply",
    "dead",
    "live",
    "now_ms",
    "shifted",
)

WEEK_SEC: Final = 7 * 86_400.0
DAY_SEC: Final = 86_400.0
ORIGIN: Final = "elsewhere"

Scenario = Callable[[SyncEngine], Awaitable[None]]


def now_ms() -> int:
    """Return the time of day in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def live(
    key: str,
    content: bytes = b"content",
    at_ms: int | None = None,
    version: int = 1,
    content_type: str = "binary",
) -> SyncItem:
    """Return a live item of another node; without ``at_ms`` it was written just now."""
    at = now_ms() if at_ms is None else at_ms
    digest = content_hash(content)
    return SyncItem(key, content, content_type, digest, version, at, False, ORIGIN)


def dead(key: str, at_ms: int | None = None, version: int = 1) -> SyncItem:
    """Return a tombstone of another node."""
    at = now_ms() if at_ms is None else at_ms
    return SyncItem(key, b"", "binary", EMPTY_HASH, version, at, True, ORIGIN)


def shifted(changes: Sequence[SyncItem]) -> list[SyncItem]:
    """Return drawn changes with their times moved close to now, where no tombstone has expired."""
    by = now_ms() - strategies.SOME_TIME_MS
    return [
        SyncItem(
            c.key, c.content, c.content_type, c.content_hash, c.version, c.updated_at + by,
            c.deleted, c.origin,
        )
        for c in changes
    ]  # fmt: skip


async def apply(
    store: SyncEngine, changes: Sequence[SyncItem], received: Received | None = None
) -> ApplyResult:
    """Apply as replication does: once more where the store only says that it was reopened."""
    try:
        return await store.apply_many(changes, received)
    except StoreReopenedError:
        return await store.apply_many(changes, received)


class Model:
    """What a store must hold, and answer, after the same changes."""

    def __init__(self, resolver: Resolver, ttl_sec: float = WEEK_SEC) -> None:
        self.items: dict[str, SyncItem] = {}
        self._resolver = resolver
        self._ttl_ms = round(ttl_sec * 1000)

    def apply(self, changes: Sequence[SyncItem]) -> tuple[list[Outcome], int, int]:
        """Take changes; returns their outcomes and how many live items were deleted, and came."""
        outcomes: list[Outcome] = []
        live_deleted = live_added = 0
        for change in changes:
            held = self.items.get(change.key)
            made = resolve(self._resolver, held, change)
            expired = change.deleted and change.updated_at + self._ttl_ms <= now_ms()
            if made is None or (held is None and expired):
                outcomes.append(Outcome.SUPERSEDED)
                continue
            was_live = held is not None and not held.deleted
            live_deleted += made.deleted and was_live
            live_added += not (made.deleted or was_live)
            self.items[change.key] = made
            outcomes.append(Outcome.APPLIED)
        return outcomes, live_deleted, live_added

    @property
    def live(self) -> int:
        """How many live items are held."""
        return sum(not item.deleted for item in self.items.values())

    async def check(self, store: SyncEngine, keys: Sequence[str] | None = None) -> None:
        """Assert that the store holds the same, for all keys or some."""
        asked = list(self.items if keys is None else keys)
        wanted = [self.items.get(key) for key in asked]
        found = await store.get_many(asked)
        assert list(map(_seen, found)) == list(map(_seen, wanted))
        assert list(await store.stamps(asked)) == [None if w is None else w.stamp for w in wanted]


def _seen(item: SyncItem | None) -> Any:
    return None if item is None else (item.key, item.content, item.stamp)


class StoreRules:
    """How a contract gets its stores; override what your store needs.

    ``durable``: a second ``open_store`` of a place finds what the first left there, also where the
    process was killed. ``shared``: a place may be opened several times at once, by several processes.
    ``examples``: how many examples hypothesis tries of each property. ``deadline_sec``: how long one
    scenario may take.
    """

    durable: bool = False
    shared: bool = False
    examples: int = 25
    deadline_sec: float = 60.0

    def new_place(self) -> Any:
        """Return where an empty store can be opened: a path, a URL, a prefix; anything.

        Each call returns another place. For a durable store it is all that ``open_store`` is given
        in another process, so it must be possible to pickle it.
        """
        return None

    def open_store(
        self, place: Any, *, ttl_sec: float, grace_sec: float
    ) -> SyncEngine | AbstractAsyncContextManager[SyncEngine]:
        """Return the store at a place, with these times of tombstones.

        Where what is returned is an async context manager it is entered, and left at the end.
        """
        raise NotImplementedError(f"{type(self).__name__} must give open_store")

    def contents(self) -> st.SearchStrategy[bytes]:
        """Return the contents to try; a resolver of yours wants some that it knows."""
        return strategies.contents()

    def refused_item(self, place: Any) -> SyncItem | None:
        """Return an item that the store at this place refuses for good, None if there is none."""
        return None

    # For the rules.

    @asynccontextmanager
    async def opened(
        self, place: Any, *, ttl_sec: float = WEEK_SEC, grace_sec: float = DAY_SEC
    ) -> AsyncIterator[SyncEngine]:
        """Open a store, and close it in the end."""
        made = self.open_store(place, ttl_sec=ttl_sec, grace_sec=grace_sec)
        if isinstance(made, AbstractAsyncContextManager):
            async with made as store:
                yield store
        else:
            yield made

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        """Run a scenario on a loop of its own, within the deadline; it may leave no task."""

        async def bounded() -> None:
            async with asyncio.timeout(self.deadline_sec):
                await scenario()
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert not left, f"closing the store left tasks behind: {left}"

        asyncio.run(bounded())

    def with_store(
        self, scenario: Scenario, *, ttl_sec: float = WEEK_SEC, grace_sec: float = DAY_SEC
    ) -> None:
        """Run a scenario on an empty store."""

        async def on_one() -> None:
            async with self.opened(self.new_place(), ttl_sec=ttl_sec, grace_sec=grace_sec) as store:
                await scenario(store)

        self.run(on_one)

    def for_all(self, drawn: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        """Try a property on many examples."""
        # Made anew for each class: hypothesis takes one test that several classes inherit for
        # a mistake.

        @settings(
            max_examples=self.examples,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        @given(drawn)
        def tried(example: Any) -> None:
            check(example)

        tried()

    def histories(self) -> st.SearchStrategy[list[SyncItem]]:
        """Return histories with the contents of this store."""
        return strategies.histories(bodies=self.contents())

    def needs_durable(self) -> None:
        """Skip the rule for a store that does not outlive its process."""
        if not self.durable:
            pytest.skip("the store is not durable")
