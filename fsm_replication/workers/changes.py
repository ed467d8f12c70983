"""What replication applied, for whoever follows it: the feed behind ``engine.changes()``.

A change is told when the store has answered that it was applied. A call that fails, is cancelled or
takes too long may have been carried out all the same; handed over again, its changes are superseded
by themselves. Their keys are kept as *doubts* until what was handed over is settled or compared, and
then whatever is held under them is told. So a change is told at least once.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fsm_replication.errors import WatcherLagged
from fsm_replication.items import SyncItem
from fsm_replication.ports import StreamId

__all__ = ("ChangeFeed", "ChangeWatcher", "Doubts")

CHANGES_KEPT: Final = 10_000
CHANGES_BYTES: Final = 64 * 1024 * 1024
DOUBTS_KEPT: Final = 10_000


class ChangeWatcher(AsyncIterator[SyncItem]):
    """What replication applied, for keys with a prefix; bounded like every watcher."""

    def __init__(self, feed: ChangeFeed, prefix: str) -> None:
        self._feed = feed
        self._prefix = prefix
        self._queue: deque[SyncItem] = deque()
        self._queued_bytes = 0
        self._missed = 0
        self._closed = False
        self._woken = asyncio.Event()

    def offer(self, items: Sequence[SyncItem]) -> None:
        """Take in what was applied."""
        for item in items:
            if item.key.startswith(self._prefix):
                self._queue.append(item)
                self._queued_bytes += len(item.content)
                while len(self._queue) > CHANGES_KEPT or self._queued_bytes > CHANGES_BYTES:
                    self._queued_bytes -= len(self._queue.popleft().content)
                    self._missed += 1
        self._woken.set()

    def miss(self, count: int) -> None:
        """Take in that so many changes cannot be told."""
        self._missed += count
        self._woken.set()

    def __aiter__(self) -> ChangeWatcher:
        return self

    async def __anext__(self) -> SyncItem:
        """Return the next change; ends when the engine does.

        :raises WatcherLagged: once, if changes were dropped since the last call.
        """
        while True:
            if self._missed:
                missed, self._missed = self._missed, 0
                raise WatcherLagged(missed)
            if self._queue:
                item = self._queue.popleft()
                self._queued_bytes -= len(item.content)
                return item
            if self._closed:
                raise StopAsyncIteration
            self._woken.clear()
            await self._woken.wait()

    def close(self) -> None:
        """Stop watching; iteration ends after what is queued."""
        self._closed = True
        self._feed.forget(self)
        self._woken.set()

    async def aclose(self) -> None:
        """Stop watching, for ``contextlib.aclosing``."""
        self.close()


@dataclass(slots=True)
class ChangeFeed:
    """Hands applied changes to watchers; costs nothing while there are none.

    They are held weakly: one that was dropped in the middle of a loop is gone.
    """

    known: list[weakref.ref[ChangeWatcher]] = field(default_factory=list)
    closed: bool = False

    @property
    def watchers(self) -> list[ChangeWatcher]:
        """Those who still watch."""
        return [watcher for known in self.known if (watcher := known()) is not None]

    def watch(self, prefix: str) -> ChangeWatcher:
        """Begin watching keys that start with ``prefix``."""
        watcher = ChangeWatcher(self, prefix)
        if self.closed:
            watcher.close()
        else:
            self.known = [known for known in self.known if known() is not None]
            self.known.append(weakref.ref(watcher))
        return watcher

    def forget(self, watcher: ChangeWatcher) -> None:
        """Stop offering to a watcher."""
        self.known = [known for known in self.known if known() not in (None, watcher)]

    def close(self) -> None:
        """End all watchers: the engine has ended."""
        self.closed = True
        for watcher in self.watchers:
            watcher.close()


class Doubts:
    """Keys of one link's changes that went to the store and came back without an answer.

    Each is kept with the place in the stream that must be settled before it can be told, or with
    none where it came another way. At most 10,000 are kept; further ones are only counted.
    """

    __slots__ = ("_keys", "_lost")

    def __init__(self) -> None:
        self._keys: dict[str, StreamId | None] = {}
        self._lost = 0

    def __bool__(self) -> bool:
        return bool(self._keys or self._lost)

    def add(self, keys: Iterable[str], until: StreamId | None) -> None:
        """Take in keys; those of the stream are due when ``until`` is settled."""
        for key in keys:
            if key in self._keys or len(self._keys) < DOUBTS_KEPT:
                self._keys[key] = until or self._keys.get(key)
            else:
                self._lost += 1

    def take(self, settled: StreamId | None) -> tuple[list[str], int]:
        """Take out the keys that are due, and the number of those that were only counted.

        With ``settled`` None all are due: the peer's items were compared with ours.
        """
        due = [
            key
            for key, until in self._keys.items()
            if settled is None or (until is not None and until <= settled)
        ]
        for key in due:
            del self._keys[key]
        lost, self._lost = self._lost, 0
        return due, lost
