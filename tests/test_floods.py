"""G8: what a peer that streams a gigabyte at any stage of the exchange costs, in memory and in time.

Each test prints the row of docs/attacks.md.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Peer

from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine
from fsm_replication.testing.lying_proxy import Command, LyingProxy, Raw

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

CHILD = Path(__file__).parent / "flood_child.py"
MIB = 1024**2
GIB = 1024 * MIB
BATCH_BYTES = 64 * MIB
SECONDS = 3.0
_PIECE = MIB

# What is sent in the place of a reply: its head, and what follows until it is a gigabyte.
FLOODS = {
    "a string": (b"$1073741824\r\n", b"x"),
    "a status": (b"+", b"x"),
    "an error": (b"-ERR ", b"x"),
    "errors": (b"*999999\r\n", b"-E\r\n"),
    "empty arrays": (b"*999999\r\n", b"*0\r\n"),
    "numbers": (b"*999999\r\n", b":1000\r\n"),
    "nested arrays": (b"", b"*1\r\n"),
}
# By the command that is answered so: how much the process may grow. What a link holds by its limits
# is twice ``limits.batch_bytes``; all else needs next to nothing. Code that is loaded late counts too.
BESIDE = 32 * MIB
STAGES = {
    b"PING": BESIDE,
    b"HGETALL": BESIDE,
    b"XINFO": BESIDE,
    b"XREAD": BESIDE + 2 * BATCH_BYTES,
    b"GETRANGE": BESIDE,
    b"EXISTS": BESIDE,
}


def flood(stage: bytes, head: bytes, piece: bytes) -> Callable[[Command, Any], Any]:
    """Return a lie that answers one command with a gigabyte."""
    filling = piece * (_PIECE // len(piece))

    def lie(command: Command, reply: Any) -> Any:
        # In a transaction it would be a part of a reply, which the proxy has to hold as a whole.
        if command[0] != stage or (stage == b"XREAD" and b"BLOCK" not in command):
            return reply
        return Raw(head, filling, GIB // len(filling))

    return lie


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.decode())
async def test_a_flood_costs_little(
    stage: bytes, kind: str, new_redis_server: Callable[[], RedisServer]
) -> None:
    """If this fails a peer can end the process that reads it, or stop its event loop."""
    server, honest = new_redis_server(), new_redis_server()
    peer = Peer(honest, "honest")
    peer.write_marker()
    peer.send("first", b"1")
    async with (
        RedisSyncEngine(server.url, node_id="liar") as store,
        LyingProxy(server.port) as proxy,
    ):
        await store.put("k", b"v")
        said = {"peers": {"honest": honest.url, "liar": proxy.url}}
        proxy.tell(flood(stage, *FLOODS[kind]))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(CHILD),
            json.dumps(said),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        await asyncio.sleep(SECONDS)
        out, _ = await process.communicate(b"enough\n")
    peer.close()
    assert process.returncode == 0
    found = json.loads(out)
    sys.stdout.write(
        f"\n| {kind} for {stage.decode()} | {found['grown'] / MIB:.0f} MiB |"
        f" {found['longest'] * 1000:.0f} ms | {found['error'][:120]}\n"
    )
    assert proxy.times(stage), "nothing was flooded"
    assert not found["left"], "the link to the honest peer has noticed it"
    assert found["journal"] < MIB
    assert found["grown"] < STAGES[stage]
