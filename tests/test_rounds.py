"""Nothing spins (G12): every round of a worker makes progress, waits, or reports.

The peer lies here, or the store does, and the commands that the peer gets are counted. A bound is
several times what a link needs that waits, and a small part of what one sends that spins.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
import redis
from conftest import Nodes, Peer, counts_entries, held, until

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    PeerConfig,
    ReconnectConfig,
    Settings,
    StartupConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import PeerReplyError, StoreReopenedError
from fsm_replication.health import PeerHealth
from fsm_replication.items import SyncItem
from fsm_replication.layout import Keys, encode_value
from fsm_replication.ports import StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine, SyncEngine
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.stream import encode_data, encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.testing import FaultProxy
from fsm_replication.testing.lying_proxy import Command, HangUpError, LyingProxy
from fsm_replication.workers.context import LinkProgress

STREAM = Keys().stream.encode()
MARKER = Keys().marker.encode()
# A link that is quiet asks about five commands in each second of this.
BLOCK_SEC = 1.0
# Commands per second that a link may send while there is nothing to read.
HANDFUL = 12
# Commands per second that a link may send that is kept from getting on.
WAITING = 20
# Commands per second where each round also copies some items anew.
COPYING = 150
# Longer than the longest wait of a link here, and then some.
PATIENCE_SEC = 8.0
WRITES_PER_SEC = 50
WRITING_SEC = 2.0
ROWS_MAX = 3


def settings(block_sec: float = BLOCK_SEC) -> Settings:
    """Return settings under which a link waits briefly, and waits longer each time."""
    return Settings(
        hot_path=HotPathConfig(block_timeout=block_sec),
        cold_path=ColdPathConfig(enabled=False),
        startup=StartupConfig(when_no_peer="run"),
        reconnect=ReconnectConfig(first=0.05, longest=2.0),
    )


class Source:
    """A peer that is written to: by its store, which keeps a tree, or by hand, without one."""

    def __init__(self, server: RedisServer, writer: RedisSyncEngine | Peer) -> None:
        self.server = server
        self.client = redis.Redis(port=server.port)
        self.has_tree = isinstance(writer, RedisSyncEngine)
        self._writer = writer

    async def write(self, *keys: str, content: bytes = b"x", maxlen: int | None = None) -> None:
        """Write some keys in one go; with ``maxlen`` no more entries are left in the stream."""
        if isinstance(self._writer, RedisSyncEngine):
            await self._writer.put_many([(key, content) for key in keys])
            if maxlen is not None:
                self.client.xtrim(Keys().stream, maxlen=maxlen, approximate=False)
            return
        trim = () if maxlen is None else ("MAXLEN", maxlen)
        with self.client.pipeline(transaction=False) as together:
            for key in keys:
                item = self._writer.item(key, content)
                together.set(Keys().item(key), encode_value(item, encode_data(content)))
                together.execute_command("XADD", Keys().stream, *trim, "*", *encode_fields(item))
            together.execute()

    @property
    def head(self) -> StreamId:
        """The id of the stream's newest entry."""
        return StreamId.parse(self.client.xinfo_stream(Keys().stream)["last-generated-id"])


@pytest_asyncio.fixture(params=["tree", pytest.param("no tree", marks=pytest.mark.slow)])
async def source(
    request: pytest.FixtureRequest, redis_server: RedisServer
) -> AsyncIterator[Source]:
    """An empty peer, with a tree and without."""
    async with opened_source(redis_server, tree=request.param == "tree") as made:
        yield made


@pytest_asyncio.fixture
async def treeless(redis_server: RedisServer) -> AsyncIterator[Source]:
    """An empty peer without a tree."""
    async with opened_source(redis_server, tree=False) as made:
        yield made


@asynccontextmanager
async def opened_source(server: RedisServer, *, tree: bool) -> AsyncIterator[Source]:
    """Open an empty peer and close it."""
    if tree:
        async with RedisSyncEngine(server.url, node_id="a") as store:
            made = Source(server, store)
            yield made
            made.client.close()
        return
    peer = Peer(server)
    peer.write_marker()
    made = Source(server, peer)
    yield made
    made.client.close()
    peer.close()


