"""Gives a key that a wrong clock has stamped far ahead a stamp of now, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fsm_replication.cli.ask import asked_peers, check_peer
from fsm_replication.cli.node import open_store
from fsm_replication.cli.tables import utc_text
from fsm_replication.config import PeerConfig, ReplicationConfig
from fsm_replication.errors import PeerReplyError, UsageError
from fsm_replication.items import DAY_MS, NUMBER_MAX, Stamp, SyncItem
from fsm_replication.printable import printable
from fsm_replication.stores import RedisSyncEngine
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.copier import source_at
from fsm_replication.workers.explain import Explanation, PeerVersion, explain_key

__all__ = ("restamp_node",)

HASH_WIDTH: Final = 12
Peers = Sequence[tuple[PeerConfig, Lines | str]]


async def restamp_node(
    config: ReplicationConfig, key: str, *, take: str | None, force: bool, console: Console
) -> SyncItem:
    """Show what this node and its peers hold, and change what this node holds; returns that.

    It works on the node's Redis, whether or not an engine runs there. Item, tree and stream entry
    change in one step, and the entry goes to the peers like any other. Later ones of the key leave the
    stream just before; who is interrupted there may do it again. ``take`` names the peer whose
    value is taken with its stamp; otherwise what is held stays, with a stamp of now.

    :raises UsageError: if the key is not stamped more than a day ahead; unless ``force`` is set, if a
        peer holds such a stamp too or could not be asked; if the peer to take from has nothing to
        take; if the key has changed meanwhile. Nothing has changed then.
    :raises InvalidKeyError: if the key is not one.
    :raises StoreError: if the store fails.
    :raises ReplicationError: if the peer to take from fails.
    """
    if config.store is None or config.store.kind != "redis":
        raise UsageError("only a node whose store.kind is redis can be changed from outside")
    if take is not None:
        check_peer(config, take)
    async with open_store(config) as store, asked_peers(config, store.resolver.name) as peers:
        assert isinstance(store, RedisSyncEngine)
        timeout = config.settings.timeouts.command
        made = await explain_key(key, store, peers, timeout_sec=timeout)
        now = await store.now_ms()
        console.print(_table(made, now))
        held = (await store.get_many([key]))[0]
        if held is None:
            raise UsageError(f"nothing is held here under {key!r}")
        if not _is_ahead(held.stamp, now):
            raise UsageError(
                f"{key!r} is not stamped more than a day ahead: an ordinary write replaces it"
            )
        obstacles = [told for version in made.peers if (told := _obstacle(version, now))]
        if obstacles and not force:
            raise UsageError(
                f"{key!r} stays as it is: {'; '.join(obstacles)}; --force does it anyway"
            )
        if take is None:
            item = _restamped(held, made.peers, now)
        else:
            item = await _taken(config, key, take, peers, now)
        if not await store.replace(item, held.stamp):
            raise UsageError(f"{key!r} was changed meanwhile: look again")
        return item


def _is_ahead(stamp: Stamp, now_ms: int) -> bool:
    return stamp.updated_at > now_ms + DAY_MS


def _obstacle(version: PeerVersion, now_ms: int) -> str:
    """Return why what is held here may not go on to a peer, "" if it may."""
    if version.problem:
        return f"peer {version.peer_id!r} could not be asked: {version.problem}"
    if version.held is not None and _is_ahead(version.held.stamp, now_ms):
        return (
            f"peer {version.peer_id!r} holds a stamp more than a day ahead too, which wins over"
            " whatever this node sends: it has to be restamped there as well"
        )
    return ""


def _restamped(held: SyncItem, peers: Sequence[PeerVersion], now_ms: int) -> SyncItem:
    """Return what is held, stamped later than all that peers hold and that is not far ahead."""
    stamps = [peer.held.stamp for peer in peers if peer.held is not None]
    later = [stamp.updated_at + 1 for stamp in stamps if not _is_ahead(stamp, now_ms)]
    version = max(held.version, *(stamp.version for stamp in stamps), 0) + 1
    return msgspec.structs.replace(
        held, updated_at=max(now_ms, *later, 0), version=min(version, NUMBER_MAX)
    )


async def _taken(
    config: ReplicationConfig, key: str, take: str, peers: Peers, now_ms: int
) -> SyncItem:
    """Return the item that a peer holds.

    :raises UsageError: if there is none, or none that helps.
    :raises ReplicationError: if the peer fails.
    """
    peer, lines = next(one for one in peers if one[0].node_id == take)
    if isinstance(lines, str):
        raise UsageError(f"peer {take!r} could not be asked: {lines}")
    source = source_at(lines, peer.redis_prefix, config.settings.limits.payload_bytes)
    name = source.redis_key(key)
    timeout = config.settings.timeouts.command
    (reply,) = await source.read(lines.asking, [name], timeout)
    if isinstance(reply, PeerReplyError):
        raise reply
    made = source.decode(key, reply)
    if made is None:
        raise UsageError(f"peer {take!r} holds nothing under {key!r}, and absence deletes nothing")
    (item,) = source.not_current([made[0]], [None])
    if _is_ahead(item.stamp, now_ms):
        raise UsageError(f"peer {take!r} holds a stamp more than a day ahead itself")
    return item


def _table(made: Explanation, now_ms: int) -> Table:
    table = Table("where", "stamp (UTC)", "version", "holds", "content", title=_text(made.key))
    table.add_row("here", *_cells(None if made.held is None else made.held.stamp, now_ms))
    for peer in made.peers:
        if peer.problem:
            problem = Text("could not be asked: ").append(printable(peer.problem))
            table.add_row(_text(peer.peer_id), problem)
            continue
        cells = _cells(None if peer.held is None else peer.held.stamp, now_ms)
        table.add_row(_text(peer.peer_id), *cells)
    return table


def _cells(stamp: Stamp | None, now_ms: int) -> Sequence[Text]:
    if stamp is None:
        return (Text("nothing"),)
    at = Text(utc_text(stamp.updated_at), style="red" if _is_ahead(stamp, now_ms) else "")
    what = "deleted" if stamp.deleted else stamp.content_type
    digest = "" if stamp.deleted else stamp.content_hash.hex()[:HASH_WIDTH]
    return (at, Text(f"{stamp.version:,}"), Text(what), Text(digest))


def _text(text: str) -> Text:
    return Text(printable(text))
