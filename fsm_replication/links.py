"""The links of one engine: which there are, in what order, and which are on their way out.

There is one link for each configured peer. One whose peer was taken out is asked to shut down and
leaves the mapping at once; it stays among those on their way out until it is Stopped, so that a
shutdown of the engine waits for it, and a peer that is added again does not get a second link
beside it. When it is Stopped everything that was kept about its peer in memory is forgotten; what
is on disk (its cursor, its dead letters, a pause) stays.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Coroutine,
    ItemsView,
    Iterator,
    Mapping,
    Sequence,
    ValuesView,
)
from functools import partial
from typing import Any, Final, Protocol

from fsm_replication.circuits import Circuit
from fsm_replication.config import PeerConfig
from fsm_replication.driver import Observer
from fsm_replication.errors import DrainTimeoutError
from fsm_replication.journal import Journal
from fsm_replication.log import get_logger
from fsm_replication.peer_link import PeerLink
from fsm_replication.ports import Clock, CursorStore, PeerRecord
from fsm_replication.reports import PauseReason
from fsm_replication.tables import PeerState
from fsm_replication.workers.cold_path import Target
from fsm_replication.workers.context import LinkContext
from fsm_replication.workers.ping import IdlePeer

__all__ = ("Links", "StartWorker")

NO_RECORD: Final = PeerRecord()


class StartWorker(Protocol):
    """Starts a worker of the engine that lasts no longer than its links."""

    def __call__(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start it and return."""