class Site:
    """A node that reads a peer which lies; ``line`` stands before the liar, and may be cut."""

    def __init__(
        self, engine: ReplicationEngine, proxy: LyingProxy, line: FaultProxy, source: Source
    ) -> None:
        self.engine = engine
        self.proxy = proxy
        self.line = line
        self.source = source

    @property
    def health(self) -> PeerHealth:
        """What is told of the link."""
        return self.engine.health_check().peers[0]

    @property
    def progress(self) -> LinkProgress:
        """What the link has achieved."""
        return self.engine._links["a"].context.progress

    def bootstraps(self) -> int:
        """Return how often the link has begun to copy."""
        moves = [move for move in self.engine.journal if move.machine == "link:a"]
        return sum(move.dest is PeerState.BOOTSTRAPPING for move in moves)

    async def rows(self) -> int:
        """Return how many rows the ledger has."""
        return len(await self.engine.ledger())

    async def tailing(self) -> None:
        """Wait until the link is at the head."""
        await self.engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=PATIENCE_SEC)

    async def holds(self, *keys: str, content: bytes = b"x") -> None:
        """Wait until the node holds all of some keys."""
        wanted = dict.fromkeys(keys, content)
        began, before = time.monotonic(), len(self.proxy.seen)
        while (found := await held(self.engine.sync_engine, *keys)) != wanted:
            if time.monotonic() > began + PATIENCE_SEC:
                lacking = sum(found[key] != content for key in keys)
                sent = (len(self.proxy.seen) - before) / PATIENCE_SEC
                raise AssertionError(
                    f"{lacking} of {len(keys)} keys are missing; {sent:.0f} commands/s,"
                    f" {await self.rows()} rows, {self.health.state}"
                )
            await asyncio.sleep(0.02)


@asynccontextmanager
async def reading(
    nodes: Nodes,
    source: Source,
    *,
    store: SyncEngine | None = None,
    lie: Callable[[Command, Any], Any] | None = None,
    block_sec: float = BLOCK_SEC,
) -> AsyncIterator[Site]:
    """Start a node that reads a peer over a proxy which lies; it is shut down first."""
    async with LyingProxy(source.server.port) as proxy, FaultProxy(proxy.port) as line:
        if lie is not None:
            proxy.tell(lie)
        peer = PeerConfig(node_id="a", redis_url=line.url)
        async with nodes.engine(peer, store=store, settings=settings(block_sec)) as engine:
            yield Site(engine, proxy, line, source)


def numbered(name: str, count: int) -> list[str]:
    """Return some keys."""
    return [f"{name}.{number}" for number in range(count)]


# Lies, each about the replies to one command.


def about_stream(change: Callable[[dict[bytes, Any]], None]) -> Callable[[Command, Any], Any]:
    """Return a lie that changes what XINFO STREAM says; a server that does not count learns to."""

    def lie(command: Command, reply: Any) -> Any:
        if command[0].upper() != b"XINFO" or not isinstance(reply, list):
            return reply
        named = dict(zip(reply[::2], reply[1::2], strict=True))
        named.setdefault(b"entries-added", named[b"length"])
        change(named)
        return [part for pair in named.items() for part in pair]

    return lie


def no_counts(named: dict[bytes, Any]) -> None:
    """Answer as Redis did before 7.0."""
    for name in (b"entries-added", b"max-deleted-entry-id", b"recorded-first-entry-id"):
        named.pop(name, None)


def three_times(named: dict[bytes, Any]) -> None:
    """Count every entry three times."""
    named[b"entries-added"] *= 3


def at_random() -> Callable[[dict[bytes, Any]], None]:
    """Count anything."""
    rng = random.Random(1)

    def change(named: dict[bytes, Any]) -> None:
        named[b"entries-added"] = rng.randrange(1_000_000)

    return change


def backwards() -> Callable[[dict[bytes, Any]], None]:
    """Count down."""
    numbers = iter(range(1_000_000, 0, -7))

    def change(named: dict[bytes, Any]) -> None:
        named[b"entries-added"] = next(numbers)

    return change


def nothing_added(named: dict[bytes, Any]) -> None:
    """Count nothing."""
    named[b"entries-added"] = 0


def longer_than_added(named: dict[bytes, Any]) -> None:
    """Have more entries than were ever added."""
    named[b"entries-added"] = max(0, named[b"length"] - 5)


def head_ahead(ms: int, added: int = 0) -> Callable[[dict[bytes, Any]], None]:
    """Tell of a head, and of entries, that no read ever gives."""

    def change(named: dict[bytes, Any]) -> None:
        head = StreamId.parse(named[b"last-generated-id"])
        named[b"last-generated-id"] = b"%d-%d" % (max(head.ms, 1) + ms, head.seq)
        named[b"entries-added"] += added

    return change


