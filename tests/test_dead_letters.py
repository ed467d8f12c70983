"""Dead letters: looked at, tried again, purged, and counted where they were dropped."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, Peer, all_parts, held, peer_config, until, until_async
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_cli import run, write_config

from fsm_replication import (
    AlreadyRunningError,
    EngineState,
    EngineStoppedError,
    InvalidStateError,
    LastWriterWins,
    MemorySyncEngine,
    Outcome,
    PauseReason,
    PeerConfig,
    PeerState,
    Ports,
    RedisSyncEngine,
    ReplicationConfig,
    ReplicationEngine,
    Resolver,
    StoreError,
    SyncItem,
    UsageError,
)
from fsm_replication.batch import FUTURE, BatchBuilder
from fsm_replication.cli.letters import purge_letters, show_letter, show_letters
from fsm_replication.config import DeadLettersConfig, LimitsConfig, Settings, StartupConfig
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.dead_letters import RetryStats
from fsm_replication.items import DAY_MS, content_hash
from fsm_replication.ports import Cursor, DeadLetter, Position, StreamId
from fsm_replication.printable import printable
from fsm_replication.servers import RedisServer
from fsm_replication.stores.protocol import ApplyResult, Received
from fsm_replication.stream import encode_fields
from fsm_replication.testing import (
    LoopClock,
    MemoryCursorStore,
    SimTransport,
    SkewedWallClock,
)
from fsm_replication.testing import run as run_virtual

START_MS = 1_700_000_000_000
ALONE = StartupConfig(when_no_peer="run")


def item(key: str, content: bytes | None, at_ms: int = START_MS, version: int = 1) -> SyncItem:
    """Return an item of node a, or with None a tombstone."""
    body = b"" if content is None else content
    return SyncItem(key, body, "binary", content_hash(body), version, at_ms, content is None, "a")


def letter(
    number: int, fields: Sequence[bytes] | None, *, peer_id: str = "a", foreign: bool = False
) -> DeadLetter:
    """Return the letter of an entry, for a reason that does not hold any more."""
    raw = None if fields is None else tuple(fields)
    size = sum(map(len, fields or ()))
    stream_id = f"{START_MS + number}-0"
    return DeadLetter(peer_id, stream_id, "once", "bad", None, raw, size, START_MS, foreign=foreign)


def memory() -> MemorySyncEngine:
    """Return a store whose time of day is the simulated one."""
    return MemorySyncEngine(wall_clock=SkewedWallClock(LoopClock(), START_MS))


class Choosy(MemorySyncEngine):
    """A store whose moods may be set."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.failing = False
        self.accepting = True
        self.hanging = False
        self.calls = 0

    def should_accept_writes(self) -> bool:
        """Return ``accepting``."""
        return self.accepting

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Fail, hang, refuse, or apply."""
        # The cold path calls without any change, to see whether the store is as it was.
        self.calls += bool(changes)
        if self.failing:
            raise StoreError("no")
        if self.hanging:
            await asyncio.Event().wait()
        if not any(change.key in self.refused for change in changes):
            return await super().apply_many(changes, received)
        outcomes = []
        for change in changes:
            if change.key in self.refused:
                outcomes.append(Outcome.REFUSED)
            else:
                outcomes.extend((await super().apply_many([change])).outcomes)
        return ApplyResult(
            outcomes, {i: "I will not" for i, o in enumerate(outcomes) if o is Outcome.REFUSED}
        )


class Bench:
    """An engine on virtual time whose only peer, a, is away, and whose letters are given."""

    def __init__(self, store: MemorySyncEngine, now_ms: int, settings: Settings) -> None:
        clock = LoopClock()
        self.store = store
        self.cursors = MemoryCursorStore()
        ports = Ports(
            transport=SimTransport({}, clock, random.Random(1)),
            cursor_store=self.cursors,
            clock=clock,
            wall_clock=SkewedWallClock(clock, now_ms),
            random=random.Random(1),
        )
        config = ReplicationConfig(
            local_node_id="b",
            peers=[PeerConfig(node_id="a", redis_url="redis://a")],
            settings=settings,
        )
        self.engine = ReplicationEngine(config, store, ports=ports)

    async def put(self, *letters: DeadLetter) -> None:
        """Store letters as a link does."""
        for peer_id in {one.peer_id for one in letters}:
            mine = [one for one in letters if one.peer_id == peer_id]
            await self.cursors.settle(peer_id, None, mine, keep=10_000)

    async def left(self) -> list[tuple[int, str]]:
        """Return number and reason of each letter that is left."""
        found = await self.cursors.dead_letters()
        return [(StreamId.parse(one.stream_id).ms - START_MS, one.reason) for one in found]


def on_bench(
    scenario: Callable[[Bench], Coroutine[Any, Any, None]],
    store: MemorySyncEngine | None = None,
    *,
    now_ms: int = START_MS,
    settings: Settings | None = None,
) -> None:
    """Run a scenario with a running engine, on virtual time."""

    async def main() -> None:
        bench = Bench(
            store if store is not None else memory(),
            now_ms,
            settings or Settings(startup=ALONE),
        )
        async with bench.engine:
            await scenario(bench)
        assert len(asyncio.all_tasks()) == 1

    run_virtual(main)


@pytest.mark.parametrize(("held_ms", "applied"), [(-1, 1), (0, 1), (1, 0)])
def test_a_far_letter_is_superseded_by_what_was_stamped_since(held_ms: int, applied: int) -> None:
    """If this fails a retry undoes a restamp, or drops an entry that nobody has given up."""

    async def scenario(bench: Bench) -> None:
        judged_at = START_MS - 2 * DAY_MS
        far, late = item("k", b"far"), item("late", b"late")
        other = item("other", b"fine")
        letters = [
            replace(letter(1, encode_fields(far)), reason=FUTURE, key="k", at_ms=judged_at),
            # What was bad for another reason is judged by its stamp alone.
            replace(letter(2, encode_fields(late)), key="late", at_ms=judged_at - DAY_MS),
            replace(letter(3, encode_fields(other)), reason=FUTURE, key="other", at_ms=judged_at),
        ]
        held = [item(key, b"here", judged_at + held_ms) for key in ("k", "late")]
        await bench.store.apply_many(held)
        await bench.put(*letters)
        stats = await bench.engine.dead_letters.retry()
        assert (stats.tried, stats.applied, stats.superseded) == (3, 2 + applied, 1 - applied)
        assert await bench.left() == []
        found = [one and one.content for one in await bench.store.get_many(["k", "late", "other"])]
        assert found == [b"far" if applied else b"here", b"late", b"fine"]

    on_bench(scenario)


@pytest.mark.parametrize("good_at", [0, 1, 2])
def test_a_damaged_copy_takes_no_good_one_with_it(good_at: int) -> None:
    """If this fails an entry is dropped as superseded by one that was never applied (G1)."""
    good = encode_fields(item("k", b"1"))
    damaged = [*good[:7], b"2", *good[8:]]
    entries = [(b"%d-0" % n, good if n == good_at else damaged) for n in range(3)]
    builder = BatchBuilder("a", payload_bytes=10, part_bytes=10, now_ms=lambda: START_MS)
    selection = builder.select(entries)
    parts = all_parts(builder, selection)
    assert [one.content for part in parts for one in part.items] == [b"1"]
    # What comes after a good one of the same stamp is damaged and told; what was before is older.
    assert [one.stream_id for one in selection.letters] == [f"{n}-0" for n in (2, 1)][: 2 - good_at]


# Trying again -------------------------------------------------------------------------------------


def test_what_is_good_now_is_applied_and_what_is_old_superseded() -> None:
    """If this fails retry throws letters away, or keeps what is settled."""

    async def scenario(bench: Bench) -> None:
        await bench.store.submit(item("old", b"newer", START_MS + 9))
        bad = [b"op", b"X", b"key", b"bad"]
        wrong = encode_fields(item("wrong", b"1"))
        wrong[7] = b"2"
        await bench.put(
            letter(1, encode_fields(item("good", b"1"))),
            letter(2, encode_fields(item("old", b"older"))),
            letter(3, bad),
            letter(4, wrong),
            letter(5, encode_fields(item("good", b"2", START_MS + 1))),
            letter(6, encode_fields(item("good", None, START_MS + 2))),
            letter(7, None),
        )
        stats = await bench.engine.dead_letters.retry()
        assert stats == RetryStats(tried=7, applied=1, superseded=3, still_bad=3)
        assert await bench.left() == [(3, "op"), (4, "hash"), (7, "once")]
        assert await held(bench.store, "good", "old") == {"good": None, "old": b"newer"}
        assert (await bench.engine.explain("good")).arrival.path == "dead letter"  # type: ignore[union-attr]
        assert bench.engine.health_check().peers[0].dead_letters == 3

    on_bench(scenario)


def test_some_are_tried_and_the_others_left_alone() -> None:
    """If this fails a person cannot try one letter, or one peer's."""

    async def scenario(bench: Bench) -> None:
        await bench.put(*(letter(n, encode_fields(item(f"k{n}", b"1"))) for n in range(1, 6)))
        await bench.put(letter(9, encode_fields(item("z", b"1")), peer_id="gone"))
        letters = bench.engine.dead_letters
        ids = [one.id for one in await letters.list("a")]
        stats = await letters.retry(ids=[ids[1], ids[3], ids[3], 999, -1])
        assert (stats.tried, stats.applied) == (2, 2)
        assert (await letters.retry("nobody")).tried == 0
        assert (await letters.retry("a")).applied == 3
        stats = await letters.retry()
        assert (stats.tried, stats.left, len(stats.problems)) == (1, 1, 1)
        assert "'gone' is not configured" in stats.problems[0]
        with pytest.raises(UsageError):
            await letters.retry("a", ids=[1])

    on_bench(scenario)


