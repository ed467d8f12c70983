"""Everything that is checked, and what has come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from fsm_replication.engine import ReplicationEngine
from fsm_replication.peer_link import PeerLink
from fsm_replication.reports import PauseReason
from fsm_replication.tables import TABLES
from fsm_replication.testing.model_check.links import Detail
from fsm_replication.testing.model_check.product import Scope, Taken
from fsm_replication.testing.model_check.search import Result, explore
from fsm_replication.testing.model_check.sequence import sequence
from fsm_replication.testing.model_check.statics import (
    TableReport,
    check_table,
    requested_triggers,
)
from fsm_replication.testing.moves import EXEMPT, moves_of_the_tables

__all__ = ("SCOPES", "Report", "check_all", "check_tables", "never_taken")

_R = PauseReason
_MODELS: Final[dict[str, type]] = {"engine": ReplicationEngine, "link": PeerLink}
PLAIN: Final = Detail(
    (_R.OPERATOR, _R.CIRCUIT), pings=False, late=False, crashes=False, reconfigures=False
)

SCOPES: Final = (
    Scope("engine alone, late reports", links=0, circuits=0),
    Scope(
        "one link, every reason to pause, both circuits", links=1, circuits=2,
        detail=Detail(tuple(_R), pings=False, late=False, crashes=False, reconfigures=False),
    ),
    Scope(
        "one link, late reports, deaths, a circuit", links=1, circuits=1,
        detail=Detail((_R.CIRCUIT,), pings=False, reconfigures=False, wears=True),
    ),
    Scope(
        "one link, late reports, deaths, requests", links=1, circuits=0,
        detail=Detail((_R.OPERATOR,), pings=False, late=True, crashes=True, reconfigures=True),
    ),
    Scope(
        "one link, pings, deaths, requests", links=1, circuits=0,
        detail=Detail((_R.OPERATOR,), pings=True, late=False, crashes=True, reconfigures=True),
    ),
    Scope("engine, two links, a circuit", links=2, circuits=1, detail=PLAIN),
)  # fmt: skip
"""What is put together: each detail where there is room for it, and then all machines at once."""


@dataclass(slots=True)
class Report:
    """What the whole check has come to."""

    tables: list[TableReport] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    not_taken: list[Taken] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing at all is wrong."""
        return not (
            self.not_taken
            or any(table.faults for table in self.tables)
            or any(result.violation for result in self.results)
        )

    def as_json(self) -> dict[str, Any]:
        """Return the numbers and what is wrong, as plain data."""
        return {
            "passed": self.passed,
            "tables": [
                {"name": t.name, "states": t.states, "moves": t.moves, "triggers": t.triggers,
                 "faults": list(t.faults)}
                for t in self.tables
            ],
            "searches": [
                {"name": r.scope.name, "states": r.states, "transitions": r.moves,
                 "resting": r.resting, "depth": r.depth, "seconds": round(r.took_sec, 2),
                 "violation": r.violation.what if r.violation else None,
                 "trace": sequence(r.product, r.violation) if r.violation else None}
                for r in self.results
            ],
            "states": sum(result.states for result in self.results),
            "transitions": sum(result.moves for result in self.results),
            "seconds": round(sum(result.took_sec for result in self.results), 2),
            "moves_never_taken": [" ".join(move) for move in self.not_taken],
        }  # fmt: skip


def check_tables() -> list[TableReport]:
    """Check every table by itself."""
    requested = requested_triggers()
    return [check_table(table, _MODELS.get(table.name), requested) for table in TABLES]


def never_taken(results: Iterable[Result]) -> list[Taken]:
    """Return the moves of the tables that none of these searches has taken."""
    rows = {
        (table, trigger, source)
        for table, trigger, source, _ in moves_of_the_tables() - EXEMPT.keys()
    }
    return sorted(rows - {taken for result in results for taken in result.taken})


def check_all(
    scopes: Iterable[Scope] = SCOPES, *, told: Callable[[Result], None] = lambda _result: None
) -> Report:
    """Check everything; ``told`` hears of each search as it ends.

    Without a violation, every move of the tables must have been taken by some search: if not, the
    searches prove less than they seem to.
    """
    report = Report(tables=check_tables())
    for scope in scopes:
        report.results.append(explore(scope))
        told(report.results[-1])
    if not any(result.violation for result in report.results):
        report.not_taken = never_taken(report.results)
    return report
