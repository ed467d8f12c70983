"""Repairs, shows differences and explains keys from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fsm_replication.cli.ask import asked_peers, check_peer
from fsm_replication.cli.cursors import opened_cursors
from fsm_replication.cli.node import open_store
from fsm_replication.cli.tables import utc_text
from fsm_replication.config import (
    ColdPathConfig,
    CursorConfig,
    HotPathConfig,
    ReplicationConfig,
    StartupConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import (
    AlreadyRunningError,
    CursorStoreError,
    ReplicationError,
    UsageError,
)
from fsm_replication.ports import GapRow
from fsm_replication.printable import printable
from fsm_replication.tables import PeerState
from fsm_replication.workers.cold_path import RepairStats
from fsm_replication.workers.explain import Explanation, explain_key

__all__ = (
    "cold_only",
    "explain_node",
    "explanation_table",
    "print_ledger",
    "repair_node",
    "repairing_engine",
    "show_differences",
)

_DECIDED: Final = tuple(
    state
    for state in PeerState
    if state not in (PeerState.CREATED, PeerState.CONNECTING, PeerState.RESUMING)
)


def cold_only(config: ReplicationConfig, *, sqlite_path: str | None = None) -> ReplicationConfig:
    """Return the configuration of an engine that does what it is asked for, and needs no peer."""
    settings = config.settings.model_copy(
        update={
            "hot_path": HotPathConfig(enabled=False),
            "cold_path": ColdPathConfig(enabled=False),
            "startup": StartupConfig(timeout=config.settings.startup.timeout, when_no_peer="run"),
        }
    )
    update: dict[str, Any] = {"settings": settings}
    if sqlite_path is not None:
        update["cursor"] = CursorConfig(sqlite_path=sqlite_path)
    return config.model_copy(update=update)


@asynccontextmanager
async def repairing_engine(
    config: ReplicationConfig, peers: Sequence[str]
) -> AsyncIterator[ReplicationEngine]:
    """Run an engine that only repairs, and wait until these links are up or cannot be."""
    if config.store is None or config.store.kind != "redis":
        raise UsageError("only a node whose store.kind is redis holds anything while it is stopped")
    async with open_store(config) as store, ReplicationEngine(config, store) as engine:
        for peer_id in peers:
            await engine.wait_for_state(*_DECIDED, peer_id=peer_id)
        yield engine


def _chosen(config: ReplicationConfig, peer: str | None) -> list[str]:
    if peer is None:
        return [one.node_id for one in config.peers]
    check_peer(config, peer)
    return [peer]


async def repair_node(
    config: ReplicationConfig,
    peer: str | None,
    *,
    force: bool,
    accept_stale: bool,
    reject_stale: bool,
    console: Console,
) -> RepairStats:
    """Repair a node that is not running, with a progress bar for each peer.

    :raises AlreadyRunningError: if an engine runs on the same cursor file.
    """
    peers = _chosen(config, peer)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("keys"),
        TimeElapsedColumn(),
    )
    try:
        async with repairing_engine(cold_only(config), peers) as engine:
            with Progress(*columns, console=console) as bars:
                tasks = {
                    name: bars.add_task(escape(f"from {printable(name)}"), total=None)
                    for name in peers
                }

                def show(name: str, differing: int, fetched: int) -> None:
                    bars.update(tasks[name], total=differing, completed=fetched)

                stats = await engine.repair(
                    peer,
                    force=force,
                    accept_stale=accept_stale,
                    reject_stale=reject_stale,
                    on_progress=show,
                )
                for task in tasks.values():
                    if bars.tasks[task].total is None:
                        bars.update(task, total=0, completed=0)
            return stats
    except AlreadyRunningError as error:
        raise AlreadyRunningError(
            f"{error}. A repair changes what the running engine holds: stop it first, or call"
            " engine.repair() in it; --dry-run works beside it",
            path=error.path,
        ) from None


async def show_differences(config: ReplicationConfig, peer: str | None, *, as_json: bool) -> bool:
    """Print every key that differs; nothing is changed. True if all peers could be compared."""
    well = True
    console, errors = Console(highlight=False), Console(stderr=True)
    # The cursor file belongs to the engine that may be running; a comparison needs none.
    quiet = cold_only(config, sqlite_path=":memory:")
    async with repairing_engine(quiet, _chosen(config, peer)) as engine:
        for name in _chosen(config, peer):
            newer = {"peer": 0, "local": 0}
            size = 0
            try:
                async for found in engine.differences(name):
                    newer[found.newer] += 1
                    size += found.size
                    if as_json:
                        line = {
                            "peer": name, "key": found.key, "newer": found.newer,
                            "bytes": found.size,
                        }  # fmt: skip
                        sys.stdout.write(json.dumps(line) + "\n")
                        continue
                    side = f"newer at {name}" if found.newer == "peer" else "newer here"
                    cost = f", {found.size:,} bytes" if found.newer == "peer" else ""
                    line_of = printable(f"{found.key}  {side}{cost}")
                    console.print(Text(line_of), soft_wrap=True)
            except ReplicationError as error:
                well = False
                errors.print(Text(printable(f"{name}: {error}"), style="red"))
                continue
            if not as_json:
                total = (
                    f"{name}: {newer['peer'] + newer['local']:,} keys differ;"
                    f" {newer['peer']:,} are newer there, to fetch them would take {size:,} bytes;"
                    f" {newer['local']:,} are newer here"
                )
                console.print(Text(printable(total), style="bold"), soft_wrap=True)
    return well


async def explain_node(config: ReplicationConfig, key: str) -> Explanation:
    """Ask the node's store and each peer for one key; works beside a running node."""
    async with open_store(config) as store, asked_peers(config, store.resolver.name) as peers:
        return await explain_key(
            key,
            store,
            peers,
            timeout_sec=config.settings.timeouts.command,
            excepted_by=await _excepted_by(config, key),
        )


