"""From a peer's stream to the local store, on real Redis servers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis
import zstandard
from conftest import Nodes, Peer, all_parts, counts_entries, digest, held, peer_config, until
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.abilities import Abilities
from fsm_replication.batch import BatchBuilder
from fsm_replication.config import (
    ColdPathConfig,
    DeadLettersConfig,
    HotPathConfig,
    LimitsConfig,
    Settings,
    StartupConfig,
)
from fsm_replication.current import Current
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.items import DAY_MS, SyncItem, content_hash
from fsm_replication.layout import Keys
from fsm_replication.limiter import PrioritySlot
from fsm_replication.ports import Position, StreamId, SystemClock
from fsm_replication.reports import PauseReason
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received
from fsm_replication.stream import encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.workers.history import StreamInfo, check_history, find_gap, parse_info
from fsm_replication.workers.reader import Read, StreamReader

PUT = {"content_type": "json", "version": 1, "updated_at": 1}


def meta(**changes: object) -> bytes:
    """Return the meta of a put with some fields changed."""
    now = {"updated_at": int(time.time() * 1000)}
    return json.dumps(PUT | now | changes).encode()


def put(key: bytes = b"k", content: bytes = b"{}", **fields: bytes) -> list[bytes]:
    """Return the fields of a put, some of them changed."""
    named = {"op": b"PUT", "key": key, "hash": digest(content), "data": content, "meta": meta()}
    named |= fields
    return [part for name, value in named.items() for part in (name.encode(), value)]


def without(fields: list[bytes], name: bytes) -> list[bytes]:
    """Return fields without one of them."""
    at = fields.index(name)
    return fields[:at] + fields[at + 2 :]


BOMB = zstandard.ZstdCompressor().compress(b"\0" * 40_000_000)
BAD: dict[str, tuple[str, list[bytes]]] = {
    "unknown op": ("op", put(op=b"RENAME")),
    "no op": ("field", without(put(), b"op")),
    "no key": ("field", without(put(), b"key")),
    "no data": ("field", without(put(), b"data")),
    "no meta": ("field", without(put(), b"meta")),
    "key not UTF-8": ("text", put(b"\xff\xfe")),
    "wrong hash": ("hash", put(hash=digest(b"other"))),
    "hash not hex": ("hash", put(hash=b"zz" * 32)),
    "does not decompress": ("data", put(data=b"\x28\xb5\x2f\xfdgarbage")),
    "grows over the limit": ("size", put(data=BOMB)),
    "meta not JSON": ("meta", put(meta=b"{")),
    "meta of another kind": ("meta", put(meta=b"[1]")),
    "unknown content type": ("meta", put(meta=meta(content_type="x"))),
    "empty key": ("key", put(b"")),
    "key too long": ("key", put(b"k" * 1025)),
    "version negative": ("range", put(meta=meta(version=-1))),
    "version too large": ("range", put(meta=meta(version=2**53))),
    "time too large": ("range", put(meta=meta(updated_at=2**53))),
    "more than a day ahead": (
        "future",
        put(meta=meta(updated_at=int(time.time() * 1000) + 2 * DAY_MS)),
    ),
}


async def tailing(engine: ReplicationEngine) -> None:
    """Wait until the link is at the head."""
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=10)


async def caught_up(engine: ReplicationEngine, peer: Peer) -> None:
    """Wait until everything in the peer's stream is settled."""
    added = peer.client.xinfo_stream(Keys().stream)["last-generated-id"]
    last = StreamId.parse(added)
    link = engine._links["a"].context.progress

    def settled() -> bool:
        return link.settled is not None and link.settled.stream_id >= last

    await until(settled, f"everything up to {last} settled")


async def test_bad_entries_become_dead_letters_and_good_ones_are_applied(
    nodes: Nodes, peer: Peer
) -> None:
    """If this fails one bad entry stops a stream, or is lost without a trace."""
    # Each has a key of its own, for letters of one key and reason are one.
    sent = [
        [b"k%d" % number if part == b"k" else part for part in fields]
        for number, (_, fields) in enumerate(BAD.values())
    ]
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        ids = {}
        for number, name in enumerate(BAD):
            peer.send(f"good.{number}", name.encode())
            ids[peer.send_fields(sent[number])] = name
        peer.send("last", b"1")
        await caught_up(engine, peer)
        letters = await engine.dead_letters.list()
        assert {ids[x.stream_id]: x.reason for x in letters} == {
            name: reason for name, (reason, _) in BAD.items()
        }
        assert [x.fields for x in letters] == list(map(tuple, sent))
        good = [f"good.{number}" for number in range(len(BAD))]
        assert (await held(engine.sync_engine, *good)) == {
            key: name.encode() for key, name in zip(good, BAD, strict=True)
        }
        assert engine.health_check().peers[0].dead_letters == len(BAD)


