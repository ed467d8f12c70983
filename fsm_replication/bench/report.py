"""Runs the rounds and says what came of them."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.table import Table

from fsm_replication.bench.workload import EVENTS, KEYS, fill
from fsm_replication.servers import RedisServer, describe_redis_server, find_redis_server
from fsm_replication.transport import RedisTransport

__all__ = ("BenchReport", "Line", "run_bench")

# What is measured in a round: title, arguments for the process, and whether Redis is written.
CONTENDERS: Final = (
    ("drain", ("drain",)),
    ("hot path into memory, embedded", ("hot",)),
    ("hot path into memory, command line", ("hot", "--cli")),
    ("hot path into Redis, embedded", ("hot", "--redis")),
    ("hot path into Redis, command line", ("hot", "--redis", "--cli")),
    ("hot path into Redis with its tree, embedded", ("hot", "--redis", "--tree")),
    ("hot path into Redis with its tree, command line", ("hot", "--redis", "--tree", "--cli")),
    ("straightforward, into a dict", ("straight",)),
)


@dataclass(slots=True)
class Line:
    """One contender over all rounds."""

    title: str
    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the medians and the spread."""
        return {
            "title": self.title,
            "events_per_sec": round(statistics.median(self.rates)),
            "events_per_sec_min": round(min(self.rates)),
            "events_per_sec_max": round(max(self.rates)),
            "ratio_to_drain": round(statistics.median(self.ratios), 3),
            "cpu_seconds": round(statistics.median(self.cpu_seconds), 2),
        }


@dataclass(slots=True)
class BenchReport:
    """All lines, and the delays from XADD to applied in milliseconds, a pair a round."""

    rounds: int
    events: int
    server: str
    lines: list[Line]
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "events": self.events,
            "keys": KEYS,
            "rounds": self.rounds,
            "server": self.server,
            "lines": [line.as_json() for line in self.lines],
            "latency_at_500_per_sec_ms": {
                "p50": round(statistics.median(self.p50_ms), 2),
                "p99": round(statistics.median(self.p99_ms), 2),
                "p99_worst_round": round(max(self.p99_ms), 2),
            },
        }

    def tables(self) -> list[Table]:
        """Return what a person wants to see."""
        throughput = Table(
            "contender", "events/s", "min .. max", "of the drain", "CPU s",
            title=f"{self.events:,} events, median of {self.rounds} rounds, {self.server}",
        )  # fmt: skip
        for line in self.lines:
            row = line.as_json()
            throughput.add_row(
                line.title,
                f"{row['events_per_sec']:,}",
                f"{row['events_per_sec_min']:,} .. {row['events_per_sec_max']:,}",
                f"{row['ratio_to_drain']:.2f}",
                f"{row['cpu_seconds']:.2f}",
            )
        delay = self.as_json()["latency_at_500_per_sec_ms"]
        quiet = Table("from XADD to applied, at 500 events/s", "ms")
        quiet.add_row("p50, median of rounds", f"{delay['p50']:.2f}")
        quiet.add_row("p99, median of rounds", f"{delay['p99']:.2f}")
        quiet.add_row("p99, worst round", f"{delay['p99_worst_round']:.2f}")
        return [throughput, quiet]


async def run_bench(
    rounds: int, events: int = EVENTS, *, note: Callable[[str], None] = lambda _text: None
) -> BenchReport:
    """Start two servers, fill one, and measure round by round.

    :raises RedisServerNotFoundError: if there is no Redis server to be found.
    """
    async with RedisServer() as source, RedisServer() as target:
        note(f"filling a stream with {events:,} events")
        transport = RedisTransport()
        connection = await transport.connect(source.url, timeout_sec=10, name="bench")
        await fill(connection, events)
        connection.close()
        server = describe_redis_server(find_redis_server())
        report = BenchReport(rounds, events, server, [Line(title) for title, _ in CONTENDERS])
        for number in range(rounds):
            await _round(report, number, source.url, target.url, note)
        return report


async def _round(
    report: BenchReport, number: int, url: str, target_url: str, note: Callable[[str], None]
) -> None:
    best = 0.0
    for line, (title, args) in zip(report.lines, CONTENDERS, strict=True):
        note(f"round {number + 1} of {report.rounds}: {title}")
        plain = [arg for arg in args if arg != "--redis"]
        if "--redis" in args:
            plain += ["--target", target_url]
        measure = await _measure([*plain, "--url", url, "--events", str(report.events)])
        rate = measure["events"] / measure["seconds"]
        best = best or rate
        line.rates.append(rate)
        line.ratios.append(rate / best)
        line.cpu_seconds.append(measure["cpu_seconds"])
    note(f"round {number + 1} of {report.rounds}: delay of a quiet link")
    async with RedisServer() as quiet:
        connection = await RedisTransport().connect(quiet.url, timeout_sec=10, name="bench")
        await fill(connection, 0)
        connection.close()
        delays = sorted(await _measure(["latency", "--url", quiet.url]))
    report.p50_ms.append(delays[len(delays) // 2])
    report.p99_ms.append(delays[len(delays) * 99 // 100])


async def _measure(args: Sequence[str]) -> Any:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fsm_replication.bench.one", *args, stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 300)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"measuring {' '.join(args)} failed")
    return json.loads(output)
