"""Reads the items of a foreign node, in either of the forms in which they lie in its Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from fsm_replication.errors import BadEntryError, PeerReplyError
from fsm_replication.foreign import decode_foreign, is_json_module_missing
from fsm_replication.items import Stamp, SyncItem, content_hash
from fsm_replication.ports import Connection
from fsm_replication.replies import values
from fsm_replication.stream import INLINE_BYTES, Encoded, WireForm, encode_data, encode_meta
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.item_source import ItemSource

__all__ = ("ForeignItems",)

# It is parsed, spelled in several ways, and hashed in each.
DECODE_PASSES: Final = 16
# Older versions of the RedisJSON module answer a key of another type without Redis's code.
_WRONG_TYPE: Final = ("WRONGTYPE", "ERR Existing key has wrong Redis type", "ERR wrong static type")


class ForeignItems(ItemSource):
    """The items of a foreign node: documents of RedisJSON, or strings that hold a whole item.

    Whether its Redis has that module is asked once per connection, by using it: ``lines`` remembers.
    """

    # STRLEN refuses documents; this tells about how much either takes.
    size_command = ("MEMORY", "USAGE")
    looks_at_held = True

    def __init__(self, lines: Lines, prefix: str, payload_limit: int) -> None:
        super().__init__(prefix)
        self._lines = lines
        self._payload_limit = payload_limit

    async def read(
        self, asking: Connection, redis_keys: Sequence[bytes], timeout_sec: float
    ) -> Sequence[Any]:
        """Read documents by JSON.GET, and what is none, or without the module all, by GET.

        A reply is a tuple of its kind, "json" or "string", and the value; or an error, or None.
        """
        replies: list[Any] = []
        if self._lines.abilities.json_module is not False:
            commands = [("JSON.GET", redis_key) for redis_key in redis_keys]
            answers = values(await asking.pipeline(commands, timeout_sec=timeout_sec), "JSON.GET")
            self._lines.abilities.json_module = not any(map(_says_missing, answers))
            replies = [
                ("json", answer) if isinstance(answer, bytes) else answer for answer in answers
            ]
        if not self._lines.abilities.json_module:
            strings = list(range(len(redis_keys)))
            replies = [None] * len(redis_keys)
        else:
            strings = [place for place, reply in enumerate(replies) if _is_wrong_type(reply)]
        if strings:
            commands = [("GET", redis_keys[place]) for place in strings]
            answers = values(await asking.pipeline(commands, timeout_sec=timeout_sec), "GET")
            for place, answer in zip(strings, answers, strict=True):
                replies[place] = ("string", answer) if isinstance(answer, bytes) else answer
        return replies

    def weigh(self, reply: Any) -> int:
        """Return the size of a document, which is looked at in several ways."""
        return len(reply[1]) * DECODE_PASSES if isinstance(reply, tuple) else 0

    def decode(self, key: str, reply: Any) -> tuple[SyncItem, WireForm | None] | None:
        """Return the item in a reply of ``read``; None where it has gone meanwhile.

        :raises BadEntryError: if it is not an item.
        """
        if reply is None:
            return None
        if not isinstance(reply, tuple):
            raise BadEntryError("item", f"its key holds no item: {reply}")
        kind, raw = reply
        item = decode_foreign(key, raw, kind=kind, payload_limit=self._payload_limit)
        # What is large is compressed here, on the thread, and the rest by a store that compresses.
        if len(item.content) > INLINE_BYTES:
            return item, Encoded(encode_data(item.content), encode_meta(item))
        return item, None

    def not_current(
        self, items: Sequence[SyncItem], held: Sequence[Stamp | None]
    ) -> list[SyncItem]:
        """Leave out those whose content is held live, and give the others their content's hash.

        Content that could not be spelled as it was hashed has come with the foreign hash, by which
        it is known to be held; but under that hash no reader of our stream would take it.
        """
        wanted: list[SyncItem] = []
        for item, ours in zip(items, held, strict=True):
            digest = content_hash(item.content)
            if ours is None or ours.deleted or ours.content_hash not in (item.content_hash, digest):
                wanted.append(msgspec.structs.replace(item, content_hash=digest))
        return wanted


def _says_missing(answer: Any) -> bool:
    return isinstance(answer, PeerReplyError) and is_json_module_missing(str(answer))


def _is_wrong_type(answer: Any) -> bool:
    return isinstance(answer, PeerReplyError) and any(text in str(answer) for text in _WRONG_TYPE)
