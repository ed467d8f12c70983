"""The simulated Redis, beside a real one, and the simulated network."""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

import hiredis
import pytest
import pytest_asyncio
from conftest import now_ms
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.errors import (
    ConnectionLostError,
    PeerRefusedError,
    PeerReplyError,
    ReplyTooLargeError,
)
from fsm_replication.ports import Connection, Oversize, SystemClock, Transport
from fsm_replication.servers import RedisServer
from fsm_replication.testing import (
    LoopClock,
    SimConnection,
    SimRedis,
    SimTransport,
    run,
)
from fsm_replication.testing.sim_dialects import (
    DIALECTS,
    REDIS_7_0,
    REDIS_8_0,
    VALKEY_8_1,
    Dialect,
    dialect_named,
    dialect_of,
)
from fsm_replication.testing.sim_streams import Wait
from fsm_replication.transport import RedisTransport

Arguments = tuple[bytes | str | int, ...]
NOW_MS = 1_700_000_000_000


def sim() -> SimRedis:
    """Return a server whose time stands still."""
    return SimRedis(now_ms=lambda: NOW_MS)


def pack(args: Arguments) -> bytes:
    """Return a command as it is sent."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]
    return packed


# Beside a real one ------------------------------------------------------------------------------


class RealRedis:
    """A real server, and one plain connection to it; ``dialect`` is what it says it speaks."""

    def __init__(self, server: RedisServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._reader = hiredis.Reader(replyError=PeerReplyError)
        self.dialect = dialect_of(self.run([("INFO", "server")])[0])

    def run(self, commands: Sequence[Arguments]) -> list[Any]:
        """Return the replies to some commands that are sent in one flight."""
        self.send(commands)
        return [self.receive() for _ in commands]

    def send(self, commands: Sequence[Arguments]) -> None:
        """Send some commands in one flight."""
        self._socket.sendall(b"".join(map(pack, commands)))

    def receive(self) -> Any:
        """Return the next reply."""
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(1 << 16))
        return reply

    def has_reply(self) -> bool:
        """Whether a reply, or a part of one, has come."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A real server that only these tests use."""
    with RedisServer() as started:
        yield started


@pytest.fixture(scope="module")
def real(server: RedisServer) -> Iterator[RealRedis]:
    """A connection to that server."""
    redis = RealRedis(server)
    yield redis
    redis.close()


UNORDERED = {"SMEMBERS", "SCAN"}
# What most of the sequences below find.
FILLING: list[Arguments] = [
    *(("XADD", "log", at, "f", at) for at in ("1-1", "1-2", "2-0", "3-1")),
    ("XDEL", "log", "1-2"),
    ("ZADD", "zset", 1, "f", 2, "g", 2, "e"),
    ("HSET", "hash", "f", "v", "g", "10"),
    ("SET", "text", "abcdef"),
]


def comparable(command: Arguments, reply: Any) -> Any:
    """Return a reply without what may differ: texts of errors, orders, inner nodes."""
    if isinstance(reply, PeerReplyError):
        return ("error", reply.code)
    name = str(command[0])
    if name == "EXEC" and isinstance(reply, list):
        return [comparable(("",), part) for part in reply]
    if name == "SCAN":
        return [reply[0], sorted(reply[1])] if isinstance(reply, list) else reply
    if name in UNORDERED and isinstance(reply, list):
        return sorted(reply)
    if isinstance(reply, list) and b"radix-tree-nodes" in reply:
        # A node whose entries were deleted one by one may stay there empty.
        reply[3] = reply[5] = None
    return reply


def same(real: RealRedis, commands: Sequence[Arguments]) -> None:
    """Run commands on both servers, empty before, and compare the replies."""
    real.run([("DISCARD",), ("FLUSHALL",)])
    session = SimRedis(now_ms=now_ms, dialect=real.dialect).session()
    commands = [*FILLING, *commands]
    for command, theirs in zip(commands, real.run(commands), strict=True):
        ours = session.execute(*command)
        alike = comparable(command, ours) == comparable(command, theirs)
        assert alike, (real.dialect.name, command, ours, theirs)


