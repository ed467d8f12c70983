"""What a host reads in its log: sentences with their facts, one line each, and nobody else's noise."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_metrics import Rig, entry, simulated

from fsm_replication import NoOpSyncEngine, PeerState
from fsm_replication.cli.runtime import LogFormat, log_formatter
from fsm_replication.log import TEXT_MAX, get_logger, one_line
from fsm_replication.reports import PauseReason
from fsm_replication.sentences import SENTENCES
from fsm_replication.tables import LINK

PACKAGE = Path(__file__).parent.parent / "fsm_replication"
START_MS = 1_700_000_000_000
LEVELS = {"debug", "info", "warning", "error", "exception"}
# What the loggers of links and engines add to each event, and what a traceback gives.
BOUND = {"peer_id", "node_id", "error"}


class Lines(logging.Handler):
    """Keeps what a plain handler of the host would print, and the records."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        """The lines as they would be printed."""
        return [self.format(record) for record in self.records]

    def of(self, level: str) -> list[str]:
        """Return the messages of one level."""
        return [r.getMessage() for r in self.records if r.levelname == level]


@contextmanager
def host(level: int = logging.INFO) -> Iterator[Lines]:
    """Log to lines as ``logging.basicConfig`` would, for everybody in the process."""
    root, handler = logging.getLogger(), Lines()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


# Every call ---------------------------------------------------------------------------------------


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield every call of a logger in the package, and where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "log" in text else ():
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            logger = ast.unparse(node.func.value)
            if re.search(r"(^|[._])log$|^get_logger\(", logger):
                assert node.func.attr in LEVELS | {"log"}, f"{path}: {ast.unparse(node)}"
                yield f"{path.name}:{node.lineno}", node


def test_every_event_has_a_sentence_and_gives_the_facts_in_it() -> None:
    """If this fails a host reads a bare word, or a sentence with holes."""
    named = set()
    for where, call in log_calls():
        assert isinstance(call.func, ast.Attribute)
        event = call.args[1 if call.func.attr == "log" else 0]
        assert isinstance(event, ast.Constant), f"{where}: an event's name is a constant"
        name = str(event.value)
        assert name in SENTENCES, f"{where}: give {name!r} a sentence"
        named.add(name)
        form = SENTENCES[name]
        given = {keyword.arg for keyword in call.keywords}
        if not isinstance(form, str) or None in given:
            continue
        wanted = {field for _, field, _, _ in string.Formatter().parse(form) if field}
        assert wanted <= given | BOUND, f"{where}: {name} lacks {wanted - given - BOUND}"
    assert named == set(SENTENCES)


# Lines --------------------------------------------------------------------------------------------


def test_the_way_of_a_link_reads_as_sentences() -> None:
    """If this fails a host with nothing configured reads bare words, or another library's lines."""

    async def play() -> None:
        rig = Rig()
        await rig.tail()
        await rig.engine.wait_synced(60)
        rig.transport.cut("a")
        await rig.reach(PeerState.BACKOFF)
        await asyncio.sleep(60)
        rig.transport.heal("a")
        await rig.reach(PeerState.TAILING)
        await rig.engine.shutdown()

    with host() as told:
        simulated(play)
    assert not [r.name for r in told.records if not r.name.startswith("fsm_replication")]
    lines = told.lines
    assert all(re.search(r"^[A-Z]+ \S+ \S+ \S+", line) for line in lines), lines
    assert "INFO engine: Created -> Connecting: start() was called" in lines
    attempts = [
        line
        for line in lines
        if re.search(
            r"link a: Connecting -> Backoff: .*redis://a.*, next attempt in \d+\.\d s", line
        )
    ]
    assert len(attempts) > 2
    # Losing a peer is a warning with its reason; that it stays away is told, and warned of once.
    lost, *others = told.of("WARNING")
    assert re.match(r"link a: Tailing -> Disconnecting: .*redis://a", lost)
    assert not [line for line in others if "Backoff" in line]


def test_a_peer_that_is_not_there_at_first_is_warned_of_once() -> None:
    """If this fails a peer that cannot be reached is silent, or fills the log."""

    async def play() -> None:
        rig = Rig(startup={"when_no_peer": "run"})
        rig.transport.cut("a")
        await rig.engine.start()
        await asyncio.sleep(600)
        await rig.engine.shutdown()

    with host(logging.WARNING) as told:
        simulated(play)
    (line,) = [line for line in told.of("WARNING") if "Backoff" in line]
    assert re.match(r"link a: Connecting -> Backoff: .*redis://a.*, next attempt in", line)


