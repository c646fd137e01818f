"""One writer at a time in a snapshot folder, and errors of the disk in the words of the library."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posthoc_ema.errors import SnapshotWriteError
from posthoc_ema.journal import recover
from posthoc_ema.places import Place, RemotePath


@contextmanager
def writing(folder: Place) -> Iterator[None]:
    """Exclusive access among the processes of one machine; finishes what a kill left undone.

    Elsewhere nothing can be locked, and nothing is left undone.

    Raises:
        SnapshotWriteError: For any error of the operating system inside.
    """
    with translated(folder):
        if isinstance(folder, RemotePath):
            yield
            return
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
def translated(folder: Place) -> Iterator[None]:
    """Errors of the operating system as :class:`SnapshotWriteError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SnapshotWriteError):
            raise
        remedy = "free space or make the folder writable"
        if isinstance(folder, RemotePath):
            from tempfile import gettempdir  # slow to import

            remedy = (
                f"make it writable, or free space in {gettempdir()} where files are put together"
            )
        raise SnapshotWriteError(
            error.errno,
            f"cannot write snapshots to {folder}: {error.strerror}. "
            + (
                "It is a file; give a folder"
                if isinstance(folder, Path) and folder.is_file()
                else f"Those already there are unharmed; {remedy}, and the next update tries again"
            ),
        ) from error
