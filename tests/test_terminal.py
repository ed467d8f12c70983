"""What comes from data commands no terminal: escaped on each screen, table and log line."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fsm_replication import RedisSyncEngine, SyncItem
from fsm_replication.cli import commands, runtime
from fsm_replication.cli.repair import print_ledger
from fsm_replication.cli.tables import stats_table
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.demo.replay import Verdict
from fsm_replication.demo.screen import _verdict
from fsm_replication.errors import ConfigError, UsageError
from fsm_replication.items import content_hash
from fsm_replication.log import get_logger
from fsm_replication.ports import BootstrapRow, DeadLetter, GapRow, Position, StreamId
from fsm_replication.printable import printable, told
from fsm_replication.servers import RedisServer
from fsm_replication.workers.cold_path import RepairStats

EVIL = "\x1b]0;pwn\x07[red]x\n\u202e\u2028end"
ESCAPED = printable(EVIL)
NAME = "[red]a[/red]"


def is_plain(text: str) -> bool:
    """Say whether a terminal obeys nothing in a text."""
    return all(one.isprintable() or one == "\n" for one in text)


def item(key: str, content: bytes, at_ms: int) -> SyncItem:
    """Return an item whose origin is no better than its key."""
    return SyncItem(key, content, "binary", content_hash(content), 1, at_ms, False, EVIL)


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Everything that a command prints, as on a terminal without colours."""
    made = io.StringIO()
    console = Console(file=made, width=400, color_system=None, force_terminal=False)
    monkeypatch.setattr(commands, "console", console)
    monkeypatch.setattr(commands, "errors", console)
    monkeypatch.setattr("fsm_replication.cli.repair.Console", lambda **_: console)
    monkeypatch.setattr(commands, "configure_logging", lambda *_: None)
    monkeypatch.setattr(runtime, "tune_gc", lambda: None)
    return made


def write_config(folder: Path, server: RedisServer, *peers: dict[str, Any]) -> Path:
    """Write the configuration of node b, whose peers have odd names."""
    path = folder / "[red]node.yaml"
    plain = {
        "local_node_id": "b",
        "cursor": {"sqlite_path": str(folder / "[red]cursors.db")},
        "store": {"kind": "redis", "redis_url": server.url},
        "settings": {"startup": {"when_no_peer": "run"}},
        "peers": list(peers),
    }
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


async def fill(folder: Path, mine: RedisServer, theirs: RedisServer) -> None:
    """Put odd keys into two stores, and odd lines into the cursor file of one."""
    now = time.time_ns() // 1_000_000
    async with RedisSyncEngine(mine.url, node_id="b") as here:
        await here.apply_many([item(EVIL, b"here", now + 10 * 86_400_000), item("k", b"", now)])
    async with RedisSyncEngine(theirs.url, node_id=NAME) as there:
        await there.apply_many([item(EVIL, b"there", now), item(EVIL * 2, b"there", now)])
    store = SqliteCursorStore(str(folder / "[red]cursors.db"))
    await store.open()
    row = BootstrapRow(Position(StreamId(1, 0), 1), "", "i", EVIL)
    await store.begin_bootstrap(NAME, row, GapRow(NAME, now, 3, EVIL))
    fields = (b"op", EVIL.encode(), EVIL.encode(), EVIL.encode())
    letter = DeadLetter(NAME, EVIL, EVIL, EVIL, EVIL, fields, 9, now, first_stream_id=EVIL)
    await store.settle(NAME, None, [letter], keep=9)
    await store.close()


COMMANDS = (
    ["check"],
    ["repair", "--dry-run"],
    ["explain", EVIL],
    ["restamp", EVIL * 2],
    ["restamp", EVIL],
    ["restamp", EVIL, "--take", EVIL],
    ["ledger"],
    ["dead-letters list"],
    ["dead-letters show", "1"],
    ["repair", "--peer", EVIL],
    ["repair"],
)


def test_no_command_prints_data_as_it_is(
    redis_servers: Callable[[], RedisServer], tmp_path: Path, screens: io.StringIO
) -> None:
    """If this fails whoever can write a key can rewrite the terminal of an operator."""
    mine, theirs = redis_servers(), redis_servers()
    peers = [
        {"node_id": NAME, "redis_url": theirs.url},
        {"node_id": "[blink]gone", "redis_url": "redis://127.0.0.1:1"},
    ]
    config = str(write_config(tmp_path, mine, *peers))
    asyncio.run(fill(tmp_path, mine, theirs))
    for command, *more in COMMANDS:
        screens.seek(0)
        screens.truncate()
        result = CliRunner().invoke(commands.app, [*command.split(), config, *more])
        shown = screens.getvalue() + result.output
        assert is_plain(shown), shown
        # What rich takes for a style would be gone.
        assert any(odd in shown for odd in ("[red]x", NAME, "[blink]gone")), shown
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_no_command_shows_easily_is_escaped_too() -> None:
    """If this fails the demo, or a table of the command line, prints data as it is."""
    screen = io.StringIO()
    console = Console(file=screen, width=400, color_system=None)
    console.print(stats_table(RepairStats(problems=(EVIL,))))
    print_ledger([GapRow(EVIL, 1, 1, EVIL, 1, EVIL)], console)
    verdict = Verdict(
        history=EVIL, topology="mesh", nodes=2, commits=1, puts=1, deletes=0, content_bytes=1,
        seconds=1.0, changes_per_sec=1.0, files=1, differing={EVIL: 1}, skipped=0, delay_p50_ms=None, delay_p99_ms=None,
        outage=None,
    )  # fmt: skip
    console.print(_verdict(verdict))
    shown = screen.getvalue()
    assert is_plain(shown)
    assert shown.count(ESCAPED) >= 5


def test_an_error_has_a_line_for_each_problem_and_no_other() -> None:
    """If this fails data in an error passes for another line of the screen."""
    assert told(UsageError(f"no {EVIL}")) == f"no {ESCAPED}"
    assert told(ConfigError([EVIL, "b"], source=EVIL)).split("\n") == [
        f"2 problems in {ESCAPED}", f"  {ESCAPED}", "  b",
    ]  # fmt: skip


def test_log_lines_of_the_console_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails whoever can write a key can forge lines of the log, or command its reader."""
    root = logging.getLogger("fsm_replication")
    before = root.handlers[:], root.propagate, root.level
    try:
        runtime.configure_logging("info", runtime.LogFormat.CONSOLE)
        get_logger("x", peer_id="a").warning(
            "item_skipped", key=EVIL, error=UsageError(EVIL), many=[EVIL]
        )
        get_logger("x").error("crashed", exc_info=UsageError(EVIL))
    finally:
        root.handlers[:], root.propagate = before[:2]
        root.setLevel(before[2])
    lines = capsys.readouterr().err.splitlines()
    assert is_plain("\n".join(lines))
    assert sum("was skipped" in line for line in lines) == 1
    assert not any(line.startswith("end") for line in lines)
