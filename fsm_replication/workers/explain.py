"""Answers the question "why does this node hold this version?" for one key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from fsm_replication.config import PeerConfig
from fsm_replication.errors import BadEntryError, ReplicationError
from fsm_replication.items import Stamp, check_key
from fsm_replication.layout import HEAD_BYTES, Keys, decode_stamp
from fsm_replication.replies import count, string
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.workers.arrivals import Arrival, Arrivals
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.fetcher import check_replies
from fsm_replication.workers.foreign_items import ForeignItems

__all__ = (
    "Explanation",
    "HeldVersion",
    "PeerVersion",
    "explain_key",
    "rule_between",
)

_ORIGIN_BYTES: Final = 256
_FOREIGN_BYTES_MAX: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HeldVersion:
    """One version of a key, without its content; ``origin`` is the node that took the write."""

    stamp: Stamp
    origin: str

    def __str__(self) -> str:
        stamp = self.stamp
        kind = (
            "deleted" if stamp.deleted else f"{stamp.content_type} {stamp.content_hash.hex()[:12]}"
        )
        return (
            f"version {stamp.version} at {stamp.updated_at}, {kind}, written at"
            f" {self.origin or 'an unknown node'}"
        )


@dataclass(frozen=True, slots=True)
class PeerVersion:
    """What a peer holds: a version, nothing, or, with ``problem``, nobody could tell.

    ``is_excepted`` says that the last agreement with this peer leaves the key out, because what the
    peer holds of it could not be taken.
    """

    peer_id: str
    held: HeldVersion | None
    problem: str = ""
    verdict: str = ""
    is_excepted: bool = False

    def __str__(self) -> str:
        told = f"could not tell: {self.problem}"
        if not self.problem:
            told = f"{self.held or 'absent'}; {self.verdict}"
        if self.is_excepted:
            told += "; left out of the agreement with this peer: it could not be taken"
        return told


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is held of a key here and at each peer, and which of them wins by which rule.

    ``arrival`` tells along which link the version held here came, as far as it is still known;
    a version written at this node came along none.
    """

    key: str
    held: HeldVersion | None
    peers: tuple[PeerVersion, ...]
    arrival: Arrival | None = None


def rule_between(ours: Stamp | None, theirs: Stamp | None) -> str:
    """Return in words which of two versions wins, and by which part of the order tuple."""
    if ours == theirs:
        return "the same" if ours is not None else "absent on both sides"
    if theirs is None:
        return "ours is the only version; absence deletes nothing"
    if ours is None:
        return "theirs wins: nothing is held here"
    winner, loser, who = (ours, theirs, "ours") if ours > theirs else (theirs, ours, "theirs")
    if winner.updated_at != loser.updated_at:
        ahead = winner.updated_at - loser.updated_at
        return f"{who} wins: it is later by {ahead} ms"
    if winner.version != loser.version:
        return f"{who} wins: same time, higher version ({winner.version} over {loser.version})"
    if winner.deleted != loser.deleted:
        return f"{who} wins: same time and version, and a delete wins over a write"
    if winner.content_hash != loser.content_hash:
        return f"{who} wins: same time and version, larger hash of the content"
    return f"{who} wins: only the content type differs"


async def explain_key(
    key: str,
    store: SyncEngine,
    peers: Sequence[tuple[PeerConfig, Lines | str]],
    *,
    timeout_sec: float,
    arrivals: Arrivals | None = None,
    blame: Callable[[str, str, Exception], None] | None = None,
    excepted_by: Collection[str] = (),
) -> Explanation:
    """Ask the local store and each peer; a peer's place may hold the reason it cannot be asked.

    ``blame`` is told what nobody expected to come of asking a peer. ``excepted_by`` names the peers
    with which the last agreement leaves the key out.

    :raises InvalidKeyError: if the key is not one.
    :raises StoreError: if the local store fails.
    """
    check_key(key)
    item = (await store.get_many([key]))[0]
    held = None if item is None else HeldVersion(item.stamp, item.origin)
    found = []
    for peer, lines in peers:
        try:
            told = await _ask(key, held, peer, lines, timeout_sec)
        except Exception as error:
            if blame is None:
                raise
            blame(peer.node_id, "explanation", error)
            told = PeerVersion(peer.node_id, None, type(error).__name__)
        found.append(replace(told, is_excepted=peer.node_id in excepted_by))
    arrival = None
    if item is not None and arrivals is not None:
        arrival = arrivals.find(key, item.updated_at)
    return Explanation(key, held, tuple(found), arrival)


async def _ask(
    key: str, ours: HeldVersion | None, peer: PeerConfig, lines: Lines | str, timeout_sec: float
) -> PeerVersion:
    if isinstance(lines, str):
        return PeerVersion(peer.node_id, None, lines)
    try:
        if lines.foreign:
            theirs = await _ask_foreign(key, peer, lines, timeout_sec)
        else:
            name = Keys(peer.redis_prefix).item(key)
            raw: Any = await lines.asking.call(
                "GETRANGE", name, 0, HEAD_BYTES + _ORIGIN_BYTES, timeout_sec=timeout_sec
            )
            theirs = _head(raw) if string(raw, "GETRANGE") else None
    except ReplicationError as error:
        return PeerVersion(peer.node_id, None, str(error))
    our_stamp = None if ours is None else ours.stamp
    their_stamp = None if theirs is None else theirs.stamp
    verdict = rule_between(our_stamp, their_stamp)
    if lines.foreign and our_stamp and their_stamp and _same_content(our_stamp, their_stamp):
        verdict = "the same content; foreign nodes stamp what arrives anew"
    return PeerVersion(peer.node_id, theirs, "", verdict)


def _same_content(ours: Stamp, theirs: Stamp) -> bool:
    return not ours.deleted and ours.content_hash == theirs.content_hash


async def _ask_foreign(
    key: str, peer: PeerConfig, lines: Lines, timeout_sec: float
) -> HeldVersion | None:
    source = ForeignItems(lines, peer.redis_prefix, _FOREIGN_BYTES_MAX)
    name = source.redis_key(key)
    size: Any = await lines.asking.call(*source.size_command, name, timeout_sec=timeout_sec)
    if size is not None and count(size, source.size_command[0]) > _FOREIGN_BYTES_MAX:
        raise BadEntryError("size", f"{size} bytes of item are not read to explain it")
    (reply,) = await source.read(lines.asking, [name], timeout_sec)
    check_replies([reply])
    made = source.decode(key, reply)
    return None if made is None else HeldVersion(made[0].stamp, made[0].origin)


def _head(raw: bytes) -> HeldVersion:
    stamp = decode_stamp(raw)
    if len(raw) <= HEAD_BYTES:
        raise BadEntryError("item", "the value ends within its head")
    begin = HEAD_BYTES + 1
    return HeldVersion(stamp, raw[begin : begin + raw[HEAD_BYTES]].decode("utf-8", "replace"))
