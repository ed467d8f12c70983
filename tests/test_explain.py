"""engine.explain(): which version is held where, which wins by which rule, and how it came."""

from __future__ import annotations

import pytest
from conftest import DEADLINE_SEC, Nodes, until
from test_repair import BY_HAND, a_at, put_of, tomb_of

from fsm_replication import InvalidKeyError, MemorySyncEngine, PeerState, RedisSyncEngine
from fsm_replication.config import Settings
from fsm_replication.items import Stamp
from fsm_replication.servers import RedisServer
from fsm_replication.workers.explain import rule_between

NOW = 1_700_000_000_000


async def test_a_key_is_explained(nodes: Nodes, redis_server: RedisServer) -> None:
    """If this fails nobody can tell why a node holds what it holds, and since when."""
    store = MemorySyncEngine(node_id="b")
    async with RedisSyncEngine(redis_server.url, node_id="a") as peer_store:
        await peer_store.put("copied", b"1")
        async with nodes.engine(
            a_at(redis_server), store=store, settings=Settings(cold_path=BY_HAND)
        ) as engine:
            await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
            await peer_store.put("streamed", b"1")
            await until(lambda: len(store) == 2)
            ways = {}
            for key in ("copied", "streamed"):
                made = await engine.explain(key)
                assert made.arrival is not None
                ways[key] = (made.arrival.peer_id, made.arrival.path)
                assert made.held is not None
                assert made.held.origin == "a"
                assert [peer.verdict for peer in made.peers] == ["the same"]
            assert ways == {"copied": ("a", "bootstrap"), "streamed": ("a", "stream")}
            await store.put("copied", b"2")
            made = await engine.explain("copied")
            assert made.arrival is None
            assert made.peers[0].verdict.startswith("ours wins: it is later by")
            assert "written at b" in str(made.held)
            nothing = await engine.explain("nowhere")
            assert (nothing.held, nothing.peers[0].held) == (None, None)
            assert nothing.peers[0].verdict == "absent on both sides"
            redis_server.stop()
            await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
            gone = (await engine.explain("copied")).peers[0]
            assert gone.held is None
            assert "could not tell" in str(gone)
            with pytest.raises(InvalidKeyError):
                await engine.explain("")


@pytest.mark.parametrize(
    ("ours", "theirs", "rule"),
    [
        (put_of("k", b"x", NOW + 5).stamp, put_of("k", b"y", NOW).stamp, "ours wins: it is later by 5 ms"),
        (put_of("k", b"x", NOW).stamp, put_of("k", b"x", NOW, 2).stamp, "higher version (2 over 1)"),
        (put_of("k", b"", NOW, 2).stamp, tomb_of("k", NOW).stamp, "theirs wins: same time and version"),
        (put_of("k", b"x", NOW).stamp, put_of("k", b"y", NOW).stamp, "larger hash"),
        (
            Stamp(NOW, 1, False, b"h" * 32, "json"),
            Stamp(NOW, 1, False, b"h" * 32, "binary"),
            "only the content type differs",
        ),
        (None, put_of("k", b"x", NOW).stamp, "theirs wins: nothing is held here"),
        (put_of("k", b"x", NOW).stamp, None, "absence deletes nothing"),
    ],
)  # fmt: skip
def test_the_rule_is_named(ours: Stamp | None, theirs: Stamp | None, rule: str) -> None:
    """If this fails a person is told the wrong reason."""
    assert rule in rule_between(ours, theirs)
