"""The lock against a second engine: flock on a file of its own beside the database.

It belongs to the open file and not to the process, so two engines in one process exclude each other
too, and the kernel drops it whatever end the process takes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from fsm_replication.errors import AlreadyRunningError

# Elsewhere SQLite's own exclusive locking mode takes the place of the lock file.
HAS_FLOCK: bool = os.name == "posix"
if HAS_FLOCK:
    import fcntl

__all__ = ("HAS_FLOCK", "already_running", "identity", "release_lock", "take_lock")

LOCK_TRIES_MAX: Final = 10

_held_handles: Final[set[int]] = set()


def _drop_locks_in_child() -> None:
    """Close what a fork has copied: a child that lives on would keep a dead engine's lock."""
    while _held_handles:
        os.close(_held_handles.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks_in_child)


def take_lock(path: str, name: str) -> int:
    """Lock the file at ``path`` and write our pid into it; returns its handle.

    :raises AlreadyRunningError: if somebody holds it; ``name`` is the file it stands for.
    :raises OSError: if it cannot be opened or locked.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(LOCK_TRIES_MAX):
        handle = os.open(path, flags, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have removed the file between the two calls: the lock of a file that
            # nobody else can see is worth nothing.
            opened = os.fstat(handle)
            if identity(path) == (opened.st_dev, opened.st_ino):
                _held_handles.add(handle)
                # The pid only serves the other's message: a full disk is no reason to stop here.
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise already_running(name, f", process {holder}" if holder.isdigit() else "") from None
        except OSError:
            os.close(handle)
            raise
    raise OSError(f"{path} is removed again and again")


def release_lock(handle: int) -> None:
    """Unlock what ``take_lock`` returned; in a forked child this does nothing."""
    # In a forked child the number may stand for another file by now.
    if handle not in _held_handles:
        return
    # The file is never removed: whoever opened it just before would then lock a file that nobody
    # else can see. Unlocking, and not only closing, frees it of copies in forked children too.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        fcntl.flock(handle, fcntl.LOCK_UN)
    _held_handles.discard(handle)
    os.close(handle)


def already_running(name: str, holder: str = "") -> AlreadyRunningError:
    """Return the error that says so; ``holder`` is added to it."""
    return AlreadyRunningError(
        f"{name} is in use by another engine{holder}; stop that one, or give this engine a cursor"
        " file of its own",
        path=name,
    )


def identity(path: str) -> tuple[int, int] | None:
    """Return which file stands at ``path`` (device, inode), or None if there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
