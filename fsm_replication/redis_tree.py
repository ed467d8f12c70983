"""A tree in a Redis, our own or a peer's, read with read-only commands.

How it lies there is told in :mod:`fsm_replication.merkle`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.foreign import DOTTED, interior_hash
from fsm_replication.layout import Keys
from fsm_replication.merkle import (
    DIGEST_BYTES,
    EMPTY_ROOT,
    OWN,
    children_command,
    parse_children,
    path_bucket,
)
from fsm_replication.redis_dotted import DottedReader, Pipeline
from fsm_replication.replies import count

__all__ = ("RedisTree", "parse_root", "root_command")


def root_command(tree_key: str) -> tuple[str, str, int, int]:
    """Return the command that reads the root of our own layout."""
    return ("GETRANGE", tree_key, 0, DIGEST_BYTES - 1)


def parse_root(reply: object) -> bytes:
    """Return the digest that was read.

    :raises ProtocolError: if it is none.
    """
    if type(reply) is not bytes or len(reply) not in (0, DIGEST_BYTES):
        raise ProtocolError("the root of a tree is 8 bytes")
    return reply or EMPTY_ROOT


async def _nothing() -> None:
    """Do nothing: a peer's tree is not ours to sweep."""


class RedisTree:
    """Reads a tree through a function that sends several commands in one flight.

    ``sweep`` is called before the root is read: a node takes expired tombstones out of its own tree.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        keys: Keys,
        sweep: Callable[[], Awaitable[None]] = _nothing,
        *,
        layouts: frozenset[str] = frozenset({OWN}),
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._key = keys.tree
        self._sweep = sweep
        self._dotted = DottedReader(self._ask, keys.prefix)
        self.layouts = layouts

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything: 8 bytes of our own layout, 32 of the dotted one."""
        if layout == DOTTED:
            return await self._dotted.root() or interior_hash(())
        await self._sweep()
        (raw,) = await self._ask([root_command(self._key)])
        return parse_root(raw)

    async def children(self, layout: str, paths: Sequence[str]) -> list[dict[str, bytes] | None]:
        """Return the children of several nodes in one round trip; None for one that is no node.

        :raises ProtocolError: if a reply has another shape.
        """
        if layout == DOTTED:
            nodes = await self._dotted.children(paths)
            return [None if node is None else node.children for node in nodes]
        replies = await self._ask([children_command(self._key, path) for path in paths])
        found: list[dict[str, bytes] | None] = []
        for path, reply in zip(paths, replies, strict=True):
            if isinstance(reply, PeerReplyError):
                found.append(None)
                continue
            try:
                found.append(parse_children(path, reply))
            except ValueError as error:
                raise ProtocolError(f"the node {path!r} of a tree: {error}") from None
        return found

    async def sizes(self, layout: str, paths: Sequence[str]) -> list[int]:
        """Return how many keys each bucket holds, in one round trip."""
        commands = [("HLEN", f"{self._key}:{path_bucket(path)}") for path in paths]
        replies = await self._ask(commands)
        return [
            0 if isinstance(reply, PeerReplyError) else count(reply, "HLEN") for reply in replies
        ]

    async def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        replies = await self._pipeline(commands) if commands else []
        for reply in replies:
            # Where something else stands, that node alone cannot be read.
            if isinstance(reply, PeerReplyError) and reply.code != "WRONGTYPE":
                raise reply
        return replies

    async def clean_branches(self, layout: str) -> Sequence[str]:
        """Return the paths below the root that are up to date; the root alone if everything is.

        In our own layout everything is: each change is in the tree with its item.
        """
        if layout != DOTTED or await self.is_branch_clean(layout, ""):
            return ("",)
        (node,) = await self._dotted.children([""])
        names = sorted(node.children) if node is not None else []
        return [name for name in names if await self.is_branch_clean(layout, name)]

    async def is_branch_clean(self, layout: str, path: str) -> bool:
        """Say whether what is below a path is up to date."""
        if layout != DOTTED:
            return True
        if not path:
            counts = await self._ask([("ZCARD", self._keys.dirty), ("ZCARD", self._keys.unfolded)])
            return counts == [0, 0]
        below = f"{path}."
        dirty, marked, unfolded = await self._ask(
            [
                # What sorts from "path." up to "path/", the next character, begins with "path.".
                ("ZRANGEBYLEX", self._keys.dirty, f"[{below}", f"({path}/", "LIMIT", 0, 1),
                ("ZSCORE", self._keys.dirty, path),
                ("ZRANGE", self._keys.unfolded, 0, -1),
            ]
        )
        nodes = (raw.decode() for raw in unfolded)
        return (
            not dirty
            and marked is None
            and not any(node == path or node.startswith(below) for node in nodes)
        )
