"""Replays a history into the first node, and sees whether every node ends with the same files."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from fsm_replication.demo.history import Commit, History
from fsm_replication.demo.mesh import Mesh, Node
from fsm_replication.errors import WatcherLagged

__all__ = ("Progress", "Verdict", "replay")

# How long the nodes may make no progress at all before the demo gives up on agreement.
STALLED_SEC: Final = 30.0
POLL_SEC: Final = 0.05
SAMPLES_MAX: Final = 200_000


@dataclass(slots=True)
class Progress:
    """How far the replay has come; read by whoever shows it."""

    commits_total: int = 0
    commits: int = 0
    puts: int = 0
    deletes: int = 0
    content_bytes: int = 0
    phase: str = "starting"
    began: float = 0.0
    delays_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))

    @property
    def changes(self) -> int:
        """Puts and deletes so far."""
        return self.puts + self.deletes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it. ``differing`` counts, per node, the keys that are not as they must be."""

    history: str
    nodes: int
    topology: str
    commits: int
    puts: int
    deletes: int
    content_bytes: int
    skipped: int
    files: int
    seconds: float
    changes_per_sec: float
    delay_p50_ms: float | None
    delay_p99_ms: float | None
    differing: dict[str, int]

    @property
    def agreed(self) -> bool:
        """Whether every node holds exactly the files of the last commit."""
        return not any(self.differing.values())

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"agreed": self.agreed, **plain}


async def replay(mesh: Mesh, history: History, topology: str, progress: Progress) -> Verdict:
    """Write the whole history at the first node, wait for the others, and compare."""
    writer, *others = mesh.nodes
    progress.commits_total = await history.count()
    written: dict[tuple[str, int], float] = {}
    watchers = [node.engine.changes() for node in others]
    async with asyncio.TaskGroup() as group:
        listening = [
            group.create_task(_listen(watcher, written, progress.delays_ms)) for watcher in watchers
        ]
        progress.phase = "replaying"
        progress.began = time.perf_counter()
        versions: dict[str, int] = {}
        # Closed here and not by whoever collects garbage: it holds child processes.
        async with aclosing(history.commits()) as commits:
            async for commit in commits:
                await _write(writer, commit, versions, written, progress)
        progress.phase = "waiting for all nodes to agree"
        expected = await history.final_files()
        differing = await _agree(mesh.nodes, expected)
        seconds = time.perf_counter() - progress.began
        progress.phase = "comparing"
        for watcher in watchers:
            watcher.close()
        for task in listening:
            await task
    delays = sorted(progress.delays_ms)
    return Verdict(
        history=history.name,
        nodes=len(mesh.nodes),
        topology=topology,
        commits=progress.commits,
        puts=progress.puts,
        deletes=progress.deletes,
        content_bytes=progress.content_bytes,
        skipped=history.skipped,
        files=len(expected),
        seconds=round(seconds, 3),
        changes_per_sec=round(progress.changes / max(seconds, 1e-9), 1),
        delay_p50_ms=_percentile(delays, 50),
        delay_p99_ms=_percentile(delays, 99),
        differing=differing,
    )


def _percentile(ordered: list[float], percent: int) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)


async def _write(
    node: Node,
    commit: Commit,
    versions: dict[str, int],
    written: dict[tuple[str, int], float],
    progress: Progress,
) -> None:
    puts = [(change.key, change.content) for change in commit.changes if change.content is not None]
    gone = [change.key for change in commit.changes if change.content is None]
    now = time.perf_counter()
    # Noted before the write: a fast node may have it before this one is told that it is written.
    for key, _ in puts:
        versions[key] = versions.get(key, 0) + 1
        written[key, versions[key]] = now
    await node.store.put_many(puts)
    for key in gone:
        version = versions.get(key, 0) + 1
        written[key, version] = time.perf_counter()
        if await node.store.delete(key):
            versions[key] = version
            progress.deletes += 1
    progress.puts += len(puts)
    progress.content_bytes += sum(len(content) for _, content in puts)
    progress.commits += 1


async def _listen(
    watcher: Any, written: dict[tuple[str, int], float], delays_ms: deque[float]
) -> None:
    while True:
        try:
            async for item in watcher:
                at = written.get((item.key, item.version))
                if at is not None:
                    delays_ms.append((time.perf_counter() - at) * 1000)
        except WatcherLagged:
            continue  # Only samples are lost.
        return


async def _agree(nodes: list[Node], expected: dict[str, bytes]) -> dict[str, int]:
    """Compare until all nodes agree, or nothing has moved for a while."""
    moved, since = _activity(nodes), time.perf_counter()
    while True:
        await _quiet(nodes)
        differing = {node.node_id: _differing(await node.holds(), expected) for node in nodes}
        if not any(differing.values()):
            return differing
        activity = _activity(nodes)
        if activity != moved:
            moved, since = activity, time.perf_counter()
        elif time.perf_counter() - since > STALLED_SEC:
            return differing
        await asyncio.sleep(POLL_SEC)


def _differing(held: dict[str, bytes], expected: dict[str, bytes]) -> int:
    return sum(held.get(key) != expected.get(key) for key in held.keys() | expected.keys())


def _activity(nodes: list[Node]) -> tuple[int, ...]:
    return tuple(
        peer.events_read + peer.events_applied
        for node in nodes
        for peer in node.engine.health_check().peers
    )


async def _quiet(nodes: list[Node]) -> None:
    """Wait until nothing was read for a moment: comparing while events flow only slows them."""
    before: tuple[int, ...] | None = None
    while (now := _activity(nodes)) != before:
        before = now
        await asyncio.sleep(POLL_SEC)
