"""G8: memory per link stays under twice ``limits.batch_bytes`` plus one entry, whatever peers send.

Peak memory is that of a process of its own, as the kernel counts it: that includes what parsers and
sockets hold, which an allocator of Python's would not tell.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Peer

from fsm_replication.items import SyncItem, content_hash
from fsm_replication.layout import Keys
from fsm_replication.servers import RedisServer
from fsm_replication.stream import encode_fields

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")

CHILD = Path(__file__).parent / "memory_child.py"
MIB = 1024**2
# What a process needs beside what it holds of peers: code that is loaded late, the event loop's and
# the allocator's own.
BESIDE = 24 * MIB
AT_MS = 1_700_000_000_000


async def read(
    server: RedisServer,
    folder: Path,
    names: Sequence[str],
    limits: dict[str, int],
    *,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Have a process of its own read these peers; returns what it tells."""
    said = {
        "url": server.url,
        "peers": names,
        "limits": limits,
        "seconds": seconds,
        "folder": str(folder),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), json.dumps(said), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    sys.stdout.write(f"\n{len(names)} peers, grown by {found['grown'] / MIB:.1f} MiB: {limits}\n")
    return found


def fill(
    server: RedisServer, name: str, entries: Iterable[list[bytes]], flight: int = 5000
) -> None:
    """Write a node's marker and its stream, under a prefix of its own."""
    keys = Keys(f"{name}:")
    peer = Peer(server, name)
    marker = peer.marker()
    peer.close()
    with redis.Redis(port=server.port) as client:
        client.hset(keys.marker, mapping=marker)
        pipe: Any = client.pipeline(transaction=False)
        for fields in entries:
            pipe.execute_command("XADD", keys.stream, "*", *fields)
            if len(pipe) >= flight:
                pipe.execute()
        pipe.execute_command("XADD", keys.stream, "*", *entry("last", b""))
        pipe.execute()


def entry(key: str, content: bytes) -> list[bytes]:
    """Return the fields of a put."""
    item = SyncItem(key, content, "binary", content_hash(content), 1, AT_MS, False, "o")
    return encode_fields(item, content)


@pytest.mark.timeout(1800)
async def test_five_peers_far_behind_fit_into_the_bound(
    new_redis_server: Callable[[], RedisServer], tmp_path: Path, full: bool
) -> None:
    """If this fails a node that was away for long dies of what it missed."""
    server = new_redis_server()
    # Far more than the bound in either case, but no more than the server can hold.
    events, size = (1_000_000, 200) if full else (20_000, 1000)
    rng = random.Random(3)
    some = [entry(f"k{number}", rng.randbytes(size)) for number in range(4000)]
    names = ["p", "q", "r", "s", "t"]
    for name in names:
        fill(server, name, (some[number % len(some)] for number in range(events)))
    batch = 2 * MIB
    found = await read(
        server, tmp_path, names, {"batch_bytes": batch, "payload_bytes": MIB}, seconds=0.001
    )
    assert found["read"] == dict.fromkeys(names, events + 1)
    # The cursors are from a time when there was no stream: nobody can tell what came first.
    assert (found["letters"], found["gaps"]) == ([], len(names))
    assert found["grown"] < len(names) * (2 * batch + len(b"".join(some[0]))) + BESIDE


@pytest.mark.timeout(300)
async def test_entries_of_16_mib_fit_into_the_bound(
    new_redis_server: Callable[[], RedisServer], tmp_path: Path
) -> None:
    """If this fails a few large files of a peer end the node that reads them."""
    server = new_redis_server()
    size, batch = 16 * MIB - 1000, 64 * MIB
    rng = random.Random(4)
    fill(server, "p", (entry(f"k{number}", rng.randbytes(size)) for number in range(14)), 1)
    found = await read(
        server, tmp_path, ["p"], {"batch_bytes": batch, "payload_bytes": 16 * MIB}, seconds=0.05
    )
    assert found["read"] == {"p": 15}
    assert found["letters"] == []
    assert found["grown"] < 2 * batch + 16 * MIB + BESIDE


async def test_an_entry_that_is_too_large_is_never_held(
    new_redis_server: Callable[[], RedisServer], tmp_path: Path
) -> None:
    """If this fails one entry of any size takes as much memory as it has bytes."""
    server = new_redis_server()
    batch, huge = 4 * MIB, 100 * MIB
    rng = random.Random(5)
    contents = [rng.randbytes(1000), rng.randbytes(huge), rng.randbytes(2 * MIB)]
    fill(server, "p", (entry(f"k{n}", content) for n, content in enumerate(contents)), 1)
    found = await read(server, tmp_path, ["p"], {"batch_bytes": batch, "payload_bytes": 2 * MIB})
    assert [reason for reason, _ in found["letters"]] == ["size"]
    assert found["letters"][0][1] >= huge
    assert found["gaps"] == 1
    assert found["grown"] < 2 * batch + 2 * MIB + BESIDE