# What any kind of value may be at, and what most often holds one kind.
ANY = ["a", "b"]
keys = st.sampled_from([*ANY, "text", "hash", "set", "zset", "log", "nothing"])
texts, hashes, sets, zsets, logs = (
    st.sampled_from([name] * 6 + ANY) for name in ("text", "hash", "set", "zset", "log")
)
names = st.sampled_from(["f", "g", "h"])
values = st.sampled_from([b"", b"v", b"\x00\xff", b"10", b"-7", b"9223372036854775807", b"1.5"])
numbers = st.sampled_from([0, 1, 2, 3, -1, -2, 7, 100] * 2 + [2**63 - 1, "x", "01", ""])
# Which are written in other ways by other servers.
ODD_SCORES = [
    *("-0", "1e-5", "-1e-7", "1e17", "1e21", "1e22", "1.5e300", "5e-324", "100000.25", "1e-300"),
    *("731271.5117751976", "0.00018760984257611436", "-9223372036854775808", "305.3151589361616"),
    *("3110015850176577870", "5691363375748086700", "123456789012345678901", "-4.25e20", "3.0"),
]
scores = st.sampled_from(
    ["0", "1", "2.5", "-inf", "+inf", "0.1", "-1e3"] * 3 + ["x", "nan", "1e999", *ODD_SCORES]
)
bounds = st.one_of(scores, scores.map("({}".format))
# What is an id to some servers, or to some commands, or to none.
ODD_IDS = [
    *("+", "-", "(1-1", "(5", "0-*", "-*", "*-1", "5-**", "5-*-1", "1-1-1", "x-*", "", "+1", " 1"),
    *("01-1", "1-01", "1-x", "1--1", "-1-1", ">", f"{2**64 - 1}-*", f"{2**64 - 1}", f"{2**64}-0"),
    *(f"1-{2**64 - 1}", f"1-{2**64}", f"{2**64 - 1}-{2**64 - 1}"),
]
ids = st.builds("{}-{}".format, st.integers(0, 5), st.integers(0, 2))
any_ids = st.one_of(
    *(ids, ids, ids),
    st.sampled_from(["0", "2", "5-*", "3-*", "-", "+", "x", "1-", "-1", "$", f"{2**64 - 1}-1"]),
    st.sampled_from(ODD_IDS),
)
ends = st.one_of(st.sampled_from(["-", "+", "(1-1", "(0-0", "(2", "(x"]), any_ids)


def cmd(name: str, *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Arguments]:
    """Return a strategy of one command; a part that yields a tuple is several arguments."""

    def flat(drawn: tuple[Any, ...]) -> Arguments:
        found: list[Any] = [*name.split(" ")]
        for part in drawn:
            found.extend(part if isinstance(part, tuple) else (part,))
        return tuple(found)

    return st.tuples(*parts).map(flat)


def maybe(*choices: Arguments) -> st.SearchStrategy[Arguments]:
    """Return a strategy of some optional arguments, which are left out half of the time."""
    return st.sampled_from([()] * len(choices) + [*choices])


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Arguments]:
    """Return a strategy of one to three of something."""
    return st.lists(strategy, min_size=1, max_size=3).map(tuple)


