"""TLS with certificates checked, and users who may only read, against servers that demand them."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Nodes, Peer, held, until
from foreign_node import AT, ForeignNode

from fsm_replication.config import (
    ColdPathConfig,
    HotPathConfig,
    PeerConfig,
    PeerHealthConfig,
    ReconnectConfig,
    Settings,
    StartupConfig,
    TimeoutsConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import ConnectionLostError, PeerRefusedError
from fsm_replication.servers import RedisServer, RedisServerError, find_all_redis_servers
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.tables import PeerState
from fsm_replication.testing import FaultProxy
from fsm_replication.transport import RedisTransport

DOCS = Path(__file__).parent.parent / "docs" / "security.md"
SECRET = "hunter2"
QUICK = Settings(
    hot_path=HotPathConfig(block_timeout=0.2),
    cold_path=ColdPathConfig(interval_sec=0.2),
    peer_health=PeerHealthConfig(ping_interval_sec=0.1, idle_threshold_sec=0),
    startup=StartupConfig(when_no_peer="run"),
    reconnect=ReconnectConfig(first=0.05, longest=0.1, rejected=0.2),
    timeouts=TimeoutsConfig(connect=1, command=2),
)


# Certificates.


class Certificates:
    """Authorities and certificates, made by openssl in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = self.make_authority("ca")

    def _openssl(self, *args: str | Path) -> None:
        subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, timeout=30)

    def make_authority(self, name: str) -> Path:
        """Make an authority; returns its certificate."""
        made = self.folder / f"{name}.pem"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", self.folder / f"{name}.key", "-out", made, "-days", "2",
            "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        return made

    def lock(self, key: str) -> str:
        """Encrypt a key with a passphrase; returns the file."""
        made = f"{key}.locked"
        self._openssl("ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", made)
        return made

    def sign(self, name: str, *, host: str = "IP:127.0.0.1", by: str = "ca") -> tuple[str, str]:
        """Make a certificate for a host; returns the files of the certificate and its key."""
        key, request, made = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "pem"))
        extensions = self.folder / f"{name}.ext"
        # As strictly as Python 3.13 checks it by default.
        extensions.write_text(f"subjectAltName={host}\nauthorityKeyIdentifier=keyid\n")
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", key, "-out", request, "-subj", f"/CN={name}",
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.folder / f"{by}.pem",
            "-CAkey", self.folder / f"{by}.key", "-CAcreateserial", "-out", made, "-days", "2",
            "-extfile", extensions,
        )  # fmt: skip
        return str(made), str(key)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The certificates of this file's tests."""
    try:
        return Certificates(tmp_path_factory.mktemp("certificates"))
    except FileNotFoundError:
        pytest.skip("there is no openssl on PATH to make certificates with")


