"""Opens the two connections of a link and reads the peer's marker key."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

from fsm_replication.abilities import TOO_OLD, Abilities, is_too_old, question_of_age
from fsm_replication.config import PeerConfig, Settings
from fsm_replication.errors import (
    PeerRefusedError,
    PeerReplyError,
    ReplicationError,
    shorten,
)
from fsm_replication.foreign import DOTTED
from fsm_replication.layout import FORMAT, Keys
from fsm_replication.merkle import OWN, PARTITIONS
from fsm_replication.ports import Connection, Position, Transport
from fsm_replication.redaction import Secrets
from fsm_replication.replies import count, table
from fsm_replication.reports import LinkFact, Reporter
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.peer_clock import ASK_TIME, PeerClock
from fsm_replication.workers.slo import TimedConnection

__all__ = (
    "Lines",
    "asking_bytes",
    "connect",
    "mending_wait_sec",
    "open_lines",
    "retry_wait_sec",
    "wait_for_mending",
    "wait_to_retry",
)


MARKER_BYTES: Final = 64 * 1024
"""What the marker key and the questions beside it may take."""
TREE_BYTES: Final = 16 * 1024 * 1024
"""What a flight of a tree's leaves may take at least, however small ``limits.batch_bytes`` is."""
FIELD_CHARS_MAX: Final = 200


@dataclass(slots=True)
class Lines:
    """A link's two connections: one for stream reads, which may block, one for all else.

    ``compared`` is the root of the peer's tree when it was last compared over them, and where its
    stream ended before that.
    """

    reading: Connection
    asking: Connection
    foreign: bool
    marker: Mapping[bytes, bytes]
    abilities: Abilities = field(default_factory=Abilities)
    compared: tuple[bytes, Position] | None = None

    @property
    def has_tree(self) -> bool:
        """Whether the peer publishes a tree in our own layout."""
        layouts = self.marker.get(b"layouts", b"").split(b",")
        partitions = self.marker.get(b"partitions", b"")
        return OWN.encode() in layouts and partitions == str(PARTITIONS).encode()

    @property
    def layout(self) -> str:
        """The layout by which the peer can be compared, "" for none.

        A foreign node's tree may appear only after its first items: it is looked for each time.
        """
        if self.foreign:
            return DOTTED
        return OWN if self.has_tree else ""

    def close(self) -> None:
        """Close both at once."""
        self.reading.close()
        self.asking.close()

    async def wait_closed(self) -> None:
        """Return when both sockets are closed."""
        await self.reading.wait_closed()
        await self.asking.wait_closed()


async def connect(context: LinkContext, report: Reporter) -> None:
    """Connect once; reports CONNECTED with :class:`Lines`, UNREACHABLE or HOPELESS."""
    status = context.metrics
    tree, clock = context.store.tree, context.ports.clock
    began = clock.monotonic()
    if context.progress.wanted_since is None:
        context.progress.wanted_since = began
    # A peer that is not up yet is no peer that fails: a circuit that opened while the engine starts
    # would use up the time that it has for that.
    guard = nullcontext() if context.starting() else context.peer_circuit.guard()
    try:
        with guard:
            lines = await open_lines(
                local_node_id=context.local_node_id,
                peer=context.peer,
                settings=context.settings,
                resolver=context.store.resolver.name,
                transport=context.ports.transport,
                publishes_dotted=DOTTED in (tree.layouts if tree is not None else ()),
                peer_clock=context.peer_clock,
            )
    except PeerRefusedError as error:
        context.progress.failed(error)
        status.connection("refused")
        report(LinkFact.HOPELESS, str(error), error)
    except ReplicationError as error:
        context.progress.failed(error)
        status.connection("failed")
        status.error(type(error).__name__)
        report(LinkFact.UNREACHABLE, str(error), error)
    else:
        status.connection("connected")
        status.operation("connect", clock.monotonic() - began)
        # Whatever is asked from now on is timed; what is read of the stream has limits of its own.
        lines.asking = TimedConnection(lines.asking, context.slo, clock)
        context.peer_clock.connection = lines.asking
        context.progress.layout = lines.layout
        if not lines.layout:
            why = "it publishes no tree of ours"
            context.log.warning("no_common_layout", why=why, then="its stream alone is read")
        kind = "a foreign node" if lines.foreign else "the marker was accepted"
        report(LinkFact.CONNECTED, kind, lines)