def failing(*names: bytes) -> Callable[[Command, Any], Any]:
    """Return a lie that answers some commands by an error."""

    def lie(command: Command, reply: Any) -> Any:
        if command[0].upper() in names:
            return PeerReplyError("ERR it is broken")
        return reply

    return lie


CONNECTING = (b"CLIENT", b"HGETALL", b"EXISTS", b"XINFO", b"XRANGE", b"XREAD", b"PING")


def bootstrap_fails(command: Command, reply: Any) -> Any:
    """Answer an error to what only a bootstrap asks for: SCAN, or the tree."""
    if command[0].upper() in CONNECTING:
        return reply
    return PeerReplyError("ERR it is broken")


def hangs_up(command: Command, reply: Any) -> Any:
    """End the connection at each read."""
    if command[0].upper() == b"XREAD":
        raise HangUpError
    return reply


def does_not_block(command: Command) -> Command:
    """Ask for a read that returns at once in the place of one that waits."""
    if command[0].upper() != b"XREAD" or b"BLOCK" not in command:
        return command
    at = list(command).index(b"BLOCK")
    return [*command[:at], *command[at + 2 :]]


def always_nil(command: Command, reply: Any) -> Any:
    """Answer every read by nothing."""
    return None if command[0].upper() == b"XREAD" else reply


def blocking_is_nil(command: Command, reply: Any) -> Any:
    """Answer every read that should wait by nothing."""
    return None if command[0].upper() == b"XREAD" and b"BLOCK" in command else reply


def always_these(reply_to_all: Any) -> Callable[[Command, Any], Any]:
    """Return a lie that answers every read by the same entries."""

    def lie(command: Command, reply: Any) -> Any:
        return reply_to_all if command[0].upper() == b"XREAD" else reply

    return lie


def scan_goes_on(*cursors: bytes) -> Callable[[Command, Any], Any]:
    """Return a lie about SCAN: it finds nothing and never ends."""
    turns = 0

    def lie(command: Command, reply: Any) -> Any:
        nonlocal turns
        if command[0].upper() != b"SCAN":
            return reply
        turns += 1
        return [cursors[turns % len(cursors)], []]

    return lie


# The measure itself.


async def test_the_truth_costs_little(nodes: Nodes, source: Source) -> None:
    """If this fails the proxy breaks what it passes on, or a link that waits is not quiet."""
    async with reading(nodes, source) as site:
        await site.tailing()
        await source.write(*numbered("k", 300))
        await site.holds(*numbered("k", 300))
        assert await site.proxy.count(2.0) <= 2 * HANDFUL
        # Without counts nobody can tell that the first entry was the first there ever was.
        doubts = 0 if counts_entries(source.server) else 1
        assert (await site.rows(), site.bootstraps()) == (doubts, 1 + doubts)


# 1. A server that does not count.


async def test_a_server_that_does_not_count_is_copied_once(nodes: Nodes, source: Source) -> None:
    """If this fails a link to a Redis before 7.0 copies again and again, or records false gaps."""
    # Without a bound: 600 to 1100 commands/s, 1000 rows a little later, and no entry applied.
    async with reading(nodes, source, lie=about_stream(no_counts)) as site:
        await site.tailing()
        first = numbered("first", 20)
        for key in first:
            await source.write(key)
        await site.holds(*first)
        assert site.bootstraps() <= 2
        assert await site.rows() <= 1
        assert await site.proxy.count(2.0) <= 2 * HANDFUL
        assert await site.rows() <= 1


async def paused_and_resumed(site: Site) -> None:
    """Pause the link and resume it."""
    await site.engine.pause("a")
    await site.engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=PATIENCE_SEC)
    await site.source.write("meanwhile")
    await site.engine.resume("a")


async def reconnected(site: Site) -> None:
    """Break both connections and let the link come back."""
    await site.line.refuse()
    await site.engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=PATIENCE_SEC)
    await site.source.write("meanwhile")
    await site.line.heal()


