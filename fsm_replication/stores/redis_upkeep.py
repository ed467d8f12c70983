"""What a store on Redis does by itself, as long as it is open.

Theory of operation. Every process of a node writes its name into Redis every five seconds (*beats*), and
takes it out when it closes. So whoever opens the store with another ``tombstones.ttl`` or resolver than
its marker names knows whether others still write by the old ones: then it is refused, and a process that
did not beat for a while, and comes back after the change, writes nothing, because every script looks at
the marker. The same beat finds that the marker is gone, and has it written again.

A changed ttl is first noted in the marker, as the one to come, then brought in line, and only then
announced to readers. Bringing in line is a walk over all items, a bounded slice at a time: tombstones are
kept in Redis until the new expiry, and those that had left the tree by a shorter ttl return to it.
Until it is announced the longer of the two is in force: no leaf is taken out too early. A walk that was
killed begins anew with the next opening, since the marker still names a ttl to come.

The marker also keeps what is known of the past at the moment a ttl is announced: raising it brings back
no tombstone that is forgotten. So for a while the store knows deletes only from as far back as the old
ttl reached, plus the time since.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from structlog.stdlib import BoundLogger

from fsm_replication.errors import StoreError
from fsm_replication.merkle import bucket_of
from fsm_replication.ports import Clock
from fsm_replication.stores import redis_scripts as scripts

__all__ = ("BEAT_SEC", "LEASE_SEC", "TtlMemory", "Upkeep")

BEAT_SEC: Final = 5.0
# How long a process that was killed still counts as running.
LEASE_SEC: Final = 20.0
KEYS_PER_SLICE: Final = 200

Change = Callable[[str, Sequence[Any]], Awaitable[Any]]
ScanItems = Callable[[], AsyncIterator[list[bytes]]]


@dataclass(frozen=True, slots=True)
class TtlMemory:
    """From how far back deletes were known at ``changed_ms``, when another ttl was announced.

    Both are in milliseconds.
    """

    known_ms: int
    changed_ms: int

    def known_at(self, now_ms: int) -> int:
        """Return for how long before ``now_ms`` every delete is known."""
        return self.known_ms + max(0, now_ms - self.changed_ms)


class Upkeep:
    """Beats for this process, and brings expiries in line with a changed ttl.

    ``change`` runs one of the scripts that begin with the common head, and opens the store again where
    its marker is gone. ``scan_items`` yields the keys of all items, whatever bytes they are.
    ``announced`` takes what the marker says once the new ttl is announced.
    """

    def __init__(
        self, change: Change, scan_items: ScanItems, announced: Callable[[Sequence[bytes]], None],
        token: str, clock: Clock, log: BoundLogger,
    ) -> None:  # fmt: skip
        self._change = change
        self._scan_items = scan_items
        self._announced = announced
        self._token = token
        self._clock = clock
        self._log = log
        self._task: asyncio.Task[None] | None = None
        # A client of Redis may swallow a cancellation that comes together with a reply.
        self._asked_to_stop = asyncio.Event()
        self._woken = asyncio.Event()
        # Counts the openings that asked for a walk, and up to which of them one was finished.
        self._asked = self._walked = 0
        self._next_beat = 0.0

    def start(self, *, must_realign: bool) -> None:
        """Begin, or go on; with ``must_realign`` after a walk over all items."""
        if must_realign:
            self._asked += 1
            self._woken.set()
        self._next_beat = self._clock.monotonic() + BEAT_SEC
        if self._task is None or self._task.done():
            self._asked_to_stop.clear()
            self._task = asyncio.create_task(self._run(), name="store-upkeep")

    async def stop(self) -> None:
        """Stop at once; what is not brought in line yet is left to the next opening."""
        task, self._task = self._task, None
        if task is not None:
            self._asked_to_stop.set()
            task.cancel()
            await asyncio.wait((task,))

    async def _run(self) -> None:
        while not self._asked_to_stop.is_set():
            try:
                while self._walked < self._asked:
                    await self._realign()
                await self._rest()
                await self._beat()
            except StoreError as error:
                if not self._asked_to_stop.is_set():
                    self._log.warning("store_upkeep_failed", error=error, again_in_sec=BEAT_SEC)
                await self._rest()

    async def _step(self, text: str, args: Sequence[Any]) -> Any:
        if self._asked_to_stop.is_set():
            raise asyncio.CancelledError
        return await self._change(text, args)

    async def _rest(self) -> None:
        self._woken.clear()
        if self._asked_to_stop.is_set():
            return
        try:
            async with self._clock.timeout(BEAT_SEC):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _beat(self) -> None:
        await self._step(scripts.BEAT, [self._token, round(LEASE_SEC * 1000)])
        self._next_beat = self._clock.monotonic() + BEAT_SEC

    async def _realign(self) -> None:
        asked, tombstones = self._asked, 0
        # Where nobody has compared for long, leaves are overdue whose items are gone: a longer ttl must
        # not keep them. Those whose items are still there come back below.
        slice_of = [KEYS_PER_SLICE, "announced"]
        while await self._step(scripts.SWEEP, slice_of) >= KEYS_PER_SLICE:
            pass
        async for keys in self._scan_items():
            for begin in range(0, len(keys), KEYS_PER_SLICE):
                args: list[bytes | int] = []
                for key in keys[begin : begin + KEYS_PER_SLICE]:
                    args += (key, bucket_of(key))
                tombstones += await self._step(scripts.REALIGN, args)
            if self._clock.monotonic() >= self._next_beat:
                await self._beat()
        self._announced(await self._step(scripts.ANNOUNCE, []))
        self._walked = asked
        self._log.info("tombstone_ttl_announced", tombstones=tombstones)
