"""The command line as a user runs it, in processes of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import Peer, until

from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.layout import Keys
from fsm_replication.ports import Cursor, DeadLetter, Position, StreamId
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine

COMMAND = [sys.executable, "-m", "fsm_replication"]


def run(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [*COMMAND, *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(Path.cwd())} | env,
    )


def write_config(folder: Path, server: RedisServer, *peers: tuple[str, RedisServer]) -> Path:
    """Write the configuration of node b on a Redis server."""
    path = folder / "node.yaml"
    lines = [
        "local_node_id: b",
        f"cursor: {{sqlite_path: {folder / 'cursors.db'}}}",
        f"store: {{kind: redis, redis_url: '{server.url}'}}",
        "settings: {startup: {when_no_peer: run}}",
        "peers:" if peers else "peers: []",
    ]
    lines += [f"  - {{node_id: {name}, redis_url: '{at.url}'}}" for name, at in peers]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class NodeProcess:
    """A node run by the command line."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            [*COMMAND, "run", str(self._config), "--log-format", "json"],
            stderr=subprocess.PIPE,
            text=True,
        )

    def signal(self, number: signal.Signals) -> str:
        """Send a signal, wait for the end, and return what was logged."""
        assert self.process is not None
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=30)
        return log


@pytest.fixture
def node_process() -> Iterator[Callable[[Path], NodeProcess]]:
    """A maker of node processes, none of which outlives the test."""
    made: list[NodeProcess] = []

    def make(config: Path) -> NodeProcess:
        made.append(NodeProcess(config))
        return made[-1]

    yield make
    for node in made:
        if node.process is not None and node.process.poll() is None:
            node.process.kill()
            node.process.communicate()


@asynccontextmanager
async def store_at(server: RedisServer, node_id: str) -> AsyncIterator[RedisSyncEngine]:
    """Open the store of a node."""
    async with RedisSyncEngine(server.url, node_id=node_id) as store:
        yield store


async def holds(store: RedisSyncEngine) -> dict[str, bytes]:
    """Return all live items of a store."""
    return {item.key: item.content async for item in store.scan()}


async def test_a_killed_node_goes_on_where_it_was(
    redis_servers: Callable[[], RedisServer],
    node_process: Callable[[Path], NodeProcess],
    tmp_path: Path,
    full: bool,
) -> None:
    """If this fails kill -9 of a node in the middle of a replay loses changes."""
    a, b = redis_servers(), redis_servers()
    node = node_process(write_config(tmp_path, b, ("a", a)))
    stream = Peer(b, "b")
    async with store_at(a, "a") as source, store_at(b, "b") as target:
        node.start()
        done = asyncio.Event()

        async def write() -> None:
            number = 0
            while not done.is_set():
                number += 1
                await source.put(f"k{number % 400}", b"v%d" % number * (number % 50))
                if number % 11 == 0:
                    await source.delete(f"k{number % 397}")

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            try:
                for _ in range(20 if full else 3):
                    seen = stream.client.xlen(Keys().stream)
                    await until(lambda seen=seen: stream.client.xlen(Keys().stream) > seen + 200)  # type: ignore[misc]
                    await asyncio.to_thread(node.signal, signal.SIGKILL)
                    node.start()
            finally:
                done.set()
        wanted = await holds(source)
        deadline = time.monotonic() + 20
        while await holds(target) != wanted:
            assert time.monotonic() < deadline, "the killed node never caught up"
            await asyncio.sleep(0.05)
        log = await asyncio.to_thread(node.signal, signal.SIGTERM)
    stream.close()
    assert node.process is not None
    assert node.process.returncode == 0
    moves = [json.loads(line) for line in log.splitlines()]
    dests = [move["dest"] for move in moves if move["event"] == "transition"]
    assert dests[-1] == "Stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_stops_cleanly_on_a_signal(
    redis_server: RedisServer,
    node_process: Callable[[Path], NodeProcess],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """If this fails a node that is asked to stop does not, or leaves its cursors unsaved."""
    node = node_process(write_config(tmp_path, redis_server))
    node.start()
    assert node.process is not None
    assert node.process.stderr is not None
    for line in node.process.stderr:
        if '"dest": "Running"' in line:
            break
    log = node.signal(number)
    assert node.process.returncode == 0
    assert '"dest": "Stopped"' in log


