"""Peers and stores that come back from backups, and keys that cannot be taken (G2, G5, G13).

Most are whole engines on virtual time; what INFO tells of a server's run changes when it is restored.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest
import redis
from conftest import DEADLINE_SEC, Nodes, peer_config, until, until_async
from foreign_node import ForeignNode

from fsm_replication.cli.repair import explain_node
from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    LimitsConfig,
    PeerConfig,
    ReconnectConfig,
    Settings,
    StartupConfig,
    StoreConfig,
    TombstonesConfig,
)
from fsm_replication.cursor import SqliteCursorStore
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import PeerReplyError, StoreError
from fsm_replication.health import PeerHealth
from fsm_replication.items import DAY_MS, SyncItem, content_hash
from fsm_replication.ports import LONG_AGO_MS, Agreement
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.stream import encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.testing.local_mesh import START_MS, LocalMesh, topology
from fsm_replication.testing.sim_dialects import REDIS_6_2, REDIS_7_0, Dialect
from fsm_replication.testing.sim_redis import SimRedis
from fsm_replication.testing.virtual_time import run
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.comparer import Comparer
from fsm_replication.workers.guards import EXCEPTIONS_MAX, StaleGuard
from fsm_replication.workers.history import ask_run_id

TTL_SEC: Final = 90.0
GRACE_SEC: Final = 10.0
CYCLE_SEC: Final = 25.0
MONTH_MS: Final = 30 * DAY_MS
LIMIT_BYTES: Final = 1000
FAR_MS: Final = 4_102_444_800_000
DELETED: Final = frozenset(f"deleted{number}" for number in range(10))
DIALECTS: Final = pytest.mark.parametrize("dialect", [REDIS_7_0, REDIS_6_2], ids=lambda d: d.name)

Trace = Callable[[LocalMesh], Awaitable[None]]


def on_virtual_time(trace: Trace, dialect: Dialect = REDIS_7_0) -> None:
    """Run a trace on a mesh of a and b, whose tombstones are kept for a short time."""
    settings = Settings(
        hot_path=HotPathConfig(block_timeout=20),
        cold_path=ColdPathConfig(interval_sec=20),
        tombstones=TombstonesConfig(ttl=TTL_SEC, grace=GRACE_SEC),
        startup=StartupConfig(when_no_peer="run"),
        limits=LimitsConfig(payload_bytes=LIMIT_BYTES, batch_bytes=LIMIT_BYTES * 100),
    )

    async def work() -> None:
        mesh = LocalMesh(
            "ab", topology("mesh", "ab"), settings=settings, dialect=lambda _name: dialect
        )
        try:
            await trace(mesh)
        finally:
            await mesh.close()

    run(work, start_ms=START_MS)


def engine_of(mesh: LocalMesh, name: str = "b") -> ReplicationEngine:
    """Return the engine of a node that runs."""
    engine = mesh.nodes[name].engine
    assert engine is not None
    return engine


def health(mesh: LocalMesh, reader: str = "b") -> PeerHealth:
    """Return the health of a node's only link."""
    return engine_of(mesh, reader).health_check().peers[0]


def live(mesh: LocalMesh, name: str) -> set[str]:
    """Return the keys that a node holds live."""
    return {key for key, item in mesh.nodes[name].store.items().items() if not item.deleted}


def copies(mesh: LocalMesh, reader: str = "b") -> int:
    """Return how often a node's link began to copy since its engine started."""
    return sum(record.dest == PeerState.BOOTSTRAPPING for record in engine_of(mesh, reader).journal)


async def until_it_is(condition: Callable[[], object], what: str) -> None:
    """Let virtual time pass until something holds; half an hour is long enough."""
    for _ in range(1800):
        if condition():
            return
        await asyncio.sleep(1)
    raise AssertionError(f"this never came: {what}")


def at_head(mesh: LocalMesh, reader: str = "b") -> bool:
    """Whether a node's link reads at the head."""
    return health(mesh, reader).state is PeerState.TAILING


def agreed_since(mesh: LocalMesh, at_ms: int, reader: str = "b") -> bool:
    """Whether a node's link has agreed since a time."""
    return (health(mesh, reader).agreed_at or 0) >= at_ms


def now_ms(mesh: LocalMesh) -> int:
    """Return the time of day."""
    return mesh.nodes["b"].wall_clock.now_ms()


async def both_agree(mesh: LocalMesh) -> None:
    """Start both nodes, and wait until they hold the same and say so."""
    for name in "ab":
        await mesh.start(name)
    await asyncio.sleep(1)
    since = now_ms(mesh)
    await until_it_is(lambda: agreed_since(mesh, since), "an agreement")


