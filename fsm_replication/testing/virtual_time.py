"""An event loop whose time goes as fast as its work is done, and clocks that show it.

When nothing is ready to run, time jumps to the next timer instead of passing. Two runs of the same
coroutines then do the same things in the same order, however busy the machine is, and a day takes
as long as what happens in it. Threads and sockets have no part in this: a loop that only waits for
one of them goes on to its next timer, or ends with :class:`DeadlockError`.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

from fsm_replication.ports import Clock

__all__ = ("DeadlockError", "LoopClock", "SkewedWallClock", "VirtualTimeLoop", "run")

# Timers closer than this fire together; far over what a float can tell after years of seconds.
RESOLUTION_SEC: Final = 1e-6
# Sums of floats fall a little short of whole milliseconds.
ROUNDING_MS: Final = 1e-3
NAMED_MAX: Final = 20

_T = TypeVar("_T")


class DeadlockError(Exception):
    """Tasks wait, and there is no timer left that could ever wake one; ``tasks`` names them."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        shown = "; ".join(tasks[:NAMED_MAX]) or "none"
        more = len(tasks) - NAMED_MAX
        super().__init__(
            f"nothing is ready and no timer is set, but {len(tasks)} tasks wait: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


class _JumpingSelector(selectors.BaseSelector):
    """Asks another selector without waiting; what would be waited is handed to ``jump``."""

    def __init__(
        self, jump: Callable[[float | None], None], creep: Callable[[], None],
        turn: Callable[[], None],
    ) -> None:  # fmt: skip
        self._real = selectors.DefaultSelector()
        self._jump = jump
        self._creep = creep
        self._turn = turn

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turn()
        ready = self._real.select(0)
        if not ready and (timeout is None or timeout > 0):
            self._jump(timeout)
        else:
            self._creep()
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose ``time()`` begins at 0 and jumps from timer to timer.

    ``start_ms`` is the time of day at 0, in ms since the epoch.
    """

    # Of asyncio's own loop: the timers, as a heap.
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, start_ms: int = 0) -> None:
        self.start_ms = start_ms
        self._now = 0.0
        self._turns = 0
        self._at_turn: dict[int, Callable[[], None]] = {}
        self._failure: Exception | None = None
        super().__init__(_JumpingSelector(self._jump, self._creep, self._turn))
        # With the machine's own, a nanosecond, a timer after 97 days would never be due.
        self._clock_resolution = RESOLUTION_SEC

    def time(self) -> float:
        """Return the seconds that have passed on this loop."""
        return self._now

    def now_ms(self) -> int:
        """Return the true time of day of this loop's world."""
        return self.start_ms + int(self._now * 1000 + ROUNDING_MS)

    @property
    def turns(self) -> int:
        """How many turns the loop has taken; every await that waits ends one at the earliest."""
        return self._turns

    def at_turn(self, number: int, call: Callable[[], None]) -> None:
        """Call something between two turns: what a coroutine did until then is all it will do."""
        self._at_turn[number] = call

    def fail(self, error: Exception) -> None:
        """End the run with an error at the next turn, also where time stands still.

        For code inside the run that finds that it can never end.
        """
        self._failure = error

    def _turn(self) -> None:
        self._turns += 1
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        call = self._at_turn.pop(self._turns, None)
        if call is not None:
            call()

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            waiting = sorted(map(_describe, asyncio.all_tasks(self)))
            raise DeadlockError(tuple(waiting))
        self._now += seconds

    def _creep(self) -> None:
        """Go to a timer that is so close that it fires now.

        Those whom such timers wake while others are ready, and who find that a clock has not got
        there yet, would set the next ones, and time would stand still.
        """
        if self._scheduled:
            first = self._scheduled[0].when()
            if self._now < first <= self._now + RESOLUTION_SEC:
                self._now = first


def _describe(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
    frames = task.get_stack(limit=1)
    line = f" at {frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else ""
    return f"{task.get_name()!r} ({name}{line})"


def run(main: Callable[..., Coroutine[Any, Any, _T]], *args: Any, start_ms: int = 0) -> _T:
    """Run ``main(*args)`` on a :class:`VirtualTimeLoop` of its own and return its result.

    Tasks that are left when it ends are cancelled.

    :raises DeadlockError: if nothing could ever wake it again.
    :raises Exception: what :meth:`VirtualTimeLoop.fail` was given.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(start_ms)) as runner:
        return runner.run(main(*args))


class LoopClock:
    """The clock of the running event loop, virtual or not."""

    def monotonic(self) -> float:
        """Return the loop's seconds."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Wait; 0 lets others run once."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Return asyncio's own timeout."""
        return asyncio.timeout(seconds)


class SkewedWallClock:
    """A node's time of day: ``start_ms`` when ``clock`` is at 0, and off by ``skew_ms``.

    ``skew_ms`` may be set at any time, and the clock then jumps; also back.
    """

    def __init__(self, clock: Clock, start_ms: int, skew_ms: int = 0) -> None:
        self.skew_ms = skew_ms
        self._clock = clock
        self._start_ms = start_ms

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        passed = int(self._clock.monotonic() * 1000 + ROUNDING_MS)
        return self._start_ms + passed + self.skew_ms