def test_run_says_why_it_cannot_start(tmp_path: Path) -> None:
    """If this fails a node that cannot start gives a traceback instead of a sentence."""
    config = tmp_path / "node.yaml"
    config.write_text(
        "local_node_id: b\nstore: {kind: memory}\nsettings: {startup: {timeout: 200ms}}\n"
        "peers: [{node_id: a, redis_url: 'redis://u:secret@127.0.0.1:1'}]\n"
        f"cursor: {{sqlite_path: {tmp_path / 'c.db'}}}\n"
    )
    ended = run("run", str(config))
    assert ended.returncode == 1
    assert "no peer could be reached" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr + ended.stdout


def test_check_lists_every_problem(tmp_path: Path) -> None:
    """If this fails a configuration is mended one problem at a time."""
    config = tmp_path / "node.yaml"
    config.write_text("peers: [{node_id: a}]\nsettings: {hot_path: {batch_size: 0}, colour: 1}\n")
    ended = run("check", str(config))
    assert ended.returncode == 1
    for told in ("local_node_id", "peers[0].redis_url", "hot_path.batch_size", "settings.colour"):
        assert told in ended.stderr


def test_check_asks_each_peer(redis_servers: Callable[[], RedisServer], tmp_path: Path) -> None:
    """If this fails check says that all is well when a peer cannot be read."""
    mine, well, wrong = redis_servers(), redis_servers(), redis_servers()
    for server, node_id in ((well, "a"), (wrong, "z")):
        peer = Peer(server, node_id)
        peer.write_marker()
        peer.close()
    ended = run("check", str(write_config(tmp_path, mine, ("a", well), ("c", wrong))))
    assert ended.returncode == 1
    assert "peer a" in ended.stdout
    assert "answers" in ended.stdout
    assert "calls itself 'z'" in ended.stdout
    ended = run("check", str(write_config(tmp_path, mine, ("a", well))))
    assert ended.returncode == 0, ended.stdout + ended.stderr


async def test_dead_letters_are_listed_beside_a_running_node(tmp_path: Path) -> None:
    """If this fails nobody can see what could not be applied while the node runs."""
    path = tmp_path / "c.db"
    config = tmp_path / "node.yaml"
    config.write_text(f"local_node_id: b\ncursor: {{sqlite_path: {path}}}\n")
    store = SqliteCursorStore(str(path))
    await store.open()
    cursor = Cursor(Position(StreamId(5, 0), 1), "x")
    letter = DeadLetter("a", "5-0", "hash", "it does not match", "k", (b"op", b"\xff"), 3, 0)
    await store.settle("a", cursor, [letter], keep=10)
    listed = await asyncio.to_thread(run, "dead-letters", "list", str(config))
    assert listed.returncode == 0, listed.stderr
    for told in ("5-0", "hash", "it does not match", "1970-01-01"):
        assert told in listed.stdout
    listed = await asyncio.to_thread(run, "dead-letters", "list", str(config), "--json")
    assert json.loads(listed.stdout)["fields"] == ["op", "\\xff"]
    await store.close()


def test_the_diagrams_are_checked_for_drift(tmp_path: Path) -> None:
    """If this fails a diagram can differ from its table without anybody noticing."""
    assert run("diagram", str(tmp_path)).returncode == 0
    assert run("diagram", str(tmp_path), "--check").returncode == 0
    (tmp_path / "link.mmd").write_text("stateDiagram-v2\n")
    ended = run("diagram", str(tmp_path), "--check")
    assert ended.returncode == 1
    assert "link.mmd" in ended.stderr
    assert (tmp_path / "link.mmd").read_text() == "stateDiagram-v2\n"