class TlsServer:
    """A server that also listens with TLS, with a user who may only read."""

    def __init__(self, server: RedisServer, port: int) -> None:
        self.server = server
        self.port = port
        self.client = redis.Redis(port=server.port)

    def url(self, **options: str) -> str:
        """Return the address over TLS for the reader."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://reader:{SECRET}@127.0.0.1:{self.port}?{query}"

    def calls_of(self, command: str) -> int:
        """Return how often a command came."""
        stats: Any = self.client.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


@pytest.fixture
def tls_server(
    certificates: Certificates, new_redis_server: Callable[..., RedisServer]
) -> Iterator[Callable[..., TlsServer]]:
    """A function that starts a server with a certificate."""
    made: list[TlsServer] = []

    def start(certificate: tuple[str, str], *, clients: str = "no") -> TlsServer:
        port = _free_port()
        config = [
            ("tls-port", str(port)),
            ("tls-cert-file", certificate[0]),
            ("tls-key-file", certificate[1]),
            ("tls-ca-cert-file", str(certificates.authority)),
            ("tls-auth-clients", clients),
        ]
        for executable in find_all_redis_servers():
            try:
                server = new_redis_server(executable, config=config)
            except RedisServerError:
                continue
            made.append(TlsServer(server, port))
            make_user(made[-1].client, documented_acl())
            return made[-1]
        pytest.skip("no redis-server of this machine was built with TLS")

    yield start
    for one in made:
        one.client.close()


def _free_port() -> int:
    with RedisServer() as server:
        return server.port


def documented_acl(name: str = "reader") -> list[str]:
    """Return the command of the docs that makes a user."""
    (line,) = re.findall(
        rf"^ACL SETUSER {name} .*$", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    return str(line).replace("PASSWORD", SECRET).split()


def make_user(client: redis.Redis, rules: Sequence[str]) -> None:
    """Make the documented user, as the docs tell for servers without permissions to read alone."""
    try:
        client.execute_command(*rules)
    except redis.exceptions.ResponseError as error:
        if "'%R~" not in str(error):
            raise
        client.execute_command(*(rule.replace("%R~", "~") for rule in rules))


def link_to(url: str, *, prefix: str = "") -> PeerConfig:
    """Return the configuration of the peer a."""
    return PeerConfig(
        node_id="a", redis_url=url, redis_prefix=prefix, circuit_reset_timeout_sec=0.1
    )


async def reaches(engine: ReplicationEngine, *states: PeerState) -> None:
    """Wait for a state of the link to a."""
    await engine.wait_for_state(*states, peer_id="a", timeout=15)


def last_error(engine: ReplicationEngine) -> str:
    """Return what the link to a last failed of."""
    return engine.health_check().peers[0].last_error


async def test_a_link_over_tls_tails(
    nodes: Nodes, certificates: Certificates, tls_server: Callable[..., TlsServer]
) -> None:
    """If this fails rediss:// does not work where everything is right."""
    peer = tls_server(certificates.sign("good"))
    authority = str(certificates.authority)
    writer_url = f"rediss://127.0.0.1:{peer.port}?ssl_ca_certs={authority}"
    store = MemorySyncEngine()
    async with (
        RedisSyncEngine(writer_url, node_id="a") as source,
        nodes.engine(
            link_to(peer.url(ssl_ca_certs=authority)), store=store, settings=QUICK
        ) as engine,
    ):
        await reaches(engine, PeerState.TAILING)
        await source.put("k", b"x" * 300_000)
        await until(lambda: len(store) == 1)
        assert await held(store, "k") == {"k": b"x" * 300_000}


@pytest.mark.parametrize("wrong", ["unknown authority", "other authority", "other host", "plain"])
async def test_a_server_that_is_not_who_it_says_is_refused(
    nodes: Nodes, certificates: Certificates, tls_server: Callable[..., TlsServer], wrong: str
) -> None:
    """If this fails whoever stands between two nodes gets the password and the data."""
    trusted = {"ssl_ca_certs": str(certificates.authority)}
    certificate = certificates.sign("good")
    if wrong == "unknown authority":
        trusted = {}
    elif wrong == "other authority":
        trusted = {"ssl_ca_certs": str(certificates.make_authority("rogue"))}
    elif wrong == "other host":
        certificate = certificates.sign("elsewhere", host="DNS:lyon.example.org")
    peer = tls_server(certificate)
    url = peer.url(**trusted)
    if wrong == "plain":
        url = url.replace(str(peer.port), str(peer.server.port))
    before = peer.calls_of("auth")
    async with nodes.engine(link_to(url), settings=QUICK) as engine:
        await reaches(engine, PeerState.BACKOFF)
        told = last_error(engine)
        await reaches(engine, PeerState.CONNECTING)
        await reaches(engine, PeerState.BACKOFF)
        states = {move.dest for move in engine.journal if move.machine == "link:a"}
        assert not any(state.is_running for state in states if isinstance(state, PeerState))
    assert peer.calls_of("auth") == before
    assert SECRET not in told
    if wrong != "plain":
        assert "certificate that is not accepted" in told
        assert "ssl_ca_certs" in told


