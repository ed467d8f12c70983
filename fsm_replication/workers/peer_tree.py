"""A peer's tree, which is believed only as long as the peer is the node that was connected to.

A peer's Redis may be emptied, restored from a backup, or lose its tree while a connection to it
lives on. What is read then must not pass for a node that holds nothing, or for one that holds all
that was agreed on: the root is read in one flight with the marker key, and where that tells of
another store, or of another tombstone ttl or resolver, the link connects anew, which tells it whether
it may go on.
"""

from __future__ import annotations

from typing import Any

from fsm_replication.errors import PeerReplacedError
from fsm_replication.layout import Keys
from fsm_replication.merkle import OWN
from fsm_replication.redis_tree import RedisTree, parse_root, root_command
from fsm_replication.replies import parts
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext

__all__ = ("PeerTree", "look_for_tree")

_INCARNATION = b"incarnation"
_LAYOUTS = b"layouts"
_PARTITIONS = b"partitions"
# What a link is refused for when it differs from ours; it may change while a link stands.
_AGREED_ON = (b"tombstone_ttl_ms", b"resolver")


class PeerTree(RedisTree):
    """The tree that a link has found at its peer when it connected."""

    def __init__(self, context: LinkContext, lines: Lines) -> None:
        timeout = context.settings.timeouts.command
        keys = Keys(context.peer.redis_prefix)
        super().__init__(
            lambda commands: lines.asking.pipeline(commands, timeout_sec=timeout), keys
        )
        self._context = context
        self._lines = lines

    async def root(self, layout: str) -> bytes:
        """Return the digest of everything.

        :raises PeerReplacedError: if it is no longer the store that the link has connected to, or
            keeps no tree any more.
        """
        assert layout == OWN
        names = (_INCARNATION, _LAYOUTS, *_AGREED_ON)
        root, marker = await self._ask(
            [root_command(self._key), ("HMGET", self._keys.marker, *names)]
        )
        marker = parts(marker, "HMGET", len(names))
        if marker != [self._lines.marker.get(name) for name in names]:
            raise _replaced(self._context)
        return parse_root(root)


async def look_for_tree(context: LinkContext, lines: Lines) -> None:
    """Look whether a node that had no tree when it was connected to keeps one by now.

    :raises PeerReplacedError: if it is another store, or has another tombstone ttl or resolver.
    :raises ReplicationError: if the peer cannot be asked.
    """
    if lines.layout:
        return
    names = (_INCARNATION, _LAYOUTS, _PARTITIONS, *_AGREED_ON)
    reply: Any = await lines.asking.call(
        "HMGET",
        Keys(context.peer.redis_prefix).marker,
        *names,
        timeout_sec=context.settings.timeouts.command,
    )
    values = parts(reply, "HMGET", len(names))
    found = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    known = lines.marker
    if any(found.get(name) != known.get(name) for name in (_INCARNATION, *_AGREED_ON)):
        raise _replaced(context)
    lines.marker = {**lines.marker, **found}
    context.progress.layout = lines.layout


def _replaced(context: LinkContext) -> PeerReplacedError:
    return PeerReplacedError(
        f"{context.peer.display_url}: its marker key tells of another store, layout, tombstone ttl or"
        " resolver than when the link connected; the link connects anew"
    )
