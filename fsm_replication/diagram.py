"""Draws the tables as Mermaid state diagrams.

The text is made from the tables alone, so a diagram can say nothing that the machine does not do.
A group is drawn as a box; where a trigger leads from every state of a group to the same place, one
arrow leaves the box instead of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from fsm_replication.tables import TABLES, Row, Table

__all__ = ("file_name", "mermaid", "reference", "render_all")

_HEAD = "%% Generated from fsm_replication/tables by `fsm-replication diagram`; do not edit."


def file_name(table: Table) -> str:
    """Return the name of the file that holds a table's diagram."""
    return f"{table.name}.mmd"


def mermaid(table: Table) -> str:
    """Return a Mermaid ``stateDiagram-v2`` of one table."""
    lines = [_HEAD, "stateDiagram-v2", "    direction TB", f"    [*] --> {table.initial}"]
    for name, members in table.groups.items():
        inside = {state for state in table.states if state in members}
        lines.append(f"    state {name} {{")
        lines += [f"        {line}" for line in _arrows(table, inside)]
        lines.append("    }")
    lines += [f"    {line}" for line in _arrows(table, None)]
    lines += [f"    {state} --> [*]" for state in table.states if state in table.final]
    return "\n".join(lines) + "\n"


def _arrows(table: Table, inside: set[StrEnum] | None) -> Iterator[str]:
    """Yield the arrows within one group, or those that are within none.

    Triggers that lead the same way share an arrow: drawn side by side, one would cover the other.
    """
    labels: dict[tuple[str, StrEnum], list[str]] = {}
    for row in table.rows:
        for source in _sources(table, row):
            within = _group_around(table, source, row.dest)
            if (within is None) == (inside is None) and (inside is None or row.dest in inside):
                labels.setdefault((source, row.dest), []).append(row.label())
    for (source, dest), told in labels.items():
        yield f"{source} --> {dest} : {'<br/>'.join(told)}"


def _sources(table: Table, row: Row) -> list[str]:
    """Return the sources of a row, a whole group as its box."""
    left = list(row.sources)
    boxes = []
    for name, members in table.groups.items():
        if members <= set(left) and row.dest not in members:
            boxes.append(name)
            left = [state for state in left if state not in members]
    return [*boxes, *map(str, left)]


def _group_around(table: Table, source: str, dest: StrEnum) -> str | None:
    for name, members in table.groups.items():
        if dest in members and source in {str(state) for state in members}:
            return name
    return None


def reference(table: Table) -> str:
    """Return a Markdown table of a machine's rows, for the documentation."""
    lines = ["| trigger | from | to | effect | why |", "| --- | --- | --- | --- | --- |"]
    for row in table.rows:
        trigger = f"{row.trigger} [{row.guard}]" if row.guard else row.trigger
        sources = ", ".join(row.sources)
        effects = ", ".join(row.effects)
        lines.append(f"| {trigger} | {sources} | {row.dest} | {effects} | {row.why} |")
    return "\n".join(lines) + "\n"


def render_all() -> dict[str, str]:
    """Return every generated file by name: a diagram per machine, and a page of them all."""
    files = {file_name(table): mermaid(table) for table in TABLES}
    page = ["# The machines", "", "Generated from `fsm_replication/tables`; do not edit.", ""]
    for table in TABLES:
        page += [f"## {table.name.capitalize()}", "", "```mermaid", mermaid(table).rstrip(), "```"]
        page += ["", reference(table)]
    files["README.md"] = "\n".join(page).rstrip() + "\n"
    return files
