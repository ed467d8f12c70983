"""A foreign node, written byte by byte as the layout is described, with nothing of the library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from redis import Redis

from fsm_replication.servers import RedisServer

AT = 1_700_000_000_000


def sha(data: bytes) -> bytes:
    """Return the raw SHA-256."""
    return hashlib.sha256(data).digest()


class ForeignNode:
    """Writes what a foreign node would, with nothing of the library."""

    def __init__(self, server: RedisServer, prefix: str = "", *, bare: bool = False) -> None:
        self.client = Redis(host="127.0.0.1", port=server.port)
        self.prefix = prefix
        self.bare = bare
        self.leaves: dict[str, bytes] = {}
        self.documents: dict[bytes, bytes] = {}

    def put(
        self, key: str, content: bytes, *, version: int = 1, at: int = AT, leaf: bool = True
    ) -> None:
        """Keep an item as one string, and plant its leaf."""
        whole = {
            "object_id": key,
            "version": version,
            "updated_at": at,
            "content_type": "binary",
            "content_hash": sha(content).hex(),
            "content": list(content),
            "state": "default",
            "batch_id": None,
        }
        self.client.set(f"{self.prefix}{key}", json.dumps(whole))
        if leaf:
            self.plant(key, version, content)

    def put_document(self, key: str, payload: bytes, hashed: bytes, *, version: int = 1) -> None:
        """Keep an item as a document, which JSON.GET is answered with; ``hashed`` was its content."""
        raw = b'{"version":%d,"timestamp":%d,"state":"default","access_count":0,' % (version, AT)
        raw += b'"last_accessed":%d,"payload_hash":"%b",' % (AT, sha(hashed).hex().encode())
        raw += b'"payload":%b}' % payload
        name = f"{self.prefix}{key}".encode()
        self.documents[name] = raw
        # Something of a type that neither GET nor STRLEN can read.
        self.client.hset(f"{self.prefix}{key}", "stands for", "a document")
        self.plant(key, version, hashed)

    def plant(self, key: str, version: int, content: bytes) -> None:
        """Note a leaf; ``write_tree`` makes the tree of all of them."""
        self.leaves[key] = sha(
            key.encode() + b"|" + version.to_bytes(8, "little") + b"|" + sha(content)
        )

    def write_tree(self) -> None:
        """Write the whole tree anew."""
        for name in self.client.scan_iter(f"{self.prefix}merkle:*", count=1000):
            self.client.delete(name)
        pipe = self.client.pipeline(transaction=False)
        self._write(pipe, "", self.leaves)
        pipe.execute()

    def _write(self, pipe: Any, path: str, leaves: Mapping[str, bytes]) -> bytes:
        below: dict[str, dict[str, bytes]] = {}
        children: dict[str, bytes] = {}
        for key, digest in leaves.items():
            segment, dot, rest = key.partition(".")
            if dot:
                below.setdefault(segment, {})[rest] = digest
            else:
                children[segment] = digest
        for segment, part in below.items():
            name = f"{path}.{segment}" if path else segment
            children[segment] = self._write(pipe, name, part)
        whole = b""
        for segment in sorted(children, key=str.encode):
            whole += segment.encode() + b":" + children[segment] + b";"
            member = segment if self.bare else f"{segment}:{children[segment].hex()}"
            pipe.zadd(f"{self.prefix}merkle:children:{path}", {member: 0})
            name = f"{path}.{segment}" if path else segment
            pipe.set(f"{self.prefix}merkle:hash:{name}", children[segment].hex())
        pipe.set(f"{self.prefix}merkle:hash:{path}", sha(whole).hex())
        return sha(whole)

    def publish(self, key: str, content: bytes, version: int = 1) -> None:
        """Append a PUT to the stream."""
        meta = {"content_type": "binary", "version": version, "updated_at": AT}
        self.client.xadd(
            f"{self.prefix}cdc",
            {
                "op": "PUT",
                "key": key,
                "hash": sha(content).hex(),
                "data": content,
                "meta": json.dumps(meta),
            },
        )
