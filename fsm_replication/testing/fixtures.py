"""Fixtures of pytest that give real Redis servers.

Put ``pytest_plugins = ["fsm_replication.testing.fixtures"]`` into your topmost ``conftest.py``. Servers run
on free ports of this machine and end with the tests, however these end. FSM_REDIS_SERVER chooses the
server (a path, or ``embedded``); pytest's header names it and its version.

* ``redis_server``: one empty server;
* ``redis_servers``: a function that returns one empty server after the other;
* ``new_redis_server``: a function that starts a server nobody else will use, for tests that kill it
  or give it a configuration;
* ``any_redis_server``: an empty server of each version this machine has, one after the other; with
  FSM_REDIS_SERVER only of that one.

The first two come from a pool, so that a test does not wait for a server to start. A test may kill
a server of the pool too: that one is not used again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import redis

from fsm_replication.servers import (
    EMBEDDED,
    SERVER_VARIABLE,
    RedisServer,
    RedisServerError,
    RedisServerNotFoundError,
    describe_redis_server,
    find_all_redis_servers,
    find_redis_server,
    redis_server_kind,
    redis_server_version,
)
from fsm_replication.testing.needs import require

require("fsm_replication.testing.fixtures", "pytest")

import pytest  # noqa: E402 - only where it is installed

__all__ = (
    "ServerPool",
    "any_redis_server",
    "new_redis_server",
    "redis_server",
    "redis_server_pool",
    "redis_servers",
    "version_id",
)


class ServerPool:
    """Servers that tests share one after the other, empty each time."""

    def __init__(self) -> None:
        self._free: list[RedisServer] = []
        self._all: list[RedisServer] = []

    def take(self) -> RedisServer:
        """Return an empty server."""
        server = self._free.pop() if self._free else self._start()
        with redis.Redis(port=server.port) as client:
            client.flushall()
            client.script_flush()
        return server

    def _start(self) -> RedisServer:
        server = RedisServer().start()
        self._all.append(server)
        return server

    def give_back(self, server: RedisServer) -> None:
        """Take a server back; one that a test has killed is not used again."""
        if server.is_running:
            self._free.append(server)

    def stop(self) -> None:
        """End all servers."""
        for server in self._all:
            server.stop()


@pytest.fixture(scope="session")
def redis_server_pool() -> Iterator[ServerPool]:
    """The servers of this run."""
    pool = ServerPool()
    yield pool
    pool.stop()


@pytest.fixture
def redis_servers(redis_server_pool: ServerPool) -> Iterator[Callable[[], RedisServer]]:
    """A function that returns one empty server after the other."""
    taken: list[RedisServer] = []

    def take() -> RedisServer:
        taken.append(redis_server_pool.take())
        return taken[-1]

    yield take
    for server in taken:
        redis_server_pool.give_back(server)


@pytest.fixture
def redis_server(redis_servers: Callable[[], RedisServer]) -> RedisServer:
    """One empty server."""
    return redis_servers()


@pytest.fixture
def new_redis_server() -> Iterator[Callable[..., RedisServer]]:
    """A function that starts a server nobody else will use; its arguments are RedisServer's."""
    made: list[RedisServer] = []

    def start(
        executable: Path | None = None,
        *,
        persist: str | bool = False,
        config: Sequence[Sequence[str]] = (),
    ) -> RedisServer:
        made.append(RedisServer(executable, persist=persist, config=config))
        return made[-1].start()

    yield start
    for server in made:
        server.stop()


def version_id(executable: Path) -> str:
    """Return the name of a server's kind and version in the ids of tests."""
    version = ".".join(map(str, redis_server_version(executable)))
    return f"{redis_server_kind(executable).lower()}-{version}"


@pytest.fixture
def any_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of each version that this machine has."""
    with RedisServer(request.param) as server:
        yield server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that wants it on each version."""
    if "any_redis_server" in metafunc.fixturenames:
        metafunc.parametrize(
            "any_redis_server", find_all_redis_servers(), indirect=True, ids=version_id
        )


def pytest_configure() -> None:
    """Refuse to begin with a server that FSM_REDIS_SERVER names and that cannot be used."""
    try:
        chosen = find_all_redis_servers()
        if os.environ.get(SERVER_VARIABLE, EMBEDDED) not in ("", EMBEDDED):
            describe_redis_server(chosen[0])
            # A test may go to another folder, where a relative path leads nowhere.
            os.environ[SERVER_VARIABLE] = str(chosen[0])
    except RedisServerError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> list[str]:
    """Say which server tests run on."""
    try:
        said = describe_redis_server(find_redis_server())
    except RedisServerNotFoundError as error:
        return [f"redis server: none, so tests that need one fail or are skipped: {error}"]
    except RedisServerError as error:
        return [f"redis server: {error}"]
    chosen = f", chosen by {SERVER_VARIABLE}" if os.environ.get(SERVER_VARIABLE) else ""
    others = ", ".join(map(version_id, find_all_redis_servers()[1:]))
    return [
        f"redis server: {said}{chosen}",
        *([f"any_redis_server also gives: {others}"] if others else []),
    ]
