"""Connections to Redis, against real servers and against peers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fsm_replication.errors import (
    ConnectionLostError,
    PeerRefusedError,
    PeerReplyError,
    ProtocolError,
    ReplyTooLargeError,
)
from fsm_replication.ports import Oversize
from fsm_replication.servers import RedisServer
from fsm_replication.transport import RedisConnection, RedisTransport

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[RedisConnection]:
    """Open a connection and close it."""
    connection = await RedisTransport().connect(url, timeout_sec=5, name="test")
    try:
        yield connection
    finally:
        connection.close()
        await connection.wait_closed()


@asynccontextmanager
async def impostor(answer: bytes, *, close: bool = False) -> AsyncIterator[str]:
    """A server that greets as Redis does and then answers with anything."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for reply in (b"+PONG\r\n", b"+OK\r\n"):
                await reader.read(4096)
                writer.write(reply)
            await reader.read(4096)
            writer.write(answer)
            await writer.drain()
            if not close:
                await reader.read()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_calls_pipelines_and_errors(redis_server: RedisServer) -> None:
    """If this fails replies are taken for those of other commands."""
    for url in (redis_server.url, redis_server.unix_url, f"{redis_server.url}/3"):
        async with connected(url) as connection:
            assert await connection.call("SET", "k", b"\x00\xff") == b"OK"
            replies = await connection.pipeline([("GET", "k"), ("HGET", "k", "f"), ("PING",)])
            assert (replies[0], replies[2]) == (b"\x00\xff", b"PONG")
            assert isinstance(replies[1], PeerReplyError)
            assert replies[1].code == "WRONGTYPE"
            with pytest.raises(PeerReplyError, match="WRONGTYPE"):
                await connection.call("HGET", "k", "f")
            assert await connection.pipeline([]) == []
            both = connection.send(("ECHO", "1")), connection.send(("ECHO", "2"))
            assert [await future for future in both] == [[b"1"], [b"2"]]


async def test_a_cancelled_call_closes_the_connection(redis_server: RedisServer) -> None:
    """If this fails the reply of a cancelled call is given to the next one."""
    async with connected(redis_server.url) as connection:
        call = asyncio.create_task(connection.call("BLPOP", "nothing", 0))
        await asyncio.sleep(0)
        other = connection.send(("PING",))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert connection.closed
        with pytest.raises(ConnectionLostError):
            await other
        with pytest.raises(ConnectionLostError):
            await connection.call("PING")


async def test_no_answer_in_time_is_a_lost_connection(redis_server: RedisServer) -> None:
    """If this fails a frozen peer holds a link for ever."""
    async with connected(redis_server.url) as connection:
        with pytest.raises(ConnectionLostError, match=r"within 0\.05 s"):
            await connection.call("BLPOP", "nothing", 0, timeout_sec=0.05)
        await asyncio.wait_for(connection.lost, 5)


async def test_a_reply_over_its_limit_is_dropped_while_it_arrives(
    redis_server: RedisServer,
) -> None:
    """If this fails a peer can make us hold whatever it likes."""
    async with connected(redis_server.url) as connection:
        await connection.call("SET", "k", b"x" * 5_000_000)
        connection.limit_reply(1_000_000)
        with pytest.raises(ReplyTooLargeError):
            await connection.call("GET", "k", timeout_sec=5)
        assert connection.closed
        assert connection.received_bytes < 3_000_000


