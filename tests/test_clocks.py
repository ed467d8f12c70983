"""Clocks that are wrong: a peer's is asked for, shown, and believed before anything good is buried."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DEADLINE_SEC, Nodes, Peer, held, until
from rich.console import Console

from fsm_replication import ReplicationEngine
from fsm_replication.batch import BatchBuilder
from fsm_replication.cli.node import check_node
from fsm_replication.config import PeerConfig, ReplicationConfig, Settings
from fsm_replication.errors import PeerReplyError, ProtocolError
from fsm_replication.items import DAY_MS, SyncItem, content_hash
from fsm_replication.log import get_logger
from fsm_replication.reports import PauseReason
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine
from fsm_replication.stream import encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.testing import LocalMesh, LoopClock, SkewedWallClock, run, topology
from fsm_replication.testing.local_mesh import START_MS
from fsm_replication.testing.sim_store import SimStore
from fsm_replication.testing.sim_values import COMMANDS, Command
from fsm_replication.workers.peer_clock import PeerClock

TWO_DAYS_MS = 2 * DAY_MS
PING_SEC = 30.0
IDLE_SEC = 60.0
NO_TIME = PeerReplyError("NOPERM this user has no permissions to run the 'time' command")


def settings(**parts: Any) -> Settings:
    """Return settings of a node that may start without peers, and whose cold path rests."""
    rest = {
        "startup": {"when_no_peer": "run"},
        "hot_path": {"block_timeout": "20s"},
        "cold_path": {"enabled": False},
        "circuits": {"look_interval": "20s"},
    }
    return Settings.model_validate({**rest, **parts})


class Pair:
    """Node b, which reads node a, on virtual time; a is another site with a clock of its own."""

    def __init__(self, **parts: Any) -> None:
        self.mesh = LocalMesh("ab", topology("mesh", "ab"), settings=settings(**parts))
        self.a, self.b = self.mesh.nodes["a"], self.mesh.nodes["b"]

    @property
    def engine(self) -> ReplicationEngine:
        """The engine of b."""
        assert self.b.engine is not None
        return self.b.engine

    @property
    def peer(self) -> SimStore:
        """The store of a."""
        return self.a.store

    async def start(self, state: PeerState = PeerState.TAILING) -> None:
        """Start b alone, and wait until its link is in a state."""
        await self.mesh.start("b")
        await self.engine.wait_for_state(state, peer_id="a", timeout=60)

    async def reach(self, condition: Callable[[], object], within_sec: float = 10) -> None:
        """Let virtual time pass until a condition holds."""
        async with asyncio.timeout(within_sec):
            while not condition():  # noqa: ASYNC110 - it is virtual time
                await asyncio.sleep(0.05)

    def is_paused(self) -> bool:
        """Say whether the link waits for the clocks to agree, and for nothing else."""
        health = self.engine.health_check().peers[0]
        return health.state is PeerState.PAUSED and health.pause_reasons == {PauseReason.CLOCK}

    def letters(self) -> int:
        """Return how many dead letters there are."""
        return self.engine.health_check().peers[0].dead_letters

    def skew(self) -> float | None:
        """Return what health says of the peer's clock."""
        return self.engine.health_check().peers[0].clock_skew_sec

    def holds(self, *keys: str) -> bool:
        """Say whether b holds what a does under some keys."""
        return all(self.b.store.held(key) == self.peer.held(key) is not None for key in keys)


def played(play: Callable[[], Any]) -> None:
    """Run a coroutine on virtual time; it may leave nothing behind."""

    async def main() -> None:
        await play()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    run(main)


