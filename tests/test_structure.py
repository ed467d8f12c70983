"""The rules that hold the library together: layers, ports, public names."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

import fsm_replication

ROOT = Path(fsm_replication.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Bottom to top; a module may import what stands in its own line or further up in this list.
LAYERS = (
    ("redaction", "printable", "errors", "items", "nesting"),
    ("config", "config_change", "metrics", "log", "sentences"),
    ("ports", "heavy", "reports", "circuits", "retry", "current", "limiter"),
    (
        "abilities",
        "replies",
        "resolvers",
        "stream",
        "merkle",
        "layout",
        "redis_tree",
        "redis_dotted",
        "foreign",
        "batch",
        "letter_folding",
        "cursor",
        "transport",
    ),
    ("stores", "dead_letters"),
    ("workers",),
    ("tables",),
    ("machine", "driver", "journal", "diagram", "health", "move_log"),
    ("peer_link",),
    ("links",),
    ("drain",),
    ("engine",),
    ("servers",),
    ("testing",),
    ("demo", "bench", "cli", "__main__", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What the world outside may only be reached through, and who may reach for it.
OUTSIDE = {
    "time": {"ports"},
    "random": {"ports", "retry", "stores", "workers"},
    "socket": {"servers", "transport"},
    "subprocess": {"servers", "demo"},
    "datetime": {"cli"},
}


def part_of(path: Path) -> str:
    """Return the part of the library a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    """If this fails a lower layer knows a higher one."""
    mine = part_of(path)
    assert mine in LEVEL, f"give {mine} its place in LAYERS"
    for module in imports(path):
        if module.startswith("fsm_replication."):
            theirs = module.split(".")[1]
            assert LEVEL[theirs] <= LEVEL[mine], f"{mine} imports {theirs}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_world_outside_is_reached_through_ports(path: Path) -> None:
    """If this fails a simulator cannot replace time, chance or the network."""
    mine = part_of(path)
    if LEVEL[mine] > LEVEL["engine"]:
        return
    for module in imports(path):
        if module in OUTSIDE:
            assert mine in OUTSIDE[module], f"{mine} imports {module} directly"
        if module.startswith("transitions"):
            assert mine == "machine", "only the machine knows that library"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            if called == "asyncio.sleep":
                zero = node.args and ast.unparse(node.args[0]) == "0"
                assert mine == "ports" or zero, f"{path}: {called} instead of the clock's sleep"
            assert called not in ("asyncio.wait_for", "asyncio.timeout") or mine == "ports"
            assert called not in ("random.random", "random.uniform", "random.choice")


def modules() -> Iterator[str]:
    """Yield every module of the library."""
    yield "fsm_replication"
    for found in pkgutil.walk_packages([str(ROOT)], "fsm_replication."):
        if not found.name.endswith(("__main__", ".one")):
            yield found.name


@pytest.mark.parametrize("name", list(modules()))
def test_all_is_the_truth(name: str) -> None:
    """If this fails __all__ names what is not there, or is not sorted, or is a list."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", ())
    assert isinstance(names, tuple)
    assert len(set(names)) == len(names)
    for public in names:
        assert hasattr(module, public), public


def test_every_error_says_whether_trying_again_helps() -> None:
    """If this fails a caller cannot tell an outage from a mistake."""
    errors = importlib.import_module("fsm_replication.errors")
    for name in errors.__all__:
        thing = getattr(errors, name)
        if isinstance(thing, type):
            assert issubclass(thing, fsm_replication.ReplicationError)
            assert isinstance(thing.retryable, bool)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_has_its_place(mutant: Mutant) -> None:
    """If this fails a defect that the suite must notice can no longer be put in."""
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new
