"""The cold path: now and then compares trees with each peer, and fetches what the hot path missed.

A *cycle* visits the peers one after the other, by priority, and each is judged alone: one that
fails rests for a while that doubles with each failure, and one whose link is not at rest is left
out. A cycle has a budget of items; where it ended a pass, the next one goes on after the last key.
A pass that somebody asks for has no budget.

A peer cannot hold up the others. In a cycle its part ends, between two flights, after
``cold_path.interval_sec``; and in a cycle or not, one whose part gets nowhere for two and a half minutes is
given up: its answer is still under way, so the link connects anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

from fsm_replication.config import ColdPathConfig, Settings
from fsm_replication.current import Current
from fsm_replication.errors import (
    ConnectionLostError,
    CursorStoreError,
    EngineStoppedError,
    NetworkError,
    ProtocolError,
    ReplicationError,
    StoreReopenedError,
    shorten,
)
from fsm_replication.log import get_logger
from fsm_replication.merkle import OWN
from fsm_replication.metrics import Metrics
from fsm_replication.ports import Ports
from fsm_replication.reports import PauseReason
from fsm_replication.stores.protocol import Received, SyncEngine
from fsm_replication.workers.applier import Blocked, Unsettled, make_applier
from fsm_replication.workers.connector import Lines
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.peer_tree import look_for_tree
from fsm_replication.workers.repair import (
    Budget,
    PeerRepair,
    StaleVerdict,
    repair_peer,
)

__all__ = ("ColdPath", "RepairStats", "Target")

ROOT_CACHE_SEC: Final = 5.0
CATCHING_UP_SKIPS: Final = 10
PATIENCE_SEC: Final = 150.0
"""How long a peer's part may go without a flight of leaves compared or items applied. The former is up
to a megabyte, which a line of 64 kbit/s brings in two minutes."""
_READY: Final = frozenset({"Tailing", "Standby"})
_BUSY: Final = "CatchingUp"
_T = TypeVar("_T")
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A peer that may be repaired: its link's state and connections, and what to tell the link.

    ``describe`` tells the state with what explains it.
    """

    context: LinkContext
    state: str
    lines: Lines | None
    block: Callable[[PauseReason, str], None]
    lost: Callable[[Lines, str], None]
    describe: Callable[[], str]
    blame: Callable[[str, Exception], None]


@dataclass(frozen=True, slots=True)
class RepairStats:
    """What a repair came to, over all its peers.

    ``items_submitted`` and ``items_deleted`` were newer than what was held; ``items_deferred`` are
    left for later: over the budget, unfetchable within the last hour, or held back as stale.
    ``items_rejected`` are old items that were deleted everywhere. ``problems`` tells what went
    wrong with which peer, one line for each of ``errors``.
    """

    peers_checked: int = 0
    peers_in_sync: int = 0
    items_fetched: int = 0
    items_submitted: int = 0
    items_deleted: int = 0
    items_deferred: int = 0
    errors: int = 0
    items_rejected: int = 0
    problems: tuple[str, ...] = ()

    def plus(self, one: PeerRepair) -> RepairStats:
        """Return the sum with what one peer came to."""
        fetched = one.fetched
        return replace(
            self,
            peers_checked=self.peers_checked + 1,
            peers_in_sync=self.peers_in_sync + one.in_sync,
            items_fetched=self.items_fetched + fetched.items,
            items_submitted=self.items_submitted + fetched.submitted,
            items_deleted=self.items_deleted + fetched.deleted,
            items_deferred=self.items_deferred + one.deferred + one.passed_over + one.held_back,
            items_rejected=self.items_rejected + one.rejected,
        )

    def failed(self, problem: str) -> RepairStats:
        """Return the sum with one more problem."""
        return replace(self, errors=self.errors + 1, problems=(*self.problems, problem))


@dataclass(slots=True)
class _Peer:
    """What is remembered of a peer from one cycle to the next."""

    failures: int = 0
    not_before: float = 0.0
    skipped_busy: int = 0
    after: tuple[str, str] | None = None


