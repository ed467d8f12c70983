"""How the items of a peer are found in its Redis and read: an interface, and what it is for our own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from fsm_replication.errors import BadEntryError
from fsm_replication.items import Stamp, SyncItem
from fsm_replication.layout import Keys, decode_item, glob_escape, item_data, item_data_head
from fsm_replication.ports import Connection
from fsm_replication.replies import values
from fsm_replication.stream import DataDecoder, Encoded, WireForm, encode_meta

__all__ = ("ItemSource", "OwnItems")


class ItemSource(ABC):
    """How the items of one kind of node, whose names in Redis begin with ``prefix``, are read."""

    size_command: ClassVar[tuple[str, ...]]
    """The command that tells about how many bytes an item takes, without its key."""
    looks_at_held: ClassVar[bool]
    """Whether order tuples alone do not tell what is newer: see ``not_current``."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self.match = glob_escape(prefix) + "*"

    def redis_key(self, key: str) -> bytes:
        """Return where the item of a key lies."""
        return self._prefix + key.encode()

    def key_of(self, redis_key: bytes) -> str | None:
        """Return the item's key, or None where it is not UTF-8."""
        try:
            return redis_key.removeprefix(self._prefix).decode() or None
        except UnicodeDecodeError:
            return None

    @abstractmethod
    async def read(
        self, asking: Connection, redis_keys: Sequence[bytes], timeout_sec: float
    ) -> Sequence[Any]:
        """Return what lies at these keys, one reply each: an error or None where nothing does."""

    @abstractmethod
    def not_current(
        self, items: Sequence[SyncItem], held: Sequence[Stamp | None]
    ) -> list[SyncItem]:
        """Return the items whose content is not held, as they are to be applied."""

    @abstractmethod
    def weigh(self, reply: Any) -> int:
        """Return about how many bytes ``decode`` goes through.

        Of more than ``INLINE_BYTES`` it may be done on a thread, and uses nothing that others do.
        """

    @abstractmethod
    def decode(self, key: str, reply: Any) -> tuple[SyncItem, WireForm | None] | None:
        """Return the item in a reply, with its wire form; None where it has gone meanwhile.

        :raises BadEntryError: if it is not an item.
        """


class OwnItems(ItemSource):
    """The items of a node of ours."""

    size_command = ("STRLEN",)
    looks_at_held = False

    def __init__(self, keys: Keys, decoder: DataDecoder) -> None:
        super().__init__(keys.item_prefix)
        self._decoder = decoder

    async def read(
        self, asking: Connection, redis_keys: Sequence[bytes], timeout_sec: float
    ) -> Sequence[Any]:
        """Read each by GET, so that one of a wrong type spoils no other."""
        commands = [("GET", redis_key) for redis_key in redis_keys]
        return values(await asking.pipeline(commands, timeout_sec=timeout_sec), "GET")

    def not_current(
        self, items: Sequence[SyncItem], held: Sequence[Stamp | None]
    ) -> list[SyncItem]:
        """Return all of them: the store compares order tuples."""
        return list(items)

    def weigh(self, reply: Any) -> int:
        """Return the size of the content, as far as it is told."""
        if not isinstance(reply, bytes):
            return 0
        return len(reply) + self._decoder.declared_bytes(item_data_head(reply))

    def decode(self, key: str, reply: Any) -> tuple[SyncItem, WireForm | None] | None:
        """Return the item in a reply; its content stands there as on the stream."""
        if reply is None:
            return None
        if not isinstance(reply, bytes):
            raise BadEntryError("item", f"its key holds no item: {reply}")
        item = decode_item(key, reply, self._decoder)
        return item, Encoded(item_data(reply), encode_meta(item))
