"""Several tasks, links and processes use a store at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack

from fsm_replication.items import SyncItem, content_hash
from fsm_replication.ports import Position, StreamId
from fsm_replication.stores.protocol import Outcome, Received, SyncEngine
from fsm_replication.testing.contract.base import Model, StoreRules, apply, dead, live, now_ms

__all__ = ("ConcurrencyRules",)

TASKS = 8
# So many turns of the loop that a call which needs none has long ended, and one that does I/O was
# interrupted at several places.
TURNS_MAX = 12


class ConcurrencyRules(StoreRules):
    """Compare and set is atomic per item, whoever else writes."""

    def test_one_item_from_many_peers_is_applied_once(self) -> None:
        """If this fails a change is published once for each peer it came from, for ever (G11)."""

        async def scenario() -> None:
            async with AsyncExitStack() as stack:
                stores = await self._several(stack)
                for number in range(5):
                    item = live(f"k{number}", b"[%d]" % number)
                    results = await asyncio.gather(
                        *(apply(stores[n % len(stores)], [item], Received(f"p{n}"))
                          for n in range(TASKS))
                    )  # fmt: skip
                    assert sum(result.applied for result in results) == 1

        self.run(scenario)

    def test_the_newest_wins_whoever_writes_at_once(self) -> None:
        """If this fails an older version overwrites a newer one that was stored meanwhile."""

        async def scenario() -> None:
            async with AsyncExitStack() as stack:
                stores = await self._several(stack)
                rng, at, model = random.Random(1), now_ms(), Model(stores[0].resolver)  # noqa: S311 - the same each time
                changes = [live("hot", b"[%d]" % n, at + n % 7, 1 + n % 3) for n in range(48)]
                changes += [live(f"cold.{n % 5}", b"[%d]" % n, at + n % 3) for n in range(48)]
                if stores[0].resolver.by_stamp:
                    # What a merging resolver makes of deletes depends on the order.
                    changes += [dead("hot", at + n) for n in range(9)]
                parts = [rng.sample(changes, len(changes)) for _ in range(TASKS)]

                async def write(number: int, part: Sequence[SyncItem]) -> int:
                    applied = 0
                    for begin in range(0, len(part), 7):
                        store = stores[number % len(stores)]
                        batch = part[begin : begin + 7]
                        applied += (await apply(store, batch, Received(f"p{number}"))).applied
                    return applied

                counts = await asyncio.gather(*(write(n, part) for n, part in enumerate(parts)))
                model.apply(changes)
                for store in stores:
                    await model.check(store)
                assert await stores[0].live_items() in (None, model.live)
                assert sum(counts) <= len(changes), "no change is new twice"

        self.run(scenario)

    def test_what_is_read_meanwhile_is_whole(self) -> None:
        """If this fails a reader gets the content of one version with the stamp of another."""

        async def scenario(store: SyncEngine) -> None:
            at, rounds = now_ms(), 40

            async def write() -> None:
                for n in range(rounds):
                    await store.apply_many([live("k", b"%d" % n * (n * 40 + 1), at + n)])

            async def read() -> None:
                last = (0, 0)
                while last[0] < at + rounds - 1:
                    (item,) = await store.get_many(["k"])
                    if item is not None:
                        assert content_hash(item.content) == item.content_hash
                        seen = (item.updated_at, item.version)
                        assert seen >= last, "a version that was replaced has come back"
                        last = seen
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                group.create_task(read())
                group.create_task(read())

        self.with_store(scenario)

    def test_a_cancelled_call_leaves_the_store_whole(self) -> None:
        """If this fails a shutdown leaves half a batch behind its position, or a lock held."""

        async def scenario(store: SyncEngine) -> None:
            at = now_ms()
            for turns in range(TURNS_MAX):
                position = Position(StreamId(turns + 1, 0), turns)
                batch = [live(f"k{turns}.{n}", b"[%d]" % n, at) for n in range(5)]
                call = asyncio.create_task(store.apply_many(batch, Received("p", position)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                call.cancel()
                await asyncio.wait((call,))
                kept = await store.applied_position("p")
                held = await store.stamps([item.key for item in batch])
                if kept == position:
                    assert None not in held, "the position is there, and an item is not"
                result = await apply(store, batch, Received("p", position))
                assert set(result.outcomes) <= {Outcome.APPLIED, Outcome.SUPERSEDED}
                assert list(await store.get_many([item.key for item in batch])) == batch

        self.with_store(scenario)

    async def _several(self, stack: AsyncExitStack) -> list[SyncEngine]:
        """Open an empty store, several times where it may be shared."""
        place = self.new_place()
        times = 3 if self.shared else 1
        return [await stack.enter_async_context(self.opened(place)) for _ in range(times)]