async def test_what_readers_must_accept_is_accepted(nodes: Nodes, peer: Peer) -> None:
    """If this fails an entry that is allowed becomes a dead letter."""
    magic = b"\x28\xb5\x2f\xfd is how this text begins"
    accepted = {
        "extra": [*put(b"extra"), b"more", b"1"],
        "lower": put(b"lower", op=b"put"),
        "nohash": without(put(b"nohash"), b"hash"),
        "magic": put(b"magic", magic),
        "trace": put(b"trace", meta=meta(trace_parent="00-1-2-03")),
        "shuffled": [b"meta", meta(), b"data", b"{}", b"key", b"shuffled", b"op", b"PUT"],
        "soon": put(b"soon", meta=meta(updated_at=int(time.time() * 1000) + 3_600_000)),
    }
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        for fields in accepted.values():
            peer.send_fields(fields)
        await caught_up(engine, peer)
        contents = await held(engine.sync_engine, *accepted)
        assert contents == {key: magic if key == "magic" else b"{}" for key in accepted}
        assert not await engine.dead_letters.list()
        assert engine._links["a"].context.progress.clock_ahead == 1


async def test_a_bad_entry_does_not_take_older_ones_of_its_key_with_it(
    nodes: Nodes, peer: Peer
) -> None:
    """If this fails a good event is dropped because a broken one was newer."""
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        pipe = peer.client.pipeline()
        at = int(time.time() * 1000)
        for number, content in enumerate((b"old", b"good", b"bad")):
            fields = put(b"x", content, meta=meta(updated_at=at + number))
            if content == b"bad":
                fields[fields.index(b"hash") + 1] = digest(b"other")
            pipe.execute_command("XADD", Keys().stream, "*", *fields)
        pipe.execute()
        await caught_up(engine, peer)
        assert await held(engine.sync_engine, "x") == {"x": b"good"}
        assert [letter.reason for letter in await engine.dead_letters.list()] == ["hash"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(1, 4), st.integers(1, 3), st.sampled_from("xyz!")
        ),
        min_size=1,
        max_size=12,
    )
)
def test_latest_wins_within_a_batch(events: list[tuple[str, int, int, str]]) -> None:
    """If this fails coalescing a batch chooses another winner than applying one by one would."""
    now = 1_800_000_000_000
    entries: list[tuple[bytes, list[bytes]]] = []
    best: dict[str, SyncItem] = {}
    for number, (key, at, version, text) in enumerate(events):
        body = text.encode()
        item = SyncItem(key, body, "binary", content_hash(body), version, now + at, False, "a")
        fields = encode_fields(item)
        if text == "!":  # Its hash is wrong, so it must not win, nor take others with it.
            fields[fields.index(b"hash") + 1] = digest(b"other")
        elif key not in best or item.stamp > best[key].stamp:
            best[key] = item
        entries.append((f"{number + 1}-0".encode(), fields))
    builder = BatchBuilder("p", payload_bytes=1000, part_bytes=1000, now_ms=lambda: now)
    selection = builder.select(entries)
    made = [item for part in all_parts(builder, selection) for item in part.items]
    assert {item.key: item.stamp for item in made} == {k: i.stamp for k, i in best.items()}
    assert {letter.reason for letter in selection.letters} <= {"hash"}


async def test_a_new_node_copies_what_is_no_longer_in_the_stream(nodes: Nodes, peer: Peer) -> None:
    """If this fails a new node never learns of what was written before the stream's memory."""
    sent = {f"k{n}": peer.send(f"k{n}", b"v" * n).content for n in range(700)}
    peer.send("gone", None)
    peer.client.xtrim(Keys().stream, maxlen=3, approximate=False)
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        assert await held(engine.sync_engine, *sent) == sent
        states = [record.dest for record in engine.journal if record.machine == "link:a"]
        assert PeerState.BOOTSTRAPPING in states
        await until(lambda: engine.health_check().peers[0].lag_events == 0)