counts = maybe(("COUNT", 1), ("COUNT", 2), ("COUNT", 0), ("COUNT", -1), ("COUNT",), ("COUNT", "x"))
trims = maybe(
    ("MAXLEN", 2),
    ("MAXLEN", "=", 1),
    ("MAXLEN", "~", 1),
    ("MAXLEN", -1),
    ("MAXLEN", "x"),
    ("MINID", "2-0"),
    ("MINID", "=", "3"),
    ("MAXLEN", "2", "LIMIT", 1),
    ("MAXLEN", "~", 1, "LIMIT", 1),
    ("MAXLEN", "~", 1, "LIMIT", 0),
    ("MAXLEN", "~", 1, "LIMIT", -1),
    ("MAXLEN", "~", 1, "LIMIT", "x"),
    ("LIMIT", 1, "MAXLEN", "~", 1),
    ("MAXLEN", "=", 1, "LIMIT", 0),
    ("MINID", "~", "2-0"),
    ("MINID", "+"),
    ("MINID", "x"),
    ("MINID", "5-*"),
    ("LIMIT", 5),
    ("LIMIT", 0),
    ("MAXLEN",),
    ("MAXLEN", 1, "MINID", "1"),
    ("MAXLEN", 3, "MAXLEN", 1),
    ("NOMKSTREAM",),
    ("NOMKSTREAM", "MAXLEN", 1),
)
options = maybe(
    ("NX",), ("XX",), ("EX", 100), ("PX", "100000"), ("PXAT", 1), ("PXAT", 4102444800000),
    ("EX", 0), ("PX", "x"), ("EX",), ("NX", "XX"), ("EX", 1, "PX", 1), ("?",),
)  # fmt: skip
strings = st.one_of(
    cmd("GET", texts),
    cmd("SET", texts, values, options),
    cmd("MGET", some(texts)),
    cmd("STRLEN", texts),
    cmd("GETRANGE", texts, numbers, numbers),
    cmd("SETRANGE", texts, st.sampled_from([0, 1, 5, -1, "x", 2**40]), values),
    cmd("INCRBY", texts, numbers),
)
whole_keys = st.one_of(
    cmd("EXISTS", some(keys)),
    cmd("DEL", some(keys)),
    cmd("UNLINK", keys),
    cmd("TYPE", keys),
    cmd(
        "SCAN",
        st.sampled_from([0, "x"]),
        maybe(("MATCH", "[ab]"), ("MATCH", "?", "COUNT", 50), ("COUNT", 0)),
    ),
)
collections = st.one_of(
    cmd("HSET", hashes, names, values),
    cmd("HSET", hashes, names, values, names, values),
    cmd("HSET", hashes, names, values, names),
    cmd("HSETNX", hashes, names, values),
    cmd("HGET", hashes, names),
    cmd("HMGET", hashes, some(names)),
    cmd("HGETALL", hashes),
    cmd("HDEL", hashes, some(names)),
    cmd("HLEN", hashes),
    cmd("HINCRBY", hashes, names, numbers),
    cmd("SADD", sets, some(names)),
    cmd("SREM", sets, some(names)),
    cmd("SMEMBERS", sets),
    cmd("ZADD", zsets, maybe(("NX",), ("XX",), ("CH",), ("NX", "XX")), scores, names),
    cmd("ZADD", zsets, scores, names, scores, names),
    cmd("ZREM", zsets, some(names)),
    cmd("ZSCORE", zsets, names),
    cmd("ZCARD", zsets),
    cmd("ZRANGE", zsets, numbers, numbers, maybe(("WITHSCORES",), ("?",))),
    cmd(
        "ZRANGEBYSCORE",
        *(zsets, bounds, bounds),
        maybe(("LIMIT", 0, 1), ("LIMIT", 1, -1), ("LIMIT", -1, 2), ("WITHSCORES",), ("LIMIT", 1)),
    ),
)
streams = st.one_of(
    cmd("XADD", logs, trims, any_ids, names, values),
    cmd("XADD", logs, ids, names, values, names, values),
    cmd("XADD", logs, ids, some(names)),
    cmd("XLEN", logs),
    cmd("XRANGE", logs, ends, ends, counts),
    cmd("XREVRANGE", logs, ends, ends, counts),
    cmd("XDEL", logs, some(ids)),
    cmd("XDEL", logs, any_ids),
    cmd("XTRIM", logs, trims),
    cmd("XREAD", counts, st.just("STREAMS"), logs, any_ids),
    cmd("XREAD COUNT", st.integers(1, 3), st.just(("STREAMS", "log")), ids),
    cmd("XREAD", counts, st.just(("BLOCK", 1, "STREAMS")), logs, logs, ids, any_ids),
    cmd("XREAD", maybe(("BLOCK", -1), ("BLOCK", "x"), ("?",)), st.just("STREAMS"), some(logs)),
    cmd("XINFO STREAM", logs),
)
odds = st.sampled_from(
    [
        ("GET",),
        ("GET", "a", "b"),
        ("XINFO",),
        ("XINFO", "STREAM"),
        ("XINFO", "NOTHING", "a"),
        ("NOTHING", "a"),
        ("PING",),
        ("PING", "x"),
        ("PING", "x", "y"),
        ("CLIENT", "SETNAME", "fine"),
        ("CLIENT", "SETNAME", "not fine"),
        ("SELECT", 0),
        ("SELECT", "x"),
        ("SELECT", 999),
        ("AUTH", "x"),
        ("AUTH", "default", "x"),
        # Not of a wrong name: Redis 8 and Valkey may go silent on it where FLUSHALL came before.
        ("AUTH", "a", "b", "c"),
        ("AUTH",),
        ("ZRANGE", "a", 0),
        ("CLIENT",),
        ("CLIENT", "SETNAME"),
        ("CLIENT", "SETNAME", "a", "b"),
        ("CLIENT", "NOTHING"),
        ("XINFO", "NOTHING"),
        ("XINFO", "NOTHING", "log"),
        ("XINFO", "NOTHING", "text"),
        ("XINFO", "STREAM", "text"),
        ("XINFO", "STREAM", "log", "x"),
        ("XINFO", "STREAM", "nothing", "x"),
        ("xinfo", "stream", "nothing"),
        ("ECHO", "x"),
        ("ECHO",),
        ("TIME", "x"),
        ("MULTI", "x"),
        ("EXEC", "x"),
        ("DISCARD", "x"),
        ("HGET", "hash"),
        ("XADD", "log"),
        ("XREAD", "STREAMS"),
        ("SCAN",),
        ("FLUSHALL", "ASYNC"),
        ("FLUSHALL", "x"),
    ]
)
queues = st.sampled_from([("MULTI",), ("MULTI",), ("EXEC",), ("EXEC",), ("DISCARD",)])
plain = st.one_of(strings, whole_keys, collections, streams, streams, odds)


