"""Reads the change history that the demo replays: a git repository's, or a directory's files.

A key is the path as a dotted path: segments are joined by ".", and what would be ambiguous in a
segment ("." itself, "%", bytes that are not UTF-8, control characters) is percent-encoded, so that
the path can be had back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fsm_replication.errors import ReplicationError
from fsm_replication.items import KEY_BYTES_MAX

__all__ = (
    "Change",
    "Commit",
    "DirectoryHistory",
    "GitHistory",
    "History",
    "HistoryError",
    "key_to_path",
    "open_history",
    "path_to_key",
)

GIT_TIMEOUT_SEC: Final = 60.0
FILES_PER_COMMIT: Final = 50
CONTENT_BYTES_MAX: Final = 16 * 1024 * 1024
LINE_BYTES_MAX: Final = 1024 * 1024
_SUBMODULE: Final = b"160000"
_NO_BLOB: Final = b"0" * 40
_ESCAPED: Final = frozenset(".%") | {chr(c) for c in (*range(32), 127)}


class HistoryError(ReplicationError):
    """The history cannot be read; the message says what git said."""


@dataclass(frozen=True, slots=True)
class Change:
    """One file was added or changed to ``content``, or removed (None)."""

    key: str
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Commit:
    """Changes that belong together; no key stands twice."""

    id: str
    changes: tuple[Change, ...]


def path_to_key(path: bytes) -> str:
    """Return the key of a path; every path has one of its own."""
    return ".".join(_escape(segment) for segment in path.split(b"/"))


def _escape(segment: bytes) -> str:
    out: list[str] = []
    # Bytes that are not UTF-8 come as lone surrogates U+DC80 .. U+DCFF.
    for char in segment.decode("utf-8", "surrogateescape"):
        if "\udc80" <= char <= "\udcff":
            out.append(f"%{ord(char) - 0xDC00:02X}")
        elif char in _ESCAPED:
            out.append(f"%{ord(char):02X}")
        else:
            out.append(char)
    return "".join(out)


def key_to_path(key: str) -> bytes:
    """Return the path of a key that :func:`path_to_key` made."""
    segments = []
    for segment in key.split("."):
        first, *rest = segment.split("%")
        raw = first.encode()
        for part in rest:
            raw += bytes((int(part[:2], 16),)) + part[2:].encode()
        segments.append(raw)
    return b"/".join(segments)


class History:
    """A sequence of commits, and the files that must be there in the end.

    ``skipped`` counts files that cannot be items: keys over 1,024 bytes, contents over 16 MiB,
    files that cannot be read. They are left out of both.
    """

    name = ""

    def __init__(self) -> None:
        self.skipped = 0

    async def count(self) -> int:
        """Return the number of commits."""
        raise NotImplementedError

    def commits(self) -> AsyncIterator[Commit]:
        """Yield the commits, oldest first."""
        raise NotImplementedError

    async def final_files(self) -> dict[str, bytes]:
        """Return the SHA-256 of every file of the last commit, by key, read on a way of its own."""
        raise NotImplementedError

    def _fits(self, key: str, size: int) -> bool:
        return len(key.encode()) <= KEY_BYTES_MAX and size <= CONTENT_BYTES_MAX


class GitHistory(History):
    """The first-parent commits of a repository's HEAD, each diffed against the one before."""

    def __init__(self, repository: Path) -> None:
        super().__init__()
        self._repository = repository
        self.name = f"git repository {repository}"

    async def count(self) -> int:
        """Return the number of first-parent commits.

        :raises HistoryError: if git fails, or there are none.
        """
        output = await self._git("rev-list", "--count", "--first-parent", "HEAD")
        return int(output)

    async def commits(self) -> AsyncIterator[Commit]:
        """Yield every commit with the contents of what it added or changed."""
        process = await self._start(
            "log", "--first-parent", "--diff-merges=first-parent", "--reverse", "--root", "--raw",
            "--no-abbrev", "--no-renames", "--format=commit %H", "-z", "HEAD",
        )  # fmt: skip
        assert process.stdout is not None
        async with _Blobs(self) as blobs:
            try:
                parts = _split(process.stdout)
                commit: str | None = None
                rows: list[tuple[bytes, bytes, bytes]] = []
                async for part in parts:
                    # A line feed stands between a commit and its first row.
                    part = part.lstrip(b"\n")  # noqa: PLW2901
                    if not part:
                        continue
                    if part.startswith(b":"):
                        _, mode, _, blob, _ = part.split(b" ")
                        rows.append((mode, blob, await anext(parts)))
                        continue
                    if commit is not None:
                        yield await self._commit(commit, rows, blobs)
                    commit, rows = part.removeprefix(b"commit ").decode(), []
                if commit is not None:
                    yield await self._commit(commit, rows, blobs)
                await asyncio.wait_for(process.wait(), GIT_TIMEOUT_SEC)
                if process.returncode:
                    raise HistoryError(f"git log failed in {self._repository}")
            finally:
                await _end(process)

    async def _commit(
        self, commit: str, rows: list[tuple[bytes, bytes, bytes]], blobs: _Blobs
    ) -> Commit:
        changes: list[Change] = []
        for mode, blob, path in rows:
            key = path_to_key(path)
            if blob.strip(b"0") == b"" or mode == _SUBMODULE:
                # A submodule that takes a file's place removes the file.
                if self._fits(key, 0):
                    changes.append(Change(key, None))
                continue
            content = await blobs.read(blob)
            if self._fits(key, len(content)):
                changes.append(Change(key, content))
            else:
                self.skipped += 1
                if self._fits(key, 0):
                    changes.append(Change(key, None))
        return Commit(commit, tuple(changes))

    async def final_files(self) -> dict[str, bytes]:
        """Return the SHA-256 of every file of HEAD, from its tree."""
        listing = await self._git("ls-tree", "-r", "-z", "--full-tree", "HEAD")
        files: dict[str, bytes] = {}
        async with _Blobs(self) as blobs:
            for row in listing.split(b"\0"):
                if not row:
                    continue
                about, path = row.split(b"\t", 1)
                mode, _, blob = about.split(b" ")
                key = path_to_key(path)
                if mode == _SUBMODULE:
                    continue
                content = await blobs.read(blob)
                if self._fits(key, len(content)):
                    files[key] = hashlib.sha256(content).digest()
        return files

    # git as a child process, which never outlives the call that needs it.

    async def _start(self, *args: str, feed: bool = False) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "git", "-c", "core.quotepath=false", "-C", str(self._repository), *args,
            stdin=asyncio.subprocess.PIPE if feed else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_git_environment(),
            limit=LINE_BYTES_MAX,
            start_new_session=True,
        )  # fmt: skip

    async def _git(self, *args: str) -> bytes:
        process = await self._start(*args)
        try:
            output, _ = await asyncio.wait_for(process.communicate(), GIT_TIMEOUT_SEC)
        finally:
            await _end(process)
        if process.returncode:
            raise HistoryError(f"git {args[0]} failed in {self._repository}: is there a commit?")
        return output