@pytest.mark.parametrize("removed", ["trim", "delete", "recreate"])
async def test_a_gap_is_found_at_connect_and_healed(nodes: Nodes, peer: Peer, removed: str) -> None:
    """If this fails entries that were trimmed while a node was away are skipped silently."""
    store = MemorySyncEngine()
    peer.send("before", b"1")
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
    for number in range(30):
        peer.send(f"missed.{number}", b"2")
    if removed == "trim":
        peer.client.xtrim(Keys().stream, maxlen=10, approximate=False)
    else:
        peer.client.delete(Keys().stream)
    if removed == "recreate":
        peer.send("new", b"3")
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        assert (await held(store, "missed.0", "missed.29")) == {
            "missed.0": b"2",
            "missed.29": b"2",
        }
        (gap,) = await engine.ledger()
        assert gap.missed == (20 if removed == "trim" and peer.counts else None)
        # This peer has no tree, so nothing tells which deletes the gap held.
        assert gap.healed_by == ""
        assert gap.healed_at_ms is None
        assert engine.health_check().peers[0].gaps_open == 1


async def test_what_is_behind_but_not_trimmed_needs_no_copy(nodes: Nodes, peer: Peer) -> None:
    """If this fails every reconnect copies everything."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send("first", b"0")
        await caught_up(engine, peer)
    for number in range(300):
        peer.send(f"k{number}", b"1")
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await caught_up(engine, peer)
        assert len(store) == 301
        states = [record.dest for record in engine.journal if record.machine == "link:a"]
        assert PeerState.BOOTSTRAPPING not in states


async def test_a_link_close_to_the_head_tails_at_once(nodes: Nodes, peer: Peer) -> None:
    """If this fails each reconnect looks like an outage."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send("first", b"0")
        await caught_up(engine, peer)
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        moves = [record.trigger for record in engine.journal if record.machine == "link:a"]
        assert moves == ["connect", "connected", "tail"]


async def test_a_stream_too_short_for_a_copy_is_read_from_its_oldest_entry(
    nodes: Nodes, redis_server: RedisServer, peer_store: RedisSyncEngine
) -> None:
    """If this fails a peer that writes faster than it is copied is copied for ever."""
    client = redis.Redis(port=redis_server.port)

    class Busy(MemorySyncEngine):
        """A store whose peer writes and trims while the first items are copied to it."""

        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            if changes and not len(self):
                await peer_store.put_many({f"more{n}": b"x" for n in range(20)})
                await asyncio.to_thread(client.xtrim, Keys().stream, 1, approximate=False)
            return await super().apply_many(changes, received)

    store = Busy()
    await peer_store.put_many({f"k{n}": b"x" for n in range(20)})
    settings = Settings(cold_path=ColdPathConfig(interval_sec=3600))
    async with nodes.engine(peer_config(redis_server), store=store, settings=settings) as engine:
        counts = counts_entries(redis_server)
        link = engine._links["a"].context.progress
        await until(lambda: link.stream_too_short if counts else len(store) == 40)
        await until(lambda: link.gaps_open == int(counts))
        await tailing(engine)
        moves = [record.trigger for record in engine.journal if record.machine == "link:a"]
        health = engine.health_check().peers[0]
        (gap,) = await engine.ledger()
        if counts:
            assert moves == ["connect", "connected", "bootstrap", "tail"]
            assert (health.stream_too_short, health.gaps_open) == (True, 1)
            assert (gap.missed, gap.healed_at_ms) == (19, None)
        else:
            # Perhaps nothing was missing: that is worth one copy more, which heals it.
            assert moves == ["connect", "connected", *["bootstrap", "tail"] * 2]
            assert (health.stream_too_short, health.gaps_open) == (False, 0)
        await engine.repair()
        health = engine.health_check().peers[0]
        assert (health.stream_too_short, health.gaps_open) == (False, 0)
        assert (await engine.ledger())[0].healed_at_ms is not None
        assert len(store) == 40
    client.close()


