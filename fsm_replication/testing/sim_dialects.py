"""Where servers of different kinds and versions answer differently.

A simulated server speaks one :class:`Dialect`. What is here was found by comparing the simulated
server with a real one of each kind; differences in the wording of errors are left out, because only
their codes mean something.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

__all__ = (
    "DIALECTS",
    "REDIS_6_2",
    "REDIS_7_0",
    "REDIS_8_0",
    "VALKEY_8_1",
    "Dialect",
    "dialect_named",
    "dialect_of",
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server of one kind and version does that others do not."""

    name: str
    kind: str
    version: str
    # INFO's redis_version, where it is not the version: Valkey says which Redis it is like.
    like_redis: str
    # XINFO STREAM has entries-added, max-deleted-entry-id and recorded-first-entry-id.
    counts_entries: bool
    # XADD takes an id such as 5-*, which leaves the second part to the server.
    half_ids: bool
    # Subcommands stand in the table of commands. Where they do not, MULTI queues any of them, and
    # what is wrong with one is found when it runs; XINFO then looks at the key first.
    subcommands_in_table: bool
    # XREAD takes + for the last entry of a stream.
    plus_is_last_entry: bool
    # The last entry that is there. Elsewhere + finds nothing while the entry last added is deleted.
    plus_passes_over_deleted: bool
    # A read that blocks is run again when one of its keys has got an entry, so that it answers
    # with all its streams. Where it is not, the answer is the one stream, without entries if those
    # that came have gone in the same transaction.
    reads_again: bool
    # MULTI inside of MULTI spoils the transaction.
    nested_multi_spoils: bool
    # Scores use the shortest form that round-trips: 0.1, not 0.10000000000000001.
    short_scores: bool
    # A score of -0 is kept as -0.
    minus_zero: bool

    @property
    def info(self) -> str:
        """What INFO says of the server's kind and version."""
        told = f"redis_version:{self.like_redis}\r\n"
        if self.kind == "redis":
            return told
        return told + f"server_name:{self.kind}\r\n{self.kind}_version:{self.version}\r\n"


REDIS_7_0: Final = Dialect(
    name="redis-7.0",
    kind="redis",
    version="7.0.15",
    like_redis="7.0.15",
    counts_entries=True,
    half_ids=True,
    subcommands_in_table=True,
    plus_is_last_entry=False,
    plus_passes_over_deleted=False,
    reads_again=False,
    nested_multi_spoils=False,
    short_scores=False,
    minus_zero=False,
)
REDIS_6_2: Final = replace(
    REDIS_7_0,
    name="redis-6.2",
    version="6.2.14",
    like_redis="6.2.14",
    counts_entries=False,
    half_ids=False,
    minus_zero=True,
    subcommands_in_table=False,
)
REDIS_8_0: Final = replace(
    REDIS_7_0,
    name="redis-8.0",
    version="8.0.2",
    like_redis="8.0.2",
    plus_is_last_entry=True,
    plus_passes_over_deleted=True,
    reads_again=True,
    short_scores=True,
)
VALKEY_8_1: Final = replace(
    REDIS_8_0,
    name="valkey-8.1",
    kind="valkey",
    version="8.1.1",
    like_redis="7.2.4",
    plus_passes_over_deleted=False,
    nested_multi_spoils=True,
)
DIALECTS: Final = (REDIS_6_2, REDIS_7_0, REDIS_8_0, VALKEY_8_1)


def dialect_named(name: str) -> Dialect:
    """Return the dialect of a name.

    :raises LookupError: if there is none.
    """
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    raise LookupError(f"there is no dialect {name!r}: {_names()}")


def _names() -> str:
    return ", ".join(dialect.name for dialect in DIALECTS)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def dialect_of(info: bytes) -> Dialect:
    """Return the dialect of a server by its reply to INFO server.

    If there is none of its version it is the nearest older one of the same kind.

    :raises LookupError: if there is no older one either.
    """
    lines = (line.partition(":") for line in info.decode().splitlines())
    told = {name: value for name, _, value in lines}
    kind = told.get("server_name", "redis")
    version = told.get(f"{kind}_version", "0.0")
    older = [
        dialect
        for dialect in DIALECTS
        if dialect.kind == kind and _numbers(dialect.version) <= _numbers(version)
    ]
    if not older:
        raise LookupError(f"there is no dialect of {kind} {version} or before: {_names()}")
    return max(older, key=lambda dialect: _numbers(dialect.version))