@given(commands=st.lists(plain, min_size=15, max_size=40))
def test_replies_are_those_of_a_real_server(real: RealRedis, commands: list[Arguments]) -> None:
    """If this fails the simulated server answers what no server would."""
    same(real, commands)


@given(commands=st.lists(st.one_of(queues, strings, streams, odds), min_size=10, max_size=30))
def test_transactions_are_those_of_a_real_server(
    real: RealRedis, commands: list[Arguments]
) -> None:
    """If this fails a transaction holds what a real one would not."""
    same(real, commands)


@given(commands=st.lists(streams.filter(lambda c: "BLOCK" not in c), min_size=10, max_size=40))
def test_the_counts_of_a_stream_are_those_of_a_real_server(
    real: RealRedis, commands: list[Arguments]
) -> None:
    """If this fails a reader of a simulated stream sees gaps where there are none."""
    same(real, [part for c in commands for part in (c, ("XINFO", "STREAM", "log"))])


# Reads that block beside what others write, in transactions or not.
read_ids = st.one_of(ids, st.sampled_from(["$", "$", "+", "0", "3-1"]))
read_keys = st.sampled_from(["log", "log", "a", "b"])
writes = st.one_of(
    cmd("XADD", read_keys, ids, names, values),
    cmd("XADD", read_keys, ids, names, values),
    cmd("XADD", st.just("log"), maybe(("MAXLEN", 0), ("MAXLEN", 1)), ids, names, values),
    cmd("XDEL", read_keys, some(ids)),
    cmd("XTRIM", read_keys, st.just(("MAXLEN", 0))),
    cmd("DEL", read_keys),
    cmd("SET", read_keys, values),
    st.sampled_from([("MULTI",), ("MULTI",), ("EXEC",), ("EXEC",), ("FLUSHALL",)]),
)
reads = st.one_of(
    cmd("XREAD", counts, st.just(("BLOCK", 0, "STREAMS")), read_keys, read_ids),
    cmd(
        "XREAD", counts, st.just(("BLOCK", 0, "STREAMS")), read_keys, read_keys, read_ids, read_ids
    ),
)


@given(before=st.lists(writes, max_size=3), read=reads, after=st.lists(writes, max_size=8))
def test_reads_that_block_end_as_those_of_a_real_server(
    server: RedisServer,
    real: RealRedis,
    before: list[Arguments],
    read: Arguments,
    after: list[Arguments],
) -> None:
    """If this fails a reader at the head is told what no server would tell it, or not at all."""
    same(real, [*before, ("DISCARD",)])
    with contextlib.closing(RealRedis(server)) as blocking:
        theirs, replies_there = _read_meanwhile(real, blocking, read, after)
    redis = SimRedis(now_ms=now_ms, dialect=real.dialect)
    reader, writer = redis.session(), redis.session()
    for command in (*FILLING, *before, ("DISCARD",)):
        writer.execute(*command)
    ours: list[Any] = []
    reply = reader.execute(*read, wake=ours.append)
    if not isinstance(reply, Wait):
        ours.append(reply)
    replies_here = [writer.execute(*command) for command in after]
    for command, mine, other in zip(after, replies_here, replies_there, strict=True):
        assert comparable(command, mine) == comparable(command, other), (command, mine, other)
    assert [comparable(read, one) for one in ours] == [comparable(read, one) for one in theirs], (
        real.dialect.name
    )


