"""What is said of a peer that is not read: its lag is unknown, or grows, and is never 0."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path

import pytest
from test_metrics import DECLARED, Rig, entry, simulated

from fsm_replication import HealthCheck, PeerHealth, PeerState, WaitTimeoutError
from fsm_replication.demo.screen import lag_text
from fsm_replication.metrics import _COUNTERS
from fsm_replication.workers.context import LinkProgress

ROOT = Path(__file__).parent.parent
START_MS = 1_700_000_000_000


def health_of_a(rig: Rig) -> PeerHealth:
    """Return what is told of the only link."""
    (peer,) = rig.engine.health_check().peers
    return peer


def lag_ms(rig: Rig) -> int:
    """Return the lag in milliseconds, which must be known."""
    told = health_of_a(rig).lag_ms
    assert told is not None
    return told


async def head_reached(rig: Rig) -> None:
    """Start, and wait until the head was reached."""
    await rig.tail()
    await rig.engine.wait_synced(60)


def test_the_lag_of_a_peer_that_is_down_grows() -> None:
    """If this fails a peer that is down for hours is told to be 0 ms behind."""

    async def play() -> None:
        rig = Rig(slo={"max_replication_lag_sec": 20})
        await head_reached(rig)
        assert lag_ms(rig) == 0
        rig.transport.cut("a")
        await rig.reach(PeerState.BACKOFF)
        assert lag_ms(rig) <= 6000
        assert health_of_a(rig).lag_events is None
        await asyncio.sleep(130)
        assert lag_ms(rig) == pytest.approx(133_000, abs=4000)
        assert rig.engine.health_check().max_lag_ms() == lag_ms(rig)
        assert rig.of_a("lag_ms", "lag_seconds") == [lag_ms(rig), lag_ms(rig) / 1000]
        (counted,) = rig.of_a("slo_violations_total", slo_type="replication_lag")
        assert counted == pytest.approx(110 / 5, abs=3)
        rig.transport.heal("a")
        await rig.reach(PeerState.TAILING)
        await asyncio.sleep(1)
        assert lag_ms(rig) == 0
        await rig.engine.shutdown()

    simulated(play)


def test_a_peer_that_was_away_for_long_is_met_soon_after_it_is_back() -> None:
    """If this fails nobody reads a peer for minutes although it is well."""

    async def play() -> None:
        rig = Rig()
        await head_reached(rig)
        rig.transport.cut("a")
        await asyncio.sleep(1300)
        rig.transport.heal("a")
        await rig.engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=31)
        await rig.engine.shutdown()

    simulated(play)


def test_the_lag_of_a_peer_that_was_never_read_is_unknown() -> None:
    """If this fails a node that has met nobody since its start looks up to date."""

    async def play() -> None:
        rig = Rig(startup={"when_no_peer": "run"}, slo={"max_replication_lag_sec": 20})
        rig.transport.cut("a")
        await rig.engine.start()
        await asyncio.sleep(60)
        assert health_of_a(rig).lag_ms is None
        assert rig.engine.health_check().max_lag_ms() is None
        shown = rig.of_a("lag_ms", "lag_seconds")
        assert [value is not None and math.isnan(value) for value in shown] == [True, True]
        # Nobody can say that the limit is kept.
        (counted,) = rig.of_a("slo_violations_total", slo_type="replication_lag")
        assert counted == pytest.approx(8, abs=1)
        await rig.engine.shutdown()

    simulated(play)


def test_a_link_at_rest_has_no_lag() -> None:
    """If this fails a peer that writes nothing is told to be behind now and then."""

    async def play() -> None:
        rig = Rig()
        await head_reached(rig)
        for _ in range(600):
            await asyncio.sleep(0.97)
            assert lag_ms(rig) == 0
        await rig.engine.shutdown()

    simulated(play)


def test_what_was_not_read_since_a_pause_counts() -> None:
    """If this fails a link that is paused for hours is told to be up to date."""

    async def play() -> None:
        rig = Rig()
        await head_reached(rig)
        await rig.engine.pause("a")
        await asyncio.sleep(100)
        assert lag_ms(rig) == pytest.approx(102_500, abs=2600)
        await rig.engine.resume("a")
        await asyncio.sleep(1)
        assert lag_ms(rig) == 0
        await rig.engine.shutdown()

    simulated(play)


def test_the_first_entry_of_an_empty_stream_is_not_decades_late() -> None:
    """If this fails a position that was decided is taken for a time: the lag is 56 years."""

    async def play() -> None:
        rig = Rig()
        await head_reached(rig)
        rig.store.accepting_writes = False
        rig.send(entry("k", b"1", START_MS))
        await rig.reach(PeerState.PAUSED)
        rig.transport.cut("a")
        await rig.reach(PeerState.BACKOFF)
        assert health_of_a(rig).lag_events == 1
        assert lag_ms(rig) <= 10_000
        moves = [move.why for move in rig.engine.journal]
        assert not [why for why in moves if re.search(r"\d{9} ms behind", why)]
        await rig.engine.shutdown()

    simulated(play)


def test_without_a_hot_path_the_lag_is_unknown_and_no_limit_is_broken() -> None:
    """If this fails a node that only compares trees warns of its lag for ever."""

    async def play() -> None:
        rig = Rig(hot_path={"enabled": False})
        await rig.engine.start()
        await rig.reach(PeerState.STANDBY)
        await asyncio.sleep(300)
        assert health_of_a(rig).lag_ms is None
        assert rig.of_a("slo_violations_total", slo_type="replication_lag") == [None]
        await rig.engine.shutdown()

    simulated(play)


def test_an_unknown_lag_makes_the_largest_unknown() -> None:
    """If this fails an alert on the largest lag sleeps while a peer was never reached."""

    async def play() -> None:
        rig = Rig()
        await head_reached(rig)
        health = rig.engine.health_check()
        await rig.engine.shutdown()
        known, unknown = LinkProgress(head_reached_at=1.0), LinkProgress()
        assert (known.lag_ms(3.5), unknown.lag_ms(3.5)) == (2500, None)
        both = HealthCheck(
            **{name: getattr(health, name) for name in health.__slots__ if name != "peers"},
            peers=(*health.peers, *(_with_lag(one, None) for one in health.peers)),
        )
        assert (health.max_lag_ms(), both.max_lag_ms()) == (0, None)

    simulated(play)


def _with_lag(peer: PeerHealth, lag: int | None) -> PeerHealth:
    fields = {name: getattr(peer, name) for name in peer.__slots__}
    return PeerHealth(**{**fields, "lag_ms": lag})


# Coming back --------------------------------------------------------------------------------------


def test_synced_means_since_this_start() -> None:
    """If this fails a node that has just started is told to be in sync by what was long ago."""

    async def play() -> None:
        rig = Rig(startup={"when_no_peer": "run"})
        await head_reached(rig)
        await rig.engine.shutdown()
        again = rig.restarted()
        rig.transport.cut("a")
        await again.start()
        assert not again.health_check().synced
        with pytest.raises(WaitTimeoutError) as told:
            await again.wait_synced(20)
        assert re.search(
            r"not synced after 20 s: the engine is Running; peer 'a' is Backoff: .*"
            r"redis://a.*, next attempt in [0-9.]+ s$",
            str(told.value),
        )
        assert isinstance(told.value, TimeoutError)
        rig.transport.heal("a")
        await again.wait_synced(60)
        assert again.health_check().synced
        # A connection that is lost and made again takes nothing back.
        rig.transport.cut("a")
        await again.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=60)
        await again.wait_synced(0.1)
        # A peer that is added again must be met again.
        whole = again.config
        await again.update_config(whole.model_copy(update={"peers": ()}))
        await again.update_config(whole)
        with pytest.raises(WaitTimeoutError):
            await again.wait_synced(0.1)
        await again.shutdown()

    simulated(play)


def test_a_wait_for_a_state_that_times_out_says_how_things_stand() -> None:
    """If this fails an operator reads "TimeoutError" and nothing else."""

    async def play() -> None:
        rig = Rig(startup={"when_no_peer": "run"})
        rig.transport.cut("a")
        await rig.engine.start()
        with pytest.raises(
            WaitTimeoutError,
            match=r"link:a did not become Tailing or Paused within 5 s: it is \w+.*redis://a",
        ):
            await rig.engine.wait_for_state(
                PeerState.TAILING, PeerState.PAUSED, peer_id="a", timeout=5
            )
        await rig.engine.shutdown()

    simulated(play)


def test_not_connected_says_why_and_when_it_is_tried_again() -> None:
    """If this fails an operator is told "it is Backoff" and must look for the reason elsewhere."""

    async def play() -> None:
        rig = Rig()
        await head_reached(rig)
        rig.transport.cut("a")
        await rig.reach(PeerState.BACKOFF)
        why = r"Backoff: .*redis://a.*, next attempt in \d+\.\d s"
        with pytest.raises(Exception, match=r"peer 'a' is not connected: it is " + why):
            _ = [found async for found in rig.engine.differences("a")]
        stats = await rig.engine.repair("a")
        assert re.search("cannot be compared now: it is " + why, stats.problems[0])
        explained = await rig.engine.explain("k")
        (there,) = explained.peers
        assert re.search(why, there.problem)
        await rig.engine.shutdown()

    simulated(play)


# What is told of it -------------------------------------------------------------------------------


def test_every_alert_of_the_docs_is_about_a_metric_that_exists() -> None:
    """If this fails an alert that was copied from the docs never fires."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    table = text.split("## Worth an alert", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", table, re.MULTILINE)
    counters = {name for name, _, _ in _COUNTERS}
    # Until the skew of clocks is measured, its alert waits for it.
    declared = {*DECLARED, "clock_skew_seconds"}
    exist = {f"{name}_total" if name in counters else name for name in declared}
    for expression, meaning in rows:
        names = re.findall(r"replication_(\w+)", expression)
        assert names, expression
        assert set(names) <= exist, expression
        labels = set(re.findall(r"(\w+)=[~\"]", expression))
        for name in names:
            base = name.removesuffix("_total")
            assert labels <= set(DECLARED.get(base, labels)), expression
        assert meaning
    told = " ".join(meaning for _, meaning in rows)
    for what in ("down", "store", "clock", "interlock", "behind"):
        assert what in told, f"no alert tells of: {what}"


def test_the_demo_shows_an_unknown_lag() -> None:
    """If this fails the screen of the demo shows a lag of 0, or of "None", that nobody knows."""
    assert [lag_text(None), lag_text(0), lag_text(12_000)] == ["unknown", "0", "12000"]
