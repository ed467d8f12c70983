"""G14: a person decides on mass deletes, over restarts, kills, full disks and wrong clocks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fsm_replication import PauseReason, PeerState
from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    RepairConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.testing.local_mesh import LocalMesh, LocalNode
from fsm_replication.testing.virtual_time import run

ITEMS = 200
ALLOWED = 40
HOUR_SEC = 3600.0


def settings(*, cold: bool = False, least: int = 10, share: float = 0.2) -> Settings:
    """Return settings by which a fifth of the items may go, ten at least."""
    return Settings(
        hot_path=HotPathConfig(max_batch_size=20, min_batch_size=1),
        cold_path=ColdPathConfig(enabled=cold, interval_sec=20.0),
        tombstones=TombstonesConfig(ttl=30 * 86_400.0),
        startup=StartupConfig(when_no_peer="run"),
        repair=RepairConfig(interlock_share=share, interlock_min=least),
    )


def _live(node: LocalNode) -> int:
    return int(node.server.execute("GET", node.store.keys.live) or 0)


class Pair:
    """Node b reads node a, which holds items that b has, too."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        self.a, self.b = mesh.nodes["a"], mesh.nodes["b"]

    def put(self, *numbers: int) -> None:
        """Write items at node a."""
        for number in numbers:
            self.a.store.put(f"k{number}", b"x")

    def delete(self, *numbers: int) -> None:
        """Delete items at node a."""
        for number in numbers:
            self.a.store.delete(f"k{number}")

    @property
    def live(self) -> int:
        """How many live items node b holds."""
        return _live(self.b)

    @property
    def reasons(self) -> frozenset[PauseReason]:
        """Why b's link to a is paused."""
        assert self.b.engine is not None
        return self.b.engine.health_check().peers[0].pause_reasons

    async def until(self, condition: Callable[[], bool], what: str, sec: float = 300.0) -> None:
        """Wait until something is so, on virtual time."""
        for _ in range(round(sec * 4)):
            if condition():
                return
            await asyncio.sleep(0.25)
        raise AssertionError(f"not within {sec:g} s: {what}")

    async def caught_up(self) -> None:
        """Wait until b holds as many live items as a."""
        there = _live(self.a)
        await self.until(lambda: self.live == there, "b holds what a holds")

    async def tripped(self) -> None:
        """Wait until b's link is Paused by the interlock."""

        def is_paused() -> bool:
            assert self.b.engine is not None
            paused = self.b.engine.peers["a"] is PeerState.PAUSED
            return paused and PauseReason.INTERLOCK in self.reasons

        await self.until(is_paused, "the interlock has tripped")


def on_pair(
    scenario: Callable[[Pair], Awaitable[None]], chosen: Settings | None = None, items: int = ITEMS
) -> None:
    """Run a scenario with b reading a, which wrote some items that b has read."""

    async def main() -> None:
        mesh = LocalMesh("ab", {frozenset("ab")}, settings=chosen or settings())
        pair = Pair(mesh)
        pair.put(*range(items))
        try:
            await mesh.start("b")
            await pair.until(lambda: pair.live == items, "everything is copied")
            await scenario(pair)
        finally:
            await mesh.close()

    run(main)


# Restarts


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("cold", [False, True])
def test_restarts_add_no_allowance(end: str, cold: bool) -> None:
    """If this fails some restarts are all it takes to lose every item."""

    async def scenario(pair: Pair) -> None:
        for begin in range(0, ITEMS, 40):
            pair.delete(*range(begin, begin + 35))
            await asyncio.sleep(10.0)
            await getattr(pair.mesh, end)("b")
            await pair.mesh.start("b")
            await asyncio.sleep(10.0)
            assert pair.live >= ITEMS - ALLOWED
        await pair.tripped()
        assert pair.live >= ITEMS - ALLOWED
        if end == "stop":
            assert pair.live <= ITEMS - ALLOWED + 20, "what is allowed is used, but for a batch"

    on_pair(scenario, settings(cold=cold))


def test_a_pause_outlasts_restarts_and_the_hour() -> None:
    """If this fails time or a restart decides what a person should."""

    async def scenario(pair: Pair) -> None:
        pair.delete(*range(150))
        await pair.tripped()
        held = pair.live
        await pair.mesh.kill("b")
        await asyncio.sleep(2 * HOUR_SEC)
        await pair.mesh.start("b")
        await asyncio.sleep(60.0)
        await pair.tripped()
        assert pair.live == held
        assert pair.b.engine is not None
        assert "live items" in next(
            row.why for row in reversed(pair.b.engine.journal) if row.trigger == "pause"
        )
        await pair.b.engine.resume("a")
        await pair.caught_up()
        assert pair.reasons == frozenset()

    on_pair(scenario)


def test_a_peer_that_has_just_brought_everything_may_not_delete_it() -> None:
    """If this fails what a peer has brought in counts as its own to delete."""

    async def scenario(pair: Pair) -> None:
        pair.put(*range(1000, 1300))
        await pair.caught_up()
        pair.delete(*range(ITEMS), *range(1000, 1300))
        await pair.tripped()
        assert pair.live >= (ITEMS + 300) * 0.8

    on_pair(scenario)


def test_churn_never_trips_it() -> None:
    """If this fails a stream that deletes and puts again stops replication."""

    async def scenario(pair: Pair) -> None:
        for turn in range(10):
            some = range(turn % 5 * 30, turn % 5 * 30 + 30)
            pair.delete(*some)
            await asyncio.sleep(1.0)
            pair.put(*some, *range(ITEMS, ITEMS + 20))
            await asyncio.sleep(1.0)
        await pair.caught_up()
        assert pair.reasons == frozenset()

    on_pair(scenario)
