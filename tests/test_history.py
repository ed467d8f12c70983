"""The histories the demo replays: real git repositories in every shape, and directories."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fsm_replication.demo import history as module
from fsm_replication.demo.history import (
    Change,
    Commit,
    DirectoryHistory,
    GitHistory,
    History,
    HistoryError,
    find_repository,
    git_is_installed,
    key_to_path,
    open_history,
    path_to_key,
)
from fsm_replication.items import check_key

FILE, PROGRAM, LINK, SUBMODULE = b"100644", b"100755", b"120000", b"160000"
SOME_COMMIT = b"1234567890" * 4
Row = tuple[Any, ...]


@pytest.fixture(scope="module", autouse=True)
def no_settings_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what this machine's git is set to out of the tests."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            environment.delenv(name)
        environment.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        environment.setenv("GIT_CONFIG_NOSYSTEM", "1")
        environment.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path_factory.getbasetemp()))
        yield


def git(folder: Path, *arguments: str, feed: bytes | None = None) -> bytes:
    """Run git in a folder; it must succeed."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, input=feed, capture_output=True, check=True).stdout


class Repository:
    """A repository that is written by ``git fast-import``, so that any path and mode can be."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        git(folder, "init", "-q", "-b", "main", *options)
        self._script: list[bytes] = []
        self._number = 0

    def commit(self, *rows: Row, branch: str = "main", begin: str = "", merge: str = "") -> None:
        """Note a commit: (mode, path, content) writes a file, (path,) removes one."""
        self._number += 1
        out = b"commit refs/heads/%b\ncommitter a <a@example.org> %d +0000\ndata 0\n" % (
            branch.encode(),
            1_700_000_000 + self._number,
        )
        out += b"from %b\n" % begin.encode() if begin else b""
        out += b"".join(b"merge refs/heads/%b\n" % name.encode() for name in merge.split())
        for row in rows:
            quoted = b'"' + b"".join(b"\\%03o" % byte for byte in row[-1 if row[1:] == () else 1])
            if len(row) == 1:
                out += b'D %b"\n' % quoted
            elif row[0] == SUBMODULE:
                out += b'M 160000 %b %b"\n' % (row[2], quoted)
            else:
                out += b'M %b inline %b"\ndata %d\n%b\n' % (row[0], quoted, len(row[2]), row[2])
        self._script.append(out + b"\n")

    def write(self) -> Path:
        """Write the commits noted so far."""
        git(self.folder, "fast-import", "--quiet", feed=b"".join(self._script))
        self._script.clear()
        return self.folder


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository."""
    return Repository(tmp_path / "repo")


async def read(history: History) -> list[dict[str, bytes | None]]:
    """Return each commit's changes, after checking them against everything else known.

    A put must change something, a delete must remove something, and what is left in the end must
    be what the tree of the last commit says.
    """
    held: dict[str, bytes] = {}
    commits: list[dict[str, bytes | None]] = []
    async with aclosing(history.commits()) as found:
        async for commit in found:
            changes = {change.key: change.content for change in commit.changes}
            assert len(changes) == len(commit.changes), "a key stands twice in a commit"
            for key, content in changes.items():
                check_key(key)
                assert held.get(key) != content, "this changes nothing"
                if content is None:
                    del held[key]
                else:
                    held[key] = content
            commits.append(changes)
    assert len(commits) == await history.count()
    digests = {key: hashlib.sha256(content).digest() for key, content in held.items()}
    assert await history.final_files() == digests
    return commits


# Keys ----------------------------------------------------------------------------------------

PATHS = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.text(max_size=6).map(lambda text: text.encode("utf-8", "replace")),
        st.sampled_from([b".", b"..", b"%", b"%2E", b"a.b", b"\xed\xb2\x80", b"\xc2\x85"]),
    ),
    min_size=1,
    max_size=5,
).map(b"/".join)


@given(PATHS)
@example(b"")
@example(b"/")
@example(b"a//b/")
@example(bytes(range(1, 256)))
def test_a_path_can_be_had_back_from_its_key(path: bytes) -> None:
    """If this fails two files share a key, or a key is none or cannot be printed."""
    key = path_to_key(path)
    assert key_to_path(key) == path
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in key)
    assert key.count(".") == path.count(b"/")