@pytest.mark.parametrize("written_before", [0, 1, 20])
@pytest.mark.parametrize("interrupted", [paused_and_resumed, reconnected])
async def test_an_interruption_is_no_gap_where_nothing_is_counted(
    nodes: Nodes, source: Source, interrupted: Callable[[Site], Any], written_before: int
) -> None:
    """If this fails each pause or lost connection of a link to a Redis before 7.0 costs a copy."""
    # Without a bound: 500 to 2300 commands/s and as many rows as the ledger keeps.
    async with reading(nodes, source, lie=about_stream(no_counts)) as site:
        await site.tailing()
        before = numbered("before", written_before)
        for key in before:
            await source.write(key)
        await site.holds(*before)
        rows, bootstraps = await site.rows(), site.bootstraps()
        await interrupted(site)
        await site.holds("meanwhile")
        await site.tailing()
        await source.write("after")
        await site.holds("after")
        # Where nothing had been read, nothing tells what the stream has held meanwhile.
        unsure = not written_before
        assert await site.rows() <= rows + unsure <= 1
        assert site.bootstraps() <= bootstraps + unsure <= 2


async def test_what_was_trimmed_unread_is_one_gap_where_nothing_is_counted(
    nodes: Nodes, source: Source
) -> None:
    """If this fails a loss in the stream of a Redis before 7.0 is not noticed, or many times."""
    await source.write(*numbered("before", 20))
    async with reading(nodes, source, lie=about_stream(no_counts)) as site:
        await site.holds(*numbered("before", 20))
        await site.tailing()
        rows, bootstraps = await site.rows(), site.bootstraps()
        await site.line.refuse()
        await site.engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=PATIENCE_SEC)
        await source.write(*numbered("lost", 20), maxlen=3)
        await site.line.heal()
        await site.tailing()
        await site.holds(*numbered("lost", 20))
        await source.write("after")
        await site.holds("after")
        assert await site.proxy.count(1.0) <= HANDFUL
        assert await site.rows() == rows + 1
        assert site.bootstraps() == bootstraps + 1


# 2, 3. A peer that miscounts.

MISCOUNTS: dict[str, Callable[[], Callable[[dict[bytes, Any]], None]]] = {
    "three times": lambda: three_times,
    "at random": at_random,
    "backwards": backwards,
    "nothing": lambda: nothing_added,
    "longer than added": lambda: longer_than_added,
}


@pytest.mark.parametrize("miscount", MISCOUNTS)
async def test_a_peer_that_miscounts_is_read_all_the_same(
    nodes: Nodes, source: Source, miscount: str
) -> None:
    """If this fails a peer whose counts are wrong is copied, or asked for its counts, for ever."""
    # Without a bound: 200 to 550 commands/s and up to 1000 rows, at random or backwards; 5 rows where
    # nothing is counted; 60 commands/s and 3 rows otherwise.
    async with reading(nodes, source, lie=about_stream(MISCOUNTS[miscount]())) as site:
        await site.tailing()
        before, keys = len(site.proxy.seen), numbered("k", round(WRITES_PER_SEC * WRITING_SEC))
        began = time.monotonic()
        for number, key in enumerate(keys):
            await asyncio.sleep(began + number / WRITES_PER_SEC - time.monotonic())
            await source.write(key)
        await site.holds(*keys)
        took = time.monotonic() - began
        sent = len(site.proxy.seen) - before
        await paused_and_resumed(site)
        await site.holds("meanwhile")
        quiet, rows = await site.proxy.count(1.0), await site.rows()
        assert sent <= 30 * took + 4 * len(keys), f"{sent} commands, {rows} rows, quiet {quiet}"
        assert rows <= ROWS_MAX, f"{sent} commands, {rows} rows, quiet {quiet}"
        assert quiet <= HANDFUL, f"{sent} commands, {rows} rows, quiet {quiet}"


# 4. A stream that is too short.


async def test_a_stream_shorter_than_a_round_trip_is_read_on(nodes: Nodes, source: Source) -> None:
    """If this fails a stream that is trimmed faster than it is read brings nothing, and copies."""
    # Without a bound: 11 to 23 rows in 3 s, and none of 110 to 1210 entries read applied.
    keys, seconds = numbered("k", 200), 3.0
    async with reading(nodes, source) as site:
        await site.tailing()
        site.line.delay(to_server_sec=0.02, to_client_sec=0.02)
        before, progress, number = len(site.proxy.seen), site.progress, 0

        def applied() -> int:
            return progress.events_applied + progress.events_deduped

        async def write() -> None:
            nonlocal number
            number += 1
            await source.write(*keys, content=b"%d" % number, maxlen=10)
            await asyncio.sleep(0.02)

        began = time.monotonic()
        while time.monotonic() < began + seconds:
            await write()
        done, read, copies = applied(), progress.events_read, site.bootstraps()
        sent, rows = len(site.proxy.seen) - before, await site.rows()
        told = f"{done} applied of {read} read, {rows} rows, {copies} bootstraps, {sent} commands"
        health = site.health
        assert health.stream_too_short or health.gaps_open or copies > 1, told
        assert 1 <= rows <= 10, told
        assert sent <= seconds * COPYING + 3 * len(keys) * copies, told
        assert done >= read // 2, told
        # It goes on, whatever bootstraps and waits come first.
        async with asyncio.timeout(20):
            while applied() <= done:
                await write()
        await site.tailing()
        if source.has_tree:
            await site.engine.repair()
            await site.holds(*keys, content=b"%d" % number)


