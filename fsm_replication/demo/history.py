"""Reads the change history that the demo replays: a git repository's, or a directory's files.

A key is the path as a dotted path: segments are joined by ".", and what would be ambiguous or
unprintable in a segment ("." itself, "%", control characters, bytes that are not UTF-8) is
percent-encoded byte by byte, so that every path has one key and can be had back from it.

Memory is bounded by the contents of one commit; nothing is ever written into a repository.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self, TypeVar

from fsm_replication.errors import ReplicationError
from fsm_replication.items import KEY_BYTES_MAX

__all__ = (
    "Change",
    "Commit",
    "DirectoryHistory",
    "GitHistory",
    "History",
    "HistoryError",
    "find_repository",
    "git_is_installed",
    "key_to_path",
    "open_history",
    "path_to_key",
)

CONTENT_BYTES_MAX: Final = 16 * 1024 * 1024
FILES_PER_COMMIT: Final = 50
# How long git may take for one answer, and how long to end after it was asked to.
GIT_TIMEOUT_SEC: Final = 60.0
GIT_END_SEC: Final = 5.0
_CHUNK_BYTES: Final = 64 * 1024
_BUFFER_BYTES: Final = 1024 * 1024
_WORDS_BYTES_MAX: Final = 4096
_NOTHING: Final = b"000000"
_SUBMODULE: Final = b"160000"
# Surrogates stand for bytes that are not UTF-8; U+0080 to U+009F are control characters too.
_ESCAPED: Final = re.compile("[.%\x00-\x1f\x7f-\x9f\udc80-\udcff]")
# All other variables of git's could point it at another repository, or have it run programs.
_KEPT_VARIABLES: Final = frozenset(
    {
        "GIT_CEILING_DIRECTORIES",
        "GIT_CONFIG_GLOBAL",
        "GIT_CONFIG_NOSYSTEM",
        "GIT_CONFIG_SYSTEM",
        "GIT_DISCOVERY_ACROSS_FILESYSTEM",
        "GIT_EXEC_PATH",
    }
)
_T = TypeVar("_T")


class HistoryError(ReplicationError):
    """The history cannot be read; where git is the reason, the message ends with its words."""


@dataclass(frozen=True, slots=True)
class Change:
    """One file was added or changed to ``content`` (0 bytes .. 16 MiB), or removed (None)."""

    key: str
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Commit:
    """Changes that belong together, possibly none; no key stands twice."""

    id: str
    changes: tuple[Change, ...]


def path_to_key(path: bytes) -> str:
    """Return the key of a path; no two paths have the same."""
    segments = (segment.decode("utf-8", "surrogateescape") for segment in path.split(b"/"))
    return ".".join(_ESCAPED.sub(_percent, segment) for segment in segments)


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogateescape"))


def key_to_path(key: str) -> bytes:
    """Return the path that :func:`path_to_key` made the key of.

    :raises ValueError: if it made no such key.
    """
    plain = key.replace(".", "/").encode("utf-8", "surrogateescape")
    path = re.sub(rb"%([0-9A-F]{2})", lambda found: bytes((int(found[1], 16),)), plain)
    if path_to_key(path) != key:
        raise ValueError(f"{key!r} is not the key of a path")
    return path


class History(ABC):
    """A sequence of commits, and the files that must be there in the end.

    Files that cannot be items are left out everywhere: keys over 1,024 bytes, contents over
    16 MiB, what lies in a directory and cannot be read or is no file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # Every path that was ever left out, and whether its latest version was.
        self._left_out: dict[bytes, bool] = {}

    @property
    def skipped(self) -> int:
        """How many paths were left out at least once, by what :meth:`commits` has yielded."""
        return len(self._left_out)

    @abstractmethod
    async def count(self) -> int:
        """Return how many commits there are in total; known before the first is read.

        :raises HistoryError: if the history cannot be read.
        """

    @abstractmethod
    def commits(self) -> AsyncGenerator[Commit, None]:
        """Yield the commits, oldest first.

        Who may leave the loop early closes the generator (``contextlib.aclosing``): that ends the
        processes behind it.

        :raises HistoryError: if the history cannot be read.
        """

    @abstractmethod
    async def final_files(self) -> dict[str, bytes]:
        """Return the raw SHA-256 of every file at the end, by key, without using the changes.

        :raises HistoryError: if the history cannot be read.
        """


