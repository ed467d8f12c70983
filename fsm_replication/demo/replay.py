"""Replays a history into the first node, and sees whether every node ends with the same files."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from fsm_replication.demo.history import Commit, History
from fsm_replication.demo.mesh import Mesh, Node
from fsm_replication.demo.outage import Outage, OutageReport
from fsm_replication.errors import WatcherLagged
from fsm_replication.tables import PeerState

__all__ = ("Progress", "Verdict", "replay")

# How long the nodes may make no progress at all before the demo gives up on agreement.
STALLED_SEC: Final = 30.0
POLL_SEC: Final = 0.05
SAMPLES_MAX: Final = 200_000
NOTES_KEPT: Final = 8


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
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=NOTES_KEPT))
    delays_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))

    def note(self, text: str) -> None:
        """Tell something that just happened, with the time since the replay began."""
        self.notes.append(f"{time.perf_counter() - self.began:6.2f} s  {text}")

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
    outage: OutageReport | None = None

    @property
    def agreed(self) -> bool:
        """Whether every node holds exactly the files of the last commit."""
        return not any(self.differing.values())

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"agreed": self.agreed, **asdict(self)}


async def replay(
    mesh: Mesh,
    history: History,
    topology: str,
    progress: Progress,
    outage: Outage | None = None,
) -> Verdict:
    """Write the whole history at the first node, wait for the others, and compare.

    With an ``outage`` the last node is cut off in between.
    """
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
        cutter = None if outage is None else _Cutter(mesh, outage, progress)
        watching = [] if cutter is None else cutter.watch(group)
        # Closed here and not by whoever collects garbage: it holds child processes.
        async with aclosing(history.commits()) as commits:
            async for commit in commits:
                if cutter is not None:
                    await cutter.at(progress.commits)
                await _write(writer, commit, versions, written, progress)
        if cutter is not None:
            await cutter.at(progress.commits_total)
        progress.phase = "waiting for all nodes to agree"
        expected = await history.final_files()
        differing = await _agree(mesh.nodes, expected)
        seconds = time.perf_counter() - progress.began
        progress.phase = "comparing"
        for task in watching:
            task.cancel()
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
        outage=None if cutter is None else await cutter.report(),
    )


class _Cutter:
    """Cuts the last node off and lets it back in, as the replay goes on."""

    def __init__(self, mesh: Mesh, outage: Outage, progress: Progress) -> None:
        self._mesh = mesh
        self._node = mesh.nodes[-1]
        self._progress = progress
        self._begin = int(progress.commits_total * outage.begin)
        self._end = max(self._begin + 1, int(progress.commits_total * outage.end))
        self._entries_left = outage.entries_left
        self._cut_at: float | None = None
        self._changes_before = 0
        self._gaps_before: set[int] = set()
        self._back_ms = 0
        self._done: OutageReport | None = None

    async def at(self, commit: int) -> None:
        """Cut or mend, if it is time."""
        if self._done is None and self._cut_at is None and commit >= self._begin:
            # A node that has read nothing yet would miss nothing that it could notice.
            for peer_id in self._node.engine.peers:
                await self._node.engine.wait_for_state(
                    PeerState.TAILING, peer_id=peer_id, timeout=STALLED_SEC
                )
            self._mesh.cut_off(self._node)
            self._cut_at = time.perf_counter()
            self._changes_before = self._progress.changes
            self._progress.note(f"{self._node.node_id} is cut off from all others")
        elif self._done is None and self._cut_at is not None and commit >= self._end:
            missed = self._progress.changes - self._changes_before
            removed = await self._mesh.trim(self._entries_left)
            # What links did before, as all do that begin, is not the outage's doing.
            self._gaps_before = {row.id for row in await self._node.engine.ledger()}
            self._back_ms = time.time_ns() // 1_000_000
            self._mesh.rejoin(self._node)
            seconds = time.perf_counter() - self._cut_at
            self._progress.note(
                f"{self._node.node_id} is back; it missed {missed:,} changes, and the streams were"
                f" trimmed to {self._entries_left} entries"
            )
            self._done = OutageReport(
                self._node.node_id, round(seconds, 3), missed, removed, (), ()
            )

    def watch(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Note what the links of the node go through."""
        return [group.create_task(self._watch(peer)) for peer in self._node.engine.peers]

    async def _watch(self, peer_id: str) -> None:
        async for move in self._node.engine.watch_state(peer_id):
            if move.source is not None and self._cut_at is not None:
                name = f"{self._node.node_id} reads {peer_id}"
                self._progress.note(f"{name}: {move.source} → {move.dest}")

    async def report(self) -> OutageReport | None:
        """Return what came of it."""
        if self._done is None:
            return None
        engine = self._node.engine
        went = {
            move.machine.removeprefix("link:")
            for move in engine.journal
            if move.trigger == "bootstrap" and move.at_ms >= self._back_ms
        }
        gaps = [row for row in await engine.ledger() if row.id not in self._gaps_before]
        healed = sorted({row.healed_by or "nothing" for row in gaps})
        return replace(self._done, bootstrapped=tuple(sorted(went)), healed_by=tuple(healed))


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