async def test_a_long_way_behind_is_caught_up_in_bulk(nodes: Nodes, peer: Peer) -> None:
    """If this fails a node that was away for long reads entry by entry."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send("first", b"0")
        await caught_up(engine, peer)
    pipe = peer.client.pipeline(transaction=False)
    for number in range(12_000):
        fields = encode_fields(peer.item(f"k{number % 3000}", b"x%d" % number))
        pipe.execute_command("XADD", Keys().stream, "*", *fields)
    pipe.execute()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        if peer.counts:
            await engine.wait_for_state(PeerState.CATCHING_UP, peer_id="a", timeout=10)
        await caught_up(engine, peer)
        await until(lambda: engine.health_check().peers[0].lag_events == 0)
        assert len(store) == 3001
        assert (await held(store, "k2999")) == {"k2999": b"x11999"}


def info(length: int, added: int | None, first: int | None, last: int) -> StreamInfo:
    """Return a stream's counts, with ids of milliseconds alone."""
    first_id = None if first is None else StreamId(first, 0)
    return StreamInfo(length, StreamId(last, 0), first_id, added)


def test_an_error_is_no_empty_stream() -> None:
    """If this fails a peer that is loading its data is taken for one that has lost it."""
    assert parse_info(PeerReplyError("ERR no such key", peer="a")).length == 0
    for text in ("LOADING Redis is loading the dataset in memory", "NOPERM no", "ERR unknown"):
        with pytest.raises(PeerReplyError):
            parse_info(PeerReplyError(text, peer="a"))


@pytest.mark.parametrize(
    ("at", "read", "there", "stream", "gap"),
    [
        (5, 5, True, info(10, 10, 1, 10), False),
        (5, 5, False, info(5, 10, 6, 10), False),  # trimmed exactly up to what was read
        (5, 5, False, info(4, 10, 7, 10), True),
        (0, 0, False, info(10, 10, 1, 10), False),
        (0, 0, False, info(9, 10, 2, 10), True),
        (5, 5, False, info(0, 5, None, 5), False),  # trimmed to nothing, nothing new
        (5, 5, False, info(0, 8, None, 8), True),
        (5, 5, False, info(0, 0, None, 0), True),  # the stream key is gone
        (0, 0, False, info(0, 0, None, 0), False),
        (5, 5, False, info(3, 3, 1, 9), True),  # created anew, ids beyond ours
        (5, 5, False, info(2, 2, 8, 9), True),
        (5, None, False, info(5, None, 6, 10), True),  # Redis 6.2 does not count
        (5, None, True, info(9, None, 2, 10), False),
        (10, None, False, info(0, None, None, 10), False),
        (5, None, False, info(0, None, None, 6), True),
        (5, None, False, info(4, None, 2, 10), True),  # not where it was: another stream
        (10, None, False, info(4, None, 2, 10), False),  # the last entry was deleted
        (10, 10, False, info(4, 10, 2, 10), False),
    ],
)
def test_whether_a_position_is_in_the_streams_history(
    at: int, read: int | None, there: bool, stream: StreamInfo, gap: bool
) -> None:
    """If this fails a gap goes unnoticed, or a node copies everything for nothing."""
    position = Position(StreamId(at, 0), read)
    assert (check_history(position, stream, entry_is_there=there) is not None) == gap


async def test_it_works_on_every_server_of_this_machine(
    nodes: Nodes, any_redis_server: RedisServer
) -> None:
    """If this fails a version of Redis that is supported is not."""
    peer = Peer(any_redis_server)
    peer.write_marker()
    for number in range(50):
        peer.send(f"k{number}", b"1")
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(any_redis_server), store=store) as engine:
        await tailing(engine)
        peer.send("new", b"2")
        await until(lambda: len(store) == 51)
    peer.send("later", b"3")
    peer.client.xtrim(Keys().stream, maxlen=1, approximate=False)
    async with nodes.engine(peer_config(any_redis_server), store=store) as engine:
        await until(lambda: len(store) == 52)
        await tailing(engine)
    peer.close()


async def test_backpressure_holds_the_batch_and_goes_on(nodes: Nodes, peer: Peer) -> None:
    """If this fails a store that takes no writes loses what was read meanwhile."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        store.accepting_writes = False
        for number in range(500):
            peer.send(f"k{number}", b"1")
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=5)
        health = engine.health_check()
        assert health.peers[0].pause_reasons == {PauseReason.BACKPRESSURE}
        assert not health.healthy
        assert len(store) == 0
        store.accepting_writes = True
        await until(lambda: len(store) == 500)
        await tailing(engine)


class FlakyStore(MemorySyncEngine):
    """Fails as often as told."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Fail, or apply."""
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the store is broken")
        return await super().apply_many(changes, received)