async def test_skimming_keeps_what_is_short(redis_server: RedisServer) -> None:
    """If this fails an entry too large to hold cannot be passed over."""
    async with connected(redis_server.url) as connection:
        await connection.call("XADD", "s", "7-1", "op", "PUT", "data", b"x" * 3_000_000)
        connection.limit_reply(1000)
        before = connection.send(("PING",))
        skimming = asyncio.create_task(connection.skim("XRANGE", "s", "-", "+", timeout_sec=5))
        await asyncio.sleep(0)
        after = connection.send(("ECHO", "later"))
        assert await before == [b"PONG"]
        assert await skimming == [[b"7-1", [b"op", b"PUT", b"data", Oversize(3_000_000)]]]
        assert await after == [b"later"]
        with pytest.raises(PeerReplyError, match="no such key"):
            await connection.skim("XINFO", "STREAM", "nothing", timeout_sec=5)
        assert await connection.skim("XRANGE", "nothing", "-", "+", timeout_sec=5) == []
        assert await connection.skim("GET", "nothing", timeout_sec=5) is None
        assert await connection.skim("STRLEN", "nothing", timeout_sec=5) == 0
        assert await connection.skim("TYPE", "s", timeout_sec=5) == b"stream"


@pytest.mark.parametrize("skim", [False, True])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"*x\r\n", b"\xff" * 9000])
async def test_garbage_is_a_protocol_error(answer: bytes, skim: bool) -> None:
    """If this fails a port that is not Redis crashes a worker."""
    async with impostor(answer) as url, connected(url) as connection:
        call = connection.skim if skim else connection.call
        with pytest.raises(ProtocolError):
            await call("PING", timeout_sec=5)
        assert connection.closed


@pytest.mark.parametrize("head", [b"*300000000\r\n", b"*1\r\n*300000000\r\n", b"~99999999\r\n"])
@pytest.mark.parametrize("skim", [False, True])
async def test_an_array_of_any_declared_length_is_not_made(head: bytes, skim: bool) -> None:
    """If this fails twelve bytes stop the event loop for seconds, while a list is made and unmade."""
    async with impostor(head + b":1\r\n") as url, connected(url) as connection:
        connection.limit_reply(10_000_000)
        call = connection.skim if skim else connection.call
        with pytest.raises((ProtocolError, ReplyTooLargeError)):
            await call("XINFO", "STREAM", "s", timeout_sec=5)
        assert connection.closed


@pytest.mark.parametrize(
    "flood", [b"x" * 1_000_000, b"*100000\r\n" + b"-E\r\n" * 100_000, b"+" + b"x" * 1_000_000]
)
@pytest.mark.parametrize(
    "command", [("PING",), ("EXISTS", "k"), ("GETRANGE", "k", 0, 7), ("CLIENT", "SETNAME", "n")]
)
async def test_a_small_reply_has_a_limit_of_its_own(flood: bytes, command: tuple[Any, ...]) -> None:
    """If this fails a peer's memory is ours before any limit is in force."""
    async with impostor(flood) as url, connected(url) as connection:
        with pytest.raises((ProtocolError, ReplyTooLargeError)):
            await connection.call(*command, timeout_sec=5)
        assert connection.closed


@pytest.mark.parametrize("answer", [b"$100\r\nhalf", b""])
async def test_a_reply_cut_in_the_middle_is_a_lost_connection(answer: bytes) -> None:
    """If this fails half a reply is waited for although the other side has gone."""
    async with impostor(answer, close=True) as url, connected(url) as connection:
        with pytest.raises(ConnectionLostError):
            await connection.call("GET", "k", timeout_sec=5)


async def test_data_that_nobody_asked_for_is_a_protocol_error() -> None:
    """If this fails a reply that comes too early is given to the next command."""
    async with impostor(b"+A\r\n+B\r\n") as url, connected(url) as connection:
        assert await connection.call("PING", timeout_sec=5) == b"A" or connection.closed
        await asyncio.wait_for(connection.lost, 5)
        with pytest.raises(ProtocolError):
            await connection.call("PING", timeout_sec=5)


