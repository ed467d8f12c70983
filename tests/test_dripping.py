"""Peers that answer, but hardly: what waits for them is given up, and nobody waits behind them."""

from __future__ import annotations

import asyncio
import random

import pytest

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    ReconnectConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import ConnectionLostError
from fsm_replication.limiter import SLOT_PATIENCE_SEC, PrioritySlot
from fsm_replication.ports import LEAST_BYTES_PER_SEC
from fsm_replication.servers import RedisServer
from fsm_replication.tables import PeerState
from fsm_replication.testing import FaultProxy, LocalMesh, LoopClock, run, topology
from fsm_replication.testing.sim_transport import SimConnection
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.cold_path import PATIENCE_SEC

TIMEOUT_SEC = 5.0
START_MS = 1_700_000_000_000
# Just enough for a reply to be waited for.
JUST_ENOUGH = LEAST_BYTES_PER_SEC + 200
MIB = 1024**2


def settings(*, hot: bool = True) -> Settings:
    """Return short intervals."""
    return Settings(
        hot_path=HotPathConfig(enabled=hot, block_timeout=1.0),
        cold_path=ColdPathConfig(interval_sec=10.0),
        reconnect=ReconnectConfig(longest=2.0),
        tombstones=TombstonesConfig(ttl=3600, grace=60),
        startup=StartupConfig(when_no_peer="run"),
    )


def mesh_of(names: str, *, hot: bool = True) -> LocalMesh:
    """Return nodes of which the first reads all others."""
    return LocalMesh(names, topology("star", names), settings=settings(hot=hot))


def now() -> float:
    """Return the time of the simulation."""
    return asyncio.get_running_loop().time()


async def ask(bytes_per_sec: int, size: int, how: str) -> float:
    """Ask a peer that answers at a rate for a string; returns how long that took."""
    mesh = mesh_of("ra")
    transport = mesh.nodes["r"].transport
    mesh.servers["a"].execute("XADD", "s", "1-0", "f", b"x" * size)
    connection = await transport.connect("redis://a", timeout_sec=TIMEOUT_SEC, name="test")
    transport.drip("a", bytes_per_sec)
    began = now()
    try:
        assert await _ask(connection, how)
        return now() - began
    except ConnectionLostError as error:
        if "too slowly" not in str(error) or not connection.closed:
            raise
        raise TimeoutError(now() - began) from error
    finally:
        connection.close()


async def _ask(connection: SimConnection, how: str) -> object:
    if how == "skim":
        return await connection.skim("XRANGE", "s", "-", "+", timeout_sec=TIMEOUT_SEC)
    return await connection.call("XRANGE", "s", "-", "+", timeout_sec=TIMEOUT_SEC)


@pytest.mark.parametrize("how", ["call", "skim"])
@pytest.mark.parametrize("bytes_per_sec", [1, 1000, LEAST_BYTES_PER_SEC - 200])
def test_a_reply_that_drips_is_given_up(bytes_per_sec: int, how: str) -> None:
    """If this fails one byte every few seconds holds whoever waits for a reply for ever."""

    async def main() -> None:
        with pytest.raises(TimeoutError) as given_up:
            await ask(bytes_per_sec, 3 * MIB, how)
        assert given_up.value.args[0] <= 2 * TIMEOUT_SEC + 1

    run(main, start_ms=START_MS)


@pytest.mark.parametrize("how", ["call", "skim"])
@pytest.mark.parametrize("bytes_per_sec", [JUST_ENOUGH, 8000])
def test_a_slow_line_brings_a_large_reply(bytes_per_sec: int, how: str) -> None:
    """If this fails a line of 64 kbit/s never brings more than it can within one timeout."""

    async def main() -> None:
        took = await ask(bytes_per_sec, 3 * MIB, how)
        assert took == pytest.approx(3 * MIB / bytes_per_sec, rel=0.01)

    run(main, start_ms=START_MS)


def test_a_greeting_that_drips_is_given_up() -> None:
    """If this fails a link is in Connecting for as long as its peer likes."""

    async def main() -> None:
        transport = mesh_of("ra").nodes["r"].transport
        transport.drip("a", 1)
        with pytest.raises(ConnectionLostError, match="within 2 s"):
            await transport.connect("redis://:secret@a", timeout_sec=2, name="test")
        assert now() == pytest.approx(2, abs=0.1)

    run(main, start_ms=START_MS)


async def test_a_handshake_that_drips_is_given_up() -> None:
    """If this fails whoever sends a TLS record byte by byte keeps a link in Connecting."""
    over = asyncio.Event()

    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # The head of a handshake record of 16,000 bytes, and then its bytes.
            writer.write(bytes((22, 3, 3, 0x3E, 0x80, 2, 0, 0x3E, 0x7C)))
            while not over.is_set():
                writer.write(b"\0")
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server:
        url = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(ConnectionLostError, match="does not answer in TLS"):
            await RedisTransport().connect(url, timeout_sec=0.2, name="test")
        over.set()