class ColdPath:
    """Repairs peers: in cycles as a worker of the engine, and when asked.

    ``targets`` returns the peers by priority, ``start`` starts a worker of the engine, and
    ``reopened`` has every link decide anew: the store may be another, or as it was before.
    """

    def __init__(
        self,
        settings: Current[Settings],
        store: SyncEngine,
        ports: Ports,
        metrics: Metrics,
        targets: Callable[[], Sequence[Target]],
        start: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
        reopened: Callable[[str], None],
    ) -> None:
        self._start = start
        self._reopened = reopened
        self._current = settings
        self._store = store
        self._ports = ports
        self._metrics = metrics
        self._targets = targets
        self._peers: dict[str, _Peer] = {}
        self._one_at_a_time = asyncio.Lock()
        self._asked: dict[tuple[str | None, StaleVerdict | None], asyncio.Future[RepairStats]] = {}
        self._root: tuple[float, bytes] | None = None
        self._incarnation = ""
        self._log = get_logger("cold_path", node_id=metrics.node_id)

    # As a worker

    async def run(self) -> None:
        """Go through a cycle every interval, while the cold path is enabled; until cancelled."""
        current, clock = self._current, self._ports.clock
        await self._look_at_store()
        while True:
            await current.wait_until(lambda settings: settings.cold_path.enabled)
            await current.sleep(clock, lambda settings: settings.cold_path.interval_sec)
            if self._settings.enabled:
                await self.cycle()

    @property
    def _settings(self) -> ColdPathConfig:
        return self._current.value.cold_path

    async def cycle(self) -> RepairStats:
        """Visit every peer that is ready for it, by priority, within the budget."""
        async with self._one_at_a_time:
            clock = self._ports.clock
            began = clock.monotonic()
            budget = Budget(self._settings.max_items_per_cycle)
            stats = RepairStats()
            await self._look_at_store()
            targets = self._targets()
            self._remember_only(targets)
            for target in targets:
                why = self._reason_to_skip(target)
                if not why and not await self._has_tree(target):
                    why = "no tree"
                if why:
                    self._metrics.get("repair_skipped", why).inc()
                    continue
                ends_at = clock.monotonic() + self._settings.interval_sec
                budget.begin_part(partial(self._is_past, ends_at))
                stats = await self._visit(target, stats, budget, None, None)
            self._metrics.get("repair_cycles").inc()
            self._metrics.get("repair_cycle_duration_seconds").observe(clock.monotonic() - began)
            self._count(stats)
            return stats

    def _is_past(self, moment: float) -> bool:
        return self._ports.clock.monotonic() >= moment

    async def _look_at_store(self) -> None:
        """See whether the store was emptied or replaced, which no tree tells where all are empty."""
        for target in self._targets()[:1]:
            context, applier = target.context, make_applier(target.context)
            try:
                found = await applier.call(context.reads, self._store.incarnation)
                # Nothing to apply: a store that came back as it was earlier says so all the same.
                await applier.call(context.writes, lambda: self._store.apply_many([], Received("")))
            except (Blocked, Unsettled):
                return  # It is in trouble, and was logged; it is looked at again.
            except StoreReopenedError as error:
                self._reopened(str(error))
                return
            known, self._incarnation = self._incarnation, found
            if known not in ("", found):
                self._reopened("the local store is another incarnation")

    def _reason_to_skip(self, target: Target) -> str:
        """Return why a cycle leaves this peer out, "" if it does not."""
        peer = self._peer(target)
        lines = target.lines
        if target.state == _BUSY:
            peer.skipped_busy += 1
            if peer.skipped_busy <= CATCHING_UP_SKIPS:
                return "catching up"
        elif target.state not in _READY:
            return "not connected" if lines is None else "not at rest"
        if lines is None:
            return "not connected"
        if self._ports.clock.monotonic() < peer.not_before:
            return "backoff"
        peer.skipped_busy = 0
        return ""

    def _remember_only(self, targets: Sequence[Target]) -> None:
        """Forget peers that were taken out of the configuration."""
        known = {target.context.peer_id for target in targets}
        self._peers = {name: peer for name, peer in self._peers.items() if name in known}

    def _peer(self, target: Target) -> _Peer:
        return self._peers.setdefault(target.context.peer_id, _Peer())

    # When asked

    async def repair(
        self,
        peer_id: str | None = None,
        verdict: StaleVerdict | None = None,
        on_progress: OnProgress | None = None,
    ) -> RepairStats:
        """Repair one peer, or all, without a budget; a call that finds one under way joins it.

        The pass is a worker of the engine: it goes on when a caller is cancelled, because others
        may wait for it too, and because a connection in mid-reply could not be used any more.

        :raises EngineStoppedError: if the engine ends first.
        """
        key = (peer_id, verdict)
        running = self._asked.get(key)
        if running is None:
            running = self._asked[key] = asyncio.get_running_loop().create_future()
            self._start(partial(self._pass, key, running, on_progress))
        return await asyncio.shield(running)

    async def _pass(
        self,
        key: tuple[str | None, StaleVerdict | None],
        done: asyncio.Future[RepairStats],
        on_progress: OnProgress | None,
    ) -> None:
        try:
            async with self._one_at_a_time:
                done.set_result(await self._repair_now(*key, on_progress))
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            done.set_exception(error)
        finally:
            if done.done():
                self._asked.pop(key, None)
                # Whoever asked may have gone away without waiting.
                done.exception()

    def close(self) -> None:
        """Tell whoever waits for a pass that the engine has ended."""
        for done in self._asked.values():
            if not done.done():
                done.set_exception(EngineStoppedError("the engine ended during the repair"))
                done.exception()
        self._asked.clear()

    async def _repair_now(
        self, peer_id: str | None, verdict: StaleVerdict | None, on_progress: OnProgress | None
    ) -> RepairStats:
        stats = RepairStats()
        self._root = None
        await self._look_at_store()
        for target in self._targets():
            name = target.context.peer_id
            if peer_id not in (None, name):
                continue
            if target.lines is None or target.state not in (*_READY, _BUSY):
                why = target.context.interlock.tripped or f"it is {target.describe()}"
                stats = stats.failed(f"peer {name!r} cannot be compared now: {why}")
            elif not await self._has_tree(target):
                stats = stats.failed(f"peer {name!r} publishes no tree that could be compared")
            else:
                stats = await self._visit(target, stats, Budget(), verdict, on_progress)
        self._count(stats)
        return stats

    # One peer

    async def _has_tree(self, target: Target) -> bool:
        """Say whether there is anything to compare; a peer may have built a tree by now."""
        context, lines = target.context, target.lines
        assert lines is not None
        try:
            await look_for_tree(context, lines)
        except (NetworkError, ProtocolError) as error:
            target.lost(lines, str(error))
        except ReplicationError as error:
            self._log.warning("peer_not_asked_for_tree", peer_id=context.peer_id, error=error)
        except Exception as error:  # noqa: BLE001 - it is logged, and counts against this link
            target.blame("cold path", error)
        return bool(lines.layout)

    async def _visit(
        self, target: Target, stats: RepairStats, budget: Budget,
        verdict: StaleVerdict | None, on_progress: OnProgress | None,
    ) -> RepairStats:  # fmt: skip
        context, lines = target.context, target.lines
        assert lines is not None
        peer, name = self._peer(target), context.peer_id
        clock = self._ports.clock
        began = clock.monotonic()
        flights = 0

        def show(result: PeerRepair) -> None:
            nonlocal flights
            flights += 1
            if on_progress is not None:
                on_progress(name, result.differing, result.fetched.items)

        try:
            our_root = None if lines.foreign else await self._our_root(context)
            result = await self._while_it_gets_on(
                repair_peer(
                    context,
                    lines,
                    budget=budget,
                    our_root=our_root,
                    after=peer.after,
                    verdict=verdict,
                    on_progress=show,
                ),
                lambda: context.progress.advances + flights,
                context.peer.display_url,
            )
        except Blocked as blocked:
            if blocked.reason in (PauseReason.INTERLOCK, PauseReason.CLOCK):
                target.block(blocked.reason, str(blocked))
            return self._gave_up(peer, context, stats, blocked)
        except Unsettled as unsettled:
            return self._gave_up(peer, context, stats, unsettled.__cause__ or unsettled)
        except CursorStoreError as error:
            if not error.may_pass:
                raise
            context.cursors.failed(error)
            return self._gave_up(peer, context, stats, error)
        except (NetworkError, ProtocolError) as error:
            # Replies may be shifted, so that the next one would be taken for another's.
            target.lost(lines, str(error))
            return self._gave_up(peer, context, stats, error)
        except StoreReopenedError as error:
            self._reopened(str(error))
            return self._gave_up(peer, context, stats, error)
        except ReplicationError as error:
            return self._gave_up(peer, context, stats, error)
        except Exception as error:  # noqa: BLE001 - it is logged, and counts against this link
            target.blame("cold path", error)
            return self._gave_up(peer, context, stats, error)
        peer.failures, peer.not_before = 0, 0.0
        peer.after = result.after if budget.spent else None
        context.metrics.operation("repair", clock.monotonic() - began)
        if not result.in_sync:
            context.metrics.diverged()
            self._log.info(
                "peer_repaired",
                peer_id=name,
                differing=result.differing,
                fetched=result.fetched.items,
                deferred=result.deferred,
                passed_over=result.passed_over,
                held_back=result.held_back,
                complete=result.complete,
            )
        return stats.plus(result)

    async def _while_it_gets_on(
        self, work: Coroutine[Any, Any, _T], progress: Callable[[], int], where: str
    ) -> _T:
        """Return what ``work`` comes to.

        :raises ConnectionLostError: if it has got nowhere for too long.
        """
        task = asyncio.create_task(work)
        # Whoever is cancelled while it fails asks for its error no more.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        # A call into the local store that hangs is no fault of the peer's.
        patience = max(PATIENCE_SEC, 2 * self._current.value.timeouts.store_call)
        try:
            while not task.done():
                reached = progress()
                try:
                    async with self._ports.clock.timeout(patience):
                        await asyncio.wait((task,))
                except TimeoutError:
                    if progress() == reached and not task.done():
                        raise ConnectionLostError(
                            f"{where} has hardly answered for {patience:g} s"
                        ) from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        return task.result()

    def _gave_up(
        self, peer: _Peer, context: LinkContext, stats: RepairStats, error: BaseException
    ) -> RepairStats:
        peer.failures += 1
        settings = self._settings
        rest = settings.backoff_base_sec * 2.0 ** min(peer.failures, 30)
        rest = min(settings.backoff_max_sec, rest)
        peer.not_before = self._ports.clock.monotonic() + rest
        context.metrics.error(type(error).__name__)
        self._log.warning("repair_failed", peer_id=context.peer_id, error=error, rest_sec=rest)
        return stats.failed(f"peer {context.peer_id!r}: {shorten(str(error))}")

    async def _our_root(self, context: LinkContext) -> bytes | None:
        """Return our root, at most five seconds old: one reading serves the peers of a cycle."""
        tree = self._store.tree
        if tree is None:
            return None
        now = self._ports.clock.monotonic()
        if self._root is None or now - self._root[0] > ROOT_CACHE_SEC:
            applier = make_applier(context)
            self._root = (now, await applier.call(context.reads, lambda: tree.root(OWN)))
        return self._root[1]

    def _count(self, stats: RepairStats) -> None:
        for name in (
            "peers_checked",
            "peers_in_sync",
            "items_fetched",
            "items_submitted",
            "items_deleted",
            "items_deferred",
            "errors",
        ):
            self._metrics.get(f"repair_{name}").inc(getattr(stats, name))
