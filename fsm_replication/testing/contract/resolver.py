"""Merging is associative, commutative and idempotent, or nodes never agree."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st

from fsm_replication.items import Resolver, SyncItem, resolve
from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.testing import strategies
from fsm_replication.testing.contract.base import StoreRules

__all__ = ("ResolverRules",)


class ResolverRules(StoreRules):
    """Rules of ``SyncEngine.resolver``: contents form a join-semilattice."""

    def test_merging_is_associative_commutative_and_idempotent(self) -> None:
        """If this fails nodes that saw the same in another order hold different contents."""
        resolver = self._resolver()
        one = strategies.items(keys=st.just("k"), bodies=self.contents())

        def check(drawn: tuple[SyncItem, SyncItem, SyncItem]) -> None:
            a, b, c = drawn
            join = functools.partial(_join, resolver)
            assert _seen(join(a, a)) == _seen(a), "idempotent"
            assert _seen(join(a, b)) == _seen(join(b, a)), "commutative"
            assert _seen(join(join(a, b), c)) == _seen(join(a, join(b, c))), "associative"
            assert _seen(join(join(a, b), a)) == _seen(join(a, b)), "what was merged is in it"

        self.for_all(st.tuples(one, one, one), check)

    def test_a_merge_is_no_new_write(self) -> None:
        """If this fails each merge is newer than the last, and nodes never come to rest."""
        resolver = self._resolver()
        one = strategies.items(keys=st.just("k"), bodies=self.contents())

        def check(drawn: tuple[SyncItem, SyncItem]) -> None:
            a, b = drawn
            made = _join(resolver, a, b)
            top = max(a.stamp, b.stamp)
            assert (made.updated_at, made.version) == (top.updated_at, top.version)
            assert not made.deleted, "only a tombstone deletes"
            if resolver.by_stamp:
                assert made in (a, b), "by_stamp: the larger stamp wins whole"

        self.for_all(st.tuples(one, one), check)

    def test_merging_takes_any_content(self) -> None:
        """If this fails an item of a peer is refused, and two nodes that write it never agree."""
        resolver = self._resolver()
        one = strategies.items(keys=st.just("k"), bodies=strategies.contents() | self.contents())

        def check(drawn: tuple[SyncItem, SyncItem]) -> None:
            a, b = drawn
            assert _seen(_join(resolver, a, b)) == _seen(_join(resolver, b, a))

        self.for_all(st.tuples(one, one), check)

    def test_a_resolver_has_a_name_and_it_is_always_the_same(self) -> None:
        """If this fails links between nodes of one resolver are refused, or of two are not."""
        names = {(r.name, r.by_stamp) for r in (self._resolver(), self._resolver())}
        assert len(names) == 1
        ((name, _),) = names
        assert name

    def _resolver(self) -> Resolver:
        found: list[Resolver] = []

        async def scenario(store: SyncEngine) -> None:
            found.append(store.resolver)

        self.with_store(scenario)
        return found[0]


def _join(resolver: Resolver, a: SyncItem, b: SyncItem) -> SyncItem:
    """Return what a node holds that held ``a`` and is given ``b``."""
    return resolve(resolver, a, b) or a


def _seen(item: SyncItem) -> Any:
    return item.content, item.stamp