def _read_meanwhile(
    real: RealRedis, blocking: RealRedis, read: Arguments, after: list[Arguments]
) -> tuple[list[Any], list[Any]]:
    """Return the reply to a read, if it was answered, and those to what was done meanwhile."""
    (number,) = blocking.run([("CLIENT", "ID")])
    blocking.send([read])
    while not blocking.has_reply():
        if b" flags=b " in real.run([("CLIENT", "LIST", "ID", number)])[0]:
            break
    replies = real.run(after)
    _, waits = real.run([("DISCARD",), ("CLIENT", "UNBLOCK", number)])
    reply = blocking.receive()
    return [] if waits else [reply], replies


def test_scores_are_written_as_by_a_real_server(real: RealRedis) -> None:
    """If this fails a walk by score goes on where no server would."""
    dice = random.Random(1)
    some_scores = [*ODD_SCORES, *(repr(10 ** dice.uniform(-30, 30)) for _ in range(100))]
    some_scores += [str(dice.randint(-(2**63), 2**63)) for _ in range(50)]
    for score in some_scores:
        same(real, [("ZADD", "z", score, "f"), ("ZRANGE", "z", 0, -1, "WITHSCORES")])


@pytest.mark.parametrize("size", [1, 300])
def test_trimming_in_nodes_is_that_of_a_real_server(real: RealRedis, size: int) -> None:
    """If this fails a trim with ~ takes more than a real one would."""
    entries: list[Arguments] = [("XADD", "s", f"{n}-1", "f", "x" * size) for n in range(1, 351)]
    ends: list[Arguments] = [("XTRIM", "s", "MAXLEN", "~", 120), ("XLEN", "s")]
    if size == 1:
        ends += [("XTRIM", "s", "MINID", "~", "320"), ("XLEN", "s"), ("XINFO", "STREAM", "s")]
        same(real, [*entries, *ends])
        return
    real.run([("FLUSHALL",)])
    mine, theirs = sim().session(), real.run([*entries, *ends])
    left = [mine.execute(*command) for command in (*entries, *ends)][-1]
    assert 120 <= left < 140
    assert 120 <= theirs[-1] < 140


GLOBS = ["*", "?", "a*", "[a-c]*", "[^a]*", "\\*", "[c-a]", "[]", "[ab", "a?c", "x[\\]]", "*:*:?"]


def test_patterns_match_as_those_of_a_real_server(real: RealRedis) -> None:
    """If this fails SCAN finds keys that a real one would not."""
    held = ["a", "b", "abc", "*", "x]", "[", "a:b:c", "a\nc", "d"]
    filled: list[Arguments] = [("SET", key, 1) for key in held]
    same(real, [*filled, *(("SCAN", 0, "COUNT", 100, "MATCH", glob) for glob in GLOBS)])


# On its own -------------------------------------------------------------------------------------


def test_scan_finds_all_that_stays() -> None:
    """If this fails a walk misses keys because others come and go."""
    redis, dice = sim(), random.Random(1)
    for number in range(200):
        redis.execute("SET", f"stays:{number}", 1)
    found: set[bytes] = set()
    cursor: Any = 0
    while True:
        cursor, keys = redis.execute("SCAN", cursor, "MATCH", "stays:*", "COUNT", 7)
        found.update(keys)
        redis.execute("SET", f"comes:{dice.random()}", 1)
        redis.execute("DEL", f"comes:{dice.random()}")
        if cursor == b"0":
            break
    assert len(found) == 200


def test_keys_expire_when_time_passes() -> None:
    """If this fails a tombstone outlives its time, or goes too early."""
    at = NOW_MS
    redis = SimRedis(now_ms=lambda: at)
    redis.execute("SET", "k", "v", "PXAT", NOW_MS + 50)
    assert redis.execute("PTTL", "k") == 50
    at += 50
    assert redis.execute("GET", "k") == b"v"
    at += 1
    assert redis.execute("GET", "k") is None
    assert redis.execute("SCAN", 0) == [b"0", []]
    assert redis.execute("PTTL", "k") == -2


