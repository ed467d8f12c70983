"""Runs one node in the foreground, and checks one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from fsm_replication.cli.cursors import opened_cursors
from fsm_replication.config import ReplicationConfig
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import AlreadyRunningError, ConfigError, ReplicationError
from fsm_replication.foreign import DOTTED
from fsm_replication.items import LastWriterWins
from fsm_replication.log import get_logger
from fsm_replication.ports import PeerRecord, SystemClock, SystemWallClock
from fsm_replication.printable import printable
from fsm_replication.stores import (
    MemorySyncEngine,
    NoOpSyncEngine,
    RedisSyncEngine,
    SyncEngine,
)
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.connector import open_lines
from fsm_replication.workers.peer_clock import WARN_FROM_SEC, PeerClock

__all__ = ("check_node", "open_store", "run_node")

# What open_store() gives to a store on Redis besides what no running engine can change.
_STORE_SETTINGS: Final = frozenset(
    {"settings.limits.payload_bytes", "settings.timeouts.store_call"}
)


@asynccontextmanager
async def open_store(config: ReplicationConfig) -> AsyncIterator[SyncEngine]:
    """Open the store that ``store.kind`` names, and close it in the end.

    :raises ConfigError: if the configuration names none.
    :raises StoreError: if it cannot be opened.
    """
    store, tombstones = config.store, config.settings.tombstones
    if store is None:
        raise ConfigError(["store.kind: needed to run a node: redis, memory or noop"])
    if store.kind == "redis":
        assert store.redis_url is not None
        async with RedisSyncEngine(
            store.redis_url,
            node_id=config.local_node_id,
            redis_prefix=store.redis_prefix,
            stream_maxlen=store.stream_maxlen,
            layouts=store.layouts,
            tombstone_ttl_sec=tombstones.ttl,
            tombstone_grace_sec=tombstones.grace,
            payload_bytes=config.settings.limits.payload_bytes,
            timeout_sec=config.settings.timeouts.store_call,
            allow_eviction=store.allow_eviction,
        ) as engine:
            yield engine
    elif store.kind == "memory":
        yield MemorySyncEngine(
            node_id=config.local_node_id,
            tombstone_ttl_sec=tombstones.ttl,
            tombstone_grace_sec=tombstones.grace,
        )
    else:
        yield NoOpSyncEngine()


async def run_node(config: ReplicationConfig, path: Path) -> None:
    """Run until SIGINT or SIGTERM, or until the engine fails; SIGHUP loads ``path`` again.

    :raises ReplicationError: what the engine failed of.
    """
    log = get_logger("cli", node_id=config.local_node_id)
    _log_warnings(config)
    loop = asyncio.get_running_loop()
    asked, reload_asked = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    loop.add_signal_handler(signal.SIGHUP, reload_asked.set)
    async with open_store(config) as store:
        engine = ReplicationEngine(config, sync_engine=store)
        starting = asyncio.create_task(engine.start(), name="start")
        closed = asyncio.create_task(engine.wait_closed(), name="closed")
        stopping = asyncio.create_task(asked.wait(), name="signal")
        reloading = asyncio.create_task(_keep_reloading(engine, path, reload_asked), name="reload")
        try:
            await asyncio.wait((closed, stopping, reloading), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                log.info("stopping", why="a signal")
        finally:
            stopping.cancel()
            reloading.cancel()
            await engine.shutdown()
            # What start() raises is the engine's kept error, which is raised below.
            await asyncio.gather(starting, closed, stopping, return_exceptions=True)
            await asyncio.wait((reloading,))
        if engine.error is not None:
            raise engine.error
        if not reloading.cancelled():
            reloading.result()


def _log_warnings(config: ReplicationConfig) -> None:
    log = get_logger("cli", node_id=config.local_node_id)
    for warning in config.warnings:
        log.warning("configuration", problem=warning)


async def _keep_reloading(engine: ReplicationEngine, path: Path, asked: asyncio.Event) -> None:
    """Load the configuration again whenever that is asked for, until cancelled.

    One that cannot be loaded, or not be put in force, is reported, and the old one stays.
    """
    log = get_logger("cli", node_id=engine.node_id)
    while True:
        await asked.wait()
        asked.clear()
        try:
            config = await asyncio.to_thread(ReplicationConfig.load, path)
            _refuse_store_settings(engine.config, config)
            change = await engine.update_config(config)
        except ReplicationError as error:
            told = {"path": str(path), "error": error, "in_force": "the old one"}
            log.error("configuration_refused", **told)  # noqa: TRY400 - it is no crash
            continue
        _log_warnings(config)
        log.info("configuration_reloaded", path=str(path), change=str(change))


def _refuse_store_settings(old: ReplicationConfig, new: ReplicationConfig) -> None:
    """Refuse what the store was opened with and the engine could change.

    :raises ConfigError: if any of it would change.
    """
    if old.store is None or old.store.kind != "redis":
        return
    problems = [
        f"{name}: the store was opened with it; stop the node and start it anew"
        for name in sorted(_STORE_SETTINGS.intersection(old.changed_paths(new)))
    ]
    if problems:
        raise ConfigError(problems)


async def check_node(config: ReplicationConfig, console: Console) -> bool:
    """Say whether the store, the cursor file and each peer answer; True if all do."""
    well = True
    for warning in config.warnings:
        _doubt(console, warning)
    try:
        async with open_store(config) as store:
            kind = config.store.kind if config.store is not None else "none"
            _fine(console, f"store: {kind} is ready")
            for warning in store.warnings if isinstance(store, RedisSyncEngine) else ():
                _doubt(console, f"store: {warning}")
    except ReplicationError as error:
        well = False
        _wrong(console, f"store: {error}")
    well = await _check_cursor(config, console) and well
    if not config.peers:
        _doubt(console, "peers: none is configured")
    for peer in sorted(config.peers, key=lambda peer: peer.priority):
        peer_clock = PeerClock(SystemClock(), SystemWallClock(), get_logger("cli"))
        try:
            lines = await open_lines(
                local_node_id=config.local_node_id,
                peer=peer,
                settings=config.settings,
                resolver=LastWriterWins.name,
                transport=RedisTransport(),
                publishes_dotted=config.store is not None and DOTTED in config.store.layouts,
                peer_clock=peer_clock,
            )
        except ReplicationError as error:
            well = False
            _wrong(console, f"peer {peer.node_id}: {error}")
            continue
        lines.close()
        await lines.wait_closed()
        whose = "a foreign node" if lines.foreign else "a node of ours"
        _fine(console, f"peer {peer.node_id}: {peer.display_url} answers, {whose}")
        well = _show_clock(peer.node_id, peer_clock, console) and well
    return well


def _show_clock(node_id: str, peer_clock: PeerClock, console: Console) -> bool:
    """Say how a peer's clock stands to ours; False if they are so far apart that its link pauses."""
    skew, far = peer_clock.skew_sec, peer_clock.is_day_off()
    agrees = skew is not None and abs(skew) < WARN_FROM_SEC
    say = _wrong if far else _fine if agrees else _doubt
    say(console, f"clock of peer {node_id}: {peer_clock.tell()}")
    return not far