class _Blobs:
    """Reads contents by id through one ``git cat-file --batch``."""

    def __init__(self, history: GitHistory) -> None:
        self._history = history
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> _Blobs:
        self._process = await self._history._start("cat-file", "--batch", feed=True)
        return self

    async def read(self, blob: bytes) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(blob + b"\n")
        await process.stdin.drain()
        head = (await process.stdout.readline()).split()
        if len(head) != 3:
            raise HistoryError(f"git cat-file does not know {blob.decode()}")
        content = await process.stdout.readexactly(int(head[2]) + 1)
        return content[:-1]

    async def __aexit__(self, *_exc: object) -> None:
        if self._process is not None:
            await _end(self._process)


async def _split(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield what stands between the NUL bytes of a stream."""
    rest = b""
    while chunk := await stream.read(65536):
        *parts, rest = (rest + chunk).split(b"\0")
        for part in parts:
            yield part
    yield rest


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


def _git_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return kept | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


class DirectoryHistory(History):
    """The files of a directory, some at a time; directories behind links are not entered."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.name = f"directory {directory}"

    async def count(self) -> int:
        """Return the number of portions the files come in."""
        files = len(await asyncio.to_thread(lambda: list(self._paths())))
        return -(-files // FILES_PER_COMMIT)

    async def commits(self) -> AsyncIterator[Commit]:
        """Yield the files in portions."""
        self.skipped = 0
        changes: list[Change] = []
        portion = 0
        for path in await asyncio.to_thread(lambda: list(self._paths())):
            found = await asyncio.to_thread(self._read, path)
            if found is None:
                self.skipped += 1
                continue
            changes.append(Change(*found))
            if len(changes) == FILES_PER_COMMIT:
                portion += 1
                yield Commit(f"portion {portion}", tuple(changes))
                changes = []
        if changes:
            yield Commit(f"portion {portion + 1}", tuple(changes))

    async def final_files(self) -> dict[str, bytes]:
        """Return the SHA-256 of every file."""

        def read_all() -> dict[str, bytes]:
            found = (self._read(path) for path in self._paths())
            return {key: hashlib.sha256(content).digest() for key, content in filter(None, found)}

        return await asyncio.to_thread(read_all)

    def _paths(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self._directory):
            folders.sort()
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for name in sorted([*names, *links]):
                yield Path(folder, name)

    def _read(self, path: Path) -> tuple[str, bytes] | None:
        key = path_to_key(os.fsencode(path.relative_to(self._directory)))
        try:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                content = os.fsencode(path.readlink())
            elif stat.S_ISREG(status.st_mode) and self._fits(key, status.st_size):
                content = path.read_bytes()
            else:
                return None
        except OSError:
            return None
        return (key, content) if self._fits(key, len(content)) else None


def open_history(path: Path) -> History:
    """Return the history at ``path``: the repository it stands in, or the directory's files.

    :raises HistoryError: if there is no such directory.
    """
    if not path.is_dir():
        raise HistoryError(f"{path} is not a directory")
    if shutil.which("git") is None:
        return DirectoryHistory(path)
    asked = subprocess.run(
        ["git", "-C", str(path), "rev-parse", "--is-inside-work-tree", "--is-bare-repository"],
        capture_output=True,
        text=True,
        env=_git_environment(),
        timeout=GIT_TIMEOUT_SEC,
        check=False,
    )
    if asked.returncode == 0:
        return GitHistory(path)
    if "dubious ownership" in asked.stderr:
        raise HistoryError(f"git refuses to read {path}: {asked.stderr.strip()}")
    return DirectoryHistory(path)
