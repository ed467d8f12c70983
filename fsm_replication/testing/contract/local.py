"""Writes of the application itself come after everything they have seen."""

from __future__ import annotations

import asyncio
import itertools
from typing import Protocol, cast

import pytest

from fsm_replication.errors import InvalidKeyError
from fsm_replication.items import NUMBER_MAX, SyncItem
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.testing.contract.base import StoreRules, dead, live, now_ms

__all__ = ("LocalWriteRules",)

HOUR_MS = 3_600_000


class _Writable(Protocol):
    async def put(self, key: str, content: bytes, content_type: str = "binary") -> SyncItem:
        """Write an item; returns it as it is held."""

    async def delete(self, key: str) -> bool:
        """Delete an item; returns whether there was a live one."""


class LocalWriteRules(StoreRules):
    """Rules of ``put(key, content, content_type)`` and ``delete(key)``, where a store has them."""

    def test_a_local_write_is_stamped_and_held(self) -> None:
        """If this fails peers cannot tell a local write from what it replaced."""

        async def scenario(store: SyncEngine) -> None:
            writer = _writer(store)
            before = now_ms()
            first = await writer.put("k", b"[1]", "json")
            assert (first.key, first.content, first.content_type) == ("k", b"[1]", "json")
            assert (first.version, first.deleted) == (1, False)
            assert before <= first.updated_at <= now_ms()
            assert await store.get("k") == first
            second = await writer.put("k", b"[1]", "json")
            assert second.version == 2
            assert second.updated_at > first.updated_at

        self.with_store(scenario)

    def test_local_writes_come_after_all_they_have_seen(self) -> None:
        """If this fails a local write loses to one it replaced, as where a clock has gone back."""

        async def scenario(store: SyncEngine) -> None:
            writer = _writer(store)
            ahead = live("k", b"[1]", now_ms() + HOUR_MS, version=7)
            await store.submit(ahead)
            written = await writer.put("k", b"[2]")
            assert (written.updated_at, written.version) == (ahead.updated_at + 1, 8)
            assert await writer.delete("k")
            (gone,) = await store.get_many(["k"])
            assert gone is not None
            assert (gone.updated_at, gone.version, gone.deleted) == (
                written.updated_at + 1,
                9,
                True,
            )
            assert not await store.submit(written), "the delete is newer"
            assert (await writer.put("k", b"[3]")).version == 10, "a tombstone counts as seen"

        self.with_store(scenario)

    def test_a_delete_of_what_is_not_there_leaves_no_trace(self) -> None:
        """If this fails deletes of nothing travel through the mesh."""

        async def scenario(store: SyncEngine) -> None:
            writer = _writer(store)
            assert not await writer.delete("never")
            await store.submit(dead("k"))
            before = await store.stamps(["k"])
            assert not await writer.delete("k")
            assert list(await store.stamps(["never", "k"])) == [None, *before]

        self.with_store(scenario)

    def test_writes_at_once_lose_no_version(self) -> None:
        """If this fails two writes at once make one version, and one of them is lost."""

        async def scenario() -> None:
            place = self.new_place()
            async with self.opened(place) as one:
                writer = _writer(one)
                async with self.opened(place if self.shared else self.new_place()) as two:
                    writers = (writer, _writer(two)) if self.shared else (writer, writer)
                    items = await asyncio.gather(
                        *(writers[n % 2].put("k", b"[%d]" % n) for n in range(40))
                    )
                (held,) = await one.stamps(["k"])
                assert held is not None
                if one.resolver.by_stamp:
                    assert sorted(item.version for item in items) == list(range(1, 41))
                    ordered = sorted(items, key=lambda item: item.version)
                    times = itertools.pairwise(item.updated_at for item in ordered)
                    assert all(a < b for a, b in times)
                    assert held == ordered[-1].stamp
                else:
                    assert held.version <= len(items)

        self.run(scenario)

    @pytest.mark.parametrize(
        "key", ["", "k" * 1025, "é" * 513, "\ud800"], ids=["empty", "long", "bytes", "surrogate"]
    )
    def test_a_bad_key_is_refused(self, key: str) -> None:
        """If this fails a node writes what no other node will take."""

        async def scenario(store: SyncEngine) -> None:
            writer = _writer(store)
            with pytest.raises(InvalidKeyError):
                await writer.put(key, b"")
            with pytest.raises(InvalidKeyError):
                await writer.delete(key)

        self.with_store(scenario)

    def test_what_no_reader_would_take_is_refused(self) -> None:
        """If this fails an item is written that every peer makes a dead letter of."""

        async def scenario(store: SyncEngine) -> None:
            writer = _writer(store)
            with pytest.raises(ValueError, match="text"):
                await writer.put("k", b"x", "text")
            assert list(await store.stamps(["k"])) == [None]
            item = live("edge", b"[1]", NUMBER_MAX, 5)
            await store.submit(item)
            with pytest.raises(ValueError, match="2"):
                await writer.put(item.key, b"[2]")
            with pytest.raises(ValueError, match="2"):
                await writer.delete(item.key)
            assert await store.get(item.key) == item

        self.with_store(scenario)

    def test_the_largest_version_makes_no_key_unwritable(self) -> None:
        """If this fails one odd entry of a peer ends all local writes of its key."""

        async def scenario(store: SyncEngine) -> None:
            writer = _writer(store)
            await store.submit(live("k", b"[1]", now_ms() + HOUR_MS, version=NUMBER_MAX))
            (before,) = await store.stamps(["k"])
            assert before is not None
            await writer.put("k", b"[2]")
            (written,) = await store.stamps(["k"])
            assert written is not None
            assert (written.updated_at, written.version) == (before.updated_at + 1, NUMBER_MAX)
            assert await writer.delete("k")
            (gone,) = await store.stamps(["k"])
            assert gone is not None
            assert (gone.updated_at, gone.version) == (before.updated_at + 2, NUMBER_MAX)

        self.with_store(scenario)


def _writer(store: SyncEngine) -> _Writable:
    if not (hasattr(store, "put") and hasattr(store, "delete")):
        pytest.skip("the store takes no local writes by put and delete")
    return cast("_Writable", store)