async def test_the_checks_can_be_given_up(
    certificates: Certificates, tls_server: Callable[..., TlsServer]
) -> None:
    """If this fails the options that the docs name do nothing."""
    peer = tls_server(certificates.sign("elsewhere", host="DNS:lyon.example.org"))
    authority = str(certificates.authority)
    for options in (
        {"ssl_ca_certs": authority, "ssl_check_hostname": "false"},
        {"ssl_cert_reqs": "none"},
    ):
        connection = await RedisTransport().connect(peer.url(**options), timeout_sec=5, name="t")
        assert await connection.call("PING") == b"PONG"
        connection.close()
        await connection.wait_closed()
    with pytest.raises(ConnectionLostError, match="IP address mismatch"):
        await RedisTransport().connect(peer.url(ssl_ca_certs=authority), timeout_sec=5, name="t")


async def test_a_renewed_certificate_needs_no_restart(
    nodes: Nodes, certificates: Certificates, tls_server: Callable[..., TlsServer]
) -> None:
    """If this fails a certificate that is mended at a peer leaves its readers behind."""
    peer = tls_server(certificates.sign("elsewhere", host="DNS:lyon.example.org"))
    by_hand = Peer(peer.server)
    by_hand.write_marker()
    url = peer.url(ssl_ca_certs=str(certificates.authority))
    async with nodes.engine(link_to(url), settings=QUICK) as engine:
        await reaches(engine, PeerState.BACKOFF)
        certificate, key = certificates.sign("renewed")
        peer.client.config_set("tls-cert-file", certificate, "tls-key-file", key)
        await reaches(engine, PeerState.TAILING)
    by_hand.close()


async def test_a_server_may_ask_for_our_certificate(
    certificates: Certificates, tls_server: Callable[..., TlsServer]
) -> None:
    """If this fails a peer that wants to know us by certificate cannot be read."""
    peer = tls_server(certificates.sign("good"), clients="yes")
    authority = str(certificates.authority)
    with pytest.raises(ConnectionLostError):
        await RedisTransport().connect(peer.url(ssl_ca_certs=authority), timeout_sec=5, name="t")
    certificate, key = certificates.sign("reader")
    url = peer.url(ssl_ca_certs=authority, ssl_certfile=certificate, ssl_keyfile=key)
    connection = await RedisTransport().connect(url, timeout_sec=5, name="t")
    assert await connection.call("PING") == b"PONG"
    connection.close()
    await connection.wait_closed()


async def test_tls_files_that_cannot_be_used_are_named(certificates: Certificates) -> None:
    """If this fails nobody finds the wrong file, or a process waits for a passphrase."""
    certificate, key = certificates.sign("good")
    locked = certificates.lock(key)
    for options, told in (
        ({"ssl_ca_certs": "/no/such/file.pem"}, "/no/such/file.pem"),
        ({"ssl_ca_certs": key}, key),
        ({"ssl_certfile": certificate, "ssl_keyfile": locked}, "without a passphrase"),
    ):
        query = "&".join(f"{name}={value}" for name, value in options.items())
        with pytest.raises(PeerRefusedError, match=re.escape(told)):
            await RedisTransport().connect(
                f"rediss://reader:{SECRET}@127.0.0.1:1?{query}", timeout_sec=5, name="t"
            )


# Users.


def name_of(args: Sequence[bytes]) -> str:
    """Return a command's name as users are granted it."""
    name = args[0].decode().lower()
    return f"{name}|{args[1].decode().lower()}" if name in ("client", "xinfo", "memory") else name


async def use_everything(
    engine: ReplicationEngine, source: RedisSyncEngine, proxy: FaultProxy
) -> None:
    """Have a link do all that a link does."""
    await reaches(engine, PeerState.TAILING)
    await source.put("tailed", b"1")
    await until(lambda: engine.health_check().peers[0].events_applied == 41)
    await engine.repair("a")
    await engine.explain("tailed")
    assert [found async for found in engine.differences("a")] == []
    await proxy.refuse()
    await reaches(engine, PeerState.BACKOFF)
    # What was read last is gone although nothing was trimmed: how old is this peer?
    stream = source.keys.stream
    ((last, _),) = await source._call("XREVRANGE", stream, "+", "-", "COUNT", 1)
    await source.put("tailed", b"2")
    await source._call("XDEL", stream, last)
    await proxy.heal()
    await reaches(engine, PeerState.TAILING)


