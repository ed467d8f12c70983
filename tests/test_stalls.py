"""What a peer can send that takes long to compute: the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import zstandard
from conftest import Nodes, Peer, all_parts, digest, held, peer_config, until

from fsm_replication.batch import BatchBuilder, RawEntry
from fsm_replication.config import ReplicationConfig, Settings, StartupConfig
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import BadEntryError, DrainTimeoutError
from fsm_replication.heavy import TURN_STEPS, SideThread
from fsm_replication.items import EMPTY_HASH, SyncItem, content_hash
from fsm_replication.layout import encode_stamp
from fsm_replication.ports import Ports
from fsm_replication.redis_dotted import DottedReader
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.stream import DataDecoder, Entry, encode_fields, parse_entry
from fsm_replication.tables import EngineState, PeerState
from fsm_replication.testing.memory_cursor import MemoryCursorStore
from fsm_replication.testing.sim_transport import SimTransport
from fsm_replication.testing.virtual_time import LoopClock, VirtualTimeLoop
from fsm_replication.testing.virtual_time import run as run_virtual
from fsm_replication.transport import SKIM_BYTES, RedisTransport
from fsm_replication.workers.chunks import cut
from fsm_replication.workers.comparer import Comparer

MIB = 1024**2
PAYLOAD_BYTES = 16 * MIB
NOW_MS = 1_700_000_000_000
# Of the loop's own thread in one turn, so that a busy machine makes no difference; it was 30 ms for
# each of these contents, in one turn for all of them.
STALL_SEC = 0.1
BOMB = zstandard.ZstdCompressor().compress(bytes(PAYLOAD_BYTES))
STREAMED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PAYLOAD_BYTES))


def put(key: str, data: bytes, of: bytes = b"another content", version: int = 1) -> list[bytes]:
    """Return the fields of an entry whose hash is that of ``of``."""
    item = SyncItem(key, of, "binary", content_hash(of), version, NOW_MS, False, "a")
    return encode_fields(item, data)


def builder() -> BatchBuilder:
    """Return a builder without a thread."""
    return BatchBuilder(
        "a", payload_bytes=PAYLOAD_BYTES, part_bytes=PAYLOAD_BYTES, now_ms=lambda: NOW_MS
    )


async def longest_turn(work: Awaitable[object]) -> float:
    """Return the most seconds that the loop's thread computed in one turn while ``work`` ran."""
    worst, last, over = 0.0, time.thread_time(), False

    async def watch() -> None:
        nonlocal worst, last
        while not over:
            await asyncio.sleep(0)
            now = time.thread_time()
            worst, last = max(worst, now - last), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        await work
    finally:
        over = True
        await watching
    return worst


async def turns_of(work: Awaitable[object]) -> int:
    """Return how many turns of the loop others get while ``work`` is awaited."""
    turns, over = 0, False

    async def count() -> None:
        nonlocal turns
        while not over:
            await asyncio.sleep(0)
            turns += 1

    counting_turns = asyncio.create_task(count())
    await work
    over = True
    await counting_turns
    return turns


async def consume(entries: Sequence[RawEntry], made_by: BatchBuilder) -> list[str]:
    """Make all that there is of entries; returns the reasons of their letters."""
    selection = made_by.select(entries)
    async for _ in made_by.materialise(selection):
        pass
    return [letter.reason for letter in selection.letters]