# 5, 6. Reads that bring nothing new.


@pytest.mark.parametrize("lie", [blocking_is_nil, always_nil])
async def test_a_read_that_does_not_wait_is_not_asked_again_at_once(
    nodes: Nodes, source: Source, lie: Callable[[Command, Any], Any]
) -> None:
    """If this fails a peer that answers blocking reads at once is asked without end."""
    # Without a bound: 900 to 2600 commands in each second.
    await source.write("before")
    async with reading(nodes, source) as site:
        await site.holds("before")
        await site.tailing()
        site.proxy.tell(lie, does_not_block)
        # It ends the read that waits already.
        await source.write("meanwhile")
        counts = [await site.proxy.count(1.0) for _ in range(3)]
        assert counts[-1] <= WAITING, counts
        site.proxy.tell()
        await source.write("after")
        await site.holds("meanwhile", "after")


@pytest.mark.parametrize("which", ["all", "the oldest", "the newest"])
async def test_entries_that_were_read_already_are_no_progress(
    nodes: Nodes, source: Source, which: str
) -> None:
    """If this fails a peer that gives the same entries again and again keeps a link busy."""
    # Without a bound: 300 to 1000 commands in each second.
    await source.write("before")
    async with reading(nodes, source) as site:
        await site.tailing()
        await source.write("one", "two", "three")
        await site.holds("one", "two", "three")
        settled = site.progress.settled
        assert settled is not None
        rows: Any = source.client.xrange(Keys().stream)
        entries = [
            [stream_id, [part for pair in fields.items() for part in pair]]
            for stream_id, fields in rows
        ]
        some = {"all": entries, "the oldest": entries[:1], "the newest": entries[-1:]}[which]
        site.proxy.tell(always_these([[STREAM, some]]), does_not_block)
        await source.write("meanwhile")
        counts = [await site.proxy.count(1.0) for _ in range(3)]
        assert counts[-1] <= WAITING, counts
        position = site.progress.settled
        assert position is not None
        assert position.stream_id >= settled.stream_id
        site.proxy.tell()
        await source.write("after")
        await site.holds("meanwhile", "after")


# 7. Whatever a link does when it has connected, fails.


