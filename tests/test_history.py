"""The history that the demo replays."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from conftest import until
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.demo.history import (
    DirectoryHistory,
    GitHistory,
    History,
    HistoryError,
    key_to_path,
    open_history,
    path_to_key,
)

SEGMENTS = st.binary(min_size=1, max_size=8).filter(lambda s: b"/" not in s and b"\0" not in s)
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(b"/".join)


class Repository:
    """A repository to be written commit by commit, without a work tree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.git("init", "-q", "-b", "main", str(path))
        self.commits = 0

    def git(self, *args: str, feed: bytes = b"") -> bytes:
        """Run git."""
        where = [] if args[0] == "init" else ["-C", str(self.path)]
        ran = subprocess.run(["git", *where, *args], input=feed, capture_output=True, check=True)
        return ran.stdout

    def commit(self, *commands: bytes, parents: str = "") -> None:
        """Make a commit of fast-import commands."""
        self.commits += 1
        head = b"commit refs/heads/main\ncommitter a <a@example.org> %d +0000\ndata 1\nx\n" % (
            1_700_000_000 + self.commits
        )
        before = b"from refs/heads/main^0\n" if self.commits > 1 else b""
        feed = head + before + parents.encode() + b"".join(commands) + b"\n"
        self.git("fast-import", "--quiet", feed=feed)


def modify(path: bytes, content: bytes, mode: bytes = b"100644") -> bytes:
    """Return the command that writes a file."""
    quoted = b'"' + b"".join(b"\\%03o" % byte for byte in path) + b'"'
    return b"M %s inline %s\ndata %d\n%s\n" % (mode, quoted, len(content), content)


def delete(path: bytes) -> bytes:
    """Return the command that removes a file."""
    return b"D " + b'"' + b"".join(b"\\%03o" % byte for byte in path) + b'"\n'


async def replay(history: History) -> dict[str, bytes]:
    """Return the digests of what is left after all changes."""
    files: dict[str, bytes] = {}
    commits = 0
    async for commit in history.commits():
        commits += 1
        keys = [change.key for change in commit.changes]
        assert len(keys) == len(set(keys))
        for change in commit.changes:
            if change.content is None:
                files.pop(change.key, None)
            else:
                files[change.key] = hashlib.sha256(change.content).digest()
    assert commits == await history.count()
    return files


@given(PATHS)
def test_every_path_comes_back_from_its_key(path: bytes) -> None:
    """If this fails a key does not tell which file it was."""
    assert key_to_path(path_to_key(path)) == path


@given(PATHS, PATHS)
def test_no_two_paths_share_a_key(a: bytes, b: bytes) -> None:
    """If this fails two files overwrite each other."""
    assert (path_to_key(a) == path_to_key(b)) == (a == b)


def test_keys_are_dotted_paths() -> None:
    """If this fails keys look different than documented."""
    assert path_to_key(b"src/app/main") == "src.app.main"
    assert path_to_key(b"a.b/100%") == "a%2Eb.100%25"
    assert path_to_key("é".encode()) == "é"
    assert path_to_key(b"\xff") == "%FF"


async def test_every_kind_of_change_is_replayed(tmp_path: Path) -> None:
    """If this fails the demo compares something else than the repository holds."""
    repository = Repository(tmp_path / "r")
    blob = b"0123456789" * 5
    repository.commit(
        modify(b"a.txt", b"1"),
        modify(b"dir/b", blob),
        modify(b"with space\nand line", b"x"),
        modify(b"\xff\xfe/bytes", bytes(range(256))),
        modify("é/ü".encode(), b""),
        modify(b"link", b"a.txt", b"120000"),
    )
    repository.commit(modify(b"a.txt", b"2"), delete(b"dir/b"))
    repository.commit()
    repository.commit(modify(b"dir/c", blob), modify(b"a.txt", b"2", b"100755"))
    commit_id = repository.git("rev-parse", "HEAD").strip()
    repository.commit(b"M 160000 " + commit_id + b" sub\n")
    repository.commit(b"M 160000 " + commit_id + b" dir/c\n")
    repository.commit(modify(b"sub", b"now a file"))
    history = open_history(repository.path)
    assert isinstance(history, GitHistory)
    final = await history.final_files()
    assert await replay(history) == final
    assert {key_to_path(key) for key in final} == {
        b"a.txt",
        b"with space\nand line",
        b"\xff\xfe/bytes",
        "é/ü".encode(),
        b"link",
        b"sub",
    }
    assert final["link"] == hashlib.sha256(b"a.txt").digest()


