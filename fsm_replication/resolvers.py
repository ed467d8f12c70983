"""Resolvers that look at contents.

A resolver must be associative, commutative and idempotent: nodes see items in different orders and
more than once, and must come to the same end. In other words contents form a join-semilattice
(Shapiro et al., "Conflict-free Replicated Data Types", 2011).
"""

from __future__ import annotations

import json
from typing import Any

from fsm_replication.items import SyncItem, content_hash
from fsm_replication.nesting import is_too_deep

__all__ = ("GrowOnlySet",)


class GrowOnlySet:
    """Contents are JSON arrays, taken as sets: two of them become their union.

    A local write adds to what is held. Elements are compared as JSON text with sorted keys, and
    written in that order. Content that is no JSON array gives way to any that is; of two such the
    larger bytes stay. Deleting the key deletes the set: what was added after it stays.
    """

    name = "grow-only-set"
    by_stamp = False

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return an item with the union of both."""
        if a.content == b.content and a.content_type == b.content_type:
            return a
        ours, theirs = _elements(a.content), _elements(b.content)
        if ours is None and theirs is None:
            return max(a, b, key=lambda item: (item.content, item.content_type))
        union = {**(ours or {}), **(theirs or {})}
        content = f"[{','.join(sorted(union))}]".encode()
        top = a if a.stamp >= b.stamp else b
        return SyncItem(
            a.key, content, "json", content_hash(content), top.version, top.updated_at, False,
            top.origin,
        )  # fmt: skip

    def __repr__(self) -> str:
        return "GrowOnlySet()"


def _elements(content: bytes) -> dict[str, Any] | None:
    """Return the elements by their canonical text, or None where it is no JSON array."""
    if is_too_deep(content):
        return None
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, list):
        return None
    return {json.dumps(element, sort_keys=True, separators=(",", ":")): None for element in parsed}