@given(st.text(alphabet="a.%/2E0C\u00e9\x01\udc80", max_size=8))
def test_a_key_belongs_to_one_path_only(key: str) -> None:
    """If this fails two spellings of a key lead to the same file."""
    try:
        path = key_to_path(key)
    except ValueError:
        return
    assert path_to_key(path) == key


@pytest.mark.parametrize("key", ["%", "%4", "%41", "%2e", "%zz", "a%", "a/b", "\x01", "\udc80"])
def test_what_is_no_key_of_a_path_is_refused(key: str) -> None:
    """If this fails a mistyped key leads to some file."""
    with pytest.raises(ValueError, match="not the key of a path"):
        key_to_path(key)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (b"README.md", "README%2Emd"),
        (b"docs/api/index.rst", "docs.api.index%2Erst"),
        (b".github/a b.yml", "%2Egithub.a b%2Eyml"),
        (b"100%", "100%25"),
        (b"caf\xc3\xa9/\xff", "café.%FF"),
        (b"two\nlines", "two%0Alines"),
    ],
)
def test_keys_read_as_people_expect(path: bytes, key: str) -> None:
    """If this fails the demo's keys are spelt otherwise than the documentation says."""
    assert path_to_key(path) == key


# Commits -------------------------------------------------------------------------------------


async def test_files_are_added_changed_renamed_and_removed(repository: Repository) -> None:
    """If this fails the plainest history is replayed wrongly."""
    repository.commit((FILE, b"a.txt", b"one"), (FILE, b"dir/b", b"same"))
    repository.commit((FILE, b"a.txt", b"two"))
    repository.commit((b"dir/b",), (FILE, b"dir/c", b"same"))
    repository.commit((b"a.txt",))
    repository.commit((b"dir/c",), (FILE, b"dir", b"a file where a directory was"))
    history = GitHistory(repository.write())
    assert await read(history) == [
        {"a%2Etxt": b"one", "dir.b": b"same"},
        {"a%2Etxt": b"two"},
        {"dir.b": None, "dir.c": b"same"},
        {"a%2Etxt": None},
        {"dir.c": None, "dir": b"a file where a directory was"},
    ]
    assert history.skipped == 0
    ids = git(repository.folder, "rev-list", "--reverse", "HEAD").decode().split()
    async with aclosing(history.commits()) as commits:
        assert [commit.id async for commit in commits] == ids


async def test_a_symlink_is_its_target_text(repository: Repository) -> None:
    """If this fails links are followed, left out, or not told apart from what was there."""
    repository.commit((LINK, b"link", b"../some where"), (FILE, b"file", b"x"))
    repository.commit((LINK, b"file", b"link"), (LINK, b"link", b"elsewhere"))
    repository.commit((FILE, b"file", b"link"), (FILE, b"link", b"y"))
    assert await read(GitHistory(repository.write())) == [
        {"link": b"../some where", "file": b"x"},
        {"file": b"link", "link": b"elsewhere"},
        {"link": b"y"},
    ]


async def test_submodules_are_left_out(repository: Repository) -> None:
    """If this fails a submodule's commit id is taken for a file, or hides what a file became."""
    repository.commit((FILE, b"a", b"1"), (SUBMODULE, b"sub", SOME_COMMIT))
    repository.commit((SUBMODULE, b"sub", SOME_COMMIT[::-1]), (SUBMODULE, b"sub2", SOME_COMMIT))
    repository.commit((FILE, b"sub", b"now a file"), (SUBMODULE, b"a", SOME_COMMIT))
    repository.commit((SUBMODULE, b"sub", SOME_COMMIT), (LINK, b"a", b"sub"))
    repository.commit((b"sub",), (b"sub2",), (FILE, b"sub2/inner", b"in a directory"))
    assert await read(GitHistory(repository.write())) == [
        {"a": b"1"},
        {},
        {"sub": b"now a file", "a": None},
        {"sub": None, "a": b"sub"},
        {"sub2.inner": b"in a directory"},
    ]


