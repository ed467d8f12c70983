"""Makes one measurement in a process of its own, and prints it as JSON.

A process each, because gc thresholds, the event loop and a warm heap would leak from one
measurement into the next.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, Final

from fsm_replication.bench import contenders
from fsm_replication.bench.workload import PEER_ID
from fsm_replication.cli.runtime import run_async
from fsm_replication.items import SyncItem, content_hash
from fsm_replication.layout import Keys
from fsm_replication.stream import encode_fields
from fsm_replication.transport import RedisTransport

RATE_PER_SEC: Final = 500


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("drain", "hot", "straight", "latency", "write"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--target")
    parser.add_argument("--prefix", default="quiet", help="what the keys written begin with")
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--cli", action="store_true")
    parser.add_argument("--tree", action="store_true")
    args = parser.parse_args()
    work: Coroutine[Any, Any, Any]
    if args.what == "drain":
        work = contenders.drain(args.url)
    elif args.what == "hot":
        work = contenders.hot_path(args.url, args.target, args.events, tree=args.tree)
    elif args.what == "straight":
        work = contenders.straightforward(args.url)
    elif args.what == "write":
        work = _write(args.url, args.seconds, args.prefix)
    else:
        writer = [sys.executable, "-m", "fsm_replication.bench.one", "write", "--url", args.url]
        writer += ["--seconds", str(args.seconds)]
        work = contenders.latency(args.url, args.seconds, writer)
    result: Any = run_async(work) if args.cli else asyncio.run(work)
    if isinstance(result, contenders.Measure):
        result = asdict(result)
    sys.stdout.write(json.dumps(result) + "\n")


async def _write(url: str, seconds: float, prefix: str) -> None:
    """Write 500 events a second, each with the time of its XADD."""
    connection = await RedisTransport().connect(url, timeout_sec=10, name="writer")
    began = time.perf_counter()
    for number in range(int(RATE_PER_SEC * seconds)):
        wait = began + number / RATE_PER_SEC - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        at_ns = time.time_ns()
        content = json.dumps({"at": at_ns, "pad": "x" * 250}).encode()
        item = SyncItem(
            f"{prefix}.{number}", content, "json", content_hash(content), 1, at_ns // 10**6,
            False, PEER_ID,
        )  # fmt: skip
        await connection.call("XADD", Keys().stream, "*", *encode_fields(item), timeout_sec=10)
    connection.close()


if __name__ == "__main__":
    main()
