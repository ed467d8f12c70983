"""Runs every fault against real Redis servers and prints what became of it.

``python -m fsm_replication.testing.faults`` takes about a minute; ``--help`` says what else it can
do. It needs a ``redis-server`` and ``rich`` (the extra ``fsm_replication[cli]``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fsm_replication.errors import ReplicationError
from fsm_replication.testing.fault_suite import FAULTS, Fault, FaultResult, run_fault

__all__ = ("main", "table")


def table(results: Sequence[FaultResult]) -> Table:
    """Return what a person wants to see."""
    shown = Table(
        "fault", "noticed after", "tails again after", "read again", "copied", "lost",
        "died unread", "changes/s",
    )  # fmt: skip
    for result in results:
        shown.add_row(
            result.fault,
            "stays connected" if result.noticed_sec is None else f"{result.noticed_sec:.2f} s",
            "never" if result.tailing_sec is None else f"{result.tailing_sec:.2f} s",
            "unknown" if result.read_again is None else str(result.read_again),
            str(result.copied),
            str(result.lost),
            str(result.gone),
            f"{result.changes_per_sec:.0f}",
            style="" if result.well else "red",
        )
    return shown


async def _run(faults: Sequence[Fault], longer_sec: float, seed: int) -> list[FaultResult]:
    results: list[FaultResult] = []
    progress = Console(stderr=True)
    for fault in faults:
        progress.print(f"{len(results) + 1} of {len(faults)}: {fault.name}", highlight=False)
        results.append(await run_fault(fault, longer_sec=longer_sec, seed=seed))
    return results


def main(args: Sequence[str] | None = None) -> int:
    """Run what the arguments say; returns 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m fsm_replication.testing.faults",
        description="Let a peer fail in every way, and check that nothing is lost.",
    )
    parser.add_argument("name", nargs="*", help="only faults with this in their name")
    parser.add_argument("--longer", type=float, default=0.0, metavar="SEC",
                        help="let each fault last so many seconds more")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="choose what is written")
    parser.add_argument("--json", action="store_true", help="print plain data")
    options = parser.parse_args(args)
    names: list[str] = options.name
    chosen = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    if not chosen:
        parser.error(f"there is no such fault; there are {', '.join(f.name for f in FAULTS)}")
    # Failures are what this is about; the table tells of them.
    logging.getLogger("fsm_replication").setLevel(logging.CRITICAL)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        results = asyncio.run(_run(chosen, options.longer, options.seed))
    except (ReplicationError, TimeoutError) as error:
        text = str(error) or "the nodes did not come to tail each other: is this machine too busy?"
        Console(stderr=True).print(text, style="red", markup=False)
        return 1
    if options.json:
        console.print_json(json.dumps([result.as_json() for result in results]))
    else:
        console.print(table(results))
    for result in results:
        if result.problem:
            Console(stderr=True).print(f"{result.fault}: {result.problem}", style="red")
    return 0 if all(result.well for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
