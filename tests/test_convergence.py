"""G3, G4, G5, G11 and G12: whatever happens between nodes, all end with the same, and come to rest.

The nodes are whole engines on virtual time; what is simulated are Redis servers, lines, clocks and
cursor files. A failing run is reported with the steps that hypothesis has reduced it to.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsm_replication.items import EMPTY_HASH, SyncItem, content_hash
from fsm_replication.resolvers import GrowOnlySet
from fsm_replication.tables import PeerState
from fsm_replication.testing.fates import (
    CONTENTS,
    COUNTING,
    KEYS,
    NAMES,
    SHAPES,
    Fate,
    Step,
    run_fate,
)
from fsm_replication.testing.local_mesh import START_MS, TTL_SEC, LocalMesh, topology
from fsm_replication.testing.sim_dialects import REDIS_6_2
from fsm_replication.testing.virtual_time import run

PARTS = 10
QUICK_PARTS = 3
DRAWN = (*COUNTING, REDIS_6_2)


def steps_of(names: str) -> st.SearchStrategy[list[Step]]:
    """Return what may happen to nodes of these names."""
    node = st.sampled_from(names)
    kinds = st.one_of(
        st.tuples(st.just("put"), node, st.sampled_from(KEYS), st.sampled_from(CONTENTS)),
        st.tuples(st.just("put"), node, st.sampled_from(KEYS), st.sampled_from(CONTENTS)),
        st.tuples(st.just("delete"), node, st.sampled_from(KEYS)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.01, 0.5, 3.0, 15.0])),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.01, 0.5, 3.0, 15.0])),
        st.tuples(st.sampled_from(["cut", "heal"]), node, node),
        st.tuples(st.sampled_from(["stop", "kill", "start", "lose", "drop", "wipe"]), node),
        st.tuples(st.just("trim"), node, st.integers(0, 2)),
        st.tuples(st.just("skew"), node, st.sampled_from([-5000, -500, 0, 500, 5000])),
        st.tuples(st.just("expire")),
    )
    return st.lists(kinds, max_size=16)


@st.composite
def fates(draw: Callable[..., Any]) -> Fate:
    """Return a random mesh with a random fate."""
    nodes = draw(st.integers(2, 5))
    shape = draw(st.sampled_from(SHAPES))
    seed = draw(st.integers(0, 2**16))
    steps = tuple(draw(steps_of(NAMES[:nodes])))
    kinds = [dialect.name for dialect in DRAWN]
    dialects = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=nodes).map(tuple))
    return Fate(shape, nodes, seed, steps, cold=draw(st.booleans()), dialects=dialects)


# In parts, so that they share the cores; each tries other runs, also where CI is set.
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "part",
    [
        *range(QUICK_PARTS),
        *(pytest.param(part, marks=pytest.mark.slow) for part in range(QUICK_PARTS, PARTS)),
    ],
)
def test_nodes_converge_whatever_happens(part: int, full: bool) -> None:
    """If this fails there is a run that ends with different items, or never ends."""

    @settings(
        max_examples=(20_000 if full else 500) // PARTS,
        suppress_health_check=list(HealthCheck),
        deadline=None,
        derandomize=False,
        print_blob=True,
    )
    @given(fates())
    def check(one: Fate) -> None:
        run_fate(one)

    check()


def fate(shape: str, nodes: int, *steps: Step, seed: int = 0) -> None:
    """Run a plan that is known."""
    run_fate(Fate(shape, nodes, seed, steps))


def wait(seconds: float) -> Step:
    """Let time pass."""
    return ("wait", seconds)


# Traces that broke other rules, by name.


def test_equal_content_written_twice_and_a_third_write_in_between() -> None:
    """If this fails equal content is taken as current, and the later stamp of it is lost."""
    fate(
        "chain",
        3,
        ("put", "a", "k", b"x"),
        wait(3.0),
        ("skew", "c", 5000),
        ("put", "c", "k", b"x"),
        ("cut", "b", "c"),
        wait(0.5),
        ("put", "b", "k", b"y"),
        wait(0.5),
        ("heal", "b", "c"),
        wait(3.0),
    )

    async def trace() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        a, b = mesh.nodes["a"].store, mesh.nodes["b"].store
        early = a.put("k", b"x")
        between = SyncItem("k", b"y", "binary", content_hash(b"y"), 1, early.updated_at + 10)
        late = SyncItem("k", b"x", "binary", early.content_hash, 1, early.updated_at + 20)
        await b.apply_many([early])
        await b.apply_many([late])
        await a.apply_many([between])
        for name in "ab":
            await mesh.start(name)
        await mesh.settle()
        assert [held["k"].stamp for held in mesh.holdings()] == [late.stamp] * 2
        await mesh.close()

    run(trace, start_ms=START_MS)


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_delete_against_an_empty_put_of_the_same_version(first: str) -> None:
    """If this fails an empty content and a tombstone look equal, and nodes differ for ever."""

    async def trace() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        at = START_MS + 1000
        empty = SyncItem("k", b"", "binary", EMPTY_HASH, 2, at)
        deleted = SyncItem("k", b"", "binary", EMPTY_HASH, 2, at, True)
        await mesh.nodes["a"].store.apply_many([empty])
        await mesh.nodes["b"].store.apply_many([deleted])
        assert len(await mesh.roots()) == 2
        for name in (first, "ba"["ab".index(first)]):
            await mesh.start(name)
        await mesh.settle()
        assert all(held["k"].deleted for held in mesh.holdings())
        await mesh.close()

    run(trace, start_ms=START_MS)


def test_a_tombstone_swept_at_one_node_while_another_still_has_it() -> None:
    """If this fails five nodes whose clocks differ hand an expired tombstone round for ever."""

    async def trace() -> None:
        mesh = LocalMesh("abcde", topology("ring", "abcde"))
        for number, name in enumerate(mesh.nodes):
            mesh.nodes[name].wall_clock.skew_ms = number * 20_000
            await mesh.start(name)
        mesh.nodes["a"].store.put("k", b"x")
        await asyncio.sleep(1)
        mesh.nodes["b"].store.delete("k")
        await mesh.settle()
        counts = mesh.events()
        # The clock of e passes the expiry 80 s before that of a: in between trees differ.
        await asyncio.sleep(TTL_SEC - 100)
        different = 0
        for _ in range(40):
            await asyncio.sleep(5)
            different += len(await mesh.roots()) > 1
        assert different > 5
        await mesh.settle()
        assert await mesh.roots() == {bytes(8)}
        assert mesh.events() == counts
        # Still kept for the grace, it wins over what is older.
        revived = SyncItem("k", b"x", "binary", content_hash(b"x"), 1, START_MS)
        assert (await mesh.nodes["c"].store.apply_many([revived])).superseded == 1
        await mesh.close()

    run(trace, start_ms=START_MS)


@pytest.mark.parametrize("interruption", ["backpressure", "kill"])
def test_a_bootstrap_that_is_interrupted_goes_on(interruption: str) -> None:
    """If this fails a large copy that is interrupted begins anew, and may never end."""
    keys = 3000

    async def trace() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        for number in range(keys):
            mesh.nodes["a"].store.put(f"k{number}", b"%d" % number)
        node = mesh.nodes["b"]
        await mesh.start("a")
        await mesh.start("b")
        engine = node.engine
        assert engine is not None
        progress = engine._links["a"].context.progress
        while progress.copied < keys // 3:  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.001)
        assert engine.peers["a"] is PeerState.BOOTSTRAPPING
        assert "keys known to differ" in engine.health_check().peers[0].bootstrap
        if interruption == "kill":
            copied = progress.copied
            await mesh.kill("b")
            await mesh.start("b")
            assert node.engine is not None
            progress = node.engine._links["a"].context.progress
        else:
            copied = 0
            node.store.accepting_writes = False
            await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=60)
            held = len(node.store.items())
            await asyncio.sleep(60)
            assert len(node.store.items()) == held < keys
            node.store.accepting_writes = True
        await mesh.settle()
        assert len(node.store.items()) == keys
        # What had been copied before was not fetched again (but for what was in flight).
        assert progress.copied <= keys - copied + 500
        assert node.engine is not None
        moves = [move.dest for move in node.engine.journal if move.machine == "link:a"]
        assert moves[-1] is PeerState.TAILING
        await mesh.close()

    run(trace, start_ms=START_MS)


def test_many_keys_that_differ_after_an_outage() -> None:
    """If this fails an outage in which 30 % of the keys changed is not mended in full."""

    async def trace() -> None:
        mesh = LocalMesh("abc", topology("mesh", "abc"))
        a = mesh.nodes["a"].store
        for number in range(2000):
            a.put(f"k{number}", b"1")
        for name in "abc":
            await mesh.start(name)
        await mesh.settle()
        await mesh.stop("c")
        for number in range(0, 2000, 10):
            a.put(f"k{number}", b"2")
            a.delete(f"k{number + 1}")
            mesh.nodes["b"].store.put(f"k{number + 2}", b"3")
        await asyncio.sleep(5)
        for name in "ab":
            mesh.trim(name, 5)
        await mesh.start("c")
        await mesh.settle()
        held = mesh.holdings()
        assert held[0] == held[1] == held[2]
        engine = mesh.nodes["c"].engine
        assert engine is not None
        copied = sum(link.context.progress.copied for link in engine._links.values())
        assert 600 <= copied <= 2 * 600
        await mesh.close()

    run(trace, start_ms=START_MS)


def test_a_peer_that_came_back_empty_deletes_nothing() -> None:
    """If this fails a Redis that lost everything empties the others, or stays empty itself."""

    async def trace() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"))
        for number in range(50):
            mesh.nodes["a"].store.put(f"k{number}", b"x")
        mesh.nodes["a"].store.delete("k7")
        for name in "ab":
            await mesh.start(name)
        await mesh.settle()
        before = mesh.holdings()[1]
        await mesh.kill("a")
        mesh.servers["a"].flush()
        mesh.cut("b", "a")
        mesh.heal("b", "a")
        await mesh.start("a")
        await mesh.settle()
        assert mesh.holdings() == [before, before]
        await mesh.close()

    run(trace, start_ms=START_MS)


def test_nodes_with_a_merging_resolver_converge() -> None:
    """If this fails concurrent additions to one set are lost, or never come to rest."""

    async def trace(seed: int) -> None:
        mesh = LocalMesh("abcd", topology("ring", "abcd"), seed=seed, resolver=GrowOnlySet())
        rng = random.Random(seed)
        for name in mesh.nodes:
            await mesh.start(name)
        for number in range(20):
            name = rng.choice("abcd")
            mesh.nodes[name].store.put("k", json.dumps([number]).encode(), "json")
            if rng.random() < 0.3:
                mesh.cut(rng.choice("abcd"), rng.choice("abcd"))
            if rng.random() < 0.1:
                await mesh.kill(rng.choice("abcd"))
            await asyncio.sleep(rng.choice([0, 0.01, 2]))
        await mesh.mend()
        await mesh.settle()
        for held in mesh.holdings():
            assert sorted(json.loads(held["k"].content)) == list(range(20))
        await mesh.close()

    for seed in range(10):
        run(trace, seed, start_ms=START_MS)


def test_the_same_seed_gives_the_same_run() -> None:
    """If this fails a run that broke a guarantee cannot be looked at again."""

    async def trace() -> list[str]:
        mesh = LocalMesh("abc", topology("chain", "abc"), seed=5)
        for name in mesh.nodes:
            await mesh.start(name)
        for number in range(30):
            mesh.nodes["abc"[number % 3]].store.put(f"k{number % 4}", b"%d" % number)
            if number == 10:
                mesh.cut("a", "b")
            if number == 20:
                await mesh.kill("b")
                await mesh.start("b")
            await asyncio.sleep(0.1)
        await mesh.mend()
        await mesh.settle()
        moves = []
        for node in mesh.nodes.values():
            assert node.engine is not None
            moves += [f"{node.name} {move}" for move in node.engine.journal]
        await mesh.close()
        return moves

    assert run(trace, start_ms=START_MS) == run(trace, start_ms=START_MS)