def refuse_info(server: SimRedis) -> None:
    """Let a server refuse INFO, as it does to a user without that permission."""

    def refuse(_: list[bytes]) -> Any:
        raise PeerReplyError("NOPERM this user has no permissions to run the 'info' command")

    make = server.session

    def session() -> Any:
        made = make()
        made._table[b"INFO"] = (-1, refuse)
        return made

    server.session = session  # type: ignore[method-assign]


def put_far_ahead(key: str) -> SyncItem:
    """Return an item that was stamped by a clock that was decades ahead."""
    return SyncItem(key, b"x", "binary", content_hash(b"x"), 1, FAR_MS)


# A peer that came back older (G5) -----------------------------------------------------------------


def test_a_marker_that_is_lost_alone_revives_nothing() -> None:
    """If this fails agreements go with the marker, and old items are taken as if they were young."""

    async def trace(mesh: LocalMesh) -> None:
        a, b = mesh.nodes["a"], mesh.nodes["b"]
        a.store.put("k", b"x")
        a.store.put("other", b"x")
        await both_agree(mesh)
        mesh.cut("b", "a")
        mesh.cut("a", "b")
        b.store.delete("k")
        await asyncio.sleep(TTL_SEC + GRACE_SEC + 60)
        assert "k" not in b.store.items()
        mesh.trim("b", 0)
        b.server.execute("DEL", b.store.keys.marker)
        await asyncio.sleep(30)
        mesh.heal("b", "a")
        await until_it_is(lambda: at_head(mesh), "the head")
        await asyncio.sleep(3 * CYCLE_SEC)
        assert live(mesh, "b") == {"other"}
        assert health(mesh).stale_held_back == 1

    on_virtual_time(trace)


async def nothing() -> None:
    """Do nothing."""


async def forgotten_deletes(mesh: LocalMesh, then: Callable[[], Awaitable[None]] = nothing) -> Any:
    """Return a backup of a with ten items, and let everybody forget that they were deleted.

    ``then`` is awaited right after the backup was made.
    """
    a = mesh.nodes["a"].store
    for key in DELETED:
        a.put(key, b"x")
    a.put("kept", b"x")
    await both_agree(mesh)
    backup = mesh.snapshot("a")
    await then()
    for key in DELETED:
        a.delete(key)
    await both_agree(mesh)
    a.put("later", b"x")
    await asyncio.sleep(TTL_SEC + GRACE_SEC + 10)
    await both_agree(mesh)
    assert live(mesh, "b") == {"kept", "later"}
    assert not DELETED & mesh.nodes["b"].store.items().keys()
    await mesh.stop("a")
    return backup


async def held_back(
    mesh: LocalMesh,
    backup: Any,
    *,
    writes: int,
    keep: int | None = None,
    come_back: Callable[[SimRedis, Any], None] = SimRedis.load,
) -> None:
    """Restore a, write there before b is back, and see what b takes of it."""
    await mesh.stop("b")
    come_back(mesh.servers["a"], backup)
    mesh.nodes["a"].store.crashed()
    for number in range(writes):
        mesh.nodes["a"].store.put("new", b"%d" % number)
    if keep is not None:
        mesh.trim("a", keep)
    await mesh.start("b")
    await until_it_is(lambda: at_head(mesh), "the head")
    await asyncio.sleep(CYCLE_SEC)
    assert live(mesh, "b") == {"kept", "later"} | ({"new"} if writes else set())
    assert health(mesh).stale_held_back == len(DELETED)
    assert set(engine_of(mesh).stale_keys("a")) == DELETED


@DIALECTS
def test_a_write_after_the_restore_hides_nothing(dialect: Dialect) -> None:
    """If this fails all deletes are undone that a peer's backup does not know of."""

    async def trace(mesh: LocalMesh) -> None:
        await held_back(mesh, await forgotten_deletes(mesh), writes=1)
        # A person's word, and all is well.
        await engine_of(mesh).repair("a", accept_stale=True)
        assert live(mesh, "b") == {"kept", "later", "new"} | DELETED
        assert health(mesh).stale_held_back == 0

    on_virtual_time(trace, dialect)


@pytest.mark.slow
@DIALECTS
@pytest.mark.parametrize("writes", [0, 2, 200])
@pytest.mark.parametrize("info", [True, False], ids=["run_id", "no run_id"])
def test_a_restored_peer_revives_nothing_whatever_it_writes(
    dialect: Dialect, writes: int, info: bool
) -> None:
    """If this fails some number of writes makes an old peer look like a young one."""

    async def trace(mesh: LocalMesh) -> None:
        if not info:
            refuse_info(mesh.servers["a"])
        await held_back(mesh, await forgotten_deletes(mesh), writes=writes)

    on_virtual_time(trace, dialect)


