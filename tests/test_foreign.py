"""The layout of foreign nodes: hashes and items against data that was written by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsm_replication import foreign
from fsm_replication.errors import BadEntryError, InvalidKeyError
from fsm_replication.foreign import (
    DottedTree,
    children_key,
    decode_foreign,
    dotted_problem,
    encode_foreign,
    hash_key,
    interior_hash,
    is_json_module_missing,
    leaf_hash,
    parent_paths,
    parse_member,
    reserved,
    segments,
)
from fsm_replication.items import NUMBER_MAX, SyncItem

LIMIT = 1_000_000
HEX = "0123456789abcdef" * 4


def sha(data: bytes) -> bytes:
    """Return the raw SHA-256."""
    return hashlib.sha256(data).digest()


def hexsha(data: bytes) -> str:
    """Return the SHA-256 as 64 digits."""
    return hashlib.sha256(data).hexdigest()


def from_json(raw: bytes | str, *, limit: int = LIMIT) -> SyncItem:
    """Decode a RedisJSON document at the key "k"."""
    return decode_foreign("k", raw, kind="json", payload_limit=limit)


def from_string(raw: bytes | str, *, limit: int = LIMIT) -> SyncItem:
    """Decode an item in one string at the key "k"."""
    return decode_foreign("k", raw, kind="string", payload_limit=limit)


def document(payload: bytes, digest: str = "") -> bytes:
    """Return a RedisJSON document, spelled as a server spells it."""
    return (
        b'{"version":3,"timestamp":1700000000123,"state":"default","access_count":7,'
        b'"last_accessed":1700000000999,"payload_hash":"' + digest.encode() + b'",'
        b'"payload":' + payload + b',"audit":{"by":["x",{"payload":1}]}}'
    )


def refused(kind: Literal["json", "string"], raw: Any, *, limit: int = LIMIT) -> str:
    """Return the reason for which an item is refused."""
    with pytest.raises(BadEntryError) as caught:
        decode_foreign("k", raw, kind=kind, payload_limit=limit)
    assert caught.value.detail
    assert len(caught.value.detail) < 300
    return caught.value.reason


# The dotted tree ------------------------------------------------------------------------------


def test_a_leaf_covers_key_version_and_content() -> None:
    """If this fails no foreign node agrees with us about a single key."""
    content = bytes.fromhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert content == sha(b"abc")
    by_hand = sha(b"uk.nhs.patient.123|\x02\x01\x00\x00\x00\x00\x00\x00|" + content)
    assert leaf_hash("uk.nhs.patient.123", 258, content) == by_hand
    largest = sha(b"\xc3\xa4|\xff\xff\xff\xff\xff\xff\x1f\x00|" + content)
    assert leaf_hash("ä", NUMBER_MAX, content) == largest


def test_a_node_covers_its_children_by_segment() -> None:
    """If this fails no foreign node agrees with us about a branch."""
    one, two, three = sha(b"1"), sha(b"2"), sha(b"3")
    by_hand = sha(b"10:" + two + b";9:" + one + b";\xc3\xa4:" + three + b";")
    assert interior_hash([(b"\xc3\xa4", three), (b"9", one), (b"10", two)]) == by_hand
    assert interior_hash(()) == sha(b"")


def test_segments_sort_as_bytes() -> None:
    """If this fails, segments beyond the BMP sort as some other language's strings do."""
    tree = DottedTree()
    for key in ("\U0001f600", "\uffee", "a"):
        tree.set(key, 0, sha(b""))
    leaf = {
        key: sha(key.encode() + b"|" + bytes(8) + b"|" + sha(b""))
        for key in ("\U0001f600", "\uffee", "a")
    }
    parts = (b"a:" + leaf["a"], b"\xef\xbf\xae:" + leaf["\uffee"], b"\xf0\x9f\x98\x80:")
    assert tree.root == sha(b";".join(parts) + leaf["\U0001f600"] + b";")