async def test_a_real_peer_that_drips_is_given_up(redis_server: RedisServer) -> None:
    """If this fails it is only in the simulator that a dripping peer is noticed."""
    async with FaultProxy(redis_server.port) as proxy:
        connection = await RedisTransport().connect(proxy.url, timeout_sec=5, name="test")
        await connection.call("SET", "k", b"x" * 10_000, timeout_sec=5)
        proxy.drip(pause_sec=0.01)
        with pytest.raises(ConnectionLostError, match="too slowly"):
            await connection.call("GET", "k", timeout_sec=0.2)
        await connection.wait_closed()
        # Silence is told as that, and not as slowness.
        await proxy.heal()
        connection = await RedisTransport().connect(proxy.url, timeout_sec=5, name="test")
        proxy.silence()
        with pytest.raises(ConnectionLostError, match=r"no answer within 0\.1 s"):
            await connection.call("GET", "k", timeout_sec=0.1)
        await connection.wait_closed()


@pytest.mark.parametrize("where", ["blocked at the head", "in bulk"])
def test_a_link_leaves_a_peer_that_drips(where: str) -> None:
    """If this fails a link is Tailing for ever though nothing more ever comes."""

    async def main() -> None:
        mesh = mesh_of("ra")
        await mesh.start("r")
        engine = running(mesh)
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=60)
        if where == "in bulk":
            await engine.pause("a")
            await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=60)
        for number in range(100):
            mesh.nodes["a"].store.put(f"k{number}", random.Random(number).randbytes(10_000))
        mesh.nodes["r"].transport.drip("a", 100)
        if where == "in bulk":
            await engine.resume("a")
        began = now()
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=3600)
        assert now() - began < 4 * TIMEOUT_SEC
        mesh.nodes["r"].transport.heal("a")
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=120)
        await mesh.close()

    run(main, start_ms=START_MS)


def running(mesh: LocalMesh) -> ReplicationEngine:
    """Return the reader's engine."""
    engine = mesh.nodes["r"].engine
    assert engine is not None
    return engine


def fill(mesh: LocalMesh, name: str) -> None:
    """Let a node hold a megabyte that cannot be compressed."""
    rng = random.Random(1)
    for number in range(12):
        mesh.nodes[name].store.put(f"{name}{number}", rng.randbytes(100_000))


def test_a_copy_that_gets_nowhere_lets_the_next_one_go() -> None:
    """If this fails a peer that drips keeps all others from being copied for minutes."""

    async def main() -> None:
        mesh = mesh_of("rab")
        fill(mesh, "a")
        mesh.nodes["b"].store.put("b", b"1")
        transport = mesh.nodes["r"].transport
        transport.cut("b")
        await mesh.start("r")
        engine = running(mesh)
        await engine.wait_for_state(PeerState.BOOTSTRAPPING, peer_id="a", timeout=60)
        transport.drip("a", JUST_ENOUGH)
        transport.heal("b")
        began = now()
        await engine.wait_for_state(PeerState.TAILING, peer_id="b", timeout=3600)
        assert now() - began < SLOT_PATIENCE_SEC + 10
        assert engine.peers["a"] is PeerState.BOOTSTRAPPING, "it goes on beside the other"
        transport.heal("a")
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=7200)
        await mesh.close()

    run(main, start_ms=START_MS)


def test_a_peer_that_drips_does_not_hold_up_the_cold_path() -> None:
    """If this fails one peer's part of a cycle lasts as long as it likes, and the others have none."""

    async def main() -> None:
        mesh = mesh_of("rab", hot=False)
        fill(mesh, "a")
        mesh.nodes["b"].store.put("b", b"1")
        mesh.nodes["r"].transport.drip("a", 4300)
        await mesh.start("r")
        began = now()
        while not [item for item in await mesh.nodes["r"].store.get_many(["b"]) if item]:
            await asyncio.sleep(1)
            assert now() - began < 120, "five minutes would be all of a's part"
        # What the first cycle left is fetched by later ones.
        mesh.nodes["r"].transport.heal("a")
        names = [f"a{number}" for number in range(12)]
        while None in await mesh.nodes["r"].store.get_many(names):
            await asyncio.sleep(10)
            assert now() - began < 3600
        await mesh.close()

    run(main, start_ms=START_MS)


def test_a_part_that_gets_nowhere_is_given_up() -> None:
    """If this fails a repair that somebody asked for is held by one reply."""

    async def main() -> None:
        mesh = mesh_of("ra", hot=False)
        mesh.nodes["a"].store.put("k", random.Random(1).randbytes(4 * MIB))
        await mesh.start("r")
        engine = running(mesh)
        await engine.wait_for_state(PeerState.STANDBY, peer_id="a", timeout=60)
        mesh.nodes["r"].transport.drip("a", JUST_ENOUGH)
        began = now()
        stats = await engine.repair("a")
        assert now() - began < 2 * PATIENCE_SEC + 20
        assert "hardly answered" in stats.problems[0]
        await mesh.close()

    run(main, start_ms=START_MS)


def test_a_slot_is_kept_by_who_gets_on() -> None:
    """If this fails several copies run at once though each of them makes progress."""

    async def main() -> None:
        slot, copied = PrioritySlot(LoopClock()), 0
        await slot.acquire("slow", lambda: 1, lambda: copied)
        waiting = asyncio.create_task(slot.acquire("next", lambda: 1))
        for _ in range(10):
            await asyncio.sleep(SLOT_PATIENCE_SEC - 1)
            copied += 1
            assert not waiting.done()
        await asyncio.sleep(2 * SLOT_PATIENCE_SEC)
        assert waiting.done()
        # What was overtaken does not end the turn of the one that came after it.
        slot.release("slow")
        third = asyncio.create_task(slot.acquire("third", lambda: 1))
        await asyncio.sleep(1)
        assert not third.done()
        slot.release("next")
        await third

    run(main)