@pytest.mark.parametrize("info", [True, False], ids=["run_id", "no run_id"])
def test_counts_of_another_run_explain_no_trim(info: bool) -> None:
    """If this fails enough writes and a MAXLEN after a restore look like an ordinary trim."""

    async def trace(mesh: LocalMesh) -> None:
        if not info:
            refuse_info(mesh.servers["a"])
        await held_back(mesh, await forgotten_deletes(mesh), writes=60, keep=1)

    on_virtual_time(trace)


@DIALECTS
def test_a_backup_that_came_by_replication_explains_no_trim(dialect: Dialect) -> None:
    """If this fails REPLICAOF a backup, which starts no server, makes an old peer look young."""

    async def trace(mesh: LocalMesh) -> None:
        backup = await forgotten_deletes(mesh)
        await held_back(mesh, backup, writes=60, keep=1, come_back=SimRedis.replicate)

    on_virtual_time(trace, dialect)


async def test_a_real_server_that_took_anothers_data_is_another(
    redis_servers: Callable[[], RedisServer],
) -> None:
    """If this fails a run that changed its data vouches for positions in what it held before."""
    server, backup = redis_servers(), redis_servers()
    asking = await RedisTransport().connect(server.url, timeout_sec=DEADLINE_SEC, name="test")
    with redis.Redis(port=server.port) as client, redis.Redis(port=backup.port) as other:
        other.config_set("repl-diskless-sync-delay", 0)
        before = await ask_run_id(asking, DEADLINE_SEC)
        assert before
        client.set("k", b"x")
        assert await ask_run_id(asking, DEADLINE_SEC) == before
        run_id = info_of(client, "server")["run_id"]
        client.replicaof("127.0.0.1", str(backup.port))
        await until(
            lambda: info_of(client, "replication")["master_link_status"] == "up",
            "what the other holds",
        )
        client.replicaof("NO", "ONE")
        assert info_of(client, "server")["run_id"] == run_id
        again = await RedisTransport().connect(server.url, timeout_sec=DEADLINE_SEC, name="test")
        assert await ask_run_id(again, DEADLINE_SEC) not in ("", before)
    for connection in (asking, again):
        connection.close()
        await connection.wait_closed()


def info_of(client: redis.Redis, section: str) -> dict[str, Any]:
    """Return a section of a server's INFO."""
    told: Any = client.info(section)
    return dict(told)


def configure_b(mesh: LocalMesh, **parts: Any) -> None:
    """Have b's next start go by other parts of its settings."""
    b = mesh.nodes["b"]
    settings = b.config.settings.model_copy(update=parts)
    b.config = b.config.model_copy(update={"settings": settings})


def read_by_trees_alone(mesh: LocalMesh) -> None:
    """Have b's next start leave the hot path out, as a repair of a stopped node does too."""
    configure_b(mesh, hot_path=HotPathConfig(enabled=False))


@DIALECTS
@pytest.mark.parametrize("writes", [0, 1, 60])
@pytest.mark.parametrize("since", ["ever", "the backup", "the restore"])
def test_a_restored_peer_revives_nothing_without_a_hot_path(
    dialect: Dialect, since: str, writes: int
) -> None:
    """If this fails comparing trees takes back all deletes that a peer's backup does not know of."""

    async def trace(mesh: LocalMesh) -> None:
        if since == "ever":
            read_by_trees_alone(mesh)

        async def stay_away() -> None:
            if since == "the backup":
                await mesh.stop("b")
                read_by_trees_alone(mesh)

        backup = await forgotten_deletes(mesh, stay_away)
        await mesh.stop("b")
        mesh.servers["a"].load(backup)
        mesh.nodes["a"].store.crashed()
        for number in range(writes):
            mesh.nodes["a"].store.put("new", b"%d" % number)
        read_by_trees_alone(mesh)
        await mesh.start("b")
        await until_it_is(lambda: health(mesh).state is PeerState.STANDBY, "the link")
        await asyncio.sleep(3 * CYCLE_SEC)
        assert live(mesh, "b") == {"kept", "later"} | ({"new"} if writes else set())
        assert set(engine_of(mesh).stale_keys("a")) == DELETED

    on_virtual_time(trace, dialect)


def written_long_ago(key: str) -> SyncItem:
    """Return an item that a third node has made long ago."""
    return SyncItem(key, b"x", "binary", content_hash(b"x"), 1, START_MS - round(5000 * TTL_SEC))


