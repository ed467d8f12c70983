"""The proxy that breaks connections: each fault is what it says, and nothing of it is left over."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from conftest import until

from fsm_replication.errors import ConnectionLostError, PeerReplyError
from fsm_replication.servers import RedisServer
from fsm_replication.testing import FaultProxy
from fsm_replication.transport import RedisConnection, RedisTransport

TIMEOUT_SEC = 5.0


@pytest_asyncio.fixture
async def proxy(redis_server: RedisServer, no_tasks_left: None) -> AsyncIterator[FaultProxy]:
    """A proxy before an empty server."""
    async with FaultProxy(redis_server.port) as made:
        yield made


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[RedisConnection]:
    """Open a connection and close it."""
    connection = await RedisTransport().connect(url, timeout_sec=TIMEOUT_SEC, name="test")
    try:
        yield connection
    finally:
        connection.close()
        await connection.wait_closed()


async def test_what_is_not_broken_goes_through(proxy: FaultProxy) -> None:
    """If this fails the proxy breaks what it was not asked to break."""
    large = random.Random(1).randbytes(3_000_000)
    async with connected(proxy.url) as one, connected(proxy.url) as other:
        assert await one.call("SET", "k", large, timeout_sec=TIMEOUT_SEC) == b"OK"
        assert await other.call("GET", "k", timeout_sec=TIMEOUT_SEC) == large
        commands = [("PING",), ("LRANGE", "none", 0, -1), ("GET", "none"), ("MGET", "x", "y")]
        replies = await one.pipeline(commands * 200, timeout_sec=TIMEOUT_SEC)
        assert replies == [b"PONG", [], None, [None, None]] * 200
        assert proxy.connections == 2
    await until(lambda: proxy.connections == 0, "the lines to end with their clients")


async def test_a_refused_port_comes_back(proxy: FaultProxy) -> None:
    """If this fails a dead port answers, or cannot be brought back to life."""
    for _ in range(3):
        async with connected(proxy.url) as connection:
            await proxy.refuse()
            await asyncio.wait_for(connection.lost, TIMEOUT_SEC)
            with pytest.raises(ConnectionLostError, match="cannot be reached"):
                await RedisTransport().connect(proxy.url, timeout_sec=TIMEOUT_SEC, name="t")
        await proxy.heal()
        async with connected(proxy.url) as connection:
            assert await connection.call("PING") == b"PONG"


async def test_a_moved_proxy_is_elsewhere(proxy: FaultProxy) -> None:
    """If this fails a peer's move cannot be tested."""
    old = proxy.url
    new = await proxy.move()
    assert new == proxy.url != old
    with pytest.raises(ConnectionLostError):
        await RedisTransport().connect(old, timeout_sec=TIMEOUT_SEC, name="t")
    async with connected(new) as connection:
        assert await connection.call("PING") == b"PONG"


async def test_a_silent_proxy_neither_answers_nor_ends(proxy: FaultProxy) -> None:
    """If this fails a black hole is told from a peer by a refusal, or loses what waits in it."""
    async with connected(proxy.url) as connection:
        proxy.silence()
        waiting = connection.send(("ECHO", "late"))
        with pytest.raises(ConnectionLostError, match="did not answer"):
            await RedisTransport().connect(proxy.url, timeout_sec=0.1, name="t")
        assert not connection.closed
        assert not waiting.done()
        await proxy.heal()
        assert await asyncio.wait_for(waiting, TIMEOUT_SEC) == [b"late"]


@pytest.mark.parametrize("direction", ["to_server_sec", "to_client_sec"])
async def test_a_delay_moves_everything_by_the_same_time(proxy: FaultProxy, direction: str) -> None:
    """If this fails a slow line also has little bandwidth, and a test tests something else."""
    async with connected(proxy.url) as connection:
        proxy.delay(**{direction: 0.2})
        began = time.monotonic()
        calls = []
        for number in range(10):
            calls.append(connection.send(("ECHO", str(number))))
            await asyncio.sleep(0.01)
        replies = [await asyncio.wait_for(call, TIMEOUT_SEC) for call in calls]
        took = time.monotonic() - began
        assert replies == [[b"%d" % number] for number in range(10)]
        assert 0.2 <= took < 1.5, "ten calls wait side by side and not one after the other"


@pytest.mark.parametrize("after_bytes", [1, 7, 1000, 300_000])
async def test_a_cut_comes_in_the_middle_of_a_reply(proxy: FaultProxy, after_bytes: int) -> None:
    """If this fails the hardest place for a line to break is not tested."""
    received: list[int] = []
    async with connected(proxy.url) as connection:
        await connection.call("SET", "k", b"x" * 200_000)
        before = connection.received_bytes
        proxy.cut(after_bytes)
        calls = [("GET", "k")] * 3
        with pytest.raises(ConnectionLostError, match="closed the connection"):
            await connection.pipeline(calls, timeout_sec=TIMEOUT_SEC)
        received.append(connection.received_bytes - before)
    assert received[0] <= after_bytes
    assert received[0] >= min(after_bytes - 1, 100_000)
    await proxy.heal()
    async with connected(proxy.url) as connection:
        assert len(await connection.call("GET", "k", timeout_sec=TIMEOUT_SEC)) == 200_000