@pytest.mark.parametrize("data", [BOMB, STREAMED], ids=["size declared", "size left out"])
async def test_contents_that_grow_and_are_bad_stop_nobody(data: bytes) -> None:
    """If this fails half a kilobyte of a stream stops every link for 30 ms, and 200 of it for 6 s."""
    thread = SideThread()
    made_by = builder()
    made_by.heavy = thread
    entries = [(b"%d-0" % n, put(f"k{n}", data)) for n in range(1, 5)]
    longest = await longest_turn(consume(entries, made_by))
    await thread.close()
    assert longest < STALL_SEC


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the bytes that come out of zstd."""
    out: list[int] = []
    real = zstandard.ZstdDecompressor

    class Counting:
        def __init__(self) -> None:
            self._real = real()

        def decompress(self, data: bytes, most: int = 0) -> bytes:
            content = self._real.decompress(data, most)
            out.append(len(content))
            return content

    with monkeypatch.context() as patch:
        patch.setattr(zstandard, "ZstdDecompressor", Counting)
        yield out


@pytest.mark.parametrize("size", [100_000, MIB])
def test_nothing_is_decompressed_twice(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a bad content costs its decompression again with each look at it."""
    content = bytes(size)
    data = zstandard.ZstdCompressor().compress(content)
    entries = [(b"1-0", put("k", b"older", b"older")), (b"2-0", put("k", data, version=2))]
    with counting(monkeypatch) as out:
        made_by = builder()
        selection = made_by.select(entries)
        parts = all_parts(made_by, selection)
        assert [item.content for part in parts for item in part.items] == [b"older"]
        assert out == [size]
        # The chunk is tried again: its letters could not be kept, or the store has failed.
        again = made_by.select(entries, selection.bad)
        parts = all_parts(made_by, again)
        assert [item.content for part in parts for item in part.items] == [b"older"]
        assert [letter.reason for letter in again.letters] == ["hash"]
        assert out == [size]


async def test_small_contents_take_turns_too() -> None:
    """If this fails contents that are just not large stop the loop by their number."""
    data = zstandard.ZstdCompressor().compress(bytes(200_000))
    entries = [(b"%d-0" % n, put(f"k{n}", data)) for n in range(1, 201)]
    reasons: list[str] = []

    async def make() -> None:
        reasons.extend(await consume(entries, builder()))

    turns = await turns_of(make())
    assert reasons == ["hash"] * 200
    assert turns > 20, "40 MB were decompressed, 1 MiB a turn"


def test_a_chunk_of_bad_entries_is_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails 200 bad entries are parsed 200 times each."""
    parsed = 0

    def parse(fields: Sequence[bytes] | None, index: int = 0) -> Entry:
        nonlocal parsed
        parsed += 1
        return parse_entry(fields, index)

    monkeypatch.setattr("fsm_replication.batch.parse_entry", parse)
    entries = [(b"%d-0" % n, put(f"k{n}", b"bad")) for n in range(1, 201)]
    made_by = builder()
    selection = made_by.select(entries)
    all_parts(made_by, selection)
    assert len(selection.letters) == 200
    assert parsed <= 400


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([*put("k", b"x", b"x")[:9], b'{"content_type":"binary","version":1,"updated_at":1,"x":"'
          + b"y" * 20_000 + b'"}'], "meta"),
        ([b"op", b"DEL", b"key", b"k", b"meta", b'{"version":1,"updated_at":1,"x":"'
          + b"y" * 20_000 + b'"}'], "meta"),
        ([b"f", b"v"] * 60_000, "field"),
    ],
    ids=["meta of a put", "meta of a delete", "fields"],
)  # fmt: skip
def test_what_takes_long_to_parse_is_refused(fields: list[bytes], reason: str) -> None:
    """If this fails a peer sends megabytes where each byte is parsed in one turn."""
    selection = builder().select([(b"1-0", fields)])
    assert [letter.reason for letter in selection.letters] == [reason]
    assert not selection.candidates


@pytest.mark.parametrize("size", [1, 1000, 255 * 1024, 257 * 1024, MIB])
@pytest.mark.parametrize("declares", [True, False])
def test_light_and_heavy_decode_to_the_same(size: int, declares: bool) -> None:
    """If this fails what a content is depends on where it is decoded."""
    content = b"ab" * size
    data = zstandard.ZstdCompressor(write_content_size=declares).compress(content)
    decoder, right = DataDecoder(PAYLOAD_BYTES), content_hash(content)
    light = decoder.decode_light(data, right)
    assert light in (None, content)
    assert (light is None) == (len(content) > 256 * 1024)
    assert decoder.decode(data, right) == content
    for wrong in (data[:-1], content_hash(b"other")):
        with pytest.raises(BadEntryError):
            decoder.decode(wrong if wrong is not data else data, content_hash(b"other"))


async def test_a_cancelled_wait_does_not_wait_for_the_thread() -> None:
    """If this fails a drain lasts as long as what is being decompressed."""
    thread, began, go_on = SideThread(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(10)

    waiting = asyncio.create_task(thread.run(work))
    await asyncio.to_thread(began.wait)
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert waiting.cancelled()
    closing = asyncio.create_task(thread.close())
    await asyncio.sleep(0)
    assert not closing.done()
    go_on.set()
    await closing
    assert not [t for t in threading.enumerate() if t.name.startswith("fsm_replication-heavy")]


async def test_a_stream_of_bombs_neither_stops_the_loop_nor_the_drain(
    nodes: Nodes, peer: Peer
) -> None:
    """If this fails 20 KiB of one peer's stream stop all links, and the shutdown with them (G8, G9)."""
    peer.write_marker()
    peer.send("first", b"1")
    engine = nodes.engine(peer_config(peer.server))
    await engine.start()
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=15)
    for n in range(12):
        peer.send_fields(encode_fields(peer.item(f"k{n}", b"x"), BOMB))

    async def read_some_and_stop() -> None:
        await until(lambda: engine._links["a"].context.progress.events_read >= 12)
        await engine.shutdown()

    assert await longest_turn(read_some_and_stop()) < STALL_SEC
    assert engine.state is EngineState.STOPPED
    assert not [t for t in threading.enumerate() if t.name.startswith("fsm_replication-heavy")]


