"""Check all tables and all combinations, and print what was found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from fsm_replication.testing.model_check.report import Report, check_all
from fsm_replication.testing.model_check.search import Result
from fsm_replication.testing.model_check.sequence import sequence

__all__ = ("main",)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _tell(result: Result) -> None:
    _say(
        f"{result.scope.name}: {result.states:,} states, {result.moves:,} transitions,"
        f" {result.resting:,} at rest, depth {result.depth}, {result.took_sec:.1f} s"
    )
    if result.violation is not None:
        _say(f"VIOLATION: {result.violation.what}\n\n{sequence(result.product, result.violation)}")


def _sum_up(report: Report) -> None:
    for table in report.tables:
        _say(
            f"table {table.name}: {table.states} states, {table.moves} moves,"
            f" {table.triggers} triggers"
        )
        for fault in table.faults:
            _say(f"FAULT: {fault}")
    for move in report.not_taken:
        _say(f"NEVER TAKEN: {' '.join(move)}")
    said = report.as_json()
    _say(
        f"{said['states']:,} states and {said['transitions']:,} transitions in"
        f" {said['seconds']:.1f} s: {'all is well' if report.passed else 'THE CHECK FAILED'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m fsm_replication.testing.model_check")
    parser.add_argument("--json", action="store_true", help="print JSON, at the end")
    chosen = parser.parse_args(arguments)
    if chosen.json:
        report = check_all()
        _say(json.dumps(report.as_json(), indent=2))
    else:
        report = check_all(told=_tell)
        _sum_up(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