def test_members() -> None:
    """If this fails a segment with colons is cut in the wrong place."""
    raw = bytes.fromhex(HEX)
    digits = HEX.encode()
    assert parse_member(b"user:" + digits) == ("user", raw)
    assert parse_member(b"user:" + digits.upper()) == ("user", raw)
    assert parse_member(b"a:b::" + digits) == ("a:b:", raw)
    assert parse_member(b"a:" + digits + b":" + digits) == (f"a:{HEX}", raw)
    assert parse_member(b"::" + digits) == (":", raw)
    assert parse_member(b"\xc3\xa4:" + digits) == ("ä", raw)
    assert parse_member(b"user") == ("user", None)
    assert parse_member(b"a:b") == ("a:b", None)
    assert parse_member(b"a:") == ("a:", None)
    assert parse_member(digits) == (HEX, None)
    assert parse_member(b"a:" + digits[:-1]) == (f"a:{HEX[:-1]}", None)
    assert parse_member(b"a:" + digits + b"0") == (f"a:{HEX}0", None)
    assert parse_member(b"a:" + digits[:-1] + b"g") == (f"a:{HEX[:-1]}g", None)
    assert parse_member(b"a:" + digits[:-1] + b" ") == (f"a:{HEX[:-1]} ", None)
    assert parse_member(b"a:" + digits[:-1] + b"\n") == (f"a:{HEX[:-1]}\n", None)


@pytest.mark.parametrize("member", [b"\xff:" + HEX.encode(), b"\xff", b"", b":" + HEX.encode()])
def test_members_that_are_none(member: bytes) -> None:
    """If this fails a bad member ends a comparison, or sends it round in a circle."""
    with pytest.raises(BadEntryError):
        parse_member(member)


def test_names() -> None:
    """If this fails we read and write other Redis keys than foreign nodes do."""
    assert hash_key("", "") == "merkle:hash:"
    assert hash_key("site-a:", "uk.nhs") == "site-a:merkle:hash:uk.nhs"
    assert children_key("", "") == "merkle:children:"
    assert children_key("site-a:", "uk.nhs") == "site-a:merkle:children:uk.nhs"
    assert segments("uk.nhs.1") == ["uk", "nhs", "1"]
    assert segments("") == []
    assert parent_paths("uk.nhs.1") == ["uk.nhs", "uk", ""]
    assert parent_paths("uk") == [""]
    assert parent_paths("") == []


def test_keys_that_do_not_fit() -> None:
    """If this fails the tree takes keys that foreign nodes cannot walk to."""
    assert dotted_problem("a") == ""
    assert dotted_problem("a:b.c") == ""
    assert dotted_problem(".".join("x" * 64)) == ""
    assert "64" in dotted_problem(".".join("x" * 65))
    for key in ("", ".", "a.", ".a", "a..b"):
        assert "empty" in dotted_problem(key)


def test_reserved_keys() -> None:
    """If this fails an item overwrites the stream or a tree."""
    for key in ("cdc", "cdc.1", "merkle:hash:", "item:a", "fsm:node", "fsm:"):
        assert reserved(key)
    for key in ("a", "cd", "CDC", "merkle", "items", "item", "fsm", "a.cdc", "a.fsm:node", ""):
        assert not reserved(key)


def by_hand(leaves: dict[str, tuple[int, bytes]]) -> tuple[dict[str, bytes], int]:
    """Return the hash of every path and the count of keys kept out, computed from nothing."""
    fit = [key for key in leaves if "" not in key.split(".") and key.count(".") < 64]
    held = [key for key in fit if not any(other.startswith(key + ".") for other in fit)]
    hashes: dict[str, bytes] = {}
    names: dict[str, set[str]] = {"": set()}
    for key in held:
        version, digest = leaves[key]
        hashes[key] = sha(key.encode() + b"|" + version.to_bytes(8, "little") + b"|" + digest)
        parts = key.split(".")
        for depth in range(len(parts)):
            names.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
    for path in sorted(names, key=lambda path: (path != "", path.count(".")), reverse=True):
        text = b""
        for name in sorted(names[path], key=str.encode):
            child = f"{path}.{name}" if path else name
            text += name.encode() + b":" + hashes[child] + b";"
        hashes[path] = sha(text)
    return hashes, len(leaves) - len(held)


