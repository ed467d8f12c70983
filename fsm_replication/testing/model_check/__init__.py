"""The tables checked as models: ``python -m fsm_replication.testing.model_check``.

Theory of operation. Each table is looked at as a graph first. Then the engine, its links and the
circuits of its store are put together and searched breadth first: every state that some order of
events leads to is reached, with at most one report in flight per worker. An adversary chooses the
order: peers go down and come up, reports come early, late or after their state is gone, workers
die, operators ask for anything at any time.

What moves is the code of the library itself: a stage (:mod:`.stage`) puts the real driver with its
real table, guards and effects into a state, lets it make one step and reads the new state off. Only
the workers are played; what each of them may say is written down beside the machine that owns it
(:mod:`.links`, :mod:`.engines`). In every state is checked that

- only legal moves were made, and no report was obeyed whose entry is over (G6);
- nothing is owned that should not be, and after a final state nothing at all (G7);
- a guard holds for each move that it guards, and the first error is the one that is kept;
- health says what the states say;
- from here the machines can come to rest, if only the world is kind from now on.

A violation is told with a shortest trace, as a Mermaid sequence diagram (:func:`sequence`).
"""

from __future__ import annotations

from fsm_replication.testing.model_check.links import Detail
from fsm_replication.testing.model_check.product import Product, Scope
from fsm_replication.testing.model_check.report import SCOPES, Report, check_all, never_taken
from fsm_replication.testing.model_check.search import Result, Violation, explore
from fsm_replication.testing.model_check.sequence import sequence
from fsm_replication.testing.model_check.statics import TableReport, check_table

__all__ = (
    "SCOPES",
    "Detail",
    "Product",
    "Report",
    "Result",
    "Scope",
    "TableReport",
    "Violation",
    "check_all",
    "check_table",
    "explore",
    "never_taken",
    "sequence",
)
