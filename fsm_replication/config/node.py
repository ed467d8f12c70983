"""A node: who it is, whom it reads, and where it keeps what.

The text below a field is its description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_serializer, field_validator

from fsm_replication.config.model import Location, Model
from fsm_replication.config.settings import Settings
from fsm_replication.config.values import (
    Count,
    FileName,
    Flag,
    NodeId,
    PositiveDuration,
    Prefix,
    Priority,
    Url,
)
from fsm_replication.config.yaml_file import read_yaml
from fsm_replication.errors import ConfigError
from fsm_replication.redaction import mask_url

__all__ = ("CursorConfig", "PeerConfig", "ReplicationConfig", "StoreConfig")


class _HasUrl(Model):
    @property
    def display_url(self) -> str:
        """The URL without credentials, for logs and screens; "" where there is none."""
        url = getattr(self, "redis_url", None)
        return mask_url(url) if url else ""

    @field_serializer("redis_url", when_used="json", check_fields=False)
    def _mask(self, value: str | None) -> str | None:
        # JSON is what gets shown and sent; model_dump() keeps the URL as it is.
        return None if value is None else mask_url(value)


class PeerConfig(_HasUrl):
    """One peer."""

    node_id: NodeId
    """The peer's own ``local_node_id``: 1 to 255 bytes of UTF-8 without control characters."""
    redis_url: Url = Field(repr=False)
    """redis://, rediss:// (TLS) or unix://, with user and password; a name that may only read
    is enough. Never shown: see ``display_url``. With TLS the certificate is checked against the
    authorities of this machine, or those in the file of ``?ssl_ca_certs=FILE`` (PEM) or the
    folder of ``ssl_ca_path``; ``ssl_certfile`` and ``ssl_keyfile`` (without passphrase) are shown
    to a server that asks; ``ssl_check_hostname=false`` and ``ssl_cert_reqs=none`` give the
    checks up, for tests."""
    priority: Priority = 0
    """Lower is served first in start and repair; equal ones in the order they stand here."""
    circuit_failure_threshold: Count = 5
    """Failures in a row that open the peer's circuit, at least 1."""
    circuit_reset_timeout_sec: PositiveDuration = 30.0
    """Seconds an open circuit waits for a probe, over 0."""
    redis_prefix: Prefix = ""
    """What the peer's keys begin with, colon included: "site-a:". "" or nothing: no prefix."""
    allow_echo: Flag = False
    """True: read a foreign node that also reads us, with fewer promises."""


class CursorConfig(Model):
    """The file that remembers how far each peer was read."""

    sqlite_path: FileName = "replication_cursors.db"
    """A file on a local disk, one per engine. ":memory:" forgets, for tests."""
    wal_mode: Flag = True
    """False: for file systems without shared memory; slower."""


