"""What broke an engine once, each kept as the shortest story that shows it."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from conftest import DEADLINE_SEC, Nodes, Peer, peer_config, until, until_async

from fsm_replication import (
    EngineState,
    InvalidStateError,
    MemorySyncEngine,
    PauseReason,
    PeerConfig,
    PeerState,
    RedisSyncEngine,
    SyncItem,
)
from fsm_replication.config import DeadLettersConfig, LimitsConfig, Settings, TimeoutsConfig
from fsm_replication.errors import PeerRefusedError
from fsm_replication.layout import Keys
from fsm_replication.reports import LinkFact
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.stream import encode_fields
from fsm_replication.transport import RedisTransport


async def tailing(engine: object) -> None:
    """Wait until the link to node a tails."""
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)  # type: ignore[attr-defined]


async def test_meta_nested_too_deep_is_a_dead_letter(nodes: Nodes, peer: Peer) -> None:
    """If this fails one small entry ends the engine, and again after every restart."""
    # How deep is too deep differs between versions of Python: since 3.14 it is what the stack
    # holds, a quarter of a million levels that are only skipped in the usual 8 MB.
    deep = b"[" * 1_000_000 + b"]" * 1_000_000
    meta = b'{"content_type":"json","version":1,"updated_at":1,"x":' + deep + b"}"
    fields = [b"op", b"PUT", b"key", b"k", b"hash", b"0" * 64, b"data", b"x", b"meta", meta]
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send_fields(fields)
        peer.send_fields([b"op", b"DEL", b"key", b"k", b"meta", meta])
        peer.send("good", b"1")
        link = engine._links["a"].context.progress
        await until(lambda: link.dead_letters == 1 and len(store) == 1)
        (letter,) = await engine.dead_letters.list()
        assert (letter.key, letter.count) == ("k", 2)


async def test_large_entries_at_both_ends_of_a_stream(nodes: Nodes, peer: Peer) -> None:
    """If this fails the stream's counts, which carry both, are asked for without end."""
    settings = Settings(limits=LimitsConfig(payload_bytes=300_000, batch_bytes=400_000))
    store = MemorySyncEngine()
    rng = random.Random(1)
    async with nodes.engine(peer_config(peer.server), store=store, settings=settings) as engine:
        await tailing(engine)
        before = peer.client.info("stats")["total_connections_received"]
        for number in range(30):
            peer.send(f"k{number}", rng.randbytes(110_000))
        await until(lambda: len(store) == 30)
        await until(lambda: engine.health_check().peers[0].lag_events == 0, "no lag")
        peer.send("small", b"1")
        await until(lambda: len(store) == 31)
        after = peer.client.info("stats")["total_connections_received"]
        assert after - before < 150


async def test_no_dead_letter_is_dropped_where_full_means_pause(nodes: Nodes, peer: Peer) -> None:
    """If this fails raw entries are lost between the limit and the pause (G1)."""
    settings = Settings(limits=LimitsConfig(dead_letters=5))
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await engine.wait_synced(DEADLINE_SEC)
        # At once, so that one read sees all of them.
        with peer.client.pipeline(transaction=True) as together:
            for number in range(20):
                together.xadd(Keys().stream, {"op": "X", "key": f"k{number}"})
            together.execute()

        async def all_kept() -> bool:
            return len(await engine.dead_letters.list()) == 20

        await until_async(all_kept)
        peer.send_fields([b"op", b"X", b"key", b"one more"])
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
        assert len(await engine.dead_letters.list()) == 20


async def test_dropped_dead_letters_are_counted(nodes: Nodes, peer: Peer) -> None:
    """If this fails letters go without a trace where full means drop."""
    settings = Settings(
        limits=LimitsConfig(dead_letters=5), dead_letters=DeadLettersConfig(when_full="drop_oldest")
    )
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await engine.wait_synced(DEADLINE_SEC)
        for number in range(20):
            peer.send_fields([b"op", b"X", b"key", b"k%d" % number])
        counted = engine.metrics.get("dead_letters", "a", "dropped")
        await until(lambda: counted._value.get() == 15)
        assert [one.key for one in await engine.dead_letters.list()] == [
            f"k{number}" for number in range(15, 20)
        ]


