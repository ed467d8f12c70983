"""What README.md says is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Peer

from fsm_replication.config import ReplicationConfig
from fsm_replication.diagram import mermaid
from fsm_replication.servers import RedisServer
from fsm_replication.tables import ENGINE, LINK, Table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


async def test_the_embedding_example_runs_as_it_stands(
    redis_servers: Callable[[], RedisServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If this fails the first thing a user copies does not work."""
    monkeypatch.chdir(tmp_path)
    peer = Peer(redis_servers(), "there")
    peer.write_marker()
    peer.send("hello", b"world")
    (example,) = blocks("python")
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "README.md", "exec"), names)
    await names["main"](peer.server.url)
    peer.close()
    assert capsys.readouterr().out == "Running [('hello', b'world')]\n"
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_configuration_is_one(tmp_path: Path) -> None:
    """If this fails the example configuration has a problem."""
    (example,) = blocks("yaml")
    path = tmp_path / "node.yaml"
    path.write_text(example, encoding="utf-8")
    config = ReplicationConfig.load(path)
    assert [peer.node_id for peer in config.peers] == ["lyon"]


@pytest.mark.parametrize("table", [ENGINE, LINK], ids=lambda table: table.name)
def test_the_pictures_are_those_of_the_tables(table: Table) -> None:
    """If this fails the README shows machines that are not there: copy the diagrams again."""
    picture = mermaid(table).split("\n", 1)[1]
    assert picture in blocks("mermaid")


def test_ci_runs_the_readmes_test_command() -> None:
    """If this fails CI tests something else than a newcomer does."""
    (command,) = [block for block in blocks("sh") if "pytest" in block]
    assert command.strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