async def open_lines(
    *,
    local_node_id: str,
    peer: PeerConfig,
    settings: Settings,
    resolver: str,
    transport: Transport,
    publishes_dotted: bool = False,
    peer_clock: PeerClock | None = None,
) -> Lines:
    """Open both connections to a peer and accept or refuse what is found there.

    With ``peer_clock`` it is asked for its time as well.

    ``publishes_dotted`` says that foreign nodes may read this node: then none is read from, unless
    ``allow_echo`` is set.

    :raises PeerRefusedError: if waiting cannot mend it.
    :raises ReplicationError: if it cannot be reached, is not well, or holds no node yet.
    """
    name = "".join(c if "!" <= c <= "~" else "_" for c in f"fsm_replication:{local_node_id}")
    timeout = settings.timeouts.connect
    reading = await transport.connect(peer.redis_url, timeout_sec=timeout, name=name)
    try:
        asking = await transport.connect(peer.redis_url, timeout_sec=timeout, name=name)
        try:
            asking.limit_reply(MARKER_BYTES)
            began = 0.0 if peer_clock is None else peer_clock.now()
            marker, found, time = await _read_marker(asking, peer, settings.timeouts.command)
            if marker or found is not _Found.FOREIGN:
                _check_marker(marker, found, peer, settings, local_node_id, resolver)
            else:
                _check_one_way(peer, publishes_dotted=publishes_dotted)
            if peer_clock is not None:
                peer_clock.take(time, began)
        except BaseException:
            asking.close()
            raise
    except BaseException:
        reading.close()
        raise
    # What takes more by its nature says so.
    reading.limit_reply(settings.limits.batch_bytes)
    asking.limit_reply(asking_bytes(settings))
    return Lines(reading, asking, foreign=not marker, marker=marker)


class _Found(Enum):
    """Whose Redis it is where there is no marker key, as its other keys tell."""

    NOBODY = auto()
    OURS = auto()
    FOREIGN = auto()


def asking_bytes(settings: Settings) -> int:
    """Return what the replies of one flight may take that asks for neither entries nor items."""
    return max(settings.limits.batch_bytes, TREE_BYTES)


async def _read_marker(
    connection: Connection, peer: PeerConfig, timeout_sec: float
) -> tuple[dict[bytes, bytes], _Found, object]:
    """Return the marker, whose Redis it is without one, and the reply to TIME, be it an error."""
    keys = Keys(peer.redis_prefix)
    questions = (
        ["HGETALL", keys.marker],
        ["EXISTS", keys.stream],
        # Only nodes of ours write these, and each of ours has one of them from its first item on.
        ["EXISTS", keys.tree, keys.live, keys.processes],
        question_of_age(keys.stream),
        ASK_TIME,
    )
    replies: list[Any] = await connection.pipeline(questions, timeout_sec=timeout_sec)
    time = replies.pop()
    if isinstance(replies[2], PeerReplyError) and replies[2].code == "NOPERM":
        # Who reads a foreign node needs no right to keys that it does not have.
        replies[2] = 0
    for reply in replies:
        if isinstance(reply, PeerReplyError):
            if reply is replies[-1] and is_too_old(str(reply)):
                raise PeerRefusedError(f"{peer.display_url}: {TOO_OLD}")
            if reply.code == "NOPERM":
                raise PeerRefusedError(
                    f"{peer.display_url}: the user may not read: {reply}", credentials=True
                )
            raise PeerReplyError(str(reply), peer=peer.display_url)
    flat, has_stream, has_our_keys, _ = replies
    where = peer.display_url
    found = _Found.FOREIGN if count(has_stream, f"{where}: EXISTS") else _Found.NOBODY
    if count(has_our_keys, f"{where}: EXISTS"):
        found = _Found.OURS
    return table(flat, f"{where}: HGETALL"), found, time


