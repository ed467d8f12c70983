"""Work that would stop the event loop for long, done on a thread beside it.

A few bytes of a peer may decompress to many megabytes, and a whole one takes a millisecond to be
decompressed and hashed. Both let go of the interpreter lock, so on a thread they cost the loop
nothing but the hand-over, which takes about 60 us. A thread cannot be cancelled: each piece of work
is therefore bounded, by ``limits.payload_bytes``, and whoever is cancelled does not wait for its end.

What is made of many small steps needs no thread: it takes turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

__all__ = ("TURN_STEPS", "HeavyWork", "InTurn", "SideThread", "take_turns")

TURN_STEPS: Final = 1000
"""Names, leaves or members of a tree that are looked at in one turn of the loop: a few ms."""

_T = TypeVar("_T")


class HeavyWork(Protocol):
    """Runs functions that compute for long and touch nothing that others use."""

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what ``work`` returns, or raise what it raises."""

    async def close(self) -> None:
        """Return when nothing is left behind: wait for what is under way."""


class SideThread:
    """One thread for all links of an engine: it begins with the first work, one after the other."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what ``work`` returns; who is cancelled meanwhile goes on at once."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fsm_replication-heavy")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def close(self) -> None:
        """Return when the thread has ended; where this is cancelled it ends by itself."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        # What nobody waits for any more is taken out of the queue; the last one under way ends
        # before this does, and then there is nothing left for which the join could wait.
        last = asyncio.get_running_loop().run_in_executor(pool, _nothing)
        pool.shutdown(wait=False)
        await last
        pool.shutdown(wait=True)


async def take_turns(step: int) -> None:
    """Let others run once in a while; called at each step of a loop that may be a long one."""
    if step % TURN_STEPS == TURN_STEPS - 1:
        await asyncio.sleep(0)


class InTurn:
    """Does the work at once: for a simulated time, in which no thread has a part."""

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what ``work`` returns, after a turn of the loop."""
        await asyncio.sleep(0)
        return work()

    async def close(self) -> None:
        """Do nothing."""


def _nothing() -> None:
    """Do nothing, after all that came before."""
