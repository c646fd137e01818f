"""Files in the making: nothing is visible under a name before all of it is there, durably."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from posthoc_ema.places import Place, RemotePath


class Draft:
    """A file that is being written.

    A local one grows beside its place, under a hidden name. One for another file system grows in
    the folder for temporary files, because what comes first in it, digests, is known last.

    Args:
        place: Where it shall be.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._named = True
        self.shown = False
        """Whether it is in its place; a local one perhaps not durably, if publishing failed."""
        if isinstance(place, RemotePath):
            import tempfile  # slow to import, and for these files only

            descriptor, name = tempfile.mkstemp(prefix="posthoc_ema-", suffix=".tmp")
            self._temporary: str | Path = name
            self.file: IO[bytes] = os.fdopen(descriptor, "wb")
            alias = f"/proc/self/fd/{descriptor}"
            if os.path.exists(alias):  # by that name Linux finds it too: a kill leaves nothing
                os.unlink(name)
                self._temporary, self._named = alias, False
        else:
            self._temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
            self.file = open(self._temporary, "wb")  # noqa: SIM115 - closed in discard

    def publish(self, new: bool = False) -> None:
        """Show it in its place, complete and durable.

        Args:
            new: Refuse to replace another file, where the file system can tell.

        Raises:
            FileExistsError: If it would.
        """
        self.file.flush()
        if isinstance(self._place, RemotePath):
            try:
                self._place.upload(self._temporary, new)
            except FileExistsError:
                if not self._is_there(self._place):
                    raise
            return
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._temporary, self._place)
        self.shown = True
        sync_directory(self._place.parent)

    def discard(self, strict: bool = False) -> None:
        """Remove what was not published.

        Args:
            strict: Raise what closing the file raises.
        """
        try:
            self.file.close()
        except OSError:
            if strict:
                raise
        finally:
            if self._named:
                with suppress(FileNotFoundError):
                    os.unlink(self._temporary)

    def _is_there(self, place: RemotePath) -> bool:
        """Whether what is in its place is this: an answer got lost, and the client tried again."""
        with open(self._temporary, "rb") as file:
            size, beginning = file.seek(0, os.SEEK_END), b""
            file.seek(0)
            beginning = file.read(1 << 20)  # digests of all the rest are in there
        return place.fresh().stat().st_size == size and place.fetch(0, len(beginning)) == beginning


def write_atomically(place: Place, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file by what ``write`` puts into an open one, as a whole, durably."""
    draft = Draft(place)
    try:
        write(draft.file)
        draft.publish()
    finally:
        draft.discard()


def write_text_atomically(place: Place, text: str) -> None:
    """Replace a small text file as a whole, durably."""
    write_atomically(place, lambda file: file.write(text.encode()))


def sync_directory(path: Place) -> None:
    """Make renames in a folder durable (where the system can)."""
    if os.name != "posix" or isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; their renames are as durable as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