def open_history(path: Path) -> History:
    """Return the history at ``path``: the repository it stands in, or the directory's files.

    It waits for git, some milliseconds as a rule.

    :raises HistoryError: if there is no such directory, the repository has no commit, or git
        refuses to read it.
    """
    if not path.is_dir():
        raise HistoryError(f"{path} is not a directory")
    repository = find_repository(path)
    if repository is not None:
        return GitHistory(repository)
    reason = "in no git repository" if git_is_installed() else "git is not installed"
    return DirectoryHistory(path, reason)


# A git repository ----------------------------------------------------------------------------


def git_is_installed() -> bool:
    """Return whether there is a git on PATH."""
    return shutil.which("git") is not None


def find_repository(path: Path) -> Path | None:
    """Return the top of the work tree that ``path`` is in, or the bare repository it is in.

    None means that it is in none, or, if :func:`git_is_installed` says so, that nobody can tell.

    :raises HistoryError: if git finds one and refuses to read it, as one of another owner.
    """
    if not git_is_installed():
        return None
    asked = _ask(path, "rev-parse", "--is-inside-work-tree", "--absolute-git-dir")
    if asked.returncode:
        # Other words mean that there is one and something is wrong with it.
        if b"not a git repository (or any" in asked.stderr:
            return None
        raise HistoryError(f"git refuses to read {path}: {_words(asked.stderr)}")
    inside, folder = asked.stdout.removesuffix(b"\n").split(b"\n", 1)
    if inside == b"true":
        asked = _ask(path, "rev-parse", "--show-toplevel")
        if asked.returncode:
            raise HistoryError(f"git refuses to read {path}: {_words(asked.stderr)}")
        folder = asked.stdout.removesuffix(b"\n")
    return Path(os.fsdecode(folder))


