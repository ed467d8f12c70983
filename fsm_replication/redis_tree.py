"""A tree in a Redis, our own or a peer's, read with read-only commands.

How it lies there is told in :mod:`fsm_replication.merkle`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.layout import Keys
from fsm_replication.merkle import (
    DIGEST_BYTES,
    EMPTY_ROOT,
    OWN,
    children_command,
    parse_children,
    path_bucket,
)

__all__ = ("RedisTree",)

Pipeline = Callable[[Sequence[Sequence[Any]]], Awaitable[list[Any]]]


async def _nothing() -> None:
    """Do nothing: a peer's tree is not ours to sweep."""


class RedisTree:
    """Reads a tree through a function that sends several commands in one flight.

    ``sweep`` is called before the root is read: a node takes expired tombstones out of its own tree.
    """

    layouts: Final = frozenset({OWN})

    def __init__(
        self, pipeline: Pipeline, keys: Keys, sweep: Callable[[], Awaitable[None]] = _nothing
    ) -> None:
        self._pipeline = pipeline
        self._key = keys.tree
        self._sweep = sweep

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything, 8 bytes."""
        await self._sweep()
        (raw,) = await self._ask([("GETRANGE", self._key, 0, DIGEST_BYTES - 1)])
        if not isinstance(raw, bytes) or len(raw) not in (0, DIGEST_BYTES):
            raise ProtocolError("the root of a tree is 8 bytes")
        return raw or EMPTY_ROOT

    async def children(self, layout: str, paths: Sequence[str]) -> list[dict[str, bytes] | None]:
        """Return the children of several nodes in one round trip; None for one that is no node."""
        replies = await self._ask([children_command(self._key, path) for path in paths])
        found: list[dict[str, bytes] | None] = []
        for path, reply in zip(paths, replies, strict=True):
            try:
                found.append(parse_children(path, reply))
            except ValueError:
                found.append(None)
        return found

    async def sizes(self, layout: str, paths: Sequence[str]) -> list[int]:
        """Return how many keys each bucket holds, in one round trip."""
        commands = [("HLEN", f"{self._key}:{path_bucket(path)}") for path in paths]
        replies = await self._ask(commands)
        return [reply if isinstance(reply, int) else 0 for reply in replies]

    async def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        replies = await self._pipeline(commands) if commands else []
        for reply in replies:
            # Where something else stands, that node alone cannot be read.
            if isinstance(reply, PeerReplyError) and reply.code != "WRONGTYPE":
                raise reply
        return replies

    async def clean_branches(self, layout: str) -> Sequence[str]:
        """Return the root: every change is in the tree with its item."""
        return ("",)

    async def is_branch_clean(self, layout: str, path: str) -> bool:
        """Return True: every change is in the tree with its item."""
        return True
