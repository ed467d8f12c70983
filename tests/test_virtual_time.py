"""Virtual time: how it passes, that runs are alike, and what becomes of a deadlock."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest

from fsm_replication.ports import Clock, WallClock
from fsm_replication.testing import (
    DeadlockError,
    LoopClock,
    SimRedis,
    SimTransport,
    SkewedWallClock,
    VirtualTimeLoop,
    run,
)

DAY_SEC = 86_400.0
START_MS = 1_700_000_000_000


def test_a_year_takes_no_time() -> None:
    """If this fails a simulation waits for what it simulates, or never comes to an end."""

    async def scenario() -> float:
        clock: Clock = LoopClock()
        for _ in range(365):
            await clock.sleep(DAY_SEC)
        for _ in range(1000):
            await clock.sleep(0.001)
        return clock.monotonic()

    began = time.monotonic()
    assert run(scenario) == pytest.approx(365 * DAY_SEC + 1)
    assert time.monotonic() - began < 5


def test_a_run_ends_with_what_it_was_failed_with() -> None:
    """If this fails a run in which time stands still for ever never ends."""
    ended: list[str] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.call_soon(loop.fail, ValueError("enough"))
        try:
            while True:  # noqa: ASYNC110 - this is what must be ended
                await asyncio.sleep(0)
        finally:
            # Clean-up still runs in what is ended this way.
            await asyncio.sleep(1)
            ended.append("in order")

    with pytest.raises(ValueError, match="enough"):
        run(scenario)
    assert ended == ["in order"]


def test_timers_fire_in_the_order_of_their_times() -> None:
    """If this fails what was due later happens first."""

    async def scenario() -> list[tuple[float, float]]:
        loop, seen = asyncio.get_running_loop(), []

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((seconds, loop.time()))

        await asyncio.gather(*(wait(seconds) for seconds in (3, 0.5, DAY_SEC * 2, 0, 1)))
        return seen

    assert run(scenario) == [(at, at) for at in (0, 0.5, 1, 3, DAY_SEC * 2)]


def test_a_timeout_comes_when_it_is_due() -> None:
    """If this fails timeouts are those of the machine."""

    async def scenario() -> float:
        clock = LoopClock()
        with pytest.raises(TimeoutError):
            async with clock.timeout(30):
                await clock.sleep(31)
        async with clock.timeout(None):
            await clock.sleep(1000)
        return clock.monotonic()

    assert run(scenario) == 1030


def test_time_gets_over_what_is_closer_than_it_can_tell() -> None:
    """If this fails waits for the last fraction of a microsecond keep each other from ending."""

    async def wait_until(due: float, turns_later: int) -> float:
        loop = asyncio.get_running_loop()
        for _ in range(turns_later):
            await asyncio.sleep(0)
        while (rest := due - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await asyncio.Event().wait()
        return loop.time()

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.at_turn(1000, lambda: loop.fail(AssertionError("time stands still")))
        # A sum of floats that falls short.
        await asyncio.sleep(1350 - 3e-10)
        return await asyncio.gather(*(wait_until(1350, turns) for turns in range(4)))

    assert run(main) == [1350] * 4


def test_a_deadlock_names_who_waits() -> None:
    """If this fails a simulation that stands still hangs, or does not say where."""
    cancelled = []

    async def stuck() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async def scenario() -> None:
        task = asyncio.create_task(stuck(), name="the stuck one")
        await asyncio.sleep(5)
        await task

    with pytest.raises(DeadlockError, match=r"2 tasks wait: .*'the stuck one' \(.*stuck") as raised:
        run(scenario)
    assert len(raised.value.tasks) == 2
    assert cancelled == [True]


def test_results_errors_and_arguments_pass_through() -> None:
    """If this fails a failed simulation looks like one that went well."""

    async def scenario(value: int) -> int:
        await asyncio.sleep(1)
        if value < 0:
            raise ValueError(value)
        return value

    assert run(scenario, 3) == 3
    with pytest.raises(ValueError, match="-1"):
        run(scenario, -1)


def test_tasks_that_are_left_are_cancelled() -> None:
    """If this fails one simulation goes on in the next."""
    ended: list[str] = []

    async def left() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("left")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.create_task(left(), name="left")  # noqa: RUF006
        await asyncio.sleep(1)

    run(scenario)
    assert ended == ["left"]


def test_a_wall_clock_may_be_wrong_and_step_back() -> None:
    """If this fails nodes cannot disagree about the time."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        right = SkewedWallClock(LoopClock(), START_MS)
        wrong = SkewedWallClock(LoopClock(), START_MS, skew_ms=-90_000)
        port: WallClock = wrong
        await asyncio.sleep(1.5)
        assert right.now_ms() == START_MS + 1500 == loop.now_ms()
        assert port.now_ms() == START_MS - 88_500
        wrong.skew_ms = 0
        assert wrong.now_ms() == right.now_ms()
        wrong.skew_ms = -1
        assert wrong.now_ms() == right.now_ms() - 1
        for _ in range(1000):
            before = right.now_ms()
            await asyncio.sleep(0.001)
            assert right.now_ms() == before + 1

    run(scenario, start_ms=START_MS)


def history(seed: int) -> list[str]:
    """Return what happens between some clients, two servers and a bad network."""

    async def scenario() -> list[str]:
        loop, dice, seen = asyncio.get_running_loop(), random.Random(seed), list[str]()
        assert isinstance(loop, VirtualTimeLoop)
        servers = {host: SimRedis(now_ms=loop.now_ms) for host in ("x", "y")}
        transport = SimTransport(servers, LoopClock(), dice)
        transport.delay = lambda _name, _host: dice.uniform(0, 0.2)

        async def client(name: str, host: str) -> None:
            while loop.time() < 60:
                with contextlib.suppress(Exception):
                    line = await transport.connect(f"redis://{host}", timeout_sec=1, name=name)
                    for _ in range(dice.randrange(20)):
                        entry = await line.call("XADD", "s", "*", "from", name, timeout_sec=1)
                        read = ("XREAD", "BLOCK", 300, "STREAMS", "s", "$")
                        found = await line.call(*read, timeout_sec=1)
                        seen.append(f"{loop.time()!r} {name} {entry!r} {found!r}")
                    line.close()
                await asyncio.sleep(dice.uniform(0, 1))

        async def trouble() -> None:
            while loop.time() < 60:
                host = dice.choice(("x", "y"))
                dice.choice((transport.cut, transport.hang))(host)
                await asyncio.sleep(dice.uniform(0, 3))
                transport.heal(host)
                await asyncio.sleep(dice.uniform(0, 5))

        clients = [client(name, host) for name in ("1", "2") for host in ("x", "y")]
        await asyncio.gather(trouble(), *clients)
        return seen

    return run(scenario, start_ms=START_MS)


def test_two_runs_with_one_seed_are_alike() -> None:
    """If this fails a failed simulation cannot be played again."""
    first = history(7)
    assert len(first) > 100
    assert history(7) == first
    assert history(8) != first