def test_ids_follow_the_clock_and_never_go_back() -> None:
    """If this fails entries have ids that no server would give."""
    at = NOW_MS
    redis = SimRedis(now_ms=lambda: at)
    first = [redis.execute("XADD", "s", "*", "f", "v") for _ in range(2)]
    at -= 1000
    first.append(redis.execute("XADD", "s", "*", "f", "v"))
    assert first == [f"{NOW_MS}-{seq}".encode() for seq in range(3)]
    assert redis.execute("TIME") == [b"1699999999", b"0"]


def test_a_server_can_lose_what_came_last() -> None:
    """If this fails a crash cannot be played: what was dumped changes, or what came after stays."""
    redis = sim()
    fill: list[Arguments] = [
        ("SET", "k", "1", "PX", 100),
        ("HSET", "h", "f", "1"),
        ("SADD", "m", "x"),
        ("ZADD", "z", 1, "x"),
        ("XADD", "s", "1-1", "f", "v"),
    ]
    for command in fill:
        redis.execute(*command)
    state = redis.dump()
    for _ in range(2):
        redis.execute("SETRANGE", "k", 0, "2")
        redis.execute("HSET", "h", "g", "1")
        redis.execute("DEL", "m", "z")
        redis.execute("XADD", "s", "2-1", "f", "v")
        redis.load(state)
        assert redis.execute("MGET", "k", "h") == [b"1", None]
        assert (redis.execute("PTTL", "k"), redis.execute("HLEN", "h")) == (100, 1)
        assert redis.execute("EXISTS", "m", "z") == 2
        assert redis.execute("XINFO", "STREAM", "s")[11] == 1
    redis.flush()
    assert redis.execute("SCAN", 0) == [b"0", []]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_version_is_told(dialect: Dialect) -> None:
    """If this fails a simulated server says that it is another than it is."""
    told = SimRedis(now_ms=now_ms, dialect=dialect).execute("INFO", "server")
    assert b"redis_version:%b\r\n" % dialect.like_redis.encode() in told
    assert dialect_of(told) is dialect
    assert dialect_named(dialect.name) is dialect


def test_the_dialect_of_an_unknown_version_is_the_one_before() -> None:
    """If this fails the tests compare a server with another one, or say nothing of why they fail."""
    assert dialect_of(b"redis_version:7.4.1\r\n") is REDIS_7_0
    assert dialect_of(b"redis_version:10.0.0\r\n") is REDIS_8_0
    valkey = b"redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:%b\r\n"
    assert dialect_of(valkey % b"9.0.0") is VALKEY_8_1
    for told in (b"redis_version:6.0.16\r\n", valkey % b"8.0.1", b""):
        with pytest.raises(LookupError, match="there is no dialect of"):
            dialect_of(told)
    with pytest.raises(LookupError, match=r"redis-1\.0"):
        dialect_named("redis-1.0")


# The network --------------------------------------------------------------------------------------


class Net:
    """Two servers and a network."""

    def __init__(self) -> None:
        self.a, self.b = sim(), SimRedis(now_ms=lambda: NOW_MS, password="s3cret")
        self.transport = SimTransport({"a": self.a, "b": self.b}, LoopClock(), random.Random(3))

    async def connect(self, url: str = "redis://a") -> SimConnection:
        """Return a connection."""
        return await self.transport.connect(url, timeout_sec=5, name="test")


@pytest.fixture
def net() -> Net:
    """Two servers and a network."""
    return Net()


@pytest_asyncio.fixture(params=["sim", "real"])
async def either(
    request: pytest.FixtureRequest, redis_server: RedisServer
) -> AsyncIterator[Connection]:
    """A connection to a simulated server, and one to a real one."""
    transport: Transport = RedisTransport(SystemClock())
    url = redis_server.url
    if request.param == "sim":
        transport, url = Net().transport, "redis://a"
    connection = await transport.connect(url, timeout_sec=5, name="test")
    yield connection
    connection.close()
    await connection.wait_closed()


async def test_calls_pipelines_and_errors(either: Connection) -> None:
    """If this fails the two kinds of connection answer differently."""
    assert await either.call("SET", "k", b"\x00\xff") == b"OK"
    replies = await either.pipeline([("GET", "k"), ("HGET", "k", "f"), ("PING",)])
    assert (replies[0], replies[2]) == (b"\x00\xff", b"PONG")
    assert isinstance(replies[1], PeerReplyError)
    with pytest.raises(PeerReplyError, match="WRONGTYPE"):
        await either.call("HGET", "k", "f")
    assert await either.pipeline([]) == []
    both = either.send(("PING", "1")), either.send(("PING", "2"))
    assert [await future for future in both] == [[b"1"], [b"2"]]
    before = either.received_bytes
    await either.pipeline(
        [("XADD", "s", "1-1", "f", "v"), ("MULTI",), ("XREAD", "STREAMS", "s", 0), ("EXEC",)]
    )
    assert either.received_bytes - before == 77


