"""What .ci/servers does with what is there; that it can build is for CI to see."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_servers import fake_server

SCRIPT = Path(__file__).parent.parent / ".ci" / "servers"
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
    """Run the script with its results in a folder."""
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, SCRIPT, folder],
        env=os.environ | {"PATH": path},
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
    for tool in ("mktemp", "mkdir", "chmod", "find", "rm", "grep", "sed", "dirname", "sh"):
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
