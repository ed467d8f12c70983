"""Says what to install where a part of ``fsm_replication.testing`` needs more than the library."""

from __future__ import annotations

import importlib.util

__all__ = ("require",)


def require(module: str, *packages: str) -> None:
    """Check that packages are installed without importing them.

    :raises ImportError: if one is missing; it names the extra to install.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{module} needs {' and '.join(missing)}: pip install 'fsm_replication[testing]'"
        )
