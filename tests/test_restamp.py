"""A key that a wrong clock has stamped far ahead: writes over it raise, and a person can mend it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Nodes, now_ms, peer_config, until_async
from rich.console import Console
from test_backups import (
    CYCLE_SEC,
    DIALECTS,
    both_agree,
    engine_of,
    health,
    on_virtual_time,
    until_it_is,
)
from test_cli import run, write_config

from fsm_replication import (
    MemorySyncEngine,
    PeerConfig,
    RedisSyncEngine,
    ReplicationConfig,
    Resolver,
    StampAheadError,
    StoreConfig,
    StoreError,
    SyncItem,
    UsageError,
)
from fsm_replication.cli.restamp import restamp_node
from fsm_replication.config import ColdPathConfig, Settings, StartupConfig, TimeoutsConfig
from fsm_replication.items import DAY_MS, NUMBER_MAX, content_hash
from fsm_replication.merkle import OWN, bucket_of
from fsm_replication.servers import RedisServer
from fsm_replication.stream import encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.testing import LocalMesh, topology
from fsm_replication.testing import run as run_virtual
from fsm_replication.testing.sim_dialects import Dialect

Servers = Callable[[], RedisServer]
FAR_MS = 4_102_444_800_000  # The first day of 2100.
ODD = "\x1b]0;pwn\x07[red]x\n"


def item(
    key: str, content: bytes | None = b"far", at_ms: int = FAR_MS, version: int = 7
) -> SyncItem:
    """Return an item of node x, or with None a tombstone."""
    body = b"" if content is None else content
    return SyncItem(key, body, "binary", content_hash(body), version, at_ms, content is None, "x")


class Longest:
    """A resolver that keeps the longer content."""

    name = "longest"
    by_stamp = False

    def merge(self, a: SyncItem, b: SyncItem) -> SyncItem:
        """Return the item of the longer content."""
        return max(a, b, key=lambda one: (len(one.content), one.content))


async def refuses_writes(store: Any, *, keys: Sequence[str]) -> None:
    """Check that nothing can be written over keys that are stamped far ahead."""
    for key in keys:
        held = (await store.get_many([key]))[0]
        for write in ("put", "put_json", "delete"):
            if not hasattr(store, write) or (held.deleted and write == "delete"):
                continue
            with pytest.raises(StampAheadError, match="restamp CONFIG KEY") as raised:
                await getattr(store, write)(key, *([b"1"] if write == "put" else []), **(
                    {"value": 1} if write == "put_json" else {}
                ))  # fmt: skip
            assert isinstance(raised.value, ValueError)
            assert raised.value.key == key
            assert raised.value.updated_at == held.updated_at
        assert (await store.get_many([key]))[0] == held


@pytest.mark.parametrize("resolver", [None, Longest()])
async def test_a_write_over_a_stamp_far_ahead_raises(
    redis_servers: Servers, resolver: Resolver | None
) -> None:
    """If this fails a write seems to succeed that every peer refuses, for good."""
    memory = MemorySyncEngine(resolver=resolver)
    async with RedisSyncEngine(redis_servers().url, node_id="b", resolver=resolver) as store:
        for one in (memory, store):
            most = now_ms() + DAY_MS
            await one.apply_many(
                [item("far"), item(ODD), item("gone", None), item("near", b"", most - 60_000)]
            )
            await refuses_writes(one, keys=["far", ODD, "gone"])
            assert (await one.put("near", b"now")).version == 8
            assert await one.delete("near")
        events = await store._call("XLEN", store.keys.stream)
        with pytest.raises(StampAheadError):
            await store.put_many({"fine": b"1", "far": b"2"})
        assert await store._call("XLEN", store.keys.stream) <= events + 1


def test_a_simulated_mesh_gets_over_a_stamp_far_ahead() -> None:
    """If this fails a key whose writer's clock was wrong for a moment is lost to all peers."""

    async def main() -> None:
        mesh = LocalMesh(["a", "b", "c"], topology("mesh", ["a", "b", "c"]))
        try:
            for name in mesh.nodes:
                await mesh.start(name)
            a = mesh.nodes["a"]
            a.store.put("k", b"before")
            await mesh.settle()
            a.wall_clock.skew_ms = 3 * DAY_MS
            far = a.store.put("k", b"far")
            a.wall_clock.skew_ms = 0
            with pytest.raises(StampAheadError):
                a.store.put("k", b"never")
            with pytest.raises(StampAheadError):
                a.store.delete("k")
            now = a.wall_clock.now_ms()
            mended = SyncItem(
                "k", far.content, "binary", far.content_hash, far.version + 1, now, False, "a"
            )
            assert not a.store.replace(mended, item("k").stamp)
            assert a.store.replace(mended, far.stamp)
            await mesh.settle()
            assert [held["k"].stamp for held in mesh.holdings()] == [mended.stamp] * 3
            assert len(await mesh.roots()) == 1
            a.store.put("k", b"after")
            await mesh.settle()
        finally:
            await mesh.close()

    run_virtual(main)