def test_foreign_letters_keep_their_own_rule() -> None:
    """If this fails a retried letter of a foreign node is stamped with a clock nobody trusts."""

    async def scenario(bench: Bench) -> None:
        far = item("put", b"1", START_MS + 5_000, version=7)
        await bench.put(
            letter(1, encode_fields(far), foreign=True),
            letter(2, [b"op", b"DEL", b"key", b"deleted"], foreign=True),
        )
        await bench.store.submit(item("deleted", b"x", START_MS))
        assert (await bench.engine.dead_letters.retry()).applied == 2
        put, deleted = await bench.store.get_many(["put", "deleted"])
        assert put is not None
        assert put.updated_at == START_MS + 1
        assert deleted is not None
        assert (deleted.deleted, deleted.updated_at) == (True, START_MS + 2)

    on_bench(scenario)


def test_letters_survive_whatever_the_store_does() -> None:
    """If this fails a store that is not well costs the letters that are tried on it (G1)."""
    store = Choosy()

    async def scenario(bench: Bench) -> None:
        await bench.put(
            letter(1, encode_fields(item("yes", b"1"))), letter(2, encode_fields(item("no", b"1")))
        )
        letters = bench.engine.dead_letters
        store.accepting = False
        stats = await letters.retry()
        assert (stats.tried, stats.left) == (2, 2)
        assert "accepts no writes" in stats.problems[0]
        store.accepting, store.failing = True, True
        for _ in range(3):
            assert "'a': no" in (await letters.retry()).problems[0]
        assert "circuit 'store-writes' is open" in (await letters.retry()).problems[0]
        assert await bench.left() == [(1, "once"), (2, "once")]
        store.failing, store.refused = False, {"no"}
        await asyncio.sleep(61)
        stats = await letters.retry()
        assert (stats.applied, stats.still_bad, stats.problems) == (1, 1, ())
        assert await bench.left() == [(2, "refused")]
        store.refused = set()
        assert (await letters.retry()).applied == 1
        assert await bench.left() == []

    on_bench(scenario, store)


