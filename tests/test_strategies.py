"""The strategies draw what they promise, and each kind of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import all_parts
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from fsm_replication.batch import BatchBuilder
from fsm_replication.errors import InvalidStateError
from fsm_replication.items import EMPTY_HASH, Stamp, SyncItem, check_key, content_hash
from fsm_replication.layout import decode_stamp, encode_stamp
from fsm_replication.machine import Machine
from fsm_replication.stream import DataDecoder, parse_entry
from fsm_replication.tables import ENGINE, LINK, TABLES, Table
from fsm_replication.testing import strategies
from fsm_replication.testing.strategies import BadEntry

# Whatever is found first will do, however large.
ANY = settings(phases=[Phase.generate], max_examples=3000, database=None, deadline=None)


class Model:
    """Has every guard and effect a table names, and does nothing."""

    def __init__(self, table: Table) -> None:
        for guard in table.guards:
            setattr(self, guard, lambda: True)
        for effect in table.effects:
            setattr(self, effect, lambda _move: None)


def machine_of(table: Table) -> Machine:
    """Return a bare machine."""
    return Machine(table, Model(table), name="m", on_move=lambda _: None, on_leave=lambda _: None)


@pytest.mark.parametrize("table", [ENGINE, LINK], ids=lambda table: table.name)
def test_machines_take_walks_and_stumble_over_missteps(table: Table) -> None:
    """If this fails a sequence that is said to be valid is not, or the other way round."""

    @given(strategies.walks(table), strategies.missteps(table))
    def check(walk: list[str], misstep: tuple[list[str], str]) -> None:
        walking = machine_of(table)
        for trigger in walk:
            assert walking.fire(trigger)
        path, wrong = misstep
        stumbling = machine_of(table)
        for trigger in path:
            assert stumbling.fire(trigger)
        before = stumbling.state
        with pytest.raises(InvalidStateError):
            stumbling.fire(wrong)
        assert stumbling.state == before

    check()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_walks_reach_every_state(table: Table) -> None:
    """If this fails a property over walks says nothing about some states."""
    reached: set[Any] = set()

    @settings(ANY, max_examples=200, derandomize=True)
    @given(strategies.walks(table))
    def check(walk: list[str]) -> None:
        state = table.initial
        for trigger in walk:
            row = table.move(state, trigger)
            assert row is not None
            state = row.dest
            reached.add(state)
        assert len(walk) <= 40

    check()
    assert reached | {table.initial} == set(table.states)


@given(st.data())
def test_items_and_tombstones_are_valid(data: st.DataObject) -> None:
    """If this fails a property fails over items that no node would have."""
    keys = strategies.item_keys()
    for item in data.draw(strategies.histories(keys=keys)):
        assert check_key(item.key)
        assert item.content_hash == content_hash(item.content)
        assert not item.deleted or (item.content, item.content_hash) == (b"", EMPTY_HASH)
    assert not data.draw(strategies.items()).deleted
    assert data.draw(strategies.tombstones()).deleted


def repeats(history: list[SyncItem]) -> bool:
    """Say whether something comes twice."""
    return len({(item.key, item.stamp) for item in history}) < len(history)


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        (strategies.histories(), repeats),
        (strategies.histories(), lambda h: any(i.deleted for i in h) and len(h) > 2),
        (strategies.stamps(), lambda stamp: stamp.updated_at > 2**52 and stamp.version < 3),
        (strategies.bad_entries(), lambda bad: bad.reason == "range"),
        (strategies.bad_entries(), lambda bad: bad.reason == "size" or b"data" not in bad.fields),
        (strategies.entries(), lambda fields: b"trace" in fields and fields[0] != b"op"),
    ],
    ids=["twice", "deletes", "large", "range", "no data", "foreign fields"],
)
def test_every_kind_is_drawn(
    strategy: st.SearchStrategy[Any], wanted: Callable[[Any], bool]
) -> None:
    """If this fails a property over these never meets the case it is for."""
    try:
        find(strategy, wanted, settings=ANY)
    except NoSuchExample:
        pytest.fail("it is never drawn")


@given(strategies.stamps())
def test_stamps_can_be_spelt(stamp: Stamp) -> None:
    """If this fails order tuples are drawn that the layout does not know."""
    item = SyncItem(
        "k", b"", stamp.content_type, stamp.content_hash, stamp.version, stamp.updated_at,
        stamp.deleted,
    )  # fmt: skip
    assert decode_stamp(encode_stamp(item)) == stamp == item.stamp


@given(strategies.items(bodies=strategies.contents()) | strategies.tombstones(), st.data())
def test_entries_are_read_as_what_they_announce(item: SyncItem, data: st.DataObject) -> None:
    """If this fails entries are drawn that readers refuse, or take for something else."""
    entry = parse_entry(data.draw(strategies.entries(st.just(item))))
    assert (entry.key, entry.deleted, entry.version) == (item.key, item.deleted, item.version)
    assert (entry.updated_at, entry.content_type) == (item.updated_at, item.content_type)
    assert DataDecoder(10_000).decode(entry.data, entry.digest) == item.content


@given(strategies.bad_entries(), strategies.entries(strategies.items(keys=st.just("fine"))))
def test_bad_entries_become_dead_letters_of_their_reason(bad: BadEntry, good: list[bytes]) -> None:
    """If this fails a reader stops at bad input, or tells another reason than it has."""
    builder = BatchBuilder(
        "p", payload_bytes=10_000, part_bytes=10_000, now_ms=lambda: strategies.SOME_TIME_MS
    )
    selection = builder.select([(b"1-0", bad.fields), (b"2-0", good)])
    made = [item for part in all_parts(builder, selection) for item in part.items]
    assert [letter.reason for letter in selection.letters] == [bad.reason]
    assert len(made) == 1, "the entry after it is read all the same"


# What is not installed ---------------------------------------------------------------------------

WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.split(".")[0] in {missing} else real(name, package)
importlib.util.find_spec = find_spec
import fsm_replication, fsm_replication.testing
for name in ("contract", "strategies", "fixtures"):
    try:
        importlib.import_module(f"fsm_replication.testing.{name}")
    except ImportError as error:
        print(error)
    else:
        print(name, "works")
"""


def needs(module: str, packages: str) -> str:
    """Return what is said where packages are missing."""
    name = f"fsm_replication.testing.{module}"
    return f"{name} needs {packages}: pip install 'fsm_replication[testing]'"


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (
            {"pytest", "_pytest", "hypothesis"},
            [
                needs("contract", "pytest and hypothesis"),
                needs("strategies", "hypothesis"),
                needs("fixtures", "pytest"),
            ],
        ),
        (
            {"pytest", "_pytest"},
            [needs("contract", "pytest"), "strategies works", needs("fixtures", "pytest")],
        ),
    ],
    ids=["neither", "no pytest"],
)
def test_the_library_needs_no_test_tools(missing: set[str], said: list[str]) -> None:
    """If this fails the library cannot be used where pytest is not installed, or says nothing."""
    script = WITHOUT.replace("{missing}", repr(missing))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == said