def make_repository(folder: Path) -> None:
    """Make a small repository with a history of every kind of change."""

    def git(*args: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(folder), *identity, *args], check=True)

    folder.mkdir()
    git("init", "-q", "-b", "main")
    for number in range(12):
        (folder / f"file {number % 5}.txt").write_text(f"version {number}\n" * number)
        (folder / "dir").mkdir(exist_ok=True)
        (folder / "dir" / "binary.bin").write_bytes(os.urandom(1000))
        if number == 8:
            (folder / "file 1.txt").unlink()
        if number == 9:
            (folder / "link").symlink_to("dir/binary.bin")
        git("add", "-A")
        git("commit", "-q", "-m", f"change {number}")


@pytest.mark.parametrize("shape", [("mesh", 3), ("chain", 4), ("ring", 3), ("mesh", 1)])
@pytest.mark.server
def test_the_demo_ends_in_agreement(tmp_path: Path, shape: tuple[str, int]) -> None:
    """If this fails a newcomer's first command fails."""
    make_repository(tmp_path / "repo")
    topology, nodes = shape
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ended = run(
        "demo", "--topology", topology, "--nodes", str(nodes), "--json", "--repo",
        str(tmp_path / "repo"), TMPDIR=str(temporary),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    verdict = json.loads(ended.stdout)
    assert verdict["agreed"] is True
    assert (verdict["commits"], verdict["nodes"], verdict["topology"]) == (12, nodes, topology)
    assert verdict["files"] == 7
    assert list(temporary.iterdir()) == []


@pytest.mark.server
def test_the_demo_survives_an_outage(tmp_path: Path) -> None:
    """If this fails a node that was cut off for longer than streams remember stays behind."""
    make_repository(tmp_path / "repo")
    done = run("demo", "--repo", str(tmp_path / "repo"), "--outage", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["agreed"]
    # All may agree before a link is met again, or because b passed on later what was trimmed at a.
    assert set(verdict["outage"]["bootstrapped"]) <= {"a", "b"}
    assert set(verdict["outage"]["healed_by"]) <= {"bootstrap", "repair", "nothing"}
    assert verdict["outage"]["entries_trimmed"] > 0
    assert verdict["outage"]["changes_missed"] > 0
    assert run("demo", "--nodes", "1", "--outage").returncode == 1


@pytest.mark.server
def test_the_demo_replays_a_directory_outside_a_repository(tmp_path: Path) -> None:
    """If this fails the demo is of no use to somebody without a repository."""
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    ended = run("demo", "--repo", str(folder), "--nodes", "2")
    assert ended.returncode == 0, ended.stderr
    assert "in no git repository" in ended.stderr
    assert "All 2 nodes hold exactly the 2 files" in ended.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.server
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """If this fails Ctrl-C leaves Redis servers and files on the machine."""
    make_repository(tmp_path / "repo")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [*COMMAND, "demo", "--repo", str(tmp_path / "repo")],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while len(list(temporary.glob("fsm-redis-*/redis.sock"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode in (0, 130)  # It may have been done already.
    assert list(temporary.iterdir()) == []


def test_without_a_server_the_demo_says_what_to_install(tmp_path: Path) -> None:
    """If this fails a newcomer without Redis is left with a traceback."""
    code = (
        "import fsm_replication.servers as s; s.find_all_redis_servers = lambda: ();"
        "from fsm_replication.cli import main; import sys; sys.argv[1:] = ['demo']; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "apt install redis-server" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [["demo"], ["bench"]], ids=lambda command: command[0])
def test_demo_and_bench_use_the_chosen_server(command: list[str]) -> None:
    """If this fails FSM_REDIS_SERVER chooses for the tests, and demo and bench run on another."""
    ended = run(*command, FSM_REDIS_SERVER="/nowhere/redis-server")
    assert ended.returncode == 1
    assert "FSM_REDIS_SERVER is '/nowhere/redis-server'" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