def write_far(mesh: LocalMesh, times: int = 1) -> SyncItem:
    """Write k at node a, whose clock is two days ahead for that moment."""
    a = mesh.nodes["a"]
    a.wall_clock.skew_ms = 2 * DAY_MS
    written = [a.store.put("k", b"far%d" % number) for number in range(times)]
    a.wall_clock.skew_ms = 0
    return written[-1]


def mend(mesh: LocalMesh, far: SyncItem) -> None:
    """Restamp k at node a and write it again."""
    a = mesh.nodes["a"]
    now = a.wall_clock.now_ms()
    mended = msgspec.structs.replace(far, updated_at=now, version=far.version + 1)
    assert a.store.replace(mended, far.stamp)
    a.store.put("k", b"written since")


def a_day_later(mesh: LocalMesh) -> None:
    """Let so much time pass at once that what was too far ahead is so no more."""
    for node in mesh.nodes.values():
        node.wall_clock.skew_ms += DAY_MS + 3_600_000


def contents(mesh: LocalMesh) -> list[bytes | None]:
    """Return what each node holds under k."""
    held = [node.store.held("k") for node in mesh.nodes.values()]
    return [None if item is None else item.content for item in held]


async def read_then_restamp(mesh: LocalMesh) -> None:
    """Let node b make a letter of a far entry, before that is restamped at node a."""
    mesh.nodes["a"].store.put("k", b"first")
    await both_agree(mesh)
    far = write_far(mesh)
    await until_it_is(lambda: health(mesh).dead_letters == 1, "the letter")
    mend(mesh, far)
    await until_it_is(lambda: contents(mesh) == [b"written since"] * 2, "the restamped key")


@DIALECTS
def test_a_reader_that_comes_a_day_late_undoes_no_restamp(dialect: Dialect) -> None:
    """If this fails the far entry of the stream wins in the end, and later writes are lost."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"]
        a.store.put("k", b"first")
        await both_agree(mesh)
        mesh.cut("b", "a")
        mend(mesh, write_far(mesh, times=2))
        a_day_later(mesh)
        a.store.put("k", b"a day later")
        mesh.heal("b", "a")
        await asyncio.sleep(3 * CYCLE_SEC)
        await until_it_is(lambda: contents(mesh) == [b"a day later"] * 2, "the latest write")
        await until_it_is(lambda: health(mesh).state == PeerState.TAILING, "reading")
        a.store.put("k", b"the last")
        await until_it_is(lambda: contents(mesh) == [b"the last"] * 2, "the write after that")

    on_virtual_time(trace, dialect)


@DIALECTS
def test_a_reader_that_was_there_goes_on_after_a_restamp(dialect: Dialect) -> None:
    """If this fails the entry that a restamp took out of the stream holds its readers up."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"]
        await read_then_restamp(mesh)
        await mesh.stop("b")
        await mesh.start("b")
        await asyncio.sleep(3 * CYCLE_SEC)
        await until_it_is(lambda: health(mesh).state == PeerState.TAILING, "reading")
        a.store.put("k", b"the last")
        await until_it_is(lambda: contents(mesh) == [b"the last"] * 2, "the write after that")

    on_virtual_time(trace, dialect)