def test_pauses_and_open_circuits_are_warnings_with_their_reasons() -> None:
    """If this fails a link stands still, and the log does not say that or why."""

    async def play() -> None:
        rig = Rig(repair={"interlock_min": 1, "interlock_share": 0.0})
        await rig.tail()
        await rig.engine.wait_synced(60)
        await rig.engine.pause("a")
        await rig.engine.resume("a")
        await rig.reach(PeerState.TAILING)
        rig.store.failing = True
        rig.send(*(entry(f"k{n}", b"1", START_MS + n) for n in range(5)))
        await rig.reach(PeerState.PAUSED)
        assert PauseReason.CIRCUIT in rig.engine.health_check().peers[0].pause_reasons
        rig.store.failing = False
        await rig.reach(PeerState.TAILING)
        rig.send(*(entry(f"k{n}", None, START_MS + 100 + n, 2) for n in range(5)))
        await rig.reach(PeerState.PAUSED)
        assert rig.of_a("peer_pause_reason", reason="interlock") == [1]
        await rig.engine.resume("a")
        assert rig.of_a("peer_pause_reason", reason="interlock") == [0]
        await rig.engine.shutdown()

    with host() as told:
        simulated(play)
    warnings = told.of("WARNING")
    circuit = [line for line in warnings if line.startswith("circuit store-writes: ")]
    assert re.match(
        r"circuit store-writes: Closed -> Open: \d failures in a row, the last of them: .*it is"
        r" broken; a probe may run in \d+\.\d s",
        circuit[0],
    )
    paused = [line for line in warnings if "-> Paused" in line]
    assert re.match(
        r"link a: Tailing -> Paused: circuit 'store-writes' is open: .*broken", paused[0]
    )
    assert re.search(r"-> Paused: .*(delete|live)", paused[-1])
    # What an operator asked for is no warning, and neither is a circuit that closes.
    assert not [line for line in warnings if "operator" in line or "-> Closed" in line]
    assert [line for line in told.of("INFO") if "-> Paused: an operator paused it" in line]


def test_a_store_that_keeps_nothing_says_so_in_a_sentence() -> None:
    """If this fails who embeds the library reads "noop_store" on standard error."""
    with host(logging.WARNING) as told:
        NoOpSyncEngine()
    (record,) = told.records
    assert "read and thrown away" in record.getMessage()
    assert vars(record)["event"] == "noop_store"


# Fields and formats -------------------------------------------------------------------------------


def test_the_formats_of_the_command_line() -> None:
    """If this fails programs lose the event's name and fields, or people get them for sentences."""
    with host() as told:
        get_logger("link", peer_id="a").warning(
            "dead_letters", count=2, reasons={"hash": 1, "field": 1}
        )
    (record,) = told.records
    line = json.loads(log_formatter(LogFormat.JSON).format(record))
    assert (line["event"], line["peer_id"], line["count"]) == ("dead_letters", "a", 2)
    assert line["reasons"] == {"hash": 1, "field": 1}
    said = "link a: 2 entries became dead letters, by reason: hash 1, field 1"
    assert (line["message"], line["level"]) == (said, "warning")
    shown = log_formatter(LogFormat.CONSOLE).format(record)
    assert said in shown
    assert "reasons=" not in shown


HOSTILE = "k\r\nCRITICAL all is lost \x1b[2J\x9b2J\u202e\u2028\x00\ud800"


def test_what_comes_from_data_stays_in_its_line() -> None:
    """If this fails a key, or a server's error, writes lines of its own or drives a terminal."""
    error = OSError("first\nsecond \x1b[31m redis://u:secret@h " + "x" * 50_000)
    with host() as told:
        get_logger("link", peer_id=HOSTILE).warning("item_skipped", key=HOSTILE, error=error)
        get_logger("engine").error("worker_died", machine="m", worker=HOSTILE, exc_info=error)
        get_logger("engine").error("drain_incomplete", left=(HOSTILE,) * 1000)
    for record in told.records:
        message = record.getMessage()
        assert message.isprintable()
        assert len(message) < 5 * TEXT_MAX
        assert "secret" not in message
    assert r"k\r\nCRITICAL all is lost \x1b[2J\x9b2J\u202e\u2028\x00\ud800" in (
        told.records[0].getMessage()
    )
    assert len(vars(told.records[0])["error"]) < 2 * TEXT_MAX
    assert one_line("ä ü 漢字 emoji 🙂") == "ä ü 漢字 emoji 🙂"
    assert one_line("x" * 12, 10) == "x" * 10 + "... (2 more characters)"


def test_an_event_without_a_sentence_is_told_all_the_same() -> None:
    """If this fails a line that lacks a fact is lost, or raises where it should tell."""
    with host() as told:
        get_logger("link").warning("item_skipped", error="why")
        get_logger("link").warning("something_new", count=1)
    assert [record.getMessage() for record in told.records] == [
        "item skipped: error=why",
        "something new: count=1",
    ]


def test_machines_log_nothing_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    """If this fails each move is told by another library too, four times, at level INFO."""
    from fsm_replication.machine import Machine

    class Model:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: True

    caplog.set_level(logging.INFO)
    machine = Machine(LINK, Model(), name="link:a", on_move=lambda _: None, on_leave=lambda _: None)
    assert machine.fire("connect")
    assert machine.state is PeerState.CONNECTING
    assert caplog.records == []