def check(tree: DottedTree, leaves: dict[str, tuple[int, bytes]], paths: Iterable[str]) -> None:
    """Compare a tree with one made from nothing."""
    hashes, kept_out = by_hand(leaves)
    assert tree.kept_out == kept_out
    assert tree.root == hashes[""]
    for path in {*paths, *hashes}:
        assert tree.hash_of(path) == hashes.get(path)
        below = f"{path}." if path else ""
        assert tree.children(path) == {
            child[len(below) :]: digest
            for child, digest in hashes.items()
            if child and child.startswith(below) and "." not in child[len(below) :]
        }


def test_prefix_keys() -> None:
    """If this fails "user" and "user.1" make a tree that depends on the order of writes."""
    one, two = sha(b"1"), sha(b"2")
    tree = DottedTree()
    assert tree.root == sha(b"")
    assert tree.hash_of("user") is None
    tree.set("user", 1, one)
    alone = sha(b"user|\1" + bytes(7) + b"|" + one)
    assert tree.root == sha(b"user:" + alone + b";")
    tree.set("user.1", 2, two)
    longer = sha(b"user.1|\2" + bytes(7) + b"|" + two)
    assert tree.kept_out == 1
    assert tree.children("") == {"user": sha(b"1:" + longer + b";")}
    assert tree.children("user") == {"1": longer}
    assert tree.children("user.1") == {}
    tree.set("user.1.x", 1, one)
    tree.set("user.2", 2, two)
    assert tree.kept_out == 2
    # What is held back can change and go without a trace.
    before = tree.root
    tree.set("user", 5, two)
    assert (tree.root, tree.kept_out) == (before, 2)
    tree.remove("user.1")
    assert (tree.root, tree.kept_out) == (before, 1)
    tree.remove("user.1.x")
    tree.remove("user.1.x")
    tree.remove("user.2.nothing")
    tree.remove("user.2")
    assert tree.kept_out == 0
    alone = sha(b"user|\5" + bytes(7) + b"|" + two)
    assert tree.children("") == {"user": alone}
    tree.remove("user")
    assert tree.root == sha(b"")


def test_the_tree_counts_what_it_cannot_hold() -> None:
    """If this fails a key that does not fit breaks the tree or goes unnoticed."""
    tree = DottedTree()
    empty = tree.root
    for key in ("a..b", ".", ".".join("x" * 65), "a..b"):
        tree.set(key, 1, sha(b""))
    assert (tree.kept_out, tree.root) == (3, empty)
    tree.remove("a..b")
    assert tree.kept_out == 2
    for key in ("", "\ud800", "x" * 1025):
        with pytest.raises(InvalidKeyError):
            tree.set(key, 1, sha(b""))