@pytest.mark.parametrize("skew_ms", [0, -5000])
def test_seconds_between_clocks_make_no_peer_older(skew_ms: int) -> None:
    """If this fails a peer that was started again has its old items held back, for good."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"]
        await both_agree(mesh)
        for number in range(20):
            a.store.put("k", b"%d" % number)
            await asyncio.sleep(0.1)
        mesh.restore("a", mesh.snapshot("a"))
        a.wall_clock.skew_ms = skew_ms
        await a.store.apply_many([written_long_ago("old")])
        await until_it_is(lambda: "old" in live(mesh, "b"), "what is old but new here")
        assert (health(mesh).agreed_at or 0) > LONG_AGO_MS

    on_virtual_time(trace)


@pytest.mark.parametrize("info", [True, False], ids=["run_id", "no run_id"])
def test_ids_ahead_of_a_clock_cost_no_copy_for_each_connection(info: bool) -> None:
    """If this fails a peer whose clock was wrong once is copied again and again."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"]
        if not info:
            refuse_info(mesh.servers["a"])
        a.wall_clock.skew_ms = 3_600_000
        a.store.put("k", b"ahead")
        a.wall_clock.skew_ms = 0
        await both_agree(mesh)
        before = copies(mesh)
        for number in range(5):
            mesh.cut("b", "a")
            await asyncio.sleep(1)
            mesh.heal("b", "a")
            a.store.put("other", b"%d" % number)
            await asyncio.sleep(CYCLE_SEC)
        assert at_head(mesh)
        assert (copies(mesh) - before, health(mesh).gaps_open) == (0, 0)

    on_virtual_time(trace)


@pytest.mark.parametrize("cold", [True, False], ids=["a cycle", "by hand"])
def test_what_comes_while_trees_are_compared_is_read_after_it(
    cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails entries that a comparison has not seen are passed over as if it had (G1)."""
    compare = Comparer.differing_buckets
    keys = {"old0", "old1", "old2"}

    async def trace(mesh: LocalMesh) -> None:
        a, b = mesh.nodes["a"].store, mesh.nodes["b"]
        configure_b(mesh, cold_path=ColdPathConfig(enabled=cold, interval_sec=20))
        for name in "ab":
            await mesh.start(name)
        await until_it_is(lambda: at_head(mesh), "the head")
        left = sorted(keys)

        async def slowly(
            self: Comparer, our_root: bytes | None = None, *, both: bool = False
        ) -> list[str]:
            found = await compare(self, our_root, both=both)
            b.store.delay_sec = 0.3 if left else 0.0
            while left:
                await a.apply_many([written_long_ago(left.pop())])
                await asyncio.sleep(0.05)
            return found

        monkeypatch.setattr(Comparer, "differing_buckets", slowly)
        if not cold:
            await engine_of(mesh).repair("a")
        await until_it_is(lambda: not left, "a comparison")
        b.store.delay_sec = 0.0
        # Before the next cycle.
        await asyncio.sleep(10)
        assert keys <= live(mesh, "b")

    on_virtual_time(trace)


def test_a_backup_that_comes_while_the_line_stands_revives_nothing() -> None:
    """If this fails REPLICAOF a backup is not noticed by a node that reads no stream."""

    async def trace(mesh: LocalMesh) -> None:
        read_by_trees_alone(mesh)
        backup = await forgotten_deletes(mesh)
        await until_it_is(lambda: health(mesh).state is PeerState.STANDBY, "the link")
        mesh.servers["a"].replicate(backup)
        mesh.nodes["a"].store.crashed()
        for number in range(60):
            mesh.nodes["a"].store.put("new", b"%d" % number)
        mesh.trim("a", 1)
        await asyncio.sleep(3 * CYCLE_SEC)
        assert not DELETED & live(mesh, "b")
        assert set(engine_of(mesh).stale_keys("a")) == DELETED

    on_virtual_time(trace)


def test_a_peer_restored_during_a_copy_revives_nothing() -> None:
    """If this fails a bootstrap that goes on takes what an older peer holds as if it were young."""

    async def trace(mesh: LocalMesh) -> None:
        backup = await forgotten_deletes(mesh)
        mesh.nodes["a"].store.put("last", b"x")
        mesh.trim("a", 0)
        mesh.nodes["a"].store.put("last", b"y")
        b = mesh.nodes["b"]
        # The copy begins, and its store fails for as long as the peer lives.
        await mesh.stop("b")
        b.store.accepting_writes = False
        await mesh.start("b")
        await until_it_is(lambda: b.cursors.snapshot().tables().peers["a"].bootstrap, "a copy")
        await mesh.stop("b")
        b.store.accepting_writes = True
        mesh.restore("a", backup)
        mesh.nodes["a"].store.put("new", b"x")
        await mesh.start("b")
        await until_it_is(lambda: at_head(mesh), "the head")
        await asyncio.sleep(CYCLE_SEC)
        assert live(mesh, "b") == {"kept", "later", "new"}

    on_virtual_time(trace)


def test_a_peer_that_only_restarts_is_not_copied() -> None:
    """If this fails each restart of a peer's server costs a copy, or makes an agreement older."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        a.put("k", b"x")
        await both_agree(mesh)
        before, agreed_at = copies(mesh), health(mesh).agreed_at
        for number in range(3):
            mesh.restore("a", mesh.snapshot("a"))
            await asyncio.sleep(5)
            a.put("k", b"%d" % number)
            await asyncio.sleep(5)
        assert at_head(mesh)
        assert copies(mesh) == before
        assert (health(mesh).agreed_at or 0) >= (agreed_at or 1)
        # The restarted server vouches for what was read of it, although nothing came since.
        mesh.restore("a", mesh.snapshot("a"))
        await asyncio.sleep(10)
        await mesh.stop("b")
        mesh.trim("a", 0)
        a.put("k", b"behind a trim that took nothing unread")
        await mesh.start("b")
        await until_it_is(lambda: at_head(mesh), "the head")
        assert copies(mesh) == 0

    on_virtual_time(trace)


@DIALECTS
@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "same run"])
def test_after_a_trim_equal_trees_agree_without_a_person(dialect: Dialect, restart: bool) -> None:
    """If this fails a trim that was ordinary life makes somebody wait for a word."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        a.put("old", b"x")
        await both_agree(mesh)
        await asyncio.sleep(TTL_SEC)
        await both_agree(mesh)
        await mesh.stop("b")
        agreed_at = mesh.nodes["b"].cursors.snapshot().tables().peers["a"].agreement
        assert agreed_at is not None
        for number in range(4):
            a.put("k", b"%d" % number)
        mesh.trim("a", 1)
        if restart:
            mesh.restore("a", mesh.snapshot("a"))
        seen: list[int] = []
        guarded = StaleGuard.agreed
        with pytest.MonkeyPatch.context() as patch:

            def note(guard: StaleGuard, agreement: Any) -> None:
                seen.append(-1 if agreement is None else agreement.at_ms)
                guarded(guard, agreement)

            patch.setattr(StaleGuard, "agreed", note)
            await mesh.start("b")
            since = now_ms(mesh)
            await until_it_is(lambda: agreed_since(mesh, since), "an agreement")
        assert copies(mesh) == 1
        assert (LONG_AGO_MS in seen) == restart
        assert live(mesh, "b") == {"old", "k"}
        assert health(mesh).stale_held_back == 0
        assert health(mesh).gaps_open == 0

    on_virtual_time(trace, dialect)


@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "same run"])
def test_nothing_read_of_an_empty_stream_is_believed_in_the_same_run(restart: bool) -> None:
    """If this fails each first entry of a peer costs a copy, or a restored peer's are lost."""

    async def trace(mesh: LocalMesh) -> None:
        await both_agree(mesh)
        await mesh.stop("b")
        if restart:
            mesh.restore("a", mesh.snapshot("a"))
        mesh.nodes["a"].store.put("first", b"x")
        await mesh.start("b")
        await until_it_is(lambda: at_head(mesh) and live(mesh, "b") == {"first"}, "the first")
        assert copies(mesh) == restart
        # What came first came after the agreement, so nobody is older than he was.
        assert (health(mesh).agreed_at or 0) > LONG_AGO_MS

    on_virtual_time(trace)