async def test_a_merge_is_what_it_brought_to_its_first_parent(repository: Repository) -> None:
    """If this fails a branch's changes come twice, in the wrong order, or not at all."""
    repository.commit((FILE, b"a", b"1"))
    repository.commit((FILE, b"b", b"side"), (b"a",), branch="side", begin="refs/heads/main")
    repository.commit((FILE, b"b", b"later"), branch="side")
    repository.commit((FILE, b"d", b"third"), branch="third", begin="refs/heads/main")
    repository.commit((FILE, b"c", b"main"))
    repository.commit((FILE, b"b", b"later"), (b"a",), merge="side")
    repository.commit((FILE, b"d", b"by hand"), merge="third side")
    repository.commit((FILE, b"e", b"after"))
    assert await read(GitHistory(repository.write())) == [
        {"a": b"1"},
        {"c": b"main"},
        {"b": b"later", "a": None},
        {"d": b"by hand"},
        {"e": b"after"},
    ]


@pytest.mark.parametrize(
    "path",
    [
        b"a.b..c", b"100%/%2E", b"with space/ lead", b"two\nlines", b"\nfirst", b"tab\there",
        b"\xff\xfe/latin-\xe9", b"\xed\xb2\x80", "süß/日本語/🦊".encode(), b":100644 x", b'"quoted"',
        b"back\\slash", b"-dash", b"\x01\x7f", b"x" * 1024,
    ],
    ids=repr,
)  # fmt: skip
async def test_any_path_that_git_holds_is_replayed(repository: Repository, path: bytes) -> None:
    """If this fails an unusual file name ends the demo, or is mistaken for another."""
    repository.commit((FILE, path, b"one"), (FILE, b"other", b"x"))
    repository.commit((FILE, path, b"two"))
    repository.commit((path,))
    repository.commit((FILE, path, b"three"))
    commits = await read(GitHistory(repository.write()))
    key = path_to_key(path)
    assert commits == [{key: b"one", "other": b"x"}, {key: b"two"}, {key: None}, {key: b"three"}]


async def test_contents_come_byte_for_byte(repository: Repository) -> None:
    """If this fails empty, binary or large files are cut, or mistaken for git's own lines."""
    contents = [b"", b"\0", b"\n", bytes(range(256)) * 9000, b"no line feed", b"crlf\r\n", b"x" * 9]
    for number, content in enumerate(contents):
        repository.commit((FILE, b"%d" % number, content), (FILE, b"again", content))
    commits = await read(GitHistory(repository.write()))
    assert [commit["again"] for commit in commits] == contents
    assert [commit[str(number)] for number, commit in enumerate(commits)] == contents


async def test_a_change_of_mode_alone_is_no_change(repository: Repository) -> None:
    """If this fails chmod makes events that carry nothing, or hides a change made with it."""
    repository.commit((FILE, b"a", b"1"))
    repository.commit((PROGRAM, b"a", b"1"))
    repository.commit((FILE, b"a", b"2"))
    repository.commit()
    assert await read(GitHistory(repository.write())) == [{"a": b"1"}, {}, {"a": b"2"}, {}]


async def test_keys_that_are_too_long_are_left_out_and_counted(repository: Repository) -> None:
    """If this fails a very long path ends the demo, or the verdict misses a file."""
    long, grown = b"x" * 1025, b"." * 342
    repository.commit((FILE, long, b"1"), (FILE, grown, b"1"), (FILE, b"y" * 1024, b"1"))
    repository.commit((FILE, long, b"2"))
    repository.commit((long,))
    history = GitHistory(repository.write())
    assert await read(history) == [{"y" * 1024: b"1"}, {}, {}]
    assert history.skipped == 2