def test_only_touched_branches_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails one change costs as much as the whole tree."""
    tree = DottedTree()
    for number in range(100):
        tree.set(f"{number % 10}.{number}.leaf", 1, sha(b""))
    assert tree.root
    computed = []

    def counted(children: Iterable[tuple[bytes, bytes]]) -> bytes:
        computed.append(1)
        return interior_hash(children)

    monkeypatch.setattr(foreign, "interior_hash", counted)
    tree.set("3.13.leaf", 2, sha(b""))
    tree.set("3.13.leaf", 3, sha(b""))
    assert tree.root
    assert len(computed) == 3
    tree.set("3.13.leaf", 3, sha(b""))
    tree.remove("3.13.nothing")
    assert tree.root
    assert len(computed) == 3


SEGMENT = st.sampled_from(["a", "b", "a:b", "ä", "", "ab"])
KEY = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join).filter(bool)
CHANGE = st.tuples(KEY, st.one_of(st.none(), st.integers(0, 2)), st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(CHANGE, max_size=40))
def test_the_tree_equals_one_made_from_nothing(
    changes: list[tuple[str, int | None, bool]],
) -> None:
    """If this fails the order of writes, or when one looked, shows in the hashes."""
    tree = DottedTree()
    leaves: dict[str, tuple[int, bytes]] = {}
    for key, version, look in changes:
        if version is None:
            tree.remove(key)
            leaves.pop(key, None)
        else:
            digest = sha(b"%d" % (version % 2))
            tree.set(key, version, digest)
            leaves[key] = version, digest
        if look:
            check(tree, leaves, [key])
    check(tree, leaves, [key for key, _, _ in changes])


# Documents ------------------------------------------------------------------------------------

SPELLINGS = [
    b'{"b":1,"a":[1.50,true,null]}',
    b'{"a":[1.50,true,null],"b":1}',
    b'{"b": 1, "a": [1.50, true, null]}',
    b'{"a": [1.50, true, null], "b": 1}',
    b'{"b":1,"a":[1.5,true,null]}',
    b'{"a": [1.5, true, null], "b": 1}',
]


@pytest.mark.parametrize("hashed", SPELLINGS)
def test_the_spelling_that_was_hashed_is_found(hashed: bytes) -> None:
    """If this fails a JSON content gets other bytes than its writer hashed."""
    item = from_json(document(SPELLINGS[0], hexsha(hashed)))
    assert item == SyncItem("k", hashed, "json", sha(hashed), 3, 1_700_000_000_123)


@pytest.mark.parametrize(
    "hashed",
    [
        '{"ä":"😀\x7f/","a":"\\n\\u0001"}'.encode(),
        '{"a":"\\n\\u0001","ä":"😀\x7f/"}'.encode(),
        '{"a": "\\n\\u0001", "ä": "😀\x7f/"}'.encode(),
        b'{"\\u00e4":"\\ud83d\\ude00\\u007f/","a":"\\n\\u0001"}',
        b'{"\\u00e4": "\\ud83d\\ude00\\u007f/", "a": "\\n\\u0001"}',
        b'{"a": "\\n\\u0001", "\\u00e4": "\\ud83d\\ude00\\u007f/"}',
    ],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_escapes_are_tried(hashed: bytes, escaped: bool) -> None:
    """If this fails a text beyond ASCII is never found as it was hashed."""
    value = {"ä": "😀\x7f/", "a": "\n\x01"}
    assert json.loads(hashed) == value
    served = json.dumps(value, ensure_ascii=escaped, separators=(",", ":")).encode()
    item = from_json(document(served, hexsha(hashed)))
    assert (item.content, item.content_hash) == (hashed, sha(hashed))


@pytest.mark.parametrize("hashed", [b"[1e16]", b"[1e+16]", b"[10000000000000000.0]", b"[ 1e16 ]"])
def test_numbers_as_served_and_as_python_writes_them(hashed: bytes) -> None:
    """If this fails a large number is found in one spelling only."""
    item = from_json(document(b"[1e16]", hexsha(hashed)))
    found = hashed in {b"[1e16]", b"[1e+16]"}
    assert item.content == (hashed if found else b"[1e16]")
    assert item.content_hash == sha(hashed)


def test_no_spelling_matches() -> None:
    """If this fails an item that was hashed in its own way is lost or never agrees."""
    item = from_json(document(b'{ "b" : "\\u00e4", "a" : 1e400 }', hexsha(b"something else")))
    assert item.content == '{"b":"ä","a":1e400}'.encode()
    assert item.content_hash == sha(b"something else")


@pytest.mark.parametrize("hash_field", [b"", b'"payload_hash":null,', b'"payload_hash":"zz",'])
@pytest.mark.parametrize("payload", [b'{"b": 1, "a": 2}', b"null", b'"x"', b"[]", b"0"])
def test_a_missing_hash_is_computed(hash_field: bytes, payload: bytes) -> None:
    """If this fails a writer without hashes cannot be read."""
    raw = b'{"version":0,"timestamp":0,' + hash_field + b'"payload":' + payload + b"}"
    compact = payload.replace(b" ", b"")
    assert from_json(raw) == SyncItem("k", compact, "json", sha(compact), 0, 0)
    assert from_json(raw.decode()) == from_json(raw)


def test_documents_that_are_none() -> None:
    """If this fails a bad document is taken, or ends the process."""
    assert refused("json", b"") == "item"
    assert refused("json", None) == "item"
    assert refused("json", b"[]") == "item"
    assert refused("json", b"{}") == "item"
    assert refused("json", b'{"version":1,"timestamp":1}') == "item"
    assert refused("json", b'{"version":1,"payload":1}') == "item"
    assert refused("json", b'{"version":"1","timestamp":1,"payload":1}') == "item"
    assert refused("json", b'{"version":true,"timestamp":1,"payload":1}') == "item"
    assert refused("json", b'{"version":1,"timestamp":1,"payload":[1,]}') == "item"
    assert refused("json", b'{"version":1,"timestamp":1,"payload":NaN}') == "item"
    assert refused("json", b'{"version":1,"timestamp":1,"payload":"\xff"}') == "item"
    assert refused("json", b'{"version":1,"timestamp":1,"payload":1,"x":"\xff"}') == "item"
    assert refused("json", b'{"version":1,"timestamp":1,"payload":"\\ud800"}') == "item"
    assert refused("json", '{"version":1,"timestamp":1,"payload":"\ud800"}') == "item"
    assert refused("json", document(b"1").decode().encode("utf-16")) == "item"


@pytest.mark.parametrize("number", ["-1", "9007199254740992", "9" * 30, "9" * 5000])
def test_numbers_out_of_range(number: str) -> None:
    """If this fails a store gets a number that it cannot compare."""
    assert refused("json", f'{{"version":{number},"timestamp":1,"payload":1}}') == "range"
    assert refused("json", f'{{"version":1,"timestamp":{number},"payload":1}}') == "range"
    whole = '{"version":%s,"updated_at":%s,"content_type":"binary","content":[]}'
    assert refused("string", whole % (number, 1)) == "range"
    assert refused("string", whole % (1, number)) == "range"
    edge = from_string(whole % (NUMBER_MAX, NUMBER_MAX))
    assert (edge.version, edge.updated_at) == (NUMBER_MAX, NUMBER_MAX)


def test_deep_and_huge_items() -> None:
    """If this fails a peer can end our process with one item."""
    # Python 3.14 has room for as many levels as the stack holds, and for the most where they are
    # only skipped: a quarter of a million in the usual 8 MB.
    deep = b"[" * 200_000 + b"]" * 200_000
    deeper = b"[" * 1_000_000 + b"]" * 1_000_000
    assert refused("json", deep) == "item"
    assert refused("json", document(deep)) == "item"
    assert refused("json", document(deep, hexsha(b"x"))) == "item"
    nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert refused("json", document(nested)) == "item"
    assert refused("string", deep) == "item"
    whole = b'{"version":1,"updated_at":1,"content_type":"binary","content":%b,"x":%b}'
    assert refused("string", whole % (deep, b"1")) == "item"
    assert refused("string", whole % (b"[]", deeper)) == "item"
    # Too large to hold a content within the limit: not even looked into.
    assert refused("json", b"\xff" * 100_000, limit=1000) == "size"
    assert refused("string", b"\xff" * 100_000, limit=1000) == "size"
    # A content over the limit.
    assert refused("json", document(b'"' + b"x" * 999 + b'"'), limit=1000) == "size"
    assert len(from_json(document(b'"' + b"x" * 998 + b'"'), limit=1000).content) == 1000
    values = b"[" + b", ".join([b"255"] * 1001) + b"]"
    assert refused("string", whole % (values, b"1"), limit=1000) == "size"
    assert refused("string", whole % (b"[" + b"0," * 9000 + b"0]", b"1"), limit=1000) == "size"
    values = b"[" + b", ".join([b"255"] * 1000) + b"]"
    assert from_string(whole % (values, b"1"), limit=1000).content == b"\xff" * 1000
    assert from_string(whole % (b"[ ]", b"1"), limit=0).content == b""


# Items in one string --------------------------------------------------------------------------


def test_a_binary_item() -> None:
    """If this fails binary contents of foreign nodes cannot be read."""
    raw = (
        b'{"object_id":"k","version":2,"updated_at":1700000000123,"priority_score":0.5,'
        b'"content_type":"binary","content_hash":"' + hexsha(b"\x00\xff{a").encode() + b'",'
        b'"content":[0,255,123,97],"state":"default","trace":null}'
    )
    expected = SyncItem("k", b"\x00\xff{a", "binary", sha(b"\x00\xff{a"), 2, 1_700_000_000_123)
    assert from_string(raw) == expected
    assert from_string(raw.decode()) == expected
    assert from_string(raw.replace(hexsha(b"\x00\xff{a").encode(), b"")) == expected
    assert from_string(raw.replace(b'"object_id":"k",', b"")) == expected
    assert from_string(raw.replace(b'"binary"', b'"Binary"')) == expected
    assert refused("string", raw.replace(b"[0,", b"[1,")) == "hash"
    assert refused("string", raw.replace(b'"k"', b'"other"')) == "item"
    assert refused("string", raw.replace(b'"binary"', b'"text"')) == "item"
    assert refused("string", raw.replace(b'"binary"', b"null")) == "item"
    for bad in (
        b"[256]",
        b"[-1]",
        b"[1.0]",
        b"[true]",
        b'["a"]',
        b"[[1]]",
        b"[1e400]",
        b"[%b]" % (b"9" * 30),
        b"[%b]" % (b"9" * 5000),
        b'"AP97YQ=="',
        b"null",
        b"{}",
        b"{",
        b"[1,]",
        b"[,1]",
        b"[1 2]",
    ):
        assert refused("string", raw.replace(b"[0,255,123,97]", bad)) == "item"


def test_long_arrays_are_read_in_pieces() -> None:
    """If this fails a content longer than a piece is cut, or nesting gets past the pieces."""
    content = bytes(range(256)) * 1000
    spelled = ", ".join(str(value) for value in content)
    whole = '{"version":1,"updated_at":1,"content":[ %s ],"content_hash":"%s"}'
    assert from_string(whole % (spelled, hexsha(content))).content == content
    ones = "1," * 32_768
    assert refused("string", whole % (f"{ones}1],[{ones}1", "")) == "item"
    assert refused("string", whole % (f"{ones}[{ones}1]", "")) == "item"
    assert refused("string", whole % (f'{ones}"{ones}1"', "")) == "item"


@pytest.mark.parametrize("key", ["", "x" * 1025, "\ud800"])
def test_keys_that_are_none(key: str) -> None:
    """If this fails a bad key from a peer looks like a mistake of the caller."""
    with pytest.raises(BadEntryError, match="key"):
        decode_foreign(key, b"{}", kind="string", payload_limit=LIMIT)


def test_what_is_published() -> None:
    """If this fails foreign nodes cannot read what we write."""
    item = SyncItem("uk.nhs.1", b"\x00\xff{", "binary", sha(b"\x00\xff{"), 4, 5, False, "site-a")
    kind, raw = encode_foreign(item)
    assert kind == "string"
    assert raw == (
        b'{"object_id":"uk.nhs.1","version":4,"updated_at":5,"content_type":"binary",'
        b'"content_hash":"' + hexsha(b"\x00\xff{").encode() + b'","content":[0,255,123],'
        b'"state":"default"}'
    )


def test_what_is_not_published() -> None:
    """If this fails the dotted layout overwrites our own, or brings a deleted key back."""
    good = SyncItem("a", b"", "binary", sha(b""), 1, 1)
    encode_foreign(good)
    for key in ("cdc", "item:a", "fsm:node", "merkle:hash:", "", "\ud800"):
        with pytest.raises(InvalidKeyError):
            encode_foreign(SyncItem(key, b"", "binary", sha(b""), 1, 1))
    with pytest.raises(ValueError, match="tombstone"):
        encode_foreign(SyncItem("a", b"", "binary", sha(b""), 1, 1, True))


NUMBER = st.integers(0, NUMBER_MAX)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
        lambda k: not reserved(k)
    ),
    st.one_of(st.binary(max_size=300), st.binary(max_size=3).map(lambda part: part * 30_000)),
    st.sampled_from(["binary", "json"]),
    NUMBER,
    NUMBER,
)
def test_round_trip(
    key: str, content: bytes, content_type: str, version: int, updated_at: int
) -> None:
    """If this fails we cannot read what we publish."""
    item = SyncItem(key, content, content_type, sha(content), version, updated_at)
    kind, raw = encode_foreign(item)
    assert decode_foreign(key, raw, kind=kind, payload_limit=LIMIT) == item
    # A JSON content may stand beside a foreign hash (see the documents above).
    other = SyncItem(key, content, "json", sha(b"other"), version, updated_at)
    kind, raw = encode_foreign(other)
    assert decode_foreign(key, raw, kind=kind, payload_limit=LIMIT) == other


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
NAMES = [
    "version",
    "timestamp",
    "updated_at",
    "payload",
    "payload_hash",
    "content",
    "content_hash",
    "content_type",
    "object_id",
]
ITEMISH = st.dictionaries(
    st.sampled_from(NAMES),
    JSON | NUMBER | st.just(HEX) | st.sampled_from(["k", "json"]) | st.lists(st.integers(-1, 256)),
)
FULL = st.fixed_dictionaries(
    {"version": NUMBER, "timestamp": NUMBER, "updated_at": NUMBER, "payload": JSON},
    optional={"payload_hash": JSON, "content": st.lists(st.integers(0, 256), max_size=9) | JSON},
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60),
        (JSON | ITEMISH | FULL).map(lambda value: json.dumps(value).encode()),
        st.tuples((ITEMISH | FULL).map(json.dumps), st.integers(0, 200), st.binary(max_size=3)).map(
            lambda cut: cut[0][: cut[1]].encode() + cut[2] + cut[0][cut[1] :].encode()
        ),
    ),
    st.sampled_from(["json", "string"]),
)
def test_anything_is_an_item_or_refused(raw: bytes | str, kind: Literal["json", "string"]) -> None:
    """If this fails some bytes of a peer end more than their own item."""
    try:
        item = decode_foreign("k", raw, kind=kind, payload_limit=200)
    except BadEntryError as error:
        assert error.reason in {"item", "range", "hash", "size"}  # noqa: PT017
        return
    assert item.key == "k"
    assert not item.deleted
    assert len(item.content) <= 200
    assert len(item.content_hash) == 32
    assert 0 <= item.version <= NUMBER_MAX
    assert 0 <= item.updated_at <= NUMBER_MAX
    if kind == "json":
        json.loads(item.content)


@settings(max_examples=100, deadline=None)
@given(JSON, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_any_document_is_found(
    value: Any, ascii_only: bool, spaced: bool, ordered: bool, served_ordered: bool
) -> None:
    """If this fails what Python programs hash is not found in what the server makes of it."""
    hashed = json.dumps(
        value,
        ensure_ascii=ascii_only,
        sort_keys=ordered,
        separators=(", ", ": ") if spaced else (",", ":"),
    )
    # A server that sorts keys loses the order of writing; only sorted spellings are then found.
    served = json.dumps(
        value, ensure_ascii=False, sort_keys=ordered and served_ordered, separators=(",", ":")
    )
    try:
        hashed_bytes, served_bytes = hashed.encode(), served.encode()
    except UnicodeEncodeError:
        return
    item = from_json(document(served_bytes, hexsha(hashed_bytes)))
    assert item.content == hashed_bytes
    assert item.content_hash == sha(hashed_bytes)


# The module -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "ERR unknown command 'JSON.GET', with args beginning with: 'a' '.' ",
        "ERR unknown command `JSON.GET`, with args beginning with: `a`, ",
        "ERR unknown command 'json.get'",
        "ERR unknown command",
        "unknown command 'JSON.GET', with args beginning with: 'a' ",
        "-ERR unknown command 'JSON.GET'",
        "10.0.0.1:6379: ERR unknown command 'JSON.GET', with args beginning with: 'a' ",
        "site-b: unknown command 'JSON.MGET', with args beginning with: 'a' ",
    ],
)
def test_the_module_is_missing(text: str) -> None:
    """If this fails a Redis without RedisJSON looks like one that fails."""
    assert is_json_module_missing(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "Existing key has wrong Redis type",
        "NOPERM this user has no permissions to run the 'json.get' command",
        "NOPERM User replica has no permissions to access one of the keys used as arguments",
        "LOADING Redis is loading the dataset in memory",
        "ERR wrong number of arguments for 'json.get' command",
        "ERR unknown command 'HELLO', with args beginning with: '3' ",
        "ERR unknown command 'FOO', with args beginning with: 'JSON.GET' ",
        "ERR unknown subcommand 'JSON.GET'",
        "ERR Path '$.unknown command' does not exist",
    ],
)
def test_a_real_failure(text: str) -> None:
    """If this fails a failure is taken for a missing module, and a key for absent."""
    assert not is_json_module_missing(text)