def test_a_letter_that_has_lain_too_long_revives_nothing() -> None:
    """If this fails retrying an old letter brings back a key that was deleted since (G5)."""

    async def scenario(bench: Bench) -> None:
        old = START_MS - 8 * DAY_MS
        await bench.store.submit(item("held", b"older", old - 1))
        await bench.put(
            letter(1, encode_fields(item("absent", b"1", old))),
            letter(2, encode_fields(item("held", b"1", old))),
            letter(3, encode_fields(item("young", b"1", START_MS))),
        )
        stats = await bench.engine.dead_letters.retry()
        assert (stats.applied, stats.left) == (2, 1)
        assert "older than tombstones.ttl" in stats.problems[0]
        assert await bench.left() == [(1, "once")]
        assert await bench.store.get("absent") is None

    on_bench(scenario)


def test_too_many_deletes_are_stopped_here_too() -> None:
    """If this fails dead letters are a way around the interlock."""

    async def scenario(bench: Bench) -> None:
        await bench.store.apply_many([item(f"k{n}", b"1") for n in range(1200)])
        deletes = [
            letter(n + 1, encode_fields(item(f"k{n}", None, START_MS + 1, 2))) for n in range(1200)
        ]
        await bench.put(*deletes)
        stats = await bench.engine.dead_letters.retry()
        assert stats.applied == 1000
        assert stats.left == 200
        assert "more would follow" in stats.problems[0]
        assert PauseReason.INTERLOCK in bench.engine.health_check().peers[0].pause_reasons
        await bench.engine.resume("a")
        assert (await bench.engine.dead_letters.retry()).applied == 200

    on_bench(scenario)


