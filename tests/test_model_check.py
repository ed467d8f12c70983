"""The tables as models: nothing is wrong with them, and what would be wrong is found."""

from __future__ import annotations

import ast
import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

import fsm_replication
from fsm_replication import engine as engine_module
from fsm_replication import peer_link as link_module
from fsm_replication.config import PeerConfig, ReplicationConfig, Settings, StartupConfig
from fsm_replication.driver import Driver
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import CursorStoreError, DrainTimeoutError
from fsm_replication.links import Links
from fsm_replication.machine import Machine
from fsm_replication.peer_link import PeerLink
from fsm_replication.ports import Ports
from fsm_replication.reports import EngineFact, LinkFact, PauseReason
from fsm_replication.reports import Report as WorkerReport
from fsm_replication.stores import MemorySyncEngine
from fsm_replication.tables import ENGINE, LINK, TABLES, PeerState, Reaction, Row, Table
from fsm_replication.testing import LoopClock, MemoryCursorStore, SimRedis, SimTransport, run
from fsm_replication.testing.model_check import (
    SCOPES,
    Detail,
    Scope,
    Violation,
    check_all,
    check_table,
    explore,
    sequence,
)
from fsm_replication.testing.model_check.__main__ import main
from fsm_replication.testing.model_check.links import CONNECTOR_SAYS, TAILER_FACTS

_R = PauseReason
DETAIL = Detail((_R.OPERATOR, _R.CIRCUIT), pings=False, late=False, crashes=False)
DOCS = Path(__file__).parent.parent / "docs" / "model.md"
ALONE = Scope("engine alone", links=0, circuits=0)
PLAIN = Scope("one link", links=1, circuits=1, detail=replace(DETAIL, reconfigures=False))
LATE = Scope(
    "late reports and deaths",
    links=1,
    circuits=0,
    detail=Detail((_R.OPERATOR,), pings=False, reconfigures=False),
)
MOVED = Scope("another URL", links=1, circuits=0, detail=Detail((), pings=False))


# The tables as they are


@pytest.mark.timeout(400)
def test_nothing_is_wrong_in_any_state_that_can_be_reached() -> None:
    """If this fails some order of events makes an illegal move, leaks, or is never finished."""
    report = check_all()
    for result in report.results:
        assert result.violation is None, sequence(result.product, result.violation)
        assert result.resting
    assert [table.faults for table in report.tables] == [()] * len(TABLES)
    assert report.not_taken == []
    assert report.passed
    everything = report.results[-1]
    assert everything.scope.links == 2
    assert everything.states > 100_000
    said = json.loads(json.dumps(report.as_json()))
    assert said["passed"]
    assert [one["name"] for one in said["searches"]] == [scope.name for scope in SCOPES]
    assert said["states"] == sum(one["states"] for one in said["searches"])
    assert {table["name"]: table["states"] for table in said["tables"]} == {
        table.name: len(table.states) for table in TABLES
    }
    told = DOCS.read_text(encoding="utf-8")
    for one in said["searches"]:
        row = f"| {one['name']} | {one['states']:,} | {one['transitions']:,} | {one['resting']:,} |"
        assert row in told, "docs/model.md speaks of another search: take the new numbers"