async def test_what_follows_bombs_is_applied(nodes: Nodes, peer: Peer) -> None:
    """If this fails bad contents take good ones with them, or those too large for a turn."""
    peer.write_marker()
    peer.send("first", b"1")
    large = bytes(3 * MIB)
    async with nodes.engine(peer_config(peer.server), store=MemorySyncEngine()) as engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=15)
        for n in range(5):
            peer.send_fields(encode_fields(peer.item(f"bad{n}", b"x"), BOMB))
        peer.send("large", large)
        peer.send("small", b"s")
        await until(lambda: engine.health_check().peers[0].events_applied == 3)
        assert engine.health_check().peers[0].dead_letters == 5
        found = await held(engine.sync_engine, "large", "small")
        # Compared whole they would be shown whole.
        assert found["large"] is not None
        assert digest(found["large"]) == digest(large)
        assert found["small"] == b"s"


def test_a_drain_that_ends_late_is_not_called_clean() -> None:
    """If this fails an engine is Stopped though its drain took three times as long as it may."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        clock = LoopClock()
        ports = Ports(SimTransport({}, clock, random.Random(1)), MemoryCursorStore(), clock)
        settings = Settings(startup=StartupConfig(when_no_peer="run"))
        engine = ReplicationEngine(
            ReplicationConfig(local_node_id="b", settings=settings), ports=ports
        )
        await engine.start()

        async def hold_up_the_loop() -> None:
            loop._now += 11.0

        engine._book.flush = hold_up_the_loop  # type: ignore[method-assign, assignment]
        await engine.shutdown()
        with pytest.raises(DrainTimeoutError, match=r"longer than 10 s: 11\.\d+ s"):
            await engine.wait_closed()
        assert engine.state is EngineState.FAILED

    run_virtual(main)


def test_wide_entries_are_parsed_a_few_at_a_time() -> None:
    """If this fails entries of many fields stop the loop, 200 of them in one turn."""
    narrow, wide = [b"op", b"PUT"] * 5, [b"f", b"v"] * 6000
    for entries, sizes in (
        ([narrow] * 450, [200, 200, 50]),
        ([wide] * 5, [1] * 5),
        ([narrow] * 3 + [wide] + [narrow] * 10 + [None], [15]),
        ([wide, narrow, wide, narrow], [2, 2]),
    ):
        rows = [(b"1-0", fields) for fields in entries]
        chunks = list(cut(rows))
        assert [len(chunk) for chunk in chunks] == sizes
        assert [row for chunk in chunks for row in chunk] == rows


async def test_a_bucket_of_many_leaves_takes_turns() -> None:
    """If this fails a bucket of 100,000 leaves stops the loop for a second."""
    leaf = encode_stamp(SyncItem("k", b"", "binary", EMPTY_HASH, 1, NOW_MS))
    theirs = {f"k{number}": leaf for number in range(20_000)}

    class Peer:
        async def sizes(self, _layout: str, paths: Sequence[str]) -> list[int]:
            return [len(theirs)] * len(paths)

        async def children(
            self, _layout: str, paths: Sequence[str]
        ) -> list[dict[str, bytes] | None]:
            return [theirs for _ in paths]

        async def root(self, _layout: str) -> bytes:
            return b"another"

    async def stamps(keys: Sequence[str]) -> list[None]:
        return [None] * len(keys)

    async def walk() -> None:
        found = [group async for group in Comparer(None, Peer(), stamps).groups(["0000"])]
        assert [len(group.differences) for group in found] == [20_000]

    assert await turns_of(walk()) >= 2 * 20_000 / TURN_STEPS - 2


async def test_a_node_of_many_children_takes_turns() -> None:
    """If this fails a foreign node with 100,000 children stops the loop for a second."""
    members = [f"{number}:{'ab' * 32}".encode() for number in range(20_000)]

    async def answer(commands: Sequence[Sequence[object]]) -> list[object]:
        return [members if command[0] == "ZRANGE" else b"ab" * 32 for command in commands]

    async def read() -> None:
        await DottedReader(answer, "").children([""])

    assert await turns_of(read()) >= 20_000 / TURN_STEPS - 2


async def test_reading_our_own_store_takes_turns(redis_server: RedisServer) -> None:
    """If this fails items that grow stop the loop whenever they are read from our own store."""
    async with RedisSyncEngine(redis_server.url, node_id="b") as store:
        for number in range(8):
            await store.put(f"k{number}", bytes(3 * MIB))
        longest = await longest_turn(store.get_many([f"k{number}" for number in range(8)]))
    assert longest < STALL_SEC


async def test_skimming_takes_turns() -> None:
    """If this fails a reply of tiny elements stops the loop each time that some of them come."""
    elements = 200_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in (b"+PONG\r\n", b"+OK\r\n", b"*%d\r\n" % elements + b":1\r\n" * elements):
            await reader.read(4096)
            writer.write(reply)
        await reader.read(4096)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        connection = await RedisTransport().connect(url, timeout_sec=10, name="test")
        replies: list[list[object]] = []

        async def skim() -> None:
            replies.append(await connection.skim("XRANGE", timeout_sec=10))

        turns = await turns_of(skim())
        connection.close()
        await connection.wait_closed()
    assert turns >= 4 * elements / SKIM_BYTES
    assert len(replies[0]) == 256


@pytest.mark.parametrize("size", [200_000, 3 * MIB])
def test_an_error_does_not_hold_the_content(size: int) -> None:
    """If this fails each bad content stays in memory until its error is collected: 600 MiB of them."""
    data = zstandard.ZstdCompressor().compress(bytes(size))
    decoder = DataDecoder(PAYLOAD_BYTES)
    decode = decoder.decode_light if size < MIB else decoder.decode
    with pytest.raises(BadEntryError) as caught:
        decode(data, content_hash(b"another"))
    held = [value for entry in caught.traceback[1:] for value in entry.frame.f_locals.values()]
    assert not [value for value in held if isinstance(value, bytes) and len(value) >= size]
