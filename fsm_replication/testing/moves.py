"""Every move that the tables allow, and which of them nothing can take.

Campaigns and model checks fail if there is a move that none of their runs has taken: then they
prove less than they seem to.
"""

from __future__ import annotations

from typing import Final

from fsm_replication.tables import TABLES

__all__ = ("EXEMPT", "Move", "moves_of_the_tables")

Move = tuple[str, str, str, str]
"""Machine, trigger, source and dest."""

EXEMPT: Final[dict[Move, str]] = {
    ("link", "give_up", "Backoff", "Failed"): (
        "it takes six errors in a minute that nobody expected, and no run of fates finds any"
    ),
}
"""Moves that nothing can take, and why."""


def moves_of_the_tables() -> set[Move]:
    """Return every move that the tables allow."""
    return {
        (table.name, row.trigger, str(source), str(row.dest))
        for table in TABLES
        for row in table.rows
        for source in row.sources
    }