FAILURES: dict[str, Callable[[Command, Any], Any]] = {
    "reads": failing(b"XREAD"),
    "bootstraps": bootstrap_fails,
    "hangs up": hangs_up,
    "counts": failing(b"XINFO"),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_peer_that_only_connects_is_waited_for_longer_each_time(
    nodes: Nodes, source: Source, failure: str
) -> None:
    """If this fails a peer on which all but connecting fails is connected to at full speed."""
    # Without a bound: 20 to 42 attempts and 140 to 420 commands in 2 s, each wait about 0.06 s.
    lie = FAILURES[failure]
    await source.write("before")
    async with reading(nodes, source, lie=lie, block_sec=0.2) as site:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(2.0)
        attempts = [at - began for at in site.proxy.times(b"HGETALL", MARKER)]
        gaps = [round(b - a, 2) for a, b in itertools.pairwise(attempts)]
        told = f"{len(attempts)} attempts, {len(site.proxy.seen)} commands, waits {gaps[-8:]}"
        assert 3 <= len(attempts) <= 10, told
        assert gaps[-1] >= 0.2, told
        assert site.health.last_error, told
        site.proxy.tell()
        await site.holds("before")
        await site.tailing()
        await source.write("after")
        await site.holds("after")
        # There was progress: the next failure is the first one.
        known = len(site.proxy.times(b"HGETALL", MARKER))
        site.proxy.tell(FAILURES["reads"])
        await until(lambda: len(site.proxy.times(b"HGETALL", MARKER)) >= known + 2)
        first, second = site.proxy.times(b"HGETALL", MARKER)[known : known + 2]
        assert second - first < 0.5, "the waits did not begin small again"


# 8. A walk over the keys that never ends.


@pytest.mark.parametrize("cursors", [(b"7",), (b"5", b"6")], ids=["7 7 7", "5 6 5 6"])
async def test_a_scan_that_never_ends_is_an_error(
    nodes: Nodes, treeless: Source, cursors: tuple[bytes, ...]
) -> None:
    """If this fails a peer whose SCAN goes round in a circle is scanned for ever, and none told."""
    # Without a bound: 230 to 1270 commands in each second, and no error.
    await treeless.write("before")
    async with reading(nodes, treeless, lie=scan_goes_on(*cursors)) as site:
        counts = [await site.proxy.count(1.0) for _ in range(3)]
        assert counts[-1] <= WAITING, counts
        assert site.health.last_error, counts
        site.proxy.tell()
        await site.holds("before")


# 9. A head that is never reached.


@pytest.mark.parametrize(
    ("ms", "added"),
    [
        pytest.param(1, 0, id="little"),
        pytest.param(600_000, 0, id="far", marks=pytest.mark.slow),
        pytest.param(1, 1, id="one more", marks=pytest.mark.slow),
        pytest.param(0, 100_000, id="many more"),
    ],
)
async def test_a_head_that_is_never_reached_is_not_run_after(
    nodes: Nodes, source: Source, ms: int, added: int
) -> None:
    """If this fails a peer that tells of entries which no read gives keeps a link busy."""
    await source.write("before")
    async with reading(nodes, source) as site:
        await site.tailing()
        await source.write(*numbered("k", 10))
        await site.holds(*numbered("k", 10))
        site.proxy.tell(about_stream(head_ahead(ms, added)))
        await paused_and_resumed(site)
        # It may be copied for it, twice at the most.
        counts = [await site.proxy.count(1.0) for _ in range(3)]
        await site.holds("meanwhile")
        await reconnected(site)
        counts += [await site.proxy.count(1.0)]
        await source.write("after")
        await site.holds("after")
        told = f"{counts} commands, {await site.rows()} rows"
        assert counts[2] <= WAITING, told
        assert counts[3] <= 3 * WAITING, told
        assert await site.rows() <= ROWS_MAX, told


async def test_a_copy_up_to_a_head_that_is_never_reached_is_made_once(
    nodes: Nodes, source: Source
) -> None:
    """If this fails a peer that tells of a head in the future is copied without end."""
    lie = about_stream(head_ahead(600_000, 100_000))
    await source.write(*numbered("k", 10))
    async with reading(nodes, source, lie=lie) as site:
        await site.holds(*numbered("k", 10))
        counts = [await site.proxy.count(1.0) for _ in range(2)]
        told = f"{counts} commands, {await site.rows()} rows, {site.bootstraps()} bootstraps"
        assert counts[-1] <= WAITING, told
        assert await site.rows() <= ROWS_MAX, told


# 10. The store's side.


class AnotherEachTime(MemorySyncEngine):
    """Is another store whenever it is asked."""

    calls = 0

    async def incarnation(self) -> str:
        """Return another name each time."""
        self.calls += 1
        return str(self.calls)


class AnotherThatRefuses(AnotherEachTime):
    """Takes, moreover, nothing that was meant for the store it was before."""

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Take only what is meant for no store."""
        if received is not None and received.incarnation:
            raise StoreReopenedError("it is another store")
        return await super().apply_many(changes, received)


class InTwoMinds(MemorySyncEngine):
    """Accepts writes every other time it is asked."""

    calls = 0

    def should_accept_writes(self) -> bool:
        """Change the answer with each call."""
        self.calls += 1
        return self.calls % 2 == 0


class TakesNothing(MemorySyncEngine):
    """Fails at every write."""

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Fail."""
        raise RuntimeError("out of order")


@pytest.mark.parametrize(
    "make_store", [AnotherEachTime, AnotherThatRefuses, InTwoMinds, TakesNothing]
)
async def test_a_store_that_is_out_of_order_costs_its_peers_little(
    nodes: Nodes, source: Source, make_store: Callable[[], MemorySyncEngine]
) -> None:
    """If this fails a store that is out of order has its node flood the peers with commands."""
    # Without a bound: 450 to 1700 commands in each second where the store refuses.
    await source.write(*numbered("k", 20))
    async with reading(nodes, source, store=make_store()) as site:
        counts = []
        for second in range(3):
            await source.write(f"late.{second}")
            counts.append(await site.proxy.count(1.0))
        assert counts[-1] <= COPYING, counts
        assert sum(counts) <= 6 * COPYING, counts
