"""What .ci/run and .ci/servers do, with nothing built or tested: that is for CI itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_servers import fake_server

FOLDER = Path(__file__).parent.parent / ".ci"
NAMES = {
    "redis-7.0": ("7.0.15", "Redis"),
    "redis-8.0": ("8.0.2", "Redis"),
    "valkey-8.1": ("8.1.1", "Valkey"),
}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def put(folder: Path, name: str) -> Path:
    """Put a program that only knows its version where the script keeps a server."""
    version, kind = NAMES[name]
    made = fake_server(folder / name, version, kind)
    return made.rename(made.with_name(f"{kind.lower()}-server"))


def run(folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run the script that makes servers with its results in a folder."""
    return bash(FOLDER / "servers", folder, PATH=path)


def bash(*command: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script."""
    shell = shutil.which("bash")
    assert shell is not None
    return subprocess.run(
        [shell, *command],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def no_compiler(tmp_path: Path) -> str:
    """A PATH without apt, make and compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tools = "mktemp mkdir chmod find rm grep sed dirname sh bash env tee tail cat realpath ln"
    for tool in tools.split():
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return str(folder)


def test_servers_that_are_there_are_kept(tmp_path: Path, no_compiler: str) -> None:
    """If this fails each run of CI builds all servers again."""
    lines = [f"{name}\t{put(tmp_path / 'servers', name)}\n" for name in NAMES]
    ended = run(tmp_path / "servers", no_compiler)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "".join(lines), "")
    assert sorted(path.name for path in (tmp_path / "servers").iterdir()) == sorted(NAMES)


def test_what_cannot_be_had_is_told(tmp_path: Path, no_compiler: str) -> None:
    """If this fails CI leaves out a server and nobody learns of it, or why."""
    there = put(tmp_path / "servers", "redis-7.0")
    broken = fake_server(tmp_path / "servers" / "redis-8.0", "7.9")
    ended = run(tmp_path / "servers", no_compiler)
    assert (ended.returncode, ended.stdout) == (0, f"redis-7.0\t{there}\n")
    for name in ("redis-8.0", "valkey-8.1"):
        assert f"{name} cannot be built: this machine has no apt-get, make" in ended.stderr
        assert f"{name} could not be had\n" in ended.stderr
    assert broken.exists()


@pytest.mark.parametrize("version", [None, "6.2.14", "7.2.5"])
def test_redis_7_must_be_there(tmp_path: Path, no_compiler: str, version: str | None) -> None:
    """If this fails CI is content without the version most people run, or refuses theirs."""
    folder = tmp_path / "installed"
    if version is not None:
        fake_server(folder, version)
    ended = run(tmp_path / "servers", os.pathsep.join((no_compiler, str(folder))))
    usable = version == "7.2.5"
    assert ended.returncode == (0 if usable else 1)
    assert ended.stdout == (f"redis-7\t{folder / 'redis-server'}\n" if usable else "")
    assert ("redis-7.0 could not be had" in ended.stderr) is not usable


# Says what it was asked for and what it saw, in place of running it.
UV = """#!/bin/sh
echo "uv $* | $(command -v redis-server) | $FSM_REDIS_SERVER" >> "$SEEN"
case "$*" in
"run pytest"*)
  case "$*$FSM_REDIS_SERVER" in *"$FAILING") failed="1 failed, " ;; *) failed= ;; esac
  echo "tests on what is chosen: 2 passed, 0 failed, 0 error, 0 skipped"
  echo "========== ${failed}${PASSED:-5 passed}, 1 skipped in 12.34s =========="
  test -z "$failed" ;;
esac
"""
ROWS = (
    "README's test command",
    "slow tests",
    "server tests on redis-7.0",
    "server tests on redis-8.0",
    "server tests on valkey-8.1",
)


class Ci:
    """A machine with a server of its own, on which nothing is really run."""

    def __init__(self, folder: Path, path: str) -> None:
        self.seen = folder / "seen"
        self.cache = folder / "cache"
        self.tools = fake_server(folder / "tools").parent
        (self.tools / "pip").write_text("#!/bin/sh\n")
        (self.tools / "uv").write_text(UV)
        for tool in ("pip", "uv"):
            (self.tools / tool).chmod(0o755)
        self.path = os.pathsep.join((str(self.tools), path))

    def run(self, *servers: str, failing: str = "nothing", passed: str = "") -> tuple[int, str]:
        """Run CI where some servers have been built; returns its exit code and its last lines."""
        for name in servers:
            put(self.cache / "fsm-servers", name)
        ended = bash(
            FOLDER / "run", PATH=self.path, XDG_CACHE_HOME=str(self.cache), SEEN=str(self.seen),
            FAILING=failing, PASSED=passed, FSM_REDIS_SERVER="/the/callers",
        )  # fmt: skip
        return ended.returncode, ended.stdout[ended.stdout.rindex("=== What ran") :]


@pytest.fixture
def ci(tmp_path: Path, no_compiler: str) -> Ci:
    """A machine without a compiler."""
    return Ci(tmp_path, no_compiler)


def test_ci_tries_every_server_and_tells_it(ci: Ci) -> None:
    """If this fails CI leaves out what a newcomer has, or a server, or does not show it."""
    code, told = ci.run(*NAMES)
    assert code == 0, told
    for row in ROWS:
        assert f"{row}: 5 passed, 1 skipped, in 0 min" in told
    assert told.count("of these on what is chosen: 2 passed") == 5
    assert "All is well." in told
    runs = [line.split(" | ") for line in ci.seen.read_text().splitlines()]
    assert [run for run in runs if run[0].startswith("uv run pytest")] == [
        ["uv run pytest", "", ""],
        ["uv run pytest -m slow", "", ""],
        *(
            [
                "uv run pytest -m server",
                str(ci.tools / "redis-server"),
                str(ci.cache / "fsm-servers" / name / f"{kind.lower()}-server"),
            ]
            for name, (_, kind) in NAMES.items()
        ),
    ]
    for check in ("ruff check", "ruff format --check", "mypy", "fsm-replication diagram --check"):
        assert f"uv run {check}" in [run[0] for run in runs]


@pytest.mark.parametrize("failing", ["run pytest", "-m slow", "valkey-server"])
def test_a_failure_fails_ci_at_its_end(ci: Ci, failing: str) -> None:
    """If this fails CI passes though tests have failed, or stops at the first that does."""
    code, told = ci.run(*NAMES, failing=failing)
    assert code == 1
    assert told.count("1 failed, 5 passed") == 1
    assert all(f"{row}: " in told for row in ROWS)
    assert ": exit code 1" in told
    assert "All is well." not in told
    assert "uv run mypy" in ci.seen.read_text()


def test_a_run_of_nothing_fails_ci(ci: Ci) -> None:
    """If this fails CI passes though all tests were skipped."""
    code, told = ci.run(*NAMES, passed="10 deselected")
    assert code == 1
    assert "FAILED: slow tests: no test has passed" in told


def test_ci_goes_on_without_the_newest_servers_but_not_without_redis_7(ci: Ci) -> None:
    """If this fails CI hides what it could not try, or fails for what an archive lacks that day."""
    code, told = ci.run("redis-7.0")
    assert code == 0, told
    assert "NOT TRIED: redis-8.0 could not be had" in told
    assert "NOT TRIED: valkey-8.1 could not be had" in told
    shutil.rmtree(ci.cache)
    code, told = ci.run("redis-8.0")
    assert code == 1
    assert "FAILED: servers: there is no Redis 7" in told
    assert "server tests on redis-8.0: 5 passed" in told