def _check_marker(
    marker: Mapping[bytes, bytes],
    found: _Found,
    peer: PeerConfig,
    settings: Settings,
    local_node_id: str,
    resolver: str,
) -> None:
    """Accept or refuse a peer that is not a foreign node.

    :raises PeerRefusedError: if waiting cannot mend it.
    :raises PeerReplyError: if there is no node here yet.
    """
    where = f"peer {peer.node_id!r} at {peer.display_url}"
    if not marker and found is _Found.OURS:
        raise PeerReplyError(
            "it is a node of ours that has lost its marker key, and writes it again by itself",
            peer=where,
        )
    if not marker:
        # A node of ours writes its marker before anything else, and a foreign one has nothing to
        # tell before its first change: there is nobody here yet, and no need to guess who comes.
        raise PeerReplyError("no node has written here yet", peer=where)

    secrets = Secrets.of(peer.redis_url)

    def field(name: str) -> str:
        text = secrets.scrub(marker.get(name.encode(), b"").decode("utf-8", "replace"))
        return shorten(text, FIELD_CHARS_MAX)

    node_id, form = field("node_id"), field("format")
    if node_id == local_node_id:
        raise PeerRefusedError(f"{where} is this very node: check peers[].redis_url")
    if node_id != peer.node_id:
        raise PeerRefusedError(f"{where} calls itself {node_id!r}: check node_id and redis_url")
    if not (form.isascii() and form.isdigit() and len(form) < 10) or int(form) > FORMAT:
        raise PeerRefusedError(f"{where} has format {form!r}, this version reads up to {FORMAT}")
    ours = {"tombstone_ttl_ms": str(round(settings.tombstones.ttl * 1000)), "resolver": resolver}
    for name, mine in ours.items():
        if field(name) != mine:
            # Where the configuration of a whole mesh changes, one node is the first.
            raise PeerRefusedError(
                f"{where} has {name} {field(name)!r}, this node {mine!r}", mendable=True
            )


def _check_one_way(peer: PeerConfig, *, publishes_dotted: bool) -> None:
    """Refuse to read a foreign node where foreign nodes may read this one.

    :raises PeerRefusedError: unless ``allow_echo`` is set.
    """
    if publishes_dotted and not peer.allow_echo:
        raise PeerRefusedError(
            f"peer {peer.node_id!r} at {peer.display_url} is a foreign node, and this node"
            " publishes the dotted layout for foreign nodes to read: what one of them echoes would"
            " come back under a new time. Set peers[].allow_echo if this one does not read this"
            " node, or if that may happen"
        )


def retry_wait_sec(context: LinkContext, delay_sec: float) -> float:
    """Return the seconds until the next attempt: the backoff, or longer by the peer's circuit."""
    gate = 0.0 if context.starting() else context.peer_circuit.probe_in_sec
    return max(delay_sec, gate)


def mending_wait_sec(context: LinkContext) -> float:
    """Return the seconds until a link that has Failed is tried again."""
    return max(context.settings.reconnect.rejected, context.peer_circuit.probe_in_sec)


async def wait_to_retry(context: LinkContext, wait_sec: float, report: Reporter) -> None:
    """Wait, then report DUE."""
    await context.ports.clock.sleep(wait_sec)
    report(LinkFact.DUE, "the wait is over")


async def wait_for_mending(context: LinkContext, wait_sec: float, report: Reporter) -> None:
    """Wait long and try again: what made the link fail may be mended at the peer."""
    await context.ports.clock.sleep(wait_sec)
    report(LinkFact.DUE, f"it is tried again after {wait_sec:g} s")
