"""What a durable store holds after its process was killed in the middle of a call."""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from typing import Any, Final

from fsm_replication.stores.protocol import SyncEngine
from fsm_replication.testing.contract import crash_child
from fsm_replication.testing.contract.base import StoreRules, apply

__all__ = ("CrashRules",)

# Batches that are applied before the one in which the process is killed.
BATCHES_BEFORE: Final = 6
GOLDEN_RATIO: Final = 0.618


class CrashRules(StoreRules):
    """Rules of a store that outlives its process; ``kills`` is how many processes are killed."""

    kills: int = 3

    def test_what_was_answered_outlives_the_process(self) -> None:
        """If this fails a crash loses what replication took for settled (G1, G2)."""
        self.needs_durable()

        async def scenario() -> None:
            place = self.new_place()
            settled = 0
            for kill in range(self.kills):
                # Spread over the time one batch takes, so that each part of it is hit some day.
                part = kill * GOLDEN_RATIO % 1
                settled = await self._kill_one(place, settled, part)
                settled = await self.check_after_crash(place, settled)

        self.run(scenario)

    async def check_after_crash(self, place: Any, answered: int) -> int:
        """Assert that everything up to ``answered`` is there; returns the last whole batch."""
        async with self.opened(place) as store:
            position = await store.applied_position(crash_child.PEER)
            assert position is not None
            kept = position.entries_read or 0
            assert kept >= answered, "batches that were answered are not there any more"
            for number in range(1, kept + 1):
                await _check_batch(store, number)
            # What of the next one is there does not matter: it comes again.
            await apply(store, crash_child.batch(kept + 1), crash_child.received(kept + 1))
            await _check_batch(store, kept + 1)
            return kept + 1

    async def _kill_one(self, place: Any, settled: int, part: float) -> int:
        """Let another process apply batches, and kill it in one; returns the last answered.

        ``part`` says how far in the batch, measured by the time the batches before it took.
        """
        order = crash_child.Order(
            list(sys.path), type(self).__module__, type(self).__qualname__, place, settled + 1
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", f"from {crash_child.__name__} import run; run()",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            child.stdin.write(pickle.dumps(order))
            child.stdin.close()
            times: list[float] = []
            for _ in range(BATCHES_BEFORE):
                line = await child.stdout.readline()
                if not line:
                    said = (await child.stderr.read()).decode("utf-8", "replace")
                    raise AssertionError(f"the process that was to be killed failed first: {said}")
                answered = int(line)
                times.append(time.monotonic())
            await asyncio.sleep(part * (times[-1] - times[0]) / (len(times) - 1))
        finally:
            if child.returncode is None:
                child.kill()
            rest = await child.stdout.read()
            await child.wait()
        # It went on until the signal came, and may have died while it wrote a line.
        numbers = [int(line) for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
        return max([answered, *numbers])


async def _check_batch(store: SyncEngine, number: int) -> None:
    changes = crash_child.batch(number)
    own = [item for item in changes if item.key != crash_child.SHARED_KEY]
    assert await store.get_many([item.key for item in own]) == own, f"of batch {number}"
    (shared,) = await store.stamps([crash_child.SHARED_KEY])
    assert shared is not None
    assert shared.version >= number
