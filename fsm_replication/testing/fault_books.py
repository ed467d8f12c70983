"""A writer that keeps writing, the books of what its node acknowledged, and of what links ask for.

Only an acknowledged write stands in the books, with the order tuple it got. It is lost if a node
holds nothing for its key, or something older: what is as new or newer has superseded it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from fsm_replication.errors import StoreError
from fsm_replication.items import Stamp, SyncItem
from fsm_replication.stores import RedisSyncEngine

__all__ = ("Books", "Loss", "Rounds", "Write", "Writer")

TICK_SEC: Final = 0.05
# What falls behind is made up for slowly: a flood would be another fault.
MAKE_UP_FACTOR: Final = 1.5
OWN_KEYS: Final = 3000
SHARED_KEYS: Final = 300
SHARED_SHARE: Final = 0.1
CONTENT_BYTES: Final = 200
# One delete in so many ticks.
DELETE_EVERY: Final = 2
SAMPLE_SEC: Final = 0.1
# Every round of a link's workers has one of these; the others fetch many items or nodes at once.
ROUND_COMMANDS: Final = frozenset(
    {b"CLIENT", b"HMGET", b"PING", b"SCAN", b"XINFO", b"XRANGE", b"XREAD"}
)


class Write(NamedTuple):
    """One acknowledged write or delete; ``at`` is the loop's time, in seconds, just after it."""

    node_id: str
    key: str
    stamp: Stamp
    at: float


class Loss(NamedTuple):
    """A write that a node should hold and does not; ``held`` is what it holds instead."""

    write: Write
    missing_at: str
    held: Stamp | None


class Books:
    """Every acknowledged write."""

    def __init__(self) -> None:
        self.writes: list[Write] = []

    def note(self, node_id: str, items: Iterable[SyncItem]) -> None:
        """Write down what a node has just acknowledged."""
        at = asyncio.get_running_loop().time()
        self.writes += [Write(node_id, item.key, item.stamp, at) for item in items]

    def count(self, since: float, until: float) -> int:
        """Return how many writes were acknowledged between two times of the loop."""
        return sum(since <= write.at < until for write in self.writes)

    async def holdings(
        self, stores: Mapping[str, RedisSyncEngine]
    ) -> dict[str, dict[str, Stamp | None]]:
        """Return what each node holds of every key in the books.

        :raises StoreError: if a store fails.
        """
        keys = sorted({write.key for write in self.writes})
        held = await asyncio.gather(*(store.stamps(keys) for store in stores.values()))
        return {
            name: dict(zip(keys, stamps, strict=True))
            for name, stamps in zip(stores, held, strict=True)
        }

    def losses(
        self,
        holdings: Mapping[str, Mapping[str, Stamp | None]],
        excused: Callable[[Write], bool] = lambda _write: False,
    ) -> list[Loss]:
        """Return the writes that some node does not hold, but for those that are excused."""
        found: list[Loss] = []
        for write in self.writes:
            for name, stamps in holdings.items():
                held = stamps.get(write.key)
                if (held is None or held < write.stamp) and not excused(write):
                    found.append(Loss(write, name, held))
        return found


class Rounds:
    """Counts the commands of rounds that links send while none of them gets on.

    ``note`` is told of every command, and ``progress`` returns another number as soon as any link has
    got on. ``most`` is the largest number of such commands within a second without progress.
    """

    def __init__(self, progress: Callable[[], int]) -> None:
        self.most = 0
        self._progress = progress
        self._commands = 0

    def note(self, command: Sequence[bytes]) -> None:
        """Count a command, if it is one of a round."""
        self._commands += bool(command) and command[0].upper() in ROUND_COMMANDS

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        reached = self._progress()
        window: deque[int] = deque(maxlen=round(1 / SAMPLE_SEC))
        while True:
            before = self._commands
            await asyncio.sleep(SAMPLE_SEC)
            window.append(self._commands - before)
            before, reached = reached, self._progress()
            if reached != before:
                window.clear()
            self.most = max(self.most, sum(window))


class Writer:
    """Writes to one node at ``rate_per_sec``, over 0, as long as ``run`` runs.

    Nine writes in ten go to keys that this node alone writes, the others to keys that all writers
    share; now and then a key of its own is deleted. A write that fails is given up, since it may
    have happened or not, and the next one is tried.
    """

    def __init__(
        self,
        node_id: str,
        store: RedisSyncEngine,
        books: Books,
        *,
        rate_per_sec: float,
        rng: random.Random,
    ) -> None:
        self.node_id = node_id
        self._store = store
        self._books = books
        self._rate = rate_per_sec
        self._rng = rng
        self._done = asyncio.Event()
        self._tried = 0

    def stop(self) -> None:
        """Write no more; ``run`` ends after the write under way."""
        self._done.set()

    async def run(self) -> None:
        """Write until stopped; what falls behind the rate is slowly made up for."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        tick = 0
        while not self._done.is_set():
            due = int((loop.time() - began) * self._rate) - self._tried
            most = round(self._rate * TICK_SEC * MAKE_UP_FACTOR)
            if due > 0:
                await self._write(min(due, most), delete=tick % DELETE_EVERY == 0)
            tick += 1
            await asyncio.sleep(TICK_SEC)

    async def _write(self, count: int, *, delete: bool) -> None:
        self._tried += count
        try:
            contents = self._contents(count)
            self._books.note(self.node_id, await self._store.put_many(contents))
            own = [key for key, _ in contents if key.startswith(f"{self.node_id}.")]
            if delete and own:
                await self._delete(self._rng.choice(own))
        except StoreError:
            return

    def _contents(self, count: int) -> Sequence[tuple[str, bytes]]:
        contents: dict[str, bytes] = {}
        while len(contents) < count:
            if self._rng.random() < SHARED_SHARE:
                key = f"shared.{self._rng.randrange(SHARED_KEYS)}"
            else:
                key = f"{self.node_id}.{self._rng.randrange(OWN_KEYS)}"
            contents[key] = self._rng.randbytes(CONTENT_BYTES)
        return list(contents.items())

    async def _delete(self, key: str) -> None:
        # Nobody else writes this key, so what is held after the delete is its tombstone.
        if await self._store.delete(key):
            self._books.note(self.node_id, [i for i in await self._store.get_many([key]) if i])