async def test_files_that_are_too_large_are_left_out_and_counted(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a huge file ends the demo, or its older version stays for ever."""
    monkeypatch.setattr(module, "CONTENT_BYTES_MAX", 100_000)
    most, more, far_more = b"m" * 100_000, b"n" * 100_001, b"o" * 5_000_000
    repository.commit((FILE, b"a", most), (FILE, b"b", more), (FILE, b"c", b"small"))
    repository.commit((FILE, b"a", far_more), (FILE, b"b", far_more))
    repository.commit((b"a",), (FILE, b"b", b"small"), (FILE, b"d", more))
    repository.commit((FILE, b"a", b"back"), (b"b",), (PROGRAM, b"d", more))
    repository.commit((b"d",))
    history = GitHistory(repository.write())
    for _ in range(2):  # Reading once more must not count once more.
        assert await read(history) == [
            {"a": most, "c": b"small"},
            {"a": None},
            {"b": b"small"},
            {"a": b"back", "b": None},
            {},
        ]
        assert history.skipped == 3


NUMBERS = count()
NAMES = st.sampled_from([b"a", b"a.b", b"dir/a", b"dir/%", b"\xff", b"caf\xc3\xa9"])
ROWS = st.one_of(
    st.tuples(st.sampled_from([FILE, PROGRAM, LINK]), NAMES, st.sampled_from([b"1", b"2", b"\0"])),
    st.tuples(st.just(SUBMODULE), NAMES, st.just(SOME_COMMIT)),
    st.tuples(NAMES),
)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(commits=st.lists(st.lists(ROWS, max_size=4), min_size=1, max_size=6))
async def test_any_history_ends_in_the_files_of_its_last_commit(
    tmp_path: Path, commits: list[list[Row]]
) -> None:
    """If this fails some sequence of kinds of change leaves a file behind, or loses one."""
    repository = Repository(tmp_path / f"repo-{next(NUMBERS)}")
    files: dict[bytes, bytes] = {}
    for rows in commits:
        repository.commit(*rows)
        for row in rows:
            files.pop(row[-1] if len(row) == 1 else row[1], None)
            if len(row) == 3 and row[0] != SUBMODULE:
                files[row[1]] = row[2]
    history = GitHistory(repository.write())
    await read(history)
    assert await history.final_files() == {
        path_to_key(path): hashlib.sha256(content).digest() for path, content in files.items()
    }


async def test_commits_made_meanwhile_change_nothing(repository: Repository) -> None:
    """If this fails who commits while the demo runs is told that the nodes do not agree."""
    for number in range(3):
        repository.commit((FILE, b"a", b"%d" % number))
    history = GitHistory(repository.write())
    repository.commit((FILE, b"a", b"later"), (FILE, b"b", b"later"), begin="refs/heads/main^0")
    repository.write()
    assert await read(history) == [{"a": b"0"}, {"a": b"1"}, {"a": b"2"}]


async def test_other_kinds_of_repository(tmp_path: Path) -> None:
    """If this fails repositories with SHA-256 ids, or cut-off histories, cannot be replayed."""
    newer = Repository(tmp_path / "sha256", "--object-format=sha256")
    newer.commit((FILE, b"a", b"1"))
    newer.commit((b"a",), (FILE, b"b", b"2"))
    assert await read(GitHistory(newer.write())) == [{"a": b"1"}, {"a": None, "b": b"2"}]
    older = Repository(tmp_path / "sha1")
    older.commit((FILE, b"a", b"1"))
    older.commit((FILE, b"b", b"2"))
    older.commit((FILE, b"c", b"3"))
    url = older.write().as_uri()
    git(tmp_path, "clone", "-q", "--depth=2", url, "shallow")
    commits = await read(GitHistory(tmp_path / "shallow"))
    assert commits == [{"a": b"1", "b": b"2"}, {"c": b"3"}]


async def test_settings_of_the_user_change_nothing(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails the demo breaks for those who have set up git to their liking."""
    other = Repository(tmp_path / "other")
    other.commit((FILE, b"wrong", b"wrong"))
    config = tmp_path / "gitconfig"
    config.write_text(
        "[core]\n quotepath = true\n pager = false\n abbrev = 5\n"
        "[diff]\n renames = copies\n noprefix = true\n relative = true\n external = false\n"
        f" orderFile = {tmp_path}/none\n ignoreSubmodules = all\n mnemonicPrefix = true\n"
        "[log]\n showSignature = true\n follow = true\n showRoot = false\n diffMerges = off\n"
        "[color]\n ui = always\n"
    )
    repository.commit((FILE, b"dir/\xe9", b"1" * 100), (FILE, b"b", b"2"))
    repository.commit((b"dir/\xe9",), (FILE, b"caf\xc3\xa9", b"1" * 100))
    folder = repository.write()
    (folder / "dir").mkdir()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_PAGER", "false")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DIR", str(other.write() / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other.folder))
    assert await read(open_history(folder / "dir")) == [
        {"dir.%E9": b"1" * 100, "b": b"2"},
        {"dir.%E9": None, "café": b"1" * 100},
    ]