class Links(Mapping[str, PeerLink]):
    """The links to the configured peers, by node id, in the order in which they are served.

    ``new_context`` and ``new_circuit`` make what a link needs, ``patience`` returns the seconds
    that a link which was taken out has until its workers are cancelled.
    """

    def __init__(
        self,
        *,
        new_context: Callable[[PeerConfig], LinkContext],
        new_circuit: Callable[[PeerConfig], Circuit],
        journal: Journal,
        observer: Observer,
        on_crash: Callable[[str, Exception], None],
        clock: Clock,
        patience: Callable[[], float],
        start_worker: StartWorker,
    ) -> None:
        self._new_context = new_context
        self._new_circuit = new_circuit
        self._journal = journal
        self._observer = observer
        self._on_crash = on_crash
        self._clock = clock
        self._patience = patience
        self._start_worker = start_worker
        # Never changed, but replaced: other threads read it.
        self._links: Mapping[str, PeerLink] = {}
        self._leaving: dict[str, PeerLink] = {}
        # Pauses and resumptions that were asked for and are not on disk yet.
        self._wishes: dict[str, bool] = {}
        self._log = get_logger("links")

    # The links to configured peers.

    def __getitem__(self, peer_id: str) -> PeerLink:
        return self._links[peer_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._links)

    def __len__(self) -> int:
        return len(self._links)

    def items(self) -> ItemsView[str, PeerLink]:
        """Return the links by node id as they are now, safe from any thread."""
        return self._links.items()

    def values(self) -> ValuesView[PeerLink]:
        """Return the links as they are now, safe from any thread."""
        return self._links.values()

    @property
    def owned(self) -> tuple[PeerLink, ...]:
        """Every link that is not forgotten, those on their way out included."""
        return (*self._links.values(), *self._leaving.values())

    # Which there are.

    def add(self, peer: PeerConfig, record: PeerRecord = NO_RECORD) -> None:
        """Make the link to a peer, of which so much is known; it is Created."""
        link = PeerLink(
            self._new_context(peer),
            journal=self._journal,
            observer=self._observer,
            on_crash=self._on_crash,
        )
        self._links = {**self._links, peer.node_id: link}
        self._take(link, record)

    def take_out(self, peer_id: str) -> None:
        """Ask a link to end; it is no longer one of the configured ones."""
        link = self._leaving[peer_id] = self._links[peer_id]
        self._links = {known: other for known, other in self._links.items() if known != peer_id}
        link.shutdown("the peer was taken out of the configuration")
        if link.driver.workers:
            self._start_worker(f"farewell to {peer_id}", partial(self._see_off, link))

    async def _see_off(self, link: PeerLink) -> None:
        """Cancel what does not end in time; how it ends, :meth:`note_stopped` is told."""
        try:
            async with self._clock.timeout(self._patience()):
                await link.waiter(PeerState.STOPPED).wait()
        except TimeoutError:
            self._log.error("link_will_not_end", peer_id=link.peer_id, left=link.driver.workers)
            link.driver.cancel_all()

    def note_stopped(self, peer_id: str) -> PeerLink | None:
        """Forget a link that is Stopped; returns it if it was on its way out."""
        return self._leaving.pop(peer_id, None)

    async def wait_gone(self, peer_ids: Sequence[str]) -> None:
        """Wait until none of these peers has a link that is on its way out.

        :raises DrainTimeoutError: if one does not end although it was cancelled.
        """
        for peer_id in peer_ids:
            link = self._leaving.get(peer_id)
            if link is None:
                continue
            # As long again as it has by itself: by then it was cancelled, and something hangs.
            patience = 2 * self._patience()
            try:
                async with self._clock.timeout(patience):
                    await link.waiter(PeerState.STOPPED).wait()
            except TimeoutError:
                raise DrainTimeoutError(link.driver.workers, timeout_sec=patience) from None

    # What is known of their peers.

    async def take_records(self, store: CursorStore) -> None:
        """Take in what a cursor store that was just opened knows of every peer.

        :raises CursorStoreError: if it cannot be read or written.
        """
        for link in self._links.values():
            resumed = self._wishes.get(link.peer_id) is False
            await self.write_wish(link.peer_id, store)
            self._take(link, await store.load(link.peer_id))
            if resumed:
                link.resume()
                await link.context.interlock.tidy()

    def _take(self, link: PeerLink, record: PeerRecord) -> None:
        if self._wishes.get(link.peer_id, record.operator_pause):
            link.pause()
        progress = link.context.progress
        progress.gaps_open = len(record.gaps)
        link.context.stale.agreed(record.agreement)
        interlock = link.context.interlock
        interlock.load(record.interlock)
        if interlock.tripped:
            link.block(PauseReason.INTERLOCK, interlock.tripped)
        progress.dead_letters = record.dead_letters

    def wish(self, peer_id: str, *, paused: bool) -> None:
        """Pause or resume a link on behalf of an operator; it is in force before it is on disk."""
        link = self._links[peer_id]
        if paused:
            link.pause()
        else:
            link.resume()
        self._wishes[peer_id] = paused

    async def write_wish(self, peer_id: str, store: CursorStore) -> None:
        """Write what an operator wished for a peer, unless that is on disk.

        :raises CursorStoreError: if it cannot be written.
        """
        wish = self._wishes.get(peer_id)
        if wish is None:
            return
        await store.set_operator_pause(peer_id, wish)
        # Another may have been made meanwhile, and waits behind this one to be written.
        if self._wishes.get(peer_id) is wish:
            del self._wishes[peer_id]
        if peer_id in self._links:
            await self._links[peer_id].context.interlock.tidy()

    async def tidy(self, *, at_end: bool = False) -> None:
        """Bring what is kept of the interlocks up to date, where it is not.

        :raises CursorStoreError: if it cannot be written.
        """
        for link in self.owned:
            await link.context.interlock.tidy(at_end=at_end)

    # What the engine's workers do with them.

    def repair_targets(self) -> list[Target]:
        """Return what the cold path needs to know of each link."""
        return [
            Target(
                link.context,
                link.state,
                link.lines,
                link.block,
                link.lost,
                link.describe,
                link.blame,
            )
            for link in self._links.values()
        ]

    def to_be_pinged(self) -> list[IdlePeer]:
        """Return what pings need to know of the links that are connected."""
        return [
            IdlePeer(link.context.progress, link.context.peer_clock, link.ping)
            for link in self._links.values()
            if link.state.is_running
        ]

    def judge_lag(self) -> None:
        """See which links are further behind than they may be."""
        for link in self._links.values():
            link.context.judge_lag()

    @property
    def await_store(self) -> bool:
        """Whether a link waits for a circuit of the store."""
        return any(PauseReason.CIRCUIT in link.pause_reasons for link in self._links.values())

    def grant_probe(self) -> bool:
        """Let one link try the store although its circuit is open; False if none waits for it."""
        for link in self._links.values():
            if PauseReason.CIRCUIT in link.pause_reasons:
                link.clear(PauseReason.CIRCUIT, "it may probe the store")
                return True
        return False

    def block(self, peer_id: str, reason: PauseReason, why: str) -> None:
        """Pause a link, unless its peer was taken out meanwhile."""
        if peer_id in self._links:
            self._links[peer_id].block(reason, why)

    def blame(self, peer_id: str, worker: str, error: Exception) -> None:
        """Count an unexpected error against a link, unless its peer was taken out meanwhile."""
        if peer_id in self._links:
            self._links[peer_id].blame(worker, error)

    # What changes about them.

    def configure(self, peer: PeerConfig) -> None:
        """Let a link take over another configuration of its peer."""
        self._links[peer.node_id].configure(peer, self._new_circuit)

    def equip_anew(self, peer: PeerConfig) -> None:
        """Give a link that was never started everything anew."""
        self._links[peer.node_id].equip(self._new_context(peer))

    def arrange(self, peers: Sequence[PeerConfig]) -> None:
        """Put the links in order: by priority, equal ones as they stand in the configuration."""
        ordered = sorted(peers, key=lambda peer: peer.priority)
        self._links = {peer.node_id: self._links[peer.node_id] for peer in ordered}

    def decide_anew(self, why: str) -> None:
        """Have every link decide again: by the settings in force, for the store as it is now."""
        for link in self._links.values():
            link.decide_anew(why)

    def doubt_store(self, why: str) -> None:
        """Have every link decide again for a store that may be as it was at an earlier time."""
        for link in self._links.values():
            link.context.distrust_store()
            link.decide_anew(why)

    def __repr__(self) -> str:
        told = ", ".join(f"{peer_id} {link.state}" for peer_id, link in self._links.items())
        return f"<Links {told or 'none'}; {len(self._leaving)} on their way out>"