def test_a_letter_that_is_tried_a_day_late_undoes_no_restamp() -> None:
    """If this fails a retry brings back what a person has given up."""

    async def trace(mesh: LocalMesh) -> None:
        a = mesh.nodes["a"]
        await read_then_restamp(mesh)
        a_day_later(mesh)
        a.store.put("k", b"a day later")
        await until_it_is(lambda: contents(mesh) == [b"a day later"] * 2, "the later write")
        stats = await engine_of(mesh).dead_letters.retry()
        assert (stats.tried, stats.applied, stats.superseded) == (1, 0, 1)
        await asyncio.sleep(3 * CYCLE_SEC)
        assert contents(mesh) == [b"a day later"] * 2

    on_virtual_time(trace)


LONG = "k" * 1024


async def test_a_restamp_takes_far_entries_out_of_the_stream(redis_servers: Servers) -> None:
    """If this fails a reader that comes late finds the far stamp in the real stream."""
    async with RedisSyncEngine(redis_servers().url, node_id="b") as store:
        for key in ("k", LONG):
            older = item(key, b"older", FAR_MS - 1)
            for far in (older, item(key, b"x" * 5000, FAR_MS), item(f"{key[:1000]}-other")):
                await store.apply_many([far])
            await store._call("XADD", store.keys.stream, "*", "op", "PUT", "key", key)
            # More than are looked at in one call.
            await store.put_many([(f"near{number}", b"1") for number in range(150)])
            await store.apply_many([item(key, b"y" * 5000, FAR_MS, 8)])
            held = await store.get_many([key])
            assert held[0] is not None
            now = now_ms()
            before = await store._call("XLEN", store.keys.stream)
            mended = msgspec.structs.replace(held[0], updated_at=now, version=9)
            # What is refused takes nothing out.
            assert not await store.replace(mended, older.stamp)
            assert await store._call("XLEN", store.keys.stream) == before
            assert await store.replace(mended, held[0].stamp)
            entries = await store._call("XRANGE", store.keys.stream, "-", "+")
            assert len(entries) == before - 2
            mine = [fields for _, fields in entries if fields[b"key"] == key.encode()]
            assert [fields.get(b"meta") for fields in mine] == [
                None,
                encode_fields(mended)[-1],
            ]