async def test_nothing_is_written_into_the_repository(repository: Repository) -> None:
    """If this fails the demo changes what it only has to read."""
    repository.commit((FILE, b"a", b"1"))
    repository.commit((FILE, b"a", b"2"))
    folder = repository.write()
    git(folder, "reset", "-q", "--hard")
    (folder / "a").touch()  # The index is now stale, which git likes to mend in passing.

    def state() -> dict[Path, tuple[int, int, int]]:
        paths = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
        return {path: (s.st_mtime_ns, s.st_ctime_ns, s.st_size) for path, s in paths.items()}

    before = state()
    await read(open_history(folder))
    assert state() == before


# Where the history is ------------------------------------------------------------------------


def test_a_repository_is_found_from_wherever_it_can_be(
    repository: Repository, tmp_path: Path
) -> None:
    """If this fails the demo replays a folder's files although it stands in a repository."""
    repository.commit((FILE, b"a", b"1"))
    repository.commit((FILE, b"b", b"1"), branch="side", begin="refs/heads/main")
    folder = repository.write()
    deep = folder / "deep" / "er\udcff\n"
    deep.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    git(tmp_path, "clone", "-q", "--bare", str(folder), "bare.git")
    git(folder, "worktree", "add", "-q", str(tmp_path / "tree"), "side")
    assert find_repository(folder) == folder
    assert find_repository(deep) == folder
    assert find_repository(folder / ".git" / "refs") == folder / ".git"
    assert find_repository(tmp_path / "bare.git" / "refs") == tmp_path / "bare.git"
    assert find_repository(tmp_path / "tree") == tmp_path / "tree"
    assert find_repository(outside) is None
    git(tmp_path, "init", "-q", "line\nfeed\n")
    assert find_repository(tmp_path / "line\nfeed\n") == tmp_path / "line\nfeed\n"


async def test_a_bare_repository_and_a_worktree_are_replayed(
    repository: Repository, tmp_path: Path
) -> None:
    """If this fails only plain clones work, or a worktree shows another branch's files."""
    repository.commit((FILE, b"a", b"1"))
    repository.commit((FILE, b"b", b"1"), branch="side", begin="refs/heads/main")
    folder = repository.write()
    git(tmp_path, "clone", "-q", "--bare", str(folder), "bare.git")
    git(folder, "worktree", "add", "-q", str(tmp_path / "tree"), "side")
    assert await read(open_history(tmp_path / "bare.git")) == [{"a": b"1"}]
    assert await read(open_history(tmp_path / "tree")) == [{"a": b"1"}, {"b": b"1"}]
    assert await read(open_history(folder / ".git")) == [{"a": b"1"}]


def test_a_repository_without_commits_is_a_clear_error(repository: Repository) -> None:
    """If this fails an empty repository ends in a traceback, or in a verdict on nothing."""
    with pytest.raises(HistoryError, match="is there a commit"):
        open_history(repository.folder)


def test_what_is_no_directory_is_a_clear_error(tmp_path: Path) -> None:
    """If this fails a mistyped --repo ends in a traceback."""
    with pytest.raises(HistoryError, match="is not a directory"):
        open_history(tmp_path / "missing")


