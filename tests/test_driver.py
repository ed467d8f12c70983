"""Reports that come late, twice, or after their state has gone; and the ownership of tasks."""

from __future__ import annotations

import asyncio
import itertools
from enum import StrEnum

import pytest
from conftest import shortest_way
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.driver import Driver, Observer
from fsm_replication.errors import InvalidStateError
from fsm_replication.journal import Journal
from fsm_replication.machine import Move
from fsm_replication.ports import SystemWallClock
from fsm_replication.reports import EngineFact, Fact, LinkFact, Report, Reporter, Ticket
from fsm_replication.tables import ENGINE, LINK, PeerState, Table

FACTS: dict[str, type[Fact]] = {"engine": EngineFact, "link": LinkFact}


class Books(Observer):
    """Notes what a driver tells."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.drops: list[Report] = []
        self.failures: list[BaseException] = []

    def moved(self, machine: str, move: Move) -> None:
        """Note a move."""
        self.moves.append(move)

    def dropped(self, machine: str, report: Report, state: StrEnum) -> None:
        """Note a report that moved nothing."""
        self.drops.append(report)

    def effect_failed(self, machine: str, move: Move | None, error: Exception) -> None:
        """Note an effect that raised."""
        self.failures.append(error)

    def worker_failed(self, machine: str, worker: str, error: BaseException) -> None:
        """Note a worker that died."""
        self.failures.append(error)


class Idle:
    """A model whose guards pass and whose effects do nothing."""

    def __init__(self, table: Table) -> None:
        for guard in table.guards:
            setattr(self, guard, lambda: True)
        for effect in table.effects:
            setattr(self, effect, lambda _move: None)


def make(table: Table, model: Idle | None = None) -> tuple[Driver, Books]:
    """Return a driver of a table and its books."""
    books = Books()
    driver = Driver(
        table,
        model or Idle(table),
        name=table.name,
        journal=Journal(1000),
        wall_clock=SystemWallClock(),
        observer=books,
        ended_fact=LinkFact.ENDED if table is LINK else None,
    )
    return driver, books


async def settle() -> None:
    """Let the driver handle what was posted."""
    for _ in range(3):
        await asyncio.sleep(0)


def walk_to(driver: Driver, state: StrEnum) -> None:
    """Take the shortest way to a state."""
    for trigger in shortest_way(driver.machine.table, driver.state, state):
        driver.request(trigger, why="on the way")


CASES = [
    (table, state, fact)
    for table in (ENGINE, LINK)
    for state in table.states
    for fact in FACTS[table.name]
]


@pytest.mark.parametrize(
    ("table", "state", "fact"), CASES, ids=[f"{t.name}-{s}-{f}" for t, s, f in CASES]
)
async def test_a_fact_moves_as_the_table_says_once(
    table: Table, state: StrEnum, fact: Fact
) -> None:
    """If this fails a report means something else than the table says, or counts twice."""
    driver, books = make(table)
    walk_to(driver, state)
    await settle()
    state = driver.state  # A state with nothing to wait for may have been left already.
    ticket = driver.machine.ticket(str(state))
    books.moves.clear()
    books.drops.clear()
    report = Report("worker", fact, ticket)
    meaning = table.meaning(fact, state)
    driver.post(report)
    await settle()
    if meaning:
        row = table.move(state, meaning[0])
        assert row is not None
        assert books.moves[0] == Move(meaning[0], state, row.dest)
    else:
        assert driver.state == state
        assert books.drops == [report]
    # The same report again, after its state has gone.
    if driver.state != state:
        after, count = driver.state, len(books.moves)
        driver.post(report)
        await settle()
        assert (driver.state, len(books.moves)) == (after, count)
        assert books.drops[-1] == report


@pytest.mark.parametrize(
    ("table", "state", "fact"), CASES, ids=[f"{t.name}-{s}-{f}" for t, s, f in CASES]
)
async def test_a_late_report_moves_nothing_even_in_the_same_state(
    table: Table, state: StrEnum, fact: Fact
) -> None:
    """If this fails a report of an earlier entry is obeyed because the state has the same name."""
    driver, books = make(table)
    walk_to(driver, state)
    before = driver.machine.ticket(str(driver.state))
    late = Ticket(before.scope, before.entry - 1)
    books.moves.clear()
    for report in (Report("worker", fact, late), Report("other", fact, late)):
        driver.post(report)
    state = driver.state
    await settle()
    ended = [move for move in books.moves if move.trigger in ("disconnected", "stopped")]
    assert books.moves == ended, "only the driver's own report of an empty crew may move it"
    assert len(books.drops) >= 2
    if not ended:
        assert driver.state == state


@given(st.lists(st.tuples(st.sampled_from(list(LinkFact)), st.integers(0, 3)), max_size=30))
def test_any_reports_in_any_order_walk_the_table(sent: list[tuple[LinkFact, int]]) -> None:
    """If this fails some order of timely and stale reports leaves the table."""

    async def scenario() -> None:
        driver, books = make(LINK)
        driver.request("connect", why="start")
        for fact, age in sent:
            state = driver.state
            ticket = driver.machine.ticket(str(state))
            driver.post(Report("worker", fact, Ticket(ticket.scope, ticket.entry - age)))
            moves = len(books.moves)
            await settle()
            if age:
                own = [m for m in books.moves[moves:] if m.trigger in ("disconnected", "stopped")]
                assert len(books.moves) == moves + len(own)
        for earlier, later in itertools.pairwise(books.moves):
            assert earlier.dest == later.source
        for move in books.moves:
            row = LINK.move(move.source, move.trigger)
            assert row is not None
            assert row.dest == move.dest

    asyncio.run(scenario())


async def test_a_newer_report_replaces_an_unhandled_one() -> None:
    """If this fails a mailbox can fill, or acts on what is no longer true."""
    driver, books = make(LINK)
    walk_to(driver, PeerState.CONNECTING)
    report = driver.reporter("connector", driver.machine.ticket("Connecting"))
    for _ in range(1000):
        report(LinkFact.CONNECTED)
    report(LinkFact.UNREACHABLE)
    await settle()
    assert driver.state is PeerState.BACKOFF
    assert len(books.drops) == 1000


async def test_a_report_is_late_that_was_overtaken_on_its_way() -> None:
    """If this fails what was true when it was said is obeyed when it no longer is."""
    driver, books = make(LINK)
    walk_to(driver, PeerState.BACKOFF)
    said = Report("timer", LinkFact.DUE, driver.machine.ticket("Backoff"))
    driver.post(said)
    # Before it is handled the link goes on, and comes back to the same state.
    for trigger in ("retry", "connect_failed"):
        driver.request(trigger, why="a request overtakes it")
    await settle()
    assert driver.state is PeerState.BACKOFF
    assert books.drops == [said]


async def test_a_late_report_takes_the_place_of_no_other() -> None:
    """If this fails a worker that was slow to end silences the one that came after it."""
    driver, books = make(LINK)
    walk_to(driver, PeerState.BACKOFF)
    earlier = driver.machine.ticket("Backoff")
    for trigger in ("retry", "connect_failed"):
        driver.request(trigger, why="on the way")
    driver.post(Report("timer", LinkFact.DUE, driver.machine.ticket("Backoff")))
    late = Report("timer", LinkFact.DUE, earlier)
    driver.post(late)
    await settle()
    assert driver.state is PeerState.CONNECTING
    assert books.drops == [late]


async def test_what_nobody_takes_over_is_closed() -> None:
    """If this fails connections in a report that comes too late stay open."""

    class Payload:
        closed = False

        def close(self) -> None:
            """Note it."""
            self.closed = True

    driver, _ = make(LINK)
    walk_to(driver, PeerState.CONNECTING)
    ticket = driver.machine.ticket("Connecting")
    driver.request("shutdown", why="stop")
    payload = Payload()
    driver.post(Report("connector", LinkFact.CONNECTED, ticket, payload=payload))
    await settle()
    assert payload.closed


async def test_leaving_a_state_stops_what_it_owns() -> None:
    """If this fails a task outlives the state that started it."""
    driver, _ = make(LINK)
    walk_to(driver, PeerState.CONNECTING)
    started = asyncio.Event()

    async def work(_report: Reporter) -> None:
        started.set()
        await asyncio.Event().wait()

    driver.start_worker("connector", "Connecting", work)
    await started.wait()
    assert driver.workers == ("link:connector",)
    driver.request("shutdown", why="stop")
    await driver.wait_ended()
    assert driver.workers == ()
    await settle()
    assert driver.state is PeerState.STOPPED


async def test_an_effect_that_raises_is_told_and_the_new_state_stands() -> None:
    """If this fails a bug in an effect is swallowed, or tears the driver down."""
    error = RuntimeError("a bug")

    def raising(_move: Move) -> None:
        raise error

    model = Idle(ENGINE)
    model.start_up = raising  # type: ignore[attr-defined]
    driver, books = make(ENGINE, model)
    assert driver.request("start", why="go")
    assert books.failures == [error]
    assert str(driver.state) == "Connecting"
    with pytest.raises(InvalidStateError):
        driver.request("start", why="again")
