"""Parts of tables that several commands print."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from fsm_replication.dead_letters import RetryStats
from fsm_replication.printable import printable
from fsm_replication.workers.cold_path import RepairStats

__all__ = ("stats_table", "utc_text")


def stats_table(stats: RepairStats | RetryStats, width: int | None = None) -> Table:
    """Return what a repair or a retry came to, each problem cut to ``width`` characters."""
    table = Table.grid(padding=(0, 2))
    for name, value in asdict(stats).items():
        if name != "problems":
            table.add_row(Text(name.replace("_", " "), style="dim"), f"{value:,}")
    for problem in stats.problems:
        table.add_row(Text("problem", style="red"), Text(printable(problem, width)))
    return table


def utc_text(at_ms: int) -> str:
    """Return a time in UTC, to the second; one that no calendar reaches, in milliseconds.

    ``at_ms`` is in milliseconds since the epoch, and may be whatever a peer has sent.
    """
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{at_ms} ms"
