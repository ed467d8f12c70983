"""The circuits' machine, as pybreaker runs it.

Theory of operation. This table is the one that is not run by us: pybreaker owns the state of a
circuit. It is declared all the same, so that the diagram, the reference and the tests have it; a
test walks pybreaker through every row, and through the pairs that have none.

Closed counts failures in a row; Open refuses every call until the reset time is over; then one
call at a time is let through as a probe (HalfOpen), and enough successes in a row close it. The
reset time is short at first and doubles each time that the circuit opens again, up to a maximum; a
minute in Closed makes it short again. Reads are probed by a look at the store, writes by a link.
A cancelled call is neither a success nor a failure.
"""

from __future__ import annotations

from typing import Final

from fsm_replication.circuits import CircuitState
from fsm_replication.tables.table import Row, Table

__all__ = ("CIRCUIT", "CircuitState")

_S = CircuitState

CIRCUIT: Final = Table(
    name="circuit",
    states=CircuitState,
    initial=_S.CLOSED,
    final=frozenset(),
    rows=(
        Row("trip", (_S.CLOSED,), _S.OPEN, "as many failures in a row as the threshold"),
        Row("probe", (_S.OPEN,), _S.HALF_OPEN, "the reset time is over and somebody calls"),
        Row(
            "relapse", (_S.HALF_OPEN,), _S.OPEN, "the probe failed: the next wait is twice as long"
        ),
        Row("mend", (_S.HALF_OPEN,), _S.CLOSED, "as many probes in a row succeeded as needed"),
    ),
)