@pytest.mark.timeout(120)
async def test_a_real_peer_that_was_restored_is_told_apart(
    nodes: Nodes, new_redis_server: Callable[..., RedisServer]
) -> None:
    """If this fails counts and ids of a real server hide that it has loaded an older file."""
    server = new_redis_server()
    saved = server.folder / "dump.rdb"
    month_ago = int(time.time() * 1000) - MONTH_MS
    old = SyncItem("revived", b"x", "binary", content_hash(b"x"), 1, month_ago)
    async with RedisSyncEngine(server.url, node_id="a") as store:
        await store.put("kept", b"x")
        await store._call("SAVE")
        shutil.copy(saved, server.folder / "young.rdb")
        await store.apply_many([old])
        # As if all of it were a month old.
        await store._call("DEL", store.keys.stream)
        await store._call("XADD", store.keys.stream, f"{month_ago}-0", *encode_fields(old))
        await store._call("SAVE")
        shutil.copy(saved, server.folder / "backup.rdb")
    _restore(server, "young.rdb")
    ours = MemorySyncEngine(node_id="b")
    settings = Settings(
        cold_path=ColdPathConfig(interval_sec=0.2), reconnect=ReconnectConfig(first=0.05)
    )
    async with nodes.engine(peer_config(server), store=ours, settings=settings) as engine:
        async with RedisSyncEngine(server.url, node_id="a") as store:
            for number in range(30):
                await store.put("later", b"%d" % number)
        await until_async(lambda: ours.get("later"))
        agreed_at = engine.health_check().peers[0].agreed_at or 0
        await until(lambda: (engine.health_check().peers[0].agreed_at or 0) > agreed_at)
        server.kill()
        await engine.wait_for_state(PeerState.BACKOFF, peer_id="a", timeout=DEADLINE_SEC)
        _restore(server, "backup.rdb")
        # The link may be back between any two of these writes.
        async with RedisSyncEngine(server.url, node_id="a") as store:
            for number in range(200):
                await store.put("new", b"%d" % number)
            await store._call("XTRIM", store.keys.stream, "MAXLEN", 1)
            await store.put("last", b"x")
        await until_async(lambda: ours.get("last"))
        await until(lambda: engine.stale_keys("a") == ("revived",))
        assert await ours.get("revived") is None