def test_without_git_the_files_are_replayed_and_the_reason_is_told(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If this fails the demo needs git, or claims there is no repository where there is one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    history = open_history(outside)
    assert isinstance(history, DirectoryHistory)
    assert history.reason == "in no git repository"
    assert git_is_installed()
    monkeypatch.setenv("PATH", str(outside))
    assert not git_is_installed()
    assert find_repository(repository.folder) is None
    history = open_history(repository.folder)
    assert isinstance(history, DirectoryHistory)
    assert history.reason == "git is not installed"


@pytest.fixture
def fake_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put Python code before git: it may do something else, or call the real one."""

    def put(code: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "git"
        program.write_text(
            f"#!{sys.executable} -IS\n"
            "import os, signal, sys, time\n"
            f"{code}\n"
            f"os.execv({shutil.which('git')!r}, ['git', *sys.argv[1:]])\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return put


def test_a_repository_of_another_owner_is_refused_in_gits_words(
    repository: Repository, fake_git: Callable[[str], None]
) -> None:
    """If this fails the user is not told how to allow it, or the wrong thing is replayed."""
    repository.commit((FILE, b"a", b"1"))
    folder = repository.write()
    fake_git("os.environ['GIT_TEST_ASSUME_DIFFERENT_OWNER'] = '1'")
    with pytest.raises(HistoryError, match=r"dubious ownership[^$]*safe\.directory"):
        open_history(folder)


def test_a_worktree_whose_repository_is_gone_is_a_clear_error(
    repository: Repository, tmp_path: Path
) -> None:
    """If this fails a broken repository is taken for none and its files are replayed."""
    repository.commit((FILE, b"a", b"1"))
    git(repository.write(), "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    shutil.rmtree(repository.folder)
    with pytest.raises(HistoryError, match="not a git repository"):
        open_history(tmp_path / "tree")


# Failures and ends ---------------------------------------------------------------------------


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the processes that the event loop starts."""
    started: list[int] = []
    start = asyncio.create_subprocess_exec

    async def noting(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*args, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noting)
    return started


def is_there(pid: int) -> bool:
    """Whether a process has not ended, or not been waited for: a zombie still takes signals."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_gone(children: list[int], at_least: int) -> None:
    """Check that processes were started, have ended, and were waited for."""
    assert len(children) >= at_least
    assert not [pid for pid in children if is_there(pid)]


@pytest.fixture(scope="module")
def long_history(
    no_settings_of_the_user: None, tmp_path_factory: pytest.TempPathFactory
) -> GitHistory:
    """More than pipes and buffers hold, so that git is at work until it is stopped."""
    repository = Repository(tmp_path_factory.mktemp("long") / "repo")
    for number in range(200):
        files = [(FILE, b"%s-%d" % (b"x" * 500, n), b"%d" % number) for n in range(50)]
        repository.commit(*files)
    return GitHistory(repository.write())


@pytest.mark.parametrize("steps", [1, 5])
async def test_leaving_the_loop_ends_every_process(
    long_history: GitHistory, children: list[int], steps: int
) -> None:
    """If this fails who stops early leaves git running or unburied."""
    async with aclosing(long_history.commits()) as commits:
        for _ in range(steps):
            await anext(commits)
        # The list of commit ids is short and may be done; the other two have work left.
        assert sum(is_there(pid) for pid in children) >= 2
    assert_gone(children, 3)


async def test_a_cancellation_between_two_commits_ends_every_process(
    long_history: GitHistory, children: list[int]
) -> None:
    """If this fails Ctrl-C while nodes are written to leaves git running."""
    reached = asyncio.Event()

    async def replay() -> None:
        async with aclosing(long_history.commits()) as commits:
            async for _ in commits:
                reached.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(replay())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_gone(children, 3)


async def test_a_loop_that_nobody_closes_ends_every_process_in_the_end(
    long_history: GitHistory, children: list[int]
) -> None:
    """If this fails a replay that is cancelled in a plain loop leaves git running."""
    reached = asyncio.Event()

    async def replay() -> None:
        async for _ in long_history.commits():
            reached.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(replay())
    await reached.wait()
    assert sum(is_there(pid) for pid in children) >= 2
    task.cancel()
    await asyncio.wait((task,))
    await until(lambda: not any(is_there(pid) for pid in children), "no git is left")


@pytest.mark.parametrize("method", ["commits", "final_files", "count"])
async def test_a_cancellation_at_any_wait_ends_every_process(
    repository: Repository, children: list[int], method: str
) -> None:
    """If this fails there is a moment in which Ctrl-C leaves git running."""
    for number in range(3):
        repository.commit((FILE, b"a", b"%d" % number), (FILE, b"b%d" % number, b"x" * 200_000))
    history = GitHistory(repository.write())

    async def use() -> None:
        if method == "commits":
            async with aclosing(history.commits()) as commits:
                async for _ in commits:
                    pass
        else:
            await getattr(history, method)()

    turns, completed = 0, False
    while not completed:
        turns += 1
        task = asyncio.create_task(use())
        for _ in range(turns):
            await asyncio.sleep(0)
        # Where git is what it waits for, turns pass at once: wait for git now and then.
        if turns % 5 == 0:
            await asyncio.wait((task,), timeout=turns / 1000)
        completed = task.done()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled() or completed
        assert_gone(children, 0)
        children.clear()
    assert turns > 3


async def test_a_git_that_heeds_no_signal_is_killed_even_if_nobody_waits(
    repository: Repository,
    children: list[int],
    fake_git: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails a stuck git outlives the demo, or the demo waits for it for ever."""
    repository.commit((FILE, b"a", b"1"))
    folder = repository.write()
    fake_git(
        "if 'cat-file' in sys.argv:\n"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        " sys.stdout.write('stuck\\n')\n"
        " sys.stdout.flush()\n"
        " time.sleep(600)"
    )
    monkeypatch.setattr(module, "GIT_END_SEC", 0.3)
    for cancellations in (1, 2):
        async with module._Blobs(folder) as blobs:
            assert await blobs.line() == b"stuck\n"
            task = asyncio.create_task(blobs.__aexit__())
            if cancellations == 2:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait((task,))
            assert task.cancelled() == (cancellations == 2)
            assert_gone(children, 1)
            children.clear()


async def test_a_git_that_gives_no_answer_is_a_clear_error(
    repository: Repository,
    children: list[int],
    fake_git: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails a stuck file system stops the demo for ever, without a word."""
    repository.commit((FILE, b"a", b"1"))
    history = GitHistory(repository.write())
    fake_git("if {'cat-file', 'rev-list'} & {*sys.argv}: time.sleep(600)")
    monkeypatch.setattr(module, "GIT_TIMEOUT_SEC", 0.2)
    with pytest.raises(HistoryError, match=r"git rev-list gave no answer in 0\.2 s"):
        await history.count()
    with pytest.raises(HistoryError, match=r"gave no answer in 0\.2 s"):
        await read(history)
    with pytest.raises(HistoryError, match=r"git cat-file gave no answer in 0\.2 s"):
        await history.final_files()
    assert_gone(children, 5)


@pytest.mark.parametrize("lost", ["blob", "tree", "commit"])
async def test_a_damaged_repository_is_an_error_in_gits_words(
    repository: Repository, children: list[int], lost: str
) -> None:
    """If this fails the files that could be read are taken for the whole history."""
    repository.commit((FILE, b"a", b"1"))
    repository.commit((FILE, b"a", b"2"))
    repository.commit((FILE, b"a", b"3"))
    folder = repository.write()
    for pack in (folder / ".git" / "objects" / "pack").glob("*.pack"):
        content = pack.read_bytes()
        pack.with_suffix(".idx").unlink()
        pack.unlink()
        git(folder, "unpack-objects", "-q", feed=content)
    name = {"blob": "HEAD~1:a", "tree": "HEAD~1^{tree}", "commit": "HEAD~1"}[lost]
    found = git(folder, "rev-parse", name).decode().strip()
    (folder / ".git" / "objects" / found[:2] / found[2:]).unlink()
    last = git(folder, "rev-parse", "HEAD").decode().strip()
    ids: list[str] = []

    async def read_all() -> None:
        async with aclosing(GitHistory(folder).commits()) as commits:
            async for commit in commits:
                ids.append(commit.id)  # noqa: PERF401

    with pytest.raises(HistoryError, match=found):
        await read_all()
    assert last not in ids
    assert "" not in ids
    assert_gone(children, 3)


async def test_a_partial_clone_is_an_error_and_stays_as_it_is(
    repository: Repository, tmp_path: Path
) -> None:
    """If this fails the demo downloads into a repository that it only has to read."""
    repository.commit((FILE, b"a", b"1"))
    git(repository.write(), "config", "uploadpack.allowFilter", "true")
    url = repository.folder.as_uri()
    git(tmp_path, "clone", "-q", "--no-checkout", "--filter=blob:none", url, "partial")
    objects = tmp_path / "partial" / ".git" / "objects"
    before = sorted(objects.rglob("*"))
    with pytest.raises(HistoryError, match=r"git cat-file failed|lacks an object"):
        await read(GitHistory(tmp_path / "partial"))
    assert sorted(objects.rglob("*")) == before


async def test_a_git_that_goes_away_is_a_clear_error(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If this fails a git removed meanwhile ends in a traceback."""
    repository.commit((FILE, b"a", b"1"))
    history = GitHistory(repository.write())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HistoryError, match="git cannot be run"):
        await history.count()


# Directories ---------------------------------------------------------------------------------


async def test_a_directory_is_replayed_in_portions(tmp_path: Path) -> None:
    """If this fails files of a directory are lost, doubled, or come all at once."""
    for number in range(120):
        folder = tmp_path / f"dir.{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"file {number}\udcff").write_bytes(b"%d" % number * number)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"ignored by nobody")
    history = DirectoryHistory(tmp_path)
    portions = await read(history)
    assert [len(portion) for portion in portions] == [50, 50, 21]
    assert portions[0]["%2Egit.config"] == b"ignored by nobody"
    assert portions[0]["dir%2E0.file 14%FF"] == b"14" * 14
    assert history.skipped == 0


async def test_links_are_their_text_and_what_is_no_file_is_counted(tmp_path: Path) -> None:
    """If this fails a loop of links never ends, or a pipe blocks the demo for ever."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_bytes(b"x")
    (tmp_path / "dir" / "up").symlink_to("..")
    (tmp_path / "to-file").symlink_to("dir/file")
    (tmp_path / "nowhere").symlink_to(b"gone\xff".decode("utf-8", "surrogateescape"))
    os.mkfifo(tmp_path / "pipe")
    history = DirectoryHistory(tmp_path)
    assert await read(history) == [
        {"dir.file": b"x", "dir.up": b"..", "nowhere": b"gone\xff", "to-file": b"dir/file"}
    ]
    assert history.skipped == 1


async def test_files_of_a_directory_that_cannot_be_items_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails one bad file ends the demo, or the verdict misses it."""
    monkeypatch.setattr(module, "CONTENT_BYTES_MAX", 1000)
    (tmp_path / "most").write_bytes(b"x" * 1000)
    (tmp_path / "more").write_bytes(b"x" * 1001)
    deep = tmp_path.joinpath(*["." + "x" * 200] * 6)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"key too long")
    for name in ("gone", "grown", "piped"):
        (tmp_path / name).write_bytes(b"x")
    history = DirectoryHistory(tmp_path)
    assert await history.count() == 3
    (tmp_path / "gone").unlink()
    (tmp_path / "grown").write_bytes(b"x" * 1001)
    (tmp_path / "piped").unlink()
    os.mkfifo(tmp_path / "piped")
    assert await read(history) == [{}, {"most": b"x" * 1000}, {}]
    assert history.skipped == 5


