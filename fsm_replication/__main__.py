"""``python -m fsm_replication`` is the same as ``fsm-replication``."""

from __future__ import annotations

from fsm_replication.cli import main

if __name__ == "__main__":
    main()
