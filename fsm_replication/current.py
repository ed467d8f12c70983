"""A value in force, which is replaced whole while others work by it.

Settings change while a node runs. Whoever works by them holds the :class:`Current` and reads the
value anew each time; whoever waits because of one waits here, and so hears of a new value at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from fsm_replication.ports import Clock

__all__ = ("Current",)

_T = TypeVar("_T")


class Current(Generic[_T]):
    """Holds one immutable value; only its owner replaces it."""

    __slots__ = ("_replaced", "_value")

    def __init__(self, value: _T) -> None:
        self._value = value
        self._replaced = asyncio.Event()

    @property
    def value(self) -> _T:
        """The value in force now."""
        return self._value

    def replace(self, value: _T) -> None:
        """Put another value in force; whoever waits for it is woken."""
        self._value = value
        replaced, self._replaced = self._replaced, asyncio.Event()
        replaced.set()

    async def wait_until(self, condition: Callable[[_T], bool]) -> None:
        """Return as soon as a value is in force for which ``condition`` holds."""
        while not condition(self._value):
            await self._replaced.wait()

    async def sleep(self, clock: Clock, seconds: Callable[[_T], float]) -> None:
        """Wait as long as the value in force says, counted from the call.

        A value that replaces it meanwhile counts at once, whether it makes the wait longer or
        shorter.
        """
        began = clock.monotonic()
        while (rest := began + seconds(self._value) - clock.monotonic()) > 0:
            try:
                async with clock.timeout(rest):
                    await self._replaced.wait()
            except TimeoutError:
                continue

    def __repr__(self) -> str:
        return f"<Current {self._value!r}>"
