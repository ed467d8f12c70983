"""What docs/testing.md shows runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def files() -> dict[str, str]:
    """Return the pieces of Python by the names of their files."""
    found = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == PAGE.count("```python"), "each piece says which file it is"
    return dict(found)


@pytest.mark.server
def test_every_piece_of_python_runs(tmp_path: Path) -> None:
    """If this fails a user copies something that does not work."""
    pieces = files()
    for name, text in pieces.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    # Without plugins: none, as one for asyncio, is needed.
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "examples")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-W", "error", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        # CI tells hypothesis not to measure how long the first example takes on a busy machine.
        env=os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CI": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in pieces:
        assert not name.startswith("test_") or f"{name}::" not in done.stdout, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    # Two contracts of some forty rules each, less what their stores do not have.
    assert int(passed) > 75
    assert "failed" not in done.stdout


def test_the_page_names_every_option_of_the_contract() -> None:
    """If this fails the page tells less than there is, or more."""
    from fsm_replication.testing import strategies
    from fsm_replication.testing.contract import StoreRules, SyncEngineContract

    options = {"open_store", "new_place", "durable", "shared", "contents", "refused_item"}
    options |= {"examples", "kills", "deadline_sec"}
    assert all(hasattr(SyncEngineContract, name) for name in options)
    helpers = {"opened", "run", "with_store", "for_all", "histories", "needs_durable"}
    assert {name for name in vars(StoreRules) if name[0] != "_"} | {"kills"} == options | helpers
    for name in (*options, *strategies.__all__):
        if name not in ("BadEntry", "contents", "item_keys"):
            assert f"`{name}" in PAGE, name