def test_the_end_of_the_engine_ends_a_retry() -> None:
    """If this fails a retry goes on behind an engine that has stopped, or is waited for for ever."""
    store = Choosy()

    async def main() -> None:
        bench = Bench(store, START_MS, Settings(startup=ALONE))
        letters = bench.engine.dead_letters
        with pytest.raises(InvalidStateError):
            await letters.retry()
        await bench.engine.start()
        await bench.put(letter(1, encode_fields(item("x", b"1"))))
        store.hanging = True
        first, second = (asyncio.create_task(letters.retry()) for _ in range(2))
        await asyncio.sleep(0.01)
        assert store.calls == 1
        await bench.engine.shutdown()
        for one in (first, second):
            with pytest.raises(EngineStoppedError):
                await one
        assert bench.engine.state is EngineState.STOPPED
        assert len(asyncio.all_tasks()) == 1
        with pytest.raises(InvalidStateError):
            await letters.retry()
        await bench.cursors.open()
        assert await bench.left() == [(1, "once")]

    run_virtual(main)


def test_a_retry_goes_on_without_its_caller() -> None:
    """If this fails a caller who is cancelled leaves a letter applied and not removed."""
    store = Choosy()

    async def scenario(bench: Bench) -> None:
        await bench.put(*(letter(n, encode_fields(item(f"k{n}", b"1"))) for n in range(1, 500)))
        for turns in range(12):
            asking = asyncio.create_task(bench.engine.dead_letters.retry())
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait((asking,))
        await asyncio.sleep(1)
        assert await bench.left() == []
        assert len(store) == 499

    on_bench(scenario, store)


contents = st.sampled_from([b"", b"1", b"22", b"x" * 90])
keys = st.sampled_from(["a", "b", "c"])
times = st.integers(0, 3)
goods = st.builds(
    lambda key, content, at, version: encode_fields(item(key, content, START_MS + at, version)),
    *(keys, st.none() | contents, times, st.integers(1, 3)),
)
BAD = [
    [b"op", b"X"],
    [b"op", b"PUT", b"key", b"a"],
    [b"op"],
    encode_fields(item("a", b"1", START_MS + 3 * DAY_MS)),
    # Of a key of its own: what is superseded by its stamp is not looked into.
    [*encode_fields(item("d", b"1"))[:7], b"tampered", *encode_fields(item("d", b"1"))[8:]],
]


ITEMS = {
    tuple(encode_fields(item(key, content, START_MS + at, version))): item(
        key, content, START_MS + at, version
    )
    for key in "abc"
    for content in (None, b"", b"1", b"22", b"x" * 90)
    for at in range(4)
    for version in (1, 2, 3)
}


@given(entries=st.lists(goods | st.sampled_from(BAD), max_size=12))
def test_any_letters_end_as_if_they_had_come_by_the_stream(entries: list[list[bytes]]) -> None:
    """If this fails what was a dead letter once ends in another store than what never was (G3)."""

    async def scenario(bench: Bench) -> None:
        await bench.put(*(letter(n, fields) for n, fields in enumerate(entries, start=1)))
        stats = await bench.engine.dead_letters.retry()
        wanted = memory()
        bad = []
        for number, fields in enumerate(entries, start=1):
            if fields in BAD:
                bad.append(number)
            else:
                await wanted.apply_many([ITEMS[tuple(fields)]])
        assert [number for number, _ in await bench.left()] == bad
        assert all(reason != "once" for _, reason in await bench.left())
        names = ["a", "b", "c", "d"]
        assert await bench.store.get_many(names) == await wanted.get_many(names)
        assert stats.tried == len(entries)
        assert stats.applied + stats.superseded == len(entries) - len(bad)
        again = await bench.engine.dead_letters.retry()
        assert (again.tried, again.still_bad) == (len(bad), len(bad))

    on_bench(scenario)