async def _excepted_by(config: ReplicationConfig, key: str) -> list[str]:
    """Return the peers with which the last agreement leaves a key out, as far as it is on disk."""
    try:
        async with opened_cursors(config, read_only=True) as cursors:
            records = {peer.node_id: await cursors.load(peer.node_id) for peer in config.peers}
    except CursorStoreError:
        return []  # No engine has run here yet, or its file is another's affair.
    agreements = {peer_id: record.agreement for peer_id, record in records.items()}
    return [peer_id for peer_id, made in agreements.items() if made and key in made.exceptions]


def explanation_table(made: Explanation) -> Table:
    """Return an explanation for a person."""
    table = Table("where", "holds", title=Text(printable(made.key)))
    table.add_row("here", Text(printable(str(made.held or "nothing"))))
    if made.arrival is not None:
        at = utc_text(made.arrival.at_ms)
        came = f"came from {made.arrival.peer_id} by {made.arrival.path} at {at} UTC"
        table.add_row("", Text(printable(came)))
    for peer in made.peers:
        table.add_row(Text(printable(peer.peer_id)), Text(printable(str(peer))))
    return table


def print_ledger(rows: Sequence[GapRow], console: Console) -> None:
    """Print each peer's gaps, with a line that sums them up."""
    if not rows:
        console.print("no gap was ever found")
    for peer_id in dict.fromkeys(row.peer_id for row in rows):
        mine = [row for row in rows if row.peer_id == peer_id]
        summary = printable(f"{peer_id}: {_summary(mine)}")
        console.print(Text(summary, style="bold"), soft_wrap=True)
        for row in mine:
            healed = (
                "not healed"
                if row.healed_at_ms is None
                else f"healed by {row.healed_by} at {utc_text(row.healed_at_ms)} UTC"
            )
            count = "unknown" if row.missed is None else f"{row.missed:,}"
            what = "dead letters dropped" if row.kind == "dropped" else "entries"
            line = f"  {utc_text(row.found_at_ms)} UTC  {count} {what}, {healed}: {row.reason}"
            console.print(Text(printable(line)), soft_wrap=True)


def _summary(rows: Sequence[GapRow]) -> str:
    gaps = [row for row in rows if row.kind == "gap"]
    dropped = sum(row.missed or 0 for row in rows if row.kind == "dropped")
    known = sum(row.missed or 0 for row in gaps)
    unknown = sum(row.missed is None for row in gaps)
    missed = f"{known:,}" + (f" and an unknown number in {unknown}" if unknown else "")
    told = f"gaps: {len(gaps)}, entries missed by the stream: {missed}"
    if dropped:
        told += f", dead letters dropped: {dropped:,}"
    still_open = sum(row.healed_at_ms is None for row in rows)
    if still_open:
        return f"{told}, {still_open} not healed"
    last = max(rows, key=lambda row: row.healed_at_ms or 0)
    return f"{told}, healed by {last.healed_by} at {utc_text(last.healed_at_ms or 0)} UTC"
