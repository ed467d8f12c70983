"""Cuts a node off from all others for a while, as a broken line between sites does."""

from __future__ import annotations

from dataclasses import dataclass

from fsm_replication.errors import ConnectionLostError
from fsm_replication.transport import RedisConnection, RedisTransport

__all__ = ("CuttableTransport", "Outage", "OutageReport")


class CuttableTransport(RedisTransport):
    """Reaches real servers, but those that were cut off as little as if the line were broken."""

    def __init__(self) -> None:
        super().__init__()
        self._unreachable: set[str] = set()
        self._made: list[tuple[str, RedisConnection]] = []

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> RedisConnection:
        """Connect, unless the server is cut off.

        :raises ConnectionLostError: if it is.
        """
        self._check(url)
        connection = await super().connect(url, timeout_sec=timeout_sec, name=name)
        try:
            self._check(url)
        except ConnectionLostError:
            connection.close()
            raise
        self._made = [pair for pair in self._made if not pair[1].closed]
        self._made.append((url, connection))
        return connection

    def _check(self, url: str) -> None:
        if url in self._unreachable:
            raise ConnectionLostError(f"{url} cannot be reached: the line is cut")

    def cut(self, url: str) -> None:
        """Lose every connection to a server, and reach it no more."""
        self._unreachable.add(url)
        for at, connection in self._made:
            if at == url:
                connection.close()

    def heal(self, url: str) -> None:
        """Reach a server again."""
        self._unreachable.discard(url)


@dataclass(frozen=True, slots=True)
class Outage:
    """When a node is cut off and when it is back, as parts of the history."""

    begin: float = 0.35
    end: float = 0.7
    entries_left: int = 3


@dataclass(frozen=True, slots=True)
class OutageReport:
    """What an outage did: entries that streams lost, and the links that bootstrapped after it."""

    node: str
    seconds: float
    changes_missed: int
    entries_trimmed: int
    bootstrapped: tuple[str, ...]
    healed_by: tuple[str, ...]
