"""The tree tells exactly what is held, whatever the way there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from fsm_replication.items import SyncItem
from fsm_replication.layout import encode_stamp
from fsm_replication.merkle import EMPTY_ROOT, OWN, MerkleTree, Tree
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.testing.contract.base import (
    StoreRules,
    dead,
    live,
    now_ms,
    shifted,
)

__all__ = ("TreeRules", "walk_tree")

KEYS = ("k", "k.1", "other")
LEVELS = 3
SHORT_TTL_SEC = 0.2
POLL_SEC = 0.02


class TreeRules(StoreRules):
    """Rules of ``SyncEngine.tree`` in our own layout, where a store has one."""

    def test_an_empty_tree_is_empty(self) -> None:
        """If this fails two new nodes believe that they differ."""

        async def scenario(store: SyncEngine) -> None:
            tree = _tree_of(store)
            assert await walk_tree(tree) == (EMPTY_ROOT, {})
            assert await tree.is_branch_clean(OWN, "")

        self.with_store(scenario)

    def test_the_tree_tells_what_is_held(self) -> None:
        """If this fails nodes that hold the same never agree, or ones that differ do."""

        def check(drawn: list[SyncItem]) -> None:
            async def scenario(store: SyncEngine) -> None:
                tree = _tree_of(store)
                changes = shifted(drawn)
                for half in (changes[: len(changes) // 2], changes[len(changes) // 2 :]):
                    await store.apply_many(half)
                    await _check(store, tree, KEYS)

            self.with_store(scenario)

        self.for_all(self.histories(), check)

    def test_many_keys_are_in_the_tree(self) -> None:
        """If this fails a tree of more than a few keys is not what its leaves say."""

        async def scenario(store: SyncEngine) -> None:
            tree = _tree_of(store)
            at = now_ms()
            keys = [f"user-{n}" for n in range(600)]
            await store.apply_many([live(key, b"[]", at) for key in keys])
            await store.apply_many([dead(key, at + 1) for key in keys[::7]])
            await store.apply_many([live(key, b"[1]", at + 2) for key in keys[::5]])
            await _check(store, tree, keys)
            paths = await tree.clean_branches(OWN)
            assert all([await tree.is_branch_clean(OWN, path) for path in paths])

        self.with_store(scenario)

    def test_tombstones_leave_the_tree_when_they_expire(self) -> None:
        """If this fails the trees of two nodes differ for as long as one was not asked."""

        async def scenario(store: SyncEngine) -> None:
            tree = _tree_of(store)
            at = now_ms()
            await store.apply_many([live("stays", b"x", at), live("late", b"x", at - 60_001)])
            await store.apply_many([dead("k", at), dead("late", at - 60_000)])
            expiry_ms = at + round(SHORT_TTL_SEC * 1000)
            # The deadline of the scenario ends it.
            while True:
                asked_ms = now_ms()
                _, leaves = await walk_tree(tree)
                assert "late" not in leaves, "it had expired when it came, and took the item along"
                if "k" not in leaves:
                    break
                assert asked_ms <= expiry_ms, "it was asked for after the expiry"
                await asyncio.sleep(POLL_SEC)
            assert now_ms() >= expiry_ms, "it left the tree before it had expired"
            assert list(leaves) == ["stays"]
            await _check(store, tree, ["stays"])

        self.with_store(scenario, ttl_sec=SHORT_TTL_SEC, grace_sec=600)


def _tree_of(store: SyncEngine) -> Tree:
    tree = store.tree
    if tree is None:
        pytest.skip("the store keeps no tree")
    assert OWN in tree.layouts
    return tree


async def walk_tree(tree: Tree) -> tuple[bytes, dict[str, bytes]]:
    """Return the root, and all leaves as they are found from the root down."""
    root = await tree.root(OWN)
    paths = [""]
    leaves: dict[str, bytes] = {}
    for level in range(LEVELS):
        found = [children or {} for children in await tree.children(OWN, paths)]
        if level == LEVELS - 1:
            sizes = await tree.sizes(OWN, paths)
            assert list(sizes) == [len(children) for children in found]
            for children in found:
                leaves |= children
        paths = [
            path + name for path, children in zip(paths, found, strict=True) for name in children
        ]
    return root, leaves


async def _check(store: SyncEngine, tree: Tree, keys: Sequence[str]) -> None:
    held = [item for item in await store.get_many(keys) if item is not None]
    root, leaves = await walk_tree(tree)
    assert leaves == {item.key: encode_stamp(item) for item in held}
    model = MerkleTree()
    for item in held:
        model.set(item.key, encode_stamp(item))
    assert root == model.root(), "the root is not that of the leaves"