async def test_a_read_at_the_head_ends_with_nothing(either: Connection) -> None:
    """If this fails a blocked read never ends, or not as a real one does."""
    assert await either.call("XREAD", "BLOCK", 10, "STREAMS", "s", "$", timeout_sec=5) is None


async def test_a_read_at_the_head_wakes_when_a_transaction_is_whole(net: Net) -> None:
    """If this fails a blocked read is not answered when, or as, a real one is."""
    reader, writer = await net.connect(), await net.connect()
    reading = reader.send(("XREAD", "BLOCK", 0, "STREAMS", "t", "s", 0, 0), ("PING",))
    await writer.pipeline(
        [("MULTI",), ("XADD", "s", "5-1", "f", "v"), ("XADD", "s", "6-1", "f", "v")]
    )
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reading.done()
    await writer.call("EXEC")
    entries = [[at, [b"f", b"v"]] for at in (b"5-1", b"6-1")]
    assert await reading == [[[b"s", entries]], b"PONG"]


async def test_a_cancelled_call_closes_the_connection(either: Connection) -> None:
    """If this fails the reply of a cancelled call is given to the next one."""
    call = asyncio.create_task(either.call("XREAD", "BLOCK", 0, "STREAMS", "s", "0"))
    await asyncio.sleep(0)
    other = either.send(("PING",))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert either.closed
    assert either.lost.done()
    for waiting in (other, either.call("PING"), either.send(("PING",))):
        with pytest.raises(ConnectionLostError):
            await waiting


async def test_no_answer_in_time_is_a_lost_connection(either: Connection) -> None:
    """If this fails a frozen peer holds a link for ever."""
    with pytest.raises(ConnectionLostError, match=r"within 0\.05 s"):
        await either.call("XREAD", "BLOCK", 0, "STREAMS", "s", "0", timeout_sec=0.05)
    await asyncio.wait_for(either.lost, 5)


async def test_large_replies_are_dropped_or_skimmed(either: Connection) -> None:
    """If this fails limits hold on one kind of connection only."""
    await either.call("XADD", "s", "7-1", "op", "PUT", "data", b"x" * 3_000_000)
    either.limit_reply(1000)
    skimming = asyncio.create_task(either.skim("XRANGE", "s", "-", "+", timeout_sec=5))
    await asyncio.sleep(0)
    after = either.send(("PING", "later"))
    assert await skimming == [[b"7-1", [b"op", b"PUT", b"data", Oversize(3_000_000)]]]
    assert await after == [b"later"]
    with pytest.raises(PeerReplyError, match="no such key"):
        await either.skim("XINFO", "STREAM", "nothing", timeout_sec=5)
    with pytest.raises(ReplyTooLargeError):
        await either.call("XRANGE", "s", "-", "+", timeout_sec=5)
    assert either.closed


async def test_flights_and_commands_are_counted(net: Net) -> None:
    """If this fails a test of round trips proves nothing."""
    connection = await net.connect()
    before = connection.flights, net.transport.flights, net.transport.commands
    await connection.call("PING")
    await connection.pipeline([("PING",), ("PING",)])
    await connection.skim("PING", timeout_sec=5)
    after = connection.flights, net.transport.flights, net.transport.commands
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3, 4]
    assert connection.commands == net.transport.commands


def test_replies_keep_their_order_and_take_their_time() -> None:
    """If this fails a shorter delay lets a reply overtake another."""

    async def scenario() -> None:
        net = Net()
        connection = await net.connect()
        net.a.execute("SET", "n", 0)
        loop = asyncio.get_running_loop()
        delays = iter([1.0, 0.2, 3.0, 0.0])
        net.transport.delay = lambda name, host: next(delays)
        began = loop.time()
        done: list[tuple[int, Any, float]] = []

        def note(number: int, future: asyncio.Future[list[Any]]) -> None:
            done.append((number, future.result(), loop.time() - began))

        for number in range(4):
            future = connection.send(("INCRBY", "n", 1))
            future.add_done_callback(partial(note, number))
        await asyncio.sleep(10)
        assert [(number, reply) for number, reply, _ in done] == [
            (number, [number + 1]) for number in range(4)
        ]
        assert [at for _, _, at in done] == pytest.approx([1.0, 1.0, 3.0, 3.0])

    run(scenario)