class StoreConfig(_HasUrl):
    """The node's own store, for ``fsm-replication run``."""

    kind: Literal["redis", "memory", "noop"]
    """"redis" needs ``redis_url``; "memory" forgets at the end; "noop" keeps nothing."""
    redis_url: Url | None = Field(default=None, repr=False)
    """The node's own Redis, as in ``peers[].redis_url``, with the right to write."""
    redis_prefix: Prefix = ""
    """As in ``peers[].redis_prefix``."""
    stream_maxlen: Count = 100_000
    """Entries the node's stream keeps, about; at least 1. More than come in the longest outage
    of a reader, or that reader copies everything anew."""
    layouts: tuple[Literal["own", "dotted"], ...] = ("own",)
    """The trees the node publishes: "own" always, "dotted" for foreign readers."""
    allow_eviction: Flag = False
    """True: use a Redis whose ``maxmemory-policy`` is not ``noeviction``. When it is full it may
    throw away tombstones, and deleted items come back."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        known = cls._known(data)
        if known.get("kind") == "redis" and data.get("redis_url") is None:
            yield ("redis_url",), "this key is required where kind is redis"
        layouts = known.get("layouts")
        if layouts is not None and "own" not in layouts:
            yield ("layouts",), '"own" is always among them'
        if layouts is not None and len(set(layouts)) != len(layouts):
            yield ("layouts",), "it names each layout once"


class ReplicationConfig(Model):
    """A node: who it is, whom it reads, and how.

    :raises ConfigError: in every way of building one, with all problems, if anything is wrong.
    """

    local_node_id: NodeId
    """This node: 1 to 255 bytes of UTF-8 without control characters. Unique in the mesh, and
    kept for ever."""
    settings: Settings = Settings()
    """What is the same for all peers."""
    peers: Sequence[PeerConfig] = ()
    """Whom it reads, each ``node_id`` once; none makes a node that others read. This node
    itself is left out, with a warning."""
    cursor: CursorConfig = CursorConfig()
    """Where it remembers how far it read."""
    store: StoreConfig | None = None
    """The node's own store; only the command line needs it."""
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("peers")
    @classmethod
    def _leave_self_out(
        cls, value: Sequence[PeerConfig], info: ValidationInfo
    ) -> Sequence[PeerConfig]:
        me = info.data.get("local_node_id")
        return tuple(peer for peer in value if peer.node_id != me)

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        first: dict[str, int] = {}
        for index, node_id in _peer_ids(data):
            if node_id in first:
                yield ("peers", index, "node_id"), f"peers[{first[node_id]}] has the same one"
            first.setdefault(node_id, index)

    def _notice(self, data: Any) -> None:
        me = self.local_node_id
        self._warnings = tuple(
            f"peers[{index}]: {me!r} is this node itself and is left out"
            for index, node_id in _peer_ids(data)
            if node_id == me
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd but no problem."""
        return self._warnings

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, checked like a new one.

        :raises ConfigError: if a change is wrong.
        """
        copied = super().model_copy(update=update, deep=deep)
        if "peers" not in (update or {}):
            copied._warnings = (*self._warnings, *copied._warnings)
        return copied

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file.

        :raises ConfigError: if it cannot be read or anything in it is wrong.
        """
        problems: list[str] = []
        try:
            data, problems = read_yaml(Path(path))
            config = cls.model_validate(data)
        except ConfigError as error:
            problems += error.problems
        # Raised out here, so that no error before it hangs on as its context.
        if problems:
            raise ConfigError(problems, source=str(Path(path)))
        return config

    def changed_paths(self, other: ReplicationConfig) -> tuple[str, ...]:
        """Return the dotted paths whose values differ, sorted, and never a value.

        Peers are named by node id, since their place may change: ``peers[b].priority``, or
        ``peers[b]`` where only one of the two has it; their order does not count.
        """
        mine, theirs = _flat(self), _flat(other)
        return tuple(sorted(_differing(mine, theirs)))


def _peer_ids(data: Any) -> Iterator[tuple[int, str]]:
    peers = data.get("peers") if isinstance(data, Mapping) else None
    if not isinstance(peers, Sequence) or isinstance(peers, str | bytes):
        return
    for index, peer in enumerate(peers):
        node_id = peer.get("node_id") if isinstance(peer, Mapping) else None
        node_id = peer.node_id if isinstance(peer, PeerConfig) else node_id
        if isinstance(node_id, str):
            yield index, node_id


def _flat(config: ReplicationConfig) -> dict[str, Any]:
    """Return a tree of plain values in which each peer stands under its node id."""
    plain = config.model_dump()
    for peer in plain.pop("peers"):
        plain[f"peers[{peer['node_id']}]"] = peer
    return plain


def _differing(mine: Any, theirs: Any, path: str = "") -> Iterator[str]:
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        if mine != theirs:
            yield path
        return
    for name in mine.keys() | theirs.keys():
        yield from _differing(mine.get(name), theirs.get(name), f"{path}.{name}".lstrip("."))
