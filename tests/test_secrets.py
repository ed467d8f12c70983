"""Credentials: no server's text and no URL brings them to a log, an error, a screen or a metric."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from urllib.parse import quote, quote_plus

import pytest
from conftest import until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from fsm_replication import (
    MemorySyncEngine,
    OutboxPublisher,
    PeerConfig,
    PeerState,
    RedisSyncEngine,
    ReplicationConfig,
    ReplicationEngine,
    StoreConfig,
    StoreError,
)
from fsm_replication.cli.node import check_node
from fsm_replication.config import CursorConfig, ReconnectConfig, Settings, StartupConfig
from fsm_replication.errors import ConfigError, PeerRefusedError, ReplicationError
from fsm_replication.redaction import Secrets, mask_url, redact
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.connector import _check_marker, _Found

USER, PASSWORD = 'al"ice b/€', "s3cr%t'\\p@ss\nwörd"
QUICK = Settings(
    startup=StartupConfig(when_no_peer="run"), reconnect=ReconnectConfig(first=0.05, longest=0.1)
)
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "in percents": lambda text: quote(text, safe=""),
    "in a form": quote_plus,
    "every byte in percents": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
    "in percents twice": lambda text: quote(quote(text, safe=""), safe=""),
    "as Python": lambda text: repr(text)[1:-1],
    "as bytes": lambda text: repr(text.encode())[2:-1],
    "as JSON": lambda text: json.dumps(text)[1:-1],
    "behind backslashes": lambda text: "".join(f"\\{one}" for one in text),
    "in capitals": lambda text: "".join(one.upper() if one.isascii() else one for one in text),
    "partly in percents": lambda text: "".join(
        f"%{ord(one):02x}" if at % 2 and one.isascii() else one for at, one in enumerate(text)
    ),
}
spellings = st.sampled_from(sorted(SPELLINGS))
# Surrogates have no UTF-8: no URL holds them. What is shorter is masked where it stands alone.
texts = st.text(st.characters(codec="utf-8"), min_size=4, max_size=40)


def url_of(user: str, password: str, server: str = "127.0.0.1:1") -> str:
    """Return a URL with these credentials."""
    return f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{server}"


@settings(max_examples=25)
@given(texts, texts, spellings, st.booleans())
@example("reader", "hunter2", "as it is", False)
@example("reader", "aaaa", "in percents", True)
def test_credentials_are_found_in_every_spelling(
    user: str, password: str, spelling: str, in_query: bool
) -> None:
    """If this fails a server that quotes what it was sent brings credentials into our logs."""
    spell = SPELLINGS[spelling]
    url = url_of(user, password)
    if in_query:
        url = f"redis://h:1?us%65r=x&username={quote_plus(user)}&pass%77ord={quote_plus(password)}"
    said = f"ERR unknown command 'X', with args: '{spell(user)}' '{spell(password)}' "
    shown = Secrets.of(url).scrub(said)
    assert shown.startswith("ERR unknown c") or "***" in shown[:14]
    for secret in (user, password):
        for one in {secret, spell(secret)}:
            assert f"'{one}'" not in shown
            assert f"'{one}'".lower() not in shown.lower()
            assert one == "***" or len(one) < 6 or one not in shown


@settings(max_examples=20)
@given(texts, texts, spellings, st.integers(0, 300))
def test_what_a_server_has_cut_is_masked_too(
    user: str, password: str, spelling: str, kept: int
) -> None:
    """If this fails the greater part of a long password is shown, because its end is not."""
    quoted = SPELLINGS[spelling](password)[:kept]
    shown = Secrets.of(url_of(user, password)).scrub(f"ERR args beginning with: {quoted}")
    if len(quoted) >= 60:
        assert quoted not in shown


@settings(max_examples=20)
@given(st.text(max_size=12), st.text(max_size=12))
def test_a_text_without_secrets_stays_as_it_is(before: str, after: str) -> None:
    """If this fails errors are mangled in which no secret stands."""
    text = f"{before}{after}"
    assert Secrets.of("redis://h:1/0?db=3&ssl_cert_reqs=none").scrub(text) == text
    assert Secrets().scrub("x" * 10_000) == "x" * 2048 + "…"


def test_a_short_word_is_masked_where_it_stands_alone() -> None:
    """If this fails a user named "a" makes every error unreadable, or is shown."""
    secrets = Secrets.of("redis://a:pw@h")
    assert secrets.scrub("ERR unknown command 'A' 'pw': a spawn") == (
        "ERR unknown command '***' '***': *** spawn"
    )


def test_odd_texts_take_no_time() -> None:
    """If this fails a peer that knows the password stops the event loop with its errors."""
    secrets = Secrets.of(url_of("\\" * 100, "aaaaaaaa%aaaa" * 40))
    began = time.perf_counter()
    for text in ("\\" * 2048, "a" * 2048, "a%25" * 512, "aaaaaaaa%" * 200):
        secrets.scrub(text)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://u:p@h:6379/0", "redis://***@h:6379/0"),
        ("rediss://:p@[::1]:6379", "rediss://***@[::1]:6379"),
        ("redis://h?password=p@ss&db=1", "redis://h?password=***&db=1"),
        ("redis://h?pass%77ord=secret", "redis://h?pass%77ord=***"),
        ("redis://h?%75sername=me", "redis://h?%75sername=***"),
        ("redis://h?odd=secret", "redis://h?odd=***"),
        ("redis://u:p/ss@h", "redis://***"),
        ("redis://u:p?ss@h", "redis://***"),
        ("redis://u:p#ss@h", "redis://***"),
        ("redis://u:p ss@h", "redis://***@h"),
        ("redis://u:secret", "redis://***"),
        ("unix://u:p@/run/redis.sock", "unix://***@/run/redis.sock"),
        ("unix://u:p/w@/run/redis.sock", "unix://***"),
        ("redis://[u:p@h", "redis://***"),
        ("u:p@h", "***"),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_secret(url: str, shown: str) -> None:
    """If this fails a URL that is odd, or wrong, is shown with a part of its password."""
    assert mask_url(url) == shown


@pytest.mark.parametrize(
    "text", ["at redis://u:hunter2@h", "redis://h?pass%77ord=hunter2 ok", "x://a:hunter2/b@h?c=d"]
)
def test_a_url_within_a_text_is_masked(text: str) -> None:
    """If this fails a URL in an error of ours shows its credentials."""
    assert "hunter2" not in redact(text)
    assert "hunter2" not in str(ReplicationError(text))


# A server that does not know AUTH, and says so.


@asynccontextmanager
async def parrot(spell: Callable[[str], str]) -> AsyncIterator[str]:
    """Run a server that answers everything by an error that quotes it; yields where it is."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readline():
                args = []
                for _ in range(int(head[1:])):
                    size = int((await reader.readline())[1:])
                    args.append((await reader.readexactly(size + 2))[:-2].decode())
                told = " ".join(f"'{spell(arg)}'" for arg in args)
                said = f"ERR unknown command, with args beginning with: {told}"
                writer.write(f"-{said}".replace("\r", " ").replace("\n", " ").encode() + b"\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def shows(text: str, *secrets: str) -> bool:
    """Say whether a text shows a secret in a spelling that is looked for."""
    forms = {spell(one) for one in (USER, PASSWORD, *secrets) for spell in SPELLINGS.values()}
    forms |= {form.replace("\n", " ") for form in forms}
    return any(form in text for form in forms)


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all it hangs on to, printed or not."""
    yield error
    for other in (error.__cause__, error.__context__):
        if other is not None:
            yield from chain_of(other)


def told_by(error: BaseException) -> str:
    """Return everything that an error can tell."""
    parts = [part for one in chain_of(error) for part in (str(one), repr(one), repr(vars(one)))]
    return "\n".join([*parts, *traceback.format_exception(error)])


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_a_server_that_quotes_its_client_tells_nobody(
    spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If this fails AUTH to a proxy brings user and password to log, journal, health or errors."""
    caplog.set_level(logging.DEBUG)
    registry = CollectorRegistry()
    async with parrot(SPELLINGS[spelling]) as server:
        url = url_of(USER, PASSWORD, server)
        config = ReplicationConfig(
            local_node_id="b",
            peers=[PeerConfig(node_id="a", redis_url=url)],
            store=StoreConfig(kind="redis", redis_url=url),
            cursor=CursorConfig(sqlite_path=":memory:"),
            settings=QUICK,
        )
        told = [repr(config), str(config.model_dump_json())]
        with pytest.raises(PeerRefusedError) as refused:
            await RedisTransport().connect(url, timeout_sec=5, name="x")
        told.append(told_by(refused.value))
        with pytest.raises(StoreError) as failed:
            await RedisSyncEngine(url, node_id="b").open()
        told.append(told_by(failed.value))
        engine = ReplicationEngine(config, MemorySyncEngine(), registry=registry)
        async with engine:
            await engine.wait_for_state(PeerState.FAILED, PeerState.BACKOFF, peer_id="a", timeout=5)
            health = engine.health_check()
            assert "***" in str(health.peers[0].last_error)
            told += [repr(health), repr(engine.journal), repr(engine)]
        screen = io.StringIO()
        assert not await check_node(config, Console(file=screen, width=500))
        told += [screen.getvalue(), generate_latest(registry).decode()]
    told += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert "unknown command" in "".join(told)
    for text in told:
        assert not shows(text), text


class EmptyOutbox:
    """An outbox in which nothing waits."""

    resolver = MemorySyncEngine().resolver

    async def read_outbox(self, limit: int) -> list[object]:
        """Return nothing."""
        return []

    async def forget_outbox(self, numbers: object, mark: str) -> None:
        """Do nothing."""

    async def outbox_mark(self) -> str:
        """Return that there is none."""
        return ""

    async def read_items(self, after: str, limit: int) -> list[object]:
        """Return nothing."""
        return []


async def test_a_publisher_tells_no_credentials(caplog: pytest.LogCaptureFixture) -> None:
    """If this fails what the outbox publisher logs shows the credentials of the node's Redis."""
    caplog.set_level(logging.DEBUG)
    async with parrot(SPELLINGS["as it is"]) as server:
        url = url_of(USER, PASSWORD, server)
        async with OutboxPublisher(EmptyOutbox(), url, node_id="b") as publisher:  # type: ignore[arg-type]
            await until(lambda: publisher.last_error is not None)
            assert publisher.last_error is not None
            assert not shows(told_by(publisher.last_error) + repr(publisher))
    assert caplog.records
    for record in caplog.records:
        assert not shows(f"{record.getMessage()} {vars(record)}")


@pytest.mark.parametrize("url", ["redis://u:hunter2/x@h", "redis://u:p@h:hunter2", "hunter2://u@h"])
async def test_a_url_that_cannot_be_read_is_not_quoted(url: str) -> None:
    """If this fails the error of a mistyped URL, or what it hangs on to, shows its password."""
    with pytest.raises(ConfigError) as wrong:
        RedisSyncEngine(url, node_id="b")
    assert "hunter2" not in told_by(wrong.value).replace(url, "")
    with pytest.raises(PeerRefusedError) as refused:
        await RedisTransport().connect(url, timeout_sec=1, name="x")
    assert not any("hunter2" in str(one) for one in chain_of(refused.value)) or "://u@" in url


def test_a_peer_that_names_itself_by_our_password_is_not_quoted() -> None:
    """If this fails what a marker key holds reaches the log unscrubbed."""
    peer = PeerConfig(node_id="a", redis_url=url_of(USER, PASSWORD))
    marker = {b"node_id": f"x {PASSWORD} {USER}".encode(), b"format": b"1"}
    with pytest.raises(PeerRefusedError) as refused:
        _check_marker(marker, _Found.OURS, peer, Settings(), "b", "last-writer-wins")
    assert not shows(str(refused.value))
