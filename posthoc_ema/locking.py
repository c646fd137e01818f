"""One writer at a time in a snapshot folder, and errors of the disk in the words of the library."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posthoc_ema.errors import SnapshotWriteError
from posthoc_ema.journal import recover


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Exclusive access among the processes of one machine; finishes what a kill left undone.

    Raises:
        SnapshotWriteError: For any error of the operating system inside.
    """
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "ab") as lock:
            try:
                import fcntl
            except ImportError:  # no such locks on this system: one writer is assumed
                pass
            else:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError as error:  # nor has every network file system
                    if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                        raise
            recover(folder)
            yield


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """Errors of the operating system as :class:`SnapshotWriteError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SnapshotWriteError):
            raise
        raise SnapshotWriteError(
            error.errno,
            f"cannot write snapshots to {folder}: {error.strerror}. "
            + (
                "It is a file; give a folder"
                if folder.is_file()
                else "Those already there are unharmed; free space or make the folder writable, "
                "and the next update tries again"
            ),
        ) from error