def refuse_time(patch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let every simulated server answer TIME otherwise."""

    def tell(_: Any, __: list[bytes]) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    patch.setitem(COMMANDS, b"TIME", Command("TIME", 1, tell))


# Our own clock -------------------------------------------------------------------------------------


@pytest.mark.parametrize("health", [{}, {"enabled": False}], ids=["pinged", "not pinged"])
@pytest.mark.parametrize("before", [0, 1], ids=["bootstrapped", "tailed"])
def test_our_clock_days_behind_buries_nothing(before: int, health: dict[str, Any]) -> None:
    """If this fails a wrong clock of ours turns every good event into a dead letter, for good."""

    async def play() -> None:
        pair = Pair(peer_health=health)
        for number in range(20):
            pair.peer.put(f"early{number}", b"1")
        if before:
            await pair.start()
        # It may have been wrong from the start, or jump at any time.
        pair.b.wall_clock.skew_ms = -TWO_DAYS_MS
        if not before:
            await pair.start(PeerState.PAUSED)
        for number in range(20):
            pair.peer.put(f"late{number}", b"1")
        await pair.reach(pair.is_paused)
        assert pair.skew() == pytest.approx(TWO_DAYS_MS / 1000, abs=1)
        error = [record.why for record in pair.engine.journal if record.trigger == "pause"][-1]
        assert "172,80" in error
        assert "set the clock that is wrong" in error
        await asyncio.sleep(4 * PING_SEC)
        assert pair.is_paused()
        assert pair.letters() == 0
        pair.b.wall_clock.skew_ms = 0
        await pair.reach(lambda: pair.holds(*pair.peer.items()), 5)
        await pair.reach(lambda: pair.engine.peers["a"] is PeerState.TAILING, 5)
        assert pair.letters() == 0
        await pair.mesh.close()

    played(play)


def test_our_clock_days_ahead_stops_nothing() -> None:
    """If this fails a link pauses although nothing lies far ahead of our clock."""

    async def play() -> None:
        pair = Pair()
        pair.b.wall_clock.skew_ms = TWO_DAYS_MS
        await pair.start()
        pair.peer.put("key", b"1")
        await pair.reach(lambda: pair.holds("key"))
        assert pair.skew() == pytest.approx(-TWO_DAYS_MS / 1000, abs=1)
        await pair.mesh.close()

    played(play)


@pytest.mark.parametrize("trees", [True, False], ids=["trees", "no trees"])
@pytest.mark.parametrize("before", [0, 1], ids=["bootstrapped", "tailed"])
def test_what_our_clock_days_ahead_makes_old_waits_for_the_clocks(before: int, trees: bool) -> None:
    """If this fails good entries are held back as if they were older than tombstones, for good."""

    async def play() -> None:
        pair = Pair(
            tombstones={"ttl": "1d"},
            cold_path={"enabled": trees, "interval_sec": 20},
        )
        pair.peer.put("early", b"1")
        await pair.start()
        if not before:
            await pair.mesh.stop("b")
            # What comes next is not in the stream any more.
            pair.peer.put("trimmed", b"1")
            pair.mesh.trim("a", 0)
        pair.b.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("late", b"1")
        if not before:
            pair.mesh.trim("a", 0)
            await pair.start(PeerState.TAILING if trees else PeerState.PAUSED)
        if trees:
            # They bring it once the clocks agree; nothing else has to wait for that.
            await pair.reach(lambda: pair.engine.health_check().peers[0].stale_held_back > 0, 60)
            assert not pair.is_paused()
        else:
            await pair.reach(pair.is_paused, 60)
        assert not pair.holds("late")
        pair.b.wall_clock.skew_ms = 0
        await pair.reach(lambda: pair.holds(*pair.peer.items()), 60)
        assert pair.engine.health_check().peers[0].stale_held_back == 0
        await pair.mesh.close()

    played(play)


def test_a_clock_that_is_set_while_the_peer_is_asked_judges_anew() -> None:
    """If this fails what was read by the wrong clock is buried by the right one."""

    async def play() -> None:
        pair = Pair()
        await pair.start()
        pair.b.wall_clock.skew_ms = -TWO_DAYS_MS
        ask = pair.engine._links["a"].context.peer_clock.ask

        async def ask_and_set(timeout_sec: float) -> None:
            await ask(timeout_sec)
            pair.b.wall_clock.skew_ms = 0

        pair.engine._links["a"].context.peer_clock.ask = ask_and_set  # type: ignore[method-assign]
        pair.peer.put("key", b"1")
        await pair.reach(lambda: pair.holds("key"))
        assert pair.letters() == 0
        await pair.mesh.close()

    played(play)


def entry(key: str, content: bytes, at_ms: int) -> tuple[bytes, list[bytes]]:
    """Return a stream entry of a put."""
    item = SyncItem(key, content, "binary", content_hash(content), 1, at_ms, False, "a")
    return b"%d-0" % at_ms, encode_fields(item)


async def test_one_chunk_is_judged_by_one_time() -> None:
    """If this fails an entry is dropped without a letter where our clock jumps at the wrong time."""
    now = [START_MS]
    builder = BatchBuilder("a", payload_bytes=100, part_bytes=100, now_ms=lambda: now[0])
    bad = entry("key", b"2", START_MS + 1)
    bad[1][bad[1].index(b"hash") + 1] = b"0" * 64
    selection = builder.select([entry("key", b"1", START_MS), bad])
    now[0] -= TWO_DAYS_MS
    (part,) = [part async for part in builder.materialise(selection)]
    assert [item.content for item in part.items] == [b"1"], "the older of the two is good"
    assert [letter.reason for letter in selection.letters] == ["hash"]


# The peer's clock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("health", [{}, {"enabled": False}], ids=["pinged", "not pinged"])
def test_a_peer_whose_clock_jumps_ahead_is_asked_before_anything_is_buried(
    health: dict[str, Any],
) -> None:
    """If this fails what a wrong clock has stamped is settled while nobody knows whose is wrong."""

    async def play() -> None:
        pair = Pair(peer_health=health)
        await pair.start()
        assert pair.skew() == pytest.approx(0, abs=0.1)
        pair.a.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("stamped wrongly", b"1")
        await pair.reach(pair.is_paused)
        pair.peer.put("another", b"1")
        await asyncio.sleep(4 * PING_SEC)
        assert pair.is_paused()
        pair.a.wall_clock.skew_ms = 0
        pair.peer.put("good", b"1")
        # It is asked again as often as peers are pinged, and now the stamp is what is wrong.
        await pair.reach(lambda: pair.holds("good"), PING_SEC + 5)
        assert pair.letters() == 2
        assert pair.b.store.held("stamped wrongly") is None
        assert pair.engine.peers["a"] is PeerState.TAILING
        await pair.mesh.close()

    played(play)


def test_one_wrong_stamp_at_the_head_pauses_nothing() -> None:
    """If this fails one entry of a writer whose clock was wrong for a moment stops the link."""

    async def play() -> None:
        pair = Pair()
        await pair.start()
        pair.a.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("wrong", b"1")
        pair.a.wall_clock.skew_ms = 0
        pair.peer.put("good", b"1")
        await pair.reach(lambda: pair.holds("good"))
        assert pair.letters() == 1
        moves = [str(move.dest) for move in pair.engine.journal if move.machine == "link:a"]
        assert "Paused" not in moves
        await pair.mesh.close()

    played(play)


def test_a_link_that_waits_for_the_clocks_goes_on_only_for_them() -> None:
    """If this fails an operator's resume has dead letters written, or a reconnect has."""

    async def play() -> None:
        pair = Pair()
        await pair.start()
        pair.b.wall_clock.skew_ms = -TWO_DAYS_MS
        pair.peer.put("key", b"1")
        await pair.reach(pair.is_paused)
        await pair.engine.resume("a")
        await asyncio.sleep(5)
        assert pair.is_paused()
        pair.mesh.cut("b", "a")
        await pair.reach(lambda: pair.engine.peers["a"] is PeerState.BACKOFF, 120)
        pair.mesh.heal("b", "a")
        await pair.reach(pair.is_paused, 120)
        assert pair.letters() == 0
        pair.b.wall_clock.skew_ms = 0
        await pair.reach(lambda: pair.holds("key"), 5)
        await pair.mesh.close()

    played(play)


# A peer that does not tell --------------------------------------------------------------------------


def test_a_peer_that_may_not_be_asked_is_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails a user without TIME cannot be used, or a far stamp stops its link."""
    refuse_time(monkeypatch, NO_TIME)

    async def play() -> None:
        pair = Pair()
        await pair.start()
        assert pair.skew() is None
        gauge = pair.engine.metrics.get("clock_skew_seconds", "a")
        assert math.isnan(sample_of(gauge))
        pair.a.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("far", b"1")
        pair.a.wall_clock.skew_ms = 0
        pair.peer.put("good", b"1")
        await pair.reach(lambda: pair.holds("good"))
        assert pair.letters() == 1
        await asyncio.sleep(200)
        assert pair.engine.peers["a"] is PeerState.TAILING
        await pair.mesh.close()

    played(play)


def sample_of(metric: Any) -> float:
    """Return the value of a gauge as it would be scraped."""
    (sample,) = metric._child_samples()
    return float(sample.value)


def test_a_right_to_ask_that_is_taken_away_ends_the_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails a link waits for ever for what it is no longer told."""

    async def play() -> None:
        pair = Pair()
        await pair.start()
        pair.a.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("far", b"1")
        await pair.reach(pair.is_paused)
        refuse_time(monkeypatch, NO_TIME)
        await pair.reach(lambda: pair.engine.peers["a"] is PeerState.TAILING, PING_SEC + 5)
        assert pair.skew() is None
        assert pair.letters() == 1
        await pair.mesh.close()

    played(play)


ODD: Sequence[Any] = (
    b"1700000000", 5, None, [], [b"1"], [b"1", b"2", b"3"], [b"x", b"1"], [1, 2], [b"1", None],
    ["1", "2"], [b"\xb2", b"1"], [b"1" * 5000, b"1"], [[b"1"], b"1"], [b"", b""], [b"-1", b"0"],
)  # fmt: skip


@pytest.mark.parametrize("reply", ODD, ids=[repr(odd)[:20] for odd in ODD])
def test_a_time_that_is_none_is_one_error(reply: Any) -> None:
    """If this fails an odd reply to TIME raises what nobody expects, or passes for a time."""

    async def play() -> None:
        made = peer_clock()
        with pytest.raises(ProtocolError, match="TIME"):
            made.take(reply, 0.0)
        assert made.skew_sec is None
        assert made.asked_at is None

    played(play)


def peer_clock() -> PeerClock:
    """Return what is known of a peer that was never asked."""
    clock = LoopClock()
    return PeerClock(clock, SkewedWallClock(clock, START_MS), get_logger("link", peer_id="a"))


@pytest.mark.parametrize("error", ["LOADING loading the dataset", "BUSY a script", "MASTERDOWN x"])
def test_a_server_that_is_not_ready_is_not_one_that_may_not_be_asked(error: str) -> None:
    """If this fails entries are buried because a server was busy when it was asked."""

    async def play() -> None:
        made = peer_clock()
        made.take([b"1700000000", b"0"], 0.0)
        with pytest.raises(PeerReplyError):
            made.take(PeerReplyError(error), 0.0)
        assert made.skew_sec == 0

    played(play)


def test_a_reply_that_is_no_time_costs_this_link_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails an odd reply ends the engine."""

    async def play() -> None:
        pair = Pair()
        await pair.start()
        refuse_time(monkeypatch, [b"x", b"y"])
        pair.mesh.cut("b", "a")
        pair.mesh.heal("b", "a")
        await pair.reach(lambda: pair.engine.peers["a"] is PeerState.BACKOFF, 60)
        await asyncio.sleep(100)
        assert pair.engine.is_running
        monkeypatch.undo()
        await pair.reach(lambda: pair.engine.peers["a"] is PeerState.TAILING, 400)
        await pair.mesh.close()

    played(play)


# What is told ---------------------------------------------------------------------------------------


def test_half_the_round_trip_is_taken_into_account() -> None:
    """If this fails a long line is told as a wrong clock."""

    async def play() -> None:
        pair = Pair()
        pair.b.transport.delay = lambda _name, _host: 2.0
        pair.a.wall_clock.skew_ms = 500
        await pair.start()
        assert pair.skew() == pytest.approx(0.5, abs=0.002)
        gauge = pair.engine.metrics.get("clock_skew_seconds", "a")
        assert sample_of(gauge) == pytest.approx(0.5, abs=0.002)
        # A jump of our own shows without asking.
        pair.b.wall_clock.skew_ms = 10_000
        assert pair.skew() == pytest.approx(-9.5, abs=0.002)
        await pair.mesh.close()

    played(play)


def test_a_skew_is_warned_of_once_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    """If this fails nobody is told of a wrong clock, or everybody with each ping."""

    def lines() -> list[tuple[str, str]]:
        told = [(record.levelname, record.__dict__.get("event", "")) for record in caplog.records]
        caplog.clear()
        return [(level, event) for level, event in told if "peer_clock" in event]

    async def play() -> None:
        pair = Pair()
        await pair.start()
        assert lines() == []
        for skew_ms, expected in (
            (900, []),
            (1000, [("WARNING", "peer_clock_off")]),
            (1500, []),
            (900, []),
            (1100, []),
            (-5000, []),
            (100, [("INFO", "peer_clock_agrees")]),
            (DAY_MS + 5000, [("WARNING", "peer_clock_off")]),
            (5000, [("WARNING", "peer_clock_off")]),
            (0, [("INFO", "peer_clock_agrees")]),
        ):
            pair.a.wall_clock.skew_ms = skew_ms
            # It is asked every minute although it is never idle.
            await asyncio.sleep(2 * IDLE_SEC)
            assert pair.skew() == pytest.approx(skew_ms / 1000, abs=0.1)
            assert lines() == expected, skew_ms
        await pair.mesh.close()

    with caplog.at_level(logging.INFO, "fsm_replication"):
        played(play)


# The cold path and letters ---------------------------------------------------------------------------


def test_what_the_cold_path_finds_far_ahead_waits_for_the_clocks() -> None:
    """If this fails items are passed over for an hour because our clock was wrong."""

    async def play() -> None:
        pair = Pair(hot_path={"enabled": False}, cold_path={"enabled": True, "interval_sec": 20})
        pair.b.wall_clock.skew_ms = -TWO_DAYS_MS
        await pair.start(PeerState.STANDBY)
        for number in range(20):
            pair.peer.put(f"key{number}", b"1")
        await pair.reach(pair.is_paused, 30)
        await asyncio.sleep(100)
        assert pair.is_paused()
        assert len(pair.engine._links["a"].context.unfetchable) == 0
        pair.b.wall_clock.skew_ms = 0
        await pair.reach(lambda: pair.holds(*pair.peer.items()), 60)
        assert pair.engine.peers["a"] is PeerState.STANDBY
        # Where the clocks agree, an item that lies far ahead is passed over, and no other.
        pair.a.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("far", b"1")
        pair.a.wall_clock.skew_ms = 0
        pair.peer.put("good", b"1")
        await pair.reach(lambda: pair.holds("good"), 60)
        assert pair.b.store.held("far") is None
        assert "far" in pair.engine._links["a"].context.unfetchable
        await pair.mesh.close()

    played(play)


def test_letters_that_lie_far_ahead_wait_for_the_clocks() -> None:
    """If this fails a retry under a wrong clock tells of entries as bad that nobody can judge."""

    async def play() -> None:
        pair = Pair()
        await pair.start()
        pair.a.wall_clock.skew_ms = TWO_DAYS_MS
        pair.peer.put("far", b"1")
        pair.a.wall_clock.skew_ms = 0
        pair.peer.put("good", b"1")
        await pair.reach(lambda: pair.letters() == 1)
        stats = await pair.engine.dead_letters.retry()
        assert (stats.tried, stats.still_bad, stats.left) == (1, 1, 0)
        pair.b.wall_clock.skew_ms = -TWO_DAYS_MS
        stats = await pair.engine.dead_letters.retry()
        assert (stats.tried, stats.still_bad, stats.left) == (1, 0, 1)
        assert "set the clock that is wrong" in stats.problems[0]
        assert pair.letters() == 1
        # Two days later.
        pair.a.wall_clock.skew_ms = pair.b.wall_clock.skew_ms = TWO_DAYS_MS
        stats = await pair.engine.dead_letters.retry()
        assert (stats.tried, stats.applied, pair.letters()) == (1, 1, 0)
        await pair.mesh.close()

    played(play)


def test_any_jumps_of_both_clocks_bury_nothing_good() -> None:
    """If this fails some order of jumps and writes makes a dead letter of a good event."""

    async def play(seed: int) -> None:
        rng, good = random.Random(seed), []
        pair = Pair()
        await pair.start()
        for number in range(30):
            pair.b.wall_clock.skew_ms = rng.choice((0, 0, -TWO_DAYS_MS, TWO_DAYS_MS, -DAY_MS // 2))
            await asyncio.sleep(rng.choice((0.0, 0.01, 1.0, 40.0)))
            for copy in range(rng.randrange(3)):
                good.append(f"{number}.{copy}")
                pair.peer.put(good[-1], b"1")
            await asyncio.sleep(rng.choice((0.0, 0.01, 1.0, 40.0)))
        pair.b.wall_clock.skew_ms = 0
        await pair.reach(lambda: pair.holds(*good), 60)
        assert pair.letters() == 0
        await pair.mesh.close()

    for seed in range(3):
        played(partial(play, seed))


# On real servers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rights", ["", " -time"], ids=["may ask", "may not"])
async def test_a_real_peer_is_asked_if_it_may_be(
    nodes: Nodes, new_redis_server: Callable[[], RedisServer], rights: str
) -> None:
    """If this fails a real server's TIME, or its refusal, is not understood."""
    server = new_redis_server()
    peer = Peer(server)
    peer.write_marker()
    rules = f"on nopass ~* +@all{rights}"
    client: Any = peer.client
    client.execute_command("ACL", "SETUSER", "reader", *rules.split())
    url = server.url.replace("redis://", "redis://reader:any@")
    store = MemorySyncEngine()
    engine = nodes.engine(PeerConfig(node_id="a", redis_url=url), store=store, settings=settings())
    async with engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=DEADLINE_SEC)
        skew = engine.health_check().peers[0].clock_skew_sec
        if rights:
            assert skew is None
        else:
            assert skew is not None
            assert abs(skew) < 5
        peer.send("far", b"1", at_ms=int(time.time() * 1000) + TWO_DAYS_MS)
        peer.send("good", b"1")
        await until(lambda: engine.health_check().peers[0].dead_letters == 1, "the letter")
        await until(lambda: len(store) == 1, "the good one")
        assert await held(store, "good") == {"good": b"1"}
    peer.close()


async def test_check_shows_the_skew(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a wrong clock is found out when it does harm."""
    peer = Peer(redis_server)
    peer.write_marker()
    config = ReplicationConfig.model_validate(
        {
            "local_node_id": "b",
            "store": {"kind": "memory"},
            "peers": [{"node_id": "a", "redis_url": redis_server.url}],
            "cursor": {"sqlite_path": str(tmp_path / "b.db")},
        }
    )
    for off_sec, mark, text, well in (
        (0, "✓", "clock of peer a", True),
        (90, "!", "its clock is 90.0 s behind ours", True),
        (-2 * 86_400, "✗", "its clock is 172,800.0 s ahead of ours", False),
    ):
        ours = SimpleNamespace(now_ms=lambda off=off_sec: int((time.time() + off) * 1000))
        monkeypatch.setattr("fsm_replication.cli.node.SystemWallClock", lambda ours=ours: ours)
        shown = io.StringIO()
        assert await check_node(config, Console(file=shown, width=200)) is well
        (line,) = [one for one in shown.getvalue().splitlines() if "clock" in one]
        assert line.startswith(mark)
        assert text in line
    peer.close()