async def test_a_store_that_fails_now_and_then_loses_nothing(nodes: Nodes, peer: Peer) -> None:
    """If this fails a batch is dropped because one call failed."""
    store = FlakyStore()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        store.failures = 2
        peer.send("x", b"1")
        await until(lambda: len(store) == 1)
        assert engine.circuit.writes.failure_count == 0


async def test_an_open_circuit_pauses_the_link(nodes: Nodes, peer: Peer) -> None:
    """If this fails a broken store is called for ever, or never again."""
    store = FlakyStore()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        engine.circuit.writes.reset_sec = 0.3
        store.failures = 3
        peer.send("x", b"1")
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=5)
        assert engine.health_check().peers[0].pause_reasons == {PauseReason.CIRCUIT}
        assert len(store) == 0
        await until(lambda: len(store) == 1)
        for number in range(3):
            peer.send(f"y{number}", b"1")
            await until(lambda number=number: len(store) == 2 + number)  # type: ignore[misc]
        assert str(engine.circuit.writes.state) == "Closed"


class RefusingStore(MemorySyncEngine):
    """Never takes keys that start with "no"."""

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Refuse some, apply the others."""
        result = await super().apply_many(
            [change for change in changes if not change.key.startswith("no")], received
        )
        taken = iter(result.outcomes)
        outcomes = [
            Outcome.REFUSED if change.key.startswith("no") else next(taken) for change in changes
        ]
        reasons = {i: "I will not" for i, o in enumerate(outcomes) if o is Outcome.REFUSED}
        return ApplyResult(outcomes, reasons)


async def test_what_the_store_refuses_becomes_a_dead_letter(nodes: Nodes, peer: Peer) -> None:
    """If this fails an item that a store will never take is tried for ever, or lost."""
    store = RefusingStore()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send("yes", b"1")
        peer.send("no", b"2")
        peer.send("yes.too", b"3")
        await caught_up(engine, peer)
        (letter,) = await engine.dead_letters.list()
        assert (letter.key, letter.reason, letter.detail) == ("no", "refused", "I will not")
        assert len(store) == 2


async def test_full_dead_letters_pause_the_link(nodes: Nodes, peer: Peer) -> None:
    """If this fails dead letters grow without bound, or are dropped without being asked."""
    settings = Settings(limits=LimitsConfig(dead_letters=2))
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await tailing(engine)
        for number in range(2):
            peer.send_fields(put(b"k%d" % number, op=b"X"))
            await caught_up(engine, peer)
        peer.send_fields(put(op=b"X"))
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=5)
        assert engine.health_check().peers[0].pause_reasons == {PauseReason.DEAD_LETTERS_FULL}
        letters = await engine.dead_letters.list()
        assert len(letters) == 2
        await engine.dead_letters.purge(ids=[letter.id for letter in letters])
        await caught_up(engine, peer)
        assert len(await engine.dead_letters.list()) == 1


async def test_full_dead_letters_may_drop_the_oldest(nodes: Nodes, peer: Peer) -> None:
    """If this fails dead_letters.when_full: drop_oldest has no effect."""
    settings = Settings(
        limits=LimitsConfig(dead_letters=2),
        dead_letters=DeadLettersConfig(when_full="drop_oldest"),
    )
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await tailing(engine)
        ids = [peer.send_fields(put(b"k%d" % number, op=b"X")) for number in range(5)]
        await caught_up(engine, peer)
        assert [letter.stream_id for letter in await engine.dead_letters.list()] == ids[-2:]


async def test_entries_of_any_size_are_read_within_bounds(nodes: Nodes, peer: Peer) -> None:
    """If this fails large entries stop a link, or one that is too large is not passed over."""
    settings = Settings(limits=LimitsConfig(payload_bytes=300_000, batch_bytes=400_000))
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store, settings=settings) as engine:
        await tailing(engine)
        rng = random.Random(1)  # Contents that do not compress.
        sent = {}
        for number in range(12):
            sent[f"k{number}"] = rng.randbytes(150_000)
            peer.send(f"k{number}", sent[f"k{number}"])
        huge = peer.send_fields(put(b"huge", rng.randbytes(900_000)))
        sent["single"] = rng.randbytes(290_000)
        peer.send("single", sent["single"])
        sent["after"] = b"1"
        peer.send("after", b"1")
        await caught_up(engine, peer)
        assert await held(store, *sent) == sent
        (letter,) = await engine.dead_letters.list()
        assert (letter.stream_id, letter.reason, letter.fields) == (huge, "size", None)
        assert letter.size >= 900_000


async def test_a_lost_connection_is_found_again_and_nothing_is_lost(
    nodes: Nodes, peer: Peer
) -> None:
    """If this fails a link does not come back after its connections were cut."""
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send("x", b"1")
        peer.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        peer.send("y", b"2")
        await until(lambda: len(store) == 2)
        await tailing(engine)
        triggers = [record.trigger for record in engine.journal]
        assert "connection_lost" in triggers


async def test_standby_where_the_hot_path_is_off(nodes: Nodes, peer: Peer) -> None:
    """If this fails hot_path.enabled: false still reads streams."""
    settings = Settings(hot_path=HotPathConfig(enabled=False))
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=5)
        assert engine.health_check().peers[0].events_read == 0


async def test_the_rate_limit_is_shared_and_kept(nodes: Nodes, peer: Peer) -> None:
    """If this fails rate_limit_per_sec is not a limit."""
    hot = HotPathConfig(rate_limit_enabled=True, rate_limit_per_sec=1000, rate_limit_burst=100)
    store = MemorySyncEngine()
    settings = Settings(hot_path=hot)
    async with nodes.engine(peer_config(peer.server), store=store, settings=settings) as engine:
        await tailing(engine)
        began = time.monotonic()
        pipe = peer.client.pipeline(transaction=False)
        for number in range(600):
            fields = encode_fields(peer.item(f"k{number}", b"1"))
            pipe.execute_command("XADD", Keys().stream, "*", *fields)
        pipe.execute()
        await until(lambda: len(store) == 600)
        # The burst and one batch of debt come at once; the others wait for their tokens.
        assert time.monotonic() - began > 0.2


async def test_replaying_a_stream_into_redis_twice_changes_nothing(
    nodes: Nodes, peer: Peer, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails events that are read again are applied and published again (G3, G11)."""
    target = redis_servers()
    for number in range(400):
        peer.send(f"k{number % 50}", b"v%d" % number if number % 7 else None)
    async with RedisSyncEngine(target.url, node_id="b") as store:
        async with nodes.engine(peer_config(peer.server), store=store) as engine:
            await tailing(engine)
            peer.send("x", b"1")
            await caught_up(engine, peer)
        mine = Peer(target, "b")
        length = mine.client.xlen(Keys().stream)
        position = await store.applied_position("a")
        assert position is not None
        # As if the cursor file had been restored from a backup: everything is read once more.
        mine.client.hset(Keys().positions, "a", "0-0 0")
        async with nodes.engine(peer_config(peer.server), store=store) as engine:
            await caught_up(engine, peer)
            health = engine.health_check().peers[0]
            assert (health.events_read, health.events_applied) == (401, 0)
        assert mine.client.xlen(Keys().stream) == length
        assert await store.applied_position("a") == position
        mine.close()