def _restore(server: RedisServer, name: str) -> None:
    server.kill()
    shutil.copy(server.folder / name, server.folder / "dump.rdb")
    server.start()


# A local store that came back older (G2) ----------------------------------------------------------


@pytest.mark.parametrize("alive", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize(
    "trimmed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["trimmed", "whole"]
)
def test_a_store_from_before_a_peer_was_read_gets_all_of_it(alive: bool, trimmed: bool) -> None:
    """If this fails a node whose Redis was restored lacks a peer's items for good, and is proud."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        backup = mesh.snapshot("b")
        await both_agree(mesh)
        for number in range(60):
            a.put(f"k{number}", b"x")
        await both_agree(mesh)
        if trimmed:
            mesh.trim("a", 0)
        if not alive:
            await mesh.stop("b")
        mesh.restore("b", backup)
        await mesh.start("b")
        await until_it_is(lambda: len(live(mesh, "b")) == 60, "all items")
        assert [record.why for record in engine_of(mesh).journal if record.trigger == "bootstrap"]
        since = now_ms(mesh)
        await until_it_is(lambda: agreed_since(mesh, since), "an agreement")

    on_virtual_time(trace)


def test_a_store_restored_from_long_ago_waits_for_nobody() -> None:
    """If this fails a restored node holds its peer's old items back, as if it had agreed on them."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        a.put("first", b"x")
        await both_agree(mesh)
        backup = mesh.snapshot("b")
        for number in range(20):
            a.put(f"k{number}", b"x")
        await both_agree(mesh)
        mesh.trim("a", 1)
        await mesh.stop("b")
        await asyncio.sleep(3 * TTL_SEC)
        mesh.restore("b", backup)
        assert live(mesh, "b") == {"first"}
        await mesh.start("b")
        await until_it_is(lambda: len(live(mesh, "b")) == 21, "all items")
        assert health(mesh).stale_held_back == 0

    on_virtual_time(trace)


def test_an_empty_store_has_agreed_on_nothing() -> None:
    """If this fails a node that lost its Redis after a long outage holds everything back."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        for number in range(20):
            a.put(f"k{number}", b"x")
        await both_agree(mesh)
        await mesh.stop("b")
        await asyncio.sleep(2 * TTL_SEC)
        mesh.wipe("b")
        await mesh.start("b")
        await until_it_is(lambda: len(live(mesh, "b")) == 20, "all items")
        assert health(mesh).stale_held_back == 0

    on_virtual_time(trace)


def test_a_store_that_lost_a_second_keeps_an_old_agreement() -> None:
    """If this fails a crash of the node's own Redis lets a peer revive what it slept through."""

    async def trace(mesh: LocalMesh) -> None:
        a, b = mesh.nodes["a"].store, mesh.nodes["b"].store
        a.put("deleted", b"x")
        await both_agree(mesh)
        await mesh.stop("a")
        mesh.cut("b", "a")
        b.delete("deleted")
        await asyncio.sleep(TTL_SEC + GRACE_SEC + 10)
        assert "deleted" not in b.items()
        before = mesh.snapshot("b")
        # The peer is back, and one entry of it gets here just before the crash.
        a.put("young", b"x")
        mesh.heal("b", "a")
        await until_it_is(lambda: "young" in live(mesh, "b"), "the young item")
        assert live(mesh, "b") == {"young"}
        mesh.restore("b", before)
        await until_it_is(lambda: "young" in live(mesh, "b"), "the young item")
        await asyncio.sleep(CYCLE_SEC)
        assert live(mesh, "b") == {"young"}
        assert health(mesh).stale_held_back == 1

    on_virtual_time(trace)


async def _holds(store: RedisSyncEngine, key: str) -> bool:
    try:
        return await store.get(key) is not None
    except StoreError:
        return False  # Its connection has to be made anew first.


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "how", [pytest.param("tailing", marks=pytest.mark.slow), "standby", "asked"]
)
async def test_what_was_taken_of_a_foreign_peer_is_taken_again_after_a_restore(
    nodes: Nodes, redis_server: RedisServer, new_redis_server: Callable[..., RedisServer], how: str
) -> None:
    """If this fails a restored store lacks a foreign peer's items, and nothing ever brings them."""
    own = new_redis_server()
    foreign = ForeignNode(redis_server)
    for number in range(60):
        foreign.put(f"k.{number}", b"x")
    foreign.write_tree()
    foreign.publish("k.0", b"x")
    settings = Settings(
        hot_path=HotPathConfig(enabled=how == "tailing"),
        cold_path=ColdPathConfig(interval_sec=3600 if how == "asked" else 0.2),
    )

    async def ask(engine: ReplicationEngine) -> None:
        if how == "asked":
            await engine.repair()

    async with RedisSyncEngine(own.url, node_id="b") as store:
        await store._call("SAVE")
        shutil.copy(own.folder / "dump.rdb", own.folder / "backup.rdb")
        async with nodes.engine(
            peer_config(redis_server), store=store, settings=settings
        ) as engine:
            await until(lambda: engine.health_check().peers[0].connected)
            await ask(engine)
            await until_async(lambda: store.get("k.59"))
            await ask(engine)
            await until(lambda: engine.health_check().peers[0].synced)
            # Several cycles find nothing to be done: the peer does not stir any more.
            settled = engine._links["a"].context.settled
            await until(lambda: len(settled) > 0)
            _restore(own, "backup.rdb")

            async def is_back() -> bool:
                await ask(engine)
                return await _holds(store, "k.59")

            await until_async(is_back)
            assert all(await store.get_many([f"k.{number}" for number in range(60)]))
    foreign.client.close()