@pytest.mark.parametrize("prefix", ["", "site-a:"])
async def test_the_documented_user_is_enough_and_not_too_much(
    nodes: Nodes, new_redis_server: Callable[[], RedisServer], prefix: str
) -> None:
    """If this fails the docs grant too little for a link to work, or more than it needs."""
    server = new_redis_server()
    client = redis.Redis(port=server.port)
    rules = [rule.replace("%R~", f"%R~{prefix}") for rule in documented_acl()]
    make_user(client, rules)
    used: set[str] = set()
    async with (
        FaultProxy(server.port, on_request=lambda args: used.add(name_of(args))) as proxy,
        RedisSyncEngine(server.url, node_id="a", redis_prefix=prefix) as source,
    ):
        peer = link_to(proxy.url.replace("redis://", f"redis://reader:{SECRET}@"), prefix=prefix)
        await source.put_many([(f"k{number}", b"x") for number in range(40)])
        async with nodes.engine(peer, settings=QUICK, store=MemorySyncEngine()) as engine:
            await use_everything(engine, source, proxy)
        # A node without a tree is copied by SCAN.
        client.hset(f"{prefix}fsm:node", mapping={"layouts": "", "partitions": 0})
        async with nodes.engine(
            peer, settings=QUICK, store=MemorySyncEngine(), node_id="c"
        ) as other:
            await reaches(other, PeerState.TAILING)
            assert other.health_check().peers[0].events_applied == 41
    assert client.execute_command("ACL", "LOG") == [], "something was refused"
    granted = {rule[1:] for rule in rules if rule.startswith("+")}
    assert used - {"auth"} == granted
    client.close()


@pytest.mark.parametrize("prefix", ["", "site-a:"])
async def test_the_documented_user_is_enough_for_a_foreign_node(
    nodes: Nodes, new_redis_server: Callable[[], RedisServer], prefix: str
) -> None:
    """If this fails the docs grant too little, or too much, for a foreign node to be read."""
    server = new_redis_server()
    foreign = ForeignNode(server, prefix)
    # The server here has no RedisJSON, which makes it refuse a user that may use it.
    rules = [rule for rule in documented_acl("foreign-reader") if rule != "+json.get"]
    make_user(foreign.client, rules)
    foreign.put("a.b", b"x")
    foreign.put("a.c", b"y")
    foreign.write_tree()
    foreign.publish("trimmed", b"0")
    foreign.client.xtrim(f"{prefix}cdc", maxlen=0, approximate=False)
    foreign.publish("in.the.stream", b"z")
    used: set[str] = set()
    store = MemorySyncEngine()
    async with FaultProxy(server.port, on_request=lambda args: used.add(name_of(args))) as proxy:
        url = proxy.url.replace("redis://", f"redis://foreign-reader:{SECRET}@")
        peer = link_to(url, prefix=prefix)
        async with nodes.engine(peer, settings=QUICK, store=store) as engine:
            await engine.wait_synced(15)
            foreign.put("a.c", b"newer", version=2, at=AT + 1)
            foreign.write_tree()
            await engine.repair("a")
            await engine.explain("a.c")
            assert [found async for found in engine.differences("a")] == []
            await proxy.refuse()
            await reaches(engine, PeerState.BACKOFF)
            await proxy.heal()
            await reaches(engine, PeerState.TAILING)
            foreign.publish("tailed", b"1")
            await until(lambda: len(store) == 4)
    assert await held(store, "a.b", "a.c") == {"a.b": b"x", "a.c": b"newer"}
    log = [entry["object"] for entry in foreign.client.execute_command("ACL", "LOG")]
    assert set(log) <= {b"json.get", "json.get"}
    granted = {rule[1:] for rule in rules if rule.startswith("+")}
    assert used - {"auth", "json.get"} == granted
    foreign.client.close()