async def test_changes_travel_through_a_chain_and_loops_end(
    nodes: Nodes, redis_servers: Callable[[], RedisServer]
) -> None:
    """If this fails a node does not pass on what it learnt, or an echo never ends (G4, G11)."""
    names = ("a", "b", "c")
    servers = {name: redis_servers() for name in names}
    alone = Settings(startup=StartupConfig(when_no_peer="run"))
    async with (
        RedisSyncEngine(servers["a"].url, node_id="a") as a,
        RedisSyncEngine(servers["b"].url, node_id="b") as b,
        RedisSyncEngine(servers["c"].url, node_id="c") as c,
    ):
        stores = {"a": a, "b": b, "c": c}
        reads = {"a": "bc", "b": "ac", "c": "ab"}
        engines = []
        for name in names:
            peers = [peer_config(servers[other], other) for other in reads[name]]
            engine = nodes.engine(*peers, store=stores[name], node_id=name, settings=alone)
            engines.append(engine)
            await engine.start()
        for engine in engines:
            await engine.wait_synced(10)
        for number in range(60):
            store = stores[names[number % 3]]
            await store.put(f"k{number % 10}", b"v%d" % number)
        await a.delete("k3")
        keys = [f"k{number}" for number in range(10)]

        async def agree() -> bool:
            states = [await stores[name].stamps(keys) for name in names]
            return states[0] == states[1] == states[2] and states[0][3] is not None

        deadline = time.monotonic() + 10
        while not await agree():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert (await held(c, "k3"))["k3"] is None
        before = [stores_events(servers[name]) for name in names]
        # Quiet: each write makes at most one event per node, and then none at all.
        await a.put("last", b"1")
        await until(lambda: [stores_events(servers[n]) for n in names] == [x + 1 for x in before])
        for engine in engines:
            await engine.shutdown()
        assert [stores_events(servers[name]) for name in names] == [x + 1 for x in before]