def test_the_docs_show_a_trace_as_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails the trace in docs/model.md is not what the search prints."""
    monkeypatch.setitem(link_module.DEATHS, "timer", LinkFact.UNREACHABLE)
    _, diagram = found(LATE)
    assert f"```mermaid\n{diagram}```" in DOCS.read_text(encoding="utf-8")


def facts_in(module: str, kind: type[StrEnum]) -> set[str]:
    """Return the facts that a module of the library names."""
    root = Path(fsm_replication.__file__).parent
    tree = ast.parse((root / module).read_text(encoding="utf-8"))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == kind.__name__
    }


def test_workers_of_the_model_say_what_the_workers_say() -> None:
    """If this fails a worker reports something that the model never lets it report."""
    tailer = {fact.name for facts in TAILER_FACTS.values() for fact in facts}
    assert facts_in("workers/tailer.py", LinkFact) == tailer | {
        "LOST",
        "BLOCKED",
        "CLEARED",
        "OUTDATED",
    }
    connector = {fact.name for fact, _ in CONNECTOR_SAYS}
    assert facts_in("workers/connector.py", LinkFact) == connector | {"DUE"}
    assert facts_in("workers/ping.py", LinkFact) == {"LOST"}
    assert facts_in("workers/supervisor.py", EngineFact) == {"BROKEN"}
    assert facts_in("workers/cursor_flush.py", EngineFact) == {"BROKEN"}
    assert facts_in("engine.py", EngineFact) == {"READY", "BROKEN", "DRAINED"}
    for path in sorted((Path(fsm_replication.__file__).parent / "workers").glob("*.py")):
        if path.name not in ("tailer.py", "connector.py", "ping.py"):
            assert not facts_in(f"workers/{path.name}", LinkFact), path


# Defects that were put in on purpose


def changed(table: Table, trigger: str, **changes: Any) -> Table:
    """Return a table in which the rows of one trigger are different."""
    rows = tuple(replace(row, **changes) if row.trigger == trigger else row for row in table.rows)
    return replace(table, rows=rows)


def without(table: Table, trigger: str) -> Table:
    """Return a table without one trigger, and without the reactions that mean it."""
    rows = tuple(row for row in table.rows if row.trigger != trigger)
    reactions = tuple(r for r in table.reactions if trigger not in r.triggers)
    return replace(table, rows=rows, reactions=reactions)


@dataclass(frozen=True)
class Defect:
    """A defect, where to look for it, what is then said, and after how many moves at least."""

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    scope: Scope
    said: str
    moves: int


def link_table(make: Callable[[], Table]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what makes links run another table."""
    return lambda patch: patch.setattr(link_module, "LINK", make())


