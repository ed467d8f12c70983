"""What ``engine.changes()`` tells: whatever replication applied, at least once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from conftest import Nodes, Peer, peer_config, until

from fsm_replication import (
    ApplyResult,
    MemorySyncEngine,
    PeerState,
    RedisSyncEngine,
    StoreError,
    SyncItem,
    WatcherLagged,
)
from fsm_replication.config import ColdPathConfig, HotPathConfig, Settings, TimeoutsConfig
from fsm_replication.ports import StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import Outcome, Received
from fsm_replication.workers.changes import DOUBTS_KEPT, ChangeFeed, Doubts

HASTY = Settings(timeouts=TimeoutsConfig(store_call=0.2))
COLD_ONLY = Settings(
    hot_path=HotPathConfig(enabled=False), cold_path=ColdPathConfig(interval_sec=3600)
)
WAIT_SEC = 10


class KeepsItsAnswer(MemorySyncEngine):
    """Applies all changes, and then once does as it is told instead of answering."""

    def __init__(self, instead: str) -> None:
        super().__init__(node_id="b")
        self._instead = instead
        self.kept_an_answer = False

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Apply, and answer from the second time on."""
        result = await super().apply_many(changes, received)
        if self.kept_an_answer or not changes:
            return result
        self.kept_an_answer = True
        if self._instead == "fails":
            raise StoreError("the answer was lost")
        if self._instead == "hangs":
            await asyncio.Event().wait()
        # One of them is said to have failed; the others were applied and are not told again.
        return ApplyResult([*result.outcomes[:-1], Outcome.FAILED], {len(changes) - 1: "why"}, 0)


async def told(changes: AsyncIterator[SyncItem], count: int) -> dict[str, SyncItem]:
    """Return the latest of each key, once so many keys were told."""
    found: dict[str, SyncItem] = {}
    async with asyncio.timeout(WAIT_SEC):
        while len(found) < count:
            item = await anext(changes)
            found[item.key] = item
    return found


@pytest.mark.parametrize("instead", ["fails", "hangs", "fails in part"])
async def test_a_change_whose_answer_was_lost_is_told(
    nodes: Nodes, peer: Peer, instead: str
) -> None:
    """If this fails a cache goes stale whenever a call of the store is slow or fails."""
    store = KeepsItsAnswer(instead)
    async with nodes.engine(peer_config(peer.server), store=store, settings=HASTY) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=WAIT_SEC)
        changes = engine.changes("user.")
        await engine.pause("a")
        sent = {f"user.{n}": peer.send(f"user.{n}", b"%d" % n) for n in range(30)}
        await engine.resume("a")
        assert await told(changes, 30) == sent
        assert store.kept_an_answer


async def test_what_a_copy_applied_without_an_answer_is_told(nodes: Nodes, peer: Peer) -> None:
    """If this fails a cache misses what came with a bootstrap."""
    sent = {f"k{n}": peer.send(f"k{n}", b"%d" % n) for n in range(30)}
    store = KeepsItsAnswer("fails")
    engine = nodes.engine(peer_config(peer.server), store=store)
    changes = engine.changes()
    async with engine:
        assert await told(changes, 30) == sent
        assert store.kept_an_answer
        assert PeerState.BOOTSTRAPPING in [move.dest for move in engine.journal]


async def test_what_a_repair_applied_without_an_answer_is_told_by_the_next(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a cache misses what a repair brought just before it failed."""
    store = KeepsItsAnswer("fails")
    async with nodes.engine(peer_config(redis_server), store=store, settings=COLD_ONLY) as engine:
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=WAIT_SEC)
        await peer_store.put_many({f"k{n}": b"%d" % n for n in range(30)})
        changes = engine.changes()
        assert (await engine.repair("a")).errors == 1
        assert len(store) == 30
        assert (await engine.repair("a")).errors == 0
        assert set(await told(changes, 30)) == {f"k{n}" for n in range(30)}


async def test_a_link_that_is_lost_leaves_its_doubts_to_the_next_connection(
    nodes: Nodes, new_redis_server: Callable[[], RedisServer]
) -> None:
    """If this fails a cache goes stale where line and store fail at once."""
    server = new_redis_server()
    peer = Peer(server)
    peer.write_marker()
    store = KeepsItsAnswer("hangs")
    async with nodes.engine(peer_config(server), store=store, settings=HASTY) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=WAIT_SEC)
        changes = engine.changes()
        item = peer.send("k", b"1")
        await until(lambda: store.kept_an_answer)
        peer.client.client_kill_filter(_type="normal", skipme=True)
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=WAIT_SEC)
        assert await told(changes, 1) == {"k": item}
    peer.close()


# Doubts -----------------------------------------------------------------------------------------


def test_doubts_are_due_when_their_place_is_settled() -> None:
    """If this fails a change is told before it is held, or never."""
    doubts = Doubts()
    assert not doubts
    doubts.add(["a", "b"], StreamId(5, 0))
    doubts.add(["b"], StreamId(7, 0))
    doubts.add(["c", "a"], None)
    assert doubts.take(StreamId(4, 9)) == ([], 0)
    assert doubts.take(StreamId(5, 0)) == (["a"], 0)
    assert doubts.take(StreamId(7, 0)) == (["b"], 0)
    assert doubts
    assert doubts.take(None) == (["c"], 0)
    assert not doubts


async def test_doubts_are_bounded_and_what_is_too_much_is_counted() -> None:
    """If this fails a store that keeps failing fills the memory."""
    doubts = Doubts()
    doubts.add([f"k{n}" for n in range(DOUBTS_KEPT + 3)], None)
    keys, lost = doubts.take(None)
    assert (len(keys), lost) == (DOUBTS_KEPT, 3)
    watcher = ChangeFeed().watch("")
    watcher.miss(lost)
    with pytest.raises(WatcherLagged) as raised:
        await anext(watcher)
    assert raised.value.missed == 3