def test_what_was_read_for_a_store_is_not_written_to_another() -> None:
    """If this fails a store that was emptied gets the end of a stream, and never its beginning."""

    async def trace(mesh: LocalMesh) -> None:
        a, b = mesh.nodes["a"].store, mesh.nodes["b"]
        configure_b(mesh, cold_path=ColdPathConfig(enabled=False))
        a.put("early", b"x")
        await mesh.start("b")
        await until_it_is(lambda: live(mesh, "b") == {"early"}, "what was there")
        b.store.accepting_writes = False
        a.put("late", b"x")
        await until_it_is(lambda: health(mesh).state is PeerState.PAUSED, "a chunk that waits")
        mesh.wipe("b")
        b.store.accepting_writes = True
        await until_it_is(lambda: live(mesh, "b") == {"early", "late"}, "all that the peer holds")

    on_virtual_time(trace)


# Keys that cannot be taken (G13) ------------------------------------------------------------------

SPOILERS: Final = pytest.mark.parametrize("kind", ["far ahead", "too large"])


async def spoil(mesh: LocalMesh, key: str, kind: str) -> None:
    """Write something at a that b cannot take."""
    a = mesh.nodes["a"].store
    if kind == "far ahead":
        await a.apply_many([put_far_ahead(key)])
    else:
        a.put(key, bytes(LIMIT_BYTES + 1))


@SPOILERS
def test_one_bad_key_ends_no_agreement(kind: str) -> None:
    """If this fails one wrong stamp or one large item spoils a link for good."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        for number in range(50):
            a.put(f"k{number}", b"x")
        await spoil(mesh, "bad", kind)
        await both_agree(mesh)
        assert health(mesh).agreed_except == 1
        assert engine_of(mesh).excepted_keys("a") == ("bad",)
        told = await engine_of(mesh).explain("bad")
        assert told.peers[0].is_excepted
        assert "left out of the agreement" in str(told.peers[0])
        assert not (await engine_of(mesh).explain("k1")).peers[0].is_excepted
        # Gaps are healed although the trees differ.
        await mesh.stop("b")
        mesh.trim("a", 0)
        a.put("k0", b"y")
        mesh.trim("a", 0)
        await mesh.start("b")
        await until_it_is(lambda: at_head(mesh), "the head")
        assert health(mesh).gaps_open == 0
        # It is known after another start.
        assert health(mesh).agreed_except == 1
        # A ttl later the node's Redis is lost, and no more than that key may wait for anybody.
        await asyncio.sleep(2 * TTL_SEC)
        mesh.wipe("b")
        await until_it_is(lambda: len(live(mesh, "b")) == 50, "all items")
        assert health(mesh).stale_held_back <= 1

    on_virtual_time(trace)


def test_an_excepted_key_is_judged_by_its_own_date() -> None:
    """If this fails a key that could not be read for long revives a delete, or spoils the rest."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        a.put("k", b"x")
        await both_agree(mesh)
        await spoil(mesh, "bad", "too large")
        await both_agree(mesh)
        await asyncio.sleep(2 * TTL_SEC)
        await both_agree(mesh)
        record = mesh.nodes["b"].cursors.snapshot().tables().peers["a"]
        assert record.agreement is not None
        assert list(record.agreement.exceptions) == ["bad"]
        began = record.agreement.exceptions["bad"]
        assert began is not None
        assert began < record.agreement.at_ms - TTL_SEC * 1000
        # An operator raises the limit: it could be read now, but is too old to be taken unasked.
        limits = LimitsConfig(payload_bytes=2 * LIMIT_BYTES, batch_bytes=LIMIT_BYTES * 100)
        engine = engine_of(mesh)
        config = mesh.nodes["b"].config
        settings = config.settings.model_copy(update={"limits": limits})
        await engine.update_config(config.model_copy(update={"settings": settings}))
        engine._links["a"].context.unfetchable.clear()
        await both_agree(mesh)
        assert live(mesh, "b") == {"k"}
        assert engine.stale_keys("a") == ("bad",)
        assert engine.excepted_keys("a") == ("bad",)
        await engine.repair("a", accept_stale=True)
        assert live(mesh, "b") == {"k", "bad"}
        assert (engine.stale_keys("a"), engine.excepted_keys("a")) == ((), ())

    on_virtual_time(trace)


