"""A node's store in its own Redis: the real one.

An item, its stream entry and the peer's position change together in one script, so no crash can
separate them, and any number of processes may write at once. Scripts are kept short (at most 200
items and 4 MiB a call), because Redis serves nobody else meanwhile. All processes of a node open
it with the same ``layouts``; the first that opens it with another set builds or drops the tree. As
long as one of them runs, none can open it with another tombstone ttl or resolver.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, cast

import zstandard
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from fsm_replication.abilities import TOO_OLD, is_too_old, question_of_age
from fsm_replication.errors import (
    BadEntryError,
    ConfigError,
    InvalidKeyError,
    MergeError,
    PeerReplyError,
    ReplicationError,
    StampAheadError,
    StoreError,
    StoreReopenedError,
)
from fsm_replication.foreign import DOTTED, reserved
from fsm_replication.items import (
    EMPTY_HASH,
    LastWriterWins,
    Resolver,
    Stamp,
    SyncItem,
    check_content,
    check_key,
    content_hash,
    encode_json,
    next_stamp,
    resolve,
)
from fsm_replication.layout import (
    FORMAT,
    STAMP_BYTES,
    Keys,
    decode_item,
    decode_stamp,
    encode_item,
    encode_origin,
    encode_stamp,
    glob_escape,
)
from fsm_replication.log import get_logger
from fsm_replication.merkle import OWN, PARTITIONS, Tree, bucket_of
from fsm_replication.ports import (
    Clock,
    Connection,
    PackedArguments,
    Position,
    StreamId,
    SystemClock,
    Transport,
)
from fsm_replication.redaction import Secrets, mask_url
from fsm_replication.redis_tree import RedisTree
from fsm_replication.stores import dotted_scripts
from fsm_replication.stores import redis_scripts as scripts
from fsm_replication.stores.dotted import DottedPublisher
from fsm_replication.stores.far_entries import find_later_entries
from fsm_replication.stores.protocol import ApplyResult, Outcome, Received, SyncEngine, WireForm
from fsm_replication.stores.redis_layouts import LayoutKeeper
from fsm_replication.stores.redis_server import ServerFacts, ask_server_facts
from fsm_replication.stores.redis_upkeep import LEASE_SEC, TtlMemory, Upkeep
from fsm_replication.stream import DataDecoder, Encoded, encode_data, encode_meta
from fsm_replication.transport import RedisTransport, pack_arguments

__all__ = ("RedisSyncEngine",)

ITEMS_PER_CALL: Final = 200
BYTES_PER_CALL: Final = 4 * 1024 * 1024
SCAN_COUNT: Final = 500
# After Redis refused a write for lack of memory or the like, links pause this long.
REFUSAL_SEC: Final = 1.0
STAMPS_PER_FLIGHT: Final = 1000
# The connections over which the tree is read, and repaired items written; no peer can have these names.
TREE_LANE: Final = "\0tree"
REPAIR_LANE: Final = "\0repair"
_REFUSALS: Final = re.compile(r"\b(?:OOM|READONLY|MISCONF|NOREPLICAS)\b")
_AHEAD: Final = re.compile(r"AHEAD (\d+) ((?:[0-9a-f]{2})+)")
_OUTCOMES: Final = {
    ord("0"): Outcome.APPLIED,
    ord("1"): Outcome.SUPERSEDED,
    ord("2"): Outcome.REFUSED,
    ord("4"): Outcome.REFUSED,
}
# How long closing waits for Redis to hear of it.
LEAVE_SEC: Final = 1.0
_NO_ITEM: Final = "its key holds something that is no item"
_RESERVED: Final = "the dotted layout keeps its own under names that begin so"
_Args = list[bytes | str | int]
_NO_ARGUMENTS: Final = PackedArguments(0, b"")
_TYPE_BYTE: Final = {"binary": b"\x00", "json": b"\x01"}


class RedisSyncEngine(SyncEngine):
    """Keeps items in Redis and publishes each change to the node's CDC stream.

    ``url`` is redis://, rediss:// or unix://. ``redis_prefix`` stands before every key and carries
    its own trailing colon. The stream is trimmed to about ``stream_maxlen`` entries. Tombstones
    are kept until max(expiry, arrival) + grace. Times are in seconds, sizes in bytes. More calls at
    once than ``connections_max`` wait for each other. A Redis that may evict keys is refused unless
    ``allow_eviction`` is set. Use it as an async context manager, or call ``open`` and ``close``;
    while it is open a task of its own keeps the marker key up to date.

    A changed ``tombstone_ttl_sec`` is announced to readers when all that is kept was brought in line
    with it, in the background.

    :raises ConfigError: if the URL cannot be used, or a layout cannot be kept.
    """

    def __init__(
        self,
        url: str,
        *,
        node_id: str,
        redis_prefix: str = "",
        stream_maxlen: int = 100_000,
        layouts: Sequence[str] = (OWN,),
        resolver: Resolver | None = None,
        tombstone_ttl_sec: float = 7 * 86_400,
        tombstone_grace_sec: float = 86_400,
        payload_bytes: int = 16 * 1024 * 1024,
        timeout_sec: float = 10.0,
        connections_max: int = 64,
        allow_eviction: bool = False,
        clock: Clock | None = None,
        transport: Transport | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.node_id = node_id
        self._url = url
        self._timeout_sec = timeout_sec
        self._rng = rng or random.SystemRandom()
        self._transport = transport or RedisTransport(clock)
        # Replication writes over a connection of its own for each peer, one call at a time:
        # batches of one peer stay in order, and a cancelled call costs nobody else a connection.
        self._lanes: dict[str, Connection] = {}
        self._locks = defaultdict[str, asyncio.Lock](asyncio.Lock)
        unknown = sorted(set(layouts) - {OWN, DOTTED})
        if unknown:
            raise ConfigError([f"store.layouts: there is no layout {', '.join(unknown)}"])
        if DOTTED in layouts and OWN not in layouts:
            raise ConfigError(['store.layouts: "own" is to be named beside "dotted"'])
        self._resolver = resolver or LastWriterWins()
        self._closed = False
        self.keys = Keys(redis_prefix)
        self._layouts = frozenset(layouts)
        self._tree = RedisTree(self._call_many, self.keys, self._sweep, layouts=self._layouts)
        self._tree_key = self.keys.tree if OWN in layouts else ""
        self._dirty_key = self.keys.dirty if DOTTED in layouts else ""
        self._where = mask_url(url)
        self._secrets = Secrets.of(url)
        self._ttl_ms = round(tombstone_ttl_sec * 1000)
        self._grace_ms = round(tombstone_grace_sec * 1000)
        self._allow_eviction = allow_eviction
        self._keeper = LayoutKeeper(
            self.keys, self._layouts, self._run, self._build, self._call,
            self._scan_keys, self._scan_raw,
        )  # fmt: skip
        self._clock = clock or SystemClock()
        self._log = get_logger("store", node_id=node_id)
        self._token = f"{self._rng.getrandbits(128):032x}"
        self._upkeep = Upkeep(
            self._change, self._scan_items, self._ttl_announced, self._token, self._clock, self._log
        )
        self._ttl_memory: TtlMemory | None = None
        # The shortest ttl that has counted until the one of this store is announced.
        self._least_ttl_ms = self._ttl_ms
        self._facts: ServerFacts | None = None
        self._publisher: DottedPublisher | None = None
        if DOTTED in layouts:
            self._publisher = DottedPublisher(
                self.keys, self._run, self._call_many, self._fetch_stamped,
                self._clock, self._rng, self._log,
            )  # fmt: skip
        # What every script that changes items begins with.
        self._head_keys = (
            self.keys.stream, self.keys.positions, self.keys.marker, self.keys.live,
            self.keys.processes,
        )  # fmt: skip
        self._head: tuple[str | int, ...] = (
            stream_maxlen, self._ttl_ms, self._grace_ms, self._resolver.name, self.keys.item_prefix,
            self._tree_key, self._dirty_key,
        )  # fmt: skip
        self._payload_bytes = payload_bytes
        self._decoder = DataDecoder(payload_bytes)
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._origin = encode_origin(node_id)
        self._meta_tail = f',"origin":{json.dumps(node_id, ensure_ascii=False)}}}'.encode()
        self._incarnation: str | None = None
        self._refused_until = 0.0
        self._opening = asyncio.Lock()
        pool = _new_pool(url, timeout_sec, connections_max)
        if pool is None:
            raise ConfigError(["the store's URL is not a redis://, rediss:// or unix:// URL"])
        self._redis = Redis.from_pool(pool)
        self._scripts = {
            text: self._redis.register_script(text)
            for text in (
                scripts.OPEN,
                scripts.BEAT,
                scripts.LEAVE,
                scripts.REALIGN,
                scripts.ANNOUNCE,
                scripts.APPLY,
                scripts.MERGE,
                scripts.PUT,
                scripts.DELETE,
                scripts.FETCH,
                scripts.SWEEP,
                scripts.BUILD,
                scripts.CLEAR,
                dotted_scripts.LEASE,
                dotted_scripts.RENEW,
                dotted_scripts.RELEASE,
                dotted_scripts.PUBLISH,
                dotted_scripts.FOLD,
                scripts.CLEAR_BRANCH,
            )
        }

    # Opening and closing.

    async def open(self) -> None:
        """Write the node's marker key, or check the one that is there.

        :raises StoreError: if Redis cannot be reached, is too old, may evict keys, or belongs to another
            node; or if another process of this node runs with another tombstone ttl or resolver.
        """
        self._closed = False
        await self._open_in_turn()

    async def _reopen(self) -> None:
        """Open again on behalf of a call under way.

        :raises StoreError: if that fails, or the store was closed meanwhile.
        """
        self._check_open()
        await self._open_in_turn()

    async def _open_in_turn(self) -> None:
        # One after the other: a second one would announce a tree that the first still builds.
        async with self._opening:
            await self._open()

    async def _open(self) -> None:
        await self._check_server()
        own = bool(self._tree_key)
        problem, *found = await self._run(
            scripts.OPEN,
            [self.keys.marker, self.keys.processes, self.keys.stream],
            [
                self.node_id,
                FORMAT,
                self._ttl_ms,
                self.resolver.name,
                f"{self._rng.getrandbits(128):032x}",
                OWN if own else "",
                PARTITIONS if own else 0,
                self._token,
                round(LEASE_SEC * 1000),
                self.keys.tree,
                self.keys.live,
            ],
        )
        if problem:
            raise self._refusal(problem, found)
        incarnation, layouts, must_realign, least, *earlier = found
        self._incarnation = incarnation.decode()
        self._note_ttl(earlier)
        self._least_ttl_ms = int(least)
        await self._keeper.keep({name for name in layouts.decode().split(",") if name})
        # It may have been closed meanwhile, and nobody would stop what begins here.
        self._check_open()
        self._upkeep.start(must_realign=bool(must_realign))
        if self._publisher is not None:
            self._publisher.start()

    def _refusal(self, problem: bytes, found: Sequence[bytes]) -> StoreError:
        texts = [raw.decode("utf-8", "replace") for raw in found]
        if problem != b"running":
            return StoreError(
                f"{self._where} belongs to another node: its {problem.decode()} is {texts[0]!r} (this is"
                f" node {self.node_id!r}, format {FORMAT})"
            )
        name, value = texts
        mine = {"tombstone_ttl_ms": str(self._ttl_ms), "resolver": self.resolver.name}[name]
        return StoreError(
            f"{self._where}: another process of node {self.node_id!r} runs with {name} {value!r}, this one"
            f" is configured with {mine!r}: stop all processes of the node before one starts with another"
            f" (one that was killed counts for {LEASE_SEC:g} s)"
        )

    def _ttl_announced(self, earlier: Sequence[bytes]) -> None:
        self._least_ttl_ms = self._ttl_ms
        self._note_ttl(earlier)

    def _note_ttl(self, earlier: Sequence[bytes]) -> None:
        """Take in what the marker says of an earlier ttl: nothing, or what was known and when."""
        known, changed = earlier
        if known.isdigit() and changed.isdigit():
            self._ttl_memory = TtlMemory(int(known), int(changed))
        else:
            self._ttl_memory = None

    def deletes_known_ms(self, now_ms: int) -> int:
        """Return for how long before ``now_ms`` every delete is known."""
        known, memory = min(self._ttl_ms, self._least_ttl_ms), self._ttl_memory
        return known if memory is None else min(known, memory.known_at(now_ms))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know of this Redis, as sentences; empty before it was opened."""
        if self._facts is None:
            return ()
        return tuple(filter(None, (self._facts.eviction, self._facts.volatility)))

    async def _sweep(self) -> None:
        """Take expired tombstones out of the tree, so that it is as every other node's."""
        while await self._change(scripts.SWEEP, [ITEMS_PER_CALL, ""]) >= ITEMS_PER_CALL:
            pass

    @property
    def resolver(self) -> Resolver:
        """How two live items of one key become one."""
        return self._resolver

    @property
    def tree(self) -> Tree | None:
        """The tree of this node's keys, None where ``layouts`` does not name our own."""
        return self._tree if OWN in self._layouts else None

    async def kept_out(self) -> int:
        """Return how many live keys the dotted tree cannot hold, as far as it is up to date.

        :raises StoreError: if Redis fails.
        """
        return int(await self._call("SCARD", self.keys.kept_out))

    async def live_items(self) -> int:
        """Return how many live items there are.

        :raises StoreError: if Redis fails.
        """
        return int(await self._call("GET", self.keys.live) or 0)

    async def _check_server(self) -> None:
        question: Any = self._redis.execute_command
        try:
            await question(*question_of_age(self.keys.stream))
        except (RedisError, OSError) as error:
            if is_too_old(str(error)):
                raise StoreError(f"{self._where}: {TOO_OLD}") from None
            raise self._store_error(error) from None
        before, self._facts = self._facts, await ask_server_facts(self._ask_freely)
        if self._facts.evicts and not self._allow_eviction:
            raise StoreError(
                f"{self._where}: {self._facts.eviction}. Set maxmemory-policy to noeviction (CONFIG SET, and"
                " in Redis's own configuration), or store.allow_eviction here if that may happen"
            )
        if self._facts != before:
            if self._facts.eviction:
                self._log.warning("store_may_evict", store=self._where, why=self._facts.eviction)
            if self._facts.volatility:
                self._log.info("store_is_volatile", store=self._where, why=self._facts.volatility)

    async def _ask_freely(self, *args: str) -> Any:
        """Send a command that the user may not be allowed to use; None if it is refused."""
        try:
            return await self._redis.execute_command(*args)  # type: ignore[no-untyped-call]
        except ResponseError:
            return None
        except (RedisError, OSError) as error:
            raise self._store_error(error) from None

    async def close(self) -> None:
        """Close all connections; calls under way and later ones fail; a second call does nothing."""
        was_open, self._closed = not self._closed, True
        if self._publisher is not None:
            await self._publisher.stop()
        await self._upkeep.stop()
        if self._incarnation is not None and was_open:
            await self._leave()
        while self._lanes:
            _, lane = self._lanes.popitem()
            lane.close()
            await lane.wait_closed()
        await self._redis.aclose()

    async def _leave(self) -> None:
        """Tell other processes that this one is gone; where Redis is gone too they wait a while."""
        try:
            async with self._clock.timeout(LEAVE_SEC):
                await self._eval(scripts.LEAVE, [self.keys.processes], [self._token])
        except (RedisError, OSError, TimeoutError) as error:
            self._secrets.scrub_error(error)
            self._log.debug("leave_not_told", error=error)

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # What replication needs.

    async def incarnation(self) -> str:
        """Return the random id written when this Redis was first opened.

        :raises StoreError: if it cannot be read, or is gone: then the store is another one.
        """
        raw = await self._call("HGET", self.keys.marker, "incarnation")
        if raw is None:
            await self._reopen()
            assert self._incarnation is not None
            return self._incarnation
        text: str = raw.decode()
        self._incarnation = text
        return text

    async def ping(self) -> None:
        """Return if Redis answers, after one round trip.

        :raises StoreError: if it does not.
        """
        await self._call("PING")

    def should_accept_writes(self) -> bool:
        """Return False for a second after Redis refused a write: out of memory, read-only, ..."""
        return self._clock.monotonic() >= self._refused_until

    async def apply_many(
        self, changes: Sequence[SyncItem], received: Received | None = None
    ) -> ApplyResult:
        """Keep what is newer, publish it, and note the peer's position with the last part.

        A change is refused where its key in Redis holds something that is no item.

        :raises StoreError: if Redis fails; what was applied until then stays applied.
        :raises StoreReopenedError: once, for a peer whose connection was lost and stands again; and
            whenever the store is not the one that is meant: look at ``incarnation`` and
            ``applied_position`` before going on.
        """
        outcomes: list[Outcome] = []
        live_deleted = live_added = 0
        reasons: dict[int, str] = {}
        # Each peer has to hear by itself that the store was lost, before its next position is kept.
        name = "" if received is None else received.peer_id or REPAIR_LANE
        meant = "" if received is None else received.incarnation
        lock = self._locks[name]
        if not self._resolver.by_stamp:
            async with lock:
                return await self._apply_merging(await self._lane(name), changes, received)
        if received is not None and received.encoded is not None:
            calls = cast("list[PackedArguments]", received.encoded)
        else:
            wire = received.wire if received is not None else None
            calls = self._encode_calls(changes, wire or [None] * len(changes))
        async with lock:
            lane = await self._lane(name)
            for number, args in enumerate(calls, 1):
                last = number == len(calls)
                peer, position = _position_args(received) if last else ("", "")
                if not args.number and not position:
                    break
                codes, deleted, added = await self._apply(
                    lane, scripts.APPLY, peer, position, args, meant
                )
                outcomes += [_OUTCOMES[code] for code in codes]
                live_deleted += deleted
                live_added += added
        if Outcome.REFUSED in outcomes:
            reasons = self._why_refused(changes, outcomes)
        return ApplyResult(outcomes, reasons, live_deleted, live_added)

    def _why_refused(
        self, changes: Sequence[SyncItem], outcomes: Sequence[Outcome]
    ) -> dict[int, str]:
        return {
            index: _RESERVED if self._dirty_key and reserved(change.key) else _NO_ITEM
            for index, (change, outcome) in enumerate(zip(changes, outcomes, strict=True))
            if outcome is Outcome.REFUSED
        }

    def _check_key(self, key: str) -> None:
        check_key(key)
        if self._dirty_key and reserved(key):
            raise InvalidKeyError(f"{key!r}: {_RESERVED}")

    async def _apply_merging(
        self, lane: Connection, changes: Sequence[SyncItem], received: Received | None
    ) -> ApplyResult:
        """Merge each change with what is held, in rounds: what changed meanwhile is made anew."""
        outcomes: list[Outcome | None] = [None] * len(changes)
        unmerged: dict[int, str] = {}
        meant = "" if received is None else received.incarnation
        live_deleted = live_added = 0
        # A key that comes twice in one call is taken in turn, so that the second sees the first.
        while None in outcomes:
            turn: dict[str, int] = {}
            for index, change in enumerate(changes):
                if outcomes[index] is None and len(turn) < ITEMS_PER_CALL:
                    turn.setdefault(change.key, index)
            deleted, added = await self._merge_round(lane, changes, turn, outcomes, unmerged, meant)
            live_deleted += deleted
            live_added += added
        peer, position = _position_args(received)
        if position:
            await self._apply(lane, scripts.APPLY, peer, position, _NO_ARGUMENTS, meant)
        done = [outcome for outcome in outcomes if outcome is not None]
        reasons = self._why_refused(changes, done) | unmerged
        return ApplyResult(done, reasons, live_deleted, live_added)

    async def _merge_round(
        self,
        lane: Connection,
        changes: Sequence[SyncItem],
        turn: Mapping[str, int],
        outcomes: list[Outcome | None],
        unmerged: dict[int, str],
        meant: str,
    ) -> tuple[int, int]:
        keys, args, filled = list(turn), list[bytes | str | int](), 0
        tried: list[int] = []
        held_items = await self._fetch(keys)
        for key, held in zip(keys, held_items, strict=False):
            try:
                made = resolve(self._resolver, held, changes[turn[key]])
            except MergeError as error:
                unmerged[turn[key]] = str(error)
                outcomes[turn[key]] = Outcome.REFUSED
                continue
            if made is None:
                outcomes[turn[key]] = Outcome.SUPERSEDED
                continue
            form = self._wire_form(made)
            stamp = b"" if held is None else encode_stamp(held)
            digest = "" if made.deleted else made.content_hash.hex()
            raw, value, bucket = encode_item(made, form.data)
            args += (raw, value, digest, form.meta, bucket, stamp)
            tried.append(turn[key])
            filled += len(value)
            if filled > BYTES_PER_CALL:
                break
        if not tried:
            return 0, 0
        made_of = pack_arguments(args)
        codes, deleted, added = await self._apply(lane, scripts.MERGE, "", "", made_of, meant)
        for index, code in zip(tried, codes, strict=True):
            outcomes[index] = _OUTCOMES.get(code)
        return deleted, added

    async def _lane(self, name: str) -> Connection:
        self._check_open()
        lane = self._lanes.get(name)
        if lane is None or lane.closed:
            was_lost = lane is not None
            try:
                lane = await self._transport.connect(
                    self._url, timeout_sec=self._timeout_sec, name="fsm_replication:store"
                )
            except ReplicationError as error:
                raise self._store_error(error) from None
            if self._closed:
                lane.close()
                await lane.wait_closed()
                self._check_open()
            if was_lost and name not in ("", TREE_LANE):
                # Redis may have come back empty, or without its last second: whoever writes a
                # position must first look which of his batches it still has.
                try:
                    await self._reopen()
                except BaseException:
                    lane.close()
                    raise
                self._lanes[name] = lane
                raise StoreReopenedError(f"{self._where} was lost and is back")
            self._lanes[name] = lane
        return lane

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self._where}: the store was closed")

    async def _apply(
        self,
        lane: Connection,
        text: str,
        peer_id: str,
        position: str,
        args: PackedArguments,
        meant: str,
    ) -> tuple[bytes, int, int]:
        keys = self._head_keys
        head = (len(keys), *keys, *self._head, peer_id, position, meant)
        timeout = self._timeout_sec
        try:
            try:
                sha = self._scripts[text].sha
                codes, deleted, added = await lane.call(
                    "EVALSHA", sha, *head, timeout_sec=timeout, tail=args
                )
            except PeerReplyError as error:
                if error.code != "NOSCRIPT":
                    raise
                codes, deleted, added = await lane.call(
                    "EVAL", text, *head, timeout_sec=timeout, tail=args
                )
        except ReplicationError as error:
            code = error.code if isinstance(error, PeerReplyError) else ""
            if code == scripts.NO_MARKER:
                raise StoreReopenedError(f"{self._where} was emptied or replaced") from None
            if code != scripts.RECONFIGURED:
                raise self._store_error(error) from None
        else:
            return codes, deleted, added
        # Another process has changed it while this one was not heard of; unless that one still runs, this
        # one changes it back.
        await self._reopen()
        raise StoreReopenedError(f"{self._where} was opened with another configuration meanwhile")

    def encode(self, changes: Sequence[SyncItem], wire: Sequence[WireForm | None]) -> object:
        """Return the arguments of each script call that these changes take."""
        # What a merging resolver writes depends on what is held by then.
        return self._encode_calls(changes, wire) if self._resolver.by_stamp else None

    def _encode_calls(
        self, changes: Sequence[SyncItem], wire: Sequence[WireForm | None]
    ) -> list[PackedArguments]:
        calls: list[PackedArguments] = []
        tree = bool(self._tree_key)
        args: _Args = []
        filled, most = 0, 5 * ITEMS_PER_CALL
        for item, given in zip(changes, wire, strict=True):
            form = given or self._wire_form(item)
            data = form.data
            if args and (len(args) >= most or filled + len(data) > BYTES_PER_CALL):
                calls.append(pack_arguments(args))
                args, filled = [], 0
            key, value, bucket = encode_item(item, data, tree=tree)
            digest = "" if item.deleted else item.content_hash.hex()
            args += (key, value, digest, form.meta, bucket)
            filled += len(data)
        calls.append(pack_arguments(args) if args else _NO_ARGUMENTS)
        return calls

    def _wire_form(self, item: SyncItem) -> WireForm:
        return Encoded(encode_data(item.content, self._compressor), encode_meta(item))

    async def get_many(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what is held, tombstones included.

        :raises StoreError: if Redis fails or an item cannot be read.
        """
        found: list[SyncItem | None] = []
        while len(found) < len(keys):
            found += await self._fetch(keys[len(found) : len(found) + ITEMS_PER_CALL])
        return found

    async def _fetch(self, keys: Sequence[str]) -> list[SyncItem | None]:
        """Return what is held for the first of these keys.

        As many as fit a bounded reply, and as are decompressed in a turn of the loop.
        """
        return [item for item, _ in await self._read(keys, self._decode)]

    async def _fetch_stamped(self, keys: Sequence[str]) -> list[tuple[SyncItem | None, bytes]]:
        """As ``_fetch``, with the order tuples as they lie in Redis; None where it is no item."""
        found = await self._read(keys, self._decode_if_item) if keys else []
        return [(item, raw[:STAMP_BYTES]) for item, raw in found]

    async def _read(
        self, keys: Sequence[str], decode: Callable[[str, bytes], SyncItem | None]
    ) -> list[tuple[SyncItem | None, bytes]]:
        args = [self.keys.item_prefix, BYTES_PER_CALL, *keys]
        raws = await self._run(scripts.FETCH, [], args)
        found: list[tuple[SyncItem | None, bytes]] = []
        filled = 0
        for key, raw in zip(keys, raws, strict=False):
            item = None if raw is None else decode(key, raw)
            found.append((item, raw or b""))
            filled += 0 if item is None else len(item.content)
            if filled > BYTES_PER_CALL:
                break
        return found

    def _decode(self, key: str, raw: bytes) -> SyncItem:
        try:
            return decode_item(key, raw, self._decoder)
        except (BadEntryError, InvalidKeyError) as error:
            raise StoreError(f"{self._where}: the item {key!r} cannot be read: {error}") from None

    def _decode_if_item(self, key: str, raw: bytes) -> SyncItem | None:
        try:
            return self._decode(key, raw)
        except StoreError as error:
            self._log.warning("item_not_published", key=key, error=error)
            return None

    async def stamps(self, keys: Sequence[str]) -> list[Stamp | None]:
        """Return the order tuples of what is held, None also where a key holds no item.

        (The change that comes next is then refused by itself, and its neighbours are not held up.)

        :raises StoreError: if Redis fails.
        """
        self._check_open()
        found: list[Stamp | None] = []
        for begin in range(0, len(keys), STAMPS_PER_FLIGHT):
            try:
                async with self._redis.pipeline(transaction=False) as pipe:
                    for key in keys[begin : begin + STAMPS_PER_FLIGHT]:
                        pipe.getrange(self.keys.item(key), 0, STAMP_BYTES - 1)
                    raws = await pipe.execute(raise_on_error=False)
            except (RedisError, OSError) as error:
                raise self._store_error(error) from None
            found += map(self._stamp, raws)
        return found

    def _stamp(self, raw: bytes | Exception) -> Stamp | None:
        if isinstance(raw, Exception):
            if "WRONGTYPE" in str(raw):
                return None
            raise self._store_error(raw)
        try:
            return decode_stamp(raw) if raw else None
        except BadEntryError:
            return None

    @property
    def keeps_positions(self) -> bool:
        """Return True: they change together with the items."""
        return True

    async def applied_position(self, peer_id: str) -> Position | None:
        """Return the position stored with the last batch from this peer.

        :raises StoreError: if Redis fails.
        """
        # From now on the loss of this connection tells that the position may be another; of one before
        # the answer tells.
        async with self._locks[peer_id]:
            with suppress(StoreReopenedError):
                await self._lane(peer_id)
            await self._lane(peer_id)
        raw = await self._call("HGET", self.keys.positions, peer_id)
        if raw is None:
            return None
        stream_id, _, count = raw.decode().partition(" ")
        return Position(StreamId.parse(stream_id), None if count == "-" else int(count))

    async def wait_published(self, timeout_sec: float) -> None:
        """Return at once: an item and its stream entry change together."""

    # What the application needs.

    async def put(self, key: str, content: bytes, content_type: str = "binary") -> SyncItem:
        """Write an item and publish it; returns it as it is held.

        :raises InvalidKeyError: if the key is not one.
        :raises TypeError: if the content is not bytes.
        :raises ValueError: if the content is too large, its type is neither binary nor json, or it is
            json and the content is not.
        :raises StampAheadError: if the key is held with a stamp more than a day ahead of the server's
            clock: peers would refuse whatever is written over it.
        :raises StoreError: if Redis fails, and the write may then have happened or not; or if the
            key in Redis holds something that is no item.
        """
        return (await self.put_many([(key, content)], content_type))[0]

    async def put_many(
        self,
        items: Mapping[str, bytes] | Sequence[tuple[str, bytes]],
        content_type: str = "binary",
    ) -> list[SyncItem]:
        """Write several items, each as ``put`` would, in as few calls as are short enough.

        :raises InvalidKeyError: if a key is not one; then nothing was written.
        :raises TypeError: if a content is not bytes; then nothing was written.
        :raises ValueError: if a content is too large or not of the type, and then nothing was
            written.
        :raises StampAheadError: if a key is held with a stamp more than a day ahead; then some may
            have been.
        :raises StoreError: if Redis fails; some of the writes may then have happened.
        """
        given = items.items() if isinstance(items, Mapping) else items
        pairs = [(key, check_content(key, content, content_type)) for key, content in given]
        for key, content in pairs:
            self._check_key(key)
            if len(content) > self._payload_bytes:
                raise ValueError(
                    f"{key!r}: {len(content)} bytes of content, the limit is {self._payload_bytes}"
                )
        if not self._resolver.by_stamp:
            return [await self._put_merging(key, content, content_type) for key, content in pairs]
        written: list[SyncItem] = []
        batch: list[tuple[str, bytes]] = []
        args: list[Any] = []
        filled = 0
        for key, content in pairs:
            if batch and (len(batch) >= ITEMS_PER_CALL or filled + len(content) > BYTES_PER_CALL):
                written += await self._put_batch(batch, args, content_type)
                batch, args, filled = [], [], 0
            digest = content_hash(content)
            data = encode_data(content, self._compressor)
            kind = digest + _TYPE_BYTE[content_type]
            head = f'{{"content_type":"{content_type}","version":'.encode()
            batch.append((key, content))
            args += (
                key, kind, self._origin + data, digest.hex(), head, self._meta_tail, bucket_of(key.encode())
            )  # fmt: skip
            filled += len(content)
        if batch:
            written += await self._put_batch(batch, args, content_type)
        return written

    async def _put_batch(
        self, batch: Sequence[tuple[str, bytes]], args: Sequence[Any], content_type: str
    ) -> list[SyncItem]:
        reply = await self._change(scripts.PUT, args)
        return [
            SyncItem(
                key,
                content,
                content_type,
                bytes(args[7 * i + 1][:32]),
                int(reply[2 * i + 1]),
                int(reply[2 * i]),
                False,
                self.node_id,
            )
            for i, (key, content) in enumerate(batch)
        ]

    async def _put_merging(self, key: str, content: bytes, content_type: str) -> SyncItem:
        """Write what a resolver makes of the content and what is held."""
        held = (await self._fetch([key]))[0]
        now = await self.now_ms()
        updated_at, version = next_stamp(None if held is None else held.stamp, now, key=key)
        digest = content_hash(content)
        item = SyncItem(
            key, content, content_type, digest, version, updated_at, False, self.node_id
        )
        try:
            result = await self.apply_many([item])
        except StoreReopenedError:
            await self._reopen()
            result = await self.apply_many([item])
        if result.refused:
            raise StoreError(f"{self._where}: {key!r}: {result.reasons[0]}")
        made = (await self._fetch([key]))[0]
        # Where somebody has deleted it since, the write did happen before that.
        return item if made is None or made.deleted else made

    async def put_json(self, key: str, value: Any) -> SyncItem:
        """Write a value as compact JSON.

        :raises TypeError: if the value cannot be written as JSON.
        :raises ValueError: if it holds NaN or an infinite number; and as ``put`` does.
        """
        return await self.put(key, encode_json(key, value), "json")

    async def delete(self, key: str) -> bool:
        """Delete an item and publish that; False, and no event, if there was no live one.

        :raises InvalidKeyError: if the key is not one.
        :raises StampAheadError: if the key is held with a stamp more than a day ahead.
        :raises StoreError: if Redis fails; the delete may then have happened or not.
        """
        self._check_key(key)
        kind = EMPTY_HASH + _TYPE_BYTE["binary"]
        args = [key, kind, self._origin, self._meta_tail, bucket_of(key.encode())]
        return bool(await self._change(scripts.DELETE, args))

    async def now_ms(self) -> int:
        """Return the time by which it stamps: the server's, in milliseconds since the epoch.

        :raises StoreError: if Redis fails.
        """
        seconds, micros = await self._call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def replace(self, item: SyncItem, held: Stamp) -> bool:
        """Put an item in the place of exactly what ``held`` names, even if it is older, and publish it.

        Item, tree and stream entry change together, as ever. It is a person's way out where a wrong
        clock has stamped a key far ahead; peers that hold what was replaced keep that. Before an older
        item is put there, the entries of the key that would win over it leave the stream: a reader that
        is late misses them, and compares. False, and nothing is put, if something else is held by now.

        :raises InvalidKeyError: if the key is not one.
        :raises StoreError: if Redis fails, and it may then have happened or not; or if the key in
            Redis holds something that is no item.
        """
        self._check_key(item.key)
        form = self._wire_form(item)
        key, value, bucket = encode_item(item, form.data)
        digest = "" if item.deleted else item.content_hash.hex()
        args = pack_arguments((key, value, digest, form.meta, bucket, encode_stamp(held)))
        async with self._locks[""]:
            lane = await self._lane("")
            # First: who is killed in between leaves the far stamp, and may do all of it again.
            if item.stamp < held and (await self.stamps([item.key]))[0] == held:
                await self._take_back(lane, item)
            codes, _, _ = await self._apply(lane, scripts.MERGE, "", "", args, "")
        if _OUTCOMES.get(codes[0]) is Outcome.REFUSED:
            raise StoreError(f"{self._where}: {item.key!r}: {_NO_ITEM}")
        return _OUTCOMES.get(codes[0]) is Outcome.APPLIED

    async def _take_back(self, lane: Connection, item: SyncItem) -> None:
        """Take what would win over an item out of the stream."""
        stream, timeout = self.keys.stream, self._timeout_sec
        try:
            async for ids in find_later_entries(lane, stream, item, timeout):
                if ids:
                    await lane.call("XDEL", stream, *ids, timeout_sec=timeout)
        except ReplicationError as error:
            raise self._store_error(error) from None

    async def scan(self, prefix: str = "") -> AsyncIterator[SyncItem]:
        """Yield live items whose keys start with ``prefix``, in no order.

        What changes meanwhile may or may not be seen, and an item may come twice, as with SCAN.

        :raises StoreError: if Redis fails or an item cannot be read.
        """
        async for found in self._scan_keys(prefix):
            keys = found
            while keys:
                items = await self._fetch(keys[:ITEMS_PER_CALL])
                keys = keys[len(items) :]
                for item in items:
                    if item is not None and not item.deleted:
                        yield item

    async def _scan_items(self, prefix: str = "") -> AsyncIterator[list[bytes]]:
        cut = len(self.keys.item_prefix.encode())
        async for raws in self._scan_raw(glob_escape(self.keys.item(prefix)) + "*"):
            yield [raw[cut:] for raw in raws]

    async def _scan_keys(self, prefix: str = "") -> AsyncIterator[list[str]]:
        async for raws in self._scan_items(prefix):
            try:
                yield [raw.decode() for raw in raws]
            except UnicodeDecodeError as error:
                raise StoreError(f"{self._where}: a key is not UTF-8: {error.object!r}") from None

    async def _scan_raw(self, pattern: str) -> AsyncIterator[list[bytes]]:
        cursor: Any = 0
        while True:
            cursor, raws = await self._call("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
            yield raws
            if int(cursor) == 0:
                return

    # Calls to Redis; foreign exceptions end here.

    async def _call_many(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        async with self._locks[TREE_LANE]:
            lane = await self._lane(TREE_LANE)
        try:
            replies = await lane.pipeline(commands, timeout_sec=self._timeout_sec)
        except ReplicationError as error:
            raise self._store_error(error) from None
        for reply in replies:
            if isinstance(reply, PeerReplyError):
                raise self._store_error(reply)
        return replies

    async def _call(self, *args: Any) -> Any:
        self._check_open()
        try:
            return await self._redis.execute_command(*args)  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            raise self._store_error(error) from None

    async def _change(self, text: str, args: Sequence[Any]) -> Any:
        """Run a script that begins with the common head; where the marker is not ours, open it first."""
        self._check_open()
        try:
            try:
                return await self._eval(text, self._head_keys, [*self._head, *args])
            except ResponseError as error:
                if not str(error).startswith((scripts.NO_MARKER, scripts.RECONFIGURED)):
                    raise
            # Redis came back empty; it is this node's store anew before anything is written to it. Or
            # another process has changed what the marker says: it is asked whether that still runs.
            await self._reopen()
            return await self._eval(text, self._head_keys, [*self._head, *args])
        except (RedisError, OSError) as error:
            ahead = _AHEAD.fullmatch(str(error))
            code, _, key = str(error).partition(" ")
            self._secrets.scrub_error(error)
            if ahead is not None:
                key = bytes.fromhex(ahead[2]).decode("utf-8", "replace")
                raise StampAheadError(key, int(ahead[1])) from None
            if code == scripts.NO_ITEM:
                raise StoreError(f"{self._where}: {key!r}: {_NO_ITEM}") from None
            raise self._store_error(error) from None

    async def _build(self, args: Sequence[Any]) -> Any:
        """Plant leaves while the store is being opened, when it must not be opened again."""
        return await self._run(scripts.BUILD, self._head_keys, [*self._head, *args])

    async def _run(self, text: str, keys: Sequence[str | bytes], args: Sequence[Any]) -> Any:
        self._check_open()
        try:
            return await self._eval(text, keys, args)
        except (RedisError, OSError) as error:
            raise self._store_error(error) from None

    async def _eval(self, text: str, keys: Sequence[str | bytes], args: Sequence[Any]) -> Any:
        try:
            return await self._redis.evalsha(self._scripts[text].sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self._redis.eval(text, len(keys), *keys, *args)

    def _store_error(self, error: Exception) -> StoreError:
        # The client's errors quote the server, and hang on to ours as their context.
        self._secrets.scrub_error(error)
        text = (str(error) or type(error).__name__).removeprefix(f"{self._where}: ")
        # redis-py has a class for some of these, and then takes the word out of the text.
        if isinstance(error, ReadOnlyError | OutOfMemoryError) or _REFUSALS.search(text):
            self._refused_until = self._clock.monotonic() + REFUSAL_SEC
        return StoreError(f"{self._where}: {text}")

    def __repr__(self) -> str:
        return f"<RedisSyncEngine {self.node_id!r} at {self._where}>"


def _new_pool(url: str, timeout_sec: float, connections_max: int) -> BlockingConnectionPool | None:
    try:
        return BlockingConnectionPool.from_url(
            url,
            decode_responses=False,
            protocol=2,
            socket_timeout=timeout_sec,
            socket_connect_timeout=timeout_sec,
            max_connections=connections_max,
            timeout=timeout_sec,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
    except ValueError:
        # What it says quotes the part it could not read, which may be a part of the password: so
        # nothing is raised in here, that would hang on to it as its context.
        return None


def _position_args(received: Received | None) -> tuple[str, str]:
    if received is None or received.position is None:
        return "", ""
    count = received.position.entries_read
    return received.peer_id, f"{received.position.stream_id} {'-' if count is None else count}"
