"""repair, explain and ledger as a user runs them, in processes of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import run, write_config

from fsm_replication import ReplicationConfig, ReplicationEngine
from fsm_replication.config import ReplicationConfig as Config
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.items import SyncItem, content_hash
from fsm_replication.ports import Agreement, BootstrapRow, Cursor, GapRow, Position, StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine

Servers = Callable[[], RedisServer]


async def two_nodes(servers: Servers, folder: Path) -> tuple[Path, RedisServer, RedisServer]:
    """Fill node a, and configure node b, which is not running."""
    a, b = servers(), servers()
    async with RedisSyncEngine(a.url, node_id="a") as store:
        await store.put_many({f"k{n}": b"x" * n for n in range(50)})
        await store.delete("k7")
    async with RedisSyncEngine(b.url, node_id="b") as store:
        await store.put("only.here", b"x")
    return write_config(folder, b, ("a", a)), a, b


async def test_a_dry_run_changes_nothing(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails a person cannot look before he leaps."""
    config, _, b = await two_nodes(redis_servers, tmp_path)
    done = run("repair", str(config), "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "only.here  newer here" in lines
    assert any(line.startswith("k49  newer at a, ") for line in lines)
    assert lines[-1].startswith("a: 51 keys differ; 50 are newer there, to fetch them would take")
    as_json = [
        json.loads(line)
        for line in run("repair", str(config), "--dry-run", "--json").stdout.splitlines()
    ]
    assert {row["key"] for row in as_json if row["newer"] == "peer"} == {f"k{n}" for n in range(50)}
    assert sum(row["bytes"] for row in as_json) > 1000
    async with RedisSyncEngine(b.url, node_id="b") as store:
        assert await store.get("k1") is None


async def test_a_repair_fetches_what_is_newer(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails a node cannot be mended while its process is stopped."""
    config, _, b = await two_nodes(redis_servers, tmp_path)
    done = run("repair", str(config), "--json")
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert (stats["items_submitted"], stats["items_deleted"], stats["errors"]) == (49, 1, 0)
    async with RedisSyncEngine(b.url, node_id="b") as store:
        assert await store.get("k1") is not None
        assert await store.get("k7") is None
    again = run("repair", str(config), "--peer", "a")
    assert again.returncode == 0
    assert "items fetched" in again.stdout


async def test_a_running_engine_is_not_repaired_behind_its_back(
    redis_servers: Servers, tmp_path: Path
) -> None:
    """If this fails two writers of one cursor file spoil it."""
    path, _, b = await two_nodes(redis_servers, tmp_path)
    config = ReplicationConfig.load(path)
    async with RedisSyncEngine(b.url, node_id="b") as store, ReplicationEngine(config, store):
        done = run("repair", str(path))
        assert done.returncode == 1
        assert "stop it first" in done.stderr
        assert "Traceback" not in done.stderr
        assert run("repair", str(path), "--dry-run").returncode == 0
        assert run("explain", str(path), "k1").returncode == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--dry-run", "--force"),
        ("--accept-stale", "a", "--reject-stale", "a"),
        ("--peer", "b", "--accept-stale", "a"),
        ("--peer", "nobody"),
    ],
)
async def test_choices_that_contradict_each_other_are_refused(
    redis_servers: Servers, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """If this fails a slip of the pen deletes what it should have kept."""
    config, _, _ = await two_nodes(redis_servers, tmp_path)
    done = run("repair", str(config), *options)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr


async def test_a_peer_that_is_down_is_named(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails a repair that reached nobody looks like one that found nothing."""
    config, a, _ = await two_nodes(redis_servers, tmp_path)
    text = config.read_text().replace(a.url, "redis://127.0.0.1:1")
    config.write_text(text)
    done = run("repair", str(config))
    assert done.returncode == 1
    assert "peer 'a' cannot be compared now: it is Backoff: redis://127.0.0.1:1" in done.stdout
    assert run("repair", str(config), "--dry-run").returncode == 1


@pytest.mark.parametrize("choice", ["--accept-stale", "--reject-stale"])
async def test_stale_items_are_accepted_or_rejected(
    redis_servers: Servers, tmp_path: Path, choice: str
) -> None:
    """If this fails old items that were held back wait for ever."""
    config, a, b = await two_nodes(redis_servers, tmp_path)
    assert run("repair", str(config)).returncode == 0
    now = int(time.time() * 1000)
    cursors = SqliteCursorStore(str(tmp_path / "cursors.db"))
    await cursors.open()
    await cursors.set_agreed("a", Agreement(now - 8 * 86_400_000), heal_gaps=False)
    await cursors.close()
    old = SyncItem("old", b"x", "binary", content_hash(b"x"), 1, now - 7 * 86_400_000 - 60_000)
    async with RedisSyncEngine(a.url, node_id="a") as store:
        await store.submit(old)
    stats = json.loads(run("repair", str(config), "--json").stdout)
    assert (stats["items_deferred"], stats["items_fetched"]) == (1, 0)
    assert run("repair", str(config), choice, "a").returncode == 0
    async with RedisSyncEngine(b.url, node_id="b") as store:
        held = (await store.get_many(["old"]))[0]
        assert held is not None
        assert held.deleted == (choice == "--reject-stale")


async def test_a_key_is_explained(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails nobody can tell why a node holds what it holds."""
    config, _, _ = await two_nodes(redis_servers, tmp_path)
    assert run("repair", str(config)).returncode == 0
    done = run("explain", str(config), "k3")
    assert done.returncode == 0, done.stderr
    assert "version 1" in done.stdout
    assert "written at a" in done.stdout
    assert "the same" in done.stdout
    assert "theirs wins: nothing is held here" not in done.stdout
    deleted = run("explain", str(config), "k7").stdout
    assert "deleted" in deleted
    assert "ours is the only version" in run("explain", str(config), "only.here").stdout
    assert run("explain", str(config), "").returncode == 1


async def test_the_ledger_tells_gaps(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails losses of the stream leave no trace for a person."""
    config, _, _ = await two_nodes(redis_servers, tmp_path)
    cursors = SqliteCursorStore(Config.load(config).cursor.sqlite_path)
    await cursors.open()
    head = Position(StreamId(1, 0), 1)
    row = BootstrapRow(head, "", "i", "why")
    await cursors.begin_bootstrap("a", row, GapRow("a", 1_700_000_000_000, 2310, "trimmed"))
    await cursors.finish_bootstrap("a", Cursor(head, "i"), 1_700_000_003_000)
    await cursors.begin_bootstrap("a", row, GapRow("a", 1_700_000_000_000, None, "again"))
    await cursors.close()
    text = run("ledger", str(config)).stdout
    assert "a: gaps: 2, entries missed by the stream: 2,310 and an unknown number in 1" in text
    assert "healed by bootstrap at 2023-11-14 22:13:23 UTC: trimmed" in text
    assert "not healed: again" in text
    rows = [json.loads(line) for line in run("ledger", str(config), "--json").stdout.splitlines()]
    assert [one["missed"] for one in rows] == [2310, None]