class GitHistory(History):
    """The first-parent commits of a repository's HEAD, each diffed against the one before.

    HEAD is looked up once, when the object is made: commits that come later change nothing.
    Submodules are left out; a symlink is its target text; a change of mode alone is no change.
    It needs git 2.31 or newer.

    :raises HistoryError: if HEAD has no commit.
    """

    def __init__(self, repository: Path) -> None:
        super().__init__(f"git repository {repository}")
        self._repository = repository
        asked = _ask(repository, "rev-parse", "--verify", "HEAD^{commit}")
        if asked.returncode:
            raise HistoryError(
                f"{repository} has nothing to replay; is there a commit? {_words(asked.stderr)}"
            )
        self._head = asked.stdout.decode().strip()

    async def count(self) -> int:
        """Return the number of first-parent commits, 1 or more."""
        arguments = ("rev-list", "--count", "--first-parent", self._head)
        async with _Git(self._repository, *arguments) as git:
            line = await git.line()
            await git.succeeded()
        return int(line)

    async def commits(self) -> AsyncGenerator[Commit, None]:
        """Yield every commit with the contents of what it added or changed."""
        self._left_out.clear()
        async with (
            _Blobs(self._repository) as blobs,
            contextlib.aclosing(self._diffs()) as diffs,
        ):
            async for commit, rows in diffs:
                changes = [await self._change(row, blobs) for row in rows]
                yield Commit(commit, tuple(change for change in changes if change is not None))

    async def _diffs(self) -> AsyncGenerator[tuple[str, list[_Row]], None]:
        """Yield every commit's id and what it changed, without contents."""
        # Plumbing, because settings of the user change what `git log` prints.
        list_ids = ("rev-list", "--first-parent", "--reverse", self._head)
        compare = (
            "diff-tree", "--stdin", "--root", "--diff-merges=first-parent", "--always",
            "-r", "--raw", "--no-abbrev", "--no-renames", "-z",
        )  # fmt: skip
        async with contextlib.AsyncExitStack() as stack:
            reading, writing = os.pipe()
            try:
                lister = _Git(self._repository, *list_ids, stdout=writing)
                await stack.enter_async_context(lister)
                git = _Git(self._repository, *compare, stdin=reading)
                await stack.enter_async_context(git)
            finally:
                os.close(reading)
                os.close(writing)
            commit, rows = "", list[_Row]()
            while (field := await git.field()) is not None:
                if field.startswith(b":"):
                    old_mode, mode, old_blob, blob, _ = field[1:].split(b" ")
                    path = await git.field() or b""
                    rows.append(_Row(old_mode, mode, old_blob, blob, path))
                    continue
                if commit:
                    yield commit, rows
                commit, rows = field.decode(), []
            # Checked before the last commit goes out: it may have been cut short.
            await lister.succeeded()
            await git.succeeded()
            yield commit, rows

    async def _change(self, row: _Row, blobs: _Blobs) -> Change | None:
        was_file, is_file = _is_file(row.old_mode), _is_file(row.mode)
        if was_file == is_file and (not is_file or row.old_blob == row.blob):
            return None
        key = path_to_key(row.path)
        was_item = was_file and not self._left_out.get(row.path, False)
        content = None
        if is_file and _key_fits(key):
            content = await blobs.read(row.blob)
        if is_file and content is None:
            self._left_out[row.path] = True
        elif row.path in self._left_out:
            self._left_out[row.path] = False
        return Change(key, content) if was_item or content is not None else None

    async def final_files(self) -> dict[str, bytes]:
        """Return the SHA-256 of every file of the last commit, from its tree."""
        files: dict[str, bytes] = {}
        list_tree = ("ls-tree", "-r", "-z", "--full-tree", self._head)
        async with _Git(self._repository, *list_tree) as git, _Blobs(self._repository) as blobs:
            while (field := await git.field()) is not None:
                about, path = field.split(b"\t", 1)
                mode, _, blob = about.split(b" ")
                key = path_to_key(path)
                if not _is_file(mode) or not _key_fits(key):
                    continue
                content = await blobs.read(blob)
                if content is not None:
                    files[key] = hashlib.sha256(content).digest()
            await git.succeeded()
        return files


class _Row(NamedTuple):
    """One line of git's raw diff format."""

    old_mode: bytes
    mode: bytes
    old_blob: bytes
    blob: bytes
    path: bytes


def _is_file(mode: bytes) -> bool:
    return mode not in (_NOTHING, _SUBMODULE)


def _key_fits(key: str) -> bool:
    return 0 < len(key.encode()) <= KEY_BYTES_MAX


# git as a child process ----------------------------------------------------------------------


def _command(repository: Path, arguments: tuple[str, ...]) -> list[str]:
    options = ("--no-pager", "--no-optional-locks", "-c", "core.quotepath=false")
    return ["git", *options, "-C", str(repository), *arguments]


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in _KEPT_VARIABLES
    }
    # What a partial clone has not fetched yet would otherwise be fetched, and written into it.
    no_fetching = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
    return kept | no_fetching | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