async def test_the_documented_user_can_harm_nothing(
    new_redis_server: Callable[[], RedisServer],
) -> None:
    """If this fails a node whose configuration leaks gives its peers away."""
    server = new_redis_server()
    with redis.Redis(port=server.port) as client:
        make_user(client, documented_acl())
    with redis.Redis(port=server.port, username="reader", password=SECRET) as reader:
        for command in (
            ("SET", "item:k", "x"), ("DEL", "item:k"), ("XADD", "cdc", "*", "a", "b"),
            ("XTRIM", "cdc", "MAXLEN", "0"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"),
            ("EVAL", "return 1", "0"), ("SHUTDOWN",), ("GET", "secret"), ("CLIENT", "LIST"),
        ):  # fmt: skip
            with pytest.raises(redis.exceptions.NoPermissionError):
                reader.execute_command(*command)


def test_each_command_of_the_documented_user_is_told() -> None:
    """If this fails the table of the docs and the line above it say different things."""
    text = DOCS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text[text.index("| command |") :], re.MULTILINE)
    told = {name.replace("\\|", "|") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    granted = {rule[1:] for rule in documented_acl() if rule.startswith("+")}
    assert granted == {name for name in told if not name.startswith("ssl_")}


async def test_a_port_with_tls_that_is_spoken_to_without_it_is_told_as_that(
    certificates: Certificates, tls_server: Callable[..., TlsServer]
) -> None:
    """If this fails who forgets the s of rediss:// reads of a connection that was reset."""
    server = tls_server(certificates.sign("node"))
    with pytest.raises(ConnectionLostError, match="with TLS, the URL begins with rediss://"):
        await RedisTransport().connect(
            f"redis://127.0.0.1:{server.port}", timeout_sec=5, name="test"
        )


async def test_rejected_credentials_that_are_mended_need_no_restart(
    nodes: Nodes,
    new_redis_server: Callable[[], RedisServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If this fails a new password at a peer is only found after a restart, or is logged."""
    caplog.set_level(logging.DEBUG)
    peer = Peer(new_redis_server())
    peer.write_marker()
    url = peer.server.url.replace("redis://", f"redis://reader:{SECRET}@")
    store = MemorySyncEngine()
    async with nodes.engine(link_to(url), store=store, settings=QUICK) as engine:
        await reaches(engine, PeerState.FAILED)
        assert "rejected the credentials" in last_error(engine)
        make_user(peer.client, documented_acl())
        await reaches(engine, PeerState.TAILING)
        # And while it tails: what is taken away is noticed, and found again.
        peer.client.execute_command("ACL", "SETUSER", "reader", "resetpass", ">other")
        peer.client.execute_command("CLIENT", "KILL", "USER", "reader")
        await reaches(engine, PeerState.FAILED)
        peer.send("k", b"1")
        make_user(peer.client, documented_acl())
        await until(lambda: len(store) == 1)
        shown = f"{engine.journal} {engine.health_check()} {engine.config!r} {caplog.records}"
        assert SECRET not in shown + caplog.text
    peer.close()


async def test_the_documented_user_of_the_store_is_enough(
    nodes: Nodes, new_redis_server: Callable[[], RedisServer]
) -> None:
    """If this fails a node cannot keep its store with the user that the docs tell to make."""
    server, peer = new_redis_server(), Peer(new_redis_server())
    peer.write_marker()
    (rules,) = re.findall(r"`(~\* \+@all .*?)`", DOCS.read_text(encoding="utf-8"))
    with redis.Redis(port=server.port) as client:
        client.execute_command("ACL", "SETUSER", "node", "on", f">{SECRET}", *rules.split())
        url = server.url.replace("redis://", f"redis://node:{SECRET}@")
        async with RedisSyncEngine(url, node_id="b") as store:
            await store.put_json("mine", [1])
            await store.delete("mine")
            async with nodes.engine(
                link_to(peer.server.url), store=store, settings=QUICK
            ) as engine:
                peer.send("k", b"1")
                await until(lambda: client.exists("item:k"))
                await engine.repair()
            client.hset("fsm:node", mapping={"layouts": "", "partitions": 0})
            await store.open()
            assert [item.key async for item in store.scan()] == ["k"]
            log: Any = client.execute_command("ACL", "LOG")
            # Before Redis 7.0 no part of CLIENT can be granted by itself; a name may be refused.
            named = set() if peer.counts else {b"client"}
            assert {entry.get("object", entry.get(b"object")) for entry in log} <= named
    peer.close()