@pytest.mark.server
async def test_who_cannot_be_reached_is_told_apart_from_who_refuses() -> None:
    """If this fails a link waits for what cannot be mended, or gives up on what can."""
    transport = RedisTransport()
    with pytest.raises(ConnectionLostError, match="cannot be reached"):
        await transport.connect("redis://127.0.0.1:1", timeout_sec=5, name="t")
    with pytest.raises(PeerRefusedError):
        await transport.connect("http://127.0.0.1", timeout_sec=5, name="t")
    with RedisServer(config=[("requirepass", "s3cret")]) as server:
        with pytest.raises(PeerRefusedError) as raised:
            await transport.connect(server.url, timeout_sec=5, name="t")
        assert raised.value.credentials
        wrong = server.url.replace("redis://", "redis://:n0t@")
        with pytest.raises(PeerRefusedError) as raised:
            await transport.connect(wrong, timeout_sec=5, name="t")
        assert "n0t" not in str(raised.value)
        async with connected(server.url.replace("redis://", "redis://default:s3cret@")) as well:
            assert await well.call("PING") == b"PONG"
        with pytest.raises(PeerRefusedError, match="DB index"):
            await transport.connect(
                server.url.replace("redis://", "redis://:s3cret@") + "/999", timeout_sec=5, name="t"
            )


@pytest.mark.server
async def test_a_reader_needs_read_commands_only() -> None:
    """If this fails the access that the README tells to grant is not enough."""
    acl = "user reader on >pw ~* +@read +@connection +multi +exec"
    with RedisServer(config=[("user", *acl.split()[1:])]) as server:
        url = server.url.replace("redis://", "redis://reader:pw@")
        async with connected(url) as connection:
            replies = await connection.pipeline(
                [("MULTI",), ("XREAD", "STREAMS", "s", "0"), ("XINFO", "STREAM", "s"), ("EXEC",)]
            )
            assert replies[-1][0] is None
            for command in (("HGETALL", "m"), ("SCAN", "0"), ("STRLEN", "k"), ("EXISTS", "s")):
                await connection.call(*command)
            with pytest.raises(PeerReplyError, match="NOPERM"):
                await connection.call("SET", "k", "v")


# Wrong ports --------------------------------------------------------------------------------------


@asynccontextmanager
async def stranger(answer: bytes | None) -> AsyncIterator[int]:
    """A server that is no Redis; it answers once, or with None says nothing and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(4096)
            writer.write(answer or b"")
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
ALERT = b"\x15\x03\x01\x00\x02\x02\x46"


@pytest.mark.parametrize(
    ("scheme", "answer", "told"),
    [
        ("redis", HTTP, r"does not speak the Redis protocol: it answers as an HTTP server"),
        ("redis", b"SSH-2.0-OpenSSH_9\r\n", r"it answers as an SSH server: check the port"),
        ("redis", ALERT, r"it answers in TLS, for which the URL begins with rediss://"),
        ("redis", None, r"before it answered anything: .* begins with rediss://"),
        ("rediss", HTTP, r"does not answer in TLS: .* begins with redis://"),
        ("rediss", b"-ERR unknown\r\n", r"does not answer in TLS: .* begins with redis://"),
        ("rediss", None, r"does not answer in TLS: .* begins with redis://"),
    ],
)
async def test_who_is_no_redis_is_told_as_what_it_is(
    scheme: str, answer: bytes | None, told: str
) -> None:
    """If this fails a wrong port or scheme in a URL must be guessed from a wrong byte."""
    async with stranger(answer) as port:
        with pytest.raises((ConnectionLostError, ProtocolError), match=told):
            await RedisTransport().connect(
                f"{scheme}://127.0.0.1:{port}", timeout_sec=5, name="test"
            )


async def test_tls_spoken_to_a_redis_without_it_is_told_as_that(redis_server: RedisServer) -> None:
    """If this fails who writes rediss:// for redis:// is told that the server is silent."""
    url = redis_server.url.replace("redis://", "rediss://")
    with pytest.raises(ConnectionLostError, match=r"does not answer in TLS: .* with redis://"):
        await RedisTransport().connect(url, timeout_sec=1, name="test")


async def test_a_url_without_a_host_is_refused() -> None:
    """If this fails a store is opened at whatever Redis this machine happens to run."""
    for url in ("redis://", "redis://:6379/0"):
        with pytest.raises(PeerRefusedError, match="names no host"):
            await RedisTransport().connect(url, timeout_sec=1, name="test")