@pytest.mark.parametrize("came_back", ["empty", "older"])
async def test_the_local_redis_restarts_under_a_running_engine(
    nodes: Nodes, redis_servers: Callable[[], RedisServer], peer: Peer, came_back: str
) -> None:
    """If this fails what the local Redis lost is never read again."""
    mine = Peer(redis_servers(), "b")
    async with (
        RedisSyncEngine(mine.server.url, node_id="b") as store,
        nodes.engine(peer_config(peer.server), store=store) as engine,
    ):
        await tailing(engine)
        peer.send("first", b"1")
        await until(lambda: mine.client.exists("item:first"))
        positions = mine.client.hgetall(Keys().positions)
        for number in range(20):
            peer.send(f"lost.{number}", b"1")
        await until(lambda: mine.client.exists("item:lost.19"))
        if came_back == "empty":
            mine.client.flushall()
        else:
            mine.client.delete(*[f"item:lost.{number}" for number in range(20)])
            mine.client.hset(Keys().positions, mapping=positions)  # type: ignore[arg-type]
        mine.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        peer.send("after", b"1")
        await until(lambda: mine.client.exists("item:lost.19"), "what was lost")
        await until(lambda: mine.client.exists("item:after", "item:lost.0", "item:first") == 3)
        assert mine.client.exists(Keys().marker)
    mine.close()


async def test_a_reason_that_was_cleared_before_it_was_named_ends(nodes: Nodes, peer: Peer) -> None:
    """If this fails a link stays Paused for ever for a circuit that is closed."""
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        tailer = engine._links["a"]._tailer
        assert tailer is not None
        assert tailer._orders is not None
        tailer._orders.report(LinkFact.BLOCKED, "circuit open", PauseReason.CIRCUIT)
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
        await tailing(engine)
        assert engine.health_check().peers[0].pause_reasons == frozenset()


async def test_a_resume_beside_still_paused_is_not_undone(nodes: Nodes, peer: Peer) -> None:
    """If this fails an operator's resume() is forgotten when it comes at the wrong moment."""
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        link = engine._links["a"]
        post = link.driver.post

        def resumed_at_once(report: object) -> None:
            post(report)  # type: ignore[arg-type]
            if link.state is PeerState.RESUMING:
                link.resume()

        link.driver.post = resumed_at_once  # type: ignore[method-assign]
        link._hold_reasons(frozenset({PauseReason.OPERATOR}))
        link.driver.request("reconfigured", why="for the test")
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
        await tailing(engine)


async def test_a_call_cancelled_inside_the_store_is_a_failed_call(nodes: Nodes, peer: Peer) -> None:
    """If this fails a link shows Tailing and has no worker any more."""

    class Cancelling(MemorySyncEngine):
        armed = False

        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            if self.armed and changes:
                self.armed = False
                inside: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                inside.cancel()
                await inside
            return await super().apply_many(changes, received)

    store = Cancelling()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        store.armed = True
        peer.send("x", b"1")
        await until(lambda: len(store) == 1)
        # And a worker that somebody else cancels is missed.
        (task,) = [t for t in asyncio.all_tasks() if t.get_name() == "link:a:tailer"]
        task.cancel()
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
        await tailing(engine)


async def test_a_peer_that_may_not_be_read_is_not_copied_as_empty(nodes: Nodes, peer: Peer) -> None:
    """If this fails "could not tell" is taken for "absent", and a copy of nothing is complete."""
    for number in range(50):
        peer.send(f"k{number}", b"1")
    peer.client.xtrim(Keys().stream, 0)
    rules = ["~cdc", "~fsm:*", "+@read", "+@connection", "+multi", "+exec", "+scan"]
    peer.client.execute_command("ACL", "SETUSER", "reader", "reset", "on", ">pw", *rules)
    store = MemorySyncEngine()
    config = PeerConfig(node_id="a", redis_url=f"redis://reader:pw@127.0.0.1:{peer.server.port}")
    async with nodes.engine(config, store=store) as engine:
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
        assert not engine.health_check().synced
        assert "NOPERM" in engine.health_check().peers[0].last_error
        peer.client.execute_command("ACL", "SETUSER", "reader", "~*")
        await tailing(engine)
        assert len(store) == 50
    peer.client.execute_command("ACL", "DELUSER", "reader")


