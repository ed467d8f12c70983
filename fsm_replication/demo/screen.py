"""What the demo shows: live progress, and the verdict."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fsm_replication.demo.history import DirectoryHistory, History, open_history
from fsm_replication.demo.mesh import Mesh, Topology
from fsm_replication.demo.outage import Outage
from fsm_replication.demo.replay import Progress, Verdict, replay
from fsm_replication.errors import UsageError
from fsm_replication.health import PeerHealth
from fsm_replication.printable import printable
from fsm_replication.tables import PeerState

__all__ = ("run_demo",)

REFRESH_PER_SEC: Final = 8
_COLOURS: Final = {
    PeerState.TAILING: "green",
    PeerState.CATCHING_UP: "yellow",
    PeerState.BOOTSTRAPPING: "magenta",
}


async def run_demo(
    path: Path, nodes: int, topology: Topology, *, as_json: bool, outage: bool = False
) -> bool:
    """Run the demo; True if all nodes agree in the end.

    :raises UsageError: if there is no node that could be cut off.
    """
    if outage and nodes < 2:
        raise UsageError("an outage needs at least two nodes")
    planned = Outage() if outage else None
    history = open_history(path)
    progress = Progress()
    errors = Console(stderr=True)
    if not as_json and isinstance(history, DirectoryHistory):
        why = f"{path}: {history.reason}; the files of the directory are replayed instead"
        errors.print(Text(printable(why)))
    async with Mesh(nodes, topology) as mesh:
        if as_json or not errors.is_terminal:
            verdict = await replay(mesh, history, str(topology), progress, planned)
        else:
            verdict = await _live(mesh, history, topology, progress, errors, planned)
    if as_json:
        sys.stdout.write(json.dumps(verdict.as_json()) + "\n")
    else:
        Console().print(_verdict(verdict))
    return verdict.agreed


async def _live(
    mesh: Mesh,
    history: History,
    topology: Topology,
    progress: Progress,
    console: Console,
    outage: Outage | None,
) -> Verdict:
    rates = _Rates()
    with Live(console=console, auto_refresh=False, transient=False) as live:

        async def show() -> None:
            while True:
                live.update(_screen(mesh, progress, topology, rates), refresh=True)
                await asyncio.sleep(1 / REFRESH_PER_SEC)

        showing = asyncio.create_task(show())
        try:
            return await replay(mesh, history, str(topology), progress, outage)
        finally:
            showing.cancel()
            await asyncio.wait((showing,))
            progress.phase = "done" if progress.phase == "comparing" else progress.phase
            live.update(_screen(mesh, progress, topology, rates), refresh=True)


class _Rates:
    """Events per second of each link, over about a second."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, int, float]] = {}

    def of(self, node: str, peer: PeerHealth) -> float:
        now = time.perf_counter()
        at, events, rate = self._seen.get((node, peer.node_id), (now, peer.events_read, 0.0))
        if now - at >= 0.5:
            rate = (peer.events_read - events) / (now - at)
            at, events = now, peer.events_read
        self._seen[node, peer.node_id] = (at, events, rate)
        return rate


def _screen(mesh: Mesh, progress: Progress, topology: Topology, rates: _Rates) -> RenderableType:
    table = Table(
        "node", "engine", "reads", "link", "events", "applied", "events/s", "lag ms",
        title=f"{len(mesh.nodes)} nodes in a {topology}",
    )  # fmt: skip
    for column in table.columns[4:]:
        column.justify = "right"
    for node in mesh.nodes:
        health = node.engine.health_check()
        first = True
        for peer in health.peers:
            table.add_row(
                Text(printable(node.node_id) if first else ""),
                str(health.state) if first else "",
                Text(printable(peer.node_id)),
                Text(str(peer.state), style=_COLOURS.get(peer.state, "red")),
                f"{peer.events_read:,}",
                f"{peer.events_applied:,}",
                f"{rates.of(node.node_id, peer):,.0f}",
                lag_text(peer.lag_ms),
            )
            first = False
        if not health.peers:
            table.add_row(Text(printable(node.node_id)), str(health.state), "nobody")
        table.add_section()
    seconds = time.perf_counter() - progress.began if progress.began else 0.0
    rate = progress.changes / seconds if seconds else 0.0
    said = (
        f"{progress.phase}: {progress.commits:,} of {progress.commits_total:,} commits,"
        f" {progress.changes:,} changes ({rate:,.0f}/s)"
    )
    bar = ProgressBar(total=max(1, progress.commits_total), completed=progress.commits, width=60)
    # A bar alone ends without a new line.
    line = Table.grid()
    line.add_row(bar)
    notes = [Text(printable(note), style="dim") for note in progress.notes]
    return Group(table, Text(printable(said)), line, *notes)


def lag_text(lag_ms: int | None) -> str:
    """Return what stands in the column for the lag."""
    return "unknown" if lag_ms is None else str(lag_ms)


def _verdict(verdict: Verdict) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    size = f"{verdict.content_bytes / 1e6:,.1f} MB"
    rows: list[tuple[str, str]] = [
        ("replayed", verdict.history),
        ("commits", f"{verdict.commits:,}"),
        ("changes", f"{verdict.puts:,} puts, {verdict.deletes:,} deletes, {size}"),
        ("nodes", f"{verdict.nodes} in a {verdict.topology}"),
        ("took", f"{verdict.seconds:.2f} s, {verdict.changes_per_sec:,.0f} changes/s"),
    ]  # fmt: skip
    if verdict.delay_p50_ms is not None:
        rows.append(
            ("write to arrival", f"p50 {verdict.delay_p50_ms} ms, p99 {verdict.delay_p99_ms} ms")
        )
    if verdict.outage is not None:
        told = verdict.outage
        links = ", ".join(told.bootstrapped) or "no peer"
        rows.append(
            (
                "outage",
                (
                    f"{told.node} was cut off for {told.seconds:.2f} s and missed"
                    f" {told.changes_missed:,} changes; {told.entries_trimmed:,} stream entries were"
                    f" trimmed; it bootstrapped from {links}; gaps healed by"
                    f" {', '.join(told.healed_by) or 'nothing: there were none'}"
                ),
            )
        )
    if verdict.skipped:
        rows.append(("left out", f"{verdict.skipped:,} files that cannot be items"))
    for name, text in rows:
        table.add_row(Text(name, style="dim"), Text(printable(text)))
    if verdict.agreed:
        end = Text(
            f"All {verdict.nodes} nodes hold exactly the {verdict.files:,} files of the last"
            " commit, byte for byte.",
            style="bold green",
        )
    else:
        wrong = ", ".join(
            f"{printable(node)}: {count:,}" for node, count in verdict.differing.items()
        )
        end = Text(f"The nodes do not agree. Files that differ: {wrong}.", style="bold red")
    return Group(table, end)
