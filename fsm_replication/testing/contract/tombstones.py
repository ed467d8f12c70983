"""Deletes are facts: they win by time, are kept until they have expired and longer, and are forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from fsm_replication.stores.protocol import Outcome, SyncEngine
from fsm_replication.testing.contract.base import WEEK_SEC, StoreRules, dead, live, now_ms

__all__ = ("TombstoneRules",)

SHORT_TTL_SEC = 0.15
SHORT_GRACE_SEC = 0.15
POLL_SEC = 0.02
WEEK_MS = round(WEEK_SEC * 1000)


class TombstoneRules(StoreRules):
    """Rules of deletes; a tombstone expires at its own time plus ttl, the same everywhere."""

    def test_a_delete_wins_over_an_empty_item_of_the_same_time(self) -> None:
        """If this fails an empty content and a deletion look alike."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            assert await store.submit(live("k", b"", at))
            assert await store.delete_replicated(dead("k", at))
            assert await store.get("k") is None
            assert not await store.submit(live("k", b"", at))
            with pytest.raises(ValueError, match="not a tombstone"):
                await store.delete_replicated(live("k", b"", at + 1))

        self.with_store(scenario)

    def test_a_tombstone_is_held_like_an_item(self) -> None:
        """If this fails a delete does not travel on, or an older item revives what it deleted."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            gone, unknown = dead("k", at + 1), dead("unknown", at)
            await store.submit(live("k", b"x", at))
            result = await store.apply_many([gone, unknown])
            assert list(result.outcomes) == [Outcome.APPLIED, Outcome.APPLIED]
            assert result.live_deleted == 1, "only one of them replaced something live"
            assert list(await store.get_many(["k", "unknown"])) == [gone, unknown]
            assert list(await store.stamps(["k", "unknown"])) == [gone.stamp, unknown.stamp]
            older = await store.apply_many([live("k", b"y", at), live("unknown", b"y", at - 1)])
            assert older.superseded == 2
            assert await store.live_items() in (None, 0)
            back = live("k", b"back", at + 2)
            assert await store.submit(back)
            assert await store.get("k") == back
            assert await store.live_items() in (None, 1)

        self.with_store(scenario)

    def test_live_items_that_deletes_replace_are_counted(self) -> None:
        """If this fails the interlock does not see that a peer deletes everything."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            await store.apply_many([live("a", b"", at), live("b", b"", at), live("c", b"", at + 9)])
            deletes = [dead("a", at + 1), dead("a", at + 2), dead("c", at), dead("d", at)]
            result = await store.apply_many(deletes)
            assert (result.applied, result.superseded, result.live_deleted) == (3, 1, 1)
            assert await store.live_items() in (None, 2)

        self.with_store(scenario)

    def test_items_that_come_to_life_are_counted(self) -> None:
        """If this fails the interlock takes a stream that deletes and puts again for a mass delete."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            first = await store.apply_many([live("a", b"", at), live("b", b"", at)])
            assert (first.live_deleted, first.live_added) == (0, 2)
            await store.apply_many([dead("a", at + 1)])
            puts = [live("a", b"", at + 2), live("a", b"", at + 3), live("b", b"", at + 1)]
            again = await store.apply_many([*puts, live("c", b"", at), live("b", b"", at)])
            assert (again.live_deleted, again.live_added) == (0, 2), "a and c, and b was live"

        self.with_store(scenario)

    def test_an_expired_tombstone_deletes_what_is_older_and_nothing_else(self) -> None:
        """If this fails a late delete comes to no rest, deletes too much, or does not delete."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms() - WEEK_MS - 10_000
            older, newer = live("older", b"x", at - 1), live("newer", b"x", at + 1)
            await store.apply_many([older, newer])
            result = await store.apply_many(
                [dead("absent", at), dead("older", at), dead("newer", at)]
            )
            assert list(result.outcomes) == [
                Outcome.SUPERSEDED,
                Outcome.APPLIED,
                Outcome.SUPERSEDED,
            ], "of an absent key, of an older item, of a newer one"
            assert result.live_deleted == 1
            assert await store.get("older") is None
            assert not await store.submit(older), "it is kept for the grace"
            assert await store.get("newer") == newer
            assert list(await store.stamps(["absent"])) == [None]

        self.with_store(scenario)

    def test_a_tombstone_is_kept_until_its_grace_is_over_and_then_forgotten(self) -> None:
        """If this fails a key comes back too easily, or every key ever deleted is kept for ever."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            arrived_ms, late = now_ms(), dead("late", at - 60_000)
            await store.apply_many([live("late", b"x", at - 60_001), dead("k", at)])
            await store.submit(late)
            await store.apply_many([dead("back", at), live("back", b"x", at + 1)])
            due_ms = {
                "k": at + round((SHORT_TTL_SEC + SHORT_GRACE_SEC) * 1000),
                # Already expired when it arrived, it is kept from then on.
                "late": arrived_ms + round(SHORT_GRACE_SEC * 1000),
            }
            gone_ms = await _watch_until_gone(store, list(due_ms))
            for key, due in due_ms.items():
                assert gone_ms[key] >= due, f"{key!r} was forgotten {due - gone_ms[key]} ms early"
            assert await store.get("back") is not None, "what replaced a tombstone stays"

        self.with_store(scenario, ttl_sec=SHORT_TTL_SEC, grace_sec=SHORT_GRACE_SEC)

    def test_the_grace_is_that_of_the_last_tombstone(self) -> None:
        """If this fails the end of an earlier tombstone's time ends that of a later one."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            later_by = round(SHORT_GRACE_SEC * 1000)
            await store.submit(dead("k", at))
            await store.submit(dead("k", at + later_by, version=2))
            gone_ms = await _watch_until_gone(store, ["k"])
            due = at + later_by + round((SHORT_TTL_SEC + SHORT_GRACE_SEC) * 1000)
            assert gone_ms["k"] >= due, f"forgotten {due - gone_ms['k']} ms early"

        self.with_store(scenario, ttl_sec=SHORT_TTL_SEC, grace_sec=SHORT_GRACE_SEC)


async def _watch_until_gone(store: SyncEngine, keys: Sequence[str]) -> dict[str, int]:
    """Return when each key was found forgotten first; the deadline of the scenario ends it."""
    gone: dict[str, int] = {}
    while len(gone) < len(keys):
        # Stores may forget while they apply something else.
        await store.apply_many([live("unrelated")])
        for key, stamp in zip(keys, await store.stamps(keys), strict=True):
            if stamp is None:
                gone.setdefault(key, now_ms())
        await asyncio.sleep(POLL_SEC)
    return gone