# Making room --------------------------------------------------------------------------------------


async def tailing(engine: ReplicationEngine) -> None:
    """Wait until the link to node a tails."""
    await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)


async def paused(engine: ReplicationEngine) -> None:
    """Wait until the link to node a is paused because it has too many dead letters."""
    await engine.wait_for_state(PeerState.PAUSED, peer_id="a", timeout=DEADLINE_SEC)
    assert engine.health_check().peers[0].pause_reasons == {PauseReason.DEAD_LETTERS_FULL}


@pytest.mark.parametrize("how", ["purge by id", "purge by peer", "purge all", "retry"])
async def test_room_lets_a_paused_link_go_on(
    nodes: Nodes, peer: Peer, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a link stays paused although a person has made room."""
    # The link looks for itself now and then; here it must be told.
    monkeypatch.setattr("fsm_replication.workers.tailer.HOLD_POLLS_PER_COUNT", 10**9)
    store = Choosy()
    store.refused = {"k0", "k1"}
    settings = Settings(limits=LimitsConfig(dead_letters=2))
    async with nodes.engine(peer_config(peer.server), store=store, settings=settings) as engine:
        await tailing(engine)
        letters = engine.dead_letters
        peer.send("k0", b"0")
        peer.send("k1", b"1")
        await until_async(letters.count, "letters")
        await until(lambda: engine.health_check().peers[0].dead_letters == 2)
        peer.send_fields([b"op", b"X", b"key", b"k"])
        await paused(engine)
        if how == "purge by id":
            first = (await letters.list())[0]
            assert await letters.purge(ids=[first.id]) == 1
        elif how == "purge by peer":
            assert await letters.purge("nobody") == 0
            assert engine.peers["a"] is PeerState.PAUSED
            assert await letters.purge("a") == 2
        elif how == "purge all":
            assert await letters.purge(everything=True) == 2
        else:
            store.refused = set()
            assert (await letters.retry("a")).applied == 2
            assert await held(store, "k0", "k1") == {"k0": b"0", "k1": b"1"}
        await tailing(engine)
        await until_async(lambda: has_reason(engine, "op"), "the entry that had to wait")
        peer.send("after", b"1")
        await until_async(lambda: store.get("after"))


async def has_reason(engine: ReplicationEngine, reason: str) -> bool:
    """Say whether a letter has this reason."""
    return any(one.reason == reason for one in await engine.dead_letters.list())


async def test_room_made_behind_its_back_is_found(
    nodes: Nodes, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails room made in the file itself is never noticed."""
    monkeypatch.setattr("fsm_replication.workers.tailer.HOLD_POLLS_PER_COUNT", 1)
    settings = Settings(limits=LimitsConfig(dead_letters=1))
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await tailing(engine)
        peer.send_fields([b"op", b"X", b"key", b"k"])
        await until(lambda: engine.health_check().peers[0].dead_letters == 1)
        peer.send_fields([b"op", b"Y"])
        await paused(engine)
        await engine._ports.cursor_store.purge_dead_letters("a")
        await tailing(engine)


async def test_what_to_purge_must_be_said(nodes: Nodes) -> None:
    """If this fails a slip of the pen removes all letters."""
    async with nodes.engine() as engine:
        letters = engine.dead_letters
        with pytest.raises(UsageError):
            await letters.purge()
        with pytest.raises(UsageError):
            await letters.purge("a", everything=True)
        with pytest.raises(UsageError):
            await letters.purge("a", ids=[1])
        with pytest.raises(UsageError, match="no dead letter 1"):
            await letters.show(1)


class Longest:
    """A resolver that keeps the longer content."""

    name = "longest"
    by_stamp = False

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return the item of the longer content."""
        return max(a, b, key=lambda one: (len(one.content), one.content))


@pytest.mark.parametrize("resolver", [LastWriterWins(), Longest()])
async def test_a_key_that_stays_bad_is_one_letter(
    nodes: Nodes, peer: Peer, resolver: Resolver
) -> None:
    """If this fails one key fills the store with letters, or what a resolver needs is gone (G1)."""
    peer.write_marker(resolver=resolver.name)
    settings = Settings(limits=LimitsConfig(dead_letters=40))
    store = MemorySyncEngine(resolver=resolver)
    async with nodes.engine(peer_config(peer.server), store=store, settings=settings) as engine:
        await tailing(engine)
        ids = []
        for number in range(30):
            ids.append(peer.send_fields([b"op", b"X", b"key", b"k", b"data", b"%d" % number]))
            peer.send(f"good{number}", b"1")
        counted = engine.metrics.get("dead_letters", "a", "op")
        await until(lambda: counted._value.get() == 30 and len(store) == 30)
        letters = await engine.dead_letters.list()
        health = engine.health_check().peers[0]
        if resolver.by_stamp:
            (one,) = letters
            assert (one.count, one.first_stream_id, one.stream_id) == (30, ids[0], ids[-1])
            assert one.fields is not None
            assert one.fields[-1] == b"29"
            assert health.dead_letters == 1
        else:
            assert [letter.stream_id for letter in letters] == ids
            assert health.dead_letters == 30


async def test_letters_over_their_bytes_pause_the_link(
    nodes: Nodes, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a peer fills the disk with dead letters, or a link that must wait flaps."""
    monkeypatch.setattr("fsm_replication.workers.tailer.HOLD_POLLS_PER_COUNT", 1)
    limits = LimitsConfig(payload_bytes=1000, batch_bytes=400_000, dead_letter_bytes=100_000)
    settings = Settings(limits=limits)
    async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
        await tailing(engine)
        for number in range(2):
            peer.send_fields([b"op", b"X", b"key", b"k%d" % number, b"data", bytes(40_000)])
            wanted = number + 1
            await until(lambda: engine.health_check().peers[0].dead_letters == wanted)  # noqa: B023
        peer.send_fields([b"op", b"X", b"key", b"k2", b"data", bytes(40_000)])
        await paused(engine)
        moves = len(engine.journal)
        async with asyncio.timeout(DEADLINE_SEC):
            await engine._ports.clock.sleep(0.3)
        assert len(engine.journal) == moves
        letters = await engine.dead_letters.list()
        assert sum(letter.held_bytes for letter in letters) <= 100_000
        await engine.dead_letters.purge(ids=[letters[0].id])
        await tailing(engine)
        await until(lambda: engine.health_check().peers[0].dead_letters == 2)


async def test_letters_that_were_dropped_stand_in_the_ledger(nodes: Nodes, peer: Peer) -> None:
    """If this fails letters go without a trace that lasts, where full means drop."""
    settings = Settings(
        limits=LimitsConfig(dead_letters=5), dead_letters=DeadLettersConfig(when_full="drop_oldest")
    )
    for begin in (0, 10):
        async with nodes.engine(peer_config(peer.server), settings=settings) as engine:
            await tailing(engine)
            for number in range(begin, begin + 10):
                peer.send_fields([b"op", b"X", b"key", b"k%d" % number])
            counted = engine.metrics.get("dead_letters", "a", "dropped")
            dropped = 5 if begin == 0 else 10
            await until(lambda: counted._value.get() == dropped)  # noqa: B023 - it waits here
            *doubts, line = sorted(await engine.ledger("a"), key=lambda one: one.kind == "dropped")
            assert (line.kind, line.missed) == ("dropped", 5 if begin == 0 else 15)
            assert line.healed_at_ms is None
            assert len(doubts) == (0 if peer.counts else 1)
            assert engine.health_check().peers[0].gaps_open == 1 + len(doubts)
            letters = await engine.dead_letters.list()
            assert [one.key for one in letters] == [f"k{n}" for n in range(begin + 5, begin + 10)]
            assert (await engine.dead_letters.show(letters[2].id)) == letters[2]


# The command line ---------------------------------------------------------------------------------

Servers = Callable[[], RedisServer]
EVIL = b"\x1b]0;owned\x07\x1b[2J\xe2\x80\xae"


async def node_with_letters(
    servers: Servers, folder: Path, *, peer_is_down: bool = False
) -> tuple[Path, RedisServer]:
    """Configure node b, which does not run, with four letters of a and one of c."""
    away, mine = servers(), servers()
    path = write_config(folder, mine, ("a", away))
    if peer_is_down:
        away.stop()
        asks_for_a_peer = path.read_text().replace("when_no_peer: run", "when_no_peer: fail")
        path.write_text(asks_for_a_peer)
    store = SqliteCursorStore(ReplicationConfig.load(path).cursor.sqlite_path)
    await store.open()
    now = int(time.time() * 1000)
    evil = [b"op", EVIL, b"key", EVIL, b"odd" + EVIL]
    odd = DeadLetter("a", "1-1", "op", EVIL.decode(), EVIL.decode(), tuple(evil), 99, now)
    large = DeadLetter("a", "1-2", "size", "too large", None, None, 10**8, now)
    goods = [letter(n, encode_fields(item(f"k{n}", b"x" * 5000, now - n))) for n in (1, 2)]
    cursor = Cursor(Position(StreamId(5, 0), 1), "x")
    await store.settle("a", cursor, [odd, large, *goods], keep=10)
    await store.settle("c", None, [letter(3, [b"op", b"X"], peer_id="c")], keep=10)
    await store.close()
    return path, mine


async def printed(work: Callable[[Console], Coroutine[Any, Any, None]]) -> str:
    """Return what a command prints on a terminal."""
    terminal = io.StringIO()
    await work(Console(file=terminal, force_terminal=True, color_system=None, width=200))
    return terminal.getvalue()


async def ids_left(path: Path) -> list[int]:
    """Return the ids of the letters that are left."""
    config = ReplicationConfig.load(path)
    store = SqliteCursorStore(config.cursor.sqlite_path, read_only=True)
    await store.open()
    found = [one.id for one in await store.dead_letters()]
    await store.close()
    return found


async def test_letters_are_listed_and_shown_safely(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails what a peer sends can rewrite the terminal of whoever looks at it."""
    path, _ = await node_with_letters(redis_servers, tmp_path)
    config = ReplicationConfig.load(path)
    listed = await printed(lambda to: show_letters(config, None, 9, to, as_json=False))
    evil, large, whole = [
        await printed(lambda to, i=i: show_letter(config, i, to, width=30, as_json=False))  # type: ignore[misc]
        for i in (1, 2, 3)
    ]
    for shown in (listed, evil, large, whole):
        assert all(one.isprintable() or one == "\n" for one in shown)
    assert [line.split()[1] for line in listed.splitlines() if "│ " in line] == list("12345")
    assert "\\x1b]0;owned\\x07" in evil
    assert "(17 bytes)" in evil
    assert "too large to be kept" in large
    assert max(map(len, whole.splitlines())) < 100
    one = await printed(lambda to: show_letters(config, "c", 1, to, as_json=False))
    assert one.count("│ 5 ") == 1
    assert "no dead" in await printed(lambda to: show_letters(config, "z", 1, to, as_json=False))


async def test_letters_are_printed_as_json(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails a script cannot read letters, or gets only a part of them."""
    path, _ = await node_with_letters(redis_servers, tmp_path)
    done = run("dead-letters", "list", str(path), "--limit", "4", "--json")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1, 2, 3, 4]
    assert done.stdout.isascii()
    done = run("dead-letters", "show", str(path), "5", "--json")
    assert json.loads(done.stdout)["fields"] == ["op", "X"]
    missing = run("dead-letters", "show", str(path), "77")
    assert (missing.returncode, "no dead letter 77" in missing.stderr) == (1, True)


@pytest.mark.parametrize(
    ("raw", "width", "shown"),
    [
        (b"abc", 3, "abc"),
        (b"abcd", 3, "ab…"),
        ("é".encode() * 4, 4, "éééé"),
        ("é".encode() * 5, 4, "ééé…"),
        (b"\xff\x00", 20, "\\xff\\x00"),
        ("\ud800\u202e\n", 40, "\\ud800\\u202e\\n"),
        (b"\x1b" * 100, 10, "\\x1b\\x1b\\…"),
    ],
)
def test_what_is_printed_is_cut_and_escaped(raw: str | bytes, width: int, shown: str) -> None:
    """If this fails a field of megabytes, or one of control characters, is printed as it is."""
    assert printable(raw, width) == shown


async def test_letters_of_a_stopped_node_are_tried_again(
    redis_servers: Servers, tmp_path: Path
) -> None:
    """If this fails dead letters can only be read, or need a node that runs."""
    path, mine = await node_with_letters(redis_servers, tmp_path)
    done = run("dead-letters", "retry", str(path), "3", "1", "--json")
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert (stats["tried"], stats["applied"], stats["still_bad"]) == (2, 1, 1)
    done = run("dead-letters", "retry", str(path))
    assert done.returncode == 1, "that a peer is not configured is a problem"
    assert "'c' is not configured" in done.stdout
    assert run("dead-letters", "retry", str(path), "3", "--peer", "a").returncode == 2
    async with RedisSyncEngine(mine.url, node_id="b") as store:
        assert await held(store, "k1", "k2") == {"k1": b"x" * 5000, "k2": b"x" * 5000}
    assert await ids_left(path) == [1, 2, 5]


async def test_letters_are_tried_again_while_no_peer_answers(
    redis_servers: Servers, tmp_path: Path
) -> None:
    """If this fails a letter waits for its peer, though it holds all that is needed."""
    path, mine = await node_with_letters(redis_servers, tmp_path, peer_is_down=True)
    done = run("dead-letters", "retry", str(path), "--peer", "a", "--json")
    assert json.loads(done.stdout)["applied"] == 2, done.stderr
    async with RedisSyncEngine(mine.url, node_id="b") as store:
        assert await held(store, "k1", "k2") == {"k1": b"x" * 5000, "k2": b"x" * 5000}
    assert await ids_left(path) == [1, 2, 5]


async def test_a_running_node_keeps_its_letters_itself(
    redis_servers: Servers, tmp_path: Path
) -> None:
    """If this fails a command changes letters behind the back of an engine that counts them."""
    path, mine = await node_with_letters(redis_servers, tmp_path)
    config = ReplicationConfig.load(path)
    async with RedisSyncEngine(mine.url, node_id="b") as store, ReplicationEngine(config, store):
        done = await asyncio.to_thread(run, "dead-letters", "retry", str(path))
        assert done.returncode == 1
        assert "stop it first" in done.stderr
        assert "Traceback" not in done.stderr
        for ids, peer_id in (([1], None), (None, "a"), (None, None)):
            with pytest.raises(AlreadyRunningError, match="stop it first"):
                await purge_letters(config, peer_id, ids, lambda _: pytest.fail("it asks"))
        await printed(lambda to: show_letters(config, None, 9, to, as_json=False))
    assert await ids_left(path) == [1, 2, 3, 4, 5]


async def test_letters_are_purged_once_somebody_agrees(
    redis_servers: Servers, tmp_path: Path
) -> None:
    """If this fails letters are removed without a word, or cannot be removed."""
    path, _ = await node_with_letters(redis_servers, tmp_path)
    config = ReplicationConfig.load(path)
    asked: list[str] = []

    def refuse(question: str) -> bool:
        asked.append(question)
        return False

    for ids, peer_id in (([1, 2, 2], None), (None, "a"), (None, None)):
        assert await purge_letters(config, peer_id, ids, refuse) is None
    assert asked == [
        "Remove 2 dead letters by id for good?",
        "Remove 4 dead letters of peer a for good?",
        "Remove 5 dead letters of all peers for good?",
    ]
    unasked = run("dead-letters", "purge", str(path), "--all")
    assert unasked.returncode == 1
    assert "of all peers for good? Nobody is there to ask" in unasked.stderr
    assert run("dead-letters", "purge", str(path), "1", "--all").returncode == 2
    assert await ids_left(path) == [1, 2, 3, 4, 5]
    assert await purge_letters(config, None, [1, 2, 99], lambda _: True) == 2
    assert await purge_letters(config, "c", None, lambda _: True) == 1
    assert await ids_left(path) == [3, 4]
    done = run("dead-letters", "purge", str(path), "--all", "--yes", "--json")
    assert json.loads(done.stdout) == {"purged": 2}
    assert await ids_left(path) == []


async def test_the_ledger_shows_what_was_dropped(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails nobody is told that dead letters are gone."""
    path, _ = await node_with_letters(redis_servers, tmp_path)
    store = SqliteCursorStore(ReplicationConfig.load(path).cursor.sqlite_path)
    await store.open()
    await store.settle("a", None, [letter(9, None)], keep=2)
    await store.close()
    text = await asyncio.to_thread(lambda: run("ledger", str(path)).stdout)
    assert "a: gaps: 0, entries missed by the stream: 0, dead letters dropped: 3" in text
    assert "3 dead letters dropped, not healed" in text