def stores_events(server: RedisServer) -> int:
    """Return how many events a node has published."""
    reader = Peer(server)
    try:
        return int(reader.client.xinfo_stream(Keys().stream)["length"])
    finally:
        reader.close()


async def test_a_foreign_node_is_read_from_the_oldest_entry_of_its_stream(
    nodes: Nodes, redis_server: RedisServer
) -> None:
    """If this fails a foreign stream is skipped, stamped by its own stamps, or a loss is hidden."""
    peer = Peer(redis_server)
    old = meta(updated_at=5, version=1)
    peer.send_fields(put(b"trimmed", b"0", meta=old))
    peer.client.xtrim(Keys().stream, maxlen=0, approximate=False)
    first = peer.send_fields(put(b"x", b"1", meta=old))
    peer.send_fields([b"op", b"DEL", b"key", b"y"])
    peer.send_fields(put(b"y", b"2", meta=old))
    peer.send_fields(put(b"z", b"3", meta=old))
    peer.send_fields([b"op", b"DELETE", b"key", b"z"])
    store = MemorySyncEngine()
    async with nodes.engine(peer_config(redis_server), store=store) as engine:
        await tailing(engine)
        await caught_up(engine, peer)
        assert await held(store, "x", "y", "z") == {"x": b"1", "y": b"2", "z": None}
        (stamp,) = await store.stamps(["x"])
        assert stamp is not None
        assert stamp.updated_at == StreamId.parse(first).ms
        peer.send_fields(put(b"x", b"1", meta=old))
        await caught_up(engine, peer)
        assert await store.stamps(["x"]) == [stamp], "content that is held live is current"
        (gap,) = await engine.ledger()
        assert (gap.missed, gap.healed_at_ms) == (1 if peer.counts else None, None)
        assert engine.health_check().peers[0].gaps_open == 1
    peer.close()


@pytest.mark.parametrize(
    ("before", "full", "empty", "after"),
    [
        (100, True, False, 200),
        (800, True, False, 1000),
        (1000, True, False, 1000),
        (100, False, False, 100),
        (100, False, True, 90),
        (400, False, True, 360),
        (55, False, True, 50),
        (50, False, True, 50),
    ],
)
def test_the_batch_size_adapts(before: int, full: bool, empty: bool, after: int) -> None:
    """If this fails adaptive_batch_size grows or shrinks in another way than documented."""
    settings = HotPathConfig(adaptive_batch_size=True, batch_size=before)
    reader = StreamReader("s", Current(Settings(hot_path=settings)), Abilities())
    entries = [] if empty else [[b"1-1", []]]
    reader.adapt(Read(entries, at_head=not full, full=full, end=reader.position))
    assert reader.size == after


async def test_one_link_copies_at_a_time_by_priority() -> None:
    """If this fails several bootstraps at once share memory and the store between them."""
    slot = PrioritySlot(SystemClock())
    await slot.acquire("first", lambda: 5)
    order: list[str] = []

    async def copy(name: str, priority: int) -> None:
        await slot.acquire(name, lambda: priority)
        order.append(name)
        await asyncio.sleep(0)
        slot.release(name)

    waiting = [
        asyncio.create_task(copy(name, priority))
        for name, priority in (("low", 9), ("high", 0), ("gone", 0), ("middle", 4))
    ]
    await asyncio.sleep(0)
    waiting[2].cancel()
    assert order == []
    slot.release("first")
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["high", "middle", "low"]


