"""Which content a store has, and up to where it has taken over each peer's stream."""

from __future__ import annotations

import pytest

from fsm_replication.ports import Position, StreamId
from fsm_replication.stores.protocol import Received, SyncEngine
from fsm_replication.testing.contract.base import StoreRules, live, now_ms

__all__ = ("PositionRules",)


class PositionRules(StoreRules):
    """Rules of ``incarnation`` and ``applied_position`` (G2)."""

    def test_the_incarnation_is_that_of_one_content(self) -> None:
        """If this fails cursors are thrown away, or kept for a store that came back empty."""

        async def scenario() -> None:
            place = self.new_place()
            async with self.opened(place) as store:
                name = await store.incarnation()
                assert name
                await store.submit(live("k"))
                assert await store.incarnation() == name
            async with self.opened(self.new_place()) as other:
                assert await other.incarnation() != name, "another store is another incarnation"
            if self.durable:
                async with self.opened(place) as again:
                    assert await again.incarnation() == name
                    assert await again.get("k") is not None

        self.run(scenario)

    def test_a_position_is_kept_with_its_batch(self) -> None:
        """If this fails a restart reads from a place that this store never settled."""

        async def scenario(store: SyncEngine) -> None:
            assert await store.applied_position("a") is None
            at, first = now_ms(), Position(StreamId(5, 1), 7)
            await store.apply_many([live("k", b"[1]", at)], Received("a", first))
            if await store.applied_position("a") is None:
                assert not self.durable, "a durable store keeps the position with the batch"
                assert not store.keeps_positions
                pytest.skip("the store keeps no positions")
            assert store.keeps_positions, "or a store that lost its last second is not read again"
            positions = [
                Position(StreamId(2**63, 2**63), None),
                Position(StreamId(6, 0), 0),
                # Of a stream that was made anew: what came last counts, not what is larger.
                Position(StreamId(1, 0), 1),
            ]
            for position in positions:
                await store.apply_many([live("k", b"[1]", at)], Received("a", position))
                assert await store.applied_position("a") == position, "also if nothing was newer"
            empty = Position(StreamId(9, 9), 9)
            await store.apply_many([], Received("a", empty))
            assert await store.applied_position("a") == empty, "also if there was nothing at all"
            await store.apply_many([live("other")], Received("a"))
            await store.apply_many([live("more")])
            assert await store.applied_position("a") == empty, "no position is no news"

        self.with_store(scenario)

    def test_every_peer_has_a_position_of_its_own(self) -> None:
        """If this fails one peer's stream is read from where another's has come to."""
        at = {peer: Position(StreamId(n, n), n) for n, peer in enumerate(("a", "b", "é 日:本"), 1)}

        async def scenario() -> None:
            place = self.new_place()
            async with self.opened(place) as store:
                for peer, position in at.items():
                    await store.apply_many([live(f"of.{peer}")], Received(peer, position))
                if await store.applied_position("a") is None:
                    pytest.skip("the store keeps no positions")
                for peer, position in at.items():
                    assert await store.applied_position(peer) == position
                assert await store.applied_position("c") is None
            if self.durable:
                async with self.opened(place) as again:
                    for peer, position in at.items():
                        assert await again.applied_position(peer) == position

        self.run(scenario)