def test_with_too_many_exceptions_there_is_no_agreement() -> None:
    """If this fails a peer of which nothing can be read passes for one that is agreed with."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"].store
        await both_agree(mesh)
        await a.apply_many([put_far_ahead(f"bad{n}") for n in range(EXCEPTIONS_MAX)])
        await both_agree(mesh)
        assert health(mesh).agreed_except == EXCEPTIONS_MAX
        await a.apply_many([put_far_ahead("one more")])
        await asyncio.sleep(1)
        agreed_at = health(mesh).agreed_at
        await asyncio.sleep(3 * CYCLE_SEC)
        assert health(mesh).agreed_at == agreed_at

    on_virtual_time(trace)


# Agreements that prove nothing --------------------------------------------------------------------


def test_a_peer_that_does_not_read_back_revives_no_delete() -> None:
    """If this fails a delete that a peer never hears of is undone as soon as it is forgotten here."""

    async def trace(mesh: LocalMesh) -> None:
        mesh.nodes["a"].store.put("k", b"x")
        mesh.nodes["a"].store.put("other", b"x")
        await both_agree(mesh)
        mesh.cut("b", "a")
        mesh.nodes["a"].store.delete("k")
        await asyncio.sleep(TTL_SEC + GRACE_SEC + 60)
        assert live(mesh, "a") == {"other"}
        found = health(mesh, "a")
        assert (found.stale_held_back, found.state) == (1, PeerState.TAILING)
        mesh.nodes["b"].store.put("new", b"x")
        await until_it_is(lambda: "new" in live(mesh, "a"), "what is new")

    on_virtual_time(trace)


@pytest.mark.parametrize("days", [2, -2])
def test_no_agreement_is_dated_by_a_clock_that_is_days_off(days: int) -> None:
    """If this fails a clock that was wrong for a moment lets old items in for days (G5)."""

    async def trace(mesh: LocalMesh) -> None:
        a, b = mesh.nodes["a"], mesh.nodes["b"]
        a.store.put("k", b"x")
        a.store.put("other", b"x")
        await both_agree(mesh)
        agreed_at = health(mesh).agreed_at
        b.wall_clock.skew_ms = days * DAY_MS
        # It is asked for its time with each ping.
        await asyncio.sleep(200)
        while_off = health(mesh).agreed_at
        await asyncio.sleep(3 * CYCLE_SEC)
        assert health(mesh).agreed_at == while_off
        assert agreed_at is not None
        b.wall_clock.skew_ms = 0
        mesh.cut("b", "a")
        mesh.cut("a", "b")
        b.store.delete("k")
        await asyncio.sleep(TTL_SEC + GRACE_SEC + 60)
        mesh.trim("b", 0)
        mesh.heal("b", "a")
        await asyncio.sleep(60 + 2 * CYCLE_SEC)
        assert live(mesh, "b") == {"other"}

    on_virtual_time(trace)


async def test_a_key_is_explained_without_an_engine_too(nodes: Nodes) -> None:
    """If this fails the command line does not say why a peer's version is not taken."""
    peer = PeerConfig(node_id="a", redis_url="redis://127.0.0.1:1")
    config = nodes.config(peer).model_copy(update={"store": StoreConfig(kind="memory")})
    assert not (await explain_node(config, "bad")).peers[0].is_excepted
    cursors = SqliteCursorStore(config.cursor.sqlite_path)
    await cursors.open()
    await cursors.set_agreed("a", Agreement(5, exceptions={"bad": None}), heal_gaps=False)
    await cursors.close()
    assert (await explain_node(config, "bad")).peers[0].is_excepted
    assert not (await explain_node(config, "good")).peers[0].is_excepted