async def test_a_merge_is_compared_with_its_first_parent_only(tmp_path: Path) -> None:
    """If this fails a merge loses what came from the branch, or tells it twice."""
    repository = Repository(tmp_path / "r")
    repository.commit(modify(b"base", b"1"))
    side = (
        b"commit refs/heads/side\ncommitter a <a@example.org> 1700000050 +0000\ndata 1\ns\n"
        b"from refs/heads/main^0\n" + modify(b"side", b"s") + b"\n"
    )
    repository.git("fast-import", "--quiet", feed=side)
    repository.commit(modify(b"main", b"m"))
    repository.commit(modify(b"side", b"s"), parents="merge refs/heads/side^0\n")
    history = GitHistory(repository.path)
    assert await history.count() == 3
    commits = [commit async for commit in history.commits()]
    assert [[change.key for change in commit.changes] for commit in commits] == [
        ["base"],
        ["main"],
        ["side"],
    ]
    assert await replay(history) == await history.final_files()


async def test_what_cannot_be_an_item_is_left_out_of_both(tmp_path: Path) -> None:
    """If this fails a path that is too long makes the nodes disagree with the repository."""
    repository = Repository(tmp_path / "r")
    repository.commit(modify(b"/".join([b"long" * 50] * 6), b"1"), modify(b"ok", b"2"))
    history = GitHistory(repository.path)
    assert await replay(history) == await history.final_files()
    assert history.skipped == 1


async def test_a_repository_without_commits_says_so(tmp_path: Path) -> None:
    """If this fails an empty repository ends in a traceback."""
    repository = Repository(tmp_path / "r")
    with pytest.raises(HistoryError, match="is there a commit"):
        await open_history(repository.path).count()
    with pytest.raises(HistoryError, match="not a directory"):
        open_history(tmp_path / "nowhere")


async def test_a_directory_is_read_as_it_is(tmp_path: Path) -> None:
    """If this fails outside a repository files are missed, or links are followed in circles."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number in range(120):
        (tmp_path / "deep" / f"{number}.txt").write_text(str(number))
    (tmp_path / "deep" / "er" / "up").symlink_to("..")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    history = open_history(tmp_path)
    assert isinstance(history, DirectoryHistory)
    final = await history.final_files()
    assert len(final) == 122
    assert await replay(history) == final
    assert history.skipped == 1
    assert final["deep.er.up"] == hashlib.sha256(b"..").digest()


async def test_a_cancelled_replay_leaves_no_git_behind(tmp_path: Path) -> None:
    """If this fails interrupting the demo leaves child processes."""
    repository = Repository(tmp_path / "r")
    for number in range(30):
        repository.commit(modify(b"file", b"%d" % number))

    async def read_some() -> None:
        async for _ in GitHistory(repository.path).commits():
            await asyncio.sleep(0.01)

    def children() -> list[str]:
        listing = subprocess.run(
            ["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True
        )
        rows = [row.split(maxsplit=1) for row in listing.stdout.splitlines()]
        return [row[1] for row in rows if row[0] == str(os.getpid()) and "git" in row[1]]

    task = asyncio.create_task(read_some())
    await until(children, "git runs")
    task.cancel()
    await asyncio.wait((task,))
    await until(lambda: not children(), "no git is left")
