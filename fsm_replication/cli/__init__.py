"""The command line: ``fsm-replication``."""

from __future__ import annotations

import sys

__all__ = ("main",)


def main() -> None:
    """Run the command line, or say what to install where its extra is missing."""
    try:
        from fsm_replication.cli.commands import app  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"fsm-replication needs {error.name!r}: pip install 'fsm_replication[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app()