def test_a_cut_loses_lines_and_refuses_new_ones_until_healed() -> None:
    """If this fails a lost peer is not noticed."""

    async def scenario() -> None:
        net = Net()
        net.transport.delay = lambda name, host: 0.1
        connection = await net.connect()
        reading = connection.send(("XREAD", "BLOCK", 0, "STREAMS", "s", "0"))
        await asyncio.sleep(1)
        net.transport.cut("a")
        assert connection.closed
        with pytest.raises(ConnectionLostError, match="cut"):
            await reading
        with pytest.raises(ConnectionLostError, match="refused"):
            await net.connect()
        net.transport.heal("a")
        assert await (await net.connect()).call("PING") == b"PONG"
        assert net.a.execute("XADD", "s", "1-1", "f", "v") == b"1-1"

    run(scenario)


def test_commands_on_their_way_to_a_cut_have_run_or_not() -> None:
    """If this fails only one of the two things that can happen is ever tried."""

    async def scenario() -> set[Any]:
        net = Net()
        net.transport.delay = lambda name, host: 0.1
        seen: set[Any] = set()
        for _ in range(30):
            net.a.execute("SET", "n", 0)
            connection = await net.connect()
            connection.send(("INCRBY", "n", 1), ("INCRBY", "n", 1))
            connection.send(("INCRBY", "n", 1))
            net.transport.cut("a")
            net.transport.heal("a")
            await asyncio.sleep(1)
            seen.add(net.a.execute("GET", "n"))
        assert not net.transport._wires
        return seen

    assert run(scenario) == {b"0", b"1", b"2", b"3"}


def test_a_host_that_hangs_answers_when_healed() -> None:
    """If this fails a stopped process looks like one that is gone."""

    async def scenario() -> None:
        net = Net()
        connection = await net.connect()
        net.transport.hang("a")
        slow = connection.send(("INCRBY", "n", 1))
        with pytest.raises(ConnectionLostError, match="did not answer within 5 s"):
            await net.connect()
        lost = await asyncio.gather(connection.call("PING", timeout_sec=2), return_exceptions=True)
        assert isinstance(lost[0], ConnectionLostError)
        assert isinstance(slow.exception(), ConnectionLostError)
        other = asyncio.create_task(net.connect())
        await asyncio.sleep(1)
        assert not other.done()
        net.transport.heal("a")
        assert await (await other).call("PING") == b"PONG"

    run(scenario)


def test_a_read_that_blocks_while_its_host_hangs_ends_afterwards() -> None:
    """If this fails replies come out of a stopped process."""

    async def scenario() -> None:
        net = Net()
        connection = await net.connect()
        reading = connection.send(("XREAD", "BLOCK", 1000, "STREAMS", "s", "$"))
        await asyncio.sleep(0.5)
        net.transport.hang("a")
        net.a.execute("XADD", "s", "9-1", "f", "v")
        await asyncio.sleep(5)
        assert not reading.done()
        net.transport.heal("a")
        assert await reading == [[[b"s", [[b"9-1", [b"f", b"v"]]]]]]

    run(scenario)


async def test_who_cannot_be_reached_is_told_apart_from_who_refuses(net: Net) -> None:
    """If this fails a link waits for what cannot be mended, or gives up on what can."""
    with pytest.raises(ConnectionLostError, match="cannot be reached"):
        await net.connect("redis://nobody")
    with pytest.raises(PeerRefusedError):
        await net.connect("http://a")
    with pytest.raises(PeerRefusedError, match="DB index"):
        await net.connect("redis://a/3")
    for url in ("redis://b", "redis://:n0t@b", "redis://someone:s3cret@b"):
        with pytest.raises(PeerRefusedError) as raised:
            await net.connect(url)
        assert raised.value.credentials
        assert "n0t" not in str(raised.value)
    connection = await net.connect("redis://:s3cret@b")
    assert await connection.call("SET", "k", 1) == b"OK"
    with pytest.raises(KeyError):
        net.transport.cut("nobody")