async def _check_cursor(config: ReplicationConfig, console: Console) -> bool:
    path = config.cursor.sqlite_path
    try:
        async with opened_cursors(config, read_only=False):
            pass
    except AlreadyRunningError:
        _doubt(console, f"cursors: a node is running with {path}")
    except ReplicationError as error:
        _wrong(console, f"cursors: {error}")
        return False
    else:
        _fine(console, f"cursors: {path} can be used")
    return await _check_books(config, console)


async def _check_books(config: ReplicationConfig, console: Console) -> bool:
    """Say what waits for a person, as the cursor file tells it; False if that is the interlock."""
    well = True
    try:
        async with opened_cursors(config, read_only=True) as store:
            for peer in config.peers:
                well = _show_books(peer.node_id, await store.load(peer.node_id), console) and well
    except ReplicationError as error:
        _doubt(console, f"cursors: {error}")
    return well


def _show_books(peer_id: str, record: PeerRecord, console: Console) -> bool:
    well = record.interlock is None or not record.interlock.tripped
    if record.interlock is not None and not well:
        _wrong(console, f"peer {peer_id}: the interlock: {record.interlock.tripped}")
    if record.operator_pause:
        _doubt(console, f"peer {peer_id}: paused by an operator")
    if record.dead_letters:
        _doubt(console, f"peer {peer_id}: {record.dead_letters} dead letters are kept")
    if record.gaps:
        _doubt(console, f"peer {peer_id}: {len(record.gaps)} gaps are open in the ledger")
    return well


def _fine(console: Console, text: str) -> None:
    console.print(Text.assemble(("✓", "green"), f" {printable(text)}"))


def _doubt(console: Console, text: str) -> None:
    console.print(Text.assemble(("!", "yellow"), f" {printable(text)}"))


def _wrong(console: Console, text: str) -> None:
    console.print(Text.assemble(("✗", "red"), f" {printable(text)}"))