def _ask(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git for a short answer, blocking."""
    try:
        return subprocess.run(
            _command(folder, arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_environment(),
            timeout=GIT_TIMEOUT_SEC,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HistoryError(
            f"git {arguments[0]} gave no answer in {GIT_TIMEOUT_SEC:g} s in {folder}"
        ) from None
    except OSError as error:
        raise HistoryError(f"git cannot be run: {error}") from error


def _words(said: bytes) -> str:
    return said.decode("utf-8", "replace").strip() or "git said nothing"


class _Git:
    """One git command that reads a repository; it ends with the block that it is entered in."""

    def __init__(
        self,
        repository: Path,
        *arguments: str,
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int = asyncio.subprocess.PIPE,
    ) -> None:
        self._repository = repository
        self._arguments = arguments
        self._stdin, self._stdout = stdin, stdout
        self._fields: deque[bytes] = deque()
        self._rest = b""

    async def __aenter__(self) -> Self:
        # A file, because a pipe that nobody reads would block a git that complains a lot.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_command(self._repository, self._arguments),
                stdin=self._stdin,
                stdout=self._stdout,
                stderr=self._said,
                env=_environment(),
                limit=_BUFFER_BYTES,
                # Ctrl-C reaches the demo alone, which then ends its children in order.
                start_new_session=True,
            )
        except BaseException as error:
            self._said.close()
            if isinstance(error, OSError):
                raise HistoryError(f"git cannot be run: {error}") from error
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        process = self._process
        try:
            if process.stdin is not None:
                process.stdin.close()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GIT_END_SEC):
                    await self._gone()
        finally:
            # Also when this was cancelled once more, or git does not heed SIGTERM.
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GIT_END_SEC):
                        await self._gone()
            self._said.close()

    async def _gone(self) -> None:
        # Some versions of asyncio do not see the end of a process with output left to read.
        if self._process.stdout is not None:
            while await self._process.stdout.read(_BUFFER_BYTES):
                pass
        await self._process.wait()

    @property
    def output(self) -> asyncio.StreamReader:
        """Where git writes, if not into a pipe of the caller's."""
        assert self._process.stdout is not None
        return self._process.stdout

    async def send(self, data: bytes) -> None:
        """Write to git."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        await self.within(self._process.stdin.drain())

    async def line(self) -> bytes:
        """Return the next line; with no line feed at its end, git has ended within it."""
        line = await self.within(self.output.readline())
        if not line.endswith(b"\n"):
            raise self.failure()
        return line

    async def field(self) -> bytes | None:
        """Return what stands before the next NUL byte, None at the end."""
        while not self._fields:
            chunk = await self.within(self.output.read(_CHUNK_BYTES))
            if not chunk:
                return None
            *fields, self._rest = (self._rest + chunk).split(b"\0")
            self._fields.extend(fields)
        return self._fields.popleft()

    async def succeeded(self) -> None:
        """Wait for the end.

        :raises HistoryError: if git failed.
        """
        if await self.within(self._process.wait()):
            raise self.failure()

    async def within(self, answer: Awaitable[_T]) -> _T:
        """Await something of git's for a limited time."""
        try:
            async with asyncio.timeout(GIT_TIMEOUT_SEC):
                return await answer
        except TimeoutError:
            what = f"git {self._arguments[0]} gave no answer in {GIT_TIMEOUT_SEC:g} s"
            raise HistoryError(f"{what} in {self._repository}") from None
        except (OSError, asyncio.IncompleteReadError):
            raise self.failure() from None

    def failure(self) -> HistoryError:
        """Return the error to raise when git has failed."""
        # Reading at a position of our own leaves git's position in the file alone.
        words = _words(os.pread(self._said.fileno(), _WORDS_BYTES_MAX, 0))
        return HistoryError(f"git {self._arguments[0]} failed in {self._repository}: {words}")


class _Blobs(_Git):
    """Reads contents by id, one after the other, through one process."""

    def __init__(self, repository: Path) -> None:
        super().__init__(repository, "cat-file", "--batch", stdin=asyncio.subprocess.PIPE)

    async def read(self, blob: bytes) -> bytes | None:
        """Return a content, or None if it is over 16 MiB: then it is never held as a whole.

        :raises HistoryError: if the repository does not have it.
        """
        await self.send(blob + b"\n")
        head = (await self.line()).split()
        if len(head) != 3:
            raise HistoryError(f"{self._repository} lacks an object: {_words(b' '.join(head))}")
        size = int(head[2])
        if size <= CONTENT_BYTES_MAX:
            content = await self.within(self.output.readexactly(size + 1))
            return content[:-1]
        left = size + 1
        while left:
            part = await self.within(self.output.readexactly(min(left, _CHUNK_BYTES)))
            left -= len(part)
        return None


# A directory ---------------------------------------------------------------------------------


class _File(NamedTuple):
    """A file of a directory."""

    key: str
    name: bytes
    path: Path


class _Found(NamedTuple):
    """A file's content, and what changes when somebody writes to the file."""

    content: bytes
    signature: tuple[int, int, int]


class DirectoryHistory(History):
    """The files of a directory, at most 50 files and 16 MiB at a time.

    Regular files and symlinks (their target text) are files; directories behind links are not
    entered; devices, pipes and sockets are left out and counted. The files are listed once: what is made later
    does not count, and a file that somebody changes after it was read counts as it was read.
    ``reason`` says why it is a directory that is read.
    """

    def __init__(self, directory: Path, reason: str = "") -> None:
        super().__init__(f"directory {directory}")
        self.reason = reason
        self._directory = directory
        self._planned: list[list[_File]] | None = None
        self._unlisted: set[bytes] = set()
        # What was yielded, by key: the file's signature then, and the content's SHA-256.
        self._yielded: dict[str, tuple[tuple[int, int, int], bytes]] = {}

    async def count(self) -> int:
        """Return the number of portions the files come in, 0 or more."""
        return len(await self._portions())

    async def commits(self) -> AsyncGenerator[Commit, None]:
        """Yield the files in portions."""
        portions = await self._portions()
        self._left_out = dict.fromkeys(self._unlisted, True)
        self._yielded.clear()
        for number, portion in enumerate(portions, 1):
            yield Commit(f"portion {number}", await asyncio.to_thread(self._read, portion))

    async def final_files(self) -> dict[str, bytes]:
        """Return the SHA-256 of every file, read once more where nobody has changed it since."""
        portions = await self._portions()
        return await asyncio.to_thread(self._read_again, portions)

    async def _portions(self) -> list[list[_File]]:
        if self._planned is None:
            self._planned = await asyncio.to_thread(self._plan)
        return self._planned

    def _plan(self) -> list[list[_File]]:
        portions: list[list[_File]] = []
        size = 0
        for path in self._paths():
            name = os.fsencode(path.relative_to(self._directory))
            file = _File(path_to_key(name), name, path)
            try:
                status = path.lstat()
            except OSError:
                self._unlisted.add(name)
                continue
            is_file = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
            if not is_file or not _key_fits(file.key) or status.st_size > CONTENT_BYTES_MAX:
                self._unlisted.add(name)
                continue
            size += status.st_size
            if not portions or len(portions[-1]) == FILES_PER_COMMIT or size > CONTENT_BYTES_MAX:
                portions.append([])
                size = status.st_size
            portions[-1].append(file)
        return portions

    def _paths(self) -> list[Path]:
        def unreadable(error: OSError) -> None:
            folder = Path(error.filename)
            if folder == self._directory:
                raise HistoryError(f"{folder} cannot be read: {error.strerror}")
            self._unlisted.add(os.fsencode(folder.relative_to(self._directory)))

        paths: list[Path] = []
        for folder, folders, names in os.walk(self._directory, onerror=unreadable):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            paths.extend(Path(folder, name) for name in (*names, *links))
        return sorted(paths)

    def _read(self, portion: list[_File]) -> tuple[Change, ...]:
        changes: list[Change] = []
        for file in portion:
            found = _read_file(file.path)
            if found is None:
                self._left_out[file.name] = True
                continue
            digest = hashlib.sha256(found.content).digest()
            self._yielded[file.key] = (found.signature, digest)
            changes.append(Change(file.key, found.content))
        return tuple(changes)

    def _read_again(self, portions: list[list[_File]]) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for file in (file for portion in portions for file in portion):
            if file.name in self._left_out:
                continue
            found, yielded = _read_file(file.path), self._yielded.get(file.key)
            if found is not None and (yielded is None or found.signature == yielded[0]):
                files[file.key] = hashlib.sha256(found.content).digest()
            elif yielded is not None:
                files[file.key] = yielded[1]
        return files


def _read_file(path: Path) -> _Found | None:
    """Return what a file holds; None if it cannot be read, is too large, or is no file by now."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(path.readlink())
        else:
            # A pipe that has taken the file's place must not make this wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:  # noqa: PTH123
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    return None
                content = file.read(CONTENT_BYTES_MAX + 1)
    except OSError:
        return None
    if len(content) > CONTENT_BYTES_MAX:
        return None
    return _Found(content, (status.st_ctime_ns, status.st_size, status.st_ino))