@pytest.mark.parametrize(
    ("read", "trimmed", "added", "missed"),
    [(10, 10, 500, None), (10, 11, 500, 1), (10, 300, 500, 290), (0, 0, 500, None)],
)
def test_a_gap_is_counted_from_before_the_batch(
    read: int, trimmed: int, added: int, missed: int | None
) -> None:
    """If this fails what was trimmed is taken for what has just been read."""
    before = Position(StreamId(1, 0), read)
    end = Position(StreamId(400, 0), read + 100)
    info = StreamInfo(added - trimmed, StreamId(500, 0), StreamId(300, 0), added)
    gap = find_gap(before, end, info, 100, at_head=False, agreed_at=before.stream_id)
    assert (None if gap is None else gap.missed) == missed


async def test_the_cursor_waits_for_the_store(nodes: Nodes, peer: Peer) -> None:
    """If this fails a crash while the store works loses what it had not taken yet (G2)."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    class Slow(MemorySyncEngine):
        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            if any(change.key == "late" for change in changes):
                entered.set()
                await go_on.wait()
            return await super().apply_many(changes, received)

    store = Slow()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        peer.send("early", b"1")
        await caught_up(engine, peer)
        before = engine._book.get("a")
        late = peer.send_fields(put(b"late", b"2"))
        await entered.wait()
        assert engine._book.get("a") == before
        go_on.set()
        await caught_up(engine, peer)
        after = engine._book.get("a")
        assert after is not None
        assert str(after.position.stream_id) == late


async def test_what_is_held_while_paused_is_applied_afterwards(nodes: Nodes, peer: Peer) -> None:
    """If this fails chunks that were read and not applied are lost in a pause (G1)."""

    class Fills(MemorySyncEngine):
        async def apply_many(
            self, changes: Sequence[SyncItem], received: Received | None = None
        ) -> ApplyResult:
            result = await super().apply_many(changes, received)
            self.accepting_writes = self.accepting_writes and not 300 <= len(self) < 900
            return result

    store = Fills()
    async with nodes.engine(peer_config(peer.server), store=store) as engine:
        await tailing(engine)
        await engine.pause("a")
        for number in range(900):
            peer.send_fields(put(b"k%d" % number, b"x"))
        await engine.resume("a")
        await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=10)
        await until(
            lambda: PauseReason.BACKPRESSURE in engine.health_check().peers[0].pause_reasons
        )
        assert 300 <= len(store) < 900
        link = engine._links["a"].context.progress
        copied = link.copied
        while len(store) < 900:
            store.accepting_writes = True
            await asyncio.sleep(0.01)
        await caught_up(engine, peer)
        assert (link.copied, link.events_read) == (copied, 900), "what was held was not read anew"
        # Without counts nobody can tell that the first entry was the first there ever was.
        assert engine.health_check().peers[0].gaps_open == (0 if peer.counts else 1)


async def test_bad_entries_in_several_chunks_become_dead_letters(nodes: Nodes, peer: Peer) -> None:
    """If this fails the cursor passes bad entries of a large read that nobody has kept (G1)."""
    async with nodes.engine(peer_config(peer.server)) as engine:
        await tailing(engine)
        with peer.client.pipeline(transaction=True) as together:
            for number in range(900):
                op = "X" if number % 100 == 99 else "PUT"
                fields = dict(zip(*[iter(put(b"k%d" % number, b"x"))] * 2, strict=True))
                together.xadd(Keys().stream, {**fields, b"op": op})
            together.execute()
        await caught_up(engine, peer)
        letters = await engine.dead_letters.list()
        assert [letter.key for letter in letters] == [f"k{n}" for n in range(99, 900, 100)]
        assert len(engine.sync_engine) == 891  # type: ignore[arg-type]


@pytest.mark.parametrize("executed", [None, [], [None], [None, None, None], 7])
def test_a_transaction_answered_in_another_shape_is_a_protocol_error(executed: object) -> None:
    """If this fails something between us and a peer that spoils a transaction ends the engine."""

    class Line:
        received_bytes = 0

        def limit_reply(self, _limit_bytes: int) -> None:
            """Note no limit."""

        def send(self, *_commands: object) -> None:
            """Send nothing."""

    line: Any = Line()
    reader = StreamReader("cdc", Current(Settings()), Abilities())
    reader.ask_bulk(line)
    with pytest.raises(ProtocolError):
        reader.take(line, [b"OK", b"QUEUED", b"QUEUED", executed])
