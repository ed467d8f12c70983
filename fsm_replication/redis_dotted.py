"""The dotted tree in a Redis, a foreign node's or our own, read with read-only commands.

How it lies there, and what its hashes cover, is told in :mod:`fsm_replication.foreign`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fsm_replication.errors import BadEntryError, PeerReplyError, ProtocolError
from fsm_replication.foreign import children_key, decode_hash, hash_key, parse_member
from fsm_replication.heavy import take_turns
from fsm_replication.replies import count, string, strings

__all__ = ("CHILDREN_MAX", "DottedNode", "DottedReader", "Pipeline", "child_path")

Pipeline = Callable[[Sequence[Sequence[Any]]], Awaitable[list[Any]]]

# A node with more children than this is passed over.
CHILDREN_MAX: Final = 100_000


@dataclass(slots=True)
class DottedNode:
    """The children of a node: each segment with its raw hash, b"" where it could not be told.

    ``bad`` counts members that are none.
    """

    children: dict[str, bytes] = field(default_factory=dict)
    bad: int = 0


def child_path(path: str, segment: str) -> str:
    """Return the path of a child."""
    return f"{path}.{segment}" if path else segment


class DottedReader:
    """Reads a dotted tree through a function that sends several commands in one flight."""

    def __init__(self, pipeline: Pipeline, prefix: str) -> None:
        self._pipeline = pipeline
        self._prefix = prefix

    async def root(self) -> bytes | None:
        """Return the hash of everything, None where there is no tree (yet).

        :raises ProtocolError: if what stands there is no hash.
        """
        (reply,) = await self._ask([("GET", hash_key(self._prefix, ""))])
        if reply is None:
            return None
        is_other = isinstance(reply, PeerReplyError) and reply.code == "WRONGTYPE"
        digest = None if is_other else decode_hash(string(reply, "GET"))
        if digest is None:
            raise ProtocolError("the root of the dotted tree is not 64 hexadecimal characters")
        return digest

    async def sizes(self, paths: Sequence[str]) -> list[tuple[int, int] | None]:
        """Return how many children several nodes have, 0 for a leaf, and about how many bytes.

        None stands for one that is no node. One round trip. It comes before reading them, because a
        node may have any number of children, of any length.
        """
        names = [children_key(self._prefix, path) for path in paths]
        counts = [("ZCARD", name) for name in names]
        replies = await self._ask([*counts, *(("MEMORY", "USAGE", name) for name in names)])
        found: list[tuple[int, int] | None] = []
        for number, size in zip(replies[: len(names)], replies[len(names) :], strict=True):
            if isinstance(number, PeerReplyError):
                found.append(None)
                continue
            unknown = size is None or isinstance(size, PeerReplyError)
            in_bytes = 0 if unknown else count(size, "MEMORY USAGE")
            found.append((count(number, "ZCARD"), in_bytes))
        return found

    async def children(self, paths: Sequence[str]) -> list[DottedNode | None]:
        """Return the children of several nodes, none for a leaf; None for one that is no node.

        One round trip, and a second one for writers that put the bare segments.
        """
        replies = await self._ask(
            [("ZRANGE", children_key(self._prefix, path), 0, CHILDREN_MAX - 1) for path in paths]
        )
        nodes: list[DottedNode | None] = []
        bare: list[tuple[DottedNode, str, str]] = []
        for path, reply in zip(paths, replies, strict=True):
            if isinstance(reply, PeerReplyError):
                nodes.append(None)
                continue
            node = DottedNode()
            nodes.append(node)
            for step, member in enumerate(strings(reply, "ZRANGE", CHILDREN_MAX)):
                await take_turns(step)
                segment = self._take(node, member)
                if segment is not None and not node.children[segment]:
                    bare.append((node, segment, child_path(path, segment)))
        hashes = await self._ask([("GET", hash_key(self._prefix, path)) for _, _, path in bare])
        for step, ((node, segment, _), reply) in enumerate(zip(bare, hashes, strict=True)):
            await take_turns(step)
            node.children[segment] = decode_hash(reply) or b""
        return nodes

    @staticmethod
    def _take(node: DottedNode, member: bytes) -> str | None:
        try:
            segment, digest = parse_member(member)
        except BadEntryError:
            node.bad += 1
            return None
        if "." in segment:
            # Its path would be another node's.
            node.bad += 1
            return None
        # Two members of one segment are one of before and one of after: nobody can tell which.
        node.children[segment] = b"" if segment in node.children else digest or b""
        return segment

    async def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        replies = await self._pipeline(commands) if commands else []
        for reply in replies:
            # Where something else stands, that node alone cannot be read.
            if isinstance(reply, PeerReplyError) and reply.code != "WRONGTYPE":
                raise reply
        return replies