async def test_a_portion_of_a_directory_is_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails fifty large files are held in memory at once."""
    monkeypatch.setattr(module, "CONTENT_BYTES_MAX", 1000)
    for number in range(6):
        (tmp_path / str(number)).write_bytes(b"x" * 400)
    assert [len(portion) for portion in await read(DirectoryHistory(tmp_path))] == [2, 2, 2]


async def test_a_directory_that_changes_meanwhile_counts_as_it_was_read(tmp_path: Path) -> None:
    """If this fails a log file that grows makes the demo say that the nodes do not agree."""
    for name in ("changed", "removed", "same"):
        (tmp_path / name).write_bytes(b"before")
    history = DirectoryHistory(tmp_path)
    async with aclosing(history.commits()) as commits:
        async for commit in commits:
            assert commit == Commit(
                "portion 1",
                tuple(Change(name, b"before") for name in ("changed", "removed", "same")),
            )
    (tmp_path / "changed").write_bytes(b"after it was read")
    (tmp_path / "removed").unlink()
    (tmp_path / "new").write_bytes(b"x")
    digest = hashlib.sha256(b"before").digest()
    expected = dict.fromkeys(("changed", "removed", "same"), digest)
    assert await history.final_files() == expected


async def test_final_files_of_a_directory_are_read_from_it(tmp_path: Path) -> None:
    """If this fails the verdict compares what was replayed with itself."""
    (tmp_path / "a").write_bytes(b"1")
    history = DirectoryHistory(tmp_path)
    assert await history.final_files() == {"a": hashlib.sha256(b"1").digest()}


async def test_an_empty_directory_has_no_commits(tmp_path: Path) -> None:
    """If this fails there is a commit of nothing, or a traceback."""
    assert await read(DirectoryHistory(tmp_path)) == []


async def test_a_directory_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    """If this fails a directory that cannot be read is taken for an empty one."""
    with pytest.raises(HistoryError, match="cannot be read"):
        await DirectoryHistory(tmp_path / "gone").count()