def engine_table(make: Callable[[], Table]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what makes engines run another table."""
    return lambda patch: patch.setattr(engine_module, "ENGINE", make())


def method(owner: type, name: str, other: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what puts another method in the place of one."""
    return lambda patch: patch.setattr(owner, name, other)


def forget_to_ask(self: Driver, ticket: object) -> None:
    """Stand for a driver that does not stop what a state owned."""


def post_anything(self: Driver, report: WorkerReport) -> None:
    """Stand for a driver in which any report takes the place of another of that name."""
    replaced = self._mailbox.pop(report.sender, None)
    if replaced is not None:
        self._drop(replaced)
    self._mailbox[report.sender] = report


def keep_the_last(self: ReplicationEngine, move: Any) -> None:
    """Stand for an engine that keeps the last error, and not the first."""
    self._error = move.payload


def keep_only_the_first(self: ReplicationEngine, report: WorkerReport) -> None:
    """Stand for an engine that says nothing of what it left behind if it had failed before."""
    if report.fact is EngineFact.DRAINED and isinstance(report.payload, BaseException):
        self._error = self._error or report.payload


DEFECTS = [
    Defect(
        "a row is missing: the end of the tailer is not heard",
        link_table(lambda: without(LINK, "disconnected")), PLAIN, "leads to rest", 5,
    ),
    Defect(
        "a row is missing: a paused link never resumes",
        link_table(lambda: without(LINK, "resume")), PLAIN, "leads to rest", 6,
    ),
    Defect(
        "a guard is dropped: a link resumes against an operator's wish",
        link_table(lambda: changed(LINK, "resume", guard=None)), PLAIN,
        "resumed with a reason to pause", 9,
    ),
    Defect(
        "a guard is dropped: an engine that failed is called stopped",
        engine_table(lambda: changed(ENGINE, "stopped", guard=None)), ALONE,
        "Stopped with an error kept", 5,
    ),
    Defect(
        "a dest is changed: a link that is not connected begins to read",
        link_table(lambda: changed(LINK, "connect_failed", dest=PeerState.RESUMING)), PLAIN,
        "an effect raised KeyError", 4,
    ),
    Defect(
        "a dest is changed: what was lost is taken for stopped",
        link_table(lambda: changed(LINK, "connection_lost", dest=PeerState.FAILED)), PLAIN,
        "nobody said that it was hopeless", 6,
    ),
    Defect(
        "an effect is missing: a paused link goes on reading",
        link_table(lambda: changed(LINK, "pause", effects=())), PLAIN, "told READ_AT_HEAD", 7,
    ),
    Defect(
        "owned workers are not asked to stop", method(Driver, "_left", forget_to_ask), PLAIN,
        "was not asked to stop", 2,
    ),
    Defect(
        "the end of workers is not waited for", method(Driver, "await_end", lambda _self: None),
        PLAIN, "leads to rest", 1,
    ),
    Defect(
        "a late report is obeyed", method(Machine, "is_current", lambda _self, _ticket: True), LATE,
        "whose entry is over (G6)", 8,
    ),
    Defect(
        "a late report takes the place of one that counts", method(Driver, "post", post_anything),
        MOVED, "leads to rest", 6,
    ),
    Defect(
        "what nobody takes over is not closed", method(Driver, "_drop", lambda _self, _report: None),
        PLAIN, "left open that nobody owns", 6,
    ),
    Defect(
        "the death of a timer is not told",
        lambda patch: patch.setitem(link_module.DEATHS, "timer", LinkFact.UNREACHABLE), LATE,
        "leads to rest", 5,
    ),
    Defect(
        "nobody may probe an open circuit",
        method(Links, "grant_probe", lambda _self: False), PLAIN, "leads to rest", 6,
    ),
    Defect(
        "the last error is kept", method(ReplicationEngine, "keep_error", keep_the_last), ALONE,
        "first error was not kept", 3,
    ),
    Defect(
        "what is left behind is not named",
        method(ReplicationEngine, "_on_fact", keep_only_the_first), ALONE,
        "cursor store was open", 6,
    ),
    Defect(
        "a link that is losing its peer counts as connected",
        lambda patch: patch.setattr(
            PeerState, "is_running",
            property(lambda state: "Running" in LINK.groups_of(state) or state == "Disconnecting"),
        ),
        PLAIN, "health ", 6,
    ),
    Defect(
        "a guard never holds: no link ever resumes",
        method(PeerLink, "no_reason_left", lambda _self: False), PLAIN, "leads to rest", 6,
    ),
]  # fmt: skip


def found(scope: Scope) -> tuple[Violation, str]:
    """Return the violation that a search finds, and its diagram."""
    result = explore(scope)
    assert result.violation is not None, "the search is blind to this defect"
    return result.violation, sequence(result.product, result.violation)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_is_found_with_a_shortest_trace(
    defect: Defect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails the check would not notice such a mistake, or tells it in a roundabout way."""
    defect.plant(monkeypatch)
    violation, diagram = found(defect.scope)
    assert defect.said in violation.what
    assert len(violation.trace) == defect.moves, diagram
    assert diagram.startswith("sequenceDiagram\n")
    assert diagram.count("->>") == len(violation.trace)
    assert violation.what.split(";")[0] in diagram


def test_a_defect_on_two_links_is_told_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a trace mixes up the links, where two that are alike count as one."""

    def only_one(self: PeerLink, why: str) -> None:
        if self.state is not PeerState.BACKOFF:
            self.driver.request_if_legal("shutdown", why=why)

    monkeypatch.setattr(PeerLink, "shutdown", only_one)
    violation, diagram = found(Scope("two", links=2, circuits=0, detail=PLAIN.detail))
    assert "leads to rest" in violation.what
    assert "link a" in diagram
    assert "link b" in diagram
    here = violation.start
    for move in violation.trace:
        changed_links = [a != b for a, b in zip(here[1], move.after[1], strict=True)]
        if move.label[1] in "ab":
            assert not changed_links["ba".index(move.label[1])], "another link moved"
        here = move.after


def test_a_violation_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails a job that runs the check would not notice that something is wrong."""
    monkeypatch.setattr(link_module, "LINK", without(LINK, "disconnected"))
    monkeypatch.setattr(
        "fsm_replication.testing.model_check.report.check_all.__defaults__", ((PLAIN,),)
    )
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "VIOLATION: from here nothing" in said
    assert "sequenceDiagram" in said
    assert main(["--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["passed"]
    assert result["searches"][0]["trace"].startswith("sequenceDiagram")


class _Toy(StrEnum):
    A = "A"
    B = "B"
    C = "C"
    D = "D"


class _Model:
    def allowed(self) -> bool:
        """Guard."""
        return True

    async def act(self, _move: object) -> None:
        """Effect that a move would have to wait for."""

    def both(self) -> None:
        """Effect that does not take the move."""


def _toy(**changes: Any) -> Table:
    parts: dict[str, Any] = {
        "name": "toy",
        "states": _Toy,
        "initial": _Toy.A,
        "final": frozenset({_Toy.D}),
        "rows": (
            Row("go", (_Toy.A,), _Toy.B, "to get there"),
            Row("on", (_Toy.B,), _Toy.C, "further"),
            Row("end", (_Toy.B, _Toy.C), _Toy.D, "the end"),
        ),
        "reactions": (Reaction(LinkFact.DUE, (_Toy.A,), ("go",)),),
    }
    return Table(**(parts | changes))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (_toy(rows=_toy().rows[1:], reactions=()), "B cannot be reached"),
        (_toy(rows=_toy().rows[:2]), "A leads to no final state"),
        (_toy(rows=_toy().rows[:2]), "C is not final and has no way out"),
        (_toy(rows=(*_toy().rows, Row("turn", (_Toy.B,), _Toy.B, "round"))), "turn leads from B"),
        (_toy(reactions=()), "go is meant by no fact"),
        (changed(_toy(), "go", guard="missing"), "has no guard missing()"),
        (changed(_toy(), "go", effects=("absent",)), "has no effect absent()"),
        (changed(_toy(), "go", effects=("act",)), "act() is a coroutine"),
        (changed(_toy(), "go", effects=("both",)), "both() does not take"),
        (changed(_toy(), "go", guard="act"), "act() does not take"),
    ],
)
def test_what_is_wrong_with_a_table_by_itself_is_found(table: Table, said: str) -> None:
    """If this fails a state that is dead, or a name that nobody knows, is not noticed."""
    requested = frozenset({"on", "end"})
    assert check_table(changed(_toy(), "go", guard="allowed"), _Model, requested).faults == ()
    assert any(said in fault for fault in check_table(table, _Model, requested).faults)


# What the searches have found, on real engines


def make_engine(cursors: MemoryCursorStore) -> tuple[ReplicationEngine, Any]:
    """Return an engine on virtual time that reads one peer, and the network between them."""
    clock = LoopClock()
    transport = SimTransport({"a": SimRedis(now_ms=lambda: 0)}, clock, random.Random(0))
    config = ReplicationConfig(
        local_node_id="b",
        peers=[PeerConfig(node_id="a", redis_url="redis://a")],
        settings=Settings(startup=StartupConfig(when_no_peer="run")),
    )
    ports = Ports(transport=transport, cursor_store=cursors, clock=clock)
    return ReplicationEngine(config, MemorySyncEngine(), ports=ports), transport


def test_a_link_outlives_the_death_of_its_timer() -> None:
    """If this fails a stranger that cancels a waiting task leaves a link in Backoff for ever."""

    async def scenario() -> None:
        engine, transport = make_engine(MemoryCursorStore())
        transport.cut("a")
        await engine.start()
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=60)
        timer = next(task for task in asyncio.all_tasks() if task.get_name() == "link:a:timer")
        timer.cancel()
        await engine.wait_for_state(PeerState.CONNECTING, peer_id="a", timeout=600)
        await engine.shutdown()

    run(scenario)


class HangingCursorStore(MemoryCursorStore):
    """A cursor store on a disk that answers no more."""

    async def close(self, *, timeout_sec: float | None = None) -> None:
        """Come back only because the time is over."""
        await asyncio.sleep(timeout_sec or 0)
        raise CursorStoreError("no answer", path="c.db")


def test_what_is_left_behind_is_named_beside_an_earlier_error() -> None:
    """If this fails an engine that had failed before leaves a file open and tells nobody."""

    async def scenario() -> None:
        cursors = HangingCursorStore()
        cursors.failure = CursorStoreError("not a database", path="c.db")
        engine, _ = make_engine(cursors)
        with pytest.raises(CursorStoreError, match="not a database") as raised:
            await engine.start()
        assert engine.error is raised.value
        told = str(DrainTimeoutError(("cursor store",), timeout_sec=10.0))
        assert raised.value.__notes__ == [told]

    run(scenario)