def codes(replies: Sequence[object]) -> list[object]:
    """Return replies with the code of an error in place of it."""
    return [reply.code if isinstance(reply, PeerReplyError) else reply for reply in replies]


async def test_errors_stand_in_the_place_of_replies(proxy: FaultProxy) -> None:
    """If this fails an injected error is taken for the reply of another command."""
    async with connected(proxy.url) as connection:
        proxy.answer("READONLY not here", ["set", "get"])
        commands = [("ECHO", "1"), ("GET", "k"), ("SET", "k", "v"), ("ECHO", "2"), ("EXISTS", "k")]
        for _ in range(50):
            replies = await connection.pipeline(commands, timeout_sec=TIMEOUT_SEC)
            assert codes(replies) == [b"1", "READONLY", "READONLY", b"2", 0]
        await proxy.heal()
        assert await connection.call("SET", "k", "v") == b"OK"


async def test_an_error_spoils_a_transaction(proxy: FaultProxy) -> None:
    """If this fails a transaction with an error in it looks as no Redis would show it."""
    transaction = [("MULTI",), ("GET", "k"), ("ECHO", "1"), ("EXEC",), ("ECHO", "2")]
    async with connected(proxy.url) as connection:
        proxy.answer("BUSY a script", ["GET"])
        replies = await connection.pipeline(transaction, timeout_sec=TIMEOUT_SEC)
        assert codes(replies) == [b"OK", "BUSY", b"QUEUED", "EXECABORT", b"2"]
        proxy.answer("LOADING wait")
        replies = await connection.pipeline(transaction, timeout_sec=TIMEOUT_SEC)
        assert codes(replies) == ["LOADING"] * 5
        await proxy.heal()
        replies = await connection.pipeline(transaction, timeout_sec=TIMEOUT_SEC)
        assert codes(replies) == [b"OK", b"QUEUED", b"QUEUED", [None, b"1"], b"2"]


async def test_an_error_ends_a_transaction_that_began_before(proxy: FaultProxy) -> None:
    """If this fails the server is left in a transaction that the client thinks is over."""
    async with connected(proxy.url) as connection:
        assert await connection.call("MULTI") == b"OK"
        assert await connection.call("GET", "k") == b"QUEUED"
        proxy.answer("LOADING wait")
        assert codes(await connection.pipeline([("EXEC",)])) == ["LOADING"]
        await proxy.heal()
        assert await connection.call("GET", "k") is None


async def test_requests_are_told(redis_server: RedisServer, no_tasks_left: None) -> None:
    """If this fails a test cannot see what a link asks for."""
    seen: list[Sequence[bytes]] = []
    async with FaultProxy(redis_server.port, on_request=seen.append) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"PING inline\r\n*2\r\n$4\r\nEC")
        await writer.drain()
        await reader.readexactly(len(b"$6\r\ninline\r\n"))
        writer.write(b"HO\r\n$4\r\na\r\nb\r\n")
        assert await reader.readexactly(10) == b"$4\r\na\r\nb\r\n"
        writer.close()
    assert seen == [[b"PING", b"inline"], [b"ECHO", b"a\r\nb"]]


async def test_a_proxy_before_no_server_ends_connections(no_tasks_left: None) -> None:
    """If this fails a client of a proxy whose server is down waits for ever."""
    async with FaultProxy(1) as proxy:
        for _ in range(3):
            with pytest.raises(ConnectionLostError):
                await RedisTransport().connect(proxy.url, timeout_sec=TIMEOUT_SEC, name="t")


async def test_stopping_leaves_nothing(redis_server: RedisServer, no_tasks_left: None) -> None:
    """If this fails a suite of many proxies runs out of something."""
    proxy = await FaultProxy(redis_server.port).start()
    connections = [
        await RedisTransport().connect(proxy.url, timeout_sec=TIMEOUT_SEC, name="t")
        for _ in range(5)
    ]
    proxy.delay(10, 10)
    waiting = [connection.send(("PING",)) for connection in connections[:3]]
    proxy.silence()
    await asyncio.sleep(0)
    await proxy.stop()
    await proxy.stop()
    for connection in connections:
        await asyncio.wait_for(connection.wait_closed(), TIMEOUT_SEC)
    for future in waiting:
        with pytest.raises(ConnectionLostError):
            await future
    assert proxy.connections == 0