async def test_a_restamp_that_was_cut_short_can_be_done_again(
    redis_servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails a crash leaves a key restamped that its stream still tells of as far ahead."""
    async with RedisSyncEngine(redis_servers().url, node_id="b") as store:
        await store.apply_many([item("k")])
        mended = item("k", b"far", now_ms(), 8)
        with monkeypatch.context() as patch:
            patch.setattr(store, "_apply", fail)
            with pytest.raises(StoreError, match="killed"):
                await store.replace(mended, item("k").stamp)
        assert await store._call("XLEN", store.keys.stream) == 0
        assert await store.get_many(["k"]) == [item("k")]
        assert await store.replace(mended, item("k").stamp)
        assert await store.get_many(["k"]) == [mended]
        assert await store._call("XLEN", store.keys.stream) == 1


async def fail(*_: object) -> None:
    """Stand for the moment at which a process is killed."""
    raise StoreError("killed")


async def test_what_is_replaced_is_whole(redis_servers: Servers) -> None:
    """If this fails item, tree and stream tell three different things after a restamp."""
    memory = MemorySyncEngine()
    async with (
        RedisSyncEngine(redis_servers().url, node_id="b", layouts=["own", "dotted"]) as store,
        RedisSyncEngine(redis_servers().url, node_id="c") as like_new,
    ):
        for one in (memory, store):
            await one.apply_many([item("live"), item("dead", None), item("other")])
        cases = [
            (item("live"), item("live", b"far", now_ms(), 8)),
            (item("dead", None), item("dead", b"alive", now_ms(), 3)),
            (item("other"), item("other", None, now_ms(), NUMBER_MAX)),
        ]
        for old, new in cases:
            for one in (memory, store):
                assert not await one.replace(new, new.stamp)
                assert await one.replace(new, old.stamp)
                assert not await one.replace(new, old.stamp)
                assert (await one.get_many([new.key]))[0] == new
                assert await one.live_items() == sum(
                    held is not None and not held.deleted
                    for held in await one.get_many(["live", "dead", "other"])
                )
            raw = (await store._call("XREVRANGE", store.keys.stream, "+", "-", "COUNT", 1))[0][1]
            assert raw[b"key"] == new.key.encode()
            bucket = f"{store.keys.tree}:{bucket_of(new.key.encode())}"
            assert await store._call("HGET", bucket, new.key)
        await like_new.apply_many([new for _, new in cases])
        assert store.tree
        assert like_new.tree
        assert (
            await store.tree.root(OWN)
            == await like_new.tree.root(OWN)
            == await memory.tree.root(OWN)
        )


QUICK = Settings(
    cold_path=ColdPathConfig(interval_sec=0.2),
    startup=StartupConfig(when_no_peer="run"),
    timeouts=TimeoutsConfig(connect=2),
)


def config_of(nodes: Nodes, server: RedisServer, *peers: PeerConfig) -> ReplicationConfig:
    """Return the configuration of node b on a server."""
    store = StoreConfig(kind="redis", redis_url=server.url)
    return nodes.config(*peers, settings=QUICK).model_copy(update={"store": store})


async def restamp(
    config: ReplicationConfig, key: str, *, take: str | None = None, force: bool = False
) -> tuple[SyncItem | None, str]:
    """Restamp a key; returns the item, None if that was refused, and what was shown."""
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    try:
        made = await restamp_node(config, key, take=take, force=force, console=console)
    except UsageError as error:
        return None, f"{screen.getvalue()}{error}"
    return made, screen.getvalue()


async def test_a_key_that_one_node_alone_holds_goes_to_its_peers(
    redis_servers: Servers, nodes: Nodes
) -> None:
    """If this fails restamp does not reach the peers, or not while the node's engine runs."""
    a, b = redis_servers(), redis_servers()
    async with (
        RedisSyncEngine(a.url, node_id="a") as there,
        RedisSyncEngine(b.url, node_id="b") as here,
    ):
        await here.apply_many([item("k"), item(ODD)])
        reader = nodes.engine(peer_config(b, "b"), store=there, node_id="a", settings=QUICK)
        own = nodes.engine(peer_config(a), store=here, settings=QUICK)
        async with reader, own:
            await reader.wait_synced(20)
            assert await there.get_many(["k", ODD]) == [None, None]
            config = config_of(nodes, b, peer_config(a))
            for key in ("k", ODD):
                made, shown = await restamp(config, key)
                assert made is not None, shown
                assert abs(made.updated_at - now_ms()) < 60_000
                assert made.version == 8
                assert "2100-01-01" in shown
                assert "nothing" in shown
                assert "\x1b" not in shown

            async def arrived() -> bool:
                return None not in await there.get_many(["k", ODD])

            await until_async(arrived, "the restamped items")
            assert (await there.get_many(["k"]))[0] == (await here.get_many(["k"]))[0]
            assert (await here.put("k", b"after")).version == 9
            assert (await restamp(config, "k"))[0] is None


async def test_restamp_is_refused_where_it_would_not_help(
    redis_servers: Servers, nodes: Nodes
) -> None:
    """If this fails a node is set against a peer that never takes what it sends."""
    a, b, c = redis_servers(), redis_servers(), redis_servers()
    peers = [peer_config(a), peer_config(c, "c")]
    async with (
        RedisSyncEngine(a.url, node_id="a") as far,
        RedisSyncEngine(b.url, node_id="b") as here,
        RedisSyncEngine(c.url, node_id="c") as good,
    ):
        for one in (far, here):
            await one.apply_many([item("k"), item("lone")])
        newer = now_ms() + 3_600_000
        await good.apply_many([item("k", b"good", newer, 3)])
        config = config_of(nodes, b, *peers)
        made, told = await restamp(config, "k")
        assert made is None
        assert "peer 'a' holds a stamp more than a day ahead too" in told
        assert "peer 'c'" not in told
        for wrong in (
            {"take": "c"},
            {"take": "nobody", "force": True},
            {"take": "a", "force": True},
        ):
            assert (await restamp(config, "k", **wrong))[0] is None
        assert (await here.get_many(["k"]))[0] == item("k")
        made, _ = await restamp(config, "k", force=True)
        assert made is not None
        assert (made.updated_at, made.version, made.content) == (newer + 1, 8, b"far")
        # What it says wins over what the peers hold that is not far ahead.
        (theirs,) = await good.stamps(["k"])
        assert theirs is not None
        assert made.stamp > theirs
        assert (await restamp(config, "lone", take="c", force=True))[0] is None
        await far.replace(made, item("k").stamp)
        assert (await restamp(config, "none"))[0] is None


async def test_a_peers_value_is_taken_as_it_is(redis_servers: Servers, nodes: Nodes) -> None:
    """If this fails --take makes a third version of what two nodes should agree on."""
    a, b = redis_servers(), redis_servers()
    async with (
        RedisSyncEngine(a.url, node_id="a") as there,
        RedisSyncEngine(b.url, node_id="b") as here,
    ):
        await here.apply_many([item("k"), item("gone")])
        await there.put("k", b'"theirs"', "json")
        await there.put("gone", b"")
        await there.delete("gone")
        config = config_of(nodes, b, peer_config(a))
        for key in ("k", "gone"):
            made, shown = await restamp(config, key, take="a")
            assert made is not None, shown
            assert [made] == await there.get_many([key]) == await here.get_many([key])
        assert here.tree
        assert there.tree
        assert await here.tree.root(OWN) == await there.tree.root(OWN)


async def test_a_peer_that_cannot_be_asked_is_named(redis_servers: Servers, nodes: Nodes) -> None:
    """If this fails restamp goes on without knowing what a peer holds."""
    b = redis_servers()
    away = PeerConfig(node_id="a", redis_url="redis://u:hunter2@127.0.0.1:1")
    async with RedisSyncEngine(b.url, node_id="b") as here:
        await here.apply_many([item("k")])
        made, told = await restamp(config_of(nodes, b, away), "k")
        assert made is None
        assert "could not be asked" in told
        assert "--force" in told
        assert "hunter2" not in told
        assert (await restamp(config_of(nodes, b, away), "k", force=True))[0] is not None
        memory = nodes.config(away).model_copy(update={"store": StoreConfig(kind="memory")})
        assert (await restamp(memory, "k", force=True))[0] is None


@pytest.mark.slow
async def test_restamp_is_a_command(redis_servers: Servers, tmp_path: Path) -> None:
    """If this fails the way out that the error names does not exist."""
    server = redis_servers()
    async with RedisSyncEngine(server.url, node_id="b") as here:
        await here.apply_many([item("k")])
        config = str(write_config(tmp_path, server))
        done = run("restamp", config, "k")
        assert done.returncode == 0, done.stderr
        assert "k has a stamp of now" in done.stdout
        again = run("restamp", config, "k")
        assert again.returncode == 1
        assert "an ordinary write replaces it" in again.stderr