async def test_an_item_from_the_far_future_is_not_copied(nodes: Nodes, peer: Peer) -> None:
    """If this fails one wrong clock wins against every later write for a year."""
    store = MemorySyncEngine()
    peer.send("future", b"1", at_ms=int(time.time() * 1000) + 400 * 86_400_000)
    peer.send("good", b"1")
    peer.client.xtrim(Keys().stream, 0)
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        assert await store.get("future") is None
        assert await store.get("good") is not None


async def test_an_entry_of_many_fields_does_not_stop_a_reconnect(nodes: Nodes, peer: Peer) -> None:
    """If this fails a link that met one wide entry never comes back."""
    store = MemorySyncEngine()
    fields = encode_fields(peer.item("wide", b"1"))
    for number in range(6000):
        fields += [b"x%d" % number, b"1"]
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send_fields(fields)
        await until(lambda: len(store) == 1)
        peer.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
        await tailing(engine)
        peer.send("more", b"1")
        await until(lambda: len(store) == 2)


async def test_a_slow_line_catches_up(nodes: Nodes, peer: Peer) -> None:
    """If this fails a reply that takes longer than the timeout is asked for again and again."""
    rate = 1_500_000

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: int) -> None:
        try:
            while data := await reader.read(20_000):
                await asyncio.sleep(len(data) / rate)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", peer.server.port)
        try:
            await asyncio.gather(pump(reader, back, 10**9), pump(there, writer, rate))
        except (ConnectionError, asyncio.CancelledError):
            writer.close()
            back.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = MemorySyncEngine()
    settings = Settings(timeouts=TimeoutsConfig(command=0.5))
    config = PeerConfig(node_id="a", redis_url=f"redis://127.0.0.1:{port}")
    async with nodes.engine(config, store=store, settings=settings) as engine:
        await tailing(engine)
        await engine.pause("a")
        body = random.Random(1).randbytes(4000)
        for number in range(800):
            peer.send(f"k{number}", body + b"%d" % number)
        await engine.resume("a")
        await until(lambda: len(store) == 800)
        assert PeerState.BACKOFF not in [move.dest for move in engine.journal]
    server.close()
    await until(lambda: len(asyncio.all_tasks()) == 1, "the lines to close")


async def test_a_slow_disk_does_not_hold_up_the_drain(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails shutdown() outlives its drain timeout (G9)."""
    monkeypatch.setattr("fsm_replication.cursor.file._checkpoint", lambda _db: time.sleep(2))
    threads = threading.active_count()
    engine = nodes.engine(settings=Settings(timeouts=TimeoutsConfig(drain=0.5)))
    await engine.start()
    began = time.monotonic()
    await engine.shutdown()
    assert time.monotonic() - began < 1.5
    assert engine.state is EngineState.FAILED
    assert "cursor store" in str(engine.error)
    assert len(asyncio.all_tasks()) == 1
    await until(lambda: threading.active_count() == threads, "the disk to answer")


async def test_a_drain_that_left_nothing_ends_in_stopped(nodes: Nodes, peer: Peer) -> None:
    """If this fails every deploy during a slow store call looks like a failure."""
    called = asyncio.Event()

    class Hanging(MemorySyncEngine):
        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            if changes:
                called.set()
                await asyncio.sleep(100)
            return await super().apply_many(changes, received)

    settings = Settings(timeouts=TimeoutsConfig(drain=1.5, store_call=30))
    engine = nodes.engine(peer_config(peer.server), store=Hanging(), settings=settings)
    await engine.start()
    await tailing(engine)
    peer.send("x", b"1")
    await asyncio.wait_for(called.wait(), 20)
    await engine.shutdown()
    assert (engine.state, engine.error) == (EngineState.STOPPED, None)


async def test_abandoned_watchers_are_forgotten(nodes: Nodes) -> None:
    """If this fails each loop that is broken off costs memory as long as the engine lives."""
    engine = nodes.engine()
    for _ in range(100):
        async for _record in engine.watch_state():
            break
    await engine.start()
    for _ in range(100):
        with pytest.raises(InvalidStateError):
            await engine.start()
    gc.collect()
    engine.watch_state()
    assert len(engine._journal._listeners) < 5


async def test_no_part_of_a_password_is_in_an_error() -> None:
    """If this fails a URL that cannot be parsed shows what stands in it."""
    with pytest.raises(PeerRefusedError) as caught:
        await RedisTransport().connect("redis://:pa/ss@h", timeout_sec=1, name="x")
    assert "pa" not in str(caught.value).replace("Redis", "").split("cannot")[1]
