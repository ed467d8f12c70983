"""The journal, its watchers, and what is logged and counted for each move."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from conftest import Nodes, Peer, peer_config
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from fsm_replication.config import PeerConfig, Settings, StartupConfig
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import UnreachableStateError, WatcherLagged
from fsm_replication.journal import WATCHER_RECORDS, Journal, StateWaiter, Transition, Watcher
from fsm_replication.log import get_logger
from fsm_replication.stores import MemorySyncEngine
from fsm_replication.tables import LINK, EngineState, PeerState

HERE = Transition("link:a", 0, None, None, PeerState.CREATED)


def record(number: int, dest: PeerState = PeerState.CONNECTING) -> Transition:
    """Return a record."""
    return Transition("link:a", number, "retry", PeerState.BACKOFF, dest)


async def test_a_slow_watcher_is_told_once_and_goes_on_with_the_oldest_kept() -> None:
    """If this fails a watcher that lags stops, grows without bound, or misses silently."""
    journal = Journal(10)
    watcher = Watcher(journal, LINK, HERE)
    for number in range(WATCHER_RECORDS + 49):
        journal.append(record(number))
    with pytest.raises(WatcherLagged) as raised:
        await anext(watcher)
    assert raised.value.missed == 50
    assert (await anext(watcher)).at_ms == 49
    journal.append(record(7777))
    rest = [(await anext(watcher)).at_ms for _ in range(WATCHER_RECORDS)]
    assert rest[-1] == 7777
    watcher.close()
    with pytest.raises(StopAsyncIteration):
        await anext(watcher)


async def test_the_journal_is_bounded_and_a_snapshot() -> None:
    """If this fails the journal grows, or changes under the hands of who reads it."""
    journal = Journal(3)
    for number in range(10):
        journal.append(record(number))
    before = journal.snapshot()
    journal.append(record(10))
    assert [r.at_ms for r in before] == [7, 8, 9]


async def test_a_watcher_ends_after_a_final_state() -> None:
    """If this fails a loop over a watcher never ends."""
    journal = Journal(10)
    watcher = Watcher(journal, LINK, HERE)
    other = Transition("link:b", 1, "stopped", PeerState.SHUTTING_DOWN, PeerState.STOPPED)
    journal.append(other)
    journal.append(record(2, PeerState.STOPPED))
    assert [r.dest async for r in watcher] == [PeerState.CREATED, PeerState.STOPPED]


async def test_a_state_passed_through_is_seen() -> None:
    """If this fails somebody who waits for a short-lived state waits for ever."""
    journal = Journal(10)
    waiter = StateWaiter(journal, LINK, HERE, frozenset({PeerState.RESUMING}))
    journal.append(record(1, PeerState.RESUMING))
    journal.append(record(2, PeerState.STOPPED))
    assert await waiter.wait() is PeerState.RESUMING
    with pytest.raises(UnreachableStateError):
        await StateWaiter(
            journal, LINK, record(3, PeerState.STOPPED), frozenset({PeerState.RESUMING})
        ).wait()


async def test_every_move_is_one_log_event_and_one_metric(
    nodes: Nodes, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails a move goes unseen by logs or metrics, or is told twice."""
    caplog.set_level(logging.INFO, logger="fsm_replication")
    registry = CollectorRegistry()
    config = nodes.config(peer_config(peer.server))
    engine = ReplicationEngine(config, sync_engine=MemorySyncEngine(), registry=registry)
    async with engine:
        await engine.wait_for_state(PeerState.TAILING, peer_id="a", timeout=5)
    told = [r.__dict__ for r in caplog.records if vars(r).get("event") == "transition"]
    moves = engine.journal
    assert [(t["machine"], t["trigger"], t["dest"]) for t in told] == [
        (move.machine, move.trigger, move.dest) for move in moves
    ]
    for move in moves:
        labels = {
            "node_id": "b",
            "machine": move.machine,
            "trigger": str(move.trigger),
            "source": str(move.source),
            "dest": str(move.dest),
        }
        same = [m for m in moves if (m.machine, m.trigger, m.source) == (
            move.machine, move.trigger, move.source)]  # fmt: skip
        assert registry.get_sample_value("replication_transitions_total", labels) == len(same)
    state = registry.get_sample_value(
        "replication_peer_state", {"node_id": "b", "peer_id": "a", "state": "Stopped"}
    )
    assert state == 1
    assert registry.get_sample_value("replication_engine_state", {"node_id": "b"}) == 4


async def test_two_engines_share_a_registry_and_the_default_one_is_left_alone(
    nodes: Nodes,
) -> None:
    """If this fails two engines of one process meet, or the host's metrics are touched."""
    before = generate_latest(REGISTRY).count(b"replication_")
    registry = CollectorRegistry()
    for node_id in ("b", "c"):
        engine = ReplicationEngine(nodes.config(node_id=node_id), registry=registry)
        async with engine:
            assert engine.is_running
    for node_id in ("b", "c"):
        assert registry.get_sample_value("replication_engine_state", {"node_id": node_id}) == 4
    assert generate_latest(REGISTRY).count(b"replication_") == before == 0


async def test_credentials_never_reach_a_log_an_error_or_a_metric(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails a password of a URL is shown."""
    caplog.set_level(logging.DEBUG, logger="fsm_replication")
    secret = PeerConfig(node_id="a", redis_url="redis://user:s3cret@127.0.0.1:1")
    registry = CollectorRegistry()
    settings = Settings(startup=StartupConfig(timeout=0.2))
    engine = ReplicationEngine(nodes.config(secret, settings=settings), registry=registry)
    with pytest.raises(Exception, match="no peer could be reached") as raised:
        await engine.start()
    shown = [str(raised.value), repr(raised.value), repr(engine), repr(engine.config)]
    shown += [str(engine.health_check()), str(engine.journal), str(generate_latest(registry))]
    shown += [str(r.__dict__) for r in caplog.records]
    assert not [text for text in shown if "s3cret" in text]
    assert any("***@127.0.0.1" in text for text in shown)


def test_fields_whose_names_are_taken_do_not_break_a_log_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If this fails a log event with a field called "name" raises instead of logging."""
    caplog.set_level(logging.INFO, logger="fsm_replication")
    get_logger("x", name="n").info("event_name", args=1, url="redis://a:b@c", error=OSError("d"))
    (found,) = caplog.records
    assert found.getMessage().startswith("event name: ")
    assert vars(found)["event"] == "event_name"
    assert vars(found)["args_"] == 1
    assert vars(found)["url"] == "redis://***@c"
    assert vars(found)["error"] == "OSError: d"


async def test_health_and_state_may_be_read_from_any_thread(nodes: Nodes, peer: Peer) -> None:
    """If this fails a health endpoint of another thread crashes now and then."""
    failures: list[BaseException] = []
    done = threading.Event()
    async with nodes.engine(peer_config(peer.server)) as engine:

        def look() -> None:
            try:
                while not done.is_set():
                    assert engine.state in EngineState
                    assert engine.health_check().peers_total == 1
                    assert isinstance(engine.journal, tuple)
            except BaseException as error:  # noqa: BLE001 - it is handed to the test
                failures.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        for _ in range(20):
            await engine.pause("a")
            await engine.resume("a")
            await asyncio.sleep(0.005)
        done.set()
        thread.join()
    assert not failures
