"""The outbox of a store tells exactly what changed, and outlives a crash with the items."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fsm_replication.items import SyncItem
from fsm_replication.stores.outbox import Outbox, OutboxRow
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.testing.contract.base import apply, dead, live, now_ms, shifted
from fsm_replication.testing.contract.crash import CrashRules

__all__ = ("OutboxRules",)


class OutboxRules(CrashRules):
    """Rules of :class:`~fsm_replication.stores.Outbox`."""

    def test_the_outbox_tells_exactly_what_was_applied(self) -> None:
        """If this fails peers see changes that did not happen, or miss some."""

        def check(drawn: list[SyncItem]) -> None:
            async def scenario() -> None:
                async with self._outbox() as (store, outbox):
                    told: list[SyncItem] = []
                    for change in shifted(drawn):
                        result = await store.apply_many([change])
                        held = await store.get_many([change.key])
                        told += [item for item in held if item is not None] * result.applied
                    rows = await outbox.read_outbox(1000)
                    assert [row.item for row in rows] == told
                    _check_numbers(rows)

            self.run(scenario)

        self.for_all(self.histories(), check)

    def test_local_writes_are_in_the_outbox(self) -> None:
        """If this fails what the application writes stays at its node."""

        async def scenario() -> None:
            async with self._outbox() as (store, outbox):
                put, delete = getattr(store, "put", None), getattr(store, "delete", None)
                assert put is not None, "a store that others read takes local writes"
                assert delete is not None, "a store that others read takes local writes"
                written = await put("k", b"[1]", "json")
                assert await delete("k")
                assert not await delete("k")
                (gone,) = await store.get_many(["k"])
                assert [row.item for row in await outbox.read_outbox(9)] == [written, gone]

        self.run(scenario)

    def test_rows_are_read_in_order_and_forgotten_by_number(self) -> None:
        """If this fails a change is published before an older one, twice, or never."""

        async def scenario() -> None:
            async with self._outbox() as (store, outbox):
                assert list(await outbox.read_outbox(5)) == []
                assert await outbox.outbox_mark() == ""
                at = now_ms()
                changes = [live(f"k{n}", b"[%d]" % n, at) for n in range(7)]
                await store.apply_many(changes)
                first = await outbox.read_outbox(3)
                assert [row.item for row in first] == changes[:3]
                assert list(await outbox.read_outbox(3)) == list(first), "reading removes nothing"
                await outbox.forget_outbox([first[0].number, first[2].number], "one")
                left = await outbox.read_outbox(100)
                assert [row.item for row in left] == [changes[1], *changes[3:]]
                assert await outbox.outbox_mark() == "one"
                await outbox.forget_outbox([first[0].number], "two")
                assert await outbox.outbox_mark() == "two", "rows that are gone do no harm"
                await outbox.forget_outbox([], "three: é")
                assert await outbox.outbox_mark() == "three: é"
                assert list(await outbox.read_outbox(100)) == list(left)
                await outbox.forget_outbox([row.number for row in left], "four")
                await store.apply_many([live("more", b"", at)])
                (row,) = await outbox.read_outbox(100)
                assert row.number > left[-1].number, "numbers are not used again"

        self.run(scenario)

    def test_all_items_are_read_page_by_page(self) -> None:
        """If this fails a Redis that came back empty stays without some of the items."""

        async def scenario() -> None:
            async with self._outbox() as (store, outbox):
                assert list(await outbox.read_items("", 3)) == []
                keys = ["a", "a.b", "B", "é", "日本", "\0", "z" * 1024, "%", "'", "_", "\U0001f600"]
                changes = [live(key, key.encode()) for key in keys] + [dead("gone")]
                await store.apply_many(changes)
                found: list[SyncItem] = []
                while page := await outbox.read_items(found[-1].key if found else "", 3):
                    assert len(page) <= 3
                    found += page
                assert sorted(item.key for item in found) == sorted([*keys, "gone"])
                assert {item.key: item for item in found} == {c.key: c for c in changes}

        self.run(scenario)

    def test_rows_of_one_key_stay_in_order_whoever_writes(self) -> None:
        """If this fails peers end with an older version than the store holds."""

        async def scenario() -> None:
            async with self._outbox() as (store, outbox):
                at = now_ms()
                await asyncio.gather(
                    *(apply(store, [live("k", b"[1]", at + n % 11)]) for n in range(30))
                )
                rows = await outbox.read_outbox(100)
                stamps = [row.item.stamp for row in rows]
                assert stamps == sorted(set(stamps))
                assert stamps[-1:] == await store.stamps(["k"])

        self.run(scenario)

    async def check_after_crash(self, place: Any, answered: int) -> int:
        """Assert also that the outbox tells exactly what the items are."""
        settled = await super().check_after_crash(place, answered)
        async with self.opened(place) as store:
            outbox = _outbox_of(store)
            told: dict[str, SyncItem] = {}
            for row in await outbox.read_outbox(1_000_000):
                held = told.get(row.item.key)
                assert held is None or held.stamp < row.item.stamp
                told[row.item.key] = row.item
            items = await outbox.read_items("", 1_000_000)
            assert {item.key: item for item in items} == told
        return settled

    @asynccontextmanager
    async def _outbox(self) -> AsyncIterator[tuple[SyncEngine, Outbox]]:
        async with self.opened(self.new_place()) as store:
            yield store, _outbox_of(store)


def _outbox_of(store: SyncEngine) -> Outbox:
    assert isinstance(store, Outbox), "a store that others read is an Outbox"
    return store


def _check_numbers(rows: Any) -> None:
    numbers = [row.number for row in rows]
    assert numbers == sorted(set(numbers))
    assert all(isinstance(row, OutboxRow) for row in rows)
